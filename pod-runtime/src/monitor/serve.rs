//! The monitor's loop.
//!
//! Everything is level-triggered: each turn asks poll(2) about what is open now, and children are reaped by asking, not
//! by counting signals. When the first process has ended, what it wrote last is drained, its end is written down, what
//! the pod had on this host is given back, and only then are clients told; the monitor leaves when the last of them has
//! taken everything.

use super::connection::{Connection, Role};
use super::exec::{Ended as Unheard, Session};
use super::log::{Log, Stream};
use super::spawn::write_who;
use super::stdio::{End, PIECE, Stdio};
use super::wire::{About, Ends, Gone, Kind, Reply, SessionEnds};
use crate::cgroup::Cgroup;
use crate::cgroup::throttle::Throttle;
use crate::lifecycle::{self, Remains};
use crate::network::Attachment;
use crate::problem::{Problem, Result};
use crate::spec::Spec;
use crate::status::{self, State};
use crate::store::{Cleared, Pod};
use crate::sys::daemon::{self, Ended};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

/// A pod's monitor.
pub struct Monitor {
    pub pod: Pod,
    pub spec: Spec,
    pub init: i32,
    pub pidfd: OwnedFd,
    pub cgroup: Cgroup,
    pub stdio: Stdio,
    pub log: Log,
    /// The pod's mount namespace: the last unmount of an overlay syncs the file system below it, and shall do it in our
    /// end and not in that of the pod's last process, for whose end people wait.
    pub _mounts: Option<File>,
    /// None once the pod has ended.
    pub listener: Option<UnixListener>,
    pub clients: Vec<Connection>,
    pub sessions: Vec<Session>,
    /// Sessions that have ended and whose client was not there.
    pub unheard: Vec<Unheard>,
    pub next_session: u64,
    /// Children besides the first process and the sessions' that are only reaped.
    pub roots: BTreeMap<i32, OwnedFd>,
    /// Read ends that nobody wants: read and thrown away.
    pub others: Vec<OwnedFd>,
    pub next_id: u64,
    /// The pod has no process any more.
    pub ended: bool,
    /// Its cable, while it is held, or the neighbours may be told otherwise.
    pub held: Option<Attachment>,
    /// The pod has less CPU time than it is due.
    pub throttle: Option<Throttle>,
    /// The pod runs and its status does not say so yet: the disk was full.
    pub unwritten: bool,
    /// The last word for all who watch, once they have caught up.
    pub farewell: Option<Farewell>,
    /// Of the pod, to be cleared away once that was said.
    pub remains: Option<Remains>,
    /// Of one that moved.
    pub cleared: Option<Cleared>,
}

/// Why a view ends.
#[derive(Debug, Clone)]
pub enum Farewell {
    Exit(i32),
    /// The pod went to this host.
    Moved(String),
}

/// How often a status is tried that could not be written.
const LATE: Duration = Duration::from_millis(500);
/// Ended sessions that are remembered.
const UNHEARD: usize = 32;

/// What a poll entry is about.
#[derive(Debug, Clone, Copy)]
enum Token {
    Child,
    Listener,
    Client(u64),
    Pod(End),
    Session(u64, End),
    Other(i32),
}

impl Monitor {
    /// Serves until the pod has ended and everyone was told.
    pub fn run(mut self) {
        while !(self.ended && self.clients.is_empty()) {
            let events = self.wait();
            for (token, flags) in events {
                self.handle(token, flags);
            }
            self.reap();
            self.write_late();
            self.tidy();
            let remains = self.remains.take().map(Remains::clear);
            for removed in [remains, self.cleared.take().map(Cleared::remove)].into_iter().flatten() {
                if let Err(problem) = removed {
                    tracing::error!(problem = problem.chain(), "not all of the pod could be removed");
                }
            }
        }
    }

