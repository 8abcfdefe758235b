//! Memory that follows its pod: after the commit, from the copy that the source still holds to the pod that runs at the destination.
//!
//! ```text
//! source                                            destination
//! the copy stands still, and is read                the pod runs                 carrier
//!            ◀────────── WANTS {pages…} ──────────── touches what is missing; or it is next
//!            ─────────── PAGES ────────────────────▶ filled
//!            ◀────────── WHOLE ───────────────────── nothing is missing any more
//! buried, done
//! ```
//!
//! The destination asks and the source answers: it keeps no account of what was sent, and whoever returns to an open job does the
//! same ([`bring`]). So a link that breaks, a carrier or a tool that is killed costs time and nothing else, as long as both hosts are
//! up. If the source's host ends before all is there, the pod cannot go on; that is the price of this way, and is said before.
//!
//! The copy never runs again: it is frozen by its cgroup, its job is *committing*, and who asks what became of that hears that the
//! pod runs there.

use super::inquiry::connect;
use super::journal::{Journal, Phase, Role};
use super::protocol::{Answer, FOLLOWS, Purpose, Say, Wanted};
use super::way;
use crate::ids::MmId;
use crate::image::{Kind, Owner, PageBuffer, PageRun};
use crate::link::dial::Dial;
use crate::link::{LINK, Link, PROTOCOL};
use crate::restore::filler;
use crate::restore::filler::behind::{self, WANT, WINDOW, Want, Word};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pod_runtime::cgroup::Cgroup;
use pod_runtime::proc::{self, status};
use pod_runtime::status::State;
use pod_runtime::store::{Pod, Store};
use pod_runtime::sys::daemon::{self, Fork};
use pod_runtime::sys::memory;
use pod_runtime::{Doing, Problem, Result};
use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Memory of a pod that runs elsewhere is still here.
pub const BEHIND: &str = "E-BEHIND";
/// The other side is told that we are here after so long without anything else.
const STILL: Duration = Duration::from_secs(5);
/// Who has said nothing for so long is gone: both sides say at least that they are there.
const SILENCE: Duration = Duration::from_secs(30);
/// How often the destination is called again when the link has broken and nothing came of it, waiting longer each time.
const ATTEMPTS: u32 = 8;
const PAGE: u64 = 4096;

/// Source: reads the copy.
pub(super) struct Copy {
    /// Where each space is, as this host numbers processes.
    hosts: BTreeMap<MmId, i32>,
    queue: VecDeque<Wanted>,
    buffer: PageBuffer,
    /// Bytes of pages that were sent.
    pub sent: u64,
}

impl Copy {
    /// Of a pod that stands still.
    pub fn of(pod: &Pod) -> Result<Copy> {
        let space = |host: i32| {
            let text = proc::read(format!("/proc/{host}/status")).ok()?;
            let pid = status::parse(&text).ns_tgid.last().copied()?;
            Some((MmId(pid as u64), host))
        };
        let hosts = Cgroup::open(pod.id())?.procs()?.into_iter().filter_map(space).collect();
        Ok(Copy { hosts, queue: VecDeque::new(), buffer: PageBuffer::new(WINDOW as usize), sent: 0 })
    }

    /// Answers until the destination has all of it.
    pub fn serve(&mut self, link: &mut Link, bandwidth: Option<u64>) -> Result<()> {
        self.queue.clear();
        link.writer.sink()?.pace(bandwidth);
        let mut heard = Instant::now();
        loop {
            let patience = if self.queue.is_empty() { STILL } else { Duration::ZERO };
            match link.heard_or(&[], patience)? {
                Some(_) => {
                    heard = Instant::now();
                    match link.hear()? {
                        Answer::Wants(wants) => wants.into_iter().for_each(|wanted| self.take(wanted)),
                        Answer::Whole => return Ok(()),
                        _ => return Err(Problem::new(PROTOCOL, "something else came where WANTS was due")),
                    }
                }
                None if self.queue.is_empty() && heard.elapsed() > SILENCE => return Err(silent("the destination")),
                None if self.queue.is_empty() => link.say(&Say::Still)?,
                None => {}
            }
            if let Some(next) = self.queue.pop_front() {
                self.sent += self.answer(next, link)?;
            }
        }
    }

