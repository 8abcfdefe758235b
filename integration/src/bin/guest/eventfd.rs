//! eventfds: a counter, a semaphore, one at its limit.

use crate::Guest;
use anyhow::{Result, ensure};
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

struct Events {
    counter: EventFd,
    semaphore: EventFd,
    full: EventFd,
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let plain = EfdFlags::EFD_NONBLOCK;
    let counter = EventFd::from_value_and_flags(123, plain)?;
    let semaphore = EventFd::from_value_and_flags(2, plain | EfdFlags::EFD_SEMAPHORE)?;
    let full = EventFd::from_value_and_flags(0, plain)?;
    full.write(u64::MAX - 1)?;
    Ok(Box::new(Events { counter, semaphore, full }))
}

impl Guest for Events {
    fn verify(&mut self) -> Result<()> {
        let value = self.counter.read()?;
        ensure!(value == 123, "the counter is {value}");
        self.counter.write(123)?;
        ensure!((self.semaphore.read()?, self.semaphore.read()?) == (1, 1), "the semaphore is a counter now");
        ensure!(self.semaphore.read() == Err(Errno::EAGAIN), "the semaphore has more");
        self.semaphore.write(2)?;
        ensure!(self.full.write(1) == Err(Errno::EAGAIN), "the full one takes more");
        ensure!(self.full.read()? == u64::MAX - 1, "the full one is not full");
        self.full.write(u64::MAX - 1)?;
        Ok(())
    }
}
