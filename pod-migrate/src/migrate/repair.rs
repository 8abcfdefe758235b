//! Finishing or undoing what dead tools left.
//!
//! A tool that is killed leaves little: the kernel lets its tracees go, the monitor sees its hold end. What is left is
//! said here, and [`repair`] is cheap enough for every command: it reads two small files a pod and one a job.

use super::arrived;
use super::journal::{Job, Journal, Phase, Role, jobs};
use super::protocol::{Answer, Fate, Purpose};
use super::source::connect;
use crate::capture::{self, go_on};
use crate::link::PROTOCOL;
use crate::link::ssh::{Ssh, Target};
use pod_runtime::cgroup::Cgroup;
use pod_runtime::monitor::client;
use pod_runtime::network::Attachment;
use pod_runtime::status::State;
use pod_runtime::store::{Pod, Store};
use pod_runtime::{Problem, Result, lifecycle};
use std::time::Duration;

/// How often the destination is asked before the person is.
const ATTEMPTS: u32 = 3;

/// Undoes what dead tools left before their commit, on either side. Returns the jobs that only the other host can
/// settle. (Pods that never came to life are swept up by the store.)
pub fn repair(store: &Store) -> Result<Vec<Job>> {
    reconnect_lost(store)?;
    let mut pending = Vec::new();
    for job in jobs(store)? {
        if job.tool.alive() {
            continue;
        }
        if job.phase.is_over() {
            if job.phase == Phase::Running && arrived::arriving(store, &job).is_some() {
                arrived::settle(store, &job.id)?;
            }
            continue;
        }
        match (job.role, job.phase) {
            (Role::Source, Phase::Committing) => {
                let status = store.pod(&job.pod).and_then(|pod| pod.status());
                let waits =
                    status.as_ref().is_ok_and(|s| s.state == State::Migrating && s.job.as_ref() == Some(&job.id));
                if waits {
                    pending.push(job);
                } else {
                    // The tool was killed after the pod had been buried and before it wrote that down.
                    Journal::open(store, &job.id)?.phase(Phase::Done)?;
                }
            }
            (Role::Source, _) => {
                let mut journal = Journal::open(store, &job.id)?;
                if let Ok(pod) = store.pod(&job.pod) {
                    put_back(&pod, &job.id)?;
                }
                journal.aborted(&Problem::new("E-LINK", "the tool that moved the pod was killed; it runs on here"))?;
            }
            (Role::Destination, _) => {
                if !job.receiver.is_some_and(|receiver| receiver.alive()) {
                    arrived::settle(store, &job.id)?;
                }
            }
        }
    }
    Ok(pending)
}

/// Lets the copy at the source run again, if this job held it.
fn put_back(pod: &Pod, job: &str) -> Result<()> {
    let status = pod.status()?;
    if status.state != State::Migrating || status.job.as_deref() != Some(job) {
        return Ok(());
    }
    go_on(pod, &Cgroup::open(pod.id())?)?;
    reconnect(pod)
}

/// Puts the pod back on the network: a hold that ends does it, or, where the monitor is gone, we.
fn reconnect(pod: &Pod) -> Result<()> {
    match client::hold(pod, true) {
        Ok(hold) => {
            drop(hold);
            Ok(())
        }
        Err(problem) if problem.code() == "E-MONITOR" => lifecycle::reconnect(pod),
        // Whoever holds it now puts it back.
        Err(_) => Ok(()),
    }
}

/// Pods that were off the network when both who held them and their monitor were killed.
fn reconnect_lost(store: &Store) -> Result<()> {
    let network = store.network_dir()?;
    let reconnect = |pod: &Pod| -> Result<()> {
        let status = pod.status()?;
        if !status.monitor_lost || !matches!(status.state, State::Running | State::Paused) {
            return Ok(());
        }
        let spec = pod.spec()?;
        // Not while somebody holds it.
        let Ok(_lock) = capture::lock(pod, &spec.name) else { return Ok(()) };
        if Attachment::open(&network, &spec, pod.id(), None)?.is_held() {
            lifecycle::reconnect(pod)?;
        }
        Ok(())
    };
    for pod in store.pods()? {
        // One that cannot be helped stands in nobody's way.
        if let Err(problem) = reconnect(&pod) {
            tracing::warn!("pod {} without a monitor: {}", pod.id(), problem.chain());
        }
    }
    Ok(())
}

