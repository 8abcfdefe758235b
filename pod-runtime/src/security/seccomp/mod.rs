//! Seccomp filters: a profile (the [`usual`] one, or a text in docker's or OCI's form, [`profile`]) and the compiler
//! that makes the kernel's program of it ([`compile`]). No library is asked: filters are dumped and restored as raw
//! programs anyway, and a profile must mean the same on every host.

mod compile;
mod profile;
pub mod syscalls;
mod usual;

use super::capabilities::Set;
use crate::problem::Result;
use crate::spec::{self, Spec};
use crate::sys::process::Instruction;

/// The filter of a pod's processes; `None` when it has none.
pub fn program(spec: &Spec) -> Result<Option<Vec<Instruction>>> {
    if spec.security.privileged {
        return Ok(None);
    }
    let capabilities = Set::parse(&spec.security.capabilities)?;
    let profile = match &spec.security.seccomp {
        spec::Seccomp::Unconfined => return Ok(None),
        spec::Seccomp::Default => usual::profile(capabilities),
        spec::Seccomp::Profile(text) => profile::parse(text, capabilities)?,
    };
    compile::compile(&profile).map(Some)
}
