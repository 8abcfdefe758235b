//! Seccomp filters: a profile (the [`usual`] one, or a text in docker's or OCI's form, [`profile`]) and the compiler
//! that makes the kernel's program of it ([`compile`]). No library is asked: filters are dumped and restored as raw
//! programs anyway, and a profile must mean the same on every host.

mod compile;
mod i386;
mod profile;
pub mod syscalls;
mod usual;

use super::capabilities::Set;
use crate::problem::{Doing, Result};
use crate::spec::{self, Spec};
use crate::sys::process::{self, Instruction};
use compile::Also;
use nix::libc;
use oci_spec::runtime::{Arch, LinuxSeccomp, LinuxSeccompFilterFlag};
use profile::Action;
use std::os::fd::OwnedFd;

/// The filter of a pod's processes; `None` when it has none.
pub fn program(spec: &Spec) -> Result<Option<Vec<Instruction>>> {
    if spec.security.privileged {
        return Ok(None);
    }
    let capabilities = Set::parse(&spec.security.capabilities)?;
    let profile = match &spec.security.seccomp {
        spec::Seccomp::Unconfined => return Ok(None),
        spec::Seccomp::Default => usual::profile(capabilities),
        spec::Seccomp::Profile(text) => profile::parse(text, capabilities)?,
    };
    compile::compile(&profile).map(Some)
}

/// A filter as an OCI configuration asks for it: with flags, for several architectures, perhaps with a listener.
#[derive(Debug)]
pub struct Filter {
    program: Vec<Instruction>,
    flags: u64,
    /// Whether somebody outside decides about some calls.
    pub notifies: bool,
}

impl Filter {
    pub fn of_oci(oci: &LinuxSeccomp) -> Result<Filter> {
        let profile = profile::from_oci(oci)?;
        if profile.otherwise == Action::Notify {
            return Err(profile::wrong("has SCMP_ACT_NOTIFY as its default action, which cannot be used"));
        }
        let notified = profile.rules.iter().filter(|rule| rule.action == Action::Notify);
        let mut notified = notified.flat_map(|rule| &rule.names).peekable();
        let notifies = notified.peek().is_some();
        // With it the listener's descriptor is handed over, after the filter is there.
        if notified.any(|name| name == "sendmsg") {
            return Err(profile::wrong("has SCMP_ACT_NOTIFY for sendmsg, which cannot be used"));
        }
        let listed = |arch: Arch| oci.architectures().iter().flatten().any(|listed| *listed == arch);
        let also = Also { i386: listed(Arch::ScmpArchX86), x32: listed(Arch::ScmpArchX32) };
        let flag = |flag: &LinuxSeccompFilterFlag| match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
            // The process has one thread; with a listener the kernel takes it only together with another flag.
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => 0,
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv if notifies => 1 << 5,
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
        };
        let flags = oci.flags().iter().flatten().map(flag).fold(0, |all, flag| all | flag);
        Ok(Filter { program: compile::compile_for(&profile, also)?, flags, notifies })
    }

    pub fn install(&self) -> Result<()> {
        process::install_filter_with(&self.program, self.flags).doing(|| "install the seccomp filter".into()).map(drop)
    }

    /// The descriptor is the listener's.
    pub fn install_with_listener(&self) -> Result<OwnedFd> {
        let flags = self.flags | libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
        let fd = process::install_filter_with(&self.program, flags).doing(|| "install the seccomp filter".into())?;
        Ok(process::received(fd as i32))
    }
}
