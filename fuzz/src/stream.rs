//! The record stream once more, from `docs/image.md` alone: decoded without belief, encoded with checksums that fit.

use crate::dice::Dice;
use crate::value::INTERESTING;
use xxhash_rust::xxh3;

const HEADER: usize = 32;
const HEAD: usize = 48;
const PAD: u16 = 1;
const END: u16 = 48;
const RAW: [u16; 6] = [5, 23, 32, 33, 35, 40];
const READY_FOR_PAGES: u16 = 34;
/// Kinds that are something.
const KINDS: [u16; 29] = [
    1, 2, 3, 4, 5, 6, 7, 8, 16, 17, 18, 19, 20, 21, 22, 23, 24, 32, 33, 34, 35, 36, 37, 38, 40, 48, 64, 65, 0xffff,
];

/// One record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    pub kind: u16,
    version: u16,
    flags: u32,
    id: u64,
    position: u64,
    pub payload: Vec<u8>,
    /// A length that the head claims instead of the payload's own.
    claimed: Option<u64>,
}

impl Piece {
    pub fn is_raw(&self) -> bool {
        RAW.contains(&self.kind)
    }

    /// Whether what follows are pages only.
    pub fn ends_the_states(&self) -> bool {
        self.kind == READY_FOR_PAGES
    }

    pub fn change_head(&mut self, dice: &mut Dice) {
        let number = match dice.below(3) {
            0 => dice.number(),
            1 => dice.number() % 64,
            _ => INTERESTING[dice.below(INTERESTING.len())] as u64,
        };
        match dice.below(6) {
            0 => self.kind = KINDS[dice.below(KINDS.len())],
            1 => self.version = number as u16,
            2 => self.flags = number as u32,
            3 => self.id = number,
            4 => self.position = number,
            _ => self.claimed = Some(number),
        }
    }
}

/// The records of a stream as far as there are any. PAD and the trailer are left out: [`encode`] makes a new one.
pub fn decode(stream: &[u8]) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut rest = stream.get(HEADER..).unwrap_or_default();
    while let Some((head, after)) = rest.split_at_checked(HEAD) {
        let number = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("eight bytes"));
        let length = usize::try_from(number(16)).unwrap_or(usize::MAX).min(after.len());
        let (payload, next) = after.split_at(length);
        let kind = u16::from_le_bytes([head[0], head[1]]);
        if kind != PAD && kind != END {
            pieces.push(Piece {
                kind,
                version: u16::from_le_bytes([head[2], head[3]]),
                flags: u32::from_le_bytes(head[4..8].try_into().expect("four bytes")),
                id: number(8),
                position: number(24),
                payload: payload.to_vec(),
                claimed: (number(16) != length as u64).then(|| number(16)),
            });
        }
        rest = next;
    }
    pieces
}

/// A whole stream with its trailer.
pub fn encode(pieces: &[Piece]) -> Vec<u8> {
    let mut out = b"pod\0img\n".to_vec();
    let arch = if cfg!(target_arch = "x86_64") { 62u32 } else { 183 };
    for number in [1, arch, 4096, 0] {
        out.extend_from_slice(&number.to_le_bytes());
    }
    let check = xxh3::xxh3_64(&out[..24]);
    out.extend_from_slice(&check.to_le_bytes());
    let mut digest = blake3::Hasher::new();
    digest.update(&out);
    for (sequence, piece) in pieces.iter().enumerate() {
        let head = head(piece, sequence as u64);
        digest.update(&head);
        if !piece.is_raw() {
            digest.update(&piece.payload);
        }
        out.extend_from_slice(&head);
        out.extend_from_slice(&piece.payload);
    }
    let bytes = digest.finalize().as_bytes().to_vec();
    let text = |text: &str| ciborium::Value::Text(text.into());
    let trailer = vec![
        (text("records"), ciborium::Value::from(pieces.len() as u64)),
        (text("digest"), ciborium::Value::Bytes(bytes)),
    ];
    let mut payload = Vec::new();
    ciborium::into_writer(&ciborium::Value::Map(trailer), &mut payload).expect("a vector takes everything");
    let end = Piece { kind: END, version: 1, flags: 0, id: 0, position: 0, payload, claimed: None };
    out.extend_from_slice(&head(&end, pieces.len() as u64));
    out.extend_from_slice(&end.payload);
    out
}

fn head(piece: &Piece, sequence: u64) -> [u8; HEAD] {
    let mut head = [0; HEAD];
    head[..2].copy_from_slice(&piece.kind.to_le_bytes());
    head[2..4].copy_from_slice(&piece.version.to_le_bytes());
    head[4..8].copy_from_slice(&piece.flags.to_le_bytes());
    head[8..16].copy_from_slice(&piece.id.to_le_bytes());
    head[16..24].copy_from_slice(&piece.claimed.unwrap_or(piece.payload.len() as u64).to_le_bytes());
    head[24..32].copy_from_slice(&piece.position.to_le_bytes());
    head[32..40].copy_from_slice(&xxh3::xxh3_64(&piece.payload).to_le_bytes());
    let check = xxh3::xxh3_64_with_seed(&head[..40], sequence);
    head[40..].copy_from_slice(&check.to_le_bytes());
    head
}
