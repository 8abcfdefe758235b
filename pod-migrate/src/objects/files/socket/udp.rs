//! UDP (and UDP-Lite, ping sockets: the same calls) with its peer, multicast groups and queued datagrams.
//!
//! Queued datagrams are peeked with SO_PEEK_OFF, which walks along the queue, and asked for their destination by
//! switching IP_RECVORIGDSTADDR on for the moment: the kernel takes it from the packet itself. On restore they are
//! handed to the pod's stack as packets from their senders, so that control messages come out as they would have; the
//! device that they came in by is then the loopback.
//!
//! The kernel passes over an empty datagram that was peeked at before, so a second dump (after one that was given up)
//! misses empty ones. Not kept, and said so: data held back by UDP_CORK (never on the wire yet), errors that wait, and the
//! queue of a ping socket.

use super::address::{Endpoint, Family};
use super::options::Options;
use super::{inject, listing};
use libc::{IPPROTO_IP, IPPROTO_IPV6, IPPROTO_UDP, MSG_DONTWAIT, MSG_PEEK, SOCK_DGRAM, SOL_SOCKET};
use pod_runtime::sys::inet;
use pod_runtime::{Doing, Result};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Socket options of multicast (linux/in.h): the same numbers for IPv4 and IPv6.
const MCAST_JOIN_GROUP: i32 = 42;
const IPV6_ORIGDSTADDR: i32 = 74;
/// Datagrams that are carried at most.
const MAX_QUEUED: usize = 4096;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub family: Family,
    /// 17 UDP, 136 UDP-Lite, 1 and 58 ping.
    pub protocol: i32,
    pub options: Options,
    pub local: Option<Endpoint>,
    pub peer: Option<Endpoint>,
    /// Device index and group.
    pub groups: Vec<(u32, IpAddr)>,
    /// Of these groups, by their place in the list: whether only (1) or all but (0) these senders are heard.
    #[serde(default)]
    pub sources: BTreeMap<u32, (u32, Vec<IpAddr>)>,
    pub queue: Vec<Datagram>,
    pub read_shut: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Datagram {
    pub from: Endpoint,
    pub to: Endpoint,
    pub payload: ByteBuf,
}

pub fn dump(
    fd: BorrowedFd<'_>,
    family: Family,
    protocol: i32,
    subject: &str,
    warnings: &mut Vec<String>,
) -> Result<State> {
    let local = Endpoint::parse(&inet::local_address(fd).doing(|| format!("{subject}: read its address"))?);
    let local = local.filter(|local| !local.is_unbound());
    let peer = inet::peer_address(fd).ok().and_then(|bytes| Endpoint::parse(&bytes));
    let read_shut = inet::poll_now(fd, libc::POLLRDHUP).doing(|| "poll a socket".into())? & libc::POLLRDHUP != 0;
    let options = Options::dump(fd, &[], subject)?;
    let is_udp = matches!(protocol, libc::IPPROTO_UDP | libc::IPPROTO_UDPLITE);
    let queue = if is_udp { peek_queue(fd, family, local)? } else { Vec::new() };
    let found = inet::poll_now(fd, libc::POLLIN).doing(|| "poll a socket".into())?;
    if !is_udp && found & libc::POLLIN != 0 {
        warnings.push(format!("{subject}: replies that wait in a ping socket are not kept"));
    }
    if found & libc::POLLERR != 0 {
        warnings.push(format!("{subject}: errors that wait in a socket (MSG_ERRQUEUE, SO_ERROR) are not kept"));
    }
    if is_udp
        && inet::number(fd, IPPROTO_UDP, libc::UDP_CORK).unwrap_or(0) != 0
        && inet::unacknowledged(fd).unwrap_or(0) > 0
    {
        warnings.push(format!("{subject}: a datagram that is held back by UDP_CORK is not kept"));
    }
    let groups = groups(fd, family);
    let sources = (0..).zip(&groups).filter_map(|(at, (device, group))| Some((at, filter(fd, *device, *group)?)));
    let sources = sources.filter(|(_, filter)| *filter != (EXCLUDE, Vec::new())).collect();
    Ok(State { family, protocol, options, local, peer, groups, sources, queue, read_shut })
}

