//! Making the monitor.

use super::{Launch, Started};
use crate::problem::{Problem, Result};

/// Forks the monitor and returns when the pod runs, or with the problem that kept it from it.
pub fn spawn(launch: Launch) -> Result<Started> {
    Err(Problem::new("E-MONITOR", format!("pod {} cannot be started yet", launch.pod.id())))
}
