//! One direction of a link: a descriptor on which nobody waits for ever.
//!
//! The descriptors do not block; waiting is done by poll(2), together with the [`Interrupt`] that ctrl-C raises and
//! with a limit on silence. Where what is sent goes another way than ssh ([`super::direct`]), the end of ssh still ends it. A
//! wait that fails is an `io::Error` that carries the [`Problem`], which the image reader and writer hand on as it is.

use super::direct::Listening;
use super::tls::Session;
use super::{LINK, SILENCE};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use pod_runtime::{Doing, Problem, Result};
use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// A larger pipe between us and ssh is fewer switches; the kernel's limit for anyone.
const PIPE: i32 = 1 << 20;

/// Somebody wants us to stop waiting, for any of some reasons.
#[derive(Debug, Clone)]
pub struct Interrupt(Rc<[Reason]>);

/// Each a descriptor that can be read then.
#[derive(Debug)]
enum Reason {
    /// SIGINT, SIGTERM or SIGHUP came.
    Signals(SignalFd),
    /// A file was written to, which says that another process has taken this one's work away.
    Written(Inotify),
    /// So much time has passed since it was made.
    Late(TimerFd, Duration),
}

/// What a wait ends with that was interrupted by a person.
pub const ABORTED: &str = "E-ABORTED";
/// The time that there was is over.
pub const TIMEOUT: &str = "E-TIMEOUT";

impl Interrupt {
    /// From here on the three signals do not end the process but show in [`Interrupt::check`]. With `within`, so does
    /// the end of that time.
    pub fn catch(within: Option<Duration>) -> Result<Interrupt> {
        let mut set = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            set.add(signal);
        }
        set.thread_block().doing(|| "block signals".into())?;
        // A ctrl-C goes to all of the terminal's foreground: ssh shall leave it to us.
        for signal in [libc::SIGINT, libc::SIGHUP] {
            pod_runtime::sys::interrupt::ignore(signal).doing(|| "ignore a signal".into())?;
        }
        let fd = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC);
        let signals = Reason::Signals(fd.doing(|| "make a signalfd".into())?);
        let late = within.map(|within| timer(within).map(|timer| Reason::Late(timer, within)));
        let late = late.transpose().doing(|| "make a timer".into())?;
        Ok(Interrupt(std::iter::once(signals).chain(late).collect()))
    }

    /// Raised when somebody writes to this file.
    pub fn on_write(path: &Path) -> Result<Interrupt> {
        let what = || format!("watch {}", path.display());
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).doing(what)?;
        inotify.add_watch(path, AddWatchFlags::IN_MODIFY).doing(what)?;
        Ok(Interrupt(Rc::new([Reason::Written(inotify)])))
    }

    /// An error if one came. It stays raised.
    pub fn check(&self) -> Result<()> {
        self.0.iter().find(|reason| reason.holds()).map_or(Ok(()), |reason| Err(reason.problem()))
    }

    fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(Reason::fd)
    }
}

impl Reason {
    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Reason::Signals(fd) => fd.as_fd(),
            Reason::Written(fd) => fd.as_fd(),
            Reason::Late(fd, _) => fd.as_fd(),
        }
    }

    fn holds(&self) -> bool {
        let mut fds = [PollFd::new(self.fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n| n > 0)
    }

    fn problem(&self) -> Problem {
        match self {
            Reason::Signals(_) => Problem::new(ABORTED, "stopped as you asked; the pod runs on where it was"),
            Reason::Written(_) => Problem::new(LINK, "this attempt was given up; the pod runs on where it was"),
            Reason::Late(_, within) => {
                let what = format!("not done within {within:?}; the pod runs on where it was");
                Problem::new(TIMEOUT, what)
                    .fix("give it more --timeout, or more --downtime if its memory changes quickly")
            }
        }
    }
}

fn timer(within: Duration) -> nix::Result<TimerFd> {
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
    timer.set(Expiration::OneShot(within.max(Duration::from_nanos(1)).into()), TimerSetTimeFlags::empty())?;
    Ok(timer)
}

