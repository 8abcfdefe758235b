//! Reading a stream that may be damaged or hostile.

use super::head::{Head, Header, SKIPPABLE};
use super::known::Known;
use super::pack::{self, MOST_STORED, PREFIX};
use super::writer::{PACKED, Trailer};
use super::{Kind, MAX_DEPTH, MAX_RAW, MAX_STATE, Owner, PageRun, VERSION, damaged};
use pod_runtime::{Problem, Result};
use serde::de::DeserializeOwned;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use xxhash_rust::xxh3::{self, Xxh3};

/// Payloads are read in pieces of this size, so that a false length costs no more memory than the stream has bytes.
const PIECE: usize = 1 << 20;
/// Read ahead on a link.
const AHEAD: usize = 256 << 10;
/// Read ahead in a file, in which most is passed over.
const AHEAD_IN_FILE: usize = 4 << 10;

/// The version of filler whose payload is part of the digest.
const HASHED_FILLER: u16 = 1;

/// One record. The bytes of a raw one are read from the [`Reader`] after it.
#[derive(Debug)]
pub struct Record {
    pub kind: Kind,
    pub version: u16,
    pub id: u64,
    /// Where the raw bytes belong; `None` when the payload is a state.
    pub run: Option<PageRun>,
    payload: Vec<u8>,
}

impl Record {
    /// The payload as the state of its kind.
    pub fn state<T: DeserializeOwned>(&self) -> Result<T> {
        let mut rest = &self.payload[..];
        let state = ciborium::de::from_reader_with_recursion_limit(&mut rest, MAX_DEPTH).map_err(|e| {
            damaged(format!("a {} record does not say what it should", self.kind)).because(e.to_string())
        })?;
        if !rest.is_empty() {
            return Err(damaged(format!("a {} record has {} bytes too many", self.kind, rest.len())));
        }
        Ok(state)
    }

    /// The CBOR as it is.
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }
}

pub struct Reader<R: Read> {
    from: BufReader<R>,
    /// The file behind `from`, with the same position, when bytes in it may be left where they are.
    file: Option<File>,
    header: Header,
    sequence: u64,
    read: u64,
    digest: blake3::Hasher,
    ended: bool,
    raw: Option<Raw>,
    put_back: Option<Record>,
    /// What comes, of a file that was read through before; where its end has been seen.
    known: VecDeque<Known>,
    /// Of the raw record at hand, when it is a known one of which nothing was read.
    untouched: Option<Waiting>,
}

/// The raw record being read.
struct Raw {
    bytes: u64,
    left: u64,
    checksum: u64,
    hash: Box<Xxh3>,
    packed: Option<Unpacking>,
}

/// Of a packed record: what was read of the payload, how long that is, and what came out of it.
struct Unpacking {
    prefix: [u8; PREFIX],
    stored: u64,
    bytes: Option<Vec<u8>>,
}

/// Raw bytes that were left in the file, to be read at their place: by another thread, say.
#[derive(Debug, Clone, Copy)]
pub struct Waiting {
    offset: u64,
    bytes: u64,
    /// How many there are in the file, if they are packed.
    packed: Option<u64>,
    checksum: u64,
    record: u64,
}

impl Waiting {
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Some of them, from `at` on: for who has compared all of the file before.
    pub fn read_part(&self, file: &File, at: u64, into: &mut [u8]) -> Result<()> {
        debug_assert!(at + into.len() as u64 <= self.bytes);
        if let Some(stored) = self.packed {
            let bytes = self.unpacked(file, stored)?;
            into.copy_from_slice(&bytes[at as usize..at as usize + into.len()]);
            return Ok(());
        }
        file.read_exact_at(into, self.offset + at).map_err(cut_short)
    }

    fn unpacked(&self, file: &File, stored: u64) -> Result<Vec<u8>> {
        let mut payload = vec![0; stored as usize];
        file.read_exact_at(&mut payload, self.offset).map_err(cut_short)?;
        if xxh3::xxh3_64(&payload) != self.checksum {
            return Err(damaged(format!("the bytes of record {} are damaged", self.record)));
        }
        pack::unpack(&payload, self.bytes)
    }

    /// Where in the file the byte lies that is so far into the run; `None` if they are packed.
    pub fn plain_at(&self, into: u64) -> Option<u64> {
        self.packed.is_none().then_some(self.offset + into)
    }

