//! `/proc/PID/mountinfo`: the mounts that a process sees, one a line, in the order in which they were made.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Mount {
    pub id: u32,
    /// What it is mounted on; itself or a stranger's at the root.
    pub parent: u32,
    pub major: u32,
    pub minor: u32,
    /// Which part of the file system is seen: "/" unless it is a bind mount of a folder or file of it.
    pub root: PathBuf,
    pub mount_point: PathBuf,
    /// Of the mount: "rw,nosuid,relatime".
    pub options: String,
    /// Propagation: "shared:1", "master:2".
    pub tags: Vec<String>,
    /// "ext4", "overlay", …
    pub kind: String,
    pub source: String,
    /// Of the file system.
    pub super_options: String,
}

impl Mount {
    pub fn has_option(&self, wanted: &str) -> bool {
        self.options.split(',').any(|option| option == wanted)
    }
}

/// All mounts; `None` when a line is not as the kernel writes it.
pub fn parse(text: &[u8]) -> Option<Vec<Mount>> {
    text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).map(line).collect()
}

fn line(line: &[u8]) -> Option<Mount> {
    // Empty fields happen (a mount may have no source), so single spaces separate.
    let mut fields = line.split(|byte| *byte == b' ');
    let mut next = || fields.next();
    let id = number(next()?)?;
    let parent = number(next()?)?;
    let device = next()?;
    let colon = device.iter().position(|byte| *byte == b':')?;
    let (major, minor) = (number(&device[..colon])?, number(&device[colon + 1..])?);
    let root = path(next()?);
    let mount_point = path(next()?);
    let options = text(next()?);
    let mut tags = Vec::new();
    loop {
        match next()? {
            b"-" => break,
            tag => tags.push(text(tag)),
        }
    }
    let kind = text(next()?);
    let source = text(next()?);
    let super_options = text(next()?);
    Some(Mount { id, parent, major, minor, root, mount_point, options, tags, kind, source, super_options })
}

fn number(field: &[u8]) -> Option<u32> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

fn text(field: &[u8]) -> String {
    String::from_utf8_lossy(&unescape(field)).into_owned()
}

fn path(field: &[u8]) -> PathBuf {
    OsString::from_vec(unescape(field)).into()
}

/// Space, tab, newline and backslash come as `\040` and the like.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        let octal = |digit: u8| (b'0'..=b'7').contains(&digit).then(|| u32::from(digit - b'0'));
        if byte == b'\\'
            && let [a, b, c, tail @ ..] = rest
            && let (Some(a), Some(b), Some(c)) = (octal(*a), octal(*b), octal(*c))
            && let Ok(value) = u8::try_from(a * 64 + b * 8 + c)
        {
            out.push(value);
            rest = tail;
        } else {
            out.push(byte);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lines_of_a_kernel() {
        let text = b"27 1 254:0 / / rw,relatime shared:1 master:2 - ext4 /dev/vda rw,discard\n\
            28 27 0:25 /sub\\040dir /mnt/a\\011b ro - tmpfs  rw,size=4k\n";
        let mounts = parse(text).unwrap();
        assert_eq!(mounts[0].tags, ["shared:1", "master:2"]);
        assert_eq!((mounts[0].major, mounts[0].minor), (254, 0));
        assert_eq!(mounts[1].root, PathBuf::from("/sub dir"));
        assert_eq!(mounts[1].mount_point, PathBuf::from("/mnt/a\tb"));
        assert_eq!(mounts[1].source, "");
        assert!(mounts[1].has_option("ro") && !mounts[0].has_option("ro"));
    }

    #[test]
    fn this_process() {
        let mounts = parse(&std::fs::read("/proc/self/mountinfo").unwrap()).unwrap();
        assert!(mounts.iter().any(|mount| mount.mount_point.as_os_str() == "/"));
    }

    proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }
    }
}
