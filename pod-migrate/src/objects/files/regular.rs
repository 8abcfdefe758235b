//! Files and directories with a path: on the pod's overlay, its volumes, its tmpfs, /proc and /sys; deleted ones too.
//!
//! Nothing of the source is touched: the path is what the kernel shows, contents of deleted files are read through a
//! description of our own, so that the offset of the program's does not move.

use super::classify::Look;
use super::deleted::{self, Metadata};
use super::place::Made;
use super::view::View;
use super::{File, opener};
use nix::fcntl::{AT_FDCWD, OFlag, open};
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod, fstat, mkdirat, mknodat};
use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};
use nix::unistd::{Gid, LinkatFlags, Uid, Whence, fchown, linkat, lseek, symlinkat};
use pod_runtime::sys::clone::{Cloned, clone3};
use pod_runtime::sys::descriptor;
use pod_runtime::{Doing, Problem, Result};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Deleted files up to this size go into their record; the others follow as raw bytes.
const INLINE: u64 = 1 << 20;
/// Executables must be complete before a task maps them: nobody may hold them open for writing then.
const INLINE_EXECUTABLE: u64 = 48 << 20;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Absolute, as the pod sees it; bytes because names need not be UTF-8.
    pub path: ByteBuf,
    /// S_IFMT and permissions.
    pub mode: u32,
    pub bytes: u64,
    pub existence: Existence,
    /// Of a directory that is being read: the names that are still to come. Offsets mean nothing on another host.
    #[serde(default)]
    pub to_read: Option<Vec<ByteBuf>>,
    /// How long what is written will live (F_SET_RW_HINT); 0 for not said.
    #[serde(default)]
    pub write_hint: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Existence {
    /// It is there. `identity` for files of the base, which does not travel.
    Named { identity: Option<Identity> },
    /// It is below /proc and can only be opened when the processes exist.
    Proc,
    /// Unlinked; the path is what it was.
    Deleted(Deleted),
}

/// What a file of the base must be on the other host too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Identity {
    /// The build id of an ELF file.
    BuildId { bytes: u64, id: ByteBuf },
    /// Digest of the contents; of files longer than 4 MiB only of the first and the last MiB.
    Contents { bytes: u64, blake3: ByteBuf },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Deleted {
    /// Descriptions of one inode share this; the first of them has the contents.
    pub inode: u64,
    /// Another name that the inode still has.
    pub other_name: Option<ByteBuf>,
    pub uid: u32,
    pub gid: u32,
    /// With the first description of a small file. Others come as raw bytes, or (not the first) from the first.
    pub contents: Option<ByteBuf>,
    /// Whether this is the first description of the inode.
    pub first: bool,
    /// With the first.
    #[serde(default)]
    pub metadata: Metadata,
}

/// What the walk must know besides the state.
pub(super) struct Dumped {
    pub state: State,
    /// Bytes to send as raw contents.
    pub raw: Option<(OwnedFd, u64)>,
    pub warning: Option<String>,
}

impl Dumped {
    fn plain(state: State) -> Dumped {
        Dumped { state, raw: None, warning: None }
    }
}

