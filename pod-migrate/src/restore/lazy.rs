//! Memory that stays in the file until a program touches it, or until its turn has come (`pod restore --lazy`), or on the host that
//! the pod has left (`pod migrate --postcopy`).
//!
//! What can wait are pages of ordinary private memory, of processes that have much of it, as far as the image has them as
//! bytes in records that can be read one by one. All else is placed before the pod runs, as ever. While the image is
//! walked this only notes where in the file what lies ([`Missing`]); [`super::filler`] brings it.
//!
//! The image was read through before, but for the bytes of memory. Those are compared record by record when they are
//! brought, which can be when the pod runs already: a pod whose memory turns out to be damaged is ended then.

use super::Image;
use super::filler::{self, Filling, Source, Space};
use super::tree::Grown;
use crate::ids::{MmId, PodPid};
use crate::image::{Owner, PageRun, Waiting, damaged};
use crate::objects::memory::behind::can_wait;
use crate::objects::memory::ranges::Ranges;
use crate::remote::RemoteCall;
use crate::remote::plain::{Job, Stub, run_all};
use crate::{Doing, Problem, Result};
use pod_runtime::sys::memory;
use pod_runtime::sys::userfault::Userfault;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;

const PAGE: u64 = 4096;
/// A process that has less of such memory is filled at once.
const MUCH: u64 = 4 << 20;
/// Of a record all is read and compared for a page of it: a longer one is placed at once.
const MOST_RECORD: u64 = 16 << 20;

/// What is to come of an address space, by address.
#[derive(Debug, Clone, Default)]
pub(super) struct Missing(BTreeMap<u64, Piece>);

/// Up to where, and where its bytes lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub end: u64,
    /// Which of the records, and how far into it.
    pub record: usize,
    pub into: u64,
}

impl Missing {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = (u64, Piece)> {
        self.0.iter().map(|(start, piece)| (*start, *piece))
    }

    /// The piece that a byte is in.
    pub fn at(&self, address: u64) -> Option<(u64, Piece)> {
        let (start, piece) = self.0.range(..=address).next_back()?;
        (address < piece.end).then_some((*start, *piece))
    }

    /// What replaces whatever was there.
    pub fn put(&mut self, start: u64, piece: Piece) {
        self.take(start..piece.end);
        self.0.insert(start, piece);
    }

    /// What of it lies in a range.
    pub fn within(&self, range: Range<u64>) -> Vec<(u64, Piece)> {
        let part = |(start, piece): (u64, Piece)| {
            let from = start.max(range.start);
            (from, Piece { end: piece.end.min(range.end), into: piece.into + (from - start), ..piece })
        };
        self.over(&range).into_iter().map(part).collect()
    }

    /// The same, and then it is not missing any more.
    pub fn take(&mut self, range: Range<u64>) -> Vec<(u64, Piece)> {
        let taken = self.within(range.clone());
        for (start, piece) in self.over(&range) {
            self.0.remove(&start);
            if start < range.start {
                self.0.insert(start, Piece { end: range.start, ..piece });
            }
            if range.end < piece.end {
                self.0.insert(range.end, Piece { into: piece.into + (range.end - start), ..piece });
            }
        }
        taken
    }

    /// Whether it has something in a range.
    fn touches(&self, range: &Range<u64>) -> bool {
        self.at(range.start).is_some() || self.0.range(range.clone()).next().is_some()
    }

    /// Pieces that have something in a range.
    fn over(&self, range: &Range<u64>) -> Vec<(u64, Piece)> {
        if range.is_empty() {
            return Vec::new();
        }
        let first = self.at(range.start).map_or(range.start, |(start, _)| start);
        self.0.range(first..range.end).map(|(start, piece)| (*start, *piece)).collect()
    }

    /// What was in a range is elsewhere now, as mremap(2) leaves it.
    pub fn shift(&mut self, from: Range<u64>, to: u64) {
        let taken = self.take(from.clone());
        self.take(to..to.saturating_add(from.end - from.start));
        for (start, piece) in taken {
            let at = to + (start - from.start);
            self.0.insert(at, Piece { end: at + (piece.end - start), ..piece });
        }
    }
}

