//! Writing raw bytes to a file by several threads at once.
//!
//! Where a record lies follows from the lengths before it, so only that is decided one after the other: each thread reads
//! and sums its bytes, takes the next number and place under a lock, and writes head and bytes there while others do the
//! same elsewhere. The stream that comes out is one that a single thread could have written.

use super::head::Head;
use super::writer::{PAGE, Stream, write_failed};
use super::{MAX_RAW, PageRun, WRITE};
use nix::errno::Errno;
use nix::sys::uio::pwritev;
use pod_runtime::{Problem, Result};
use std::fs::File;
use std::io::{self, IoSlice, Seek, SeekFrom};
use std::sync::{Mutex, PoisonError};
use xxhash_rust::xxh3;

/// Fewer than the kernel's IOV_MAX.
const MOST_SLICES: usize = 512;

/// The end of a file that is being written, for many threads. When it is dropped the stream goes on behind it.
pub struct Lanes<'a> {
    file: &'a File,
    stream: Mutex<&'a mut Stream>,
}

impl<'a> Lanes<'a> {
    pub(super) fn new(file: &'a File, stream: &'a mut Stream) -> Lanes<'a> {
        Lanes { file, stream: Mutex::new(stream) }
    }

    /// Raw bytes to their places, a record each.
    pub fn put(&self, runs: &[(PageRun, &[u8])]) -> Result<()> {
        if let Some((run, data)) = runs.iter().find(|(run, data)| run.bytes != data.len() as u64 || run.bytes > MAX_RAW)
        {
            let what = format!("a run of {} bytes was announced and {} came", run.bytes, data.len());
            return Err(Problem::new(WRITE, what));
        }
        let sums: Vec<u64> = runs.iter().map(|(_, data)| xxh3::xxh3_64(data)).collect();
        let mut heads = Vec::with_capacity(runs.len() * 2 * Head::SIZE + PAGE as usize);
        let mut ends = Vec::with_capacity(runs.len());
        let begin;
        {
            let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
            begin = stream.written;
            for ((run, _), sum) in runs.iter().zip(sums) {
                stream.run(*run, sum, true, &mut heads);
                stream.written += run.bytes;
                stream.raw += run.bytes;
                ends.push(heads.len());
            }
        }
        let mut slices = Vec::with_capacity(2 * runs.len());
        let mut from = 0;
        for ((_, data), end) in runs.iter().zip(ends) {
            slices.push(IoSlice::new(&heads[from..end]));
            slices.push(IoSlice::new(data));
            from = end;
        }
        self.write_at(&mut slices, begin).map_err(write_failed)
    }

    fn write_at(&self, mut slices: &mut [IoSlice<'_>], mut at: u64) -> io::Result<()> {
        IoSlice::advance_slices(&mut slices, 0);
        while !slices.is_empty() {
            let most = slices.len().min(MOST_SLICES);
            match pwritev(self.file, &slices[..most], at as i64) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    at += n as u64;
                    IoSlice::advance_slices(&mut slices, n);
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// All threads are done: what comes next is written behind what they wrote.
    pub fn finish(self) -> Result<()> {
        let mut file = self.file;
        let stream = self.stream.into_inner().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(stream.written)).map(drop).map_err(write_failed)
    }
}
