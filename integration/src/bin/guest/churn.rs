//! Memory that changes all the time, in every way in which it can: written, written with zeros, given back, unmapped and
//! mapped anew at the same place, moved to another address, made read-only and writable again, and copied on write by a
//! child. Every page says which it is and how often it was written, and what it should say is kept apart.

use crate::sys::{Map, Region};
use crate::{Guest, sys};
use anyhow::{Result, ensure};
use libc::MAP_PRIVATE;
use nix::sys::wait::{WaitStatus, waitpid};
use std::ops::Range;

const PAGE: usize = 4096;
const CHUNK_PAGES: usize = 64;
const CHUNK: usize = CHUNK_PAGES * PAGE;
const CHUNKS: usize = 192;
/// Changes between two looks at whether somebody asks.
const CHANGES: usize = 400;
/// Chunks that a child looks at.
const LOOKED_AT: usize = 8;

struct Churn {
    chunks: Vec<Chunk>,
    random: u64,
    changes: u64,
}

struct Chunk {
    region: Region,
    /// What each page was written with last; 0 for zeros.
    said: [u64; CHUNK_PAGES],
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let chunk = || Ok(Chunk { region: Map::anonymous(CHUNK, MAP_PRIVATE).map()?, said: [0; CHUNK_PAGES] });
    let mut churn = Churn { chunks: (0..CHUNKS).map(|_| chunk()).collect::<Result<_>>()?, random: 1, changes: 0 };
    for chunk in 0..CHUNKS {
        (0..CHUNK_PAGES).for_each(|page| churn.write(chunk, page));
    }
    Ok(Box::new(churn))
}

fn page_of(said: u64) -> Vec<u8> {
    said.to_ne_bytes().repeat(PAGE / 8)
}

impl Churn {
    fn check(&self, chunks: Range<usize>) -> Result<()> {
        for number in chunks {
            let chunk = &self.chunks[number];
            for (page, said) in chunk.said.iter().enumerate() {
                let found = chunk.region.read(page * PAGE, PAGE);
                let word = u64::from_ne_bytes(found[..8].try_into()?);
                ensure!(found == page_of(*said), "page {page} of chunk {number} says {word:x}, not {said:x}");
            }
        }
        Ok(())
    }

    fn random(&mut self, most: usize) -> usize {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) as usize % most
    }

    fn write(&mut self, chunk: usize, page: usize) {
        self.changes += 1;
        let said = (self.changes << 20) | (chunk * CHUNK_PAGES + page) as u64;
        self.chunks[chunk].region.write(page * PAGE, &page_of(said));
        self.chunks[chunk].said[page] = said;
    }

    fn change(&mut self) -> Result<()> {
        let (chunk, page) = (self.random(CHUNKS), self.random(CHUNK_PAGES));
        match self.random(1000) {
            0..=899 => self.write(chunk, page),
            900..=949 => {
                self.chunks[chunk].region.write(page * PAGE, &[0; PAGE]);
                self.chunks[chunk].said[page] = 0;
            }
            950..=969 => {
                self.chunks[chunk].region.give_back(page * PAGE, PAGE)?;
                self.chunks[chunk].said[page] = 0;
            }
            970..=979 => {
                self.chunks[chunk].region.renew()?;
                self.chunks[chunk].said = [0; CHUNK_PAGES];
                self.write(chunk, page);
            }
            980..=989 => self.chunks[chunk].region.move_away()?,
            990..=997 => {
                let region = &mut self.chunks[chunk].region;
                region.protect(page * PAGE, PAGE, libc::PROT_READ)?;
                region.protect(page * PAGE, PAGE, libc::PROT_READ | libc::PROT_WRITE)?;
            }
            _ => {
                // What the child has is what the parent had.
                let first = self.random(CHUNKS - LOOKED_AT);
                let child = sys::fork(|| i32::from(self.check(first..first + LOOKED_AT).is_err()))?;
                (0..CHUNK_PAGES).for_each(|page| self.write(chunk, page));
                let ended = waitpid(child, None)?;
                ensure!(ended == WaitStatus::Exited(child, 0), "a child that looked at its memory: {ended:?}");
            }
        }
        Ok(())
    }
}

impl Guest for Churn {
    fn step(&mut self) -> Result<()> {
        (0..CHANGES).try_for_each(|_| self.change())
    }

    fn verify(&mut self) -> Result<()> {
        self.check(0..CHUNKS)
    }
}
