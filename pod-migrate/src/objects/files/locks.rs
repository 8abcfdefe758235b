//! File locks: flock(2) and OFD locks belong to the description, POSIX record locks to the descriptor table.

use crate::ids::TaskFd;
use serde::{Deserialize, Serialize};

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
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PosixLock {
    /// Any descriptor of the file in the table.
    pub fd: TaskFd,
    pub exclusive: bool,
    pub start: u64,
    pub end: u64,
}
