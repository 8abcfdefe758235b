//! Where the memory that an image holds lies in its file, for who looks at it without restoring it.

use crate::ids::MmId;
use crate::image::{Kind, Owner, PageRun, Waiting, damaged};
use crate::objects::memory::Alike;
use crate::objects::memory::ranges::Ranges;
use crate::restore::latest;
use pod_runtime::Result;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;

pub(super) const PAGE: u64 = 4096;
/// Pages are read through so much at once.
const PIECE: u64 = 256 << 10;
/// Runs of pages that are like others.
const MOST_ALIKE: usize = 16 << 20;

/// The bytes of memory of an image that was read through before.
#[derive(Debug)]
pub(super) struct Memory {
    file: File,
    /// By address, without overlaps.
    runs: BTreeMap<Owner, Vec<Run>>,
    last: RefCell<(Option<u64>, Vec<u8>)>,
}

/// A part of a record.
#[derive(Debug, Clone)]
struct Run {
    range: Range<u64>,
    /// Where in the record it begins.
    skip: u64,
    record: Waiting,
}

impl Memory {
    /// Of all runs in the order of the stream; of what came ahead, `kept` holds.
    pub fn new(file: File, all: Vec<(PageRun, Waiting)>, kept: &BTreeMap<MmId, Ranges>) -> Memory {
        let mut memory = Memory { file, runs: by_owner(all, kept), last: RefCell::default() };
        memory.order();
        memory
    }

    /// With pages whose bytes are those of others.
    pub fn with(mut self, alike: &[Alike]) -> Result<Memory> {
        let mut more: Vec<(Owner, Run)> = Vec::new();
        for one in alike {
            let owner = |(kind, id, _): (u16, u64, u64)| Owner::from_kind(Kind(kind), id);
            let (Some(to), Some(from)) = (owner(one.to), owner(one.from)) else { continue };
            let source = one.from.2..one.from.2.saturating_add(one.bytes);
            for run in self.over(from, &source) {
                let part = run.range.start.max(source.start)..run.range.end.min(source.end);
                let start = one.to.2.saturating_add(part.start - source.start);
                let range = start..start.saturating_add(part.end - part.start);
                let skip = run.skip + (part.start - run.range.start);
                more.push((to, Run { range, skip, record: run.record }));
            }
            if more.len() > MOST_ALIKE {
                return Err(damaged("the image says of more pages than there can be that they are like others"));
            }
        }
        more.into_iter().for_each(|(to, run)| self.runs.entry(to).or_default().push(run));
        self.order();
        Ok(self)
    }

    fn order(&mut self) {
        for list in self.runs.values_mut() {
            list.sort_by_key(|run| run.range.start);
            // An image that has a page twice is strange but readable: the later one is not looked at.
            list.dedup_by(|later, earlier| later.range.start < earlier.range.end);
        }
    }

    /// Everything, by owner and address: whose, where, and which part of which record it is.
    pub fn runs(&self) -> impl Iterator<Item = (Owner, Range<u64>, u64, Waiting)> {
        let all = self.runs.iter().flat_map(|(owner, list)| list.iter().map(move |run| (*owner, run)));
        all.map(|(owner, run)| (owner, run.range.clone(), run.skip, run.record))
    }

    /// What of a run lies at an address. The last record that had to be unpacked is kept at hand.
    fn part(&self, run: &Run, at: u64, into: &mut [u8]) -> Result<()> {
        let skip = run.skip + (at - run.range.start);
        if run.record.plain_at(0).is_some() {
            return run.record.read_part(&self.file, skip, into);
        }
        let mut last = self.last.borrow_mut();
        if last.0 != Some(run.record.record()) {
            let mut bytes = vec![0; run.record.bytes() as usize];
            run.record.read_part(&self.file, 0, &mut bytes)?;
            *last = (Some(run.record.record()), bytes);
        }
        into.copy_from_slice(&last.1[skip as usize..skip as usize + into.len()]);
        Ok(())
    }

    /// What there is of something, and of something in a range.
    pub fn stored(&self, owner: Owner) -> u64 {
        self.list(owner).iter().map(|run| run.range.end - run.range.start).sum()
    }

    pub fn stored_in(&self, owner: Owner, range: &Range<u64>) -> u64 {
        self.over(owner, range).map(|run| run.range.end.min(range.end) - run.range.start.max(range.start)).sum()
    }