fn peek_queue(fd: BorrowedFd<'_>, family: Family, local: Option<Endpoint>) -> Result<Vec<Datagram>> {
    let Some(local) = local else { return Ok(Vec::new()) };
    if inet::poll_now(fd, libc::POLLIN).doing(|| "poll a socket".into())? & libc::POLLIN == 0 {
        return Ok(Vec::new());
    }
    let level = |family| if family == Family::V4 { IPPROTO_IP } else { IPPROTO_IPV6 };
    let asked = |family| if family == Family::V4 { libc::IP_RECVORIGDSTADDR } else { IPV6_ORIGDSTADDR };
    // A socket of IPv6 also gets IPv4 datagrams, whose destination is an option of the other level.
    let families: &[Family] = if family == Family::V4 { &[Family::V4] } else { &[Family::V4, Family::V6] };
    let before: Vec<i32> =
        families.iter().map(|family| inet::number(fd, level(*family), asked(*family)).unwrap_or(0)).collect();
    let offset = inet::number(fd, SOL_SOCKET, libc::SO_PEEK_OFF).unwrap_or(-1);
    for family in families {
        let _ = inet::set_number(fd, level(*family), asked(*family), 1);
    }
    let walked = inet::set_number(fd, SOL_SOCKET, libc::SO_PEEK_OFF, 0).map(|()| walk(fd, local));
    let _ = inet::set_number(fd, SOL_SOCKET, libc::SO_PEEK_OFF, offset);
    for (family, before) in families.iter().zip(before) {
        let _ = inet::set_number(fd, level(*family), asked(*family), before);
    }
    Ok(walked.unwrap_or_default())
}

fn walk(fd: BorrowedFd<'_>, local: Endpoint) -> Vec<Datagram> {
    let mut queue = Vec::new();
    while queue.len() < MAX_QUEUED {
        // A datagram with a bad checksum is dropped by the kernel here as it would have been later.
        let Ok(message) = inet::receive(fd, 64 << 10, MSG_PEEK | MSG_DONTWAIT) else { break };
        let Some(from) = Endpoint::parse(&message.from) else { break };
        let destination = message.control.iter().find_map(|(level, kind, data)| {
            let ours = (*level == IPPROTO_IP && *kind == libc::IP_RECVORIGDSTADDR)
                || (*level == IPPROTO_IPV6 && *kind == IPV6_ORIGDSTADDR);
            ours.then(|| Endpoint::parse(data)).flatten()
        });
        queue.push(Datagram { from, to: destination.unwrap_or(local), payload: ByteBuf::from(message.bytes) });
    }
    queue
}

/// Which of the groups that the pod's devices are in this socket has joined: asking a socket for the filter of a group
/// fails when it is no member.
fn groups(fd: BorrowedFd<'_>, family: Family) -> Vec<(u32, IpAddr)> {
    let mut found = Vec::new();
    if family == Family::V4 {
        for (device, group) in listing::groups_v4(fd).unwrap_or_default() {
            if filter(fd, device, IpAddr::V4(group)).is_some() {
                found.push((device, IpAddr::V4(group)));
            }
        }
    } else {
        for (device, group) in listing::groups_v6(fd).unwrap_or_default() {
            if filter(fd, device, IpAddr::V6(group)).is_some() {
                found.push((device, IpAddr::V6(group)));
            }
        }
    }
    found
}

/// `struct group_req`, which is also how `struct group_filter` begins.
fn group_request(device: u32, group: IpAddr) -> Vec<u8> {
    let mut bytes = u64::from(device).to_ne_bytes().to_vec();
    bytes.extend_from_slice(&Endpoint { ip: group, port: 0, scope: 0 }.bytes());
    bytes.resize(8 + 128, 0);
    bytes
}

/// All senders are heard but these.
const EXCLUDE: u32 = 0;
const MCAST_MSFILTER: i32 = 48;
/// `sysctl net.ipv4.igmp_max_msf` allows ten unless it was raised.
const MAX_SOURCES: usize = 128;

