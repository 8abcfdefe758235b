//! signalfd(2): only its mask; what it would read are the pending signals of the task that reads.

use pod_runtime::proc::fdinfo::FdInfo;
use pod_runtime::sys::descriptor;
use pod_runtime::{Doing, Problem, Result};
use serde::{Deserialize, Serialize};
use std::os::fd::OwnedFd;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub mask: u64,
}

pub(super) fn dump(info: &FdInfo) -> Result<State> {
    let mask = info.signal_mask();
    Ok(State { mask: mask.ok_or_else(|| Problem::new("E-SYSTEM", "the kernel does not show a signalfd's mask"))? })
}

pub(super) fn restore(state: &State) -> Result<OwnedFd> {
    let State { mask } = state;
    descriptor::signalfd(*mask).doing(|| "make a signalfd".into())
}
