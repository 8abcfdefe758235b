//! Writing a layer from records that are not trusted.
//!
//! Every path is checked as text and then resolved by the kernel below the layer's root (openat2 with BENEATH and
//! NO_SYMLINKS): a link inside the layer, put there by an earlier record or by the pod, leads nowhere. Each object is
//! made new under its name, never opened through what is there.

use super::{Entry, Meta, Node, PATH, STORAGE, check_path, lossy};
use crate::image::{Kind, Owner, Reader, damaged};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, fstat, fstatat, makedev, mknodat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, LinkatFlags, Uid, UnlinkatFlags, fchownat, linkat, symlinkat, unlinkat};
use pod_runtime::sys::xattr;
use pod_runtime::{Doing, Problem, Result};
use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File, Permissions};
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, PermissionsExt};

/// Contents are copied in pieces of this size.
const PIECE: usize = 1 << 20;

/// A layer being written.
pub struct Writing {
    root: OwnedFd,
    /// What is there already stays (the /dev of a newborn pod).
    keep: bool,
    /// The parent that was used last, open.
    parent: Option<(Vec<u8>, OwnedFd)>,
    /// The file whose contents come now.
    file: Option<(u64, File, Entry)>,
    /// Directories whose times are set when nothing is made in them any more.
    directories: BTreeMap<Vec<u8>, Times>,
    arrived: Arrived,
    buffer: Vec<u8>,
}

#[derive(Debug, Clone, Copy)]
struct Times {
    accessed: TimeSpec,
    modified: TimeSpec,
}

/// What came.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Arrived {
    pub files: u64,
    pub bytes: u64,
}

/// Reads the records of one layer up to its STORAGE_END and writes them.
pub fn receive_layer<R: Read>(reader: &mut Reader<R>, mut to: Writing) -> Result<Arrived> {
    loop {
        let Some(record) = reader.next()? else { return Err(damaged("the image ends within a layer of files")) };
        match (record.kind, record.run) {
            (Kind::STORAGE_ENTRY, _) => to.entry(record.id, record.state()?)?,
            (Kind::STORAGE_DATA, Some(run)) => to.contents(run.owner, run.address, reader)?,
            (Kind::STORAGE_END, _) => return to.finish(),
            (kind, _) => return Err(damaged(format!("a {kind} record within a layer of files"))),
        }
    }
}

impl Writing {
    /// `root` is a directory, which may hold the state of an earlier pass.
    pub fn new(root: OwnedFd, keep_existing: bool) -> Writing {
        Writing {
            root,
            keep: keep_existing,
            parent: None,
            file: None,
            directories: BTreeMap::new(),
            arrived: Arrived::default(),
            buffer: Vec::new(),
        }
    }

    pub fn entry(&mut self, id: u64, entry: Entry) -> Result<()> {
        self.close_file()?;
        check_path(&entry.path)?;
        self.arrived.files += 1;
        if entry.path.is_empty() {
            return self.root_entry(&entry);
        }
        let (parent, name) = self.parent_of(&entry.path)?;
        let what = || format!("make {}", lossy(&entry.path));
        let there = kind_at(&parent, &name)?;
        if self.keep && there.is_some() {
            return Ok(());
        }
        if let Node::Patch { size } = entry.node {
            let what = || format!("change {}", lossy(&entry.path));
            if there != Some(SFlag::S_IFREG) {
                return Err(damaged(format!("a change of {}, which did not come before", lossy(&entry.path))));
            }
            let flags = OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
            let file = File::from(openat(&parent, &name[..], flags, Mode::empty()).code(STORAGE, what)?);
            file.set_len(size).code(STORAGE, what)?;
            self.file = Some((id, file, entry));
            return Ok(());
        }
        if there.is_some() && !(matches!(entry.node, Node::Directory) && there == Some(SFlag::S_IFDIR)) {
            self.forget(&entry.path);
            remove(&parent, &name).code(STORAGE, || format!("replace {}", lossy(&entry.path)))?;
        }
        let parent_fd = &parent;
        match &entry.node {
            Node::Removed | Node::Patch { .. } => return Ok(()),
            Node::HardLink(target) => {
                check_path(target)?;
                let (from, from_name) = self.parent_of(target)?;
                return linkat(&from, &from_name[..], parent_fd, &name[..], LinkatFlags::empty()).code(STORAGE, what);
            }
            Node::Directory if there == Some(SFlag::S_IFDIR) => {}
            Node::Directory => {
                nix::sys::stat::mkdirat(parent_fd, &name[..], Mode::from_bits_truncate(0o700)).code(STORAGE, what)?;
            }
            Node::File { size } => {
                let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                let fd = openat(parent_fd, &name[..], flags, Mode::from_bits_truncate(0o600)).code(STORAGE, what)?;
                let file = File::from(fd);
                file.set_len(*size).code(STORAGE, what)?;
                self.file = Some((id, file, entry));
                return Ok(());
            }
            Node::Symlink(target) => symlinkat(&target[..], parent_fd, &name[..]).code(STORAGE, what)?,
            Node::Character { major, minor } => node(parent_fd, &name, SFlag::S_IFCHR, *major, *minor)?,
            Node::Block { major, minor } => node(parent_fd, &name, SFlag::S_IFBLK, *major, *minor)?,
            Node::Fifo => node(parent_fd, &name, SFlag::S_IFIFO, 0, 0)?,
            Node::Socket => node(parent_fd, &name, SFlag::S_IFSOCK, 0, 0)?,
        }
        self.adorn(&parent, &name, &entry)
    }

