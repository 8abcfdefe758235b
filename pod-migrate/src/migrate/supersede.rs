//! A source that tries again.
//!
//! When the link is cut, the destination still waits for it (its patience is longer than a person's) and holds name,
//! address and place of the pod. A new attempt to bring the same pod from the same source takes them over: the older
//! job is decided, by its journal and under its lock, to never run here; whoever works on it hears that and gives back
//! what it took. One that did run is left alone, and then the pod is here and the new attempt is refused.
//!
//! Only one tool at a time moves a pod at its source (`capture.lock`), so there is nobody left who could finish the
//! older attempt.

use super::arrived;
use super::journal::{Job, Journal, Phase, Role, jobs};
use pod_runtime::status::ProcessKey;
use pod_runtime::store::Store;
use pod_runtime::{Doing, Result};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// How long an older attempt may take to give back what it has; then it is ended by force.
const GIVING_BACK: Duration = Duration::from_secs(10);

/// Destination: ends what is left of older attempts to bring this pod from that host.
pub fn supersede(store: &Store, pod: &str, source: &str) -> Result<()> {
    let older = |job: &Job| {
        let the_same = job.role == Role::Destination && job.pod == pod && job.peer == source;
        the_same && (!job.phase.is_over() || at_work(job))
    };
    for job in jobs(store)?.into_iter().filter(older) {
        let mut journal = Journal::open(store, &job.id)?;
        // One that was decided a moment ago may still be at work giving back.
        if journal.give_up()? == Phase::Aborted && at_work(&job) {
            tracing::info!(job = job.id, "an older attempt makes way for a new one");
            make_way(store, &job.id)?;
        }
    }
    Ok(())
}

fn at_work(job: &Job) -> bool {
    job.tool.alive() || job.receiver.is_some_and(|receiver| receiver.alive())
}

/// Waits until nobody works on the job any more, and sees to it if need be.
fn make_way(store: &Store, id: &str) -> Result<()> {
    let deadline = Instant::now() + GIVING_BACK;
    loop {
        // Anew each time: the monitor takes over from the receiver.
        let job = Journal::open(store, id)?.job;
        if !at_work(&job) {
            break;
        }
        if Instant::now() > deadline {
            [Some(job.tool), job.receiver].into_iter().flatten().try_for_each(end)?;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    // What one that was killed left.
    arrived::settle(store, id).map(drop)
}

fn end(process: ProcessKey) -> Result<()> {
    let Some(pidfd) = process.pidfd()? else { return Ok(()) };
    match pod_runtime::sys::daemon::pidfd_send_signal(pidfd.as_fd(), libc::SIGKILL) {
        Err(nix::errno::Errno::ESRCH) => Ok(()),
        sent => sent.doing(|| format!("end process {}", process.pid)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(id: &str, phase: Phase, tool: ProcessKey) -> Job {
        let (pod, name, peer) = ("0123456789ab".into(), "web".into(), "hostA".into());
        Job { pod, name, peer, receiver: Some(tool), ..Job::here(id, phase, tool) }
    }

    #[test]
    fn only_undecided_attempts_of_the_same_source_make_way() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_at(dir.path().join("data"), dir.path().join("run")).unwrap();
        let gone = ProcessKey { pid: 1, start_time: u64::MAX };
        let begin = |job| Journal::begin(&store, job).unwrap();
        begin(job("aaaa", Phase::Receiving, gone));
        begin(job("bbbb", Phase::Running, gone));
        begin(Job { peer: "hostC".into(), ..job("cccc", Phase::Receiving, gone) });
        begin(Job { pod: "ba9876543210".into(), ..job("dddd", Phase::Receiving, gone) });
        supersede(&store, "0123456789ab", "hostA").unwrap();
        let phase = |id| Journal::open(&store, id).unwrap().job.phase;
        assert_eq!(phase("aaaa"), Phase::Aborted);
        assert_eq!(phase("bbbb"), Phase::Running, "what ran is not taken back");
        assert_eq!(phase("cccc"), Phase::Receiving, "another host's");
        assert_eq!(phase("dddd"), Phase::Receiving, "another pod's");
    }

    #[test]
    fn who_works_on_it_hears_that_it_was_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_at(dir.path().join("data"), dir.path().join("run")).unwrap();
        let journal = Journal::begin(&store, job("aaaa", Phase::Receiving, ProcessKey::myself().unwrap())).unwrap();
        let interrupt = journal.given_up().unwrap();
        assert!(interrupt.check().is_ok());
        let mut other = Journal::open(&store, "aaaa").unwrap();
        assert_eq!(other.give_up().unwrap(), Phase::Aborted);
        assert!(interrupt.check().is_err());
        assert!(journal.given_up().is_err(), "also when it was before");
    }
}
