//! Finishing or undoing what dead tools left.
//!
//! A tool that is killed leaves little: the kernel lets its tracees go, the monitor sees its hold end. What is left is
//! said here, and [`repair`] is cheap enough for every command: it reads two small files a pod and one a job.
//!
//! `model` (a test) has each of the steps here and shows what they are there for.

use super::arrived;
use super::following;
use super::inquiry::connect;
use super::journal::{Job, Journal, Phase, Role, jobs};
use super::protocol::{Answer, Fate, Purpose};
use crate::capture::{self, go_on};
use crate::letting_go;
use crate::link::PROTOCOL;
use crate::link::dial::Dial;
use pod_runtime::cgroup::Cgroup;
use pod_runtime::monitor::client;
use pod_runtime::network::Attachment;
use pod_runtime::status::{ProcessKey, State};
use pod_runtime::store::{Pod, Store};
use pod_runtime::{Problem, Result, lifecycle};
use std::collections::BTreeSet;
use std::time::Duration;

/// How often the destination is asked before the person is.
const ATTEMPTS: u32 = 3;

/// Undoes what dead tools left before their commit, on either side. Returns the jobs that only the other host can
/// settle. (Pods that never came to life are swept up by the store.)
pub fn repair(store: &Store) -> Result<Vec<Job>> {
    reconnect_lost(store)?;
    let pods = store.pods()?.into_iter();
    let held: BTreeSet<String> = pods.filter_map(|pod| pod.status().ok()?.job).collect();
    let mut pending = Vec::new();
    for job in jobs(store)? {
        if job.phase.is_over() && !held.contains(&job.id) {
            continue;
        }
        // One that cannot be helped stands in nobody's way.
        match settle_here(store, &job) {
            Ok(true) => pending.push(job),
            Ok(false) => {}
            Err(problem) => tracing::warn!("job {} of pod {}: {}", job.id, job.name, problem.chain()),
        }
    }
    Ok(pending)
}

/// Settles a job on which nobody works any more, as far as this host knows how. `true`: the other host has to be asked.
fn settle_here(store: &Store, job: &Job) -> Result<bool> {
    if job.tool.alive() || job.receiver.is_some_and(|receiver| receiver.alive()) {
        return Ok(false);
    }
    match job.role {
        Role::Source if job.phase.is_over() => Ok(false),
        // Its tool may have gone on until a moment ago: what counts is what it left.
        Role::Source => Journal::open(store, &job.id).and_then(|journal| settle_source(store, journal)),
        Role::Destination => {
            // Of one that is over something may be left to be done.
            if !job.phase.is_over() || arrived::arriving(store, job).is_some() {
                arrived::settle(store, &job.id)?;
            }
            Ok(false)
        }
    }
}

fn settle_source(store: &Store, mut journal: Journal) -> Result<bool> {
    if journal.job.phase.is_over() {
        return Ok(false);
    }
    let committing = journal.job.phase == Phase::Committing;
    let Some(pod) = store.by_id(&journal.job.pod) else {
        // Its tombstone, or the copy that stood still.
        if !committing {
            journal.aborted(&Problem::new(
                "E-LINK",
                "the tool that moved the pod was killed; the pod is not here any more",
            ))?;
        }
        return Ok(committing);
    };
    let status = pod.status()?;
    match status.state {
        // The tool was killed after the pod had been buried and before it wrote that down; or not all of it could be removed,
        // which is tried again as long as it has not come back.
        State::Moved => {
            store.exclusively(|| match pod.status()?.state {
                State::Moved => lifecycle::give_back(&pod),
                _ => Ok(()),
            })?;
            journal.phase(Phase::Done)?;
        }
        // The entry may be older than what it is about: a power cut leaves of both what it likes.
        State::Dead => return Ok(true),
        State::Migrating if committing && status.is_leaving(&journal.job.id) => return Ok(true),
        // Somebody has ended the copy that stood still.
        State::Exited if committing => return Ok(true),
        _ => {
            put_back(&pod, &journal.job.id)?;
            journal.aborted(&Problem::new("E-LINK", "the tool that moved the pod was killed; the pod stays here"))?;
        }
    }
    Ok(false)
}

/// A pod comes here that once left from here: whatever the entries say, it did leave. Nobody has to ask any more, and by
/// the answer take the copy that comes for the one that left.
pub(super) fn it_left(store: &Store, pod: &str) -> Result<()> {
    let open = |job: &Job| job.role == Role::Source && job.pod == pod && !job.phase.is_over() && !job.tool.alive();
    jobs(store)?.iter().filter(|job| open(job)).try_for_each(|job| Journal::open(store, &job.id)?.phase(Phase::Done))
}