/// What waits, of all processes.
pub(super) struct Lazy {
    filling: Filling,
    spaces: BTreeMap<MmId, Waits>,
    records: Vec<Waiting>,
    /// None where it is in a file; else whose memory each record is, which comes behind, and by which job the pod left it.
    behind: Option<(Vec<MmId>, String)>,
}

/// By what pages are put in places that are watched already.
pub(super) struct Beside {
    pub mm: MmId,
    pub fault: Userfault,
    pub places: Vec<Range<u64>>,
}

/// Of one address space.
struct Waits {
    fault: Userfault,
    /// Where memory may wait.
    places: Ranges,
    missing: Missing,
}

impl Lazy {
    /// Asks every process with much memory for the means to give it pages later. Where a kernel, or its settings, do not
    /// allow that all of it is placed at once.
    pub fn open(image: &Image, grown: &Grown, filling: Filling) -> Lazy {
        let processes: Vec<_> = image
            .processes
            .values()
            .filter_map(|process| Some((process.mm, can_wait(&image.spaces.get(&process.mm)?.maps), process.pid)))
            .filter(|(_, places, _)| places.bytes() >= MUCH)
            .collect();
        let mut spaces = BTreeMap::new();
        for (mm, places, pid) in processes {
            match filler::userfault(&grown.stubs[&pid]) {
                Ok(fault) => drop(spaces.insert(mm, Waits { fault, places, missing: Missing::default() })),
                Err(problem) => {
                    tracing::warn!(%pid, problem = problem.chain(), "the memory of a process is filled at once");
                }
            }
        }
        Lazy { filling, spaces, records: Vec::new(), behind: None }
    }

    /// What comes behind the pod, from the host that it left.
    ///
    /// # Errors
    /// A process does not get the means to be given pages later: it cannot be done without them.
    pub fn behind(image: &Image, grown: &Grown, (filling, job): (Filling, String)) -> Result<Lazy> {
        let (mut spaces, mut owners) = (BTreeMap::new(), Vec::new());
        for (mm, ranges) in &image.behind {
            let (state, process) = (&image.spaces[mm], image.processes.values().find(|process| process.mm == *mm));
            let process = process.ok_or_else(|| damaged(format!("pages behind memory {mm}, which no process has")))?;
            let stub = &grown.stubs[&process.pid];
            let fault = filler::userfault(stub)?;
            let record = owners.len();
            let piece = |range: Range<u64>| (range.start, Piece { end: range.end, record, into: range.start });
            let missing = Missing(ranges.iter().map(piece).collect());
            let places = can_wait(&state.maps);
            let watched = watched(&missing, &places);
            empty(stub, process.pid, ranges, &watched)?;
            watch(&fault, *mm, &watched)?;
            // Only now nobody puts anything there by himself: a page for all of a huge one, of zeros where nothing was.
            if there(stub, &watched).is_ok_and(|there| !there.both(ranges).is_empty()) {
                return Err(Problem::new("E-KERNEL", format!("memory {mm} has pages where it should have none yet")));
            }
            owners.push(*mm);
            spaces.insert(*mm, Waits { fault, places, missing });
        }
        Ok(Lazy { filling, spaces, records: Vec::new(), behind: Some((owners, job)) })
    }

    /// By what pages that are not missing are put where others are: only so nothing else comes into being beside them.
    pub fn beside(&self) -> Result<Vec<Beside>> {
        let behind = self.spaces.iter().filter(|_| self.behind.is_some());
        let one = |(mm, space): (&MmId, &Waits)| {
            let fault = space.fault.copied().doing(|| "copy a descriptor".into())?;
            let places = watched(&space.missing, &space.places).iter().collect();
            Ok(Beside { mm: *mm, fault, places })
        };
        behind.map(one).collect()
    }

    /// Whether all of a run can wait.
    pub fn takes(&self, run: PageRun) -> bool {
        let Owner::Mm(mm) = run.owner else { return false };
        let (range, whole) = (run.address..run.address.saturating_add(run.bytes), run.address | run.bytes);
        self.behind.is_none()
            && whole.is_multiple_of(PAGE)
            && (1..=MOST_RECORD).contains(&run.bytes)
            && self.spaces.get(&mm).is_some_and(|space| space.places.has(&range))
    }

