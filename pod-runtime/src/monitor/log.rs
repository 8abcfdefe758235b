//! The pod's log: what the program wrote to its terminal or its pipes.
//!
//! One JSON object a line, as docker's json-file: `time` (RFC 3339, nanoseconds), `stream` ("stdout", "stderr"; a
//! terminal is all "stdout") and `log`, the text. Text is written as it comes: a record is one line with its newline,
//! or what there was of a line; putting the records together gives every byte back. Bytes that are not UTF-8 go to
//! `log64` in base64 instead of `log`.
//!
//! A log is bounded: when its file is full a new one is begun, and the oldest goes ([`history`]).

use crate::spec::LogLimits;
use crate::when;
use history::Segment;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

mod history;

pub use history::{History, files};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stream {
    Stdout,
    Stderr,
    /// What `pod` itself has to say about the pod: "moved here from hostA".
    Note,
}

/// One record of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// RFC 3339.
    pub time: String,
    pub stream: Stream,
    pub bytes: Vec<u8>,
}

#[derive(Serialize, Deserialize)]
struct Line<'a> {
    #[serde(borrow)]
    time: std::borrow::Cow<'a, str>,
    stream: Stream,
    #[serde(default, borrow, skip_serializing_if = "Option::is_none")]
    log: Option<std::borrow::Cow<'a, str>>,
    #[serde(default, borrow, skip_serializing_if = "Option::is_none")]
    log64: Option<std::borrow::Cow<'a, str>>,
}

/// The log of a pod, to be written on: by its monitor, or by who brings it from another host.
#[derive(Debug)]
pub struct Log {
    dir: PathBuf,
    limits: LogLimits,
    /// The last of its files is the one that is written to.
    history: History,
    length: u64,
}

impl Log {
    /// Opens the log in the pod's folder; a record that was cut short by a crash is cut off.
    pub fn open(dir: &Path, limits: LogLimits) -> io::Result<Log> {
        let mut log = Log::resume(dir, limits)?;
        log.cut_half_record()?;
        Ok(log)
    }

