//! What is set inside the namespaces of a pod before anything of the user's runs: clocks, host name, kernel settings.
//!
//! Settings are written through a private handle of a procfs that was just made ([`Settings`]), never by path, so
//! nothing that a file tree holds at /proc can redirect a write.

use crate::birth::Clocks;
use crate::problem::{Doing, Problem, Result};
use crate::spec::{NetworkMode, Spec};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;

/// The largest pid that every kernel accepts when a pod is restored: older ones have one limit for the whole host, and
/// 32768 is its least value.
const PORTABLE_PID_MAX: &str = "32768";

/// What the network of every pod is set to.
pub const NETWORK: [(&str, &str); 5] = [
    // An MPTCP connection cannot be rebuilt on another host: no kernel has a repair mode for it. Programs that would use
    // it by default (Go's servers since 1.24) fall back to TCP by themselves.
    ("net.mptcp.enabled", "0"),
    // Both as in docker: ping and low ports without privileges, in a network namespace of the pod's own.
    ("net.ipv4.ping_group_range", "0 2147483647"),
    ("net.ipv4.ip_unprivileged_port_start", "0"),
    // Devices that programs make lead nowhere else: none of the second that duplicate detection takes. `eth0` does, and
    // has a setting of its own.
    ("net.ipv6.conf.all.accept_dad", "0"),
    ("net.ipv6.conf.default.accept_dad", "0"),
];

/// What `/proc/self/timens_offsets` takes: seconds may be negative, nanoseconds may not.
pub fn time_offsets(clocks: Clocks) -> String {
    let line = |name: &str, nanoseconds: i128| {
        let second = 1_000_000_000;
        format!("{name} {} {}\n", nanoseconds.div_euclid(second), nanoseconds.rem_euclid(second))
    };
    line("monotonic", clocks.monotonic) + &line("boottime", clocks.boottime)
}

/// A procfs's `sys`.
#[derive(Debug)]
pub struct Settings<'a> {
    /// Root of a procfs mount.
    pub proc: &'a OwnedFd,
}

impl Settings<'_> {
    fn open(&self, name: &str, flags: OFlag) -> nix::Result<File> {
        let path = format!("sys/{}", name.replace('.', "/"));
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV);
        openat2(self.proc, path.as_str(), how).map(File::from)
    }

    fn read(&self, name: &str) -> Option<String> {
        let mut text = String::new();
        self.open(name, OFlag::O_RDONLY).ok()?.read_to_string(&mut text).ok()?;
        Some(text.trim().to_owned())
    }

    pub(crate) fn write(&self, name: &str, value: &str) -> Result<()> {
        let mut file = self.open(name, OFlag::O_WRONLY).doing(|| format!("open the setting {name}"))?;
        file.write_all(value.as_bytes()).doing(|| format!("set {name} to {value}"))
    }
}

/// Sets what a new pod's namespaces need. `outer_pid_max` is the host's.
pub fn settle(spec: &Spec, settings: &Settings<'_>, outer_pid_max: Option<&str>) -> Result<()> {
    nix::unistd::sethostname(&spec.hostname).doing(|| format!("set the host name {}", spec.hostname))?;
    if pid_max_is_ours(settings, outer_pid_max) {
        settings.write("kernel.pid_max", PORTABLE_PID_MAX)?;
    }
    if spec.network.mode == NetworkMode::Host {
        return Ok(());
    }
    crate::sys::process::loopback_up().doing(|| "bring the pod's loopback device up".into())?;
    // Absent settings are those of a kernel without the feature.
    for (name, value) in NETWORK {
        if settings.read(name).is_some_and(|now| now != value) {
            settings.write(name, value)?;
        }
    }
    Ok(())
}

/// Whether `kernel.pid_max` belongs to the pid namespace (Linux 6.14). Writing it on an older kernel would set the
/// host's.
fn pid_max_is_ours(settings: &Settings<'_>, outer: Option<&str>) -> bool {
    let Some(inner) = settings.read("kernel.pid_max") else { return false };
    if inner == PORTABLE_PID_MAX {
        return false;
    }
    outer.is_some_and(|outer| outer != inner) || kernel_at_least(6, 14)
}

/// The running kernel's version, as far as two numbers.
pub fn kernel_at_least(major: u32, minor: u32) -> bool {
    let Ok(uname) = nix::sys::utsname::uname() else { return false };
    let release = uname.release().to_string_lossy().into_owned();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (major, minor)
}

/// Clocks that this kernel cannot shift.
pub fn no_time_namespace(error: nix::Error) -> Problem {
    Problem::new("E-KERNEL", "this kernel makes no time namespace: a pod's clocks could not go on after a move")
        .fix("use a kernel with CONFIG_TIME_NS (Linux 5.6 or later)")
        .because(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_as_the_kernel_takes_them() {
        let text = time_offsets(Clocks { monotonic: -1, boottime: 1_500_000_000 });
        assert_eq!(text, "monotonic -1 999999999\nboottime 1 500000000\n");
    }

    #[test]
    fn kernel_versions() {
        assert!(kernel_at_least(4, 0));
        assert!(!kernel_at_least(99, 0));
    }
}
