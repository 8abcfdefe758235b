//! Connections of which both ends are in the pod. No cable is cut between them, so the kernel goes on carrying what was
//! written before the freeze: a segment that its pacing held back, one that is repeated. If it goes over between the
//! reading of the two ends, they do not fit: a receiver that was read first lacks what its sender is told that it has,
//! a sender that was read first would throw an acknowledgement away, of what it has not sent. So when all are read, the
//! end that is too old is read again. The programs stand still: this ends.

use super::{Connection, Phase, State};
use std::collections::HashMap;
use std::net::IpAddr;

/// A way from one program to another.
type Name = ((IpAddr, u16), (IpAddr, u16));

fn name(connection: &Connection) -> Name {
    let Connection { local, peer, .. } = connection;
    ((local.ip.to_canonical(), local.port), (peer.ip.to_canonical(), peer.port))
}

/// Those whose state is older than what their other end knows of them.
pub fn outdated<'a>(states: impl Iterator<Item = (usize, &'a State)>) -> Vec<usize> {
    let connected = states.filter_map(|(index, state)| match &state.phase {
        Phase::Connected(connection) => Some((name(connection), (index, &**connection))),
        _ => None,
    });
    let ends: HashMap<Name, (usize, &Connection)> = connected.collect();
    let mut outdated = Vec::new();
    for ((near, far), (index, receiver)) in &ends {
        let Some((other, sender)) = ends.get(&(*far, *near)) else { continue };
        let received = receiver.receive_sequence.wrapping_add(receiver.unread.len() as u32);
        let sent = sender.send_sequence.wrapping_add(sender.sent as u32);
        if is_after(sender.send_sequence, received) {
            outdated.push(*index);
        }
        if is_after(received, sent) {
            outdated.push(*other);
        }
    }
    outdated
}

/// Sequence numbers come round.
fn is_after(one: u32, other: u32) -> bool {
    one.wrapping_sub(other) as i32 > 0
}
