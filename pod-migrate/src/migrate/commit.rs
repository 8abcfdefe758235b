//! The commit: the one instant at which the pod changes hosts.
//!
//! Before it, whatever fails leaves the pod with the source: the destination takes silence and every error for "no".
//! The destination's journal entry going from `Receiving` to `Running` *is* the instant; it can happen once and only on
//! a COMMIT. A source that has said COMMIT and hears nothing knows nothing: its copy stays frozen until the destination
//! was asked, and asking makes an undecided job an aborted one. So never two run; and none runs only until somebody
//! could ask. The reasons are in `docs/decisions/0004-commit.md`.
//!
//! # When nothing breaks
//!
//! ```text
//! source: pod migrate                                                  destination: the new monitor
//!                       journal     the copy                           the copy          journal
//!                       copying     runs                                                 receiving
//! Copied::freeze        frozen      ptrace holds it: it runs
//!                                   on when the tool dies
//! Frozen::send                      ────────── SENT ──────────▶        is filled, dies
//!                                                                      with the monitor
//!                                                                      its cgroup holds it            outlive
//!                                   ◀───────── READY ──────────                                       await_commit
//! Still::stop_for_good              its cgroup holds it, too;
//!                                   status: migrating
//! commit                committing
//!                                   ───────── COMMIT ─────────▶
//!                                                                                        running,     Journal::decide:
//!                                                                                        on the disk  the commit point
//!                                                                      runs                           let_go
//!                                   ◀──────── RUNNING ─────────
//! Still::moved                      killed; status: moved
//! finish                done
//! ```
//!
//! # When something breaks
//!
//! | what breaks | where | what is done | by whom |
//! |---|---|---|---|
//! | the link, or there is silence | source, before COMMIT | the pod is let go, *aborted* | `broken`, `gave_up` |
//! | | source, after COMMIT | the copy stays held, it is asked | [`Said::Unknown`], `repair::settle` |
//! | | source, and the copy cannot be let go | the job stays open | `pod job resume` |
//! | | destination, before COMMIT | *aborted*, what there is of the pod goes | [`await_commit`], `Arriving::failed` |
//! | the question or its answer | source | *committing* stays, `repair` names it | `pod job resume` asks again |
//! | `pod migrate` | before its cgroup holds the pod | the kernel lets the tasks go, *aborted* | `repair` |
//! | | before *committing* | the cgroup lets it go, *aborted* | `repair` |
//! | | in *committing* | the destination is asked | `pod job resume` |
//! | | when the tombstone is set | *done* | `repair` |
//! | the new monitor | before `outlive` | the tasks die with it, *aborted* | `pod receive` |
//! | | before the commit point | *aborted*, the copy is killed | `pod receive`, if it is killed too `repair` there |
//! | | after it | the copy is let go | the same: `arrived::settle` |
//! | the disk | *committing* is not written | COMMIT is not said, the pod goes on | `Sent::commit` |
//! | | *running* is not written | *aborted*, FAILED | `Arriving::failed` |
//! | the destination's host | before the commit point | it answers "never", the source goes on | `journal::ask` |
//! | | after it | the pod died with its host; it answers "ran", the source buries its copy | `journal::ask` |
//! | the source's host | before COMMIT | the pod died with its host; *aborted* there | [`await_commit`] |
//! | | after COMMIT | runs at the destination, if COMMIT arrived | [`await_commit`] |
//!
//! A question is answered under the lock of the job: so it comes before the commit point, which then never comes, or
//! after it. `model`, a test, goes through all of this in every order and with any number of faults, and shows that each
//! rule is needed.

use super::journal::{Journal, Phase};
use super::protocol::{Answer, Arrival, Say};
use crate::laps::lap;
use crate::link::{Link, PROTOCOL};
use pod_runtime::{Problem, Result};

/// What the source knows after saying COMMIT.
#[derive(Debug)]
pub enum Said {
    /// It runs there.
    Runs(Arrival),
    /// It was refused there and will not run there.
    Refused(Problem),
    /// No answer came.
    Unknown(Problem),
}

