//! Reading a layer: a first pass while the pod runs, later passes that send only what changed.
//!
//! The tree may change under a first pass; whatever vanishes is passed over, whatever changes is seen by the next pass,
//! because a file's stamp is taken before its contents are read. Every object is opened by its parent's descriptor and
//! without following links, so nothing outside of the layer is ever read, whatever the pod does meanwhile.

use super::patch::{self, BLOCK, Candidate};
use super::{Entry, Meta, Node, STORAGE, lossy};
use crate::compare::{Digesting, Digests, RUN};
use crate::image::{Kind, Owner, PageRun, Writer};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, major, minor};
use nix::unistd::{Whence, lseek};
use pod_runtime::sys::xattr;
use pod_runtime::{Doing, Problem, Result};
use serde_bytes::ByteBuf;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// So many files that came before are compared at once: each is a descriptor.
const CROWD: usize = 128;
/// A file changed this shortly before it was looked at may change again without a new stamp on kernels whose file times
/// have the grain of a tick.
const GRAIN_NS: i128 = 20_000_000;

/// The root of a layer, open.
#[derive(Debug)]
pub struct Tree {
    root: OwnedFd,
    device: u64,
    /// The layer is this one file of the root, not all of it.
    only: Option<Vec<u8>>,
}

impl Tree {
    /// Opens a directory, or the directory of a file that alone is the layer.
    pub fn open(path: &Path) -> Result<Tree> {
        let meta = fs::metadata(path).code(STORAGE, || format!("look at {}", path.display()))?;
        let (dir, only) = match (meta.is_dir(), path.parent(), path.file_name()) {
            (true, _, _) => (path, None),
            (false, Some(dir), Some(name)) => (dir, Some(name.as_bytes().to_vec())),
            _ => return Err(Problem::new(STORAGE, format!("{} is neither a directory nor a file", path.display()))),
        };
        let root = File::open(dir).code(STORAGE, || format!("open {}", dir.display()))?;
        Tree::at(root.into(), only)
    }

    pub fn at(root: OwnedFd, only: Option<Vec<u8>>) -> Result<Tree> {
        let device = fstat(&root).code(STORAGE, || "look at the root of a layer".into())?.st_dev;
        Ok(Tree { root, device, only })
    }

    /// Whether the layer is one file and not a directory.
    pub fn single(&self) -> bool {
        self.only.is_some()
    }

    fn directory(&self, path: &[u8]) -> nix::Result<OwnedFd> {
        let path = if path.is_empty() { b"." } else { path };
        let how = OpenHow::new()
            .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV);
        openat2(&self.root, path, how)
    }
}

/// What a file looked like when it was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    mode: u32,
    size: i64,
    modified: (i64, i64),
    changed: (i64, i64),
    device: u64,
    /// Looked at too shortly after a change to be compared.
    unsure: bool,
}

impl Stamp {
    fn is_directory(&self) -> bool {
        self.mode & SFlag::S_IFMT.bits() == SFlag::S_IFDIR.bits()
    }
}

/// What one pass sent, to find out later what changed.
#[derive(Debug, Default)]
pub struct Inventory {
    /// The file system.
    device: u64,
    stamps: BTreeMap<Vec<u8>, Stamp>,
    /// What went out of regular files, where that is kept.
    digests: BTreeMap<Vec<u8>, Arc<Digests>>,
}

impl Inventory {
    /// Whether it is of what is in the same place now.
    pub fn is_of(&self, tree: &Tree) -> bool {
        self.device == tree.device
    }
}

/// How a pass knows what changed, and what it sends of that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// Whole files whose stamp is another.
    Whole,
    /// Of files whose stamp is another, what is another in them.
    Blocks,
}

/// Files that are looked at even when their stamp is the same. A store to a page that is mapped and was written to before
/// leaves no trace in a file's times.
#[derive(Debug, Default)]
pub struct Mapped {
    pub paths: BTreeSet<Vec<u8>>,
    /// Any may have been: on a tmpfs a page that was read through a map can be written to without a trace, too.
    pub any: bool,
}

/// What a pass did.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Sent {
    pub files: u64,
    pub bytes: u64,
    pub removed: u64,
}

/// One pass over a layer.
struct Pass<'a, W: Write> {
    tree: &'a Tree,
    out: &'a mut Writer<W>,
    /// Ids of entries, unique in the image.
    next_id: &'a mut u64,
    before: Option<&'a Inventory>,
    mapped: &'a Mapped,
    /// Of its paths: another name of the same file may be met first.
    mapped_inodes: BTreeSet<u64>,
    manner: Manner,
    now: Inventory,
    /// First names of files that have several.
    names: BTreeMap<u64, Vec<u8>>,
    /// Files that came before, and are to be compared.
    candidates: Vec<Candidate>,
    sent: Sent,
    buffer: Vec<u8>,
}

