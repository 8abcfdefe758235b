//! The bytes of memory on their way out: in pieces that stay in the cache until they are written, by as many threads as
//! there are processors where the stream is a file, by one where it is a link.
//!
//! Private pages come by process_vm_readv, only those that are there and not the file's own; what is shared is read
//! through its file. Pages of zeros are left out where nothing lies below them. What a program itself may not read is
//! read by the tracer through /proc/PID/mem, and only by the thread that is the tracer: a kernel may be told that nobody
//! else can (proc_mem.force_override=ptrace).

use super::dump::{Place, Private};
use super::ranges::Ranges;
use crate::compare::is_zero;
use crate::crew;
use crate::ids::MmId;
use crate::image::{Lanes, Owner, PageBuffer, PageRun, Writer};
use pod_runtime::sys::memory::{self, PageRegion};
use pod_runtime::{Doing, Problem, Result};
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

const PAGE: u64 = 4096;
/// What one thread reads at once: half of a second-level cache.
const PIECE: u64 = 256 << 10;
/// Ranges of one piece: well below the kernel's IOV_MAX.
const MOST_RANGES: usize = 256;
/// Threads pay from this many pieces on.
const ALONE: usize = 16;
/// More would wait for the memory, not for each other.
const MOST_THREADS: usize = 8;
pub(super) const END_OF_USER: u64 = 0x7fff_ffff_f000;

/// A file or nameless memory whose contents are to be sent.
pub struct Contents {
    pub source: File,
    pub bytes: u64,
    pub owner: Owner,
}

/// Ranges of one owner that are read at once.
struct Piece<'a> {
    source: Source<'a>,
    owner: Owner,
    /// Pages of zeros belong to it too.
    zeros: bool,
    ranges: Vec<(u64, usize)>,
}

