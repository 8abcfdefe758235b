//! inotify(7): watches from fdinfo, resolved to paths inside the pod.

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub watches: Vec<Watch>,
    /// There were events in the queue: the reader is told that some were lost (IN_Q_OVERFLOW is what it must handle
    /// anyway), because the kernel has no way to put them back.
    pub events_lost: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Watch {
    pub wd: i32,
    pub path: ByteBuf,
    pub mask: u32,
}
