//! The daemon itself: lets in whom this host trusts, and forks a session for each call.
//!
//! The daemon has the handshakes of strangers in its hands and nothing else; a session has one peer. What a session runs is named
//! by [`may_run`]. Neither is the parent of anything that matters: a pod that arrives has its own monitor, and a session that is
//! killed is a link that broke.

use super::frame::Kind;
use super::keys::{Keys, Peer};
use super::pump::Pump;
use super::{CONNECTION, PEER};
use crate::link::tls::{Door, HANDSHAKE, Session};
use crate::link::{LINK, PROTOCOL};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use pod_runtime::store::Store;
use pod_runtime::sys::daemon::{self, Fork};
use pod_runtime::sys::pidfd;
use pod_runtime::{Doing, Problem, Result};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Strangers that may be in their handshake at a time. One more sends the first away.
const MOST_GUESTS: usize = 64;
/// Calls at a time.
const MOST_SESSIONS: usize = 64;
/// When letting in has failed it is tried again after this.
const AGAIN: Duration = Duration::from_secs(1);

/// The daemon.
pub struct Daemon {
    store: Store,
    keys: Keys,
    doors: Vec<Door>,
    /// Processes of the sessions that are under way.
    sessions: Vec<OwnedFd>,
}

/// Everywhere, by IPv6 if there is any.
pub fn everywhere(port: u16) -> Vec<SocketAddr> {
    let six = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    match TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)) {
        Ok(_) => vec![six],
        Err(_) => vec![SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))],
    }
}

impl Daemon {
    pub fn open(store: &Store, listen: &[SocketAddr]) -> Result<Daemon> {
        let keys = Keys::of(store)?;
        let door = |address: &SocketAddr| -> Result<Door> {
            let listener = TcpListener::bind(address).code(LINK, || format!("listen at {address}"))?;
            Door::new(listener, keys.own()?, expected(&keys)?, MOST_GUESTS)
        };
        let doors = listen.iter().map(door).collect::<Result<_>>()?;
        Ok(Daemon { store: store.clone(), keys, doors, sessions: Vec::new() })
    }

    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.doors.iter().filter_map(|door| door.address().ok()).collect()
    }

    /// Serves until it is ended. What is worth a line goes to `say`.
    pub fn serve(mut self, say: impl Fn(&str)) -> Result<()> {
        loop {
            self.wait()?;
            while daemon::reap_any().doing(|| "look for sessions that have ended".into())?.is_some() {}
            self.sessions.retain(|session| !pidfd_ended(session));
            // Whom to let in may have been said a moment ago.
            match expected(&self.keys) {
                Ok(keys) => self.doors.iter_mut().try_for_each(|door| door.expect(keys.clone()))?,
                Err(problem) => say(&format!("whom to trust cannot be read, so it is as before: {}", problem.chain())),
            }
            self.doors.iter_mut().for_each(Door::serve);
            // One after the other: a session must not keep what belongs to another.
            while let Some(wire) = self.doors.iter_mut().find_map(Door::arrived) {
                if let Err(problem) = self.begin(wire, &say) {
                    say(&format!("a call could not be taken: {}", problem.chain()));
                }
            }
        }
    }

    fn wait(&mut self) -> Result<()> {
        let full = self.doors.iter().any(Door::is_full);
        let patience = PollTimeout::try_from(AGAIN).ok().filter(|_| full).unwrap_or(PollTimeout::NONE);
        let read = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds: Vec<PollFd<'_>> = self.doors.iter().flat_map(Door::fds).map(read).collect();
        fds.extend(self.sessions.iter().map(|session| read(session.as_fd())));
        match poll(&mut fds, patience) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).doing(|| "wait for calls".into()),
        }
        self.doors.iter_mut().for_each(Door::reopen);
        Ok(())
    }

    fn begin(&mut self, wire: Session, say: &impl Fn(&str)) -> Result<()> {
        let caller = caller(&wire, &self.keys)?;
        let Some(caller) = caller else { return Ok(()) };
        if self.sessions.len() >= MOST_SESSIONS {
            say(&format!("{}: turned away, {MOST_SESSIONS} calls are under way", caller.name));
            return Ok(());
        }
        match daemon::fork().doing(|| "begin a session".into())? {
            Fork::Parent(pid) => {
                self.sessions.extend(pidfd::open(pid).ok());
                Ok(())
            }
            Fork::Child => {
                self.doors.clear();
                self.sessions.clear();
                daemon::set_comm(c"pod-session");
                // What is said to the daemon's terminal is not for calls that are under way.
                let _ = nix::unistd::setsid();
                let ended = session(&self.store, wire, &caller, say);
                if let Err(problem) = &ended {
                    say(&format!("{}: {}", caller.name, problem.chain()));
                }
                daemon::exit_now(ended.is_err().into())
            }
        }
    }
}

