//! The walk over all descriptor tables.
//!
//! Each descriptor is copied into this process (pidfd_getfd), told apart from those already seen by kcmp(2), and dumped
//! by its kind once. References that need the whole picture (epoll targets, peers of sockets) are resolved in
//! [`FilesDump::finish`].

use super::{Task, View};
use crate::ids::{FdTableId, FileId};
use crate::image::Writer;
use pod_runtime::{Problem, Result};
use std::io::Write;
use std::os::fd::OwnedFd;

/// Collects the files of a frozen pod.
#[derive(Debug)]
pub struct FilesDump<'v> {
    view: &'v View,
    /// What is not kept exactly, a line each.
    pub warnings: Vec<String>,
}

/// Contents that are too large for a record: sent as raw bytes of `Owner::File`, by offset.
#[derive(Debug)]
pub struct Contents {
    pub file: FileId,
    pub fd: OwnedFd,
    pub bytes: u64,
}

impl<'v> FilesDump<'v> {
    pub fn new(view: &'v View) -> Self {
        FilesDump { view, warnings: Vec::new() }
    }

    /// The descriptor table of this task; tasks that share a table get the same id. For a thread other than the leader
    /// only when [`FilesDump::has_own_table`] says so.
    pub fn table(&mut self, task: Task<'_>) -> Result<FdTableId> {
        let _ = (self.view, task);
        Err(Problem::new("E-SYSTEM", "descriptors cannot be dumped yet"))
    }

    /// A file that a task refers to without a descriptor: cwd, root, exe, a mapped file. `fd` is opened through
    /// /proc (`/proc/PID/cwd`, `/proc/PID/map_files/…`) with the access that the restored one needs; O_PATH for
    /// directories.
    pub fn path(&mut self, fd: OwnedFd, used_as: &str) -> Result<FileId> {
        let _ = (fd, used_as);
        Err(Problem::new("E-SYSTEM", "files cannot be dumped yet"))
    }

    /// Writes the FILE and FD_TABLE records. What comes back is to be sent after READY_FOR_PAGES.
    pub fn finish(self, w: &mut Writer<impl Write>) -> Result<Vec<Contents>> {
        let _ = w;
        Ok(Vec::new())
    }
}
