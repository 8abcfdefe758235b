//! Moving a pod to another host.
//!
//! * [`protocol`]: what is said; [`commit`]: the one instant that decides; [`journal`]: what is written down.
//! * [`source`] and [`destination`]: the two sides, each phase owning what must be undone.
//! * [`repair`]: finishing or undoing what dead tools left, cheap enough for every command.

pub mod commit;
pub mod journal;
pub mod protocol;
