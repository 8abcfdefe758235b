//! The files of a log: `log`, which is written to, and `log.1` (the newest), `log.2`, … which are full.
//!
//! Seen from outside they are one long text, and a place in it is counted from the pod's first byte, also when the oldest
//! files are gone and on every host that the pod comes to. So a file that is not the first begins with a line that says
//! where it stands, `{"base":N}`; that line is no record and is not counted. Files begin and end between two records.

use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Longer a first line that says where a file stands never is.
const HEAD: usize = 64;

#[derive(Serialize, Deserialize)]
struct Head {
    base: u64,
}

#[derive(Debug)]
pub(super) struct Segment {
    pub file: File,
    /// Where it begins in the whole log.
    pub base: u64,
    /// Bytes of its own first line.
    pub head: u64,
}

impl Segment {
    fn open(path: &Path) -> io::Result<Segment> {
        let file = OpenOptions::new().read(true).open(path)?;
        Segment::of(file)
    }

    fn of(file: File) -> io::Result<Segment> {
        let mut first = [0; HEAD];
        let n = file.read_at(&mut first, 0)?;
        let line = first[..n].iter().position(|byte| *byte == b'\n').map(|end| &first[..end]);
        let head = line.and_then(|line| Some((line.len(), serde_json::from_slice::<Head>(line).ok()?)));
        let (head, base) = head.map_or((0, 0), |(length, head)| (length as u64 + 1, head.base));
        Ok(Segment { file, base, head })
    }

    /// A new file that is to begin at `base`.
    pub fn create(path: &Path, base: u64) -> io::Result<Segment> {
        let mut file = OpenOptions::new().create(true).truncate(true).read(true).write(true).mode(0o600).open(path)?;
        let mut line = Vec::new();
        if base > 0 {
            line = serde_json::to_vec(&Head { base })?;
            line.push(b'\n');
            file.write_all(&line)?;
        }
        Ok(Segment { file, base, head: line.len() as u64 })
    }

    pub fn length(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len().saturating_sub(self.head))
    }

    pub fn end(&self) -> io::Result<u64> {
        Ok(self.base.saturating_add(self.length()?))
    }
}

/// A log as it is now, for reading. What is written to its last file later is seen; a later file is not.
#[derive(Debug, Default)]
pub struct History {
    pub(super) segments: Vec<Segment>,
}

/// The paths of a log's files in a folder.
pub fn files(dir: &Path) -> Vec<PathBuf> {
    let is_ours =
        |name: &str| name == "log" || name.strip_prefix("log.").is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit()));
    let names = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.file_name());
    names.filter(|name| name.to_str().is_some_and(is_ours)).map(|name| dir.join(name)).collect()
}

impl History {
    /// Empty, when there is no log yet.
    pub fn open(dir: &Path) -> io::Result<History> {
        let mut segments = Vec::new();
        for path in files(dir) {
            match Segment::open(&path) {
                Ok(segment) => segments.push(segment),
                // Rotated away this moment.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        segments.sort_by_key(|segment| segment.base);
        // One that was renamed while we looked was opened twice.
        segments.dedup_by_key(|segment| segment.base);
        Ok(History { segments })
    }

    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// Where the oldest record that is left begins.
    pub fn start(&self) -> u64 {
        self.segments.first().map_or(0, |segment| segment.base)
    }

    /// Where the next record will begin.
    pub fn end(&self) -> io::Result<u64> {
        self.segments.last().map_or(Ok(0), Segment::end)
    }

    /// The first place from `offset` on that is left.
    pub fn settle(&self, offset: u64) -> io::Result<u64> {
        for (number, segment) in self.segments.iter().enumerate() {
            let at = offset.max(segment.base);
            // The end of a file is the beginning of the next, and a file may have nothing left.
            if at < segment.end()? || number + 1 == self.segments.len() {
                return Ok(at);
            }
        }
        Ok(offset)
    }

    /// Bytes of the log as they stand in its files, from one of them at a time; 0 where nothing is (yet).
    pub fn raw(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let Some(segment) = self.segments.iter().rfind(|segment| segment.base <= offset) else { return Ok(0) };
        segment.file.read_at(buffer, (offset - segment.base).saturating_add(segment.head))
    }

    /// As much as there is without a gap.
    pub(super) fn fill(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.raw(&mut buffer[filled..], offset + filled as u64)? {
                0 => break,
                n => filled += n,
            }
        }
        Ok(filled)
    }
}
