//! The kinds of records by number and name.
//!
//! Numbers are for ever: a kind that is no longer written keeps its number. A reader refuses a kind that it does not
//! know by this number, unless the writer marked the record skippable.

use serde::{Deserialize, Serialize};
use std::fmt;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Kind(pub u16);

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $number:literal,)*) => {
        impl Kind {
            $($(#[$doc])* pub const $name: Kind = Kind($number);)*

            /// The kind's name in lower case, or `None` for one that this version does not know.
            pub fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($number => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

kinds! {
    /// Filler: aligns what follows, or keeps a silent link awake. Never handed to the caller.
    PAD = 1,
    /// The pod's spec, clock readings, who wrote this and when.
    SPEC = 2,
    /// One layer of files begins (the upper layer, a volume, a tmpfs).
    STORAGE = 3,
    /// One file, directory, link or node of a layer.
    STORAGE_ENTRY = 4,
    /// Raw bytes of a file of a layer; the position is the offset.
    STORAGE_DATA = 5,
    /// The layer that began last ends.
    STORAGE_END = 6,
    /// A further pass over the layers follows: only what changed.
    STORAGE_DELTA = 7,
    /// The instant of the freeze: the pod's clocks.
    MOMENT = 8,
    /// The tree of processes and threads with sessions and groups.
    TREE = 16,
    /// One process: its threads' registers, signals, credentials, limits, timers.
    PROCESS = 17,
    /// One address space: its maps.
    MM = 18,
    /// One descriptor table.
    FD_TABLE = 19,
    /// One open file description.
    FILE = 20,
    /// One piece of shared memory.
    SHARED_MEMORY = 21,
    /// SysV queues, semaphores and segments, POSIX queues.
    IPC = 22,
    /// Raw bytes of an open deleted file or a queue too large for its FILE record.
    FILE_DATA = 23,
    /// What the network knows besides sockets: held frames, addresses added inside.
    NETWORK = 24,
    /// Raw bytes of one run of pages of an address space.
    PAGES = 32,
    /// Raw bytes of one run of pages of a shared memory object.
    SHARED_PAGES = 33,
    /// Everything but pages has been said.
    READY_FOR_PAGES = 34,
    /// Lines of the pod's log.
    LOG = 40,
    /// The trailer: number of records and the digest of the stream.
    END = 48,
    /// A message of the migration protocol (links only).
    MESSAGE = 64,
}

impl Kind {
    /// Kinds whose payload is raw bytes that are read in place, not CBOR.
    pub fn is_raw(self) -> bool {
        matches!(self, Kind::PAGES | Kind::SHARED_PAGES | Kind::FILE_DATA | Kind::STORAGE_DATA | Kind::LOG)
    }
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "kind {}", self.0),
        }
    }
}
