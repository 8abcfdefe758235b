//! Raw IP sockets and packet sockets: what they are bound to, their filters and options. Packets that wait to be read
//! are not kept, which is said: they are a watcher's view of traffic, which may always lose some.

use super::address::{Endpoint, Family};
use super::diag::Diag;
use super::options::Options;
use libc::{AF_PACKET, SOCK_RAW, SOL_PACKET, SOL_RAW, c_int};
use pod_runtime::sys::inet;
use pod_runtime::{Doing, Problem, Result};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

const ICMP_FILTER: c_int = 1;
const ICMPV6_FILTER: c_int = 1;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RawState {
    pub family: Family,
    pub protocol: i32,
    pub options: Options,
    pub local: Option<Endpoint>,
    pub peer: Option<Endpoint>,
    /// Which ICMP types are dropped.
    pub icmp_filter: Option<ByteBuf>,
}

/// Says that packets are lost, if any wait.
fn warn_of_queue(fd: BorrowedFd<'_>, subject: &str, warnings: &mut Vec<String>) -> Result<()> {
    if inet::poll_now(fd, libc::POLLIN).doing(|| "poll a socket".into())? & libc::POLLIN != 0 {
        warnings.push(format!("{subject}: packets that wait in a raw socket are not kept"));
    }
    Ok(())
}

pub fn dump_raw(
    fd: BorrowedFd<'_>,
    family: Family,
    protocol: i32,
    subject: &str,
    warnings: &mut Vec<String>,
) -> Result<RawState> {
    warn_of_queue(fd, subject, warnings)?;
    let local = inet::local_address(fd).ok().and_then(|bytes| Endpoint::parse(&bytes));
    let peer = inet::peer_address(fd).ok().and_then(|bytes| Endpoint::parse(&bytes));
    let filter = match family {
        Family::V4 => inet::option(fd, SOL_RAW, ICMP_FILTER, &[], 4),
        Family::V6 => inet::option(fd, libc::IPPROTO_ICMPV6, ICMPV6_FILTER, &[], 32),
    };
    Ok(RawState {
        family,
        protocol,
        options: Options::dump(fd, &[], subject)?,
        // The kernel shows the protocol as the port.
        local: local.filter(|local| !local.ip.is_unspecified()),
        peer,
        icmp_filter: filter.ok().map(ByteBuf::from),
    })
}

pub fn restore_raw(state: &RawState) -> Result<OwnedFd> {
    let RawState { family, protocol, options, local, peer, icmp_filter } = state;
    let socket = inet::socket(family.number(), SOCK_RAW, *protocol);
    let socket = socket.doing(|| format!("make a raw socket of protocol {protocol}"))?;
    let fd = socket.as_fd();
    options.before_bind(fd, true)?;
    if let Some(local) = local {
        inet::bind(fd, &local.bytes()).doing(|| format!("bind a raw socket to {}", local.ip))?;
    }
    if let Some(peer) = peer {
        inet::connect(fd, &peer.bytes()).doing(|| format!("connect a raw socket to {}", peer.ip))?;
    }
    if let Some(filter) = icmp_filter {
        let (level, name) = match family {
            Family::V4 => (SOL_RAW, ICMP_FILTER),
            Family::V6 => (libc::IPPROTO_ICMPV6, ICMPV6_FILTER),
        };
        let _ = inet::set_option(fd, level, name, filter);
    }
    options.after_bind(fd)?;
    options.last(fd)?;
    Ok(socket)
}

/// Of packet(7), with one int each: AUXDATA, ORIGDEV, VERSION, RESERVE, LOSS, VNET_HDR, TIMESTAMP, IGNORE_OUTGOING.
const PACKET_NUMBERS: &[c_int] = &[8, 9, 10, 12, 14, 15, 17, 23];
const PACKET_FANOUT: c_int = 18;
/// Groups whose program nobody gives back: PACKET_FANOUT_CBPF and PACKET_FANOUT_EBPF.
const FANOUT_PROGRAMS: [i32; 2] = [6, 7];
/// Its number was chosen by the kernel, which now is to be given it.
const FANOUT_UNIQUE_ID: i32 = 0x20 << 24;
const PACKET_ADD_MEMBERSHIP: c_int = 1;
/// More than once, one membership is counted. A program that asks for more has lost count.
const MOST_TIMES: u32 = 4096;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PacketState {
    /// SOCK_RAW or SOCK_DGRAM.
    pub kind: i32,
    /// EtherType in host order.
    pub protocol: u16,
    /// 0 for all.
    pub device: i32,
    pub numbers: BTreeMap<i32, i32>,
    pub options: Options,
    #[serde(default)]
    pub memberships: Vec<Membership>,
    /// PACKET_FANOUT: number, kind and flags of the group; 0 for none.
    #[serde(default)]
    pub fanout: i32,
}