/// Sends a layer, or what changed of it since `before`. `next_id` goes on from pass to pass.
pub fn walk<W: Write>(
    tree: &Tree,
    out: &mut Writer<W>,
    next_id: &mut u64,
    before: Option<&Inventory>,
    mapped: &Mapped,
    manner: Manner,
) -> Result<(Inventory, Sent)> {
    let mut pass = Pass {
        tree,
        out,
        next_id,
        before,
        mapped,
        mapped_inodes: inodes_of(tree, mapped),
        manner,
        now: Inventory { device: tree.device, ..Inventory::default() },
        names: BTreeMap::new(),
        candidates: Vec::new(),
        sent: Sent::default(),
        buffer: Vec::new(),
    };
    pass.run()?;
    Ok((pass.now, pass.sent))
}

impl<W: Write> Pass<'_, W> {
    fn run(&mut self) -> Result<()> {
        if let Some(name) = self.tree.only.clone() {
            self.object(&self.tree.root, &name, name.clone())?;
            return self.compare();
        }
        let root = self.tree.directory(b"").code(STORAGE, || "open the root of a layer".into())?;
        self.object(&root, b".", Vec::new())?;
        let mut to_read = vec![Vec::new()];
        while let Some(path) = to_read.pop() {
            self.out.breathe()?;
            let Ok(directory) = self.tree.directory(&path) else { continue };
            for name in names(&directory) {
                let child = if path.is_empty() { name.clone() } else { [&path[..], b"/", &name[..]].concat() };
                if child.len() > super::MOST_PATH {
                    let what = format!("a path of {} bytes is too deep to be moved: {}", child.len(), lossy(&child));
                    return Err(Problem::new(STORAGE, what).fix("make the directories less deep"));
                }
                if self.object(&directory, &name, child.clone())? {
                    to_read.push(child);
                }
            }
        }
        self.compare()?;
        self.removed()
    }

    /// Sends one object if it changed; says whether it is a directory to descend into.
    fn object(&mut self, parent: &OwnedFd, name: &[u8], path: Vec<u8>) -> Result<bool> {
        let looked = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as i128);
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let Ok(fd) = openat(parent, name, flags, Mode::empty()) else { return Ok(false) };
        let stat = fstat(&fd).code(STORAGE, || format!("look at {}", lossy(&path)))?;
        if stat.st_dev != self.tree.device {
            return Ok(false); // something is mounted here: not of this layer
        }
        let kind = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits());
        let directory = kind == SFlag::S_IFDIR;
        let stamp = stamp(&stat, looked);
        let same = self.before.is_some_and(|b| b.stamps.get(&path).is_some_and(|s| *s == stamp && !s.unsure));
        let several = !directory && stat.st_nlink > 1;
        let first = several.then(|| self.names.get(&stat.st_ino).cloned()).flatten();
        if several && first.is_none() {
            self.names.insert(stat.st_ino, path.clone());
        }
        self.now.stamps.insert(path.clone(), stamp);
        let digests = self.before.and_then(|before| before.digests.get(&path));
        let kept = self.mapped.any && kind == SFlag::S_IFREG && first.is_none() && digests.is_some();
        let mapped = kept || self.mapped.paths.contains(&path) || self.mapped_inodes.contains(&stat.st_ino);
        if same && !mapped {
            let digests = digests.map(|digests| (path, Arc::clone(digests)));
            self.now.digests.extend(digests);
            return Ok(directory);
        }
        let size = stat.st_size as u64;
        let node = match (first, kind) {
            (Some(first), _) => Node::HardLink(ByteBuf::from(first)),
            (None, SFlag::S_IFDIR) => Node::Directory,
            (None, SFlag::S_IFREG) if digests.is_some() && self.is_the_same_file(&path, &stamp) => Node::Patch { size },
            (None, SFlag::S_IFREG) => Node::File { size },
            (None, SFlag::S_IFLNK) => match nix::fcntl::readlinkat(&fd, c"") {
                Ok(target) => Node::Symlink(ByteBuf::from(target.into_vec())),
                Err(_) => return Ok(false),
            },
            (None, SFlag::S_IFCHR) => Node::Character { major: major(stat.st_rdev), minor: minor(stat.st_rdev) },
            (None, SFlag::S_IFBLK) => Node::Block { major: major(stat.st_rdev), minor: minor(stat.st_rdev) },
            (None, SFlag::S_IFIFO) => Node::Fifo,
            _ => Node::Socket,
        };
        // Of one that is to be compared and may be what it was, nobody may want to know.
        let with_meta = !matches!((&node, same), (Node::HardLink(_), _) | (Node::Patch { .. }, true));
        let meta = with_meta.then(|| meta(&fd, &stat)).transpose()?;
        self.send(Entry { path: ByteBuf::from(path), node, meta }, fd, (same, stat))?;
        Ok(directory)
    }

    /// Not another one that has its name now: what else the old one was called would change with it over there.
    fn is_the_same_file(&self, path: &[u8], stamp: &Stamp) -> bool {
        let kind = |stamp: &Stamp| stamp.mode & SFlag::S_IFMT.bits();
        let before = self.before.and_then(|before| before.stamps.get(path));
        before.is_some_and(|before| before.inode == stamp.inode && kind(before) == kind(stamp))
    }

    /// `same`: by its stamp it is what it was.
    fn send(&mut self, entry: Entry, fd: OwnedFd, (same, stat): (bool, FileStat)) -> Result<()> {
        let id = *self.next_id;
        *self.next_id += 1;
        match entry.node {
            Node::Patch { size } => {
                let before = self.before.and_then(|before| before.digests.get(&entry.path[..]).map(Arc::clone));
                let before =
                    before.ok_or_else(|| Problem::new("E-INTERNAL", "a change of a file that was not sent"))?;
                self.candidates.push(Candidate { id, entry, fd, size, same, stat, before });
                if self.candidates.len() < CROWD { Ok(()) } else { self.compare() }
            }
            Node::File { size } => {
                self.announce(id, &entry)?;
                self.file(id, entry, &fd, size)
            }
            _ => self.announce(id, &entry),
        }
    }

    /// What is another in files that came before. Nothing at all of one that is in nothing.
    fn compare(&mut self) -> Result<()> {
        let candidates = std::mem::take(&mut self.candidates);
        let digests = patch::send(&candidates, self.out, &mut self.sent)?;
        let paths = candidates.into_iter().map(|candidate| candidate.entry.path.into_vec());
        self.now.digests.extend(paths.zip(digests.into_iter().map(Arc::new)));
        Ok(())
    }

    fn announce(&mut self, id: u64, entry: &Entry) -> Result<()> {
        self.sent.files += 1;
        self.out.put(Kind::STORAGE_ENTRY, id, entry)
    }

    fn file(&mut self, id: u64, entry: Entry, fd: &OwnedFd, size: u64) -> Result<()> {
        let mut digesting = (self.manner != Manner::Whole).then(|| Digesting::new(BLOCK, None));
        if size > 0 {
            let (out, sent) = (&mut *self.out, &mut self.sent);
            extents(&entry.path, fd, size as i64, &mut self.buffer, |at, bytes| {
                if let Some(digesting) = &mut digesting {
                    digesting.feed(at, bytes, &mut |_, _| Ok(()))?;
                }
                sent.bytes += bytes.len() as u64;
                out.pages(PageRun { owner: Owner::Storage(id), address: at, bytes: bytes.len() as u64 }, &[bytes])
            })?;
        }
        let digests = digesting.map(|digesting| digesting.end(size, &mut |_, _| Ok(()))).transpose()?;
        self.now.digests.extend(digests.map(|digests| (entry.path.into_vec(), Arc::new(digests))));
        Ok(())
    }

    /// What the pass before sent and this one did not meet. What was in a directory that is gone, or is something else now,
    /// goes with it.
    fn removed(&mut self) -> Result<()> {
        let Some(before) = self.before else { return Ok(()) };
        let in_a_directory = |path: &[u8]| match path.iter().rposition(|byte| *byte == b'/') {
            Some(at) => self.now.stamps.get(&path[..at]).is_some_and(Stamp::is_directory),
            None => true,
        };
        let gone = before.stamps.keys().filter(|path| !self.now.stamps.contains_key(*path) && in_a_directory(path));
        for path in gone {
            let id = *self.next_id;
            *self.next_id += 1;
            let entry = Entry { path: ByteBuf::from(path.clone()), node: Node::Removed, meta: None };
            self.out.put(Kind::STORAGE_ENTRY, id, &entry)?;
            self.sent.removed += 1;
        }
        Ok(())
    }
}

