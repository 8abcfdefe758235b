//! Shared anonymous memory of which a process has parts: without its beginning, without its end, twice, in pieces of
//! another protection; and all of it in a child.

use crate::sys::{Map, Region};
use crate::{Guest, sys};
use anyhow::{Context, Result, ensure};
use libc::{MAP_SHARED, PROT_READ};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

const PAGE: usize = 4096;

struct Parts {
    middle: Region,
    pieces: Region,
    again: Region,
    child: UnixStream,
    round: u8,
}

/// Answers with a byte of each page of memory that its parent has only the middle of.
fn child(mut link: UnixStream, all: &Region) -> i32 {
    let mut byte = [0];
    while link.read_exact(&mut byte).is_ok() {
        let pages: Vec<u8> = (0..8).map(|page| all.read(page * PAGE, 1)[0]).collect();
        if link.write_all(&pages).is_err() {
            break;
        }
    }
    0
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let mut all = Map::anonymous(8 * PAGE, MAP_SHARED).map()?;
    // The first page and the last stay untouched.
    (1..7).for_each(|page| all.write(page * PAGE, &[page as u8]));
    let (ours, theirs) = UnixStream::pair()?;
    let for_child = ours.try_clone()?;
    sys::fork(|| {
        drop(for_child);
        child(theirs, &all)
    })?;
    let middle = all.keep(2 * PAGE, 4 * PAGE)?;
    let mut pieces = Map::anonymous(3 * PAGE, MAP_SHARED).map()?;
    pieces.write(PAGE, &[99]);
    let again = pieces.twice()?;
    pieces.protect(PAGE, PAGE, PROT_READ)?;
    Ok(Box::new(Parts { middle, pieces, again, child: ours, round: 0 }))
}

impl Guest for Parts {
    fn verify(&mut self) -> Result<()> {
        self.round += 1;
        let before = self.middle.read(0, 1)[0];
        ensure!(before == if self.round == 1 { 2 } else { self.round + 99 }, "the middle begins with {before}");
        self.middle.write(0, &[self.round + 100]);
        self.child.write_all(&[0])?;
        let mut pages = [0; 8];
        self.child.read_exact(&mut pages).context("the child ended")?;
        ensure!(pages == [0, 1, self.round + 100, 3, 4, 5, 6, 0], "the child sees {pages:?}");
        ensure!(self.again.read(PAGE, 1) == [if self.round == 1 { 99 } else { self.round + 49 }], "other contents");
        self.again.write(PAGE, &[self.round + 50]);
        ensure!(self.pieces.read(PAGE, 1) == [self.round + 50], "what is mapped twice is two things");
        Ok(())
    }
}
