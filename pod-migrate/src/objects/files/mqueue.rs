//! Open POSIX message queues. What is in them is kept by [`crate::objects::namespaces::mqueue`], as they live on without
//! being open; a description refers to its queue by name. One that was removed has a name of ours until all are open.

use super::File;
use crate::objects::namespaces::mqueue as queues;
use pod_runtime::sys::mqueue;
use pod_runtime::{Doing, Result};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::ffi::CString;
use std::os::fd::{BorrowedFd, OwnedFd};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Without the slash.
    pub name: ByteBuf,
    pub removed: bool,
}

/// `link` is the kernel's name of the file; `number` tells removed queues apart.
pub(super) fn dump(fd: BorrowedFd<'_>, link: &[u8], number: u64, subject: &str) -> Result<State> {
    queues::refuse(fd, subject)?;
    let removed = nix::sys::stat::fstat(fd).doing(|| format!("{subject}: look at it"))?.st_nlink == 0;
    let name = match removed {
        true => format!(".removed-{number}").into_bytes(),
        false => link.rsplit(|byte| *byte == b'/').next().unwrap_or_default().to_vec(),
    };
    Ok(State { name: ByteBuf::from(name), removed })
}

pub(super) fn restore(state: &State, file: &File) -> Result<OwnedFd> {
    let shown = String::from_utf8_lossy(&state.name);
    let name = CString::new(state.name.to_vec()).doing(|| format!("open message queue /{shown}"))?;
    mqueue::open(&name, file.flags & libc::O_ACCMODE).doing(|| format!("open message queue /{shown}"))
}

/// When all are open.
pub(super) fn remove<'a>(states: impl Iterator<Item = &'a State>) -> Result<()> {
    let mut names: Vec<&[u8]> = states.filter(|state| state.removed).map(|state| &state.name[..]).collect();
    names.sort_unstable();
    names.dedup();
    names.into_iter().try_for_each(|name| {
        let shown = String::from_utf8_lossy(name);
        let name = CString::new(name).doing(|| format!("remove message queue /{shown}"))?;
        mqueue::unlink(&name).doing(|| format!("remove message queue /{shown}"))
    })
}
