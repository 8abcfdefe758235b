//! timerfd_create(2). Everything is in its fdinfo; the pod's clocks continue, so absolute times hold.

use serde::{Deserialize, Serialize};

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
}
