//! What processes have from one another since a fork, and how they come to have it again: the pages are put into a process
//! before it makes children, who inherit them.
//!
//! An image says of a space which pages are the same frames as those of another. Who makes whom when it is restored is
//! [`super::plan`]'s: so for each such page the topmost process is looked for from which all that have it descend ([`Plan`]).
//! That is the one that the page belongs to, as a rule; of pages that only siblings share, because their parent wrote
//! its copy since, it is the parent, who has it for as long as it makes children. A process keeps what it inherits where
//! the image says that it has it, and loses the rest ([`Laid`]), be it because the program gave it back or because its own
//! contents follow.
//!
//! What cannot be had in this way is a copy in the end: two things at one address of the same maker, maps that differ.
//! Nothing of it is decided by the image: an image that says strange things gets copies.

use super::plan::{self, Made};
use crate::ids::{FileId, MmId, PodPid};
use crate::objects::memory::forked::Claims;
use crate::objects::memory::ranges::Ranges;
use crate::objects::memory::{Backing, Map};
use crate::objects::task::{Life, Node};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::ops::Range;
use std::rc::Rc;

/// Steps that finding all of it may take, far above what real pods need: what is not found by then is copied.
const MOST_STEPS: usize = 1 << 27;

/// What a map is made of: pages are inherited by a map of the same kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Stuff {
    /// And the offset that address 0 would have.
    pub file: Option<(FileId, u64)>,
    pub grows_down: bool,
    pub huge_pages: bool,
}

impl Stuff {
    pub const PLAIN: Stuff = Stuff { file: None, grows_down: false, huge_pages: false };

    /// `None` of memory that is not inherited.
    fn of(map: &Map) -> Option<Stuff> {
        let file = match &map.backing {
            Backing::Anonymous => None,
            Backing::File { file, offset } => Some((*file, offset.wrapping_sub(map.start))),
            _ => return None,
        };
        let huge_pages = map.advice.contains(&libc::MADV_HUGEPAGE);
        let is_private = !map.shared && map.huge == 0 && !map.droppable;
        is_private.then_some(Stuff { file, grows_down: map.grows_down, huge_pages })
    }
}

/// What a process gets before it makes children.
#[derive(Debug, Default)]
pub(super) struct Sown {
    /// Maps that are to be there besides those that it has from its own maker, in order.
    pub maps: Vec<(Range<u64>, Stuff)>,
    /// All maps that pages come into.
    pub over: Vec<(Range<u64>, Stuff)>,
    /// The pages, in order, and whose they are.
    pub pages: Vec<(Range<u64>, MmId)>,
}

/// What a process has when all are made.
#[derive(Debug, Default)]
pub(super) struct Has {
    /// Parts of its maps that are there.
    pub maps: Ranges,
    /// Pages that are what they should be.
    pub pages: Ranges,
}

/// A range of a space that is to be copied from another.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Copied {
    pub to: MmId,
    pub from: MmId,
    pub range: Range<u64>,
}

#[derive(Debug, Default)]
pub(super) struct Heritage {
    pub sown: BTreeMap<PodPid, Sown>,
    /// Of every process that is made by one that had something.
    pub has: BTreeMap<PodPid, Has>,
    pub copied: Vec<Copied>,
}

impl Heritage {
    /// What is put at a place of a process that others, too, have something at.
    pub fn foreign(&self, pid: PodPid, mm: MmId) -> Ranges {
        let pages = self.sown.get(&pid).into_iter().flat_map(|sown| &sown.pages);
        Ranges::of(pages.filter(|(_, from)| *from != mm).map(|(range, _)| range.clone()))
    }
}

/// Of what is claimed, the bytes that will be shared after a restore.
pub(crate) fn kept<'a>(nodes: &[Node], maps: impl Fn(MmId) -> &'a [Map], claims: &Claims) -> u64 {
    if claims.is_empty() {
        return 0;
    }
    let living = nodes.iter().filter(|node| !matches!(node.life, Life::Zombie(_)));
    let spaces = living.map(|node| (node.pid, MmId(node.pid.0 as u64))).collect();
    let heritage = plan(nodes, &spaces, maps, claims, &Ranges::default());
    let all: u64 = claims.values().flatten().map(|claim| claim.range.end - claim.range.start).sum();
    let copied = heritage.copied.iter().map(|copied| copied.range.end - copied.range.start).sum();
    all.saturating_sub(copied)
}