    /// What is urgent comes first, also if it was asked for before.
    fn take(&mut self, wanted: Wanted) {
        if !wanted.urgent {
            return self.queue.push_back(wanted);
        }
        self.queue.retain(|other| (other.mm, other.address) != (wanted.mm, wanted.address));
        let at = self.queue.iter().take_while(|other| other.urgent).count();
        self.queue.insert(at, wanted);
    }

    /// How many bytes of pages that were.
    fn answer(&mut self, Wanted { mm, address, pages, .. }: Wanted, link: &mut Link) -> Result<u64> {
        let strange = || Problem::new(PROTOCOL, format!("pages {pages:#x} at {address:#x} of memory {mm} are wanted"));
        let sound = address.is_multiple_of(WINDOW) && address.checked_add(WINDOW).is_some();
        let host = *self.hosts.get(&MmId(mm)).filter(|_| sound).ok_or_else(strange)?;
        let runs = runs(address, pages);
        let bytes: usize = runs.iter().map(|(_, bytes)| bytes).sum();
        let buffer = &mut self.buffer[..bytes];
        // A first thread that has ended before the others has no memory any more.
        let by_another = |buffer: &mut [u8]| {
            let tasks = fs::read_dir(format!("/proc/{host}/task"))?.flatten();
            let threads = tasks.filter_map(|task| task.file_name().to_string_lossy().parse().ok());
            let mut read = threads.map(|thread| memory::read(thread, buffer, &runs));
            read.find(|read| read.as_ref().is_ok_and(|count| *count == bytes)).unwrap_or(Ok(0))
        };
        let read = memory::read(host, buffer, &runs).or_else(|_| by_another(buffer));
        let read = read.and_then(|count| match count == bytes {
            true => Ok(()),
            false => Err(io::Error::from_raw_os_error(libc::EFAULT)),
        });
        read.doing(|| format!("read {bytes} bytes at {address:#x} of the copy of memory {mm}"))?;
        let mut rest = &*buffer;
        for (address, bytes) in runs {
            let (these, more) = rest.split_at(bytes);
            link.writer.pages(PageRun { owner: Owner::Mm(MmId(mm)), address, bytes: bytes as u64 }, &[these])?;
            rest = more;
        }
        link.writer.flush()?;
        Ok(bytes as u64)
    }
}

/// Pages of a window that follow each other.
fn runs(window: u64, mut pages: u64) -> Vec<(u64, usize)> {
    let mut runs = Vec::new();
    let mut at = window;
    while pages != 0 {
        let gap = pages.trailing_zeros();
        pages >>= gap;
        let count = pages.trailing_ones();
        at += u64::from(gap) * PAGE;
        runs.push((at, count as usize * PAGE as usize));
        at += u64::from(count) * PAGE;
        pages = pages.checked_shr(count).unwrap_or(0);
    }
    runs
}

/// Source: serves by a link that is there, or by new ones when it breaks.
///
/// # Errors
/// The destination could not be reached for some time: the job stays open, and `pod job resume` does the same.
pub(super) fn bring(link: Option<Link>, pod: &Pod, dial: &Dial, job: &str, bandwidth: Option<u64>) -> Result<u64> {
    let mut copy = Copy::of(pod)?;
    let mut last = Problem::new(PROTOCOL, "nobody answered");
    if let Some(mut link) = link {
        match copy.serve(&mut link, bandwidth) {
            Ok(()) => return Ok(copy.sent),
            Err(problem) => last = problem,
        }
    }
    let mut attempt = 0;
    while attempt < ATTEMPTS {
        std::thread::sleep(Duration::from_millis(250) * attempt.pow(2));
        let before = copy.sent;
        match again(&mut copy, dial, job, bandwidth) {
            Ok(()) => return Ok(copy.sent),
            Err(problem) => last = problem,
        }
        // A link that breaks now and then takes some time, and that is all.
        attempt = if copy.sent > before { 0 } else { attempt + 1 };
    }
    Err(last)
}

