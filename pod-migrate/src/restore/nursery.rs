//! The first process's large private memory, filled before the process is restored: while the pod still runs at its
//! source, pages that come ahead go straight to where they will be used.
//!
//! The first process of a pod that is half born waits for its files anyway; it maps the places that the source names, as
//! far as nothing of its own lies there, and makes a userfaultfd through which they are filled. What the process is
//! turned into later keeps these maps ([`Laid`]): what is wrong about them by then is unmapped, emptied or protected, and
//! what cannot be made from them (a map that grows downwards, say) is carried to the file in memory that all other pages
//! wait in. Forks leave them out until the end (MADV_DONTFORK).

use super::Image;
use super::memory::TASK_SIZE;
use crate::ids::{MmId, PodPid};
use crate::objects::memory::ranges::Ranges;
use crate::objects::memory::{Backing, Map};
use crate::remote::RemoteCall;
use crate::{Doing, Result};
use pod_runtime::birth::Conceived;
use pod_runtime::sys::memory;
use pod_runtime::sys::userfault::Userfault;
use std::io::ErrorKind;
use std::ops::Range;

const PAGE: usize = 4096;
/// The space of the first process.
pub(super) const FIRST: MmId = MmId(1);
/// What a place must hold at least, and how many there are at most.
const LEAST: u64 = 1 << 20;
const MOST: usize = 512;

/// Places of a first process that has yet to become one.
#[derive(Debug)]
pub(super) struct Nursery {
    task: i32,
    fault: Userfault,
    places: Ranges,
    /// In the order in which it was filled.
    filled: Vec<Range<u64>>,
}

impl Nursery {
    /// Has the first process map what it can of `wanted`.
    pub fn open(conceived: &Conceived, wanted: &Ranges) -> Result<Nursery> {
        let large = wanted.iter().filter(|range| range.end - range.start >= LEAST).take(MOST);
        let large: Vec<(u64, u64)> = large.map(|range| (range.start, range.end)).collect();
        let (fd, places) = conceived.lay_out(&large)?;
        let doing = || "fill the first process ahead".to_owned();
        let fault = Userfault::take(fd).doing(doing)?;
        for (start, end) in &places {
            fault.register(*start, end - start).doing(doing)?;
        }
        let places = Ranges::of_any(places.into_iter().map(|(start, end)| start..end));
        Ok(Nursery { task: conceived.first(), fault, places, filled: Vec::new() })
    }

    /// The part of a range that is filled here.
    pub fn has(&self, range: Range<u64>) -> Ranges {
        self.places.both(&Ranges::one(range))
    }

    /// Whole pages, new or in place of earlier ones.
    pub fn put(&mut self, mut address: u64, mut pages: &[u8]) -> Result<()> {
        let end = address + pages.len() as u64;
        match self.filled.last_mut() {
            Some(last) if last.end == address => last.end = end,
            _ => self.filled.push(address..end),
        }
        let doing = || "fill the first process ahead".to_owned();
        while !pages.is_empty() {
            let count = match self.fault.copy(address, pages) {
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    memory::write(self.task, &pages[..PAGE], &[(address, PAGE)]).doing(doing)?;
                    PAGE
                }
                Err(error) => return Err(error).doing(doing),
            };
            pages = &pages[count..];
            address += count as u64;
        }
        Ok(())
    }

    /// What of it the image can use.
    pub fn usable(&self, image: &Image) -> Ranges {
        let process = image.processes.get(&PodPid(1));
        let space = process.filter(|process| process.mm == FIRST).and_then(|process| image.spaces.get(&process.mm));
        let fitting = space.into_iter().flat_map(|space| &space.maps).filter(|map| fits(map));
        self.places.both(&Ranges::of(fitting.map(|map| map.start..map.end)))
    }

    /// Leaves what of it the image can use. What it keeps of the rest is handed to `elsewhere`, also what lies where
    /// something else comes first, which is `foreign`.
    pub fn settle(
        self,
        image: &Image,
        foreign: &Ranges,
        mut elsewhere: impl FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<Laid> {
        let usable = self.usable(image);
        let Nursery { task, fault, places, filled } = self;
        let filled = Ranges::of_any(filled);
        // From here on its memory is as any other's.
        drop(fault);
        let all = image.kept.get(&FIRST).cloned().unwrap_or_default();
        let kept = all.without(foreign);
        let mut buffer = vec![0; 256 << 10];
        for range in filled.both(&all).without(&usable.both(&kept)).iter() {
            let mut at = range.start;
            while at < range.end {
                let count = buffer.len().min((range.end - at) as usize);
                let piece = &mut buffer[..count];
                memory::read_exact(task, at, piece).doing(|| "read what came ahead".into())?;
                elsewhere(at, piece)?;
                at += count as u64;
            }
        }
        let filled = filled.both(&usable);
        Ok(Laid { unusable: places.without(&usable), stale: filled.without(&kept), filled: filled.both(&kept), usable })
    }
}