/// Where the bytes go, or come from.
enum Wire {
    Pipe(File),
    Direct(Box<Session>),
}

impl Wire {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Wire::Pipe(file) => file.read(into),
            Wire::Direct(direct) => direct.read(into),
        }
    }

    fn write_vectored(&mut self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Wire::Pipe(file) => file.write_vectored(from),
            Wire::Direct(direct) => direct.write_vectored(from),
        }
    }

    /// Whether something has come that no descriptor tells of.
    fn has_more(&mut self) -> io::Result<bool> {
        match self {
            Wire::Pipe(_) => Ok(false),
            Wire::Direct(direct) => direct.has_more(),
        }
    }

    /// Sends what was taken and not sent yet.
    fn drain(&mut self) -> io::Result<()> {
        match self {
            Wire::Pipe(_) => Ok(()),
            Wire::Direct(direct) => direct.drain(),
        }
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Wire::Pipe(file) => file.as_fd(),
            Wire::Direct(direct) => direct.as_fd(),
        }
    }
}

/// What a wait ended with.
#[derive(Debug, PartialEq, Eq)]
enum Woken {
    Ready,
    /// Something else that was waited for.
    Beside,
    Late,
}

/// What both directions share.
struct Channel {
    wire: Wire,
    /// ssh's pipe, where the bytes go another way. Open it tells the other side that we are there; its end is that of the link.
    left: Option<Wire>,
    peer: String,
    interrupt: Option<Interrupt>,
    /// Nothing interrupts any more.
    deaf: bool,
    patience: Duration,
}

