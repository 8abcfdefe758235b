//! The monitor's ends of a program's stdio: the master side of a terminal, or pipes.
//!
//! All of them are non-blocking. What clients type waits in [`Stdio::input`], bounded, until the program reads it.

use super::wire::Size;
use crate::problem::{Doing, Result};
use crate::sys::tty::set_window_size;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

/// Typed bytes that a program has not read yet; more is left with the client.
pub const INPUT_BOUND: usize = 256 << 10;
/// What is read from a program at once.
pub const PIECE: usize = 64 << 10;
/// A terminal whose other side nobody has open (the program closed it, another may open it again) is asked this often.
const PAUSE: Duration = Duration::from_millis(50);

/// One end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Both directions.
    Console,
    Stdin,
    Stdout,
    Stderr,
}

#[derive(Debug, Default)]
pub struct Stdio {
    pub console: Option<OwnedFd>,
    pub stdin: Option<OwnedFd>,
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
    input: VecDeque<u8>,
    /// Which client typed how many of them, in order.
    typists: VecDeque<(u64, usize)>,
    /// Close stdin when the input is written.
    input_ends: bool,
    /// The console had nobody on its other side; not to be polled before this.
    pause: Option<Instant>,
}

impl Stdio {
    /// Takes over what there is.
    pub fn new(fds: [Option<OwnedFd>; 4]) -> Result<Stdio> {
        for fd in fds.iter().flatten() {
            nonblocking(fd.as_fd())?;
        }
        let [console, stdin, stdout, stderr] = fds;
        Ok(Stdio { console, stdin, stdout, stderr, ..Stdio::default() })
    }

