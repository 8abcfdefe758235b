//! Keys of age: `age1…` to encrypt to, `AGE-SECRET-KEY-1…` to open with.

use super::seal::{IDENTITY, random};
use bech32::{Bech32, Hrp};
use pod_runtime::{Problem, Result};
use std::fmt;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use x25519_dalek::{PublicKey, StaticSecret};

const PUBLIC: &str = "age";
const SECRET: &str = "age-secret-key-";
/// A file of identities that is longer is something else.
const MOST: u64 = 1 << 20;

/// Whom something is encrypted to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipient(PublicKey);

impl Recipient {
    pub fn parse(text: &str) -> Option<Recipient> {
        decode(text, PUBLIC).map(|bytes| Recipient(PublicKey::from(bytes)))
    }

    pub(super) fn key(&self) -> &PublicKey {
        &self.0
    }
}

impl fmt::Display for Recipient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&encode(PUBLIC, self.0.as_bytes()))
    }
}

/// Who opens it. Is not shown by `Debug`.
#[derive(Clone)]
pub struct Identity(StaticSecret);

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity of {}", self.recipient())
    }
}

impl Identity {
    pub(super) fn of(bytes: [u8; 32]) -> Identity {
        Identity(StaticSecret::from(bytes))
    }

    pub fn new() -> Result<Identity> {
        Ok(Identity::of(random()?))
    }

    pub fn parse(text: &str) -> Option<Identity> {
        decode(text, SECRET).map(Identity::of)
    }

    pub fn recipient(&self) -> Recipient {
        Recipient(PublicKey::from(&self.0))
    }

    pub(super) fn secret(&self) -> &StaticSecret {
        &self.0
    }

    /// All that a file has, as age-keygen writes them: one a line, and lines that begin with '#'.
    pub fn read(path: &Path) -> Result<Vec<Identity>> {
        let fix = "a file as `pod checkpoint keygen FILE` or age-keygen writes it";
        let wrong = |what: String| Problem::new(IDENTITY, what).fix(fix);
        let cannot = || format!("cannot read identities from {}", path.display());
        let metadata = fs::metadata(path).map_err(|error| wrong(cannot()).because(error))?;
        if metadata.len() > MOST {
            return Err(wrong(format!("{} is too long for a file of identities", path.display())));
        }
        let text = fs::read_to_string(path).map_err(|error| wrong(cannot()).because(error))?;
        if metadata.permissions().mode() & 0o077 != 0 {
            tracing::warn!(path = %path.display(), "others can read this identity: chmod 600");
        }
        let lines = text.lines().map(str::trim).enumerate();
        let mut found = Vec::new();
        for (number, line) in lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#')) {
            let one = Identity::parse(line);
            let line = number + 1;
            found.push(one.ok_or_else(|| wrong(format!("line {line} of {} is no X25519 identity", path.display())))?);
        }
        if found.is_empty() { Err(wrong(format!("{} has no identity in it", path.display()))) } else { Ok(found) }
    }

    /// To a new file that only its owner can read.
    pub fn write(&self, path: &Path) -> Result<()> {
        let open = File::options().write(true).create_new(true).mode(0o600).open(path);
        let text =
            format!("# public key: {}\n{}\n", self.recipient(), encode(SECRET, self.0.as_bytes()).to_uppercase());
        let written = open.and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()));
        written.map_err(|error| {
            Problem::new(IDENTITY, format!("cannot write the identity to {}", path.display())).because(error)
        })
    }
}

fn decode(text: &str, kind: &str) -> Option<[u8; 32]> {
    let (hrp, bytes) = bech32::decode(text).ok()?;
    let of_kind = hrp.as_str().eq_ignore_ascii_case(kind);
    // Bech32 and not its later sibling, and in the case that it is written in.
    let again = bech32::encode::<Bech32>(hrp, &bytes).ok()?;
    (of_kind && again.eq_ignore_ascii_case(text)).then(|| bytes.try_into().ok())?
}

fn encode(kind: &str, bytes: &[u8; 32]) -> String {
    let hrp = Hrp::parse(kind).expect("it is a valid prefix");
    bech32::encode::<Bech32>(hrp, bytes).expect("32 bytes are not too many")
}