enum Source<'a> {
    Task(&'a Private),
    /// One that runs: what it has unmapped meanwhile is missed, and that is noted.
    Running(&'a Private, &'a Missed),
    /// What it may share with others since a fork, through /proc/PID/mem: process_vm_readv pins pages, and the kernel gives
    /// who is pinned a copy of its own first.
    Forked(&'a Private, Arc<File>),
    /// What the program itself may not read, through /proc/PID/mem.
    Hidden(&'a Private, Arc<File>),
    File(&'a File),
}

/// Ranges that were to be read and are not there any more.
type Missed = Mutex<Vec<(MmId, Range<u64>)>>;

/// What becomes of pages of zeros over nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Zeros {
    LeftOut,
    /// Because they may replace others.
    Sent,
}

/// Sends the pages of all spaces and then all contents.
pub(super) fn send(spaces: &[Private], contents: &[Contents], w: &mut Writer<impl Write>) -> Result<()> {
    let all = spaces.iter().flat_map(|space| flat(private(space, Part::Rest)));
    send_all(all.chain(contents.iter().flat_map(|contents| flat(of_file(contents)))), w)
}

/// Sends the pages of spaces that stand still which are to come before all others.
pub(super) fn send_early(spaces: &[Private], w: &mut Writer<impl Write>) -> Result<()> {
    let some = spaces.iter().filter(|space| !space.early.is_empty()).collect::<Vec<_>>();
    if some.is_empty() {
        return Ok(());
    }
    send_all(some.into_iter().flat_map(|space| flat(private(space, Part::Early))), w)
}

/// Sends the chosen pages of spaces that are in use. Returns what could not be read.
pub(super) fn send_ahead(
    spaces: &[Private],
    zeros: Zeros,
    w: &mut Writer<impl Write>,
) -> Result<Vec<(MmId, Range<u64>)>> {
    let missed = Missed::default();
    let zeros = zeros == Zeros::Sent;
    let pieces = |space| {
        let mut gather = Gather { pieces: Vec::new(), bytes: 0 };
        let open = || Piece {
            source: Source::Running(space, &missed),
            owner: Owner::Ahead(space.mm),
            zeros,
            ranges: Vec::new(),
        };
        space.only.iter().flat_map(Ranges::iter).for_each(|range| gather.add(range, |_| true, open));
        gather.pieces.into_iter().map(Ok)
    };
    send_all(spaces.iter().flat_map(pieces), w)?;
    Ok(missed.into_inner().unwrap_or_else(PoisonError::into_inner))
}

fn send_all<'a>(all: impl Iterator<Item = Result<Piece<'a>>> + Send, w: &mut Writer<impl Write>) -> Result<()> {
    if let Some(lanes) = w.lanes()? {
        by_many(all, &lanes)?;
        return lanes.finish();
    }
    let mut buffer = PageBuffer::new(PIECE as usize);
    for piece in all {
        for (run, data) in piece?.read(&mut buffer)? {
            w.pages(run, &[data])?;
        }
    }
    Ok(())
}

fn flat(pieces: Result<Vec<Piece<'_>>>) -> Vec<Result<Piece<'_>>> {
    match pieces {
        Ok(pieces) => pieces.into_iter().map(Ok).collect(),
        Err(problem) => vec![Err(problem)],
    }
}

fn by_many<'a>(mut pieces: impl Iterator<Item = Result<Piece<'a>>> + Send, lanes: &Lanes<'_>) -> Result<()> {
    let first: Vec<_> = pieces.by_ref().take(ALONE).collect();
    let threads = match first.len() < ALONE {
        true => 1,
        false => crew::cpus().min(MOST_THREADS),
    };
    let hidden = |piece: &Result<Piece<'_>>| matches!(piece, Ok(Piece { source: Source::Hidden(..), .. }));
    let put = |piece: Result<Piece<'_>>, buffer: &mut PageBuffer| lanes.put(&piece?.read(buffer)?);
    divide(first.into_iter().chain(pieces), threads, hidden, put)
}

/// Has so many threads, of which the calling one is the first, work off all of it; what is `ours` the calling one alone.
fn divide<T: Send>(
    all: impl Iterator<Item = T> + Send,
    threads: usize,
    ours: impl Fn(&T) -> bool + Sync,
    work: impl Fn(T, &mut PageBuffer) -> Result<()> + Sync,
) -> Result<()> {
    let all = Mutex::new(all);
    let aside = Mutex::new(Vec::new());
    let run = |is_caller: bool| {
        let mut buffer = PageBuffer::new(PIECE as usize);
        loop {
            let next = lock(&all).next();
            match next {
                None => return Ok(()),
                Some(one) if !is_caller && ours(&one) => lock(&aside).push(one),
                Some(one) => work(one, &mut buffer)?,
            }
        }
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(|| run(false))).collect();
        let done = run(true);
        others.into_iter().map(|other| other.join().unwrap_or_else(|_| Err(died()))).fold(done, Result::and)
    })?;
    let mut buffer = PageBuffer::new(PIECE as usize);
    let aside = aside.into_inner().unwrap_or_else(PoisonError::into_inner);
    aside.into_iter().try_for_each(|one| work(one, &mut buffer))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn died() -> Problem {
    Problem::new("E-INTERNAL", "a thread that copied memory ended by itself")
}

