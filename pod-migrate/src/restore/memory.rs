//! Making the maps of every process, each at its old address; [`super::pages`] fills them.
//!
//! All maps of a process are made in few tables of remote calls. Files come from the opener; memory that several
//! processes share is made by the first that maps it and opened by the others through /proc/PID/map_files, so that it
//! is the same object, unless it came ahead ([`super::premade`]); SysV segments are made by us and attached by each. vdso and vvar, which waited behind the stub,
//! go to where the program remembers them.

use super::Image;
use super::nursery::Laid;
use super::tree::Grown;
use crate::ids::{FileId, HostPid, MmId, PodPid, SharedMemoryId};
use crate::image::damaged;
use crate::objects::files::Opener;
use crate::objects::files::opener::Memory;
use crate::objects::memory::behind::can_wait;
use crate::objects::memory::forked::Claim;
use crate::objects::memory::ranges::Ranges;
use crate::objects::memory::{Backing, Map, MmState, SharedMemoryKind, SharedMemoryState};
use crate::objects::namespaces::ipc;
use crate::remote::plain::{Job, run_all};
use crate::remote::{Arg, RemoteCall};
use crate::{Doing, Problem, Result};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};

/// Largest address of a program, plus one.
pub(super) const TASK_SIZE: u64 = 0x7fff_ffff_f000;
/// What the kernel and the hardware let a program ask of a page.
const PROTECTIONS: u32 = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as u32;

/// Maps must be where maps can be, and name what is there.
pub(super) fn check(
    space: &MmState,
    shared: &BTreeMap<SharedMemoryId, SharedMemoryState>,
    known: impl Fn(&FileId) -> bool,
) -> Result<()> {
    let mut last = 0;
    for map in &space.maps {
        let wrong = |what: &str| damaged(format!("the map at {:#x} of memory {} {what}", map.start, space.id));
        if map.start < last || map.end <= map.start || map.end > TASK_SIZE || (map.start | map.end) & 0xfff != 0 {
            return Err(wrong("is not where a map can be"));
        }
        if map.guards.iter().any(|(start, end)| *start < map.start || start >= end || *end > map.end) {
            return Err(wrong("has guards that are not in it"));
        }
        let huge = map.huge.is_power_of_two() && (1 << 16..=1 << 40).contains(&map.huge);
        if map.huge != 0 && (!huge || (map.start | map.end) & (map.huge - 1) != 0 || map.backing != Backing::Anonymous)
        {
            return Err(wrong("has huge pages that cannot be"));
        }
        if map.protection & !PROTECTIONS != 0 {
            return Err(wrong("has no sensible protection"));
        }
        match &map.backing {
            Backing::File { file, offset } if !known(file) || offset & 0xfff != 0 => return Err(wrong("has no file")),
            Backing::Shared { memory, offset }
                if shared.get(memory).is_none_or(|state| state.bytes > TASK_SIZE) || offset & 0xfff != 0 =>
            {
                return Err(wrong("has no memory behind it"));
            }
            _ => {}
        }
        last = map.end;
    }
    Ok(())
}

/// Pages that came ahead are private and lie in maps that are.
pub(super) fn check_kept(space: &MmState, kept: &Ranges) -> Result<()> {
    match kept.without(&private(space, |_| true)).iter().next() {
        Some(outside) => {
            Err(damaged(format!("pages at {:#x} of memory {} are kept where no map is", outside.start, space.id)))
        }
        None if kept.iter().any(|range| (range.start | range.end) & 0xfff != 0) => {
            Err(damaged(format!("memory {} keeps parts of pages", space.id)))
        }
        None => Ok(()),
    }
}

/// What comes when the pod runs comes where it may, and has not come already.
pub(super) fn check_behind(space: &MmState, behind: &Ranges, kept: Option<&Ranges>) -> Result<()> {
    let wrong = |what: &str| Err(damaged(format!("memory {} has pages behind it {what}", space.id)));
    if behind.iter().any(|range| (range.start | range.end) & 0xfff != 0 || range.is_empty()) {
        return wrong("that are none");
    }
    if !behind.without(&can_wait(&space.maps)).is_empty() {
        return wrong("where none may be");
    }
    match kept.is_some_and(|kept| !kept.both(behind).is_empty()) {
        true => wrong("that came already"),
        false => Ok(()),
    }
}