fn again(copy: &mut Copy, dial: &Dial, job: &str, bandwidth: Option<u64>) -> Result<()> {
    let (_remote, mut link, met) = connect(dial, Purpose::Bring { job: job.to_owned() }, None)?;
    if link.protocol < FOLLOWS {
        return Err(Problem::new(PROTOCOL, "the pod there is of a version that takes no memory behind it"));
    }
    if !dial.tunnelled {
        way::seek(&mut link, dial.target.scheme, &met.hello.host)?;
    }
    link.say(&Say::Still)?;
    copy.serve(&mut link, bandwidth)
}

fn silent(who: &str) -> Problem {
    Problem::new(LINK, format!("nothing was heard from {who} for {} s", SILENCE.as_secs()))
}

/// Source: the copy has been ended, and what was missing there with it. Whoever looks at the pod there is to know.
pub(super) fn lost(dial: &Dial, job: &str) -> Result<()> {
    let (_remote, mut link, _) = connect(dial, Purpose::Bring { job: job.to_owned() }, None)?;
    link.say(&Say::Abort(Problem::new(BEHIND, "the copy on the host that it left was ended").report()))?;
    match link.hear()? {
        Answer::Whole => Ok(()),
        _ => Err(Problem::new(PROTOCOL, "something else came where WHOLE was due")),
    }
}

/// What a person can do when it does not come on.
pub(super) fn unfinished(problem: Problem, job: &str, to: &str) -> Problem {
    let what = format!("the pod runs on {to}, some of its memory is still here, and the way there is lost");
    Problem::new(BEHIND, what).because(problem).fix(format!(
        "pod job resume {job} when {to} can be reached; until then the pod waits where it touches what is missing"
    ))
}

/// Destination: a process of its own goes on with the link of a pod that runs and has memory behind it.
pub(super) fn carry_on(mut link: Link, pod: &Pod, job: &str) -> Result<()> {
    // It is nobody's to give up any more.
    link.past_interrupts();
    match daemon::fork().doing(|| "fork".into())? {
        Fork::Parent(_) => Ok(()),
        Fork::Child => {
            daemon::set_comm(c"pod-carrier");
            let keep: Vec<i32> = link.descriptors();
            daemon::close_all_but(&keep);
            let carried = carry(&mut link, pod, job);
            if let Err(problem) = &carried {
                tracing::warn!("memory of pod {} does not come: {}", pod.id(), problem.chain());
            }
            daemon::exit_now(carried.is_err().into())
        }
    }
}

/// Destination: somebody has memory of a pod that runs here by this job.
pub(super) fn brought(store: &Store, mut link: Link, job: &str) -> Result<()> {
    let job = Journal::open(store, job)?.job;
    let ran = job.role == Role::Destination && job.phase == Phase::Running;
    let pod = store.by_id(&job.pod).filter(|_| ran);
    match (way::hear(&mut link)?, pod) {
        (Say::Still, Some(pod)) => carry(&mut link, &pod, &job.id),
        (Say::Abort(report), Some(pod)) if behind::is_missing(&pod, &job.id) => {
            let why = format!("some of its memory is lost, it waits for it in vain: {}", report.what);
            pod.update(|status| status.problem = Some(why))?;
            link.say(&Answer::Whole)
        }
        // It has ended since, or has all.
        (Say::Still | Say::Abort(_), _) => link.say(&Answer::Whole),
        _ => Err(Problem::new(PROTOCOL, "something else came where STILL was due")),
    }
}

