//! How often memory goes ahead of a pod that runs, and what is done when that leads nowhere.
//!
//! Each round sends what was written during the one before. While rounds become shorter they are worth it. When what is
//! left can be sent in a small part of the time for which the pod may stand still, that is enough; when a program writes as
//! fast as its memory is sent, more rounds help nobody, and somebody has to decide: [`OnStall`].

use crate::objects::memory::tracking::Pass;
use pod_runtime::{Problem, Result};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// How long a pod should stand still at most, if it lets itself be had.
pub const DOWNTIME: Duration = Duration::from_millis(30);
/// As long as rounds become shorter, memory is to take one part in so many of the time that the pod may stand still.
const SHARE_OF_DOWNTIME: f64 = 16.0;
/// More rounds than that are none that become shorter.
const MOST: u32 = 30;

/// Memory is written as fast as it is sent.
pub const STALL: &str = "E-STALL";

/// What is done when rounds do not become shorter and what is left is too much.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnStall {
    /// The pod stands still for as long as it takes.
    #[default]
    Switch,
    /// It is given up; the pod runs on as if nothing had happened.
    Abort,
}

/// What a round led to.
#[derive(Debug, Clone, PartialEq)]
pub enum Next {
    /// Another one is worth it.
    Again,
    /// What is left is little enough, or as little as it becomes.
    Enough,
    /// It does not become little enough: the pod will stand still for longer than it should, and this is to be said.
    Long(String),
}

/// The rounds of one pod.
#[derive(Debug)]
pub struct Rounds {
    downtime: Duration,
    on_stall: OnStall,
    done: u32,
    before: Option<Pass>,
    /// Bytes a second, in the best of the rounds: a short one is mostly the search for what was written.
    speed: f64,
    estimate: Option<Estimate>,
}

/// What a round lets expect.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// Bytes that the pod writes, each page counted once a round.
    pub written_per_second: u64,
    /// How long the pod would stand still for its memory alone, if it stopped now.
    pub expected_ms: f64,
}

impl Default for Rounds {
    fn default() -> Rounds {
        Rounds::new(DOWNTIME, OnStall::default())
    }
}

impl Rounds {
    pub fn new(downtime: Duration, on_stall: OnStall) -> Rounds {
        Rounds { downtime, on_stall, done: 0, before: None, speed: 0.0, estimate: None }
    }

    /// How many there were.
    pub fn done(&self) -> u32 {
        self.done
    }

    /// What the last one lets expect. None before the second: what the first sends was not written during one.
    pub fn estimate(&self) -> Option<Estimate> {
        self.estimate
    }

    /// After a round. A link that is held back on purpose is taken for as fast as it may be: what it could do while the
    /// pod stands still nobody has seen.
    pub fn judge(&mut self, pass: Pass) -> Result<Next> {
        self.done += 1;
        self.speed = self.speed.max(pass.written as f64 / pass.took.as_secs_f64().max(1e-6));
        let Some(before) = self.before.replace(pass) else { return Ok(Next::Again) };
        // What was written during this round is at most what was written during the one before, as long as those become
        // shorter: that much is expected to be left.
        let left = Duration::from_secs_f64(pass.written as f64 / self.speed.max(1.0));
        let written = pass.written as f64 / before.took.as_secs_f64().max(1e-6);
        self.estimate = Some(Estimate { written_per_second: written as u64, expected_ms: left.as_secs_f64() * 1e3 });
        if left.as_secs_f64() < self.downtime.as_secs_f64() / SHARE_OF_DOWNTIME {
            return Ok(Next::Enough);
        }
        if pass.written <= before.written / 4 * 3 && self.done < MOST {
            return Ok(Next::Again);
        }
        if left < self.downtime {
            return Ok(Next::Enough);
        }
        let what = format!(
            "memory is written as fast as it is sent ({} MiB/s beside {} MiB/s): the pod would stand still for up to {} ms, not {}",
            mib(written),
            mib(self.speed),
            left.as_millis(),
            self.downtime.as_millis(),
        );
        match self.on_stall {
            OnStall::Switch => Ok(Next::Long(what)),
            OnStall::Abort => Err(Problem::new(STALL, what).fix(
                "move it when it has less to do, give it --downtime, or let it stand still with --on-stall switch",
            )),
        }
    }
}

fn mib(bytes: f64) -> u64 {
    (bytes / f64::from(1 << 20)).round() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn pass(mib: u64, ms: u64) -> Pass {
        Pass { written: mib * MIB, took: Duration::from_millis(ms) }
    }

    fn rounds(on_stall: OnStall, passes: &[Pass]) -> Vec<Result<Next>> {
        let mut rounds = Rounds::new(Duration::from_millis(40), on_stall);
        passes.iter().map(|pass| rounds.judge(*pass)).collect()
    }

    #[test]
    fn as_long_as_they_become_shorter() {
        // At 1000 MiB a second a sixteenth of what it may take is 2.5 MiB.
        let judged = rounds(OnStall::Abort, &[pass(1000, 1000), pass(100, 120), pass(11, 15), pass(2, 4)]);
        let judged: Vec<Next> = judged.into_iter().map(|next| next.unwrap()).collect();
        assert_eq!(judged, [Next::Again, Next::Again, Next::Again, Next::Enough]);
    }

    #[test]
    fn little_that_stays_is_enough() {
        let judged = rounds(OnStall::Abort, &[pass(1000, 1000), pass(32, 40), pass(30, 38)]);
        assert_eq!(judged.into_iter().last().unwrap().unwrap(), Next::Enough);
    }

    #[test]
    fn much_that_stays_is_said_or_refused() {
        let busy = [pass(1000, 1000), pass(700, 700), pass(690, 700)];
        let Ok(Next::Long(what)) = rounds(OnStall::Switch, &busy).pop().unwrap() else { panic!("it goes on") };
        assert!(what.contains("986 MiB/s beside 1000 MiB/s") && what.contains("690 ms, not 40"), "{what}");
        let problem = rounds(OnStall::Abort, &busy).pop().unwrap().unwrap_err();
        assert_eq!(problem.code(), STALL);
    }

    #[test]
    fn nothing_at_all_is_enough() {
        let mut rounds = Rounds::new(Duration::from_millis(40), OnStall::Abort);
        let none = Pass { written: 0, took: Duration::ZERO };
        assert_eq!(rounds.judge(none).unwrap(), Next::Again);
        assert_eq!(rounds.judge(none).unwrap(), Next::Enough);
        assert_eq!(rounds.estimate(), Some(Estimate { written_per_second: 0, expected_ms: 0.0 }));
    }

    #[test]
    fn they_end() {
        let mut rounds = Rounds::new(Duration::ZERO, OnStall::Switch);
        let mut size = 1 << 50;
        let many = (0..100).position(|_| {
            size = size / 4 * 3;
            rounds.judge(Pass { written: size, took: Duration::from_millis(1) }).unwrap() != Next::Again
        });
        assert_eq!(many, Some(MOST as usize - 1));
    }
}
