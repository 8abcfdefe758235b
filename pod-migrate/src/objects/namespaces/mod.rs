//! What belongs to a namespace and not to a task.

pub mod ipc;
pub mod mounts;
pub mod mqueue;
pub mod network;
pub mod uts;
