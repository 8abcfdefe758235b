//! Raw bytes in a smaller form. Each record is packed for itself, so that any thread can read any of them.
//!
//! The payload of a packed record is a method (u32: 1 is zstd), 0 (u32), the number of bytes that come out of it (u64), and
//! one frame. Its checksum is of all that as it lies in the file, and is compared before anything is unpacked. What comes
//! out must be as long as was said, and not longer than [`MAX_PACKED`]: nothing is made room for beyond that.

use super::{MAX_PACKED, WRITE, damaged};
use pod_runtime::{Doing, Problem, Result};
use zstd::bulk::{Compressor, Decompressor};

pub(super) const PREFIX: usize = 16;
const ZSTD: u32 = 1;
/// What does not shrink by a part in so many stays as it is: to unpack it would cost more than to read it.
const WORTH: usize = 8;
/// Less is not worth a frame.
const LITTLE: usize = 256;
/// What a frame of [`MAX_PACKED`] bytes that do not shrink takes, and a little.
pub(super) const MOST_STORED: u64 = PREFIX as u64 + MAX_PACKED + MAX_PACKED / 128 + 512;

/// Bytes in the form in which they are stored.
#[derive(Debug)]
pub struct Packed(Vec<u8>);

impl Packed {
    pub(super) fn stored(&self) -> &[u8] {
        &self.0
    }
}

/// Packs one piece after the other.
pub struct Packer {
    zstd: Compressor<'static>,
}

impl Packer {
    /// With a level of zstd.
    pub fn new(level: i32) -> Result<Packer> {
        let zstd = Compressor::new(level).code(WRITE, || format!("pack with zstd at level {level}"))?;
        Ok(Packer { zstd })
    }

    /// `None` for what is not worth it.
    pub fn pack(&mut self, bytes: &[u8]) -> Result<Option<Packed>> {
        if bytes.len() < LITTLE || bytes.len() as u64 > MAX_PACKED {
            return Ok(None);
        }
        let mut stored = vec![0; PREFIX + zstd::zstd_safe::compress_bound(bytes.len())];
        stored[..4].copy_from_slice(&ZSTD.to_le_bytes());
        stored[8..16].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
        let length = self.zstd.compress_to_buffer(bytes, &mut stored[PREFIX..]);
        stored.truncate(PREFIX + length.code(WRITE, || "pack pages".into())?);
        Ok((stored.len() < bytes.len() - bytes.len() / WORTH).then_some(Packed(stored)))
    }
}

/// How many bytes a packed record holds, by the first bytes of its payload.
pub(super) fn length(prefix: &[u8; PREFIX]) -> Result<u64> {
    let (method, rest) = prefix.split_at(4);
    let (zero, length) = rest.split_at(4);
    let length = u64::from_le_bytes(*length.first_chunk().expect("eight bytes are left"));
    if method != ZSTD.to_le_bytes() || zero != [0; 4] {
        let what = "the image is packed in a way that this pod does not know";
        return Err(Problem::new(super::VERSION, what).fix("use a newer version of pod"));
    }
    if length == 0 || length > MAX_PACKED {
        return Err(damaged(format!("a packed record claims to hold {length} bytes")));
    }
    Ok(length)
}

