//! Which pages processes share since a fork: those that are the same frame at the same address of both.
//!
//! Only fork makes such pages (and KSM, whose pages have the same bytes at least). They are stored once, under the topmost
//! process that has them; the others say in an [`Inherited`] record from whom they have them. What is mapped by one process
//! alone the kernel tells at once (pagemap, bit 56), and of a pod whose mappings ([`super::areas`]) tell of no such sharing
//! nothing is read at all.
//!
//! A frame may be taken away and given to somebody else between two looks, also of processes that stand still: the kernel
//! moves pages to make room for huge ones. So those of whom others have pages are looked at once more when all have been:
//! what is another frame by then is nobody else's. If there was any such, or a page on its way, all of it is looked at anew, a few
//! times at most.

use super::pagemap::{self, ELSEWHERE, FRAME, MAPPED_ONCE, OF_A_FILE, PAGE, PRESENT};
use super::ranges::Ranges;
use crate::ids::MmId;
use pod_runtime::proc::maps::Map;
use pod_runtime::sys::memory;
use pod_runtime::{Doing, Result};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::hash::{BuildHasherDefault, Hasher};
use std::io::ErrorKind;
use std::ops::Range;

/// With less than this in all of a pod the slower restore is not worth it.
pub(super) const WORTH_IT: u64 = 1 << 20;

/// Where a page is that is somewhere else. The numbers before the last, of which each kernel has a
/// few more or less, are pages on their way; the last are marks that there is none; nobody has so many swap files.
const WHERE: u64 = (1 << 5) - 1;
const ON_THEIR_WAY: Range<u64> = 16..31;
/// Looks at all of it.
const MOST_LOOKS: usize = 4;

/// A range that a space has from another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    pub from: MmId,
    pub range: Range<u64>,
}

/// What each space has from others, in order.
pub type Claims = BTreeMap<MmId, Vec<Claim>>;

/// A process to be looked at.
pub(super) struct Member<'a> {
    pub mm: MmId,
    pub host: i32,
    pub maps: &'a [Map],
}

/// Bytes that would be needed more if nothing of it were kept.
pub(super) fn bytes<'a>(maps: impl IntoIterator<Item = &'a Map>) -> u64 {
    maps.into_iter().map(Map::shared_since_fork).sum()
}

/// What others have from each.
pub(super) fn lent(claims: &Claims) -> BTreeMap<MmId, Ranges> {
    let mut lent: BTreeMap<MmId, Vec<Range<u64>>> = BTreeMap::new();
    for claim in claims.values().flatten() {
        lent.entry(claim.from).or_default().push(claim.range.clone());
    }
    lent.into_iter().map(|(mm, ranges)| (mm, Ranges::of_any(ranges))).collect()
}

/// Bytes that come from others.
pub(super) fn claimed(claims: &Claims) -> u64 {
    claims.values().flatten().map(|claim| claim.range.end - claim.range.start).sum()
}

