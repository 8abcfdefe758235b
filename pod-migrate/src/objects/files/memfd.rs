//! Files made by memfd_create(2).

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Descriptions of one memfd share this; the first of them has the contents.
    pub inode: u64,
    pub first: bool,
    pub name: ByteBuf,
    pub bytes: u64,
    /// MFD_HUGETLB and its size bits; 0 is ordinary pages.
    pub huge: u32,
    /// F_SEAL_*.
    pub seals: u32,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// For small or sealed ones; others come as raw bytes.
    pub contents: Option<ByteBuf>,
}
