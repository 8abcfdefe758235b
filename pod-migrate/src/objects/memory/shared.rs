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
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

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
pub struct Sharing {
    pieces: BTreeMap<Key, Piece>,
    /// How many there were, also such as are gone: their numbers.
    met: u64,
    /// How long it took to compare all of it in the last pass.
    compared: Duration,
}

#[derive(Debug)]
struct Piece {
    state: SharedMemoryState,
    source: File,
    sent: Sent,
}

/// What went out of each page, by [`PART`]s of which some page was no zeros.
type Sent = BTreeMap<u64, Box<Digests>>;
type Digests = [Digest; (PART / PAGE) as usize];

/// Whether a map may be of such memory: a program may have mapped a part of it, and to look at the rest costs more than to send it.
fn is_of_it(map: &maps::Map) -> bool {
    map.shared && map.name == super::dump::NAMELESS && map.bytes() >= LEAST / 16
}

fn key(map: &maps::Map) -> Key {
    (map.device.0, map.device.1, map.inode)
}

impl Sharing {
    /// Whether a pod has any that is worth it, by a look from outside.
    pub fn pays(processes: &[i32]) -> bool {
        processes.iter().any(|host| maps_of(*host).iter().any(is_of_it))
    }

    /// Sends what of it is not as it was sent, at first everything. The pod, of which these are the processes now, runs. Returns
    /// how many bytes that were.
    pub fn pass(&mut self, processes: &[i32], w: &mut Writer<impl Write>) -> Result<u64> {
        let mut seen = BTreeSet::new();
        for host in processes {
            for map in maps_of(*host).iter().filter(|map| is_of_it(map)) {
                seen.insert(key(map));
                self.meet(*host, map, w)?;
            }
        }
        // What the pod has no more it must not be kept from giving back. (Who has it all the same has it from now on as memory
        // that did not go ahead.)
        self.pieces.retain(|key, _| seen.contains(key));
        let (mut bytes, mut compared) = (0, Duration::ZERO);
        for piece in self.pieces.values_mut() {
            let (sent, took) = piece.different(1, w)?;
            (bytes, compared) = (bytes + sent, compared + took);
        }
        self.compared = compared;
        w.flush()?;
        Ok(bytes)
    }

    /// How long the last pass took to compare all of it, and how long that takes once more when the pod stands still.
    pub fn compared(&self) -> (Duration, Duration) {
        (self.compared, self.compared / crew::cpus() as u32)
    }

    /// Memory that was not there at the pass before; what cannot be opened is gone again.
    fn meet(&mut self, host: i32, map: &maps::Map, w: &mut Writer<impl Write>) -> Result<()> {
        if self.pieces.contains_key(&key(map)) || self.met == MOST_AHEAD as u64 {
            return Ok(());
        }
        let Ok(source) = File::open(format!("/proc/{host}/map_files/{:x}-{:x}", map.start, map.end)) else {
            return Ok(());
        };
        let Ok(meta) = source.metadata() else { return Ok(()) };
        // The process may have something else there by now.
        if meta.ino() != map.inode || meta.len() < LEAST {
            return Ok(());
        }
        self.met += 1;
        let id = SharedMemoryId(self.met);
        let state = SharedMemoryState { id, bytes: meta.len(), kind: SharedMemoryKind::Anonymous };
        w.put(Kind::SHARED_MEMORY, id.0, &state)?;
        self.pieces.insert(key(map), Piece { state, source, sent: Sent::new() });
        Ok(())
    }

    /// Under which number it went, if it did. (A segment of System V has a number of its own, which may be the inode of another.)
    pub(super) fn id(&self, key: &Key, kind: &SharedMemoryKind) -> Option<SharedMemoryId> {
        self.pieces.get(key).map(|piece| &piece.state).filter(|state| state.kind == *kind).map(|state| state.id)
    }

    /// Numbers above this one are free.
    pub(super) fn last_id(&self) -> u64 {
        self.met
    }

    /// What of a piece is not as it was sent. The pod stands still.
    pub(super) fn rest(&mut self, key: &Key, w: &mut Writer<impl Write>) -> Result<()> {
        self.pieces.get_mut(key).map_or(Ok(()), |piece| piece.different(crew::cpus(), w).map(drop))
    }
}

fn maps_of(host: i32) -> Vec<maps::Map> {
    maps::parse(&proc::read(format!("/proc/{host}/maps")).unwrap_or_default())
}

