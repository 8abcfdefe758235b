//! timerfds: one with expirations not yet read, one far away, a disarmed one, and their flags.

use crate::Guest;
use anyhow::{Result, ensure};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

struct Timers {
    expired: TimerFd,
    far: TimerFd,
    idle: TimerFd,
    ticking: TimerFd,
}

fn make(clock: ClockId) -> Result<TimerFd> {
    Ok(TimerFd::new(clock, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?)
}

impl Timers {
    fn arm(&self) -> Result<()> {
        let soon = Expiration::OneShot(TimeSpec::from_duration(Duration::from_millis(1)));
        self.expired.set(soon, TimerSetTimeFlags::empty())?;
        crate::until("a timerfd to expire", || readable(&self.expired))
    }
}

fn readable(timer: &TimerFd) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    poll(&mut [PollFd::new(timer.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO) == Ok(1)
}

fn read(timer: &TimerFd) -> Option<u64> {
    let mut count = [0; 8];
    (nix::unistd::read(timer, &mut count).ok()? == 8).then(|| u64::from_ne_bytes(count))
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let timers = Timers {
        expired: make(ClockId::CLOCK_MONOTONIC)?,
        far: make(ClockId::CLOCK_BOOTTIME)?,
        idle: make(ClockId::CLOCK_REALTIME)?,
        ticking: make(ClockId::CLOCK_MONOTONIC)?,
    };
    let hour = TimeSpec::from_duration(Duration::from_secs(3600));
    timers.far.set(
        Expiration::IntervalDelayed(hour, TimeSpec::from_duration(Duration::from_secs(9))),
        TimerSetTimeFlags::empty(),
    )?;
    let tick = TimeSpec::from_duration(Duration::from_millis(10));
    timers.ticking.set(Expiration::Interval(tick), TimerSetTimeFlags::empty())?;
    timers.arm()?;
    Ok(Box::new(timers))
}

impl Guest for Timers {
    fn verify(&mut self) -> Result<()> {
        ensure!(read(&self.expired) == Some(1), "the expiration that nobody had read is gone");
        ensure!(read(&self.expired).is_none(), "and it came twice");
        let Some(Expiration::IntervalDelayed(left, period)) = self.far.get()? else {
            anyhow::bail!("the far timer is disarmed")
        };
        ensure!(left.tv_sec() > 3000 && left.tv_sec() <= 3600, "{left:?} left of an hour");
        ensure!(period.tv_sec() == 9, "its period is {period:?}");
        ensure!(self.idle.get()?.is_none(), "the idle timer is armed");
        let _ = read(&self.ticking);
        crate::until("the ticking timerfd to tick", || readable(&self.ticking))?;
        let flags = nix::fcntl::fcntl(&self.far, nix::fcntl::FcntlArg::F_GETFL)?;
        ensure!(flags & libc::O_NONBLOCK != 0, "fd {} blocks now", self.far.as_fd().as_raw_fd());
        self.arm()
    }
}
