//! Files made by memfd_create(2).
//!
//! Read through a description of our own; the source is not touched. Contents of a large one follow as raw bytes, and
//! its seals are set when they have arrived. One that is sealed against writing goes whole into its record, so that it
//! is sealed before anybody maps it: the kernel refuses the seal once it is mapped by a writable description. With
//! F_SEAL_FUTURE_WRITE it is the other way round: writable maps from before the seal may be there, so it comes last.

use super::classify::Look;
use super::regular::{fill, read_all, reopen};
use super::{File, opener};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, fchmod};
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use nix::unistd::{Gid, Uid, Whence, fchown, lseek};
use pod_runtime::sys::descriptor;
use pod_runtime::{Doing, Result};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

const INLINE: u64 = 1 << 20;
const INLINE_SEALED: u64 = 48 << 20;
const SEAL_SEAL: u32 = 1;
const SEAL_WRITE: u32 = 8;
const SEAL_FUTURE_WRITE: u32 = 16;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Descriptions of one memfd share this; the first of them has the contents.
    pub inode: u64,
    pub first: bool,
    pub name: ByteBuf,
    pub bytes: u64,
    /// Bytes of a huge page; 0 is ordinary pages.
    pub huge: u64,
    /// F_SEAL_*.
    pub seals: u32,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// For small or sealed ones; others come as raw bytes.
    pub contents: Option<ByteBuf>,
}

/// The second value: what is to be sent as raw bytes.
pub(super) fn dump(
    fd: BorrowedFd<'_>,
    look: &Look,
    (inode, first): (u64, bool),
) -> Result<(State, Option<(OwnedFd, u64)>)> {
    let doing = || format!("read {}", look.name());
    let name = look.link.strip_prefix(b"/memfd:").unwrap_or(&look.link);
    let name = name.strip_suffix(b" (deleted)").unwrap_or(name);
    let file_system = fstatfs(fd).doing(doing)?;
    let huge = if file_system.filesystem_type() == HUGETLBFS_MAGIC { file_system.block_size() as u64 } else { 0 };
    let mut state = State {
        inode,
        first,
        name: ByteBuf::from(name.to_vec()),
        bytes: look.stat.st_size as u64,
        huge,
        seals: descriptor::seals(fd).doing(doing)?,
        mode: look.stat.st_mode,
        uid: look.stat.st_uid,
        gid: look.stat.st_gid,
        contents: None,
    };
    if !first {
        return Ok((state, None));
    }
    let readable = reopen(fd, OFlag::O_RDONLY).doing(doing)?;
    let sealed = state.seals & SEAL_WRITE != 0;
    if state.bytes <= if sealed { INLINE_SEALED } else { INLINE } && huge == 0 {
        state.contents = Some(ByteBuf::from(read_all(readable, state.bytes).doing(doing)?));
        return Ok((state, None));
    }
    let bytes = state.bytes;
    Ok((state, Some((readable, bytes))))
}

/// As [`super::regular::restore`].
pub(super) fn restore(
    state: &State,
    file: &File,
    first: impl Fn(u64) -> Option<i32>,
) -> Result<(OwnedFd, Option<OwnedFd>)> {
    let State { inode, first: is_first, name, bytes, huge, seals, mode, uid, gid, contents } = state;
    let doing = || format!("make {} again", file.name);
    let flags = OFlag::from_bits_retain(file.flags & libc::O_ACCMODE) | OFlag::O_CLOEXEC;
    if !is_first {
        let number = first(*inode).ok_or_else(|| opener::broken(format!("{} has no contents", file.name)))?;
        let fd = open(format!("/proc/self/fd/{number}").as_str(), flags, Mode::empty()).doing(doing)?;
        lseek(&fd, file.position as i64, Whence::SeekSet).doing(doing)?;
        return Ok((fd, None));
    }
    let name = CString::new(name.to_vec()).doing(doing)?;
    let mut create = libc::MFD_CLOEXEC;
    if *seals != SEAL_SEAL {
        create |= libc::MFD_ALLOW_SEALING;
    }
    if *huge > 0 {
        create |= libc::MFD_HUGETLB | (huge.trailing_zeros() << libc::MFD_HUGE_SHIFT);
    }
    let whole = descriptor::memfd(&name, create).doing(doing)?;
    fill(&whole, *bytes, contents.as_ref().map(|c| &c[..])).doing(doing)?;
    fchown(&whole, Some(Uid::from_raw(*uid)), Some(Gid::from_raw(*gid))).doing(doing)?;
    fchmod(&whole, Mode::from_bits_truncate(mode & 0o7777)).doing(doing)?;
    let fd = if file.flags & libc::O_ACCMODE == libc::O_RDWR {
        whole.try_clone().doing(doing)?
    } else {
        reopen(whole.as_fd(), flags).doing(doing)?
    };
    lseek(&fd, file.position as i64, Whence::SeekSet).doing(doing)?;
    if contents.is_some() {
        let late = if state.seals & SEAL_WRITE == 0 { SEAL_FUTURE_WRITE | SEAL_SEAL } else { 0 };
        add(fd.as_fd(), state.seals & !late)?;
        return Ok((fd, None));
    }
    Ok((fd, Some(whole)))
}

/// When the contents are complete and everything is mapped.
pub(super) fn seal(state: &State, fd: BorrowedFd<'_>) -> Result<()> {
    add(fd, state.seals)
}

fn add(fd: BorrowedFd<'_>, seals: u32) -> Result<()> {
    let missing = seals & !descriptor::seals(fd).unwrap_or(0);
    if missing == 0 {
        return Ok(());
    }
    // Only a description that may write can seal.
    let writable = reopen(fd, OFlag::O_RDWR).doing(|| "open a memfd to seal it".into())?;
    descriptor::add_seals(writable.as_fd(), missing).doing(|| "seal a memfd".into())
}
