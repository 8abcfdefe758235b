//! Shared anonymous memory while its pod runs: sent whole, then over and over what is another in it, by comparing it page by
//! page with what went out. When the pod stands still it is compared once more.
//!
//! There is no watching it as private memory is watched: the kernel notices writes by process, and a process that comes
//! to share it later, as each backend of a postgres does, would have to be stopped before its first one. To compare is to
//! read it, some 5 GiB a second and processor, and cannot miss anything.

use super::{MOST_AHEAD, SharedMemoryKind, SharedMemoryState};
use crate::Result;
use crate::compare::{self, Digests, Found, Subject};
use crate::crew;
use crate::ids::SharedMemoryId;
use crate::image::{Kind, Owner, PageRun, Writer};
use pod_runtime::proc::{self, maps};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

/// Less is sent when the pod stands still: it takes less than a millisecond.
const LEAST: u64 = 1 << 20;
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
    /// What went out of each page.
    sent: Digests,
}

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
        let mut pieces: Vec<&mut Piece> = self.pieces.values_mut().collect();
        let (bytes, compared) = different(&mut pieces, 1, w)?;
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
        self.pieces.insert(key(map), Piece { state, source, sent: Digests::default() });
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

    /// What of these pieces is not as it was sent. The pod stands still.
    pub(super) fn rest(&mut self, keys: &BTreeSet<Key>, w: &mut Writer<impl Write>) -> Result<()> {
        let mut pieces: Vec<&mut Piece> =
            self.pieces.iter_mut().filter(|(key, _)| keys.contains(*key)).map(|(_, piece)| piece).collect();
        different(&mut pieces, crew::cpus(), w).map(drop)
    }
}

/// Sends what is not as it was sent. Returns how many bytes that were, and what the comparison took.
fn different(pieces: &mut [&mut Piece], hands: usize, w: &mut Writer<impl Write>) -> Result<(u64, Duration)> {
    let subjects: Vec<&Piece> = pieces.iter().map(|piece| &**piece).collect();
    let mut sent = 0;
    let (digests, took) = compare::compare(&subjects, hands, w, |index, found, w| {
        let Found::Run { at, bytes } = found else { return Ok(()) };
        let owner = Owner::SharedMemory(subjects[index].state.id);
        sent += bytes.len() as u64;
        w.pages(PageRun { owner, address: at, bytes: bytes.len() as u64 }, &[bytes])
    })?;
    pieces.iter_mut().zip(digests).for_each(|(piece, digests)| piece.sent = digests);
    Ok((sent, took))
}

fn maps_of(host: i32) -> Vec<maps::Map> {
    maps::parse(&proc::read(format!("/proc/{host}/maps")).unwrap_or_default())
}

impl Subject for Piece {
    const BLOCK: usize = 4096;
    const CODE: &'static str = "E-SYSTEM";

    fn open(&self) -> std::io::Result<File> {
        self.source.try_clone()
    }

    fn bytes(&self) -> u64 {
        self.state.bytes
    }

    fn before(&self) -> &Digests {
        &self.sent
    }

    fn name(&self) -> String {
        "shared memory".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Reader;
    use nix::fcntl::{FallocateFlags, fallocate};
    use pod_runtime::sys::memory::make_shared;
    use std::os::unix::fs::FileExt;

    const PAGE: u64 = 4096;
    const BYTES: u64 = (3 << 20) + 5 * PAGE;

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
        let mut piece = Piece { state, source, sent: Digests::default() };
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
                let (at, bytes) = (below(BYTES), below(1 << 20));
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
            let (told, _) = different(&mut [&mut piece], 1 + pass % 2, &mut w).unwrap();
            assert_eq!(apply(&w.finish().unwrap(), &mut there), told as usize);
            assert!(here == there, "pass {pass}");
            let (more, _) = different(&mut [&mut piece], 1, &mut Writer::new(Vec::new())).unwrap();
            assert_eq!(more, 0, "pass {pass}: nothing is sent twice");
        }
    }
}
