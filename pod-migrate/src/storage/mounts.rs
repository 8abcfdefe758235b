//! What is mounted in a pod, as its first process sees it.

use pod_runtime::{Doing, Result};
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// One line of /proc/PID/mountinfo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Where, seen from the pod's root.
    pub at: PathBuf,
    pub kind: String,
    /// Major and minor number.
    pub device: (u64, u64),
    pub read_only: bool,
    /// All of the file system, not a part bound here.
    pub whole: bool,
}

/// Mounts of the process with this pid on the host, in order: later ones may cover earlier ones.
pub fn mounts(pid: i32) -> Result<Vec<Mount>> {
    let path = format!("/proc/{pid}/mountinfo");
    let text = fs::read(&path).doing(|| format!("read {path}"))?;
    Ok(text.split(|b| *b == b'\n').filter_map(parse).collect())
}

fn parse(line: &[u8]) -> Option<Mount> {
    let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
    let dash = fields.iter().position(|f| *f == b"-")?;
    let (major, minor) = std::str::from_utf8(fields.get(2)?).ok()?.split_once(':')?;
    Some(Mount {
        device: (major.parse().ok()?, minor.parse().ok()?),
        at: unescape(fields.get(4)?),
        kind: String::from_utf8_lossy(fields.get(dash + 1)?).into_owned(),
        read_only: fields.get(5)?.split(|b| *b == b',').any(|option| option == b"ro"),
        whole: *fields.get(3)? == b"/",
    })
}

/// `\040` and its like stand for blanks, tabs, newlines and backslashes.
fn unescape(field: &[u8]) -> PathBuf {
    let mut path = Vec::with_capacity(field.len());
    let mut at = 0;
    while at < field.len() {
        let octal =
            field.get(at + 1..at + 4).filter(|d| field[at] == b'\\' && d.iter().all(|b| (b'0'..b'8').contains(b)));
        match octal {
            Some(digits) => {
                path.push(digits.iter().fold(0u8, |n, d| n.wrapping_mul(8).wrapping_add(d - b'0')));
                at += 4;
            }
            None => {
                path.push(field[at]);
                at += 1;
            }
        }
    }
    OsString::from_vec(path).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_with_a_blank_in_its_path() {
        let line = b"36 35 0:3 / /mnt/a\\040b ro,noatime shared:1 - tmpfs tmpfs rw,size=4k";
        let (at, kind) = ("/mnt/a b".into(), "tmpfs".into());
        let expected = Mount { at, kind, device: (0, 3), read_only: true, whole: true };
        assert_eq!(parse(line), Some(expected));
        assert_eq!(parse(b""), None);
    }
}
