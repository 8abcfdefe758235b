//! Pages that were read while the pod still ran: kept aside until KEPT says which of them hold, then placed by several
//! threads while the rest of the stream arrives.
//!
//! In a file they stay where they are. From a link they go to a nameless file in memory, each to the offset that its
//! address gives, so that a later version of a page replaces an earlier one; what was placed is given back at once, so that
//! no page is there twice for long. Those of the first process go straight to their place, where they can ([`nursery`]).

use super::Image;
use super::lazy::Lazy;
use super::nursery::{self, Laid, Nursery};
use super::pages::{Target, Targets, by_map, died};
use super::premade::Premade;
use crate::crew;
use crate::ids::MmId;
use crate::image::{Owner, PageBuffer, PageRun, Reader, Record, Waiting, damaged};
use crate::objects::files::opener::Memory;
use crate::objects::memory::ranges::Ranges;
use crate::objects::memory::{Map, Places};
use crate::{Doing, Result};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{Whence, lseek};
use pod_runtime::birth::Conceived;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};
use std::thread::{Scope, ScopedJoinHandle};

/// What passes through one thread's cache at once.
const PIECE: usize = 256 << 10;
/// Bits of an address, and of an offset within one space's part of the file in memory.
const ADDRESS: u32 = 47;
/// Address spaces that one file has offsets for.
const MOST_SPACES: usize = (1 << (63 - ADDRESS)) - 1;
/// More threads would wait for the memory, not for each other.
const MOST_THREADS: usize = 8;

/// What came ahead.
#[derive(Debug, Default)]
pub struct Ahead {
    /// Left in the file that is read, oldest first.
    left: BTreeMap<MmId, Vec<(u64, Waiting)>>,
    /// All that came, wherever it is.
    came: BTreeMap<MmId, Vec<Range<u64>>>,
    staged: Option<File>,
    /// Which part of it a space has.
    parts: BTreeMap<MmId, u64>,
    nursery: Option<Nursery>,
    shared: Premade,
}

impl Ahead {
    /// Takes the run of pages that the reader stands at.
    pub fn take<R: Read>(&mut self, run: PageRun, reader: &mut Reader<R>) -> Result<()> {
        let mm = match run.owner {
            Owner::Ahead(mm) => mm,
            Owner::SharedMemory(id) => return self.shared.take(id, run, reader),
            _ => return Err(damaged("bytes of something else among pages that came ahead")),
        };
        let pages = (run.address | run.bytes).is_multiple_of(4096);
        if !pages || run.address.checked_add(run.bytes).is_none_or(|end| end > 1 << ADDRESS) {
            return Err(damaged(format!("pages of memory {mm} at {:#x}, where none can be", run.address)));
        }
        self.came.entry(mm).or_default().push(run.address..run.address + run.bytes);
        if let Some(waiting) = reader.leave_pages()? {
            self.left.entry(mm).or_default().push((run.address, waiting));
            return Ok(());
        }
        reader.each_piece(run.address, &mut PageBuffer::new(PIECE), |at, pages| self.keep(mm, at, pages))
    }

    /// Makes room where the first process will have its memory, if this is about it; there is another way if that fails.
    pub fn expect(&mut self, record: &Record, conceived: &Conceived) -> Result<()> {
        let Places { ranges } = record.state()?;
        if MmId(record.id) != nursery::FIRST || self.nursery.is_some() {
            return Ok(());
        }
        let wanted = ranges.into_iter().map(|(start, end)| start..end);
        let aligned = wanted.filter(|place| (place.start | place.end) & 0xfff == 0 && place.end <= 1 << ADDRESS);
        match Nursery::open(conceived, &Ranges::of_any(aligned)) {
            Ok(nursery) => self.nursery = Some(nursery),
            Err(problem) => tracing::debug!(problem = problem.chain(), "the first process is not filled ahead"),
        }
        Ok(())
    }

