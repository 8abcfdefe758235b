//! What a destination says before anything is moved: who it is, what is free there, whether it would take a pod, how far its
//! clock is off. `pod check`, the first steps of every move, and the plan of a drain.
//!
//! Nothing is taken here. A side of the release before answers one question a connection, so it is called again for the next.

use super::estimate::{Expected, Written, expect};
use super::offer;
use super::protocol::{Answer, Hello, Offer, Purpose, QUESTIONS, Room, Say};
use super::source::Limits;
use super::way;
use crate::link::dial::{Dial, Remote};
use crate::link::{Interrupt, Link, PROTOCOL};
use pod_runtime::store::Pod;
use pod_runtime::{Problem, Result, when};
use std::time::{Duration, Instant};

/// By how much two clocks may differ before somebody should know: time in the pod jumps by it.
const SKEW_MS: u64 = 500;
pub const CLOCK: &str = "W-CLOCK";

/// The other side, as it introduced itself.
#[derive(Debug, Clone)]
pub struct Met {
    pub hello: Hello,
    /// What is spoken with it.
    pub agreed: u32,
    /// How far its clock is ahead of ours, in milliseconds, and how exactly that is known. None from older versions.
    pub ahead: Option<(i64, u64)>,
}

impl Met {
    /// What is to be said of the clocks.
    pub fn skew(&self) -> Option<String> {
        let (ahead, within) = self.ahead?;
        // What the way there and back took is nobody's fault.
        if ahead.unsigned_abs().saturating_sub(within) <= SKEW_MS {
            return None;
        }
        let which = if ahead > 0 { "ahead" } else { "behind" };
        let (host, ms) = (&self.hello.host, ahead.unsigned_abs());
        Some(format!(
            "{CLOCK}: the clock of {host} is {ms} ms {which}: time in the pod will jump by it; let both follow one \
             source (chrony, ntp)"
        ))
    }
}

/// Connects and says hello.
pub(super) fn connect(dial: &Dial, purpose: Purpose, interrupt: Option<Interrupt>) -> Result<(Remote, Link, Met)> {
    connect_as(dial, Hello::new(purpose), interrupt)
}

pub(super) fn connect_as(dial: &Dial, hello: Hello, interrupt: Option<Interrupt>) -> Result<(Remote, Link, Met)> {
    let (remote, mut link) = dial.connect(interrupt)?;
    let met = greet(&mut link, hello)?;
    Ok((remote, link, met))
}

fn greet(link: &mut Link, hello: Hello) -> Result<Met> {
    let before = when::now_ns();
    link.say(&Say::Hello(hello))?;
    let Answer::Hello(hello) = link.hear()? else {
        return Err(Problem::new(PROTOCOL, "the answer to HELLO was something else"));
    };
    let Some(agreed) = hello.agreed() else { return Err(hello.strange()) };
    link.protocol = agreed;
    let ahead = hello.time_ms.map(|theirs| ahead(before, when::now_ns(), theirs));
    Ok(Met { hello, agreed, ahead })
}

/// Of a clock that said so many milliseconds at some moment between two of ours (nanoseconds).
fn ahead(before: u64, after: u64, theirs: u64) -> (i64, u64) {
    let way = after.saturating_sub(before) / 2;
    let middle = (before + way) / 1_000_000;
    (theirs as i64 - middle as i64, way / 1_000_000 + 1)
}

/// A destination that is asked about pods.
pub struct Inquiry {
    dial: Dial,
    /// What was not used up by a question.
    open: Option<(Link, Remote)>,
    pub peer: Met,
}

impl Inquiry {
    pub fn open(dial: &Dial) -> Result<Inquiry> {
        let (remote, link, peer) = connect(dial, Purpose::Check, None)?;
        Ok(Inquiry { dial: dial.clone(), open: Some((link, remote)), peer })
    }

    /// What is free there, if it says so.
    pub fn room(&self) -> Option<Room> {
        self.peer.hello.room
    }

    /// What stands against it there, and what somebody should know.
    pub fn ask(&mut self, offer: Offer) -> Result<(Vec<Problem>, Vec<String>)> {
        let (mut link, remote) = self.link()?;
        link.say(&Say::Offer(Box::new(offer)))?;
        let answer = match link.hear()? {
            Answer::Reserved { warnings } => (Vec::new(), warnings),
            Answer::Refused(reports) => (reports.into_iter().map(Problem::from).collect(), Vec::new()),
            _ => return Err(Problem::new(PROTOCOL, "the answer to the offer was something else")),
        };
        if self.peer.agreed >= QUESTIONS {
            self.open = Some((link, remote));
        }
        Ok(answer)
    }

