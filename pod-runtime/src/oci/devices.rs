//! Devices of a container: nodes in its /dev, and the list of those that it may use.

use super::namespaces::is_procfs;
use super::wrong;
use crate::cgroup::{DeviceKind, DeviceRule, usual_devices};
use crate::problem::{Doing, Problem, Result};
use crate::rootfs::tree::{self, Tree, Want};
use crate::sys::mount;
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{Mode, SFlag, fstat, fstatat, makedev, mknodat};
use nix::unistd::{Gid, Uid, fchownat, symlinkat};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// A node: where, what, and whose.
#[derive(Debug, Clone)]
struct Node {
    path: std::path::PathBuf,
    kind: SFlag,
    number: (u64, u64),
    mode: u32,
    owner: (u32, u32),
}

fn usual() -> Vec<Node> {
    let numbers = [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
    let node = |(name, major, minor): (&str, u64, u64)| Node {
        path: Path::new("/dev").join(name),
        kind: SFlag::S_IFCHR,
        number: (major, minor),
        mode: 0o666,
        owner: (0, 0),
    };
    numbers.map(node).to_vec()
}

fn asked_for(device: &LinuxDevice) -> Result<Node> {
    let kind = match device.typ() {
        LinuxDeviceType::B => SFlag::S_IFBLK,
        LinuxDeviceType::C | LinuxDeviceType::U => SFlag::S_IFCHR,
        LinuxDeviceType::P => SFlag::S_IFIFO,
        LinuxDeviceType::A => return Err(wrong(format!("device {}: type 'a' is no node", device.path().display()))),
    };
    let number = |number: i64| {
        u64::try_from(number).map_err(|_| wrong(format!("device {}: {number} is no number", device.path().display())))
    };
    let number = if kind == SFlag::S_IFIFO { (0, 0) } else { (number(device.major())?, number(device.minor())?) };
    Ok(Node {
        path: device.path().clone(),
        kind,
        number,
        mode: device.file_mode().unwrap_or(0o666) & 0o7777,
        owner: (device.uid().unwrap_or(0), device.gid().unwrap_or(0)),
    })
}

/// Makes the usual nodes and links and those that are asked for. In a user namespace none can be made: there the host's
/// are bound.
pub fn fill(root: &Tree, devices: &[LinuxDevice], user_namespace: bool) -> Result<()> {
    let asked = devices.iter().map(asked_for).collect::<Result<Vec<_>>>()?;
    let usual = usual().into_iter().filter(|node| !asked.iter().any(|own| own.path == node.path));
    for node in usual.chain(asked.iter().cloned()) {
        let done = if user_namespace { node.bind(root) } else { node.make(root) };
        done.doing(|| format!("make the device {}", node.path.display()))?;
    }
    let dev = root.find(Path::new("/dev")).doing(|| "find /dev".into())?;
    let links = [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ];
    for (name, target) in links {
        match symlinkat(target, &dev, name) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => return Err(error).doing(|| format!("make /dev/{name}")),
        }
    }
    // The container's own ptys, not those of whoever made the image.
    let _ = nix::unistd::unlinkat(&dev, "ptmx", nix::unistd::UnlinkatFlags::NoRemoveDir);
    symlinkat("pts/ptmx", &dev, "ptmx").doing(|| "make /dev/ptmx".into())
}

impl Node {
    /// The caller has an empty umask: the mode is as it is made. To set it afterwards could follow a link that somebody
    /// else has put there.
    fn make(&self, root: &Tree) -> Result<()> {
        let doing = || "make the node".to_owned();
        let (Some(folder), Some(name)) = (self.path.parent(), self.path.file_name()) else {
            return Err(wrong(format!("'{}' is no path of a device", self.path.display())));
        };
        let folder = root.find_or_make(folder, Want::Directory)?;
        let number = makedev(self.number.0, self.number.1);
        match mknodat(&folder, name, self.kind, Mode::from_bits_truncate(self.mode), number) {
            Err(Errno::EEXIST) => {
                let found = fstatat(&folder, name, AtFlags::AT_SYMLINK_NOFOLLOW).doing(doing)?;
                let same = found.st_mode & SFlag::S_IFMT.bits() == self.kind.bits() && found.st_rdev == number;
                return if same { Ok(()) } else { Err(Errno::EEXIST).doing(doing) };
            }
            other => other.doing(doing)?,
        }
        let (uid, gid) = (Uid::from_raw(self.owner.0), Gid::from_raw(self.owner.1));
        if self.owner != (0, 0) {
            fchownat(&folder, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW).doing(doing)?;
        }
        Ok(())
    }

    /// The host's node of the same path, if it is the same device.
    fn bind(&self, root: &Tree) -> Result<()> {
        let host = tree::clone_of_host(&self.path, false)?;
        let found = fstat(&host).doing(|| "look at the host's device".into())?;
        let number = makedev(self.number.0, self.number.1);
        if found.st_mode & SFlag::S_IFMT.bits() != self.kind.bits() || found.st_rdev != number {
            return Err(Problem::new("E-ROOTFS", format!("{} of this host is another device", self.path.display())));
        }
        let onto = root.find_or_make(&self.path, Want::File)?;
        if is_procfs(onto.as_fd()) {
            return Err(wrong(format!("{} is inside /proc", self.path.display())));
        }
        mount::attach(&host, onto.as_fd()).doing(|| "bind the host's device".into())
    }
}

/// What a container may use: nothing, then what is asked for in order, then what every container has.
pub fn rules(asked: &[LinuxDeviceCgroup]) -> Result<Vec<DeviceRule>> {
    let mut rules = Vec::new();
    for rule in asked {
        let kind = match rule.typ() {
            None | Some(LinuxDeviceType::A) => DeviceKind::Any,
            Some(LinuxDeviceType::B) => DeviceKind::Block,
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => DeviceKind::Char,
            Some(LinuxDeviceType::P) => return Err(wrong("device rule of type 'p'")),
        };
        let access = rule.access().as_deref().filter(|access| !access.is_empty()).unwrap_or("rwm");
        if let Some(letter) = access.chars().find(|letter| !"rwm".contains(*letter)) {
            return Err(wrong(format!("device rule with access '{letter}'")));
        }
        let number = |number: Option<i64>| number.filter(|number| *number >= 0).unwrap_or(-1);
        rules.push(DeviceRule {
            allow: rule.allow(),
            kind,
            major: number(rule.major()),
            minor: number(rule.minor()),
            read: access.contains('r'),
            write: access.contains('w'),
            make: access.contains('m'),
        });
    }
    rules.extend(usual_devices());
    Ok(rules)
}

/// The slave of the container's terminal as its /dev/console.
pub fn console(root: &Tree, terminal: &OwnedFd) -> Result<()> {
    let doing = || "make /dev/console".to_owned();
    let onto = root.find_or_make(Path::new("/dev/console"), Want::File)?;
    let copy = mount::clone_tree(terminal.as_fd(), c"", false).doing(doing)?;
    mount::attach(&copy, onto.as_fd()).doing(doing)
}
