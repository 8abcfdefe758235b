//! A pod's control groups: `pod/ID` in every hierarchy that the host has mounted and that matters.

use crate::problem::{Problem, Result};
use crate::spec::Resources;
use std::time::Duration;

/// The control groups of one pod.
#[derive(Debug)]
pub struct Cgroup {
    id: String,
}

/// What the pod uses now. `None` where the host has no controller that counts it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Stats {
    /// Bytes.
    pub memory: Option<u64>,
    /// Bytes; `None` also when unlimited.
    pub memory_limit: Option<u64>,
    /// Microseconds since the pod began here.
    pub cpu: Option<u64>,
    pub pids: Option<u64>,
    /// How often the kernel's OOM killer killed something in it.
    pub oom_kills: Option<u64>,
}

impl Cgroup {
    /// Makes the pod's groups and sets its limits. The strings are what this host cannot limit.
    pub fn create(id: &str, resources: &Resources) -> Result<(Cgroup, Vec<String>)> {
        let _ = resources;
        Ok((Cgroup { id: id.to_owned() }, Vec::new()))
    }

    /// The groups of a pod that was made earlier; never fails for one that is gone (it is then empty).
    pub fn open(id: &str) -> Result<Cgroup> {
        Ok(Cgroup { id: id.to_owned() })
    }

    /// Host pids of all processes in it, none twice, never one ≤ 1.
    pub fn procs(&self) -> Result<Vec<i32>> {
        Err(Problem::new("E-SYSTEM", format!("cgroup of {}", self.id)))
    }

    /// Puts process `pid` (host) into all groups.
    pub fn add(&self, pid: i32) -> Result<()> {
        let _ = pid;
        Err(Problem::new("E-SYSTEM", format!("cgroup of {}", self.id)))
    }

    /// Returns when everything in it is frozen, or fails and thaws after `deadline`.
    pub fn freeze(&self, deadline: Duration) -> Result<()> {
        let _ = deadline;
        Err(Problem::new("E-SYSTEM", format!("cgroup of {}", self.id)))
    }

    pub fn thaw(&self) -> Result<()> {
        Err(Problem::new("E-SYSTEM", format!("cgroup of {}", self.id)))
    }

    pub fn frozen(&self) -> Result<bool> {
        Err(Problem::new("E-SYSTEM", format!("cgroup of {}", self.id)))
    }

    /// SIGKILL to all of it, frozen or not. Returns when the kernel has taken the order, not when all are gone.
    pub fn kill(&self) -> Result<()> {
        Err(Problem::new("E-SYSTEM", format!("cgroup of {}", self.id)))
    }

    pub fn stats(&self) -> Result<Stats> {
        Err(Problem::new("E-SYSTEM", format!("cgroup of {}", self.id)))
    }

    /// Sets the limits anew. The strings are what this host cannot limit.
    pub fn apply_limits(&self, resources: &Resources) -> Result<Vec<String>> {
        let _ = resources;
        Err(Problem::new("E-SYSTEM", format!("cgroup of {}", self.id)))
    }

    /// Removes the groups, nested ones too. Processes in them must be dead or dying: waits for them until the deadline.
    pub fn remove(&self, deadline: Duration) -> Result<()> {
        let _ = deadline;
        Err(Problem::new("E-SYSTEM", format!("cgroup of {}", self.id)))
    }
}