impl Piece<'_> {
    /// Reads it; what is to be sent of it, by place.
    fn read<'b>(&self, buffer: &'b mut [u8]) -> Result<Vec<(PageRun, &'b [u8])>> {
        let bytes = self.ranges.iter().map(|(_, bytes)| bytes).sum();
        let buffer = &mut buffer[..bytes];
        let at = self.ranges.first().map_or(0, |(at, _)| *at);
        match &self.source {
            Source::Running(space, missed) => {
                let read = match &space.gently {
                    Some(memory) => self.by_range(memory, buffer).is_ok(),
                    None => memory::read(space.host, buffer, &self.ranges).ok() == Some(bytes),
                };
                if !read {
                    return Ok(self.one_by_one(space, missed, buffer));
                }
            }
            Source::Task(space) => match memory::read(space.host, buffer, &self.ranges) {
                Ok(read) if read == bytes => Ok(()),
                Ok(_) => Err(std::io::Error::from_raw_os_error(libc::EFAULT)),
                Err(error) => Err(error),
            }
            .doing(|| format!("read {bytes} bytes at {at:x} of {}", space.name))?,
            Source::Forked(space, memory) | Source::Hidden(space, memory) => {
                self.by_range(memory, buffer).doing(|| format!("read {bytes} bytes at {at:x} of {}", space.name))?;
            }
            Source::File(file) => self.by_range(file, buffer).doing(|| "read shared memory".into())?,
        }
        let mut runs = Vec::with_capacity(self.ranges.len());
        let mut rest = &*buffer;
        for (at, bytes) in &self.ranges {
            let (data, more) = rest.split_at(*bytes);
            rest = more;
            if self.zeros {
                runs.push((PageRun { owner: self.owner, address: *at, bytes: *bytes as u64 }, data));
            } else {
                without_zeros(data, *at, self.owner, &mut runs);
            }
        }
        Ok(runs)
    }

    /// What can be read of each range, down to single pages.
    fn one_by_one<'b>(&self, space: &Private, missed: &Missed, buffer: &'b mut [u8]) -> Vec<(PageRun, &'b [u8])> {
        let pages = self.ranges.iter().flat_map(|(at, bytes)| (*at..at + *bytes as u64).step_by(PAGE as usize));
        let mut runs = Vec::new();
        for (address, page) in pages.zip(buffer.chunks_mut(PAGE as usize)) {
            let read = match &space.gently {
                Some(memory) => memory.read_exact_at(page, address),
                None => memory::read_exact(space.host, address, page),
            };
            match read {
                Ok(()) => runs.push((PageRun { owner: self.owner, address, bytes: PAGE }, &*page)),
                Err(_) => lock(missed).push((space.mm, address..address + PAGE)),
            }
        }
        runs
    }

    fn by_range(&self, file: &File, buffer: &mut [u8]) -> std::io::Result<()> {
        let mut rest = buffer;
        for (at, bytes) in &self.ranges {
            let (into, more) = rest.split_at_mut(*bytes);
            file.read_exact_at(into, *at)?;
            rest = more;
        }
        Ok(())
    }
}

/// Runs of pages that are not all zero.
fn without_zeros<'b>(data: &'b [u8], at: u64, owner: Owner, runs: &mut Vec<(PageRun, &'b [u8])>) {
    let page = PAGE as usize;
    let is_zero = |from: usize| is_zero(&data[from..(from + page).min(data.len())]);
    let mut from = 0;
    while from < data.len() {
        if is_zero(from) {
            from += page;
            continue;
        }
        let mut to = from + page;
        while to < data.len() && !is_zero(to) {
            to += page;
        }
        let to = to.min(data.len());
        let run = PageRun { owner, address: at + from as u64, bytes: (to - from) as u64 };
        runs.push((run, &data[from..to]));
        from = to;
    }
}

/// Gathers ranges into pieces.
struct Gather<'a> {
    pieces: Vec<Piece<'a>>,
    bytes: u64,
}

impl<'a> Gather<'a> {
    /// `joins` says whether the range may lie in the piece at hand, `open` begins another.
    fn add(&mut self, range: Range<u64>, joins: impl Fn(&Piece<'a>) -> bool, open: impl Fn() -> Piece<'a>) {
        let mut at = range.start;
        while at < range.end {
            let full = self.bytes == PIECE;
            let piece = match self.pieces.last_mut() {
                Some(piece) if !full && piece.ranges.len() < MOST_RANGES && joins(piece) => piece,
                _ => {
                    self.bytes = 0;
                    self.pieces.push(open());
                    let last = self.pieces.len() - 1;
                    &mut self.pieces[last]
                }
            };
            let bytes = (range.end - at).min(PIECE - self.bytes);
            piece.ranges.push((at, bytes as usize));
            self.bytes += bytes;
            at += bytes;
        }
    }
}

/// Which pages of a space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Early,
    Rest,
}

