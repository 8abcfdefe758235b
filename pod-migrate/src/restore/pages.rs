//! Pages from the stream straight into their place.
//!
//! From a file several threads do it: the one that walks the records leaves long runs where they are, others read,
//! compare and place them. All have ended, and the stream's trailer has been compared, before the walk goes on; until
//! the pod is let go nothing of it runs.
//!
//! Fresh anonymous memory is filled through a userfaultfd of the process, which allocates, copies and maps in one step
//! (half the time of writing to memory that is not there yet). Where there is none, and for all else, the pages are
//! written by process_vm_writev. What the program itself may not write is written by the tracer through /proc/PID/mem,
//! and only by the thread that is the tracer: a kernel may be told that nobody else can (proc_mem.force_override=ptrace).

use super::ahead::{self, Ahead};
use super::heritage::Copied;
use super::lazy::{Beside, Lazy};
use super::nursery::Laid;
use super::same::{self, Same};
use super::tree::Grown;
use super::{Image, write_memory};
use crate::crew;
use crate::ids::{FileId, HostPid, MmId, PodPid, SharedMemoryId};
use crate::image::{Kind, Owner, PageBuffer, PageRun, Reader, Record, Waiting, damaged};
use crate::objects::files::{FileState, Opener};
use crate::objects::memory::ranges::Ranges;
use crate::objects::memory::{Backing, Map, MmState, SharedMemoryKind};
use crate::remote::RemoteCall;
use crate::remote::plain::Stub;
use crate::{Doing, Problem, Result};
use pod_runtime::sys::pidfd;
use pod_runtime::sys::userfault::{self, Userfault};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Scope, ScopedJoinHandle};

const PAGE: u64 = 4096;
/// What passes through one thread's cache at once.
const PIECE: usize = 256 << 10;
/// Threads pay from this many bytes on.
const ALONE: u64 = 4 << 20;
/// Runs that are worth handing over.
const LONG: u64 = 32 << 10;
/// More would wait for the memory, not for each other.
const MOST_THREADS: usize = 8;
/// A userfaultfd costs a tenth of a millisecond: from this much anonymous memory on it pays.
const MUCH: u64 = 4 << 20;

/// What pages go to.
#[derive(Clone)]
pub(super) enum Target<'a> {
    Memory(Arc<Space<'a>>),
    /// Something of so many bytes, which does not grow.
    File(Arc<File>, Owner, u64),
}

impl Target<'_> {
    /// Whether a run lies where the image itself says that something is.
    pub fn check(&self, run: PageRun) -> Result<()> {
        match self {
            Target::Memory(space) => space.check(run.address, run.bytes),
            Target::File(_, owner, most) => match run.address.checked_add(run.bytes) {
                Some(end) if end <= *most => Ok(()),
                _ => Err(damaged(format!("contents of {owner:?} beyond its {most} bytes"))),
            },
        }
    }

    /// Whether any thread may place it.
    pub fn for_all(&self, run: PageRun) -> bool {
        match self {
            Target::Memory(space) => space.takes_plainly(run.address, run.bytes),
            Target::File(..) => true,
        }
    }

    /// What was written there.
    pub fn read(&self, address: u64, into: &mut [u8]) -> Result<()> {
        let (file, owner) = match self {
            Target::Memory(space) => (&space.file, Owner::Mm(space.state.id)),
            Target::File(file, owner, _) => (&**file, *owner),
        };
        file.read_exact_at(into, address).doing(|| format!("read {} bytes at {address:#x} of {owner:?}", into.len()))
    }

    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        match self {
            Target::Memory(space) => space.write(address, bytes),
            Target::File(file, owner, _) => {
                file.write_all_at(bytes, address).doing(|| format!("write contents of {owner:?}"))
            }
        }
    }
}

/// Everything that pages can go to, opened when its first page comes.
pub(super) struct Targets<'a> {
    image: &'a Image,
    grown: &'a Grown,
    opener: &'a Opener,
    shared: BTreeMap<SharedMemoryId, Arc<File>>,
    files: BTreeMap<FileId, Arc<File>>,
    spaces: BTreeMap<MmId, Arc<Space<'a>>>,
}

