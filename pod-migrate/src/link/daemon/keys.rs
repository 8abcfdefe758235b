//! Keys of this host and of those that it trusts: `DATA/daemon/key.json` and `DATA/daemon/peers.json`, for root alone.
//!
//! One key a host (Ed25519), made when it is first asked for. Whom to trust is told by a person (`pod daemon trust`), who has the
//! other host's key from there (`pod daemon key`): nobody is taken on first sight.

use super::PEER;
use crate::link::tls::Key;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use pod_runtime::status::now;
use pod_runtime::store::{Store, read_json, write_json};
use pod_runtime::{Doing, Problem, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// A host's public key, written `ed25519:` and base64.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey([u8; 32]);

/// What comes before the key itself in the form that TLS has it in (RFC 8410).
const SPKI: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
const PREFIX: &str = "ed25519:";

impl PublicKey {
    fn of(key: &Key) -> Option<PublicKey> {
        let public = key.public();
        Some(PublicKey(public.strip_prefix(&SPKI[..])?.try_into().ok()?))
    }

    /// SubjectPublicKeyInfo.
    pub fn spki(&self) -> Vec<u8> {
        [&SPKI[..], &self.0].concat()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", BASE64.encode(self.0))
    }
}

impl FromStr for PublicKey {
    type Err = Problem;

    fn from_str(text: &str) -> Result<PublicKey> {
        let bytes = text.strip_prefix(PREFIX).and_then(|rest| BASE64.decode(rest).ok());
        let bytes = bytes.and_then(|bytes| bytes.try_into().ok()).map(PublicKey);
        bytes.ok_or_else(|| {
            Problem::new("E-USAGE", format!("'{text}' is no key of a host"))
                .fix("take it as `pod daemon key` prints it on that host")
        })
    }
}

impl TryFrom<String> for PublicKey {
    type Error = Problem;

    fn try_from(text: String) -> Result<PublicKey> {
        text.parse()
    }
}

impl From<PublicKey> for String {
    fn from(key: PublicKey) -> String {
        key.to_string()
    }
}

/// A host that is trusted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    pub key: PublicKey,
    /// Where it listens, if its name does not say: `HOST`, `HOST:PORT`, `[V6]:PORT`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// It takes pods from here and may send none.
    #[serde(default)]
    pub outgoing_only: bool,
    /// Since when, in seconds since the epoch.
    pub since: u64,
}

impl Peer {
    pub fn new(key: PublicKey) -> Peer {
        Peer { key, address: None, outgoing_only: false, since: now() }
    }
}

#[derive(Serialize, Deserialize)]
struct Kept {
    /// PKCS #8, base64.
    secret: String,
}

/// All of them.
#[derive(Debug, Clone)]
pub struct Keys {
    store: Store,
    dir: PathBuf,
}

impl Keys {
    pub fn of(store: &Store) -> Result<Keys> {
        Ok(Keys { store: store.clone(), dir: store.daemon_dir()? })
    }

    /// This host's own.
    pub fn own(&self) -> Result<Key> {
        let path = self.dir.join("key.json");
        let kept: Kept = self.store.exclusively(|| {
            if path.exists() {
                return read_json(&path);
            }
            let kept = Kept { secret: BASE64.encode(Key::secret()?) };
            write_json(&path, &kept).map(|()| kept)
        })?;
        let secret = BASE64.decode(kept.secret).doing(|| format!("understand {}", path.display()))?;
        Key::of(&secret)
    }

    pub fn public(&self) -> Result<PublicKey> {
        PublicKey::of(&self.own()?).ok_or_else(|| Problem::new("E-INTERNAL", "this host's key is of another kind"))
    }

    /// By name.
    pub fn peers(&self) -> Result<BTreeMap<String, Peer>> {
        let path = self.dir.join("peers.json");
        if path.exists() { read_json(&path) } else { Ok(BTreeMap::new()) }
    }

    pub fn peer(&self, name: &str) -> Result<Peer> {
        self.peers()?.remove(name).ok_or_else(|| {
            Problem::new(PEER, format!("the key of {name} is not known here"))
                .fix(format!("pod daemon trust {name} KEY, with what `pod daemon key` prints on {name}"))
        })
    }