    /// Pipes for a program that runs as `uid` and `gid`, who may open `/dev/stdout` anew. Without `interactive` its
    /// stdin is empty. Returns the monitor's ends and the program's.
    pub fn pipes(interactive: bool, uid: u32, gid: u32) -> Result<(Stdio, [OwnedFd; 3])> {
        let make = || -> Result<(OwnedFd, OwnedFd)> {
            let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).doing(|| "make a pipe".into())?;
            for fd in [&read, &write] {
                nix::unistd::fchown(fd, Some(uid.into()), Some(gid.into())).doing(|| "give away a pipe".into())?;
            }
            Ok((read, write))
        };
        let (in_read, in_write) = make()?;
        let (out_read, out_write) = make()?;
        let (err_read, err_write) = make()?;
        // Without `-i` the write end is closed at once: the program reads end of file.
        let stdin = interactive.then_some(in_write);
        let ours = Stdio::new([None, stdin, Some(out_read), Some(err_read)])?;
        Ok((ours, [in_read, out_write, err_write]))
    }

    /// What is to be polled, for reading (true) or writing.
    pub fn interests(&self, now: Instant) -> Vec<(End, BorrowedFd<'_>, bool, bool)> {
        let mut list = Vec::new();
        if let Some(console) = self.console.as_ref().filter(|_| self.pause.is_none_or(|until| now >= until)) {
            list.push((End::Console, console.as_fd(), true, !self.input.is_empty()));
        }
        for (end, fd) in [(End::Stdout, &self.stdout), (End::Stderr, &self.stderr)] {
            if let Some(fd) = fd {
                list.push((end, fd.as_fd(), true, false));
            }
        }
        if let Some(stdin) = self.stdin.as_ref().filter(|_| !self.input.is_empty()) {
            list.push((End::Stdin, stdin.as_fd(), false, true));
        }
        list
    }

    /// When [`Stdio::interests`] must be asked again though nothing happened.
    pub fn wake(&self, now: Instant) -> Option<Duration> {
        self.pause.map(|until| until.saturating_duration_since(now))
    }

    /// Reads what the program wrote: `None` when there is nothing now or never more.
    pub fn read(&mut self, end: End, buffer: &mut [u8]) -> Option<usize> {
        let slot = match end {
            End::Console => &mut self.console,
            End::Stdout => &mut self.stdout,
            End::Stderr => &mut self.stderr,
            End::Stdin => return None,
        };
        let fd = slot.as_ref()?;
        match nix::unistd::read(fd, buffer) {
            Ok(0) if end != End::Console => {
                *slot = None;
                None
            }
            Ok(0) | Err(Errno::EIO) => {
                self.pause = Some(Instant::now() + PAUSE);
                None
            }
            Ok(n) => {
                self.pause = None;
                Some(n)
            }
            Err(Errno::EAGAIN | Errno::EINTR) => None,
            Err(_) => {
                *slot = None;
                None
            }
        }
    }

    /// Takes what a client typed. More than [`INPUT_BOUND`] is only taken when a client sent it in one frame.
    pub fn type_in(&mut self, client: u64, bytes: &[u8]) {
        if self.console.is_some() || self.stdin.is_some() {
            self.input.extend(bytes);
            self.typists.push_back((client, bytes.len()));
            self.write();
        }
    }

    /// How many bytes of this client the program has not got.
    pub fn unread_of(&self, client: u64) -> usize {
        self.typists.iter().filter(|(who, _)| *who == client).map(|(_, bytes)| bytes).sum()
    }

    /// The oldest `count` of the typed bytes are not waiting any more.
    fn forget(&mut self, mut count: usize) {
        drop(self.input.drain(..count));
        while let Some((_, bytes)) = self.typists.front_mut() {
            if *bytes > count {
                *bytes -= count;
                return;
            }
            count -= *bytes;
            self.typists.pop_front();
        }
    }

    /// The client's input is at its end.
    pub fn end_input(&mut self) {
        self.input_ends = true;
        self.write();
    }

    pub fn takes_input(&self) -> bool {
        self.input.len() < INPUT_BOUND
    }

    /// Writes what the program takes of the typed bytes.
    pub fn write(&mut self) {
        while !self.input.is_empty() {
            let Some(fd) = self.console.as_ref().or(self.stdin.as_ref()) else {
                self.forget(self.input.len());
                break;
            };
            let (front, _) = self.input.as_slices();
            match nix::unistd::write(fd, front) {
                Ok(n) => self.forget(n),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break,
                Err(_) => {
                    // The program closed its stdin.
                    self.forget(self.input.len());
                    self.stdin = None;
                }
            }
        }
        if self.input_ends && self.input.is_empty() {
            self.stdin = None;
        }
    }

    pub fn resize(&self, size: Size) {
        if let Some(console) = &self.console
            && let Err(error) = set_window_size(console.as_fd(), size.rows, size.columns)
        {
            tracing::debug!(%error, "resize");
        }
    }

    /// The numbers of the descriptors: console, stdin, stdout, stderr.
    pub fn numbers(&self) -> [Option<RawFd>; 4] {
        [&self.console, &self.stdin, &self.stdout, &self.stderr].map(|fd| fd.as_ref().map(AsRawFd::as_raw_fd))
    }

    /// The read ends of pipes, when nobody wants to hear any more of what comes there.
    pub fn leftovers(self) -> impl Iterator<Item = OwnedFd> {
        [self.stdout, self.stderr].into_iter().flatten()
    }
}

/// Sets O_NONBLOCK.
pub fn nonblocking(fd: BorrowedFd<'_>) -> Result<()> {
    let set = || {
        let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
        fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))
    };
    set().map(drop).doing(|| "make a descriptor non-blocking".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_typed_and_not_read_is_known_by_who_typed_it() {
        let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
        let mut stdio = Stdio::new([None, Some(write), None, None]).unwrap();
        let room = nix::fcntl::fcntl(&read, FcntlArg::F_GETPIPE_SZ).unwrap() as usize;
        stdio.type_in(1, &vec![0; room - 10]);
        assert_eq!(stdio.unread_of(1), 0);
        stdio.type_in(1, &vec![0; 9000]);
        stdio.type_in(2, &[0; 7]);
        assert!(stdio.unread_of(1) >= 8990 && stdio.unread_of(2) == 7);
        let mut buffer = vec![0; room];
        while stdio.unread_of(2) > 0 {
            nix::unistd::read(&read, &mut buffer).unwrap();
            stdio.write();
        }
        assert_eq!(stdio.unread_of(1), 0);
    }
}
