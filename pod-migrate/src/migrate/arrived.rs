//! A pod that arrived and was not let go: its monitor was killed between the commit and the last step.
//!
//! The journal says that the pod runs here, so it has to. What the monitor left makes that possible: the tasks stand
//! still by their cgroup and do not die with their tracer, and the opener, which has the state of the connections, lets
//! them go by itself when the monitor is gone. What is left to do is said in [`finish`]; doing it twice is no harm.

use super::destination::logged;
use super::journal::{Job, Journal, Phase, Role};
use pod_runtime::cgroup::Cgroup;
use pod_runtime::network::{self, Attachment};
use pod_runtime::status::{ProcessKey, State, now};
use pod_runtime::store::{Pod, Store};
use pod_runtime::{Problem, Result, lifecycle};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long the opener may take to let the connections go.
const LETTING_GO: Duration = Duration::from_secs(20);

/// Destination: nobody works on this job any more. Makes true what its journal says.
pub fn settle(store: &Store, id: &str) -> Result<Phase> {
    let mut journal = Journal::open(store, id)?;
    let phase = journal.give_up()?;
    let Some(pod) = arriving(store, &journal.job) else { return Ok(phase) };
    match phase {
        Phase::Running => finish(&pod)?,
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

/// The last step of an arrival.
fn finish(pod: &Pod) -> Result<()> {
    let status = pod.status()?;
    let Some(init) = status.init.filter(ProcessKey::alive) else { return it_ended(pod) };
    let (spec, cgroup) = (pod.spec()?, Cgroup::open(pod.id())?);
    let dir = pod.store().network_dir()?;
    match Attachment::open(&dir, &spec, Some(init.pid)) {
        Ok(attachment) => {
            logged("the pod is not on the network", attachment.join());
            logged("the neighbours were not told of the pod", attachment.announce());
        }
        Err(problem) => logged("the pod is not on the network", Err(problem)),
    }
    wait_for_the_opener(init.pid, &cgroup)?;
    cgroup.thaw()?;
    pod.update_quickly(|status| {
        status.state = State::Running;
        status.started = Some(now());
        status.job = None;
    })?;
    pod.store().event(pod, "arrived", &[]);
    logged("published ports are not open", network::publish(&dir, &spec));
    Ok(())
}

/// It ran here, and has ended with nobody there, as in a power cut: what it left is the only copy.
fn it_ended(pod: &Pod) -> Result<()> {
    pod.update(|status| {
        status.state = State::Dead;
        status.init = None;
        status.started = status.started.or_else(|| Some(now()));
        status.job = None;
    })?;
    Ok(())
}

/// Until nothing is in the pod's pid namespace but what is in its cgroup.
fn wait_for_the_opener(init: i32, cgroup: &Cgroup) -> Result<()> {
    let space = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let own = space(init);
    let deadline = Instant::now() + LETTING_GO;
    loop {
        let members = cgroup.procs()?;
        let pids = fs::read_dir(Path::new("/proc")).into_iter().flatten().flatten();
        let mut pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        if own.is_none() || !pids.any(|pid| !members.contains(&pid) && space(pid) == own) {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(Problem::new("E-SYSTEM", "the pod's connections are not let go"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
