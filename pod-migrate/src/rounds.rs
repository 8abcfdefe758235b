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
    /// The pod gets less CPU time, by steps, until it is little enough or less is not possible; then as [`OnStall::Switch`].
    Throttle,
    /// What is left comes when the pod runs there.
    Postcopy,
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
    /// It does not become little enough, for the reason said: the pod is to have less CPU time ([`Rounds::slowed`]), or, where it
    /// cannot have less, this is [`Next::Long`].
    Throttle(String),
    /// It does not become little enough: the pod will stand still for longer than it should, and this is to be said.
    Long(String),
    /// It does not become little enough: what is left comes when the pod runs there, and this is to be said.
    Follow(String),
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
    /// They become shorter, be it by little.
    shorter: bool,
    /// What the next round sends was written while the pod had more CPU time than it has now.
    slowed: bool,
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
        Rounds { downtime, on_stall, done: 0, before: None, speed: 0.0, estimate: None, shorter: false, slowed: false }
    }

    /// How many there were.
    pub fn done(&self) -> u32 {
        self.done
    }

    /// What the last one lets expect. None before the second: what the first sends was not written during one.
    pub fn estimate(&self) -> Option<Estimate> {
        self.estimate
    }

    /// The pod has less CPU time from now on: what that leads to the next round does not show yet.
    pub fn slowed(&mut self) {
        self.slowed = true;
    }

    /// Whether there should be more of them for a pod that has as little CPU time as it may have: the last one was shorter than the one
    /// before, and by little is better than not at all.
    pub fn still_pay(&self) -> bool {
        self.shorter && self.done < MOST
    }

    /// After a round. A link that is held back on purpose is taken for as fast as it may be: what it could do while the
    /// pod stands still nobody has seen.
    pub fn judge(&mut self, pass: Pass) -> Result<Next> {
        self.done += 1;
        let sending = pass.took.saturating_sub(pass.compared);
        self.speed = self.speed.max(pass.written as f64 / sending.as_secs_f64().max(1e-6));
        let Some(before) = self.before.replace(pass) else { return Ok(Next::Again) };
        // What was written during this round is at most what was written during the one before, as long as those become
        // shorter: that much is expected to be left.
        let left = Duration::from_secs_f64(pass.written as f64 / self.speed.max(1.0));
        let written = pass.written as f64 / before.took.as_secs_f64().max(1e-6);
        let in_all = left + pass.at_rest;
        self.estimate = Some(Estimate { written_per_second: written as u64, expected_ms: in_all.as_secs_f64() * 1e3 });
        if left.as_secs_f64() < self.downtime.as_secs_f64() / SHARE_OF_DOWNTIME {
            return self.enough(pass, in_all);
        }
        self.shorter = pass.written <= before.written / 10 * 9;
        let shorter = pass.written <= before.written / 4 * 3 && self.done < MOST;
        if std::mem::take(&mut self.slowed) || shorter {
            return Ok(Next::Again);
        }
        if left < self.downtime {
            return self.enough(pass, in_all);
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
            OnStall::Throttle => Ok(Next::Throttle(what)),
            OnStall::Postcopy => Ok(Next::Follow(what)),
            OnStall::Abort => Err(Problem::new(STALL, what).fix(
                "move it when it has less to do, give it --downtime, or --on-stall throttle (less CPU time) or switch (it stands still)",
            )),
        }
    }
}

impl Rounds {
    /// What was written is little enough. What is compared takes as long as there is of it, and no more rounds change that.
    fn enough(&self, pass: Pass, in_all: Duration) -> Result<Next> {
        if self.on_stall != OnStall::Abort || in_all < self.downtime {
            return Ok(Next::Enough);
        }
        let (all, compared) = (in_all.as_millis(), pass.at_rest.as_millis());
        let what = format!(
            "the pod would stand still for up to {all} ms, not {}: its shared memory alone takes {compared} to be compared",
            self.downtime.as_millis(),
        );
        Err(Problem::new(STALL, what).fix("give it --downtime, or --on-stall switch"))
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
        Pass { written: mib * MIB, took: Duration::from_millis(ms), ..Pass::default() }
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
    fn less_cpu_time_shows_in_the_round_after_the_next() {
        let mut rounds = Rounds::new(Duration::from_millis(40), OnStall::Throttle);
        let judge = |rounds: &mut Rounds, mib, ms| rounds.judge(pass(mib, ms)).unwrap();
        let step = |next: Next| matches!(next, Next::Throttle(what) if what.contains("MiB/s"));
        assert_eq!(judge(&mut rounds, 1000, 1000), Next::Again);
        assert!(step(judge(&mut rounds, 800, 800)));
        rounds.slowed();
        // Written before that, all the same as fast.
        assert_eq!(judge(&mut rounds, 790, 800), Next::Again);
        // Half as fast helps; then it stays, and that is too much, and the next step is enough.
        assert_eq!(judge(&mut rounds, 400, 400), Next::Again);
        assert!(step(judge(&mut rounds, 390, 400)) && !rounds.still_pay());
        rounds.slowed();
        assert_eq!(judge(&mut rounds, 385, 400), Next::Again);
        assert_eq!(judge(&mut rounds, 50, 50), Next::Again);
        assert!(step(judge(&mut rounds, 44, 45)) && rounds.still_pay());
        assert_eq!(judge(&mut rounds, 35, 40), Next::Enough);
        // What is little is enough at once.
        rounds.slowed();
        assert_eq!(judge(&mut rounds, 2, 4), Next::Enough);
    }

    #[test]
    fn what_is_compared_counts() {
        let (compared, at_rest) = (Duration::from_millis(100), Duration::from_millis(50));
        let passes = [pass(1000, 1000), pass(2, 102), pass(2, 102)].map(|pass| Pass { compared, at_rest, ..pass });
        let judge = |on_stall| rounds(on_stall, &passes).pop().unwrap();
        assert_eq!(judge(OnStall::Switch).unwrap(), Next::Enough);
        let problem = judge(OnStall::Abort).unwrap_err();
        assert!(problem.code() == STALL && problem.what().contains("takes 50 to be compared"), "{}", problem.what());
        let mut rounds = Rounds::new(Duration::from_millis(40), OnStall::Switch);
        passes.iter().for_each(|pass| drop(rounds.judge(*pass).unwrap()));
        // 2 MiB took 2 ms to be sent.
        assert!((51.0..53.0).contains(&rounds.estimate().unwrap().expected_ms), "{:?}", rounds.estimate());
    }

    #[test]
    fn nothing_at_all_is_enough() {
        let mut rounds = Rounds::new(Duration::from_millis(40), OnStall::Abort);
        let none = Pass::default();
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
            rounds.judge(Pass { written: size, took: Duration::from_millis(1), ..Pass::default() }).unwrap()
                != Next::Again
        });
        assert_eq!(many, Some(MOST as usize - 1));
    }
}