    /// The bytes of a range; what the image does not hold is zeros.
    pub fn read(&self, owner: Owner, range: Range<u64>) -> Result<Vec<u8>> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        for run in self.over(owner, &range) {
            let part = run.range.start.max(range.start)..run.range.end.min(range.end);
            let into = &mut bytes[(part.start - range.start) as usize..(part.end - range.start) as usize];
            self.part(run, part.start, into)?;
        }
        Ok(bytes)
    }

    /// All pages of something that are not zeros, each with its address, in the order of the file: so a record that has
    /// to be unpacked is unpacked once, however many pages are like some of it.
    pub fn each_page(&self, owner: Owner, mut see: impl FnMut(u64, &[u8])) -> Result<()> {
        let mut buffer = vec![0; PIECE as usize];
        let mut runs: Vec<&Run> = self.list(owner).iter().collect();
        runs.sort_by_key(|run| (run.record.record(), run.skip));
        for run in runs {
            let mut at = run.range.start;
            while at < run.range.end {
                let end = run.range.end.min(at + PIECE);
                let piece = &mut buffer[..(end - at) as usize];
                self.part(run, at, piece)?;
                for (number, page) in piece.chunks(PAGE as usize).enumerate() {
                    if page.iter().any(|byte| *byte != 0) {
                        see(at + number as u64 * PAGE, page);
                    }
                }
                at = end;
            }
        }
        Ok(())
    }

    fn list(&self, owner: Owner) -> &[Run] {
        self.runs.get(&owner).map_or(&[], |list| list)
    }

    fn over(&self, owner: Owner, range: &Range<u64>) -> impl Iterator<Item = &Run> {
        let list = self.list(owner);
        let first = list.partition_point(|run| run.range.end <= range.start);
        let end = range.end;
        list[first..].iter().take_while(move |run| run.range.start < end)
    }
}

fn by_owner(all: Vec<(PageRun, Waiting)>, kept: &BTreeMap<MmId, Ranges>) -> BTreeMap<Owner, Vec<Run>> {
    let mut runs: BTreeMap<Owner, Vec<Run>> = BTreeMap::new();
    let mut ahead: BTreeMap<MmId, Vec<(PageRun, Waiting)>> = BTreeMap::new();
    for (run, record) in all {
        match run.owner {
            Owner::Ahead(mm) => ahead.entry(mm).or_default().push((run, record)),
            owner => {
                let range = run.address..run.address + run.bytes;
                runs.entry(owner).or_default().push(Run { range, skip: 0, record });
            }
        }
    }
    for (mm, all) in ahead {
        let Some(kept) = kept.get(&mm) else { continue };
        let list = runs.entry(Owner::Mm(mm)).or_default();
        let ranges = all.iter().map(|(run, _)| run.address..run.address + run.bytes);
        for (index, parts) in latest(ranges) {
            let (run, record) = all[index];
            // There may be a hundred thousand of both: what is kept is looked up, not walked through for each.
            let here = parts.iter().flat_map(|part| kept.within(part));
            list.extend(here.map(|range| Run { skip: range.start - run.address, range, record }));
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Packer, Reader, Writer};
    use std::io::Seek;

    /// Two packed records, and a process whose pages are by turns like one of the one and one of the other: whoever went by
    /// address would unpack a record for each page.
    #[test]
    fn a_record_is_unpacked_once_for_all_that_is_like_it() {
        let (a, b) = (Owner::Mm(MmId(1)), Owner::Mm(MmId(2)));
        let mut file = tempfile::tempfile().unwrap();
        let mut w = Writer::to_file(file.try_clone().unwrap()).unwrap();
        for byte in [1, 2] {
            let bytes = vec![byte; 64 * PAGE as usize];
            let run = PageRun { owner: a, address: u64::from(byte) << 20, bytes: bytes.len() as u64 };
            w.packed(run, &Packer::new(1).unwrap().pack(&bytes).unwrap().unwrap()).unwrap();
        }
        w.finish().unwrap();
        file.rewind().unwrap();
        let mut reader = Reader::of_file(file.try_clone().unwrap()).unwrap();
        let mut runs = Vec::new();
        while let Some(record) = reader.next().unwrap() {
            runs.extend(record.run.zip(reader.leave_pages().unwrap()));
        }
        let at = |owner: Owner, address| (owner.kind().0, owner.id(), address);
        let alike: Vec<Alike> = (0..64)
            .map(|n| Alike { to: at(b, n * PAGE), from: at(a, ((1 + n % 2) << 20) + n * PAGE), bytes: PAGE })
            .collect();
        let memory = Memory::new(file, runs, &BTreeMap::new()).with(&alike).unwrap();
        let (mut seen, mut changes) = (BTreeMap::new(), Vec::new());
        memory
            .each_page(b, |address, page| {
                changes.push(page[0]);
                assert!(seen.insert(address, page[0]).is_none());
            })
            .unwrap();
        changes.dedup();
        assert_eq!(changes, [1, 2]);
        assert_eq!(seen, (0..64).map(|n| (n * PAGE, 1 + (n % 2) as u8)).collect());
        assert_eq!(memory.read(b, PAGE..2 * PAGE).unwrap(), [2; PAGE as usize]);
    }
}