    /// The same, where the rest of a record may come.
    pub fn resume(dir: &Path, limits: LogLimits) -> io::Result<Log> {
        let mut history = History::open(dir)?;
        let current = dir.join("log");
        let end = history.end()?;
        // Readers open files to read.
        let segment = match fs::metadata(&current) {
            Ok(_) => {
                Segment { file: fs::OpenOptions::new().read(true).write(true).open(&current)?, ..last(&mut history)? }
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Segment::create(&current, end)?,
            Err(error) => return Err(error),
        };
        history.segments.push(segment);
        Ok(Log { dir: dir.to_owned(), limits, length: history.end()?, history })
    }

    fn cut_half_record(&mut self) -> io::Result<()> {
        let Some(current) = self.history.segments.last() else { return Ok(()) };
        let mut length = current.length()? + current.head;
        let mut end = [0];
        while length > current.head {
            current.file.read_exact_at(&mut end, length - 1)?;
            if end[0] == b'\n' {
                break;
            }
            length -= 1;
        }
        current.file.set_len(length)?;
        self.length = current.end()?;
        Ok(())
    }

    /// Where the next record will begin.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Writes what the program wrote. A log that cannot be written (disk full) loses this piece and never stops the
    /// pod.
    pub fn write(&mut self, stream: Stream, bytes: &[u8]) -> io::Result<()> {
        let text = encode(when::now_ns(), stream, bytes);
        self.fill(&text, true)
    }

    /// Appends, a new file after each that is full. `whole`: the file ends between two records.
    fn fill(&mut self, mut text: &[u8], mut whole: bool) -> io::Result<()> {
        while let Some(most) = self.limits.max_size {
            let room = usize::try_from(most.saturating_sub(self.written())).unwrap_or(usize::MAX);
            if text.len() <= room {
                break;
            }
            let fits = text[..room].iter().rposition(|byte| *byte == b'\n');
            // A record is never taken apart: one that is longer than a file has one of its own.
            let needed = if whole && self.written() > 0 { None } else { text.iter().position(|byte| *byte == b'\n') };
            match fits.or(needed).map(|end| text.split_at(end + 1)) {
                Some((records, rest)) => {
                    self.append(records)?;
                    text = rest;
                }
                None if whole && self.written() > 0 => {}
                None => break,
            }
            whole = true;
            if !text.is_empty()
                && let Err(error) = self.rotate(self.length)
            {
                tracing::warn!(%error, "the log cannot be rotated");
                break;
            }
        }
        self.append(text)
    }

    /// Bytes in the file that is written to.
    fn written(&self) -> u64 {
        self.history.segments.last().map_or(0, |current| self.length - current.base)
    }

    fn append(&mut self, text: &[u8]) -> io::Result<()> {
        let Some(current) = self.history.segments.last() else { return Err(ErrorKind::NotFound.into()) };
        let at = self.length - current.base + current.head;
        match current.file.write_all_at(text, at) {
            Ok(()) => {
                self.length += text.len() as u64;
                Ok(())
            }
            Err(error) => {
                let _ = current.file.set_len(at);
                Err(error)
            }
        }
    }

    /// Begins a new file at this place of the log. Readers see the old files or the new ones, or for a moment none that
    /// is written to.
    fn rotate(&mut self, base: u64) -> io::Result<()> {
        let path = |n: u32| if n == 0 { self.dir.join("log") } else { self.dir.join(format!("log.{n}")) };
        let aside = self.dir.join(".log.new");
        let segment = Segment::create(&aside, base)?;
        for n in (1..self.limits.max_files.max(1)).rev() {
            match fs::rename(path(n - 1), path(n)) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        fs::rename(&aside, path(0))?;
        self.history.segments.push(segment);
        let surplus = self.history.segments.len().saturating_sub(self.limits.max_files.max(1) as usize);
        self.history.segments.drain(..surplus);
        self.length = base;
        Ok(())
    }

    /// Takes a piece of a log from another host. It begins where the last one ended, or later when what was between is
    /// gone there; it need not end between two records.
    pub fn receive(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let counted = offset.checked_add(bytes.len() as u64).is_some_and(|end| end < 1 << 62);
        if offset < self.length || !counted {
            return Err(io::Error::new(ErrorKind::InvalidData, "a piece that cannot come here"));
        }
        let gap = offset > self.length;
        if gap {
            self.cut_half_record()?;
            self.rotate(offset)?;
        }
        self.fill(bytes, gap)
    }

    pub fn sync(&mut self) -> io::Result<()> {
        self.history.segments.last().map_or(Ok(()), |current| current.file.sync_data())
    }

    /// The records from `offset` on, about `bound` bytes of them, and where they end.
    pub fn read(&self, offset: u64, bound: usize) -> io::Result<(Vec<Record>, u64)> {
        self.history.read(offset, bound)
    }
}

/// The file that is written to.
fn last(history: &mut History) -> io::Result<Segment> {
    history.segments.pop().ok_or_else(|| ErrorKind::NotFound.into())
}

/// Records as they stand in the file.
pub fn encode(time: u64, stream: Stream, bytes: &[u8]) -> Vec<u8> {
    let time = when::rfc3339(time);
    let mut out = Vec::with_capacity(bytes.len() + bytes.len() / 8 + 80);
    for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
        let mut line = Line { time: time.as_str().into(), stream, log: None, log64: None };
        match std::str::from_utf8(piece) {
            Ok(text) => line.log = Some(text.into()),
            Err(_) => line.log64 = Some(base64(piece).into()),
        }
        // Plain strings into a vector: it cannot fail.
        let _ = serde_json::to_writer(&mut out, &line);
        out.push(b'\n');
    }
    out
}

/// One line of the file; `None` when it is damaged.
pub fn decode(line: &[u8]) -> Option<Record> {
    let line: Line<'_> = serde_json::from_slice(line).ok()?;
    let bytes = match (line.log, line.log64) {
        (Some(text), _) => text.into_owned().into_bytes(),
        (None, Some(text)) => unbase64(&text)?,
        (None, None) => Vec::new(),
    };
    Some(Record { time: line.time.into_owned(), stream: line.stream, bytes })
}

impl History {
    /// Whole records from `offset` on, about `bound` bytes of them (one at least if there is one), and where they end.
    pub fn read(&self, offset: u64, bound: usize) -> io::Result<(Vec<Record>, u64)> {
        let offset = self.settle(offset)?;
        let mut bound = bound.max(4096);
        loop {
            let mut text = vec![0; bound];
            let filled = self.fill(&mut text, offset)?;
            let whole = text[..filled].iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            if whole == 0 && filled == bound {
                // One record longer than the bound.
                bound *= 2;
                continue;
            }
            let records = text[..whole].split(|b| *b == b'\n').filter(|l| !l.is_empty()).filter_map(decode).collect();
            return Ok((records, offset + whole as u64));
        }
    }

