//! What the targets share: streams and documents that are valid enough to get past the first checks, and changes to them
//! that leave them so. Random bytes would die at the first checksum; so a change is made to one value of one record and
//! the checksums are set right again, as somebody would who means harm.

pub mod dice;
pub mod stream;
pub mod value;

use dice::Dice;
use stream::Piece;

/// Changes a stream. For `fuzz_mutator!`.
pub fn mutate_stream(data: &mut [u8], size: usize, most: usize, seed: u32) -> usize {
    let mut dice = Dice::new(seed);
    let mut pieces = stream::decode(&data[..size]);
    if pieces.is_empty() || dice.one_in(40) {
        return libfuzzer_sys::fuzzer_mutate(data, size, most);
    }
    for _ in 0..1 + dice.below(3) {
        change(&mut pieces, &mut dice);
    }
    put(&stream::encode(&pieces), data, most).unwrap_or_else(|| libfuzzer_sys::fuzzer_mutate(data, size, most))
}

/// Records of the one in the other.
pub fn cross_streams(one: &[u8], other: &[u8], out: &mut [u8], seed: u32) -> usize {
    let mut dice = Dice::new(seed);
    let (mut pieces, theirs) = (stream::decode(one), stream::decode(other));
    for piece in theirs {
        if dice.one_in(4) {
            let at = dice.below(pieces.len() + 1);
            pieces.insert(at, piece);
        }
    }
    let most = out.len();
    put(&stream::encode(&pieces), out, most).unwrap_or(0)
}

fn change(pieces: &mut Vec<Piece>, dice: &mut Dice) {
    let Some(at) = dice.index(pieces.len()) else { return };
    match dice.below(16) {
        0 => drop(pieces.remove(at)),
        1 => pieces.insert(at, pieces[at].clone()),
        2 => {
            let other = dice.below(pieces.len());
            pieces.swap(at, other);
        }
        3 => pieces[at].change_head(dice),
        4 => bytes(&mut pieces[at].payload, dice),
        _ if pieces[at].is_raw() => bytes(&mut pieces[at].payload, dice),
        _ => match ciborium::from_reader::<ciborium::Value, _>(&pieces[at].payload[..]) {
            Ok(mut value) => {
                value::change(&mut value, dice);
                pieces[at].payload.clear();
                ciborium::into_writer(&value, &mut pieces[at].payload).expect("a vector takes everything");
            }
            Err(_) => bytes(&mut pieces[at].payload, dice),
        },
    }
}

fn bytes(payload: &mut Vec<u8>, dice: &mut Dice) {
    let size = payload.len();
    payload.resize(size + 1 + dice.below(64), 0);
    let most = payload.len();
    let size = libfuzzer_sys::fuzzer_mutate(payload, size, most);
    payload.truncate(size);
}

/// Changes a JSON document behind `skip` bytes that choose what it is.
pub fn mutate_json(data: &mut [u8], size: usize, most: usize, seed: u32, skip: usize) -> usize {
    let mut dice = Dice::new(seed);
    if size > skip
        && !dice.one_in(8)
        && let Ok(mut document) = serde_json::from_slice::<ciborium::Value>(&data[skip..size])
    {
        for _ in 0..1 + dice.below(3) {
            value::change(&mut document, &mut dice);
        }
        if let Ok(text) = serde_json::to_vec(&document)
            && let Some(length) = put(&text, &mut data[skip..], most - skip)
        {
            return skip + length;
        }
    }
    libfuzzer_sys::fuzzer_mutate(data, size, most)
}

fn put(from: &[u8], to: &mut [u8], most: usize) -> Option<usize> {
    if from.len() > most {
        return None;
    }
    to[..from.len()].copy_from_slice(from);
    Some(from.len())
}
