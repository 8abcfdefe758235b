//! How the opener gets out of the pod's freezer: what it does last it does while that holds the pod.
//!
//! To move a process waits until the whole kernel has noticed (RCU, some 10 ms). So where it can it goes on as a new process,
//! which is born outside and shares all descriptors ([`pod_runtime::cgroup::Outside`]), and the one before is killed.

use super::{Opener, Order, Process, died};
use crate::ids::PodPid;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pod_runtime::cgroup::Cgroup;
use pod_runtime::sys::pidfd;
use pod_runtime::{Doing, Result};
use std::os::fd::AsFd;
use std::thread::JoinHandle;

/// An opener on its way.
#[derive(Debug)]
pub(super) enum Leaving {
    /// Another process that has this pid in the pod goes on in its place.
    Succeeded(PodPid),
    /// It is moved by a thread of ours, which waits for the whole kernel while memory is filled.
    Moved(Moving),
}

/// Waits for its thread on drop.
#[derive(Debug)]
pub(super) struct Moving(Option<JoinHandle<Result<()>>>);

impl Moving {
    fn begin(cgroup: &Cgroup, host: i32) -> Moving {
        let cgroup = cgroup.clone();
        Moving(Some(std::thread::spawn(move || cgroup.step_out(host))))
    }

    fn end(mut self) -> Result<()> {
        let thread = self.0.take();
        thread.map_or(Ok(()), |thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    }
}

impl Drop for Moving {
    fn drop(&mut self) {
        let _ = self.0.take().map(JoinHandle::join);
    }
}

impl Opener {
    /// Has it leave the pod's freezer, where it can as a new process with this pid. Once all sockets exist, for they are
    /// counted, and new clients kept out, by the group that they were made in. [`Opener::has_left`] is to
    /// follow.
    pub fn leave(&mut self, cgroup: &Cgroup, free_pid: PodPid) -> Result<()> {
        if self.way_out {
            self.tell(&Order::Leave(free_pid))?;
            self.leaving = Some(Leaving::Succeeded(free_pid));
        } else {
            self.leaving = Some(Leaving::Moved(Moving::begin(cgroup, self.process.host)));
        }
        Ok(())
    }

    /// Goes on with its successor, if it is to have one: it takes a millisecond until its predecessor has ended, who would be waited
    /// for when the pod is frozen.
    pub fn hand_on(&mut self, cgroup: &Cgroup) -> Result<()> {
        let Some(Leaving::Succeeded(pid)) = self.leaving else { return Ok(()) };
        self.leaving = None;
        self.wait_for_its_answer()?;
        let number = match self.answer()?.successor {
            Some(Ok(number)) => number,
            refused => {
                tracing::debug!(?refused, "the opener has to be moved out of the pod's freezer");
                self.leaving = Some(Leaving::Moved(Moving::begin(cgroup, self.process.host)));
                return Ok(());
            }
        };
        let pidfd = self.copy(number)?;
        let host = pidfd::pid_of(&pidfd).doing(|| "look at the opener".into())?;
        let host = host.ok_or_else(died)?;
        let before = std::mem::replace(&mut self.process, Process { host, pidfd, reaped: false });
        before.kill();
        (self.pid, self.predecessor) = (pid, Some(before));
        Ok(())
    }

    /// Returns when it has left.
    pub fn has_left(&mut self, cgroup: &Cgroup) -> Result<()> {
        self.hand_on(cgroup)?;
        match self.leaving.take() {
            Some(Leaving::Moved(moving)) => moving.end(),
            _ => Ok(()),
        }
    }

    /// If it dies before, its successor has the other end of the link still, and waits for a word, too.
    fn wait_for_its_answer(&self) -> Result<()> {
        let (link, process) = (self.to.as_fd(), self.process.pidfd.as_fd());
        let mut ends = [link, process].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        while let Err(error) = poll(&mut ends, PollTimeout::NONE) {
            if error != Errno::EINTR {
                return Err(error).doing(|| "wait for the opener".into());
            }
        }
        if ends[0].any() == Some(true) { Ok(()) } else { Err(died()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pod_runtime::sys::daemon::{self, Fork};
    use std::os::unix::net::UnixStream;

    /// Its successor would have the other end of the link, which does not end then.
    #[test]
    fn an_opener_that_dies_on_its_way_is_noticed() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let host = match daemon::fork().unwrap() {
            Fork::Child => daemon::exit_now(0),
            Fork::Parent(host) => host,
        };
        let opener = Opener::of(PodPid(2), host, ours).unwrap();
        assert_eq!(opener.wait_for_its_answer().unwrap_err().chain(), died().chain());
        drop(theirs);
    }
}