impl Channel {
    fn new(fd: OwnedFd, peer: &str, interrupt: Option<Interrupt>) -> Result<Channel> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL).doing(|| "look at the link".into())?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).doing(|| "set up the link".into())?;
        // Not every link is a pipe.
        let _ = fcntl(&fd, FcntlArg::F_SETPIPE_SZ(PIPE));
        Ok(Channel {
            wire: Wire::Pipe(fd.into()),
            left: None,
            peer: peer.to_owned(),
            interrupt,
            deaf: false,
            patience: SILENCE,
        })
    }

    /// The bytes go this way from now on. Both ways must be there until the end.
    fn switch(&mut self, direct: Session) {
        self.left = Some(std::mem::replace(&mut self.wire, Wire::Direct(Box::new(direct))));
    }

    fn descriptors(&self) -> Vec<RawFd> {
        [Some(&self.wire), self.left.as_ref()].into_iter().flatten().map(|wire| wire.as_fd().as_raw_fd()).collect()
    }

    /// Returns when the descriptor is ready, else with the problem.
    fn wait(&self, what: PollFlags) -> io::Result<()> {
        match self.wait_until(Some(what), &[], Instant::now() + self.patience)? {
            Woken::Ready => Ok(()),
            _ => Err(io::Error::other(self.silent())),
        }
    }

    /// Waits for the descriptor, if for anything of it, or until another can be read. An interrupt is an error.
    fn wait_until(&self, what: Option<PollFlags>, beside: &[BorrowedFd<'_>], end: Instant) -> io::Result<Woken> {
        let any = |fds: &[PollFd<'_>]| fds.iter().any(|fd| fd.any() == Some(true));
        loop {
            // Rounded up, so that a millisecond is not waited for in a thousand polls.
            let left = end.saturating_duration_since(Instant::now()) + Duration::from_micros(999);
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let read = |fd| PollFd::new(fd, PollFlags::POLLIN);
            let mut interrupts: Vec<_> =
                self.interrupt.iter().filter(|_| !self.deaf).flat_map(Interrupt::fds).map(read).collect();
            let counts = (interrupts.len(), beside.len());
            let fds = &mut interrupts;
            fds.extend(beside.iter().copied().map(read));
            fds.extend(what.map(|what| PollFd::new(self.wire.as_fd(), what)));
            let ours = fds.len();
            fds.extend(self.left.iter().map(|fd| PollFd::new(fd.as_fd(), PollFlags::empty())));
            match poll(fds, timeout) {
                Ok(0) if Instant::now() < end => {}
                Ok(0) => return Ok(Woken::Late),
                Ok(_) if any(&fds[..counts.0]) => {
                    self.interrupt.as_ref().map_or(Ok(()), Interrupt::check).map_err(io::Error::other)?;
                }
                // Nobody is there any more to send it to.
                Ok(_) if what == Some(PollFlags::POLLOUT) && any(&fds[ours..]) => return Err(self.lost(None)),
                // What has come counts, though nothing more will.
                Ok(_) if any(&fds[counts.0 + counts.1..ours]) => return Ok(Woken::Ready),
                Ok(_) if any(&fds[ours..]) => return Err(self.lost(None)),
                Ok(_) => return Ok(Woken::Beside),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn silent(&self) -> Problem {
        let what = format!("nothing was heard from {} for {:.0} s", self.peer, self.patience.as_secs_f32());
        Problem::new(LINK, what).fix("look at the network, then try again")
    }

    fn lost(&self, error: Option<io::Error>) -> io::Error {
        let problem = Problem::new(LINK, format!("the connection to {} was lost", self.peer)).fix("try again");
        io::Error::other(match error {
            Some(error) => problem.because(error),
            None => problem,
        })
    }
}

/// What the other side sends.
pub struct Incoming(Channel);

/// What goes to the other side.
pub struct Outgoing {
    channel: Channel,
    /// Told how many bytes went out.
    on_bytes: Option<Box<dyn FnMut(u64)>>,
    pace: Option<Pace>,
}

/// Not more than so many bytes a second.
struct Pace {
    rate: u64,
    /// When what was written by now may have been written.
    due: Instant,
}

impl Pace {
    /// At most so much at once, or it would go out in bursts: what goes in a 50th of a second.
    fn most(&self) -> usize {
        (self.rate / 50).max(1) as usize
    }

    fn wrote(&mut self, bytes: usize) {
        // What was not used is not saved up.
        let from = self.due.max(Instant::now());
        self.due = from + Duration::from_secs_f64(bytes as f64 / self.rate as f64);
    }
}

impl Incoming {
    pub fn new(fd: OwnedFd, peer: &str, interrupt: Option<Interrupt>) -> Result<Incoming> {
        Channel::new(fd, peer, interrupt).map(Incoming)
    }

    pub fn deaf(&mut self) {
        self.0.deaf = true;
    }

    pub fn patience(&mut self, patience: Duration) {
        self.0.patience = patience;
    }

    pub fn interrupted_by(&mut self, interrupt: Interrupt) {
        self.0.interrupt = Some(interrupt);
    }

    /// Serves whoever comes by the other way until something is heard by this one.
    pub(super) fn serve_until_heard(&self, listening: &mut Listening) -> io::Result<()> {
        let end = Instant::now() + self.0.patience;
        loop {
            match self.0.wait_until(Some(PollFlags::POLLIN), &listening.fds(), end)? {
                Woken::Ready => return Ok(()),
                Woken::Beside => listening.serve(),
                Woken::Late => return Err(io::Error::other(self.0.silent())),
            }
        }
    }

    pub(super) fn descriptors(&self) -> Vec<RawFd> {
        self.0.descriptors()
    }

    /// Waits until something has come, or something else can be read, or for that long.
    pub(super) fn heard_or(&mut self, beside: &[BorrowedFd<'_>], patience: Duration) -> io::Result<Option<bool>> {
        if self.0.wire.has_more()? {
            return Ok(Some(true));
        }
        Ok(match self.0.wait_until(Some(PollFlags::POLLIN), beside, Instant::now() + patience)? {
            Woken::Ready => Some(true),
            Woken::Beside => Some(false),
            Woken::Late => None,
        })
    }

    /// The source has said that it comes by the other way.
    pub(super) fn switch(&mut self, mut listening: Listening) -> Result<()> {
        let end = Instant::now() + listening.patience();
        let lost = |e| Problem::new(LINK, "the source did not come by the way that it said").because(e);
        let direct = loop {
            listening.serve();
            if let Some(direct) = listening.source() {
                break direct;
            }
            match self.0.wait_until(None, &listening.fds(), end) {
                Ok(Woken::Late) => return Err(lost(io::ErrorKind::TimedOut.into())),
                Ok(_) => {}
                Err(e) => return Err(lost(e)),
            }
        };
        self.0.switch(direct);
        Ok(())
    }
}

impl Outgoing {
    pub fn new(fd: OwnedFd, peer: &str, interrupt: Option<Interrupt>) -> Result<Outgoing> {
        Ok(Outgoing { channel: Channel::new(fd, peer, interrupt)?, on_bytes: None, pace: None })
    }

    /// From now on at most so many bytes a second, or as many as go.
    pub fn pace(&mut self, rate: Option<u64>) {
        self.pace = rate.map(|rate| Pace { rate: rate.max(1), due: Instant::now() });
    }

    /// Waits until more may be written.
    fn keep_pace(&self) -> io::Result<()> {
        match &self.pace {
            Some(pace) if Instant::now() < pace.due => self.channel.wait_until(None, &[], pace.due).map(drop),
            _ => Ok(()),
        }
    }

    pub fn deaf(&mut self) {
        self.channel.deaf = true;
    }

    pub fn interrupted_by(&mut self, interrupt: Interrupt) {
        self.channel.interrupt = Some(interrupt);
    }

    /// Calls back with the number of bytes of each write.
    pub fn watch(&mut self, on_bytes: impl FnMut(u64) + 'static) {
        self.on_bytes = Some(Box::new(on_bytes));
    }

    pub(super) fn descriptors(&self) -> Vec<RawFd> {
        self.channel.descriptors()
    }

    /// What is written next goes this way.
    pub(super) fn switch(&mut self, direct: Session) {
        self.channel.switch(direct);
    }

    /// Whether something can be read there by then. An interrupt is an error.
    pub(super) fn readable(&self, fd: BorrowedFd<'_>, end: Instant) -> io::Result<bool> {
        self.channel.wait_until(None, &[fd], end).map(|woken| woken == Woken::Beside)
    }

    /// Until it is done.
    fn attempt<T>(&mut self, mut step: impl FnMut(&mut Wire) -> io::Result<T>) -> io::Result<T> {
        loop {
            match step(&mut self.channel.wire) {
                Ok(done) => return Ok(done),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.channel.wait(PollFlags::POLLOUT)?,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.channel.lost(Some(e))),
            }
        }
    }

    fn send(&mut self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        self.keep_pace()?;
        if self.channel.interrupt.is_some() && !self.channel.deaf {
            // A peer that always takes more must not keep an interrupt from being seen.
            self.channel.wait(PollFlags::POLLOUT)?;
        }
        let n = self.attempt(|wire| wire.write_vectored(from))?;
        self.attempt(Wire::drain)?;
        if let Some(pace) = &mut self.pace {
            pace.wrote(n);
        }
        if let Some(on_bytes) = &mut self.on_bytes {
            on_bytes(n as u64);
        }
        Ok(n)
    }
}

impl Read for Incoming {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.wire.read(into) {
                Ok(0) if !into.is_empty() => return Err(self.0.lost(None)),
                Ok(n) => return Ok(n),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.0.wait(PollFlags::POLLIN)?,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.0.lost(Some(e))),
            }
        }
    }
}

impl Write for Outgoing {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let most = self.pace.as_ref().map_or(from.len(), |pace| from.len().min(pace.most()));
        self.send(&[IoSlice::new(&from[..most])])
    }

    fn write_vectored(&mut self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        if self.pace.is_some() {
            let first = from.iter().find(|piece| !piece.is_empty());
            return self.write(first.map_or(&[], |piece| piece));
        }
        self.send(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