    /// Bytes a second that the link takes. None from older versions.
    pub fn measure(&mut self) -> Result<Option<u64>> {
        if self.peer.agreed < QUESTIONS {
            return Ok(None);
        }
        let (mut link, remote) = self.link()?;
        // The way that memory would go; that there is only ssh is told by the move.
        if !self.dial.tunnelled {
            way::seek(&mut link, self.dial.target.scheme, &self.peer.hello.host)?;
        }
        let mut speed = 0;
        // Each time more, until it takes a time in which what the buffers on the way hold, and what a shaper lets through at
        // once, is no matter: that one counts. Where even the most takes less, the best does; the first is the way's own
        // beginning.
        for pieces in [1, 8, 64, 256] {
            let (bytes, took) = filled(&mut link, pieces)?;
            let this = (bytes as f64 / took.as_secs_f64()) as u64;
            speed = if pieces == 1 || took > ENOUGH { this } else { speed.max(this) };
            if took > TOO_LONG || took > ENOUGH && pieces > 1 {
                break;
            }
        }
        self.open = Some((link, remote));
        Ok(Some(speed))
    }

    fn link(&mut self) -> Result<(Link, Remote)> {
        if let Some(open) = self.open.take() {
            return Ok(open);
        }
        let (remote, link, _) = connect(&self.dial, Purpose::Check, None)?;
        Ok((link, remote))
    }
}

/// How long a measure of the link is to take at least.
const ENOUGH: Duration = Duration::from_millis(150);
/// A link on which the least takes this long is slow, however exactly it is known.
const TOO_LONG: Duration = Duration::from_secs(1);

/// So many pieces of filler: how many bytes the other side got of them, and how long it took until it said so. (Its own time
/// begins when it has its turn, and by then the buffers on the way may have taken most of it: on a busy machine a link looks
/// twice as fast as it is.)
fn filled(link: &mut Link, pieces: usize) -> Result<(u64, Duration)> {
    let began = Instant::now();
    link.say(&Say::Measure)?;
    // Nothing that ssh could compress.
    let mut state = 1u64;
    let noise = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 32
    });
    let piece: Vec<u8> = noise.take(PIECE / 4).flat_map(|word| (word as u32).to_le_bytes()).collect();
    for _ in 0..pieces {
        link.writer.filler(&piece)?;
    }
    link.say(&Say::Measured)?;
    match link.hear()? {
        Answer::Filled { bytes } => Ok((bytes, began.elapsed().max(Duration::from_micros(1)))),
        _ => Err(Problem::new(PROTOCOL, "the answer to MEASURED was something else")),
    }
}

const PIECE: usize = 256 << 10;

/// What a check found.
#[derive(Debug, Default)]
pub struct Checked {
    pub blockers: Vec<Problem>,
    /// From the destination.
    pub refused: Vec<Problem>,
    /// What will not be as it was.
    pub downgrades: Vec<Problem>,
    pub warnings: Vec<String>,
    /// What would go over, in bytes: memory, and files of the pod's own layer.
    pub memory: u64,
    pub files: u64,
    pub peer: Option<Hello>,
    /// What it would be like, and why that is not known.
    pub expected: Option<Expected>,
    pub unknown: Option<String>,
}

/// `pod check`: the first steps of a move, without taking anything. With `limits` it is also measured what a move within
/// these would be like.
pub fn check(pod: &Pod, dial: Option<&Dial>, limits: Option<&Limits>) -> Result<Checked> {
    let (blockers, downgrades) = (offer::blockers(pod)?, offer::downgrades(pod)?);
    let mut checked = Checked { blockers, downgrades, ..Checked::default() };
    if let Some(dial) = dial {
        let offer = offer::offer(pod)?;
        (checked.memory, checked.files) = (offer.memory, offer.files);
        let mut there = Inquiry::open(dial)?;
        (checked.refused, checked.warnings) = there.ask(offer)?;
        checked.warnings.extend(there.peer.skew());
        if let Some(limits) = limits.filter(|_| checked.blockers.is_empty()) {
            match expected(pod, &mut there, (checked.memory, checked.files), limits) {
                Ok(mut expected) => {
                    let given_up = expected.given_up();
                    let list = if given_up { &mut checked.blockers } else { &mut checked.downgrades };
                    list.extend(expected.stalls.take());
                    checked.expected = Some(expected);
                }
                Err(problem) => checked.unknown = Some(problem.chain()),
            }
        }
        checked.peer = Some(there.peer.hello);
    }
    Ok(checked)
}

fn expected(pod: &Pod, there: &mut Inquiry, size: (u64, u64), limits: &Limits) -> Result<Expected> {
    let Some(link) = there.measure()? else {
        return Err(Problem::new(PROTOCOL, "the other side is of an older version, which does not measure the link"));
    };
    Ok(expect(size, &Written::by(pod)?, link, limits))
}

#[cfg(test)]
mod tests {
    use super::super::protocol::{OLDEST, PROTOCOL as NEWEST};
    use super::*;
    use pod_runtime::problem::Report;
    use pod_runtime::store::Store;
    use serde::{Deserialize, Serialize};
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::thread;

