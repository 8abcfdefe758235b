//! Making a checkpoint smaller once it is written, when the pod that it is of goes on already: nothing of this is waited
//! for by a program.
//!
//! What is out of date of the pages that came ahead is left out, and the rest of them are pages like all others, but for those
//! that several processes have since a fork: they come ahead still. A page of
//! memory whose bytes the image has already becomes a line in a SAME record: found by xxh3, believed by comparing the
//! bytes. Everything raw is packed piece by piece, by as many threads as there are processors; one thread reads and
//! writes, in the order of the stream.

use super::memory::{Memory, PAGE};
use crate::crew;
use crate::ids::MmId;
use crate::image::{Kind, Owner, Packed, Packer, PageRun, Reader, Record, Waiting, Writer};
use crate::objects::memory::ranges::Ranges;
use crate::objects::memory::{Alike, Inherited, Kept, MmState, Same};
use pod_runtime::{Doing, Problem, Result};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Scope, ScopedJoinHandle};

/// What is packed at once: with more it gets hardly smaller, and a reader that wants one page unpacks all of it.
const PIECE: usize = 256 << 10;
/// Entries of one SAME record.
const MOST_ALIKE: usize = 16 << 10;
/// Ranges of one KEPT record.
const MOST_KEPT: usize = 100_000;
/// More threads would wait for the one that reads and writes.
const MOST_THREADS: usize = 8;
/// Pieces that are under way, for each thread.
const UNDER_WAY: usize = 4;

/// What came of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Saving {
    /// Of pages that are there already.
    pub alike: u64,
}

/// Writes the checkpoint in `from`, which nobody but us has written, to `to`.
pub(super) fn pack(from: &File, to: File, level: i32) -> Result<(File, Saving)> {
    // Found out before a thread needs it.
    Packer::new(level)?;
    let copy = |file: &File| file.try_clone().doing(|| "copy a descriptor".into());
    let mut reader = Reader::of_file(copy(from)?)?;
    let mut runs: Vec<(PageRun, Waiting)> = Vec::new();
    let mut kept: BTreeMap<MmId, Vec<Range<u64>>> = BTreeMap::new();
    let mut ends: BTreeMap<MmId, Vec<u64>> = BTreeMap::new();
    let mut lent: BTreeMap<MmId, Vec<Range<u64>>> = BTreeMap::new();
    std::thread::scope(|scope| {
        let mut line = Line::new(scope, Writer::to_file(to)?, level);
        let mut seen = Seen::default();
        while let Some(record) = reader.next()? {
            match (record.kind, record.run) {
                // Of what was out of date when the pod stopped nothing is left.
                (Kind::PLACES, _) => {}
                (Kind::KEPT, _) => {
                    let Kept { ranges } = record.state()?;
                    let more = ranges.into_iter().map(|(start, end)| start..end);
                    kept.entry(MmId(record.id)).or_default().extend(more);
                }
                (Kind::READY_FOR_PAGES, _) => {
                    let lent = all_of(&lent);
                    let memory = Memory::new(copy(from)?, runs.clone(), &all_of(&kept));
                    pages(&memory, &ends, Part::Lent(&lent), from, &mut seen, &mut line)?;
                    lent.into_iter().try_for_each(|(mm, ranges)| line.kept(mm, &ranges))?;
                    line.state(record)?;
                }
                (kind, None) => {
                    if kind == Kind::MM {
                        let space: MmState = record.state()?;
                        ends.insert(space.id, space.maps.iter().map(|map| map.end).collect());
                    }
                    if kind == Kind::INHERITED {
                        for (from, start, end) in record.state::<Inherited>()?.ranges {
                            lent.entry(MmId(from)).or_default().push(start..end);
                        }
                    }
                    line.state(record)?;
                }
                (_, Some(run @ PageRun { owner: Owner::Storage(_) | Owner::Log, .. })) => {
                    line.copy(run, &mut reader)?;
                }
                (_, Some(run)) => runs.extend(reader.leave_pages()?.map(|waiting| (run, waiting))),
            }
        }
        let memory = Memory::new(copy(from)?, runs, &all_of(&kept));
        let alike = pages(&memory, &ends, Part::AllBut(&all_of(&lent)), from, &mut seen, &mut line)?;
        let saving = Saving { alike: alike.iter().map(|one| one.bytes).sum() };
        let mut writer = line.finish()?;
        for pages in alike.chunks(MOST_ALIKE) {
            writer.put(Kind::SAME, 0, &Same { pages: pages.to_vec() })?;
        }
        Ok((writer.finish()?, saving))
    })
}