/// `shared` is the number that the inode has in the image, and whether this is its first description.
pub(super) fn dump(
    fd: BorrowedFd<'_>,
    look: &Look,
    view: &View,
    subject: &str,
    mut shared: impl FnMut() -> (u64, bool),
) -> Result<Dumped> {
    let bytes = if look.format() == libc::S_IFREG { look.stat.st_size as u64 } else { 0 };
    let written = look.format() == libc::S_IFREG && !look.is_path_only();
    let write_hint = if written { descriptor::write_hint(fd).unwrap_or(0) } else { 0 };
    let state = |path: &[u8], existence| State {
        path: ByteBuf::from(path.to_vec()),
        mode: look.stat.st_mode,
        bytes,
        existence,
        to_read: None,
        write_hint,
    };
    if fstatfs(fd).is_ok_and(|s| s.filesystem_type() == PROC_SUPER_MAGIC) {
        return Ok(Dumped::plain(state(&look.link, Existence::Proc)));
    }
    let seen = below_overlay(look, view);
    let look = seen.as_ref().unwrap_or(look);
    match deleted_path(look, view) {
        None => {
            must_be_reachable(look, view, subject)?;
            let identity = if look.format() == libc::S_IFREG && view.is_of_base(&look.link, look.info.mount) {
                Some(known_identity(fd, look, view).doing(|| format!("read {} to compare it", look.name()))?)
            } else {
                None
            };
            let mut named = state(&look.link, Existence::Named { identity });
            if look.format() == libc::S_IFDIR && look.info.position != 0 && !look.is_path_only() {
                named.to_read = Some(names_from(fd, look).doing(|| format!("{subject}: read {}", look.name()))?);
            }
            Ok(Dumped::plain(named))
        }
        Some(path) => {
            let (inode, first) = shared();
            let mut dumped = Dumped::plain(state(path, Existence::Proc));
            let mut gone = Deleted {
                inode,
                other_name: None,
                uid: look.stat.st_uid,
                gid: look.stat.st_gid,
                contents: None,
                first,
                metadata: if first { deleted::dump(fd, look) } else { Metadata::default() },
            };
            if !matches!(look.format(), libc::S_IFREG | libc::S_IFDIR) {
                gone.contents = special(fd, look, subject)?;
            } else if first && look.format() == libc::S_IFREG {
                if look.stat.st_nlink > 0 {
                    gone.other_name = deleted::other_name(path, look, view);
                    dumped.warning = gone.other_name.is_none().then(|| {
                        format!(
                            "{subject}: {} has another name that was not found; they are two files now",
                            look.name()
                        )
                    });
                }
                if gone.other_name.is_none() {
                    (gone.contents, dumped.raw) = contents(fd, look)?;
                }
            }
            dumped.state.existence = Existence::Deleted(gone);
            Ok(dumped)
        }
    }
}

/// The names of a directory behind the offset of a description.
fn names_from(fd: BorrowedFd<'_>, look: &Look) -> nix::Result<Vec<ByteBuf>> {
    let own = reopen(fd, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    lseek(&own, look.info.position as i64, Whence::SeekSet)?;
    Ok(descriptor::entries(own.as_fd())?.into_iter().map(|(name, _)| ByteBuf::from(name)).collect())
}

/// Puts a directory's offset before the first name that was still to come. Where the order of names is another one, some
/// come twice; none is left out.
fn seek_to_names(fd: &OwnedFd, to_read: &[ByteBuf]) -> nix::Result<()> {
    let to_read: HashSet<&[u8]> = to_read.iter().map(|name| &name[..]).collect();
    let mut at = 0;
    for (name, behind) in descriptor::entries(fd.as_fd())? {
        if to_read.contains(&name[..]) {
            return lseek(fd, at, Whence::SeekSet).map(drop);
        }
        at = behind;
    }
    Ok(())
}

/// Of a deleted node that is only referred to (O_PATH): the target of a symbolic link.
fn special(fd: BorrowedFd<'_>, look: &Look, subject: &str) -> Result<Option<ByteBuf>> {
    match look.format() {
        libc::S_IFLNK => {
            let target = nix::fcntl::readlinkat(fd, "").doing(|| format!("{subject}: read {}", look.name()))?;
            Ok(Some(ByteBuf::from(target.into_encoded_bytes())))
        }
        libc::S_IFIFO | libc::S_IFSOCK => Ok(None),
        _ => Err(Problem::new("E-FILE-KIND", format!("{subject}: {} is a deleted device node", look.name()))),
    }
}

/// The path without the kernel's mark, when the file is deleted. A name may end in the same words.
fn deleted_path<'l>(look: &'l Look, view: &View) -> Option<&'l [u8]> {
    let path = look.link.strip_suffix(b" (deleted)")?;
    if look.stat.st_nlink > 0 && view.stat(&look.link).is_some_and(|s| s.st_ino == look.stat.st_ino) {
        return None;
    }
    Some(path)
}

