//! pidfd_open(2).

use crate::ids::PodPid;
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// None: the process has ended and was waited for.
    pub pid: Option<PodPid>,
    /// PIDFD_THREAD.
    pub thread: bool,
}
