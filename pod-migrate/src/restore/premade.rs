//! Shared memory that comes while the pod still runs at its source: made before there are processes, filled where it stays,
//! and mapped by each that has it when they are made.
//!
//! Only what has no name and no number, which nobody can find before it is mapped.

use super::Image;
use super::check::MOST_SHARED;
use crate::ids::SharedMemoryId;
use crate::image::{Owner, PageBuffer, PageRun, Reader, Record, damaged};
use crate::objects::files::opener::Memory;
use crate::objects::memory::{MOST_AHEAD, SharedMemoryKind, SharedMemoryState};
use crate::{Doing, Result};
use pod_runtime::sys::memory;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;

/// What passes through the cache at once.
const PIECE: usize = 256 << 10;

#[derive(Debug, Default)]
pub(super) struct Premade(BTreeMap<SharedMemoryId, (File, u64)>);

impl Premade {
    /// Makes what a SHARED_MEMORY record says, all zeros.
    pub fn make(&mut self, record: &Record) -> Result<()> {
        let SharedMemoryState { id, bytes, kind } = record.state()?;
        if id.0 != record.id || kind != SharedMemoryKind::Anonymous || !(1..=MOST_SHARED).contains(&bytes) {
            return Err(damaged(format!("shared memory {id} is none that can come ahead")));
        }
        if self.0.len() == MOST_AHEAD || self.0.contains_key(&id) {
            return Err(damaged(format!("shared memory {id} comes ahead, after all there can be or twice")));
        }
        let file = memory::make_shared(bytes).doing(|| format!("make shared memory {id} of {bytes} bytes"))?;
        self.0.insert(id, (file, bytes));
        Ok(())
    }

    /// Takes the run of pages that the reader stands at.
    pub fn take<R: Read>(&self, id: SharedMemoryId, run: PageRun, reader: &mut Reader<R>) -> Result<()> {
        let Some((file, bytes)) = self.0.get(&id) else {
            return Err(damaged(format!("pages of shared memory {id}, which is not there")));
        };
        if run.address.checked_add(run.bytes).is_none_or(|end| end > *bytes) {
            return Err(damaged(format!("contents of {:?} beyond its {bytes} bytes", Owner::SharedMemory(id))));
        }
        reader.each_piece(run.address, &mut PageBuffer::new(PIECE), |at, pages| {
            file.write_all_at(pages, at).doing(|| format!("write contents of shared memory {id}"))
        })
    }

