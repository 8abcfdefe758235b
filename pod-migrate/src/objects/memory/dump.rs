//! Reading address spaces: first their maps ([`Spaces::space`]), then, when all else has been said, their pages
//! ([`Spaces::pages`]). Shared memory without a name is read once, through its inode.

use super::behind::{self, Behind};
use super::forked::{self, Claims, Member};
use super::pages::{self, Contents};
use super::ranges::Ranges;
use super::shared::Key;
use super::{
    Backing, Inherited, Kept, Layout, Map, MmState, Policy, SharedMemoryKind, SharedMemoryState, Told, WentAhead,
};
use crate::freeze::Process;
use crate::ids::{FileId, HostPid, MmId, PodPid, SharedMemoryId};
use crate::image::{Kind, Owner, Writer};
use crate::objects::files::FilesDump;
use crate::objects::task::{ProcessState, Tree};
use crate::restore::heritage;
use pod_runtime::proc::{self, maps, status};
use pod_runtime::sys::memory;
use pod_runtime::{Doing, Problem, Result};
use serde_bytes::ByteBuf;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::ops::Range;

/// Memory of a kind that is not saved: I/O rings, device memory, huge pages.
pub const KIND: &str = "E-MEMORY-KIND";

/// Pages that are shared since a fork become copies.
pub const FORKED: &str = "W-FORK-SHARED";

/// So many ranges in a record: three megabytes at most.
const MOST_RANGES: usize = 100_000;
/// Less of a space is sent at once: it takes about as long as its record, and is wanted soon.
const LEAST_BEHIND: u64 = 256 << 10;

/// Address spaces and shared memory of a frozen pod.
pub struct Spaces<'a> {
    /// What was sent while the pod ran.
    ahead: &'a mut WentAhead,
    /// A mapped file is the same file wherever it is mapped: device, inode, name, writable.
    files: BTreeMap<((u32, u32), u64, String, bool), FileId>,
    shared: BTreeMap<(u32, u32, u64), SharedMemory>,
    private: Vec<Private>,
    /// Bytes that processes share since a fork.
    forked: u64,
    claims: Claims,
    /// What others have from each.
    lent: BTreeMap<MmId, Ranges>,
    /// The maps of all that have to do with it.
    related: BTreeMap<MmId, Vec<Map>>,
}

struct SharedMemory {
    state: SharedMemoryState,
    source: File,
}

/// Pages of one space that are to be read.
pub(super) struct Private {
    pub mm: MmId,
    pub host: i32,
    pub name: String,
    /// Where zero pages may be left out, and whether process_vm_readv can read there.
    pub places: Vec<Place>,
    /// Only these pages, when it is known which; else all that are its own.
    pub only: Option<Ranges>,
    /// Pages that come before all others, and those that do not come at all.
    pub early: Ranges,
    pub left_out: Ranges,
    /// Of a process that runs and shares pages since a fork: its memory, to be read through.
    pub gently: Option<File>,
    /// Where pages may come behind the pod.
    pub can_wait: Ranges,
}

pub(super) struct Place {
    pub range: Range<u64>,
    pub readable: bool,
    pub over_a_file: bool,
    /// Some of it other processes have too, since a fork.
    pub forked: bool,
}

