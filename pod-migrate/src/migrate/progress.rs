//! What is told while a move is under way, and after it.

use super::way::Transport;
use crate::laps::Lap;
use crate::rounds::Estimate;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Something to show.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A step begins.
    Step {
        step: Step,
        detail: String,
    },
    /// Bytes that went out since the last of these.
    Sent {
        bytes: u64,
    },
    /// A pass over the memory of a pod that runs on has ended.
    Pass {
        /// From 1 on.
        pass: u32,
        /// Of memory that had been written since the pass before.
        bytes: u64,
        ms: f64,
        /// From the second pass on.
        #[serde(flatten)]
        estimate: Option<Estimate>,
    },
    /// Memory is written as fast as it is sent, and the pod will stand still for longer than it should.
    Stalled {
        text: String,
    },
    /// For the same reason it gets less CPU time now.
    Throttled {
        /// Of the CPU time that it used before: that it does not get.
        #[serde(rename = "cpu-throttle-percentage")]
        percentage: u64,
        text: String,
    },
    /// Somebody else has to be done with the pod first.
    Waiting {
        text: String,
    },
    Warning {
        text: String,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    Connect,
    Check,
    Reserve,
    /// Files, while the pod runs.
    Files,
    /// Memory, while the pod runs.
    Memory,
    /// Everything else, while it stands still.
    Freeze,
    Commit,
    /// Memory, while the pod runs there.
    Behind,
}

/// How a move went: six lines for a person.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    pub job: String,
    pub pod: String,
    pub to: String,
    pub total_ms: f64,
    /// Until the destination had taken it.
    pub setup_ms: f64,
    pub frozen_ms: f64,
    /// On the link, and of that memory and contents of files.
    pub bytes_sent: u64,
    pub bytes_raw: u64,
    /// Of what was sent, what went while the pod ran.
    pub bytes_ahead: u64,
    /// Of memory that came when the pod ran there already, and until when that took.
    pub bytes_behind: u64,
    pub behind_ms: f64,
    /// Of memory that the pod had when it was offered.
    pub bytes_memory: u64,
    /// Which way it went.
    pub transport: Transport,
    /// Passes over memory while the pod ran, and what the last of them let expect.
    pub rounds: u32,
    #[serde(flatten)]
    pub estimate: Option<Estimate>,
    pub throttled: Option<Throttled>,
    pub connections_kept: u64,
    pub connections_closed: u64,
    /// Half-open: left to their clients, who send again.
    pub connections_retried: u64,
    pub processes: usize,
    pub files: u64,
    pub file_bytes: u64,
    pub warnings: Vec<String>,
    /// What the frozen time went to, in its order.
    pub frozen: Vec<Part>,
    /// The same more closely, here and at the destination, which works on its part at the same time.
    pub laps_here: Vec<Lap>,
    pub laps_there: Vec<Lap>,
}

/// A pod had less CPU time before it stood still.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Throttled {
    /// In the end: how much of the CPU time that it used before it did not get.
    pub percentage: u64,
    /// For how long it had less.
    pub ms: f64,
}

/// A part of the frozen time: `files` (and what is in memory file systems) that changed, `hold` (until the destination holds
/// the pod's frames), `dump` (of everything else), `restore` (of it there), `commit`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Part {
    pub part: &'static str,
    pub ms: f64,
}

/// A report in the names of QEMU's `query-migrate`, for tools that know those. Times in milliseconds, `mbps` in 10⁶ bits a
/// second. Pages are not counted by kind.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationInfo {
    pub status: &'static str,
    pub total_time: u64,
    pub setup_time: u64,
    pub downtime: u64,
    pub expected_downtime: Option<u64>,
    /// Of a pod that was throttled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_throttle_percentage: Option<u64>,
    pub ram: MigrationStats,
}

#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationStats {
    pub transferred: u64,
    pub remaining: u64,
    pub total: u64,
    pub mbps: f64,
    pub page_size: u64,
    pub dirty_sync_count: u64,
    pub dirty_pages_rate: u64,
    pub precopy_bytes: u64,
    pub downtime_bytes: u64,
    pub postcopy_bytes: u64,
}

pub(super) const PAGE: u64 = 4096;

impl Report {
    /// `commit` is the part of it since everything was there.
    pub fn stood_still(&mut self, frozen: Duration, commit: Duration) {
        self.frozen_ms = frozen.as_secs_f64() * 1e3;
        self.frozen.push(Part { part: "commit", ms: commit.as_secs_f64() * 1e3 });
    }

    pub fn migration(&self) -> MigrationInfo {
        let ms = |ms: f64| ms.round() as u64;
        let sending = ((self.total_ms - self.setup_ms) / 1e3).max(1e-6);
        MigrationInfo {
            status: "completed",
            total_time: ms(self.total_ms),
            setup_time: ms(self.setup_ms),
            downtime: ms(self.frozen_ms),
            expected_downtime: self.estimate.map(|estimate| ms(estimate.expected_ms)),
            cpu_throttle_percentage: self.throttled.map(|throttled| throttled.percentage),
            ram: MigrationStats {
                transferred: self.bytes_sent,
                remaining: 0,
                total: self.bytes_memory,
                mbps: self.bytes_sent as f64 * 8.0 / 1e6 / sending,
                page_size: PAGE,
                // The freeze looks for what was written, too.
                dirty_sync_count: u64::from(self.rounds) + 1,
                dirty_pages_rate: self.estimate.map_or(0, |estimate| estimate.written_per_second / PAGE),
                precopy_bytes: self.bytes_ahead,
                downtime_bytes: self.bytes_sent.saturating_sub(self.bytes_ahead),
                postcopy_bytes: self.bytes_behind,
            },
        }
    }
}
