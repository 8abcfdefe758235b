//! By what it is seen that a block is another than it was. Never stored and never sent: who compares made both.
//!
//! What a program in the pod writes may be chosen by somebody, so two blocks must not be alike for who knows the function. It
//! is XXH3's 128 bits under a secret of 192 random bytes, which is this process's own: to find two that are alike one
//! would have to know it, and what that breaks is one's own copy. It takes a third of the time of a BLAKE3, and a block
//! of memory is read in about that time ([decision 0069](../../../docs/decisions/0069-compared-by-xxh3.md)).

use ring::rand::{SecureRandom, SystemRandom};
use std::sync::LazyLock;
use xxhash_rust::xxh3::xxh3_128_with_secret;

/// Of a block: never [`ZEROS`] unless it is all zeros.
pub type Digest = u128;

/// That of a block of zeros, of any length, and of what is not there.
pub const ZEROS: Digest = 0;

static SECRET: LazyLock<[u8; 192]> = LazyLock::new(|| {
    let mut secret = [0; 192];
    SystemRandom::new().fill(&mut secret).expect("the kernel has random bytes");
    secret
});

pub fn digest(block: &[u8]) -> Digest {
    if is_zero(block) { ZEROS } else { xxh3_128_with_secret(block, &*SECRET).max(1) }
}

/// Most blocks show that they are not within the first bytes.
pub fn is_zero(block: &[u8]) -> bool {
    block[..block.len().min(64)].iter().all(|byte| *byte == 0)
        && block.chunks(512).all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_is_another_block() {
        let mut block = vec![7u8; 4096];
        let before = digest(&block);
        for at in [0, 63, 64, 1023, 1024, 4095] {
            block[at] ^= 1;
            assert_ne!(digest(&block), before, "at {at}");
            block[at] ^= 1;
        }
        assert_eq!(digest(&block), before);
    }

    #[test]
    fn only_zeros_are_zeros() {
        let mut block = vec![0u8; 4096];
        assert_eq!((digest(&block), digest(&block[..100]), digest(&[])), (ZEROS, ZEROS, ZEROS));
        for at in [0, 63, 64, 511, 512, 4095] {
            block[at] = 1;
            assert_ne!(digest(&block), ZEROS, "at {at}");
            block[at] = 0;
        }
    }
}
