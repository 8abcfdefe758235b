//! A pod that arrived and was not let go: its monitor was killed between the commit and the last step.
//!
//! The journal says that the pod runs here, so it has to. What the monitor left makes that possible: the tasks stand
//! still by their cgroup and do not die with their tracer, and the opener, which has the state of the connections, lets
//! them go by itself when the monitor is gone. What is left to do is said in [`letting_go`].

use super::journal::{Job, Journal, Phase, Role};
use crate::letting_go;
use pod_runtime::store::{Pod, Store};
use pod_runtime::{Result, lifecycle};

/// Destination: nobody works on this job any more. Makes true what its journal says.
pub fn settle(store: &Store, id: &str) -> Result<Phase> {
    let mut journal = Journal::open(store, id)?;
    let phase = journal.give_up()?;
    let Some(pod) = arriving(store, &journal.job) else { return Ok(phase) };
    match phase {
        Phase::Running => letting_go::finish(&pod, "arrived")?,
        _ => {
            lifecycle::kill_now(&pod)?;
            lifecycle::remove(&pod)?;
        }
    }
    Ok(phase)
}

/// The pod of the job, as long as it is neither let go nor gone.
pub fn arriving(store: &Store, job: &Job) -> Option<Pod> {
    if job.role != Role::Destination {
        return None;
    }
    let pod = store.by_id(&job.pod)?;
    let status = pod.status().ok()?;
    (status.job.as_deref() == Some(&job.id)).then_some(pod)
}
