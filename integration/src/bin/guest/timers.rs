//! Timers: an interval timer, one that has expired while its signal is blocked, POSIX timers (armed, disarmed, thread-less), a sleep that goes on with what remains.

use crate::{Guest, sys};
use anyhow::{Context, Result, ensure};
use nix::sys::signal::{SigEvent, SigSet, SigevNotify, Signal};
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::ClockId;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
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
    late: UnixStream,
}

/// Has an interval timer whose signal it does not take until it is asked for; then it takes it and those that follow.
fn late(mut asked: UnixStream) -> i32 {
    const PENDING: &str = "ShdPnd:\t0000000000002000";
    let expired = || std::fs::read_to_string("/proc/self/status").is_ok_and(|status| status.contains(PENDING));
    let alarm = SigSet::from(Signal::SIGALRM);
    let armed = alarm.thread_block().is_ok() && sys::itimer(Some((10_000, 10_000))).is_ok();
    if !armed || crate::until("the blocked timer to expire", expired).is_err() {
        return 1;
    }
    let mut byte = *b"!";
    while asked.write_all(&byte).and_then(|()| asked.read_exact(&mut byte)).is_ok() {
        if (0..3).any(|_| alarm.wait().is_err()) || crate::until("the blocked timer to expire", expired).is_err() {
            return 1;
        }
    }
    0
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
    let (mut ours, theirs) = UnixStream::pair()?;
    ours.set_read_timeout(Some(Duration::from_secs(10)))?;
    sys::fork(|| late(theirs))?;
    ours.read_exact(&mut [0])?;
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
    Ok(Box::new(Timers { long, ticking, idle, ticks: 0, itimer: HOUR_US, long_left, sleeper, late: ours }))
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
        self.late.write_all(b"?")?;
        self.late.read_exact(&mut [0]).context("three signals of a timer that had expired")?;
        ensure!(sys::signals(libc::SIGALRM) + sys::signals(libc::SIGUSR2) == 0, "a timer of an hour went off");
        Ok(())
    }
}
