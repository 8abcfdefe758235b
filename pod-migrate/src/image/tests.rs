//! The stream as a whole: what is written is read, and every single damaged bit is found.

use super::*;
use crate::ids::{MmId, SharedMemoryId};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct State {
    name: String,
    numbers: Vec<u64>,
    #[serde(with = "serde_bytes")]
    bytes: Vec<u8>,
}

fn state() -> State {
    State { name: "web".into(), numbers: vec![1, u64::MAX], bytes: vec![7; 100] }
}

fn small_image(file: bool) -> Vec<u8> {
    let mut w = if file { Writer::aligned(Vec::new()) } else { Writer::new(Vec::new()) };
    w.put(Kind::SPEC, 0, &state()).unwrap();
    w.put(Kind::PROCESS, 41, &state()).unwrap();
    w.pages(PageRun { owner: Owner::Mm(MmId(3)), address: 0x7000_0000, bytes: 48 }, &[&[1; 16], &[], &[2; 32]])
        .unwrap();
    w.keep_alive().unwrap();
    w.pages(PageRun { owner: Owner::SharedMemory(SharedMemoryId(9)), address: 0, bytes: 0 }, &[]).unwrap();
    w.finish().unwrap()
}

/// Walks the whole stream as a restore does.
fn walk(bytes: &[u8]) -> Result<Vec<(Kind, u64, Vec<u8>)>> {
    let mut reader = Reader::new(bytes)?;
    let found = walk_reading(&mut reader)?;
    reader.nothing_after()?;
    Ok(found)
}

fn walk_reading<R: std::io::Read>(reader: &mut Reader<R>) -> Result<Vec<(Kind, u64, Vec<u8>)>> {
    let mut found = Vec::new();
    while let Some(record) = reader.next()? {
        let mut payload = record.payload().to_vec();
        if record.run.is_none() {
            record.state::<State>()?;
        }
        let mut piece = [0; 20];
        loop {
            let n = reader.read_pages(&mut piece)?;
            if n == 0 {
                break;
            }
            payload.extend_from_slice(&piece[..n]);
        }
        found.push((record.kind, record.id, payload));
    }
    Ok(found)
}

use pod_runtime::Result;

#[test]
fn what_is_written_is_read() {
    let found = walk(&small_image(false)).unwrap();
    let kinds: Vec<_> = found.iter().map(|f| (f.0, f.1)).collect();
    assert_eq!(kinds, [(Kind::SPEC, 0), (Kind::PROCESS, 41), (Kind::PAGES, 3), (Kind::SHARED_PAGES, 9)]);
    assert_eq!(found[2].2, [[1; 16].to_vec(), [2; 32].to_vec()].concat());
}

#[test]
fn every_flipped_bit_is_found() {
    let image = small_image(false);
    for at in 0..image.len() {
        for bit in 0..8 {
            let mut bad = image.clone();
            bad[at] ^= 1 << bit;
            let problem = walk(&bad).expect_err(&format!("bit {bit} of byte {at}"));
            assert!(problem.code() == DAMAGED || problem.code() == VERSION, "byte {at}: {}", problem.chain());
        }
    }
}

#[test]
fn every_truncation_is_found() {
    let image = small_image(true);
    for at in 0..image.len() {
        assert_eq!(walk(&image[..at]).expect_err("cut").code(), DAMAGED, "cut at {at}");
    }
    assert_eq!(walk(&[&image[..], &[0]].concat()).expect_err("longer").code(), DAMAGED);
}

#[test]
fn long_runs_lie_on_pages_of_the_file() {
    let pages = vec![5; 128 << 10];
    let mut w = Writer::aligned(Vec::new());
    for i in 0..4 {
        w.put(Kind::PROCESS, i, &state()).unwrap();
        w.pages(PageRun { owner: Owner::Mm(MmId(i)), address: i << 20, bytes: pages.len() as u64 }, &[&pages]).unwrap();
    }
    let file = w.finish().unwrap();
    assert!(verify(&file[..]).is_ok());
    let runs: Vec<_> =
        file.chunks(4096).enumerate().filter(|(_, c)| c.len() == 4096 && c.iter().all(|b| *b == 5)).collect();
    assert_eq!(runs.len(), 4 * 32, "each run starts on a page");
}

