//! inotify(7): watches from fdinfo, resolved to paths inside the pod.
//!
//! A watch is on an inode; the kernel tells its number and, where the file system has them, a handle. The path is looked
//! for where a program most likely watches, then by a bounded walk. Events that wait in the queue cannot be read without
//! taking them; after a restore the reader gets no events for what happened before, which is said as a warning.

use super::view::View;
use pod_runtime::proc::fdinfo::{FdInfo, InotifyWatch};
use pod_runtime::sys::descriptor;
use pod_runtime::{Doing, Problem, Result};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::collections::VecDeque;
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

/// Entries looked at by the walk before it gives up.
const WALK: usize = 400_000;
/// Looked into before everything else.
const LIKELY: [&str; 12] =
    ["/", "/etc", "/tmp", "/run", "/var", "/home", "/root", "/dev", "/srv", "/opt", "/var/log", "/var/spool"];

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub watches: Vec<Watch>,
    /// There were events in the queue.
    pub events_lost: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Watch {
    pub wd: i32,
    pub path: ByteBuf,
    pub mask: u32,
}

pub(super) fn dump(fd: BorrowedFd<'_>, info: &FdInfo, view: &View, subject: &str) -> Result<State> {
    let events_lost = descriptor::readable_bytes(fd).doing(|| "count inotify events".into())? > 0;
    let mut watches = Vec::new();
    for watch in info.inotify() {
        let path = find(&watch, view).ok_or_else(|| {
            let what = format!("{subject}: the file of inotify watch {} was not found", watch.wd);
            Problem::new("E-FILE-INOTIFY", what)
        })?;
        watches.push(Watch { wd: watch.wd, path: ByteBuf::from(path), mask: watch.mask });
    }
    watches.sort_by_key(|w| w.wd);
    Ok(State { watches, events_lost })
}

/// The path of the watched inode.
fn find(watch: &InotifyWatch, view: &View) -> Option<Vec<u8>> {
    if let Some(path) = view.found_inodes.borrow().get(&(watch.device, watch.inode)) {
        return Some(path.clone());
    }
    let is_it = |path: &[u8]| {
        view.stat(path).is_some_and(|s| s.st_ino == watch.inode && kernel_device(s.st_dev) == watch.device)
    };
    let path = LIKELY
        .iter()
        .map(|p| p.as_bytes().to_vec())
        .find(|path| is_it(path))
        .or_else(|| view.working_places().into_iter().find(|path| is_it(path)))
        .or_else(|| walk(watch, view))?;
    view.found_inodes.borrow_mut().insert((watch.device, watch.inode), path.clone());
    Some(path)
}

/// As the kernel prints `sdev`: 12 bits of major, 20 of minor.
fn kernel_device(device: u64) -> u64 {
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    (major << 20) | minor
}

/// Breadth first, so that what is near the root (and most often watched) comes early. /proc and /sys are left out.
fn walk(watch: &InotifyWatch, view: &View) -> Option<Vec<u8>> {
    let mut queue =
        VecDeque::from(LIKELY[1..].iter().map(PathBuf::from).chain([PathBuf::from("/")]).collect::<Vec<_>>());
    let mut seen = 0;
    while let Some(directory) = queue.pop_front() {
        let Ok(fd) = view.open_path(directory.as_os_str().as_bytes()) else { continue };
        // The magic link leads into the pod's mount namespace whatever ours is.
        let Ok(entries) = std::fs::read_dir(format!("/proc/self/fd/{}", fd.as_raw_fd())) else { continue };
        for entry in entries.flatten() {
            seen += 1;
            if seen > WALK {
                return None;
            }
            let path = directory.join(entry.file_name());
            use std::os::unix::fs::MetadataExt;
            if entry.metadata().is_ok_and(|m| m.ino() == watch.inode && kernel_device(m.dev()) == watch.device) {
                return Some(path.into_os_string().into_vec());
            }
            let skip = path == std::path::Path::new("/proc") || path == std::path::Path::new("/sys");
            if !skip && entry.file_type().is_ok_and(|t| t.is_dir()) {
                queue.push_back(path);
            }
        }
    }
    None
}

pub(super) fn restore(state: &State) -> Result<OwnedFd> {
    let State { watches, events_lost: _ } = state;
    let fd = descriptor::inotify().doing(|| "make an inotify".into())?;
    for Watch { wd, path, mask } in watches {
        let shown = String::from_utf8_lossy(path);
        let doing = || format!("watch {shown} as {wd}");
        let c_path = CString::new(path.to_vec()).doing(doing)?;
        descriptor::set_next_watch(fd.as_fd(), *wd).doing(doing)?;
        let got = descriptor::add_watch(fd.as_fd(), &c_path, *mask).doing(doing)?;
        if got != *wd {
            return Err(Problem::new("E-SYSTEM", format!("watch of {shown} is {got} instead of {wd}")));
        }
    }
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::super::classify::Look;
    use super::super::view::Outside;
    use super::*;
    use crate::ids::HostPid;

    #[test]
    fn watches_come_back_under_their_numbers() {
        let folder = tempfile::tempdir().unwrap();
        let fd = descriptor::inotify().unwrap();
        let path = CString::new(folder.path().as_os_str().as_bytes()).unwrap();
        descriptor::set_next_watch(fd.as_fd(), 5).unwrap();
        assert_eq!(descriptor::add_watch(fd.as_fd(), &path, 0x100).unwrap(), 5);
        let view = View::new(HostPid(std::process::id() as i32), Outside::default()).unwrap();
        let state = dump(fd.as_fd(), &Look::at(fd.as_fd()).unwrap().info, &view, "test").unwrap();
        assert_eq!(state.watches, [Watch { wd: 5, path: ByteBuf::from(path.as_bytes().to_vec()), mask: 0x100 }]);
        let again = restore(&state).unwrap();
        let info = Look::at(again.as_fd()).unwrap().info;
        assert_eq!(dump(again.as_fd(), &info, &view, "test").unwrap(), state);
    }
}
