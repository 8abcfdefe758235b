//! Birth of a pod: its namespaces, cgroup, file tree and first process. Called in the pod's monitor, which becomes the
//! parent of the first process.
//!
//! `run` and `restore` share all of it. The difference is the last step of the child ([`Purpose`]): it becomes the
//! user's program, or it parks, that is, keeps nothing open but its end of [`Born::sync`] and blocks in read(2) there
//! until the engine has turned it into something else. Whatever fails before [`Born::start`] leaves nothing behind:
//! dropping a [`Born`] that was never started kills the child, and its mounts and namespaces go with it.

use crate::cgroup::Cgroup;
use crate::problem::{Problem, Result};
use crate::spec::Spec;
use crate::store::Pod;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

/// What the pod's clocks show more (or less) than this host's, in nanoseconds. Zero for a new pod; for a restored one,
/// what makes them go on where they stopped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Clocks {
    pub monotonic: i128,
    pub boottime: i128,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The first process becomes the user's program when [`Born::start`] says so.
    Run,
    /// The first process parks, to be filled.
    Fill,
}

/// What the first process gets as descriptors 0, 1 and 2. Nothing of it is used for [`Purpose::Fill`].
#[derive(Debug)]
pub enum Stdio {
    /// A pty of the pod's own devpts, also its controlling terminal; the master comes back as [`Born::console`].
    Terminal { rows: u16, columns: u16 },
    /// These three.
    Files([OwnedFd; 3]),
    /// The pod's own /dev/null three times.
    Null,
}

/// A pod with a first process that does not run anything of the user's yet.
#[derive(Debug)]
pub struct Born {
    /// The first process as this host numbers it; a child of the caller, who reaps it.
    pub init: i32,
    pub pidfd: OwnedFd,
    /// The other end is the only descriptor of a parked first process.
    pub sync: UnixStream,
    pub cgroup: Cgroup,
    /// Master side of the pty, for [`Stdio::Terminal`].
    pub console: Option<OwnedFd>,
    /// What this host could not give and the pod lives without, a line each.
    pub warnings: Vec<String>,
}

impl Born {
    /// Lets the first process become the user's program and returns when it has. A program that cannot be executed is
    /// `E-COMMAND-NOT-FOUND` (exit code 127) or `E-COMMAND-NOT-EXECUTABLE` (126).
    pub fn start(&self) -> Result<()> {
        Err(Problem::new("E-SYSTEM", "pods cannot be started yet"))
    }
}

/// Makes the pod's environment and its first process.
///
/// `meanwhile` gets the first process's pid as soon as its namespaces exist, and runs while that process builds its
/// file tree: the place to attach the network. When it fails, so does the birth.
pub fn birth(
    spec: &Spec,
    pod: &Pod,
    clocks: Clocks,
    purpose: Purpose,
    stdio: Stdio,
    meanwhile: impl FnOnce(i32) -> Result<()>,
) -> Result<Born> {
    let _ = (spec, pod, clocks, purpose, stdio, meanwhile);
    Err(Problem::new("E-SYSTEM", "pods cannot be born yet"))
}

/// Forks a child of the caller inside all namespaces and the cgroup of a living pod, and runs `f` there; the child
/// ends with what `f` returns. With `pid_in_pod` the child has exactly this pid inside. Returns its pid on this host.
///
/// `f` runs with the credentials of the caller, non-dumpable (nothing inside the pod can trace it or look at its
/// descriptors), its descriptors still open: it must close what the pod must not have before it becomes a program.
pub fn enter(init: &OwnedFd, cgroup: &Cgroup, pid_in_pod: Option<i32>, f: impl FnOnce() -> i32) -> Result<i32> {
    let _ = (init, cgroup, pid_in_pod, f);
    Err(Problem::new("E-SYSTEM", "pods cannot be entered yet"))
}
