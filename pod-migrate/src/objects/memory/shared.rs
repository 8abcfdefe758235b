//! Shared anonymous memory while its pod runs: sent whole, then over and over what is another in it, by comparing it page by
//! page with what went out. When the pod stands still it is compared once more.
//!
//! There is no watching it as private memory is watched: the kernel notices writes by process, and a process that comes
//! to share it later, as each backend of a postgres does, would have to be stopped before its first one. To compare is to
//! read it, some 5 GiB a second and processor, and cannot miss anything.

use super::{MOST_AHEAD, SharedMemoryKind, SharedMemoryState};
use crate::crew;
use crate::digest::{Digest, ZEROS, digest};
use crate::ids::SharedMemoryId;
use crate::image::{Kind, Owner, PageRun, Writer};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use pod_runtime::proc::{self, maps};
use pod_runtime::{Doing, Result};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};

const PAGE: u64 = 4096;
/// Less is sent when the pod stands still: it takes less than a millisecond.
const LEAST: u64 = 1 << 20;
/// What a thread compares at once, and so many of that before what is another is sent.
const PART: u64 = 256 << 10;
const PARTS: usize = 64;

/// Device and inode: which memory it is, in all maps of it.
pub(super) type Key = (u32, u32, u64);

/// The shared memory of a pod that went ahead.
#[derive(Debug, Default)]
pub struct Sharing(BTreeMap<Key, Piece>);

#[derive(Debug)]
struct Piece {
    state: SharedMemoryState,
    source: File,
    /// What went out of each page.
    sent: Vec<Digest>,
}

/// Whether a map may be of such memory: a program may have mapped a part of it.
fn is_of_it(map: &maps::Map) -> bool {
    map.shared && map.name == super::dump::NAMELESS && map.bytes() >= LEAST / 16
}

impl Sharing {
    /// Whether a pod has any that is worth it, by a look from outside.
    pub fn pays(processes: &[i32]) -> bool {
        processes.iter().any(|host| maps_of(*host).iter().any(is_of_it))
    }

    /// Sends what of it is not as it was sent, at first everything. The pod, of which these are the processes now, runs. Returns
    /// how many bytes that were.
    pub fn pass(&mut self, processes: &[i32], w: &mut Writer<impl Write>) -> Result<u64> {
        for host in processes {
            for map in maps_of(*host).iter().filter(|map| is_of_it(map)) {
                self.meet(*host, map, w)?;
            }
        }
        let mut bytes = 0;
        for piece in self.0.values_mut() {
            bytes += piece.different(1, w)?;
        }
        w.flush()?;
        Ok(bytes)
    }

    /// Memory that was not there at the pass before; what cannot be opened is gone again.
    fn meet(&mut self, host: i32, map: &maps::Map, w: &mut Writer<impl Write>) -> Result<()> {
        let key = (map.device.0, map.device.1, map.inode);
        if self.0.contains_key(&key) || self.0.len() == MOST_AHEAD {
            return Ok(());
        }
        let Ok(source) = File::open(format!("/proc/{host}/map_files/{:x}-{:x}", map.start, map.end)) else {
            return Ok(());
        };
        let Ok(meta) = source.metadata() else { return Ok(()) };
        // The process may have something else there by now.
        let same = meta.ino() == map.inode && meta.len() >= LEAST;
        if !same {
            return Ok(());
        }
        let id = SharedMemoryId(self.0.len() as u64 + 1);
        let state = SharedMemoryState { id, bytes: meta.len(), kind: SharedMemoryKind::Anonymous };
        w.put(Kind::SHARED_MEMORY, id.0, &state)?;
        let sent = vec![ZEROS; state.bytes.div_ceil(PAGE) as usize];
        self.0.insert(key, Piece { state, source, sent });
        Ok(())
    }

    /// Under which number it went, if it did.
    pub(super) fn id(&self, key: &Key) -> Option<SharedMemoryId> {
        self.0.get(key).map(|piece| piece.state.id)
    }

    /// Numbers above this one are free.
    pub(super) fn last_id(&self) -> u64 {
        self.0.len() as u64
    }

    /// What of a piece is not as it was sent. The pod stands still.
    pub(super) fn rest(&mut self, key: &Key, w: &mut Writer<impl Write>) -> Result<()> {
        self.0.get_mut(key).map_or(Ok(0), |piece| piece.different(crew::cpus(), w)).map(drop)
    }
}

fn maps_of(host: i32) -> Vec<maps::Map> {
    maps::parse(&proc::read(format!("/proc/{host}/maps")).unwrap_or_default())
}

impl Piece {
    /// Sends the pages that are not as they were sent. Returns how many bytes that were.
    fn different(&mut self, hands: usize, w: &mut Writer<impl Write>) -> Result<u64> {
        let Piece { state, source, sent } = self;
        let mut bytes = 0;
        for parts in parts(source, state.bytes).chunks(PARTS) {
            w.breathe()?;
            let work = |at: usize| compare(source, &parts[at], sent);
            let found: Vec<Result<Vec<Different>>> =
                if hands == 1 { (0..parts.len()).map(work).collect() } else { crew::share(parts.len(), work) };
            let found = found.into_iter().collect::<Result<Vec<_>>>()?;
            for Different { first, digests, data } in found.into_iter().flatten() {
                let (owner, address) = (Owner::SharedMemory(state.id), first as u64 * PAGE);
                w.pages(PageRun { owner, address, bytes: data.len() as u64 }, &[&data])?;
                bytes += data.len() as u64;
                sent[first..first + digests.len()].copy_from_slice(&digests);
            }
        }
        Ok(bytes)
    }
}

