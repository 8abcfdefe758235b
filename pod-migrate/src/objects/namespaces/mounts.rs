//! Mounts that a program made inside the pod, beside those that every pod with its spec is born with (which the birth
//! wrote down): tmpfs, whose contents are a layer of the pod's files, parts of the pod's own tree bound elsewhere, procfs.
//!
//! What cannot be made again by the same steps is refused before the freeze and by the dump alike: other file systems,
//! mounts that cover others, mounts of the birth that are gone or changed, propagation.

use super::{Namespace, permitted, within};
use crate::{Doing, Problem, Result};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, SFlag, fstat, mkdirat, mknodat};
use pod_runtime::birth;
use pod_runtime::proc::mountinfo::{self, Mount};
use pod_runtime::spec::Security;
use pod_runtime::store::Pod;
use pod_runtime::sys::mount;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::ffi::{CString, OsStr};
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The pod's mounts are not what they were when it was born, in a way that cannot be made again.
pub const INSIDE: &str = "E-MOUNT-INSIDE";

/// One mount; a later one may lie in an earlier one. Record MOUNTS has all of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inside {
    pub at: ByteBuf,
    pub what: What,
    /// MOUNT_ATTR_*.
    pub attributes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum What {
    /// A tmpfs of its own with these options.
    Memory {
        options: Vec<(String, String)>,
    },
    /// What lies at this path.
    Bind {
        from: ByteBuf,
    },
    Proc,
}

/// Name in mountinfo and MOUNT_ATTR_*.
const ATTRIBUTES: [(&str, u64); 7] = [
    ("ro", 1),
    ("nosuid", 2),
    ("nodev", 4),
    ("noexec", 8),
    ("noatime", 0x10),
    ("nodiratime", 0x80),
    ("nosymfollow", 0x20_0000),
];
const STRICT_ACCESS_TIME: u64 = 0x20;
/// Of a tmpfs: what decides what fits and who may, and its name in /proc/mounts.
const OPTIONS: [&str; 7] = ["size", "nr_inodes", "nr_blocks", "mode", "uid", "gid", "source"];

/// Those of a pod that stands still, or a look at one that runs.
pub fn dump(pod: &Pod, init: i32) -> Result<Vec<Inside>> {
    let path = birth::mounts_path(pod);
    let born = fs::read(&path).doing(|| format!("read {}", path.display()))?;
    let born: Vec<Mount> = serde_json::from_slice(&born).doing(|| format!("read {}", path.display()))?;
    let path = format!("/proc/{init}/mountinfo");
    let text = fs::read(&path).doing(|| format!("read {path}"))?;
    let now =
        mountinfo::parse(&text).ok_or_else(|| Problem::new("E-SYSTEM", format!("{path} is not as it should be")))?;
    compare(&born, &now, |mount, from| is_same(init, &mount.mount_point, from))
}

fn compare(born: &[Mount], now: &[Mount], same: impl Fn(&Mount, &Path) -> bool) -> Result<Vec<Inside>> {
    for mount in born {
        let place = mount.mount_point.display();
        match now.iter().find(|other| other.id == mount.id) {
            None => return Err(refusal(format!("what every pod has at {place} was unmounted in this one"))),
            Some(other)
                if (&other.mount_point, &other.root, &other.options)
                    != (&mount.mount_point, &mount.root, &mount.options) =>
            {
                return Err(refusal(format!("what every pod has at {place} was mounted otherwise in this one")));
            }
            Some(_) => {}
        }
    }
    let made = |mount: &&Mount| born.iter().all(|other| other.id != mount.id);
    now.iter().filter(made).map(|mount| one(mount, now, &same)).collect()
}

