//! epoll(7): registrations are read from fdinfo and made again by the opener under the same descriptor number, because
//! the number is part of the key that a task uses in EPOLL_CTL_MOD and EPOLL_CTL_DEL.
//!
//! A target stays registered when its number was closed but its description lives on elsewhere (dup, fork, a queue), and
//! the number may name another file by now. So each target is told by the kernel (KCMP_EPOLL_TFD), not by its number.
//!
//! A one-shot registration that has fired is registered again with no events; the kernel adds errors and hang-ups to any
//! registration, so a target that hangs up can be reported once more than before.

use super::opener;
use crate::ids::{FileId, TaskFd};
use pod_runtime::proc::fdinfo::FdInfo;
use pod_runtime::sys::{descriptor, kcmp};
use pod_runtime::{Doing, Problem, Result};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

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

/// `candidates` are the descriptions of the pod by inode number.
pub(super) fn dump<'a>(
    epoll: BorrowedFd<'_>,
    info: &FdInfo,
    subject: &str,
    candidates: impl Fn(u64) -> Vec<(FileId, BorrowedFd<'a>)>,
) -> Result<State> {
    let mut targets = Vec::new();
    // Several files under one number are listed one after another; the kernel counts them in the same order.
    let mut offsets: HashMap<i32, u32> = HashMap::new();
    for target in info.epoll() {
        let offset = offsets.entry(target.fd).or_default();
        let found = candidates(target.inode)
            .into_iter()
            .find(|(_, fd)| kcmp::is_epoll_target(*fd, epoll, target.fd, *offset).unwrap_or(false));
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

/// Empty; the registrations follow when everything is open.
pub(super) fn restore() -> Result<OwnedFd> {
    descriptor::epoll().doing(|| "make an epoll".into())
}

/// Registers the targets. A number that the opener uses for something else is put aside meanwhile: what is registered is
/// the description, so this does not touch other registrations.
pub(super) fn register<'a>(
    state: &State,
    epoll: BorrowedFd<'_>,
    number_of: impl Fn(FileId) -> Option<BorrowedFd<'a>>,
) -> Result<()> {
    for target in &state.targets {
        let Target { fd, file, events, data } = target;
        let source = number_of(*file).ok_or_else(|| opener::broken(format!("an epoll watches file {file}")))?;
        // The loop below must not move the two descriptors that it uses itself.
        let doing = || format!("register descriptor {fd} in an epoll");
        let source = descriptor::dup_above(source, fd.0.saturating_add(1)).doing(doing)?;
        let epoll = descriptor::dup_above(epoll, fd.0.saturating_add(1)).doing(doing)?;
        let aside = if descriptor::is_open(fd.0) { Some(aside(fd.0).doing(doing)?) } else { None };
        let added = descriptor::dup_to(source.as_fd(), fd.0)
            .and_then(|()| descriptor::epoll_add(epoll.as_fd(), fd.0, *events, *data));
        match aside {
            Some(old) => descriptor::dup_to(old.as_fd(), fd.0).doing(doing)?,
            None => descriptor::close_number(fd.0),
        }
        added.doing(doing)?;
    }
    Ok(())
}

fn aside(number: i32) -> nix::Result<OwnedFd> {
    descriptor::duplicate_number(number, number.saturating_add(1))
}

#[cfg(test)]
mod tests {
    use super::super::classify::Look;
    use super::*;
    use std::collections::BTreeMap;
    use std::os::fd::AsRawFd;

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
        let all = || vec![(FileId(1), other.as_fd()), (FileId(2), kept.as_fd())];
        let state = dump(epoll.as_fd(), &look.info, "test", |_| all()).unwrap();
        assert_eq!(state.targets, [Target { fd: TaskFd(registered), file: FileId(2), events: 0x19, data: 77 }]);

        let again = restore().unwrap();
        let held = BTreeMap::from([(FileId(2), kept.as_fd())]);
        register(&state, again.as_fd(), |id| held.get(&id).copied()).unwrap();
        assert!(!descriptor::is_open(registered));
        let look = Look::at(again.as_fd()).unwrap();
        assert_eq!(dump(again.as_fd(), &look.info, "test", |_| all()).unwrap(), state);
    }
}
