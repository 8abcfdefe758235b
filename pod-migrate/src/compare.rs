//! What is another in something that came before: files, and memory that processes share. All of it is read and compared
//! block by block with what went out, by as many threads as may be, because a pod may stand still for it; what is another
//! is sent by one ([decision 0069](../../docs/decisions/0069-compared-by-xxh3.md)).

pub mod blocks;
mod digest;

pub use blocks::{Digesting, Digests};
pub use digest::is_zero;

use crate::crew;
use crate::image::Writer;
use crate::{Doing, Result};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use std::cell::RefCell;
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// Bytes go out in runs of at most this.
pub const RUN: usize = 1 << 20;
/// What a thread takes at once.
const PART: u64 = 1 << 20;
/// So many parts are compared before what is another in them is sent: it is in memory until then.
const PARTS: usize = 64;

/// Something that came before.
pub trait Subject: Sync {
    /// Bytes in a block; so many make a mebibyte.
    const BLOCK: usize;
    /// Of what cannot be read.
    const CODE: &'static str;

    /// To be read by one thread.
    fn open(&self) -> std::io::Result<File>;
    fn bytes(&self) -> u64;
    /// What went out of it.
    fn before(&self) -> &Digests;
    /// For messages.
    fn name(&self) -> String;
}

/// What is told of a subject, in order.
pub enum Found<'a> {
    /// It is compared; what follows is of it.
    Subject,
    /// Bytes that are others, and from where on.
    Run { at: u64, bytes: &'a [u8] },
}

/// Tells what is another in each of them. Returns what each is now, and how long it took to find out.
pub fn compare<S: Subject, W: Write>(
    subjects: &[&S],
    hands: usize,
    w: &mut Writer<W>,
    mut found: impl FnMut(usize, Found<'_>, &mut Writer<W>) -> Result<()>,
) -> Result<(Vec<Digests>, Duration)> {
    const { assert!(PART.is_multiple_of(S::BLOCK as u64)) };
    let parts: Vec<(usize, Range<u64>)> = subjects
        .iter()
        .enumerate()
        .flat_map(|(index, subject)| parts(*subject).into_iter().map(move |part| (index, part)))
        .collect();
    let mut digests: Vec<Digests> = subjects.iter().map(|_| Digests::default()).collect();
    let mut telling = Telling { w, found: &mut found, subject: None, at: 0, bytes: Vec::new() };
    let mut took = Duration::ZERO;
    for parts in parts.chunks(PARTS) {
        // The other side waits for something while nothing has changed.
        telling.w.breathe()?;
        let began = Instant::now();
        let work = |at: usize| part(subjects[parts[at].0], &parts[at].1);
        let compared: Vec<Result<Compared>> =
            if hands == 1 { (0..parts.len()).map(work).collect() } else { crew::share(parts.len(), work) };
        took += began.elapsed();
        for ((index, _), compared) in parts.iter().zip(compared) {
            let Compared { digests: more, changed } = compared?;
            digests[*index].append(more);
            telling.of(*index)?;
            for (number, block) in changed {
                let at = number * S::BLOCK as u64;
                let bytes = S::BLOCK.min(subjects[*index].bytes().saturating_sub(at) as usize);
                telling.block(at, &block, bytes)?;
            }
        }
    }
    telling.end()?;
    Ok((digests, took))
}

/// Tells of one subject after the other, of blocks side by side at once.
struct Telling<'a, W: Write, F> {
    w: &'a mut Writer<W>,
    found: F,
    subject: Option<usize>,
    /// What is gathered of it, and from where on.
    at: u64,
    bytes: Vec<u8>,
}