    /// Makes room for shared memory that comes.
    pub fn share(&mut self, record: &Record) -> Result<()> {
        self.shared.make(record)
    }

    /// Shared memory that came, as far as the image has it.
    pub(super) fn shared(&self, image: &Image) -> Result<Memory> {
        self.shared.of(image)
    }

    /// Where the first process has something that the image can use.
    pub(super) fn usable(&self, image: &Image) -> Ranges {
        self.nursery.as_ref().map(|nursery| nursery.usable(image)).unwrap_or_default()
    }

    /// What the first process has of the image, where nothing `foreign` is to be. To be called before anything else is done
    /// with that process.
    pub(super) fn settle(&mut self, image: &Image, foreign: &Ranges) -> Result<Laid> {
        let Some(nursery) = self.nursery.take() else { return Ok(Laid::default()) };
        nursery.settle(image, foreign, |address, pages| self.stage(nursery::FIRST, address, pages))
    }

    /// What came for each space.
    pub(super) fn came(&self) -> BTreeMap<MmId, Ranges> {
        self.came.iter().map(|(mm, ranges)| (*mm, Ranges::of_any(ranges.iter().cloned()))).collect()
    }

    fn keep(&mut self, mm: MmId, address: u64, pages: &[u8]) -> Result<()> {
        let range = address..address + pages.len() as u64;
        let part = |range: &Range<u64>| &pages[(range.start - address) as usize..(range.end - address) as usize];
        let mut here = Ranges::default();
        if let Some(nursery) = self.nursery.as_mut().filter(|_| mm == nursery::FIRST) {
            here = nursery.has(range.clone());
            here.iter().try_for_each(|range| nursery.put(range.start, part(&range)))?;
        }
        Ranges::one(range).without(&here).iter().try_for_each(|range| self.stage(mm, range.start, part(&range)))
    }

    fn stage(&mut self, mm: MmId, address: u64, pages: &[u8]) -> Result<()> {
        let next = self.parts.len();
        if next >= MOST_SPACES && !self.parts.contains_key(&mm) {
            return Err(damaged("pages of more processes than there can be"));
        }
        let at = (*self.parts.entry(mm).or_insert(next as u64) << ADDRESS) + address;
        let file = match &self.staged {
            Some(file) => file,
            None => {
                let made = memfd_create(c"pages", MFdFlags::MFD_CLOEXEC).doing(|| "make a file in memory".into())?;
                self.staged.insert(made.into())
            }
        };
        file.write_all_at(pages, at).doing(|| "keep pages in memory".into())
    }

    /// Leaves to `lazy` what can wait; what is to be placed now is handed back.
    pub(super) fn leave(
        &self,
        (kept, laid): (&BTreeMap<MmId, Ranges>, &BTreeMap<MmId, &Laid>),
        lazy: &mut Lazy,
    ) -> BTreeMap<MmId, Ranges> {
        let leave = |(mm, kept): (&MmId, &Ranges)| {
            let missing = laid.get(mm).map_or_else(|| kept.clone(), |laid| kept.without(laid.filled()));
            let wait = lazy.can_wait(*mm, &missing);
            let runs = self.left.get(mm).filter(|_| !wait.is_empty()).map_or(&[][..], |runs| runs);
            let mut left = Vec::new();
            for (index, parts) in latest(runs.iter().map(|(at, waiting)| *at..*at + waiting.bytes())) {
                let (address, waiting) = runs[index];
                let parts = Ranges::of(parts.iter().flat_map(|part| wait.within(part).collect::<Vec<_>>()));
                if !parts.is_empty() && lazy.leave(*mm, address, waiting, &parts) {
                    left.extend(parts.iter());
                }
            }
            (*mm, missing.without(&Ranges::of_any(left)))
        };
        kept.iter().map(leave).collect()
    }