/// The same file as the pod sees it, when the kernel shows a mapped one as part of what an overlay of the pod covers: a base
/// that is an overlay itself maps its own file, in a mount that is nowhere, and the path begins at that mount's root.
fn below_overlay(look: &Look, view: &View) -> Option<Look> {
    if look.format() != libc::S_IFREG || view.mount_point(look.info.mount).is_some() {
        return None;
    }
    let same = |stat: &FileStat| {
        // Through the upper overlay the device is another one, and what is written has a new number.
        let of = |stat: &FileStat| (stat.st_ino, stat.st_size, stat.st_mtime, stat.st_mtime_nsec, stat.st_mode);
        of(stat) == of(&look.stat)
    };
    view.overlays().find_map(|at| {
        let inner = look.link.strip_prefix(b"/")?;
        let path = at.join(OsStr::from_bytes(inner)).into_os_string().into_vec();
        let stat = view.stat(&path).filter(same)?;
        let mut info = look.info.clone();
        info.mount = view.mount_at(&path)?;
        Some(Look { stat, link: path, flags: look.flags, info })
    })
}

/// Opening the path again must give the same file: not when another mount covers it.
fn must_be_reachable(look: &Look, view: &View, subject: &str) -> Result<()> {
    let same = view.stat(&look.link).is_some_and(|s| (s.st_dev, s.st_ino) == (look.stat.st_dev, look.stat.st_ino));
    // On an overlay the inode number may change when a file is first written; the mount does not.
    if same || view.mount_at(&look.link) == Some(look.info.mount) {
        return Ok(());
    }
    let what = format!("{subject}: {} cannot be reached by its path inside the pod", look.name());
    Err(Problem::new("E-FILE-HIDDEN", what).fix("unmount what covers it, or close the file"))
}

/// A readable description of our own of the same file.
pub(super) fn reopen(fd: BorrowedFd<'_>, flags: OFlag) -> nix::Result<OwnedFd> {
    open(format!("/proc/self/fd/{}", fd.as_raw_fd()).as_str(), flags | OFlag::O_CLOEXEC, Mode::empty())
}

type Inline = (Option<ByteBuf>, Option<(OwnedFd, u64)>);

fn contents(fd: BorrowedFd<'_>, look: &Look) -> Result<Inline> {
    let bytes = look.stat.st_size as u64;
    let readable = reopen(fd, OFlag::O_RDONLY).doing(|| format!("open {} to read it", look.name()))?;
    let most = if look.stat.st_mode & 0o111 != 0 { INLINE_EXECUTABLE } else { INLINE };
    if bytes > most {
        return Ok((None, Some((readable, bytes))));
    }
    Ok((Some(ByteBuf::from(read_all(readable, bytes).doing(|| format!("read {}", look.name()))?)), None))
}

/// The first `bytes` of a file; what is missing at its end is zero.
pub(super) fn read_all(fd: OwnedFd, bytes: u64) -> std::io::Result<Vec<u8>> {
    let file = std::fs::File::from(fd);
    let mut data = vec![0; bytes as usize];
    let mut at = 0;
    while at < data.len() {
        match file.read_at(&mut data[at..], at as u64)? {
            0 => break,
            n => at += n,
        }
    }
    Ok(data)
}

fn known_identity(fd: BorrowedFd<'_>, look: &Look, view: &View) -> std::io::Result<Identity> {
    let key = (look.stat.st_dev, look.stat.st_ino, look.stat.st_size, look.stat.st_ctime);
    if let Some(identity) = view.identities.borrow().get(&key) {
        return Ok(identity.clone());
    }
    let identity = identify(&std::fs::File::from(reopen(fd, OFlag::O_RDONLY)?), look.stat.st_size as u64)?;
    view.identities.borrow_mut().insert(key, identity.clone());
    Ok(identity)
}

