//! Signals: handlers with their flags, ignored and default ones, the mask, pending ones (queued real-time ones in order
//! of arrival, with their values), the alternate stack.

use crate::{Guest, sys};
use anyhow::{Result, ensure};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, raise, sigprocmask};

struct Signals {
    stack: (usize, usize),
    handled: u64,
}

const FLAGS: [(i32, i32); 4] = [
    (libc::SIGHUP, libc::SA_RESTART),
    (libc::SIGUSR2, libc::SA_ONSTACK | libc::SA_NODEFER),
    (libc::SIGVTALRM, 0),
    (libc::SIGTRAP, libc::SA_RESTART),
];

fn blocked() -> SigSet {
    let mut set = SigSet::empty();
    set.add(Signal::SIGUSR2);
    set.add(Signal::SIGWINCH);
    set
}

/// Number of a real-time signal that libc leaves to programs.
fn real_time() -> i32 {
    libc::SIGRTMIN() + 3
}

fn pending() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let masks = status.lines().filter(|line| line.starts_with("SigPnd") || line.starts_with("ShdPnd"));
    let masks = masks.filter_map(|line| u64::from_str_radix(line.split_whitespace().nth(1)?, 16).ok());
    Ok(masks.fold(0, |all, mask| all | mask))
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    for (signal, flags) in FLAGS {
        sys::handle(signal, flags)?;
    }
    sys::ignore(libc::SIGPIPE);
    sys::ignore(libc::SIGTTOU);
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&blocked()), None)?;
    sys::block(real_time())?;
    let mut signals = Signals { stack: sys::altstack(Some(64 * 1024))?, handled: 0 };
    signals.queue()?;
    Ok(Box::new(signals))
}

impl Signals {
    /// One standard signal and three real-time ones, all blocked.
    fn queue(&mut self) -> Result<()> {
        raise(Signal::SIGUSR2)?;
        for value in 1..=3 {
            sys::queue(real_time(), value)?;
        }
        self.handled = sys::signals(libc::SIGUSR2);
        Ok(())
    }
}

impl Guest for Signals {
    fn verify(&mut self) -> Result<()> {
        for (signal, flags) in FLAGS {
            let (now, handler) = sys::action(signal)?;
            ensure!((now, handler) == (flags, sys::handler()), "signal {signal}: flags {now:#x}, handler {handler:#x}");
        }
        for signal in [libc::SIGPIPE, libc::SIGTTOU] {
            ensure!(sys::action(signal)?.1 == libc::SIG_IGN, "signal {signal} is no longer ignored");
        }
        ensure!(sys::action(libc::SIGIO)?.1 == libc::SIG_DFL, "SIGIO is no longer default");
        ensure!(sys::altstack(None)? == self.stack, "the alternate stack is another");
        let mask = SigSet::thread_get_mask()?;
        ensure!(blocked().iter().all(|signal| mask.contains(signal)), "the mask is another");
        ensure!(!mask.contains(Signal::SIGHUP), "the mask has more");
        let expected = 1 << (libc::SIGUSR2 - 1) | 1 << (real_time() - 1);
        ensure!(pending()? & expected == expected, "pending: {:#x}", pending()?);
        for value in 1..=3 {
            let (code, got) = sys::take(real_time())?;
            ensure!((code, got) == (libc::SI_QUEUE, value), "queued value {value} came as {got}, code {code}");
        }
        sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&SigSet::from(Signal::SIGUSR2)), None)?;
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&blocked()), None)?;
        let came = sys::signals(libc::SIGUSR2) - self.handled;
        ensure!(came == 1, "the pending SIGUSR2 came {came} times");
        self.queue()
    }
}