/// Source: asks the destination what became of the job and does what follows. `true`: the pod lives there.
pub(super) fn settle(store: &Store, pod: &Pod, ssh: &Ssh, journal: &mut Journal) -> Result<bool> {
    let mut last = None;
    for attempt in 0..ATTEMPTS {
        std::thread::sleep(Duration::from_secs(u64::from(attempt)));
        match fate(ssh, &journal.job.id) {
            Ok(fate) => return conclude(store, pod, journal, fate),
            Err(problem) => last = Some(problem),
        }
    }
    Err(last.unwrap_or_else(|| Problem::new(PROTOCOL, "nobody answered")))
}

fn fate(ssh: &Ssh, job: &str) -> Result<Fate> {
    let (_remote, mut link, _) = connect(ssh, Purpose::Ask { job: job.to_owned() }, None)?;
    match link.hear()? {
        Answer::Outcome(fate) => Ok(fate),
        _ => Err(Problem::new(PROTOCOL, "the answer to a question about a job was something else")),
    }
}

fn conclude(store: &Store, pod: &Pod, journal: &mut Journal, fate: Fate) -> Result<bool> {
    match fate {
        Fate::Ran => {
            if let Ok(spec) = pod.spec() {
                let _ = crate::storage::volumes::remember(store, &spec);
            }
            lifecycle::moved(pod, &journal.job.peer)?;
            journal.phase(Phase::Done)?;
            Ok(true)
        }
        Fate::Never => {
            put_back(pod, &journal.job.id.clone())?;
            journal.aborted(&Problem::new("E-LINK", "the destination did not run the pod; it runs on here"))?;
            Ok(false)
        }
    }
}

/// `pod job resume`: settles a job whose commit got no answer. `true`: the pod lives at the destination.
pub fn resume(store: &Store, id: &str) -> Result<bool> {
    let mut journal = Journal::open(store, id)?;
    let job = journal.job.clone();
    if job.phase.is_over() {
        return Ok(matches!(job.phase, Phase::Done | Phase::Running));
    }
    if job.tool.alive() {
        return Err(Problem::new("E-STATE", format!("job {id} is still being worked on by process {}", job.tool.pid)));
    }
    if job.role == Role::Destination || job.phase != Phase::Committing {
        repair(store)?;
        return Ok(false);
    }
    let pod = store.pod(&job.pod)?;
    let ssh = Ssh {
        target: Target { host: job.peer, port: job.port },
        options: job.ssh_options,
        remote_pod: job.remote_pod.unwrap_or_else(|| "pod".into()),
    };
    settle(store, &pod, &ssh, &mut journal)
}

/// `pod job abort`: before the commit the tool is asked to stop; after it, it is too late.
pub fn abort(store: &Store, id: &str) -> Result<()> {
    let job = Journal::open(store, id)?.job;
    if job.phase.is_over() {
        return Err(Problem::new("E-STATE", format!("job {id} is over")));
    }
    if !job.tool.alive() {
        return resume(store, id).map(drop);
    }
    if job.role == Role::Destination {
        return match Journal::open(store, id)?.give_up()? {
            Phase::Aborted => Ok(()),
            _ => Err(Problem::new("E-STATE", format!("job {id} is over: the pod runs here"))),
        };
    }
    if job.phase == Phase::Committing {
        return Err(Problem::new("E-STATE", format!("job {id} is in its commit: too late, it is finishing")));
    }
    if let Some(pidfd) = job.tool.pidfd()? {
        use std::os::fd::AsFd;
        let sent = pod_runtime::sys::daemon::pidfd_send_signal(pidfd.as_fd(), 15);
        pod_runtime::Doing::doing(sent, || format!("tell process {} to stop", job.tool.pid))?;
    }
    Ok(())
}
