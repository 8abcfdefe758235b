//! Sealed memory (mseal, Linux 6.10): read-only data that nobody can change, unmap or make writable; guard regions (6.13);
//! memory that the kernel may drop (6.11).

use crate::sys::{Map, Region};
use crate::{Guest, sys};
use anyhow::{Result, ensure};
use libc::{MAP_PRIVATE, PROT_READ};

const SYS_MSEAL: i64 = 462;
const MADV_GUARD_INSTALL: i64 = 102;
const MAP_DROPPABLE: i32 = 8;
const PAGE: usize = 4096;

struct Sealed {
    memory: Region,
    /// This kernel has it.
    sealed: bool,
    guarded: Region,
    has_guards: bool,
    /// Absent where the kernel has none.
    _droppable: Option<Region>,
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let mut memory = Map::anonymous(3 * PAGE, MAP_PRIVATE).map()?;
    memory.write(PAGE, b"sealed");
    memory.protect(0, 3 * PAGE, PROT_READ)?;
    let sealed = sys::call(SYS_MSEAL, [memory.at() as i64, 3 * PAGE as i64, 0, 0, 0]).is_ok();
    let mut guarded = Map::anonymous(6 * PAGE, MAP_PRIVATE).map()?;
    guarded.write(0, &[7; 6 * PAGE]);
    let guard = [(guarded.at() + 2 * PAGE) as i64, PAGE as i64, MADV_GUARD_INSTALL, 0, 0];
    let has_guards = sys::call(libc::SYS_madvise, guard).is_ok();
    let droppable = Map::anonymous(PAGE, MAP_DROPPABLE).map().ok();
    Ok(Box::new(Sealed { memory, sealed, guarded, has_guards, _droppable: droppable }))
}

impl Guest for Sealed {
    fn verify(&mut self) -> Result<()> {
        ensure!(self.memory.read(PAGE, 6) == b"sealed", "other contents");
        if self.sealed {
            let writable = self.memory.protect(0, PAGE, PROT_READ | libc::PROT_WRITE);
            ensure!(writable.is_err(), "sealed memory was made writable");
        }
        for page in 0..6 {
            let guard = self.has_guards && page == 2;
            ensure!(self.guarded.readable(page * PAGE) != guard, "page {page} of 6, the third a guard");
            ensure!(guard || self.guarded.read(page * PAGE, 1) == [7], "beside a guard: other contents");
        }
        Ok(())
    }
}
