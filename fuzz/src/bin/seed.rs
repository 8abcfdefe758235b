//! `seed IMAGE OUT`: of a checkpoint, what a fuzz target begins with: everything but its pages and contents, and no
//! record that is longer than a page or two.

use pod_fuzz::stream::{decode, encode};

const MOST: usize = 8 << 10;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let [_, image, out] = &args[..] else { panic!("seed IMAGE OUT") };
    let mut pieces = decode(&std::fs::read(image).expect("an image"));
    pieces.retain(|piece| piece.payload.len() < MOST && (!piece.is_raw() || piece.payload.len() < 64));
    std::fs::write(out, encode(&pieces)).expect("written");
}
