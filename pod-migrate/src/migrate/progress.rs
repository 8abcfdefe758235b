//! What is told while a move is under way, and after it.

use serde::Serialize;
use std::time::Duration;

/// Something to show.
#[derive(Debug, Clone, PartialEq, Serialize)]
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
    },
    Warning {
        text: String,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
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
}

/// How a move went: six lines for a person.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    pub job: String,
    pub pod: String,
    pub to: String,
    pub total_ms: f64,
    pub frozen_ms: f64,
    /// On the link, and of that memory and contents of files.
    pub bytes_sent: u64,
    pub bytes_raw: u64,
    pub connections_kept: u64,
    pub connections_closed: u64,
    /// Half-open: left to their clients, who send again.
    pub connections_retried: u64,
    pub processes: usize,
    pub files: u64,
    pub file_bytes: u64,
    pub warnings: Vec<String>,
}

impl Report {
    pub fn times(&mut self, total: Duration, frozen: Duration) {
        self.total_ms = total.as_secs_f64() * 1e3;
        self.frozen_ms = frozen.as_secs_f64() * 1e3;
    }
}
