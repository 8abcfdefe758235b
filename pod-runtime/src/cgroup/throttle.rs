//! Less CPU time for a pod, for a while: the CPU limit of its group, v1 or v2, is lowered and put back.
//!
//! The period is short, so that who waits for the pod sees many short pauses and no long one. What was there before is
//! written down in a file ([`NOTE`]) before anything is changed: where whoever throttles is killed, the next one puts it
//! back ([`undo`]). What somebody else sets meanwhile is theirs: it is what is put back. Nothing is ever raised.
//!
//! Groups that a program has made below the pod's own have no more than that together; v1 refuses a limit below one of
//! theirs, and then the pod cannot be throttled.

use super::Cgroup;
use crate::problem::{Doing, Problem, Result};
use crate::store::{read_json, write_json_quickly};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Millionths of a CPU: microseconds in a second.
pub const ONE_CPU: u64 = 1_000_000;
/// The kernel refuses a quota of less than a millisecond.
pub const LEAST: u64 = LEAST_QUOTA * ONE_CPU / PERIOD;

/// Microseconds.
const PERIOD: u64 = 10_000;
const LEAST_QUOTA: u64 = 1_000;
/// In the pod's run directory, while it is throttled.
const NOTE: &str = "throttled";

/// A limit as the kernel has it, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Limit {
    /// None is no limit.
    quota: Option<u64>,
    period: u64,
}

impl Limit {
    /// So many millionths of a CPU.
    fn of(cpu: u64) -> Limit {
        Limit { quota: Some((cpu * PERIOD / ONE_CPU).max(LEAST_QUOTA)), period: PERIOD }
    }

    fn is_less_than(&self, other: &Limit) -> bool {
        match (self.quota, other.quota) {
            (Some(own), Some(theirs)) => {
                u128::from(own) * u128::from(other.period) < u128::from(theirs) * u128::from(self.period)
            }
            (own, theirs) => own.is_some() && theirs.is_none(),
        }
    }
}

/// What is written down of a pod that is throttled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    /// To be put back.
    was: Limit,
    /// What was there when this was written, and what was set then: v1 has them half and half in between.
    ours: [Limit; 2],
}

impl Note {
    /// Whether a limit is not somebody else's.
    fn knows(&self, now: &Limit) -> bool {
        let all = [self.was, self.ours[0], self.ours[1]];
        all.iter().any(|limit| limit.quota == now.quota) && all.iter().any(|limit| limit.period == now.period)
    }
}

/// The files of a limit.
#[derive(Debug, Clone)]
enum Files {
    V1(PathBuf),
    V2(PathBuf),
}

impl Files {
    fn of(cgroup: &Cgroup) -> Option<Files> {
        let v1 = cgroup.v1("cpu").filter(|folder| folder.join("cpu.cfs_quota_us").exists()).map(Files::V1);
        v1.or_else(|| cgroup.unified().filter(|folder| folder.join("cpu.max").exists()).map(Files::V2))
    }

    fn read(&self) -> io::Result<Limit> {
        let number = |text: &str| text.parse::<u64>().map_err(io::Error::other);
        match self {
            Files::V1(folder) => {
                let text = |name| fs::read_to_string(folder.join(name));
                let (quota, period) = (text("cpu.cfs_quota_us")?, text("cpu.cfs_period_us")?);
                Ok(Limit { quota: quota.trim().parse().ok(), period: number(period.trim())? })
            }
            Files::V2(folder) => {
                let text = fs::read_to_string(folder.join("cpu.max"))?;
                let (quota, period) = text.trim().split_once(' ').ok_or(io::ErrorKind::InvalidData)?;
                Ok(Limit { quota: quota.parse().ok(), period: number(period)? })
            }
        }
    }

    fn write(&self, from: Limit, to: Limit) -> io::Result<()> {
        match self {
            Files::V1(folder) => {
                let quota = to.quota.map_or("-1".to_owned(), |quota| quota.to_string());
                let quota = || fs::write(folder.join("cpu.cfs_quota_us"), &quota);
                let period = || fs::write(folder.join("cpu.cfs_period_us"), to.period.to_string());
                // In between the pod has less than before and after, never more.
                let quota_first = match (from.quota, to.quota) {
                    (None, _) => false,
                    (_, None) => true,
                    _ => to.period < from.period,
                };
                if quota_first { quota().and_then(|()| period()) } else { period().and_then(|()| quota()) }
            }
            Files::V2(folder) => {
                let quota = to.quota.map_or("max".to_owned(), |quota| quota.to_string());
                fs::write(folder.join("cpu.max"), format!("{quota} {}", to.period))
            }
        }
    }
}