impl<'a> Targets<'a> {
    /// `None` for what is no part of memory.
    pub fn of(&mut self, owner: Owner) -> Result<Option<Target<'a>>> {
        Ok(Some(match owner {
            Owner::Mm(id) => {
                if !self.spaces.contains_key(&id) {
                    self.spaces.insert(id, Arc::new(Space::open(self.image, self.grown, id)?));
                }
                Target::Memory(self.spaces[&id].clone())
            }
            Owner::SharedMemory(id) => {
                let none = || damaged(format!("pages of shared memory {id}, which is not there"));
                let file = self.shared.get(&id).ok_or_else(none)?.clone();
                let state = self.image.shared.get(&id).ok_or_else(none)?;
                let most = match state.kind {
                    SharedMemoryKind::Contents(file) => state.bytes.min(self.bytes_of(file)),
                    _ => state.bytes,
                };
                Target::File(file, owner, most)
            }
            Owner::File(id) => {
                if !self.files.contains_key(&id) {
                    self.files.insert(id, Arc::new(File::from(self.opener.contents(id)?)));
                }
                Target::File(self.files[&id].clone(), owner, self.bytes_of(id))
            }
            Owner::Ahead(_) | Owner::Storage(_) | Owner::Log => return Ok(None),
        }))
    }

    /// A range of a space in parts that lie in one map each, as pages are placed.
    pub fn by_map(&self, mm: MmId, range: Range<u64>) -> Vec<Range<u64>> {
        by_map(self.maps(mm), range)
    }

    pub fn maps(&self, mm: MmId) -> &'a [Map] {
        self.image.spaces.get(&mm).map_or(&[][..], |space| &space.maps[..])
    }

    /// What the FILE record of a file that has contents says.
    fn bytes_of(&self, id: FileId) -> u64 {
        match self.image.files.files.get(&id).map(|file| &file.state) {
            Some(FileState::Regular(state)) => state.bytes,
            Some(FileState::Memfd(state)) => state.bytes,
            _ => 0,
        }
    }
}

/// The parts of a range that lie in one map each.
pub(super) fn by_map(maps: &[Map], range: Range<u64>) -> Vec<Range<u64>> {
    let first = maps.partition_point(|map| map.end <= range.start);
    let over = maps[first..].iter().take_while(|map| map.start < range.end);
    over.map(|map| map.start.max(range.start)..map.end.min(range.end)).collect()
}

/// All pages: of those that came ahead what still holds, and all up to the stream's trailer, or to where `other`, which gets all other records, says that it was enough. What can wait, and lies in a file, is left to `lazy`.
pub(super) fn fill<R: Read>(
    (image, grown, opener): (&Image, &Grown, &Opener),
    shared: BTreeMap<SharedMemoryId, File>,
    (ahead, laid, copied): (&Ahead, &BTreeMap<PodPid, Laid>, &[Copied]),
    (reader, mut lazy): (&mut Reader<R>, Option<&mut Lazy>),
    other: &mut impl FnMut(&Record, &mut Reader<R>) -> Result<bool>,
) -> Result<()> {
    let shared = shared.into_iter().map(|(id, file)| (id, Arc::new(file))).collect();
    let mut targets = Targets { image, grown, opener, shared, files: BTreeMap::new(), spaces: BTreeMap::new() };
    for Beside { mm, fault, places } in lazy.as_deref().map(Lazy::beside).transpose()?.into_iter().flatten() {
        targets.spaces.insert(mm, Arc::new(Space::open(image, grown, mm)?.beside(fault, places)));
    }
    let file = reader.file().map(File::try_clone).transpose().doing(|| "copy a descriptor".into())?;
    let mut buffer = PageBuffer::new(PIECE);
    let queue = ahead::Queue::default();
    let mut same = Same::default();
    let came = ahead.came();
    for (mm, came) in &came {
        let kept = image.kept.get(mm).map(|kept| kept.both(came)).unwrap_or_default();
        kept.iter().for_each(|range| {
            same.placed(PageRun { owner: Owner::Mm(*mm), address: range.start, bytes: range.end - range.start })
        });
    }
    let laid = laid.iter().filter_map(|(pid, laid)| Some((image.processes.get(pid)?.mm, laid))).collect();
    let kept = lazy.as_deref_mut().map(|lazy| ahead.leave((&image.kept, &laid), lazy));
    let kept = kept.as_ref().unwrap_or(&image.kept);
    std::thread::scope(|scope| {
        let placing = ahead.place((kept, &laid), &mut targets, file.as_ref(), scope, &queue)?;
        let mut helpers = file.as_ref().map(|file| Helpers::new(scope, file));
        while let Some(record) = reader.next()? {
            if record.kind == Kind::SAME {
                same.take(&record)?;
                continue;
            }
            let target = record.run.map(|run| targets.of(run.owner)).transpose()?.flatten();
            let (Some(run), Some(target)) = (record.run, target) else {
                if other(&record, reader)? {
                    break;
                }
                continue;
            };
            target.check(run)?;
            same.placed(run);
            if let (Some(lazy), Owner::Mm(mm)) = (&mut lazy, run.owner)
                && lazy.takes(run)
                && let Some(waiting) = reader.leave_pages()?
            {
                lazy.leave(mm, run.address, waiting, &Ranges::one(run.address..run.address + run.bytes));
                continue;
            }
            if let Some(helpers) = &mut helpers
                && helpers.want(run.bytes)
                && target.for_all(run)
                && let Some(waiting) = reader.leave_pages()?
            {
                helpers.give(Work { target, address: run.address, waiting })?;
            } else {
                place(run, &target, reader, &mut buffer)?;
            }
        }
        helpers.map_or(Ok(()), Helpers::finish)?;
        placing.finish()
    })?;
    let mut lazy = lazy.zip(file.as_ref());
    same.copy(&mut targets, &mut buffer, &mut lazy)?;
    same::inherited(copied, &came, &mut targets, &mut buffer, &mut lazy)
}

