//! signalfd: its mask, a signal that waits in it, and epolls that wait for it: one under its own number, one under a
//! number that names another file by now, one under a number that is closed.

use crate::Guest;
use anyhow::{Result, ensure};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;
use nix::sys::signal::{SigSet, Signal, raise};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::os::fd::{AsFd, AsRawFd};

struct Signals {
    fd: SignalFd,
    epolls: Vec<Epoll>,
    _reused: EventFd,
}

fn watches(fd: impl AsFd) -> Result<Epoll> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, 17))?;
    Ok(epoll)
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGUSR2);
    mask.add(Signal::SIGHUP);
    mask.thread_block()?;
    let fd = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK)?;
    raise(Signal::SIGUSR2)?;
    // The kernel keeps a registration under its number as long as the description lives.
    let closed = nix::unistd::dup(&fd)?;
    let under_closed = watches(&closed)?;
    let reused = nix::unistd::dup(&fd)?;
    let under_reused = watches(&reused)?;
    let number = reused.as_raw_fd();
    drop(reused);
    let other = EventFd::new()?;
    ensure!(other.as_raw_fd() == number, "the number was not given out again");
    drop(closed);
    let epolls = vec![watches(&fd)?, under_closed, under_reused];
    Ok(Box::new(Signals { fd, epolls, _reused: other }))
}

impl Signals {
    /// An epoll learns of a signal only by being told at the moment that it comes.
    fn wakes(&self, expected: usize) -> Result<()> {
        for (index, epoll) in self.epolls.iter().enumerate() {
            let mut events = [EpollEvent::empty(); 2];
            let count = epoll.wait(&mut events, EpollTimeout::ZERO)?;
            ensure!(count == expected, "epoll {index} reports {count} events, not {expected}");
        }
        Ok(())
    }
}

impl Guest for Signals {
    fn verify(&mut self) -> Result<()> {
        let waiting = self.fd.read_signal()?.map(|signal| signal.ssi_signo);
        ensure!(waiting == Some(libc::SIGUSR2 as u32), "{waiting:?} waits in the signalfd");
        ensure!(self.fd.read_signal()?.is_none(), "and another");
        self.wakes(0)?;
        raise(Signal::SIGHUP)?;
        self.wakes(1)?;
        let other = self.fd.read_signal()?.map(|signal| signal.ssi_signo);
        ensure!(other == Some(libc::SIGHUP as u32), "the mask is another: {other:?}");
        Ok(raise(Signal::SIGUSR2)?)
    }
}