fn all_of(ranges: &BTreeMap<MmId, Vec<Range<u64>>>) -> BTreeMap<MmId, Ranges> {
    ranges.iter().map(|(mm, ranges)| (*mm, Ranges::of_any(ranges.iter().cloned()))).collect()
}

/// Which pages of spaces.
#[derive(Clone, Copy)]
enum Part<'a> {
    /// Those that others have too, which are needed before there are processes.
    Lent(&'a BTreeMap<MmId, Ranges>),
    AllBut(&'a BTreeMap<MmId, Ranges>),
}

impl Part<'_> {
    fn of(&self, owner: Owner, range: Range<u64>) -> Vec<Range<u64>> {
        let lent = |lent: &BTreeMap<MmId, Ranges>| match owner {
            Owner::Mm(mm) => lent.get(&mm).map_or(Vec::new(), |lent| lent.within(range.clone()).collect()),
            _ => Vec::new(),
        };
        match self {
            Part::Lent(all) => lent(all),
            Part::AllBut(all) => Ranges::one(range.clone()).without(&Ranges::of(lent(all))).iter().collect(),
        }
    }
}

/// The bytes of memory, each piece in one map, as they will be placed; what came ahead did not heed that. Returns what is
/// there already. What is lent is there once, whatever it is like.
fn pages(
    memory: &Memory,
    ends: &BTreeMap<MmId, Vec<u64>>,
    which: Part<'_>,
    from: &File,
    seen: &mut Seen,
    line: &mut Line<'_>,
) -> Result<Vec<Alike>> {
    let mut alike = Vec::new();
    let mut buffer = vec![0; PIECE];
    for (owner, range, skip, record) in memory.runs() {
        if which.of(owner, range.clone()).is_empty() {
            continue;
        }
        record.read(from, &mut buffer, |at, bytes| {
            // The part of the record that holds, as far as this piece has it.
            let part = skip.max(at)..(skip + (range.end - range.start)).min(at + bytes.len() as u64);
            if part.start >= part.end {
                return Ok(());
            }
            let bytes = &bytes[(part.start - at) as usize..(part.end - at) as usize];
            let address = range.start + (part.start - skip);
            for here in which.of(owner, address..address + bytes.len() as u64) {
                let into = here.start - address;
                let bytes = &bytes[into as usize..(here.end - address) as usize];
                let Some(offset) = record.plain_at(part.start + into) else { return Err(lost()) };
                some_pages((owner, here), offset, bytes, (which, ends, from), (seen, &mut alike, line))?;
            }
            Ok(())
        })?;
    }
    Ok(alike)
}

type Given<'a> = (Part<'a>, &'a BTreeMap<MmId, Vec<u64>>, &'a File);