fn identify(file: &std::fs::File, bytes: u64) -> std::io::Result<Identity> {
    // The pod is stopped while this runs.
    const WHOLE: u64 = 4 << 20;
    const ENDS: u64 = 1 << 20;
    if let Some(id) = build_id(file)? {
        return Ok(Identity::BuildId { bytes, id: ByteBuf::from(id) });
    }
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 256 << 10];
    let mut hash = |from: u64, to: u64| -> std::io::Result<()> {
        let mut at = from;
        while at < to {
            let want = buffer.len().min((to - at) as usize);
            match file.read_at(&mut buffer[..want], at)? {
                0 => break,
                n => {
                    hasher.update(&buffer[..n]);
                    at += n as u64;
                }
            }
        }
        Ok(())
    };
    if bytes <= WHOLE {
        hash(0, bytes)?;
    } else {
        hash(0, ENDS)?;
        hash(bytes - ENDS, bytes)?;
    }
    Ok(Identity::Contents { bytes, blake3: ByteBuf::from(hasher.finalize().as_bytes().to_vec()) })
}

/// The note NT_GNU_BUILD_ID of a 64-bit little-endian ELF file, if its program headers lead to one.
fn build_id(file: &std::fs::File) -> std::io::Result<Option<Vec<u8>>> {
    let mut head = [0; 64];
    if file.read_at(&mut head, 0)? < 64 || &head[..6] != b"\x7fELF\x02\x01" {
        return Ok(None);
    }
    let u16_at = |b: &[u8], at: usize| u64::from(u16::from_le_bytes([b[at], b[at + 1]]));
    let u32_at = |b: &[u8], at: usize| u32::from_le_bytes(b[at..at + 4].try_into().unwrap_or_default());
    let u64_at = |b: &[u8], at: usize| u64::from_le_bytes(b[at..at + 8].try_into().unwrap_or_default());
    let (table, size, count) = (u64_at(&head, 32), u16_at(&head, 54), u16_at(&head, 56));
    for index in 0..count.min(128) {
        let mut header = [0; 56];
        let Some(at) = table.checked_add(index * size) else { break };
        if file.read_at(&mut header, at)? < 56 || u32_at(&header, 0) != 4 {
            continue;
        }
        let mut notes = vec![0; u64_at(&header, 32).min(4096) as usize];
        let length = file.read_at(&mut notes, u64_at(&header, 8))?;
        let mut rest = &notes[..length];
        while rest.len() >= 12 {
            let (name, data, kind) = (u32_at(rest, 0) as usize, u32_at(rest, 4) as usize, u32_at(rest, 8));
            let data_at = 12 + name.next_multiple_of(4);
            let Some(end) = data_at.checked_add(data).filter(|end| *end <= rest.len()) else { break };
            if kind == 3 && rest.get(12..16) == Some(b"GNU\0") {
                return Ok(Some(rest[data_at..end].to_vec()));
            }
            rest = &rest[end.next_multiple_of(4).min(rest.len())..];
        }
    }
    Ok(None)
}

/// Flags that open(2) takes from a description's. The others are set after.
fn open_flags(flags: i32) -> OFlag {
    let keep = libc::O_ACCMODE
        | libc::O_APPEND
        | libc::O_DIRECT
        | libc::O_DIRECTORY
        | libc::O_NOFOLLOW
        | libc::O_PATH
        | libc::O_SYNC
        | libc::O_DSYNC
        | libc::O_NOATIME;
    // An O_TMPFILE's own bit comes with O_DIRECTORY, which does not fit the file that was made.
    let flags = if flags & libc::O_TMPFILE == libc::O_TMPFILE { flags & !libc::O_TMPFILE } else { flags };
    OFlag::from_bits_retain(flags & keep) | OFlag::O_NOCTTY | OFlag::O_CLOEXEC
}

