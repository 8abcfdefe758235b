//! epoll: level and edge, one-shot spent and unspent, nested, a target whose number was closed but which lives on, data.

use crate::Guest;
use anyhow::{Result, ensure};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;
use std::os::fd::OwnedFd;

struct Sets {
    epoll: Epoll,
    outer: Epoll,
    level: EventFd,
    spent: EventFd,
    _quiet: EventFd,
    _elsewhere: OwnedFd,
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let (level, spent, quiet) = (EventFd::from_value(1)?, EventFd::from_value(1)?, EventFd::from_value(0)?);
    epoll.add(&level, EpollEvent::new(EpollFlags::EPOLLIN, 0xdead_beef_0000_0001))?;
    epoll.add(&spent, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, 2))?;
    epoll.add(&quiet, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 3))?;
    let hidden = EventFd::from_value(0)?;
    let elsewhere = nix::unistd::dup(&hidden)?;
    epoll.add(&hidden, EpollEvent::new(EpollFlags::EPOLLOUT, 4))?;
    drop(hidden);
    let outer = Epoll::new(EpollCreateFlags::empty())?;
    outer.add(&epoll.0, EpollEvent::new(EpollFlags::EPOLLIN, 5))?;
    let mut sets = Sets { epoll, outer, level, spent, _quiet: quiet, _elsewhere: elsewhere };
    ensure!(sets.ready()? == [4, 2, 0xdead_beef_0000_0001] || sets.ready()?.len() == 2, "epoll is not as made");
    Ok(Box::new(sets))
}

impl Sets {
    /// The data of everything that is ready, in descending order by its low byte.
    fn ready(&mut self) -> Result<Vec<u64>> {
        let mut events = [EpollEvent::empty(); 8];
        let count = self.epoll.wait(&mut events, EpollTimeout::ZERO)?;
        let mut data: Vec<u64> = events[..count].iter().map(EpollEvent::data).collect();
        data.sort_by_key(|data| std::cmp::Reverse(data & 0xff));
        Ok(data)
    }
}

impl Guest for Sets {
    fn verify(&mut self) -> Result<()> {
        let mut events = [EpollEvent::empty(); 2];
        let nested = self.outer.wait(&mut events, EpollTimeout::ZERO)?;
        ensure!(nested == 1 && events[0].data() == 5, "the outer set sees {nested} events");
        // The one-shot that was spent when the sets were made stays quiet until armed again.
        let ready = self.ready()?;
        ensure!(ready == [4, 0xdead_beef_0000_0001], "ready: {ready:x?}");
        let mut armed = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, 2);
        self.epoll.modify(&self.spent, &mut armed)?;
        let ready = self.ready()?;
        ensure!(ready == [4, 2, 0xdead_beef_0000_0001], "ready after arming: {ready:x?}");
        self.level.read()?;
        let ready = self.ready()?;
        ensure!(ready == [4], "ready after reading: {ready:x?}");
        self.level.write(1)?;
        Ok(())
    }
}
