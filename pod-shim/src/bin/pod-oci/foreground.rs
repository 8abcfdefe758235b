//! Staying with a process until it ends: signals go on to it, and its terminal, if it got one, is shown in ours.
//!
//! All signals are blocked and read from a descriptor, and the end of the process is seen on its pidfd: nothing can come
//! between two looks.

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use pod_runtime::oci::terminal;
use pod_runtime::problem::{Doing, Result};
use pod_runtime::sys::{daemon, process, tty};
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

pub struct Foreground {
    signals: SignalFd,
    /// Ours and theirs, until the terminal comes through.
    console: Option<(UnixStream, Option<UnixStream>)>,
}

/// Puts the own terminal back.
struct Raw(Termios);

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin(), SetArg::TCSADRAIN, &self.0);
    }
}

impl Foreground {
    /// Before the process is made; with a terminal for it or without.
    pub fn begin(with_terminal: bool) -> Result<Foreground> {
        let mut all = SigSet::all();
        // Those that a fault raises cannot wait.
        for fault in [Signal::SIGSEGV, Signal::SIGBUS, Signal::SIGFPE, Signal::SIGILL, Signal::SIGTRAP, Signal::SIGABRT]
        {
            all.remove(fault);
        }
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&all), None).doing(|| "block signals".into())?;
        let signals = SignalFd::with_flags(&all, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .doing(|| "listen for signals".into())?;
        let console = match with_terminal {
            true => {
                let (ours, theirs) = UnixStream::pair().doing(|| "make a socket pair".into())?;
                Some((ours, Some(theirs)))
            }
            false => None,
        };
        Ok(Foreground { signals, console })
    }

    /// Where the process is to send its terminal.
    pub fn console(&mut self) -> Result<Option<UnixStream>> {
        Ok(self.console.as_mut().and_then(|(_, theirs)| theirs.take()))
    }

    /// Until the process, a child of the caller, has ended. Its exit code.
    pub fn stay(&mut self, pid: i32) -> Result<i32> {
        let pidfd = daemon::pidfd_open(pid).doing(|| "open a pidfd".into())?;
        let master = match self.console.take() {
            Some((ours, _)) => Some(terminal::receive(&ours)?),
            None => None,
        };
        let raw = master.as_ref().and_then(|master| {
            resize(master);
            make_raw()
        });
        let done = self.relay(&pidfd, master.as_ref());
        drop(raw);
        done?;
        Ok(daemon::reap(pid).doing(|| "wait for the process".into())?.code())
    }

    fn relay(&mut self, pidfd: &OwnedFd, master: Option<&OwnedFd>) -> Result<()> {
        let mut input = master.is_some();
        loop {
            let (stdin, nothing) = (std::io::stdin(), PollFlags::empty());
            let mut wanted = vec![
                PollFd::new(pidfd.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            ];
            if let Some(master) = master {
                wanted.push(PollFd::new(master.as_fd(), PollFlags::POLLIN));
                wanted.push(PollFd::new(stdin.as_fd(), if input { PollFlags::POLLIN } else { nothing }));
            }
            match poll(&mut wanted, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                other => other.doing(|| "wait for the process".into())?,
            };
            let ready: Vec<bool> =
                wanted.iter().map(|one| one.revents().is_some_and(|events| !events.is_empty())).collect();
            drop(wanted);
            if ready[1] {
                self.pass_signals(pidfd, master);
            }
            if let Some(master) = master {
                if ready[2] {
                    copy(master.as_fd(), std::io::stdout().as_fd());
                }
                if ready[3] && input {
                    input = copy(stdin.as_fd(), master.as_fd());
                }
            }
            if ready[0] {
                // What it wrote last.
                while master.is_some_and(|master| has_more(master) && copy(master.as_fd(), std::io::stdout().as_fd())) {
                }
                return Ok(());
            }
        }
    }

    fn pass_signals(&mut self, pidfd: &OwnedFd, master: Option<&OwnedFd>) {
        while let Ok(Some(found)) = self.signals.read_signal() {
            match found.ssi_signo as i32 {
                libc::SIGCHLD | libc::SIGPIPE | libc::SIGURG => {}
                libc::SIGWINCH => drop(master.map(resize)),
                // With a terminal of its own these are about ours.
                libc::SIGTTIN | libc::SIGTTOU | libc::SIGTSTP if master.is_some() => {}
                signal => drop(process::kill_by_pidfd(pidfd.as_fd(), signal)),
            }
        }
    }
}

fn has_more(master: &OwnedFd) -> bool {
    let mut one = [PollFd::new(master.as_fd(), PollFlags::POLLIN)];
    poll(&mut one, PollTimeout::ZERO).is_ok_and(|count| count > 0)
        && one[0].revents().is_some_and(|events| events.contains(PollFlags::POLLIN))
}

/// What there is, once; false at the end.
fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> bool {
    let mut buffer = [0; 8192];
    let owned = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map(std::fs::File::from);
    let (Ok(mut from), Ok(mut to)) = (owned(from), owned(to)) else { return false };
    match from.read(&mut buffer) {
        Ok(count) if count > 0 => to.write_all(&buffer[..count]).is_ok(),
        _ => false,
    }
}

fn resize(master: &OwnedFd) {
    if let Ok((rows, columns)) = tty::window_size(std::io::stdin().as_fd()) {
        let _ = tty::set_window_size(master.as_fd(), rows, columns);
    }
}

fn make_raw() -> Option<Raw> {
    let before = tcgetattr(std::io::stdin()).ok()?;
    let mut raw = before.clone();
    cfmakeraw(&mut raw);
    tcsetattr(std::io::stdin(), SetArg::TCSADRAIN, &raw).ok()?;
    Some(Raw(before))
}