/// Decides all of it; `spaces` are those of the processes, `there` what the first has already, of plain memory.
pub(super) fn plan<'a>(
    nodes: &[Node],
    spaces: &BTreeMap<PodPid, MmId>,
    maps: impl Fn(MmId) -> &'a [Map],
    claims: &Claims,
    there: &Ranges,
) -> Heritage {
    let Some(family) = Family::of(nodes, spaces) else { return Heritage::default() };
    if claims.is_empty() {
        return Heritage::default();
    }
    let maps = |member: usize| family.members[member].mm.map_or(&[][..], &maps);
    let mut plan = Plan {
        family: &family,
        claims,
        there,
        maps: &maps,
        steps: MOST_STEPS,
        wanted: BTreeMap::new(),
        lent: BTreeMap::new(),
    };
    plan.find_tops();
    plan.go_down()
}

/// Processes by number, makers before those that they make.
struct Family {
    members: Vec<Member>,
    by_mm: BTreeMap<MmId, usize>,
}

struct Member {
    pid: PodPid,
    mm: Option<MmId>,
    maker: Option<usize>,
    generation: usize,
}

impl Family {
    fn of(nodes: &[Node], spaces: &BTreeMap<PodPid, MmId>) -> Option<Family> {
        let made = plan::plan(nodes).ok()?;
        let mut by_maker: BTreeMap<Option<PodPid>, Vec<PodPid>> = BTreeMap::new();
        for node in nodes {
            let maker = match made.get(&node.pid)? {
                Made::Outside => None,
                Made::Early | Made::Late => Some(node.parent),
                Made::Orphan(session) if made.contains_key(session) => Some(*session),
                Made::Orphan(_) => Some(PodPid(1)),
            };
            by_maker.entry(maker).or_default().push(node.pid);
        }
        let member = |pid, maker, generation| Member { pid, mm: spaces.get(&pid).copied(), maker, generation };
        let roots = by_maker.remove(&None).unwrap_or_default();
        let mut members: Vec<Member> = roots.into_iter().map(|pid| member(pid, None, 0)).collect();
        let mut next = 0;
        // Whom nobody makes, for he would have to be there before himself, is not among them.
        while next < members.len() {
            let generation = members[next].generation + 1;
            let children = by_maker.remove(&Some(members[next].pid)).unwrap_or_default();
            members.extend(children.into_iter().map(|pid| member(pid, Some(next), generation)));
            next += 1;
        }
        let by_mm = members.iter().enumerate().filter_map(|(number, member)| Some((member.mm?, number))).collect();
        Some(Family { members, by_mm })
    }

    /// Who makes both, or makes the other.
    fn common(&self, mut one: usize, mut other: usize, steps: &mut usize) -> Option<usize> {
        while one != other {
            *steps = steps.checked_sub(1)?;
            let lower =
                if self.members[one].generation >= self.members[other].generation { &mut one } else { &mut other };
            *lower = self.members[*lower].maker?;
        }
        Some(one)
    }
}

/// What is to be put into a process for others.
#[derive(Default)]
struct Wanted {
    /// Whose pages: who has them himself comes before others.
    pages: Vec<(Range<u64>, (bool, usize))>,
    /// Whose maps they come into.
    members: Vec<usize>,
}

/// What a process has, and so all that it makes: both in order.
#[derive(Default)]
struct State {
    maps: Vec<(Range<u64>, Stuff)>,
    pages: Vec<(Range<u64>, usize)>,
}

struct Plan<'a, 'b> {
    family: &'b Family,
    claims: &'b Claims,
    there: &'b Ranges,
    maps: &'b dyn Fn(usize) -> &'a [Map],
    /// That are left.
    steps: usize,
    wanted: BTreeMap<usize, Wanted>,
    /// What others have of each.
    lent: BTreeMap<usize, Ranges>,
}

