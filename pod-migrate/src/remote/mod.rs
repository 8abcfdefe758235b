//! Running system calls inside a stopped task.
//!
//! [`RemoteCall`] is what to run; a list of them is laid out as one table and run by one stub without a stop between two
//! calls. Someone else's address is a number here ([`crate::ids::RemoteAddress`]) and cannot be dereferenced.
//!
//! Two flavours: [`Borrowed`] in a program that must never notice, also when we are killed in the middle; the stub of
//! [`plain`] in a task that restore is making, which dies with us.

mod borrowed;
pub mod call;
pub mod layout;
pub mod plain;
mod stub;

pub use borrowed::{Borrowed, NO_ROOM};
pub use call::{Arg, Expect, RemoteCall};
pub(crate) use stub::stranded;
