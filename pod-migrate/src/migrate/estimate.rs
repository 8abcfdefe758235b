//! What a move would be like, before anything is moved: how long it would take, and for how long the pod would stand still.
//!
//! Two things are measured: how much of its memory the pod writes in a short and in a longer time ([`Written`]; two passes
//! of the same watch that a move has, without sending: to be put under it the large processes stand still for a
//! moment, as in a move long before its freeze), and how many bytes a second the link takes (filler that is thrown away
//! there). The rest is reckoned by the rules of the move itself ([`Rounds`]).

use super::progress::{MigrationInfo, MigrationStats, PAGE};
use super::source::Limits;
use super::throttling;
use crate::capture::Capture;
use crate::objects::memory::tracking::{LEAST_TO_SEND, Pass};
use crate::rounds::{Next, Rounds, STALL};
use pod_runtime::store::Pod;
use pod_runtime::{Problem, Result};
use serde::Serialize;
use std::time::{Duration, Instant};

/// How long is looked at what is written: twice, to see whether it is always the same that is written.
const SHORT: Duration = Duration::from_millis(40);
const LONG: Duration = Duration::from_millis(320);
/// What a pass takes that finds nothing.
const SEARCH: Duration = Duration::from_micros(500);
/// How long a small pod stands still whose memory is no matter.
const FIXED: Duration = Duration::from_millis(25);
/// The least part of its CPU time that a pod would have for the sake of its move.
const LEAST_SHARE: f64 = 1.0 / throttling::MOST as f64;
/// It would stand still for longer than it should.
pub const WOULD_STALL: &str = "W-STALL";

/// How much a pod writes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Written {
    /// Bytes that are under watch: what would go ahead.
    pub watched: u64,
    /// Bytes of pages that were written within the short time, and within the longer one, and how long those were.
    short: (u64, f64),
    long: (u64, f64),
}

impl Written {
    /// Looks. Nothing is known of a pod whose memory would not go ahead.
    pub fn by(pod: &Pod) -> Result<Written> {
        let mut capture = Capture::new(pod)?;
        let Some(mut tracker) = capture.watch_memory(LEAST_TO_SEND)? else { return Ok(Written::default()) };
        let watched = tracker.look();
        let mut within = |time: Duration| {
            let began = Instant::now();
            std::thread::sleep(time);
            (tracker.look(), began.elapsed().as_secs_f64())
        };
        Ok(Written { watched, short: within(SHORT), long: within(LONG) })
    }

    pub fn per_second(&self) -> u64 {
        if self.long.1 > 0.0 { (self.long.0 as f64 / self.long.1) as u64 } else { 0 }
    }

    /// Bytes within so many seconds: by a power of the time that fits both looks. One that writes the same pages over and
    /// over has written no more after a longer time; one that goes on through its memory has written as much more.
    fn within(&self, seconds: f64) -> u64 {
        let ((short, brief), (long, time)) = (self.short, self.long);
        if long == 0 || time <= brief {
            return 0;
        }
        if seconds <= brief {
            return ((short as f64 * seconds / brief) as u64).min(self.watched);
        }
        let power = match short {
            0 => 1.0,
            short => ((long as f64 / short as f64).ln() / (time / brief).ln()).clamp(0.0, 1.0),
        };
        ((long as f64 * (seconds / time).powf(power)) as u64).min(self.watched)
    }
}

/// What is to be expected of a move.
#[derive(Debug, Serialize)]
pub struct Expected {
    /// Bytes a second that the link took.
    pub link_bytes_per_second: u64,
    /// Bytes a second that the pod writes in its memory, each page counted once in a third of a second.
    pub written_per_second: u64,
    /// That would go over, what is sent again counted again.
    pub bytes: u64,
    /// Passes over memory while the pod runs.
    pub rounds: u32,
    pub total_ms: f64,
    /// How long it would stand still.
    pub stall_ms: f64,
    /// Bytes of memory at the beginning.
    memory: u64,
    /// W-STALL, or with `--on-stall abort` what the move would end with.
    #[serde(skip)]
    pub stalls: Option<Problem>,
}

