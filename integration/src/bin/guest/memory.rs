//! Memory: private and shared, anonymous and of files (also deleted ones), memfd, unreadable pages, holes, copy on write
//! after fork, a mapping that grows downwards, shared memory seen by a child.

use crate::sys::{Map, Region};
use crate::{Guest, sys};
use anyhow::{Result, ensure};
use libc::{MAP_GROWSDOWN, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, PROT_NONE};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

const PAGE: usize = 4096;
const MIB: usize = 1 << 20;

struct Memory {
    regions: Vec<(&'static str, Region, usize, u64)>,
    guarded: Region,
    memfd: File,
    child: UnixStream,
    shared: Region,
    /// A file of /etc, which is an overlay over an overlay in a pod on a host of the bed.
    layered: Region,
    round: u8,
}

const LAYERED: &str = "/etc/login.defs";

fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..bytes).map(|_| next()).collect()
}

fn file(path: &str, seed: u64, bytes: usize) -> Result<File> {
    let mut file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
    file.write_all(&pattern(seed, bytes))?;
    Ok(file)
}

/// Answers with the first byte of memory that it shares with its parent, and of memory that it does not.
fn child(mut link: UnixStream, shared: &Region, private: &Region) -> i32 {
    let mut byte = [0];
    while link.read_exact(&mut byte).is_ok() {
        if link.write_all(&[shared.read(0, 1)[0], private.read(0, 1)[0]]).is_err() {
            break;
        }
    }
    0
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let mut regions = Vec::new();
    let mut keep = |name, mut region: Region, bytes, seed, write: bool| {
        if write {
            region.write(0, &pattern(seed, bytes));
        }
        regions.push((name, region, bytes, seed));
    };
    let shared = Map::anonymous(4 * PAGE, MAP_SHARED).map()?;
    let mut private = Map::anonymous(PAGE, MAP_PRIVATE).map()?;
    private.write(0, &[77]);
    let (ours, theirs) = UnixStream::pair()?;
    let for_child = ours.try_clone()?;
    sys::fork(|| {
        drop(for_child);
        child(theirs, &shared, &private)
    })?;
    private.write(0, &[78]);
    // Enough for several threads to save and restore it.
    keep("private anonymous", Map::anonymous(24 * MIB, MAP_PRIVATE).map()?, 24 * MIB, 1, true);
    keep("shared anonymous", Map::anonymous(2 * MIB, MAP_SHARED).map()?, 2 * MIB, 2, true);
    keep("sparse", Map::anonymous(1 << 36, MAP_PRIVATE | MAP_NORESERVE).map()?, PAGE, 3, true);
    let huge = Map::anonymous(6 * MIB, MAP_PRIVATE).map()?;
    huge.advise(libc::MADV_HUGEPAGE)?;
    keep("huge pages", huge, 6 * MIB, 13, true);
    let mut constant = Map::anonymous(MIB, MAP_PRIVATE).map()?;
    constant.write(0, &pattern(14, MIB));
    constant.protect(0, MIB, libc::PROT_READ)?;
    keep("written once", constant, MIB, 14, false);
    keep("growing downwards", Map::anonymous(8 * PAGE, MAP_PRIVATE | MAP_GROWSDOWN).map()?, 8 * PAGE, 4, true);
    let kept = file("/var/tmp/guest-kept", 5, MIB)?;
    keep("file, private, written", Map::of(kept.as_raw_fd(), MIB, MAP_PRIVATE).map()?, MIB, 6, true);
    keep("file, private, only read", Map::of(kept.as_raw_fd(), MIB, MAP_PRIVATE).map()?, MIB, 7, false);
    let other = file("/var/tmp/guest-shared", 7, MIB)?;
    keep("file, shared", Map::of(other.as_raw_fd(), MIB, MAP_SHARED).map()?, MIB, 8, true);
    let gone = file("/var/tmp/guest-gone", 9, MIB)?;
    keep("deleted file, shared", Map::of(gone.as_raw_fd(), MIB, MAP_SHARED).map()?, MIB, 9, false);
    keep("deleted file, private", Map::of(gone.as_raw_fd(), MIB, MAP_PRIVATE).map()?, MIB, 10, true);
    std::fs::remove_file("/var/tmp/guest-gone")?;
    let mut memfd = File::from(nix::sys::memfd::memfd_create(c"guest", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?);
    memfd.write_all(&pattern(11, MIB))?;
    keep("memfd, shared", Map::of(memfd.as_raw_fd(), MIB, MAP_SHARED).map()?, MIB, 11, false);
    // The private mapping that was only read must show what the file holds, which is what seed 5 wrote.
    regions.iter_mut().filter(|(name, ..)| *name == "file, private, only read").for_each(|region| region.3 = 5);
    let mut guarded = Map::anonymous(3 * PAGE, MAP_PRIVATE).map()?;
    guarded.write(0, &pattern(12, 3 * PAGE));
    guarded.protect(PAGE, PAGE, PROT_NONE)?;
    let services = File::open(LAYERED)?;
    let bytes = services.metadata()?.len() as usize;
    let layered = Map { protection: libc::PROT_READ, ..Map::of(services.as_raw_fd(), bytes, MAP_PRIVATE) }.map()?;
    Ok(Box::new(Memory { regions, guarded, memfd, child: ours, shared, layered, round: 0 }))
}

impl Guest for Memory {
    fn verify(&mut self) -> Result<()> {
        for (name, region, bytes, seed) in &self.regions {
            ensure!(region.read(0, *bytes) == pattern(*seed, *bytes), "{name}: other contents");
        }
        let sparse = &self.regions[2].1;
        ensure!(sparse.read(1 << 35, PAGE) == vec![0; PAGE], "the middle of sparse memory is not zero");
        ensure!(!self.guarded.readable(PAGE), "an unreadable page is readable");
        ensure!(
            self.guarded.read(2 * PAGE, PAGE)[..] == pattern(12, 3 * PAGE)[2 * PAGE..],
            "after the guard: other contents"
        );
        self.guarded.protect(PAGE, PAGE, libc::PROT_READ)?;
        ensure!(
            self.guarded.read(PAGE, PAGE)[..] == pattern(12, 3 * PAGE)[PAGE..2 * PAGE],
            "behind the guard: other contents"
        );
        self.guarded.protect(PAGE, PAGE, PROT_NONE)?;
        let mut contents = vec![0; MIB];
        let layered = std::fs::read(LAYERED)?;
        ensure!(self.layered.read(0, layered.len()) == layered, "{LAYERED} is mapped with other contents");
        std::os::unix::fs::FileExt::read_exact_at(&self.memfd, &mut contents, 0)?;
        ensure!(contents == pattern(11, MIB), "the memfd's file has other contents");
        // What is shared stays shared, what was copied on write stays apart.
        self.round += 1;
        self.shared.write(0, &[self.round]);
        self.child.write_all(&[0])?;
        let mut answer = [0; 2];
        self.child.read_exact(&mut answer)?;
        ensure!(answer == [self.round, 77], "the child sees {answer:?}, not {:?}", [self.round, 77]);
        Ok(())
    }
}
