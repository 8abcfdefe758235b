//! The processes that bring memory which was left in a checkpoint's file, or on another host ([`behind`]), while the pod runs.
//!
//! ```text
//! program ── touches a page ──> userfaultfd ──> filler: reads the record, compares it, puts its pages
//!                                                 │  between two faults: whatever comes next in the file
//! keeper: holds the same descriptors, and nothing else to do
//! ```
//!
//! When the last descriptor of a userfaultfd is closed the kernel lets the program run on, with zeros where it had something.
//! That must not be, whoever is killed: so there are two processes that hold them. Without its filler the keeper ends the
//! pod, which then cannot go on, and holds the descriptors until it has; without its keeper the filler becomes one, and
//! its child goes on. The monitor has no part in it. A page that cannot be read, or does not fit its checksum, is the
//! filler's end.
//!
//! Order: the kernel tells of faults before it tells of mremap(2), munmap(2), madvise(2) and fork(2) that came earlier,
//! but takes no page as long as one of those was not read (EAGAIN). So everything is read before anything is answered, and
//! what was refused is looked up again.

pub mod behind;

use self::behind::Behind;
use super::lazy::{Missing, Piece};
use crate::ids::MmId;
use crate::image::{PageBuffer, Waiting};
use crate::remote::RemoteCall;
use crate::remote::plain::Stub;
use crate::{Doing, Problem, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pod_runtime::store::Pod;
use pod_runtime::sys::daemon::{self, Ended, Fork};
use pod_runtime::sys::interrupt;
use pod_runtime::sys::pidfd;
use pod_runtime::sys::userfault::{self, Event, Userfault};
use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

const PAGE: u64 = 4096;
/// What a fault brings, around the page that was touched; between two looks at faults no more is brought.
const WINDOW: u64 = 64 << 10;
/// Records whose bytes are kept: faults come in clusters.
const MOST_KEPT: usize = 4;
/// A pod that has no room for a page is asked again after this, milliseconds.
const NO_ROOM: u16 = 20;

/// A pod that is being filled while it runs: nobody can save or move it meanwhile ([`wait`]).
pub struct Filling {
    pod: Pod,
    /// Locked, by whoever has the description: this, the keeper, the filler.
    lock: File,
}

fn lock_path(pod: &Pod) -> PathBuf {
    pod.run_dir().join("filling.lock")
}

impl Filling {
    /// In the run directory, which goes with the pod.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn begin(pod: &Pod) -> Result<Filling> {
        let (path, dir) = (lock_path(pod), pod.run_dir());
        DirBuilder::new().recursive(true).mode(0o700).create(&dir).doing(|| format!("make {}", dir.display()))?;
        let open = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let lock = open.doing(|| format!("open {}", path.display()))?;
        lock.lock().doing(|| format!("lock {}", path.display()))?;
        Ok(Filling { pod: pod.clone(), lock })
    }
}

/// Whether memory of a pod is still to come.
pub fn is_filled(pod: &Pod) -> bool {
    File::open(lock_path(pod)).map_or(true, |file| file.try_lock_shared().is_ok())
}

/// Waits until all memory of a pod is there; `late` is called if that takes some time.
///
/// # Errors
/// The lock cannot be opened.
pub fn wait(pod: &Pod, late: impl FnOnce()) -> Result<()> {
    let path = lock_path(pod);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).doing(|| format!("open {}", path.display())),
    };
    if file.try_lock_shared().is_ok() {
        return Ok(());
    }
    late();
    file.lock_shared().doing(|| format!("wait for {}", path.display()))
}

/// A userfaultfd of the process by which its faults can be handled, also those of its system calls. The process itself does
/// not keep it.
pub(super) fn userfault(stub: &Stub) -> Result<Userfault> {
    let what = || format!("make a userfaultfd in task {}", stub.task);
    let call = RemoteCall::new("userfaultfd", libc::SYS_userfaultfd, vec![userfault::HANDLING.into()]).may_fail();
    let number = stub.call(call)?;
    if number < 0 {
        return Err(io::Error::from_raw_os_error(-number as i32)).doing(what);
    }
    let fd = pidfd::open(stub.task.0).and_then(|task| pidfd::get_fd(task, number as i32));
    stub.call(RemoteCall::new("close", libc::SYS_close, vec![(number as i32).into()]))?;
    fd.and_then(Userfault::handling).doing(what)
}

