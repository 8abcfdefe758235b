//! What becomes of a pod's TCP connections when it moves: which go on, which end, which are begun anew by their clients.
//!
//! A connection goes on when its socket is restored and its peers reach the pod as before. On a network that only this
//! host has (a bridge that `pod` made, with NAT outward and published ports) peers outside know the pod under this host's
//! address: the socket moves, and nothing comes to it any more.

use crate::ids::HostPid;
use crate::settle::Unsaved;
use pod_runtime::Problem;
use pod_runtime::network::named;
use pod_runtime::spec::{NetworkMode, Spec};
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

/// Connections end because they go by an address of the old host.
pub const NAT: &str = "W-NAT";

/// How many of each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Connections {
    /// Go on, and neither side notices.
    pub kept: u64,
    /// Are over: not accepted in time, in the middle of closing, or tied to the old host.
    pub closed: u64,
    /// Half-open handshakes: their clients send again what was not answered, and come to the pod where it is then.
    pub retried: u64,
}

impl Connections {
    /// Of the sockets that were dumped, by their other ends, and what had no socket.
    pub fn tally(spec: &Spec, network: &Path, peers: &[IpAddr], unsaved: &Unsaved) -> Connections {
        let tied = if is_of_this_host(spec, network) { outside(spec, peers) } else { 0 };
        Connections {
            kept: peers.len() as u64 - tied,
            closed: tied + u64::from(unsaved.waiting) + u64::from(unsaved.closing),
            retried: u64::from(unsaved.half_open),
        }
    }
}

/// Whether the pod is on a network that no other host has.
fn is_of_this_host(spec: &Spec, network: &Path) -> bool {
    match &spec.network.mode {
        NetworkMode::Named(name) => named::load(network, name).map_or(true, |found| found.managed || found.nat),
        NetworkMode::Bridge(_) | NetworkMode::None | NetworkMode::Host => false,
    }
}

fn outside(spec: &Spec, peers: &[IpAddr]) -> u64 {
    let inside = |ip: &IpAddr| ip.is_loopback() || spec.network.addresses.iter().any(|own| own.ip == *ip);
    peers.iter().map(IpAddr::to_canonical).filter(|ip| !inside(ip)).count() as u64
}

/// What a person should know before the pod moves, by the connections that it has now.
pub fn downgrade(spec: &Spec, network: &Path, init: HostPid) -> Option<Problem> {
    if !is_of_this_host(spec, network) {
        return None;
    }
    let tied = outside(spec, &peers_now(init));
    let ports: Vec<String> = spec.network.ports.iter().map(|port| port.host.to_string()).collect();
    let what = match (tied, ports.is_empty()) {
        (0, true) => return None,
        (0, false) => format!(
            "port {} is published on this host's address: after the move on that of the other, and connections end then",
            ports.join(", ")
        ),
        (1, _) => {
            "one connection goes through this host's address (NAT, published ports) and ends with the move".into()
        }
        (n, _) => {
            format!("{n} connections go through this host's address (NAT, published ports) and end with the move")
        }
    };
    let fix = "for connections that last, run it on the LAN itself: --network bridge:IFACE --ip ADDRESS/PREFIX";
    Some(Problem::new(NAT, what).fix(fix))
}

/// The other ends of the established connections of a pod that runs.
fn peers_now(init: HostPid) -> Vec<IpAddr> {
    let lines = ["tcp", "tcp6"].map(|file| fs::read_to_string(format!("/proc/{init}/net/{file}")).unwrap_or_default());
    lines.iter().flat_map(|text| text.lines().skip(1)).filter_map(peer).collect()
}

/// `sl local remote state …`, addresses as words of this host's byte order.
fn peer(line: &str) -> Option<IpAddr> {
    let mut fields = line.split_ascii_whitespace();
    let (remote, state) = (fields.nth(2)?, fields.next()?);
    let words = remote.split_once(':')?.0;
    let word = |at: usize| u32::from_str_radix(words.get(at * 8..at * 8 + 8)?, 16).ok().map(u32::to_ne_bytes);
    let ip = match words.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        32 => Ipv6Addr::from(<[u8; 16]>::try_from([word(0)?, word(1)?, word(2)?, word(3)?].concat()).ok()?).into(),
        _ => return None,
    };
    (state == "01").then_some(ip)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_proc_net_tcp() {
        let v4 = "   1: 0100007F:1F90 0200A8C0:C5A2 01 00000000:00000000 00:00000000 00000000  0  0 12345 1";
        assert_eq!(peer(v4), Some("192.168.0.2".parse().unwrap()));
        let v6 = "   0: 00000000000000000000000001000000:1F90 000077FD000000000000000011000000:C5A2 01 0:0 00:0 0";
        assert_eq!(peer(v6), Some("fd77::11".parse().unwrap()));
        assert_eq!(peer(&v4.replace(" 01 ", " 0A ")), None);
        for bad in ["", "1: x", "1: a b 01", "1: 0:0 ZZZZZZZZ:1 01"] {
            assert_eq!(peer(bad), None, "{bad}");
        }
    }
}
