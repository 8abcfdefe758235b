//! What the two sides of a move say to each other. The whole conversation is in `docs/protocol.md`.
//!
//! A message is a MESSAGE record of the stream of its direction; the records of the image go between them. Every
//! message has one place in the order; another one there is [`crate::link::PROTOCOL`].

use super::base::Base;
use crate::laps::Lap;
use crate::link::direct::Door;
use pod_runtime::Problem;
use pod_runtime::problem::Report;
use pod_runtime::spec::Spec;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

/// The newest of this conversation that is spoken here. 2: the base in the offer, records of version 2. 3: memory comes
/// ahead. 4: a range of protocols in HELLO, what is free, several questions in one check, a measure of the link, STOPPED.
/// What came later has a name below.
pub const PROTOCOL: u32 = 8;
/// The oldest: that of the release before. Two sides take the newest that both speak ([`Hello::agreed`]).
pub const OLDEST: u32 = 3;
/// From here on a check may ask about several pods, and have the link measured.
pub const QUESTIONS: u32 = 4;
/// From here on the source says STOPPED, and its frames are held from then on. Before, they are when the pod is born.
pub const STOPS: u32 = 4;
/// From here on changes of files are sent, and file systems in memory while the pod runs.
pub const CHANGES: u32 = 5;
/// From here on HELLO has jobs that are settled.
pub const SETTLED: u32 = 5;
/// From here on the source says KNOCKS.
pub const KNOCKS: u32 = 5;
/// From here on the source may ask for a way past ssh.
pub const DIRECT: u32 = 6;
/// From here on shared memory comes while the pod runs.
pub const SHARES: u32 = 7;
/// From here on memory may come behind the pod.
pub const FOLLOWS: u32 = 8;

/// From the source to the destination.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Say {
    Hello(Hello),
    /// What would come; the destination answers with what stands against it, or takes what it needs.
    Offer(Box<Offer>),
    /// The pod stands still; frames that come for it are to be held at the destination from now on. From protocol 4 on.
    Stopped,
    /// Frames that wanted to begin connections and were kept out until the pod was off the network: for its stack, when it
    /// runs. From protocol 5 on.
    Knocks(Vec<ByteBuf>),
    /// Everything was sent.
    Sent,
    /// Run. Said once, after READY.
    Commit,
    /// The source gave up.
    Abort(Report),
    /// In a check: filler comes now, and then MEASURED, to see how fast the link is. From protocol 4 on.
    Measure,
    Measured,
    /// May I come by another way than ssh? The key is what I will prove there. From protocol 6 on.
    Direct {
        key: ByteBuf,
    },
    /// By which way what follows comes. After DOOR.
    Comes {
        directly: bool,
    },
    /// Nothing has been asked for, and we are here. When the pod runs there and memory follows. From protocol 8 on.
    Still,
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
    /// Where somebody listens for the source.
    Door(Door),
    /// Nobody does, and why.
    NoDoor(Report),
    /// To a question about a job.
    Outcome(Fate),
    /// So many bytes of filler came.
    Filled {
        bytes: u64,
    },
    /// After RUNNING: memory that is to come, in this order but for what is urgent. The answer to each are runs of PAGES. From protocol
    /// 8 on.
    Wants(Vec<Wanted>),
    /// After RUNNING: all memory is there, or none is needed any more. The end of the conversation.
    Whole,
}

/// Pages of a space: some of 64 from an address on, which is a multiple of so many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    pub mm: u64,
    pub address: u64,
    /// A bit for each.
    pub pages: u64,
    /// Somebody waits for them.
    pub urgent: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Hello {
    /// The oldest that is spoken; the only one where `newest` is not said, which is how older versions say it.
    pub protocol: u32,
    #[serde(default)]
    pub newest: Option<u32>,
    /// Of the program.
    pub version: String,
    pub host: String,
    pub kernel: String,
    /// Seconds since the epoch.
    pub time: u64,
    /// The same in milliseconds.
    #[serde(default)]
    pub time_ms: Option<u64>,
    /// Of the destination.
    #[serde(default)]
    pub room: Option<Room>,
    /// Of the source: jobs of which it knows how they ended, and will after a power cut. It never asks about them again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub settled: Vec<String>,
    pub purpose: Purpose,
}

/// What is free on a host, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Room {
    pub memory: u64,
    pub disk: u64,
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
    /// Memory of a pod that runs there, by this job, and has not all of it yet: what it wants is brought now. From protocol 8 on.
    Bring {
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
    /// Memory may come when the pod runs there.
    #[serde(default)]
    pub behind: bool,
    /// The largest frames that peers send the pod, if it is on a LAN itself.
    #[serde(default)]
    pub mtu: Option<u32>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    pub model: String,
    /// As /proc/cpuinfo names them.
    pub flags: Vec<String>,
    /// How threads' registers are kept, as they are restored.
    #[serde(default)]
    pub xsave: Option<Xsave>,
}

/// Which parts there are (XCR0), how much all take, and number, place and size of each.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Xsave {
    pub features: u64,
    pub size: u32,
    pub parts: Vec<(u32, u32, u32)>,
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
            protocol: OLDEST,
            newest: Some(PROTOCOL),
            version: env!("CARGO_PKG_VERSION").into(),
            host: text(name.as_ref().map(|n| n.nodename())),
            kernel: text(name.as_ref().map(|n| n.release())),
            time: pod_runtime::status::now(),
            time_ms: Some(pod_runtime::when::now_ns() / 1_000_000),
            room: None,
            settled: Vec::new(),
            purpose,
        }
    }

    /// The newest protocol that this side and the one that said this speak both.
    pub fn agreed(&self) -> Option<u32> {
        let newest = self.spoken().1.min(PROTOCOL);
        (newest >= self.protocol.max(OLDEST)).then_some(newest)
    }

    fn spoken(&self) -> (u32, u32) {
        (self.protocol, self.newest.unwrap_or(self.protocol))
    }

    /// Why there is none.
    pub fn strange(&self) -> Problem {
        let range = |(oldest, newest): (u32, u32)| {
            if oldest == newest { newest.to_string() } else { format!("{oldest} to {newest}") }
        };
        let (theirs, ours) = (range(self.spoken()), range((OLDEST, PROTOCOL)));
        let here = env!("CARGO_PKG_VERSION");
        let what = format!(
            "{} has pod {}, which speaks protocol {theirs}; pod {here} on the other side speaks {ours}",
            self.host, self.version
        );
        Problem::new(crate::link::PROTOCOL, what).fix("install the newer of the two on both hosts")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_that_both_speak() {
        let says = |protocol, newest| Hello { protocol, newest, ..Hello::new(Purpose::Check) }.agreed();
        assert_eq!(says(OLDEST, Some(PROTOCOL)), Some(PROTOCOL));
        assert_eq!(says(OLDEST, None), Some(OLDEST), "the release before says one number");
        assert_eq!(says(OLDEST - 1, None), None);
        assert_eq!(says(OLDEST, Some(PROTOCOL + 5)), Some(PROTOCOL), "a newer one that still speaks ours");
        assert_eq!(says(PROTOCOL, Some(PROTOCOL + 1)), Some(PROTOCOL));
        assert_eq!(says(PROTOCOL + 1, Some(PROTOCOL + 2)), None);
        assert_eq!(says(9, Some(2)), None, "no range at all");
    }
}
