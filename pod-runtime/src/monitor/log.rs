//! The pod's log: what the program wrote to its terminal or its pipes.
//!
//! One JSON object a line, as docker's json-file: `time` (RFC 3339, nanoseconds), `stream` ("stdout", "stderr"; a
//! terminal is all "stdout") and `log`, the text. Text is written as it comes: a record is one line with its newline,
//! or what there was of a line; putting the records together gives every byte back. Bytes that are not UTF-8 go to
//! `log64` in base64 instead of `log`.

use crate::when;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

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

/// The log of a running pod, open in its monitor.
#[derive(Debug)]
pub struct Log {
    file: File,
    length: u64,
}

impl Log {
    /// Opens the log to write on; a record that was cut short by a crash is cut off.
    pub fn open(path: &Path) -> io::Result<Log> {
        let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).mode(0o600).open(path)?;
        let mut length = file.metadata()?.len();
        let mut last = [0];
        while length > 0 {
            file.read_exact_at(&mut last, length - 1)?;
            if last[0] == b'\n' {
                break;
            }
            length -= 1;
        }
        file.set_len(length)?;
        Ok(Log { file, length })
    }

    /// Where the next record will begin.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Writes what the program wrote. A log that cannot be written (disk full) loses this piece and never stops the
    /// pod.
    pub fn write(&mut self, stream: Stream, bytes: &[u8]) -> io::Result<()> {
        let text = encode(when::now_ns(), stream, bytes);
        match self.file.write_all_at(&text, self.length) {
            Ok(()) => {
                self.length += text.len() as u64;
                Ok(())
            }
            Err(error) => {
                let _ = self.file.set_len(self.length);
                Err(error)
            }
        }
    }

    pub fn sync(&mut self) -> io::Result<()> {
        self.file.flush()?;
        self.file.sync_data()
    }

    /// The records from `offset` on, about `bound` bytes of them, and where they end.
    pub fn read(&self, offset: u64, bound: usize) -> io::Result<(Vec<Record>, u64)> {
        read(&self.file, offset, bound)
    }
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

/// Whole records from `offset` on, about `bound` bytes of them (one at least if there is one), and where they end.
pub fn read(file: &File, offset: u64, bound: usize) -> io::Result<(Vec<Record>, u64)> {
    let mut bound = bound.max(4096);
    loop {
        let mut text = vec![0; bound];
        let mut filled = 0;
        while filled < text.len() {
            match file.read_at(&mut text[filled..], offset + filled as u64)? {
                0 => break,
                n => filled += n,
            }
        }
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

/// Where the last `lines` lines of the program begin in the file.
pub fn tail_offset(file: &File, lines: usize) -> io::Result<u64> {
    const BLOCK: u64 = 64 << 10;
    let end = file.metadata()?.len();
    let mut start = end;
    let mut text: Vec<u8> = Vec::new();
    loop {
        let more = BLOCK.min(start);
        let mut block = vec![0; more as usize];
        file.read_exact_at(&mut block, start - more)?;
        start -= more;
        block.append(&mut text);
        text = block;
        if let Some(at) = tail_in(&text, lines, start == 0) {
            return Ok(start + at as u64);
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
        let path = dir.path().join("log");
        let mut log = Log::open(&path).unwrap();
        log.write(Stream::Stdout, b"one\ntwo\n").unwrap();
        let length = log.length();
        std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"time\"").unwrap();
        let mut log = Log::open(&path).unwrap();
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
        let path = dir.path().join("log");
        let mut log = Log::open(&path).unwrap();
        for i in 0..5000 {
            log.write(Stream::Stdout, format!("line {i}\n").as_bytes()).unwrap();
        }
        log.write(Stream::Stdout, b"pro").unwrap();
        log.write(Stream::Stdout, b"mpt").unwrap();
        let file = File::open(&path).unwrap();
        let last = |n| {
            let (records, _) = read(&file, tail_offset(&file, n).unwrap(), 8 << 20).unwrap();
            String::from_utf8(records.into_iter().flat_map(|r| r.bytes).collect()).unwrap()
        };
        assert_eq!(last(0), "");
        assert_eq!(last(1), "prompt");
        assert_eq!(last(2), "line 4999\nprompt");
        assert_eq!(last(3), "line 4998\nline 4999\nprompt");
        assert!(last(2000).starts_with("line 3001\n"));
        assert!(last(1_000_000).starts_with("line 0\n"));
    }
}
