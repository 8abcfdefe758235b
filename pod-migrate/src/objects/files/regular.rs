//! Files and directories with a path: on the pod's overlay, its volumes, its tmpfs, /proc and /sys; deleted ones too.

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Absolute, as the pod sees it; bytes because names need not be UTF-8.
    pub path: ByteBuf,
    /// S_IFMT and permissions.
    pub mode: u32,
    pub bytes: u64,
    pub existence: Existence,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Existence {
    /// It is there. `identity` for files of the base, which does not travel.
    Named { identity: Option<Identity> },
    /// It is below /proc and can only be opened when the processes exist.
    Proc,
    /// Unlinked; the path is what it was.
    Deleted(Deleted),
}

/// What a file of the base must be on the other host too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Identity {
    BuildId { bytes: u64, id: ByteBuf },
    Contents { bytes: u64, blake3: ByteBuf },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Deleted {
    /// Descriptions of one inode share this; the first of them has the contents.
    pub inode: u64,
    /// Another name that the inode still has.
    pub other_name: Option<ByteBuf>,
    pub uid: u32,
    pub gid: u32,
    /// With the first description of a small file. Others come as raw bytes, or (not the first) from the first.
    pub contents: Option<ByteBuf>,
    /// Whether this is the first description of the inode.
    pub first: bool,
}