/// What is to be read of one space.
fn private(space: &Private, part: Part) -> Result<Vec<Piece<'_>>> {
    let path = format!("/proc/{}/pagemap", space.host);
    let pagemap = File::open(&path).doing(|| format!("open {path}"))?;
    let only = match part {
        Part::Early => Some(&space.early),
        Part::Rest => space.only.as_ref(),
    };
    let only = only.map(|only| Ok(only.iter().map(region).collect()));
    let regions = only.unwrap_or_else(|| own_pages(&pagemap)).or_else(|error| match error.raw_os_error() {
        // Before Linux 6.7.
        Some(libc::ENOTTY | libc::EINVAL) => {
            space.places.iter().try_fold(Vec::new(), |regions, place| own_pages_of(&pagemap, &place.range, regions))
        }
        _ => Err(error),
    });
    let mut regions = regions.doing(|| format!("find the pages of {}", space.name))?;
    if part == Part::Rest && !space.left_out.is_empty() {
        let all = Ranges::of(regions.iter().map(|region| region.start..region.end));
        regions = all.without(&space.left_out).iter().map(region).collect();
    }
    // What came before them may hold something else.
    let replaces = part == Part::Early && space.only.is_some();
    let memory = File::open(format!("/proc/{}/mem", space.host));
    let memory = Arc::new(memory.doing(|| format!("open the memory of {}", space.name))?);
    let mut gather = Gather { pieces: Vec::new(), bytes: 0 };
    for (range, place) in within(&regions, &space.places) {
        let source = || match (place.readable, place.forked) {
            (true, false) => Source::Task(space),
            (true, true) => Source::Forked(space, memory.clone()),
            (false, _) => Source::Hidden(space, memory.clone()),
        };
        let joins = |piece: &Piece<'_>| {
            let same = match piece.source {
                Source::Task(_) => place.readable && !place.forked,
                Source::Forked(..) => place.readable && place.forked,
                _ => !place.readable,
            };
            piece.zeros == (place.over_a_file || replaces) && same
        };
        let owner = match part {
            Part::Early => Owner::Ahead(space.mm),
            Part::Rest => Owner::Mm(space.mm),
        };
        let zeros = place.over_a_file || replaces;
        gather.add(range, joins, || Piece { source: source(), owner, zeros, ranges: Vec::new() });
    }
    Ok(gather.pieces)
}

fn region(range: Range<u64>) -> PageRegion {
    PageRegion { start: range.start, end: range.end, categories: 0 }
}

/// The parts of regions that lie in places, both in order.
fn within<'a>(regions: &[PageRegion], places: &'a [Place]) -> Vec<(Range<u64>, &'a Place)> {
    let mut found = Vec::with_capacity(regions.len());
    let mut first = 0;
    for region in regions {
        while places.get(first).is_some_and(|place| place.range.end <= region.start) {
            first += 1;
        }
        for place in places[first..].iter().take_while(|place| place.range.start < region.end) {
            found.push((region.start.max(place.range.start)..region.end.min(place.range.end), place));
        }
    }
    found
}

/// What a file holds, without its holes.
fn of_file(contents: &Contents) -> Result<Vec<Piece<'_>>> {
    use nix::unistd::{Whence, lseek};
    let (source, bytes, owner) = (&contents.source, contents.bytes, contents.owner);
    let mut gather = Gather { pieces: Vec::new(), bytes: 0 };
    let mut at = 0;
    while at < bytes {
        let start = match lseek(source, at as i64, Whence::SeekData) {
            Ok(start) => start as u64 & !(PAGE - 1),
            Err(nix::Error::ENXIO) => break,
            // No holes known: all of it is data.
            Err(_) => at,
        };
        let start = start.max(at);
        let end = lseek(source, start as i64, Whence::SeekHole).map_or(bytes, |end| (end as u64).min(bytes));
        let open = || Piece { source: Source::File(source), owner, zeros: false, ranges: Vec::new() };
        gather.add(start..end, |_| true, open);
        at = end.max(at + 1);
    }
    Ok(gather.pieces)
}