impl<W: Write, F: FnMut(usize, Found<'_>, &mut Writer<W>) -> Result<()>> Telling<'_, W, F> {
    fn of(&mut self, index: usize) -> Result<()> {
        if self.subject == Some(index) {
            return Ok(());
        }
        self.end()?;
        self.subject = Some(index);
        (self.found)(index, Found::Subject, self.w)
    }

    /// So many bytes of a block; one that is empty here is one of zeros.
    fn block(&mut self, at: u64, block: &[u8], bytes: usize) -> Result<()> {
        if at != self.at + self.bytes.len() as u64 || self.bytes.len() >= RUN {
            self.end()?;
            self.at = at;
        }
        match block {
            [] => self.bytes.resize(self.bytes.len() + bytes, 0),
            block => self.bytes.extend_from_slice(&block[..bytes]),
        }
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        if let Some(index) = self.subject.filter(|_| !self.bytes.is_empty()) {
            (self.found)(index, Found::Run { at: self.at, bytes: &self.bytes }, self.w)?;
        }
        self.bytes.clear();
        Ok(())
    }
}

/// A subject, divided: no two parts have a block in common, and a long hole is one part. One at least, for an empty one may
/// have had something.
fn parts<S: Subject>(subject: &S) -> Vec<Range<u64>> {
    let size = subject.bytes();
    if size <= PART {
        return std::iter::once(0..size).collect();
    }
    let file = subject.open();
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

/// What of a part is as it is now.
struct Compared {
    digests: Digests,
    /// Blocks that are others, by number; nothing for zeros, of which a hole may have made any number.
    changed: Vec<(u64, Vec<u8>)>,
}

fn part<S: Subject>(subject: &S, part: &Range<u64>) -> Result<Compared> {
    let mut changed = Vec::new();
    let mut note = |number: u64, block: &[u8]| -> Result<()> {
        changed.push((number, block.to_vec()));
        Ok(())
    };
    let mut digesting = Digesting::part(S::BLOCK, subject.before(), part);
    if !part.is_empty() {
        read(subject, part, |at, bytes| digesting.feed(at, bytes, &mut note))?;
    }
    let digests = digesting.end(part.end, &mut note)?;
    Ok(Compared { digests, changed })
}

/// What there is in a part from its first data on. Holes between are read as the zeros that they are: where the next one
/// begins a tmpfs finds out page by page, and would for each part up to the end of the file.
fn read<S: Subject>(subject: &S, part: &Range<u64>, mut each: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
    thread_local! {
        static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    let file = subject.open().code(S::CODE, || format!("open {}", subject.name()))?;
    let data = |at: u64| match lseek(&file, at as i64, Whence::SeekData) {
        Ok(data) => Ok(data as u64),
        Err(Errno::ENXIO) => Ok(part.end),
        Err(Errno::EINVAL) => Ok(at), // no holes on this file system
        Err(error) => Err(error).code(S::CODE, || format!("seek in {}", subject.name())),
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
            let n = file.read_at(&mut buffer[..most], at).code(S::CODE, || format!("read {}", subject.name()))?;
            if n == 0 {
                return Ok(()); // it has become shorter
            }
            each(at, &buffer[..n])?;
            at += n as u64;
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use pod_runtime::sys::memory::make_shared;

    struct Memory(File, u64, Digests);

    impl Subject for Memory {
        const BLOCK: usize = 4096;
        const CODE: &'static str = "E-SYSTEM";

        fn open(&self) -> std::io::Result<File> {
            self.0.try_clone()
        }

        fn bytes(&self) -> u64 {
            self.1
        }

        fn before(&self) -> &Digests {
            &self.2
        }

        fn name(&self) -> String {
            "memory".to_owned()
        }
    }

    #[test]
    fn untouched_memory_is_no_work() {
        const HUGE: u64 = 1 << 44;
        let memory = Memory(make_shared(HUGE).unwrap(), HUGE, Digests::default());
        assert_eq!(parts(&memory), std::iter::once(0..HUGE).collect::<Vec<_>>());
        memory.0.write_all_at(b"x", HUGE / 2 + 4096).unwrap();
        let data = HUGE / 2..HUGE / 2 + PART;
        assert_eq!(parts(&memory), [0..data.start, data.clone(), data.end..HUGE]);
    }
}
