//! `tmpcopyup`: what a folder of the root has goes into the file system in memory that is laid over it.
//!
//! By descriptors, folder by folder, following no link. What is neither folder, file nor link (devices, sockets, pipes)
//! stays below.

use crate::problem::{Doing, Result};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod, fstat, fstatat, mkdirat};
use nix::unistd::{Gid, Uid, fchown, fchownat, symlinkat};
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

/// A tree that is deeper is an attack on the stack.
const DEEPEST: usize = 256;

/// All of `from` into `to`, the root of a file system that is empty.
pub fn copy(from: &OwnedFd, to: &OwnedFd) -> Result<()> {
    // The root of a mount that is not attached yet is a descriptor of a path only.
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let to = openat(to, c".", flags, Mode::empty()).doing(|| "open the new file system".into())?;
    folder(from, c".", &to, 0)
}

fn folder(above: &OwnedFd, name: &CStr, to: &OwnedFd, depth: usize) -> Result<()> {
    let doing = || "read a folder".to_owned();
    if depth > DEEPEST {
        return Err(Errno::ELOOP).doing(doing);
    }
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let source = openat(above, name, flags, Mode::empty()).doing(doing)?;
    let found = fstat(&source).doing(doing)?;
    let copy = source.try_clone().doing(doing)?;
    for entry in Dir::from_fd(copy).doing(doing)?.iter() {
        let entry = entry.doing(doing)?;
        if ![c".", c".."].contains(&entry.file_name()) {
            one(&source, entry.file_name(), to, depth)
                .doing(|| format!("copy {}", entry.file_name().to_string_lossy()))?;
        }
    }
    give(to, &found).doing(|| "set owner and mode".into())
}

fn one(above: &OwnedFd, name: &CStr, to: &OwnedFd, depth: usize) -> Result<()> {
    let doing = || "copy".to_owned();
    let found = fstatat(above, name, AtFlags::AT_SYMLINK_NOFOLLOW).doing(doing)?;
    let open = OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    match SFlag::from_bits_truncate(found.st_mode & SFlag::S_IFMT.bits()) {
        SFlag::S_IFDIR => {
            mkdirat(to, name, Mode::S_IRWXU).doing(doing)?;
            let made = openat(to, name, open | OFlag::O_RDONLY | OFlag::O_DIRECTORY, Mode::empty()).doing(doing)?;
            folder(above, name, &made, depth + 1)
        }
        SFlag::S_IFREG => {
            let source = openat(above, name, open | OFlag::O_RDONLY | OFlag::O_NONBLOCK, Mode::empty()).doing(doing)?;
            let flags = open | OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
            let made = openat(to, name, flags, Mode::S_IRUSR | Mode::S_IWUSR).doing(doing)?;
            let copy = made.try_clone().doing(doing)?;
            io::copy(&mut File::from(source), &mut File::from(copy)).doing(doing)?;
            give(&made, &found).doing(doing)
        }
        SFlag::S_IFLNK => {
            let target = readlinkat(above, name).doing(doing)?;
            symlinkat(target.as_os_str(), to, name).doing(doing)?;
            let (uid, gid) = (Uid::from_raw(found.st_uid), Gid::from_raw(found.st_gid));
            fchownat(to, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW).doing(doing)
        }
        _ => Ok(()),
    }
}

/// Owner first: the change clears set-user-ID.
fn give(to: &OwnedFd, found: &FileStat) -> nix::Result<()> {
    fchown(to, Some(Uid::from_raw(found.st_uid)), Some(Gid::from_raw(found.st_gid)))?;
    let mode = Mode::from_bits_truncate(found.st_mode & 0o7777);
    fchmod(to, mode)
}
