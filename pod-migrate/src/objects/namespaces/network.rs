//! What a pod that may administer its network has made of it: addresses, routes of every table, rules, permanent
//! neighbours. They are kept in the kernel's own messages, as ip-route(8) saves them, and compared with what the newborn
//! pod has: what it lacks is added, what it should not have is taken away.
//!
//! Routes that the kernel makes by itself (of addresses) are left to it, and neighbours that it has found. Other devices
//! than the pod's own, packet filters and what else the kernel keeps for such a program are refused ([`refuse`]).
//! Connections that are tracked come anew, which is reported: without packet filters nobody asks for them.

use super::{Namespace, permitted, within};
use crate::objects::files::socket::diag::messages_of;
use crate::{Doing, Problem, Result};
use netlink_sys::Socket;
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE, NETLINK_XFRM};
use pod_runtime::spec::{NetworkMode, Spec};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::fs;
use std::io;
use std::net::IpAddr;

/// A device, a packet filter or the like that a program in the pod has made.
pub const INSIDE: &str = "E-NETWORK-INSIDE";
/// Connections are tracked in the pod's network.
pub const TRACKED: &str = "W-CONNTRACK";

const REQUEST: u16 = 1;
const ACKNOWLEDGE: u16 = 4;
const EXCLUSIVE: u16 = 0x200;
const DUMP: u16 = 0x300;
const CREATE: u16 = 0x400;
/// NLM_F_APPEND: beside one to the same place.
const APPEND: u16 = 0x800;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const HEADER: usize = 16;

/// One kind: number of RTM_NEW*, which the ones to delete and to list follow; bytes before the attributes; attributes that
/// tell of the moment.
struct Kind {
    new: u16,
    head: usize,
    passing: &'static [u16],
}

const ADDRESS: Kind = Kind { new: 20, head: 8, passing: &[IFA_CACHEINFO] };
const ROUTE: Kind = Kind { new: 24, head: 12, passing: &[RTA_CACHEINFO] };
const RULE: Kind = Kind { new: 32, head: 12, passing: &[] };
const NEIGHBOUR: Kind = Kind { new: 28, head: 12, passing: &[NDA_CACHEINFO, NDA_PROBES] };

const IFA_CACHEINFO: u16 = 6;
const IFA_FLAGS: u16 = 8;
const IFA_F_NODAD: u32 = 2;
const RTA_CACHEINFO: u16 = 12;
const NDA_CACHEINFO: u16 = 3;
const NDA_PROBES: u16 = 4;
const NUD_PERMANENT: u8 = 0x80;
const NTF_PROXY: u8 = 8;
const RTPROT_KERNEL: u8 = 2;
const RT_TABLE_LOCAL: u8 = 255;
const RTM_F_CLONED: u32 = 0x200;

/// Each the kernel's message without its header. Record NETWORK.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub addresses: Vec<ByteBuf>,
    pub routes: Vec<ByteBuf>,
    pub rules: Vec<ByteBuf>,
    /// Permanent ones, and those that the pod answers for.
    #[serde(default)]
    pub neighbours: Vec<ByteBuf>,
    /// The addresses that the pod was given: one that is restored with others keeps those.
    pub own: Vec<IpAddr>,
}

/// None for a pod that cannot have changed it.
pub fn dump(spec: &Spec, init: i32) -> Result<Option<State>> {
    if !spec.security.may("NET_ADMIN") || spec.network.mode == NetworkMode::Host {
        return Ok(None);
    }
    if let Some(problem) = refuse(init) {
        return Err(problem);
    }
    let own = addresses(spec);
    within(init, Namespace::Network, || Ok(State { own, ..State::read()? })).map(Some)
}

fn addresses(spec: &Spec) -> Vec<IpAddr> {
    spec.network.addresses.iter().map(|address| address.ip).collect()
}

/// The same of a pod that runs.
pub fn check(spec: &Spec, init: i32) -> Option<Problem> {
    dump(spec, init).err()
}

