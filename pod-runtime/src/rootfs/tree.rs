//! The pod's file tree while it is being built, by descriptors: every path is resolved inside its root (openat2 with
//! RESOLVE_IN_ROOT), so that no symlink in it, however hostile, leads outside, and what was resolved is held and not
//! looked up again.

use crate::problem::{Doing, Problem, Result};
use crate::sys::mount;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, open, openat2, readlinkat};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, mkdirat};
use std::ffi::CStr;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

/// The root of a tree.
#[derive(Debug)]
pub struct Tree {
    root: OwnedFd,
}

/// What must be at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    Directory,
    File,
}

impl Tree {
    pub fn at(path: &Path) -> Result<Tree> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root = open(path, flags, Mode::empty()).doing(|| format!("open {}", path.display()))?;
        Ok(Tree { root })
    }

    /// The tree below what is held.
    pub fn of(root: OwnedFd) -> Tree {
        Tree { root }
    }

    pub fn root(&self) -> &OwnedFd {
        &self.root
    }

    /// What is at `path`, symlinks followed inside the tree.
    pub fn find(&self, path: &Path) -> nix::Result<OwnedFd> {
        self.open(path, OFlag::O_PATH, ResolveFlag::RESOLVE_IN_ROOT)
    }

    /// A folder where the pod's own file systems go. A symlink there is refused: following it would put them, and what
    /// protects them, somewhere else.
    pub fn own_folder(&self, path: &Path) -> Result<OwnedFd> {
        let resolve = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_SYMLINKS;
        match self.open(path, OFlag::O_PATH | OFlag::O_DIRECTORY, resolve) {
            Ok(found) => Ok(found),
            Err(Errno::ENOENT) => self.make(path, Want::Directory, Mode::from_bits_truncate(0o755)),
            Err(error) => {
                let what = format!("{} of the pod's root is no plain folder", path.display());
                Err(Problem::new("E-ROOTFS", what).fix("use a root in which it is a folder").because(error))
            }
        }
    }

    /// What is at `path`; made, with the folders above it, when it is not there. A symlink that leads to nothing has what it
    /// leads to made, inside the tree like all else.
    pub fn find_or_make(&self, path: &Path, want: Want) -> Result<OwnedFd> {
        self.find_or_make_by(path, want, MOST_LINKS)
    }

    fn find_or_make_by(&self, path: &Path, want: Want, links: u32) -> Result<OwnedFd> {
        match self.find(path) {
            Ok(found) => Ok(found),
            Err(Errno::ENOENT) => match self.dangling(path) {
                Some(target) if links > 0 => self.find_or_make_by(&target, want, links - 1),
                _ => self.make(path, want, Mode::from_bits_truncate(0o755)),
            },
            Err(error) => Err(error).doing(|| format!("find {} in the pod's root", path.display())),
        }
    }

    /// The path with the first symlink in it that leads to nothing replaced by where that leads; none without one. By
    /// text: what comes out is looked up inside the tree again.
    fn dangling(&self, path: &Path) -> Option<PathBuf> {
        let mut so_far = PathBuf::from("/");
        let mut parts = path.components().filter(|part| matches!(part, Component::Normal(_)));
        while let Some(part) = parts.next() {
            let above = self.find(&so_far).ok()?;
            let target = readlinkat(&above, part.as_os_str());
            let link = so_far.join(part);
            if let Ok(target) = target
                && matches!(self.find(&link), Err(Errno::ENOENT))
            {
                let rest: PathBuf = parts.collect();
                return Some(plain(&so_far.join(target).join(rest)));
            }
            so_far = link;
        }
        None
    }

    fn open(&self, path: &Path, flags: OFlag, resolve: ResolveFlag) -> nix::Result<OwnedFd> {
        let how = OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        // A rename somewhere in the tree at the wrong instant is EAGAIN.
        for _ in 0..64 {
            match openat2(&self.root, if path.as_os_str().is_empty() { Path::new("/") } else { path }, how) {
                Err(Errno::EAGAIN) => continue,
                other => return other,
            }
        }
        Err(Errno::EAGAIN)
    }

    /// Component by component, each resolved inside the root before the next is made in it.
    fn make(&self, path: &Path, want: Want, mode: Mode) -> Result<OwnedFd> {
        let doing = || format!("make {} in the pod's root", path.display());
        let mut parts: Vec<&Path> = Vec::new();
        for part in path.components() {
            match part {
                Component::Normal(part) => parts.push(Path::new(part)),
                Component::RootDir | Component::CurDir => {}
                Component::ParentDir | Component::Prefix(_) => {
                    return Err(Problem::new("E-ROOTFS", format!("{} has '..' in it", path.display())));
                }
            }
        }
        let mut so_far = PathBuf::from("/");
        for (at, part) in parts.iter().enumerate() {
            let above = self.find(&so_far).doing(doing)?;
            so_far.push(part);
            match self.find(&so_far) {
                Ok(_) => continue,
                Err(Errno::ENOENT) => {}
                Err(error) => return Err(error).doing(doing),
            }
            let made = if at + 1 == parts.len() && want == Want::File {
                let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_WRONLY;
                nix::fcntl::openat(&above, *part, flags, Mode::from_bits_truncate(0o644)).map(drop)
            } else {
                mkdirat(&above, *part, mode)
            };
            match made {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(error) => return Err(error).doing(doing),
            }
        }
        self.find(&so_far).doing(doing)
    }

    /// Mounts what [`new`] has made at `path`, which must be a plain folder.
    pub fn mount(&self, path: &str, made: &OwnedFd) -> Result<()> {
        let onto = self.own_folder(Path::new(path))?;
        mount::attach(made, onto.as_fd()).doing(|| format!("mount {path}"))
    }
}

/// As the kernel's bound on links in a path.
const MOST_LINKS: u32 = 40;

/// Without dots, from the root, above which there is nothing.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(part) => plain.push(part),
            Component::ParentDir => drop(plain.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    plain
}

/// The root of a new instance of a file system, which is to be mounted at `path`.
pub fn new(path: &str, kind: &'static CStr, options: &[(&CStr, &CStr)], attributes: u64) -> Result<OwnedFd> {
    mount::new_filesystem(kind, options, attributes).doing(|| format!("make the {path} of the pod"))
}

/// mount(2) of the old kind on an object that is held. By way of /proc/self/fd of the host's procfs.
pub fn mount_on(kind: &str, source: &str, onto: &OwnedFd, flags: MsFlags, options: &str) -> nix::Result<()> {
    let onto = format!("/proc/self/fd/{}", onto.as_raw_fd());
    mount(Some(source), onto.as_str(), Some(kind), flags, Some(options))
}

/// A detached copy of what the host has at `path`.
pub fn clone_of_host(path: &Path, recursive: bool) -> Result<OwnedFd> {
    let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).doing(|| "use a path".into())?;
    mount::clone_tree(AT_FDCWD, &name, recursive).doing(|| format!("take {} of the host", path.display()))
}

/// Whether a held object is a folder.
pub fn is_folder(object: &OwnedFd) -> Result<bool> {
    let copy = object.try_clone().doing(|| "copy a descriptor".into())?;
    Ok(File::from(copy).metadata().doing(|| "look at a file".into())?.is_dir())
}