fn expected(keys: &Keys) -> Result<Vec<Vec<u8>>> {
    let may_call = keys.peers()?.into_values().filter(|peer| !peer.outgoing_only);
    Ok(may_call.map(|peer| peer.key.spki()).collect())
}

fn pidfd_ended(session: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(session.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n| n > 0)
}

/// Who calls.
struct Caller {
    name: String,
    /// As sshd says it: client's address and port, and ours.
    connection: String,
}

/// None if it is trusted no more.
fn caller(wire: &Session, keys: &Keys) -> Result<Option<Caller>> {
    let shown = wire.peer().unwrap_or_default();
    let Some((name, Peer { outgoing_only: false, .. })) = keys.named(shown)? else { return Ok(None) };
    let plain = |address: SocketAddr| match address.ip() {
        IpAddr::V6(six) => (six.to_ipv4_mapped().map_or(IpAddr::V6(six), IpAddr::V4), address.port()),
        four => (four, address.port()),
    };
    let what = || "look at a connection".to_owned();
    let (theirs, their_port) = plain(wire.socket().peer_addr().code(LINK, what)?);
    let (ours, our_port) = plain(wire.socket().local_addr().code(LINK, what)?);
    Ok(Some(Caller { name, connection: format!("{theirs} {their_port} {ours} {our_port}") }))
}

/// What a peer may have run here: the far side of a move, what it wants to know before one, and the way to a pod that it has sent.
fn may_run(args: &[String]) -> bool {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["receive"] | ["doctor", "--json"] => true,
        ["relay", id] => id.len() == 12 && id.bytes().all(|byte| byte.is_ascii_hexdigit()),
        _ => false,
    }
}

/// One call, until the program has ended or the caller has gone.
fn session(store: &Store, wire: Session, caller: &Caller, say: &impl Fn(&str)) -> Result<()> {
    let mut pump = Pump::new(wire);
    let args = request(&mut pump)?;
    if !may_run(&args) {
        let problem = Problem::new(PEER, format!("a daemon does not run `pod {}`", args.join(" ")))
            .fix("by ssh it can be run: leave pod:// out");
        pump.say(Kind::Words, format!("{}\n", serde_json::json!({ "error": problem.report() })).as_bytes());
        pump.close(126, &limit()?)?;
        return Err(problem);
    }
    say(&format!("{} ({}): pod {}", caller.name, caller.connection, args.join(" ")));
    let mut child = start(store, caller, &args)?;
    let ended = pidfd::open(child.id() as i32).doing(|| "watch what was started".into())?;
    let what = || Problem::new("E-INTERNAL", "no pipe");
    pump.to(Kind::Data, child.stdin.take().ok_or_else(what)?.into())?;
    pump.from(Kind::Data, child.stdout.take().ok_or_else(what)?.into())?;
    pump.from(Kind::Words, child.stderr.take().ok_or_else(what)?.into())?;
    let mut watched = Some(&ended);
    while watched.is_some() || !pump.has_read_all() {
        if pump.turn(watched.map(AsFd::as_fd))? {
            watched = None;
        }
    }
    let status = child.wait().doing(|| "see how it ended".into())?;
    use std::os::unix::process::ExitStatusExt;
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    pump.close(code as u8, &limit()?)
}

fn request(pump: &mut Pump) -> Result<Vec<String>> {
    match pump.first(limit()?.as_fd())? {
        (Kind::Request, bytes) => serde_json::from_slice(&bytes).code(PROTOCOL, || "understand a request".into()),
        (kind, _) => Err(Problem::new(PROTOCOL, format!("a frame of {kind:?} where a request was due"))),
    }
}

/// Can be read when a peer has had enough time for one word.
fn limit() -> Result<TimerFd> {
    let what = || "set a limit".to_owned();
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC).doing(what)?;
    timer.set(Expiration::OneShot(HANDSHAKE.into()), TimerSetTimeFlags::empty()).doing(what)?;
    Ok(timer)
}

fn start(store: &Store, caller: &Caller, args: &[String]) -> Result<Child> {
    let mut command = Command::new("/proc/self/exe");
    command.args(args).env("POD_ROOT", store.data()).env("POD_RUN", store.run());
    command.env(CONNECTION, &caller.connection).env_remove("SSH_CONNECTION");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().doing(|| format!("start pod {}", args.join(" ")))
}

#[cfg(test)]
mod tests {
    use super::super::call;
    use super::super::frame::MOST;
    use super::*;
    use crate::link::tls;
    use std::io::IoSlice;
    use std::os::fd::BorrowedFd;
    use std::thread;
    use std::time::Instant;

    const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

