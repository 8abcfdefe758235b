//! The opener: a process of ours inside the pod's namespaces that opens every file and holds it until each task has its
//! copies.
//!
//! Order of a restore:
//! 1. [`Opener::start`] before the tree is made: everything that needs no other process is open then, terminals too, so
//!    that session leaders can take theirs (see [`super::Files::controlling_terminals`]).
//! 2. The tree is made. [`Opener::connect`]: what refers to processes or to other files (pidfds, /proc files, epoll
//!    registrations, queued messages, owners).
//! 3. Each task takes its descriptors: `pidfd_open(pid)`, `pidfd_getfd(n)`, `dup3`. Contents arrive as raw bytes.
//! 4. [`task_work`] in each task; [`Opener::release`] when nothing can fail any more; [`Opener::finish`].
//!
//! Dropping an opener kills its process; everything that only it held goes with it.

use super::Files;
use crate::ids::{FdTableId, FileId, PodPid};
use crate::remote::call::RemoteCall;
use pod_runtime::cgroup::Cgroup;
use pod_runtime::{Problem, Result};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

/// What the pod's new monitor gets: its side of what was the old monitor's.
#[derive(Debug, Default)]
pub struct External {
    pub stdin: Option<OwnedFd>,
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
    /// Master of the pod's terminal.
    pub console: Option<OwnedFd>,
}

#[derive(Debug)]
pub struct Opener {
    pid: PodPid,
    numbers: BTreeMap<FileId, i32>,
}

impl Opener {
    /// `free_pid` is one that no restored task has.
    pub fn start(init: &OwnedFd, cgroup: &Cgroup, free_pid: PodPid, files: &Files) -> Result<Opener> {
        let _ = (init, cgroup, free_pid, files);
        Err(Problem::new("E-SYSTEM", "files cannot be opened yet"))
    }

    /// Its pid in the pod: what tasks call pidfd_open with.
    pub fn pid(&self) -> PodPid {
        self.pid
    }

    /// Under which number the opener holds each file.
    pub fn numbers(&self) -> &BTreeMap<FileId, i32> {
        &self.numbers
    }

    /// After all processes of the pod exist.
    pub fn connect(&mut self) -> Result<()> {
        Ok(())
    }

    /// A copy of a file for the engine.
    pub fn take(&self, file: FileId) -> Result<OwnedFd> {
        Err(Problem::new("E-SYSTEM", format!("file {file} is not open")))
    }

    /// A writable descriptor of a file whose contents come as raw bytes.
    pub fn contents(&self, file: FileId) -> Result<OwnedFd> {
        self.take(file)
    }

    /// What the new monitor gets. Once.
    pub fn external(&mut self) -> Result<External> {
        Ok(External::default())
    }

    /// The last moment before the tasks go: connections leave repair mode, seals are set.
    pub fn release(&mut self) -> Result<()> {
        Ok(())
    }

    /// Ends the opener's process and reaps it.
    pub fn finish(self) -> Result<()> {
        Ok(())
    }
}

/// Calls that the task must make itself after its descriptors are in place: POSIX record locks (they belong to the
/// table: once for each table), and the foreground group for session leaders.
pub fn task_work(files: &Files, pid: PodPid, table: FdTableId) -> Vec<RemoteCall> {
    let _ = (files, pid, table);
    Vec::new()
}
