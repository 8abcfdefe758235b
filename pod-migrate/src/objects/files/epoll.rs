//! epoll(7): registrations are read from fdinfo and made again by the opener under the same descriptor number, because
//! the number is part of the key that a task uses in EPOLL_CTL_MOD and EPOLL_CTL_DEL.
//!
//! A target stays registered when its number was closed but its description lives on elsewhere (dup, fork, a queue), and
//! the number may name another file by now. So each target is told by the kernel (KCMP_EPOLL_TFD), not by its number. It
//! walks the whole tree of registrations for each answer, which for ten thousand of them takes a second and more; so a socket,
//! which is the only description of its inode, is told by that.
//!
//! A signalfd wakes whoever *added* it: the kernel hangs the registration on the signals of the process that calls
//! EPOLL_CTL_ADD. Registered by the opener it would never be heard of again, so the process itself does it
//! ([`own_calls`]). Which one it was the kernel does not tell; it is taken to be the first that has both, which is the
//! one that made them unless it has ended.
//!
//! A one-shot registration that has fired is registered again with no events; the kernel adds errors and hang-ups to any
//! registration, so a target that hangs up can be reported once more than before.

use super::inotify::kernel_device;
use super::{FdTable, FileState, Files, opener};
use crate::ids::{FdTableId, FileId, TaskFd};
use crate::remote::call::{Arg, RemoteCall};
use nix::sys::stat::fstat;
use pod_runtime::proc::fdinfo::{EpollTarget, FdInfo};
use pod_runtime::sys::{descriptor, kcmp};
use pod_runtime::{Doing, Problem, Result};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub targets: Vec<Target>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Target {
    /// The number at the time of EPOLL_CTL_ADD: part of the key, even when it was closed since.
    pub fd: TaskFd,
    pub file: FileId,
    pub events: u32,
    pub data: u64,
}

/// `candidates` are the descriptions of the pod by inode number, first those that are open under the number of a target.
pub(super) fn dump<'a, Candidates: Iterator<Item = (FileId, BorrowedFd<'a>)>>(
    epoll: BorrowedFd<'_>,
    info: &FdInfo,
    subject: &str,
    candidates: impl Fn(u64, TaskFd) -> Candidates,
) -> Result<State> {
    let mut targets = Vec::new();
    // Several files under one number are listed one after another; the kernel counts them in the same order.
    let mut offsets: HashMap<i32, u32> = HashMap::new();
    for target in info.epoll() {
        let offset = offsets.entry(target.fd).or_default();
        let mut candidates = candidates(target.inode, TaskFd(target.fd));
        let found = candidates.find(|(_, fd)| {
            is_its_socket(*fd, &target) || kcmp::is_epoll_target(*fd, epoll, target.fd, *offset).unwrap_or(false)
        });
        *offset += 1;
        let Some((file, _)) = found else {
            let what = format!(
                "{subject}: the epoll watches a file (registered as {}) that no process of the pod has",
                target.fd
            );
            return Err(Problem::new("E-FILE-LOST", what));
        };
        targets.push(Target { fd: TaskFd(target.fd), file, events: target.events, data: target.data });
    }
    Ok(State { targets })
}

/// Whether a description is the socket that was registered: a socket that lives has its inode number alone, on the device
/// that all sockets share.
fn is_its_socket(fd: BorrowedFd<'_>, target: &EpollTarget) -> bool {
    fstat(fd).is_ok_and(|found| {
        let socket = found.st_mode & libc::S_IFMT == libc::S_IFSOCK;
        socket && (found.st_ino, kernel_device(found.st_dev)) == (target.inode, target.device)
    })
}

/// Empty; the registrations follow when everything is open.
pub(super) fn restore() -> Result<OwnedFd> {
    descriptor::epoll().doing(|| "make an epoll".into())
}

/// Registers the targets but for those that a process must register itself. A number that the opener uses for something else is put aside meanwhile: what is registered is
/// the description, so this does not touch other registrations.
pub(super) fn register<'a>(
    state: &State,
    epoll: BorrowedFd<'_>,
    number_of: impl Fn(FileId) -> Option<BorrowedFd<'a>>,
    by_itself: impl Fn(&Target) -> bool,
) -> Result<()> {
    for target in state.targets.iter().filter(|target| !by_itself(target)) {
        let Target { fd, file, events, data } = target;
        let source = number_of(*file).ok_or_else(|| opener::broken(format!("an epoll watches file {file}")))?;
        let doing = || format!("register descriptor {fd} in an epoll");
        if source.as_raw_fd() == fd.0 {
            descriptor::epoll_add(epoll, fd.0, *events, *data).doing(doing)?;
            continue;
        }
        if !descriptor::is_open(fd.0) {
            descriptor::dup_to(source, fd.0).doing(doing)?;
            let added = descriptor::epoll_add(epoll, fd.0, *events, *data);
            descriptor::close_number(fd.0);
            added.doing(doing)?;
            continue;
        }
        // What follows must not move the two descriptors that it uses itself.
        let source = descriptor::dup_above(source, fd.0.saturating_add(1)).doing(doing)?;
        let epoll = descriptor::dup_above(epoll, fd.0.saturating_add(1)).doing(doing)?;
        let aside = aside(fd.0).doing(doing)?;
        let added = descriptor::dup_to(source.as_fd(), fd.0)
            .and_then(|()| descriptor::epoll_add(epoll.as_fd(), fd.0, *events, *data));
        descriptor::dup_to(aside.as_fd(), fd.0).doing(doing)?;
        added.doing(doing)?;
    }
    Ok(())
}