/// What others have is what came for the one, and comes for the others only from there.
pub(super) fn check_claims(image: &Image, mm: MmId, claims: &[Claim]) -> Result<()> {
    let wrong = |what: &str| damaged(format!("memory {mm} has pages of others {what}"));
    let space = image.spaces.get(&mm).ok_or_else(|| wrong("and no maps"))?;
    let place =
        |claim: &Claim| claim.range.start < claim.range.end && (claim.range.start | claim.range.end) & 0xfff == 0;
    if !claims.iter().all(place) || claims.windows(2).any(|pair| pair[0].range.end > pair[1].range.start) {
        return Err(wrong("at places that are none"));
    }
    let ordinary = private(space, |map| map.huge == 0 && !map.droppable);
    let own = image.kept.get(&mm);
    for Claim { from, range } in claims {
        if *from == mm || !image.kept.get(from).is_some_and(|kept| kept.has(range)) {
            return Err(wrong("that the image does not have"));
        }
        if !ordinary.has(range) || own.is_some_and(|own| own.touches(range)) {
            return Err(wrong("where its own are, or none can be"));
        }
    }
    Ok(())
}

/// Where private maps of a space are, of those that are `such`.
fn private(space: &MmState, such: impl Fn(&Map) -> bool) -> Ranges {
    let is_private = |map: &&Map| !map.shared && matches!(map.backing, Backing::Anonymous | Backing::File { .. });
    Ranges::of(space.maps.iter().filter(is_private).filter(|map| such(map)).map(|map| map.start..map.end))
}

/// Makes everything but the contents. Returns what pages of shared memory are written to.
/// `premade` is shared memory that is there already.
pub(super) fn map_all(
    (image, premade): (&Image, Memory),
    grown: &mut Grown,
    laid: &BTreeMap<PodPid, Laid>,
    opener: &Opener,
) -> Result<BTreeMap<SharedMemoryId, File>> {
    let mut shared: BTreeMap<_, _> = premade.into_iter().map(|(id, fd)| (id, File::from(fd))).collect();
    let mut homes = Homes::new();
    for (id, state) in &image.shared {
        match &state.kind {
            SharedMemoryKind::Anonymous => {}
            SharedMemoryKind::Contents(file) => drop(shared.insert(*id, File::from(opener.contents(*file)?))),
            SharedMemoryKind::SysV { .. } => drop(shared.insert(*id, ipc::make_segment(init(grown)?.0, state)?)),
        }
    }
    let mut seen = BTreeMap::new();
    // Who maps memory that another brought into the world does so after him.
    let is_new = |state: &SharedMemoryState| !shared.contains_key(&state.id);
    let alone = image.shared.values().any(|state| state.kind == SharedMemoryKind::Anonymous && is_new(state));
    let mut jobs = Vec::new();
    for state in image.processes.values() {
        if let Some(other) = seen.insert(state.mm, state.pid) {
            let what = format!("processes {other} and {} share their memory without being threads", state.pid);
            return Err(Problem::new("E-SHARED-MEMORY-SPACE", what));
        }
        let stub = grown.stubs[&state.pid];
        let space = &image.spaces[&state.mm];
        let mut mapper = Mapper {
            image,
            grown,
            opener,
            homes: &mut homes,
            pid: state.pid,
            calls: Vec::new(),
            fds: BTreeMap::new(),
            space,
            laid: laid.get(&state.pid),
        };
        mapper.space()?;
        let mut calls = mapper.calls;
        if alone {
            stub.run(&mut calls)?;
            open_homes(&homes, state.pid, stub.task, &mut shared)?;
        } else {
            jobs.push(Job { stub, calls, space: state.pid.0 });
        }
    }
    run_all(&mut jobs)?;
    leave_homes(&homes, grown)?;
    ipc::remove_segments(init(grown)?.0, image.shared.values())?;
    Ok(shared)
}