/// A file whose pages several threads wrote, and the file itself.
fn file_by_lanes() -> (Vec<u8>, std::fs::File) {
    let mut file = tempfile::tempfile().unwrap();
    let mut w = Writer::to_file(file.try_clone().unwrap()).unwrap();
    w.put(Kind::SPEC, 0, &state()).unwrap();
    let lanes = w.lanes().unwrap().unwrap();
    std::thread::scope(|scope| {
        for id in 0..4u64 {
            let lanes = &lanes;
            scope.spawn(move || {
                for (address, bytes) in [(0, 300), (4096, 70_000), (1 << 20, 0)] {
                    let data = vec![id as u8 + 1; bytes];
                    let run = PageRun { owner: Owner::Mm(MmId(id)), address, bytes: bytes as u64 };
                    lanes.put(&[(run, &data), (PageRun { address: 9, ..run }, &data)]).unwrap();
                }
            });
        }
    });
    lanes.finish().unwrap();
    w.put(Kind::IPC, 0, &state()).unwrap();
    w.finish().unwrap();
    let mut bytes = Vec::new();
    std::io::Seek::rewind(&mut file).unwrap();
    std::io::Read::read_to_end(&mut file, &mut bytes).unwrap();
    (bytes, file)
}

/// Walks a file as a restore does: pages are left where they are and read there.
fn walk_leaving(mut reader: Reader<std::fs::File>) -> Result<Vec<(Kind, u64, Vec<u8>)>> {
    let same = reader.file().unwrap().try_clone().unwrap();
    let mut found = Vec::new();
    let mut buffer = vec![0; 4096];
    while let Some(record) = reader.next()? {
        let mut payload = record.payload().to_vec();
        match reader.leave_pages()? {
            Some(waiting) => waiting.read(&same, &mut buffer, |at, piece| {
                assert_eq!(at, payload.len() as u64);
                payload.extend_from_slice(piece);
                Ok(())
            })?,
            None if record.run.is_none() => drop(record.state::<State>()?),
            None => assert_eq!(record.run.unwrap().bytes, 0),
        }
        found.push((record.kind, record.id, payload));
    }
    reader.nothing_after()?;
    Ok(found)
}

#[test]
fn what_many_threads_wrote_is_read_in_both_ways() {
    let (bytes, file) = file_by_lanes();
    let found = walk(&bytes).unwrap();
    assert_eq!(found.len(), 2 + 4 * 6);
    assert_eq!(found.last().unwrap().0, Kind::IPC);
    for (kind, id, payload) in &found {
        assert!(*kind != Kind::PAGES || payload.iter().all(|byte| u64::from(*byte) == id + 1));
    }
    let copy = || file.try_clone().unwrap();
    assert!(found == walk_leaving(Reader::of_file(copy()).unwrap()).unwrap());
    assert!(found == walk_leaving(Reader::of_verified_file(copy()).unwrap()).unwrap());
    assert!(found == walk_reading(&mut Reader::of_verified_file(copy()).unwrap()).unwrap());
    // Some of them read, some left, some passed over.
    let mut reader = Reader::of_verified_file(copy()).unwrap();
    let mut buffer = vec![0; 70_000];
    for (number, (kind, id, payload)) in found.iter().enumerate() {
        let record = reader.next().unwrap().unwrap();
        assert_eq!((record.kind, record.id), (*kind, *id));
        match number % 3 {
            _ if record.run.is_none() || payload.is_empty() => {}
            0 => {
                reader.read_pages(&mut buffer[..payload.len()]).unwrap();
                assert!(buffer[..payload.len()] == payload[..]);
            }
            1 => assert_eq!(reader.leave_pages().unwrap().unwrap().bytes(), payload.len() as u64),
            _ => assert_eq!(reader.pages_left(), payload.len() as u64),
        }
    }
    assert!(reader.next().unwrap().is_none());
    assert!(bytes.len() > 4 * 2 * 70_000);
}