impl<'a> Plan<'a, '_> {
    /// For each page that somebody has from another the topmost process that all who have it descend from.
    fn find_tops(&mut self) {
        let mut by_donor: BTreeMap<usize, Vec<(Range<u64>, usize)>> = BTreeMap::new();
        let mut tops: BTreeMap<(usize, usize), Option<usize>> = BTreeMap::new();
        let mut heirs: BTreeMap<usize, Vec<(Range<u64>, usize)>> = BTreeMap::new();
        for (mm, claims) in self.claims {
            let Some(heir) = self.family.by_mm.get(mm) else { continue };
            for claim in claims {
                let Some(donor) = self.family.by_mm.get(&claim.from) else { continue };
                let (family, steps) = (self.family, &mut self.steps);
                let top = *tops.entry((*heir, *donor)).or_insert_with(|| family.common(*heir, *donor, steps));
                let Some(top) = top else { continue };
                by_donor.entry(*donor).or_default().push((claim.range.clone(), family.members[top].generation));
                heirs.entry(*donor).or_default().push((claim.range.clone(), *heir));
            }
        }
        for (donor, ranges) in by_donor {
            self.lent.insert(donor, Ranges::of_any(ranges.iter().map(|(range, _)| range.clone())));
            let tops: Vec<(Range<u64>, usize)> =
                least(ranges).into_iter().map(|(range, generation)| (range, self.above(donor, generation))).collect();
            let mut of_heirs = heirs.remove(&donor).unwrap_or_default();
            of_heirs.sort_unstable_by_key(|(range, _)| range.start);
            for (range, heir) in of_heirs {
                let first = tops.partition_point(|(top, _)| top.end <= range.start);
                for (_, top) in tops[first..].iter().take_while(|(top, _)| top.start < range.end) {
                    let members = &mut self.wanted.entry(*top).or_default().members;
                    members.extend([heir, donor]);
                }
            }
            for (range, top) in tops {
                self.wanted.entry(top).or_default().pages.push((range, (top != donor, donor)));
            }
        }
    }

    fn above(&mut self, mut member: usize, generation: usize) -> usize {
        while self.family.members[member].generation > generation {
            self.steps = self.steps.saturating_sub(1);
            let Some(maker) = self.family.members[member].maker else { break };
            member = maker;
        }
        member
    }

    /// From makers to those that they make.
    fn go_down(mut self) -> Heritage {
        let mut heritage = Heritage::default();
        let mut states: Vec<Rc<State>> = Vec::with_capacity(self.family.members.len());
        let nothing = Rc::new(State::default());
        for number in 0..self.family.members.len() {
            let member = &self.family.members[number];
            let before = member.maker.map_or(&nothing, |maker| &states[maker]).clone();
            let state = match self.wanted.remove(&number) {
                Some(wanted) => match self.sow(number, &before, wanted) {
                    Some((state, sown)) => {
                        heritage.sown.insert(member.pid, sown);
                        Rc::new(state)
                    }
                    None => before,
                },
                None => before,
            };
            if !state.maps.is_empty() {
                let has = self.has(number, &state);
                heritage.has.insert(member.pid, has);
            }
            self.copied(number, &state, &mut heritage.copied);
            states.push(state);
        }
        heritage
    }

    /// What a process has when it got what is wanted of it. Nothing that it has is replaced but pages by pages.
    fn sow(&mut self, number: usize, before: &State, wanted: Wanted) -> Option<(State, Sown)> {
        let Wanted { pages, mut members } = wanted;
        members.sort_unstable();
        members.dedup();
        let pages = least(pages);
        let places = Ranges::of(pages.iter().map(|(range, _)| range.clone()));
        let mut maps = Vec::new();
        for member in members {
            let all = (self.maps)(member);
            self.steps = self.steps.checked_sub(all.len())?;
            let touched = all.iter().filter(|map| places.touches(&(map.start..map.end)));
            maps.extend(touched.filter_map(|map| Some((map.start..map.end, Stuff::of(map)?))));
        }
        self.steps = self.steps.checked_sub(before.maps.len() + before.pages.len() + maps.len() + pages.len())?;
        let here = Ranges::of_any(maps.iter().map(|(range, _)| range.clone()));
        let there = match self.family.members[number].pid {
            PodPid(1) => self.there.both(&here),
            _ => Ranges::default(),
        };
        maps.extend(there.iter().map(|range| (range, Stuff::PLAIN)));
        let inherited = Ranges::of(before.maps.iter().map(|(range, _)| range.clone()));
        let maps: Vec<_> = least(maps)
            .into_iter()
            .flat_map(|(range, stuff)| parts(&Ranges::one(range).without(&inherited), stuff))
            .collect();
        let mut all: Vec<_> = before.maps.iter().cloned().chain(maps.iter().cloned()).collect();
        all.sort_unstable_by_key(|(range, _)| range.start);
        let all = least(all);
        // Only where the map is what it is to the one whose page it is.
        let mut sown = Vec::new();
        for (range, (_, donor)) in pages {
            let own = (self.maps)(donor);
            for map in &own[own.partition_point(|map| map.end <= range.start)..] {
                if map.start >= range.end {
                    break;
                }
                let Some(stuff) = Stuff::of(map) else { continue };
                let part = map.start.max(range.start)..map.end.min(range.end);
                sown.extend(parts_of(&all, part, stuff).into_iter().map(|part| (part, donor)));
            }
        }
        let replaced = Ranges::of(sown.iter().map(|(range, _)| range.clone()));
        let stay = before
            .pages
            .iter()
            .flat_map(|(range, donor)| parts(&Ranges::one(range.clone()).without(&replaced), *donor));
        let mut pages: Vec<_> = stay.chain(sown.iter().cloned()).collect();
        pages.sort_unstable_by_key(|(range, _)| range.start);
        let whose = |(range, donor): (Range<u64>, usize)| Some((range, self.family.members[donor].mm?));
        let sown = sown.into_iter().filter_map(whose).collect();
        let over = all.iter().filter(|(range, _)| replaced.touches(range)).cloned().collect();
        Some((State { maps: all, pages }, Sown { maps, over, pages: sown }))
    }

    /// What of a range a process has as the pages of another.
    fn pages_of(&mut self, state: &State, range: Range<u64>, donor: usize) -> Vec<Range<u64>> {
        let first = state.pages.partition_point(|(pages, _)| pages.end <= range.start);
        let over = state.pages[first..].iter().take_while(|(pages, _)| pages.start < range.end);
        let over: Vec<_> =
            over.map(|(pages, of)| (pages.start.max(range.start)..pages.end.min(range.end), *of)).collect();
        self.steps = self.steps.saturating_sub(over.len());
        over.into_iter().filter(|(_, of)| *of == donor).map(|(range, _)| range).collect()
    }

    /// What of what it should have a process has from its maker, and in a map that fits.
    fn right(&mut self, number: usize, state: &State, range: Range<u64>, donor: usize) -> Vec<Range<u64>> {
        let mut right = Vec::new();
        if state.pages.is_empty() || self.steps == 0 {
            return right;
        }
        let maps = (self.maps)(number);
        for map in &maps[maps.partition_point(|map| map.end <= range.start)..] {
            if map.start >= range.end {
                break;
            }
            let Some(stuff) = Stuff::of(map) else { continue };
            let part = map.start.max(range.start)..map.end.min(range.end);
            for pages in self.pages_of(state, part, donor) {
                right.extend(parts_of(&state.maps, pages, stuff));
            }
        }
        right
    }

    fn has(&mut self, number: usize, state: &State) -> Has {
        let mut pages = Vec::new();
        let member = &self.family.members[number];
        for claim in member.mm.and_then(|mm| self.claims.get(&mm)).into_iter().flatten() {
            if let Some(donor) = self.family.by_mm.get(&claim.from) {
                pages.extend(self.right(number, state, claim.range.clone(), *donor));
            }
        }
        for range in self.lent.get(&number).cloned().unwrap_or_default().iter() {
            pages.extend(self.right(number, state, range, number));
        }
        let pages = Ranges::of_any(pages);
        let mut maps = Vec::new();
        for map in (self.maps)(number).iter().filter(|map| pages.touches(&(map.start..map.end))) {
            if let Some(stuff) = Stuff::of(map) {
                maps.extend(parts_of(&state.maps, map.start..map.end, stuff));
            }
        }
        Has { maps: Ranges::of_any(maps), pages }
    }

    /// What is left to be copied.
    fn copied(&mut self, number: usize, state: &State, copied: &mut Vec<Copied>) {
        let Some(to) = self.family.members[number].mm else { return };
        for claim in self.claims.get(&to).into_iter().flatten() {
            let donor = self.family.by_mm.get(&claim.from).copied();
            let right = donor.map_or(Vec::new(), |donor| self.right(number, state, claim.range.clone(), donor));
            let left = Ranges::one(claim.range.clone()).without(&Ranges::of_any(right));
            copied.extend(left.iter().map(|range| Copied { to, from: claim.from, range }));
        }
    }
}