    /// What of these ranges of a space can wait.
    pub fn can_wait(&self, mm: MmId, ranges: &Ranges) -> Ranges {
        self.spaces.get(&mm).map_or_else(Ranges::default, |space| space.places.both(ranges))
    }

    /// Parts of a run that lies in the file at `waiting`, which can wait ([`Lazy::takes`], [`Lazy::can_wait`]). False if
    /// they have to be placed now all the same.
    pub fn leave(&mut self, mm: MmId, address: u64, waiting: Waiting, parts: &Ranges) -> bool {
        let Some(space) = self.spaces.get_mut(&mm).filter(|_| waiting.bytes() <= MOST_RECORD) else { return false };
        let record = self.records.len();
        self.records.push(waiting);
        for part in parts.iter() {
            space.missing.put(part.start, Piece { end: part.end, record, into: part.start - address });
        }
        true
    }

    /// The same bytes once more: what of `from` waits is to come to `to`, too, and the rest is handed to `others`, as a
    /// range of `from`. None of it is in place already.
    pub fn alike(&mut self, (from, source): (Owner, u64), (to, address): (MmId, u64), bytes: u64) -> Vec<Range<u64>> {
        let whole = Ranges::one(source..source + bytes);
        let Owner::Mm(from) = from else { return whole.iter().collect() };
        let pieces = self.spaces.get(&from).map_or_else(Vec::new, |space| space.missing.within(source..source + bytes));
        let waits = Ranges::of_any(pieces.iter().map(|(start, piece)| *start..piece.end));
        if let Some(space) = self.spaces.get_mut(&to) {
            for (start, piece) in pieces {
                let at = address + (start - source);
                space.missing.put(at, Piece { end: at + (piece.end - start), ..piece });
            }
        }
        whole.without(&waits).iter().collect()
    }