    /// Where the last `lines` lines of the program begin.
    pub fn tail(&self, lines: usize) -> io::Result<u64> {
        const BLOCK: u64 = 64 << 10;
        let (first, mut start) = (self.start(), self.end()?);
        let mut text: Vec<u8> = Vec::new();
        loop {
            let more = BLOCK.min(start - first);
            let mut block = vec![0; more as usize];
            if self.fill(&mut block, start - more)? < block.len() {
                // A gap: what is before it does not belong to what comes after.
                return Ok(start);
            }
            start -= more;
            block.append(&mut text);
            text = block;
            if let Some(at) = tail_in(&text, lines, start == first) {
                return Ok(start + at as u64);
            }
        }
    }
}

/// The same within a piece that ends where the file ends; `None` when the piece is too short to tell.
fn tail_in(text: &[u8], lines: usize, whole: bool) -> Option<usize> {
    let mut ends = text.iter().enumerate().rev().filter(|(_, b)| **b == b'\n').map(|(at, _)| at);
    let mut end = match ends.next() {
        Some(end) => end,
        None => return whole.then_some(0),
    };
    let mut found = 0;
    let mut keep = end + 1;
    loop {
        let begin = match ends.next() {
            Some(before) => before + 1,
            None if whole => 0,
            None => return None,
        };
        let record = decode(&text[begin..end]);
        let closes = record.is_some_and(|r| r.bytes.ends_with(b"\n") || r.stream == Stream::Note);
        // A record that ends a line belongs to a further line, unless nothing after it was counted yet.
        if closes || found == 0 {
            if found == lines {
                return Some(keep);
            }
            found += 1;
        }
        keep = begin;
        if begin == 0 {
            return Some(0);
        }
        end = begin - 1;
    }
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

fn base64(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let value = three.iter().enumerate().fold(0u32, |v, (i, b)| v | u32::from(*b) << (16 - 8 * i));
        for i in 0..4 {
            let digit = ALPHABET[(value >> (18 - 6 * i) & 63) as usize];
            out.push(if i <= three.len() { char::from(digit) } else { '=' });
        }
    }
    out
}

fn unbase64(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() / 4 * 3);
    for four in text.as_bytes().chunks(4) {
        let digits: Vec<u8> = four.iter().copied().take_while(|b| *b != b'=').collect();
        if four.len() != 4 || digits.len() < 2 {
            return None;
        }
        let mut value = 0u32;
        for (i, digit) in digits.iter().enumerate() {
            let at = ALPHABET.iter().position(|a| a == digit)? as u32;
            value |= at << (18 - 6 * i);
        }
        out.extend_from_slice(&value.to_be_bytes()[1..digits.len()]);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn open(dir: &Path) -> Log {
        Log::open(dir, LogLimits::default()).unwrap()
    }

    fn back(text: &[u8]) -> Vec<u8> {
        text.split(|b| *b == b'\n').filter(|l| !l.is_empty()).flat_map(|l| decode(l).unwrap().bytes).collect()
    }

    proptest! {
        #[test]
        fn every_byte_comes_back(bytes: Vec<u8>) {
            prop_assert_eq!(back(&encode(1, Stream::Stdout, &bytes)), bytes.clone());
            prop_assert_eq!(unbase64(&base64(&bytes)).unwrap(), bytes);
        }

        #[test]
        fn damage_never_panics(bytes: Vec<u8>) {
            let _ = decode(&bytes);
        }
    }

    #[test]
    fn text_stays_readable() {
        let line = encode(0, Stream::Stderr, "héllo\n".as_bytes());
        assert_eq!(
            String::from_utf8(line).unwrap(),
            "{\"time\":\"1970-01-01T00:00:00.000000000Z\",\"stream\":\"stderr\",\"log\":\"héllo\\n\"}\n"
        );
    }

    #[test]
    fn a_half_record_is_cut_off_and_offsets_go_on() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(dir.path());
        log.write(Stream::Stdout, b"one\ntwo\n").unwrap();
        let length = log.length();
        let mut file = fs::OpenOptions::new().append(true).open(dir.path().join("log")).unwrap();
        io::Write::write_all(&mut file, b"{\"time\"").unwrap();
        let mut log = open(dir.path());
        assert_eq!(log.length(), length);
        log.write(Stream::Stdout, b"three").unwrap();
        let (records, end) = log.read(0, 1).unwrap();
        assert_eq!(records.len(), 3);
        assert_eq!(end, log.length());
        let (records, _) = log.read(length, 1 << 20).unwrap();
        assert_eq!(records[0].bytes, b"three");
    }