/// One address space that is being filled.
pub(super) struct Space {
    pub fault: Userfault,
    pub missing: Missing,
}

/// Where what is missing is.
pub(super) enum Source<'a> {
    File(Vec<Waiting>, &'a File),
    /// On the host that the pod has left: whose memory each record is, and by which job it left.
    Behind(Vec<MmId>, String),
}

/// The same for one who brings it.
enum From {
    File(Records),
    Behind(Behind),
}

/// Starts the keeper and the filler for spaces that are watched already. The caller is single-threaded.
///
/// # Errors
/// No process is to be had.
pub(super) fn start(spaces: Vec<Space>, source: Source<'_>, init: i32, filling: Filling) -> Result<()> {
    let threads = fs::read_dir("/proc/self/task").doing(|| "count threads".into())?.count();
    if threads != 1 {
        return Err(Problem::new("E-INTERNAL", format!("a filler cannot be forked by {threads} threads")));
    }
    let init = pidfd::open(init).doing(|| "open the first process".into())?;
    let from = match source {
        Source::File(records, file) => {
            From::File(Records::new(records, file.try_clone().doing(|| "copy a descriptor".into())?))
        }
        Source::Behind(owners, job) => From::Behind(Behind::open(&filling.pod, &job, owners)?),
    };
    let turns = turns(spaces.iter().enumerate().map(|(number, space)| (number, &space.missing)));
    let spaces = spaces.into_iter().enumerate().collect();
    let mut filler = Filler { spaces, from, turns, faults: Vec::new(), moved: false, doubt: None, init, filling };
    match daemon::fork().doing(|| "fork".into())? {
        Fork::Parent(_) => Ok(()),
        Fork::Child => {
            daemon::close_all_but(&filler.descriptors());
            for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGTERM, libc::SIGPIPE] {
                // One that cannot be ignored ends it, as any signal would.
                let _ = interrupt::ignore(signal);
            }
            daemon::exit_now(filler.keep())
        }
    }
}

/// Space, address, and what was missing there.
type Turn = (usize, u64, Piece);

