//! Device nodes that hold no state: null, zero, full, random, urandom. Terminals have a file of their own.

use super::File;
use super::classify::Look;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, fstat, major, minor};
use pod_runtime::{Doing, Problem, Result};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub path: ByteBuf,
    pub major: u32,
    pub minor: u32,
}

pub(super) fn dump(look: &Look) -> State {
    let (major, minor) = look.device();
    State { path: ByteBuf::from(look.link.clone()), major, minor }
}

/// The node must be what it was: an image names a path, not a right to a device.
pub(super) fn restore(state: &State, file: &File) -> Result<OwnedFd> {
    let State { path, major: want_major, minor: want_minor } = state;
    let shown = String::from_utf8_lossy(path);
    let flags = OFlag::from_bits_retain(file.flags & libc::O_ACCMODE) | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let fd = open(Path::new(OsStr::from_bytes(path)), flags, Mode::empty()).doing(|| format!("open {shown}"))?;
    let stat = fstat(&fd).doing(|| format!("stat {shown}"))?;
    let (major, minor) = (major(stat.st_rdev) as u32, minor(stat.st_rdev) as u32);
    if stat.st_mode & libc::S_IFMT != libc::S_IFCHR || (major, minor) != (*want_major, *want_minor) {
        return Err(Problem::new("E-FILE-DEVICE", format!("{shown} is another device here")));
    }
    Ok(fd)
}
