//! inotify(7): watches from fdinfo, resolved to paths inside the pod.
//!
//! A watch is on an inode; the kernel tells its number and, where the file system has them, a handle. The path is looked
//! for where a program most likely watches, then by a bounded walk; a file that has no name any more is one that the pod
//! has open. Events that wait in the queue cannot be read without taking them, nor made again: after a restore the reader
//! finds IN_Q_OVERFLOW in their place, which tells it that it missed some, and a warning says so too.
//!
//! Watches are set last of all, so that what a restore does to files is no event.

use super::opener;
use super::view::View;
use crate::ids::FileId;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use pod_runtime::proc::fdinfo::{FdInfo, InotifyWatch};
use pod_runtime::sys::descriptor;
use pod_runtime::{Doing, Problem, Result};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::collections::VecDeque;
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

/// Entries looked at by the walk before it gives up.
const WALK: usize = 400_000;
/// Looked into before everything else.
const LIKELY: [&str; 12] =
    ["/", "/etc", "/tmp", "/run", "/var", "/home", "/root", "/dev", "/srv", "/opt", "/var/log", "/var/spool"];

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub watches: Vec<Watch>,
    /// There were events in the queue.
    pub events_lost: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Watch {
    pub wd: i32,
    /// Empty when it is an open file.
    pub path: ByteBuf,
    pub mask: u32,
    /// It has no name any more.
    #[serde(default)]
    pub file: Option<FileId>,
}

/// `open` finds a watched file among those that the pod has open.
pub(super) fn dump(
    fd: BorrowedFd<'_>,
    info: &FdInfo,
    view: &View,
    subject: &str,
    open: impl Fn(&InotifyWatch) -> Option<Open>,
) -> Result<State> {
    let events_lost = descriptor::readable_bytes(fd).doing(|| "count inotify events".into())? > 0;
    let mut watches = Vec::new();
    for watch in info.inotify() {
        let (path, file) = match open(&watch) {
            Some(Open::Nameless(file)) => (Vec::new(), Some(file)),
            Some(Open::Path(path)) if is_it(&watch, view, &path) => (path, None),
            _ => (find(&watch, view).ok_or_else(|| not_found(subject, &watch))?, None),
        };
        watches.push(Watch { wd: watch.wd, path: ByteBuf::from(path), mask: watch.mask, file });
    }
    watches.sort_by_key(|w| w.wd);
    Ok(State { watches, events_lost })
}

/// A watched inode that the pod has open.
pub(super) enum Open {
    Path(Vec<u8>),
    Nameless(FileId),
}

fn not_found(subject: &str, watch: &InotifyWatch) -> Problem {
    Problem::new("E-FILE-INOTIFY", format!("{subject}: the file of inotify watch {} was not found", watch.wd))
}

/// Numbers of inodes are not enough: those of an overlay can meet, and the device that stat(2) tells of a file there can be
/// that of a layer. Handles tell files apart where there are any.
fn is_it(watch: &InotifyWatch, view: &View, path: &[u8]) -> bool {
    let Ok(fd) = view.open_path(path) else { return false };
    let Ok(stat) = nix::sys::stat::fstat(&fd) else { return false };
    if stat.st_ino != watch.inode {
        return false;
    }
    match descriptor::file_handle(fd.as_fd()) {
        Ok((kind, handle)) if kind == watch.handle_type => handle == watch.handle,
        _ => kernel_device(stat.st_dev) == watch.device,
    }
}