    #[test]
    fn the_last_lines() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(dir.path());
        for i in 0..5000 {
            log.write(Stream::Stdout, format!("line {i}\n").as_bytes()).unwrap();
        }
        log.write(Stream::Stdout, b"pro").unwrap();
        log.write(Stream::Stdout, b"mpt").unwrap();
        let history = History::open(dir.path()).unwrap();
        let last = |n| {
            let (records, _) = history.read(history.tail(n).unwrap(), 8 << 20).unwrap();
            String::from_utf8(records.into_iter().flat_map(|r| r.bytes).collect()).unwrap()
        };
        assert_eq!(last(0), "");
        assert_eq!(last(1), "prompt");
        assert_eq!(last(2), "line 4999\nprompt");
        assert_eq!(last(3), "line 4998\nline 4999\nprompt");
        assert!(last(2000).starts_with("line 3001\n"));
        assert!(last(1_000_000).starts_with("line 0\n"));
    }

    /// Everything that is left of a log, and the place where it begins.
    fn left(dir: &Path) -> (u64, String) {
        let history = History::open(dir).unwrap();
        let (mut at, mut text) = (history.start(), String::new());
        loop {
            let (records, end) = history.read(at, 1).unwrap();
            if end == at {
                return (history.start(), text);
            }
            text.extend(records.into_iter().map(|r| String::from_utf8(r.bytes).unwrap()));
            at = end;
        }
    }

    fn lines(range: std::ops::Range<u32>) -> String {
        range.map(|i| format!("line {i}\n")).collect()
    }

    #[test]
    fn a_log_is_bounded_and_its_end_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        for max_files in [1, 2, 3] {
            files(dir.path()).iter().for_each(|path| fs::remove_file(path).unwrap());
            let limits = LogLimits { max_size: Some(4096), max_files };
            let mut log = Log::open(dir.path(), limits).unwrap();
            for i in 0..1000 {
                if i % 100 == 99 {
                    let length = log.length();
                    log = Log::open(dir.path(), limits).unwrap();
                    assert_eq!(log.length(), length);
                }
                log.write(Stream::Stdout, format!("line {i}\n").as_bytes()).unwrap();
            }
            let sizes: Vec<u64> = files(dir.path()).iter().map(|p| fs::metadata(p).unwrap().len()).collect();
            assert_eq!(sizes.len(), max_files as usize);
            assert!(sizes.iter().all(|size| *size <= 4096 + 64), "{sizes:?}");
            let (start, text) = left(dir.path());
            let first = 1000 - text.lines().count() as u32;
            assert!(start > 0 && text == lines(first..1000));
            let history = History::open(dir.path()).unwrap();
            let (records, _) = history.read(history.tail(3).unwrap(), 1 << 20).unwrap();
            assert_eq!(records.len(), 3);
            // A place that is gone is the oldest one that is not.
            assert_eq!(history.read(1, 1).unwrap().0[0].bytes, format!("line {first}\n").as_bytes());
            // All at once, as much as several files hold.
            log.write(Stream::Stdout, lines(1000..1500).as_bytes()).unwrap();
            assert!(files(dir.path()).iter().all(|path| fs::metadata(path).unwrap().len() <= 4096 + 64));
            assert!(left(dir.path()).1.ends_with("line 1498\nline 1499\n"));
            log.write(Stream::Stdout, &[b'x'; 9000]).unwrap();
            assert_eq!(left(dir.path()).1.lines().last().unwrap().len(), 9000);
        }
    }

    #[test]
    fn a_log_arrives_in_pieces_of_any_size_and_keeps_its_places() {
        let (there, here) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let limits = LogLimits { max_size: Some(5000), max_files: 4 };
        let mut log = Log::open(there.path(), limits).unwrap();
        for i in 0..1000 {
            log.write(Stream::Stdout, format!("line {i}\n").as_bytes()).unwrap();
        }
        let history = History::open(there.path()).unwrap();
        let mut at = history.start();
        while at < history.end().unwrap() {
            let mut piece = vec![0; 777];
            let n = history.raw(&mut piece, at).unwrap();
            Log::resume(here.path(), limits).unwrap().receive(at, &piece[..n]).unwrap();
            at += n as u64;
        }
        let mut arrived = Log::open(here.path(), limits).unwrap();
        assert_eq!(arrived.length(), log.length());
        assert_eq!(left(here.path()).1, left(there.path()).1);
        // A record without an end.
        arrived.receive(arrived.length() + 1, &[b'x'; 20_000]).unwrap();
        arrived.receive(arrived.length(), &[b'x'; 20_000]).unwrap();
        assert!(arrived.receive(1, b"x").is_err() && arrived.receive(u64::MAX, b"x").is_err());
        // What was between is gone.
        let after = arrived.length() + 100;
        arrived.receive(after, &encode(1, Stream::Stdout, b"later\n")).unwrap();
        assert!(left(here.path()).1.ends_with("later\n"));
    }
}
