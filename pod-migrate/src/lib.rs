//! Taking a pod apart on one host and putting it together on another, or on the same one later.
//!
//! A checkpoint is a migration to disk: one dump walk ([`dump`]), one record stream ([`image`]), one restore walk
//! ([`restore`]); a file or a link is only the sink. What a pod is made of is in [`objects`], one file a kind of
//! kernel object, both directions in it.
#![deny(unsafe_code)]

mod apart;
pub mod arrival;
pub mod capture;
pub mod check;
pub mod checkpoint;
mod compare;
mod connections;
mod crew;
pub mod dump;
pub mod freeze;
pub mod ids;
pub mod image;
pub mod laps;
mod letting_go;
pub mod link;
pub mod migrate;
pub mod objects;
pub mod remote;
pub mod restore;
pub mod rounds;
pub mod settle;
pub mod storage;
pub mod watchdog;

pub use pod_runtime::problem::{Doing, Problem, Result};
