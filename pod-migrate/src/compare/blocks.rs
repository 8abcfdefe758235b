//! What was sent of a file or of memory, block by block, to send of a changed one only the blocks that are others now.
//!
//! A digest is of the bytes that went out, not of the file: what changes while it is read is seen by the next pass. Blocks
//! of zeros have none, so that a hole costs nothing; and the last block is filled up with zeros, as the file itself is when
//! it grows.

use super::digest::{self, Digest, digest};
use crate::Result;
use std::ops::Range;

/// Those of a file, or of a part of it, by their number: 32 bytes each.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Digests(Vec<(u64, Digest)>);

impl Digests {
    /// Those of the blocks, of so many bytes, that begin in a part of the file.
    fn within(&self, block: usize, part: &Range<u64>) -> &[(u64, Digest)] {
        let first = |at: u64| self.0.partition_point(|(number, _)| *number < at.div_ceil(block as u64));
        &self.0[first(part.start)..first(part.end)]
    }

    /// With those of the part of the file that comes next.
    pub fn append(&mut self, mut next: Digests) {
        self.0.append(&mut next.0);
    }
}

/// Bytes of a file that come in order, with gaps for holes.
#[derive(Debug)]
pub struct Digesting<'a> {
    digests: Vec<(u64, Digest)>,
    /// The block that is not complete yet, and its number.
    block: Vec<u8>,
    number: u64,
    touched: bool,
    /// Those of the pass before that were not met yet.
    before: Option<&'a [(u64, Digest)]>,
}

/// Takes a block that is another one now: its number and what is in it, nothing where it is zeros now.
pub type Changed<'a> = &'a mut dyn FnMut(u64, &[u8]) -> Result<()>;

impl<'a> Digesting<'a> {
    /// In blocks of so many bytes.
    pub fn new(block: usize, before: Option<&'a Digests>) -> Digesting<'a> {
        Digesting::of(block, before.map(|before| &before.0[..]))
    }

    /// Of a part of a file that begins with a block, and ends with one or where the file does.
    pub fn part(block: usize, before: &'a Digests, part: &Range<u64>) -> Digesting<'a> {
        Digesting::of(block, Some(before.within(block, part)))
    }

    fn of(block: usize, before: Option<&'a [(u64, Digest)]>) -> Digesting<'a> {
        Digesting { digests: Vec::new(), block: vec![0; block], number: 0, touched: false, before }
    }

    /// `changed` is told of what is not as it was before; of nothing if there was no before.
    pub fn feed(&mut self, mut at: u64, mut bytes: &[u8], changed: Changed<'_>) -> Result<()> {
        let block = self.block.len();
        while !bytes.is_empty() {
            let (number, from) = (at / block as u64, (at % block as u64) as usize);
            if number != self.number {
                self.end_block(changed)?;
                self.number = number;
            }
            let n = bytes.len().min(block - from);
            let (now, rest) = bytes.split_at(n);
            if n == block {
                self.whole(number, now, changed)?;
            } else {
                self.block[from..from + n].copy_from_slice(now);
                self.touched = true;
            }
            (at, bytes) = (at + n as u64, rest);
        }
        Ok(())
    }

    /// All that there is of it, in a file of this size or a part that ends there.
    pub fn end(mut self, size: u64, changed: Changed<'_>) -> Result<Digests> {
        self.end_block(changed)?;
        self.gone_before(size.div_ceil(self.block.len() as u64), changed)?;
        Ok(Digests(self.digests))
    }

    fn end_block(&mut self, changed: Changed<'_>) -> Result<()> {
        if !std::mem::take(&mut self.touched) {
            return Ok(());
        }
        let block = std::mem::take(&mut self.block);
        self.whole(self.number, &block, changed)?;
        self.block = block;
        self.block.fill(0);
        Ok(())
    }

    fn whole(&mut self, number: u64, block: &[u8], changed: Changed<'_>) -> Result<()> {
        let digest = digest(block);
        if digest == digest::ZEROS {
            return Ok(()); // as a hole
        }
        self.gone_before(number, changed)?;
        self.digests.push((number, digest));
        let Some(left) = &mut self.before else { return Ok(()) };
        match left.split_first() {
            Some((first, rest)) if first.0 == number => {
                *left = rest;
                if first.1 == digest { Ok(()) } else { changed(number, block) }
            }
            _ => changed(number, block),
        }
    }

    /// Blocks below this one that had something and are zeros now.
    fn gone_before(&mut self, number: u64, changed: Changed<'_>) -> Result<()> {
        let Some(left) = &mut self.before else { return Ok(()) };
        while let Some(((gone, _), rest)) = left.split_first().filter(|((gone, _), _)| *gone < number) {
            *left = rest;
            changed(*gone, &[])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BLOCK: usize = 16 << 10;

    fn nothing(number: u64, _: &[u8]) -> Result<()> {
        panic!("block {number} of the first pass");
    }

    /// In pieces of this size, holes left out.
    fn digest(file: &[u8], piece: usize, before: Option<&Digests>, changed: Changed<'_>) -> Digests {
        let mut digesting = Digesting::new(BLOCK, before);
        let mut at = 0;
        for part in file.chunks(piece) {
            if part.iter().any(|byte| *byte != 0) {
                digesting.feed(at, part, changed).unwrap();
            }
            at += part.len() as u64;
        }
        digesting.end(file.len() as u64, changed).unwrap()
    }

    #[test]
    fn a_block_that_is_zeros_now_is_told() {
        let mut file = vec![7; 3 * BLOCK + 5];
        let before = digest(&file, BLOCK, None, &mut nothing);
        file[BLOCK..2 * BLOCK].fill(0);
        file[3 * BLOCK..].fill(0);
        let mut told = Vec::new();
        let now = digest(&file, 4096, Some(&before), &mut |number, block| {
            assert!(block.is_empty());
            told.push(number);
            Ok(())
        });
        assert_eq!(told, [1, 3]);
        assert_eq!(now.0.iter().map(|(number, _)| *number).collect::<Vec<_>>(), [0, 2]);
    }

    proptest! {
        /// Whatever becomes of a file: the blocks that are told, put over the file that it was, make the file that it is.
        #[test]
        fn the_changes_make_the_file(
            old in proptest::collection::vec(0u8..3, 0..8),
            new in proptest::collection::vec(0u8..3, 0..8),
            cut in 0..BLOCK,
            piece in 1..3 * BLOCK,
        ) {
            let file = |blocks: &[u8], cut: usize| {
                let mut file: Vec<u8> = blocks.iter().flat_map(|byte| vec![*byte; BLOCK]).collect();
                file.truncate(file.len().saturating_sub(cut));
                file
            };
            let (old, new) = (file(&old, BLOCK / 2), file(&new, cut));
            let before = digest(&old, piece, None, &mut nothing);
            let mut made = old.clone();
            made.resize(new.len(), 0);
            let now = digest(&new, 4096, Some(&before), &mut |number, block| {
                let at = number as usize * BLOCK;
                let end = made.len().min(at + BLOCK);
                match block {
                    [] => made[at..end].fill(0),
                    block => made[at..end].copy_from_slice(&block[..end - at]),
                }
                Ok(())
            });
            prop_assert!(made == new);
            prop_assert_eq!(now, digest(&new, piece, None, &mut nothing));
        }
    }
}