#[test]
fn damage_is_found_though_pages_are_read_later() {
    use std::os::unix::fs::FileExt;
    let image = small_image(true);
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&image, 0).unwrap();
    let walk = || walk_leaving(Reader::of_file(file.try_clone().unwrap())?);
    let found = walk().unwrap();
    let pages = &found.iter().find(|found| found.0 == Kind::PAGES).unwrap().2;
    let place = image.windows(pages.len()).position(|window| window == &pages[..]).unwrap();
    for at in 0..image.len() {
        for bit in 0..8 {
            file.write_all_at(&[image[at] ^ (1 << bit)], at as u64).unwrap();
            let problem = walk().expect_err(&format!("bit {bit} of byte {at}"));
            assert!(problem.code() == DAMAGED || problem.code() == VERSION, "byte {at}: {}", problem.chain());
            let only_pages = (place..place + pages.len()).contains(&at);
            let verified = Reader::of_verified_file(file.try_clone().unwrap());
            assert_eq!(verified.is_ok(), only_pages, "byte {at}");
            if let Ok(mut reader) = verified {
                assert_eq!(walk_reading(&mut reader).expect_err("the pages are damaged").code(), DAMAGED);
            }
        }
        file.write_all_at(&image[at..=at], at as u64).unwrap();
    }
    for at in (0..image.len()).rev() {
        file.set_len(at as u64).unwrap();
        let cut = Reader::of_verified_file(file.try_clone().unwrap()).err().expect("it is cut");
        assert_eq!(cut.code(), DAMAGED, "cut at {at}");
    }
}

#[test]
fn hostile_lengths_cost_nothing() {
    for length in [u64::MAX, 1 << 63, MAX_RAW + 1, MAX_STATE + 1] {
        for kind in [Kind::PROCESS, Kind::PAGES] {
            let mut w = Writer::new(Vec::new());
            w.put(Kind::SPEC, 0, &state()).unwrap();
            let mut bytes = w.sink().unwrap().clone();
            let head = head::Head { kind, version: 1, flags: 0, id: 0, length, position: 0, checksum: 0 };
            bytes.extend_from_slice(&head.encode(1));
            assert_eq!(walk(&bytes).expect_err("length").code(), DAMAGED);
        }
    }
    // An address that would wrap.
    let mut w = Writer::new(Vec::new());
    let mut bytes = w.sink().unwrap().clone();
    let head =
        head::Head { kind: Kind::PAGES, version: 1, flags: 0, id: 0, length: 4096, position: u64::MAX, checksum: 0 };
    bytes.extend_from_slice(&head.encode(0));
    assert_eq!(walk(&bytes).expect_err("wrap").code(), DAMAGED);
}

#[test]
fn unknown_kinds_are_refused_unless_skippable() {
    let with = |flags| {
        let mut w = Writer::new(Vec::new());
        let mut bytes = w.sink().unwrap().clone();
        let head = head::Head {
            kind: Kind(999),
            version: 1,
            flags,
            id: 0,
            length: 0,
            position: 0,
            checksum: xxhash_rust::xxh3::xxh3_64(&[]),
        };
        bytes.extend_from_slice(&head.encode(0));
        Reader::new(&bytes[..]).unwrap().next().expect_err("no trailer")
    };
    let refused = with(0);
    assert_eq!(refused.code(), VERSION);
    assert!(refused.what().contains("kind 999"));
    assert_eq!(with(head::SKIPPABLE).code(), DAMAGED, "passed over, then the end is missing");
}

