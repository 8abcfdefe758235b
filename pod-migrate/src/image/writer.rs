//! Writing a stream. Raw bytes go out by vectored writes from where they lie; small records are gathered first.

use super::head::{Head, Header, SKIPPABLE};
use super::{Kind, Lanes, MAX_RAW, MAX_STATE, Packed, PageRun, Record, WRITE};
use crate::crew;
use pod_runtime::{Doing, Problem, Result};
use serde::Serialize;
use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::time::{Duration, Instant};
use xxhash_rust::xxh3::{self, Xxh3};

/// Gathered small records are written when they reach this.
const GATHER: usize = 64 << 10;
/// Raw payloads of at least this size are aligned to a page in files, so that they can be mapped later.
const ALIGN_FROM: u64 = 64 << 10;
pub(super) const PAGE: u64 = 4096;
/// So many records are encoded at once.
const CROWD: usize = 1024;
/// A link that was silent this long gets filler.
const BREATH: Duration = Duration::from_secs(5);
/// Fewer than the kernel's IOV_MAX.
const MOST_SLICES: usize = 512;

fn encoded<T: Serialize + ?Sized>(kind: Kind, state: &T) -> Result<Vec<u8>> {
    debug_assert!(!kind.is_raw());
    let mut payload = Vec::new();
    ciborium::into_writer(state, &mut payload).doing(|| format!("encode a {kind} record"))?;
    if payload.len() as u64 > MAX_STATE {
        let what = format!("a {kind} record of {} bytes is larger than an image can hold", payload.len());
        return Err(Problem::new(WRITE, what));
    }
    Ok(payload)
}

pub struct Writer<W: Write> {
    to: W,
    gathered: Vec<u8>,
    stream: Stream,
    aligned: bool,
    /// The file that `to` writes, when it is one that may be written at any place.
    file: Option<File>,
    last: Instant,
}

/// How far the stream has come. The digest covers the header, every record's head and every CBOR payload; raw bytes and
/// filler (a page for each run of pages, nearly) are covered through the checksum in their head.
pub(super) struct Stream {
    /// Bytes of the stream so far.
    pub written: u64,
    /// Of those, raw ones.
    pub raw: u64,
    sequence: u64,
    digest: blake3::Hasher,
}

impl Stream {
    fn push(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(bytes);
        self.written += bytes.len() as u64;
    }

    fn head(&mut self, head: Head, out: &mut Vec<u8>) {
        let bytes = head.encode(self.sequence);
        self.sequence += 1;
        self.digest.update(&bytes);
        self.push(&bytes, out);
    }

    fn record(&mut self, (kind, flags): (Kind, u32), id: u64, payload: &[u8], out: &mut Vec<u8>) {
        let (length, checksum, version) = (payload.len() as u64, xxh3::xxh3_64(payload), written(kind));
        self.head(Head { kind, version, flags, id, length, position: 0, checksum }, out);
        if kind != Kind::PAD {
            self.digest.update(payload);
        }
        self.push(payload, out);
    }

    /// The head of raw bytes; with `aligned`, long ones will begin on a page.
    pub fn run(&mut self, run: PageRun, checksum: u64, aligned: bool, out: &mut Vec<u8>) {
        self.raw_head(run, (run.bytes, PLAIN), checksum, aligned, out);
    }

    fn raw_head(
        &mut self,
        run: PageRun,
        (length, version): (u64, u16),
        checksum: u64,
        aligned: bool,
        out: &mut Vec<u8>,
    ) {
        let head = Head::SIZE as u64;
        if aligned && length >= ALIGN_FROM && !(self.written + head).is_multiple_of(PAGE) {
            let fill = (PAGE - (self.written + 2 * head) % PAGE) % PAGE;
            self.record((Kind::PAD, SKIPPABLE), 0, &[0; PAGE as usize][..fill as usize], out);
        }
        let (kind, id, position) = (run.owner.kind(), run.owner.id(), run.address);
        self.head(Head { kind, version, flags: 0, id, length, position, checksum }, out);
    }
}

