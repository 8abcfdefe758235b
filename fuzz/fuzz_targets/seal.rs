//! Encrypted checkpoints, and the keys for them. The first byte says whether the rest is a file that somebody sends, a key,
//! or what is done to a file of ours: how long it is, where it is changed, how, and where it ends.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pod_migrate::checkpoint::{Identity, Recipient, seal};
use pod_migrate::image::DAMAGED;

/// Opens the file in fuzz/corpus, and nothing else.
const KEY: &str = "AGE-SECRET-KEY-1SXECL7QEKH2GWNNJMV390GWM6UGGYHERXHM2HJK8YZ3X86HP0JMSWR39AE";

fuzz_target!(|data: &[u8]| {
    let Some((which, rest)) = data.split_first() else { return };
    match which {
        b'k' => key(&String::from_utf8_lossy(rest)),
        b'c' => changed(rest),
        _ => drop(open(rest)),
    }
});

fn identity() -> Identity {
    Identity::parse(KEY).expect("it is one")
}

/// What comes out up to the problem, if there is one: it has one of two names.
fn open(mut sealed: &[u8]) -> (Vec<u8>, bool) {
    let mut out = Vec::new();
    match seal::open(&mut sealed, &mut out, &[identity()]) {
        Ok(()) => (out, true),
        Err(problem) => {
            assert!([DAMAGED, seal::IDENTITY].contains(&problem.code()), "{}", problem.chain());
            (out, false)
        }
    }
}

fn key(text: &str) {
    if let Some(recipient) = Recipient::parse(text) {
        assert!(Recipient::parse(&recipient.to_string()).is_some_and(|again| again == recipient));
    }
    drop(Identity::parse(text));
}

/// A file that was changed never opens, and nothing comes out of it that was not put in.
fn changed(how: &[u8]) {
    let Some((length, mut how)) = how.split_first_chunk::<3>() else { return };
    let length = u32::from_le_bytes([length[0], length[1], length[2] & 1, 0]) as usize;
    let plain: Vec<u8> = (0..length).map(|n| (n % 251) as u8).collect();
    let mut good = Vec::new();
    seal::seal(&mut &plain[..], &mut good, &[identity().recipient()]).expect("it is encrypted");
    let mut sealed = good.clone();
    while let Some((&[what, a, b, c], rest)) = how.split_first_chunk::<4>() {
        let at = u32::from_le_bytes([a, b, c, 0]) as usize % (sealed.len() + 1);
        match what % 5 {
            0 => sealed.truncate(at),
            1 => sealed.insert(at, what),
            2 => sealed.get_mut(at).into_iter().for_each(|byte| *byte ^= what | 1),
            3 => sealed.extend_from_within(at..),
            _ => drop(sealed.drain(..at)),
        }
        how = rest;
        // Each doubles it at most.
        if sealed.len() > 1 << 20 {
            break;
        }
    }
    let (out, whole) = open(&sealed);
    assert_eq!(whole, sealed == good);
    assert!(plain.starts_with(&out) && (!whole || out == plain));
}