/// Opens it; runs inside the pod. A deleted one that is not the first of its inode is opened through `first`.
/// The second descriptor is a writable one for contents that come as raw bytes.
pub(super) fn restore(
    state: &State,
    file: &File,
    first: impl Fn(u64) -> Option<i32>,
) -> Result<(OwnedFd, Option<OwnedFd>)> {
    let State { path, mode, bytes, existence, to_read, write_hint } = state;
    let shown = String::from_utf8_lossy(path).into_owned();
    let (fd, contents) = match existence {
        Existence::Named { identity } => {
            let fd = open_named(path, *mode, file.flags).doing(|| format!("open {shown}"))?;
            if let Some(identity) = identity {
                must_be_the_same(&fd, identity, &shown)?;
            }
            (fd, None)
        }
        Existence::Proc => (open_proc(path, *mode, file.flags).doing(|| format!("open {shown}"))?, None),
        Existence::Deleted(deleted) => restore_deleted(path, *mode, *bytes, deleted, file.flags, first)?,
    };
    if *write_hint != 0
        && let Err(error) = descriptor::set_write_hint(fd.as_fd(), *write_hint)
    {
        // Advice: a file system may have no use for it.
        tracing::debug!("the write hint of {shown}: {error}");
    }
    if let Some(to_read) = to_read {
        seek_to_names(&fd, to_read).doing(|| format!("set the offset in {shown}"))?;
    } else if file.position != 0 && file.flags & libc::O_PATH == 0 {
        lseek(&fd, file.position as i64, Whence::SeekSet).doing(|| format!("set the offset in {shown}"))?;
    }
    Ok((fd, contents))
}

/// O_NONBLOCK so that a FIFO in the place of a file cannot make us wait; the kind must be what it was.
fn open_named(path: &[u8], mode: u32, flags: i32) -> std::io::Result<OwnedFd> {
    let flags = open_flags(flags) | OFlag::O_NONBLOCK;
    let fd = open(Path::new(OsStr::from_bytes(path)), flags, Mode::empty())?;
    if fstat(&fd)?.st_mode & libc::S_IFMT != mode & libc::S_IFMT {
        return Err(std::io::Error::other("it is another kind of file here"));
    }
    Ok(fd)
}

/// A file of procfs; one of a process that has ended is opened by way of a process that ends.
fn open_proc(path: &[u8], mode: u32, flags: i32) -> std::io::Result<OwnedFd> {
    let alive = path.strip_suffix(b" (deleted)").unwrap_or(path);
    if alive.len() == path.len() {
        match open_named(path, mode, flags) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            other => return other,
        }
    }
    let text = String::from_utf8_lossy(alive);
    let inner = text.strip_prefix("/proc/").unwrap_or("");
    let (pid, rest) = inner.split_once('/').unwrap_or((inner, ""));
    let pid: i32 = pid.parse().map_err(|_| std::io::Error::from_raw_os_error(libc::ENOENT))?;
    // The number may be another process's by now; then any does.
    let child = clone3(0, None, Some(pid)).or_else(|_| clone3(0, None, None))?;
    let Cloned::Parent { pid: child, pidfd } = child else {
        loop {
            nix::unistd::pause();
        }
    };
    // Threads of it may be named on the way.
    let rest = rest.replace(&format!("task/{pid}"), &format!("task/{child}"));
    let opened = open_named(format!("/proc/{child}/{rest}").trim_end_matches('/').as_bytes(), mode, flags);
    pod_runtime::sys::pidfd::send_signal(&pidfd, libc::SIGKILL)?;
    pod_runtime::sys::daemon::reap(child)?;
    opened
}

