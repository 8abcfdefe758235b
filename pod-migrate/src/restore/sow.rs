//! Putting into a process what others are to inherit from it, and what each has when all are made: the plan is
//! [`super::heritage`]'s.

use super::ahead::Ahead;
use super::heritage::{Heritage, Sown, Stuff};
use super::memory::{close_all, map_private, open_opener, take};
use super::nursery::{self, Laid};
use super::pages::{Space, Target};
use super::tree::Grown;
use super::{Image, heritage};
use crate::Result;
use crate::ids::{FileId, MmId, PodPid};
use crate::objects::files::Opener;
use crate::objects::memory::ranges::Ranges;
use crate::objects::memory::{Backing, Map, MmState};
use crate::remote::RemoteCall;
use crate::remote::plain::Stub;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

/// What a restore has before there are processes: what is to come into them early, and where it is.
pub(super) struct Seed<'a> {
    pub heritage: &'a Heritage,
    pub ahead: &'a Ahead,
    /// Of the first process.
    pub laid: &'a Laid,
    /// In which pages were left.
    pub file: Option<&'a File>,
}

/// What is inherited of an image; `there` is what its first process has.
pub(super) fn plan(image: &Image, there: &Ranges) -> Heritage {
    let spaces = image.processes.values().map(|process| (process.pid, process.mm)).collect();
    let maps = |mm: MmId| image.spaces.get(&mm).map_or(&[][..], |space| &space.maps);
    heritage::plan(image.nodes(), &spaces, maps, &image.claims, there)
}

/// What each process has of its memory, once all are made.
pub(super) fn laid(heritage: Heritage, first: Laid, grown: &Grown) -> BTreeMap<PodPid, Laid> {
    let ours = grown.base.0..grown.reserved_end();
    let mut all = BTreeMap::new();
    let mut first = Some(first);
    for (pid, has) in heritage.has {
        let before = match pid {
            PodPid(1) => first.take().unwrap_or_default(),
            _ => Laid::default(),
        };
        all.insert(pid, before.with(&has.maps, &has.pages, &ours));
    }
    all.extend(first.map(|first| (PodPid(1), first)));
    all
}

impl Seed<'_> {
    /// To be called before the process makes its first child.
    pub fn sow(&self, pid: PodPid, stub: &Stub, opener: &Opener) -> Result<()> {
        let Some(sown) = self.heritage.sown.get(&pid) else { return Ok(()) };
        let nothing = Laid::default();
        let laid = if pid == PodPid(1) { self.laid } else { &nothing };
        stub.run(&mut maps(sown, laid, opener)?)?;
        let state = space(sown);
        let space = Arc::new(Space::over(stub, &state)?);
        let mut by_owner: BTreeMap<MmId, Vec<Range<u64>>> = BTreeMap::new();
        for (range, mm) in &sown.pages {
            by_owner.entry(*mm).or_default().push(range.clone());
        }
        for (mm, ranges) in by_owner {
            let mut ranges = Ranges::of(ranges);
            if mm == nursery::FIRST {
                ranges = ranges.without(laid.filled());
            }
            self.ahead.sow((mm, &ranges), &Target::Memory(space.clone()), &state.maps, self.file)?;
        }
        Ok(())
    }
}

/// The maps that are not there yet, and those that are, for children too.
fn maps(sown: &Sown, laid: &Laid, opener: &Opener) -> Result<Vec<RemoteCall>> {
    let mut calls = vec![open_opener(opener)];
    calls.extend(laid.tidy());
    let mut fds: BTreeMap<FileId, i32> = BTreeMap::new();
    for (range, stuff) in &sown.maps {
        let map = map(range, *stuff);
        let (there, missing) = laid.divide(&map);
        calls.extend(there.iter().map(|part| Laid::inherit(&part)));
        for part in missing.iter() {
            let (fd, offset) = match stuff.file {
                None => (-1, 0),
                Some((file, base)) => {
                    // 0 is the opener.
                    let next = 1 + fds.len() as i32;
                    let fd = *fds.entry(file).or_insert(next);
                    if fd == next {
                        calls.push(take(opener, 0, file, fd)?);
                    }
                    (fd, base.wrapping_add(part.start))
                }
            };
            calls.push(map_private(&Map { start: part.start, end: part.end, ..map.clone() }, fd, offset));
        }
        if stuff.huge_pages {
            let args = vec![range.start.into(), (range.end - range.start).into(), libc::MADV_HUGEPAGE.into()];
            calls.push(RemoteCall::new("madvise", libc::SYS_madvise, args).may_fail());
        }
    }
    calls.push(close_all());
    Ok(calls)
}

/// As it is while there are only pages to be put into it.
fn map(range: &Range<u64>, stuff: Stuff) -> Map {
    Map {
        start: range.start,
        end: range.end,
        protection: (libc::PROT_READ | libc::PROT_WRITE) as u32,
        shared: false,
        grows_down: stuff.grows_down,
        locked: false,
        lock_on_fault: false,
        guards: Vec::new(),
        droppable: false,
        sealed: false,
        no_reserve: true,
        advice: if stuff.huge_pages { vec![libc::MADV_HUGEPAGE] } else { Vec::new() },
        protection_key: 0,
        huge: 0,
        policy: None,
        backing: match stuff.file {
            None => Backing::Anonymous,
            Some((file, base)) => Backing::File { file, offset: base.wrapping_add(range.start) },
        },
    }
}

fn space(sown: &Sown) -> MmState {
    MmState {
        id: MmId(0),
        maps: sown.over.iter().map(|(range, stuff)| map(range, *stuff)).collect(),
        layout: Default::default(),
        auxv: Default::default(),
        exe: FileId(0),
        lock_future: false,
        lock_future_on_fault: false,
    }
}
