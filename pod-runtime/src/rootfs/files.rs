//! Files that the runtime writes for a pod: its names, its resolver, its tiny init. They go into the pod's own layer
//! before that is mounted, never through a path of the mounted tree, and only where the pod has none yet, so that what
//! the pod made of them survives a move.

use super::layers::Layers;
use crate::problem::{Doing, Result};
use crate::spec::{Base, NetworkMode, Spec};
use nix::sys::stat::{Mode, SFlag, mknod};
use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Where the tiny init is in a pod. In its own layer, so that it travels with the pod.
pub const TINY_INIT: &str = "/.pod-init";

pub fn write(spec: &Spec, layers: &Layers, own: &[&Path]) -> Result<()> {
    put(layers, "/etc/hostname", &format!("{}\n", spec.hostname), 0o644)?;
    if spec.network.mode != NetworkMode::Host {
        put(layers, "/etc/hosts", &hosts(spec, &host_file("/etc/hosts")), 0o644)?;
        put(layers, "/etc/resolv.conf", &resolver(spec), 0o644)?;
    }
    if spec.process.init {
        put(layers, TINY_INIT, crate::init::TINY, 0o755)?;
    }
    if spec.root.base == Base::Host {
        own.iter().try_for_each(|folder| hide(layers, folder))?;
    }
    Ok(())
}

fn put(layers: &Layers, path: &str, content: &(impl AsRef<[u8]> + ?Sized), mode: u32) -> Result<()> {
    let Some(place) = layers.place(Path::new(path))? else { return Ok(()) };
    if fs::symlink_metadata(&place).is_ok() {
        return Ok(());
    }
    let options = OpenOptions::new().write(true).create_new(true).mode(mode).to_owned();
    let mut file = options.open(&place).doing(|| format!("make {path} for the pod"))?;
    file.write_all(content.as_ref()).doing(|| format!("write {path} for the pod"))
}

/// A whiteout: the pod does not see the runtime's own data (other pods' files among them).
fn hide(layers: &Layers, folder: &Path) -> Result<()> {
    let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    if !layers.is_below(&folder) {
        return Ok(());
    }
    let Some(place) = layers.place(&folder)? else { return Ok(()) };
    if fs::symlink_metadata(&place).is_ok() {
        return Ok(());
    }
    mknod(&place, SFlag::S_IFCHR, Mode::empty(), 0).doing(|| format!("hide {} from the pod", folder.display()))
}

/// Own names first; what the host has noted about other machines holds for its pods too.
fn hosts(spec: &Spec, of_host: &str) -> String {
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\n\
         ff00::\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n",
    );
    let own = if spec.network.addresses.is_empty() { vec!["127.0.0.1".to_owned()] } else { Vec::new() };
    let own = own.into_iter().chain(spec.network.addresses.iter().map(|address| address.ip.to_string()));
    for ip in own {
        let _ = writeln!(text, "{ip}\t{}", spec.hostname);
    }
    if spec.root.base == Base::Host {
        for line in of_host.lines().filter(|line| names_another_machine(line, &spec.hostname)) {
            let _ = writeln!(text, "{line}");
        }
    }
    text
}

fn names_another_machine(line: &str, hostname: &str) -> bool {
    let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
    let Some(Ok(ip)) = words.next().map(str::parse::<std::net::IpAddr>) else { return false };
    let special = match ip {
        std::net::IpAddr::V4(ip) => ip.is_loopback(),
        std::net::IpAddr::V6(ip) => ip.is_loopback() || ip.is_multicast() || ip.segments()[0] == 0xfe00,
    };
    !special && !words.any(|name| name == hostname)
}

/// The host's resolver, or the one asked for. A resolver on the host's loopback cannot be reached from a pod: then the
/// one that it forwards to.
fn resolver(spec: &Spec) -> String {
    let host = host_file("/etc/resolv.conf");
    let only_local = host.lines().filter_map(nameserver).all(|ip| ip.starts_with("127.") || ip == "::1");
    let host = if only_local { host_file("/run/systemd/resolve/resolv.conf") } else { host };
    if spec.network.dns.is_empty() {
        return host;
    }
    let mut text: String = spec.network.dns.iter().map(|ip| format!("nameserver {ip}\n")).collect();
    for line in host.lines().filter(|line| line.starts_with("search ") || line.starts_with("options ")) {
        let _ = writeln!(text, "{line}");
    }
    text
}

fn nameserver(line: &str) -> Option<&str> {
    line.strip_prefix("nameserver").map(str::trim)
}

fn host_file(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_about_other_machines() {
        for (line, kept) in [
            ("10.0.0.1 db", true),
            ("10.0.0.2 box # own", false),
            ("127.0.1.1 other", false),
            ("::1 localhost", false),
            ("# 10.0.0.3 x", false),
            ("fd00::1 v6", true),
            ("", false),
        ] {
            assert_eq!(names_another_machine(line, "box"), kept, "{line}");
        }
    }
}
