//! A way past ssh, for all that the source sends.
//!
//! ssh moves a fraction of what a connection of our own does: two more programs pass every byte on and encrypt it on the way.
//! So ssh authenticates, starts the far side and carries what that says; what comes from the source goes over TLS 1.3 where
//! the hosts reach each other. The destination listens where ssh has come to, on a port of [`PORTS`]. Each side makes a key
//! for this one move and tells the other through ssh ([`Key`], [`Door`]); both prove theirs in the handshake ([`tls`]). Nobody else
//! gets further than that, and nothing outlives the move. Where a daemon stands in the place of ssh ([`super::daemon`]) it is the
//! same.
//!
//! The direct way goes in one direction. Both sides keep ssh at the same time, and the end of either way is the end of the
//! link.

use super::LINK;
use super::dial::Scheme;
use super::tls::{self, Key, Session};
use pod_runtime::{Doing, Problem, Result};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::ops::RangeInclusive;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

/// Where a destination listens: the ports of libvirt's migrations, which firewalls know.
pub const PORTS: RangeInclusive<u16> = 49152..=49215;
/// Memory goes through ssh, though another way was wanted.
pub const TUNNELLED: &str = "W-TUNNELLED";

/// Who has connected and not proved yet who it is.
const MOST_GUESTS: usize = 8;
/// Where the destination listens, and whom one finds there.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Door {
    pub address: SocketAddr,
    /// Its public key (SubjectPublicKeyInfo).
    pub key: ByteBuf,
}

/// Source: goes to where the destination listens. `wait` says whether the descriptor could be read by then.
pub fn connect(
    door: &Door,
    key: &Key,
    wait: impl Fn(BorrowedFd<'_>, Instant) -> io::Result<bool>,
) -> io::Result<Session> {
    tls::connect(door.address, &door.key, key, wait)
}

/// Destination: waits for the source.
pub struct Listening(tls::Door);

impl Listening {
    /// Where the source has come to, for the holder of this key.
    ///
    /// # Errors
    /// Nothing says where that is; there is no free port; that is no address of this host.
    pub fn open(source: &[u8]) -> Result<(Listening, Door)> {
        let said = |variable| std::env::var(variable).ok().as_deref().and_then(came_to);
        let unknown = || {
            let what = "SSH_CONNECTION does not say to which address ssh has come";
            Problem::new(LINK, what).fix("have sudo keep SSH_CONNECTION (env_keep), if that starts pod there")
        };
        let came_to = said(super::daemon::CONNECTION).or_else(|| said("SSH_CONNECTION"));
        Listening::at(came_to.ok_or_else(unknown)?, source)
    }

    fn at(address: IpAddr, source: &[u8]) -> Result<(Listening, Door)> {
        let what = || format!("listen at {address} on a port from {} to {}", PORTS.start(), PORTS.end());
        let listener = bind(address).code(LINK, what)?;
        let key = Key::new()?;
        let public = key.public();
        let door = tls::Door::new(listener, key, vec![source.to_vec()], MOST_GUESTS)?;
        let address = door.address().doing(what)?;
        Ok((Listening(door), Door { address, key: public }))
    }

    /// What this waits for.
    pub(super) fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.0.fds()
    }

    /// Goes on with everybody as far as that is possible without waiting. Who is not the source is shown out.
    pub(super) fn serve(&mut self) {
        self.0.serve();
    }

    pub(super) fn source(&mut self) -> Option<Session> {
        self.0.arrived()
    }

    /// How long the source may take once it says that it comes this way.
    pub(super) fn patience(&self) -> Duration {
        tls::HANDSHAKE
    }
}

fn bind(address: IpAddr) -> io::Result<TcpListener> {
    for port in PORTS {
        match TcpListener::bind((address, port)) {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => {}
            other => return other,
        }
    }
    Err(io::ErrorKind::AddrInUse.into())
}

/// Of what sshd says: the client's address and port, and then ours.
fn came_to(connection: &str) -> Option<IpAddr> {
    connection.split(' ').nth(2)?.parse().ok()
}

/// Why the source did not get to where the destination listens, and what helps.
pub(super) fn unreached(door: &Door, error: io::Error) -> Problem {
    use io::ErrorKind::{ConnectionRefused, ConnectionReset, HostUnreachable, NetworkUnreachable, TimedOut};
    let closed = [TimedOut, ConnectionRefused, ConnectionReset, HostUnreachable, NetworkUnreachable];
    let ports = format!("let its TCP ports {} to {} be reached from here", PORTS.start(), PORTS.end());
    let closed = closed.contains(&error.kind());
    let problem = Problem::new(LINK, format!("{} cannot be reached", door.address)).because(error);
    if closed { problem.fix(ports) } else { problem }
}

/// The operator should know: it is slower, and how it becomes faster.
pub fn tunnelled(scheme: Scheme, host: &str, problem: &Problem) -> String {
    let through = match scheme {
        Scheme::Ssh => "ssh",
        Scheme::Daemon => "the daemon",
    };
    let help = problem.way_out().map_or_else(String::new, |fix| format!("; {fix}"));
    format!(
        "{TUNNELLED}: memory goes through {through}, which is slower, and not directly to {host}: {}{help} (--tunnelled does not try it)",
        problem.chain()
    )
}