    /// What is to be placed, in pieces that a thread takes at once.
    fn pieces<'a>(
        &self,
        kept: &BTreeMap<MmId, Ranges>,
        laid: &BTreeMap<MmId, &Laid>,
        targets: &mut Targets<'a>,
    ) -> Result<Vec<Piece<'a>>> {
        let mut pieces = Vec::new();
        for (mm, kept) in kept {
            let kept = match laid.get(mm) {
                Some(laid) => &kept.without(laid.filled()),
                None => kept,
            };
            let Some(target) = targets.of(Owner::Mm(*mm))? else { continue };
            self.pieces_of((*mm, kept), &target, targets.maps(*mm), false, &mut pieces)?;
        }
        Ok(pieces)
    }

    /// Parts of what came for a space, on their way to a target that has maps.
    fn pieces_of<'a>(
        &self,
        (mm, wanted): (MmId, &Ranges),
        target: &Target<'a>,
        maps: &[Map],
        again: bool,
        pieces: &mut Vec<Piece<'a>>,
    ) -> Result<()> {
        let runs = self.left.get(&mm).map_or(&[][..], |runs| runs);
        for (index, parts) in latest(runs.iter().map(|(at, waiting)| *at..*at + waiting.bytes())) {
            let parts: Vec<_> = parts.iter().flat_map(|part| wanted.within(part).collect::<Vec<_>>()).collect();
            let parts: Vec<_> = parts.into_iter().flat_map(|part| by_map(maps, part)).collect();
            if !parts.is_empty() {
                let (address, waiting) = runs[index];
                pieces.push(Piece { target: target.clone(), from: From::Left { address, waiting, parts } });
            }
        }
        if let (Some(file), Some(part)) = (&self.staged, self.parts.get(&mm)) {
            let base = part << ADDRESS;
            for range in wanted.iter().flat_map(|range| by_map(maps, range)) {
                let data = data_of(file, base + range.start..base + range.end)?;
                pieces.extend(data.into_iter().map(|offsets| Piece {
                    target: target.clone(),
                    from: From::Staged { address: offsets.start - base, offsets, again },
                }));
            }
        }
        Ok(())
    }

    /// Puts pages of a space into a process that has maps for them; they stay here, too.
    pub(super) fn sow(
        &self,
        pages: (MmId, &Ranges),
        target: &Target<'_>,
        maps: &[Map],
        file: Option<&File>,
    ) -> Result<()> {
        let mut pieces = Vec::new();
        self.pieces_of(pages, target, maps, true, &mut pieces)?;
        let sources = Sources { left: file, staged: self.staged.as_ref() };
        let threads = crew::cpus().min(MOST_THREADS).min(pieces.len());
        let queue = Queue::new(pieces);
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(|| sources.work(&queue))).collect();
            let done = sources.work(&queue);
            others.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(died()))).fold(done, Result::and)
        })
    }

    /// Begins to place what still holds; [`Placing::finish`] ends it. The calling thread is the tracer.
    pub(super) fn place<'scope, 'env, 'a: 'scope>(
        &'env self,
        (kept, laid): (&BTreeMap<MmId, Ranges>, &BTreeMap<MmId, &Laid>),
        targets: &mut Targets<'a>,
        file: Option<&'env File>,
        scope: &'scope Scope<'scope, 'env>,
        queue: &'env Queue<'a>,
    ) -> Result<Placing<'scope, 'env, 'a>> {
        let (for_all, ours): (Vec<_>, Vec<_>) =
            self.pieces(kept, laid, targets)?.into_iter().partition(Piece::is_for_all);
        let sources = Sources { left: file, staged: self.staged.as_ref() };
        let threads = match for_all.len() {
            0 => 0,
            some => crew::cpus().min(MOST_THREADS).min(some),
        };
        *queue.lock().unwrap_or_else(PoisonError::into_inner) = for_all;
        let threads = (0..threads).map(|_| scope.spawn(move || sources.work(queue))).collect();
        Ok(Placing { threads, ours, sources })
    }
}

/// What threads take from.
pub(super) type Queue<'a> = Mutex<Vec<Piece<'a>>>;