    /// Who has this key (SubjectPublicKeyInfo).
    pub fn named(&self, spki: &[u8]) -> Result<Option<(String, Peer)>> {
        Ok(self.peers()?.into_iter().find(|(_, peer)| peer.key.spki() == spki))
    }

    /// From now on.
    pub fn trust(&self, name: &str, peer: Peer) -> Result<()> {
        let sound = |c: char| c.is_ascii_alphanumeric() || "._-:".contains(c);
        if name.is_empty() || name.len() > 255 || name.starts_with('-') || !name.chars().all(sound) {
            return Err(Problem::new("E-USAGE", format!("'{name}' is no name of a host")));
        }
        if peer.key == self.public()? {
            return Err(Problem::new("E-USAGE", "that is the key of this host itself")
                .fix(format!("take the one that `pod daemon key` prints on {name}")));
        }
        self.change(|peers| {
            let other = peers.iter().find(|(other, known)| *other != name && known.key == peer.key);
            if let Some((other, _)) = other {
                return Err(Problem::new("E-USAGE", format!("{other} has this key, too: each host has its own"))
                    .fix(format!("pod daemon forget {other}, if it goes by another name now")));
            }
            peers.insert(name.to_owned(), peer);
            Ok(())
        })
    }

    pub fn forget(&self, name: &str) -> Result<()> {
        self.change(|peers| match peers.remove(name) {
            Some(_) => Ok(()),
            None => Err(Problem::new(PEER, format!("{name} is not known here")).fix("pod daemon ls shows who is")),
        })
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<String, Peer>) -> Result<()>) -> Result<()> {
        self.store.exclusively(|| {
            let mut peers = self.peers()?;
            change(&mut peers)?;
            write_json(&self.dir.join("peers.json"), &peers)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(dir: &std::path::Path, name: &str) -> Keys {
        Keys::of(&Store::open_at(dir.join(name), dir.join(name).join("run")).unwrap()).unwrap()
    }

    #[test]
    fn a_host_has_one_key_and_knows_others_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let (here, there) = (keys(dir.path(), "a"), keys(dir.path(), "b"));
        let (ours, theirs) = (here.public().unwrap(), there.public().unwrap());
        assert!(ours != theirs && here.public().unwrap() == ours);
        assert_eq!(theirs.to_string().parse::<PublicKey>().unwrap(), theirs);
        assert_eq!(here.peer("b").unwrap_err().code(), PEER);
        here.trust("b", Peer::new(theirs)).unwrap();
        assert_eq!(here.named(&theirs.spki()).unwrap().unwrap().0, "b");
        assert!(here.named(&ours.spki()).unwrap().is_none());
        here.trust("b", Peer { outgoing_only: true, ..Peer::new(theirs) }).unwrap();
        assert!(here.peer("b").unwrap().outgoing_only, "said anew");
        here.forget("b").unwrap();
        assert_eq!(here.forget("b").unwrap_err().code(), PEER);
        for file in ["key.json", "peers.json"] {
            use std::os::unix::fs::PermissionsExt;
            let mode = std::fs::metadata(here.dir.join(file)).unwrap().permissions().mode();
            assert_eq!(mode & 0o077, 0, "{file} is for root alone");
        }
    }

    #[test]
    fn what_is_no_key_or_no_name_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let here = keys(dir.path(), "a");
        let own = here.public().unwrap();
        for text in ["", "ed25519:", "ed25519:AAAA", &own.to_string()[8..], &format!("{own}A"), "ssh-ed25519 AAAA"] {
            assert!(text.parse::<PublicKey>().is_err(), "{text}");
        }
        assert!(here.trust("b", Peer::new(own)).is_err(), "its own");
        let other = keys(dir.path(), "b").public().unwrap();
        for name in ["", "-b", "a b", "a/b", "b\n"] {
            assert!(here.trust(name, Peer::new(other)).is_err(), "{name}");
        }
        here.trust("b", Peer::new(other)).unwrap();
        assert!(here.trust("c", Peer::new(other)).is_err(), "one host, two names");
    }
}