/// The run at hand, by this thread.
fn place<R: Read>(run: PageRun, target: &Target<'_>, reader: &mut Reader<R>, buffer: &mut [u8]) -> Result<()> {
    reader.each_piece(run.address, buffer, |at, pages| target.write(at, pages))
}

/// A run that was left in the file.
struct Work<'a> {
    target: Target<'a>,
    address: u64,
    waiting: Waiting,
}

/// Threads that place runs, started when there is enough for them to do.
struct Helpers<'scope, 'env, 'a> {
    scope: &'scope Scope<'scope, 'env>,
    file: &'env File,
    seen: u64,
    queue: Option<SyncSender<Work<'a>>>,
    threads: Vec<ScopedJoinHandle<'scope, Result<()>>>,
}

impl<'scope, 'env, 'a: 'scope> Helpers<'scope, 'env, 'a> {
    fn new(scope: &'scope Scope<'scope, 'env>, file: &'env File) -> Self {
        Helpers { scope, file, seen: 0, queue: None, threads: Vec::new() }
    }

    fn want(&mut self, bytes: u64) -> bool {
        self.seen = self.seen.saturating_add(bytes);
        self.seen > ALONE && bytes >= LONG
    }

    fn give(&mut self, work: Work<'a>) -> Result<()> {
        let queue = match &self.queue {
            Some(queue) => queue,
            None => {
                let (queue, from) = sync_channel::<Work<'a>>(64);
                let from = Arc::new(Mutex::new(from));
                let threads = crew::cpus().min(MOST_THREADS);
                let file = self.file;
                for _ in 0..threads {
                    let from = from.clone();
                    self.threads.push(self.scope.spawn(move || help(&from, file)));
                }
                self.queue.insert(queue)
            }
        };
        if queue.send(work).is_ok() { Ok(()) } else { self.join().and(Err(died())) }
    }

    fn join(&mut self) -> Result<()> {
        self.queue = None;
        let ended = self.threads.drain(..).map(|thread| thread.join().unwrap_or_else(|_| Err(died())));
        ended.fold(Ok(()), Result::and)
    }

    fn finish(mut self) -> Result<()> {
        self.join()
    }
}

fn help(from: &Mutex<Receiver<Work<'_>>>, file: &File) -> Result<()> {
    let mut buffer = PageBuffer::new(PIECE);
    loop {
        let next = from.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Work { target, address, waiting }) = next else { return Ok(()) };
        waiting.read(file, &mut buffer, |at, bytes| target.write(address + at, bytes))?;
    }
}

pub(super) fn died() -> Problem {
    Problem::new("E-INTERNAL", "a thread that copied memory ended by itself")
}