#[cfg(test)]
mod tests {
    use super::super::Link;
    use super::*;
    use std::io::Write;
    use std::net::{Ipv4Addr, TcpStream};
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::thread;

    const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    fn link(stream: UnixStream) -> Link {
        let copy = stream.try_clone().unwrap();
        Link::open(OwnedFd::from(stream), OwnedFd::from(copy), "the other", None).unwrap()
    }

    /// What the destination hears after the source has said by which way it comes, until the end.
    fn destination(ssh: UnixStream, mut listening: Listening) -> (Vec<String>, Problem) {
        let mut link = link(ssh);
        link.serve_until_heard(&mut listening).unwrap();
        if link.hear::<bool>().unwrap() {
            link.come(listening).unwrap();
        }
        let mut heard = Vec::new();
        loop {
            match link.hear() {
                Ok(word) => heard.push(word),
                Err(problem) => return (heard, problem),
            }
        }
    }

    fn words(count: usize) -> Vec<String> {
        (0..count).map(|n| format!("{n} ").repeat(40_000)).collect()
    }

    #[test]
    fn all_that_is_said_comes_past_ssh() {
        let key = Key::new().unwrap();
        let (listening, door) = Listening::at(HERE, &key.public()).unwrap();
        assert!(PORTS.contains(&door.address.port()));
        let (ssh, far) = UnixStream::pair().unwrap();
        let there = thread::spawn(move || destination(far, listening));
        let mut link = link(ssh);
        let direct = link.connect(&door, &key).unwrap();
        link.say(&true).unwrap();
        link.go(direct).unwrap();
        let before = link.writer.bytes();
        words(50).iter().for_each(|word| link.say(word).unwrap());
        assert!(link.writer.bytes() - before > 4 << 20);
        drop(link);
        let (heard, end) = there.join().unwrap();
        assert!(heard == words(50), "{} words came", heard.len());
        assert_eq!(end.code(), LINK, "{end}");
    }

    #[test]
    fn strangers_do_not_get_in_and_do_not_keep_the_source_out() {
        let key = Key::new().unwrap();
        let (listening, door) = Listening::at(HERE, &key.public()).unwrap();
        let (ssh, far) = UnixStream::pair().unwrap();
        let there = thread::spawn(move || destination(far, listening));
        let mut link = link(ssh);
        // They say nothing, nonsense, prove another key, or find another than they were told of.
        let _silent: Vec<TcpStream> = (0..20).map(|_| TcpStream::connect(door.address).unwrap()).collect();
        let mut loud = TcpStream::connect(door.address).unwrap();
        loud.write_all(&[0x16; 70_000]).ok();
        assert!(link.connect(&door, &Key::new().unwrap()).is_err(), "a stranger was let in");
        let other = Door { key: Key::new().unwrap().public(), ..door.clone() };
        assert!(link.connect(&other, &key).is_err(), "another host was taken for the destination");
        let direct = link.connect(&door, &key).unwrap();
        link.say(&true).unwrap();
        link.go(direct).unwrap();
        link.say(&"it is I").unwrap();
        drop(link);
        assert_eq!(there.join().unwrap().0, ["it is I"]);
    }

    #[test]
    fn the_end_of_ssh_is_the_end() {
        let key = Key::new().unwrap();
        let (listening, door) = Listening::at(HERE, &key.public()).unwrap();
        let (ssh, far) = UnixStream::pair().unwrap();
        let there = thread::spawn(move || destination(far, listening));
        let also = ssh.try_clone().unwrap();
        let mut link = link(ssh);
        let direct = link.connect(&door, &key).unwrap();
        link.say(&true).unwrap();
        link.go(direct).unwrap();
        link.say(&"one").unwrap();
        also.shutdown(std::net::Shutdown::Both).unwrap();
        let (heard, end) = there.join().unwrap();
        assert_eq!((heard.len() <= 1, end.code()), (true, LINK), "{end}");
        drop(link);
    }

    #[test]
    fn who_does_not_come_goes_through_ssh() {
        let key = Key::new().unwrap();
        let (listening, door) = Listening::at(HERE, &key.public()).unwrap();
        let (ssh, far) = UnixStream::pair().unwrap();
        let there = thread::spawn(move || destination(far, listening));
        let mut link = link(ssh);
        let nobody = TcpListener::bind((HERE, 0)).unwrap().local_addr().unwrap();
        let unreached = Door { address: nobody, ..door };
        let problem = link.connect(&unreached, &key).err().unwrap();
        let said = tunnelled(Scheme::Ssh, "hostB", &problem);
        assert!(said.contains("to hostB: ") && said.contains("ports 49152 to 49215"), "{said}");
        link.say(&false).unwrap();
        words(3).iter().for_each(|word| link.say(word).unwrap());
        drop(link);
        assert_eq!(there.join().unwrap().0, words(3));
    }

    #[test]
    fn where_ssh_came_to() {
        assert_eq!(came_to("10.0.0.1 50000 10.0.0.2 22"), Some("10.0.0.2".parse().unwrap()));
        assert_eq!(came_to("fd77::1 50000 fd77::2 22"), Some("fd77::2".parse().unwrap()));
        for strange in ["", "10.0.0.1 50000", "a b c d", "UNKNOWN 65535 UNKNOWN 65535"] {
            assert_eq!(came_to(strange), None, "{strange}");
        }
    }
}