/// The path of the watched inode.
fn find(watch: &InotifyWatch, view: &View) -> Option<Vec<u8>> {
    if let Some(path) = view.found_inodes.borrow().get(&(watch.device, watch.inode)) {
        return Some(path.clone());
    }
    let is_it = |path: &[u8]| is_it(watch, view, path);
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
pub(super) fn kernel_device(device: u64) -> u64 {
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
            if entry.metadata().is_ok_and(|m| m.ino() == watch.inode) && is_it(watch, view, path.as_os_str().as_bytes())
            {
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

/// Without its watches: see [`watch`].
pub(super) fn restore() -> Result<OwnedFd> {
    descriptor::inotify().doing(|| "make an inotify".into())
}

/// `held` gives any file of the image.
pub(super) fn watch<'h>(
    state: &State,
    fd: BorrowedFd<'_>,
    held: impl Fn(FileId) -> Option<BorrowedFd<'h>>,
) -> Result<()> {
    let State { watches, events_lost } = state;
    for Watch { wd, path, mask, file } in watches {
        let path = match file {
            None => path.to_vec(),
            Some(id) => {
                let open = held(*id).ok_or_else(|| opener::broken(format!("file {id} is watched and not there")))?;
                format!("/proc/self/fd/{}", open.as_raw_fd()).into_bytes()
            }
        };
        let shown = String::from_utf8_lossy(&path).into_owned();
        let doing = || format!("watch {shown} as {wd}");
        let c_path = CString::new(path).doing(doing)?;
        descriptor::set_next_watch(fd, *wd).doing(doing)?;
        let got = descriptor::add_watch(fd, &c_path, *mask).doing(doing)?;
        if got != *wd {
            return Err(Problem::new("E-SYSTEM", format!("watch of {shown} is {got} instead of {wd}")));
        }
    }
    if *events_lost {
        let free = watches.last().map_or(1, |last| last.wd.saturating_add(1));
        overflow(fd, free).doing(|| "tell the reader of an inotify that it missed events".into())?;
    }
    Ok(())
}

/// Makes the queue hold IN_Q_OVERFLOW and nothing else: it is filled up with events of a file of our own, and all but
/// the last, which says that there were too many, are taken out again.
fn overflow(fd: BorrowedFd<'_>, free: i32) -> std::io::Result<()> {
    const SIZE: usize = 16;
    const TOO_MANY: usize = 64 << 20;
    let temporary = |folder: &str| open(folder, OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::S_IRUSR);
    let file = std::fs::File::from(temporary("/dev/shm").or_else(|_| temporary("/tmp"))?);
    let path = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    descriptor::set_next_watch(fd, free)?;
    let wd = descriptor::add_watch(fd, &path, libc::IN_MODIFY | libc::IN_ACCESS)?;
    let mut bytes = 0;
    loop {
        // Two kinds in turn, because equal neighbours become one.
        file.write_all_at(&[0], 0)?;
        file.read_exact_at(&mut [0], 0)?;
        let now = descriptor::readable_bytes(fd)?;
        // The one that says so is queued when the next finds no room; then nothing is queued any more.
        if now < bytes + 2 * SIZE || now > TOO_MANY {
            break;
        }
        bytes = now;
    }
    file.write_all_at(&[0], 0)?;
    descriptor::remove_watch(fd, wd)?;
    descriptor::set_next_watch(fd, free)?;
    let mut buffer = vec![0; 64 << 10];
    loop {
        let waiting = descriptor::readable_bytes(fd)?;
        if waiting <= SIZE {
            return Ok(());
        }
        let most = buffer.len().min(waiting - SIZE);
        nix::unistd::read(fd, &mut buffer[..most])?;
    }
}

#[cfg(test)]
mod tests {
    use super::super::classify::Look;
    use super::super::view::Outside;
    use super::*;
    use crate::ids::HostPid;

    fn dumped(fd: &OwnedFd, view: &View) -> State {
        dump(fd.as_fd(), &Look::at(fd.as_fd()).unwrap().info, view, "test", |_| None).unwrap()
    }

    #[test]
    fn watches_come_back_under_their_numbers() {
        let folder = tempfile::tempdir().unwrap();
        let fd = descriptor::inotify().unwrap();
        let path = CString::new(folder.path().as_os_str().as_bytes()).unwrap();
        descriptor::set_next_watch(fd.as_fd(), 5).unwrap();
        assert_eq!(descriptor::add_watch(fd.as_fd(), &path, 0x100).unwrap(), 5);
        let view = View::new(HostPid(std::process::id() as i32), Outside::default()).unwrap();
        let state = dumped(&fd, &view);
        let path = ByteBuf::from(path.as_bytes().to_vec());
        assert_eq!(state.watches, [Watch { wd: 5, path, mask: 0x100, file: None }]);
        let again = restore().unwrap();
        watch(&state, again.as_fd(), |_| None).unwrap();
        assert_eq!(dumped(&again, &view), state);
    }

    #[test]
    fn a_reader_is_told_of_lost_events() {
        let folder = tempfile::tempdir().unwrap();
        let fd = descriptor::inotify().unwrap();
        let path = CString::new(folder.path().as_os_str().as_bytes()).unwrap();
        let wd = descriptor::add_watch(fd.as_fd(), &path, libc::IN_CREATE).unwrap();
        std::fs::write(folder.path().join("new"), "").unwrap();
        let view = View::new(HostPid(std::process::id() as i32), Outside::default()).unwrap();
        let state = dumped(&fd, &view);
        assert!(state.events_lost);
        let again = restore().unwrap();
        watch(&state, again.as_fd(), |_| None).unwrap();
        let mut event = [0; 64];
        assert_eq!(nix::unistd::read(&again, &mut event).unwrap(), 16);
        let word = |at: usize| u32::from_ne_bytes(event[at..at + 4].try_into().unwrap());
        assert_eq!((word(0) as i32, word(4)), (-1, libc::IN_Q_OVERFLOW));
        std::fs::write(folder.path().join("newer"), "").unwrap();
        nix::unistd::read(&again, &mut event).unwrap();
        assert_eq!(i32::from_ne_bytes(event[..4].try_into().unwrap()), wd, "it goes on to report");
    }
}
