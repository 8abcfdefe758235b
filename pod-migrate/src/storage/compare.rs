//! What is another in files that came before: read and compared by as many threads as there are processors, because a pod
//! may stand still for it, and sent by one.

use super::Entry;
use super::blocks::{BLOCK, Digesting, Digests};
use super::walk::{RUN, Sent, meta};
use super::{STORAGE, lossy};
use crate::crew;
use crate::digest::is_zero;
use crate::image::{Kind, Owner, PageRun, Writer};
use crate::{Doing, Result};
use nix::errno::Errno;
use nix::sys::stat::FileStat;
use nix::unistd::{Whence, lseek};
use std::cell::RefCell;
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// What a thread takes at once.
const PART: u64 = 1 << 20;
const _: () = assert!(PART.is_multiple_of(BLOCK as u64));
/// So many parts are compared before what is another in them is sent: it is in memory until then.
const PARTS: usize = 64;

/// A file that came before under its name.
#[derive(Debug)]
pub(super) struct Candidate {
    pub id: u64,
    /// A patch; without what is about the file if that is the same.
    pub entry: Entry,
    pub fd: OwnedFd,
    pub size: u64,
    /// By its stamp, which is of this, it is what it was.
    pub same: bool,
    pub stat: FileStat,
    pub before: Arc<Digests>,
}

/// What of a part is as it is now.
struct Compared {
    digests: Digests,
    /// Blocks that are others, by number; nothing for zeros, of which a hole may have made any number.
    changed: Vec<(u64, Vec<u8>)>,
}