/// Threads at work.
pub(super) struct Placing<'scope, 'env, 'a> {
    threads: Vec<ScopedJoinHandle<'scope, Result<()>>>,
    /// What only the tracer may place.
    ours: Vec<Piece<'a>>,
    sources: Sources<'env>,
}

impl Placing<'_, '_, '_> {
    pub fn finish(self) -> Result<()> {
        let mut buffer = PageBuffer::new(PIECE);
        let own = self.ours.iter().try_for_each(|piece| self.sources.place(piece, &mut buffer));
        let others = self.threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(died())));
        others.fold(own, Result::and)
    }
}

/// Pages to be placed.
pub(super) struct Piece<'a> {
    target: Target<'a>,
    from: From,
}

enum From {
    /// A run that was left in the file; only parts of it still hold.
    Left { address: u64, waiting: Waiting, parts: Vec<Range<u64>> },
    Staged {
        address: u64,
        offsets: Range<u64>,
        /// They are needed once more.
        again: bool,
    },
}

impl Piece<'_> {
    fn is_for_all(&self) -> bool {
        let for_all = |address, bytes| self.target.for_all(PageRun { owner: Owner::Log, address, bytes });
        match &self.from {
            From::Left { parts, .. } => parts.iter().all(|part| for_all(part.start, part.end - part.start)),
            From::Staged { address, offsets, .. } => for_all(*address, offsets.end - offsets.start),
        }
    }
}

#[derive(Clone, Copy)]
struct Sources<'env> {
    left: Option<&'env File>,
    staged: Option<&'env File>,
}

impl Sources<'_> {
    fn work(&self, queue: &Queue<'_>) -> Result<()> {
        let mut buffer = PageBuffer::new(PIECE);
        loop {
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let Some(piece) = next else { return Ok(()) };
            self.place(&piece, &mut buffer)?;
        }
    }

    fn place(&self, piece: &Piece<'_>, buffer: &mut PageBuffer) -> Result<()> {
        let none = || damaged("pages that came ahead are not there");
        match &piece.from {
            From::Left { address, waiting, parts } => {
                let file = self.left.ok_or_else(none)?;
                waiting.read(file, buffer, |at, bytes| {
                    let from = address + at;
                    let to = from + bytes.len() as u64;
                    let here = parts.iter().map(|part| part.start.max(from)..part.end.min(to));
                    here.filter(|part| part.start < part.end).try_for_each(|part| {
                        let (start, end) = ((part.start - from) as usize, (part.end - from) as usize);
                        piece.target.write(part.start, &bytes[start..end])
                    })
                })
            }
            From::Staged { address, offsets, again } => {
                let file = self.staged.ok_or_else(none)?;
                let buffer = &mut buffer[..(offsets.end - offsets.start) as usize];
                file.read_exact_at(buffer, offsets.start).doing(|| "read pages that came ahead".into())?;
                piece.target.write(*address, buffer)?;
                if *again {
                    return Ok(());
                }
                let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                // Only memory is lost if it fails.
                let _ = fallocate(file, hole, offsets.start as i64, (offsets.end - offsets.start) as i64);
                Ok(())
            }
        }
    }
}

/// Of runs in order, of which a later one replaces what it covers of earlier ones: which parts of each are left.
pub fn latest(runs: impl DoubleEndedIterator<Item = Range<u64>> + ExactSizeIterator) -> Vec<(usize, Ranges)> {
    let mut covered: BTreeMap<u64, u64> = BTreeMap::new();
    let mut found = Vec::new();
    for (index, run) in runs.enumerate().rev() {
        let mut left = Vec::new();
        let mut at = run.start;
        let before = covered.range(..=run.start).next_back().filter(|(_, end)| **end > run.start);
        let mut over: Vec<(u64, u64)> = before.into_iter().map(|(start, end)| (*start, *end)).collect();
        over.extend(covered.range(run.start + 1..run.end).map(|(start, end)| (*start, *end)));
        for (start, end) in &over {
            if at < *start {
                left.push(at..*start);
            }
            at = at.max(*end);
            covered.remove(start);
        }
        if at < run.end {
            left.push(at..run.end);
        }
        let start = over.first().map_or(run.start, |(start, _)| run.start.min(*start));
        let end = over.last().map_or(run.end, |(_, end)| run.end.max(*end));
        covered.insert(start, end);
        found.push((index, Ranges::of(left)));
    }
    found
}

