//! epoll(7): registrations are read from fdinfo and made again by the opener under the same descriptor number.

use crate::ids::{FileId, TaskFd};
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub targets: Vec<Target>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Target {
    /// The number at the time of EPOLL_CTL_ADD: part of the key, even when it was closed since.
    pub fd: TaskFd,
    pub file: FileId,
    pub events: u32,
    pub data: u64,
}
