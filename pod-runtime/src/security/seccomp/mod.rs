//! Seccomp filters: from a profile to a program.

use crate::problem::Result;
use crate::spec::Spec;
use crate::sys::process::Instruction;

/// The filter of a pod's processes; `None` when it has none.
pub fn program(spec: &Spec) -> Result<Option<Vec<Instruction>>> {
    let _ = spec;
    Ok(None)
}