impl<'a> Spaces<'a> {
    pub fn new(ahead: &'a mut WentAhead) -> Spaces<'a> {
        Spaces {
            ahead,
            files: BTreeMap::new(),
            shared: BTreeMap::new(),
            private: Vec::new(),
            forked: 0,
            claims: Claims::new(),
            lent: BTreeMap::new(),
            related: BTreeMap::new(),
        }
    }

    /// Finds what processes share since a fork, before their maps are taken.
    pub fn find_shared(&mut self, processes: &[Process]) -> Result<()> {
        if forked::bytes(processes.iter().flat_map(|process| &process.maps)) < forked::WORTH_IT {
            return Ok(());
        }
        let parents: BTreeMap<PodPid, PodPid> = processes.iter().map(|process| (process.pid, process.parent)).collect();
        // The kernel's trees have no circles.
        let generation = |pid: PodPid| std::iter::successors(parents.get(&pid), |parent| parents.get(parent)).count();
        let mut order: Vec<&Process> = processes.iter().collect();
        order.sort_by_cached_key(|process| (generation(process.pid), process.pid));
        let members = order.into_iter().map(|process| Member {
            mm: id_of(process.pid),
            host: process.host.0,
            maps: &process.maps,
        });
        self.claims = forked::find(&members.collect::<Vec<_>>())?;
        self.lent = forked::lent(&self.claims);
        Ok(())
    }

    /// Takes the maps of a process, of which the rest is known; `ours` is a range that is not the program's.
    pub fn space(
        &mut self,
        (process, known): (&Process, &ProcessState),
        told: Told,
        ours: &Range<u64>,
        files: &mut FilesDump<'_>,
    ) -> Result<MmState> {
        let id = id_of(process.pid);
        let mut state = MmState {
            id,
            maps: Vec::new(),
            layout: layout(process, told.brk),
            auxv: ByteBuf::from(
                proc::bytes(process.proc("auxv")).doing(|| format!("read auxv of {}", process.name()))?,
            ),
            exe: self.exe(process, files)?,
            lock_future: told.lock_future,
            lock_future_on_fault: told.lock_future_on_fault,
        };
        let mut places = Vec::new();
        for map in process.maps.iter().filter(|map| map.end <= ours.start || map.start >= ours.end) {
            self.one(process, map, told.policies.get(&map.start), &mut state, &mut places, files)?;
        }
        self.private.push(Private {
            mm: id,
            host: process.host.0,
            name: process.name(),
            places,
            only: None,
            early: Ranges::default(),
            left_out: Ranges::default(),
            gently: None,
            can_wait: match self.ahead.may_follow {
                true => behind::can_wait(&state.maps).without(&behind::touched(known)),
                false => Ranges::default(),
            },
        });
        if self.claims.contains_key(&id) || self.lent.contains_key(&id) {
            self.related.insert(id, state.maps.clone());
        }
        Ok(state)
    }

    fn one(
        &mut self,
        process: &Process,
        map: &maps::Map,
        policy: Option<&Policy>,
        state: &mut MmState,
        places: &mut Vec<Place>,
        files: &mut FilesDump<'_>,
    ) -> Result<()> {
        if map.start >= map.end || map.name == "[vsyscall]" {
            return Ok(());
        }
        let ours = map.has(b"uw") && self.ahead.private.as_ref().is_some_and(|ahead| ahead.watches(process.host, map));
        refuse(&process.name(), map, ours)?;
        self.forked += map.shared_since_fork();
        let backing = self.backing(process, map, files)?;
        let over_a_file = matches!(backing, Backing::File { .. });
        let guards = if map.has(b"gu") { guards(process, map)? } else { Vec::new() };
        let droppable = map.has(b"dp");
        if !map.shared && !droppable && (over_a_file || backing == Backing::Anonymous) {
            let ranges = between(map.start..map.end, &guards).into_iter();
            let forked = map.proportional < map.resident;
            places.extend(ranges.map(|range| Place { range, readable: map.read, over_a_file, forked }));
        }
        state.maps.push(Map {
            start: map.start,
            end: map.end,
            protection: protection(map),
            shared: map.shared,
            grows_down: map.has(b"gd"),
            locked: map.has(b"lo"),
            lock_on_fault: map.has(b"lf"),
            guards,
            droppable,
            sealed: map.has(b"sl") && !map.name.starts_with("[v"),
            no_reserve: map.has(b"nr"),
            advice: advice(map),
            protection_key: map.protection_key,
            huge: if is_own_huge(map) { map.page_bytes } else { 0 },
            policy: policy.cloned(),
            backing,
        });
        Ok(())
    }

    fn exe(&mut self, process: &Process, files: &mut FilesDump<'_>) -> Result<FileId> {
        let file = File::open(process.proc("exe")).doing(|| format!("open the program of {}", process.name()))?;
        files.path(file.into(), "program")
    }

    fn backing(&mut self, process: &Process, map: &maps::Map, files: &mut FilesDump<'_>) -> Result<Backing> {
        if map.name == "[vdso]" {
            return Ok(Backing::Vdso);
        }
        if map.name.starts_with("[vvar") {
            return Ok(Backing::Vvar);
        }
        if (map.inode == 0 && !map.shared) || is_own_huge(map) {
            return Ok(Backing::Anonymous);
        }
        let kind = match shared_kind(&map.name) {
            Some(kind) if map.shared => kind,
            _ => return self.file(process, map, files),
        };
        let key = (map.device.0, map.device.1, map.inode);
        if !self.shared.contains_key(&key) {
            let source = open_mapped(process, map, false)?;
            let bytes = source.metadata().doing(|| format!("look at {} of {}", map.name, process.name()))?.len();
            let kind = match kind {
                Nameless::Anonymous => SharedMemoryKind::Anonymous,
                Nameless::SysV => super::sysv::kind(process.host, map.inode as i32)?,
            };
            let id = self.shared_id(&key, &kind);
            self.shared.insert(key, SharedMemory { state: SharedMemoryState { id, bytes, kind }, source });
        }
        Ok(Backing::Shared { memory: self.shared[&key].state.id, offset: map.offset })
    }

    /// That under which it went ahead, or the next that is free.
    fn shared_id(&self, key: &Key, kind: &SharedMemoryKind) -> SharedMemoryId {
        let ahead = &self.ahead.shared;
        ahead.id(key, kind).unwrap_or(SharedMemoryId(ahead.last_id() + self.shared.len() as u64 + 1))
    }

    fn file(&mut self, process: &Process, map: &maps::Map, files: &mut FilesDump<'_>) -> Result<Backing> {
        let writable = map.shared && map.has(b"mw");
        let key = (map.device, map.inode, map.name.clone(), writable);
        let file = match self.files.get(&key) {
            Some(file) => *file,
            None => {
                let file = files.path(open_mapped(process, map, writable)?.into(), "mapped")?;
                self.files.insert(key, file);
                file
            }
        };
        Ok(Backing::File { file, offset: map.offset })
    }

    /// What will be needed more when processes no longer share what they have shared since a fork.
    pub fn shared_since_fork(&self, tree: &Tree) -> Option<Problem> {
        let maps = |mm: MmId| self.related.get(&mm).map_or(&[][..], |maps| maps);
        let kept = heritage::kept(&tree.processes, maps, &self.claims);
        shared_since_fork(self.forked.saturating_sub(kept))
    }

    /// Segments that nobody has attached live on by themselves.
    pub fn unattached(&mut self, init: HostPid) -> Result<()> {
        for segment in super::sysv::unattached(init)? {
            let id = self.shared_id(&segment.key, &segment.kind);
            let state = SharedMemoryState { id, bytes: segment.bytes, kind: segment.kind };
            self.shared.entry(segment.key).or_insert(SharedMemory { state, source: segment.memory });
        }
        Ok(())
    }

    /// The SHARED_MEMORY records.
    pub fn records(&self, w: &mut Writer<impl Write>) -> Result<()> {
        self.shared.values().try_for_each(|memory| w.put(Kind::SHARED_MEMORY, memory.state.id.0, &memory.state))
    }

    /// The INHERITED records, the pages that others have too, and the KEPT records: what of the pages that were sent ahead
    /// still holds, also of those that went out just now. What does not is to be sent.
    pub fn kept(&mut self, w: &mut Writer<impl Write>) -> Result<u64> {
        for (mm, claims) in &self.claims {
            for claims in claims.chunks(MOST_RANGES) {
                let range = |claim: &forked::Claim| (claim.from.0, claim.range.start, claim.range.end);
                w.put(Kind::INHERITED, mm.0, &Inherited { ranges: claims.iter().map(range).collect() })?;
            }
        }
        let mut kept = Vec::new();
        for space in &mut self.private {
            let claimed = self.claims.get(&space.mm).into_iter().flatten().map(|claim| claim.range.clone());
            let claimed = Ranges::of(claimed);
            let lent = self.lent.get(&space.mm).cloned().unwrap_or_default();
            let ahead = self
                .ahead
                .private
                .as_ref()
                .map(|ahead| ahead.kept(HostPid(space.host), &space.places))
                .transpose()?
                .flatten();
            let holds = match ahead {
                Some((holds, rest)) => {
                    let holds = holds.without(&claimed);
                    space.early = lent.without(&holds);
                    space.only = Some(rest.without(&claimed).without(&space.early));
                    holds.with(&space.early)
                }
                None => {
                    space.left_out = claimed.with(&lent);
                    space.early = lent.clone();
                    lent
                }
            };
            kept.push((space.mm, holds));
        }
        pages::send_early(&self.private, w)?;
        let follows = self.follow(w)?;
        for (mm, kept) in kept.iter().filter(|(_, kept)| !kept.is_empty()) {
            let ranges: Vec<(u64, u64)> = kept.iter().map(|range| (range.start, range.end)).collect();
            for ranges in ranges.chunks(MOST_RANGES) {
                w.put(Kind::KEPT, mm.0, &Kept { ranges: ranges.to_vec() })?;
            }
        }
        Ok(follows)
    }

    /// The BEHIND records: what is not sent now but brought when the pod runs.
    fn follow(&mut self, w: &mut Writer<impl Write>) -> Result<u64> {
        let mut bytes = 0;
        for space in &mut self.private {
            let Some(only) = &mut space.only else { continue };
            let follows = only.both(&space.can_wait);
            if follows.bytes() < LEAST_BEHIND {
                continue;
            }
            *only = only.without(&follows);
            bytes += follows.bytes();
            let ranges: Vec<(u64, u64)> = follows.iter().map(|range| (range.start, range.end)).collect();
            for ranges in ranges.chunks(MOST_RANGES) {
                w.put(Kind::BEHIND, space.mm.0, &Behind { ranges: ranges.to_vec() })?;
            }
        }
        Ok(bytes)
    }

    /// The raw bytes of everything, and after them `more`.
    pub fn pages(self, more: Vec<Contents>, w: &mut Writer<impl Write>) -> Result<()> {
        let mut whole = self.shared;
        let there = whole.extract_if(.., |key, memory| self.ahead.shared.id(key, &memory.state.kind).is_some());
        let there: BTreeSet<Key> = there.map(|(key, _)| key).collect();
        self.ahead.shared.rest(&there, w)?;
        let shared = whole.into_values().map(|SharedMemory { state, source }| Contents {
            source,
            bytes: state.bytes,
            owner: Owner::SharedMemory(state.id),
        });
        let contents: Vec<Contents> = shared.chain(more).collect();
        pages::send(&self.private, &contents, w)
    }
}

/// Shared anonymous memory, as maps name it.
pub(super) const NAMELESS: &str = "/dev/zero (deleted)";

enum Nameless {
    Anonymous,
    SysV,
}

fn shared_kind(name: &str) -> Option<Nameless> {
    if name == NAMELESS {
        Some(Nameless::Anonymous)
    } else if name.starts_with("/SYSV") && name.ends_with(" (deleted)") {
        Some(Nameless::SysV)
    } else {
        None
    }
}

fn open_mapped(process: &Process, map: &maps::Map, writable: bool) -> Result<File> {
    let path = process.proc(&format!("map_files/{:x}-{:x}", map.start, map.end));
    let file = OpenOptions::new().read(true).write(writable).open(path);
    file.doing(|| format!("open {} as {} has it mapped", map.name, process.name()))
}

/// Of processes that run: what would be lost, by what there is to see now.
pub fn downgrade(processes: &[HostPid]) -> Option<Problem> {
    let text = |host: &HostPid| fs::read(format!("/proc/{host}/smaps")).unwrap_or_default();
    let mut all: Vec<(i32, Vec<maps::Map>)> =
        processes.iter().map(|host| (host.0, maps::parse(&String::from_utf8_lossy(&text(host))))).collect();
    // Parents come before their children, but for the few whose numbers have begun anew; who is above whom changes nothing
    // about how much it is.
    all.sort_unstable_by_key(|(host, _)| *host);
    let members = all.iter().map(|(host, maps)| Member { mm: MmId(*host as u64), host: *host, maps });
    let claims = forked::find(&members.collect::<Vec<_>>()).unwrap_or_default();
    let bytes = forked::bytes(all.iter().flat_map(|(_, maps)| maps));
    shared_since_fork(bytes.saturating_sub(forked::claimed(&claims)))
}

/// The space of a process.
fn id_of(pid: PodPid) -> MmId {
    MmId(pid.0 as u64)
}

/// Every child of a shell shares a little.
fn shared_since_fork(bytes: u64) -> Option<Problem> {
    const WORTH_A_WORD: u64 = 4 << 20;
    (bytes >= WORTH_A_WORD).then(|| {
        let what = "processes share memory since they were forked, of which some will be copies: it takes";
        Problem::new(FORKED, format!("{what} {} MiB more", bytes >> 20))
    })
}

/// Memory of a living process that cannot be saved.
pub fn check(host: HostPid) -> Vec<Problem> {
    let read = |name: &str| {
        String::from_utf8_lossy(&fs::read(format!("/proc/{host}/{name}")).unwrap_or_default()).into_owned()
    };
    let status = status::parse(&read("status"));
    let name = format!("{} ({})", status.ns_tgid.last().unwrap_or(&0), read("comm").trim_end());
    maps::parse(&read("smaps")).iter().filter_map(|map| refuse(&name, map, false).err()).collect()
}

/// `ours`: a userfaultfd is on it because it is sent ahead.
fn refuse(name: &str, map: &maps::Map, ours: bool) -> Result<()> {
    let why = if map.name.contains("io_uring]") {
        "a ring of io_uring"
    } else if map.name.starts_with("/[aio]") {
        "a ring of asynchronous I/O"
    } else if map.has(b"ht") && !is_own_huge(map) {
        "huge pages of hugetlbfs that it shares"
    } else if map.name.contains("[perf_event]") {
        "a buffer of perf"
    } else if map.name.starts_with("socket:[") {
        "a ring of a packet socket"
    } else if map.has(b"um") || (map.has(b"uw") && !ours) || map.has(b"ui") {
        "memory under userfaultfd"
    } else if map.protection_key != 0 {
        "memory under a protection key"
    } else if (map.has(b"io") || map.has(b"pf")) && !map.name.starts_with("[v") {
        "memory of a device"
    } else {
        return Ok(());
    };
    let what = format!("process {name} has {why} at {:x}, which cannot be saved", map.start);
    Err(Problem::new(KIND, what).fix("let the program do without (see `pod explain E-MEMORY-KIND`), or end it"))
}

/// Huge pages that were asked for with MAP_HUGETLB and are nobody else's. The kernel shows them by a file of its own.
fn is_own_huge(map: &maps::Map) -> bool {
    map.has(b"ht") && !map.shared && map.name.starts_with("/anon_hugepage")
}

/// Guard regions of a map, which cannot be read and hold nothing.
fn guards(process: &Process, map: &maps::Map) -> Result<Vec<(u64, u64)>> {
    let doing = || format!("find the guard regions of {}", process.name());
    let pagemap = File::open(process.proc("pagemap")).doing(doing)?;
    let found = memory::scan_pages(&pagemap, map.start, map.end, memory::PAGE_IS_GUARD, 0).doing(doing)?;
    Ok(found.into_iter().map(|region| (region.start, region.end)).collect())
}

/// What of a range lies outside of others, which are in order.
fn between(range: Range<u64>, others: &[(u64, u64)]) -> Vec<Range<u64>> {
    let mut from = range.start;
    let mut left = Vec::new();
    for (start, end) in others.iter().copied().chain([(range.end, range.end)]) {
        if from < start {
            left.push(from..start);
        }
        from = from.max(end);
    }
    left
}

fn protection(map: &maps::Map) -> u32 {
    let bit = |set: bool, value: i32| if set { value as u32 } else { 0 };
    bit(map.read, libc::PROT_READ) | bit(map.write, libc::PROT_WRITE) | bit(map.execute, libc::PROT_EXEC)
}

fn advice(map: &maps::Map) -> Vec<i32> {
    const FLAGS: [(&[u8; 2], i32); 8] = [
        (b"dc", libc::MADV_DONTFORK),
        (b"wf", libc::MADV_WIPEONFORK),
        (b"mg", libc::MADV_MERGEABLE),
        (b"hg", libc::MADV_HUGEPAGE),
        (b"nh", libc::MADV_NOHUGEPAGE),
        (b"dd", libc::MADV_DONTDUMP),
        (b"sr", libc::MADV_SEQUENTIAL),
        (b"rr", libc::MADV_RANDOM),
    ];
    // The kernel itself marks its own maps (vDSO) with some of them.
    if map.name.starts_with("[v") {
        return Vec::new();
    }
    FLAGS.iter().filter(|(flag, _)| map.has(flag)).map(|(_, advice)| *advice).collect()
}

fn layout(process: &Process, brk: u64) -> Layout {
    let stat = &process.stat;
    Layout {
        start_code: stat.start_code,
        end_code: stat.end_code,
        start_data: stat.start_data,
        end_data: stat.end_data,
        start_brk: stat.start_brk,
        brk,
        start_stack: stat.start_stack,
        arg_start: stat.arg_start,
        arg_end: stat.arg_end,
        env_start: stat.env_start,
        env_end: stat.env_end,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guards_are_left_out() {
        assert_eq!(between(1..9, &[(0, 1)]).pop(), Some(1..9));
        assert_eq!(between(1..9, &[(1, 2), (4, 5), (5, 6), (8, 9)]), [2..4, 6..8]);
        assert!(between(1..9, &[(1, 9)]).is_empty());
    }
}
