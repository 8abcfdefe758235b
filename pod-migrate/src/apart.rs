//! Work that is finished though the tool that began it is killed.

use pod_runtime::sys::daemon::{self, Fork};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{self, Read, Write};

/// Does `work` in a process of its own, which goes on to its end whatever becomes of this one: what is taken out of
/// the kernel to be looked at is put back. What it returns.
pub(crate) fn apart<T: Serialize + DeserializeOwned>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let (mut from, mut to) = io::pipe()?;
    match daemon::fork()? {
        Fork::Child => {
            drop(from);
            // A key pressed at the terminal of the one who dumps does not reach it.
            let _ = nix::unistd::setsid();
            let said = work().and_then(|done| to.write_all(&serde_json::to_vec(&done)?));
            daemon::exit_now(i32::from(said.is_err()));
        }
        Fork::Parent(child) => {
            drop(to);
            let mut bytes = Vec::new();
            let read = from.read_to_end(&mut bytes);
            daemon::reap(child)?;
            read?;
            serde_json::from_slice(&bytes).map_err(|_| io::Error::other("it could not be taken and put back"))
        }
    }
}