    /// Which record of the image they are.
    pub fn record(&self) -> u64 {
        self.record
    }

    /// Reads them through `buffer`; `take` gets each piece and how far into the run it begins. The last piece is handed
    /// out only if the checksum fits.
    pub fn read(&self, file: &File, buffer: &mut [u8], mut take: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        if let Some(stored) = self.packed {
            let bytes = self.unpacked(file, stored)?;
            let pieces = bytes.chunks(buffer.len()).enumerate();
            return pieces.into_iter().try_for_each(|(number, piece)| take((number * buffer.len()) as u64, piece));
        }
        let mut hash = Xxh3::new();
        let mut at = 0;
        while at < self.bytes {
            let n = buffer.len().min(usize::try_from(self.bytes - at).unwrap_or(usize::MAX));
            let piece = &mut buffer[..n];
            file.read_exact_at(piece, self.offset + at).map_err(cut_short)?;
            let last = at + n as u64 == self.bytes;
            let sum = match at {
                // All of it at once: what sums piece by piece is slower.
                0 if last => xxh3::xxh3_64(piece),
                _ => {
                    hash.update(piece);
                    if last { hash.digest() } else { 0 }
                }
            };
            if last && sum != self.checksum {
                return Err(damaged(format!("the bytes of record {} are damaged", self.record)));
            }
            take(at, piece)?;
            at += n as u64;
        }
        Ok(())
    }
}

impl Reader<File> {
    /// Of a whole file, whose raw bytes may be left where they are ([`Reader::leave_pages`]).
    pub fn of_file(mut file: File) -> Result<Self> {
        file.rewind().map_err(cut_short)?;
        let same = file.try_clone().map_err(cut_short)?;
        Ok(Reader { file: Some(same), ..Reader::with_capacity(AHEAD_IN_FILE, file)? })
    }

    /// From the first record on, of which nothing is read a second time but raw bytes.
    pub(super) fn again(mut self, known: VecDeque<Known>) -> Self {
        self.known = known;
        self
    }
}

impl<R: Read> Reader<R> {
    /// Reads the header; refuses another format, another machine.
    pub fn new(from: R) -> Result<Self> {
        Self::with_capacity(AHEAD, from)
    }

    fn with_capacity(ahead: usize, from: R) -> Result<Self> {
        let mut from = BufReader::with_capacity(ahead, from);
        let mut bytes = [0; Header::SIZE];
        from.read_exact(&mut bytes).map_err(cut_short)?;
        let header = Header::decode(&bytes)?;
        let mut digest = blake3::Hasher::new();
        digest.update(&bytes);
        Ok(Reader {
            from,
            file: None,
            header,
            sequence: 0,
            read: Header::SIZE as u64,
            digest,
            ended: false,
            raw: None,
            put_back: None,
            known: VecDeque::new(),
            untouched: None,
        })
    }

    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes of the stream used so far; nothing sensible of a file that was read before.
    pub fn bytes(&self) -> u64 {
        self.read
    }