/// What comes out of a whole payload whose checksum fitted.
pub(super) fn unpack(stored: &[u8], length: u64) -> Result<Vec<u8>> {
    let unpacked = Decompressor::new().and_then(|mut zstd| {
        let mut bytes = vec![0; length as usize];
        let count = zstd.decompress_to_buffer(stored.get(PREFIX..).unwrap_or_default(), &mut bytes)?;
        bytes.truncate(count);
        Ok(bytes)
    });
    match unpacked {
        Ok(bytes) if bytes.len() as u64 == length => Ok(bytes),
        Ok(bytes) => Err(damaged(format!("a packed record holds {} bytes and claims {length}", bytes.len()))),
        Err(error) => Err(damaged("a packed record cannot be unpacked").because(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{DAMAGED, Kind, Owner, PageRun, Reader, VERSION, Writer};
    use super::*;
    use crate::ids::MmId;
    use std::io::Seek;

    fn stream(packed: &Packed, bytes: u64) -> Vec<u8> {
        let mut w = Writer::new(Vec::new());
        w.packed(PageRun { owner: Owner::Mm(MmId(1)), address: 4096, bytes }, packed).unwrap();
        w.put(Kind::IPC, 0, &1).unwrap();
        w.finish().unwrap()
    }

    /// All bytes of the first record, read in small pieces.
    fn read(stream: &[u8]) -> Result<Vec<u8>> {
        read_all(Reader::new(stream)?)
    }

    fn read_all<R: std::io::Read>(mut reader: Reader<R>) -> Result<Vec<u8>> {
        let run = reader.next()?.and_then(|record| record.run).expect("raw bytes");
        let (mut all, mut piece) = (Vec::new(), [0; 1000]);
        loop {
            match reader.read_pages(&mut piece)? {
                0 => break,
                n => all.extend_from_slice(&piece[..n]),
            }
        }
        assert_eq!(run.bytes, all.len() as u64);
        while reader.next()?.is_some() {}
        Ok(all)
    }

    #[test]
    fn what_is_packed_comes_out_again() {
        let bytes = b"pages of a program ".repeat(20_000);
        let packed = Packer::new(1).unwrap().pack(&bytes).unwrap().unwrap();
        assert!(packed.stored().len() < bytes.len() / 20);
        let stream = stream(&packed, bytes.len() as u64);
        assert!(read(&stream).unwrap() == bytes);
        // From a file, left in it.
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, &stream).unwrap();
        let mut reader = Reader::of_file(file.try_clone().unwrap()).unwrap();
        reader.next().unwrap();
        let waiting = reader.leave_pages().unwrap().unwrap();
        assert_eq!(reader.next().unwrap().unwrap().kind, Kind::IPC);
        assert!(reader.next().unwrap().is_none(), "the digest fits");
        let mut found = Vec::new();
        waiting
            .read(&file, &mut [0; 5000], |at, piece| {
                assert_eq!(at, found.len() as u64);
                found.extend_from_slice(piece);
                Ok(())
            })
            .unwrap();
        assert!(found == bytes);
        let mut part = [0; 100];
        waiting.read_part(&file, 12_345, &mut part).unwrap();
        assert_eq!(part, bytes[12_345..12_445]);
        // And read there, when it has been read before.
        let again = Reader::of_verified_file(file.try_clone().unwrap()).unwrap();
        assert!(read_all(again).unwrap() == bytes);
        file.rewind().unwrap();
        super::super::verify(file).unwrap();
    }

    #[test]
    fn what_does_not_shrink_stays() {
        let mut packer = Packer::new(1).unwrap();
        let noise: Vec<u8> = (0..100_000u64).map(|n| blake3::hash(&n.to_le_bytes()).as_bytes()[0]).collect();
        assert!(packer.pack(&noise).unwrap().is_none());
        assert!(packer.pack(&[0; 100]).unwrap().is_none());
        assert!(Packer::new(1).unwrap().pack(&vec![0; MAX_PACKED as usize]).unwrap().is_some());
        assert!(packer.pack(&vec![0; MAX_PACKED as usize + 1]).unwrap().is_none());
    }

    /// Each is well-formed as a record: only what it says of itself is false.
    #[test]
    fn who_claims_too_much_or_too_little_is_refused() {
        let bytes = vec![7; 100_000];
        let good = Packer::new(1).unwrap().pack(&bytes).unwrap().unwrap();
        let code = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut stored = good.stored().to_vec();
            change(&mut stored);
            let stream = stream(&Packed(stored), bytes.len() as u64);
            let walk = || -> Result<()> {
                let mut reader = Reader::new(&stream[..])?;
                while reader.next()?.is_some() {}
                Ok(())
            };
            walk().unwrap_err().code().to_owned()
        };
        let claim = |length: u64| move |stored: &mut Vec<u8>| stored[8..16].copy_from_slice(&length.to_le_bytes());
        for length in [0, 1, 99_999, 100_001, MAX_PACKED, MAX_PACKED + 1, 1 << 40, u64::MAX] {
            assert_eq!(code(&claim(length)), DAMAGED, "{length}");
        }
        assert_eq!(code(&|stored| stored[0] = 2), VERSION);
        assert_eq!(code(&|stored| stored[4] = 1), VERSION);
        for length in [0, 3, 16, 17, good.stored().len() - 1] {
            assert_eq!(code(&|stored: &mut Vec<u8>| stored.truncate(length)), DAMAGED, "{length}");
        }
        assert_eq!(code(&|stored| stored.extend_from_slice(b"more")), DAMAGED);
        assert_eq!(code(&|stored| stored.resize(MOST_STORED as usize + 1, 0)), DAMAGED);
        // A bomb: a frame of a few bytes that would become a GiB.
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
        assert_eq!(code(&|stored| stored.splice(PREFIX.., bomb.iter().copied()).for_each(drop)), DAMAGED);
    }
}
