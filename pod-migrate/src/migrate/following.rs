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
use super::journal::{Journal, Role};
use super::protocol::{Answer, FOLLOWS, Purpose, Say, Wanted};
use super::way;
use crate::ids::MmId;
use crate::image::{Kind, Owner, PageBuffer, PageRun};
use crate::link::dial::Dial;
use crate::link::{Link, PROTOCOL};
use crate::restore::filler::behind::{self, WANT, Want, Word};
use pod_runtime::cgroup::Cgroup;
use pod_runtime::proc::{self, status};
use pod_runtime::store::{Pod, Store};
use pod_runtime::sys::daemon::{self, Fork};
use pod_runtime::sys::memory;
use pod_runtime::{Doing, Problem, Result};
use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// The other side is told that we are here after so long without anything else.
const STILL: Duration = Duration::from_secs(5);
/// How often the destination is called again when the link has broken, waiting longer each time.
const ATTEMPTS: u32 = 8;
/// Pages of one answer.
const MOST: u64 = 1 << 20;

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
        Ok(Copy { hosts, queue: VecDeque::new(), buffer: PageBuffer::new(MOST as usize), sent: 0 })
    }

    /// Answers until the destination has all of it.
    pub fn serve(&mut self, link: &mut Link, bandwidth: Option<u64>) -> Result<()> {
        self.queue.clear();
        link.writer.sink()?.pace(bandwidth);
        loop {
            let patience = if self.queue.is_empty() { STILL } else { Duration::ZERO };
            match link.heard_or(&[], patience)? {
                Some(_) => match link.hear()? {
                    Answer::Wants(wants) => wants.into_iter().for_each(|wanted| self.take(wanted)),
                    Answer::Whole => return Ok(()),
                    _ => return Err(Problem::new(PROTOCOL, "something else came where WANTS was due")),
                },
                None if self.queue.is_empty() => link.say(&Say::Still)?,
                None => {}
            }
            if let Some(next) = self.queue.pop_front() {
                self.answer(next, link)?;
                self.sent += next.bytes;
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

    fn answer(&mut self, Wanted { mm, address, bytes, .. }: Wanted, link: &mut Link) -> Result<()> {
        let strange = || Problem::new(PROTOCOL, format!("{bytes} bytes at {address:#x} of memory {mm} are wanted"));
        let host = *self.hosts.get(&MmId(mm)).filter(|_| (1..=MOST).contains(&bytes)).ok_or_else(strange)?;
        let buffer = &mut self.buffer[..bytes as usize];
        // A first thread that has ended before the others has no memory any more.
        let by_another = |buffer: &mut [u8]| {
            let tasks = fs::read_dir(format!("/proc/{host}/task"))?.flatten();
            let threads = tasks.filter_map(|task| task.file_name().to_string_lossy().parse().ok());
            let mut read = threads.map(|thread| memory::read_exact(thread, address, buffer));
            read.find(io::Result::is_ok).unwrap_or_else(|| Err(io::Error::from_raw_os_error(libc::EFAULT)))
        };
        memory::read_exact(host, address, buffer)
            .or_else(|_| by_another(buffer))
            .doing(|| format!("read {bytes} bytes at {address:#x} of the copy of memory {mm}"))?;
        link.writer.pages(PageRun { owner: Owner::Mm(MmId(mm)), address, bytes }, &[buffer])?;
        link.writer.flush()
    }
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
    for attempt in 0..ATTEMPTS {
        std::thread::sleep(Duration::from_millis(250) * attempt.pow(2));
        match again(&mut copy, dial, job, bandwidth) {
            Ok(()) => return Ok(copy.sent),
            Err(problem) => last = problem,
        }
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

/// What a person can do when it does not come on.
pub(super) fn unfinished(problem: Problem, job: &str, to: &str) -> Problem {
    let what = format!("the pod runs on {to}, some of its memory is still here, and the way there is lost");
    Problem::new("E-BEHIND", what).because(problem).fix(format!(
        "pod job resume {job} when {to} can be reached; until then the pod waits where it touches what is missing"
    ))
}

/// Destination: a process of its own goes on with the link of a pod that runs and has memory behind it.
pub(super) fn carry_on(mut link: Link, pod: &Pod) -> Result<()> {
    // It is nobody's to give up any more.
    link.past_interrupts();
    match daemon::fork().doing(|| "fork".into())? {
        Fork::Parent(_) => Ok(()),
        Fork::Child => {
            daemon::set_comm(c"pod-carrier");
            let keep: Vec<i32> = link.descriptors();
            daemon::close_all_but(&keep);
            let carried = carry(&mut link, pod);
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
    let Say::Still = way::hear(&mut link)? else {
        return Err(Problem::new(PROTOCOL, "something else came where STILL was due"));
    };
    match store.by_id(&job.pod).filter(|_| job.role == Role::Destination) {
        Some(pod) => carry(&mut link, &pod),
        // It has ended since.
        None => link.say(&Answer::Whole),
    }
}

/// Words one way, pages the other, until nothing is missing.
fn carry(link: &mut Link, pod: &Pod) -> Result<()> {
    let Some(mut filler) = behind::connect(pod)? else { return link.say(&Answer::Whole) };
    let mut words = Vec::new();
    loop {
        match link.heard_or(&[filler.as_fd()], STILL * 5)? {
            Some(true) => pages(link, &mut filler)?,
            Some(false) => {
                let mut buffer = [0; WANT * 256];
                let count = filler.read(&mut buffer).doing(|| "hear what is missing".into())?;
                words.extend(&buffer[..count]);
                // A filler that ends without a word has lost its pod, which needs nothing then.
                if say(link, &mut words)? || count == 0 {
                    return link.say(&Answer::Whole);
                }
            }
            None => return Err(Problem::new(crate::link::LINK, "nothing was heard from the source for some time")),
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
            Word::Want(Want { urgent, mm, address, bytes }) => wants.push(Wanted { mm, address, bytes, urgent }),
        }
    }
    if wants.is_empty() { Ok(false) } else { link.say(&Answer::Wants(wants)).map(|()| false) }
}

/// Passes on one thing that the source has said.
fn pages(link: &mut Link, filler: &mut UnixStream) -> Result<()> {
    let Some(record) = link.reader.next()? else { return Err(Problem::new(PROTOCOL, "the source ended its stream")) };
    match (record.kind, record.run) {
        (Kind::PAGES, Some(run @ PageRun { owner: Owner::Mm(mm), .. })) if run.bytes <= MOST => {
            let mut put = |bytes: &[u8]| -> io::Result<()> { filler.write_all(bytes) };
            put(&behind::head(mm, run.address, run.bytes)).doing(|| "hand memory on".into())?;
            let mut buffer = PageBuffer::new(256 << 10);
            link.reader.each_piece(run.address, &mut buffer, |_, bytes| put(bytes).doing(|| "hand memory on".into()))
        }
        (Kind::MESSAGE, _) if matches!(record.state()?, Say::Still) => Ok(()),
        _ => Err(Problem::new(PROTOCOL, format!("a {} record where pages were due", record.kind))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(address: u64, urgent: bool) -> Wanted {
        Wanted { mm: 1, address, bytes: 4096, urgent }
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
