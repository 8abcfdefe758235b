//! memfds with seals: one that may not be written any more but through a map from before, one that is sealed altogether.

use crate::Guest;
use crate::sys::{Map, Region};
use anyhow::{Result, ensure};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

struct Sealed {
    /// F_SEAL_FUTURE_WRITE.
    later: File,
    map: Region,
    whole: File,
    rounds: u8,
}

const FUTURE_WRITE: SealFlag = SealFlag::from_bits_retain(16);

fn sealed(name: &str, contents: &[u8], seals: SealFlag, map: bool) -> Result<(File, Option<Region>)> {
    let file = File::from(memfd_create(name, MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC)?);
    file.write_all_at(contents, 0)?;
    let map = if map { Some(Map::of(file.as_raw_fd(), contents.len(), libc::MAP_SHARED).map()?) } else { None };
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok((file, map))
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let shape = SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK;
    let (later, map) = sealed("later", &[7; 8192], shape | FUTURE_WRITE, true)?;
    let all = shape | SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SEAL;
    let (whole, _) = sealed("whole", b"for ever", all, false)?;
    Ok(Box::new(Sealed { later, map: map.expect("it was asked for"), whole, rounds: 0 }))
}

impl Guest for Sealed {
    fn verify(&mut self) -> Result<()> {
        let seals = |file: &File| fcntl(file, FcntlArg::F_GET_SEALS).map(|seals| seals & 31);
        ensure!(seals(&self.later)? == 16 | 4 | 2, "seals of the first: {}", seals(&self.later)?);
        ensure!(seals(&self.whole)? == 8 | 4 | 2 | 1, "seals of the second: {}", seals(&self.whole)?);
        ensure!(self.later.write_at(b"x", 0).is_err(), "the first can be written");
        let map = Map::of(self.later.as_raw_fd(), 4096, libc::MAP_SHARED);
        ensure!(map.map().is_err(), "the first can be mapped for writing");
        self.rounds += 1;
        self.map.write(100, &[self.rounds]);
        let mut byte = [0];
        self.later.read_exact_at(&mut byte, 100)?;
        ensure!(byte == [self.rounds], "the map of the first is of something else");
        let mut text = [0; 8];
        self.whole.read_exact_at(&mut text, 0)?;
        ensure!(&text == b"for ever", "the second holds {text:?}");
        Ok(())
    }
}
