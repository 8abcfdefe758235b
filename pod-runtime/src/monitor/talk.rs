//! What clients ask of the monitor, and its answers.

use super::connection::{Connection, Role};
use super::exec;
use super::serve::{Farewell, Monitor, moved_problem};
use super::stdio::Stdio;
use super::wire::{Attach, Exec, Gone, Kind, Reply, Request, Size};
use crate::cgroup::throttle::Throttle;
use crate::lifecycle;
use crate::network::Attachment;
use crate::problem::{Doing, Problem, Result};
use crate::sys::daemon;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::AsFd;

impl Monitor {
    /// Something came from a client, or it takes more.
    pub(super) fn talk(&mut self, id: u64, flags: PollFlags) {
        let Some(client) = self.clients.iter_mut().find(|c| c.id == id) else { return };
        if flags.contains(PollFlags::POLLOUT) {
            client.flush();
        }
        if flags.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR) {
            client.receive();
            // What came before the end still counts.
            self.requests(id);
        }
    }

    /// Serves what a client has asked so far. What is for a program waits while the pod is held: it may go on
    /// elsewhere, and then the client says it again there.
    pub(super) fn requests(&mut self, id: u64) {
        loop {
            let holding = self.holding();
            let Some(client) = self.clients.iter_mut().find(|c| c.id == id) else { return };
            match client.role.clone() {
                Role::Fresh => {
                    let Some(line) = client.take_line() else { return };
                    self.request(id, &line);
                }
                Role::Attached { .. } | Role::Session(_) if holding => return,
                role @ (Role::Attached { .. } | Role::Session(_)) => {
                    let Some((kind, payload)) = client.take_frame() else { return };
                    match kind {
                        Kind::Input => client.typed += payload.len() as u64,
                        Kind::Signal => client.signals += 1,
                        _ => {}
                    }
                    self.frame(id, &role, kind, &payload);
                }
                Role::Holding { link } => {
                    // Only the cut and one of two ends can follow.
                    let Some(line) = client.take_line() else { return };
                    match serde_json::from_slice(&line) {
                        Ok(Request::Moved { to, .. }) => self.moved(id, &to),
                        Ok(Request::Release) => {
                            client.role = Role::Closing;
                            let released = self.released();
                            let reply = released.map_or_else(|problem| Reply::problem(&problem), |()| Reply::default());
                            self.answer(id, Role::Closing, &reply);
                        }
                        Ok(Request::Hold { link: true, .. }) => {
                            let reply = match self.cut() {
                                Ok(()) => Reply::default(),
                                Err(problem) => Reply::problem(&problem),
                            };
                            self.answer(id, Role::Holding { link: true }, &reply);
                        }
                        _ => client.role = Role::Holding { link },
                    }
                }
                Role::Throttling => {
                    let Some(line) = client.take_line() else { return };
                    self.throttling(id, &line);
                }
                Role::Waiting | Role::Closing => return,
            }
        }
    }

    /// Of the client that throttles the pod: for less, or the end of it.
    fn throttling(&mut self, id: u64, line: &[u8]) {
        let (role, done) = match (serde_json::from_slice(line), &mut self.throttle) {
            (Ok(Request::Throttle { cpu }), Some(throttle)) => (Role::Throttling, throttle.set(cpu)),
            (Ok(Request::Release), throttle) => {
                let ended = throttle.take().map_or(Ok(()), |mut throttle| throttle.end());
                (Role::Closing, ended)
            }
            _ => (Role::Throttling, Err(Problem::new("E-MONITOR", "this connection throttles the pod"))),
        };
        let reply = done.map_or_else(|problem| Reply::problem(&problem), |()| Reply::default());
        self.answer(id, role, &reply);
    }

    fn request(&mut self, id: u64, line: &[u8]) {
        let done = match serde_json::from_slice(line) {
            Ok(request) => self.serve(id, request),
            Err(error) => Err(Problem::new("E-MONITOR", "the monitor does not understand the request").because(error)),
        };
        if let (Err(problem), Some(client)) = (done, self.clients.iter_mut().find(|c| c.id == id)) {
            client.reply(&Reply::problem(&problem));
            client.role = Role::Closing;
        }
    }

    fn serve(&mut self, id: u64, request: Request) -> Result<()> {
        let me = Some(std::process::id() as i32);
        match request {
            Request::Ping => self.answer(id, Role::Fresh, &Reply { pid: me, ..Reply::default() }),
            Request::Wait => self.answer_later(id, Role::Waiting),
            Request::Attach(Attach { session: Some(session), size, again, .. }) => {
                self.attach_session(id, session, size.filter(|_| !again))?;
            }
            Request::Attach(Attach { size, from, again, .. }) => {
                let (terminal, interactive) = (self.spec.process.terminal, self.spec.process.interactive);
                let behind = from.filter(|from| *from < self.log.length());
                self.answer(id, Role::Attached { behind }, &Reply { terminal, interactive, ..Reply::default() });
                if let Some(size) = size.filter(|_| !again && !self.holding()) {
                    redraw(&self.stdio, size);
                }
            }
            Request::Sessions => {
                let over = self.unheard.iter().map(|unheard| unheard.about.clone());
                let sessions = self.sessions.iter().map(exec::Session::about).chain(over).collect();
                self.answer(id, Role::Fresh, &Reply { sessions, ..Reply::default() });
            }
            Request::Exec(exec) => self.exec(id, &exec)?,
            Request::Hold { link, leaving } => self.hold(id, link, leaving)?,
            Request::Moved { to, job } => {
                // Who asks without a hold may mean a copy that left long ago.
                if job.is_some_and(|job| !self.pod.status().is_ok_and(|status| status.is_leaving(&job))) {
                    return Err(Problem::new("E-STATE", "the pod is not leaving for that job"));
                }
                self.moved(id, &to);
            }
            Request::Throttle { .. } if self.throttle.is_some() => {
                return Err(Problem::new("E-BUSY", "the pod is throttled already"));
            }
            Request::Throttle { cpu } => {
                let mut throttle = Throttle::begin(&self.cgroup, &self.pod.run_dir())?;
                throttle.set(cpu)?;
                self.throttle = Some(throttle);
                self.answer(id, Role::Throttling, &Reply::default());
            }
            Request::Release => return Err(Problem::new("E-STATE", "this connection does not hold the pod")),
        }
        Ok(())
    }

    fn answer(&mut self, id: u64, role: Role, reply: &Reply) {
        if let Some(client) = self.by_id(id) {
            client.reply(reply);
            client.role = role;
        }
    }

    fn answer_later(&mut self, id: u64, role: Role) {
        if let Some(client) = self.by_id(id) {
            client.role = role;
        }
    }

    fn by_id(&mut self, id: u64) -> Option<&mut Connection> {
        self.clients.iter_mut().find(|c| c.id == id)
    }

    /// Gives a client a session that has none.
    fn attach_session(&mut self, id: u64, wanted: u64, size: Option<Size>) -> Result<()> {
        let name = &self.spec.name;
        if let Some(unheard) = self.unheard.iter_mut().find(|unheard| unheard.about.id == wanted) {
            let (about, output) = (unheard.about.clone(), std::mem::take(&mut unheard.output));
            let reply = Reply {
                terminal: about.terminal,
                interactive: about.interactive,
                pid: Some(about.pid),
                ..Reply::default()
            };
            self.answer(id, Role::Closing, &reply);
            if let Some(client) = self.by_id(id) {
                output.iter().for_each(|(kind, bytes)| client.frame(*kind, bytes));
                client.frame(Kind::Exit, &about.exit_code.unwrap_or_default().to_le_bytes());
            }
            return Ok(());
        }
        let holding = self.holding();
        let Some(session) = self.sessions.iter_mut().find(|session| session.id() == wanted) else {
            return Err(Problem::new("E-NOSESSION", format!("pod '{name}' has no exec session {wanted}"))
                .fix(format!("`pod inspect {name}` lists them (exec_sessions)")));
        };
        if session.client.is_some() {
            return Err(Problem::new(
                "E-STATE",
                format!("somebody is attached to exec session {wanted} of pod '{name}'"),
            )
            .fix("leave it there first (ctrl-p ctrl-q)"));
        }
        session.client = Some(id);
        session.awaited = None;
        let about = session.about();
        if let Some(size) = size.filter(|_| !holding) {
            redraw(&session.stdio, size);
        }
        let (terminal, interactive, pid) = (about.terminal, about.interactive, Some(about.pid));
        self.answer(id, Role::Session(wanted), &Reply { terminal, interactive, pid, ..Reply::default() });
        Ok(())
    }

    fn frame(&mut self, id: u64, role: &Role, kind: Kind, payload: &[u8]) {
        let session = match role {
            Role::Session(wanted) => match self.sessions.iter_mut().find(|s| s.id() == *wanted) {
                Some(session) => Some(session),
                None => return,
            },
            _ => None,
        };
        let (stdio, pidfd) = match session {
            Some(session) => (&mut session.stdio, &session.pidfd),
            None => (&mut self.stdio, &self.pidfd),
        };
        match kind {
            Kind::Input if payload.is_empty() => stdio.end_input(),
            Kind::Input => stdio.type_in(id, payload),
            Kind::Resize => {
                if let Some(size) = Size::from_bytes(payload) {
                    stdio.resize(size);
                }
            }
            Kind::Signal => {
                if let Ok(number) = payload.try_into().map(i32::from_le_bytes) {
                    let _ = daemon::pidfd_send_signal(pidfd.as_fd(), number);
                }
            }
            _ => {}
        }
    }

    fn exec(&mut self, id: u64, exec: &Exec) -> Result<()> {
        if self.holding() {
            return Err(Problem::new("E-STATE", "the pod is being saved or moved at this moment").fix("try again"));
        }
        let number = self.next_session + 1;
        let mut session = exec::start(number, &self.spec, self.init, &self.pidfd, &self.cgroup, exec)?;
        self.next_session = number;
        let reply = Reply { pid: Some(session.pid), session: Some(number), ..Reply::default() };
        self.pod.store().event(&self.pod, "exec", &[("command", &exec.args.join(" "))]);
        if exec.detach {
            self.answer(id, Role::Closing, &reply);
        } else {
            session.client = Some(id);
            self.answer(id, Role::Session(number), &reply);
        }
        self.sessions.push(session);
        Ok(())
    }

    /// Stops reading stdio, and with `link` takes the pod off the network, until this client is gone. With `leaving` the end of it is
    /// an announcement, too, though the pod was never taken off.
    fn hold(&mut self, id: u64, link: bool, leaving: bool) -> Result<()> {
        if self.holding() {
            return Err(Problem::new("E-BUSY", "the pod is being saved or moved already"));
        }
        self.drain();
        if leaving && self.held.is_none() {
            self.held = Some(self.cable()?);
        }
        if link {
            self.cut()?;
        }
        let reply = Reply {
            pid: Some(std::process::id() as i32),
            log: Some(self.log.length()),
            ends: Some(self.ends()),
            terminal: self.spec.process.terminal,
            opens_port: true,
            ..Reply::default()
        };
        self.answer(id, Role::Holding { link }, &reply);
        Ok(())
    }

    /// Takes the pod off the network until the hold ends.
    fn cut(&mut self) -> Result<()> {
        let attachment = match self.held.take() {
            Some(attachment) => attachment,
            None => self.cable()?,
        };
        // Also one that could not be cut is released.
        self.held.insert(attachment).hold()
    }

    fn cable(&self) -> Result<Attachment> {
        let dir = self.pod.store().network_dir()?;
        Attachment::open(&dir, &self.spec, Some(self.init))
    }

    /// The pod runs elsewhere: the copy here goes, silently.
    fn moved(&mut self, id: u64, to: &str) {
        self.ended = true;
        self.throttle = None;
        self.held = None;
        self.untype();
        let killed = self.kill_all();
        // Written down before the door closes: who comes too late reads it there.
        let buried = killed.and_then(|()| lifecycle::bury(&self.pod, to));
        // The door itself is gone with what was buried: one of that name is that of a pod that came back.
        self.close();
        let reply = match buried {
            Ok(cleared) => {
                self.cleared = Some(cleared);
                Reply::default()
            }
            Err(problem) => Reply::problem(&problem),
        };
        self.answer(id, Role::Closing, &reply);
        let name = self.spec.name.clone();
        for client in &mut self.clients {
            match client.role {
                Role::Waiting => client.reply(&Reply::problem(&moved_problem(&name, to))),
                Role::Session(_) => {
                    let gone = Gone { to: to.to_owned(), typed: client.typed, signals: client.signals, log: 0 };
                    client.frame(Kind::Gone, &gone.to_bytes());
                }
                Role::Attached { .. } => continue,
                _ => {}
            }
            client.role = Role::Closing;
        }
        self.farewell = Some(Farewell::Moved(to.to_owned()));
    }

    /// What was typed and waits here goes with nobody: its clients are told, and type it again where the pod is now.
    fn untype(&mut self) {
        for client in &mut self.clients {
            let stdio = match client.role {
                Role::Session(id) => self.sessions.iter().find(|s| s.id() == id).map(|s| &s.stdio),
                _ => Some(&self.stdio),
            };
            client.typed -= stdio.map_or(0, |stdio| stdio.unread_of(client.id)) as u64;
        }
    }

    /// Kills every process of the pod and reaps the monitor's children among them.
    fn kill_all(&mut self) -> Result<()> {
        self.cgroup.kill()?;
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        // The first process cannot go before the others are reaped, so both are waited for together.
        for _ in 0..1000 {
            while let Ok(Some((pid, _))) = daemon::reap_any() {
                if pid == self.init {
                    self.sessions.clear();
                    self.roots.clear();
                    return Ok(());
                }
            }
            poll(&mut fds, PollTimeout::from(10u8)).doing(|| "wait for the pod's end".into())?;
        }
        Err(Problem::new("E-SYSTEM", "the pod's processes do not die"))
    }
}

/// Sets the size so that the program draws its screen anew for who has just come.
fn redraw(stdio: &Stdio, size: Size) {
    stdio.resize(Size { rows: size.rows, columns: size.columns.saturating_sub(1).max(1) });
    stdio.resize(size);
}
