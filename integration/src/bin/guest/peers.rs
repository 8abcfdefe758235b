//! SO_PEERCRED: who made a pair, who connected and who listened, also when that process has ended since.

use crate::{Guest, sys};
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

const PATH: &str = "/var/tmp/guest-peers";

struct Peers {
    /// What each is, the socket, and whom it told of.
    told: Vec<(&'static str, UnixStream, Credentials)>,
    listener: UnixListener,
    child: UnixStream,
}

/// pid, user, group.
type Credentials = [i32; 3];

fn peer(fd: &impl AsRawFd) -> Result<Credentials> {
    let bytes = sys::option(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED)?;
    let word = |at: usize| bytes.get(at..at + 4).and_then(|four| four.first_chunk().copied()).map(i32::from_ne_bytes);
    match (word(0), word(4), word(8)) {
        (Some(pid), Some(uid), Some(gid)) => Ok([pid, uid, gid]),
        _ => bail!("SO_PEERCRED of {} bytes", bytes.len()),
    }
}

/// Connects as somebody else, says a byte and answers what it is asked.
fn child() -> i32 {
    let nobody = (nix::unistd::Gid::from_raw(65534), nix::unistd::Uid::from_raw(65534));
    let changed = nix::unistd::setgid(nobody.0).and_then(|()| nix::unistd::setuid(nobody.1));
    let Ok(mut stream) = UnixStream::connect(PATH) else { return 1 };
    if changed.is_err() || stream.write_all(b"!").is_err() {
        return 1;
    }
    let mut byte = [0];
    while stream.read_exact(&mut byte).is_ok() {
        let own = peer(&stream).map_or_else(|error| format!("{error:#}"), |told| told[0].to_string());
        // In one write: the other end takes what one read gives.
        if stream.write_all(format!("{own}\n").as_bytes()).is_err() {
            break;
        }
    }
    0
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let _ = fs::remove_file(PATH);
    let listener = UnixListener::bind(PATH)?;
    fs::set_permissions(PATH, std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
    let (pair, other) = UnixStream::pair()?;
    let hidden = UnixListener::bind_addr(&SocketAddr::from_abstract_name("guest-peers")?)?;
    let client = UnixStream::connect_addr(&SocketAddr::from_abstract_name("guest-peers")?)?;
    let (server, _) = hidden.accept()?;
    sys::fork(child)?;
    let (mut theirs, _) = listener.accept()?;
    theirs.read_exact(&mut [0])?;
    let mut made = vec![("a pair", pair), ("its other end", other), ("a client", client), ("a server", server)];
    let ended = sys::fork(|| i32::from(UnixStream::connect(PATH).and_then(|mut s| s.write_all(b"bye")).is_err()))?;
    nix::sys::wait::waitpid(ended, None)?;
    made.push(("one whose client has ended", listener.accept()?.0));
    made.push(("a child's", theirs.try_clone()?));
    let told = made.into_iter().map(|(what, stream)| Ok((what, peer(&stream)?, stream)));
    let told: Result<Vec<_>> = told.map(|made| made.map(|(what, told, stream)| (what, stream, told))).collect();
    Ok(Box::new(Peers { told: told?, listener, child: theirs }))
}

impl Guest for Peers {
    fn verify(&mut self) -> Result<()> {
        for (what, stream, before) in &self.told {
            let now = peer(stream)?;
            ensure!(now == *before, "{what} tells of {now:?} (pid, user, group), not of {before:?}");
        }
        let own = std::process::id() as i32;
        ensure!(peer(&self.listener)?[0] == own, "the listener tells of {:?}", peer(&self.listener)?);
        let client = UnixStream::connect(PATH)?;
        ensure!(peer(&client)?[0] == own, "a new client is told of {:?}", peer(&client)?);
        self.listener.accept()?;
        self.child.write_all(b"?")?;
        let mut line = [0; 16];
        let got = self.child.read(&mut line)?;
        let text = std::str::from_utf8(&line[..got]).context("no text")?;
        ensure!(text.trim().parse() == Ok(own), "the child is told of {text:?}, not of {own}");
        Ok(())
    }
}
