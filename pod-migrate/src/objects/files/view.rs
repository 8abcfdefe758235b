//! The pod as the dump of its files sees it: its root, its tasks, and what of it ends outside.

use super::regular::Identity;
use super::socket::tcp;
use crate::ids::{HostPid, PodPid};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::{FileStat, Mode, fstat};
use pod_runtime::proc::fdinfo;
use pod_runtime::proc::mountinfo::Mount;
use pod_runtime::proc::stat::Stat;
use pod_runtime::proc::status::Status;
use pod_runtime::rootfs::layers;
use pod_runtime::sys::descriptor;
use pod_runtime::{Doing, Result};
use serde::{Deserialize, Serialize};
use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// One task whose descriptors are read.
#[derive(Debug, Clone, Copy)]
pub struct Task<'a> {
    pub pid: PodPid,
    pub host: HostPid,
    /// Of the process, not of a thread.
    pub pidfd: BorrowedFd<'a>,
    /// For messages.
    pub comm: &'a str,
    pub stat: &'a Stat,
    pub status: &'a Status,
}

/// What belongs to the pod and lies outside of it: mostly what its monitor holds.
#[derive(Debug, Default)]
pub struct Outside {
    /// The pod's own layer over its base: a file that is in there travels, one that is not must be the same on the
    /// other host.
    pub upper: Option<PathBuf>,
    /// Pipes whose other end the monitor has, by inode number.
    pub pipes: HashMap<u64, Holder>,
    /// Terminals whose master the monitor has, by index, with a copy of the master.
    pub terminals: HashMap<u32, (Holder, OwnedFd)>,
    /// Connections that no process has a descriptor of.
    pub closed: Vec<tcp::State>,
}

/// What the monitor's end is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Holder {
    /// The pod's stdin, stdout, stderr (0, 1, 2); 0 for its terminal.
    Pod(u8),
    /// The same of a session of `pod exec`, by its number.
    Session(u64, u8),
    /// What a session left; it is read and thrown away.
    Nobody,
}

impl Outside {
    pub fn new(upper: Option<PathBuf>) -> Outside {
        Outside { upper, ..Outside::default() }
    }

    /// Adds a copy of one of the monitor's ends: of a pipe, or the master of a terminal. Others mean nothing here.
    pub fn add(&mut self, end: OwnedFd, holder: Holder) -> Result<()> {
        let stat = fstat(&end).doing(|| "look at the pod's stdio".into())?;
        if stat.st_mode & libc::S_IFMT == libc::S_IFIFO {
            self.pipes.insert(stat.st_ino, holder);
        } else if let Ok(index) = descriptor::pty_index(end.as_fd()) {
            self.terminals.insert(index, (holder, end));
        }
        Ok(())
    }
}

/// The pod, seen from this host.
#[derive(Debug)]
pub struct View {
    /// Pid 1 of the pod.
    pub init: HostPid,
    /// The pod's root directory (O_PATH).
    pub root: OwnedFd,
    pub outside: Outside,
    mounts: OnceCell<Vec<Mount>>,
    /// How many pid namespaces the pod's lies below ours.
    pub(super) depth: usize,
    /// Paths of watched inodes that were found already.
    pub(super) found_inodes: RefCell<HashMap<(u64, u64), Vec<u8>>>,
    /// Identities of base files, by device, inode, size and time of change: hashed before the freeze where possible.
    pub(super) identities: RefCell<HashMap<(u64, u64, i64, i64), Identity>>,
}

impl View {
    pub fn new(init: HostPid, outside: Outside) -> Result<View> {
        let path = format!("/proc/{init}/root");
        let root = open(path.as_str(), OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
            .doing(|| format!("open {path}"))?;
        let depth = pids(init).len().saturating_sub(1);
        let (found_inodes, identities) = (RefCell::default(), RefCell::default());
        Ok(View { init, root, outside, mounts: OnceCell::new(), depth, found_inodes, identities })
    }

    /// A path of the pod, opened as a mere reference (O_PATH), the last component not followed.
    pub fn open_path(&self, path: &[u8]) -> nix::Result<OwnedFd> {
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT);
        openat2(&self.root, Path::new(OsStr::from_bytes(path)), how)
    }

    pub fn stat(&self, path: &[u8]) -> Option<FileStat> {
        fstat(self.open_path(path).ok()?).ok()
    }

    /// The mount that a path of the pod leads to.
    pub(super) fn mount_at(&self, path: &[u8]) -> Option<i32> {
        mount_of(&self.open_path(path).ok()?).ok()
    }

    /// Whether a file lies in a base, which does not travel, and not in the pod's own layer over it.
    pub(super) fn is_of_base(&self, path: &[u8], mount: i32) -> bool {
        let Some((top, layer)) = self.mount_point(mount).zip(self.layer_of(mount)) else { return false };
        let Ok(inner) = Path::new(OsStr::from_bytes(path)).strip_prefix(top) else { return false };
        std::fs::symlink_metadata(layer.join(inner)).is_err()
    }

    /// The pod's own layer over a base that is mounted here.
    pub(super) fn layer_of(&self, mount: i32) -> Option<PathBuf> {
        let mount = self.mounts().iter().find(|m| i64::from(m.id) == i64::from(mount) && m.kind == "overlay")?;
        let layer = self.outside.upper.as_ref()?.join(layers::folder_name(&mount.mount_point));
        layer.is_dir().then_some(layer)
    }

    /// Where the pod sees this mount.
    pub(super) fn mount_point(&self, mount: i32) -> Option<&Path> {
        self.mounts().iter().find(|m| i64::from(m.id) == i64::from(mount)).map(|m| m.mount_point.as_path())
    }

    /// Where the pod has overlays.
    pub(super) fn overlays(&self) -> impl Iterator<Item = &Path> {
        self.mounts().iter().filter(|m| m.kind == "overlay").map(|m| m.mount_point.as_path())
    }

    fn mounts(&self) -> &[Mount] {
        self.mounts.get_or_init(|| {
            let text = std::fs::read(format!("/proc/{}/mountinfo", self.init)).unwrap_or_default();
            pod_runtime::proc::mountinfo::parse(&text).unwrap_or_default()
        })
    }

    /// A process of this host as the pod numbers it.
    pub fn pid_in_pod(&self, host: HostPid) -> Option<PodPid> {
        pids(host).get(self.depth).copied().map(PodPid)
    }

    /// The same for any thread, or for a process group by its leader's number (which may have ended).
    pub(super) fn any_pid_in_pod(&self, host: i32, group: bool) -> Option<PodPid> {
        let text = std::fs::read(format!("/proc/{host}/status")).ok()?;
        let status = pod_runtime::proc::status::parse(&String::from_utf8_lossy(&text));
        let numbers = if group { status.ns_group } else { status.ns_pid };
        numbers.get(self.depth).copied().map(PodPid)
    }

    /// Directories that the first process works in, where others may well work too.
    pub(super) fn working_places(&self) -> Vec<Vec<u8>> {
        let cwd = std::fs::read_link(format!("/proc/{}/cwd", self.init));
        cwd.map(|path| path.into_os_string().into_vec()).into_iter().collect()
    }
}

/// The numbers of a process in our pid namespace and in those below, down to its own.
fn pids(host: HostPid) -> Vec<i32> {
    let text = pod_runtime::proc::read(format!("/proc/{host}/status")).unwrap_or_default();
    pod_runtime::proc::status::parse(&text).ns_tgid
}

fn mount_of(fd: &OwnedFd) -> Result<i32> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))
        .doing(|| "read the mount of a file".into())?;
    Ok(fdinfo::parse(&text).mount)
}