/// Sends what is another; the digests of all of them as they are now.
pub(super) fn compare<W: Write>(
    candidates: &[Candidate],
    out: &mut Writer<W>,
    sent: &mut Sent,
) -> Result<Vec<Digests>> {
    let parts: Vec<(usize, Range<u64>)> = candidates
        .iter()
        .enumerate()
        .flat_map(|(index, candidate)| parts(candidate).into_iter().map(move |part| (index, part)))
        .collect();
    let mut digests: Vec<Digests> = candidates.iter().map(|_| Digests::default()).collect();
    let mut changes: Option<(usize, Changes<'_>)> = None;
    for parts in parts.chunks(PARTS) {
        // The other side waits for something while nothing has changed.
        out.breathe()?;
        let compared = crew::share(parts.len(), |at| part(&candidates[parts[at].0], &parts[at].1));
        for ((index, _), compared) in parts.iter().zip(compared) {
            let Compared { digests: more, changed } = compared?;
            digests[*index].append(more);
            if changes.as_ref().is_none_or(|(of, _)| of != index) {
                changes.take().map_or(Ok(()), |(_, mut before)| before.send(out, sent))?;
                let mut of_this = Changes::of(&candidates[*index]);
                if !candidates[*index].same {
                    of_this.announce(out, sent)?;
                }
                changes = Some((*index, of_this));
            }
            let Some((_, changes)) = &mut changes else { continue };
            changed.iter().try_for_each(|(number, block)| changes.add(*number, block, out, sent))?;
        }
    }
    changes.map_or(Ok(()), |(_, mut last)| last.send(out, sent))?;
    Ok(digests)
}

/// A file, divided: no two parts have a block in common, and a long hole is one part. One at least, for an empty file may
/// have had something.
fn parts(candidate: &Candidate) -> Vec<Range<u64>> {
    let size = candidate.size;
    if size <= PART {
        return std::iter::once(0..size).collect();
    }
    let file = File::open(format!("/proc/self/fd/{}", candidate.fd.as_raw_fd()));
    let data = |at: u64| match file.as_ref().map(|file| lseek(file, at as i64, Whence::SeekData)) {
        Ok(Ok(data)) => size.min(data as u64),
        Ok(Err(Errno::ENXIO)) => size,
        // It will be said when it is read.
        _ => at,
    };
    let mut found = Vec::new();
    let mut at = 0;
    while at < size {
        let next = match data(at) {
            far if far >= size => size,
            far if far >= at + PART => far / PART * PART,
            _ => size.min(at + PART),
        };
        found.push(at..next);
        at = next;
    }
    found
}

fn part(candidate: &Candidate, part: &Range<u64>) -> Result<Compared> {
    let mut changed = Vec::new();
    let mut digesting = Digesting::part(&candidate.before, part);
    let mut note = |number: u64, block: &[u8]| -> Result<()> {
        changed.push((number, if is_zero(block) { Vec::new() } else { block.to_vec() }));
        Ok(())
    };
    read(candidate, part, |at, bytes| digesting.feed(at, bytes, &mut note))?;
    let digests = digesting.end(part.end, &mut note)?;
    Ok(Compared { digests, changed })
}

/// What there is in a part from its first data on. Holes between are read as the zeros that they are: where the next one
/// begins a tmpfs finds out page by page, and would for each part up to the end of the file.
fn read(candidate: &Candidate, part: &Range<u64>, mut each: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
    thread_local! {
        static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    if part.is_empty() {
        return Ok(());
    }
    let path = || lossy(&candidate.entry.path);
    let file = File::open(format!("/proc/self/fd/{}", candidate.fd.as_raw_fd()));
    let file = file.code(STORAGE, || format!("open {}", path()))?;
    let data = |at: u64| match lseek(&file, at as i64, Whence::SeekData) {
        Ok(data) => Ok(data as u64),
        Err(Errno::ENXIO) => Ok(part.end),
        Err(Errno::EINVAL) => Ok(at), // no holes on this file system
        Err(error) => Err(error).code(STORAGE, || format!("seek in {}", path())),
    };
    BUFFER.with_borrow_mut(|buffer| {
        let mut at = part.start;
        loop {
            // What was a long hole a moment ago may have something in its middle.
            at = data(at)?;
            if at >= part.end {
                return Ok(());
            }
            let most = (PART.min(part.end - at)) as usize;
            // Most files are small, and a page that is touched costs more than what is read into it.
            buffer.resize(most.max(buffer.len()), 0);
            let n = file.read_at(&mut buffer[..most], at).code(STORAGE, || format!("read {}", path()))?;
            if n == 0 {
                return Ok(()); // it has become shorter
            }
            each(at, &buffer[..n])?;
            at += n as u64;
        }
    })
}

/// The changes of one file, on their way out: what lies side by side goes together.
struct Changes<'a> {
    of: &'a Candidate,
    announced: bool,
    /// What is gathered, and from where on.
    at: u64,
    bytes: Vec<u8>,
}

impl<'a> Changes<'a> {
    fn of(candidate: &'a Candidate) -> Changes<'a> {
        Changes { of: candidate, announced: false, at: 0, bytes: Vec::new() }
    }

    fn announce<W: Write>(&mut self, out: &mut Writer<W>, sent: &mut Sent) -> Result<()> {
        if std::mem::replace(&mut self.announced, true) {
            return Ok(());
        }
        sent.files += 1;
        let Candidate { id, entry, fd, stat, .. } = self.of;
        match entry.meta {
            Some(_) => out.put(Kind::STORAGE_ENTRY, *id, entry),
            None => out.put(Kind::STORAGE_ENTRY, *id, &Entry { meta: Some(meta(fd, stat)?), ..entry.clone() }),
        }
    }

    /// A block that is empty here is one of zeros.
    fn add<W: Write>(&mut self, number: u64, block: &[u8], out: &mut Writer<W>, sent: &mut Sent) -> Result<()> {
        let at = number * BLOCK as u64;
        if at != self.at + self.bytes.len() as u64 || self.bytes.len() >= RUN {
            self.send(out, sent)?;
            self.at = at;
        }
        let end = BLOCK.min(self.of.size.saturating_sub(at) as usize);
        match block {
            [] => self.bytes.resize(self.bytes.len() + end, 0),
            block => self.bytes.extend_from_slice(&block[..end]),
        }
        Ok(())
    }

    fn send<W: Write>(&mut self, out: &mut Writer<W>, sent: &mut Sent) -> Result<()> {
        if self.bytes.is_empty() {
            return Ok(());
        }
        self.announce(out, sent)?;
        let bytes = self.bytes.len() as u64;
        let run = PageRun { owner: Owner::Storage(self.of.id), address: self.at, bytes };
        out.pages(run, &[&self.bytes])?;
        sent.bytes += bytes;
        self.bytes.clear();
        Ok(())
    }
}
