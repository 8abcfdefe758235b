//! A pod: its spec, its environment, its life. Knows nothing of checkpoints.
//!
//! A pod is a group of processes in private PID, network, mount, IPC, UTS, cgroup and time namespaces with a virtual
//! IP. This crate starts one, keeps it and ends it; `pod-migrate` takes it apart and puts it together.
#![deny(unsafe_code)]

pub mod birth;
pub mod cgroup;
pub mod copy;
pub mod events;
pub mod init;
pub mod lifecycle;
pub mod monitor;
pub mod namespaces;
pub mod network;
pub mod oci;
pub mod problem;
pub mod proc;
pub mod rootfs;
pub mod samples;
pub mod security;
pub mod spec;
pub mod status;
pub mod store;
pub mod sys;
pub mod untested;
pub mod usher;
pub mod when;

pub use problem::{Doing, Problem, Result};