/// What of a range of a file is no hole, in pieces.
fn data_of(file: &File, range: Range<u64>) -> Result<Vec<Range<u64>>> {
    let mut found = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let start = match lseek(file, at as i64, Whence::SeekData) {
            Ok(start) if (start as u64) < range.end => start as u64,
            Ok(_) | Err(nix::Error::ENXIO) => break,
            Err(error) => return Err(error).doing(|| "look for pages that came ahead".into()),
        };
        let end = lseek(file, start as i64, Whence::SeekHole).doing(|| "look for pages that came ahead".into())?;
        let end = (end as u64).min(range.end);
        let mut from = start;
        while from < end {
            let to = (from + PIECE as u64).min(end);
            found.push(from..to);
            from = to;
        }
        at = end;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Kind, Writer};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_latest_wins(runs in proptest::collection::vec((0u64..40, 1u64..9), 0..12)) {
            let runs: Vec<_> = runs.into_iter().map(|(start, bytes)| start..start + bytes).collect();
            let mut expected = BTreeMap::new();
            for (index, run) in runs.iter().enumerate() {
                expected.extend(run.clone().map(|at| (at, index)));
            }
            let found = latest(runs.iter().cloned());
            let found: Vec<(u64, usize)> =
                found.iter().flat_map(|(index, parts)| parts.iter().flatten().map(|at| (at, *index))).collect();
            prop_assert_eq!(found.len(), expected.len());
            prop_assert_eq!(found.into_iter().collect::<BTreeMap<_, _>>(), expected);
        }
    }

    /// A later version of a page replaces the earlier one; what lies beyond memory is refused.
    #[test]
    fn pages_of_a_link_are_staged_by_address() {
        let mut w = Writer::new(Vec::new());
        let run = |mm, address| PageRun { owner: Owner::Ahead(MmId(mm)), address, bytes: 4096 };
        for (mm, address, byte) in [(1, 0x5000, 1u8), (2, 0x5000, 2), (1, 0x5000, 3), (1, 0x7000, 4)] {
            w.pages(run(mm, address), &[&[byte; 4096]]).unwrap();
        }
        w.pages(run(1, 1 << 47), &[&[5; 4096]]).unwrap();
        w.put(Kind::IPC, 0, &1).unwrap();
        let stream = w.finish().unwrap();
        let mut reader = Reader::new(&stream[..]).unwrap();
        let mut ahead = Ahead::default();
        for _ in 0..4 {
            let run = reader.next().unwrap().unwrap().run.unwrap();
            ahead.take(run, &mut reader).unwrap();
        }
        let beyond = reader.next().unwrap().unwrap().run.unwrap();
        assert_eq!(ahead.take(beyond, &mut reader).unwrap_err().code(), crate::image::DAMAGED);
        let file = ahead.staged.as_ref().unwrap();
        let byte = |mm: u64, address: u64| {
            let mut one = [0];
            file.read_exact_at(&mut one, (ahead.parts[&MmId(mm)] << ADDRESS) + address).unwrap();
            one[0]
        };
        assert_eq!((byte(1, 0x5000), byte(2, 0x5000), byte(1, 0x7000)), (3, 2, 4));
        let base = ahead.parts[&MmId(1)] << ADDRESS;
        assert_eq!(
            data_of(file, base..base + 0x10000).unwrap(),
            [base + 0x5000..base + 0x6000, base + 0x7000..base + 0x8000]
        );
    }
}