/// In which order what waits is brought when nobody asks for it: that of the file, so that each record is read once. To be
/// taken from the end.
fn turns<'a>(spaces: impl Iterator<Item = (usize, &'a Missing)>) -> Vec<Turn> {
    let each = |(number, missing): (usize, &'a Missing)| missing.iter().map(move |(at, piece)| (number, at, piece));
    let mut turns: Vec<Turn> = spaces.flat_map(each).collect();
    turns.sort_unstable_by_key(|(_, _, piece)| std::cmp::Reverse((piece.record, piece.into)));
    turns
}

struct Filler {
    spaces: BTreeMap<usize, Space>,
    from: From,
    turns: Vec<Turn>,
    /// Pages that somebody waits for: the kernel tells of each once.
    faults: Vec<(usize, u64)>,
    /// Something is missing elsewhere than it was at first.
    moved: bool,
    /// A page that the kernel found no memory for, and what had happened was not known yet.
    doubt: Option<(usize, u64)>,
    /// The pod's first process.
    init: OwnedFd,
    filling: Filling,
}

/// What came of putting pages.
#[derive(Debug, PartialEq, Eq)]
enum Put {
    Done,
    /// Something happened to the memory that has to be read first.
    Again,
    /// Nothing is mapped at the address. It may have been moved a moment ago, which has to be read first, too.
    Unmapped(u64),
    /// The process is no more, or is another program.
    Gone,
}

impl Filler {
    fn descriptors(&self) -> Vec<i32> {
        let mut all: Vec<i32> = self.spaces.values().map(|space| space.fault.as_fd().as_raw_fd()).collect();
        all.extend([self.init.as_raw_fd(), self.filling.lock.as_raw_fd()]);
        match &self.from {
            From::File(records) => all.push(records.file.as_raw_fd()),
            From::Behind(behind) => all.push(behind.descriptor()),
        }
        all
    }

    /// The keeper's life, and in a child the filler's. The status to end with.
    fn keep(&mut self) -> i32 {
        daemon::set_comm(c"pod-keeper");
        let Ok((mut ours, theirs)) = UnixStream::pair() else { return self.give_up("no socket pair") };
        let filler = match daemon::fork() {
            Ok(Fork::Child) => {
                drop(ours);
                return self.serve(theirs);
            }
            Ok(Fork::Parent(pid)) => pid,
            Err(error) => return self.give_up(&error.to_string()),
        };
        drop(theirs);
        // Userfaultfds of children of the pod's processes that were forked since.
        let mut more = Vec::new();
        let task = pidfd::open(filler);
        let mut number = [0; 4];
        while ours.read_exact(&mut number).is_ok() {
            more.extend(task.as_ref().ok().and_then(|task| pidfd::get_fd(task, i32::from_ne_bytes(number)).ok()));
            if ours.write_all(b"!").is_err() {
                break;
            }
        }
        match daemon::reap(filler) {
            Ok(Ended::Code(0)) => 0,
            Ok(Ended::Code(_)) => self.give_up(""),
            Ok(Ended::Signal(signal)) => self.give_up(&format!("its filler was ended by signal {signal}")),
            Err(error) => self.give_up(&error.to_string()),
        }
    }

    /// Ends the pod, which cannot have its memory, and holds what there is of it until then.
    fn give_up(&self, why: &str) -> i32 {
        // SIGKILL is not to be held off, and a first process that has gone has taken all others with it.
        let _ = pidfd::send_signal(&self.init, libc::SIGKILL);
        if !why.is_empty() {
            self.report(why);
        }
        let mut ended = [PollFd::new(self.init.as_fd(), PollFlags::POLLIN)];
        while poll(&mut ended, PollTimeout::NONE) == Err(nix::Error::EINTR) {}
        1
    }

    /// Writes down why the pod was ended.
    fn report(&self, why: &str) {
        let from = match self.from {
            From::File(_) => "the checkpoint",
            From::Behind(_) => "the host that it left",
        };
        let why = format!("its memory could not be brought from {from}: {why}");
        // A pod without this line is ended all the same.
        let _ = self.filling.pod.update_quickly(|status| status.problem = Some(why.clone()));
    }

    /// The filler's life.
    fn serve(&mut self, mut keeper: UnixStream) -> i32 {
        daemon::set_comm(c"pod-filler");
        let filled = match self.from {
            From::File(_) => self.fill(&mut keeper),
            From::Behind(_) => self.fill_from_behind(&mut keeper),
        };
        match filled {
            Ok(true) => 0,
            // Another filler, and this keeps it.
            Ok(false) => self.keep(),
            Err(problem) => {
                self.report(&format!("{} ({})", problem.chain(), problem.code()));
                1
            }
        }
    }

    /// Until nothing is missing any more; false when the keeper has gone before.
    fn fill(&mut self, keeper: &mut UnixStream) -> Result<bool> {
        let mut patience = PollTimeout::ZERO;
        loop {
            if !self.listen(keeper, patience)? {
                return Ok(false);
            }
            patience = PollTimeout::ZERO;
            for (number, address) in std::mem::take(&mut self.faults) {
                if self.answer(number, address, &mut patience)? == Put::Again {
                    self.faults.push((number, address));
                }
            }
            if self.faults.is_empty() && !self.bring(&mut patience)? {
                return Ok(true);
            }
        }
    }

    /// Reads all that has happened. False when the keeper has gone.
    fn listen(&mut self, keeper: &mut UnixStream, patience: PollTimeout) -> Result<bool> {
        let numbers: Vec<usize> = self.spaces.keys().copied().collect();
        let mut fds: Vec<PollFd<'_>> =
            self.spaces.values().map(|space| PollFd::new(space.fault.as_fd(), PollFlags::POLLIN)).collect();
        fds.push(PollFd::new(keeper.as_fd(), PollFlags::POLLIN));
        match poll(&mut fds, patience) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error).doing(|| "wait for faults".into()),
        }
        let happened = |fd: &PollFd<'_>| fd.revents().is_some_and(|flags| !flags.is_empty());
        if fds.last().is_some_and(happened) {
            return Ok(false);
        }
        let ready: Vec<usize> = numbers.iter().zip(&fds).filter(|(_, fd)| happened(fd)).map(|(n, _)| *n).collect();
        for number in ready {
            while let Some(space) = self.spaces.get(&number) {
                let events = space.fault.read().doing(|| "read faults".into())?;
                if events.is_empty() {
                    break;
                }
                for event in events {
                    self.take_in(number, event, keeper);
                }
            }
        }
        Ok(true)
    }

    fn take_in(&mut self, number: usize, event: Event, keeper: &mut UnixStream) {
        let Some(space) = self.spaces.get_mut(&number) else { return };
        match event {
            Event::Fault(address) => self.faults.push((number, address)),
            Event::Remap { from, to } => {
                space.missing.shift(from, to);
                self.moved = true;
            }
            Event::Remove(range) => drop(space.missing.take(range)),
            Event::Fork(fault) => {
                let missing = space.missing.clone();
                // Whether the keeper has it is seen at the next look at it.
                let _ = keeper
                    .write_all(&fault.as_fd().as_raw_fd().to_ne_bytes())
                    .and_then(|()| keeper.read_exact(&mut [0]));
                let next = self.spaces.last_key_value().map_or(0, |(last, _)| last + 1);
                self.turns.splice(0..0, turns(std::iter::once((next, &missing))));
                self.spaces.insert(next, Space { fault, missing });
            }
        }
    }

    /// Gives a page that was touched, and some around it.
    fn answer(&mut self, number: usize, address: u64, patience: &mut PollTimeout) -> Result<Put> {
        let Some(space) = self.spaces.get(&number) else { return Ok(Put::Gone) };
        let Some((start, piece)) = space.missing.at(address) else {
            return self.done(number, address..address + PAGE, put(|| space.fault.zero(address), patience)?);
        };
        let from = (address & !(WINDOW - 1)).max(start);
        let to = (from + WINDOW).min(piece.end);
        self.place(number, from..to, patience)
    }

    /// Brings what is next in the file. False when nothing is missing.
    fn bring(&mut self, patience: &mut PollTimeout) -> Result<bool> {
        while let Some((number, start, piece)) = self.turns.last().copied() {
            // What of it is still missing, and where it was.
            let here =
                |(at, found): &(u64, Piece)| found.record == piece.record && found.into == piece.into + (at - start);
            let space = self.spaces.get(&number);
            let next = space.and_then(|space| space.missing.within(start..piece.end).into_iter().find(here));
            if let Some((at, found)) = next {
                self.place(number, at..found.end.min(at + WINDOW), patience)?;
                return Ok(true);
            }
            self.turns.pop();
        }
        // What mremap(2) has moved.
        let next = self.spaces.iter().find_map(|(number, space)| {
            let (start, piece) = space.missing.iter().next()?;
            Some((*number, start..piece.end.min(start + WINDOW)))
        });
        let Some((number, range)) = next else { return Ok(false) };
        self.place(number, range, patience).map(|_| true)
    }

    /// Pages of one piece that is missing.
    fn place(&mut self, number: usize, range: Range<u64>, patience: &mut PollTimeout) -> Result<Put> {
        let Some(space) = self.spaces.get_mut(&number) else { return Ok(Put::Gone) };
        let Some((start, piece)) = space.missing.within(range.clone()).first().copied() else { return Ok(Put::Done) };
        let From::File(records) = &mut self.from else { return Ok(Put::Done) };
        let bytes = records.part(piece.record, piece.into, (piece.end - start) as usize)?;
        let doubt = self.doubt.filter(|(of, _)| *of == number).map(|(_, address)| address);
        let (there, outcome) = put_all(&space.fault, start, bytes, doubt, patience)?;
        self.done(number, there, outcome)
    }

    /// Notes what is not missing any more.
    fn done(&mut self, number: usize, there: Range<u64>, mut outcome: Put) -> Result<Put> {
        if let Put::Unmapped(address) = outcome {
            self.doubt = Some((number, address));
            outcome = Put::Again;
        }
        match outcome {
            Put::Gone => drop(self.spaces.remove(&number)),
            Put::Again if there.is_empty() => {}
            _ => {
                if let Some(space) = self.spaces.get_mut(&number) {
                    space.missing.take(there);
                }
            }
        }
        Ok(outcome)
    }
}