/// Source: the copy here is frozen for good when this is called. After it returns `Unknown` it must stay so.
///
/// # Errors
/// Only before COMMIT was said: the source runs on.
pub fn commit(link: &mut Link, journal: &mut Journal) -> Result<Said> {
    journal.phase(Phase::Committing)?;
    lap("journal");
    link.past_interrupts();
    // From here on even a failed write may have arrived.
    let answer = link.say(&Say::Commit).and_then(|()| link.hear());
    Ok(match answer {
        Ok(Answer::Running(arrival)) => Said::Runs(arrival),
        Ok(Answer::Failed(report)) => Said::Refused(report.into()),
        Ok(_) => Said::Unknown(Problem::new(PROTOCOL, "the answer to COMMIT was something else")),
        Err(problem) => Said::Unknown(problem),
    })
}

/// Destination: everything is restored and stopped. Returns when the pod may run here; any error means that it never
/// will.
pub fn await_commit(link: &mut Link, journal: &mut Journal, arrival: &Arrival) -> Result<()> {
    let heard = link.say(&Answer::Ready(arrival.clone())).and_then(|()| link.hear());
    lap("wait for the commit");
    let problem = match heard {
        Ok(Say::Commit) => match journal.decide(Phase::Running)? {
            Phase::Running => {
                link.past_interrupts();
                return Ok(());
            }
            _ => Problem::new(crate::link::LINK, "the source asked, and was told that the pod will not run here"),
        },
        Ok(Say::Abort(report)) => report.into(),
        Ok(_) => Problem::new(PROTOCOL, "something else came where COMMIT was due"),
        Err(problem) => problem,
    };
    journal.decide(Phase::Aborted)?;
    Err(problem)
}

#[cfg(test)]
mod tests {
    use super::super::journal::{Job, Role, ask};
    use super::*;
    use pod_runtime::status::ProcessKey;
    use pod_runtime::store::Store;
    use std::io::{Read, Write};
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::UnixStream;
    use std::path::Path;
    use std::thread;

    fn store(dir: &Path, name: &str) -> Store {
        Store::open_at(dir.join(name), dir.join(name).join("run")).unwrap()
    }

    fn begin(store: &Store, role: Role, id: &str) -> Journal {
        let phase = if role == Role::Source { Phase::Frozen } else { Phase::Receiving };
        let job = Job { role, ..Job::here(id, phase, ProcessKey::myself().unwrap()) };
        Journal::begin(store, job).unwrap()
    }

    /// A wire that carries this many bytes and then is cut, in both directions.
    fn wire(bytes: usize, mut from: UnixStream, mut to: UnixStream) {
        thread::spawn(move || {
            let mut left = bytes;
            let mut buffer = [0; 512];
            while left > 0 {
                let most = left.min(buffer.len());
                match from.read(&mut buffer[..most]) {
                    Ok(n) if n > 0 && to.write_all(&buffer[..n]).is_ok() => left -= n,
                    _ => break,
                }
            }
            let _ = from.shutdown(std::net::Shutdown::Both);
            let _ = to.shutdown(std::net::Shutdown::Both);
        });
    }

    /// Who runs after a commit over wires of these lengths, once the source could ask.
    fn outcome(there_bytes: usize, back_bytes: usize, round: usize) -> (bool, bool, bool) {
        let dir = tempfile::tempdir().unwrap();
        let (here, there) = (store(dir.path(), "a"), store(dir.path(), "b"));
        let id = format!("{round:08x}");
        let (s_out, w1) = UnixStream::pair().unwrap();
        let (w2, d_in) = UnixStream::pair().unwrap();
        let (d_out, w3) = UnixStream::pair().unwrap();
        let (w4, s_in) = UnixStream::pair().unwrap();
        wire(there_bytes, w1, w2);
        wire(back_bytes, w3, w4);
        let mut arriving = begin(&there, Role::Destination, &id);
        let destination = thread::spawn(move || {
            let Ok(mut link) = Link::open(OwnedFd::from(d_in), OwnedFd::from(d_out), "a", None) else { return false };
            if await_commit(&mut link, &mut arriving, &Arrival::default()).is_err() {
                return false;
            }
            let _ = link.say(&Answer::Running(Arrival::default()));
            true
        });
        let mut journal = begin(&here, Role::Source, &id);
        let source = || -> Result<Said> {
            let mut link = Link::open(OwnedFd::from(s_in), OwnedFd::from(s_out), "b", None)?;
            match link.hear()? {
                Answer::Ready(_) => commit(&mut link, &mut journal),
                _ => Err(Problem::new(PROTOCOL, "not ready")),
            }
        };
        let said = source();
        let mut asked = false;
        let source_runs = match said {
            Ok(Said::Runs(_)) => false,
            Ok(Said::Refused(_)) | Err(_) => true,
            Ok(Said::Unknown(_)) => {
                asked = true;
                ask(&there, &id, "0123456789ab").unwrap() == Phase::Aborted
            }
        };
        let destination_runs = destination.join().unwrap();
        (source_runs, destination_runs, asked)
    }