/// Bytes that lie at an offset of the file.
fn some_pages(
    (owner, range): (Owner, Range<u64>),
    offset: u64,
    bytes: &[u8],
    (which, ends, from): Given<'_>,
    (seen, alike, line): (&mut Seen, &mut Vec<Alike>, &mut Line<'_>),
) -> Result<()> {
    let is_paged = matches!(owner, Owner::Mm(_) | Owner::SharedMemory(_));
    let aligned = (range.start | range.end).is_multiple_of(PAGE);
    if !is_paged || !aligned {
        return line.raw(PageRun { owner, address: range.start, bytes: bytes.len() as u64 }, bytes.to_vec());
    }
    let ends = match owner {
        Owner::Mm(mm) => ends.get(&mm).map_or(&[][..], |ends| ends),
        _ => &[],
    };
    for piece in by_map(range.clone(), ends) {
        let into = piece.start - range.start;
        let bytes = &bytes[into as usize..(piece.end - range.start) as usize];
        let offset = offset + into;
        seen.places.insert(offset, (owner, piece.start));
        if let (Part::Lent(_), Owner::Mm(mm)) = (which, owner) {
            seen.note(offset, bytes);
            let run = PageRun { owner: Owner::Ahead(mm), address: piece.start, bytes: bytes.len() as u64 };
            line.raw(run, bytes.to_vec())?;
            continue;
        }
        for fresh in seen.sort(from, (owner, piece.start), offset, bytes, alike)? {
            let address = piece.start + fresh.start as u64;
            line.raw(PageRun { owner, address, bytes: fresh.len() as u64 }, bytes[fresh].to_vec())?;
        }
    }
    Ok(())
}

/// A range in parts that no map ends in.
fn by_map(range: Range<u64>, ends: &[u64]) -> Vec<Range<u64>> {
    let mut parts = Vec::new();
    let mut at = range.start;
    let first = ends.partition_point(|end| *end <= range.start);
    for end in ends[first..].iter().take_while(|end| **end < range.end) {
        parts.push(at..*end);
        at = *end;
    }
    parts.push(at..range.end);
    parts
}

/// The pages that went out.
#[derive(Default)]
struct Seen {
    /// By digest, where in the file.
    pages: HashMap<u64, u64>,
    /// What begins where in the file.
    places: BTreeMap<u64, (Owner, u64)>,
}

impl Seen {
    /// Pages that are written in any case.
    fn note(&mut self, offset: u64, bytes: &[u8]) {
        for (number, page) in bytes.chunks(PAGE as usize).enumerate() {
            self.pages.entry(xxhash_rust::xxh3::xxh3_64(page)).or_insert(offset + number as u64 * PAGE);
        }
    }

    /// The parts of a piece that are new; what is not is noted.
    fn sort(
        &mut self,
        from: &File,
        (owner, address): (Owner, u64),
        offset: u64,
        bytes: &[u8],
        alike: &mut Vec<Alike>,
    ) -> Result<Vec<Range<usize>>> {
        let mut fresh: Vec<Range<usize>> = Vec::new();
        for (number, page) in bytes.chunks(PAGE as usize).enumerate() {
            let at = number * PAGE as usize;
            let digest = xxhash_rust::xxh3::xxh3_64(page);
            let known = *self.pages.entry(digest).or_insert(offset + at as u64);
            if known != offset + at as u64 && same_bytes(from, known, page)? {
                let (begin, (source, from)) = self.places.range(..=known).next_back().ok_or_else(lost)?;
                note(alike, (owner, address + at as u64), (*source, from + (known - begin)));
                continue;
            }
            match fresh.last_mut() {
                Some(last) if last.end == at => last.end += PAGE as usize,
                _ => fresh.push(at..at + PAGE as usize),
            }
        }
        Ok(fresh)
    }
}

fn same_bytes(from: &File, offset: u64, page: &[u8]) -> Result<bool> {
    let mut other = [0; PAGE as usize];
    from.read_exact_at(&mut other, offset).doing(|| "read the checkpoint once more".into())?;
    Ok(other == page)
}

fn lost() -> Problem {
    Problem::new("E-INTERNAL", "a page that was seen is nowhere")
}

/// One more page that is like another; it may go on where the last ended.
fn note(alike: &mut Vec<Alike>, (owner, address): (Owner, u64), (source, from): (Owner, u64)) {
    let to = (owner.kind().0, owner.id(), address);
    let from = (source.kind().0, source.id(), from);
    let goes_on = |before: (u16, u64, u64), bytes, now: (u16, u64, u64)| (before.0, before.1, before.2 + bytes) == now;
    match alike.last_mut() {
        Some(last) if goes_on(last.to, last.bytes, to) && goes_on(last.from, last.bytes, from) => last.bytes += PAGE,
        _ => alike.push(Alike { to, from, bytes: PAGE }),
    }
}

/// Pieces on their way to a thread that packs: one long one, or many short ones, because to hand something over takes
/// longer than to pack a page.
struct Work {
    pieces: Vec<Vec<u8>>,
    done: SyncSender<Result<Vec<Packing>>>,
}

enum Packing {
    Packed(Packed),
    /// It did not shrink.
    Plain(Vec<u8>),
}

/// What is to be written next, or will be.
enum Next {
    State(Record),
    Kept(MmId, Kept),
    Raw(Vec<PageRun>, Receiver<Result<Vec<Packing>>>),
}

/// Records in their order, of which several are being packed.
struct Line<'scope> {
    writer: Writer<File>,
    next: VecDeque<Next>,
    most: usize,
    /// What is to be handed over together, and how many bytes that is.
    together: Vec<(PageRun, Vec<u8>)>,
    length: usize,
    work: Option<SyncSender<Work>>,
    threads: Vec<ScopedJoinHandle<'scope, Result<()>>>,
}