fn one(mount: &Mount, all: &[Mount], same: impl Fn(&Mount, &Path) -> bool) -> Result<Inside> {
    let refuse = |why: String| {
        Err(refusal(format!(
            "a program in the pod has mounted {} ({}): {why}",
            mount.mount_point.display(),
            mount.kind
        )))
    };
    if !mount.tags.is_empty() {
        return refuse("mounts propagate from or to it".into());
    }
    let hidden = |other: &&Mount| {
        other.id != mount.id && other.mount_point.starts_with(&mount.mount_point) && !descends(other, mount, all)
    };
    if let Some(other) = all.iter().find(hidden) {
        return refuse(format!("it covers the mount at {}", other.mount_point.display()));
    }
    let earlier = all.iter().take_while(|other| other.id != mount.id);
    let seen = earlier.filter(|other| (other.major, other.minor) == (mount.major, mount.minor));
    let sources = seen.filter_map(|other| Some(other.mount_point.join(mount.root.strip_prefix(&other.root).ok()?)));
    let from = sources.map(trimmed).find(|from| same(mount, from));
    let what = match (from, mount.kind.as_str()) {
        (Some(from), _) => What::Bind { from: ByteBuf::from(from.as_os_str().as_bytes()) },
        (None, "tmpfs") if mount.root == Path::new("/") && !mount.has_option("ro") => {
            What::Memory { options: options(mount) }
        }
        (None, "proc") if mount.root == Path::new("/") && mount.super_options == "rw" => What::Proc,
        (None, "tmpfs") => return refuse("only a whole tmpfs that can be written to is moved".into()),
        (None, _) => {
            return refuse(
                "a file system of this kind, or a part of the tree that has no path any more, cannot be moved".into(),
            );
        }
    };
    Ok(Inside { at: ByteBuf::from(mount.mount_point.as_os_str().as_bytes()), what, attributes: attributes(mount) })
}

fn refusal(what: String) -> Problem {
    Problem::new(INSIDE, what).fix("undo it before the move, or give the pod a volume instead (-v)")
}

/// Whether one lies in the other.
fn descends(mount: &Mount, of: &Mount, all: &[Mount]) -> bool {
    let mut at = mount;
    for _ in 0..all.len() {
        if at.parent == of.id {
            return true;
        }
        let Some(parent) = all.iter().find(|other| other.id == at.parent && other.id != at.id) else { return false };
        at = parent;
    }
    false
}

/// `join` of nothing leaves a slash behind.
fn trimmed(path: PathBuf) -> PathBuf {
    path.components().collect()
}

fn is_same(init: i32, at: &Path, from: &Path) -> bool {
    let stat = |path: &Path| {
        let inside = path.strip_prefix("/").unwrap_or(path);
        fs::symlink_metadata(Path::new(&format!("/proc/{init}/root")).join(inside))
            .map(|stat| (stat.dev(), stat.ino()))
            .ok()
    };
    stat(at).is_some() && stat(at) == stat(from)
}

fn attributes(mount: &Mount) -> u64 {
    let set = ATTRIBUTES.iter().filter(|(name, _)| mount.has_option(name)).fold(0, |all, (_, bit)| all | bit);
    let lazy = mount.has_option("relatime") || mount.has_option("noatime");
    set | if lazy { 0 } else { STRICT_ACCESS_TIME }
}

