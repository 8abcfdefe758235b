//! Address spaces: the maps of a process, what backs each, and the bytes that nobody else keeps.
//!
//! One [`MmState`] record an address space; one [`SharedMemoryState`] a piece of memory that has no name to be opened by
//! and that several spaces or descriptors share (shared anonymous memory, memfd, SysV segments, deleted files): its
//! bytes are sent once. Pages follow as page runs, by [`MmId`] and address or by [`SharedMemoryId`] and offset. Private
//! pages of large processes come ahead, while the pod runs ([`tracking`]); a [`Kept`] record says which of them hold. On their
//! way to a host so does shared memory ([`shared`]), to be put right in the end; and what is left of private memory may come when
//! the pod runs there ([`behind`]). Pages
//! that processes share since a fork come once ([`forked`]), before all others; an [`Inherited`] record says who has them too.

pub mod areas;
pub mod behind;
pub mod dump;
pub mod forked;
mod pagemap;
mod pages;
pub mod ranges;
pub mod shared;
mod sysv;
pub mod tracking;

pub use pages::Contents;

use crate::ids::{FileId, MmId, SharedMemoryId};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::collections::BTreeMap;

/// So many pieces of shared memory go ahead: each is a descriptor, and all of them go into one message.
pub const MOST_AHEAD: usize = 64;

/// What went ahead of a pod while it ran.
#[derive(Default)]
pub struct WentAhead {
    pub private: Option<tracking::Tracker>,
    pub shared: shared::Sharing,
    /// What is left of private memory may come behind the pod.
    pub may_follow: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MmState {
    pub id: MmId,
    /// By address; they never overlap.
    pub maps: Vec<Map>,
    pub layout: Layout,
    pub auxv: ByteBuf,
    /// What /proc/self/exe names.
    pub exe: FileId,
    /// mlockall(MCL_FUTURE), and MCL_ONFAULT with it.
    pub lock_future: bool,
    #[serde(default)]
    pub lock_future_on_fault: bool,
}

/// State of PLACES: plain private anonymous maps of a space while its pod runs, in order. They may be others by the time
/// it has stopped: MM says what there is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Places {
    /// First address, and the one after the last.
    pub ranges: Vec<(u64, u64)>,
}

/// State of KEPT: of the pages that came ahead for this space, those that still hold. In order; several records may be
/// needed for a space.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// First address, and the one after the last.
    pub ranges: Vec<(u64, u64)>,
}

/// State of INHERITED: pages that this space has from others since a fork, by frames that are the same. In order; several
/// records may be needed for a space. The others' came ahead, and are kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inherited {
    /// Id of the other space, first address, and the one after the last.
    pub ranges: Vec<(u64, u64, u64)>,
}

/// State of SAME: pages whose bytes are those of others, which came as PAGES or SHARED_PAGES. In the order of their
/// places, over all such records; to be copied when all raw bytes are where they belong.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Same {
    pub pages: Vec<Alike>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alike {
    /// Number of the raw kind, id of the owner, address.
    pub to: (u16, u64, u64),
    pub from: (u16, u64, u64),
    pub bytes: u64,
}

/// What only the process itself is told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Told {
    /// The policies of maps that have one, by their first address.
    pub policies: BTreeMap<u64, Policy>,
    /// The end of its heap.
    pub brk: u64,
    pub lock_future: bool,
    pub lock_future_on_fault: bool,
}

/// What prctl(PR_SET_MM_MAP) sets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    pub start_code: u64,
    pub end_code: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub brk: u64,
    pub start_stack: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
}

/// One line of /proc/PID/maps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Map {
    pub start: u64,
    pub end: u64,
    /// PROT_*.
    pub protection: u32,
    pub shared: bool,
    pub grows_down: bool,
    pub locked: bool,
    /// Only pages that are there are locked (MLOCK_ONFAULT).
    #[serde(default)]
    pub lock_on_fault: bool,
    /// Ranges that end in SIGSEGV when they are touched (MADV_GUARD_INSTALL).
    #[serde(default)]
    pub guards: Vec<(u64, u64)>,
    /// MAP_DROPPABLE: the kernel may make it zeros at any time, and so do we, for what lies there must not be in two
    /// places (the random generator of a C library).
    #[serde(default)]
    pub droppable: bool,
    /// mseal(2).
    #[serde(default)]
    pub sealed: bool,
    pub no_reserve: bool,
    /// MADV_* that are in force: MADV_DONTFORK, MADV_WIPEONFORK, MADV_MERGEABLE, MADV_(NO)HUGEPAGE, MADV_DONTDUMP, …
    pub advice: Vec<i32>,
    pub protection_key: u32,
    /// Bytes of a huge page (MAP_HUGETLB); 0 is ordinary pages.
    #[serde(default)]
    pub huge: u64,
    /// mbind(2): mode with flags, and the nodes, unless it is the default.
    #[serde(default)]
    pub policy: Option<Policy>,
    pub backing: Backing,
}

/// Of NUMA: mode with flags, and a bit for each node.
pub type Policy = (i32, ByteBuf);

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Backing {
    Anonymous,
    /// Offset in bytes.
    File {
        file: FileId,
        offset: u64,
    },
    /// Memory of a [`SharedMemoryState`] that no descriptor record holds.
    Shared {
        memory: SharedMemoryId,
        offset: u64,
    },
    Vdso,
    /// vvar and its relatives: mapped by the kernel, never copied.
    Vvar,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SharedMemoryState {
    pub id: SharedMemoryId,
    pub bytes: u64,
    pub kind: SharedMemoryKind,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum SharedMemoryKind {
    /// mmap(MAP_SHARED | MAP_ANONYMOUS).
    Anonymous,
    /// The contents of a file that the FILE record of this id makes again (memfd, deleted file): filled through it.
    Contents(FileId),
    /// A SysV segment.
    SysV { shmid: i32, key: i32, mode: u32, uid: u32, gid: u32, cuid: u32, cgid: u32, removed: bool },
}