impl<'scope> Line<'scope> {
    fn new(scope: &'scope Scope<'scope, '_>, writer: Writer<File>, level: i32) -> Self {
        let count = crew::cpus().min(MOST_THREADS);
        let (work, from) = sync_channel::<Work>(count * UNDER_WAY);
        let from = Arc::new(Mutex::new(from));
        let thread = |_| {
            let from = from.clone();
            scope.spawn(move || packs(&from, level))
        };
        let threads = (0..count).map(thread).collect();
        let most = count * UNDER_WAY;
        Line { writer, next: VecDeque::new(), most, together: Vec::new(), length: 0, work: Some(work), threads }
    }

    fn state(&mut self, record: Record) -> Result<()> {
        self.hand_over()?;
        self.next.push_back(Next::State(record));
        self.write_until(self.most)
    }

    fn kept(&mut self, mm: MmId, ranges: &Ranges) -> Result<()> {
        self.hand_over()?;
        let ranges: Vec<(u64, u64)> = ranges.iter().map(|range| (range.start, range.end)).collect();
        for ranges in ranges.chunks(MOST_KEPT) {
            self.next.push_back(Next::Kept(mm, Kept { ranges: ranges.to_vec() }));
        }
        self.write_until(self.most)
    }

    /// The raw record that the reader stands at.
    fn copy(&mut self, run: PageRun, reader: &mut Reader<File>) -> Result<()> {
        let mut at = 0;
        while at < run.bytes {
            let mut bytes = vec![0; PIECE.min((run.bytes - at) as usize)];
            let mut have = 0;
            while have < bytes.len() {
                have += reader.read_pages(&mut bytes[have..])?;
            }
            let part = PageRun { address: run.address + at, bytes: bytes.len() as u64, ..run };
            at += part.bytes;
            self.raw(part, bytes)?;
        }
        Ok(())
    }

    fn raw(&mut self, run: PageRun, bytes: Vec<u8>) -> Result<()> {
        self.length += bytes.len();
        self.together.push((run, bytes));
        if self.length < PIECE { Ok(()) } else { self.hand_over() }
    }

    fn hand_over(&mut self) -> Result<()> {
        if self.together.is_empty() {
            return Ok(());
        }
        self.length = 0;
        let (runs, pieces) = self.together.drain(..).unzip();
        let (done, packed) = sync_channel(1);
        let sent = self.work.as_ref().is_some_and(|work| work.send(Work { pieces, done }).is_ok());
        if !sent {
            return Err(died());
        }
        self.next.push_back(Next::Raw(runs, packed));
        self.write_until(self.most)
    }

