//! signalfd: its mask, and a signal that waits in it.

use crate::Guest;
use anyhow::{Result, ensure};
use nix::sys::signal::{SigSet, Signal, raise};
use nix::sys::signalfd::{SfdFlags, SignalFd};

struct Signals {
    fd: SignalFd,
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGUSR2);
    mask.add(Signal::SIGHUP);
    mask.thread_block()?;
    let fd = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK)?;
    raise(Signal::SIGUSR2)?;
    Ok(Box::new(Signals { fd }))
}

impl Guest for Signals {
    fn verify(&mut self) -> Result<()> {
        let waiting = self.fd.read_signal()?.map(|signal| signal.ssi_signo);
        ensure!(waiting == Some(libc::SIGUSR2 as u32), "{waiting:?} waits in the signalfd");
        ensure!(self.fd.read_signal()?.is_none(), "and another");
        raise(Signal::SIGHUP)?;
        let other = self.fd.read_signal()?.map(|signal| signal.ssi_signo);
        ensure!(other == Some(libc::SIGHUP as u32), "the mask is another: {other:?}");
        Ok(raise(Signal::SIGUSR2)?)
    }
}