/// What these processes share, parents before their children.
pub(super) fn find(members: &[Member<'_>]) -> Result<Claims> {
    if members.len() < 2 || bytes(members.iter().flat_map(|member| member.maps)) < WORTH_IT {
        return Ok(Claims::new());
    }
    let mut looks = 0;
    loop {
        let (claims, is_settled) = find_once(members)?;
        looks += 1;
        if is_settled || looks == MOST_LOOKS {
            return Ok(claims);
        }
    }
}

/// And whether no page was moved meanwhile.
fn find_once(members: &[Member<'_>]) -> Result<(Claims, bool)> {
    let mut is_settled = true;
    let mut seen = Seen::default();
    let mut found: BTreeMap<usize, Vec<(usize, Range<u64>)>> = BTreeMap::new();
    for (number, member) in members.iter().enumerate() {
        let Some(pagemap) = pagemap(member)? else { continue };
        let mut claims: Vec<(usize, Range<u64>)> = Vec::new();
        for (index, map) in member.maps.iter().enumerate().filter(|(_, map)| is_candidate(map)) {
            is_settled &= look(&pagemap, map.start..map.end, |page, frame| {
                let first = *seen.0.entry(frame).or_insert(Place { page, member: number as u32, map: index as u32 });
                let other = first.member as usize;
                if other == number || first.page != page || !alike(map, &members[other].maps[first.map as usize]) {
                    return;
                }
                match claims.last_mut() {
                    Some((of, range)) if *of == other && range.end == page => range.end += PAGE,
                    _ => claims.push((other, page..page + PAGE)),
                }
            })
            .doing(|| format!("find the pages of {}", member.host))?;
        }
        if !claims.is_empty() {
            found.insert(number, claims);
        }
    }
    let (still, are_same) = still_there(members, &seen, &found)?;
    let claims = found.into_iter().map(|(number, claims)| {
        let of = |(from, range): (usize, Range<u64>)| {
            let parts: Vec<_> = still.get(&from).into_iter().flat_map(|ranges| ranges.within(range.clone())).collect();
            parts.into_iter().map(move |range| Claim { from: members[from].mm, range })
        };
        (members[number].mm, claims.into_iter().flat_map(of).collect::<Vec<_>>())
    });
    Ok((claims.filter(|(_, claims)| !claims.is_empty()).collect(), is_settled && are_same))
}

/// Of whom others have something: what is the same frame as before, and a page of its own as [`super::pages`] sends it; and
/// whether all frames are the same.
fn still_there(
    members: &[Member<'_>],
    seen: &Seen,
    found: &BTreeMap<usize, Vec<(usize, Range<u64>)>>,
) -> Result<(BTreeMap<usize, Ranges>, bool)> {
    let mut are_same = true;
    let mut wanted: BTreeMap<usize, Vec<Range<u64>>> = BTreeMap::new();
    for (from, range) in found.values().flatten() {
        wanted.entry(*from).or_default().push(range.clone());
    }
    let mut still = BTreeMap::new();
    for (number, ranges) in wanted {
        let member = &members[number];
        let Some(pagemap) = pagemap(member)? else { continue };
        let mut same = Vec::new();
        let ranges = Ranges::of_any(ranges);
        for range in ranges.iter() {
            are_same &= look(&pagemap, range, |page, frame| {
                let first = seen.0.get(&frame);
                if first.is_some_and(|first| first.page == page && first.member as usize == number) {
                    same.push(page..page + PAGE);
                }
            })
            .doing(|| format!("find the pages of {}", member.host))?;
        }
        let same = Ranges::of(same);
        are_same &= same.bytes() == ranges.bytes();
        let there = memory::PAGE_IS_PRESENT;
        let not = memory::PAGE_IS_FILE | memory::PAGE_IS_PFNZERO;
        // A kernel that cannot tell has the page of zeros sent like any other.
        let own = memory::scan_pages(&pagemap, 0, super::pages::END_OF_USER, there, not).ok();
        let same = match own {
            Some(own) => same.both(&Ranges::of(own.iter().map(|region| region.start..region.end))),
            None => same,
        };
        still.insert(number, same);
    }
    Ok((still, are_same))
}

/// `None` for a process that has ended.
fn pagemap(member: &Member<'_>) -> Result<Option<File>> {
    let path = format!("/proc/{}/pagemap", member.host);
    match File::open(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        opened => opened.doing(|| format!("open {path}")).map(Some),
    }
}

/// Private, with pages that somebody else has too; no huge ones, and none that the kernel may drop.
fn is_candidate(map: &Map) -> bool {
    !map.shared
        && map.anonymous > 0
        && map.proportional < map.resident
        && !map.has(b"ht")
        && !map.has(b"dp")
        && !map.name.starts_with("[v")
}

/// Whether pages at the same address of two maps can be one.
fn alike(one: &Map, other: &Map) -> bool {
    let file = |map: &Map| (map.inode != 0).then(|| (map.device, map.inode, map.offset.wrapping_sub(map.start)));
    file(one) == file(other)
}

/// Shows each page of a range that is there, is no file's, and may be mapped more than once, with its frame. Whether none was
/// on its way.
fn look(pagemap: &File, range: Range<u64>, mut see: impl FnMut(u64, u64)) -> std::io::Result<bool> {
    let mut are_settled = true;
    pagemap::each(pagemap, range, |at, entry| {
        if entry & (PRESENT | OF_A_FILE | MAPPED_ONCE) == PRESENT && entry & FRAME != 0 {
            see(at, entry & FRAME);
        }
        are_settled &= entry & (PRESENT | ELSEWHERE) != ELSEWHERE || !ON_THEIR_WAY.contains(&(entry & WHERE));
        Ok(())
    })?;
    Ok(are_settled)
}

/// By frame, where it was seen first.
#[derive(Default)]
struct Seen(HashMap<u64, Place, BuildHasherDefault<Frames>>);

#[derive(Clone, Copy)]
struct Place {
    page: u64,
    /// Of the members, and of its maps.
    member: u32,
    map: u32,
}

/// Frames are numbers that nobody chooses.
#[derive(Default)]
struct Frames(u64);

impl Hasher for Frames {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = (self.0 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pod_runtime::proc::maps;
    use pod_runtime::sys::daemon;

    /// Two children of ours, which do nothing: what they have from us, and from each other, and what they have not.
    #[test]
    fn children_share_with_us_and_with_each_other() {
        const PAGES: usize = 4096;
        let mut memory = crate::image::PageBuffer::new(PAGES * PAGE as usize);
        memory.iter_mut().step_by(PAGE as usize).for_each(|byte| *byte = 1);
        let base = memory.as_ptr() as u64;
        // It does nothing but wait to be killed.
        let child = || match daemon::fork().unwrap() {
            daemon::Fork::Child => loop {
                nix::unistd::pause();
            },
            daemon::Fork::Parent(child) => nix::unistd::Pid::from_raw(child),
        };
        let children = [child(), child()];
        // Ours alone from now on, and theirs together.
        memory[..512 * PAGE as usize].iter_mut().step_by(PAGE as usize).for_each(|byte| *byte = 2);
        let hosts = [std::process::id() as i32, children[0].as_raw(), children[1].as_raw()];
        let maps = hosts.map(|host| maps::parse(&std::fs::read_to_string(format!("/proc/{host}/smaps")).unwrap()));
        let members: Vec<Member<'_>> = hosts
            .iter()
            .zip(&maps)
            .zip(1..)
            .map(|((host, maps), mm)| Member { mm: MmId(mm), host: *host, maps })
            .collect();
        let found = find(&members);
        for child in children {
            nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL).unwrap();
            nix::sys::wait::waitpid(child, None).unwrap();
        }
        let found = found.unwrap();
        let whole = base..base + PAGES as u64 * PAGE;
        let here = |mm: u64, from: u64| {
            let claims = found.get(&MmId(mm)).into_iter().flatten().filter(|claim| claim.from == MmId(from));
            let here = Ranges::of(claims.map(|claim| claim.range.clone())).both(&Ranges::one(whole.clone()));
            here.bytes() / PAGE
        };
        assert!(!found.contains_key(&MmId(1)), "nobody is above us");
        assert_eq!((here(2, 1), here(3, 1)), (PAGES as u64 - 512, PAGES as u64 - 512));
        assert_eq!((here(2, 3), here(3, 2)), (0, 512));
        assert_eq!(find(&members[..1]).unwrap(), Claims::new());
    }
}
