//! Pages whose bytes are those of others: copied from where the others lie, when all of those are in their place.
//!
//! The image is believed in nothing: who is copied must have come as bytes, of memory, and lie where the image has a map;
//! each place is filled once, in order, so that a small image cannot ask for more work than there is memory.

use super::heritage::Copied;
use super::lazy::Lazy;
use super::pages::Targets;
use crate::ids::MmId;
use crate::image::{Kind, Owner, PageRun, Record, damaged};
use crate::objects::memory::ranges::Ranges;
use crate::objects::memory::{Alike, Same as State};
use crate::{Problem, Result};
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;

const PAGE: u64 = 4096;

/// What waits, and the file that it waits in.
pub(super) type Left<'a> = Option<(&'a mut Lazy, &'a File)>;

#[derive(Debug, Default)]
pub(super) struct Same {
    alike: Vec<Alike>,
    /// What came as bytes.
    placed: BTreeMap<Owner, Vec<Range<u64>>>,
}

impl Same {
    /// A run that is being placed.
    pub fn placed(&mut self, run: PageRun) {
        self.placed.entry(run.owner).or_default().push(run.address..run.address + run.bytes);
    }

    /// A SAME record.
    pub fn take(&mut self, record: &Record) -> Result<()> {
        for one in record.state::<State>()?.pages {
            let end = |(kind, id, address): (u16, u64, u64)| Some((kind, id, address.checked_add(one.bytes)?));
            let (Some(_), Some(_)) = (end(one.to), end(one.from)) else { return Err(strange("beyond all memory")) };
            if one.bytes == 0 || (one.to.2 | one.from.2 | one.bytes) & (PAGE - 1) != 0 {
                return Err(strange("that are none"));
            }
            if self.alike.last().and_then(|last| end_of(last.to, last.bytes)) > Some(one.to) {
                return Err(strange("out of order"));
            }
            self.alike.push(one);
        }
        Ok(())
    }

    /// To be called by the tracer when all bytes are in their place, but for what `lazy` has of the file.
    pub fn copy(self, targets: &mut Targets<'_>, buffer: &mut [u8], lazy: &mut Left<'_>) -> Result<()> {
        let Same { alike, placed } = self;
        let placed: BTreeMap<Owner, Ranges> =
            placed.into_iter().map(|(owner, ranges)| (owner, Ranges::of_any(ranges))).collect();
        for Alike { to, from, bytes } in alike {
            let (to, address) = owner(to)?;
            let (from, source) = owner(from)?;
            // A page that is not there yet would be waited for.
            let there = placed.get(&from).is_some_and(|ranges| ranges.has(&(source..source + bytes)));
            if !there {
                return Err(strange("like some that did not come"));
            }
            duplicate(targets, (to, address), (from, source), bytes, (buffer, lazy))?;
        }
        Ok(())
    }
}

/// Copies what processes should have inherited and have not. What did not come are pages of zeros.
pub(super) fn inherited(
    copied: &[Copied],
    came: &BTreeMap<MmId, Ranges>,
    targets: &mut Targets<'_>,
    buffer: &mut [u8],
    lazy: &mut Left<'_>,
) -> Result<()> {
    for Copied { to, from, range } in copied {
        for part in came.get(from).into_iter().flat_map(|came| came.within(range.clone())) {
            let (to, from) = ((Owner::Mm(*to), part.start), (Owner::Mm(*from), part.start));
            duplicate(targets, to, from, part.end - part.start, (buffer, lazy))?;
        }
    }
    Ok(())
}

