//! Netlink sockets of every family: port id, groups, options. Messages that wait to be read are not kept: they told
//! of the source host's kernel. A warning says so.

use super::options::Options;
use libc::{AF_NETLINK, SOCK_RAW, SOL_NETLINK};
use pod_runtime::sys::inet;
use pod_runtime::{Doing, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

const LIST_MEMBERSHIPS: i32 = 9;
/// Option numbers with one int: PKTINFO, BROADCAST_ERROR, NO_ENOBUFS, LISTEN_ALL_NSID, CAP_ACK, EXT_ACK, STRICT_CHK.
const NUMBERS: &[i32] = &[3, 4, 5, 8, 10, 11, 12];

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub protocol: i32,
    /// 0 for a socket that was never bound.
    pub port: u32,
    /// The destination of connect(2): port id and groups.
    pub peer: Option<(u32, u32)>,
    pub groups: Vec<u32>,
    pub numbers: BTreeMap<i32, i32>,
    pub options: Options,
}

/// `struct sockaddr_nl`.
fn address(port: u32, groups: u32) -> Vec<u8> {
    let mut bytes = (AF_NETLINK as u16).to_ne_bytes().to_vec();
    bytes.extend_from_slice(&[0; 2]);
    bytes.extend_from_slice(&port.to_ne_bytes());
    bytes.extend_from_slice(&groups.to_ne_bytes());
    bytes
}

fn parse(bytes: &[u8]) -> Option<(u32, u32)> {
    let word = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    Some((word(4)?, word(8)?))
}

pub fn dump(fd: BorrowedFd<'_>, protocol: i32, subject: &str, warnings: &mut Vec<String>) -> Result<State> {
    let (port, _) = inet::local_address(fd).ok().and_then(|bytes| parse(&bytes)).unwrap_or((0, 0));
    let peer = inet::peer_address(fd).ok().and_then(|bytes| parse(&bytes)).filter(|peer| *peer != (0, 0));
    let words = inet::option(fd, SOL_NETLINK, LIST_MEMBERSHIPS, &[], 512).unwrap_or_default();
    let mut groups = Vec::new();
    for (at, word) in words.chunks_exact(4).enumerate() {
        let word = u32::from_ne_bytes(word.try_into().expect("four bytes"));
        groups.extend((0..32).filter(|bit| word & (1 << bit) != 0).map(|bit| at as u32 * 32 + bit + 1));
    }
    let numbers = NUMBERS.iter().filter_map(|name| Some((*name, inet::number(fd, SOL_NETLINK, *name).ok()?))).collect();
    if inet::poll_now(fd, libc::POLLIN).doing(|| "poll a socket".into())? != 0 {
        warnings.push(format!("{subject}: kernel messages that wait in a netlink socket are not kept"));
    }
    Ok(State { protocol, port, peer, groups, numbers, options: Options::dump(fd, &[], subject)? })
}

pub fn restore(state: &State) -> Result<OwnedFd> {
    let State { protocol, port, peer, groups, numbers, options } = state;
    let socket = inet::socket(AF_NETLINK, SOCK_RAW, *protocol)
        .doing(|| format!("make a netlink socket of family {protocol}"))?;
    let fd = socket.as_fd();
    options.before_bind(fd, true)?;
    if *port != 0 {
        inet::bind(fd, &address(*port, 0)).doing(|| format!("bind a netlink socket to {port}"))?;
    }
    for group in groups {
        const ADD_MEMBERSHIP: i32 = 1;
        let joined = inet::set_number(fd, SOL_NETLINK, ADD_MEMBERSHIP, *group as i32);
        joined.doing(|| format!("join netlink group {group} of family {protocol}"))?;
    }
    if let Some((port, groups)) = peer {
        inet::connect(fd, &address(*port, *groups)).doing(|| "connect a netlink socket".into())?;
    }
    for (name, value) in numbers {
        if inet::number(fd, SOL_NETLINK, *name).ok() != Some(*value) {
            let _ = inet::set_number(fd, SOL_NETLINK, *name, *value);
        }
    }
    options.after_bind(fd)?;
    options.last(fd)?;
    Ok(socket)
}
