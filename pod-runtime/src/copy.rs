//! Copying files into and out of a running pod's tree.
//!
//! The pod may change its tree while we walk it, and may mean harm: every path is resolved by the kernel inside the
//! pod's root (openat2 with RESOLVE_IN_ROOT), below it we go from folder descriptor to folder descriptor and follow no
//! link, and what is there is looked at before it is opened (a FIFO or a device is made anew, never opened).

use crate::problem::{Doing, Problem, Result};
use nix::dir::Dir;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2, readlinkat};
use nix::sys::stat::{
    FchmodatFlags, FileStat, Mode, SFlag, UtimensatFlags, fchmodat, fstat, fstatat, mkdirat, mknodat, utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{UnlinkatFlags, fchownat, symlinkat, unlinkat};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Deeper than this nothing is copied.
const DEPTH: usize = 256;

/// A file's content from inside a root; a few MiB at most.
pub fn read_inside(root: &Path, path: &str) -> Result<Vec<u8>> {
    let root = open_root(root)?;
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = resolve(&root, Path::new(path), flags).doing(|| format!("open {path} in the pod"))?;
    if kind(&fstat(&file).doing(|| format!("look at {path}"))?) != SFlag::S_IFREG {
        return Err(Problem::new("E-SYSTEM", format!("{path} in the pod is no file")));
    }
    let mut bytes = Vec::new();
    File::from(file).take(4 << 20).read_to_end(&mut bytes).doing(|| format!("read {path}"))?;
    Ok(bytes)
}

/// Copies `from` of one root to `to` of another, as `cp -a`. When `to` is a folder (or ends in '/'), into it under its
/// own name.
pub fn copy(from_root: &Path, from: &Path, to_root: &Path, to: &Path) -> Result<()> {
    let (from_root, to_root) = (open_root(from_root)?, open_root(to_root)?);
    // The parent is resolved, the last part is not followed: a link is copied as a link.
    let (folder, name) = split(&from_root, from)?;
    let found = look(&folder, &name).map_err(|error| absent(from, error))?;
    let into = resolve(&to_root, to, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC);
    let (target, new_name) = match into {
        Ok(into) => {
            let name = if name == "." { OsString::from(".") } else { name.clone() };
            (into, name)
        }
        Err(_) if ends_in_slash(to) => {
            return Err(Problem::new("E-USAGE", format!("there is no folder {}", to.display())));
        }
        Err(_) => split(&to_root, to)?,
    };
    let walk = Walk { path: from.to_owned() };
    walk.entry(&folder, &name, &found, &target, &new_name, 0)
}

fn absent(path: &Path, error: nix::Error) -> Problem {
    Problem::new("E-USAGE", format!("there is nothing at {}", path.display())).because(error)
}

fn ends_in_slash(path: &Path) -> bool {
    path.as_os_str().as_bytes().ends_with(b"/")
}

fn open_root(root: &Path) -> Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    nix::fcntl::open(root, flags, Mode::empty()).doing(|| format!("open {}", root.display()))
}

fn resolve(root: &OwnedFd, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
    let how = OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(root, if path.as_os_str().is_empty() { Path::new("/") } else { path }, how)
}

/// The folder that a path is in, and its last part. A path without a last part (`/`, `a/.`) is the content of a folder.
fn split(root: &OwnedFd, path: &Path) -> Result<(OwnedFd, OsString)> {
    let plain_end = path.as_os_str().as_bytes();
    let (parent, name) = match path.file_name() {
        Some(name) if !plain_end.ends_with(b"/.") => (path.parent().unwrap_or(Path::new("/")), name.to_owned()),
        _ => (path, OsString::from(".")),
    };
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let folder = resolve(root, parent, flags).map_err(|error| absent(parent, error))?;
    Ok((folder, name))
}

fn look(folder: &OwnedFd, name: &OsStr) -> nix::Result<FileStat> {
    fstatat(folder, name, AtFlags::AT_SYMLINK_NOFOLLOW)
}

fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT
}

struct Walk {
    /// For messages.
    path: PathBuf,
}

impl Walk {
    fn entry(
        &self,
        from: &OwnedFd,
        name: &OsStr,
        found: &FileStat,
        to: &OwnedFd,
        as_name: &OsStr,
        depth: usize,
    ) -> Result<()> {
        let here = || format!("copy {} ({})", self.path.display(), name.display());
        if depth > DEPTH {
            return Err(Problem::new("E-SYSTEM", format!("{} is too deep", self.path.display())));
        }
        let kind = kind(found);
        if kind == SFlag::S_IFDIR {
            return self.folder(from, name, found, to, as_name, depth);
        }
        if kind == SFlag::S_IFSOCK {
            return Ok(());
        }
        match unlinkat(to, as_name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(nix::Error::ENOENT) => {}
            Err(error) => return Err(error).doing(here),
        }
        match kind {
            SFlag::S_IFREG => self.file(from, name, to, as_name).doing(here)?,
            SFlag::S_IFLNK => {
                let target = readlinkat(from, name).doing(here)?;
                symlinkat(target.as_os_str(), to, as_name).doing(here)?;
            }
            _ => mknodat(to, as_name, kind, Mode::from_bits_truncate(0o600), found.st_rdev).doing(here)?,
        }
        keep(found, to, as_name).doing(here)
    }