fn refuse(init: i32) -> Option<Problem> {
    let refusal = |what: String| Some(Problem::new(INSIDE, what).fix("remove it before the move"));
    let devices = fs::read_to_string(format!("/proc/{init}/net/dev")).unwrap_or_default();
    let names = devices.lines().filter_map(|line| Some(line.split_once(':')?.0.trim()));
    // These are there in every namespace on kernels that have them.
    const FALLBACK: [&str; 8] = ["tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0"];
    if let Some(name) = names.into_iter().find(|name| !["lo", "eth0"].contains(name) && !FALLBACK.contains(name)) {
        return refusal(format!("a program in the pod has made the network device {name}"));
    }
    for table in ["ip_tables_names", "ip6_tables_names"] {
        let text = fs::read_to_string(format!("/proc/{init}/net/{table}")).unwrap_or_default();
        if let Some(name) = text.lines().next() {
            return refusal(format!("a program in the pod uses the packet filter table {name} (iptables)"));
        }
    }
    match within(init, Namespace::Network, || Ok(made_inside())) {
        Ok(Some(what)) => refusal(format!("a program in the pod has made {what}")),
        Ok(None) => None,
        Err(problem) => Some(problem),
    }
}

/// Of the calling thread's network, the first thing that nobody can take along.
fn made_inside() -> Option<String> {
    const GET_TABLE: u16 = 10 << 8 | 1;
    const LIST_SETS: u16 = 6 << 8 | 7;
    /// struct nfgenmsg; then the version of the protocol.
    const SETS: [u8; 12] = [0, 0, 0, 0, 5, 0, 1, 0, 6, 0, 0, 0];
    const GET_STATE: u16 = 0x12;
    const GET_POLICY: u16 = 0x15;
    const GET_NEXT_HOP: u16 = 106;
    // None where the kernel has no such thing.
    let any = |protocol, kind, payload: &[u8]| {
        let socket = Socket::new(protocol);
        socket.and_then(|socket| list(&socket, kind, payload)).is_ok_and(|found| !found.is_empty())
    };
    for (protocol, kind, payload, name) in [
        (NETLINK_NETFILTER, GET_TABLE, &[0; 4][..], "packet filters (nftables)"),
        (NETLINK_NETFILTER, LIST_SETS, &SETS[..], "sets of addresses (ipset)"),
        (NETLINK_XFRM, GET_STATE, &[][..], "states of IPsec (ip xfrm state)"),
        (NETLINK_XFRM, GET_POLICY, &[][..], "policies of IPsec (ip xfrm policy)"),
        (NETLINK_ROUTE, GET_NEXT_HOP, &[0; 8][..], "next hops that routes share (ip nexthop)"),
    ] {
        if any(protocol, kind, payload) {
            return Some(name.to_owned());
        }
    }
    discipline().map(|name| format!("a queueing discipline, {name} (tc)"))
}

/// The name of one that was asked for: those that the kernel gives every device have no handle.
fn discipline() -> Option<String> {
    const GET_DISCIPLINE: u16 = 38;
    const HEAD: usize = 20;
    let found = Socket::new(NETLINK_ROUTE).and_then(|socket| list(&socket, GET_DISCIPLINE, &[0; HEAD])).ok()?;
    let made = found.iter().find(|message| message.get(8..12).is_some_and(|handle| handle != [0; 4]))?;
    // TCA_KIND comes first: length, number, text.
    let kind = made.get(HEAD + 4..).unwrap_or_default().split(|byte| *byte == 0).next().unwrap_or_default();
    Some(String::from_utf8_lossy(kind).into_owned())
}