    /// Reads what waits of a range, for who needs it now: `take` gets it piece by piece. The rest is handed back.
    pub fn read(
        &self,
        mm: MmId,
        range: Range<u64>,
        file: &File,
        mut take: impl FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<Vec<Range<u64>>> {
        let pieces = self.spaces.get(&mm).map_or_else(Vec::new, |space| space.missing.within(range.clone()));
        for (start, piece) in &pieces {
            let mut bytes = vec![0; (piece.end - start) as usize];
            self.records[piece.record].read_part(file, piece.into, &mut bytes)?;
            take(*start, &bytes)?;
        }
        let waits = Ranges::of_any(pieces.iter().map(|(start, piece)| *start..piece.end));
        Ok(Ranges::one(range).without(&waits).iter().collect())
    }

    /// Everything else is in its place: whoever touches what is missing waits for it from here on, and it is
    /// brought.
    pub fn start(self, file: Option<&File>, init: i32) -> Result<()> {
        let mut spaces = Vec::new();
        for (mm, Waits { fault, places, missing }) in self.spaces {
            if missing.is_empty() {
                continue;
            }
            if self.behind.is_none() {
                watch(&fault, mm, &watched(&missing, &places))?;
            }
            spaces.push(Space { fault, missing });
        }
        if spaces.is_empty() {
            return Ok(());
        }
        let source = match (self.behind, file) {
            (Some((owners, job)), _) => Source::Behind(owners, job),
            (None, Some(file)) => Source::File(self.records, file),
            (None, None) => return Err(damaged("memory was left in a file that is none")),
        };
        filler::start(spaces, source, init, self.filling)
    }
}

/// Whoever touches what is missing there waits from here on.
fn watch(fault: &Userfault, mm: MmId, ranges: &Ranges) -> Result<()> {
    ranges.iter().try_for_each(|range| {
        let done = fault.register(range.start, range.end - range.start);
        done.doing(|| format!("watch for faults at {:#x} of memory {mm}", range.start))
    })
}

/// Takes away what may be where pages are missing: something of what came ahead and is out of date, or came with a huge page.
fn empty(stub: &Stub, pid: PodPid, missing: &Ranges, watched: &Ranges) -> Result<()> {
    // Before Linux 6.7 nobody says what is there.
    let stale = there(stub, watched).map_or_else(|_| missing.clone(), |there| there.both(missing));
    let dontneed = |range: Range<u64>| {
        let args = vec![range.start.into(), (range.end - range.start).into(), libc::MADV_DONTNEED.into()];
        RemoteCall::new("madvise", libc::SYS_madvise, args)
    };
    let calls: Vec<RemoteCall> = stale.iter().map(dontneed).collect();
    if calls.is_empty() { Ok(()) } else { run_all(&mut [Job { stub: *stub, calls, space: pid.0 }]) }
}

/// Pages that are there.
fn there(stub: &Stub, ranges: &Ranges) -> std::io::Result<Ranges> {
    let pagemap = File::open(format!("/proc/{}/pagemap", stub.task))?;
    let any = memory::PAGE_IS_PRESENT | memory::PAGE_IS_SWAPPED;
    let mut found = Vec::new();
    for range in ranges.iter() {
        let regions = memory::scan_pages(&pagemap, range.start, range.end, any, 0)?;
        found.extend(regions.into_iter().map(|region| region.start..region.end));
    }
    Ok(Ranges::of_any(found))
}

/// The ranges to be watched. Whole maps: a part of one would be a map of its own, and mremap(2), with which realloc(3) makes
/// large memory larger, fails with EFAULT where there are two.
fn watched(missing: &Missing, places: &Ranges) -> Ranges {
    Ranges::of(places.iter().filter(|place| missing.touches(place)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const MOST: u64 = 64;

    /// What each byte is: record and place in it.
    fn bytes(missing: &Missing) -> BTreeMap<u64, (usize, u64)> {
        let one = |(start, piece): (u64, Piece)| {
            (start..piece.end).map(move |at| (at, (piece.record, piece.into + (at - start))))
        };
        missing.iter().flat_map(one).collect()
    }

    #[derive(Debug, Clone)]
    enum Step {
        Put(u64, u64),
        Take(u64, u64),
        Shift(u64, u64, u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..MOST, 0..9u64).prop_map(|(start, bytes)| Step::Put(start, start + bytes)),
            (0..MOST, 0..20u64).prop_map(|(start, bytes)| Step::Take(start, start + bytes)),
            (0..MOST, 0..20u64, 100..100 + MOST).prop_map(|(start, bytes, to)| Step::Shift(start, start + bytes, to)),
        ]
    }

    proptest! {
        #[test]
        fn each_byte_is_known_as_long_as_it_is_missing(steps in proptest::collection::vec(step(), 0..30)) {
            let (mut missing, mut known) = (Missing::default(), BTreeMap::new());
            for (record, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Put(start, end) if start == end => {}
                    Step::Put(start, end) => {
                        missing.put(start, Piece { end, record, into: 7 });
                        known.extend((start..end).map(|at| (at, (record, 7 + at - start))));
                    }
                    Step::Take(start, end) => {
                        let expected: Vec<_> = known.range(start..end).map(|(at, what)| (*at, *what)).collect();
                        let taken = Missing(missing.take(start..end).into_iter().collect());
                        prop_assert_eq!(bytes(&taken).into_iter().collect::<Vec<_>>(), expected);
                        known.retain(|at, _| !(start..end).contains(at));
                    }
                    Step::Shift(start, end, to) => {
                        missing.shift(start..end, to);
                        let moved: Vec<_> = known.range(start..end).map(|(at, what)| (to + at - start, *what)).collect();
                        known.retain(|at, _| !(start..end).contains(at) && !(to..to + end - start).contains(at));
                        known.extend(moved);
                    }
                }
                prop_assert_eq!(&bytes(&missing), &known);
                for at in 0..200 {
                    prop_assert_eq!(missing.at(at).is_some(), known.contains_key(&at));
                }
            }
        }
    }

    #[test]
    fn what_is_watched_are_whole_maps() {
        let mut missing = Missing::default();
        for start in [0x10_0000, 0x12_0000, 0x90_0000] {
            missing.put(start, Piece { end: start + 0x1000, record: 0, into: 0 });
        }
        let places = Ranges::of([0..0x11_8000, 0x11_c000..0xa0_0000, 0xb0_0000..0xc0_0000]);
        let found: Vec<_> = watched(&missing, &places).iter().collect();
        assert_eq!(found, [0..0x11_8000, 0x11_c000..0xa0_0000]);
    }
}