    fn file(&self, from: &OwnedFd, name: &OsStr, to: &OwnedFd, as_name: &OsStr) -> std::io::Result<()> {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let source = File::from(openat(from, name, flags, Mode::empty())?);
        if !source.metadata()?.is_file() {
            return Err(std::io::Error::other("it changed meanwhile"));
        }
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mut target = File::from(openat(to, as_name, flags, Mode::from_bits_truncate(0o600))?);
        std::io::copy(&mut &source, &mut target)?;
        Ok(())
    }

    fn folder(
        &self,
        from: &OwnedFd,
        name: &OsStr,
        found: &FileStat,
        to: &OwnedFd,
        as_name: &OsStr,
        depth: usize,
    ) -> Result<()> {
        let here = || format!("copy the folder {} ({})", self.path.display(), name.display());
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        match mkdirat(to, as_name, Mode::from_bits_truncate(0o700)) {
            Ok(()) | Err(nix::Error::EEXIST) => {}
            Err(error) => return Err(error).doing(here),
        }
        let source = openat(from, name, flags, Mode::empty()).doing(here)?;
        let target = openat(to, as_name, flags, Mode::empty()).doing(here)?;
        let copy = source.try_clone().doing(here)?;
        let mut names = Vec::new();
        for entry in Dir::from_fd(copy).doing(here)?.iter() {
            let entry = entry.doing(here)?;
            let entry = OsStr::from_bytes(entry.file_name().to_bytes()).to_owned();
            if entry != "." && entry != ".." {
                names.push(entry);
            }
        }
        for entry in names {
            match look(&source, &entry) {
                Ok(found) => self.entry(&source, &entry, &found, &target, &entry, depth + 1)?,
                // Removed while we walk.
                Err(nix::Error::ENOENT) => {}
                Err(error) => return Err(error).doing(here),
            }
        }
        if as_name != "." {
            keep(found, to, as_name).doing(here)?;
        }
        Ok(())
    }
}

/// Owner, mode and times.
fn keep(found: &FileStat, to: &OwnedFd, name: &OsStr) -> nix::Result<()> {
    let (uid, gid) = (found.st_uid.into(), found.st_gid.into());
    fchownat(to.as_fd(), name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)?;
    if kind(found) != SFlag::S_IFLNK {
        // What was just made here is no link: the mode goes where it should, unless the pod swaps it meanwhile, and then
        // the change stays below a folder of its own.
        let mode = Mode::from_bits_truncate(found.st_mode & 0o7777);
        match fchmodat(to, name, mode, FchmodatFlags::NoFollowSymlink) {
            Err(nix::Error::EOPNOTSUPP) => {}
            done => done?,
        }
    }
    let (accessed, modified) =
        (TimeSpec::new(found.st_atime, found.st_atime_nsec), TimeSpec::new(found.st_mtime, found.st_mtime_nsec));
    utimensat(to, name, &accessed, &modified, UtimensatFlags::NoFollowSymlink)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn a_tree_with_links_goes_over_whole() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        fs::create_dir_all(a.join("x/deep")).unwrap();
        fs::create_dir_all(b.join("into")).unwrap();
        fs::write(a.join("x/file"), "text").unwrap();
        fs::set_permissions(a.join("x/file"), PermissionsExt::from_mode(0o640)).unwrap();
        symlink("/etc/passwd", a.join("x/link")).unwrap();
        copy(&a, Path::new("/x"), &b, Path::new("/into")).unwrap();
        assert_eq!(fs::read_to_string(b.join("into/x/file")).unwrap(), "text");
        assert_eq!(fs::metadata(b.join("into/x/file")).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(fs::read_link(b.join("into/x/link")).unwrap(), Path::new("/etc/passwd"));
        copy(&a, Path::new("/x"), &b, Path::new("/new")).unwrap();
        assert!(b.join("new/deep").is_dir());
        copy(&a, Path::new("/x/."), &b, Path::new("/into")).unwrap();
        assert!(b.join("into/file").is_file());
        assert_eq!(copy(&a, Path::new("/none"), &b, Path::new("/")).unwrap_err().code(), "E-USAGE");
        assert_eq!(copy(&a, Path::new("/x"), &b, Path::new("/none/")).unwrap_err().code(), "E-USAGE");
    }

    #[test]
    fn a_link_in_the_pod_does_not_lead_out() {
        let dir = tempfile::tempdir().unwrap();
        let (pod, host) = (dir.path().join("pod"), dir.path().join("host"));
        fs::create_dir_all(pod.join("etc")).unwrap();
        fs::create_dir_all(&host).unwrap();
        fs::write(host.join("secret"), "secret").unwrap();
        symlink(&host, pod.join("out")).unwrap();
        symlink("../../../../../..", pod.join("up")).unwrap();
        fs::write(host.join("new"), "new").unwrap();
        assert!(copy(&pod, Path::new("/out/secret"), &host, Path::new("/copied")).is_err());
        assert!(copy(&host, Path::new("/new"), &pod, Path::new("/out/planted")).is_err());
        copy(&host, Path::new("/new"), &pod, Path::new("/up/planted")).unwrap();
        assert!(pod.join("planted").is_file());
        assert!(read_inside(&pod, "out/secret").is_err());
        // What lies at the destination is replaced, not written through.
        symlink(host.join("secret"), pod.join("trap")).unwrap();
        copy(&host, Path::new("/new"), &pod, Path::new("/trap")).unwrap();
        assert_eq!(fs::read_to_string(host.join("secret")).unwrap(), "secret");
    }
}