/// One address space, open for pages.
pub(super) struct Space<'a> {
    task: HostPid,
    file: File,
    state: &'a MmState,
    /// For pages that were never there, and where.
    fresh: Vec<(Userfault, Vec<Range<u64>>)>,
}

impl<'a> Space<'a> {
    fn open(image: &'a Image, grown: &Grown, id: MmId) -> Result<Space<'a>> {
        let none = || damaged(format!("pages of memory {id}, which nobody has"));
        let process = image.processes.values().find(|process| process.mm == id).ok_or_else(none)?;
        let stub = grown.stubs[&process.pid];
        Space::over(&stub, image.spaces.get(&id).ok_or_else(none)?)
    }

    /// A process that is to have these maps, whatever it will be.
    pub fn over(stub: &Stub, state: &'a MmState) -> Result<Space<'a>> {
        let path = format!("/proc/{}/mem", stub.task);
        let file = OpenOptions::new().read(true).write(true).open(&path).doing(|| format!("open {path}"))?;
        let anonymous = state.maps.iter().filter(|map| is_fresh(map)).map(|map| map.end - map.start);
        let fresh = if anonymous.fold(0, u64::saturating_add) < MUCH {
            Vec::new()
        } else {
            let made = userfault(stub, state)
                .inspect_err(|problem| tracing::debug!(problem = problem.chain(), "pages are written instead"));
            made.into_iter().collect()
        };
        Ok(Space { task: stub.task, file, state, fresh })
    }

    /// In some places pages are put by this, which watches them already.
    fn beside(mut self, fault: Userfault, places: Vec<Range<u64>>) -> Space<'a> {
        self.fresh.push((fault, places));
        self
    }

    /// Pages must lie in maps of the image: the engine's own page must not be reachable.
    fn check(&self, address: u64, bytes: u64) -> Result<()> {
        let end = address.checked_add(bytes).ok_or_else(|| damaged("pages beyond the end of memory"))?;
        match covered(&self.state.maps, address..end, |_| true) {
            at if at < end => Err(damaged(format!("pages at {at:#x} of memory {}, where no map is", self.state.id))),
            _ => Ok(()),
        }
    }

    /// Whether it takes no tracer to write there.
    fn takes_plainly(&self, address: u64, bytes: u64) -> bool {
        let end = address.saturating_add(bytes);
        let writable = |map: &Map| map.protection & libc::PROT_WRITE as u32 != 0 || map.huge != 0;
        self.is_fresh(address, bytes) || covered(&self.state.maps, address..end, writable) >= end
    }

    /// Whether it goes through a userfaultfd.
    fn is_fresh(&self, address: u64, bytes: u64) -> bool {
        self.fresh_by(address, bytes).is_some()
    }

    fn fresh_by(&self, address: u64, bytes: u64) -> Option<&Userfault> {
        let inside = |place: &Range<u64>| place.start <= address && address.saturating_add(bytes) <= place.end;
        let whole = (address | bytes).is_multiple_of(PAGE);
        let by = self.fresh.iter().filter(|_| whole).find(|(_, places)| places.iter().any(inside));
        by.map(|(fault, _)| fault)
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        if let Some(fault) = self.fresh_by(address, bytes.len() as u64) {
            return self.put(fault, address, bytes);
        }
        if write_memory(self.task, address, bytes).is_ok() {
            return Ok(());
        }
        // Not writable for the program itself: as its tracer we may, and it gets a private copy.
        self.overwrite(address, bytes)
    }

    /// Pages that are not there yet; if an image has one twice, the second is written over the first.
    fn put(&self, fault: &Userfault, mut address: u64, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let count = match fault.copy(address, bytes) {
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    self.overwrite(address, &bytes[..PAGE as usize])?;
                    PAGE as usize
                }
                Err(error) => return Err(error).doing(|| self.placing(address, bytes)),
            };
            bytes = &bytes[count..];
            address += count as u64;
        }
        Ok(())
    }

    fn overwrite(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, address).doing(|| self.placing(address, bytes))
    }

    fn placing(&self, address: u64, bytes: &[u8]) -> String {
        format!("write {} bytes at {address:#x} of task {}", bytes.len(), self.task)
    }
}