    /// A run of the file that came last.
    pub fn contents<R: Read>(&mut self, owner: Owner, offset: u64, reader: &mut Reader<R>) -> Result<()> {
        let (bytes, Some((id, file, entry))) = (reader.pages_left(), &self.file) else {
            if self.keep {
                return reader.skip_pages();
            }
            return Err(damaged("contents of a file that was not announced"));
        };
        let (Node::File { size } | Node::Patch { size }) = entry.node else {
            return Err(damaged("contents of something that is no file"));
        };
        if owner != Owner::Storage(*id) || offset.checked_add(bytes).is_none_or(|end| end > size) {
            return Err(damaged(format!("contents that do not belong to {}", lossy(&entry.path))));
        }
        // Most files are small, and a page that is touched costs more than what is read into it.
        let piece = PIECE.min(bytes as usize);
        self.buffer.resize(piece.max(self.buffer.len()), 0);
        let arrived = &mut self.arrived;
        reader.each_piece(offset, &mut self.buffer, |at, bytes| {
            file.write_all_at(bytes, at).code(STORAGE, || format!("write {}", lossy(&entry.path)))?;
            arrived.bytes += bytes.len() as u64;
            Ok(())
        })
    }

    /// Gives the last file and all directories their final times.
    pub fn finish(mut self) -> Result<Arrived> {
        self.close_file()?;
        self.parent = None;
        for (path, times) in std::mem::take(&mut self.directories).into_iter().rev() {
            let Ok(fd) = self.resolve(&path) else { continue };
            set_times(&fd, b".", times).code(STORAGE, || format!("set the times of {}", lossy(&path)))?;
        }
        Ok(self.arrived)
    }

    fn close_file(&mut self) -> Result<()> {
        let Some((_, file, entry)) = self.file.take() else { return Ok(()) };
        drop(file);
        let (parent, name) = self.parent_of(&entry.path)?;
        self.adorn(&parent, &name, &entry)
    }

    fn root_entry(&mut self, entry: &Entry) -> Result<()> {
        if self.keep {
            return Ok(());
        }
        if entry.node != Node::Directory {
            return Err(damaged("the root of a layer is not a directory"));
        }
        let root = self.root.try_clone().code(STORAGE, || "copy a descriptor".into())?;
        self.adorn(&root, b".", entry)
    }

    /// Owner, permissions, attributes and times, in the order in which they do not undo each other.
    fn adorn(&mut self, parent: &OwnedFd, name: &[u8], entry: &Entry) -> Result<()> {
        let Some(meta) = &entry.meta else { return Err(damaged("a file without owner and times")) };
        let what = || format!("set owner, permissions and times of {}", lossy(&entry.path));
        let (uid, gid) = (Uid::from_raw(meta.uid), Gid::from_raw(meta.gid));
        fchownat(parent, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW).code(STORAGE, what)?;
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = openat(parent, name, flags, Mode::empty()).code(STORAGE, what)?;
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        if !matches!(entry.node, Node::Symlink(_)) {
            fs::set_permissions(&path, Permissions::from_mode(meta.mode & 0o7777)).code(STORAGE, what)?;
        }
        attributes(&path, meta, entry)?;
        let times = Times { accessed: time(meta.accessed), modified: time(meta.modified) };
        if entry.node == Node::Directory {
            self.directories.insert(entry.path.to_vec(), times);
            return Ok(());
        }
        set_times(parent, name, times).code(STORAGE, what)
    }

    /// The directory of a path, and the last part. Making something in it must not show in its times.
    fn parent_of(&mut self, path: &[u8]) -> Result<(OwnedFd, Vec<u8>)> {
        let cut = path.iter().rposition(|b| *b == b'/');
        let (dir, name) = cut.map_or((&b""[..], path), |at| (&path[..at], &path[at + 1..]));
        if self.parent.as_ref().is_none_or(|(last, _)| last != dir) {
            let fd = self.resolve(dir)?;
            if !self.directories.contains_key(dir)
                && let Ok(stat) = fstat(&fd)
            {
                let times = Times {
                    accessed: time((stat.st_atime, stat.st_atime_nsec)),
                    modified: time((stat.st_mtime, stat.st_mtime_nsec)),
                };
                self.directories.insert(dir.to_vec(), times);
            }
            self.parent = Some((dir.to_vec(), fd));
        }
        let Some((_, fd)) = &self.parent else { return Err(Problem::new(STORAGE, "no directory")) };
        Ok((fd.try_clone().code(STORAGE, || "copy a descriptor".into())?, name.to_vec()))
    }

