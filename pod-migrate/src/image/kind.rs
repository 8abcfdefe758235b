//! The kinds of records by number and name.
//!
//! Numbers are for ever: one that was given away is not given away again (7 and 24 were). A reader refuses a kind, or a
//! version of one, that it does not know, unless the writer marked the record skippable.
//!
//! A version is that of the kind's state (or of its raw bytes). It grows with whatever a reader of the version before
//! must not ignore or could not read; a field that may be ignored gets a default and changes no version. Raw bytes that are
//! packed are version 2 of their kind, and those that are not stay version 1, so that a reader that cannot unpack has them.

use serde::{Deserialize, Serialize};
use std::fmt;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Kind(pub u16);

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $number:literal v $version:literal,)*) => {
        impl Kind {
            $($(#[$doc])* pub const $name: Kind = Kind($number);)*

            /// The kind's name in lower case, or `None` for one that this version does not know.
            pub fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($number => Some(stringify!($name)),)*
                    _ => None,
                }
            }

            /// The version that is written, and the latest that can be read; `None` for a kind that is not known.
            pub fn version(self) -> Option<u16> {
                match self.0 {
                    $($number => Some($version),)*
                    _ => None,
                }
            }
        }

        /// All kinds that there are.
        #[cfg(test)]
        pub(super) const ALL: &[Kind] = &[$(Kind($number),)*];
    };
}

kinds! {
    /// Filler: aligns what follows, or keeps a silent link awake. Never handed to the caller. 2: its payload is not part of
    /// the digest.
    PAD = 1 v 2,
    /// The pod's spec, clock readings, who wrote this and when.
    SPEC = 2 v 1,
    /// One layer of files begins (the upper layer, a volume, a tmpfs).
    STORAGE = 3 v 1,
    /// One file, directory, link or node of a layer.
    STORAGE_ENTRY = 4 v 1,
    /// Raw bytes of a file of a layer; the position is the offset.
    STORAGE_DATA = 5 v 2,
    /// The layer that began last ends.
    STORAGE_END = 6 v 1,
    /// The instant of the freeze: the pod's clocks. 2: the sessions of `pod exec`.
    MOMENT = 8 v 2,
    /// Mounts that were made inside the pod.
    MOUNTS = 9 v 1,
    /// Addresses, routes and rules that were made inside the pod. 2: neighbours.
    NETWORK = 10 v 2,
    /// Host and domain name of a pod that may change them.
    UTS = 11 v 1,
    /// What was made of the pod's control groups inside it.
    CGROUPS = 12 v 1,
    /// Settings of the kernel (sysctl) that were made in the pod's namespaces.
    SETTINGS = 13 v 1,
    /// The tree of processes and threads with sessions and groups.
    TREE = 16 v 1,
    /// One process: its threads' registers, signals, credentials, limits, timers. 2: filters by reference, switches, waits
    /// with the time that remains. 3: a first thread that has ended.
    PROCESS = 17 v 3,
    /// One address space: its maps. 2: guards, seals, droppable maps, locks on fault. 3: huge pages.
    MM = 18 v 3,
    /// One descriptor table: of one process and all its threads.
    FD_TABLE = 19 v 1,
    /// One open file description. 2: which session of `pod exec` has the other end. 3: keys of TCP's signatures, what packet
    /// sockets listen to, POSIX message queues. 4: a socket's options by the file that has the same.
    FILE = 20 v 4,
    /// One piece of shared memory.
    SHARED_MEMORY = 21 v 1,
    /// SysV queues and semaphores. 2: POSIX queues.
    IPC = 22 v 2,
    /// Raw bytes of an open deleted file or a queue too large for its FILE record.
    FILE_DATA = 23 v 2,
    /// What is to be undone of SysV semaphores at the end of processes.
    UNDO = 25 v 1,
    /// Raw bytes of one run of pages of an address space.
    PAGES = 32 v 2,
    /// Raw bytes of one run of pages of a shared memory object.
    SHARED_PAGES = 33 v 2,
    /// Everything but pages has been said.
    READY_FOR_PAGES = 34 v 1,
    /// Raw bytes of one run of pages of an address space, read while the pod ran, or needed before there are processes.
    AHEAD_PAGES = 35 v 2,
    /// Of the pages that came ahead, those that an address space still has as they came.
    KEPT = 36 v 1,
    /// Where the large private maps of an address space lie, for whoever wants to make room for what comes ahead.
    PLACES = 37 v 1,
    /// Pages whose bytes are those of others that the image holds.
    SAME = 38 v 1,
    /// What an address space has from others since a fork.
    INHERITED = 39 v 1,
    /// Pages of an address space that come when the pod runs (links only).
    BEHIND = 41 v 1,
    /// Lines of the pod's log.
    LOG = 40 v 2,
    /// The trailer: number of records and the digest of the stream.
    END = 48 v 1,
    /// A message of the migration protocol (links only).
    MESSAGE = 64 v 1,
}

impl Kind {
    /// Kinds whose payload is raw bytes that are read in place, not CBOR.
    pub fn is_raw(self) -> bool {
        matches!(
            self,
            Kind::PAGES | Kind::AHEAD_PAGES | Kind::SHARED_PAGES | Kind::FILE_DATA | Kind::STORAGE_DATA | Kind::LOG
        )
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