    /// What of it the image still has, for whoever maps it. A piece that is of another size or kind now is another one.
    pub fn of(&self, image: &Image) -> Result<Memory> {
        let mut there = Memory::new();
        for (id, (file, bytes)) in &self.0 {
            let Some(state) = image.shared.get(id) else { continue };
            if state.bytes != *bytes || state.kind != SharedMemoryKind::Anonymous {
                return Err(damaged(format!("shared memory {id} is not what came ahead under this number")));
            }
            there.insert(*id, file.try_clone().doing(|| "copy a descriptor".into())?.into());
        }
        Ok(there)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{DAMAGED, Kind, Writer};

    fn state(id: u64, bytes: u64, kind: SharedMemoryKind) -> SharedMemoryState {
        SharedMemoryState { id: SharedMemoryId(id), bytes, kind }
    }

    fn read(write: impl FnOnce(&mut Writer<Vec<u8>>), mut each: impl FnMut(&Record, &mut Reader<&[u8]>)) {
        let mut w = Writer::new(Vec::new());
        write(&mut w);
        let stream = w.finish().unwrap();
        let mut reader = Reader::new(&stream[..]).unwrap();
        while let Some(record) = reader.next().unwrap() {
            each(&record, &mut reader);
        }
    }

    #[test]
    fn what_came_last_is_there() {
        let mut premade = Premade::default();
        let put = |w: &mut Writer<Vec<u8>>| {
            w.put(Kind::SHARED_MEMORY, 1, &state(1, 5 << 20, SharedMemoryKind::Anonymous)).unwrap();
            for (address, byte) in [(0, 1u8), (4 << 20, 2), (0, 3)] {
                let run = PageRun { owner: Owner::SharedMemory(SharedMemoryId(1)), address, bytes: 8192 };
                w.pages(run, &[&[byte; 8192]]).unwrap();
            }
        };
        read(put, |record, reader| match record.run {
            Some(run) => premade.take(SharedMemoryId(1), run, reader).unwrap(),
            None => premade.make(record).unwrap(),
        });
        let shared = state(1, 5 << 20, SharedMemoryKind::Anonymous);
        let image = Image { shared: [(SharedMemoryId(1), shared)].into(), ..Image::default() };
        let there = File::from(premade.of(&image).unwrap().remove(&SharedMemoryId(1)).unwrap());
        let byte = |at| {
            let mut byte = [9];
            there.read_exact_at(&mut byte, at).unwrap();
            byte[0]
        };
        assert_eq!([0, 8191, 8192, 4 << 20, (5 << 20) - 1].map(byte), [3, 3, 0, 2, 0]);
        let name = std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&there))).unwrap();
        assert_eq!(name.to_str(), Some("/dev/zero (deleted)"), "as mmap makes it");
        assert!(premade.of(&Image::default()).unwrap().is_empty(), "what is gone meanwhile");
        for (bytes, kind) in
            [(6 << 20, SharedMemoryKind::Anonymous), (5 << 20, SharedMemoryKind::Contents(crate::ids::FileId(1)))]
        {
            let image = Image { shared: [(SharedMemoryId(1), state(1, bytes, kind))].into(), ..Image::default() };
            assert_eq!(premade.of(&image).unwrap_err().code(), DAMAGED);
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let mut premade = Premade::default();
        let anonymous = || SharedMemoryKind::Anonymous;
        let put = |w: &mut Writer<Vec<u8>>| {
            w.put(Kind::SHARED_MEMORY, 1, &state(1, 1 << 20, anonymous())).unwrap();
            w.put(Kind::SHARED_MEMORY, 1, &state(1, 1 << 20, anonymous())).unwrap();
            w.put(Kind::SHARED_MEMORY, 2, &state(3, 1 << 20, anonymous())).unwrap();
            w.put(Kind::SHARED_MEMORY, 4, &state(4, 0, anonymous())).unwrap();
            w.put(Kind::SHARED_MEMORY, 5, &state(5, u64::MAX, anonymous())).unwrap();
            w.put(Kind::SHARED_MEMORY, 6, &state(6, 4096, SharedMemoryKind::Contents(crate::ids::FileId(1)))).unwrap();
            for (id, address) in [(1, 1 << 20), (1, 1 << 46), (2, 0)] {
                let run = PageRun { owner: Owner::SharedMemory(SharedMemoryId(id)), address, bytes: 4096 };
                w.pages(run, &[&[1; 4096]]).unwrap();
            }
            for id in 100..100 + MOST_AHEAD as u64 {
                w.put(Kind::SHARED_MEMORY, id, &state(id, 4096, anonymous())).unwrap();
            }
        };
        let mut outcomes = Vec::new();
        read(put, |record, reader| {
            let done = match record.run {
                Some(run) => premade.take(SharedMemoryId(record.id), run, reader),
                None => premade.make(record),
            };
            outcomes.push(done.map_err(|problem| problem.code().to_owned()));
        });
        let bad = outcomes.iter().enumerate().filter(|(_, outcome)| outcome.is_err());
        let bad: Vec<usize> = bad.map(|(index, _)| index).collect();
        // The last is one more than there can be.
        assert_eq!(bad, [1, 2, 3, 4, 5, 6, 7, 8, 8 + MOST_AHEAD]);
        assert!(outcomes.iter().flat_map(|outcome| outcome.as_ref().err()).all(|code| *code == DAMAGED));
    }
}
