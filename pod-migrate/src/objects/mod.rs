//! What a pod is made of, one file a kind of kernel object: its `State` (plain data: no fds, no host pids), how it is
//! dumped, checked and restored.
//!
//! Two families, because they are restored in two places: [`files`] are opened by a process of ours inside the pod and
//! handed over; parts of a [`task`] and its [`memory`] are made by remote calls in the task itself.

pub mod files;
pub mod memory;
pub mod namespaces;
mod pieces;
pub mod task;
