//! Names of things, as types, so that a pid of the pod is never taken for one of the host.

use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(
    /// A process or thread as the pod itself numbers it. 0 is "outside" (the parent of a root of the tree).
    PodPid(i32)
);
id!(
    /// A process or thread as this host numbers it. Never stored, never sent.
    HostPid(i32)
);
id!(
    /// A descriptor number inside a task.
    TaskFd(i32)
);
id!(
    /// An open file description (what dup and fork share). Unique within one image.
    FileId(u64)
);
id!(
    /// A descriptor table (what CLONE_FILES shares).
    FdTableId(u64)
);
id!(
    /// An address space (what CLONE_VM shares).
    MmId(u64)
);
id!(
    /// A piece of memory that several address spaces share: shared anonymous memory, memfd, SysV or POSIX shm.
    SharedMemoryId(u64)
);
id!(
    /// An address in a task's memory: a number here, never dereferenced.
    RemoteAddress(u64)
);
