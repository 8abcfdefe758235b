//! The options of a mount, as `config.json` lists them: what becomes of each is decided here and nowhere else.
//!
//! A word is an attribute of the mount ("ro", "rnosuid"), one of the file system ("sync"), a kind of propagation, an order
//! to the runtime ("bind", "tmpcopyup", "idmap"), or, when it is none of these, text for the file system.

use super::wrong;
use crate::problem::Result;
use crate::sys::mount::{MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY};
use nix::libc;

/// All kinds of access times; a kind is set after all are cleared.
const ACCESS_TIMES: u64 = 0x70;
const NOATIME: u64 = 0x10;
const STRICTATIME: u64 = 0x20;
const NODIRATIME: u64 = 0x80;
const NOSYMFOLLOW: u64 = 0x20_0000;

/// Set (or, with true, cleared) on the mount; with an "r" before it, on all below as well.
const ATTRIBUTES: [(&str, u64, bool); 17] = [
    ("ro", MOUNT_ATTR_RDONLY, false),
    ("rw", MOUNT_ATTR_RDONLY, true),
    ("nosuid", MOUNT_ATTR_NOSUID, false),
    ("suid", MOUNT_ATTR_NOSUID, true),
    ("nodev", MOUNT_ATTR_NODEV, false),
    ("dev", MOUNT_ATTR_NODEV, true),
    ("noexec", MOUNT_ATTR_NOEXEC, false),
    ("exec", MOUNT_ATTR_NOEXEC, true),
    ("noatime", NOATIME, false),
    ("atime", NOATIME, true),
    ("strictatime", STRICTATIME, false),
    ("nostrictatime", STRICTATIME, true),
    ("relatime", 0, false),
    ("norelatime", 0, true),
    ("nodiratime", NODIRATIME, false),
    ("diratime", NODIRATIME, true),
    ("nosymfollow", NOSYMFOLLOW, false),
];

/// Flags of the file system, which it takes without a value.
const FILE_SYSTEM: [&str; 5] = ["sync", "dirsync", "mand", "lazytime", "nolazytime"];

/// What every mount is or what has had no effect for long.
const NOTHING: [&str; 9] = ["defaults", "async", "nomand", "silent", "loud", "iversion", "noiversion", "acl", "noacl"];

const PROPAGATION: [(&str, u64); 4] = [
    ("private", libc::MS_PRIVATE),
    ("slave", libc::MS_SLAVE),
    ("shared", libc::MS_SHARED),
    ("unbindable", libc::MS_UNBINDABLE),
];

/// What is set and cleared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Attributes {
    pub set: u64,
    pub clear: u64,
}

impl Attributes {
    pub fn is_empty(self) -> bool {
        self == Attributes::default()
    }

    fn take(&mut self, bits: u64, cleared: bool, of_times: bool) {
        if of_times {
            // A kind of access times takes the place of any other.
            self.clear |= ACCESS_TIMES;
            self.set &= !ACCESS_TIMES;
            self.set |= if cleared { 0 } else { bits };
        } else if cleared {
            self.set &= !bits;
            self.clear |= bits;
        } else {
            self.clear &= !bits;
            self.set |= bits;
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// A bind mount; with true of all below, too.
    pub bind: Option<bool>,
    pub attributes: Attributes,
    pub recursive: Attributes,
    /// In order: MS_…, and whether for all below as well.
    pub propagation: Vec<(u64, bool)>,
    /// Owners are shown through a user namespace; with true of all below, too.
    pub idmap: Option<bool>,
    pub copy_up: bool,
    /// "name" or "name=value", for the file system.
    pub data: Vec<(String, String)>,
}

impl Options {
    pub fn parse(words: &[String]) -> Result<Options> {
        let mut options = Options::default();
        for word in words {
            options.take(word)?;
        }
        Ok(options)
    }

    fn take(&mut self, word: &str) -> Result<()> {
        let attribute = |word: &str| ATTRIBUTES.iter().find(|(name, ..)| *name == word);
        let propagation = |word: &str| PROPAGATION.iter().find(|(name, _)| *name == word);
        let below = word.strip_prefix('r').unwrap_or("");
        let of_times = |name: &str| name.ends_with("atime") && !name.ends_with("diratime");
        match word {
            "bind" => self.bind = Some(self.bind.unwrap_or(false)),
            "rbind" => self.bind = Some(true),
            "idmap" => self.idmap = Some(false),
            "ridmap" => self.idmap = Some(true),
            "tmpcopyup" => self.copy_up = true,
            "remount" | "nofail" => return Err(wrong(format!("mount option \"{word}\" is not supported"))),
            "symfollow" => self.attributes.take(NOSYMFOLLOW, true, false),
            "rsymfollow" => self.recursive.take(NOSYMFOLLOW, true, false),
            word if NOTHING.contains(&word) || word.is_empty() => {}
            word if FILE_SYSTEM.contains(&word) => self.data.push((word.to_owned(), String::new())),
            word => {
                if let Some((name, bits, cleared)) = attribute(word) {
                    self.attributes.take(*bits, *cleared, of_times(name));
                } else if let Some((_, kind)) = propagation(word) {
                    self.propagation.push((*kind, false));
                } else if let Some((name, bits, cleared)) = attribute(below) {
                    self.recursive.take(*bits, *cleared, of_times(name));
                } else if let Some((_, kind)) = propagation(below) {
                    self.propagation.push((*kind, true));
                } else {
                    let (name, value) = word.split_once('=').unwrap_or((word, ""));
                    self.data.push((name.to_owned(), value.to_owned()));
                }
            }
        }
        Ok(())
    }
}

/// All words that mean something, as `features` lists them.
pub fn known() -> Vec<String> {
    let mut words: Vec<String> =
        ["bind", "rbind", "idmap", "ridmap", "tmpcopyup", "symfollow", "rsymfollow"].map(String::from).to_vec();
    words.extend(NOTHING.iter().chain(&FILE_SYSTEM).map(|word| (*word).to_owned()));
    for name in ATTRIBUTES.iter().map(|(name, ..)| *name).chain(PROPAGATION.iter().map(|(name, _)| *name)) {
        words.extend([name.to_owned(), format!("r{name}")]);
    }
    words.sort_unstable();
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Options {
        Options::parse(&text.split(',').map(String::from).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn each_word_goes_where_it_belongs() {
        let options = parse("rbind,ro,nosuid,rnoexec,rslave,private,size=64k,mode=755,newinstance,sync");
        assert_eq!(options.bind, Some(true));
        assert_eq!(options.attributes.set, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID);
        assert_eq!(options.recursive.set, MOUNT_ATTR_NOEXEC);
        assert_eq!(options.propagation, [(libc::MS_SLAVE, true), (libc::MS_PRIVATE, false)]);
        let data: Vec<&str> = options.data.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(data, ["size", "mode", "newinstance", "sync"]);
        assert_eq!(parse("bind,rbind").bind, parse("rbind,bind").bind);
    }

    #[test]
    fn the_last_word_counts() {
        assert_eq!(parse("ro,rw").attributes, Attributes { set: 0, clear: MOUNT_ATTR_RDONLY });
        assert_eq!(parse("rro").recursive.set, MOUNT_ATTR_RDONLY);
        assert_eq!(parse("noatime,relatime").attributes, Attributes { set: 0, clear: ACCESS_TIMES });
        assert_eq!(parse("rrelatime").recursive, Attributes { set: 0, clear: ACCESS_TIMES });
        assert_eq!(parse("relatime,noatime,nodiratime").attributes.set, NOATIME | NODIRATIME);
        assert!(Options::parse(&["remount".to_owned()]).is_err());
    }
}
