//! Sockets, by family. A family is one file with `State`, `dump`, `restore` and, where something must happen at the last
//! moment before the pod runs, `release`.

pub mod unix;

use super::dump::FilesDump;
use pod_runtime::Result;
use serde::{Deserialize, Serialize};
use std::os::fd::{BorrowedFd, OwnedFd};

/// Which family, and its state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum State {
    Unix(unix::State),
}

/// What a family's `dump` may look at besides the socket itself.
#[derive(Debug)]
pub struct DumpContext<'a, 'v> {
    /// Inode number of the socket: what the diag interfaces know it by.
    pub inode: u64,
    /// "pid 41 nginx, fd 7": the subject of a problem.
    pub subject: &'a str,
    pub files: &'a mut FilesDump<'v>,
}

/// Reads a socket without changing it. `fd` is our copy.
pub fn dump(fd: BorrowedFd<'_>, context: &mut DumpContext<'_, '_>) -> Result<State> {
    let _ = (fd, context);
    Err(pod_runtime::Problem::new("E-SYSTEM", "sockets cannot be dumped yet"))
}

/// Makes the socket again; runs in the opener, inside the pod's namespaces. Flags of the description are set by the
/// caller.
pub fn restore(state: &State) -> Result<OwnedFd> {
    match state {
        State::Unix(state) => unix::restore(state),
    }
}

/// The last moment before the tasks go; runs in the opener.
pub fn release(state: &State, fd: BorrowedFd<'_>) -> Result<()> {
    let _ = fd;
    match state {
        State::Unix(_) => Ok(()),
    }
}
