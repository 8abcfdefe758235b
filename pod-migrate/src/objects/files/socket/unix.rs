//! Unix sockets: stream, datagram, seqpacket.

use pod_runtime::{Problem, Result};
use serde::{Deserialize, Serialize};
use std::os::fd::{BorrowedFd, OwnedFd};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub inode: u64,
}

pub(super) fn dump(fd: BorrowedFd<'_>, context: &mut super::DumpContext<'_, '_>) -> Result<State> {
    let _ = fd;
    Err(Problem::new("E-SYSTEM", format!("{}: unix sockets cannot be dumped yet", context.subject)))
}

pub(super) fn restore(state: &State) -> Result<OwnedFd> {
    Err(Problem::new("E-SYSTEM", format!("unix socket {} cannot be restored yet", state.inode)))
}