/// Pages side by side that are not as they were.
struct Different {
    first: usize,
    digests: Vec<Digest>,
    data: Vec<u8>,
}

/// A part of the memory, and whether it is a hole.
struct Part {
    range: Range<u64>,
    hole: bool,
}

fn parts(source: &File, size: u64) -> Vec<Part> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < size {
        let data = match lseek(source, at as i64, Whence::SeekData) {
            Ok(data) => size.min(data as u64 & !(PAGE - 1)),
            Err(Errno::ENXIO) => size,
            // No holes known: all of it is data.
            Err(_) => at,
        };
        if data > at {
            found.push(Part { range: at..data, hole: true });
            at = data;
        }
        let end = size.min(at + PART);
        if at < end {
            found.push(Part { range: at..end, hole: false });
        }
        at = end;
    }
    found
}

fn compare(source: &File, part: &Part, before: &[Digest]) -> Result<Vec<Different>> {
    thread_local! {
        static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    let Part { range, hole } = part;
    let mut found: Vec<Different> = Vec::new();
    let mut note = |page: usize, digest: Digest, data: &[u8]| match found
        .last_mut()
        .filter(|last| last.first + last.digests.len() == page && last.data.len() < PART as usize)
    {
        Some(last) => {
            last.digests.push(digest);
            last.data.extend_from_slice(data);
        }
        None => found.push(Different { first: page, digests: vec![digest], data: data.to_vec() }),
    };
    let first = (range.start / PAGE) as usize;
    if *hole {
        // What had something and was given back.
        let pages = before[first..range.end.div_ceil(PAGE) as usize].iter().enumerate();
        for (n, _) in pages.filter(|(_, digest)| **digest != ZEROS) {
            let at = range.start + n as u64 * PAGE;
            note(first + n, ZEROS, &[0; PAGE as usize][..PAGE.min(range.end - at) as usize]);
        }
        return Ok(found);
    }
    let read = BUFFER.with_borrow_mut(|buffer| {
        buffer.resize(PART as usize, 0);
        let data = &mut buffer[..(range.end - range.start) as usize];
        source.read_exact_at(data, range.start)?;
        for (n, page) in data.chunks(PAGE as usize).enumerate() {
            let now = digest(page);
            if now != before[first + n] {
                note(first + n, now, page);
            }
        }
        std::io::Result::Ok(())
    });
    read.doing(|| "read shared memory".into())?;
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Reader;
    use nix::fcntl::{FallocateFlags, fallocate};
    use pod_runtime::sys::memory::make_shared;

    const BYTES: u64 = 3 * PART + 5 * PAGE;

    /// What the records make of memory that was as `there`.
    fn apply(stream: &[u8], there: &mut [u8]) -> usize {
        let mut reader = Reader::new(stream).unwrap();
        let mut came = 0;
        while let Some(record) = reader.next().unwrap() {
            let run = record.run.unwrap();
            let place = &mut there[run.address as usize..(run.address + run.bytes) as usize];
            came += place.len();
            assert_eq!(reader.read_pages(place).unwrap(), run.bytes as usize);
        }
        came
    }

    /// A piece that is written to, given back and compared at random is the same on the other side after each pass.
    #[test]
    fn what_is_another_makes_it_the_same() {
        let source = make_shared(BYTES).unwrap();
        let state = SharedMemoryState { id: SharedMemoryId(1), bytes: BYTES, kind: SharedMemoryKind::Anonymous };
        let sent = vec![ZEROS; BYTES.div_ceil(PAGE) as usize];
        let mut piece = Piece { state, source, sent };
        let (mut there, mut here) = (vec![0u8; BYTES as usize], vec![0u8; BYTES as usize]);
        let mut random = 7u64;
        let mut below = |n: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % n
        };
        for pass in 0..40 {
            for _ in 0..below(5) {
                let (at, bytes) = (below(BYTES), below(PART));
                match below(4) {
                    0 => {
                        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                        fallocate(&piece.source, hole, (at & !(PAGE - 1)) as i64, (bytes.max(1)) as i64).unwrap();
                    }
                    _ => piece.source.write_all_at(&vec![below(3) as u8; bytes.min(BYTES - at) as usize], at).unwrap(),
                }
            }
            piece.source.read_exact_at(&mut here, 0).unwrap();
            let mut w = Writer::new(Vec::new());
            let told = piece.different(1 + pass % 2, &mut w).unwrap();
            assert_eq!(apply(&w.finish().unwrap(), &mut there), told as usize);
            assert!(here == there, "pass {pass}");
            let more = piece.different(1, &mut Writer::new(Vec::new())).unwrap();
            assert_eq!(more, 0, "pass {pass}: nothing is sent twice");
        }
    }

    #[test]
    fn untouched_memory_is_no_work() {
        let source = make_shared(1 << 30).unwrap();
        source.write_all_at(b"x", 1 << 29).unwrap();
        let ranges: Vec<(Range<u64>, bool)> =
            parts(&source, 1 << 30).into_iter().map(|part| (part.range, part.hole)).collect();
        let data = (1 << 29)..(1 << 29) + PART;
        assert_eq!(ranges, [(0..data.start, true), (data.clone(), false), (data.end..1 << 30, true)]);
    }
}
