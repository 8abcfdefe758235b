//! Passes on what a program reads and writes, over the one connection of a call: the same on both sides.
//!
//! Nothing is read that cannot be passed on yet, in each direction by itself, so that neither side keeps more than a few frames
//! of the other in memory and neither direction waits for the other.

use super::frame::{self, Frames, Kind, MOST};
use crate::link::tls::{HANDSHAKE, Session};
use crate::link::{LINK, PROTOCOL};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::timerfd::{Expiration, TimerFd, TimerSetTimeFlags};
use pod_runtime::{Doing, Problem, Result};
use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

pub struct Pump {
    wire: Session,
    /// In frames, and not encrypted yet.
    out: Vec<u8>,
    frames: Frames,
    /// None where nothing more comes.
    from: Vec<(Kind, Option<File>)>,
    to: Vec<(Kind, Sink)>,
    /// How the program ended, as the other side says.
    exit: Option<u8>,
}

/// What is waited for.
#[derive(Debug, Clone, Copy)]
enum Slot {
    Wire,
    From(usize),
    To(usize),
    Beside,
}

/// Where something goes.
struct Sink {
    /// None when nobody takes it any more.
    file: Option<File>,
    pending: Vec<u8>,
    /// Nothing more will come.
    ended: bool,
}

impl Pump {
    pub fn new(wire: Session) -> Pump {
        let (out, frames) = (Vec::new(), Frames::default());
        Pump { wire, out, frames, from: Vec::new(), to: Vec::new(), exit: None }
    }

    /// What is read here is sent as this kind.
    pub fn from(&mut self, kind: Kind, fd: OwnedFd) -> Result<()> {
        self.from.push((kind, Some(patient(fd)?)));
        Ok(())
    }

    /// What comes as this kind is written here.
    pub fn to(&mut self, kind: Kind, fd: OwnedFd) -> Result<()> {
        self.to.push((kind, Sink { file: Some(patient(fd)?), pending: Vec::new(), ended: false }));
        Ok(())
    }

    /// Something of our own.
    pub fn say(&mut self, kind: Kind, bytes: &[u8]) {
        frame::put(kind, &bytes[..bytes.len().min(MOST)], &mut self.out);
    }

    /// Nothing is left to be read here.
    pub fn has_read_all(&self) -> bool {
        self.from.is_empty()
    }

    /// How the program ended, when all that it said has been passed on.
    pub fn exit(&self) -> Option<u8> {
        self.exit.filter(|_| self.is_idle())
    }

    /// Says how the program has ended, and waits until the other side has hung up: what it has sent and nobody has read would take
    /// the last word back. It has so much time for that, from when all has been sent.
    pub fn close(mut self, code: u8, limit: &TimerFd) -> Result<()> {
        self.say(Kind::Exit, &[code]);
        self.to.clear();
        let mut begun = false;
        loop {
            self.send()?;
            let sent = self.has_sent_all();
            if sent && !std::mem::replace(&mut begun, true) {
                let time = Expiration::OneShot(HANDSHAKE.into());
                limit.set(time, TimerSetTimeFlags::empty()).doing(|| "set a limit".into())?;
            }
            let mut wire = PollFlags::POLLIN;
            wire.set(PollFlags::POLLOUT, !sent);
            let mut fds = vec![PollFd::new(self.wire.as_fd(), wire)];
            if sent {
                fds.push(PollFd::new(limit.as_fd(), PollFlags::POLLIN));
            }
            wait(&mut fds)?;
            let late = fds.get(1).is_some_and(|limit| limit.any() == Some(true));
            drop(fds);
            // Nobody is there for it any more.
            let gone = loop {
                match self.hear() {
                    Ok(true) => self.frames = Frames::default(),
                    Ok(false) => break false,
                    Err(_) => break true,
                }
            };
            if gone || late {
                return if self.has_sent_all() { Ok(()) } else { Err(Problem::new(LINK, "nobody took the last word")) };
            }
        }
    }

    /// Whether all that was said has been sent.
    fn has_sent_all(&self) -> bool {
        self.out.is_empty() && !self.wire.is_behind()
    }

    /// The first frame, which is waited for until `beside` can be read.
    pub fn first(&mut self, beside: BorrowedFd<'_>) -> Result<(Kind, Vec<u8>)> {
        loop {
            if let Some(frame) = self.frames.next()? {
                return Ok(frame);
            }
            if self.hear()? {
                continue;
            }
            let mut fds = [PollFd::new(self.wire.as_fd(), PollFlags::POLLIN), PollFd::new(beside, PollFlags::POLLIN)];
            wait(&mut fds)?;
            if fds[1].any() == Some(true) {
                return Err(Problem::new(LINK, "it said nothing in time"));
            }
        }
    }

