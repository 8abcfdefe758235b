//! Timers: an interval timer, POSIX timers (armed, disarmed, thread-less), a sleep that goes on with what remains.

use crate::{Guest, sys};
use anyhow::{Result, ensure};
use nix::sys::signal::{SigEvent, SigevNotify, Signal};
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::ClockId;
use std::time::Duration;

const HOUR_US: i64 = 3_600_000_000;

struct Timers {
    long: Timer,
    ticking: Timer,
    idle: Timer,
    ticks: u64,
    itimer: i64,
    long_left: Duration,
    sleeper: std::sync::Arc<std::sync::atomic::AtomicBool>,
}

fn timer(signal: Signal) -> Result<Timer> {
    let event = SigEvent::new(SigevNotify::SigevSignal { signal, si_value: 7 });
    Ok(Timer::new(ClockId::CLOCK_MONOTONIC, event)?)
}

fn left(timer: &Timer) -> Result<Option<Duration>> {
    Ok(match timer.get()? {
        Some(Expiration::OneShot(left)) => Some(left.into()),
        Some(Expiration::IntervalDelayed(left, _)) => Some(left.into()),
        _ => None,
    })
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    for signal in [libc::SIGALRM, libc::SIGUSR2, libc::SIGVTALRM] {
        sys::count_signals(signal)?;
    }
    let (mut long, mut ticking, idle) = (timer(Signal::SIGUSR2)?, timer(Signal::SIGVTALRM)?, timer(Signal::SIGUSR2)?);
    long.set(Expiration::OneShot(Duration::from_secs(3600).into()), TimerSetTimeFlags::empty())?;
    ticking.set(Expiration::Interval(Duration::from_millis(10).into()), TimerSetTimeFlags::empty())?;
    sys::itimer(Some((HOUR_US, HOUR_US / 2)))?;
    // A thread in a sleep longer than any test, which must not end early when the pod is taken apart.
    let sleeper = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let ended = sleeper.clone();
    std::thread::spawn(move || {
        // The ticking timer interrupts calls of the main thread only: here every signal is blocked.
        let _ = nix::sys::signal::SigSet::all().thread_block();
        let _ = sys::sleep_once(HOUR_US * 1000);
        ended.store(true, std::sync::atomic::Ordering::SeqCst);
    });
    let long_left = left(&long)?.unwrap_or_default();
    Ok(Box::new(Timers { long, ticking, idle, ticks: 0, itimer: HOUR_US, long_left, sleeper }))
}

impl Guest for Timers {
    fn verify(&mut self) -> Result<()> {
        let (value, interval) = sys::itimer(None)?;
        ensure!(interval == HOUR_US / 2, "the interval timer's period is {interval} us");
        ensure!(value <= self.itimer && value > self.itimer - 600_000_000, "{value} us left of {}", self.itimer);
        self.itimer = value;
        let now = left(&self.long)?.unwrap_or_default();
        let passed = self.long_left.checked_sub(now);
        ensure!(passed.is_some_and(|passed| passed < Duration::from_secs(600)), "{now:?} left of {:?}", self.long_left);
        self.long_left = now;
        ensure!(left(&self.idle)?.is_none(), "a disarmed timer is armed");
        ensure!(left(&self.ticking)?.is_some(), "the ticking timer is disarmed");
        self.ticks = sys::signals(libc::SIGVTALRM);
        let before = self.ticks;
        crate::until("the ticking timer to tick", || sys::signals(libc::SIGVTALRM) > before)?;
        ensure!(!self.sleeper.load(std::sync::atomic::Ordering::SeqCst), "a sleep of an hour ended");
        ensure!(sys::signals(libc::SIGALRM) + sys::signals(libc::SIGUSR2) == 0, "a timer of an hour went off");
        Ok(())
    }
}