fn must_be_the_same(fd: &OwnedFd, identity: &Identity, shown: &str) -> Result<()> {
    let bytes = fstat(fd).doing(|| format!("stat {shown}"))?.st_size as u64;
    let readable = reopen(fd.as_fd(), OFlag::O_RDONLY).doing(|| format!("open {shown} to compare it"))?;
    let here = identify(&std::fs::File::from(readable), bytes).doing(|| format!("read {shown} to compare it"))?;
    if here == *identity {
        return Ok(());
    }
    let what = format!("{shown} is not the same file on this host as where the pod ran");
    Err(Problem::new("E-BASE-DIFFERS", what).fix("install the same version of the package that it belongs to"))
}

fn restore_deleted(
    path: &[u8],
    mode: u32,
    bytes: u64,
    deleted: &Deleted,
    flags: i32,
    first: impl Fn(u64) -> Option<i32>,
) -> Result<(OwnedFd, Option<OwnedFd>)> {
    let shown = String::from_utf8_lossy(path).into_owned();
    let Deleted { inode, other_name, uid, gid, contents, first: is_first, metadata } = deleted;
    let doing = || format!("make the deleted file {shown} again");
    // So that it lies on the file system that it was on, and shows the path that it had.
    let _made = Made::parents_of(Path::new(OsStr::from_bytes(path))).ok();
    if !is_first {
        let number =
            first(*inode).ok_or_else(|| opener::broken(format!("{shown} refers to a file that is not there")))?;
        let link = format!("/proc/self/fd/{number}");
        return Ok((open(link.as_str(), open_flags(flags) & !OFlag::O_NOFOLLOW, Mode::empty()).doing(doing)?, None));
    }
    if mode & libc::S_IFMT == libc::S_IFDIR {
        return Ok((deleted_directory(path, mode, (*uid, *gid), flags).doing(doing)?, None));
    }
    if mode & libc::S_IFMT != libc::S_IFREG {
        return Ok((deleted_node(path, mode, contents.as_ref().map(|c| &c[..]), flags).doing(doing)?, None));
    }
    let complete = |fd: &OwnedFd| -> std::io::Result<()> {
        fill(fd, bytes, contents.as_ref().map(|c| &c[..]))?;
        fchown(fd, Some(Uid::from_raw(*uid)), Some(Gid::from_raw(*gid)))?;
        fchmod(fd, Mode::from_bits_truncate(mode & 0o7777))?;
        deleted::restore(metadata, fd.as_fd())
    };
    if other_name.is_none()
        && flags & libc::O_TMPFILE == libc::O_TMPFILE
        && let Some((fd, writable)) = unnamed(path, flags)
    {
        complete(&writable).doing(doing)?;
        return Ok((fd, Some(writable).filter(|_| contents.is_none() && bytes > 0)));
    }
    let (name, writable) = match other_name {
        Some(other) => {
            let other = Path::new(OsStr::from_bytes(other));
            let name = at_free_name(path, |name| linkat(AT_FDCWD, other, AT_FDCWD, name, LinkatFlags::empty()));
            (name.doing(doing)?.0, None)
        }
        None => {
            let create = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_RDWR | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let (name, fd) =
                at_free_name(path, |name| open(name, create, Mode::S_IRUSR | Mode::S_IWUSR)).doing(doing)?;
            (name, Some(fd))
        }
    };
    let opened = (|| -> std::io::Result<OwnedFd> {
        writable.as_ref().map_or(Ok(()), complete)?;
        Ok(open(&name, open_flags(flags), Mode::empty())?)
    })();
    std::fs::remove_file(&name).doing(doing)?;
    let fd = opened.doing(doing)?;
    Ok((fd, writable.filter(|_| contents.is_none() && bytes > 0)))
}

/// A file that never had a name (O_TMPFILE), which linkat(2) can give it; and a second description to fill it through.
/// None where the file system has no such files here: then it is one that was deleted.
fn unnamed(path: &[u8], flags: i32) -> Option<(OwnedFd, OwnedFd)> {
    let directory = Path::new(OsStr::from_bytes(path)).parent()?;
    let made = open(directory, open_flags(flags) | OFlag::O_TMPFILE, Mode::S_IRUSR | Mode::S_IWUSR)
        .and_then(|fd| reopen(fd.as_fd(), OFlag::O_RDWR).map(|writable| (fd, writable)));
    made.inspect_err(|error| tracing::warn!("{} is a deleted file now: {error}", directory.display())).ok()
}

