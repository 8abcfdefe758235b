//! Files that travel with the pod: its upper layer, volumes that are not shared, the contents of its tmpfs mounts.
//!
//! A [`Layer`] is a tree of files. It is read by [`walk`] while the pod runs (a first pass) and once more when it is
//! frozen: only what changed since then is sent again ([`Inventory`]), of a file that changed only its changed blocks where
//! the other side is a host and not an image. [`Sending`] says when which layer is read. It is written by [`Writing`], which
//! believes nothing: a path of an image stays below the layer's root, no link is ever followed, and what cannot be made is
//! a problem.
//!
//! What travels of a file: contents with their holes, type, permissions, owner, times to the nanosecond, extended
//! attributes (ACLs and capabilities are such), hard links within the layer, device numbers, the whiteouts and opaque
//! marks of the overlay. What does not: inode numbers, the change time, attributes of `chattr`.

mod layers;
mod mounts;
mod patch;
mod sending;
pub mod volumes;
mod walk;
mod write;

#[cfg(test)]
mod tests;

pub use layers::{Layer, Place, layers_at_rest, layers_in_memory, open_memory};
pub use mounts::{Mount, mounts};
pub use sending::Sending;
pub use walk::{Inventory, Manner, Mapped, Sent, Tree, walk};
pub use write::{Arrived, Writing, receive_layer};

use crate::image::damaged;
use pod_runtime::Result;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

/// A file of a layer could not be read or made.
pub const STORAGE: &str = "E-STORAGE";
/// An image names a path outside of its layer.
pub const PATH: &str = "E-IMAGE-PATH";

/// Longer paths are refused: the kernel could not open them in one piece.
const MOST_PATH: usize = 4095;

/// One file, directory, link or node. A STORAGE_ENTRY record; its id is that of the STORAGE_DATA that follow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Below the layer's root, without a leading slash; empty is the root itself.
    pub path: ByteBuf,
    pub node: Node,
    pub meta: Option<Meta>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Node {
    Directory,
    /// What STORAGE_DATA does not cover are holes.
    File {
        size: u64,
    },
    /// In a delta between two hosts: a file that came before under this path. What STORAGE_DATA does not cover is as it was.
    Patch {
        size: u64,
    },
    Symlink(ByteBuf),
    /// Another name of a file that came before in this layer.
    HardLink(ByteBuf),
    Character {
        major: u64,
        minor: u64,
    },
    Block {
        major: u64,
        minor: u64,
    },
    Fifo,
    Socket,
    /// In a delta: what was sent under this path is gone.
    Removed,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// Permission bits, 07777.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds and nanoseconds.
    pub accessed: (i64, i64),
    pub modified: (i64, i64),
    pub attributes: Vec<(ByteBuf, ByteBuf)>,
}

/// Only what can be a path below a root passes: no empty part, no `.` or `..`, not absolute, no NUL.
fn check_path(path: &[u8]) -> Result<()> {
    let bad =
        || Err(damaged(format!("the path '{}' leads out of its layer", String::from_utf8_lossy(path))).recode(PATH));
    if path.is_empty() {
        return Ok(());
    }
    if path.len() > MOST_PATH || path.contains(&0) {
        return bad();
    }
    for part in path.split(|b| *b == b'/') {
        if part.is_empty() || part == b"." || part == b".." || part.len() > 255 {
            return bad();
        }
    }
    Ok(())
}

trait Recode {
    fn recode(self, code: &'static str) -> Self;
}

impl Recode for pod_runtime::Problem {
    fn recode(self, code: &'static str) -> Self {
        pod_runtime::Problem::new(code, self.what().to_owned()).fix("do not use this image: it was made to do harm")
    }
}

fn lossy(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}
