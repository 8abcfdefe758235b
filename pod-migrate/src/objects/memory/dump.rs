//! Reading address spaces: first their maps ([`Spaces::space`]), then, when all else has been said, their pages
//! ([`Spaces::pages`]).
//!
//! Private pages come by process_vm_readv in pieces of 1 MiB (which stay in the cache until they are written), only
//! those that PAGEMAP_SCAN says are there and not the file's own; pages of zeros are left out where nothing lies
//! below them. Shared memory without a name is read once, through its inode.

use super::{Backing, Layout, Map, MmState, SharedMemoryKind, SharedMemoryState};
use crate::freeze::Process;
use crate::ids::{FileId, HostPid, MmId, SharedMemoryId};
use crate::image::{Kind, Owner, PageRun, Writer};
use crate::objects::files::FilesDump;
use pod_runtime::proc::{self, maps, status};
use pod_runtime::sys::memory::{self, PageRegion};
use pod_runtime::{Doing, Problem, Result};
use serde_bytes::ByteBuf;
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Memory of a kind that is not saved: I/O rings, device memory, huge pages.
pub const KIND: &str = "E-MEMORY-KIND";

const PAGE: u64 = 4096;
const PIECE: u64 = 1 << 20;
const END_OF_USER: u64 = 0x7fff_ffff_f000;

/// Address spaces and shared memory of a frozen pod.
#[derive(Default)]
pub struct Spaces {
    /// A mapped file is the same file wherever it is mapped: device, inode, name, writable.
    files: BTreeMap<((u32, u32), u64, String, bool), FileId>,
    shared: BTreeMap<(u32, u32, u64), SharedMemory>,
    private: Vec<Private>,
}

struct SharedMemory {
    state: SharedMemoryState,
    source: File,
}

/// Pages of one space that are to be read.
struct Private {
    mm: MmId,
    host: i32,
    name: String,
    /// Where zero pages may be left out, and whether process_vm_readv can read there.
    places: Vec<Place>,
}

struct Place {
    range: Range<u64>,
    readable: bool,
    over_a_file: bool,
}

impl Spaces {
    /// Takes the maps of a process; `brk` is the end of its heap, `ours` a range that is not the program's.
    pub fn space(
        &mut self,
        process: &Process,
        brk: u64,
        ours: &Range<u64>,
        files: &mut FilesDump<'_>,
    ) -> Result<MmState> {
        let id = MmId(process.pid.0 as u64);
        let mut state = MmState {
            id,
            maps: Vec::new(),
            layout: layout(process, brk),
            auxv: ByteBuf::from(
                proc::bytes(process.proc("auxv")).doing(|| format!("read auxv of {}", process.name()))?,
            ),
            exe: self.exe(process, files)?,
            lock_future: false,
        };
        let mut places = Vec::new();
        for map in process.maps.iter().filter(|map| map.end <= ours.start || map.start >= ours.end) {
            self.one(process, map, &mut state, &mut places, files)?;
        }
        self.private.push(Private { mm: id, host: process.host.0, name: process.name(), places });
        Ok(state)
    }

