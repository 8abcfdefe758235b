//! Pages from the stream straight into their place.
//!
//! From a file several threads do it: the one that walks the records leaves long runs where they are, others read,
//! compare and place them. All have ended, and the stream's trailer has been compared, before the walk goes on; until
//! the pod is let go nothing of it runs.
//!
//! Fresh anonymous memory is filled through a userfaultfd of the process, which allocates, copies and maps in one step
//! (half the time of writing to memory that is not there yet). Where there is none, and for all else, the pages are
//! written by process_vm_writev.

use super::tree::Grown;
use super::{Image, write_memory};
use crate::ids::{FileId, HostPid, MmId, SharedMemoryId};
use crate::image::{Owner, PageBuffer, PageRun, Reader, Record, Waiting, damaged};
use crate::objects::files::Opener;
use crate::objects::memory::{Backing, Map, MmState};
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
enum Target<'a> {
    Memory(Arc<Space<'a>>),
    File(Arc<File>, Owner),
}

impl Target<'_> {
    fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        match self {
            Target::Memory(space) => space.write(address, bytes),
            Target::File(file, owner) => {
                file.write_all_at(bytes, address).doing(|| format!("write contents of {owner:?}"))
            }
        }
    }
}

/// Everything that pages can go to, opened when its first page comes.
struct Targets<'a> {
    image: &'a Image,
    grown: &'a Grown,
    opener: &'a Opener,
    shared: BTreeMap<SharedMemoryId, Arc<File>>,
    files: BTreeMap<FileId, Arc<File>>,
    spaces: BTreeMap<MmId, Arc<Space<'a>>>,
}

impl<'a> Targets<'a> {
    /// `None` for what is no part of memory.
    fn of(&mut self, owner: Owner) -> Result<Option<Target<'a>>> {
        Ok(Some(match owner {
            Owner::Mm(id) => {
                if !self.spaces.contains_key(&id) {
                    self.spaces.insert(id, Arc::new(Space::open(self.image, self.grown, id)?));
                }
                Target::Memory(self.spaces[&id].clone())
            }
            Owner::SharedMemory(id) => {
                let none = || damaged(format!("pages of shared memory {id}, which is not there"));
                Target::File(self.shared.get(&id).ok_or_else(none)?.clone(), owner)
            }
            Owner::File(id) => {
                if !self.files.contains_key(&id) {
                    self.files.insert(id, Arc::new(File::from(self.opener.contents(id)?)));
                }
                Target::File(self.files[&id].clone(), owner)
            }
            Owner::Storage(_) | Owner::Log => return Ok(None),
        }))
    }
}

/// All pages up to the stream's trailer, or to where `other`, which gets all other records, says that it was enough.
pub(super) fn fill<R: Read>(
    (image, grown, opener): (&Image, &Grown, &Opener),
    shared: BTreeMap<SharedMemoryId, File>,
    reader: &mut Reader<R>,
    other: &mut impl FnMut(&Record, &mut Reader<R>) -> Result<bool>,
) -> Result<()> {
    let shared = shared.into_iter().map(|(id, file)| (id, Arc::new(file))).collect();
    let mut targets = Targets { image, grown, opener, shared, files: BTreeMap::new(), spaces: BTreeMap::new() };
    let file = reader.file().map(File::try_clone).transpose().doing(|| "copy a descriptor".into())?;
    let mut buffer = PageBuffer::new(PIECE);
    std::thread::scope(|scope| {
        let mut helpers = file.as_ref().map(|file| Helpers::new(scope, file));
        while let Some(record) = reader.next()? {
            let target = record.run.map(|run| targets.of(run.owner)).transpose()?.flatten();
            let (Some(run), Some(target)) = (record.run, target) else {
                if other(&record, reader)? {
                    break;
                }
                continue;
            };
            if let Some(helpers) = &mut helpers
                && helpers.want(run.bytes)
                && let Some(waiting) = reader.leave_pages()?
            {
                helpers.give(Work { target, address: run.address, waiting })?;
            } else {
                place(run, &target, reader, &mut buffer)?;
            }
        }
        helpers.map_or(Ok(()), Helpers::finish)
    })
}

/// The run at hand, by this thread.
fn place<R: Read>(run: PageRun, target: &Target<'_>, reader: &mut Reader<R>, buffer: &mut [u8]) -> Result<()> {
    let mut at = run.address;
    loop {
        let count = reader.read_pages(buffer)?;
        if count == 0 {
            return Ok(());
        }
        target.write(at, &buffer[..count])?;
        at += count as u64;
    }
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
                let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS);
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

fn died() -> Problem {
    Problem::new("E-INTERNAL", "a thread that copied memory ended by itself")
}

/// One address space, open for pages.
struct Space<'a> {
    task: HostPid,
    file: File,
    state: &'a MmState,
    /// For pages that were never there, and where.
    fresh: Option<(Userfault, Vec<Range<u64>>)>,
}

impl<'a> Space<'a> {
    fn open(image: &'a Image, grown: &Grown, id: MmId) -> Result<Space<'a>> {
        let none = || damaged(format!("pages of memory {id}, which nobody has"));
        let process = image.processes.values().find(|process| process.mm == id).ok_or_else(none)?;
        let stub = grown.stubs[&process.pid];
        let task = stub.task;
        let path = format!("/proc/{task}/mem");
        let file = OpenOptions::new().read(true).write(true).open(&path).doing(|| format!("open {path}"))?;
        let state = image.spaces.get(&id).ok_or_else(none)?;
        let anonymous = state.maps.iter().filter(|map| is_fresh(map)).map(|map| map.end - map.start);
        let fresh = if anonymous.fold(0, u64::saturating_add) < MUCH {
            None
        } else {
            userfault(&stub, state)
                .inspect_err(|problem| tracing::debug!(problem = problem.chain(), "pages are written instead"))
                .ok()
        };
        Ok(Space { task, file, state, fresh })
    }

    /// Writes pages; they must lie in maps of the image (the engine's own page must not be reachable).
    fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        let end = address.checked_add(bytes.len() as u64).ok_or_else(|| damaged("pages beyond the end of memory"))?;
        let mut at = address;
        let first = self.state.maps.partition_point(|map| map.end <= address);
        for map in &self.state.maps[first..] {
            if map.start > at || at >= end {
                break;
            }
            at = map.end.min(end);
        }
        if at < end {
            return Err(damaged(format!("pages at {at:#x} of memory {}, where no map is", self.state.id)));
        }
        if let Some((fault, places)) = &self.fresh
            && (address | bytes.len() as u64).is_multiple_of(PAGE)
            && places.iter().any(|place| place.start <= address && end <= place.end)
        {
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

/// Whether a map's pages come into being one by one: not where whole huge pages are wanted.
fn is_fresh(map: &Map) -> bool {
    map.backing == Backing::Anonymous && !map.shared && !map.advice.contains(&libc::MADV_HUGEPAGE)
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