fn init(grown: &Grown) -> Result<HostPid> {
    grown.stubs.get(&PodPid(1)).map(|stub| stub.task).ok_or_else(|| damaged("the image has no first process"))
}

/// Where a piece of shared anonymous memory came to be: all of it is mapped there.
#[derive(Debug, Clone, Copy)]
struct Home {
    pid: PodPid,
    start: u64,
    end: u64,
    /// In no map of the program, which has parts of it only: unmapped when everybody has his.
    passing: bool,
}

type Homes = BTreeMap<SharedMemoryId, Home>;

/// Opens shared anonymous memory that this process brought into the world, for its contents.
fn open_homes(homes: &Homes, pid: PodPid, task: HostPid, shared: &mut BTreeMap<SharedMemoryId, File>) -> Result<()> {
    for (memory, home) in homes.iter().filter(|(_, home)| home.pid == pid) {
        let path = format!("/proc/{task}/map_files/{:x}-{:x}", home.start, home.end);
        let file = OpenOptions::new().read(true).write(true).open(&path).doing(|| format!("open {path}"))?;
        shared.insert(*memory, file);
    }
    Ok(())
}

fn leave_homes(homes: &Homes, grown: &Grown) -> Result<()> {
    for home in homes.values().filter(|home| home.passing) {
        let args = vec![home.start.into(), (home.end - home.start).into()];
        grown.stubs[&home.pid].call(RemoteCall::new("unmap", libc::SYS_munmap, args))?;
    }
    Ok(())
}

/// The lowest gap of a space that holds so many bytes, clear of the engine's own maps.
fn hole(space: &MmState, grown: &Grown, homes: &Homes, pid: PodPid, bytes: u64) -> Option<u64> {
    const LOWEST: u64 = 1 << 20;
    /// A stack that grows down keeps its distance.
    const GUARD: u64 = 2 << 20;
    let mut taken: Vec<(u64, u64)> = space.maps.iter().map(|map| (map.start, map.end)).collect();
    taken.push((grown.base.0, grown.reserved_end()));
    taken.extend(homes.values().filter(|home| home.pid == pid).map(|home| (home.start, home.end)));
    taken.push((TASK_SIZE, TASK_SIZE));
    taken.sort_unstable();
    let mut free = LOWEST;
    for (start, end) in taken {
        if start.saturating_sub(free) >= bytes.checked_add(GUARD)? {
            return Some(free);
        }
        free = free.max(end);
    }
    None
}

/// Collects the calls for one process.
struct Mapper<'a> {
    image: &'a Image,
    grown: &'a Grown,
    opener: &'a Opener,
    homes: &'a mut Homes,
    pid: PodPid,
    space: &'a MmState,
    calls: Vec<RemoteCall>,
    /// Descriptors that the process has open for its maps.
    fds: BTreeMap<FileId, i32>,
    /// Memory that it has already.
    laid: Option<&'a Laid>,
}

