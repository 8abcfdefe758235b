//! Connections that are complete for the kernel and their clients, but that no program has accepted.
//!
//! Nothing puts a connection into the queue of a listener but a handshake, whose numbers the kernel chooses. So they are
//! lost; but a client that waits to be greeted would never learn it. It is made to ask: a segment that does not fit its
//! connection is answered with what it has got so far (RFC 9293, 3.10.7.4), which comes to a listener that knows nothing
//! of it and so says reset, with the very number that the client expects.

use super::super::address::{Endpoint, Family};
use super::super::diag::Diag;
use super::super::inject::Segment;
use super::{Phase, State};
use libc::{AF_INET, AF_INET6, SOCK_DGRAM};
use pod_runtime::network::frame::ACK;
use pod_runtime::sys::inet;
use pod_runtime::{Doing, Result};
use std::os::fd::AsFd;

/// More than any backlog; what an image says beyond is not believed.
const MOST: usize = 65536;

/// Those of a listener.
pub(in super::super) fn dump(diag: &Diag, state: &State) -> Vec<(Endpoint, Endpoint)> {
    let Phase::Listening { local, .. } = &state.phase else { return Vec::new() };
    let families: &[Family] = match state.family {
        Family::V4 => &[Family::V4],
        // A listener for both has clients of both.
        Family::V6 => &[Family::V6, Family::V4],
    };
    let ask = |family: &Family| diag.unaccepted(family.number(), local.port);
    let found = families.iter().map(ask).collect::<std::io::Result<Vec<_>>>();
    let found =
        found.inspect_err(|error| tracing::debug!(%error, "connections to {local} are not told")).unwrap_or_default();
    let here = |end: &Endpoint| local.ip.is_unspecified() || end.ip == local.ip;
    found.into_iter().flatten().filter(|(end, _)| here(end)).take(MOST).collect()
}

/// The pod is on its network again. What fails changes nothing for the pod.
pub(super) fn reset_all(connections: &[(Endpoint, Endpoint)]) {
    for (local, peer) in connections.iter().take(MOST) {
        if let Err(problem) = make_it_ask(local, peer) {
            tracing::debug!(problem = problem.chain(), "the client {peer} is not told that {local} has lost it");
        }
    }
}

fn make_it_ask(local: &Endpoint, peer: &Endpoint) -> Result<()> {
    // An image can name any address; the pod can speak for its own ones only.
    let family = if local.ip.is_ipv6() { AF_INET6 } else { AF_INET };
    let own = inet::socket(family, SOCK_DGRAM, 0).doing(|| "make a socket".into())?;
    let here = Endpoint { port: 0, ..*local };
    inet::bind(own.as_fd(), &here.bytes()).doing(|| format!("bind to {local}"))?;
    // Numbers that a connection has by chance once in some thousand times; then the client asks at its next segment.
    Segment { from: *local, to: *peer, sequence: 1, acknowledge: 1, flags: ACK, window: 0 }.inject()
}