/// A pod that is throttled. Dropping it gives the pod what it had.
#[derive(Debug)]
pub struct Throttle {
    files: Files,
    note: PathBuf,
    was: Limit,
    set: Option<Limit>,
}

impl Throttle {
    /// `run_dir` is the pod's.
    pub fn begin(cgroup: &Cgroup, run_dir: &Path) -> Result<Throttle> {
        let files = Files::of(cgroup).ok_or_else(|| {
            Problem::new("E-CGROUP", "this host has no cpu cgroup controller by which the pod could be throttled")
        })?;
        // Of one who was killed: what was there before is in there, and not in the group.
        undo(cgroup, run_dir);
        let was = files.read().doing(|| "read the pod's CPU limit".into())?;
        Ok(Throttle { files, note: run_dir.join(NOTE), was, set: None })
    }

    /// At most so many millionths of a CPU from now on.
    pub fn set(&mut self, cpu: u64) -> Result<()> {
        let now = self.files.read().doing(|| "read the pod's CPU limit".into())?;
        if self.set.is_none_or(|set| set != now) {
            self.was = now;
            self.set = None;
        }
        let to = Limit::of(cpu);
        if !to.is_less_than(&self.was) {
            return Err(Problem::new("E-CGROUP", "the pod's own CPU limit is no higher than what it would be given"));
        }
        write_json_quickly(&self.note, &Note { was: self.was, ours: [now, to] })?;
        if let Err(error) = self.files.write(now, to) {
            // Also half of a change.
            logged(put_back(&self.files, self.was, &self.note));
            self.set = None;
            return Err(error).doing(|| "lower the pod's CPU limit".into());
        }
        self.set = Some(to);
        Ok(())
    }

    /// Gives the pod what it had. Dropping it does the same, and tells nobody whether it could.
    pub fn end(&mut self) -> Result<()> {
        let Some(set) = self.set else { return Ok(()) };
        match self.files.read() {
            Ok(now) if now == set => put_back(&self.files, self.was, &self.note)?,
            // Somebody else has set it since; or the pod has ended, and the group is gone.
            _ => drop(fs::remove_file(&self.note)),
        }
        self.set = None;
        Ok(())
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        logged(self.end());
    }
}

fn logged(put_back: Result<()>) {
    if let Err(problem) = put_back {
        tracing::error!(problem = problem.chain(), "the pod's CPU limit could not be put back");
    }
}

/// Gives a pod back what it had before it was throttled by somebody who was killed. Nobody throttles it now.
pub fn undo(cgroup: &Cgroup, run_dir: &Path) {
    if let Some(files) = Files::of(cgroup) {
        undo_by(&files, &run_dir.join(NOTE));
    }
}

fn undo_by(files: &Files, note: &Path) {
    let Ok(noted) = read_json::<Note>(note) else { return };
    if files.read().is_ok_and(|now| !noted.knows(&now)) {
        // Somebody else has set it since.
        let _ = fs::remove_file(note);
        return;
    }
    logged(put_back(files, noted.was, note));
}

/// Whether there is something to undo.
pub fn is_noted(run_dir: &Path) -> bool {
    run_dir.join(NOTE).exists()
}