/// Puts pages, as many as go: which of them are there then, and what came of the rest. Nothing has happened since there was no memory
/// for the page at `doubt`: somebody has mapped something else there and the kernel has told nobody.
fn put_all(
    fault: &Userfault,
    start: u64,
    bytes: &[u8],
    doubt: Option<u64>,
    patience: &mut PollTimeout,
) -> Result<(Range<u64>, Put)> {
    let mut step = bytes.len();
    let mut at = 0;
    while at < bytes.len() {
        let address = start + at as u64;
        let piece = &bytes[at..bytes.len().min(at + step)];
        let outcome = match fault.copy(address, piece) {
            Ok(count) => {
                at += count;
                continue;
            }
            // The range has several maps by now; or what is there is no memory of ours any more.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) && piece.len() > PAGE as usize => {
                step = PAGE as usize;
                continue;
            }
            // Since Linux 6.9 it is looked for before the kernel looks whether it is just being moved.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) && doubt != Some(address) => {
                Put::Unmapped(address)
            }
            // It is there, so it was brought; what was written since is newer.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EEXIST | libc::ENOENT)) => {
                at += PAGE as usize;
                continue;
            }
            Err(error) => put(|| Err(error), patience)?,
        };
        return Ok((start..address, outcome));
    }
    Ok((start..start + bytes.len() as u64, Put::Done))
}