    /// As the release before says it, and one that is not even that.
    #[derive(Debug, Serialize, Deserialize)]
    struct OldHello {
        protocol: u32,
        version: String,
        host: String,
        kernel: String,
        time: u64,
        purpose: Purpose,
    }

    #[derive(Debug, Serialize, Deserialize)]
    enum Old {
        Hello(OldHello),
        Refused(Vec<Report>),
    }

    fn old(protocol: u32) -> Old {
        let text = String::from;
        let (version, host, kernel) = (text("0.0.9"), text("old"), text("6.1"));
        Old::Hello(OldHello { protocol, version, host, kernel, time: 0, purpose: Purpose::Check })
    }

    fn ends() -> (UnixStream, UnixStream) {
        UnixStream::pair().unwrap()
    }

    fn link(end: UnixStream) -> Link {
        Link::open(OwnedFd::from(end.try_clone().unwrap()), OwnedFd::from(end), "peer", None).unwrap()
    }

    /// What a source makes of a destination that says this.
    fn met(answer: impl Serialize + Send + 'static) -> (Result<Met>, Old) {
        let (ours, theirs) = ends();
        let destination = thread::spawn(move || {
            let mut link = link(theirs);
            let heard: Old = link.hear().unwrap();
            link.say(&answer).unwrap();
            heard
        });
        let met = greet(&mut link(ours), Hello::new(Purpose::Check));
        (met, destination.join().unwrap())
    }

    #[test]
    fn a_destination_of_the_release_before_is_spoken_with_as_it_speaks() {
        let (met, Old::Hello(heard)) = met(old(OLDEST)) else { panic!("no HELLO") };
        assert_eq!(met.unwrap().agreed, OLDEST);
        // It compares that number with its own, and takes nothing else.
        assert_eq!(heard.protocol, OLDEST);
        let ours = Hello { time_ms: Some(0), ..Hello::new(Purpose::Check) };
        let met = self::met(Answer::Hello(ours)).0.unwrap();
        assert_eq!(met.agreed, NEWEST);
        assert!(met.skew().unwrap().contains("behind"), "its clock is in 1970");
    }

    #[test]
    fn a_destination_that_speaks_nothing_of_ours_is_refused_by_name() {
        let problem = met(old(OLDEST - 1)).0.unwrap_err();
        assert_eq!(problem.code(), PROTOCOL);
        assert!(problem.what().contains("old has pod 0.0.9") && problem.way_out().is_some(), "{problem}");
    }

    #[test]
    fn a_source_of_the_release_before_is_answered_and_an_older_one_refused() {
        for (protocol, taken) in [(OLDEST, true), (OLDEST - 1, false), (NEWEST + 1, false)] {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::open_at(dir.path().join("data"), dir.path().join("run")).unwrap();
            let (ours, theirs) = ends();
            let destination = thread::spawn(move || {
                super::super::receive(&store, OwnedFd::from(theirs.try_clone().unwrap()), OwnedFd::from(theirs))
            });
            let mut link = link(ours);
            link.say(&old(protocol)).unwrap();
            let Old::Hello(answer) = link.hear().unwrap() else { panic!("no HELLO") };
            assert_eq!(answer.protocol, OLDEST, "which is what it compares with its own");
            if !taken {
                let Old::Refused(why) = link.hear().unwrap() else { panic!("not refused") };
                assert!(why[0].code == PROTOCOL && why[0].what.contains("old has pod 0.0.9"), "{why:?}");
            }
            drop(link);
            // What it waits for next is the offer.
            assert_eq!(destination.join().unwrap().is_err(), taken);
        }
    }

    #[test]
    fn clocks_that_differ_are_named() {
        let met = |ahead| Met { hello: Hello::new(Purpose::Check), agreed: QUESTIONS, ahead };
        assert_eq!(met(None).skew(), None, "an older version does not say");
        assert_eq!(met(Some((400, 1))).skew(), None);
        assert_eq!(met(Some((900, 600))).skew(), None, "that may have been the way");
        assert!(met(Some((1501, 1))).skew().unwrap().contains("1501 ms ahead"));
        let behind = met(Some((-90_000, 5))).skew().unwrap();
        assert!(behind.starts_with(CLOCK) && behind.contains("90000 ms behind"), "{behind}");
    }

    #[test]
    fn a_clock_is_asked_in_the_middle_of_the_way() {
        let ms = 1_000_000;
        assert_eq!(ahead(10_000 * ms, 10_100 * ms, 10_050), (0, 51));
        assert_eq!(ahead(10_000 * ms, 10_100 * ms, 12_050), (2000, 51));
        assert_eq!(ahead(10_000 * ms, 10_000 * ms, 8000), (-2000, 1));
    }
}
