//! Where the root is moved and not pivoted to (`--no-pivot`), the host's mounts stay in the mount namespace, below it.
//!
//! Nothing reaches them by a path, but the kernel lets whoever makes a user namespace mount a procfs or a sysfs without
//! what masks the container's when there is one in the mount namespace that nothing covers. So those of the host go first.

use crate::problem::{Doing, Problem, Result};
use crate::proc::mountinfo::{self, Mount};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::Mode;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};

/// Of looks at the list: each takes the topmost of those that lie over each other.
const MOST: usize = 64;

/// Takes every procfs and sysfs that is not below `root` out of the caller's mount namespace, which is the container's and
/// has no way back to the host's; lays an empty folder over those that it may not take out.
pub fn kernels_files(root: &OwnedFd) -> Result<()> {
    // Of a procfs that is held: the one at /proc is among the first to go.
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let own = open("/proc/self", flags, Mode::empty()).doing(|| "open /proc".into())?;
    let root = mount_id(&own, root)?;
    let mut covered: Vec<u32> = Vec::new();
    for _ in 0..MOST {
        let mounts = mounts(&own)?;
        let left: Vec<&Mount> = mounts
            .iter()
            .rev()
            .filter(|mount| mount.kind == "proc" || mount.kind == "sysfs")
            .filter(|mount| !covered.contains(&mount.id) && !is_below(&mounts, mount, root))
            .collect();
        if left.is_empty() {
            return Ok(());
        }
        for mount in left {
            take_out(mount, &mut covered)?;
        }
    }
    Err(Problem::new("E-SYSTEM", "the host's procfs and sysfs cannot be kept from the container without pivot_root"))
}

fn take_out(found: &Mount, covered: &mut Vec<u32>) -> Result<()> {
    let at = &found.mount_point;
    let doing = || format!("keep the host's {} from the container", at.display());
    match umount2(at, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) => return Ok(()),
        // It is under something that has no way to it.
        Err(Errno::ENOENT) => {}
        // Came with a user namespace that has more rights: it is locked to its place.
        Err(Errno::EINVAL | Errno::EPERM) => {
            let none: Option<&str> = None;
            match mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::MS_RDONLY, none) {
                Ok(()) | Err(Errno::ENOENT | Errno::ENOTDIR) => {}
                Err(error) => return Err(error).doing(doing),
            }
        }
        Err(error) => return Err(error).doing(doing),
    }
    covered.push(found.id);
    Ok(())
}

fn read(own: &OwnedFd, name: &str) -> Result<Vec<u8>> {
    let doing = || "read the mounts of the container".to_owned();
    let file = openat(own, name, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).doing(doing)?;
    let mut text = Vec::new();
    File::from(file).read_to_end(&mut text).doing(doing)?;
    Ok(text)
}

fn mounts(own: &OwnedFd) -> Result<Vec<Mount>> {
    mountinfo::parse(&read(own, "mountinfo")?)
        .ok_or_else(|| Problem::new("E-SYSTEM", "/proc/self/mountinfo is not as the kernel writes it"))
}

fn mount_id(own: &OwnedFd, of: &OwnedFd) -> Result<u32> {
    let text = read(own, &format!("fdinfo/{}", of.as_raw_fd()))?;
    let id = String::from_utf8_lossy(&text).lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok());
    id.ok_or_else(|| Problem::new("E-SYSTEM", "the mount of the container's root has no number"))
}

fn is_below(mounts: &[Mount], mount: &Mount, root: u32) -> bool {
    let (mut id, mut parent) = (mount.id, mount.parent);
    // No chain is longer than the list.
    for _ in 0..=mounts.len() {
        if id == root {
            return true;
        }
        let Some(above) = mounts.iter().find(|mount| mount.id == parent && mount.id != id) else { return false };
        (id, parent) = (above.id, above.parent);
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_below_a_mount() {
        let text = b"1 0 0:1 / / rw - ext4 x rw\n2 1 0:2 / /proc rw - proc proc rw\n3 1 0:1 /b /b rw - ext4 x rw\n\
            4 3 0:4 / /b/proc rw - proc proc rw\n5 4 0:4 /sys /b/proc/sys ro - proc proc rw\n6 6 0:9 / / rw - ext4 x rw\n";
        let mounts = mountinfo::parse(text).unwrap();
        let below: Vec<u32> = mounts.iter().filter(|mount| is_below(&mounts, mount, 3)).map(|mount| mount.id).collect();
        assert_eq!(below, [3, 4, 5]);
    }
}