/// Versions of raw bytes.
pub(super) const PLAIN: u16 = 1;
pub(super) const PACKED: u16 = 2;

/// The version that a record with a state of this kind is written in.
fn written(kind: Kind) -> u16 {
    kind.version().unwrap_or(1)
}

impl Writer<File> {
    /// Opens a stream to a file: long runs start on a page of it, and several threads may write ([`Writer::lanes`]).
    pub fn to_file(to: File) -> Result<Self> {
        let file = to.try_clone().doing(|| "copy a descriptor".into())?;
        Ok(Writer { file: Some(file), ..Writer::aligned(to) })
    }
}

impl<W: Write> Writer<W> {
    /// Opens a stream to a link: nothing is aligned.
    pub fn new(to: W) -> Self {
        let mut stream = Stream { written: 0, raw: 0, sequence: 0, digest: blake3::Hasher::new() };
        let mut gathered = Vec::with_capacity(2 * GATHER);
        let header = Header::here().encode();
        stream.digest.update(&header);
        stream.push(&header, &mut gathered);
        Writer { to, gathered, stream, aligned: false, file: None, last: Instant::now() }
    }

    /// The same with long runs on pages.
    pub fn aligned(to: W) -> Self {
        Writer { aligned: true, ..Writer::new(to) }
    }

