//! Several hosts on one machine: the bed that tests, workloads, the demo and the benchmarks run on.
//!
//! [`bed`] makes hosts, cables and keys and takes them away again; [`wait`] is the only way in which anything here waits.
#![deny(unsafe_code)]

pub mod bed;
pub mod faults;
pub mod hugepages;
pub mod pods;
pub mod servers;
pub mod terminal;
pub mod wait;