fn options(mount: &Mount) -> Vec<(String, String)> {
    let pairs = mount.super_options.split(',').filter_map(|option| option.split_once('='));
    let pairs = pairs.filter(|(key, _)| OPTIONS.contains(key)).chain([("source", mount.source.as_str())]);
    pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

/// Makes them in the mount namespace of a newborn pod. An image may ask for what its pod could do itself.
pub fn restore(init: i32, mounts: &[Inside], security: &Security) -> Result<()> {
    if mounts.is_empty() {
        return Ok(());
    }
    permitted(security, "SYS_ADMIN", "mounts made inside its pod")?;
    within(init, Namespace::Mount, || mounts.iter().try_for_each(make))
}

fn make(inside: &Inside) -> Result<()> {
    let Inside { at, what, attributes } = inside;
    let doing = || format!("mount {} as a program in the pod has", String::from_utf8_lossy(at));
    let fs = match what {
        What::Memory { options } => {
            let text = |text: &str| CString::new(text).doing(doing);
            let known = options.iter().filter(|(key, _)| OPTIONS.contains(&key.as_str()));
            let options = known.map(|(key, value)| Ok((text(key)?, text(value)?))).collect::<Result<Vec<_>>>()?;
            let options: Vec<_> = options.iter().map(|(key, value)| (key.as_c_str(), value.as_c_str())).collect();
            mount::new_filesystem(c"tmpfs", &options, 0).doing(doing)?
        }
        What::Bind { from } => mount::clone_tree(find(from).doing(doing)?.as_fd(), c"", false).doing(doing)?,
        // One of our own would show our processes.
        What::Proc => mount::clone_tree(find(b"/proc").doing(doing)?.as_fd(), c"", false).doing(doing)?,
    };
    mount::replace_attributes(fs.as_fd(), *attributes).doing(doing)?;
    let onto = match find(at) {
        Err(nix::errno::Errno::ENOENT) => make_place(at, &fs).doing(doing)?,
        found => found.doing(doing)?,
    };
    mount::attach(fs, onto.as_fd()).doing(doing)
}

/// What lies under a mount in a tmpfs is not seen, and so it is not sent.
fn make_place(at: &[u8], fs: &OwnedFd) -> nix::Result<OwnedFd> {
    let path = Path::new(OsStr::from_bytes(at));
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Err(nix::errno::Errno::ENOENT) };
    let parent = find(parent.as_os_str().as_bytes())?;
    if fstat(fs)?.st_mode & libc::S_IFMT == libc::S_IFDIR {
        mkdirat(&parent, name, Mode::from_bits_truncate(0o755))?;
    } else {
        mknodat(&parent, name, SFlag::S_IFREG, Mode::from_bits_truncate(0o644), 0)?;
    }
    find(at)
}

/// The kernel's own paths have no links in them.
fn find(path: &[u8]) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(nix::fcntl::AT_FDCWD, Path::new(OsStr::from_bytes(path)), how)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(text: &str) -> Vec<Mount> {
        mountinfo::parse(text.as_bytes()).unwrap()
    }

    const BORN: &str = "10 1 0:64 / / rw,relatime - overlay overlay rw\n11 10 0:65 / /tmp rw,nosuid - tmpfs tmpfs rw\n";

    fn made(more: &str) -> Result<Vec<Inside>> {
        compare(&table(BORN), &table(&format!("{BORN}{more}")), |_, _| true)
    }

    #[test]
    fn mounts_are_told_by_how_they_are_made() {
        assert_eq!(made("").unwrap(), []);
        let found = made(
            "12 10 0:70 / /t rw,noexec,relatime - tmpfs t rw,size=64k,inode64\n\
             13 12 0:64 /etc /t/e ro,relatime - overlay overlay rw\n14 10 0:71 / /p rw - proc proc rw\n",
        );
        let found = found.unwrap();
        let options = vec![("size".to_owned(), "64k".to_owned()), ("source".to_owned(), "t".to_owned())];
        assert_eq!((&found[0].what, found[0].attributes), (&What::Memory { options }, 8));
        assert_eq!((&found[1].what, found[1].attributes), (&What::Bind { from: ByteBuf::from("/etc") }, 1));
        assert_eq!((&found[2].what, found[2].attributes), (&What::Proc, STRICT_ACCESS_TIME));
    }

    #[test]
    fn what_cannot_be_made_again_is_refused() {
        for (mounts, why) in [
            ("12 10 8:1 / /m rw - ext4 /dev/sda1 rw\n", "of this kind"),
            ("12 10 0:70 / /tmp rw - tmpfs t rw\n", "covers the mount at /tmp"),
            ("12 10 0:70 / /m rw shared:3 - tmpfs t rw\n", "propagate"),
            ("12 10 0:70 / /m ro - tmpfs t ro\n", "whole tmpfs"),
        ] {
            let problem = made(mounts).unwrap_err();
            assert_eq!(problem.code(), INSIDE);
            assert!(problem.chain().contains(why), "{}", problem.chain());
        }
        let gone = compare(&table(BORN), &table(BORN)[..1], |_, _| true).unwrap_err();
        assert!(gone.chain().contains("at /tmp was unmounted"), "{}", gone.chain());
        let remounted = table(&BORN.replace("rw,nosuid", "rw"));
        assert!(compare(&table(BORN), &remounted, |_, _| true).unwrap_err().chain().contains("otherwise"));
    }
}
