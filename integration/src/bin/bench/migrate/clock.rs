//! The one clock of a benchmark of moves, in nanoseconds: clients, capture and moves are all of this process.

use anyhow::Result;
use nix::sys::time::TimeValLike;
use nix::time::{ClockId, clock_gettime};

pub fn now() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |time| time.num_nanoseconds() as u64)
}

/// What has to be taken from a time of the day to have one of ours.
pub fn since_epoch() -> Result<u64> {
    let day = clock_gettime(ClockId::CLOCK_REALTIME)?.num_nanoseconds() as u64;
    Ok(day - now())
}

pub fn ms(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e6
}
