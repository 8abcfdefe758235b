//! What a pod that may administer its network has made of it: addresses, routes of every table, rules. They are kept in
//! the kernel's own messages, as ip-route(8) saves them, and compared with what the newborn pod has: what it lacks is
//! added, what it should not have is taken away.
//!
//! Routes that the kernel makes by itself (of addresses) are left to it. Other devices than the pod's own and packet
//! filters are refused. Neighbours, queueing disciplines and tracked connections come anew.

use super::{Namespace, permitted, within};
use crate::objects::files::socket::diag::messages_of;
use crate::{Doing, Problem, Result};
use netlink_sys::Socket;
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use pod_runtime::spec::{NetworkMode, Spec};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::fs;
use std::io;
use std::net::IpAddr;

/// A device or a packet filter that a program in the pod has made.
pub const INSIDE: &str = "E-NETWORK-INSIDE";

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

const IFA_CACHEINFO: u16 = 6;
const IFA_FLAGS: u16 = 8;
const IFA_F_NODAD: u32 = 2;
const RTA_CACHEINFO: u16 = 12;
const RTPROT_KERNEL: u8 = 2;
const RT_TABLE_LOCAL: u8 = 255;
const RTM_F_CLONED: u32 = 0x200;

/// Each the kernel's message without its header. Record NETWORK.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub addresses: Vec<ByteBuf>,
    pub routes: Vec<ByteBuf>,
    pub rules: Vec<ByteBuf>,
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
    match within(init, Namespace::Network, || Ok(has_filter())) {
        Ok(true) => refusal("a program in the pod has made packet filters (nftables)".into()),
        Ok(false) => None,
        Err(problem) => Some(problem),
    }
}

/// Whether there is any table of nftables; none where the kernel has no such thing.
fn has_filter() -> bool {
    const GET_TABLE: u16 = 10 << 8 | 1;
    let socket = Socket::new(NETLINK_NETFILTER);
    socket.and_then(|socket| list(&socket, GET_TABLE, &[0; 4])).is_ok_and(|found| !found.is_empty())
}

impl State {
    fn read() -> Result<State> {
        let socket = open()?;
        let routes = listed(&socket, &ROUTE)?.into_iter().filter(is_made).collect();
        Ok(State { addresses: listed(&socket, &ADDRESS)?, routes, rules: listed(&socket, &RULE)?, own: Vec::new() })
    }
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
        let State { addresses: had, routes, rules, own } = state;
        // A copy that was given another address: what went by the first one's is not for it.
        let is_copy = *own != addresses(spec);
        let others =
            |address: &&ByteBuf| !is_copy || !ip_of(address).is_some_and(|ip| own.contains(&ip) || is_link_local(ip));
        let had: Vec<ByteBuf> = had.iter().filter(others).cloned().collect();
        let socket = open()?;
        for (kind, wanted, there) in
            [(&RULE, rules, &now.rules), (&ADDRESS, &had, &now.addresses), (&ROUTE, routes, &now.routes)]
        {
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
    let found = list(socket, kind.new + 2, &vec![0; kind.head]).doing(|| "list what the pod's network has".into())?;
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