    /// Passes on what there is, then waits until there is more, or `beside` can be read: whether that is so.
    pub fn turn(&mut self, beside: Option<BorrowedFd<'_>>) -> Result<bool> {
        self.to.iter_mut().for_each(|(_, sink)| sink.flush());
        self.take()?;
        self.send()?;
        if self.exit().is_some() {
            return Ok(false);
        }
        let (slots, mut fds): (Vec<Slot>, Vec<PollFd<'_>>) = self.wants(beside).into_iter().unzip();
        wait(&mut fds)?;
        let happened: Vec<(Slot, PollFlags)> =
            slots.into_iter().zip(fds).filter_map(|(slot, fd)| Some((slot, fd.revents()?))).collect();
        let mut came = false;
        for (slot, flags) in happened.into_iter().filter(|(_, flags)| !flags.is_empty()) {
            match slot {
                Slot::Wire => {}
                Slot::Beside => came = true,
                Slot::From(at) => self.read(at),
                Slot::To(at) if flags.intersects(PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL) => {
                    self.to[at].1.give_up();
                }
                Slot::To(_) => {}
            }
        }
        let before = self.from.len();
        self.from.retain(|(_, from)| from.is_some());
        if before > 0 && self.from.is_empty() {
            frame::put(Kind::End, &[], &mut self.out);
        }
        Ok(came)
    }

    /// What is waited for. Not what could not be passed on; who may take what comes is watched for its end.
    fn wants<'a>(&'a self, beside: Option<BorrowedFd<'a>>) -> Vec<(Slot, PollFd<'a>)> {
        let mut wire = PollFlags::empty();
        wire.set(PollFlags::POLLIN, self.is_idle());
        wire.set(PollFlags::POLLOUT, !self.has_sent_all());
        let wire = (!wire.is_empty()).then(|| (Slot::Wire, PollFd::new(self.wire.as_fd(), wire)));
        let from = self.from.iter().enumerate().filter(|_| self.out.is_empty()).filter_map(|(at, (_, file))| {
            Some((Slot::From(at), PollFd::new(file.as_ref()?.as_fd(), PollFlags::POLLIN)))
        });
        let to = self.to.iter().enumerate().filter_map(|(at, (_, sink))| {
            let flags = if sink.pending.is_empty() { PollFlags::empty() } else { PollFlags::POLLOUT };
            Some((Slot::To(at), PollFd::new(sink.file.as_ref()?.as_fd(), flags)))
        });
        let beside = beside.map(|fd| (Slot::Beside, PollFd::new(fd, PollFlags::POLLIN)));
        wire.into_iter().chain(from).chain(to).chain(beside).collect()
    }

    /// Whether nobody takes what is said of this kind any more.
    pub fn is_deaf(&self, kind: Kind) -> bool {
        self.to.iter().any(|(of, sink)| *of == kind && sink.file.is_none())
    }

    /// Nothing waits for who takes it.
    fn is_idle(&self) -> bool {
        self.to.iter().all(|(_, sink)| sink.pending.is_empty())
    }

    /// Reads once where something has come.
    fn read(&mut self, at: usize) {
        let (kind, from) = &mut self.from[at];
        let Some(file) = from else { return };
        let mut buffer = vec![0; MOST];
        match file.read(&mut buffer) {
            Ok(0) => *from = None,
            Ok(n) => frame::put(*kind, &buffer[..n], &mut self.out),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => *from = None,
        }
    }

    fn send(&mut self) -> Result<()> {
        loop {
            match self.wire.drain() {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                done => done.map_err(lost)?,
            }
            if self.out.is_empty() {
                return Ok(());
            }
            match self.wire.write_vectored(&[IoSlice::new(&self.out)]) {
                Ok(n) => drop(self.out.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(lost(e)),
            }
        }
    }

    /// Takes in what has come, as long as what came before has been passed on.
    fn take(&mut self) -> Result<()> {
        while self.is_idle() {
            match self.frames.next()? {
                Some((kind, bytes)) => self.taken(kind, bytes)?,
                None if self.exit.is_some() || !self.hear()? => return Ok(()),
                None => {}
            }
        }
        Ok(())
    }

    /// Whether more has come.
    fn hear(&mut self) -> Result<bool> {
        let mut buffer = [0; 16 << 10];
        match self.wire.read(&mut buffer) {
            Ok(0) => Err(lost(io::ErrorKind::UnexpectedEof.into())),
            Ok(n) => {
                self.frames.feed(&buffer[..n]);
                Ok(true)
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(false),
            Err(e) => Err(lost(e)),
        }
    }

    fn taken(&mut self, kind: Kind, bytes: Vec<u8>) -> Result<()> {
        let into = if kind == Kind::End { Kind::Data } else { kind };
        match (kind, &bytes[..]) {
            (Kind::Exit, &[code]) if self.expects(Kind::Words) => self.exit = Some(code),
            // Both streams of a program end before it does.
            (Kind::End, _) if self.expects(Kind::Words) => {}
            _ => {
                let sink = self.to.iter_mut().find(|(of, _)| *of == into).map(|(_, sink)| sink);
                let sink =
                    sink.ok_or_else(|| Problem::new(PROTOCOL, format!("a frame of {kind:?} has no place here")))?;
                sink.ended |= kind == Kind::End;
                sink.pending.extend(bytes);
                sink.flush();
            }
        }
        Ok(())
    }

    /// Whether this is the side that called.
    fn expects(&self, kind: Kind) -> bool {
        self.to.iter().any(|(of, _)| *of == kind)
    }
}

impl Sink {
    fn flush(&mut self) {
        while let (Some(file), false) = (&mut self.file, self.pending.is_empty()) {
            match file.write(&self.pending) {
                Ok(n) => drop(self.pending.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.give_up(),
            }
        }
        if self.file.is_none() || self.ended {
            self.give_up();
        }
    }

    /// Nobody takes it any more.
    fn give_up(&mut self) {
        self.file = None;
        self.pending.clear();
    }
}

fn lost(error: io::Error) -> Problem {
    Problem::new(LINK, "the connection was lost").because(error)
}

/// One that does not make who uses it wait.
fn patient(fd: OwnedFd) -> Result<File> {
    let what = || "set up a descriptor".to_owned();
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL).doing(what)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).doing(what)?;
    Ok(fd.into())
}

fn wait(fds: &mut [PollFd<'_>]) -> Result<()> {
    match poll(fds, PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error).doing(|| "wait".into()),
    }
}
