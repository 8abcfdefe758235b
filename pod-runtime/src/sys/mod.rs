//! System calls that nix does not have, one thin wrapper each. The only unsafe code of the workspace lives below here.
//!
//! A wrapper takes and returns owned or borrowed fds and plain structs, turns `-1` into `io::Error` (or nix's `Errno`),
//! and holds no policy. Each `unsafe` block names the invariant and who keeps it.
#![allow(unsafe_code)]
pub mod bpf;
pub mod clone;
pub mod cpu;
pub mod daemon;
pub mod descriptor;
pub mod inet;
pub mod interrupt;
pub mod ipc;
pub mod kcmp;
pub mod memory;
pub mod mount;
pub mod mqueue;
pub mod netdev;
pub mod pidfd;
pub mod process;
pub mod ptrace;
pub mod task;
pub mod tty;
pub mod unix;
pub mod userfault;
pub mod xattr;
