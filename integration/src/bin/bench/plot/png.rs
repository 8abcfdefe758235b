//! A PNG of few colours, as small as it is without a library: rows that are like the one above become zeros, and runs of a
//! byte become one match of a fixed Huffman code.

/// Width, height and the numbers of colours in the palette, a byte a pixel.
pub fn encode(width: usize, height: usize, palette: &[[u8; 3]], pixels: &[u8]) -> Vec<u8> {
    let mut png = b"\x89PNG\r\n\x1a\n".to_vec();
    let mut header = Vec::new();
    header.extend((width as u32).to_be_bytes());
    header.extend((height as u32).to_be_bytes());
    // Eight bits, by palette, the only packing and filters there are, no interlacing.
    header.extend([8, 3, 0, 0, 0]);
    chunk(&mut png, b"IHDR", &header);
    chunk(&mut png, b"PLTE", palette.as_flattened());
    chunk(&mut png, b"IDAT", &zlib(&filtered(width, pixels)));
    chunk(&mut png, b"IEND", &[]);
    png
}

fn chunk(png: &mut Vec<u8>, kind: &[u8; 4], data: &[u8]) {
    png.extend((data.len() as u32).to_be_bytes());
    let from = png.len();
    png.extend(kind);
    png.extend(data);
    let sum = crc(&png[from..]);
    png.extend(sum.to_be_bytes());
}

/// Each row as its difference from the one above.
fn filtered(width: usize, pixels: &[u8]) -> Vec<u8> {
    const UP: u8 = 2;
    let mut above = vec![0; width];
    let mut rows = Vec::with_capacity(pixels.len() + pixels.len() / width);
    for row in pixels.chunks_exact(width) {
        rows.push(UP);
        rows.extend(row.iter().zip(&above).map(|(here, above)| here.wrapping_sub(*above)));
        above.copy_from_slice(row);
    }
    rows
}

fn crc(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        let once = |crc: u32, _| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 };
        (0..8).fold(crc ^ u32::from(*byte), once)
    };
    !bytes.iter().fold(!0, step)
}

fn adler(bytes: &[u8]) -> u32 {
    const PRIME: u32 = 65521;
    let step = |(a, b): (u32, u32), byte: &u8| {
        let a = (a + u32::from(*byte)) % PRIME;
        (a, (b + a) % PRIME)
    };
    let (a, b) = bytes.iter().fold((1, 0), step);
    b << 16 | a
}

fn zlib(bytes: &[u8]) -> Vec<u8> {
    let mut packed = vec![0x78, 0x9c];
    packed.extend(deflate(bytes));
    packed.extend(adler(bytes).to_be_bytes());
    packed
}

/// Bits from the lowest on.
#[derive(Default)]
struct Bits {
    bytes: Vec<u8>,
    held: u32,
    count: u32,
}

impl Bits {
    fn low_first(&mut self, value: u32, count: u32) {
        self.held |= value << self.count;
        self.count += count;
        while self.count >= 8 {
            self.bytes.push(self.held as u8);
            self.held >>= 8;
            self.count -= 8;
        }
    }

    /// Codes of Huffman go the other way round.
    fn code(&mut self, value: u32, count: u32) {
        self.low_first(value.reverse_bits() >> (32 - count), count);
    }

    /// A byte, the end (256) or a length (from 257 on).
    fn symbol(&mut self, symbol: u32) {
        match symbol {
            0..=143 => self.code(0x30 + symbol, 8),
            144..=255 => self.code(0x190 + symbol - 144, 9),
            256..=279 => self.code(symbol - 256, 7),
            _ => self.code(0xc0 + symbol - 280, 8),
        }
    }

    /// The byte before so many times more, at least 3 and at most 258.
    fn again(&mut self, length: u32) {
        if length == 258 {
            self.symbol(285);
        } else if length < 11 {
            self.symbol(254 + length);
        } else {
            // From 11 on there are four codes for each number of further bits.
            let from = length - 3;
            let more = from.ilog2() - 2;
            self.symbol(257 + 4 * more + (from >> more));
            self.low_first(from & ((1 << more) - 1), more);
        }
        self.code(0, 5);
    }
}

/// One block of the fixed code.
fn deflate(bytes: &[u8]) -> Vec<u8> {
    let mut bits = Bits::default();
    bits.low_first(0b011, 3);
    for run in bytes.chunk_by(|a, b| a == b) {
        bits.symbol(u32::from(run[0]));
        let mut left = run.len() as u32 - 1;
        while left >= 3 {
            let now = left.min(258);
            bits.again(now);
            left -= now;
        }
        (0..left).for_each(|_| bits.symbol(u32::from(run[0])));
    }
    bits.symbol(256);
    // What is held comes out.
    bits.low_first(0, 7);
    bits.bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_those_of_the_standards() {
        assert_eq!(crc(b"IEND"), 0xae42_6082);
        assert_eq!(adler(b"Wikipedia"), 0x11e6_0398);
    }

    #[test]
    fn a_run_is_a_byte_and_a_match() {
        // As zlib unpacks it.
        assert_eq!(zlib(&[b'a'; 10]), [0x78, 0x9c, 0x4b, 0x84, 0x03, 0x00, 0x14, 0xe1, 0x03, 0xcb]);
    }

    /// The length that a code and its further bits stand for, by the table of RFC 1951.
    #[test]
    fn every_length_has_its_code() {
        const BASE: [u32; 29] = [
            3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195,
            227, 258,
        ];
        for length in 3..=258 {
            let mut bits = Bits::default();
            bits.again(length);
            bits.low_first(0, 31 - bits.count);
            let word = bits.bytes.iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
            let seven = (word as u32 & 127).reverse_bits() >> 25;
            let (symbol, used) = if seven < 24 {
                (256 + seven, 7)
            } else {
                (((word as u32 & 255).reverse_bits() >> 24) - 0xc0 + 280, 8)
            };
            let at = symbol as usize - 257;
            let more = if (8..28).contains(&at) { (at as u32 - 4) / 4 } else { 0 };
            let extra = (word >> used) as u32 & ((1 << more) - 1);
            assert_eq!(BASE[at] + extra, length);
        }
    }

    #[test]
    fn rows_that_are_alike_cost_nothing() {
        let png = encode(1000, 500, &[[255, 255, 255]], &vec![0; 500_000]);
        assert!(png.len() < 5000, "{}", png.len());
    }
}
