//! Checkpoints for somebody's eyes only: files in the format of age (<https://age-encryption.org/v1>) for X25519 recipients, which
//! the `age` tool opens and makes as well.
//!
//! Primitives are those of RustCrypto and dalek; what is here is how the format puts them together. A file is a header, in
//! which a key of its own is wrapped for each recipient, and the bytes in pieces of 64 KiB, each under that key with its
//! number and whether it is the last: a piece that was changed, moved, doubled or left out does not open, and a file that was
//! cut short has no last one. Nothing of a piece is handed on before it opened, and nothing of an image is used before all did.

use super::key::{Identity, Recipient};
use crate::image::{WRITE, damaged};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD as BASE64;
use chacha20poly1305::aead::AeadInOut;
use chacha20poly1305::{ChaCha20Poly1305, KeyInit};
use hkdf::Hkdf;
use hmac::{Hmac, Mac};
use pod_runtime::{Doing, Problem, Result};
use sha2::Sha256;
use std::fs::File;
use std::io::{self, Read, Write};
use x25519_dalek::{PublicKey, StaticSecret};

/// The checkpoint is encrypted and nobody said with what to open it.
pub const ENCRYPTED: &str = "E-ENCRYPTED";
/// It is for somebody else.
pub const IDENTITY: &str = "E-IDENTITY";

const MAGIC: &[u8] = b"age-encryption.org/v1\n";
const INFO: &[u8] = b"age-encryption.org/v1/X25519";
const PIECE: usize = 64 << 10;
const TAG: usize = 16;
const FILE_KEY: usize = 16;
/// A header that is longer is none of ours.
const MOST_HEADER: usize = 64 << 10;
/// So many fit in one.
const MOST_RECIPIENTS: usize = 600;

