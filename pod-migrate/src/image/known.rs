//! A file that has been read through and compared once is used without being read again: what it says is in memory, and
//! where its raw bytes lie is known. (A gibibyte of pages is 8000 records, each a seek and a read on the second way through,
//! before a pod that is restored lazily can run.) Only the contents of files are read twice: to be compared, and to be used.

use super::{Kind, Reader, Record, Waiting};
use pod_runtime::Result;
use std::collections::VecDeque;
use std::fs::File;

/// More than this is not kept: then the file is walked again.
const MOST: usize = 64 << 20;

/// A record and, when it is a raw one with bytes, where they are.
pub(super) struct Known {
    pub record: Record,
    pub waiting: Option<Waiting>,
}

impl Reader<File> {
    /// Reads a whole file and compares every checksum and the digest, but for the bytes of memory: of those only that they
    /// are there. Nothing of an image from a file is used before this; the bytes of memory are compared as they are read
    /// into their place, where they wait until all fitted.
    pub fn of_verified_file(file: File) -> Result<Self> {
        let mut reader = Reader::of_file(file)?;
        let (mut known, mut kept) = (VecDeque::new(), 0);
        let mut piece = Vec::new();
        while let Some(record) = reader.next()? {
            let waiting = reader.waiting();
            if matches!(record.kind, Kind::PAGES | Kind::AHEAD_PAGES | Kind::SHARED_PAGES) {
                reader.leave_pages()?;
            } else if waiting.is_some() {
                piece.resize(256 << 10, 0);
                while reader.read_pages(&mut piece)? > 0 {}
            }
            kept += size_of::<Known>() + record.payload().len();
            match kept <= MOST {
                true => known.push_back(Known { record, waiting }),
                false => known = VecDeque::new(),
            }
        }
        reader.nothing_after()?;
        if kept <= MOST { Ok(reader.again(known)) } else { Reader::of_file(reader.into_inner()) }
    }
}