/// Lets the copy at the source run again, if this job holds it. Nobody else does anything with the pod from the look at it on.
fn put_back(pod: &Pod, job: &str) -> Result<()> {
    let held = || -> Result<bool> { Ok(pod.status()?.is_leaving(job)) };
    if !held()? {
        return Ok(());
    }
    let _lock = capture::lock(pod, &pod.spec()?.name)?;
    if held()? {
        go_on(pod, &Cgroup::open(pod.id())?, job)?;
        reconnect(pod)?;
    }
    Ok(())
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

/// Pods that were off the network, or throttled, when both who did that and their monitor were killed; and such as were
/// restored and not let go when it was.
fn reconnect_lost(store: &Store) -> Result<()> {
    let network = store.network_dir()?;
    let reconnect = |pod: &Pod| -> Result<()> {
        let status = pod.status()?;
        if status.let_go {
            return letting_go::settle(pod).map(drop);
        }
        if !status.monitor_lost || !matches!(status.state, State::Running | State::Paused) {
            return Ok(());
        }
        let spec = pod.spec()?;
        // Not while somebody holds it.
        let Ok(_lock) = capture::lock(pod, &spec.name) else { return Ok(()) };
        if Attachment::open(&network, &spec, None)?.is_held() {
            lifecycle::reconnect(pod)?;
        }
        lifecycle::unthrottle(pod)?;
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
pub(super) fn settle(store: &Store, pod: Option<&Pod>, dial: &Dial, journal: &mut Journal) -> Result<bool> {
    let mut last = None;
    for attempt in 0..ATTEMPTS {
        std::thread::sleep(Duration::from_secs(u64::from(attempt)));
        match fate(dial, &journal.job.id) {
            Ok(fate) => {
                if fate == Fate::Ran && journal.job.behind {
                    bring(pod, dial, &journal.job)?;
                }
                return conclude(store, pod, journal, fate);
            }
            Err(problem) => last = Some(problem),
        }
    }
    Err(last.unwrap_or_else(|| Problem::new(PROTOCOL, "nobody answered")))
}

/// The pod runs there and may not have all of its memory: what is missing is in the copy here.
fn bring(pod: Option<&Pod>, dial: &Dial, job: &Job) -> Result<()> {
    let held = |pod: &Pod| -> Result<bool> { Ok(pod.status()?.is_leaving(&job.id)) };
    let pod = match pod {
        Some(pod) if held(pod)? => pod,
        // Somebody has ended the copy, or removed it: there is nothing to be brought.
        _ => return following::lost(dial, &job.id),
    };
    let _lock = capture::lock(pod, &pod.spec()?.name)?;
    let brought = following::bring(None, pod, dial, &job.id, None);
    brought.map(drop).map_err(|problem| following::unfinished(problem, &job.id, &job.peer))
}

fn fate(dial: &Dial, job: &str) -> Result<Fate> {
    let (_remote, mut link, _) = connect(dial, Purpose::Ask { job: job.to_owned() }, None)?;
    match link.hear()? {
        Answer::Outcome(fate) => Ok(fate),
        _ => Err(Problem::new(PROTOCOL, "the answer to a question about a job was something else")),
    }
}

fn conclude(store: &Store, pod: Option<&Pod>, journal: &mut Journal, fate: Fate) -> Result<bool> {
    let Job { id, peer, started, .. } = journal.job.clone();
    match fate {
        Fate::Ran => {
            if let Some(spec) = pod.and_then(|pod| pod.spec().ok()) {
                let _ = crate::storage::volumes::remember(store, &spec);
            }
            pod.map_or(Ok(()), |pod| lifecycle::moved(pod, &id, started, &peer))?;
            journal.phase(Phase::Done)?;
            Ok(true)
        }
        Fate::Never => {
            pod.map_or(Ok(()), |pod| put_back(pod, &id))?;
            journal.aborted(&Problem::new("E-LINK", "the destination did not run the pod; it stays here"))?;
            // It may have been settled while the question was on its way, and been forgotten there.
            Ok(journal.job.phase == Phase::Done)
        }
    }
}

/// Where a pod is, as one of the two hosts of its move knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lives {
    Here,
    /// On the other host of the job.
    There,
    /// On neither: it did not move, and is not here any more.
    Nowhere,
}

/// `pod job resume`: settles a job on which nobody works any more.
pub fn resume(store: &Store, id: &str) -> Result<Lives> {
    let job = Journal::open(store, id)?.job;
    let at_work =
        |key: &ProcessKey| Problem::new("E-STATE", format!("job {id} is still being worked on by process {}", key.pid));
    if !job.phase.is_over()
        && let Some(key) = [Some(job.tool), job.receiver].iter().flatten().find(|key| key.alive())
    {
        return Err(at_work(key));
    }
    if settle_here(store, &job)? {
        let mut journal = Journal::open(store, id)?;
        let pod = store.by_id(&job.pod);
        let dial = job.dial(store);
        settle(store, pod.as_ref(), &dial, &mut journal)?;
    }
    let job = Journal::open(store, id)?.job;
    match (job.role, job.phase) {
        (Role::Source, Phase::Done) | (Role::Destination, Phase::Aborted) => Ok(Lives::There),
        (Role::Source, Phase::Aborted) if store.by_id(&job.pod).is_none() => Ok(Lives::Nowhere),
        (Role::Source, Phase::Aborted) | (Role::Destination, Phase::Running) => Ok(Lives::Here),
        _ => Err(at_work(&job.tool)),
    }
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

#[cfg(test)]
mod tests;