fn duplicate(
    targets: &mut Targets<'_>,
    (to, address): (Owner, u64),
    (from, source): (Owner, u64),
    bytes: u64,
    (buffer, lazy): (&mut [u8], &mut Left<'_>),
) -> Result<()> {
    let (Some(place), Some(target)) = (targets.of(from)?, targets.of(to)?) else {
        return Err(strange("of no memory"));
    };
    target.check(PageRun { owner: Owner::Log, address, bytes })?;
    place.check(PageRun { owner: Owner::Log, address: source, bytes })?;
    // What lies at an address of the source. As pages are placed: in one map at a time.
    let put = |at: u64, pages: &[u8]| {
        let start = address + (at - source);
        let range = start..start + pages.len() as u64;
        let parts = match to {
            Owner::Mm(mm) => targets.by_map(mm, range),
            _ => std::iter::once(range).collect(),
        };
        let piece = |part: &Range<u64>| &pages[(part.start - start) as usize..(part.end - start) as usize];
        parts.iter().try_for_each(|part| target.write(part.start, piece(part)))
    };
    let whole = source..source + bytes;
    let now = match (lazy, from, to) {
        (Some((lazy, _)), _, Owner::Mm(mm)) if lazy.takes(PageRun { owner: to, address, bytes }) => {
            lazy.alike((from, source), (mm, address), bytes)
        }
        (Some((lazy, file)), Owner::Mm(mm), _) => lazy.read(mm, whole, file, put)?,
        _ => std::iter::once(whole).collect(),
    };
    for part in now {
        let mut at = part.start;
        while at < part.end {
            let count = usize::try_from(part.end - at).unwrap_or(usize::MAX).min(buffer.len());
            let piece = &mut buffer[..count];
            place.read(at, piece)?;
            put(at, piece)?;
            at += count as u64;
        }
    }
    Ok(())
}

fn end_of((kind, id, address): (u16, u64, u64), bytes: u64) -> Option<(u16, u64, u64)> {
    Some((kind, id, address.checked_add(bytes)?))
}

/// Whose memory, and where.
fn owner((kind, id, address): (u16, u64, u64)) -> Result<(Owner, u64)> {
    match Owner::from_kind(Kind(kind), id) {
        Some(owner @ (Owner::Mm(_) | Owner::SharedMemory(_))) => Ok((owner, address)),
        _ => Err(strange("of no memory")),
    }
}

fn strange(what: &str) -> Problem {
    damaged(format!("the image has pages like others {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Reader, Writer};

    fn take(pages: Vec<Alike>) -> Result<usize> {
        let mut w = Writer::new(Vec::new());
        w.put(Kind::SAME, 0, &State { pages })?;
        let stream = w.finish()?;
        let record = Reader::new(&stream[..])?.next()?.expect("one record");
        let mut same = Same::default();
        same.take(&record)?;
        Ok(same.alike.len())
    }

    #[test]
    fn each_place_is_filled_once_in_order() {
        let one = |to: u64, from: u64, bytes: u64| Alike { to: (32, 1, to), from: (32, 1, from), bytes };
        assert_eq!(take(vec![one(0, 0, 4096), one(4096, 0, 8192), one(16384, 0, 4096)]).unwrap(), 3);
        for bad in [
            vec![one(4096, 0, 4096), one(0, 0, 4096)],
            vec![one(0, 0, 8192), one(4096, 0, 4096)],
            vec![one(0, 0, 4096), one(0, 0, 4096)],
            vec![one(0, 0, 0)],
            vec![one(1, 0, 4096)],
            vec![one(0, 1, 4096)],
            vec![one(0, 0, 4097)],
            vec![one(u64::MAX - 4095, 0, 4096)],
            vec![one(0, u64::MAX - 4095, 8192)],
        ] {
            assert_eq!(take(bad.clone()).unwrap_err().code(), crate::image::DAMAGED, "{bad:?}");
        }
        assert!(owner((33, 1, 0)).is_ok());
        for kind in [Kind::FILE_DATA, Kind::AHEAD_PAGES, Kind::STORAGE_DATA, Kind::LOG, Kind::SPEC] {
            assert!(owner((kind.0, 1, 0)).is_err(), "{kind}");
        }
    }
}