impl Mapper<'_> {
    fn space(&mut self) -> Result<()> {
        let space = self.space;
        self.calls.push(open_opener(self.opener));
        self.calls.extend(self.laid.into_iter().flat_map(Laid::tidy));
        for map in &space.maps {
            match &map.backing {
                Backing::Anonymous => self.anonymous(map),
                Backing::File { file, offset } => self.file_map(map, *file, *offset)?,
                Backing::Shared { memory, offset } => self.shared(map, *memory, *offset)?,
                Backing::Vdso | Backing::Vvar => {}
            }
        }
        self.kernel_maps(space)?;
        self.calls.push(close_all());
        Ok(())
    }

    fn file(&mut self, file: FileId) -> Result<i32> {
        if let Some(fd) = self.fds.get(&file) {
            return Ok(*fd);
        }
        // 0 is the opener; descriptors are given out from below.
        let fd = 1 + self.fds.len() as i32;
        self.calls.push(take(self.opener, 0, file, fd)?);
        self.fds.insert(file, fd);
        Ok(fd)
    }

    /// What of a map is there already, if anything is, becomes a part of it; the rest.
    fn missing(&mut self, map: &Map) -> Ranges {
        let Some((there, missing)) = self.laid.map(|laid| laid.divide(map)) else {
            return Ranges::one(map.start..map.end);
        };
        self.calls.extend(there.iter().flat_map(|part| Laid::adopt(map, &part)));
        missing
    }

    fn anonymous(&mut self, map: &Map) {
        for part in self.missing(map).iter() {
            self.map(&Map { start: part.start, end: part.end, ..map.clone() }, -1, 0, libc::MAP_ANONYMOUS);
        }
        self.huge_pages(map);
    }

    fn file_map(&mut self, map: &Map, file: FileId, offset: u64) -> Result<()> {
        for part in self.missing(map).iter() {
            let fd = self.file(file)?;
            let offset = offset.wrapping_add(part.start - map.start);
            self.map(&Map { start: part.start, end: part.end, ..map.clone() }, fd, offset, 0);
        }
        Ok(())
    }

    fn map(&mut self, map: &Map, fd: i32, offset: u64, extra: i32) {
        let mut flags = extra | libc::MAP_FIXED_NOREPLACE;
        flags |= match (map.shared, map.droppable && knows_droppable()) {
            (true, _) => libc::MAP_SHARED,
            (false, true) => MAP_DROPPABLE,
            (false, false) => libc::MAP_PRIVATE,
        };
        if map.grows_down {
            flags |= libc::MAP_GROWSDOWN;
        }
        // Whether the host promises memory for all of it was settled when the program asked for it.
        if !map.shared && map.huge == 0 {
            flags |= libc::MAP_NORESERVE;
        }
        // A host that has too few says so now, not when a page is touched.
        if map.huge != 0 {
            flags |= libc::MAP_HUGETLB | ((map.huge.trailing_zeros() as i32) << libc::MAP_HUGE_SHIFT);
        }
        let args = vec![
            map.start.into(),
            (map.end - map.start).into(),
            u64::from(map.protection | if map.huge != 0 { FILLING } else { 0 }).into(),
            flags.into(),
            fd.into(),
            offset.into(),
        ];
        let call = RemoteCall::new(format!("map {:#x}", map.start), libc::SYS_mmap, args);
        self.calls.push(call.returns(map.start as i64));
    }

    /// Where the program asked for huge pages it gets them, which is decided when a page comes.
    fn huge_pages(&mut self, map: &Map) {
        if map.advice.contains(&libc::MADV_HUGEPAGE) && !self.image.processes[&self.pid].no_huge_pages {
            let args = vec![map.start.into(), (map.end - map.start).into(), libc::MADV_HUGEPAGE.into()];
            self.calls.push(RemoteCall::new("madvise", libc::SYS_madvise, args).may_fail());
        }
    }

    fn shared(&mut self, map: &Map, memory: SharedMemoryId, offset: u64) -> Result<()> {
        match &self.image.shared[&memory].kind {
            SharedMemoryKind::Contents(file) => {
                let fd = self.file(*file)?;
                self.map(map, fd, offset, 0);
            }
            SharedMemoryKind::SysV { shmid, .. } => self.attach(map, *shmid, offset, self.image.shared[&memory].bytes),
            SharedMemoryKind::Anonymous if self.opener.memory().contains_key(&memory) => {
                let number = self.opener.memory()[&memory];
                let fd = 1 + self.fds.len() as i32;
                let args = vec![0.into(), number.into(), 0.into()];
                let take = RemoteCall::new(format!("take shared memory {memory}"), libc::SYS_pidfd_getfd, args);
                self.calls.push(take.returns(fd.into()));
                self.map(map, fd, offset, 0);
                self.calls.push(RemoteCall::new("close shared memory", libc::SYS_close, vec![fd.into()]));
            }
            SharedMemoryKind::Anonymous => {
                let bytes = self.image.shared[&memory].bytes.next_multiple_of(4096);
                if !self.homes.contains_key(&memory) && offset == 0 && map.end - map.start == bytes {
                    let home = Home { pid: self.pid, start: map.start, end: map.end, passing: false };
                    self.homes.insert(memory, home);
                    self.map(map, -1, 0, libc::MAP_ANONYMOUS);
                    return Ok(());
                }
                let home = match self.homes.get(&memory) {
                    Some(home) => *home,
                    None => self.passing_home(memory, bytes)?,
                };
                self.share_home(map, home, offset);
            }
        }
        Ok(())
    }

    /// Nobody maps all of the memory in one piece, or others come first: it is made whole, beside the program's maps.
    fn passing_home(&mut self, memory: SharedMemoryId, bytes: u64) -> Result<Home> {
        let start = hole(self.space, self.grown, self.homes, self.pid, bytes).ok_or_else(super::no_room)?;
        let home = Home { pid: self.pid, start, end: start + bytes, passing: true };
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE | libc::MAP_NORESERVE;
        let args = vec![start.into(), bytes.into(), libc::PROT_NONE.into(), flags.into(), (-1).into(), 0.into()];
        self.calls.push(RemoteCall::new("map shared memory", libc::SYS_mmap, args).returns(start as i64));
        self.homes.insert(memory, home);
        Ok(home)
    }

    /// Opens memory that is mapped somewhere already.
    fn share_home(&mut self, map: &Map, home: Home, offset: u64) {
        let path = format!("/proc/{}/map_files/{:x}-{:x}\0", home.pid, home.start, home.end);
        let fd = 1 + self.fds.len() as i32;
        let args = vec![libc::AT_FDCWD.into(), Arg::In(path.into_bytes()), (libc::O_RDWR | libc::O_CLOEXEC).into()];
        self.calls.push(RemoteCall::new("open shared memory", libc::SYS_openat, args).returns(fd.into()));
        self.map(map, fd, offset, 0);
        self.calls.push(RemoteCall::new("close shared memory", libc::SYS_close, vec![fd.into()]));
    }

    /// shmat of the whole segment, then away with what this map does not cover.
    fn attach(&mut self, map: &Map, shmid: i32, offset: u64, bytes: u64) {
        let start = map.start.wrapping_sub(offset);
        let end = start.wrapping_add(bytes.next_multiple_of(4096));
        let mut flags = 0;
        if map.protection & libc::PROT_WRITE as u32 == 0 {
            flags |= libc::SHM_RDONLY;
        }
        if map.protection & libc::PROT_EXEC as u32 != 0 {
            flags |= libc::SHM_EXEC;
        }
        let args = vec![shmid.into(), start.into(), flags.into()];
        let call = RemoteCall::new(format!("attach segment {shmid}"), libc::SYS_shmat, args);
        self.calls.push(call.returns(start as i64));
        for (from, to) in [(start, map.start), (map.end, end)] {
            if from < to {
                self.calls.push(RemoteCall::new("unmap", libc::SYS_munmap, vec![from.into(), (to - from).into()]));
            }
        }
    }

    fn kernel_maps(&mut self, space: &MmState) -> Result<()> {
        let wanted: Vec<&Map> =
            space.maps.iter().filter(|map| matches!(map.backing, Backing::Vdso | Backing::Vvar)).collect();
        let ours = &self.grown.kernel_maps;
        if !wanted.is_empty() && !same_shape(&wanted, ours) {
            let what = format!("process {} uses a vDSO of another layout than this kernel's", self.pid);
            return Err(Problem::new("E-VDSO-LAYOUT", what)
                .fix("move it to a host that runs the same kernel, or a neighbouring version"));
        }
        for (index, (_, start, end)) in ours.iter().enumerate() {
            let bytes = end - start;
            let Some(map) = wanted.get(index) else {
                self.calls.push(RemoteCall::new("unmap", libc::SYS_munmap, vec![(*start).into(), bytes.into()]));
                continue;
            };
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            let args = vec![(*start).into(), bytes.into(), bytes.into(), flags.into(), map.start.into()];
            let call = RemoteCall::new("move the vdso", libc::SYS_mremap, args);
            self.calls.push(call.returns(map.start as i64));
        }
        Ok(())
    }
}