/// Which senders of a group are heard; `None` when the socket is no member.
fn filter(fd: BorrowedFd<'_>, device: u32, group: IpAddr) -> Option<(u32, Vec<IpAddr>)> {
    // struct group_filter: group_req, mode, number of sources, and room for them.
    let mut request = group_request(device, group);
    let room = if group.is_ipv4() { MAX_SOURCES } else { MAX_SOURCES / 2 };
    request.extend_from_slice(&[0; 4]);
    request.extend_from_slice(&(room as u32).to_ne_bytes());
    let found = inet::option(fd, level(group), MCAST_MSFILTER, &request, request.len() + room * 128).ok()?;
    let word = |at: usize| Some(u32::from_ne_bytes(found.get(at..at + 4)?.try_into().ok()?));
    let (mode, count) = (word(136)?, word(140)? as usize);
    let sources = found.get(144..)?.chunks_exact(128).take(count).filter_map(Endpoint::parse).map(|from| from.ip);
    Some((mode, sources.collect()))
}

fn level(group: IpAddr) -> i32 {
    if group.is_ipv4() { IPPROTO_IP } else { IPPROTO_IPV6 }
}

/// Joins a group again, and hears in it whom it heard.
fn join(fd: BorrowedFd<'_>, device: u32, group: IpAddr, sources: Option<&(u32, Vec<IpAddr>)>) -> std::io::Result<()> {
    inet::set_option(fd, level(group), MCAST_JOIN_GROUP, &group_request(device, group))?;
    let Some((mode, sources)) = sources else { return Ok(()) };
    let mut request = group_request(device, group);
    request.extend_from_slice(&mode.to_ne_bytes());
    request.extend_from_slice(&(sources.len() as u32).to_ne_bytes());
    for source in sources {
        let at = request.len();
        request.extend_from_slice(&Endpoint { ip: *source, port: 0, scope: 0 }.bytes());
        request.resize(at + 128, 0);
    }
    inet::set_option(fd, level(group), MCAST_MSFILTER, &request)
}

pub fn restore(state: &State) -> Result<OwnedFd> {
    let State { family, protocol, options, local, peer, groups, sources, queue, read_shut } = state;
    let socket = inet::socket(family.number(), SOCK_DGRAM, *protocol)
        .doing(|| format!("make a socket of protocol {protocol}"))?;
    let fd = socket.as_fd();
    options.before_bind(fd, true)?;
    if let Some(local) = local {
        inet::bind(fd, &local.bytes()).doing(|| format!("bind to {local}"))?;
    }
    for (at, (device, group)) in (0..).zip(groups) {
        if let Err(error) = join(fd, *device, *group, sources.get(&at)) {
            tracing::warn!("W-MULTICAST: joining {group} again: {error}");
        }
    }
    if let Some(peer) = peer {
        inet::connect(fd, &peer.bytes()).doing(|| format!("connect to {peer}"))?;
    }
    options.after_bind(fd)?;
    let own = local.map(|local| local.ip);
    for datagram in queue {
        let to = deliverable(datagram.to, own);
        if let Err(problem) = inject::datagram(datagram.from, to, &datagram.payload) {
            tracing::warn!("W-DATAGRAM: a queued datagram from {}: {}", datagram.from, problem.chain());
        }
    }
    options.last(fd)?;
    if *read_shut {
        let _ = nix::sys::socket::shutdown(std::os::fd::AsRawFd::as_raw_fd(&fd), nix::sys::socket::Shutdown::Read);
    }
    Ok(socket)
}

/// A datagram goes to the address that it was sent to. One to a group or a broadcast, which only a device receives, or
/// of which we know no better than "any", goes to the loopback address, which a socket bound to any hears.
fn deliverable(to: Endpoint, bound: Option<IpAddr>) -> Endpoint {
    let ip = to.wire_ip();
    let usable = |ip: IpAddr| !ip.is_unspecified() && !ip.is_multicast() && ip != IpAddr::V4(Ipv4Addr::BROADCAST);
    if usable(ip) {
        return to;
    }
    let ip = match bound.map(|ip| ip.to_canonical()).filter(|bound| usable(*bound)) {
        Some(bound) => bound,
        None if ip.is_ipv4() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        None => IpAddr::V6(Ipv6Addr::LOCALHOST),
    };
    Endpoint { ip, ..to }
}
