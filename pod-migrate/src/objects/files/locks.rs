//! File locks: flock(2), OFD locks and leases belong to the description, POSIX record locks to the descriptor table.
//!
//! They are read from fdinfo: through our copy of a descriptor the kernel shows the description's own, through the
//! task's entry in /proc also those of its table. Closing our copies drops none of them: POSIX locks go when their
//! *owner* closes a descriptor of the file, and that is another table.

use crate::ids::TaskFd;
use crate::remote::call::{Arg, RemoteCall};
use pod_runtime::proc::fdinfo::{FdInfo, LockClass};
use pod_runtime::sys::descriptor;
use pod_runtime::{Doing, Result};
use serde::{Deserialize, Serialize};
use std::os::fd::BorrowedFd;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lock {
    pub kind: LockKind,
    pub exclusive: bool,
    pub start: u64,
    /// Inclusive; `u64::MAX` is the end of the file, however long it grows.
    pub end: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LockKind {
    Flock,
    Ofd,
    Lease,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PosixLock {
    /// Any descriptor of the file in the table.
    pub fd: TaskFd,
    pub exclusive: bool,
    pub start: u64,
    pub end: u64,
}

/// 0 is "to the end of the file" for fcntl(2).
fn length(start: u64, end: u64) -> u64 {
    if end == u64::MAX { 0 } else { end.saturating_sub(start).saturating_add(1) }
}

/// Those of the description.
pub(super) fn of_description(info: &FdInfo) -> Vec<Lock> {
    let lock = |lock: pod_runtime::proc::fdinfo::Lock| {
        let kind = match lock.class {
            LockClass::Flock => LockKind::Flock,
            LockClass::Ofd => LockKind::Ofd,
            LockClass::Lease => LockKind::Lease,
            LockClass::Posix => return None,
        };
        Some(Lock { kind, exclusive: lock.exclusive, start: lock.start, end: lock.end })
    };
    info.locks().into_iter().filter_map(lock).collect()
}

/// Those of the table, from the task's own fdinfo of `fd`.
pub(super) fn of_table(fd: TaskFd, info: &FdInfo) -> Vec<PosixLock> {
    let posix = info.locks().into_iter().filter(|lock| lock.class == LockClass::Posix);
    posix.map(|lock| PosixLock { fd, exclusive: lock.exclusive, start: lock.start, end: lock.end }).collect()
}

/// In the opener, on the description itself.
pub(super) fn restore(lock: &Lock, fd: BorrowedFd<'_>) -> Result<()> {
    let Lock { kind, exclusive, start, end } = lock;
    match kind {
        LockKind::Flock => descriptor::set_flock(fd, *exclusive).doing(|| "take a flock".into()),
        LockKind::Ofd => descriptor::set_record_lock(fd, true, *exclusive, *start, length(*start, *end))
            .doing(|| "take an OFD lock".into()),
        LockKind::Lease => descriptor::set_lease(fd, if *exclusive { libc::F_WRLCK } else { libc::F_RDLCK })
            .doing(|| "take a lease".into()),
    }
}

/// What the task must call itself.
pub(super) fn posix_call(lock: &PosixLock) -> RemoteCall {
    let PosixLock { fd, exclusive, start, end } = lock;
    let bytes = descriptor::record_lock_bytes(*exclusive, *start, length(*start, *end));
    let args = vec![Arg::from(fd.0), Arg::from(libc::F_SETLK), Arg::In(bytes)];
    RemoteCall::new(format!("lock of a file range through descriptor {fd}"), libc::SYS_fcntl, args).returns(0)
}