/// Huge pages are filled by writing: not even a tracer can write what the program may not.
const FILLING: u32 = (libc::PROT_READ | libc::PROT_WRITE) as u32;

const MAP_DROPPABLE: i32 = 8;

/// Since Linux 6.11; another kernel keeps such memory like any other.
fn knows_droppable() -> bool {
    let name = nix::sys::utsname::uname().ok();
    let release = name.as_ref().and_then(|name| name.release().to_str()).unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map(|word| word.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (6, 11)
}

/// The same sizes in the same order at the same distances.
fn same_shape(wanted: &[&Map], ours: &[(String, u64, u64)]) -> bool {
    let distance = |start: u64, first: u64| start.wrapping_sub(first);
    wanted.len() == ours.len()
        && wanted.iter().zip(ours).all(|(map, (name, start, end))| {
            map.end - map.start == end - start
                && distance(map.start, wanted[0].start) == distance(*start, ours[0].1)
                && (map.backing == Backing::Vdso) == (name == "[vdso]")
        })
}

/// A private map with nothing else to it.
pub(super) fn map_private(map: &Map, fd: i32, offset: u64) -> RemoteCall {
    let mut flags = libc::MAP_PRIVATE | libc::MAP_FIXED_NOREPLACE | libc::MAP_NORESERVE;
    if fd < 0 {
        flags |= libc::MAP_ANONYMOUS;
    }
    if map.grows_down {
        flags |= libc::MAP_GROWSDOWN;
    }
    let (start, bytes) = (map.start, map.end - map.start);
    let protection = u64::from(map.protection).into();
    let args = vec![start.into(), bytes.into(), protection, flags.into(), fd.into(), offset.into()];
    RemoteCall::new(format!("map {start:#x}"), libc::SYS_mmap, args).returns(start as i64)
}

/// The process's first descriptor: the opener.
pub(super) fn open_opener(opener: &Opener) -> RemoteCall {
    let args = vec![opener.pid().0.into(), 0.into()];
    RemoteCall::new("open the opener", libc::SYS_pidfd_open, args).returns(0)
}

/// Takes a file from the opener; it will be number `fd`.
pub(super) fn take(opener: &Opener, pidfd: i32, file: FileId, fd: i32) -> Result<RemoteCall> {
    let number = opener.numbers().get(&file);
    let number = *number.ok_or_else(|| damaged(format!("file {file} is named but was not opened")))?;
    let args = vec![pidfd.into(), number.into(), 0.into()];
    Ok(RemoteCall::new(format!("take file {file}"), libc::SYS_pidfd_getfd, args).returns(fd.into()))
}

pub(super) fn close_all() -> RemoteCall {
    let args = vec![0.into(), u64::from(u32::MAX).into(), 0.into()];
    RemoteCall::new("close everything", libc::SYS_close_range, args)
}

/// Advice and locks, which would cost or do harm before the pages are there.
pub(super) fn afterwards(space: &MmState) -> Vec<RemoteCall> {
    const MLOCK_ONFAULT: u64 = 1;
    const SYS_MSEAL: i64 = 462;
    const MADV_GUARD_INSTALL: i32 = 102;
    let mut calls = Vec::new();
    for map in &space.maps {
        let bytes = map.end - map.start;
        if map.huge != 0 && map.protection & FILLING != FILLING {
            let args = vec![map.start.into(), bytes.into(), u64::from(map.protection).into()];
            calls.push(RemoteCall::new("mprotect", libc::SYS_mprotect, args));
        }
        for advice in &map.advice {
            let args = vec![map.start.into(), bytes.into(), (*advice).into()];
            // A hint that this kernel does not know changes nothing that a program could see.
            calls.push(RemoteCall::new("madvise", libc::SYS_madvise, args).may_fail());
        }
        if let Some((mode, nodes)) = &map.policy {
            // Nodes that this host does not have: where memory comes from is nothing that a program can rely on.
            let nodes = [Arg::In(nodes.to_vec()), (nodes.len() as u64 * 8).into()];
            let [place, length, mode] = [map.start.into(), bytes.into(), (*mode).into()];
            let [nodes, count] = nodes;
            let args = vec![place, length, mode, nodes, count, 0.into()];
            calls.push(RemoteCall::new("set the memory policy of a map", libc::SYS_mbind, args).may_fail());
        }
        // What is locked takes no guards.
        for (start, end) in &map.guards {
            let args = vec![(*start).into(), end.wrapping_sub(*start).into(), MADV_GUARD_INSTALL.into()];
            calls.push(RemoteCall::new("install a guard region", libc::SYS_madvise, args));
        }
        if map.locked {
            let flags = if map.lock_on_fault { MLOCK_ONFAULT } else { 0 };
            let args = vec![map.start.into(), bytes.into(), flags.into()];
            calls.push(RemoteCall::new("mlock", libc::SYS_mlock2, args).may_fail());
        }
    }
    // The last of its maps: nothing of a sealed one can be changed any more.
    for map in space.maps.iter().filter(|map| map.sealed) {
        let args = vec![map.start.into(), (map.end - map.start).into(), 0.into()];
        calls.push(RemoteCall::new(format!("seal {:#x}", map.start), SYS_MSEAL, args));
    }
    if space.lock_future {
        let on_fault = if space.lock_future_on_fault { libc::MCL_ONFAULT } else { 0 };
        let flags = libc::MCL_FUTURE | on_fault;
        calls.push(RemoteCall::new("mlockall", libc::SYS_mlockall, vec![flags.into()]).may_fail());
    }
    calls
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::DAMAGED;
    use crate::restore::pages::tests::{map, space};

    #[test]
    fn only_pages_of_private_maps_are_kept() {
        let write = libc::PROT_READ | libc::PROT_WRITE;
        let shared = Map { shared: true, ..map(0x30000..0x40000, write) };
        let space = space(&[map(0x10000..0x20000, write), map(0x20000..0x30000, write), shared]);
        check_kept(&space, &Ranges::one(0x11000..0x2f000)).unwrap();
        check_kept(&space, &Ranges::default()).unwrap();
        for wrong in [0xf000..0x11000, 0x2f000..0x31000, 0x30000..0x31000, 0x11800..0x12000, 0..u64::MAX] {
            assert_eq!(check_kept(&space, &Ranges::one(wrong)).unwrap_err().code(), DAMAGED);
        }
    }

    #[test]
    fn only_what_came_for_another_is_inherited() {
        let write = libc::PROT_READ | libc::PROT_WRITE;
        let droppable = Map { droppable: true, ..map(0x30000..0x40000, write) };
        let maps = [map(0x10000..0x20000, write), map(0x20000..0x30000, libc::PROT_READ), droppable];
        let spaces = [1, 2].map(|id| (MmId(id), MmState { id: MmId(id), ..space(&maps) })).into();
        let kept = [(MmId(1), Ranges::one(0x10000..0x3f000)), (MmId(2), Ranges::one(0x18000..0x19000))].into();
        let image = Image { spaces, kept, ..Image::default() };
        let check = |mm: u64, claims: &[(u64, std::ops::Range<u64>)]| {
            let claim = |(from, range): &(u64, std::ops::Range<u64>)| Claim { from: MmId(*from), range: range.clone() };
            check_claims(&image, MmId(mm), &claims.iter().map(claim).collect::<Vec<_>>())
        };
        check(2, &[(1, 0x10000..0x12000), (1, 0x12000..0x18000), (1, 0x19000..0x30000)]).unwrap();
        for (mm, wrong) in [
            (3, vec![(1, 0x10000..0x11000)]),
            (1, vec![(1, 0x10000..0x11000)]),
            (2, vec![(2, 0x18000..0x19000)]),
            (2, vec![(3, 0x10000..0x11000)]),
            (2, vec![(1, 0xf000..0x11000)]),
            (2, vec![(1, 0x3e000..0x40000)]),
            (2, vec![(1, 0x30000..0x31000)]),
            (2, vec![(1, 0x17000..0x19000)]),
            (2, vec![(1, 0x12000..0x13000), (1, 0x10000..0x11000)]),
            (2, vec![(1, 0x10000..0x12000), (1, 0x11000..0x13000)]),
            (2, vec![(1, 0x11000..0x11000)]),
            (2, vec![(1, 0x11800..0x12000)]),
            (2, vec![(1, 0x10000..u64::MAX)]),
        ] {
            assert_eq!(check(mm, &wrong).unwrap_err().code(), DAMAGED, "{mm}: {wrong:?}");
        }
    }
}