impl Piece {
    /// Sends the pages that are not as they were sent. Returns how many bytes that were, and what the comparison took.
    fn different(&mut self, hands: usize, w: &mut Writer<impl Write>) -> Result<(u64, Duration)> {
        let Piece { state, source, sent } = self;
        let (mut bytes, mut compared) = (0, Duration::ZERO);
        for parts in parts(source, state.bytes, sent).chunks(PARTS) {
            w.breathe()?;
            let began = Instant::now();
            let work = |at: usize| compare(source, &parts[at], sent.get(&parts[at].number).map(|sent| &**sent));
            let found: Vec<Result<Vec<Different>>> =
                if hands == 1 { (0..parts.len()).map(work).collect() } else { crew::share(parts.len(), work) };
            let found = found.into_iter().collect::<Result<Vec<_>>>()?;
            compared += began.elapsed();
            for (part, found) in parts.iter().zip(found) {
                for Different { first, digests, data } in found {
                    let address = part.number * PART + first as u64 * PAGE;
                    let run = PageRun { owner: Owner::SharedMemory(state.id), address, bytes: data.len() as u64 };
                    w.pages(run, &[&data])?;
                    bytes += run.bytes;
                    let sent = sent.entry(part.number).or_insert_with(|| Box::new([ZEROS; (PART / PAGE) as usize]));
                    sent[first..first + digests.len()].copy_from_slice(&digests);
                }
                if part.hole {
                    sent.remove(&part.number);
                }
            }
        }
        Ok((bytes, compared))
    }
}

/// Pages of a part side by side that are not as they were.
struct Different {
    first: usize,
    digests: Vec<Digest>,
    data: Vec<u8>,
}

/// One [`PART`] of the memory, the last one shorter.
struct Part {
    number: u64,
    bytes: usize,
    /// There is nothing in it any more.
    hole: bool,
}

/// Where there is something, or was.
fn parts(source: &File, size: u64, sent: &Sent) -> Vec<Part> {
    let part = |number: u64, hole| Part { number, bytes: PART.min(size - number * PART) as usize, hole };
    let mut found = Vec::new();
    let (mut next, end) = (0, size.div_ceil(PART));
    while next < end {
        let data = match lseek(source, (next * PART) as i64, Whence::SeekData) {
            Ok(data) => end.min(data as u64 / PART),
            Err(Errno::ENXIO) => end,
            // No holes known: all of it is data.
            Err(_) => next,
        };
        found.extend(sent.range(next..data).map(|(number, _)| part(*number, true)));
        if data < end {
            found.push(part(data, false));
        }
        next = data + 1;
    }
    found
}

fn compare(source: &File, part: &Part, before: Option<&Digests>) -> Result<Vec<Different>> {
    thread_local! {
        static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    let mut found: Vec<Different> = Vec::new();
    let mut page = |number: usize, data: &[u8], now: Digest| {
        if now == before.map_or(ZEROS, |before| before[number]) {
            return;
        }
        match found.last_mut().filter(|last| last.first + last.digests.len() == number) {
            Some(last) => {
                last.digests.push(now);
                last.data.extend_from_slice(data);
            }
            None => found.push(Different { first: number, digests: vec![now], data: data.to_vec() }),
        }
    };
    let read = BUFFER.with_borrow_mut(|buffer| {
        buffer.resize(PART as usize, 0);
        let data = &mut buffer[..part.bytes];
        match part.hole {
            true => data.fill(0),
            false => source.read_exact_at(data, part.number * PART)?,
        }
        let pages = data.chunks(PAGE as usize).enumerate();
        pages.for_each(|(number, data)| page(number, data, digest(data)));
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
        let mut piece = Piece { state, source, sent: Sent::new() };
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
            let (told, _) = piece.different(1 + pass % 2, &mut w).unwrap();
            assert_eq!(apply(&w.finish().unwrap(), &mut there), told as usize);
            assert!(here == there, "pass {pass}");
            let (more, _) = piece.different(1, &mut Writer::new(Vec::new())).unwrap();
            assert_eq!(more, 0, "pass {pass}: nothing is sent twice");
        }
    }

    #[test]
    fn untouched_memory_is_no_work() {
        const HUGE: u64 = 1 << 44;
        let source = make_shared(HUGE).unwrap();
        let said = |sent: &Sent| -> Vec<(u64, usize, bool)> {
            parts(&source, HUGE, sent).into_iter().map(|part| (part.number, part.bytes, part.hole)).collect()
        };
        assert_eq!(said(&Sent::new()), []);
        source.write_all_at(b"x", HUGE / 2 + PAGE).unwrap();
        let data = (HUGE / 2 / PART, PART as usize, false);
        assert_eq!(said(&Sent::new()), [data]);
        // And what was there before and is given back.
        let sent = [3, data.0, HUGE / PART - 1].map(|number| (number, Box::new([1; 64]))).into();
        assert_eq!(said(&sent), [(3, PART as usize, true), data, (HUGE / PART - 1, PART as usize, true)]);
    }
}
