//! /proc/PID/pagemap: what the kernel says of each page of a process.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

pub(super) const PAGE: u64 = 4096;

/// An entry's bits.
pub(super) const PRESENT: u64 = 1 << 63;
/// Of what is not present: it is somewhere else, and the low bits say where.
pub(super) const ELSEWHERE: u64 = 1 << 62;
pub(super) const OF_A_FILE: u64 = 1 << 61;
pub(super) const MAPPED_ONCE: u64 = 1 << 56;
pub(super) const FRAME: u64 = (1 << 55) - 1;

/// Entries that are read at once.
pub(super) const ENTRIES: usize = 8192;

/// Shows the entry of each page of a range, with the page's address. Returns of how many pages there was one.
pub(super) fn each(
    pagemap: &File,
    range: Range<u64>,
    mut see: impl FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<u64> {
    let mut buffer = vec![0u8; ENTRIES.min(((range.end - range.start) / PAGE) as usize) * 8];
    let mut at = range.start;
    while at < range.end {
        let pages = ((range.end - at) / PAGE).min(ENTRIES as u64) as usize;
        let read = pagemap.read_at(&mut buffer[..pages * 8], at / PAGE * 8)?;
        if read < 8 {
            break;
        }
        for entry in words(&buffer[..read]) {
            see(at, entry)?;
            at += PAGE;
        }
    }
    Ok((at - range.start) / PAGE)
}

/// What files like this consist of.
pub(super) fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().expect("eight bytes")))
}
