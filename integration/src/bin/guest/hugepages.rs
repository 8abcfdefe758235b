//! Huge pages of the process's own (MAP_HUGETLB): one that was written, one that was not, one that may only be read.

use crate::{Guest, sys};
use anyhow::{Result, ensure};

struct Huge {
    two: sys::Region,
    read: sys::Region,
}

const BYTES: usize = 2 << 20;

pub fn set_up() -> Result<Box<dyn Guest>> {
    let flags = libc::MAP_PRIVATE | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
    let mut two = sys::Map::anonymous(BYTES * 2, flags).map()?;
    let mut read = sys::Map::anonymous(BYTES, flags).map()?;
    two.write(BYTES - 1, b"7");
    read.write(4097, b"9");
    read.protect(0, BYTES, libc::PROT_READ)?;
    Ok(Box::new(Huge { two, read }))
}

impl Guest for Huge {
    fn verify(&mut self) -> Result<()> {
        ensure!(self.two.read(BYTES - 1, 1) == b"7", "the first page holds something else");
        ensure!(self.two.read(0, 1) == [0] && self.two.read(BYTES + 5, 1) == [0], "there is more");
        ensure!(self.read.read(4097, 1) == b"9", "the page that may be read holds something else");
        let smaps = std::fs::read_to_string("/proc/self/smaps")?;
        let huge = smaps.matches("KernelPageSize:     2048 kB").count();
        ensure!(huge == 2, "{huge} maps have huge pages");
        Ok(())
    }
}
