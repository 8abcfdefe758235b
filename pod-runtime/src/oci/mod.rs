//! Containers as the OCI runtime specification has them: a bundle's `config.json` in, a container out, driven by the
//! verbs that podman, Docker and containerd call (`pod-oci`).
//!
//! A container is a folder below a root ([`Containers`]), its processes live in the control groups and namespaces that
//! the bundle asks for, and no process of the runtime stays: [`create`] makes the first process by one clone3(2), which
//! builds its own inside ([`first`]) and then waits on a socket in that folder until `start` lets it become the user's
//! program. What serves `pod run` serves here too: the tree of descriptors, masks, cgroups, filters, the launcher.
//!
//! Errors use the words that those clients look for ("already exists", "does not exist", "executable file not found in
//! $PATH", "container not running"): they are part of the contract.

pub mod bundle;
mod confine;
mod copyup;
pub mod create;
mod devices;
pub mod enter;
pub mod features;
mod first;
mod hooks;
pub mod life;
mod listener;
mod mounts;
mod namespaces;
mod options;
mod resources;
pub mod sealed;
pub mod stats;
mod store;
pub mod template;
pub mod terminal;
mod uncover;

pub use bundle::Bundle;
pub use store::{Container, Containers, State, Status, write_file};

use crate::problem::Problem;

/// The version of the runtime specification that this follows.
pub const VERSION: &str = "1.3.0";

/// The bundle's configuration cannot be what it is.
fn wrong(what: impl Into<String>) -> Problem {
    Problem::new("E-OCI-CONFIG", what)
}

/// Something that this runtime does not do.
pub fn unsupported(what: impl Into<String>) -> Problem {
    Problem::new("E-OCI-UNSUPPORTED", what)
}