fn inodes_of(tree: &Tree, mapped: &Mapped) -> BTreeSet<u64> {
    let how = || {
        OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV)
    };
    let inode = |path: &Vec<u8>| Some(fstat(openat2(&tree.root, &path[..], how()).ok()?).ok()?.st_ino);
    mapped.paths.iter().filter_map(inode).collect()
}

/// Reads the extents that hold data, up to the size that was announced (what a file grows meanwhile comes later).
fn extents(
    path: &[u8],
    fd: &OwnedFd,
    size: i64,
    buffer: &mut Vec<u8>,
    mut each: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let Ok(file) = File::options().read(true).open(format!("/proc/self/fd/{}", fd.as_raw_fd())) else {
        return Err(Problem::new(STORAGE, format!("open {}", lossy(path))));
    };
    let mut at = 0;
    loop {
        let start = match lseek(&file, at, Whence::SeekData) {
            Ok(start) if start >= size => return Ok(()),
            Ok(start) => start,
            Err(Errno::ENXIO) => return Ok(()),
            Err(Errno::EINVAL) => at, // no holes on this file system
            Err(error) => return Err(error).code(STORAGE, || format!("seek in {}", lossy(path))),
        };
        let end = lseek(&file, start, Whence::SeekHole).unwrap_or(size).min(size);
        // Most files are small, and a page that is touched costs more than what is read into it.
        let longest = RUN.min(usize::try_from(end - start).unwrap_or(RUN));
        buffer.resize(longest.max(buffer.len()), 0);
        at = start;
        while at < end {
            let most = RUN.min(usize::try_from(end - at).unwrap_or(RUN));
            let n = file.read_at(&mut buffer[..most], at as u64).code(STORAGE, || format!("read {}", lossy(path)))?;
            if n == 0 {
                return Ok(()); // it has become shorter
            }
            each(at as u64, &buffer[..n])?;
            at += n as i64;
        }
        if at >= size {
            return Ok(());
        }
    }
}

