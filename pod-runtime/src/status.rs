//! How a pod is doing: its state on this host, as written to `status.json`, and what the kernel says about it.
//!
//! The file is the last word that somebody wrote; whoever wrote it may have died since, or the host may have been
//! rebooted. [`Status::corrected`] holds the file against the kernel: a process is recognised by pid *and* start time,
//! a boot by its id, so a recycled pid is never taken for the pod's.

use crate::problem::{Doing, Problem, Result};
use crate::proc;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs;
use std::os::fd::OwnedFd;
use std::time::{SystemTime, UNIX_EPOCH};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Reserved; its environment is being made.
    Creating,
    Running,
    Paused,
    /// The source of a move, frozen in the commit.
    Migrating,
    Exited,
    /// Lives on another host now; what is left here is the tombstone.
    Moved,
    /// The first process and its monitor are gone and nobody wrote down how it ended (host rebooted, both killed).
    Dead,
}

impl State {
    /// Whether the pod has (or is about to have) processes on this host.
    pub fn is_live(self) -> bool {
        matches!(self, State::Creating | State::Running | State::Paused | State::Migrating)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            State::Creating => "creating",
            State::Running => "running",
            State::Paused => "paused",
            State::Migrating => "migrating",
            State::Exited => "exited",
            State::Moved => "moved",
            State::Dead => "dead",
        })
    }
}

/// One process of this host for all time: a pid alone is reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessKey {
    pub pid: i32,
    /// Clock ticks since boot, field 22 of `/proc/PID/stat`.
    pub start_time: u64,
}

impl ProcessKey {
    /// The process that has this pid now.
    pub fn of(pid: i32) -> Result<ProcessKey> {
        let start_time = start_time(pid).doing(|| format!("read the start time of process {pid}"))?;
        Ok(ProcessKey { pid, start_time })
    }

    pub fn myself() -> Result<ProcessKey> {
        ProcessKey::of(std::process::id() as i32)
    }

    /// Still there and not a zombie that only waits to be reaped.
    pub fn alive(&self) -> bool {
        stat(self.pid).is_ok_and(|(state, start)| start == self.start_time && state != 'Z' && state != 'X')
    }

    /// A descriptor of exactly this process; `None` when it is gone.
    pub fn pidfd(&self) -> Result<Option<OwnedFd>> {
        let fd = match crate::sys::daemon::pidfd_open(self.pid) {
            Ok(fd) => fd,
            Err(Errno::ESRCH) => return Ok(None),
            Err(error) => return Err(error).doing(|| format!("open a pidfd of process {}", self.pid)),
        };
        // The pid may have been reused before the pidfd was opened; after it, it cannot be any more.
        Ok(if start_time(self.pid).is_ok_and(|s| s == self.start_time) { Some(fd) } else { None })
    }
}

fn start_time(pid: i32) -> std::io::Result<u64> {
    stat(pid).map(|(_, start)| start)
}

fn stat(pid: i32) -> std::io::Result<(char, u64)> {
    let text = proc::read(format!("/proc/{pid}/stat"))?;
    parse_stat(&text).ok_or_else(|| std::io::Error::other("unexpected /proc/PID/stat"))
}

