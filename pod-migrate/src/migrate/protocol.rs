//! What the two sides of a move say to each other. The whole conversation is in `docs/protocol.md`.
//!
//! A message is a MESSAGE record of the stream of its direction; the records of the image go between them. Every
//! message has one place in the order; another one there is [`crate::link::PROTOCOL`].

use super::base::Base;
use crate::laps::Lap;
use pod_runtime::problem::Report;
use pod_runtime::spec::Spec;
use serde::{Deserialize, Serialize};

/// Of this conversation. A side that speaks another is refused by name. 2: the base in the offer, records of version 2.
/// 3: memory comes ahead.
pub const PROTOCOL: u32 = 3;

/// From the source to the destination.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Say {
    Hello(Hello),
    /// What would come; the destination answers with what stands against it, or takes what it needs.
    Offer(Box<Offer>),
    /// The pod stands still; frames that come for it are to be held at the destination from now on.
    Stopped,
    /// Everything was sent.
    Sent,
    /// Run. Said once, after READY.
    Commit,
    /// The source gave up.
    Abort(Report),
}

/// From the destination to the source.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Answer {
    Hello(Hello),
    /// What stands against it. The end of the conversation.
    Refused(Vec<Report>),
    /// Name, address, ports and place are taken; records may come. For a check: would be.
    Reserved {
        warnings: Vec<String>,
    },
    /// Frames for the pod's address come here now: the source may take it off the network.
    Holding,
    /// All is restored and stopped: the destination can run the pod and waits for COMMIT.
    Ready(Arrival),
    /// The pod runs here: written down before it was said.
    Running(Arrival),
    /// It failed here and nothing of it is left. The end of the conversation.
    Failed(Report),
    /// To a question about a job.
    Outcome(Fate),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Hello {
    pub protocol: u32,
    /// Of the program.
    pub version: String,
    pub host: String,
    pub kernel: String,
    /// Seconds since the epoch.
    pub time: u64,
    pub purpose: Purpose,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// Only the answer to the offer is wanted.
    Check,
    Move {
        job: String,
    },
    /// What became of a job whose answer was lost. Whatever did not run by now never will.
    Ask {
        job: String,
    },
}

/// What the destination must know to say yes or no.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Offer {
    pub spec: Spec,
    /// Bytes.
    pub memory: u64,
    pub files: u64,
    pub processes: u64,
    /// Of the source's processor: what a program in the pod may have seen and may use.
    pub cpu: Cpu,
    /// Of what lies below the pod's own layer, and does not come along.
    #[serde(default)]
    pub base: Base,
    /// Names of kernel features that the image needs.
    pub features: Vec<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    pub model: String,
    /// As /proc/cpuinfo names them.
    pub flags: Vec<String>,
}

/// What arrived.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Arrival {
    pub files: u64,
    pub bytes: u64,
    pub connections: u64,
    pub warnings: Vec<String>,
    /// What the time went to there, since the pod's clocks stood still.
    #[serde(default)]
    pub laps: Vec<Lap>,
}

/// How a job ended at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fate {
    /// The pod ran there: the copy at the source must not.
    Ran,
    /// It did not, and now never will.
    Never,
}

impl Hello {
    pub fn new(purpose: Purpose) -> Hello {
        let name = nix::sys::utsname::uname().ok();
        let text = |s: Option<&std::ffi::OsStr>| s.map_or_else(String::new, |s| s.to_string_lossy().into_owned());
        Hello {
            protocol: PROTOCOL,
            version: env!("CARGO_PKG_VERSION").into(),
            host: text(name.as_ref().map(|n| n.nodename())),
            kernel: text(name.as_ref().map(|n| n.release())),
            time: pod_runtime::status::now(),
            purpose,
        }
    }
}