    fn resolve(&self, dir: &[u8]) -> Result<OwnedFd> {
        let path = if dir.is_empty() { b"." } else { dir };
        let how =
            OpenHow::new().flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC).resolve(
                ResolveFlag::RESOLVE_BENEATH
                    | ResolveFlag::RESOLVE_NO_SYMLINKS
                    | ResolveFlag::RESOLVE_NO_MAGICLINKS
                    | ResolveFlag::RESOLVE_NO_XDEV,
            );
        openat2(&self.root, path, how).map_err(|error| {
            let what = format!("the directory '{}' of a layer cannot be entered", lossy(dir));
            match error {
                Errno::ELOOP | Errno::EXDEV | Errno::ENOTDIR => {
                    Problem::new(PATH, what).because(error).fix("do not use this image: it was made to do harm")
                }
                _ => Problem::new(STORAGE, what).because(error),
            }
        })
    }

    /// A directory that goes takes the times kept for it and for those below along.
    fn forget(&mut self, path: &[u8]) {
        self.directories
            .retain(|kept, _| !(kept.starts_with(path) && matches!(kept.get(path.len()), None | Some(b'/'))));
        if self.parent.as_ref().is_some_and(|(last, _)| last.starts_with(path)) {
            self.parent = None;
        }
    }
}

fn time((seconds, nanoseconds): (i64, i64)) -> TimeSpec {
    // Beyond 10^9 the kernel would take it for UTIME_NOW or UTIME_OMIT.
    TimeSpec::new(seconds, nanoseconds.clamp(0, 999_999_999))
}

fn set_times(parent: &OwnedFd, name: &[u8], times: Times) -> nix::Result<()> {
    utimensat(parent, name, &times.accessed, &times.modified, UtimensatFlags::NoFollowSymlink)
}

fn attributes(path: &str, meta: &Meta, entry: &Entry) -> Result<()> {
    let path = CString::new(path).unwrap_or_default();
    // Those of an earlier pass that are gone.
    for name in xattr::list(&path).unwrap_or_default() {
        let wanted = meta.attributes.iter().any(|(n, _)| n[..] == *name.to_bytes());
        let ours = name.to_bytes().starts_with(b"trusted.overlay.") || name.to_bytes().starts_with(b"security.selinux");
        if !wanted && !ours {
            xattr::remove(&path, &name).code(STORAGE, || format!("take an attribute off {}", lossy(&entry.path)))?;
        }
    }
    for (name, value) in &meta.attributes {
        if name.starts_with(b"trusted.overlay.") && &name[..] != b"trusted.overlay.opaque" {
            return Err(damaged(format!("{} has an attribute of the overlay's own", lossy(&entry.path))));
        }
        let name = CString::new(name.to_vec()).map_err(|_| damaged("an attribute's name holds a NUL"))?;
        match xattr::set(&path, &name, value) {
            Ok(()) => {}
            // What a security module of the other host put there.
            Err(Errno::ENOTSUP) if name.to_bytes().starts_with(b"security.") => {}
            Err(error) => {
                let what = format!("set the attribute {} of {}", name.to_string_lossy(), lossy(&entry.path));
                return Err(error).code(STORAGE, || what);
            }
        }
    }
    Ok(())
}

fn node(parent: &OwnedFd, name: &[u8], kind: SFlag, major: u64, minor: u64) -> Result<()> {
    mknodat(parent, name, kind, Mode::from_bits_truncate(0o600), makedev(major, minor))
        .code(STORAGE, || format!("make the node {}", lossy(name)))
}

fn kind_at(parent: &OwnedFd, name: &[u8]) -> Result<Option<SFlag>> {
    match fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()))),
        Err(Errno::ENOENT) => Ok(None),
        Err(error) => Err(error).code(STORAGE, || format!("look at {}", lossy(name))),
    }
}

/// Takes away whatever has this name, a directory with all below it. Follows nothing.
fn remove(parent: &OwnedFd, name: &[u8]) -> nix::Result<()> {
    match unlinkat(parent, name, UnlinkatFlags::NoRemoveDir) {
        Err(Errno::EISDIR | Errno::EPERM) => {}
        other => return other,
    }
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let directory = openat(parent, name, flags, Mode::empty())?;
    let entries = fs::read_dir(format!("/proc/self/fd/{}", directory.as_raw_fd())).map_err(|_| Errno::EIO)?;
    let names: Vec<Vec<u8>> = entries.flatten().map(|e| e.file_name().into_vec()).collect();
    for child in names {
        remove(&directory, &child)?;
    }
    unlinkat(parent, name, UnlinkatFlags::RemoveDir)
}
