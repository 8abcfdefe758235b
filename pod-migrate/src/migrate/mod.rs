//! Moving a pod to another host.
//!
//! * [`protocol`]: what is said; [`commit`]: the one instant that decides; [`journal`]: what is written down.
//! * [`offer`]: what can be known before the pod is touched, on both sides, [`base`] what lies below its own files;
//!   `pod check` is the same code.
//! * [`inquiry`]: what a destination says before anything is moved; [`drain`] asks several about many pods, and
//!   [`placement`] decides which goes where; [`estimate`] says what a move would be like.
//! * [`way`]: directly or through ssh.
//! * `following`: memory that comes when the pod runs at the destination already.
//! * [`throttling`]: less CPU time for a pod that writes its memory as fast as it is sent.
//! * [`source`] and [`destination`]: the two sides, each phase owning what must be undone.
//! * [`repair`](mod@repair): finishing or undoing what dead tools left, cheap enough for every command.

mod arrived;
mod base;
pub mod commit;
pub mod destination;
pub mod drain;
pub mod estimate;
mod following;
pub mod inquiry;
pub mod journal;
mod labels;
#[cfg(test)]
mod model;
pub mod offer;
pub mod placement;
pub mod progress;
pub mod protocol;
mod questions;
mod repair;
pub mod source;
mod supersede;
mod throttling;
mod turn;
pub mod way;

pub use destination::receive;
pub use inquiry::{Checked, check};
pub use repair::{Lives, abort, repair, resume};
pub use source::{Ended, Failure, Limits, Listener, migrate};