    /// Writes what comes first until so many are left.
    fn write_until(&mut self, left: usize) -> Result<()> {
        while self.next.len() > left {
            match self.next.pop_front() {
                Some(Next::State(record)) => self.writer.again(&record)?,
                Some(Next::Kept(mm, kept)) => self.writer.put(Kind::KEPT, mm.0, &kept)?,
                Some(Next::Raw(runs, packed)) => {
                    for (run, packing) in runs.into_iter().zip(packed.recv().map_err(|_| died())??) {
                        match packing {
                            Packing::Packed(packed) => self.writer.packed(run, &packed)?,
                            Packing::Plain(bytes) => self.writer.pages(run, &[&bytes])?,
                        }
                    }
                }
                None => {}
            }
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Writer<File>> {
        self.hand_over()?;
        self.write_until(0)?;
        self.work = None;
        let ended = self.threads.drain(..).map(|thread| thread.join().unwrap_or_else(|_| Err(died())));
        ended.fold(Ok(()), Result::and)?;
        Ok(self.writer)
    }
}

fn packs(from: &Mutex<Receiver<Work>>, level: i32) -> Result<()> {
    let mut packer = Packer::new(level)?;
    loop {
        let next = from.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Work { pieces, done }) = next else { return Ok(()) };
        let mut pack = |bytes: Vec<u8>| -> Result<Packing> {
            Ok(packer.pack(&bytes)?.map_or_else(|| Packing::Plain(bytes), Packing::Packed))
        };
        let packed = pieces.into_iter().map(&mut pack).collect();
        // Who does not wait any more has met another problem.
        let _ = done.send(packed);
    }
}

fn died() -> Problem {
    Problem::new("E-INTERNAL", "a thread that packed memory ended by itself")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::verify;
    use std::io::Seek;

    fn run(owner: Owner, address: u64, bytes: &[u8]) -> PageRun {
        PageRun { owner, address, bytes: bytes.len() as u64 }
    }

    fn noise(seed: u64, pages: usize) -> Vec<u8> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        };
        (0..pages * PAGE as usize).map(|_| next()).collect()
    }

    /// Every page of memory and every byte of a file, as a reader has them in the end.
    fn contents(file: &File) -> (BTreeMap<(Owner, u64), Vec<u8>>, u64) {
        let mut reader = Reader::of_file(file.try_clone().unwrap()).unwrap();
        let (mut found, mut alike) = (BTreeMap::new(), Vec::new());
        while let Some(record) = reader.next().unwrap() {
            if record.kind == Kind::SAME {
                alike.extend(record.state::<Same>().unwrap().pages);
            }
            let Some(run) = record.run else { continue };
            let mut data = vec![0; run.bytes as usize];
            let mut have = 0;
            while have < data.len() {
                have += reader.read_pages(&mut data[have..]).unwrap();
            }
            for (number, page) in data.chunks(PAGE as usize).enumerate() {
                found.insert((run.owner, run.address + number as u64 * PAGE), page.to_vec());
            }
        }
        for one in &alike {
            let owner = |(kind, id, _): (u16, u64, u64)| Owner::from_kind(Kind(kind), id).unwrap();
            for at in (0..one.bytes).step_by(PAGE as usize) {
                let page = found[&(owner(one.from), one.from.2 + at)].clone();
                assert!(found.insert((owner(one.to), one.to.2 + at), page).is_none(), "a page comes once");
            }
        }
        (found, alike.iter().map(|one| one.bytes).sum())
    }

    #[test]
    fn no_piece_lies_in_two_maps() {
        assert_eq!(by_map(10..50, &[5, 10, 20, 30, 50, 60]), [10..20, 20..30, 30..50]);
        assert_eq!(by_map(10..50, &[])[0], 10..50);
        assert_eq!(by_map(10..20, &[20])[0], 10..20);
    }

    #[test]
    fn a_packed_image_holds_the_same_in_less() {
        let (mm, other) = (Owner::Mm(MmId(1)), Owner::Mm(MmId(2)));
        let (a, b) = (noise(1, 80), noise(2, 3));
        let text = b"the same words over and over ".repeat(3000);
        let mut from = tempfile::tempfile().unwrap();
        let mut w = Writer::to_file(from.try_clone().unwrap()).unwrap();
        w.put(Kind::SPEC, 0, &"spec").unwrap();
        w.put(Kind::STORAGE_ENTRY, 7, &"entry").unwrap();
        w.pages(run(Owner::Storage(7), 0, &text), &[&text]).unwrap();
        w.put(Kind::PLACES, 1, &0).unwrap();
        // Out of date: the second page of it, by a later run, and the third, which is not kept.
        let ahead = Owner::Ahead(MmId(1));
        w.pages(run(ahead, 0x100_0000, &b), &[&b]).unwrap();
        w.pages(run(ahead, 0x100_1000, &a[..4096]), &[&a[..4096]]).unwrap();
        w.put(Kind::KEPT, 1, &Kept { ranges: vec![(0x100_0000, 0x100_2000)] }).unwrap();
        w.put(Kind::READY_FOR_PAGES, 0, &()).unwrap();
        w.pages(run(mm, 0x10_0000, &a), &[&a]).unwrap();
        let twice = [&b[..], &a[8192..16384], &[0; 8192], &text[..4096]].concat();
        w.pages(run(other, 0x10_0000, &twice), &[&twice]).unwrap();
        w.pages(run(Owner::SharedMemory(crate::ids::SharedMemoryId(1)), 0, &a[..4096]), &[&a[..4096]]).unwrap();
        w.finish().unwrap();
        let (mut packed, saving) = pack(&from, tempfile::tempfile().unwrap(), 1).unwrap();
        packed.rewind().unwrap();
        verify(packed.try_clone().unwrap()).unwrap();
        let (mut wanted, _) = contents(&from);
        let (found, alike) = contents(&packed);
        assert_eq!(alike, saving.alike);
        // Of a: one ahead, two in the other, one shared; of b: its first page, ahead and in the other; one of two of zeros.
        assert_eq!(alike, 6 * PAGE);
        wanted.retain(|(owner, _), _| !matches!(owner, Owner::Ahead(_)));
        wanted.insert((mm, 0x100_0000), b[..4096].to_vec());
        wanted.insert((mm, 0x100_1000), a[..4096].to_vec());
        assert!(found == wanted, "{:?}\n{:?}", found.keys(), wanted.keys());
        let end = |file: &mut File| file.seek(std::io::SeekFrom::End(0)).unwrap();
        assert!(end(&mut packed) + (text.len() as u64) < end(&mut from));
    }
}