/// Pages that are the process's own: there (or swapped out), not a file's, not the shared page of zeros.
fn own_pages(pagemap: &File) -> std::io::Result<Vec<PageRegion>> {
    let there = memory::PAGE_IS_PRESENT | memory::PAGE_IS_SWAPPED;
    let not = memory::PAGE_IS_FILE | memory::PAGE_IS_PFNZERO;
    memory::scan_pages(pagemap, 0, END_OF_USER, there, not)
}

/// The same of one range by reading the table itself, eight bytes a page. The page of zeros looks like any other.
fn own_pages_of(pagemap: &File, range: &Range<u64>, mut found: Vec<PageRegion>) -> std::io::Result<Vec<PageRegion>> {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const OF_A_FILE: u64 = 1 << 61;
    let mut buffer = vec![0u8; 64 << 10];
    let mut at = range.start;
    while at < range.end {
        let pages = ((range.end - at) / PAGE).min(buffer.len() as u64 / 8);
        let entries = &mut buffer[..pages as usize * 8];
        pagemap.read_exact_at(entries, at / PAGE * 8)?;
        for entry in entries.chunks_exact(8) {
            let entry = u64::from_le_bytes(entry.try_into().expect("eight bytes"));
            if entry & (PRESENT | SWAPPED) != 0 && entry & OF_A_FILE == 0 {
                match found.last_mut() {
                    Some(last) if last.end == at => last.end += PAGE,
                    _ => found.push(PageRegion { start: at, end: at + PAGE, categories: 0 }),
                }
            }
            at += PAGE;
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::FileId;
    use crate::image::{Kind, Reader};
    use std::collections::BTreeMap;
    use std::io::Read;

    #[test]
    fn own_pages_of_ourselves() {
        // So large that it is a mapping of its own, whatever the allocator learnt from other tests.
        let mut data = vec![0u8; 40 << 20];
        let first = (data.as_ptr() as u64).next_multiple_of(4096);
        data[8192] = 7;
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let start = data.as_ptr() as u64 & !4095;
        let old = own_pages_of(&pagemap, &(start..start + 64 * 4096), Vec::new()).unwrap();
        assert!(old.iter().any(|region| region.start <= start + 8192 && start + 8192 < region.end));
        let Ok(regions) = own_pages(&pagemap) else { return };
        let touched = data.as_ptr() as u64 + 8192;
        assert!(regions.iter().any(|region| region.start <= touched && touched < region.end));
        let untouched = first + 40 * 4096;
        assert!(!regions.iter().any(|region| region.start <= untouched && untouched < region.end));
    }

    fn place(range: Range<u64>) -> Place {
        Place { range, readable: true, over_a_file: false, forked: false }
    }

    #[test]
    fn regions_are_cut_to_places() {
        let region = |start, end| PageRegion { start, end, categories: 0 };
        let places = [place(10..20), place(20..30), place(50..60)];
        let found = within(&[region(0, 5), region(8, 25), region(28, 55), region(55, 90)], &places);
        let ranges: Vec<_> = found.into_iter().map(|(range, _)| range).collect();
        assert_eq!(ranges, [10..20, 20..25, 28..30, 50..55, 55..60]);
    }

    #[test]
    fn what_only_the_tracer_may_read_stays_with_the_calling_thread() {
        let caller = std::thread::current().id();
        let seen = Mutex::new(Vec::new());
        let others = std::sync::Barrier::new(2);
        let work = |number: i32, _: &mut PageBuffer| {
            let mine = std::thread::current().id() == caller;
            // Neither goes on before both threads have something.
            if number < 2 {
                others.wait();
            }
            lock(&seen).push((number, mine));
            Ok(())
        };
        divide(0..1000, 2, |number| *number >= 2 && number % 3 == 0, work).unwrap();
        let mut seen = seen.into_inner().unwrap();
        seen.sort_unstable();
        assert!(seen.iter().map(|(number, _)| *number).eq(0..1000), "each once");
        assert!(seen.iter().all(|(number, mine)| *mine || *number < 2 || number % 3 != 0));
        assert!(seen.iter().any(|(_, mine)| !mine), "the other thread had something");
        let failing = |number: i32, _: &mut PageBuffer| if number == 7 { Err(died()) } else { Ok(()) };
        assert!(divide(0..1000, 4, |number| number % 7 == 0, failing).is_err());
    }

    /// Our own memory as that of a pod: 32 MiB with holes, pages of zeros and single pages, by many threads and by one.
    #[test]
    fn many_threads_write_what_one_would() {
        let bytes = 32 << 20;
        let mut memory = PageBuffer::new(bytes);
        let mut state = 1u64;
        for (number, page) in memory.chunks_mut(4096).enumerate() {
            if number % 7 == 0 || (2048..4096).contains(&number) {
                continue;
            }
            page.iter_mut().for_each(|byte| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = (state >> 56) as u8;
            });
        }
        let base = memory.as_ptr() as u64;
        let host = std::process::id() as i32;
        let places = vec![place(base..base + bytes as u64)];
        let (early, left_out) = <(Ranges, Ranges)>::default();
        let spaces = [Private {
            mm: MmId(3),
            host,
            name: "us".into(),
            places,
            only: None,
            early,
            left_out,
            gently: None,
            can_wait: Ranges::default(),
        }];
        let mut file = tempfile::tempfile().unwrap();
        std::io::copy(&mut &memory[..1 << 20], &mut file).unwrap();
        let contents = [Contents { source: file, bytes: 1 << 20, owner: Owner::File(FileId(9)) }];
        let mut stream = tempfile::tempfile().unwrap();
        let mut w = Writer::to_file(stream.try_clone().unwrap()).unwrap();
        w.put(Kind::SPEC, 0, &1).unwrap();
        send(&spaces, &contents, &mut w).unwrap();
        w.put(Kind::IPC, 0, &2).unwrap();
        w.finish().unwrap();
        let mut written = Vec::new();
        std::io::Seek::rewind(&mut stream).unwrap();
        stream.read_to_end(&mut written).unwrap();
        let mut w = Writer::new(Vec::new());
        send(&spaces, &contents, &mut w).unwrap();
        let one = pages_of(&w.finish().unwrap()[..]);
        let many = pages_of(&written[..]);
        assert!(many == one, "the same pages");
        for (owner, address, page) in many.iter().map(|((owner, address), page)| (owner, *address, page)) {
            let at = if *owner == Owner::Mm(MmId(3)) { address - base } else { address } as usize;
            assert!(memory[at..at + 4096] == page[..], "page at {at:x} of {owner:?}");
        }
        let zeros = bytes / 4096 / 2 - (0..8192).filter(|n| n % 7 == 0 && !(2048..4096).contains(n)).count();
        assert_eq!(many.keys().filter(|(owner, _)| *owner == Owner::Mm(MmId(3))).count(), zeros + 2048);
    }

    fn pages_of(stream: &[u8]) -> BTreeMap<(Owner, u64), Vec<u8>> {
        let mut reader = Reader::new(stream).unwrap();
        let mut found = BTreeMap::new();
        while let Some(record) = reader.next().unwrap() {
            let Some(run) = record.run else { continue };
            let mut data = vec![0; run.bytes as usize];
            assert_eq!(reader.read_pages(&mut data).unwrap(), data.len());
            for (number, page) in data.chunks(4096).enumerate() {
                let twice = found.insert((run.owner, run.address + 4096 * number as u64), page.to_vec());
                assert!(twice.is_none(), "a page comes once");
            }
        }
        reader.nothing_after().unwrap();
        found
    }
}