    /// Two hosts, of which the second lets in the first.
    fn hosts(dir: &std::path::Path) -> (Store, Store) {
        let store = |name| Store::open_at(dir.join(name), dir.join(name).join("run")).unwrap();
        let (a, b) = (store("a"), store("b"));
        let public = |store| Keys::of(store).unwrap().public().unwrap();
        Keys::of(&a).unwrap().trust("b", Peer::new(public(&b))).unwrap();
        Keys::of(&b).unwrap().trust("a", Peer::new(public(&a))).unwrap();
        (a, b)
    }

    fn readable(fd: BorrowedFd<'_>, end: Instant) -> std::io::Result<bool> {
        let left = PollTimeout::try_from(end.saturating_duration_since(Instant::now())).unwrap_or(PollTimeout::MAX);
        Ok(poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], left)? > 0)
    }

    /// How a session ends whose caller is let in, says this, and hangs up.
    fn said(words: &[u8]) -> Problem {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = hosts(dir.path());
        let mut daemon = Daemon::open(&b, &[LOOPBACK]).unwrap();
        let at = daemon.addresses()[0];
        let (keys, words) = (Keys::of(&a).unwrap(), words.to_vec());
        let caller = thread::spawn(move || {
            let theirs = keys.peer("b").unwrap().key.spki();
            let mut wire = tls::connect(at, &theirs, &keys.own().unwrap(), readable).unwrap();
            let mut left = &words[..];
            while !left.is_empty() {
                match wire.write_vectored(&[IoSlice::new(left)]).and_then(|n| wire.drain().map(|()| n)) {
                    Ok(n) => left = &left[n..],
                    Err(_) => break,
                }
            }
        });
        let wire = loop {
            daemon.wait().unwrap();
            daemon.doors[0].serve();
            if let Some(wire) = daemon.doors[0].arrived() {
                break wire;
            }
        };
        let who = super::caller(&wire, &daemon.keys).unwrap().unwrap();
        assert!(who.name == "a" && who.connection.starts_with("127.0.0.1 "), "{}", who.connection);
        let ended = session(&b, wire, &who, &|_| {}).unwrap_err();
        caller.join().unwrap();
        ended
    }

    #[test]
    fn one_that_is_trusted_and_talks_nonsense_ends_its_session() {
        let frame = |kind: u8, bytes: &[u8]| {
            let length = (bytes.len() as u32).to_le_bytes();
            [&[kind], &length[..3], bytes].concat()
        };
        for (what, words, code) in [
            ("nothing", vec![], LINK),
            ("half of a head", vec![0, 1], LINK),
            ("a frame of no kind", frame(77, b"x"), PROTOCOL),
            ("one that is too long", vec![0, 1, 0, 1], PROTOCOL),
            ("data first", frame(1, b"x"), PROTOCOL),
            ("an exit first", frame(4, &[0]), PROTOCOL),
            ("a request that is no list", frame(0, b"{}"), PROTOCOL),
            ("one of numbers", frame(0, b"[1, 2]"), PROTOCOL),
            ("one that is not ended", frame(0, b"[\"receive\""), PROTOCOL),
            ("one of another verb", frame(0, b"[\"run\", \"--\", \"sh\"]"), PEER),
            ("one of nothing", frame(0, b"[]"), PEER),
            ("one with more", frame(0, b"[\"receive\", \"--root=/\"]"), PEER),
            ("one with a path", frame(0, b"[\"relay\", \"../../../..\"]"), PEER),
            ("64 KiB of brackets", frame(0, &vec![b'['; MOST]), PROTOCOL),
        ] {
            let problem = said(&words);
            assert_eq!(problem.code(), code, "{what}: {problem}");
        }
    }

    #[test]
    fn who_is_trusted_no_more_is_not_let_in() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = hosts(dir.path());
        Keys::of(&b).unwrap().forget("a").unwrap();
        let daemon = Daemon::open(&b, &[LOOPBACK]).unwrap();
        let at = daemon.addresses()[0];
        let caller = thread::spawn(move || {
            let null = || std::fs::File::options().read(true).write(true).open("/dev/null").unwrap().into();
            let keys = Keys::of(&a).unwrap();
            let peer = Peer { address: Some(at.to_string()), ..keys.peer("b").unwrap() };
            keys.trust("b", peer).unwrap();
            call::call(&a, "b", None, &["receive".to_owned()], [null(), null(), null()])
        });
        let mut daemon = daemon;
        while !caller.is_finished() {
            let mut fds: Vec<PollFd<'_>> =
                daemon.doors[0].fds().into_iter().map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
            poll(&mut fds, PollTimeout::from(20u8)).unwrap();
            daemon.doors[0].serve();
            assert!(daemon.doors[0].arrived().is_none(), "it was let in");
        }
        let problem = caller.join().unwrap().unwrap_err();
        assert!(problem.code() == PEER && problem.way_out().unwrap().contains("ed25519:"), "{problem}");
    }
}