    /// For many threads, when this goes to a file. To be given back by [`Lanes::finish`].
    pub fn lanes(&mut self) -> Result<Option<Lanes<'_>>> {
        self.flush()?;
        Ok(self.file.as_ref().map(|file| Lanes::new(file, &mut self.stream)))
    }

    /// One record with a state as CBOR. Written at the latest by the next [`Writer::flush`] or [`Writer::finish`].
    pub fn put<T: Serialize + ?Sized>(&mut self, kind: Kind, id: u64, state: &T) -> Result<()> {
        self.record(kind, 0, id, &encoded(kind, state)?)
    }

    /// The same of many, encoded by all CPUs, some at a time so that whoever reads begins meanwhile.
    pub fn put_all<T: Serialize + Sync>(&mut self, kind: Kind, all: &[(u64, T)]) -> Result<()> {
        for some in all.chunks(CROWD) {
            let payloads = crew::share(some.len(), |at| encoded(kind, &some[at].1));
            for ((id, _), payload) in some.iter().zip(payloads) {
                self.record(kind, 0, *id, &payload?)?;
            }
        }
        Ok(())
    }

    /// A record with a state as it was read.
    pub fn again(&mut self, record: &Record) -> Result<()> {
        self.record(record.kind, 0, record.id, record.payload())
    }

    /// Filler of no meaning: keeps a silent link awake.
    pub fn keep_alive(&mut self) -> Result<()> {
        self.record(Kind::PAD, SKIPPABLE, 0, &[])?;
        self.flush()
    }

    /// Filler of these bytes: to see how fast a link is.
    pub fn filler(&mut self, bytes: &[u8]) -> Result<()> {
        self.record(Kind::PAD, SKIPPABLE, 0, bytes)
    }

    /// Sends filler if nothing was sent for a while. Whoever works long between records calls this now and then.
    pub fn breathe(&mut self) -> Result<()> {
        if self.last.elapsed() < BREATH { Ok(()) } else { self.keep_alive() }
    }

    /// Raw bytes to their place. The slices together have `to.bytes`.
    pub fn pages(&mut self, to: PageRun, data: &[&[u8]]) -> Result<()> {
        let length: u64 = data.iter().map(|d| d.len() as u64).sum();
        if length != to.bytes || length > MAX_RAW {
            let what = format!("a run of {} bytes was announced and {length} came", to.bytes);
            return Err(Problem::new(WRITE, what));
        }
        let checksum = match data {
            [one] => xxh3::xxh3_64(one),
            many => {
                let mut hash = Xxh3::new();
                many.iter().for_each(|d| hash.update(d));
                hash.digest()
            }
        };
        self.stream.run(to, checksum, self.aligned, &mut self.gathered);
        self.stream.raw += length;
        self.payload(length, data)
    }

    /// Raw bytes that were packed.
    pub fn packed(&mut self, to: PageRun, bytes: &Packed) -> Result<()> {
        let stored = bytes.stored();
        let checksum = xxh3::xxh3_64(stored);
        self.stream.raw_head(to, (stored.len() as u64, PACKED), checksum, self.aligned, &mut self.gathered);
        self.stream.raw += to.bytes;
        self.payload(stored.len() as u64, &[stored])
    }

    /// A payload as it is. Short ones are gathered.
    fn payload(&mut self, length: u64, data: &[&[u8]]) -> Result<()> {
        if length < (GATHER / 4) as u64 {
            data.iter().for_each(|d| self.stream.push(d, &mut self.gathered));
            return self.flush_if_full();
        }
        self.vectored(data).map_err(write_failed)
    }

    /// Bytes written or gathered so far.
    pub fn bytes(&self) -> u64 {
        self.stream.written
    }

    /// Of those, bytes of pages and contents.
    pub fn raw_bytes(&self) -> u64 {
        self.stream.raw
    }

    /// Hands all that was gathered to the sink.
    pub fn flush(&mut self) -> Result<()> {
        let done = self.to.write_all(&self.gathered).and_then(|()| self.to.flush());
        self.gathered.clear();
        self.last = Instant::now();
        done.map_err(write_failed)
    }

    /// Writes the trailer. A stream without one is damaged.
    pub fn finish(mut self) -> Result<W> {
        let trailer = Trailer { records: self.stream.sequence, digest: *self.stream.digest.finalize().as_bytes() };
        self.put(Kind::END, 0, &trailer)?;
        self.flush()?;
        Ok(self.to)
    }

    /// What the stream goes to, with nothing gathered any more.
    pub fn sink(&mut self) -> Result<&mut W> {
        self.flush()?;
        Ok(&mut self.to)
    }

    fn record(&mut self, kind: Kind, flags: u32, id: u64, payload: &[u8]) -> Result<()> {
        self.stream.record((kind, flags), id, payload, &mut self.gathered);
        self.flush_if_full()
    }

    fn flush_if_full(&mut self) -> Result<()> {
        if self.gathered.len() < GATHER { Ok(()) } else { self.flush() }
    }

    /// What was gathered and then `data`, in as few system calls as the sink allows.
    fn vectored(&mut self, data: &[&[u8]]) -> io::Result<()> {
        let gathered = std::mem::take(&mut self.gathered);
        let mut slices: Vec<IoSlice<'_>> = Vec::with_capacity(data.len() + 1);
        slices.push(IoSlice::new(&gathered));
        slices.extend(data.iter().filter(|d| !d.is_empty()).map(|d| IoSlice::new(d)));
        let mut rest = &mut slices[..];
        IoSlice::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            let most = rest.len().min(MOST_SLICES);
            match self.to.write_vectored(&rest[..most]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => IoSlice::advance_slices(&mut rest, n),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        self.stream.written += data.iter().map(|d| d.len() as u64).sum::<u64>();
        self.gathered = gathered;
        self.gathered.clear();
        Ok(())
    }
}

/// A link that breaks keeps its own name.
pub(super) fn write_failed(error: io::Error) -> Problem {
    match error.downcast::<Problem>() {
        Ok(problem) => problem,
        Err(error) => Problem::new(WRITE, "write the image").because(error),
    }
}

/// The state of [`Kind::END`].
#[derive(Debug, Serialize, serde::Deserialize)]
pub(super) struct Trailer {
    /// Records before this one.
    pub records: u64,
    #[serde(with = "serde_bytes")]
    pub digest: [u8; 32],
}
