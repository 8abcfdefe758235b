//! Interval timers and POSIX timers.

use super::{IntervalTimer, PosixTimer, ProcessState};
use crate::remote::{Arg, RemoteCall};

/// prctl(2): timer_create takes the id that it finds where it would write it (Linux 6.15).
const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
const SIGEV_THREAD_ID: i32 = 4;

/// setitimer(2) for those that are armed, or have a period all the same, as those of CPU time can.
pub fn restore_interval_timers(state: &ProcessState) -> Vec<RemoteCall> {
    let set =
        state.interval_timers.iter().enumerate().filter(|(_, timer)| timer.value_us != 0 || timer.interval_us != 0);
    set.map(|(which, timer)| {
        let args = vec![(which as u64).into(), Arg::In(itimerval(timer)), 0.into()];
        RemoteCall::new("arm an interval timer", libc::SYS_setitimer, args)
    })
    .collect()
}

fn itimerval(timer: &IntervalTimer) -> Vec<u8> {
    [
        timer.interval_us / 1_000_000,
        timer.interval_us % 1_000_000,
        timer.value_us / 1_000_000,
        timer.value_us % 1_000_000,
    ]
    .iter()
    .flat_map(|word| word.to_ne_bytes())
    .collect()
}

/// timer_create(2) with the old ids, and timer_settime(2). Once all threads exist, for some timers name one.
pub fn restore_timers(state: &ProcessState) -> Vec<RemoteCall> {
    if state.timers.is_empty() {
        return Vec::new();
    }
    let restore_ids = |on: i32| {
        let args = vec![PR_TIMER_CREATE_RESTORE_IDS.into(), on.into(), 0.into(), 0.into(), 0.into()];
        RemoteCall::new("choose timer ids", libc::SYS_prctl, args)
    };
    let mut calls = vec![restore_ids(1)];
    calls.extend(state.timers.iter().map(create));
    calls.push(restore_ids(0));
    calls.extend(state.timers.iter().filter(|timer| timer.remaining_ns != 0 || timer.interval_ns != 0).map(arm));
    calls
}

fn create(timer: &PosixTimer) -> RemoteCall {
    let mut event = vec![0u8; 64];
    event[..8].copy_from_slice(&timer.value.to_ne_bytes());
    event[8..12].copy_from_slice(&timer.signal.to_ne_bytes());
    event[12..16].copy_from_slice(&timer.notify.to_ne_bytes());
    if timer.notify & SIGEV_THREAD_ID != 0 {
        event[16..20].copy_from_slice(&timer.thread.map_or(0, |tid| tid.0).to_ne_bytes());
    }
    let id = Arg::InOut(timer.id.to_ne_bytes().to_vec());
    let args = vec![timer.clock.into(), Arg::In(event), id];
    RemoteCall::new(format!("make timer {}", timer.id), libc::SYS_timer_create, args)
}

fn arm(timer: &PosixTimer) -> RemoteCall {
    const SECOND: u64 = 1_000_000_000;
    // An expired one-shot timer has neither; one that is about to expire must not be taken for disarmed.
    let remaining = timer.remaining_ns.max(1);
    let words = [timer.interval_ns / SECOND, timer.interval_ns % SECOND, remaining / SECOND, remaining % SECOND];
    let bytes = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let args = vec![timer.id.into(), 0.into(), Arg::In(bytes), 0.into()];
    RemoteCall::new(format!("arm timer {}", timer.id), libc::SYS_timer_settime, args)
}