/// The table whose process registers this target itself; none when the opener can do it.
pub(super) fn registers_itself(files: &Files, epoll: FileId, target: &Target) -> Option<FdTableId> {
    if !matches!(files.files.get(&target.file)?.state, FileState::Signalfd(_)) {
        return None;
    }
    let has = |table: &FdTable, file| table.fds.iter().any(|fd| fd.file == file);
    files.tables.iter().find(|(_, table)| has(table, epoll) && has(table, target.file)).map(|(id, _)| *id)
}

/// The registrations that a process makes itself, once its descriptors are in place. Run before the record
/// locks of the table: closing a descriptor ends those.
pub(super) fn own_calls(files: &Files, id: FdTableId) -> Vec<RemoteCall> {
    let Some(table) = files.tables.get(&id) else { return Vec::new() };
    let mut calls = Vec::new();
    let mut seen = std::collections::BTreeSet::new();
    for epoll in &table.fds {
        let Some(FileState::Epoll(state)) = files.files.get(&epoll.file).map(|file| &file.state) else { continue };
        if seen.insert(epoll.file) {
            let own = |target: &&Target| registers_itself(files, epoll.file, target) == Some(id);
            state.targets.iter().filter(own).for_each(|target| calls.extend(add(table, epoll.fd, target)));
        }
    }
    calls
}

/// EPOLL_CTL_ADD under the number of old, which by now may be closed or name another file.
fn add(table: &FdTable, epoll: TaskFd, target: &Target) -> Vec<RemoteCall> {
    let Target { fd, file, events, data } = target;
    let event = [&events.to_ne_bytes()[..], &data.to_ne_bytes()].concat();
    // Both numbers are put above everything while the one of old is borrowed.
    let high = table.fds.iter().map(|fd| fd.fd.0).max().unwrap_or(0).max(fd.0).saturating_add(1);
    let (set, aside) = (high, high.saturating_add(1));
    let dup = |from: i32, to: i32, close_on_exec: bool| {
        let flags = if close_on_exec { libc::O_CLOEXEC } else { 0 };
        RemoteCall::new("dup3", libc::SYS_dup3, vec![from.into(), to.into(), flags.into()]).returns(to.into())
    };
    let close = |number: i32| RemoteCall::new("close", libc::SYS_close, vec![number.into()]);
    let add = |epoll: i32| {
        let args = vec![epoll.into(), libc::EPOLL_CTL_ADD.into(), fd.0.into(), Arg::In(event.clone())];
        RemoteCall::new(format!("register descriptor {fd} in an epoll"), libc::SYS_epoll_ctl, args)
    };
    let now = table.fds.iter().find(|entry| entry.fd == *fd);
    if now.is_some_and(|entry| entry.file == *file) {
        return vec![add(epoll.0)];
    }
    let Some(source) = table.fds.iter().find(|entry| entry.file == *file) else { return Vec::new() };
    let mut calls = vec![dup(epoll.0, set, true)];
    match now {
        None => calls.extend([dup(source.fd.0, fd.0, true), add(set), close(fd.0)]),
        Some(entry) => calls.extend([
            dup(fd.0, aside, true),
            dup(source.fd.0, fd.0, true),
            add(set),
            dup(aside, fd.0, entry.close_on_exec),
            close(aside),
        ]),
    }
    calls.push(close(set));
    calls
}

fn aside(number: i32) -> nix::Result<OwnedFd> {
    descriptor::duplicate_number(number, number.saturating_add(1))
}

#[cfg(test)]
mod tests {
    use super::super::classify::Look;
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn a_socket_is_told_by_its_inode() {
        let (one, other) = std::os::unix::net::UnixStream::pair().unwrap();
        let epoll = descriptor::epoll().unwrap();
        descriptor::epoll_add(epoll.as_fd(), one.as_raw_fd(), 1, 7).unwrap();
        let target = Look::at(epoll.as_fd()).unwrap().info.epoll().remove(0);
        assert!(is_its_socket(one.as_fd(), &target) && !is_its_socket(other.as_fd(), &target));
        // A number is an inode's on one device only, and other descriptions than sockets share theirs.
        assert!(!is_its_socket(one.as_fd(), &EpollTarget { device: target.device + 1, ..target.clone() }));
        let event = descriptor::eventfd(false).unwrap();
        descriptor::epoll_add(epoll.as_fd(), event.as_raw_fd(), 1, 8).unwrap();
        let targets = Look::at(epoll.as_fd()).unwrap().info.epoll();
        let target = targets.iter().find(|target| target.data == 8).unwrap();
        assert!(!is_its_socket(event.as_fd(), target));
    }

    #[test]
    fn a_closed_number_stays_registered() {
        let epoll = descriptor::epoll().unwrap();
        let kept = descriptor::eventfd(false).unwrap();
        let number = descriptor::dup_above(kept.as_fd(), 300).unwrap();
        descriptor::epoll_add(epoll.as_fd(), number.as_raw_fd(), 1, 77).unwrap();
        let registered = number.as_raw_fd();
        drop(number);
        let other = descriptor::eventfd(false).unwrap();
        let look = Look::at(epoll.as_fd()).unwrap();
        let all = || [(FileId(1), other.as_fd()), (FileId(2), kept.as_fd())].into_iter();
        let state = dump(epoll.as_fd(), &look.info, "test", |_, _| all()).unwrap();
        assert_eq!(state.targets, [Target { fd: TaskFd(registered), file: FileId(2), events: 0x19, data: 77 }]);

        let again = restore().unwrap();
        let held = BTreeMap::from([(FileId(2), kept.as_fd())]);
        register(&state, again.as_fd(), |id| held.get(&id).copied(), |_| false).unwrap();
        assert!(!descriptor::is_open(registered));
        let look = Look::at(again.as_fd()).unwrap();
        assert_eq!(dump(again.as_fd(), &look.info, "test", |_, _| all()).unwrap(), state);
    }
}
