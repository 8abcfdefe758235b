//! A client with many connections in one thread, on the client host: it asks at a fixed rate or as fast as it is answered,
//! looks at every reply and keeps when it was due and when it came.
//!
//! At a fixed rate a request is sent when it is due, whether or not the one before was answered: a server that stands still
//! for 100 ms makes 200 requests of 2000 a second late, not one. A connection is made once; what is lost stays lost.

use super::clock;
use anyhow::{Context, Result, ensure};
use integration::bed::Host;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::time::{TimeSpec, TimeValLike};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Longer than any pause that could still pass for one.
const GIVE_UP: u64 = 60_000_000_000;
/// What marks the timer among the connections.
const TIMER: u64 = u64::MAX;

/// A reply: when its request was due and when it was there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    pub due: u64,
    pub replied: u64,
}

/// What a client says at the end.
#[derive(Debug, Default)]
pub struct Heard {
    /// By the time of the reply.
    pub samples: Vec<Sample>,
    /// Any of these makes a run fail.
    pub errors: Vec<String>,
    pub notes: Vec<String>,
    /// The longest wait for a reply that a tool tells of, which has no samples; in ms.
    pub slowest: Option<f64>,
}

/// What is said over the connections.
pub trait Protocol: Send {
    /// Writes the next request of a connection.
    fn request(&mut self, connection: usize, out: &mut Vec<u8>);
    /// The length of the reply that these bytes begin with, once all of it is there. An error if it is wrong.
    fn reply(&mut self, connection: usize, bytes: &[u8]) -> Result<Option<usize>>;
    /// After the last reply: whether the server still has what it acknowledged, in words.
    fn check(&mut self, _server: SocketAddr) -> Result<Option<String>> {
        Ok(None)
    }
}

#[derive(Debug, Clone, Copy)]
pub enum Pace {
    /// Requests a second, by all connections in turn.
    PerSecond(u32),
    /// The next as soon as the last is answered.
    Always,
}

/// One that runs.
pub struct Load {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Heard>>,
}

impl Load {
    /// Connects, and returns when there are replies.
    pub fn start(
        host: &Host,
        server: SocketAddr,
        connections: usize,
        pace: Pace,
        protocol: Box<dyn Protocol>,
    ) -> Result<Load> {
        let (stop, replies) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&replies));
        let thread = host.thread(move || {
            let mut client = Client::connect(server, connections, pace, protocol)?;
            client.run(&stopped, &counted)?;
            client.end(server)
        })?;
        let begun = || replies.load(Ordering::Relaxed) > 100 || thread.is_finished();
        integration::wait::until_true("a client to have replies", Duration::from_secs(60), begun)?;
        Ok(Load { stop, thread })
    }

    pub fn finish(self) -> Result<Heard> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().ok().context("the client panicked")?
    }
}

struct Connection {
    stream: TcpStream,
    out: Vec<u8>,
    input: Vec<u8>,
    /// Of what is not answered yet, when it was due.
    due: VecDeque<u64>,
    open: bool,
}

struct Client {
    connections: Vec<Connection>,
    protocol: Box<dyn Protocol>,
    pace: Pace,
    epoll: Epoll,
    heard: Heard,
    unanswered: usize,
}

