//! The pod as the dump of its files sees it: its root, its tasks, and what of it ends outside.

use crate::ids::{HostPid, PodPid};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use pod_runtime::{Doing, Result};
use std::os::fd::{BorrowedFd, OwnedFd};

/// One task whose descriptors are read.
#[derive(Debug, Clone, Copy)]
pub struct Task<'a> {
    pub pid: PodPid,
    pub host: HostPid,
    /// Of the process, not of a thread.
    pub pidfd: BorrowedFd<'a>,
    /// For messages.
    pub comm: &'a str,
}

/// What the pod's monitor holds of the pod's files.
#[derive(Debug, Default)]
pub struct Outside {
    /// The monitor, as this host numbers it.
    pub monitor: Option<HostPid>,
    /// Inode numbers of the pipes that are the pod's stdin, stdout and stderr.
    pub stdio: [Option<u64>; 3],
    /// Index of the pty that is the pod's terminal.
    pub console: Option<u32>,
}

/// The pod, seen from this host.
#[derive(Debug)]
pub struct View {
    /// Pid 1 of the pod.
    pub init: HostPid,
    /// The pod's root directory (O_PATH).
    pub root: OwnedFd,
    pub outside: Outside,
}

impl View {
    pub fn new(init: HostPid, outside: Outside) -> Result<View> {
        let path = format!("/proc/{init}/root");
        let root = open(path.as_str(), OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
            .doing(|| format!("open {path}"))?;
        Ok(View { init, root, outside })
    }
}