/// Up to where maps, all of which are `such`, cover a range without a gap.
fn covered(maps: &[Map], range: Range<u64>, such: impl Fn(&Map) -> bool) -> u64 {
    let mut at = range.start;
    let first = maps.partition_point(|map| map.end <= range.start);
    for map in &maps[first..] {
        if map.start > at || at >= range.end || !such(map) {
            break;
        }
        at = map.end.min(range.end);
    }
    at
}

/// Whether a map's pages come into being one by one: not where whole huge pages are wanted.
fn is_fresh(map: &Map) -> bool {
    map.huge == 0 && map.backing == Backing::Anonymous && !map.shared && !map.advice.contains(&libc::MADV_HUGEPAGE)
}

/// A userfaultfd of the process for all its anonymous maps. The process itself does not keep it.
fn userfault(stub: &Stub, state: &MmState) -> Result<(Userfault, Vec<Range<u64>>)> {
    let what = || format!("make a userfaultfd in task {}", stub.task);
    let call = RemoteCall::new("userfaultfd", libc::SYS_userfaultfd, vec![userfault::FLAGS.into()]).may_fail();
    let number = stub.call(call)?;
    if number < 0 {
        return Err(std::io::Error::from_raw_os_error(-number as i32)).doing(what);
    }
    let fd = pidfd::open(stub.task.0).and_then(|task| pidfd::get_fd(task, number as i32));
    stub.call(RemoteCall::new("close", libc::SYS_close, vec![(number as i32).into()]))?;
    let fault = fd.and_then(Userfault::take).doing(what)?;
    let mut places: Vec<Range<u64>> = Vec::new();
    for map in state.maps.iter().filter(|map| is_fresh(map)) {
        if fault.register(map.start, map.end - map.start).is_err() {
            continue;
        }
        match places.last_mut() {
            Some(last) if last.end == map.start => last.end = map.end,
            _ => places.push(map.start..map.end),
        }
    }
    Ok((fault, places))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::image::DAMAGED;

    pub fn map(range: Range<u64>, protection: i32) -> Map {
        Map {
            start: range.start,
            end: range.end,
            protection: protection as u32,
            shared: false,
            grows_down: false,
            locked: false,
            lock_on_fault: false,
            guards: Vec::new(),
            droppable: false,
            sealed: false,
            no_reserve: false,
            advice: Vec::new(),
            protection_key: 0,
            huge: 0,
            policy: None,
            backing: Backing::Anonymous,
        }
    }

    pub fn space(maps: &[Map]) -> MmState {
        MmState {
            id: MmId(1),
            maps: maps.to_vec(),
            layout: Default::default(),
            auxv: Default::default(),
            exe: FileId(1),
            lock_future: false,
            lock_future_on_fault: false,
        }
    }

    #[test]
    fn contents_do_not_grow_what_they_belong_to() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        for owner in [Owner::SharedMemory(SharedMemoryId(1)), Owner::File(FileId(1))] {
            let target = Target::File(file.clone(), owner, 8192);
            let check = |address, bytes| target.check(PageRun { owner, address, bytes });
            for (address, bytes) in [(0, 8192), (4096, 4096), (8192, 0)] {
                check(address, bytes).unwrap();
            }
            for (address, bytes) in [(0, 8193), (4097, 4096), (1 << 40, 1), (8192, 1), (u64::MAX, 2)] {
                assert_eq!(check(address, bytes).unwrap_err().code(), DAMAGED, "{bytes} at {address}");
            }
        }
    }

    #[test]
    fn only_what_is_writable_goes_to_any_thread() {
        let write = libc::PROT_READ | libc::PROT_WRITE;
        let maps = [map(0..10, write), map(10..20, write), map(20..30, libc::PROT_READ), map(40..50, write)];
        let state = space(&maps);
        let space = Space { task: HostPid(0), file: tempfile::tempfile().unwrap(), state: &state, fresh: Vec::new() };
        for (range, is_there, plain) in [
            (0..20, true, true),
            (5..15, true, true),
            (15..25, true, false),
            (20..30, true, false),
            (5..45, false, false),
            (40..50, true, true),
            (45..51, false, false),
            (60..70, false, false),
        ] {
            let (at, bytes) = (range.start, range.end - range.start);
            assert_eq!(space.check(at, bytes).is_ok(), is_there, "{range:?}");
            assert_eq!(space.takes_plainly(at, bytes), plain, "{range:?}");
        }
        assert!(space.check(u64::MAX, 2).is_err());
    }
}
