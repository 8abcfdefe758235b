//! Less CPU time for a pod that writes its memory as fast as it is sent: half of what it used, then half of that, until
//! rounds become shorter or it has no more than a small part.
//!
//! The pod's monitor does it, and undoes it when its connection ends, however that comes ([`client::Throttle`]).

use super::progress::Throttled;
use pod_runtime::cgroup::Cgroup;
use pod_runtime::cgroup::throttle::{LEAST, ONE_CPU};
use pod_runtime::monitor::client;
use pod_runtime::store::Pod;
use pod_runtime::{Problem, Result};
use std::thread::available_parallelism;
use std::time::Instant;

/// The pod keeps one part in so many of what it used, at least.
pub const MOST: u64 = 16;

/// What a pod gets while its memory goes ahead.
pub struct Throttling {
    pod: Pod,
    /// When its rounds began, and what it had used by then, in microseconds.
    begin: (Instant, Option<u64>),
    slowed: Option<Slowed>,
}

struct Slowed {
    hold: client::Throttle,
    since: Instant,
    /// Millionths of a CPU: what it used, and what it gets now.
    full: u64,
    now: u64,
}

impl Slowed {
    fn percentage(&self) -> u64 {
        100 - (self.now * 100 / self.full).min(100)
    }
}

impl Throttling {
    /// Its rounds begin.
    pub fn begin(pod: &Pod) -> Throttling {
        Throttling { pod: pod.clone(), begin: (Instant::now(), used(pod)), slowed: None }
    }

    /// Gives it less: how much of what it used it does not get now, in percent. None when it has as little as it may have.
    pub fn step(&mut self) -> Result<Option<u64>> {
        let (full, before) = self.slowed.as_ref().map_or_else(|| (self.full(), self.full()), |s| (s.full, s.now));
        let Some(next) = next(full, before) else { return Ok(None) };
        match &mut self.slowed {
            Some(slowed) => {
                slowed.hold.set(next)?;
                slowed.now = next;
            }
            None => {
                let hold = client::Throttle::begin(&self.pod, next)?;
                self.slowed = Some(Slowed { hold, since: Instant::now(), full, now: next });
            }
        }
        Ok(self.slowed.as_ref().map(Slowed::percentage))
    }

    /// What it used a second since its rounds began.
    fn full(&self) -> u64 {
        let (since, before) = self.begin;
        let micros = since.elapsed().as_micros().max(1) as u64;
        match before.zip(used(&self.pod)) {
            Some((before, now)) => now.saturating_sub(before).saturating_mul(ONE_CPU) / micros,
            None => available_parallelism().map_or(1, |all| all.get() as u64) * ONE_CPU,
        }
    }

    /// For the one who ends it, and what is to be said of it when it ended then.
    pub fn end(self) -> (Option<client::Throttle>, impl FnOnce(Instant) -> Option<Throttled>) {
        let said = self.slowed.as_ref().map(|slowed| (slowed.percentage(), slowed.since));
        let told = move |end: Instant| {
            let (percentage, since) = said?;
            Some(Throttled { percentage, ms: end.saturating_duration_since(since).as_secs_f64() * 1e3 })
        };
        (self.slowed.map(|slowed| slowed.hold), told)
    }

    /// The pod has what it is due, at once.
    pub fn lift(&mut self) {
        self.slowed = None;
    }
}

/// Half of what it has, as long as that is not too little.
fn next(full: u64, before: u64) -> Option<u64> {
    let floor = LEAST.max(full / MOST);
    (before > floor).then(|| (before / 2).max(floor))
}

fn used(pod: &Pod) -> Option<u64> {
    Cgroup::open(pod.id()).and_then(|cgroup| cgroup.stats()).ok()?.cpu
}

/// What is said when it has less now.
pub fn slower(why: &str, percentage: u64) -> String {
    format!("{why}; from now on it has {} % of the CPU time that it used", 100 - percentage)
}

/// Why it does not get less. None: it has as little as it may have.
pub fn no_slower(problem: Option<Problem>) -> String {
    match problem {
        None => "with as little CPU time as it may have".to_owned(),
        Some(problem) => format!("it cannot be given less CPU time ({})", problem.chain()),
    }
}

/// For the report.
pub fn told(throttled: &Throttled) -> String {
    let left = 100 - throttled.percentage;
    format!(
        "before it stood still the pod was throttled for {:.0} ms, down to {left} % of the CPU time that it used",
        throttled.ms
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(full: u64) -> Vec<u64> {
        std::iter::successors(next(full, full), |before| next(full, *before)).collect()
    }

    #[test]
    fn halves_down_to_a_small_part() {
        assert_eq!(steps(ONE_CPU), [500_000, 250_000, 125_000, LEAST]);
        assert_eq!(steps(8 * ONE_CPU), [4_000_000, 2_000_000, 1_000_000, 500_000]);
        assert_eq!(steps(LEAST + 1), [LEAST]);
        assert!(steps(LEAST).is_empty() && steps(0).is_empty());
    }
}