fn stamp(stat: &FileStat, looked: i128) -> Stamp {
    let changed = i128::from(stat.st_ctime) * 1_000_000_000 + i128::from(stat.st_ctime_nsec);
    Stamp {
        inode: stat.st_ino,
        mode: stat.st_mode,
        size: stat.st_size,
        modified: (stat.st_mtime, stat.st_mtime_nsec),
        changed: (stat.st_ctime, stat.st_ctime_nsec),
        device: stat.st_rdev,
        unsure: looked - changed < GRAIN_NS,
    }
}

/// Names in a directory, without `.` and `..`; what cannot be listed is empty (it vanished).
fn names(directory: &OwnedFd) -> Vec<Vec<u8>> {
    let Ok(entries) = fs::read_dir(format!("/proc/self/fd/{}", directory.as_raw_fd())) else { return Vec::new() };
    let mut names: Vec<_> = entries.flatten().map(|entry| entry.file_name().into_vec()).collect();
    names.sort_unstable();
    // Where a name is given to another file meanwhile, some file systems list it twice.
    names.dedup();
    names
}

pub(super) fn meta(fd: &OwnedFd, stat: &FileStat) -> Result<Meta> {
    Ok(Meta {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        accessed: (stat.st_atime, stat.st_atime_nsec),
        modified: (stat.st_mtime, stat.st_mtime_nsec),
        attributes: attributes(fd)?,
    })
}

/// Attributes that mean the same elsewhere. Of the overlay's own only the opaque mark does: the rest are handles and
/// hints about the lower layer of this host.
fn attributes(fd: &OwnedFd) -> Result<Vec<(ByteBuf, ByteBuf)>> {
    let path = CString::new(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())).unwrap_or_default();
    let mut found = Vec::new();
    for name in xattr::list(&path).code(STORAGE, || "list extended attributes".into())? {
        let overlay = name.as_bytes().strip_prefix(b"trusted.overlay.");
        if overlay.is_some_and(|rest| rest == b"metacopy" || rest == b"redirect") {
            return Err(Problem::new(STORAGE, "the pod's overlay was mounted with metacopy or redirect_dir")
                .fix("these options cannot be moved: start the pod anew"));
        }
        if overlay.is_some_and(|rest| rest != b"opaque") {
            continue;
        }
        if let Some(value) = xattr::get(&path, &name).code(STORAGE, || "read an extended attribute".into())? {
            found.push((ByteBuf::from(name.into_bytes()), ByteBuf::from(value)));
        }
    }
    Ok(found)
}