    #[test]
    fn exactly_one_runs_wherever_the_link_is_cut() {
        let (mut stayed, mut moved, mut asked) = (0, 0, 0);
        let cuts: Vec<usize> = (0..220).step_by(3).collect();
        for (round, cut) in cuts.iter().enumerate() {
            for (there, back) in [(*cut, 10_000), (10_000, *cut)] {
                let (source, destination, had_to_ask) = outcome(there, back, round * 2 + usize::from(there < back));
                assert!(source != destination, "cut {there}/{back}: source {source}, destination {destination}");
                stayed += usize::from(source);
                moved += usize::from(destination);
                asked += usize::from(had_to_ask);
            }
        }
        assert!(stayed > 0 && moved > 0 && asked > 0, "{stayed} {moved} {asked}: all cases were met");
    }

    #[test]
    fn a_commit_that_cannot_be_written_down_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let there = store(dir.path(), "b");
        let mut journal = begin(&there, Role::Destination, "abcdef01");
        // As another version wrote it, so that it cannot be changed where it is; and where the new text is to be written.
        let path = there.jobs_dir().unwrap().join("abcdef01.json");
        std::fs::write(&path, serde_json::to_string(&journal.job).unwrap()).unwrap();
        let beside = there.jobs_dir().unwrap().join(".abcdef01.json.new");
        std::fs::create_dir(&beside).unwrap();
        assert!(journal.decide(Phase::Running).is_err());
        assert_eq!(journal.job.phase, Phase::Receiving);
        std::fs::remove_dir(&beside).unwrap();
        assert_eq!(ask(&there, "abcdef01", "0123456789ab").unwrap(), Phase::Aborted);
        assert_eq!(journal.decide(Phase::Running).unwrap(), Phase::Aborted);
    }

    #[test]
    fn the_commit_point_is_a_word_of_a_text_that_the_disk_has() {
        let dir = tempfile::tempdir().unwrap();
        let there = store(dir.path(), "b");
        let mut journal = begin(&there, Role::Destination, "abcdef01");
        journal.take_over().unwrap();
        let path = there.jobs_dir().unwrap().join("abcdef01.json");
        let before = std::fs::metadata(&path).unwrap();
        assert_eq!(journal.decide(Phase::Running).unwrap(), Phase::Running);
        let after = std::fs::metadata(&path).unwrap();
        assert_eq!((before.ino(), before.len()), (after.ino(), after.len()), "nothing but a word has changed");
        assert_eq!(Journal::open(&there, "abcdef01").unwrap().job.phase, Phase::Running);
        assert_eq!(ask(&there, "abcdef01", "0123456789ab").unwrap(), Phase::Running);
    }

    #[test]
    fn a_late_commit_after_the_question_does_not_run() {
        let dir = tempfile::tempdir().unwrap();
        let there = store(dir.path(), "b");
        let mut journal = begin(&there, Role::Destination, "abcdef01");
        assert_eq!(ask(&there, "abcdef01", "0123456789ab").unwrap(), Phase::Aborted);
        assert_eq!(journal.decide(Phase::Running).unwrap(), Phase::Aborted);
        assert_eq!(ask(&there, "abcdef02", "0123456789ab").unwrap(), Phase::Aborted, "never heard of");
        let late = Job { id: "abcdef02".into(), ..journal.job.clone() };
        assert!(Journal::begin(&there, late).is_err(), "and it cannot begin any more");
    }
}
