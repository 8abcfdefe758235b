//! What the first process of a pod, and every other that enters it to become a program, does on its way.

use crate::problem::Problem;
use crate::spec::{Process, Spec};

/// Turns the calling process, which is inside the pod already, into `process` under the pod's security: user, groups,
/// capabilities, seccomp, limits, umask. All descriptors from 3 on are closed. Returns only when it cannot, with
/// `E-COMMAND-NOT-FOUND` (exit code 127), `E-COMMAND-NOT-EXECUTABLE` (126) or another code (125).
///
/// `error` descriptors that must survive until then have CLOEXEC set: pass their numbers in `keep`.
pub fn become_program(spec: &Spec, process: &Process, keep: &[i32]) -> Problem {
    let _ = (spec, process, keep);
    Problem::new("E-SYSTEM", "programs cannot be started yet")
}