/// What is not as it was afterwards: connections that the kernel tracks for packet filters which the pod had.
pub fn downgrade(spec: &Spec, init: i32) -> Option<Problem> {
    if !spec.security.may("NET_ADMIN") || spec.network.mode == NetworkMode::Host {
        return None;
    }
    let count = || Ok(fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count").unwrap_or_default());
    let count: u64 = within(init, Namespace::Network, count).ok()?.trim().parse().ok()?;
    let what = format!("{count} connections are tracked by the pod's own kernel; that begins anew");
    (count > 0)
        .then(|| Problem::new(TRACKED, what).fix("nothing, unless packet filters are made that ask for their state"))
}

impl State {
    fn read() -> Result<State> {
        let socket = open()?;
        let routes = listed(&socket, &ROUTE)?.into_iter().filter(is_made).collect();
        let (addresses, rules) = (listed(&socket, &ADDRESS)?, listed(&socket, &RULE)?);
        Ok(State { addresses, routes, rules, neighbours: neighbours(&socket)?, own: Vec::new() })
    }
}

/// Those that a program has made: the others come and go by themselves.
fn neighbours(socket: &Socket) -> Result<Vec<ByteBuf>> {
    let mut proxies = [0; 12];
    proxies[10] = NTF_PROXY;
    let mut found = listed_as(socket, &NEIGHBOUR, &[0; 12])?;
    found.retain(|message| message.get(8).is_some_and(|state| state & NUD_PERMANENT != 0));
    found.extend(listed_as(socket, &NEIGHBOUR, &proxies)?);
    Ok(found)
}

/// Not by the kernel itself.
fn is_made(route: &ByteBuf) -> bool {
    let flags = route.get(8..12).and_then(|four| four.first_chunk()).map_or(0, |four| u32::from_ne_bytes(*four));
    route.get(4) != Some(&RT_TABLE_LOCAL) && route.get(5) != Some(&RTPROT_KERNEL) && flags & RTM_F_CLONED == 0
}

/// In the network of a newborn pod.
pub fn restore(init: i32, state: &State, spec: &Spec) -> Result<()> {
    permitted(&spec.security, "NET_ADMIN", "addresses and routes of its own")?;
    within(init, Namespace::Network, || {
        let now = State::read()?;
        let State { addresses: had, routes, rules, neighbours, own } = state;
        // A copy that was given another address: what went by the first one's is not for it.
        let is_copy = *own != addresses(spec);
        let others =
            |address: &&ByteBuf| !is_copy || !ip_of(address).is_some_and(|ip| own.contains(&ip) || is_link_local(ip));
        let had: Vec<ByteBuf> = had.iter().filter(others).cloned().collect();
        let socket = open()?;
        for (kind, wanted, there) in [
            (&RULE, rules, &now.rules),
            (&ADDRESS, &had, &now.addresses),
            (&NEIGHBOUR, neighbours, &now.neighbours),
            (&ROUTE, routes, &now.routes),
        ] {
            let surplus: Vec<&ByteBuf> = there.iter().filter(|one| !is_copy && !wanted.contains(one)).collect();
            surplus.into_iter().try_for_each(|one| change(&socket, kind, false, one))?;
            // One may be the way to the next.
            let mut missing: Vec<&ByteBuf> = wanted.iter().filter(|one| !there.contains(one)).collect();
            while !missing.is_empty() {
                let before = missing.len();
                let mut last = Ok(());
                missing.retain(|one| {
                    let done = change(&socket, kind, true, one);
                    let failed = done.is_err();
                    if failed {
                        last = done;
                    }
                    failed
                });
                if missing.len() == before && is_copy {
                    tracing::warn!("{} of what the pod had made of its network do not fit its new address", before);
                    break;
                }
                if missing.len() == before {
                    return last;
                }
            }
        }
        Ok(())
    })
}

fn open() -> Result<Socket> {
    Socket::new(NETLINK_ROUTE).doing(|| "open a netlink socket".into())
}

fn listed(socket: &Socket, kind: &Kind) -> Result<Vec<ByteBuf>> {
    listed_as(socket, kind, &vec![0; kind.head])
}

fn listed_as(socket: &Socket, kind: &Kind, wanted: &[u8]) -> Result<Vec<ByteBuf>> {
    let found = list(socket, kind.new + 2, wanted).doing(|| "list what the pod's network has".into())?;
    Ok(found.iter().map(|message| ByteBuf::from(lasting(message, kind))).collect())
}

/// Without the attributes that tell of the moment.
fn lasting(message: &[u8], kind: &Kind) -> Vec<u8> {
    let (head, mut rest) = message.split_at(kind.head.min(message.len()));
    let mut kept = head.to_vec();
    while let (Some(length), Some(name)) = (rest.first_chunk(), rest.get(2..4).and_then(|two| two.first_chunk())) {
        let length = usize::from(u16::from_ne_bytes(*length)).next_multiple_of(4);
        let Some(attribute) = rest.get(..length).filter(|_| length >= 4) else { break };
        if !kind.passing.contains(&u16::from_ne_bytes(*name)) {
            kept.extend_from_slice(attribute);
        }
        rest = &rest[length..];
    }
    kept
}

fn is_link_local(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

/// Of an address's message: IFA_LOCAL, or else IFA_ADDRESS.
fn ip_of(message: &[u8]) -> Option<IpAddr> {
    let mut rest = message.get(ADDRESS.head..)?;
    let (mut address, mut local) = (None, None);
    while let (Some(length), Some(name)) = (rest.first_chunk(), rest.get(2..4).and_then(|two| two.first_chunk())) {
        let length = usize::from(u16::from_ne_bytes(*length));
        let Some(value) = rest.get(4..length) else { break };
        let ip = match value.len() {
            4 => value.first_chunk::<4>().map(|four| IpAddr::from(*four)),
            16 => value.first_chunk::<16>().map(|bytes| IpAddr::from(*bytes)),
            _ => None,
        };
        match u16::from_ne_bytes(*name) {
            1 => address = ip,
            2 => local = ip,
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    local.or(address)
}

/// Adds or takes away.
fn change(socket: &Socket, kind: &Kind, add: bool, message: &[u8]) -> Result<()> {
    let doing = || format!("{} what a program in the pod has made of its network", if add { "make" } else { "undo" });
    let flags = match (add, kind.new) {
        (false, _) => 0,
        (true, new) if new == ROUTE.new => CREATE | APPEND,
        (true, _) => CREATE | EXCLUSIVE,
    };
    let mut message = message.to_vec();
    if add && kind.new == ADDRESS.new {
        no_detection(&mut message);
    }
    let number = if add { kind.new } else { kind.new + 1 };
    send(socket, number, REQUEST | ACKNOWLEDGE | flags, &message).doing(doing)?;
    let (answer, _) = socket.recv_from_full().doing(doing)?;
    for (kind, payload) in messages_of(&answer) {
        let code = payload.first_chunk().map_or(0, |four| i32::from_ne_bytes(*four));
        if kind == ERROR && code != 0 {
            return Err(io::Error::from_raw_os_error(-code)).doing(doing);
        }
    }
    Ok(())
}

/// The address was the pod's before: to look for another who has it would take a second in which it cannot be used.
fn no_detection(message: &mut [u8]) {
    let mut at = ADDRESS.head;
    while let Some(length) = message.get(at..at + 2).and_then(|two| two.first_chunk()) {
        let length = usize::from(u16::from_ne_bytes(*length));
        let name = message.get(at + 2..at + 4).and_then(|two| two.first_chunk()).map(|two| u16::from_ne_bytes(*two));
        if name == Some(IFA_FLAGS) && length == 8 {
            message[at + 4] |= IFA_F_NODAD as u8;
        }
        at += length.max(4).next_multiple_of(4);
    }
}

fn send(socket: &Socket, kind: u16, flags: u16, payload: &[u8]) -> io::Result<()> {
    let mut bytes = ((HEADER + payload.len()) as u32).to_ne_bytes().to_vec();
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(&flags.to_ne_bytes());
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend_from_slice(payload);
    socket.send(&bytes, 0).map(drop)
}

fn list(socket: &Socket, kind: u16, payload: &[u8]) -> io::Result<Vec<Vec<u8>>> {
    send(socket, kind, REQUEST | DUMP, payload)?;
    let mut found = Vec::new();
    loop {
        let (answer, _) = socket.recv_from_full()?;
        for (kind, payload) in messages_of(&answer) {
            match kind {
                DONE => return Ok(found),
                ERROR => {
                    let code = payload.first_chunk().map_or(0, |four| i32::from_ne_bytes(*four));
                    return Err(io::Error::from_raw_os_error(-code));
                }
                _ => found.push(payload.to_vec()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passing_attributes_are_left_out() {
        let attribute = |name: u8, value: &[u8]| [&[4 + value.len() as u8, 0, name, 0][..], value].concat();
        let head = [2u8; 8];
        let message =
            [&head[..], &attribute(1, &[9; 4]), &attribute(6, &[7; 16]), &attribute(8, &[0x80, 0, 0, 0])].concat();
        let mut kept = lasting(&message, &ADDRESS);
        assert_eq!(kept, [&head[..], &attribute(1, &[9; 4]), &attribute(8, &[0x80, 0, 0, 0])].concat());
        no_detection(&mut kept);
        assert_eq!(kept[kept.len() - 4..], [0x82, 0, 0, 0]);
        lasting(&message[..11], &ADDRESS);
        assert_eq!(ip_of(&kept), Some(IpAddr::from([9; 4])));
    }

    #[test]
    fn the_kernels_own_routes_are_left_to_it() {
        let route = |table: u8, protocol: u8| ByteBuf::from([2, 0, 0, 0, table, protocol, 0, 1, 0, 0, 0, 0].to_vec());
        assert!(is_made(&route(254, 3)) && !is_made(&route(255, 3)) && !is_made(&route(254, 2)));
    }
}