/// Whether a map can be one that was laid out: nothing about it has to be decided when it is made.
fn fits(map: &Map) -> bool {
    map.backing == Backing::Anonymous
        && !map.shared
        && map.huge == 0
        && !map.grows_down
        && !map.droppable
        && !map.advice.contains(&libc::MADV_HUGEPAGE)
}

/// What a process has already when it is turned into what the image says.
#[derive(Debug, Default)]
pub(super) struct Laid {
    /// Readable and writable memory that is part of maps of the image.
    usable: Ranges,
    /// What is not.
    unusable: Ranges,
    /// Pages that hold something which the image does not have.
    stale: Ranges,
    /// Pages that hold what they should.
    filled: Ranges,
}

impl Laid {
    pub fn filled(&self) -> &Ranges {
        &self.filled
    }

    /// With what was inherited. All else that is mapped, but what lies in `ours`, is not the image's.
    pub fn with(self, maps: &Ranges, pages: &Ranges, ours: &Range<u64>) -> Laid {
        let usable = self.usable.with(maps);
        let filled = self.filled.with(pages);
        let all = Ranges::of([0..ours.start, ours.end..TASK_SIZE]);
        Laid { unusable: all.without(&usable), stale: usable.without(&filled), filled, usable }
    }

    /// A map of the process that is not to go when everything of what it was goes.
    pub fn keeps(&self, start: u64, end: u64) -> bool {
        let range = Ranges::one(start..end);
        !self.usable.both(&range).is_empty() || !self.unusable.both(&range).is_empty()
    }

    /// Takes away what the image does not have.
    pub fn tidy(&self) -> Vec<RemoteCall> {
        let bytes = |range: &Range<u64>| (range.end - range.start).into();
        let unmap =
            |range: Range<u64>| RemoteCall::new("unmap", libc::SYS_munmap, vec![range.start.into(), bytes(&range)]);
        let empty = |range: Range<u64>| {
            let args = vec![range.start.into(), bytes(&range), libc::MADV_DONTNEED.into()];
            RemoteCall::new("madvise", libc::SYS_madvise, args)
        };
        self.unusable.iter().map(unmap).chain(self.stale.iter().map(empty)).collect()
    }

    /// What of a map is there, and what is still to be mapped.
    pub fn divide(&self, map: &Map) -> (Ranges, Ranges) {
        let whole = Ranges::one(map.start..map.end);
        (self.usable.both(&whole), whole.without(&self.usable))
    }

    /// Children are to have it too.
    pub fn inherit(part: &Range<u64>) -> RemoteCall {
        let args = vec![part.start.into(), (part.end - part.start).into(), libc::MADV_DOFORK.into()];
        RemoteCall::new("madvise", libc::SYS_madvise, args)
    }

    /// Makes what is there a part of a map.
    pub fn adopt(map: &Map, part: &Range<u64>) -> [RemoteCall; 2] {
        let (start, bytes) = (part.start, part.end - part.start);
        let protect = vec![start.into(), bytes.into(), u64::from(map.protection).into()];
        [RemoteCall::new(format!("protect {start:#x}"), libc::SYS_mprotect, protect), Laid::inherit(part)]
    }
}