    fn one(
        &mut self,
        process: &Process,
        map: &maps::Map,
        state: &mut MmState,
        places: &mut Vec<Place>,
        files: &mut FilesDump<'_>,
    ) -> Result<()> {
        if map.start >= map.end || map.name == "[vsyscall]" {
            return Ok(());
        }
        refuse(&process.name(), map)?;
        let backing = self.backing(process, map, files)?;
        let over_a_file = matches!(backing, Backing::File { .. });
        if !map.shared && (over_a_file || backing == Backing::Anonymous) {
            places.push(Place { range: map.start..map.end, readable: map.read, over_a_file });
        }
        state.maps.push(Map {
            start: map.start,
            end: map.end,
            protection: protection(map),
            shared: map.shared,
            grows_down: map.has(b"gd"),
            locked: map.has(b"lo"),
            no_reserve: map.has(b"nr"),
            advice: advice(map),
            protection_key: map.protection_key,
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
        if map.inode == 0 && !map.shared {
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
            let id = SharedMemoryId(self.shared.len() as u64 + 1);
            let kind = match kind {
                Nameless::Anonymous => SharedMemoryKind::Anonymous,
                Nameless::SysV => super::sysv::kind(process.host, map.inode as i32)?,
            };
            self.shared.insert(key, SharedMemory { state: SharedMemoryState { id, bytes, kind }, source });
        }
        Ok(Backing::Shared { memory: self.shared[&key].state.id, offset: map.offset })
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

    /// Segments that nobody has attached live on by themselves.
    pub fn unattached(&mut self, init: HostPid) -> Result<()> {
        for segment in super::sysv::unattached(init)? {
            let id = SharedMemoryId(self.shared.len() as u64 + 1);
            let state = SharedMemoryState { id, bytes: segment.bytes, kind: segment.kind };
            self.shared.entry(segment.key).or_insert(SharedMemory { state, source: segment.memory });
        }
        Ok(())
    }

    /// The SHARED_MEMORY records.
    pub fn records(&self, w: &mut Writer<impl Write>) -> Result<()> {
        self.shared.values().try_for_each(|memory| w.put(Kind::SHARED_MEMORY, memory.state.id.0, &memory.state))
    }

    /// The raw bytes of everything, in pieces.
    pub fn pages(self, w: &mut Writer<impl Write>) -> Result<()> {
        let mut buffer = vec![0u8; PIECE as usize];
        for space in &self.private {
            space.send(&mut buffer, w)?;
        }
        for memory in self.shared.values() {
            contents(&memory.source, memory.state.bytes, Owner::SharedMemory(memory.state.id), w)?;
        }
        Ok(())
    }
}

enum Nameless {
    Anonymous,
    SysV,
}

fn shared_kind(name: &str) -> Option<Nameless> {
    if name == "/dev/zero (deleted)" {
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

/// Memory of a living process that cannot be saved.
pub fn check(host: HostPid) -> Vec<Problem> {
    let read = |name: &str| {
        String::from_utf8_lossy(&fs::read(format!("/proc/{host}/{name}")).unwrap_or_default()).into_owned()
    };
    let status = status::parse(&read("status"));
    let name = format!("{} ({})", status.ns_tgid.last().unwrap_or(&0), read("comm").trim_end());
    maps::parse(&read("smaps")).iter().filter_map(|map| refuse(&name, map).err()).collect()
}

fn refuse(name: &str, map: &maps::Map) -> Result<()> {
    let why = if map.name.contains("io_uring]") {
        "a ring of io_uring"
    } else if map.name.starts_with("/[aio]") {
        "a ring of asynchronous I/O"
    } else if map.name.starts_with("/anon_hugepage") || map.has(b"ht") {
        "huge pages of hugetlbfs"
    } else if map.name.contains("[perf_event]") {
        "a buffer of perf"
    } else if map.name.starts_with("socket:[") {
        "a ring of a packet socket"
    } else if map.has(b"um") || map.has(b"uw") || map.has(b"ui") {
        "memory under userfaultfd"
    } else if map.has(b"sl") {
        "sealed memory (mseal)"
    } else if (map.has(b"io") || map.has(b"pf")) && !map.name.starts_with("[v") {
        "memory of a device"
    } else {
        return Ok(());
    };
    let what = format!("process {name} has {why} at {:x}, which cannot be saved", map.start);
    Err(Problem::new(KIND, what).fix("let the program do without (see `pod explain E-MEMORY-KIND`), or end it"))
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

impl Private {
    fn send(&self, buffer: &mut [u8], w: &mut Writer<impl Write>) -> Result<()> {
        let path = format!("/proc/{}/pagemap", self.host);
        let pagemap = File::open(&path).doing(|| format!("open {path}"))?;
        let regions = own_pages(&pagemap).or_else(|error| match error.raw_os_error() {
            // Before Linux 6.7.
            Some(libc::ENOTTY | libc::EINVAL) => {
                self.places.iter().try_fold(Vec::new(), |regions, place| own_pages_of(&pagemap, &place.range, regions))
            }
            _ => Err(error),
        });
        let regions = regions.doing(|| format!("find the pages of {}", self.name))?;
        let memory =
            File::open(format!("/proc/{}/mem", self.host)).doing(|| format!("open the memory of {}", self.name))?;
        let mut places = self.places.iter().peekable();
        for region in regions {
            let mut from = region.start;
            while from < region.end {
                while places.peek().is_some_and(|place| place.range.end <= from) {
                    places.next();
                }
                let Some(place) = places.peek() else { return Ok(()) };
                let start = from.max(place.range.start);
                let end = region.end.min(place.range.end);
                if start >= end {
                    break;
                }
                self.send_range(start..end, place, &memory, buffer, w)?;
                from = end;
            }
        }
        Ok(())
    }

    fn send_range(
        &self,
        range: Range<u64>,
        place: &Place,
        memory: &File,
        buffer: &mut [u8],
        w: &mut Writer<impl Write>,
    ) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let bytes = (range.end - at).min(PIECE) as usize;
            let piece = &mut buffer[..bytes];
            if place.readable { memory::read_exact(self.host, at, piece) } else { memory.read_exact_at(piece, at) }
                .doing(|| format!("read {bytes} bytes at {at:x} of {}", self.name))?;
            if place.over_a_file {
                w.pages(PageRun { owner: Owner::Mm(self.mm), address: at, bytes: bytes as u64 }, &[piece])?;
            } else {
                without_zeros(piece, at, Owner::Mm(self.mm), w)?;
            }
            at += bytes as u64;
        }
        Ok(())
    }
}

/// Pages that are the process's own: there (or swapped out), not a file's, not the shared page of zeros.
fn own_pages(pagemap: &File) -> std::io::Result<Vec<PageRegion>> {
    let there = memory::PAGE_IS_PRESENT | memory::PAGE_IS_SWAPPED;
    let not = memory::PAGE_IS_FILE | memory::PAGE_IS_PFNZERO;
    memory::scan_pages(pagemap, 0, END_OF_USER, there, not)
}

/// The same of one range by reading the table itself, eight bytes a page. The page of zeros looks like any other.
fn own_pages_of(pagemap: &File, range: &Range<u64>, mut found: Vec<PageRegion>) -> std::io::Result<Vec<PageRegion>> {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const OF_A_FILE: u64 = 1 << 61;
    let mut buffer = vec![0u8; 64 << 10];
    let mut at = range.start;
    while at < range.end {
        let pages = ((range.end - at) / PAGE).min(buffer.len() as u64 / 8);
        let entries = &mut buffer[..pages as usize * 8];
        pagemap.read_exact_at(entries, at / PAGE * 8)?;
        for entry in entries.chunks_exact(8) {
            let entry = u64::from_le_bytes(entry.try_into().expect("eight bytes"));
            if entry & (PRESENT | SWAPPED) != 0 && entry & OF_A_FILE == 0 {
                match found.last_mut() {
                    Some(last) if last.end == at => last.end += PAGE,
                    _ => found.push(PageRegion { start: at, end: at + PAGE, categories: 0 }),
                }
            }
            at += PAGE;
        }
    }
    Ok(found)
}

/// Sends runs of pages that are not all zero.
fn without_zeros(piece: &[u8], at: u64, owner: Owner, w: &mut Writer<impl Write>) -> Result<()> {
    let page = PAGE as usize;
    let is_zero = |from: usize| zero(&piece[from..(from + page).min(piece.len())]);
    let mut from = 0;
    while from < piece.len() {
        if is_zero(from) {
            from += page;
            continue;
        }
        let mut to = from + page;
        while to < piece.len() && !is_zero(to) {
            to += page;
        }
        let to = to.min(piece.len());
        let run = PageRun { owner, address: at + from as u64, bytes: (to - from) as u64 };
        w.pages(run, &[&piece[from..to]])?;
        from = to;
    }
    Ok(())
}

fn zero(page: &[u8]) -> bool {
    // Most pages show that they are not within the first bytes.
    page[..page.len().min(64)].iter().all(|byte| *byte == 0)
        && page.chunks(512).all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Sends what a file holds, without its holes and pages of zeros.
pub fn contents(source: &File, bytes: u64, owner: Owner, w: &mut Writer<impl Write>) -> Result<()> {
    use nix::unistd::{Whence, lseek};
    let mut buffer = vec![0u8; PIECE as usize];
    let mut at = 0;
    while at < bytes {
        let start = match lseek(source, at as i64, Whence::SeekData) {
            Ok(start) => start as u64 & !(PAGE - 1),
            Err(nix::Error::ENXIO) => break,
            // No holes known: all of it is data.
            Err(_) => at,
        };
        let end = lseek(source, start as i64, Whence::SeekHole).map_or(bytes, |end| (end as u64).min(bytes));
        let mut from = start.max(at);
        while from < end {
            let piece = &mut buffer[..(end - from).min(PIECE) as usize];
            source.read_exact_at(piece, from).doing(|| "read shared memory".into())?;
            without_zeros(piece, from, owner, w)?;
            from += piece.len() as u64;
        }
        at = end.max(at + 1);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_pages_are_seen() {
        let mut page = vec![0u8; 4096];
        assert!(zero(&page));
        page[4095] = 1;
        assert!(!zero(&page));
    }

    #[test]
    fn own_pages_of_ourselves() {
        let mut data = vec![0u8; 64 * 4096];
        let first = (data.as_ptr() as u64).next_multiple_of(4096);
        data[8192] = 7;
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let start = data.as_ptr() as u64 & !4095;
        let old = own_pages_of(&pagemap, &(start..start + 64 * 4096), Vec::new()).unwrap();
        assert!(old.iter().any(|region| region.start <= start + 8192 && start + 8192 < region.end));
        let Ok(regions) = own_pages(&pagemap) else { return };
        let touched = data.as_ptr() as u64 + 8192;
        assert!(regions.iter().any(|region| region.start <= touched && touched < region.end));
        let untouched = first + 40 * 4096;
        assert!(!regions.iter().any(|region| region.start <= untouched && untouched < region.end));
    }
}
