//! The record stream: what a checkpoint file holds and what a link carries. See `docs/image.md`.
//!
//! A stream is a [`Header`], then records, then a trailer ([`Kind::END`]). A record is 48 bytes of head and a payload:
//! CBOR of one kind's state, or raw bytes (pages, contents of files) that are written from where they lie and read into
//! where they belong. Nothing here knows what the states mean.
//!
//! An image is hostile input. Every length is bounded before anything is allocated, CBOR is bounded in depth, a kind
//! that is not known is refused by name unless marked skippable, and whatever is damaged, short or out of order is a
//! [`Problem`] with the code [`DAMAGED`], never a panic. Checksums are against accidents, not against forgery: whoever
//! can write a checkpoint can write a valid one.

mod buffer;
mod head;
mod kind;
mod known;
mod lanes;
mod pack;
mod reader;
mod verify;
mod writer;

#[cfg(test)]
mod tests;

pub use buffer::PageBuffer;
pub use head::Header;
pub use kind::Kind;
pub use lanes::Lanes;
pub use pack::{Packed, Packer};
pub use reader::{Reader, Record, Waiting};
pub use verify::{Contents, verify};
pub use writer::Writer;

use crate::ids::{FileId, MmId, SharedMemoryId};
use pod_runtime::Problem;

/// The image is not what it was when it was written.
pub const DAMAGED: &str = "E-IMAGE-DAMAGED";
/// The image is sound but this version cannot use it.
pub const VERSION: &str = "E-IMAGE-VERSION";
/// The stream could not be written (a full disk, a cut link).
pub const WRITE: &str = "E-IMAGE-WRITE";

/// Largest CBOR payload.
pub const MAX_STATE: u64 = 64 << 20;
/// Largest raw payload of one record. Nothing is allocated for it.
pub const MAX_RAW: u64 = 1 << 30;
/// Largest piece that is packed: what a reader makes room for.
pub const MAX_PACKED: u64 = 4 << 20;
/// CBOR nested deeper than this is refused.
pub const MAX_DEPTH: usize = 48;

/// What raw bytes belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Owner {
    Mm(MmId),
    /// The same, sent while the pod ran: what KEPT does not name is out of date.
    Ahead(MmId),
    SharedMemory(SharedMemoryId),
    /// Contents of an open file that has no name (deleted, memfd kept as a file) or of a long queue.
    File(FileId),
    /// Contents of a file of a storage layer, by the id of its STORAGE_ENTRY.
    Storage(u64),
    Log,
}

/// Where a run of raw bytes goes: `bytes` from `address` on (an offset where the owner is a file).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    pub owner: Owner,
    pub address: u64,
    pub bytes: u64,
}

impl Owner {
    pub fn kind(self) -> Kind {
        match self {
            Owner::Mm(_) => Kind::PAGES,
            Owner::Ahead(_) => Kind::AHEAD_PAGES,
            Owner::SharedMemory(_) => Kind::SHARED_PAGES,
            Owner::File(_) => Kind::FILE_DATA,
            Owner::Storage(_) => Kind::STORAGE_DATA,
            Owner::Log => Kind::LOG,
        }
    }

    pub fn id(self) -> u64 {
        match self {
            Owner::Mm(id) | Owner::Ahead(id) => id.0,
            Owner::SharedMemory(id) => id.0,
            Owner::File(id) => id.0,
            Owner::Storage(id) => id,
            Owner::Log => 0,
        }
    }

    pub fn from_kind(kind: Kind, id: u64) -> Option<Owner> {
        Some(match kind {
            Kind::PAGES => Owner::Mm(MmId(id)),
            Kind::AHEAD_PAGES => Owner::Ahead(MmId(id)),
            Kind::SHARED_PAGES => Owner::SharedMemory(SharedMemoryId(id)),
            Kind::FILE_DATA => Owner::File(FileId(id)),
            Kind::STORAGE_DATA => Owner::Storage(id),
            Kind::LOG => Owner::Log,
            _ => return None,
        })
    }
}

/// A damaged image, with what was wrong with it.
pub fn damaged(what: impl Into<String>) -> Problem {
    Problem::new(DAMAGED, what).fix("take another checkpoint, or copy the file again")
}
