//! A client of a pod's stdio: what is typed goes in, what comes out is shown, until the program ends.
//!
//! The person's terminal is put into raw mode only while this runs and gets its mode back on every way out, panics
//! included ([`Raw`]). Nothing here waits for one side only: input that the program does not read yet is kept here,
//! bounded, while output goes on.

use crate::cli::Exit;
use crate::{elsewhere, output};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use pod_runtime::monitor::Size;
use pod_runtime::monitor::wire::{self, Attach, Gone, Kind};
use pod_runtime::store::Pod;
use pod_runtime::sys::tty;
use pod_runtime::{Doing, Problem, Result};
use std::collections::VecDeque;
use std::io::{IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

/// Input that the monitor has not taken yet.
const INPUT_BOUND: usize = 128 << 10;
/// Input that is kept in case that the program has not got it when the pod moves. More than the sockets, pipes and
/// windows between us and the program hold.
const KEPT: usize = 8 << 20;

/// How a view ended.
#[derive(Debug)]
pub enum Outcome {
    Exit(i32),
    /// By the detach keys, or because the person's terminal went away.
    Detached,
    /// The pod lives on this host now, and we could not follow, because of this.
    Moved(String, Problem),
    /// Nobody reads what we show any more.
    Unread,
}

/// What is shown and where signals go.
pub struct View {
    pub stream: UnixStream,
    /// Whether what is typed goes to the program.
    pub input: bool,
    /// Whether the program has a terminal, so that ours becomes raw.
    pub terminal: bool,
    /// Typed in a row they end the view; empty: nothing does.
    pub detach_keys: Vec<u8>,
    /// Whether the program gets the signals that we get.
    pub proxy: bool,
    /// To find it again when it moves.
    pub pod: Pod,
    /// When it is one of `pod exec`.
    pub session: Option<u64>,
}

/// The size of the terminal that we run on; 24×80 when there is none.
pub fn size() -> Size {
    let of =
        |fd: std::os::fd::BorrowedFd<'_>| tty::window_size(fd).ok().filter(|(rows, columns)| *rows > 0 && *columns > 0);
    let found = of(std::io::stdin().as_fd()).or_else(|| of(std::io::stdout().as_fd()));
    let (rows, columns) = found.unwrap_or((24, 80));
    Size { rows, columns }
}

/// Raw mode of our terminal, for as long as this lives.
struct Raw(Option<Termios>);

impl Raw {
    fn enter() -> Raw {
        let stdin = std::io::stdin();
        let Ok(before) = tcgetattr(&stdin) else { return Raw(None) };
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        // Not TCSAFLUSH: what was typed ahead is meant for the program.
        Raw(tcsetattr(&stdin, SetArg::TCSADRAIN, &raw).ok().map(|()| before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = tcsetattr(std::io::stdin(), SetArg::TCSADRAIN, before);
        }
    }
}

const SIGNALS: &[Signal] = &[
    Signal::SIGWINCH,
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGCONT,
];

/// What would end us waits from now on until a view passes it on: for who starts a program that is to get it. Between its
/// first instruction and the view there is time enough for a signal.
pub fn keep_signals() -> Result<SigSet> {
    let mask: SigSet = SIGNALS.iter().copied().collect();
    mask.thread_block().doing(|| "block signals".into())?;
    Ok(mask)
}

struct Running {
    view: View,
    signals: SignalFd,
    /// To the monitor.
    outgoing: VecDeque<u8>,
    incoming: Vec<u8>,
    reading: bool,
    /// The beginning of the detach keys, typed and not yet sent.
    held: Vec<u8>,
    interrupts: u32,
    is_tty: bool,
    /// What was typed last, and how much there was of it in all.
    kept: VecDeque<u8>,
    typed: u64,
    /// Signals that were passed on.
    signalled: Vec<i32>,
}

impl View {
    /// Shows the program until it ends or the view does, and says how that was. `name` is the pod's.
    pub fn show(self, name: &str) -> Result<Exit> {
        let session = self.session.map_or_else(String::new, |number| format!(" --exec {number}"));
        Ok(Exit(match self.run()? {
            Outcome::Exit(code) => code,
            Outcome::Detached => {
                output::say(format!("detached; back with: pod attach {name}{session}"));
                0
            }
            Outcome::Moved(to, why) => {
                tracing::info!("not followed to {to}: {}", why.chain());
                output::say(format!("\nmoved to {to}; go on there with: ssh -t {to} pod attach {name}{session}"));
                0
            }
            // As a shell counts a broken pipe.
            Outcome::Unread => 141,
        }))
    }

    fn run(self) -> Result<Outcome> {
        let mask = keep_signals()?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = SignalFd::with_flags(&mask, flags).doing(|| "listen for signals".into())?;
        self.stream.set_nonblocking(true).doing(|| "set up the connection".into())?;
        let is_tty = self.terminal && std::io::stdin().is_terminal();
        let raw = (is_tty && self.input).then(Raw::enter);
        let reading = self.input;
        let mut running = Running {
            view: self,
            signals,
            outgoing: VecDeque::new(),
            incoming: Vec::new(),
            reading,
            held: Vec::new(),
            interrupts: 0,
            is_tty,
            kept: VecDeque::new(),
            typed: 0,
            signalled: Vec::new(),
        };
        if is_tty {
            running.send_size();
        }
        let outcome = running.turn();
        drop(raw);
        let _ = mask.thread_unblock();
        outcome
    }
}

impl Running {
    fn turn(&mut self) -> Result<Outcome> {
        loop {
            let (socket, typed, signalled) = self.wait()?;
            if signalled && let Some(outcome) = self.signals() {
                return Ok(outcome);
            }
            if typed && let Some(outcome) = self.typed() {
                return Ok(outcome);
            }
            if socket.contains(PollFlags::POLLOUT) {
                self.flush();
            }
            if socket.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR)
                && let Some(outcome) = self.shown()?
            {
                return Ok(outcome);
            }
        }
    }

    /// What can be done: with the socket, stdin, the signals.
    fn wait(&self) -> Result<(PollFlags, bool, bool)> {
        let stdin = std::io::stdin();
        let mut wish = PollFlags::POLLIN;
        wish.set(PollFlags::POLLOUT, !self.outgoing.is_empty());
        let mut fds =
            vec![PollFd::new(self.view.stream.as_fd(), wish), PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        if self.reading && self.outgoing.len() < INPUT_BOUND {
            fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).doing(|| "wait for the pod".into()),
        }
        let got = |at: usize| fds.get(at).and_then(PollFd::revents).unwrap_or(PollFlags::empty());
        Ok((got(0), !got(2).is_empty(), !got(1).is_empty()))
    }

    fn signals(&mut self) -> Option<Outcome> {
        while let Ok(Some(info)) = self.signals.read_signal() {
            let number = info.ssi_signo as i32;
            if number == Signal::SIGWINCH as i32 {
                if self.is_tty {
                    self.send_size();
                }
            } else if self.is_tty && [Signal::SIGHUP as i32, Signal::SIGTERM as i32].contains(&number) {
                // Our terminal goes away; the pod's stays.
                return Some(Outcome::Detached);
            } else if self.view.proxy {
                self.signalled.push(number);
                wire::put(&mut self.outgoing, Kind::Signal, &number.to_le_bytes());
                self.flush();
                self.interrupts += u32::from(number == Signal::SIGINT as i32 || number == Signal::SIGTERM as i32);
                // As docker: somebody who insists gets the prompt back.
                if self.interrupts >= 3 {
                    return Some(Outcome::Detached);
                }
            } else if [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT]
                .map(|s| s as i32)
                .contains(&number)
            {
                return Some(Outcome::Exit(128 + number));
            }
        }
        None
    }

    fn send_size(&mut self) {
        wire::put(&mut self.outgoing, Kind::Resize, &size().to_bytes());
        self.flush();
    }

    /// Reads what was typed and looks for the detach keys in it.
    fn typed(&mut self) -> Option<Outcome> {
        let mut buffer = [0; 16 << 10];
        let n = match nix::unistd::read(std::io::stdin().as_fd(), &mut buffer) {
            Err(Errno::EINTR | Errno::EAGAIN) => return None,
            Ok(0) | Err(_) => {
                self.reading = false;
                wire::put(&mut self.outgoing, Kind::Input, b"");
                self.flush();
                return None;
            }
            Ok(n) => n,
        };
        let keys = if self.is_tty { self.view.detach_keys.clone() } else { Vec::new() };
        let (send, detach) = sift(&keys, &mut self.held, &buffer[..n]);
        if !send.is_empty() {
            self.send(&send);
            self.flush();
        }
        detach.then_some(Outcome::Detached)
    }

    fn send(&mut self, typed: &[u8]) {
        wire::put(&mut self.outgoing, Kind::Input, typed);
        self.typed += typed.len() as u64;
        self.kept.extend(typed);
        let surplus = self.kept.len().saturating_sub(KEPT);
        self.kept.drain(..surplus);
    }

    /// Goes to where the pod is now, and says again what did not reach it.
    fn follow(&mut self, gone: Gone) -> Option<Outcome> {
        let View { pod, session, .. } = &self.view;
        let size = self.is_tty.then(size);
        let wanted = Attach { size, session: *session, from: Some(gone.log), again: true };
        let found = elsewhere::attach(pod.store(), pod.id(), &wanted).and_then(|stream| {
            stream.set_nonblocking(true).doing(|| "set up the connection".into())?;
            Ok(stream)
        });
        let stream = match found {
            Ok(stream) => stream,
            Err(problem) => return Some(Outcome::Moved(gone.to, problem)),
        };
        let line_end = if self.is_tty { "\r" } else { "" };
        output::say(format!("{line_end}\n[pod] moved to {}{line_end}", gone.to));
        self.view.stream = stream;
        self.incoming.clear();
        self.outgoing.clear();
        if self.is_tty {
            self.send_size();
        }
        let missing = self.typed.saturating_sub(gone.typed).min(self.kept.len() as u64) as usize;
        let missing: Vec<u8> = self.kept.drain(..).rev().take(missing).collect::<Vec<_>>().into_iter().rev().collect();
        self.typed = 0;
        if !missing.is_empty() {
            self.send(&missing);
        }
        if self.view.input && !self.reading {
            wire::put(&mut self.outgoing, Kind::Input, b"");
        }
        self.signalled.drain(..self.signalled.len().min(gone.signals as usize));
        for number in &self.signalled {
            wire::put(&mut self.outgoing, Kind::Signal, &number.to_le_bytes());
        }
        self.flush();
        None
    }

    fn flush(&mut self) {
        while !self.outgoing.is_empty() {
            let (front, _) = self.outgoing.as_slices();
            match (&self.view.stream).write(front) {
                Ok(n) => drop(self.outgoing.drain(..n)),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                // The monitor is gone: reading says so.
                Err(_) => self.outgoing.clear(),
            }
        }
    }

    /// Shows what came.
    fn shown(&mut self) -> Result<Option<Outcome>> {
        let mut buffer = [0; 64 << 10];
        match nix::unistd::read(&self.view.stream, &mut buffer) {
            Err(Errno::EINTR | Errno::EAGAIN) => return Ok(None),
            Ok(0) | Err(_) => return Err(Problem::new("E-MONITOR", "the pod's monitor went away")),
            Ok(n) => self.incoming.extend_from_slice(&buffer[..n]),
        }
        while let Some((kind, payload)) = wire::take(&mut self.incoming)? {
            let written = match kind {
                Kind::Output => show(std::io::stdout().lock(), &payload),
                Kind::Error => show(std::io::stderr().lock(), &payload),
                Kind::Exit => {
                    let code: [u8; 4] = payload.try_into().unwrap_or([125, 0, 0, 0]);
                    return Ok(Some(Outcome::Exit(i32::from_le_bytes(code))));
                }
                Kind::Gone => return Ok(self.follow(Gone::from_bytes(&payload))),
                Kind::Input | Kind::Resize | Kind::Signal => true,
            };
            if !written {
                return Ok(Some(Outcome::Unread));
            }
        }
        Ok(None)
    }
}

/// Splits what was typed: what goes to the program, and whether the detach keys were all typed. Their beginning is held
/// back until the next key tells.
fn sift(keys: &[u8], held: &mut Vec<u8>, typed: &[u8]) -> (Vec<u8>, bool) {
    if keys.is_empty() {
        return (typed.to_vec(), false);
    }
    let mut send = Vec::with_capacity(typed.len());
    for byte in typed {
        if *byte == keys[held.len()] {
            held.push(*byte);
            if held.len() == keys.len() {
                return (send, true);
            }
            continue;
        }
        send.append(held);
        if *byte == keys[0] {
            held.push(*byte);
        } else {
            send.push(*byte);
        }
    }
    (send, false)
}

/// Whether somebody still reads there.
fn show(mut to: impl Write, bytes: &[u8]) -> bool {
    match to.write_all(bytes).and_then(|()| to.flush()) {
        Err(error) => error.kind() != std::io::ErrorKind::BrokenPipe,
        Ok(()) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detach_keys_are_held_back_and_given_when_they_were_none() {
        let mut held = Vec::new();
        assert_eq!(sift(&[16, 17], &mut held, b"ab\x10"), (b"ab".to_vec(), false));
        assert_eq!(sift(&[16, 17], &mut held, b"c"), (b"\x10c".to_vec(), false));
        assert_eq!(sift(&[16, 17], &mut held, b"\x10\x10"), (b"\x10".to_vec(), false));
        assert_eq!(sift(&[16, 17], &mut held, b"\x11rest"), (b"".to_vec(), true));
        assert_eq!(sift(&[], &mut Vec::new(), b"\x10\x11"), (b"\x10\x11".to_vec(), false));
    }
}