fn put_back(files: &Files, was: Limit, note: &Path) -> Result<()> {
    let here = || "put the pod's CPU limit back".into();
    let now = files.read().doing(here)?;
    // What is not lower is not ours, but for the first half of a limit where there was none.
    let half = now.quota.is_none() && was.quota.is_none() && now.period != was.period;
    if now.is_less_than(&was) || half {
        files.write(now, was).doing(here)?;
    }
    let _ = fs::remove_file(note);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Limit = Limit { quota: None, period: 100_000 };

    /// A folder that is written as a group of v2 is.
    fn v2(text: &str) -> (tempfile::TempDir, Throttle) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cpu.max"), text).unwrap();
        let files = Files::V2(dir.path().to_owned());
        let was = files.read().unwrap();
        let throttle = Throttle { files, note: dir.path().join(NOTE), was, set: None };
        (dir, throttle)
    }

    fn says(dir: &tempfile::TempDir) -> String {
        fs::read_to_string(dir.path().join("cpu.max")).unwrap()
    }

    #[test]
    fn less_is_by_the_share_and_not_by_the_quota() {
        let half = Limit::of(ONE_CPU / 2);
        assert_eq!(half, Limit { quota: Some(5_000), period: 10_000 });
        assert!(half.is_less_than(&NONE) && !NONE.is_less_than(&half) && !NONE.is_less_than(&NONE));
        let own = Limit { quota: Some(40_000), period: 100_000 };
        assert!(own.is_less_than(&half) && !half.is_less_than(&own));
        assert_eq!(Limit::of(1), Limit::of(LEAST));
    }

    #[test]
    fn what_was_there_is_back_and_was_written_down() {
        let (dir, mut throttle) = v2("150000 100000\n");
        throttle.set(ONE_CPU / 2).unwrap();
        assert_eq!(says(&dir), "5000 10000");
        throttle.set(ONE_CPU / 4).unwrap();
        assert_eq!(says(&dir), "2500 10000");
        let noted: Note = read_json(&dir.path().join(NOTE)).unwrap();
        assert_eq!(noted.was, Limit { quota: Some(150_000), period: 100_000 });
        drop(throttle);
        assert_eq!(says(&dir), "150000 100000");
        assert!(!is_noted(dir.path()));
    }

    #[test]
    fn nothing_is_raised() {
        let (dir, mut throttle) = v2("30000 100000\n");
        assert_eq!(throttle.set(ONE_CPU / 2).unwrap_err().code(), "E-CGROUP");
        throttle.set(ONE_CPU / 5).unwrap();
        drop(throttle);
        assert_eq!(says(&dir), "30000 100000");
    }

    #[test]
    fn what_somebody_else_sets_meanwhile_is_theirs() {
        let (dir, mut throttle) = v2("max 100000\n");
        throttle.set(ONE_CPU / 2).unwrap();
        fs::write(dir.path().join("cpu.max"), "40000 100000").unwrap();
        throttle.set(ONE_CPU / 4).unwrap();
        drop(throttle);
        assert_eq!(says(&dir), "40000 100000");
        let (dir, mut throttle) = v2("max 100000\n");
        throttle.set(ONE_CPU / 2).unwrap();
        fs::write(dir.path().join("cpu.max"), "20000 100000").unwrap();
        drop(throttle);
        assert_eq!(says(&dir), "20000 100000");
        assert!(!is_noted(dir.path()));
    }

    #[test]
    fn who_comes_after_one_who_was_killed_puts_back_what_is_ours() {
        for (found, left) in [
            ("2500 10000", "150000 100000"),
            ("5000 10000", "150000 100000"),
            // Half of it, as v1 would have it in between.
            ("2500 100000", "150000 100000"),
            // Somebody else has set that.
            ("20000 100000", "20000 100000"),
            ("max 100000", "max 100000"),
        ] {
            let (dir, mut throttle) = v2("150000 100000\n");
            throttle.set(ONE_CPU / 2).unwrap();
            throttle.set(ONE_CPU / 4).unwrap();
            std::mem::forget(throttle);
            fs::write(dir.path().join("cpu.max"), found).unwrap();
            undo_by(&Files::V2(dir.path().to_owned()), &dir.path().join(NOTE));
            assert_eq!((says(&dir).as_str(), is_noted(dir.path())), (left, false), "{found}");
        }
    }

    #[test]
    fn halves_of_v1_are_never_more_than_both() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let set = |limit: Limit| {
            fs::write(at("cpu.cfs_quota_us"), limit.quota.map_or("-1".into(), |quota| quota.to_string())).unwrap();
            fs::write(at("cpu.cfs_period_us"), limit.period.to_string()).unwrap();
        };
        let files = Files::V1(dir.path().to_owned());
        let own = Limit { quota: Some(150_000), period: 100_000 };
        for (from, to) in
            [(NONE, Limit::of(ONE_CPU)), (own, Limit::of(ONE_CPU)), (Limit::of(ONE_CPU), NONE), (Limit::of(7), own)]
        {
            set(from);
            // The second half fails: what is there then is what is there in between.
            let second = if from.quota.is_none() || (to.quota.is_some() && to.period > from.period) {
                "cpu.cfs_quota_us"
            } else {
                "cpu.cfs_period_us"
            };
            let kept = fs::read(at(second)).unwrap();
            files.write(from, to).unwrap();
            assert_eq!(files.read().unwrap(), to);
            fs::write(at(second), kept).unwrap();
            let between = files.read().unwrap();
            let more = |limit: &Limit| limit.is_less_than(&between);
            assert!(!(more(&from) && more(&to)), "{from:?} {between:?} {to:?}");
        }
    }
}