/// Of a pod with so much memory and files.
pub fn expect((memory, files): (u64, u64), written: &Written, link: u64, limits: &Limits) -> Expected {
    let slow = limits.bandwidth.map_or(link, |most| most.min(link)).max(1) as f64;
    let time = |bytes: u64, speed: f64| bytes as f64 / speed.max(1.0);
    let mut rounds = Rounds::new(limits.downtime, limits.on_stall);
    let (mut total, mut sent, mut bytes, mut stalls) = (time(files, slow), files, written.watched, None);
    // Of its CPU time: with half of it a pod writes in a second what it wrote in half of one.
    let (mut share, mut follows) = (1.0, limits.postcopy);
    while !limits.postcopy && (bytes > 0 || rounds.done() > 0) {
        let took = Duration::from_secs_f64(time(bytes, slow)) + SEARCH;
        total += took.as_secs_f64();
        sent += bytes;
        let next = rounds.judge(Pass { written: bytes, took, ..Pass::default() });
        bytes = written.within(took.as_secs_f64() * share);
        match next {
            Ok(Next::Again) => continue,
            Ok(Next::Enough) => {}
            Ok(Next::Throttle(what)) if share > LEAST_SHARE => {
                share /= 2.0;
                rounds.slowed();
                let what = format!("{what}; it would be given less CPU time, {:.0} % of what it uses", share * 1e2);
                stalls = Some(Problem::new(WOULD_STALL, what).fix(RATHER));
                continue;
            }
            Ok(Next::Follow(what)) => {
                let what = format!("{what}; what is left of its memory would come when it runs there");
                (follows, stalls) = (true, Some(Problem::new(WOULD_STALL, what).fix(RATHER)));
            }
            Ok(Next::Throttle(what) | Next::Long(what)) => stalls = Some(Problem::new(WOULD_STALL, what).fix(RATHER)),
            Err(problem) => stalls = Some(problem),
        }
        break;
    }
    if follows {
        // It takes its time all the same.
        total += time(bytes, slow);
        (sent, bytes) = (sent + bytes, 0);
    }
    // What is not under watch goes while it stands still, and so does what was written in the last round.
    let still = bytes + memory.saturating_sub(written.watched);
    let stall = FIXED.as_secs_f64() + time(still, link as f64);
    Expected {
        link_bytes_per_second: link,
        written_per_second: written.per_second(),
        bytes: sent + still,
        rounds: rounds.done(),
        total_ms: (total + stall) * 1e3,
        stall_ms: stall * 1e3,
        memory,
        stalls,
    }
}

const RATHER: &str =
    "move it when it has less to do, or say what shall happen: --downtime TIME, --on-stall throttle or abort";

impl Expected {
    /// Whether the move would be given up for it.
    pub fn given_up(&self) -> bool {
        self.stalls.as_ref().is_some_and(|problem| problem.code() == STALL)
    }

    /// In QEMU's names, as of a migration that has not begun.
    pub fn migration(&self) -> MigrationInfo {
        let ms = |ms: f64| ms.round() as u64;
        MigrationInfo {
            status: "none",
            total_time: ms(self.total_ms),
            setup_time: 0,
            downtime: 0,
            expected_downtime: Some(ms(self.stall_ms)),
            cpu_throttle_percentage: None,
            ram: MigrationStats {
                remaining: self.memory,
                total: self.memory,
                mbps: self.link_bytes_per_second as f64 * 8.0 / 1e6,
                page_size: PAGE,
                dirty_sync_count: u64::from(self.rounds) + 1,
                dirty_pages_rate: self.written_per_second / PAGE,
                ..MigrationStats::default()
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rounds::OnStall;

    const MIB: u64 = 1 << 20;

    fn written(watched: u64, short: u64, long: u64) -> Written {
        Written { watched: watched * MIB, short: (short * MIB, 0.04), long: (long * MIB, 0.32) }
    }

    fn expected(written: &Written, limits: &Limits) -> Expected {
        expect((written.watched + 2 * MIB, MIB), written, 100 * MIB, limits)
    }

    #[test]
    fn one_that_writes_nothing() {
        let expected = expected(&written(500, 0, 0), &Limits::default());
        assert_eq!((expected.rounds, expected.bytes, expected.stalls.is_none()), (2, 503 * MIB, true));
        assert!((5000.0..5200.0).contains(&expected.total_ms), "{}", expected.total_ms);
        assert!((44.0..46.0).contains(&expected.stall_ms), "{}", expected.stall_ms);
    }

    #[test]
    fn one_that_writes_the_same_over_and_over() {
        // After the first look nothing is new, however long a round takes.
        let same = written(500, 3, 3);
        assert_eq!(same.within(60.0), 3 * MIB);
        let expected = expected(&same, &Limits::default());
        assert!(expected.stalls.is_none() && expected.bytes < 520 * MIB, "{expected:?}");
        assert!((55.0..76.0).contains(&expected.stall_ms), "{}", expected.stall_ms);
    }

    #[test]
    fn one_that_goes_through_its_memory() {
        let through = written(500, 10, 80);
        assert!((159..=160).contains(&(through.within(0.64) / MIB)));
        assert_eq!(through.within(0.02), 5 * MIB);
        assert_eq!(through.within(60.0), 500 * MIB, "and begins again");
        let said = expected(&through, &Limits::default());
        assert_eq!(said.stalls.as_ref().unwrap().code(), WOULD_STALL);
        assert!(said.stall_ms > 4000.0 && !said.given_up(), "{said:?}");
        let abort = Limits { on_stall: OnStall::Abort, ..Limits::default() };
        assert!(expected(&through, &abort).given_up());
        let throttle = Limits { on_stall: OnStall::Throttle, ..Limits::default() };
        let slowed = expected(&through, &throttle);
        assert!(slowed.stall_ms < 60.0 && slowed.rounds > said.rounds, "{slowed:?}");
        let named = slowed.stalls.unwrap();
        assert!(named.code() == WOULD_STALL && named.what().ends_with("25 % of what it uses"), "{named:?}");
    }

    #[test]
    fn small_ones_and_slow_links() {
        let small = expect((MIB, 0), &Written::default(), 100 * MIB, &Limits::default());
        assert_eq!((small.rounds, small.bytes), (0, MIB));
        let held = Limits { bandwidth: Some(10 * MIB), ..Limits::default() };
        let held = expected(&written(500, 0, 0), &held);
        assert!(held.total_ms > 50_000.0 && held.stall_ms < 50.0, "{held:?}");
        assert_eq!(held.migration().ram.remaining, 502 * MIB);
    }
}
