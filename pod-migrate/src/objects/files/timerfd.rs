//! timerfd_create(2). Everything is in its fdinfo.
//!
//! The pod's monotonic clocks go on where they stopped, so what remained until an expiry still remains. An absolute time
//! on the wall clock stays that time: it can be over when the pod runs again, and then the timer fires at once.

use crate::freeze::Standstill;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pod_runtime::proc::fdinfo::FdInfo;
use pod_runtime::sys::descriptor;
use pod_runtime::{Doing, Problem, Result};
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, OwnedFd};

const ABSOLUTE: u32 = 1;
const KNOWN_FLAGS: u32 = 3;
const CLOCK_REALTIME: i32 = 0;
const CLOCK_REALTIME_ALARM: i32 = 8;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub clock: i32,
    /// Expiries not yet read.
    pub ticks: u64,
    /// TFD_TIMER_* of the last settime.
    pub settime_flags: u32,
    /// Until the next expiry, in nanoseconds; 0 is disarmed.
    pub remaining_ns: u64,
    pub interval_ns: u64,
    /// For an absolute time on the wall clock: that time.
    pub wall_ns: Option<u64>,
}

pub(super) fn dump(info: &FdInfo, standstill: Option<Standstill>) -> Result<State> {
    let timer = info.timer().ok_or_else(|| Problem::new("E-SYSTEM", "the kernel does not show a timerfd's state"))?;
    let wall = matches!(timer.clock, CLOCK_REALTIME | CLOCK_REALTIME_ALARM);
    let wall_ns = if wall && timer.settime_flags & ABSOLUTE != 0 && timer.remaining_ns > 0 {
        Some(descriptor::clock(CLOCK_REALTIME).doing(|| "read the clock".into())? + timer.remaining_ns)
    } else {
        None
    };
    let left = timer.remaining_ns;
    Ok(State {
        clock: timer.clock,
        ticks: timer.ticks,
        settime_flags: timer.settime_flags,
        remaining_ns: standstill.map_or(left, |standstill| standstill.remaining(timer.clock, left, None)),
        interval_ns: timer.interval_ns,
        wall_ns,
    })
}

/// Runs in the pod's time namespace.
pub(super) fn restore(state: &State) -> Result<OwnedFd> {
    let State { clock, ticks, settime_flags, remaining_ns, interval_ns, wall_ns } = state;
    let doing = || "make a timerfd".to_string();
    let fd = descriptor::timerfd(*clock).doing(doing)?;
    let flags = settime_flags & KNOWN_FLAGS;
    let value = match wall_ns {
        Some(time) => *time,
        None if flags & ABSOLUTE != 0 && *remaining_ns > 0 => {
            descriptor::clock(*clock).doing(doing)?.saturating_add(*remaining_ns)
        }
        None => *remaining_ns,
    };
    if value > 0 {
        descriptor::set_timer(fd.as_fd(), flags, value, *interval_ns).doing(doing)?;
    } else if *ticks > 0 && *interval_ns > 0 {
        // A periodic timer rests after its first expiry until it is read: make it expire.
        descriptor::set_timer(fd.as_fd(), 0, 1, *interval_ns).doing(doing)?;
        let mut polled = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
        poll(&mut polled, PollTimeout::from(1000u16)).doing(doing)?;
    }
    if *ticks > 0 {
        descriptor::set_timer_ticks(fd.as_fd(), *ticks).doing(|| "set the expiries of a timerfd".into())?;
    }
    Ok(fd)
}
