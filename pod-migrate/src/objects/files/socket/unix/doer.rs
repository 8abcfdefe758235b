//! SO_PEERCRED tells who made a pair, who connected, or who listened: the kernel notes the process that makes the call. So
//! each of these calls is made by that process itself, at the engine's hands; by a short-lived one with its pid when it has
//! ended; and by the opener when neither can be.

use super::super::super::opener::{Deed, Errand};
use super::State;
use crate::ids::PodPid;
use nix::unistd::{Gid, Uid, setresgid, setresuid};
use pod_runtime::sys::clone::{Cloned, clone3};
use pod_runtime::sys::{daemon, pidfd, process, unix};
use serde_bytes::ByteBuf;
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};

/// Pairs that a task makes at once: it must have room for their descriptors.
const AT_ONCE: usize = 200;

/// Whom a socket tells of as its peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Who {
    pid: i32,
    uid: u32,
    gid: u32,
}

pub(super) fn peer_of(state: &State) -> Option<Who> {
    state.peer_credentials.map(|(uid, gid)| Who { pid: state.peer_pid, uid, gid })
}

/// What the engine answers: the results of the calls, or that there is no such process.
type Ask<'a> = &'a mut dyn FnMut(&Errand) -> io::Result<Option<Vec<i64>>>;

type Pair = (OwnedFd, OwnedFd);

pub struct Doer<'a> {
    ask: Ask<'a>,
    /// Made ahead, many at once.
    pairs: HashMap<(Who, i32), Vec<Pair>>,
}

impl<'a> Doer<'a> {
    pub fn new(ask: Ask<'a>) -> Doer<'a> {
        Doer { ask, pairs: HashMap::new() }
    }

    pub(super) fn listen(&mut self, who: Option<Who>, fd: BorrowedFd<'_>, backlog: i32) -> io::Result<()> {
        let deed = Deed::Listen { number: fd.as_raw_fd(), backlog };
        self.deed(who, deed, || unix::listen(fd, backlog))
    }

    pub(super) fn connect(&mut self, who: Option<Who>, fd: BorrowedFd<'_>, address: &[u8]) -> io::Result<()> {
        let deed = Deed::Connect { number: fd.as_raw_fd(), address: ByteBuf::from(address.to_vec()) };
        self.deed(who, deed, || pod_runtime::sys::inet::connect(fd, address))
    }

    fn deed(&mut self, who: Option<Who>, deed: Deed, own: impl Fn() -> io::Result<()>) -> io::Result<()> {
        let Some(who) = who else { return own() };
        let done = match self.errand(who, deed)? {
            // What it may not do is done in its place.
            Some(results) => results == [0],
            None => by_one_with_its_pid(who, || as_user(who, &own).is_ok()),
        };
        if done { Ok(()) } else { as_user(who, own) }
    }

    fn errand(&mut self, who: Who, deed: Deed) -> io::Result<Option<Vec<i64>>> {
        if who.pid <= 0 {
            return Ok(None);
        }
        (self.ask)(&Errand { pid: PodPid(who.pid), uid: who.uid, gid: who.gid, deed })
    }

    /// Makes so many pairs of each sort, to be had from [`Doer::pair`].
    pub(super) fn prepare(&mut self, wanted: HashMap<(Who, i32), usize>) -> io::Result<()> {
        for ((who, kind), mut left) in wanted {
            while left > 0 {
                let now = left.min(AT_ONCE);
                let Some(made) = self.made_by(who, kind, now)? else { break };
                left -= made.len().min(left);
                self.pairs.entry((who, kind)).or_default().extend(made);
            }
        }
        Ok(())
    }

    /// Made by the process itself, and taken from it.
    fn made_by(&mut self, who: Who, kind: i32, count: usize) -> io::Result<Option<Vec<Pair>>> {
        let Some(numbers) = self.errand(who, Deed::Pairs { kind, count })? else { return Ok(None) };
        let task = pidfd::open(who.pid)?;
        let take = |number: i64| pidfd::get_fd(&task, number as i32);
        let pairs: io::Result<Vec<Pair>> =
            numbers.chunks_exact(2).map(|two| Ok((take(two[0])?, take(two[1])?))).collect();
        self.errand(who, Deed::Close)?;
        pairs.map(|pairs| Some(pairs).filter(|pairs| !pairs.is_empty()))
    }

    pub(super) fn pair(&mut self, who: Option<Who>, kind: i32) -> io::Result<Pair> {
        let Some(who) = who else { return unix::pair(kind) };
        if let Some(pair) = self.pairs.get_mut(&(who, kind)).and_then(Vec::pop) {
            return Ok(pair);
        }
        let (mut told, mut tell) = io::pipe()?;
        let done = by_one_with_its_pid(who, || {
            let Ok((a, b)) = as_user(who, || unix::pair(kind)) else { return false };
            // The table is the opener's, which takes them over by number.
            let numbers = [a.into_raw_fd().to_ne_bytes(), b.into_raw_fd().to_ne_bytes()].concat();
            tell.write_all(&numbers).is_ok()
        });
        if !done {
            return as_user(who, || unix::pair(kind));
        }
        let (mut a, mut b) = ([0; 4], [0; 4]);
        told.read_exact(&mut a)?;
        told.read_exact(&mut b)?;
        let take = |number: [u8; 4]| process::received(i32::from_ne_bytes(number));
        Ok((take(a), take(b)))
    }
}

/// Runs `f` in a process with this pid that shares our descriptors and ends at once. False when the pid is taken, or when
/// `f` said so.
fn by_one_with_its_pid(who: Who, f: impl FnOnce() -> bool) -> bool {
    if who.pid <= 1 {
        return false;
    }
    match clone3(libc::CLONE_FILES as u64, None, Some(who.pid)) {
        Ok(Cloned::Child) => daemon::exit_now(i32::from(!f())),
        Ok(Cloned::Parent { pid, .. }) => daemon::reap(pid).is_ok_and(|ended| ended.code() == 0),
        Err(_) => false,
    }
}

/// Runs `f` as this user; what it may not do is done as root instead.
fn as_user<T>(who: Who, f: impl Fn() -> io::Result<T>) -> io::Result<T> {
    if (who.uid, who.gid) == (0, 0) {
        return f();
    }
    let root = (Uid::from_raw(0), Gid::from_raw(0));
    setresgid(root.1, Gid::from_raw(who.gid), root.1)?;
    if let Err(error) = setresuid(root.0, Uid::from_raw(who.uid), root.0) {
        setresgid(root.1, root.1, root.1)?;
        return Err(error.into());
    }
    let done = f();
    setresuid(root.0, root.0, root.0)?;
    setresgid(root.1, root.1, root.1)?;
    done.or_else(|_| f())
}