/// What of a range lies in maps of some stuff.
fn parts_of(maps: &[(Range<u64>, Stuff)], range: Range<u64>, stuff: Stuff) -> Vec<Range<u64>> {
    let first = maps.partition_point(|(map, _)| map.end <= range.start);
    let over = maps[first..].iter().take_while(|(map, _)| map.start < range.end);
    let such = over.filter(|(_, other)| *other == stuff);
    such.map(|(map, _)| map.start.max(range.start)..map.end.min(range.end)).collect()
}

fn parts<T: Copy>(ranges: &Ranges, of: T) -> Vec<(Range<u64>, T)> {
    ranges.iter().map(|range| (range, of)).collect()
}

/// At each address the least of those whose ranges cover it; neighbours that are the same become one.
fn least<T: Ord + Copy>(ranges: Vec<(Range<u64>, T)>) -> Vec<(Range<u64>, T)> {
    let mut begin: Vec<(Range<u64>, T)> = ranges.into_iter().filter(|(range, _)| range.start < range.end).collect();
    begin.sort_unstable_by_key(|(range, _)| range.start);
    let mut edges: Vec<u64> = begin.iter().flat_map(|(range, _)| [range.start, range.end]).collect();
    edges.sort_unstable();
    edges.dedup();
    let mut found: Vec<(Range<u64>, T)> = Vec::new();
    let mut open: BinaryHeap<Reverse<(T, u64)>> = BinaryHeap::new();
    let mut next = begin.into_iter().peekable();
    for pair in edges.windows(2) {
        while let Some((range, of)) = next.next_if(|(range, _)| range.start == pair[0]) {
            open.push(Reverse((of, range.end)));
        }
        while open.peek().is_some_and(|Reverse((_, end))| *end <= pair[0]) {
            open.pop();
        }
        let Some(Reverse((of, _))) = open.peek() else { continue };
        match found.last_mut() {
            Some((range, last)) if range.end == pair[0] && last == of => range.end = pair[1],
            _ => found.push((pair[0]..pair[1], *of)),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::memory::forked::Claim;
    use crate::restore::pages::tests::map;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const PAGE: u64 = 4096;

    fn node(pid: i32, parent: i32, session: i32) -> Node {
        Node {
            pid: PodPid(pid),
            parent: PodPid(parent),
            group: PodPid(1),
            session: PodPid(session),
            exit_signal: libc::SIGCHLD,
            life: Life::Running,
            threads: vec![PodPid(pid)],
            comm: Default::default(),
        }
    }

    fn maps_of(ranges: &[(u64, u64, bool)]) -> Vec<Map> {
        let one = |(start, pages, grows_down): &(u64, u64, bool)| Map {
            grows_down: *grows_down,
            ..map(start * PAGE..(start + pages) * PAGE, libc::PROT_READ)
        };
        ranges.iter().map(one).collect()
    }

    /// Who has the same page at which address: of each address a number for each process.
    fn claims_of(frames: &[Vec<Option<u8>>], maps: &[Vec<Map>]) -> Claims {
        let mut claims = Claims::new();
        for (page, frames) in frames.iter().enumerate() {
            let at = page as u64 * PAGE;
            let mut first: BTreeMap<u8, usize> = BTreeMap::new();
            for (process, frame) in frames.iter().enumerate() {
                let there = maps[process].iter().any(|map| map.start <= at && at < map.end);
                let Some(frame) = frame.filter(|_| there) else { continue };
                let donor = *first.entry(frame).or_insert(process);
                if donor != process {
                    let claim = Claim { from: MmId(donor as u64 + 1), range: at..at + PAGE };
                    claims.entry(MmId(process as u64 + 1)).or_default().push(claim);
                }
            }
        }
        claims
    }

    /// What a kernel would make of the plan: by page, what is mapped and whose page is there.
    type Memory = (BTreeMap<u64, Stuff>, BTreeMap<u64, MmId>);

    fn pages(range: &Range<u64>) -> impl Iterator<Item = u64> + use<> {
        range.clone().step_by(PAGE as usize)
    }

    fn grown(order: &[(PodPid, Option<PodPid>)], heritage: &Heritage) -> BTreeMap<PodPid, Memory> {
        let mut all: BTreeMap<PodPid, Memory> = BTreeMap::new();
        for (pid, maker) in order {
            let (mut maps, mut there) = maker.map(|maker| all[&maker].clone()).unwrap_or_default();
            if let Some(sown) = heritage.sown.get(pid) {
                for (range, stuff) in &sown.maps {
                    assert!(pages(range).all(|page| maps.insert(page, *stuff).is_none()), "a map over a map");
                }
                for (range, from) in &sown.pages {
                    for page in pages(range) {
                        let over = sown.over.iter().find(|(map, _)| map.contains(&page));
                        assert_eq!(over.map(|(_, stuff)| *stuff), maps.get(&page).copied());
                        assert!(over.is_some(), "pages come into maps");
                        there.insert(page, *from);
                    }
                }
            }
            all.insert(*pid, (maps, there));
        }
        all
    }

    /// That each process has what the plan says it has, and that all that is claimed is had or copied. Returns what is copied.
    fn verify(nodes: &[Node], maps: &[Vec<Map>], claims: &Claims, there: &Ranges) -> u64 {
        let spaces = nodes.iter().map(|node| (node.pid, MmId(node.pid.0 as u64))).collect();
        let heritage = plan(nodes, &spaces, |mm| &maps[mm.0 as usize - 1], claims, there);
        let family = Family::of(nodes, &spaces).unwrap();
        let order: Vec<_> = family
            .members
            .iter()
            .map(|member| (member.pid, member.maker.map(|maker| family.members[maker].pid)))
            .collect();
        let all = grown(&order, &heritage);
        let mut copied = 0;
        for (pid, (mapped, there)) in &all {
            let mm = MmId(pid.0 as u64);
            let has = heritage.has.get(pid);
            assert!(mapped.is_empty() == has.is_none(), "who has something is told what to keep of it");
            let kept: BTreeSet<u64> =
                has.iter().flat_map(|has| has.pages.iter()).flat_map(|range| pages(&range)).collect();
            for page in has.iter().flat_map(|has| has.maps.iter()).flat_map(|range| pages(&range)) {
                let own = maps[mm.0 as usize - 1].iter().find(|map| map.start <= page && page < map.end).unwrap();
                assert_eq!(mapped.get(&page).copied(), Stuff::of(own));
            }
            let mut wanted: BTreeMap<u64, MmId> = BTreeMap::new();
            for claim in claims.get(&mm).into_iter().flatten() {
                wanted.extend(pages(&claim.range).map(|page| (page, claim.from)));
            }
            for claim in claims.values().flatten().filter(|claim| claim.from == mm) {
                wanted.extend(pages(&claim.range).map(|page| (page, mm)));
            }
            for page in &kept {
                assert!(has.unwrap().maps.has(&(*page..page + PAGE)));
                assert_eq!(there.get(page), wanted.get(page), "page {page:x} of {pid}");
            }
            let copies: BTreeSet<u64> =
                heritage.copied.iter().filter(|one| one.to == mm).flat_map(|one| pages(&one.range)).collect();
            copied += copies.len() as u64;
            assert!(copies.is_disjoint(&kept));
            let claimed = wanted.iter().filter(|(_, from)| **from != mm).map(|(page, _)| *page);
            assert!(claimed.eq(copies.union(&kept).copied().filter(|page| wanted.get(page) != Some(&mm))));
        }
        copied
    }

    proptest! {
        #[test]
        fn everybody_has_what_the_plan_says(
            parents in proptest::collection::vec(0usize..8, 1..7),
            sessions in proptest::collection::vec(0usize..3, 7),
            layouts in proptest::collection::vec(proptest::collection::vec((0u64..4, 1u64..5, proptest::bool::weighted(0.2)), 1..3), 8),
            frames in proptest::collection::vec(proptest::collection::vec(proptest::option::of(0u8..3), 8), 16),
            there in (0u64..8, 0u64..8),
        ) {
            let mut nodes = vec![node(1, 0, 1)];
            for (number, parent) in parents.iter().enumerate() {
                let parent = (parent % nodes.len()) as i32 + 1;
                nodes.push(node(number as i32 + 2, parent, [1, 1, 77][sessions[number]]));
            }
            let maps: Vec<Vec<Map>> = layouts.iter().map(|layout| {
                let mut at = 0;
                let place = |(gap, bytes, down): &(u64, u64, bool)| { at += gap + bytes; (at - bytes, *bytes, *down) };
                maps_of(&layout.iter().map(place).collect::<Vec<_>>())
            }).collect();
            let frames: Vec<_> = frames.into_iter().map(|of| of[..nodes.len()].to_vec()).collect();
            let claims = claims_of(&frames, &maps);
            let plain = maps[0].iter().filter(|map| !map.grows_down).map(|map| map.start..map.end);
            let there = Ranges::of(plain).both(&Ranges::one(there.0 * PAGE..(there.0 + there.1) * PAGE));
            verify(&nodes, &maps, &claims, &there);
        }
    }

    /// Whom it is made for: a server with workers, one of whom has made another; all that differs was written by one of them.
    #[test]
    fn nothing_of_a_server_is_copied() {
        let nodes = [node(1, 0, 1), node(2, 1, 1), node(3, 2, 1), node(4, 2, 1), node(5, 3, 1)];
        let mut maps: Vec<Vec<Map>> = vec![maps_of(&[(0, 16, false)]); 5];
        maps[3] = maps_of(&[(0, 8, false), (9, 20, false)]);
        let frames: Vec<Vec<Option<u8>>> = [
            [None, Some(0), Some(0), Some(0), Some(0)],
            [None, Some(0), Some(1), Some(1), Some(1)],
            [None, Some(0), Some(1), Some(0), Some(1)],
            [Some(0), None, Some(0), Some(0), None],
            [Some(0), Some(1), Some(1), Some(2), Some(1)],
            [None, None, Some(0), Some(0), None],
        ]
        .iter()
        .map(|frames| frames.to_vec())
        .collect();
        let claims = claims_of(&frames, &maps);
        assert_eq!(verify(&nodes, &maps, &claims, &Ranges::default()), 0);
        // Here the second process would have to have two things at once, or one after the other.
        let between = vec![vec![Some(0), Some(1), Some(0), Some(1), Some(9)]];
        assert_eq!(verify(&nodes, &maps, &claims_of(&between, &maps), &Ranges::default()), 1);
    }

    #[test]
    fn the_least_of_those_that_cover_a_place() {
        let found = least(vec![(0..10, 3), (2..4, 1), (4..6, 1), (3..8, 2), (20..30, 1), (9..9, 0)]);
        assert_eq!(found, [(0..2, 3), (2..6, 1), (6..8, 2), (8..10, 3), (20..30, 1)]);
    }
}
