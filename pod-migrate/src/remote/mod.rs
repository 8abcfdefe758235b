//! Running system calls inside a stopped task.
//!
//! [`RemoteCall`] is what to run; a list of them is laid out as one table and run by one stub without a stop between two
//! calls. Someone else's address is a number here ([`crate::ids::RemoteAddress`]) and cannot be dereferenced.

pub mod call;
pub mod layout;
pub mod plain;

pub use call::{Arg, RemoteCall};