    /// The next record; `None` after a trailer that fits. Raw bytes that were not read are passed over (and
    /// verified, unless the file was read before).
    // Not an Iterator: the bytes of a raw record are read from the reader between two calls.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Result<Option<Record>> {
        if let Some(record) = self.put_back.take() {
            return Ok(Some(record));
        }
        self.skip_pages()?;
        if let Some(known) = self.known.pop_front() {
            return Ok(Some(self.begin_known(known)));
        }
        loop {
            if self.ended {
                return Ok(None);
            }
            let head = self.head()?;
            let strange = strange(&head);
            if head.kind.is_raw() {
                strange.map_or(Ok(()), Err)?;
                return self.begin_raw(head).map(Some);
            }
            if head.kind == Kind::PAD && head.version > HASHED_FILLER && strange.is_none() {
                self.pass_over_filler(&head)?;
                continue;
            }
            let payload = self.payload(&head)?;
            match (head.kind, strange) {
                (_, Some(problem)) if head.flags & SKIPPABLE == 0 => return Err(problem),
                (Kind::PAD, _) | (_, Some(_)) => {}
                (Kind::END, None) => self.end(&head, payload)?,
                (kind, None) => {
                    return Ok(Some(Record { kind, version: head.version, id: head.id, run: None, payload }));
                }
            }
        }
    }

    /// The run of the next record when it is raw; anything else stays for [`Reader::next`]. This is how who fills
    /// memory stops at what comes after the pages.
    pub fn next_run(&mut self) -> Result<Option<PageRun>> {
        let Some(record) = self.next()? else { return Ok(None) };
        if record.run.is_none() {
            self.put_back(record);
            return Ok(None);
        }
        Ok(record.run)
    }

    /// Hands a record back: the next [`Reader::next`] gives it again.
    pub fn put_back(&mut self, record: Record) {
        self.put_back = Some(record);
    }

    /// Hands out the raw record at hand in pieces of at most the buffer's size: where each belongs, when the record begins
    /// at `at`, and what is in it.
    pub fn each_piece(
        &mut self,
        mut at: u64,
        buffer: &mut [u8],
        mut each: impl FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        loop {
            let count = self.read_pages(buffer)?;
            if count == 0 {
                return Ok(());
            }
            each(at, &buffer[..count])?;
            at += count as u64;
        }
    }

    /// Fills `into` from the raw record at hand; returns how many bytes came, 0 when it is used up. The last piece is
    /// handed out only if the checksum fits.
    pub fn read_pages(&mut self, into: &mut [u8]) -> Result<usize> {
        self.go_to_untouched()?;
        let Some(raw) = &mut self.raw else { return Ok(0) };
        if raw.packed.is_some() {
            return self.read_packed(into);
        }
        let n = into.len().min(usize::try_from(raw.left).unwrap_or(usize::MAX));
        self.from.read_exact(&mut into[..n]).map_err(cut_short)?;
        self.read += n as u64;
        raw.hash.update(&into[..n]);
        raw.left -= n as u64;
        if raw.left == 0 {
            let fits = raw.hash.digest() == raw.checksum;
            self.raw = None;
            if !fits {
                return Err(damaged(format!("the bytes of record {} are damaged", self.sequence - 1)));
            }
        }
        Ok(n)
    }

    /// All of a packed record is read, compared and unpacked with its first byte.
    fn read_packed(&mut self, into: &mut [u8]) -> Result<usize> {
        let record = self.sequence - 1;
        let Some(Raw { bytes, left, checksum, packed: Some(packed), .. }) = &mut self.raw else { return Ok(0) };
        if packed.bytes.is_none() {
            let mut payload = packed.prefix.to_vec();
            let more = packed.stored - PREFIX as u64;
            let got = (&mut self.from).take(more).read_to_end(&mut payload).map_err(cut_short)? as u64;
            self.read += got;
            if got != more {
                return Err(damaged("the image ends too early"));
            }
            if xxh3::xxh3_64(&payload) != *checksum {
                return Err(damaged(format!("the bytes of record {record} are damaged")));
            }
            packed.bytes = Some(pack::unpack(&payload, *bytes)?);
        }
        let unpacked = packed.bytes.as_deref().unwrap_or_default();
        let rest = &unpacked[unpacked.len() - *left as usize..];
        let n = into.len().min(rest.len());
        into[..n].copy_from_slice(&rest[..n]);
        *left -= n as u64;
        if *left == 0 {
            self.raw = None;
        }
        Ok(n)
    }

    /// The file, when raw bytes can be left in it.
    pub fn file(&self) -> Option<&File> {
        self.file.as_ref()
    }

    /// Passes over the raw record at hand without reading it: whoever gets it reads and compares it. `None` when this
    /// is no file, or nothing is there to read; then [`Reader::read_pages`] does.
    pub fn leave_pages(&mut self) -> Result<Option<Waiting>> {
        let Some(waiting) = self.waiting() else { return Ok(None) };
        self.raw = None;
        if self.untouched.take().is_some() {
            return Ok(Some(waiting));
        }
        let Some(file) = &mut self.file else { return Ok(None) };
        let here = waiting.offset + waiting.packed.unwrap_or(waiting.bytes) - self.read;
        let ahead = self.from.buffer().len().min(usize::try_from(here).unwrap_or(usize::MAX));
        self.from.consume(ahead);
        let rest = here - ahead as u64;
        if rest > 0 {
            // What was read ahead is used up: the file itself stands where the reader does.
            file.seek(SeekFrom::Current(rest as i64)).map_err(cut_short)?;
        }
        self.read += here;
        Ok(Some(waiting))
    }

    /// Where in the file the bytes of the raw record at hand are, when nothing of them was read.
    pub(super) fn waiting(&self) -> Option<Waiting> {
        if self.untouched.is_some() {
            return self.untouched;
        }
        let raw = self.raw.as_ref().filter(|raw| self.file.is_some() && raw.left == raw.bytes)?;
        // Of a packed one the first bytes were read already.
        let (before, packed) = match &raw.packed {
            Some(Unpacking { bytes: Some(_), .. }) => return None,
            Some(packed) => (PREFIX as u64, Some(packed.stored)),
            None => (0, None),
        };
        let (bytes, checksum) = (raw.bytes, raw.checksum);
        Some(Waiting { offset: self.read - before, bytes, packed, checksum, record: self.sequence - 1 })
    }

    /// A record of a file that was read before. Its raw bytes are not gone to unless they are asked for.
    fn begin_known(&mut self, Known { record, waiting }: Known) -> Record {
        self.untouched = waiting;
        self.raw = waiting.map(|waiting| {
            self.sequence = waiting.record + 1;
            let packed = waiting.packed.map(|stored| Unpacking { prefix: [0; PREFIX], stored, bytes: None });
            let (bytes, checksum) = (waiting.bytes, waiting.checksum);
            Raw { bytes, left: bytes, checksum, hash: Box::new(Xxh3::new()), packed }
        });
        record
    }

    /// Where the bytes of a known record are read after all.
    fn go_to_untouched(&mut self) -> Result<()> {
        let (Some(waiting), Some(file)) = (self.untouched.take(), &mut self.file) else { return Ok(()) };
        // Small files lie one behind the other: often the next is in what was read ahead for the last.
        let ahead = self.from.buffer().len();
        let begins = file.stream_position().map_err(cut_short)? - ahead as u64;
        match waiting.offset.checked_sub(begins).and_then(|into| usize::try_from(into).ok()) {
            Some(into) if into < ahead => self.from.consume(into),
            _ => {
                self.from.consume(ahead);
                file.seek(SeekFrom::Start(waiting.offset)).map_err(cut_short)?;
            }
        }
        self.read = waiting.offset;
        if let Some(Raw { packed: Some(packed), .. }) = &mut self.raw {
            self.from.read_exact(&mut packed.prefix).map_err(cut_short)?;
            self.read += PREFIX as u64;
        }
        Ok(())
    }

    /// Raw bytes still to be read of the record at hand.
    pub fn pages_left(&self) -> u64 {
        self.raw.as_ref().map_or(0, |raw| raw.left)
    }

    /// Passes over the rest of the raw record at hand.
    pub fn skip_pages(&mut self) -> Result<()> {
        if self.untouched.take().is_some() {
            self.raw = None;
        }
        if self.raw.is_some() {
            let mut piece = vec![0; PIECE.min(self.pages_left() as usize)];
            while self.raw.is_some() {
                self.read_pages(&mut piece)?;
            }
        }
        Ok(())
    }

    /// The source of the stream; what was read ahead is lost.
    pub fn into_inner(self) -> R {
        self.from.into_inner()
    }

    /// Whether more was read than was asked for by now.
    pub fn is_ahead(&self) -> bool {
        !self.from.buffer().is_empty()
    }

    pub fn get_mut(&mut self) -> &mut R {
        self.from.get_mut()
    }

    pub(super) fn get_buffered(&mut self) -> &mut BufReader<R> {
        &mut self.from
    }

    fn head(&mut self) -> Result<Head> {
        let mut bytes = [0; Head::SIZE];
        self.from.read_exact(&mut bytes).map_err(cut_short)?;
        self.read += Head::SIZE as u64;
        let head = Head::decode(&bytes, self.sequence)?;
        let most = if head.kind.is_raw() { MAX_RAW } else { MAX_STATE };
        if head.length > most {
            return Err(damaged(format!("a {} record claims {} bytes", head.kind, head.length)));
        }
        self.sequence += 1;
        // The trailer's digest is of everything before the trailer.
        if head.kind != Kind::END {
            self.digest.update(&bytes);
        }
        Ok(head)
    }

    fn payload(&mut self, head: &Head) -> Result<Vec<u8>> {
        let mut payload = Vec::with_capacity(PIECE.min(head.length as usize));
        let got = (&mut self.from).take(head.length).read_to_end(&mut payload).map_err(cut_short)?;
        self.read += got as u64;
        if got as u64 != head.length {
            return Err(damaged("the image ends too early"));
        }
        if xxh3::xxh3_64(&payload) != head.checksum {
            return Err(damaged(format!("record {} ({}) is damaged", self.sequence - 1, head.kind)));
        }
        if head.kind != Kind::END {
            self.digest.update(&payload);
        }
        Ok(payload)
    }

    /// Nothing of it is kept; of most files it lies in what was read ahead with its head.
    fn pass_over_filler(&mut self, head: &Head) -> Result<()> {
        let mut left = head.length;
        let mut hash = Xxh3::new();
        let mut sum = None;
        while left > 0 {
            let ahead = self.from.fill_buf().map_err(cut_short)?;
            let piece = &ahead[..ahead.len().min(usize::try_from(left).unwrap_or(usize::MAX))];
            let length = piece.len();
            match length as u64 {
                0 => return Err(damaged("the image ends too early")),
                all if all == head.length => sum = Some(xxh3::xxh3_64(piece)),
                _ => hash.update(piece),
            }
            self.from.consume(length);
            left -= length as u64;
            self.read += length as u64;
        }
        if sum.unwrap_or_else(|| hash.digest()) != head.checksum {
            return Err(damaged(format!("record {} ({}) is damaged", self.sequence - 1, head.kind)));
        }
        Ok(())
    }

    fn begin_raw(&mut self, head: Head) -> Result<Record> {
        let owner = Owner::from_kind(head.kind, head.id).ok_or_else(|| damaged("raw bytes that belong to nothing"))?;
        let packed = if head.version == PACKED { Some(self.begin_packed(&head)?) } else { None };
        let bytes = packed.as_ref().map_or(Ok(head.length), |packed| pack::length(&packed.prefix))?;
        if head.position.checked_add(bytes).is_none() {
            return Err(damaged(format!("a {} record runs past the end of memory", head.kind)));
        }
        let hash = Box::new(Xxh3::new());
        self.raw = (bytes > 0).then_some(Raw { bytes, left: bytes, checksum: head.checksum, hash, packed });
        Ok(Record {
            kind: head.kind,
            version: head.version,
            id: head.id,
            run: Some(PageRun { owner, address: head.position, bytes }),
            payload: Vec::new(),
        })
    }

    fn begin_packed(&mut self, head: &Head) -> Result<Unpacking> {
        if head.length < PREFIX as u64 || head.length > MOST_STORED {
            return Err(damaged(format!("a packed {} record claims {} bytes", head.kind, head.length)));
        }
        let mut prefix = [0; PREFIX];
        self.from.read_exact(&mut prefix).map_err(cut_short)?;
        self.read += PREFIX as u64;
        Ok(Unpacking { prefix, stored: head.length, bytes: None })
    }

    fn end(&mut self, head: &Head, payload: Vec<u8>) -> Result<()> {
        let record = Record { kind: head.kind, version: head.version, id: 0, run: None, payload };
        let trailer: Trailer = record.state()?;
        if trailer.records != self.sequence - 1 || trailer.digest != *self.digest.finalize().as_bytes() {
            return Err(damaged("the image does not have the digest that its trailer says"));
        }
        self.ended = true;
        Ok(())
    }
}

/// Why a record cannot be read by this version, if so: what is new in its state must not be ignored.
fn strange(head: &Head) -> Option<Problem> {
    let kind = head.kind;
    let what = match kind.version() {
        None => format!("the image holds a record of {kind}, which this pod does not know"),
        Some(known) if head.version > known => {
            let version = head.version;
            format!("the image holds a {kind} record of version {version}, and this pod knows it up to {known}")
        }
        Some(_) => return None,
    };
    Some(Problem::new(VERSION, what).fix("use a newer version of pod"))
}

/// An end in the middle is damage; a link that fails keeps its own name.
fn cut_short(error: std::io::Error) -> Problem {
    if error.kind() == std::io::ErrorKind::UnexpectedEof {
        return damaged("the image ends too early");
    }
    match error.downcast::<Problem>() {
        Ok(problem) => problem,
        Err(error) => Problem::new("E-IMAGE-READ", "read the image").because(error),
    }
}