/// Words one way, pages the other, until nothing is missing.
fn carry(link: &mut Link, pod: &Pod, job: &str) -> Result<()> {
    let Some(mut filler) = behind::connect(pod, job)? else { return end(link, pod) };
    let mut words = Vec::new();
    let mut heard = Instant::now();
    loop {
        // Words first: somebody may wait for what is asked for now, while what was asked for before comes.
        let spoken = poll(&mut [PollFd::new(filler.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO);
        let next = match spoken {
            Ok(n) if n > 0 => Some(false),
            _ => link.heard_or(&[filler.as_fd()], STILL)?,
        };
        match next {
            Some(true) => {
                heard = Instant::now();
                // One that takes no more has said why, or was replaced.
                if !pages(link, &mut filler)? && last_words(link, &mut filler, &mut words)? {
                    return link.say(&Answer::Whole);
                }
            }
            Some(false) => match listen(link, &mut filler, &mut words)? {
                Heard::Words => {}
                Heard::Whole => return link.say(&Answer::Whole),
                Heard::Nothing => return end(link, pod),
            },
            None if heard.elapsed() > SILENCE => return Err(silent("the source")),
            None => link.say(&Answer::Wants(Vec::new()))?,
        }
    }
}

/// A filler is gone that has not said that it has all. Only where that can be seen otherwise the source is told so.
fn end(link: &mut Link, pod: &Pod) -> Result<()> {
    let ended = !matches!(pod.status().map(|status| status.state), Ok(State::Running | State::Paused));
    match ended || filler::is_filled(pod) {
        true => link.say(&Answer::Whole),
        false => Err(Problem::new(BEHIND, "somebody else brings the memory of the pod, or its filler was killed")),
    }
}

enum Heard {
    Words,
    /// Nothing is missing any more.
    Whole,
    /// It has hung up.
    Nothing,
}

/// Passes on what a filler says.
fn listen(link: &mut Link, filler: &mut UnixStream, words: &mut Vec<u8>) -> Result<Heard> {
    let mut buffer = [0; WANT * 256];
    match filler.read(&mut buffer) {
        Ok(0) => Ok(Heard::Nothing),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(Heard::Nothing),
        Ok(count) => {
            words.extend(&buffer[..count]);
            say(link, words).map(|whole| if whole { Heard::Whole } else { Heard::Words })
        }
        Err(error) => Err(error).doing(|| "hear what is missing".into()),
    }
}

/// Whether a filler that has gone has said before that it has all.
fn last_words(link: &mut Link, filler: &mut UnixStream, words: &mut Vec<u8>) -> Result<bool> {
    loop {
        match listen(link, filler, words)? {
            Heard::Words => {}
            Heard::Whole => return Ok(true),
            Heard::Nothing => return Err(Problem::new(BEHIND, "the filler took no more")),
        }
    }
}

/// Passes on what a filler has said: whether it has all.
fn say(link: &mut Link, words: &mut Vec<u8>) -> Result<bool> {
    let whole = words.len() / WANT * WANT;
    let mut wants = Vec::new();
    for word in words.drain(..whole).collect::<Vec<_>>().chunks_exact(WANT) {
        let Some(word) = word.first_chunk() else { break };
        match behind::word(word) {
            Word::Whole => return Ok(true),
            Word::Want(Want { urgent, mm, address, pages }) => wants.push(Wanted { mm, address, pages, urgent }),
        }
    }
    if wants.is_empty() { Ok(false) } else { link.say(&Answer::Wants(wants)).map(|()| false) }
}

/// Passes on one thing that the source has said; false when the filler takes no more.
fn pages(link: &mut Link, filler: &mut UnixStream) -> Result<bool> {
    let Some(record) = link.reader.next()? else { return Err(Problem::new(PROTOCOL, "the source ended its stream")) };
    match (record.kind, record.run) {
        (Kind::PAGES, Some(run @ PageRun { owner: Owner::Mm(mm), .. })) if run.bytes <= WINDOW => {
            let mut taken = filler.write_all(&behind::head(mm, run.address, run.bytes)).is_ok();
            let mut buffer = PageBuffer::new(256 << 10);
            link.reader.each_piece(run.address, &mut buffer, |_, bytes| {
                taken = taken && filler.write_all(bytes).is_ok();
                Ok(())
            })?;
            Ok(taken)
        }
        (Kind::MESSAGE, _) if matches!(record.state()?, Say::Still) => Ok(true),
        _ => Err(Problem::new(PROTOCOL, format!("a {} record where pages were due", record.kind))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(address: u64, urgent: bool) -> Wanted {
        Wanted { mm: 1, address, pages: 1, urgent }
    }

    #[test]
    fn what_is_urgent_comes_first_and_once() {
        let mut copy = Copy { hosts: BTreeMap::new(), queue: VecDeque::new(), buffer: PageBuffer::new(4096), sent: 0 };
        for wanted in [wanted(1, false), wanted(2, false), wanted(3, false), wanted(9, true), wanted(2, true)] {
            copy.take(wanted);
        }
        let order: Vec<u64> = copy.queue.iter().map(|wanted| wanted.address).collect();
        assert_eq!(order, [9, 2, 1, 3]);
    }

    #[test]
    fn what_is_no_window_of_the_pod_is_not_read() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let link = |end: UnixStream| Link::open(end.try_clone().unwrap().into(), end.into(), "x", None).unwrap();
        let there = std::thread::spawn(move || link(theirs).hear::<Answer>().is_err());
        let mut link = link(ours);
        let hosts = [(MmId(1), std::process::id() as i32)].into();
        let mut copy = Copy { hosts, queue: VecDeque::new(), buffer: PageBuffer::new(WINDOW as usize), sent: 0 };
        for (mm, address) in [(2, 0), (1, PAGE), (1, WINDOW + 1), (1, u64::MAX - WINDOW + 1), (u64::MAX, 0)] {
            let wanted = Wanted { mm, address, pages: u64::MAX, urgent: true };
            assert_eq!(copy.answer(wanted, &mut link).unwrap_err().code(), PROTOCOL, "{mm} {address:#x}");
        }
        // Nothing is mapped there.
        assert!(copy.answer(Wanted { mm: 1, address: 0, pages: 1, urgent: false }, &mut link).is_err());
        drop(link);
        assert!(there.join().unwrap(), "something was sent");
    }

    #[test]
    fn bits_are_runs_of_pages() {
        assert!(runs(WINDOW, 0).is_empty());
        assert_eq!(runs(WINDOW, u64::MAX), [(WINDOW, WINDOW as usize)]);
        assert_eq!(runs(0, 0b1011_0000), [(4 * PAGE, 2 * PAGE as usize), (7 * PAGE, PAGE as usize)]);
        assert_eq!(runs(0, 1 << 63), [(63 * PAGE, PAGE as usize)]);
    }

    #[test]
    fn halves_of_words_wait_for_the_rest() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let link = |end: UnixStream| Link::open(end.try_clone().unwrap().into(), end.into(), "x", None).unwrap();
        let there = std::thread::spawn(move || link(theirs).hear::<Answer>().unwrap());
        let mut here = link(ours);
        let mut words = vec![0; WANT - 1];
        words[0] = 7;
        assert!(!say(&mut here, &mut words).unwrap() && words.len() == WANT - 1);
        words.push(0);
        assert!(!say(&mut here, &mut words).unwrap() && words.is_empty());
        assert!(matches!(there.join().unwrap(), Answer::Wants(wants) if wants[0].mm == 7));
        let mut whole = vec![0xff; WANT];
        assert!(say(&mut here, &mut whole).unwrap());
    }
}