/// How the kernel took it.
fn put(how: impl FnOnce() -> io::Result<()>, patience: &mut PollTimeout) -> Result<Put> {
    let Err(error) = how() else { return Ok(Put::Done) };
    match error.raw_os_error() {
        // ENOENT: unmapped meanwhile.
        Some(libc::EEXIST | libc::ENOENT) => Ok(Put::Done),
        Some(libc::EAGAIN) => Ok(Put::Again),
        Some(libc::ESRCH) => Ok(Put::Gone),
        // Within its limit the pod has to find room itself, by its end if it must.
        Some(libc::ENOMEM) => {
            *patience = PollTimeout::from(NO_ROOM);
            Ok(Put::Again)
        }
        _ => Err(error).doing(|| "put a page".into()),
    }
}

/// The records of the file.
struct Records {
    all: Vec<Waiting>,
    file: File,
    /// Bytes of a few, the latest last.
    kept: Vec<(usize, Vec<u8>)>,
    buffer: PageBuffer,
}

impl Records {
    fn new(all: Vec<Waiting>, file: File) -> Records {
        Records { all, file, kept: Vec::new(), buffer: PageBuffer::new(256 << 10) }
    }

    /// Some bytes of a record, all of which have been compared.
    fn part(&mut self, record: usize, into: u64, bytes: usize) -> Result<&[u8]> {
        let at = match self.kept.iter().position(|(kept, _)| *kept == record) {
            Some(at) => at,
            None => {
                let waiting = self.all[record];
                let mut whole = Vec::with_capacity(waiting.bytes() as usize);
                waiting.read(&self.file, &mut self.buffer, |_, piece| {
                    whole.extend_from_slice(piece);
                    Ok(())
                })?;
                if self.kept.len() == MOST_KEPT {
                    self.kept.remove(0);
                }
                self.kept.push((record, whole));
                self.kept.len() - 1
            }
        };
        let whole = &self.kept[at].1;
        Ok(&whole[into as usize..into as usize + bytes])
    }
}