/// State and start time; the command name may hold anything, parentheses and spaces too.
fn parse_stat(text: &str) -> Option<(char, u64)> {
    let rest = &text[text.rfind(')')? + 1..];
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// The pod's `status.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub state: State,
    /// Pid 1 of the pod, as this host numbers it.
    #[serde(default)]
    pub init: Option<ProcessKey>,
    /// The monitor; while the pod is being created, who creates it.
    #[serde(default)]
    pub monitor: Option<ProcessKey>,
    #[serde(default)]
    pub exit_code: Option<i32>,
    /// Whether the kernel's OOM killer ended it.
    #[serde(default)]
    pub oom_killed: bool,
    /// Why it was ended by us, if it was.
    #[serde(default)]
    pub problem: Option<String>,
    /// Seconds since the epoch.
    #[serde(default)]
    pub started: Option<u64>,
    #[serde(default)]
    pub finished: Option<u64>,
    #[serde(default)]
    pub moved_to: Option<String>,
    #[serde(default)]
    pub moved_at: Option<u64>,
    pub boot_id: String,
    /// The migration that the pod is part of.
    #[serde(default)]
    pub job: Option<String>,
    /// A restored pod that is still [`State::Creating`] may have spoken from here on: it has to run, whatever becomes of its
    /// monitor.
    #[serde(default)]
    pub let_go: bool,
    /// Not in the file: the monitor is gone though the pod runs. Set by [`Status::corrected`].
    #[serde(default, skip_deserializing)]
    pub monitor_lost: bool,
}

impl Status {
    /// A pod that this process has begun to create.
    pub fn creating() -> Result<Status> {
        Ok(Status {
            state: State::Creating,
            init: None,
            monitor: Some(ProcessKey::myself()?),
            exit_code: None,
            oom_killed: false,
            problem: None,
            started: None,
            finished: None,
            moved_to: None,
            moved_at: None,
            boot_id: boot_id()?,
            job: None,
            let_go: false,
            monitor_lost: false,
        })
    }

    /// Whether the pod was stopped for good for this move.
    pub fn is_leaving(&self, job: &str) -> bool {
        self.state == State::Migrating && self.job.as_deref() == Some(job)
    }

    /// What the file says, held against the kernel.
    #[must_use]
    pub fn corrected(mut self) -> Status {
        if !self.state.is_live() {
            return self;
        }
        if boot_id().is_ok_and(|now| now != self.boot_id) {
            self.state = State::Dead;
            return self;
        }
        let monitor = self.monitor.is_some_and(|key| key.alive());
        if monitor {
            return self;
        }
        if self.init.is_some_and(|key| key.alive()) {
            self.monitor_lost = true;
        } else {
            self.state = State::Dead;
        }
        self
    }
}

/// Changes with every boot of the host.
pub fn boot_id() -> Result<String> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").doing(|| "read the boot id".into())?;
    Ok(text.trim().to_owned())
}

/// Seconds since the epoch.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// The pod is not in a state in which this can be done. `wanted` reads as "running".
pub fn wrong_state(name: &str, state: State, wanted: &str) -> Problem {
    Problem::new("E-STATE", format!("pod '{name}' is {state}, not {wanted}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_with_a_hostile_name() {
        let text = "12 (a) b (c) R 1 12 12 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 98765 1000 1";
        assert_eq!(parse_stat(text), Some(('R', 98765)));
        assert_eq!(parse_stat(""), None);
        assert_eq!(parse_stat("1 (x) S"), None);
    }

    #[test]
    fn own_key_is_alive_and_a_wrong_start_time_is_not() {
        let key = ProcessKey::myself().unwrap();
        assert!(key.alive());
        assert!(key.pidfd().unwrap().is_some());
        let other = ProcessKey { start_time: key.start_time + 1, ..key };
        assert!(!other.alive());
        assert!(other.pidfd().unwrap().is_none());
    }

    #[test]
    fn another_boot_is_dead() {
        let mut status = Status::creating().unwrap();
        assert_eq!(status.clone().corrected().state, State::Creating);
        status.boot_id = "other".into();
        assert_eq!(status.corrected().state, State::Dead);
    }

    #[test]
    fn running_without_a_monitor_is_said() {
        let mut status = Status::creating().unwrap();
        status.state = State::Running;
        status.init = status.monitor;
        status.monitor = Some(ProcessKey { pid: 1, start_time: u64::MAX });
        let corrected = status.clone().corrected();
        assert!(corrected.monitor_lost && corrected.state == State::Running);
        status.init = None;
        assert_eq!(status.corrected().state, State::Dead);
    }
}
