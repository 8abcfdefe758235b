//! What the storage of a pod does not carry of a file without a name: its times and extended attributes; and the search
//! for another name that it may still have.

use super::classify::Look;
use super::view::View;
use nix::sys::stat::futimens;
use nix::sys::time::TimeSpec;
use pod_runtime::sys::xattr;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::collections::VecDeque;
use std::ffi::{CString, OsStr};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Entries that the search looks at before it gives up: the pod stands still meanwhile.
const SEARCH: usize = 100_000;

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Metadata {
    /// Of the last access and the last change: seconds and nanoseconds.
    pub times: Option<[(i64, i64); 2]>,
    pub attributes: Vec<(ByteBuf, ByteBuf)>,
}

fn magic(fd: BorrowedFd<'_>) -> CString {
    CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap_or_default()
}

pub(super) fn dump(fd: BorrowedFd<'_>, look: &Look) -> Metadata {
    let path = magic(fd);
    let mut attributes = Vec::new();
    for name in xattr::list(&path).unwrap_or_default() {
        if let Ok(Some(value)) = xattr::get(&path, &name) {
            attributes.push((ByteBuf::from(name.into_bytes()), ByteBuf::from(value)));
        }
    }
    let stat = &look.stat;
    Metadata { times: Some([(stat.st_atime, stat.st_atime_nsec), (stat.st_mtime, stat.st_mtime_nsec)]), attributes }
}

/// When it has its contents. An attribute that this file system lacks is passed over: the program got it from one that
/// may have been another.
pub(super) fn restore(metadata: &Metadata, fd: BorrowedFd<'_>) -> io::Result<()> {
    let Metadata { times, attributes } = metadata;
    for (name, value) in attributes {
        let Ok(name) = CString::new(name.to_vec()) else { continue };
        if let Err(error) = xattr::set(&magic(fd), &name, value) {
            tracing::warn!("attribute {} of a deleted file: {error}", name.to_string_lossy());
        }
    }
    if let Some([accessed, changed]) = times {
        futimens(fd, &TimeSpec::new(accessed.0, accessed.1), &TimeSpec::new(changed.0, changed.1))?;
    }
    Ok(())
}

/// A hard link of the inode: in the directory where it was, or anywhere on its mount. Files of the pod's root that were
/// linked lie in its own layer, which is small.
pub(super) fn other_name(path: &[u8], look: &Look, view: &View) -> Option<ByteBuf> {
    let is_it = |candidate: &Path| {
        let stat = view.stat(candidate.as_os_str().as_bytes());
        stat.is_some_and(|s| (s.st_dev, s.st_ino) == (look.stat.st_dev, look.stat.st_ino))
    };
    let found = |path: PathBuf| ByteBuf::from(path.into_os_string().into_encoded_bytes());
    let directory = Path::new(OsStr::from_bytes(path)).parent()?;
    if let Ok(fd) = view.open_path(directory.as_os_str().as_bytes()) {
        // The magic link leads into the pod's mount namespace whatever ours is.
        let beside = fs::read_dir(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok()?;
        if let Some(name) = beside.flatten().map(|e| directory.join(e.file_name())).find(|path| is_it(path)) {
            return Some(found(name));
        }
    }
    let top = view.mount_point(look.info.mount)?;
    if let Some(upper) = view.layer_of(look.info.mount) {
        return search(&upper, |path| is_it(&top.join(path))).map(|path| found(top.join(path)));
    }
    let fd = view.open_path(top.as_os_str().as_bytes()).ok()?;
    let root = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    search(&root, |path| is_it(&top.join(path))).map(|path| found(top.join(path)))
}

/// Breadth first below `root`; what is found is relative to it.
fn search(root: &Path, is_it: impl Fn(&Path) -> bool) -> Option<PathBuf> {
    let mut queue = VecDeque::from([PathBuf::new()]);
    let mut seen = 0;
    while let Some(directory) = queue.pop_front() {
        let Ok(entries) = fs::read_dir(root.join(&directory)) else { continue };
        for entry in entries.flatten() {
            seen += 1;
            if seen > SEARCH {
                return None;
            }
            let path = directory.join(entry.file_name());
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => queue.push_back(path),
                Ok(kind) if kind.is_file() && is_it(&path) => return Some(path),
                _ => {}
            }
        }
    }
    None
}