impl Client {
    fn connect(server: SocketAddr, count: usize, pace: Pace, protocol: Box<dyn Protocol>) -> Result<Client> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let mut connections = Vec::new();
        for at in 0..count {
            let stream = TcpStream::connect_timeout(&server, Duration::from_secs(10))
                .with_context(|| format!("connection {at} to {server}"))?;
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, at as u64))?;
            connections.push(Connection { stream, out: vec![], input: vec![], due: VecDeque::new(), open: true });
        }
        Ok(Client { connections, protocol, pace, epoll, heard: Heard::default(), unanswered: 0 })
    }

    fn run(&mut self, stop: &AtomicBool, replies: &AtomicU64) -> Result<()> {
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC)?;
        let (mut next, mut turn) = (clock::now(), 0);
        if let Pace::PerSecond(rate) = self.pace {
            let every = TimeSpec::nanoseconds(i64::from(1_000_000_000 / rate));
            timer.set(Expiration::Interval(every), TimerSetTimeFlags::empty())?;
            self.epoll.add(&timer, EpollEvent::new(EpollFlags::EPOLLIN, TIMER))?;
        } else {
            (0..self.connections.len()).for_each(|at| self.ask(at, next));
        }
        while !stop.load(Ordering::Relaxed) {
            if self.turn()? {
                timer.wait()?;
                let Pace::PerSecond(rate) = self.pace else { continue };
                let now = clock::now();
                // A timer that came late has made all that was due meanwhile late, too.
                while next <= now {
                    self.ask(turn % self.connections.len(), next);
                    (next, turn) = (next + u64::from(1_000_000_000 / rate), turn + 1);
                }
            }
            replies.store(self.heard.samples.len() as u64, Ordering::Relaxed);
        }
        if matches!(self.pace, Pace::PerSecond(_)) {
            self.epoll.delete(&timer)?;
        }
        Ok(())
    }

    /// Waits for what comes, and takes it. True when the timer is due.
    fn turn(&mut self) -> Result<bool> {
        let mut events = [EpollEvent::empty(); 128];
        let count = match self.epoll.wait(&mut events, EpollTimeout::from(100u8)) {
            Err(nix::Error::EINTR) => 0,
            other => other?,
        };
        let mut due = false;
        for event in &events[..count] {
            if event.data() == TIMER {
                due = true;
                continue;
            }
            let at = event.data() as usize;
            if event.events().contains(EpollFlags::EPOLLOUT) {
                self.write(at);
            }
            if event.events().intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
                self.read(at);
            }
        }
        Ok(due)
    }

    fn ask(&mut self, at: usize, due: u64) {
        let connection = &mut self.connections[at];
        if !connection.open {
            return;
        }
        let waiting = !connection.out.is_empty();
        self.protocol.request(at, &mut connection.out);
        connection.due.push_back(due);
        self.unanswered += 1;
        // What waits for room is written when there is some.
        if !waiting {
            self.write(at);
        }
    }

    fn write(&mut self, at: usize) {
        let connection = &mut self.connections[at];
        let wants = |flags| EpollEvent::new(flags, at as u64);
        match connection.stream.write(&connection.out) {
            Ok(count) if count == connection.out.len() => {
                connection.out.clear();
                let mut all = wants(EpollFlags::EPOLLIN);
                let _ = self.epoll.modify(&connection.stream, &mut all);
            }
            Ok(count) => {
                connection.out.drain(..count);
                let _ = self.epoll.modify(&connection.stream, &mut wants(EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT));
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let _ = self.epoll.modify(&connection.stream, &mut wants(EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT));
            }
            Err(error) => self.lose(at, &format!("write: {error}")),
        }
    }

    fn read(&mut self, at: usize) {
        let mut buffer = [0; 64 << 10];
        let connection = &mut self.connections[at];
        if !connection.open {
            return;
        }
        match connection.stream.read(&mut buffer) {
            Ok(0) => self.lose(at, "the server closed it"),
            Ok(count) => {
                connection.input.extend_from_slice(&buffer[..count]);
                if let Err(error) = self.replies(at) {
                    self.lose(at, &format!("{error:#}"));
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => self.lose(at, &format!("read: {error}")),
        }
    }

    /// Takes the replies that are there.
    fn replies(&mut self, at: usize) -> Result<()> {
        let replied = clock::now();
        let connection = &mut self.connections[at];
        let mut taken = 0;
        while taken < connection.input.len() {
            let Some(length) = self.protocol.reply(at, &connection.input[taken..])? else { break };
            let due = connection.due.pop_front().context("a reply that nobody asked for")?;
            self.heard.samples.push(Sample { due, replied });
            self.unanswered -= 1;
            taken += length;
        }
        connection.input.drain(..taken);
        if matches!(self.pace, Pace::Always) && connection.due.is_empty() {
            self.ask(at, replied);
        }
        Ok(())
    }

    fn lose(&mut self, at: usize, why: &str) {
        let connection = &mut self.connections[at];
        if !std::mem::replace(&mut connection.open, false) {
            return;
        }
        let _ = self.epoll.delete(&connection.stream);
        self.unanswered -= connection.due.len();
        let lost = format!("connection {at}: {why}, {} requests unanswered", connection.due.len());
        self.heard.errors.push(lost);
    }

    /// Everything that was asked is answered, then every connection once more; then what the server has is looked at.
    fn end(mut self, server: SocketAddr) -> Result<Heard> {
        self.pace = Pace::PerSecond(1);
        self.all_answered()?;
        // So many at a time that no queue overflows.
        for some in 0..self.connections.len().div_ceil(100) {
            let now = clock::now();
            (some * 100..self.connections.len().min(some * 100 + 100)).for_each(|at| self.ask(at, now));
            self.all_answered()?;
        }
        match self.protocol.check(server) {
            Ok(note) => self.heard.notes.extend(note),
            Err(error) => self.heard.errors.push(format!("{error:#}")),
        }
        let open = self.connections.iter().filter(|connection| connection.open).count();
        self.heard.notes.push(format!("{open} of {} connections kept", self.connections.len()));
        Ok(self.heard)
    }

    fn all_answered(&mut self) -> Result<()> {
        let end = clock::now() + GIVE_UP;
        while self.unanswered > 0 {
            self.turn()?;
            ensure!(clock::now() < end, "{} requests are not answered", self.unanswered);
        }
        Ok(())
    }
}