#[test]
fn later_versions_are_refused_by_name() {
    let read = |kind: Kind, version, flags| {
        let mut payload = Vec::new();
        ciborium::into_writer(&state(), &mut payload).unwrap();
        if kind.is_raw() && version == 2 {
            payload = Packer::new(1).unwrap().pack(&[7; 1000]).unwrap().unwrap().stored().to_vec();
        }
        let mut bytes = Writer::new(Vec::new()).sink().unwrap().clone();
        let (length, checksum) = (payload.len() as u64, xxhash_rust::xxh3::xxh3_64(&payload));
        let head = head::Head { kind, version, flags, id: 0, length, position: 0, checksum };
        bytes.extend_from_slice(&head.encode(0));
        bytes.extend_from_slice(&payload);
        Reader::new(&bytes[..]).unwrap().next().map(|record| record.map(|record| record.version))
    };
    for kind in kind::ALL.iter().copied().filter(|kind| ![Kind::PAD, Kind::END].contains(kind)) {
        let known = kind.version().unwrap();
        for version in 1..=known {
            assert_eq!(read(kind, version, 0).unwrap(), Some(version), "{kind}");
        }
        let refused = read(kind, known + 1, 0).unwrap_err();
        assert_eq!(refused.code(), VERSION, "{kind}");
        let says = format!("a {kind} record of version {}, and this pod knows it up to {known}", known + 1);
        assert!(refused.what().contains(&says), "{}", refused.what());
        if !kind.is_raw() {
            assert_eq!(read(kind, known + 1, head::SKIPPABLE).unwrap_err().code(), DAMAGED, "passed over, no trailer");
        }
    }
    assert_eq!(read(Kind::END, 2, 0).unwrap_err().code(), VERSION);
}

#[test]
fn records_are_written_in_the_version_of_their_kind() {
    let mut w = Writer::new(Vec::new());
    let kinds: Vec<Kind> =
        kind::ALL.iter().copied().filter(|k| !k.is_raw() && ![Kind::PAD, Kind::END].contains(k)).collect();
    kinds.iter().for_each(|kind| w.put(*kind, 0, &state()).unwrap());
    let image = w.finish().unwrap();
    let mut reader = Reader::new(&image[..]).unwrap();
    for kind in kinds {
        let record = reader.next().unwrap().unwrap();
        assert_eq!((record.kind, Some(record.version)), (kind, kind.version()));
    }
}

#[test]
fn deep_cbor_is_refused() {
    let mut deep = vec![0x81; 10_000];
    deep.push(0);
    let mut w = Writer::new(Vec::new());
    w.put(Kind::SPEC, 0, &Raw(deep)).unwrap();
    let image = w.finish().unwrap();
    let record = Reader::new(&image[..]).unwrap().next().unwrap().unwrap();
    assert!(record.state::<ciborium::Value>().is_ok(), "a byte string is not nesting");
    let mut cbor = vec![0x81; 10_000];
    cbor.push(0);
    let head = head::Head {
        kind: Kind::SPEC,
        version: 1,
        flags: 0,
        id: 0,
        length: cbor.len() as u64,
        position: 0,
        checksum: xxhash_rust::xxh3::xxh3_64(&cbor),
    };
    let mut bytes = Writer::new(Vec::new()).sink().unwrap().clone();
    bytes.extend_from_slice(&head.encode(0));
    bytes.extend_from_slice(&cbor);
    let record = Reader::new(&bytes[..]).unwrap().next().unwrap().unwrap();
    assert_eq!(record.state::<ciborium::Value>().unwrap_err().code(), DAMAGED);
}

struct Raw(Vec<u8>);

impl Serialize for Raw {
    fn serialize<S: serde::Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        s.serialize_bytes(&self.0)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_records_come_back(records in prop::collection::vec((0u64..9, prop::collection::vec(any::<u8>(), 0..40_000)), 0..12), file: bool) {
        let mut w = if file { Writer::aligned(Vec::new()) } else { Writer::new(Vec::new()) };
        for (id, bytes) in &records {
            w.pages(PageRun { owner: Owner::Mm(MmId(*id)), address: *id, bytes: bytes.len() as u64 }, &[bytes]).unwrap();
        }
        let image = w.finish().unwrap();
        let found = walk(&image).unwrap();
        prop_assert_eq!(found.len(), records.len());
        for (f, r) in found.iter().zip(&records) {
            prop_assert_eq!(f.1, r.0);
            prop_assert_eq!(&f.2, &r.1);
        }
    }

    #[test]
    fn noise_never_panics(noise in prop::collection::vec(any::<u8>(), 0..4096)) {
        let _ = walk(&noise);
        let mut image = small_image(false);
        let at = noise.len() % image.len();
        image.truncate(at);
        image.extend_from_slice(&noise);
        prop_assert!(walk(&image).is_err());
    }
}