    /// One poll: what can be done now.
    fn wait(&self) -> Vec<(Token, PollFlags)> {
        let now = Instant::now();
        let mut tokens = Vec::new();
        let mut fds = Vec::new();
        let mut add = |token, fd, flags| {
            tokens.push(token);
            fds.push(PollFd::new(fd, flags));
        };
        let wish = |read: bool, write: bool| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::POLLIN, read);
            flags.set(PollFlags::POLLOUT, write);
            flags
        };
        let late = self.unwritten.then_some(LATE);
        let mut wake = None;
        if !self.ended {
            add(Token::Child, self.pidfd.as_fd(), PollFlags::POLLIN);
        }
        for fd in self.roots.values().chain(self.sessions.iter().map(|s| &s.pidfd)) {
            add(Token::Child, fd.as_fd(), PollFlags::POLLIN);
        }
        if let Some(listener) = &self.listener {
            add(Token::Listener, listener.as_fd(), PollFlags::POLLIN);
        }
        if !self.holding() {
            for (end, fd, read, write) in self.stdio.interests(now) {
                add(Token::Pod(end), fd, wish(read, write));
            }
            wake = self.stdio.wake(now);
            for session in &self.sessions {
                let room = self.may_be_heard(session);
                // With nothing asked for, a hang-up would still wake us, again and again.
                for (end, fd, read, write) in session.stdio.interests(now).into_iter().filter(|i| i.2 && room || i.3) {
                    add(Token::Session(session.id(), end), fd, wish(read && room, write));
                }
                let patience = session.awaited.map(|until| until.saturating_duration_since(now));
                wake = [wake, session.stdio.wake(now), patience].into_iter().flatten().min();
            }
            for fd in &self.others {
                add(Token::Other(fd.as_raw_fd()), fd.as_fd(), PollFlags::POLLIN);
            }
        }
        for client in &self.clients {
            let heard = match &client.role {
                Role::Attached { .. } => self.stdio.takes_input() && !self.holding(),
                Role::Session(id) => !self.holding() && self.session(*id).is_none_or(|s| s.stdio.takes_input()),
                _ => true,
            };
            add(Token::Client(client.id), client.fd(), wish(heard, client.wants_to_write()));
        }
        let timeout = [wake, late].into_iter().flatten().min().map_or(PollTimeout::NONE, |d| {
            PollTimeout::try_from(d + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        });
        if poll(&mut fds, timeout).is_err() {
            return Vec::new();
        }
        let happened = fds.iter().map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
        tokens.into_iter().zip(happened).filter(|(_, flags)| !flags.is_empty()).collect()
    }

    fn handle(&mut self, token: Token, flags: PollFlags) {
        match token {
            Token::Child => {}
            Token::Listener => self.accept(),
            Token::Client(id) => self.talk(id, flags),
            Token::Pod(End::Stdin) => self.stdio.write(),
            Token::Pod(end) => {
                if flags.contains(PollFlags::POLLOUT) {
                    self.stdio.write();
                }
                if flags.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR) {
                    self.hear(end);
                }
            }
            Token::Session(id, end) => {
                if (end == End::Stdin || flags.contains(PollFlags::POLLOUT))
                    && let Some(session) = self.sessions.iter_mut().find(|s| s.id() == id)
                {
                    session.stdio.write();
                }
                if end != End::Stdin
                    && flags.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR)
                    && self.session(id).is_some_and(|session| self.may_be_heard(session))
                {
                    self.hear_session(id, end);
                }
            }
            Token::Other(number) => {
                let mut buffer = vec![0; PIECE];
                let open = |fd: &OwnedFd| match nix::unistd::read(fd, &mut buffer) {
                    Ok(0) => false,
                    Ok(_) => true,
                    Err(error) => error == nix::errno::Errno::EAGAIN,
                };
                let open = self.others.iter().find(|fd| fd.as_raw_fd() == number).is_some_and(open);
                self.others.retain(|fd| open || fd.as_raw_fd() != number);
            }
        }
    }

    /// Tries again what could not be written when the pod arrived.
    fn write_late(&mut self) {
        self.unwritten = self.unwritten && !self.ended && write_who(&self.pod, self.init, State::Running).is_err();
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        while let Ok((stream, _)) = listener.accept() {
            self.next_id += 1;
            if let Ok(client) = Connection::new(self.next_id, stream, Role::Fresh) {
                self.clients.push(client);
            }
        }
    }

    /// Reads once from the pod's stdio: to the log and to who watches. Whether there was something.
    fn hear(&mut self, end: End) -> bool {
        let mut buffer = vec![0; PIECE];
        let Some(n) = self.stdio.read(end, &mut buffer) else { return false };
        let (stream, kind) =
            if end == End::Stderr { (Stream::Stderr, Kind::Error) } else { (Stream::Stdout, Kind::Output) };
        let offset = self.log.length();
        if let Err(error) = self.log.write(stream, &buffer[..n]) {
            tracing::error!(%error, "the log cannot be written, output is lost");
        }
        for client in &mut self.clients {
            client.show(kind, &buffer[..n], offset);
        }
        true
    }

    /// Whether what a session writes can be read now: by a client that keeps up, or to throw it away. Not while its
    /// client is waited for.
    fn may_be_heard(&self, session: &Session) -> bool {
        match session.client {
            Some(_) => self.client(session.client).is_none_or(Connection::has_room),
            None => session.awaited.is_none(),
        }
    }

    fn hear_session(&mut self, id: u64, end: End) -> bool {
        let Some((kind, bytes)) = self.read_session(id, end) else { return false };
        let watcher = self.session(id).and_then(|session| session.client);
        if let Some(client) = self.clients.iter_mut().find(|c| Some(c.id) == watcher) {
            client.frame(kind, &bytes);
        }
        true
    }

    fn read_session(&mut self, id: u64, end: End) -> Option<(Kind, Vec<u8>)> {
        let mut buffer = vec![0; PIECE];
        let session = self.sessions.iter_mut().find(|s| s.id() == id)?;
        let n = session.stdio.read(end, &mut buffer)?;
        buffer.truncate(n);
        Some((if end == End::Stderr { Kind::Error } else { Kind::Output }, buffer))
    }

    /// Reads everything that the pod wrote up to now; bounded, in case that it goes on writing.
    pub fn drain(&mut self) {
        for end in [End::Console, End::Stdout, End::Stderr] {
            let mut left = 256;
            while left > 0 && self.hear(end) {
                left -= 1;
            }
        }
    }

    /// Reaps every child that has ended.
    fn reap(&mut self) {
        while let Ok(Some((pid, ended))) = daemon::reap_any() {
            if pid == self.init {
                self.first_ended(ended);
            } else if self.sessions.iter().any(|s| s.pid == pid) {
                self.session_ended(pid, ended);
            } else {
                self.roots.remove(&pid);
            }
        }
    }

    fn session_ended(&mut self, pid: i32, ended: Ended) {
        let Some(at) = self.sessions.iter().position(|s| s.pid == pid) else { return };
        let id = self.sessions[at].id();
        let mut output = Vec::new();
        for end in [End::Console, End::Stdout, End::Stderr] {
            // At most what the kernel holds, unless children of it go on writing.
            while output.len() < 64
                && let Some(last) = self.read_session(id, end)
            {
                output.push(last);
            }
        }
        let session = self.sessions.remove(at);
        match self.clients.iter_mut().find(|c| Some(c.id) == session.client) {
            Some(client) => {
                output.iter().for_each(|(kind, bytes)| client.frame(*kind, bytes));
                client.frame(Kind::Exit, &ended.code().to_le_bytes());
                client.role = Role::Closing;
            }
            None => self.remember(&session, ended.code(), output),
        }
        // Its children may still write to its pipes and shall not die of it.
        self.others.extend(session.stdio.leftovers());
    }

    /// Keeps how a session ended, and what it wrote last if its client is waited for.
    fn remember(&mut self, session: &Session, code: i32, output: Vec<(Kind, Vec<u8>)>) {
        let about = About { exit_code: Some(code), ..session.about() };
        let output = if session.awaited.is_some() { output } else { Vec::new() };
        self.unheard.push(Unheard { about, output });
        if self.unheard.len() > UNHEARD {
            self.unheard.remove(0);
        }
    }

    /// The first process has ended, and with it all of the pod.
    fn first_ended(&mut self, ended: Ended) {
        if self.ended {
            return;
        }
        self.ended = true;
        self.throttle = None;
        self.drain_all();
        let code = ended.code();
        let oom_killed = code == 137 && self.cgroup.stats().is_ok_and(|s| s.oom_kills.is_some_and(|n| n > 0));
        let ended = |status: &mut status::Status| {
            status.state = State::Exited;
            status.exit_code = Some(code);
            status.oom_killed = oom_killed;
            status.finished = Some(status::now());
            status.init = None;
        };
        // What is removed in a moment need not be on the disk.
        let written = if self.spec.auto_remove {
            self.pod.update_quickly(ended)
        } else {
            let _ = self.log.sync();
            self.pod.update(ended)
        };
        if let Err(problem) = written {
            tracing::error!(problem = problem.chain(), "the end of the pod could not be written down");
        }
        let store = self.pod.store().clone();
        store.event(&self.pod, "die", &[("exit_code", &code.to_string())]);
        self.close_shop();
        let (remains, given) = lifecycle::give_back_first(&self.pod, self.spec.auto_remove);
        self.remains = Some(remains);
        if let Err(problem) = given {
            tracing::error!(problem = problem.chain(), "not all of the pod could be removed");
        }
        for client in &mut self.clients {
            match client.role {
                Role::Waiting => client.reply(&Reply { exit_code: Some(code), ..Reply::default() }),
                Role::Attached { .. } => continue,
                _ => {}
            }
            client.role = Role::Closing;
        }
        self.farewell = Some(Farewell::Exit(code));
    }

    /// What the pod wrote before its end.
    fn drain_all(&mut self) {
        while [End::Console, End::Stdout, End::Stderr].into_iter().any(|end| self.hear(end)) {}
    }

    /// Nobody can come any more, and there is nothing more to hear.
    fn close_shop(&mut self) {
        self.close();
        let _ = std::fs::remove_file(self.pod.socket_path());
    }

    /// The same, without the door's name.
    pub fn close(&mut self) {
        self.stdio = Stdio::default();
        self.others.clear();
        self.listener = None;
    }

    /// Lets slow clients catch up and forgets those that are done.
    fn tidy(&mut self) {
        for client in &mut self.clients {
            client.catch_up(&self.log);
            if let (Some(farewell), Role::Attached { behind: None }) = (&self.farewell, &client.role) {
                match farewell {
                    Farewell::Exit(code) => client.frame(Kind::Exit, &code.to_le_bytes()),
                    Farewell::Moved(to) => {
                        let (typed, signals) = (client.typed, client.signals);
                        let gone = Gone { to: to.clone(), typed, signals, log: self.log.length() };
                        client.frame(Kind::Gone, &gone.to_bytes());
                    }
                }
                client.role = Role::Closing;
            }
        }
        let mut released = false;
        let mut lost = Vec::new();
        self.clients.retain(|client| {
            if client.done() {
                released |= matches!(client.role, Role::Holding { .. });
                if client.role == Role::Throttling {
                    self.throttle = None;
                }
                if let Role::Session(id) = client.role {
                    lost.push(id);
                }
            }
            !client.done()
        });
        let now = Instant::now();
        for session in &mut self.sessions {
            if lost.contains(&session.id()) {
                session.client = None;
                session.stdio.end_input();
            }
            if session.awaited.is_some_and(|until| until <= now) {
                session.awaited = None;
                session.stdio.end_input();
            }
        }
        if released && let Err(problem) = self.released() {
            tracing::error!(problem = problem.chain(), "the pod could not be put back on the network");
        }
    }

    /// A hold has ended.
    pub fn released(&mut self) -> Result<()> {
        // What came during the hold was left where it was.
        let ids: Vec<u64> = self.clients.iter().map(|client| client.id).collect();
        ids.into_iter().for_each(|id| self.requests(id));
        if self.clients.iter().any(|c| c.role == Role::Holding { link: true }) {
            return Ok(());
        }
        self.release_link()
    }

    /// Puts the pod back on the network.
    fn release_link(&mut self) -> Result<()> {
        // The tool died in the commit: the pod may run on the other host, and two must never answer for one address.
        if self.pod.status().is_ok_and(|status| status.state == State::Migrating) {
            return Ok(());
        }
        lifecycle::mend_connections(&self.cgroup);
        self.held.take().map_or(Ok(()), |attachment| attachment.release())
    }

    pub fn holding(&self) -> bool {
        self.clients.iter().any(|c| matches!(c.role, Role::Holding { .. }))
    }

    pub fn client(&self, id: Option<u64>) -> Option<&Connection> {
        self.clients.iter().find(|c| Some(c.id) == id)
    }

    pub fn session(&self, id: u64) -> Option<&Session> {
        self.sessions.iter().find(|s| s.id() == id)
    }

    /// The monitor's descriptors that the pod's processes talk to.
    pub fn ends(&self) -> Ends {
        let [console, stdin, stdout, stderr] = self.stdio.numbers();
        let others = self.others.iter().map(AsRawFd::as_raw_fd).collect();
        let over = |unheard: &Unheard| SessionEnds { about: unheard.about.clone(), numbers: [None; 4] };
        let sessions = self.sessions.iter().map(Session::ends).chain(self.unheard.iter().map(over)).collect();
        Ends { console, stdin, stdout, stderr, others, sessions }
    }

    /// A client that is there from the beginning.
    pub fn welcome(&mut self, stream: UnixStream) -> Result<()> {
        self.next_id += 1;
        self.clients.push(Connection::new(self.next_id, stream, Role::Attached { behind: None })?);
        Ok(())
    }
}

/// The pod went to another host.
pub fn moved_problem(name: &str, to: &str) -> Problem {
    Problem::new("E-MOVED", format!("pod '{name}' was moved to {to}"))
        .fix(format!("look for it there: ssh {to} pod ps"))
}
