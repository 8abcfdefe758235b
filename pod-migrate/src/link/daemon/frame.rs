//! What is said over the one connection of a call: frames of a kind, a length and so many bytes.
//!
//! `{kind: u8, length: u24 little-endian, bytes}`. A frame of another kind, or of more than [`MOST`] bytes, is an error: the
//! other side is trusted, and may be broken.

use crate::link::PROTOCOL;
use pod_runtime::{Problem, Result};

/// Bytes of a frame.
pub const MOST: usize = 64 << 10;
const HEAD: usize = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// What to run: its arguments, in JSON. The first frame of who calls, and nowhere else.
    Request,
    /// Of standard input, or of standard output.
    Data,
    /// Of standard errors.
    Words,
    /// Standard input has ended.
    End,
    /// The program has ended with this code (a byte), and all that it said has been sent.
    Exit,
}

impl Kind {
    const ALL: [Kind; 5] = [Kind::Request, Kind::Data, Kind::Words, Kind::End, Kind::Exit];
}

/// Puts one frame after what is there.
pub fn put(kind: Kind, bytes: &[u8], into: &mut Vec<u8>) {
    debug_assert!(bytes.len() <= MOST);
    into.push(kind as u8);
    into.extend(&(bytes.len() as u32).to_le_bytes()[..3]);
    into.extend(bytes);
}

/// What has come, frame by frame.
#[derive(Debug, Default)]
pub struct Frames(Vec<u8>);

impl Frames {
    pub fn feed(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
    }

    /// The next one, if all of it has come.
    pub fn next(&mut self) -> Result<Option<(Kind, Vec<u8>)>> {
        let Some(&[kind, a, b, c]) = self.0.first_chunk::<HEAD>() else { return Ok(None) };
        let length = u32::from_le_bytes([a, b, c, 0]) as usize;
        let Some(kind) = Kind::ALL.get(usize::from(kind)).copied().filter(|_| length <= MOST) else {
            return Err(Problem::new(PROTOCOL, format!("a frame of kind {kind} and {length} bytes")));
        };
        if self.0.len() < HEAD + length {
            return Ok(None);
        }
        let rest = self.0.split_off(HEAD + length);
        let mut frame = std::mem::replace(&mut self.0, rest);
        Ok(Some((kind, frame.split_off(HEAD))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn frames_come_as_they_were_sent_in_whatever_pieces(
            sent in proptest::collection::vec((0..5usize, proptest::collection::vec(any::<u8>(), 0..300)), 0..20),
            piece in 1..50usize,
        ) {
            let mut bytes = Vec::new();
            for (kind, payload) in &sent {
                put(Kind::ALL[*kind], payload, &mut bytes);
            }
            let (mut frames, mut came) = (Frames::default(), Vec::new());
            for piece in bytes.chunks(piece) {
                frames.feed(piece);
                while let Some(frame) = frames.next().unwrap() {
                    came.push(frame);
                }
            }
            let sent: Vec<_> = sent.into_iter().map(|(kind, payload)| (Kind::ALL[kind], payload)).collect();
            prop_assert_eq!(came, sent);
        }

        #[test]
        fn nonsense_is_an_error_or_waited_for(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut frames = Frames::default();
            frames.feed(&bytes);
            while let Ok(Some(_)) = frames.next() {}
        }
    }

    #[test]
    fn too_long_or_strange_is_refused_by_its_head() {
        for head in [[9, 0, 0, 0], [1, 1, 0, 1], [255, 255, 255, 255]] {
            let mut frames = Frames::default();
            frames.feed(&head);
            assert_eq!(frames.next().unwrap_err().code(), PROTOCOL, "{head:?}");
        }
        let mut frames = Frames::default();
        frames.feed(&[1, 0, 0, 1]);
        assert!(frames.next().unwrap().is_none(), "64 KiB may come");
    }
}
