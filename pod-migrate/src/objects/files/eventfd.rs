//! eventfd(2). Everything is in its fdinfo.

use pod_runtime::proc::fdinfo::FdInfo;
use pod_runtime::sys::descriptor;
use pod_runtime::{Doing, Problem, Result};
use serde::{Deserialize, Serialize};
use std::os::fd::OwnedFd;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub count: u64,
    pub semaphore: bool,
}

pub(super) fn dump(info: &FdInfo) -> Result<State> {
    let (count, semaphore) =
        info.eventfd().ok_or_else(|| Problem::new("E-SYSTEM", "the kernel does not show the count of an eventfd"))?;
    Ok(State { count, semaphore })
}

pub(super) fn restore(state: &State) -> Result<OwnedFd> {
    let State { count, semaphore } = state;
    let fd = descriptor::eventfd(*semaphore).doing(|| "make an eventfd".into())?;
    if *count > 0 {
        nix::unistd::write(&fd, &count.to_ne_bytes()).doing(|| "set the count of an eventfd".into())?;
    }
    Ok(fd)
}