/// Multicast groups, other addresses, promiscuous mode of a device (PACKET_ADD_MEMBERSHIP).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Membership {
    pub device: i32,
    /// PACKET_MR_PROMISC and its like.
    pub kind: u16,
    pub address: ByteBuf,
    pub times: u32,
}

impl Membership {
    /// struct packet_diag_mclist: device, times, kind, length, address.
    fn parse(bytes: &[u8]) -> Option<Membership> {
        let four = |at: usize| bytes.get(at..at + 4)?.first_chunk().copied();
        let two = |at: usize| bytes.get(at..at + 2)?.first_chunk().map(|two| u16::from_ne_bytes(*two));
        Some(Membership {
            device: i32::from_ne_bytes(four(0)?),
            times: u32::from_ne_bytes(four(4)?),
            kind: two(8)?,
            address: ByteBuf::from(bytes.get(12..12 + usize::from(two(10)?))?.to_vec()),
        })
    }

    /// struct packet_mreq, with room for the longest address.
    fn bytes(&self) -> Vec<u8> {
        let Membership { device, kind, address, times: _ } = self;
        let address = &address[..address.len().min(32)];
        let mut bytes = device.to_ne_bytes().to_vec();
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&(address.len() as u16).to_ne_bytes());
        bytes.extend_from_slice(address);
        bytes.resize(8 + 32, 0);
        bytes
    }
}

/// Those of the socket with this inode number.
pub(super) fn memberships(diag: Option<&Diag>, inode: u64, subject: &str) -> Result<Vec<Membership>> {
    let listed = match diag {
        Some(diag) => diag.memberships(),
        None => Err(std::io::Error::from_raw_os_error(libc::ENOENT)),
    };
    let listed = listed.map_err(|error| {
        let what = format!("{subject}: the kernel does not tell what this packet socket listens to");
        Problem::new("E-SOCKET-PACKET", what).because(error).fix("load the module af_packet_diag")
    })?;
    Ok(listed.get(&inode).into_iter().flatten().filter_map(|bytes| Membership::parse(bytes)).collect())
}

pub fn dump_packet(fd: BorrowedFd<'_>, kind: i32, subject: &str) -> Result<PacketState> {
    let fanout = inet::number(fd, SOL_PACKET, PACKET_FANOUT).unwrap_or(0);
    if fanout != 0 && FANOUT_PROGRAMS.contains(&(fanout >> 16 & 0xff)) {
        let what = format!("{subject}: a packet socket in a fanout group that a program divides");
        return Err(Problem::new("E-SOCKET-PACKET", what).fix("leave the group before the move"));
    }
    let address = inet::local_address(fd).doing(|| format!("{subject}: read its address"))?;
    let protocol = address.get(2..4).map_or(0, |two| u16::from_be_bytes([two[0], two[1]]));
    let device = address.get(4..8).map_or(0, |four| i32::from_ne_bytes(four.try_into().expect("four bytes")));
    let numbers =
        PACKET_NUMBERS.iter().filter_map(|name| Some((*name, inet::number(fd, SOL_PACKET, *name).ok()?))).collect();
    let options = Options::dump(fd, &[], subject)?;
    Ok(PacketState { kind, protocol, device, numbers, options, memberships: Vec::new(), fanout })
}

pub fn restore_packet(state: &PacketState) -> Result<OwnedFd> {
    let PacketState { kind, protocol, device, numbers, options, memberships, fanout } = state;
    // Protocol 0 at first: nothing is received until it is bound.
    let socket = inet::socket(AF_PACKET, *kind, 0).doing(|| "make a packet socket".into())?;
    let fd = socket.as_fd();
    options.before_bind(fd, true)?;
    for (name, value) in numbers {
        if inet::number(fd, SOL_PACKET, *name).ok() != Some(*value) {
            let _ = inet::set_number(fd, SOL_PACKET, *name, *value);
        }
    }
    options.after_bind(fd)?;
    if *protocol != 0 || *device != 0 {
        let mut address = (AF_PACKET as u16).to_ne_bytes().to_vec();
        address.extend_from_slice(&protocol.to_be_bytes());
        address.extend_from_slice(&device.to_ne_bytes());
        address.resize(20, 0);
        inet::bind(fd, &address).doing(|| format!("bind a packet socket to device {device}"))?;
    }
    // The kernel lists the latest first.
    for membership in memberships.iter().rev() {
        for _ in 0..membership.times.min(MOST_TIMES) {
            inet::set_option(fd, SOL_PACKET, PACKET_ADD_MEMBERSHIP, &membership.bytes())
                .doing(|| format!("have a packet socket listen on device {}", membership.device))?;
        }
    }
    if *fanout != 0 {
        inet::set_number(fd, SOL_PACKET, PACKET_FANOUT, fanout & !FANOUT_UNIQUE_ID)
            .doing(|| "put a packet socket into its fanout group".into())?;
    }
    options.last(fd)?;
    Ok(socket)
}
