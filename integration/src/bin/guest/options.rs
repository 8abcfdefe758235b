//! Options of sockets that are not connected: everything that a program can set and read back is as it was.

use crate::{Guest, sys};
use anyhow::{Result, bail};
use libc::{AF_INET, AF_INET6, AF_UNIX, IPPROTO_IP as IP, IPPROTO_IPV6 as V6, IPPROTO_TCP as TCP, SOL_SOCKET as ANY};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use std::os::fd::{AsRawFd, OwnedFd};

struct Options {
    /// Name, socket, and what it answered to every option that it knows.
    sockets: Vec<(&'static str, OwnedFd, Vec<Answer>)>,
}

/// Level, number, value.
type Answer = (i32, i32, Vec<u8>);

/// Levels and their highest numbers.
const LEVELS: [(i32, i32); 5] = [(ANY, 84), (IP, 52), (V6, 79), (TCP, 45), (libc::IPPROTO_UDP, 104)];

/// What tells of the moment, of the route, or takes what it tells.
const PASSING: &[(i32, i32)] = &[
    (ANY, libc::SO_ERROR),
    (ANY, libc::SO_INCOMING_CPU),
    (ANY, libc::SO_INCOMING_NAPI_ID),
    (ANY, libc::SO_COOKIE),
    (ANY, libc::SO_MEMINFO),
    (ANY, libc::SO_PEERPIDFD),
    (ANY, libc::SO_PEERCRED),
    (IP, 9),
    (V6, 6),
    (TCP, libc::TCP_INFO),
    (TCP, libc::TCP_CC_INFO),
    (TCP, libc::TCP_REPAIR_WINDOW),
    (TCP, libc::TCP_QUEUE_SEQ),
    (TCP, libc::TCP_TIMESTAMP),
];

/// (level, number, value) of a family's or protocol's own; IPv4 and IPv6 have what both have from ANY_SET.
const ANY_SET: &[(i32, i32, i32)] = &[
    (ANY, libc::SO_KEEPALIVE, 1),
    (ANY, libc::SO_BROADCAST, 1),
    (ANY, libc::SO_DONTROUTE, 1),
    (ANY, libc::SO_OOBINLINE, 1),
    (ANY, libc::SO_PRIORITY, 3),
    (ANY, libc::SO_RCVLOWAT, 5),
    (ANY, libc::SO_SNDBUF, 30000),
    (ANY, libc::SO_RCVBUF, 40000),
    (ANY, libc::SO_SELECT_ERR_QUEUE, 1),
    (ANY, libc::SO_TIMESTAMPNS, 1),
    (ANY, libc::SO_PASSSEC, 1),
    (ANY, 43, 1),
    (ANY, 75, 1),
    (ANY, 82, 1),
];
const V4_SET: &[(i32, i32, i32)] = &[
    (IP, libc::IP_TOS, 0x10),
    (IP, libc::IP_TTL, 33),
    (IP, libc::IP_MTU_DISCOVER, 2),
    (IP, libc::IP_RECVERR, 1),
    (IP, libc::IP_RECVTTL, 1),
    (IP, libc::IP_RECVTOS, 1),
    (IP, libc::IP_PKTINFO, 1),
    (IP, libc::IP_FREEBIND, 1),
    (IP, libc::IP_MINTTL, 3),
    (IP, libc::IP_RETOPTS, 1),
    (IP, 23, 1),
    (IP, 26, 1),
];
const V6_SET: &[(i32, i32, i32)] = &[
    (V6, libc::IPV6_UNICAST_HOPS, 9),
    (V6, libc::IPV6_MTU_DISCOVER, 3),
    (V6, libc::IPV6_RECVERR, 1),
    (V6, libc::IPV6_V6ONLY, 1),
    (V6, libc::IPV6_RECVPKTINFO, 1),
    (V6, libc::IPV6_RECVHOPLIMIT, 1),
    (V6, libc::IPV6_RECVTCLASS, 1),
    (V6, libc::IPV6_TCLASS, 0x20),
    (V6, 11, 1),
    (V6, 31, 1),
    (V6, 33, 1),
];
const TCP_SET: &[(i32, i32, i32)] = &[
    (TCP, libc::TCP_NODELAY, 1),
    (TCP, libc::TCP_MAXSEG, 1000),
    (TCP, libc::TCP_KEEPIDLE, 77),
    (TCP, libc::TCP_KEEPINTVL, 78),
    (TCP, libc::TCP_KEEPCNT, 7),
    (TCP, libc::TCP_SYNCNT, 3),
    (TCP, libc::TCP_LINGER2, 50),
    (TCP, libc::TCP_DEFER_ACCEPT, 5),
    (TCP, libc::TCP_WINDOW_CLAMP, 20000),
    (TCP, libc::TCP_USER_TIMEOUT, 9999),
    (TCP, libc::TCP_NOTSENT_LOWAT, 12345),
    (TCP, libc::TCP_CORK, 1),
    (TCP, 44, 5000),
];
const UNIX_SET: &[(i32, i32, i32)] = &[(ANY, libc::SO_PASSCRED, 1), (ANY, 76, 1)];

fn answers(fd: &OwnedFd) -> Vec<Answer> {
    let mut answers = Vec::new();
    for (level, highest) in LEVELS {
        for number in (1..=highest).filter(|number| !PASSING.contains(&(level, *number))) {
            if let Ok(value) = sys::option(fd.as_raw_fd(), level, number) {
                answers.push((level, number, value));
            }
        }
    }
    answers
}

fn made(family: i32, kind: SockType, sets: &[&[(i32, i32, i32)]]) -> Result<OwnedFd> {
    let family = AddressFamily::from_i32(family).unwrap_or(AddressFamily::Unix);
    let fd = socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?;
    for (level, number, value) in sets.iter().flat_map(|set| set.iter()) {
        // What this kernel does not know is not there afterwards either.
        let _ = sys::set_option(fd.as_raw_fd(), *level, *number, &value.to_ne_bytes());
    }
    let _ = sys::set_option(fd.as_raw_fd(), ANY, libc::SO_LINGER, &[1, 0, 0, 0, 7, 0, 0, 0]);
    Ok(fd)
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let tcp = made(AF_INET, SockType::Stream, &[ANY_SET, V4_SET, TCP_SET])?;
    sys::set_option(tcp.as_raw_fd(), TCP, libc::TCP_CONGESTION, b"reno")?;
    let udp = made(AF_INET, SockType::Datagram, &[ANY_SET, V4_SET])?;
    sys::set_option(udp.as_raw_fd(), IP, libc::IP_MULTICAST_IF, &[127, 0, 0, 1])?;
    let made = [
        ("tcp", tcp),
        ("udp", udp),
        ("tcp6", made(AF_INET6, SockType::Stream, &[ANY_SET, V6_SET, TCP_SET])?),
        ("udp6", made(AF_INET6, SockType::Datagram, &[ANY_SET, V6_SET])?),
        ("unix", made(AF_UNIX, SockType::Stream, &[ANY_SET, UNIX_SET])?),
    ];
    let sockets = made.into_iter().map(|(name, fd)| {
        let known = answers(&fd);
        (name, fd, known)
    });
    Ok(Box::new(Options { sockets: sockets.collect() }))
}

impl Guest for Options {
    fn verify(&mut self) -> Result<()> {
        for (name, fd, before) in &self.sockets {
            let now = answers(fd);
            if now != *before {
                let differ: Vec<_> = before.iter().filter(|answer| !now.contains(answer)).collect();
                bail!("options of {name} that are something else now (level, number, before): {differ:?}");
            }
        }
        Ok(())
    }
}