/// Of a deleted file whose contents came as raw bytes.
pub(super) fn set_times(state: &State, fd: BorrowedFd<'_>) -> std::io::Result<()> {
    match &state.existence {
        Existence::Deleted(gone) => deleted::restore(&gone.metadata, fd),
        _ => Ok(()),
    }
}

/// Gives an empty file its size and its contents.
pub(super) fn fill(fd: &OwnedFd, bytes: u64, contents: Option<&[u8]>) -> std::io::Result<()> {
    nix::unistd::ftruncate(fd, bytes as i64)?;
    let file = std::fs::File::from(fd.try_clone()?);
    match contents {
        Some(contents) => file.write_all_at(contents, 0),
        None => Ok(()),
    }
}

fn deleted_directory(path: &[u8], mode: u32, owner: (u32, u32), flags: i32) -> std::io::Result<OwnedFd> {
    let (name, ()) = at_free_name(path, |name| mkdirat(AT_FDCWD, name, Mode::S_IRWXU))?;
    let opened = (|| -> std::io::Result<OwnedFd> {
        std::os::unix::fs::chown(&name, Some(owner.0), Some(owner.1))?;
        std::fs::set_permissions(&name, std::os::unix::fs::PermissionsExt::from_mode(mode & 0o7777))?;
        Ok(open(&name, open_flags(flags), Mode::empty())?)
    })();
    std::fs::remove_dir(&name)?;
    opened
}

/// A symbolic link, FIFO or socket's file, referred to by O_PATH.
fn deleted_node(path: &[u8], mode: u32, target: Option<&[u8]>, flags: i32) -> std::io::Result<OwnedFd> {
    let kind = SFlag::from_bits_truncate(mode & libc::S_IFMT);
    if flags & libc::O_PATH == 0 || (kind == SFlag::S_IFLNK) != target.is_some() {
        return Err(std::io::Error::other("a node of this kind cannot be open"));
    }
    let permissions = Mode::from_bits_truncate(mode & 0o7777);
    let (name, ()) = at_free_name(path, |name| match target {
        Some(target) => symlinkat(Path::new(OsStr::from_bytes(target)), AT_FDCWD, name),
        None if kind == SFlag::S_IFIFO || kind == SFlag::S_IFSOCK => mknodat(AT_FDCWD, name, kind, permissions, 0),
        None => Err(nix::errno::Errno::EINVAL),
    })?;
    let opened = open(&name, open_flags(flags) | OFlag::O_NOFOLLOW, Mode::empty());
    std::fs::remove_file(&name)?;
    Ok(opened?)
}

/// Makes something under the name it had or, where that is taken or its directory is gone too, under another one; the
/// name is removed again anyway.
fn at_free_name<T>(path: &[u8], make: impl Fn(&Path) -> nix::Result<T>) -> std::io::Result<(PathBuf, T)> {
    let path = Path::new(OsStr::from_bytes(path));
    let name = path.file_name().unwrap_or(OsStr::new("deleted")).to_owned();
    let places = [path.parent().unwrap_or(Path::new("/")), Path::new("/tmp"), Path::new("/dev/shm"), Path::new("/")];
    let mut last = std::io::Error::from_raw_os_error(libc::ENOENT);
    for place in places {
        for attempt in 0..64 {
            let mut free = name.clone();
            if attempt > 0 {
                // A long name is cut by the kernel's limit otherwise.
                free = format!(".deleted-{attempt}").into();
            }
            let free = place.join(free);
            match make(&free) {
                Ok(made) => return Ok((free, made)),
                Err(nix::errno::Errno::EEXIST) => {}
                Err(error) => {
                    last = error.into();
                    break;
                }
            }
        }
    }
    Err(last)
}
