//! Shared anonymous memory of which a process has parts: without its beginning, without its end, twice, in pieces of
//! another protection; and all of it in a child. And some that another child writes to all the time, page after page, in an
//! order that shows whether each is from the same moment. All of it is so large that it goes ahead of a move.

use crate::sys::{Map, Region};
use crate::{Guest, sys};
use anyhow::{Context, Result, ensure};
use libc::{MAP_SHARED, PROT_READ};
use nix::unistd::getppid;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

const PAGE: usize = 512 << 10;
/// Pages of the memory that is written to all the time; the first says how far it has come. What a move has left as it was
/// shows for as long as it takes to come round once: four seconds and more.
const PAGES: u64 = 4000;

struct Parts {
    middle: Region,
    pieces: Region,
    again: Region,
    child: UnixStream,
    counted: Region,
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

/// Where a number is written: each in the page after the one before, and round again.
fn place(number: u64) -> usize {
    (1 + number % (PAGES - 1)) as usize * 4096
}

fn number(memory: &Region, at: usize) -> u64 {
    u64::from_ne_bytes(memory.read(at, 8).try_into().expect("eight bytes"))
}

/// Writes number after number for as long as it has the same parent.
fn count(mut memory: Region) -> i32 {
    let parent = getppid();
    for n in 1u64.. {
        memory.write(place(n), &n.to_ne_bytes());
        memory.write(0, &n.to_ne_bytes());
        if getppid() != parent {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
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
    let counted = Map::anonymous(PAGES as usize * 4096, MAP_SHARED).map()?;
    let by_child = counted.twice()?;
    sys::fork(|| count(by_child))?;
    let middle = all.keep(2 * PAGE, 4 * PAGE)?;
    let mut pieces = Map::anonymous(3 * PAGE, MAP_SHARED).map()?;
    pieces.write(PAGE, &[99]);
    let again = pieces.twice()?;
    pieces.protect(PAGE, PAGE, PROT_READ)?;
    Ok(Box::new(Parts { middle, pieces, again, child: ours, counted, round: 0 }))
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
        // Between these two it went on, and one more may be written that is not said yet.
        let before = number(&self.counted, 0);
        let found: Vec<u64> = (1..PAGES).map(|page| number(&self.counted, page as usize * 4096)).collect();
        let after = number(&self.counted, 0) + 1;
        for (page, found) in (1..).zip(found) {
            let fits = found == 0 || place(found) == page * 4096;
            let least = before.saturating_sub(PAGES - 2);
            ensure!(
                fits && (least..=after).contains(&found),
                "{found} in page {page}, when {before} to {after} were written"
            );
        }
        ensure!(self.pieces.read(PAGE, 1) == [self.round + 50], "what is mapped twice is two things");
        Ok(())
    }
}