/// Whether a file is one of these, by how it begins. The file stands at its begin before and after.
pub fn is_sealed(file: &File) -> io::Result<bool> {
    use std::os::unix::fs::FileExt;
    let mut begin = [0; MAGIC.len()];
    match file.read_exact_at(&mut begin, 0) {
        Ok(()) => Ok(begin == MAGIC),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether something can be encrypted to all of them: to be found out before it is there.
pub fn check(recipients: &[Recipient]) -> Result<()> {
    header(&[0; FILE_KEY], recipients).map(drop)
}

/// Writes all of `from` to `to`, for the recipients to open.
pub fn seal(from: &mut impl Read, to: &mut impl Write, recipients: &[Recipient]) -> Result<()> {
    let file_key: [u8; FILE_KEY] = random()?;
    let header = header(&file_key, recipients)?;
    let nonce: [u8; 16] = random()?;
    let cipher = ChaCha20Poly1305::new(&derive(&file_key, Some(&nonce), b"payload").into());
    let write = |to: &mut dyn Write, bytes: &[u8]| to.write_all(bytes).code(WRITE, || "write the checkpoint".into());
    write(to, &header)?;
    write(to, &nonce)?;
    let mut number = 0u64;
    let mut next = read_piece(from, PIECE)?;
    loop {
        let mut piece = next;
        next = read_piece(from, PIECE)?;
        let last = next.is_empty();
        let place = place(number, last).into();
        cipher.encrypt_in_place(&place, b"", &mut piece).map_err(|_| Problem::new(WRITE, "encrypt the checkpoint"))?;
        write(to, &piece)?;
        number += 1;
        if last {
            return Ok(());
        }
    }
}

/// Reads all of `from` with one of the identities, and writes what it holds to `to`, each piece once it opened.
pub fn open(from: &mut impl Read, to: &mut impl Write, identities: &[Identity]) -> Result<()> {
    let file_key = unwrap(&read_header(from)?, identities)?;
    let mut nonce = [0; 16];
    from.read_exact(&mut nonce).map_err(|_| changed())?;
    let cipher = ChaCha20Poly1305::new(&derive(&file_key, Some(&nonce), b"payload").into());
    let mut number = 0u64;
    let mut next = read_piece(from, PIECE + TAG)?;
    loop {
        let mut piece = next;
        next = read_piece(from, PIECE + TAG)?;
        let last = next.is_empty();
        let place = place(number, last).into();
        cipher.decrypt_in_place(&place, b"", &mut piece).map_err(|_| changed())?;
        // Only an empty file has an empty piece.
        if piece.is_empty() && number > 0 {
            return Err(changed());
        }
        to.write_all(&piece).doing(|| "keep the opened checkpoint in memory".into())?;
        number += 1;
        if last {
            return Ok(());
        }
    }
}

fn changed() -> Problem {
    damaged("the encrypted checkpoint was changed or cut short")
}

/// As much as there is, up to so many bytes.
fn read_piece(from: &mut impl Read, bytes: usize) -> Result<Vec<u8>> {
    let mut piece = Vec::with_capacity(bytes + TAG);
    from.take(bytes as u64).read_to_end(&mut piece).code("E-IMAGE-READ", || "read the checkpoint".into())?;
    Ok(piece)
}

/// What a piece is sealed with besides the key: its number, and whether it is the last.
fn place(number: u64, last: bool) -> [u8; 12] {
    let mut place = [0; 12];
    place[3..11].copy_from_slice(&number.to_be_bytes());
    place[11] = u8::from(last);
    place
}

fn derive(key: &[u8], salt: Option<&[u8]>, info: &[u8]) -> [u8; 32] {
    let mut derived = [0; 32];
    Hkdf::<Sha256>::new(salt, key).expand(info, &mut derived).expect("32 bytes are not too many");
    derived
}

fn header(file_key: &[u8; FILE_KEY], recipients: &[Recipient]) -> Result<Vec<u8>> {
    if recipients.len() > MOST_RECIPIENTS {
        let what = format!("a checkpoint is for {MOST_RECIPIENTS} recipients at most, not {}", recipients.len());
        return Err(Problem::new(IDENTITY, what).fix("encrypt it to fewer"));
    }
    let mut header = MAGIC.to_vec();
    for recipient in recipients {
        let secret = StaticSecret::from(random::<32>()?);
        let share = PublicKey::from(&secret);
        let key = wrapping_key(&secret, recipient.key(), &share, recipient.key())
            .ok_or_else(|| Problem::new(IDENTITY, format!("{recipient} is no key that one can encrypt to")))?;
        let mut body = file_key.to_vec();
        let sealed = ChaCha20Poly1305::new(&key.into()).encrypt_in_place(&[0; 12].into(), b"", &mut body);
        sealed.map_err(|_| Problem::new(WRITE, "encrypt the checkpoint"))?;
        let (share, body) = (BASE64.encode(share.as_bytes()), BASE64.encode(body));
        header.extend_from_slice(format!("-> X25519 {share}\n{body}\n").as_bytes());
    }
    header.extend_from_slice(b"---");
    let mac = BASE64.encode(mac(file_key, &header).finalize().into_bytes());
    header.extend_from_slice(format!(" {mac}\n").as_bytes());
    Ok(header)
}

fn mac(file_key: &[u8], header: &[u8]) -> Hmac<Sha256> {
    let mut mac =
        Hmac::<Sha256>::new_from_slice(&derive(file_key, None, b"header")).expect("a key of any length will do");
    mac.update(header);
    mac
}

/// `None` if the other key is one of the few with which nothing is secret.
fn wrapping_key(
    secret: &StaticSecret,
    other: &PublicKey,
    share: &PublicKey,
    recipient: &PublicKey,
) -> Option<[u8; 32]> {
    let shared = secret.diffie_hellman(other);
    let salt = [*share.as_bytes(), *recipient.as_bytes()].concat();
    shared.was_contributory().then(|| derive(shared.as_bytes(), Some(&salt), INFO))
}

/// To the end of its last line.
fn read_header(from: &mut impl Read) -> Result<Vec<u8>> {
    let mut header = Vec::new();
    let mut line = 0;
    let mut byte = [0];
    // Byte by byte: what follows is not the header's. It is short.
    while header.len() < MOST_HEADER {
        from.read_exact(&mut byte).map_err(|_| changed())?;
        header.push(byte[0]);
        if header.ends_with(b"\n") {
            if header[line..].starts_with(b"---") {
                return Ok(header);
            }
            line = header.len();
        }
    }
    Err(damaged(format!("the encrypted checkpoint has a header of more than {MOST_HEADER} bytes")))
}

/// The key of the file, if one of the identities opens it and the header is as it was written.
fn unwrap(header: &[u8], identities: &[Identity]) -> Result<[u8; FILE_KEY]> {
    let text = std::str::from_utf8(header).map_err(|_| changed())?;
    let mut lines = text.strip_prefix(std::str::from_utf8(MAGIC).expect("text")).ok_or_else(changed)?.lines();
    let mut found: Option<[u8; FILE_KEY]> = None;
    let mut before = MAGIC.len();
    while let Some(line) = lines.next() {
        if let Some(sum) = line.strip_prefix("---") {
            let sum = BASE64.decode(sum.strip_prefix(' ').ok_or_else(changed)?).map_err(|_| changed())?;
            let Some(file_key) = found else { break };
            mac(&file_key, &header[..before + 3]).verify_slice(&sum).map_err(|_| changed())?;
            return Ok(file_key);
        }
        before += line.len() + 1;
        let stanza = line.strip_prefix("-> ").ok_or_else(changed)?;
        // The body: lines of 64 letters and a shorter one, which may be empty.
        let mut body = String::new();
        loop {
            let line = lines.next().ok_or_else(changed)?;
            before += line.len() + 1;
            body.push_str(line);
            if line.len() < 64 {
                break;
            }
        }
        // Others than these are for somebody else.
        if let (None, Some(share)) = (&found, stanza.strip_prefix("X25519 ")) {
            found = identities.iter().find_map(|identity| opened(identity, share, &body));
        }
    }
    Err(Problem::new(IDENTITY, "none of the identities opens this checkpoint: it was encrypted to others")
        .fix("give the file of the identity whose recipient it was encrypted to: --identity FILE"))
}

fn opened(identity: &Identity, share: &str, body: &str) -> Option<[u8; FILE_KEY]> {
    let share: [u8; 32] = BASE64.decode(share).ok()?.try_into().ok()?;
    let mut body = BASE64.decode(body).ok()?;
    if body.len() != FILE_KEY + TAG {
        return None;
    }
    let share = PublicKey::from(share);
    let recipient = identity.recipient();
    let key = wrapping_key(identity.secret(), &share, &share, recipient.key())?;
    ChaCha20Poly1305::new(&key.into()).decrypt_in_place(&[0; 12].into(), b"", &mut body).ok()?;
    body.try_into().ok()
}

pub(super) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    let read = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.doing(|| "read /dev/urandom".into())?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::DAMAGED;

    fn identity(byte: u8) -> Identity {
        Identity::of([byte; 32])
    }

    fn sealed(bytes: &[u8], to: &[u8]) -> Vec<u8> {
        let recipients: Vec<Recipient> = to.iter().map(|byte| identity(*byte).recipient()).collect();
        let mut out = Vec::new();
        seal(&mut &bytes[..], &mut out, &recipients).unwrap();
        out
    }

    fn opened_with(sealed: &[u8], byte: u8) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        open(&mut &sealed[..], &mut out, &[identity(9), identity(byte)])?;
        Ok(out)
    }

    #[test]
    fn who_it_is_for_opens_it_and_nobody_else() {
        for length in [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 3 * PIECE + 17] {
            let bytes: Vec<u8> = (0..length).map(|n| (n % 251) as u8).collect();
            let sealed = sealed(&bytes, &[1, 2]);
            assert!(opened_with(&sealed, 1).unwrap() == bytes && opened_with(&sealed, 2).unwrap() == bytes, "{length}");
            assert_eq!(opened_with(&sealed, 3).unwrap_err().code(), IDENTITY);
        }
    }

    #[test]
    fn what_is_written_can_be_opened_for_however_many_it_is() {
        let key = [7; FILE_KEY];
        let of = |recipients: &[Recipient]| header(&key, recipients).unwrap().len();
        let one = identity(1).recipient();
        let (none, each) = (of(&[]), of(std::slice::from_ref(&one)) - of(&[]));
        assert!(none + MOST_RECIPIENTS * each < MOST_HEADER);
        assert_eq!(check(&vec![one.clone(); MOST_RECIPIENTS + 1]).unwrap_err().code(), IDENTITY);
        // A key with which nothing is secret.
        let weak = bech32::encode::<bech32::Bech32>(bech32::Hrp::parse("age").unwrap(), &[0; 32]).unwrap();
        assert_eq!(check(&[one, Recipient::parse(&weak).unwrap()]).unwrap_err().code(), IDENTITY);
        let long = [MAGIC, &b"-> X25519 a\n\n".repeat(MOST_HEADER / 12)].concat();
        assert_eq!(opened_with(&long, 1).unwrap_err().code(), DAMAGED);
    }

    #[test]
    fn whatever_is_changed_or_cut_does_not_open() {
        let bytes = vec![7; 2 * PIECE + 100];
        let good = sealed(&bytes, &[1]);
        let header = good.len() - bytes.len() - 3 * TAG;
        for at in (0..header).chain((header..good.len()).step_by(997)).chain([good.len() - 1]) {
            let mut bad = good.clone();
            bad[at] ^= 1;
            let code = opened_with(&bad, 1).expect_err(&format!("byte {at}")).code().to_owned();
            // The share, or what it wraps: then it is for somebody else.
            assert!(code == DAMAGED || (at < header && code == IDENTITY), "byte {at}: {code}");
        }
        for length in [0, 10, header - 1, header, header + PIECE + TAG, header + 2 * (PIECE + TAG), good.len() - 1] {
            assert_eq!(opened_with(&good[..length], 1).unwrap_err().code(), DAMAGED, "cut at {length}");
        }
        assert_eq!(opened_with(&[&good[..], &[0]].concat(), 1).unwrap_err().code(), DAMAGED);
        // Two pieces in each other's place.
        let mut bad = good.clone();
        let (a, b) = bad[header..].split_at_mut(PIECE + TAG);
        a.swap_with_slice(&mut b[..PIECE + TAG]);
        assert_eq!(opened_with(&bad, 1).unwrap_err().code(), DAMAGED);
    }
}
