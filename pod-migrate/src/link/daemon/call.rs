//! Calling another host's daemon: what `pod dial` does in the place of ssh.

use super::frame::Kind;
use super::keys::{Keys, Peer};
use super::pump::Pump;
use super::{PEER, PORT};
use crate::link::LINK;
use crate::link::tls::{self, Key};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pod_runtime::store::Store;
use pod_runtime::{Doing, Problem, Result};
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// Runs `pod ARGS…` on the host that is known as `name`, with these for its standard input, output and errors: the code that it
/// ended with.
pub fn call(
    store: &Store,
    name: &str,
    port: Option<u16>,
    args: &[String],
    [input, output, errors]: [OwnedFd; 3],
) -> Result<i32> {
    let keys = Keys::of(store)?;
    let (peer, own) = (keys.peer(name)?, keys.own()?);
    let wire = connect(name, &peer, port, &own, &keys)?;
    let mut pump = Pump::new(wire);
    pump.say(Kind::Request, &serde_json::to_vec(args).doing(|| "put a request into words".into())?);
    pump.from(Kind::Data, input)?;
    pump.to(Kind::Data, output)?;
    pump.to(Kind::Words, errors)?;
    loop {
        pump.turn(None)?;
        if let Some(code) = pump.exit() {
            return Ok(code.into());
        }
        if pump.is_deaf(Kind::Data) {
            return Err(Problem::new(LINK, "nobody listens to what it says any more"));
        }
    }
}

/// To the first of its addresses that answers.
fn connect(name: &str, peer: &Peer, port: Option<u16>, own: &Key, keys: &Keys) -> Result<tls::Session> {
    let mut last = None;
    for address in addresses(name, peer, port)? {
        match tls::connect(address, &peer.key.spki(), own, readable) {
            Ok(wire) => return Ok(wire),
            Err(error) => last = Some(why(name, address, error, keys)),
        }
    }
    Err(last.unwrap_or_else(|| Problem::new(LINK, format!("{name} has no address"))))
}

fn addresses(name: &str, peer: &Peer, port: Option<u16>) -> Result<Vec<SocketAddr>> {
    let said = peer.address.as_deref().unwrap_or(name);
    let (host, its) = split(said);
    let port = port.or(its).unwrap_or(PORT);
    let found = (host, port).to_socket_addrs().code(LINK, || format!("find the address of {host}"));
    let found = found.map_err(|problem| match &peer.address {
        Some(_) => problem,
        None => problem.fix(format!("say where it is: pod daemon trust {name} KEY --address HOST[:PORT]")),
    });
    found.map(Iterator::collect)
}

/// `HOST`, `HOST:PORT`, `[V6]:PORT`, `V6`.
pub fn split(address: &str) -> (&str, Option<u16>) {
    if let Some((host, rest)) = address.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        return (host, rest.strip_prefix(':').and_then(|port| port.parse().ok()));
    }
    match address.split_once(':') {
        Some((host, port)) if !port.contains(':') => (host, port.parse().ok()),
        _ => (address, None),
    }
}

/// Whether it could be read by then.
fn readable(fd: BorrowedFd<'_>, end: Instant) -> io::Result<bool> {
    loop {
        let left = end.saturating_duration_since(Instant::now()) + Duration::from_micros(999);
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) {
            Ok(n) => return Ok(n > 0),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// What the operator can do about it.
fn why(name: &str, address: SocketAddr, error: io::Error, keys: &Keys) -> Problem {
    use rustls::Error::{AlertReceived, InvalidCertificate};
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match (tls, error.kind()) {
        (Some(InvalidCertificate(_)), _) => {
            let what =
                format!("what answers at {address} is not {name}: it has another key than the one that is known");
            Problem::new(PEER, what).fix(format!(
                "compare what `pod daemon key` prints on {name} with `pod daemon ls`; pod daemon trust {name} KEY takes a new one"
            ))
        }
        (Some(AlertReceived(_)), _) => {
            let own = keys.public().map_or_else(|_| "KEY".into(), |key| key.to_string());
            Problem::new(PEER, format!("{name} does not let this host in"))
                .fix(format!("on {name}: pod daemon trust THIS-HOST {own}"))
        }
        (None, io::ErrorKind::ConnectionRefused) => {
            Problem::new(LINK, format!("nothing listens at {address}")).fix(format!("on {name}: pod daemon run"))
        }
        _ => Problem::new(LINK, format!("{name} cannot be reached at {address}")).because(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_a_host_is() {
        for (address, expected) in [
            ("hostB", ("hostB", None)),
            ("hostB:99", ("hostB", Some(99))),
            ("10.0.0.1:99", ("10.0.0.1", Some(99))),
            ("[fd77::1]:99", ("fd77::1", Some(99))),
            ("[fd77::1]", ("fd77::1", None)),
            ("fd77::1", ("fd77::1", None)),
        ] {
            assert_eq!(split(address), expected, "{address}");
        }
    }
}
