//! The fixed parts: the 32 bytes that open a stream and the 48 bytes that open a record. All numbers little-endian.

use super::{DAMAGED, Kind, VERSION, damaged};
use pod_runtime::{Problem, Result};
use xxhash_rust::xxh3;

/// Every version of the format opens with this.
const MAGIC: [u8; 8] = *b"pod\x00img\n";
/// Grows when old readers could not even walk the records.
pub(super) const FORMAT: u32 = 1;

/// What opens a stream: enough to refuse it by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub format: u32,
    /// The ELF machine number: 62 x86-64, 183 aarch64.
    pub arch: u32,
    pub page_size: u32,
}

impl Header {
    pub const SIZE: usize = 32;

    /// What this build on this host writes.
    pub fn here() -> Header {
        Header { format: FORMAT, arch: ARCH, page_size: 4096 }
    }

    pub(super) fn encode(&self) -> [u8; Self::SIZE] {
        let mut b = [0; Self::SIZE];
        b[..8].copy_from_slice(&MAGIC);
        b[8..12].copy_from_slice(&self.format.to_le_bytes());
        b[12..16].copy_from_slice(&self.arch.to_le_bytes());
        b[16..20].copy_from_slice(&self.page_size.to_le_bytes());
        let check = xxh3::xxh3_64(&b[..24]);
        b[24..].copy_from_slice(&check.to_le_bytes());
        b
    }

    pub(super) fn decode(b: &[u8; Self::SIZE]) -> Result<Header> {
        if b[..8] != MAGIC {
            return Err(Problem::new(DAMAGED, "not an image of a pod: the first bytes are something else"));
        }
        if xxh3::xxh3_64(&b[..24]) != u64_at(b, 24) {
            return Err(damaged("the header of the image is damaged"));
        }
        let header = Header { format: u32_at(b, 8), arch: u32_at(b, 12), page_size: u32_at(b, 16) };
        if header.format != FORMAT {
            return Err(Problem::new(
                VERSION,
                format!("the image has format {}, this pod knows format {FORMAT}", header.format),
            )
            .fix("use the version of pod that wrote it, or a newer one"));
        }
        if header.arch != ARCH {
            return Err(Problem::new(
                VERSION,
                format!("the image is of a {} machine, this one is {}", arch_name(header.arch), arch_name(ARCH)),
            )
            .fix("restore it on a machine of its kind"));
        }
        if header.page_size != 4096 {
            return Err(Problem::new(VERSION, format!("the image has pages of {} bytes", header.page_size)));
        }
        Ok(header)
    }
}

#[cfg(target_arch = "x86_64")]
const ARCH: u32 = 62;
#[cfg(target_arch = "aarch64")]
const ARCH: u32 = 183;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const ARCH: u32 = 0;

fn arch_name(number: u32) -> &'static str {
    match number {
        62 => "x86-64",
        183 => "aarch64",
        _ => "unknown",
    }
}

/// What opens a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    pub kind: Kind,
    pub version: u16,
    pub flags: u32,
    pub id: u64,
    pub length: u64,
    /// For raw records: the address or offset that the bytes belong to. 0 otherwise.
    pub position: u64,
    /// xxh3 of the payload.
    pub checksum: u64,
}

/// A reader that does not know the kind may go on.
pub(super) const SKIPPABLE: u32 = 1;

impl Head {
    pub const SIZE: usize = 48;

    /// `sequence` counts the records of the stream from 0: a record lost, doubled or moved is found at once.
    pub fn encode(&self, sequence: u64) -> [u8; Self::SIZE] {
        let mut b = [0; Self::SIZE];
        b[..2].copy_from_slice(&self.kind.0.to_le_bytes());
        b[2..4].copy_from_slice(&self.version.to_le_bytes());
        b[4..8].copy_from_slice(&self.flags.to_le_bytes());
        b[8..16].copy_from_slice(&self.id.to_le_bytes());
        b[16..24].copy_from_slice(&self.length.to_le_bytes());
        b[24..32].copy_from_slice(&self.position.to_le_bytes());
        b[32..40].copy_from_slice(&self.checksum.to_le_bytes());
        let check = xxh3::xxh3_64_with_seed(&b[..40], sequence);
        b[40..].copy_from_slice(&check.to_le_bytes());
        b
    }

    pub fn decode(b: &[u8; Self::SIZE], sequence: u64) -> Result<Head> {
        if xxh3::xxh3_64_with_seed(&b[..40], sequence) != u64_at(b, 40) {
            return Err(damaged(format!("the head of record {sequence} is damaged")));
        }
        Ok(Head {
            kind: Kind(u16::from_le_bytes([b[0], b[1]])),
            version: u16::from_le_bytes([b[2], b[3]]),
            flags: u32_at(b, 4),
            id: u64_at(b, 8),
            length: u64_at(b, 16),
            position: u64_at(b, 24),
            checksum: u64_at(b, 32),
        })
    }
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    let mut n = [0; 4];
    n.copy_from_slice(&b[at..at + 4]);
    u32::from_le_bytes(n)
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    let mut n = [0; 8];
    n.copy_from_slice(&b[at..at + 8]);
    u64::from_le_bytes(n)
}
