//! Threads that wait with a time-out in every call that has one: each goes on for the time that remains, and never
//! ends with EINTR, for no signal comes.

use crate::{Guest, sys};
use anyhow::{Result, ensure};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// One wait; half of it is over when the guest is ready to be moved.
const TIME: i64 = 8_000_000_000;
/// How long the pod may stand still meanwhile, by its own clock. Below half a wait: one that begins anew ends that late.
const LATE: i64 = 3_500_000_000;

/// What each wait returned, and how long it took; None while it lasts.
type Results = Arc<Mutex<BTreeMap<&'static str, Option<(i32, i64)>>>>;

struct TimeOuts {
    results: Results,
}

fn wait(results: &Results, name: &'static str, expected: i32, call: fn(i64) -> i32) {
    if let Ok(mut results) = results.lock() {
        results.insert(name, None);
    }
    let results = results.clone();
    std::thread::spawn(move || {
        let _ = nix::sys::signal::SigSet::all().thread_block();
        let before = sys::clock(libc::CLOCK_MONOTONIC).unwrap_or(0);
        let ended = call(TIME);
        let took = sys::clock(libc::CLOCK_MONOTONIC).unwrap_or(0) - before;
        if let Ok(mut results) = results.lock() {
            results.insert(name, Some((ended - expected, took)));
        }
    });
}

impl TimeOuts {
    /// Begins all waits, and returns when half of their time has passed.
    fn begin() -> Result<TimeOuts> {
        let results = Results::default();
        for (name, expected, call) in sys::WAITS {
            wait(&results, name, *expected, *call);
        }
        let half = sys::clock(libc::CLOCK_MONOTONIC)? + TIME / 2;
        crate::until("half of the time", || sys::clock(libc::CLOCK_MONOTONIC).is_ok_and(|now| now > half))?;
        Ok(TimeOuts { results })
    }

    fn ended(&self) -> Option<BTreeMap<&'static str, (i32, i64)>> {
        let results = self.results.lock().ok()?;
        results.iter().map(|(name, result)| result.map(|result| (*name, result))).collect()
    }
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    Ok(Box::new(TimeOuts::begin()?))
}

impl Guest for TimeOuts {
    fn verify(&mut self) -> Result<()> {
        crate::until("all waits to end", || self.ended().is_some())?;
        for (name, (wrong, took)) in self.ended().unwrap_or_default() {
            ensure!(wrong == 0, "{name} ended with {wrong} more than it should");
            // Those that wait their whole time again are named in the report of the move. They do at each stop, and a pod
            // whose memory goes ahead is stopped twice.
            let latest = if sys::WHOLE_AGAIN.contains(&name) { 3 * TIME } else { TIME };
            ensure!(took >= TIME && took < latest + LATE, "{name} took {took} ns, not {TIME}");
        }
        *self = TimeOuts::begin()?;
        Ok(())
    }
}
