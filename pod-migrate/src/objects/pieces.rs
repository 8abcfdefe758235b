//! Parts of one of the kernel's structs that a walk (a BPF program) reads together, and where in what was read a member is.

use pod_runtime::proc::btf::Place;

/// Pieces that lie so near to each other are read as one.
const NEAR: u32 = 64;
/// Bytes that go through the walk's stack at a time.
pub const PIECE: u32 = 256;

/// Ranges that have all of these places: offset and bytes.
pub fn pieces(places: impl Iterator<Item = Place>) -> Vec<(u32, u32)> {
    let mut places: Vec<(u32, u32)> =
        places.map(|place| (place.byte(), (place.bit + place.bits).div_ceil(8))).collect();
    places.sort_unstable();
    let mut pieces: Vec<(u32, u32)> = Vec::new();
    for (start, end) in places {
        match pieces.last_mut() {
            Some((first, bytes)) if start <= *first + *bytes + NEAR && end - *first <= PIECE => {
                *bytes = (*bytes).max(end - *first);
            }
            _ => pieces.push((start, end - start)),
        }
    }
    pieces
}

/// Where a place of the struct lies in the pieces that were read, one behind the other from `before` on.
pub fn moved(place: Place, pieces: &[(u32, u32)], before: u32) -> Option<Place> {
    let mut at = before;
    for (start, bytes) in pieces {
        if (*start..start + bytes).contains(&place.byte()) {
            return Some(Place { bit: (at + place.byte() - start) * 8 + place.bit % 8, bits: place.bits });
        }
        at += bytes;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_found_in_the_pieces() {
        let at = |byte: u32, bits| Place { bit: byte * 8, bits };
        let all = [at(8, 32), at(12, 3), at(400, 64), at(600, 8), at(610, 2000)];
        let pieces = pieces(all.into_iter());
        assert_eq!(pieces, [(8, 5), (400, 8), (600, 1), (610, 250)]);
        assert_eq!(moved(Place { bit: 12 * 8 + 2, bits: 1 }, &pieces, 0), Some(Place { bit: 34, bits: 1 }));
        assert_eq!(moved(at(400, 64), &pieces, 100), Some(Place { bit: 840, bits: 64 }));
        assert_eq!(moved(at(500, 8), &pieces, 0), None);
    }
}
