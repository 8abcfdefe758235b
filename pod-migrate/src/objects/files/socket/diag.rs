//! What the kernel tells of one socket by sock_diag(7) and by no option of it: the keys of TCP's MD5 signatures, the
//! memberships of a packet socket.
//!
//! A TCP socket is asked for by its addresses, which is one look-up; packet sockets can only be listed all together.
//! The answers are read by hand: they are few, and of a fixed layout (linux/inet_diag.h, linux/packet_diag.h).

use super::address::Endpoint;
use netlink_sys::{Socket, protocols::NETLINK_SOCK_DIAG};
use pod_runtime::network::wire::inside;
use pod_runtime::sys::inet;
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
/// struct nlmsghdr.
const HEADER: usize = 16;
/// struct inet_diag_msg.
const INET_ANSWER: usize = 72;
const INET_DIAG_INFO: u16 = 2;
const INET_DIAG_MD5SIG: u16 = 18;
/// struct packet_diag_msg.
const PACKET_ANSWER: usize = 16;
const PACKET_SHOW_MCLIST: u32 = 2;
const PACKET_DIAG_MCLIST: u16 = 1;

/// struct tcp_diag_md5sig.
pub const SIGNATURE: usize = 100;
/// struct packet_diag_mclist.
pub const MEMBERSHIP: usize = 44;

/// A socket of sock_diag in the network namespace of the pod.
pub struct Diag(Socket);

impl std::fmt::Debug for Diag {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Diag")
    }
}

impl Diag {
    /// Of the namespace that this socket belongs to.
    pub fn of(fd: BorrowedFd<'_>) -> io::Result<Diag> {
        Diag::inside(inet::namespace(fd)?.as_fd())
    }

    /// Of a network namespace.
    pub fn inside(namespace: BorrowedFd<'_>) -> io::Result<Diag> {
        let opened = inside(namespace, || {
            let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
            socket.bind_auto()?;
            Ok(Diag(socket))
        });
        opened.map_err(|problem| io::Error::other(problem.chain()))?
    }

    /// The MD5 keys of a TCP socket that listens or is connected, a struct tcp_diag_md5sig each. An error when the kernel
    /// does not find the socket: one that is neither cannot be asked for.
    pub fn signatures(
        &self,
        fd: BorrowedFd<'_>,
        family: i32,
        local: &Endpoint,
        peer: Option<&Endpoint>,
    ) -> io::Result<Vec<Vec<u8>>> {
        let cookie = inet::option(fd, libc::SOL_SOCKET, libc::SO_COOKIE, &[], 8)?;
        let port = |end: Option<&Endpoint>| end.map_or(0, |end| end.port).to_be_bytes();
        let address = |end: Option<&Endpoint>| {
            let mut bytes = [0; 16];
            match end.map(|end| end.ip) {
                Some(std::net::IpAddr::V4(ip)) if family == libc::AF_INET => bytes[..4].copy_from_slice(&ip.octets()),
                Some(std::net::IpAddr::V4(ip)) => bytes = ip.to_ipv6_mapped().octets(),
                Some(std::net::IpAddr::V6(ip)) => bytes = ip.octets(),
                None => {}
            }
            bytes
        };
        let scope = local.scope.max(peer.map_or(0, |peer| peer.scope));
        // Keys come with INET_DIAG_INFO only.
        let mut request = vec![family as u8, libc::IPPROTO_TCP as u8, 1 << 1, 0];
        request.extend_from_slice(&u32::MAX.to_ne_bytes());
        request.extend_from_slice(&[port(Some(local)), port(peer)].concat());
        request.extend_from_slice(&[address(Some(local)), address(peer)].concat());
        request.extend_from_slice(&scope.to_ne_bytes());
        request.extend_from_slice(&cookie);
        let answers = self.ask(&request, NLM_F_REQUEST)?;
        let attributes = answers.first().and_then(|answer| answer.get(INET_ANSWER..)).unwrap_or_default();
        let keys = attributes_of(attributes).into_iter().filter(|(kind, _)| *kind == INET_DIAG_MD5SIG);
        Ok(keys.flat_map(|(_, keys)| keys.chunks_exact(SIGNATURE)).map(<[u8]>::to_vec).collect())
    }

    /// The established TCP connections at these ports of ours that have no descriptor: nobody has accepted them.
    pub fn unaccepted(&self, family: i32, port: u16) -> io::Result<Vec<(Endpoint, Endpoint)>> {
        /// Both before and after the peer's end.
        const STATES: u32 = 1 << 1 | 1 << 8;
        let mut request = vec![family as u8, libc::IPPROTO_TCP as u8, 0, 0];
        request.extend_from_slice(&STATES.to_ne_bytes());
        request.extend_from_slice(&port.to_be_bytes());
        request.resize(56, 0);
        let mut found = Vec::new();
        for answer in self.ask(&request, NLM_F_REQUEST | NLM_F_DUMP)? {
            let Some(connection) = parse_connection(&answer) else { continue };
            if connection.0.port == port && answer.get(68..72) == Some(&[0; 4]) {
                found.push(connection);
            }
        }
        Ok(found)
    }

    /// The TCP connections in these states (a bit each, by the kernel's number) that have no descriptor.
    pub fn without_descriptor(&self, family: i32, states: u32) -> io::Result<Vec<Told>> {
        let mut request = vec![family as u8, libc::IPPROTO_TCP as u8, 1 << (INET_DIAG_INFO - 1), 0];
        request.extend_from_slice(&states.to_ne_bytes());
        request.resize(56, 0);
        let answers = self.ask(&request, NLM_F_REQUEST | NLM_F_DUMP)?;
        Ok(answers.iter().filter_map(|answer| Told::parse(answer)).collect())
    }

    /// The memberships of all packet sockets by inode number, a struct packet_diag_mclist each.
    pub fn memberships(&self) -> io::Result<HashMap<u64, Vec<Vec<u8>>>> {
        let mut request = vec![libc::AF_PACKET as u8, 0, 0, 0];
        request.extend_from_slice(&0u32.to_ne_bytes());
        request.extend_from_slice(&PACKET_SHOW_MCLIST.to_ne_bytes());
        request.extend_from_slice(&[0xff; 8]);
        let mut all = HashMap::new();
        for answer in self.ask(&request, NLM_F_REQUEST | NLM_F_DUMP)? {
            let Some(inode) = answer.get(4..8).and_then(|four| four.first_chunk()) else { continue };
            let attributes = answer.get(PACKET_ANSWER..).unwrap_or_default();
            let lists = attributes_of(attributes).into_iter().filter(|(kind, _)| *kind == PACKET_DIAG_MCLIST);
            let members = lists.flat_map(|(_, list)| list.chunks_exact(MEMBERSHIP)).map(<[u8]>::to_vec);
            all.insert(u64::from(u32::from_ne_bytes(*inode)), members.collect());
        }
        Ok(all)
    }

    /// The payloads of the answers.
    fn ask(&self, request: &[u8], flags: u16) -> io::Result<Vec<Vec<u8>>> {
        let mut bytes = ((HEADER + request.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        bytes.extend_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(request);
        self.0.send(&bytes, 0)?;
        let mut answers = Vec::new();
        loop {
            let (answer, _) = self.0.recv_from_full()?;
            for (kind, payload) in messages_of(&answer) {
                match kind {
                    NLMSG_DONE => return Ok(answers),
                    NLMSG_ERROR => {
                        let code = payload.first_chunk().map_or(0, |four| i32::from_ne_bytes(*four));
                        return Err(io::Error::from_raw_os_error(-code));
                    }
                    _ => answers.push(payload.to_vec()),
                }
            }
            if flags & NLM_F_DUMP == 0 {
                return Ok(answers);
            }
        }
    }
}

/// A connection without a descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    pub local: Endpoint,
    pub peer: Endpoint,
    /// The kernel's number.
    pub state: u8,
    /// Bytes that the peer has not acknowledged; a FIN is one.
    pub unacknowledged: u32,
    /// struct tcp_info. Nothing of one that waits for the peer's FIN only, of which the kernel keeps little more than its
    /// numbers.
    pub info: Vec<u8>,
}

impl Told {
    /// Of a struct inet_diag_msg and what follows. None if it has a descriptor.
    fn parse(answer: &[u8]) -> Option<Told> {
        let (local, peer) = parse_connection(answer)?;
        let word = |at: usize| Some(u32::from_ne_bytes(*answer.get(at..at + 4)?.first_chunk()?));
        if word(68)? != 0 {
            return None;
        }
        let attributes = attributes_of(answer.get(INET_ANSWER..).unwrap_or_default());
        let info = attributes.into_iter().find(|(kind, _)| *kind == INET_DIAG_INFO).map(|(_, info)| info.to_vec());
        Some(Told { local, peer, state: *answer.get(1)?, unacknowledged: word(60)?, info: info.unwrap_or_default() })
    }
}

/// Our end and the peer's, of a struct inet_diag_msg.
fn parse_connection(answer: &[u8]) -> Option<(Endpoint, Endpoint)> {
    let family = i32::from(*answer.first()?);
    let scope = u32::from_ne_bytes(*answer.get(40..44)?.first_chunk()?);
    let end = |port: usize, address: usize| {
        let port = u16::from_be_bytes(*answer.get(port..)?.first_chunk()?);
        let bytes: &[u8; 16] = answer.get(address..)?.first_chunk()?;
        let ip = match family {
            libc::AF_INET => std::net::IpAddr::from(*bytes.first_chunk::<4>()?),
            _ => std::net::IpAddr::from(*bytes),
        };
        Some(Endpoint { ip, port, scope: if family == libc::AF_INET { 0 } else { scope } })
    };
    Some((end(4, 8)?, end(6, 24)?))
}

/// Type and payload of each netlink message.
pub(crate) fn messages_of(mut rest: &[u8]) -> Vec<(u16, &[u8])> {
    let mut found = Vec::new();
    while let (Some(length), Some(kind)) = (rest.first_chunk(), rest.get(4..6).and_then(|two| two.first_chunk())) {
        let length = u32::from_ne_bytes(*length) as usize;
        let Some(payload) = rest.get(HEADER..length) else { break };
        found.push((u16::from_ne_bytes(*kind), payload));
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

/// Type and value of each attribute.
fn attributes_of(mut rest: &[u8]) -> Vec<(u16, &[u8])> {
    let mut found = Vec::new();
    while let (Some(length), Some(kind)) = (rest.first_chunk(), rest.get(2..4).and_then(|two| two.first_chunk())) {
        let length = usize::from(u16::from_ne_bytes(*length));
        let Some(value) = rest.get(4..length) else { break };
        found.push((u16::from_ne_bytes(*kind), value));
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn attributes_by_their_lengths() {
        let bytes = [&[6u8, 0, 1, 0, 7, 8, 0, 0][..], &[4, 0, 2, 0], &[3, 0, 9, 9]].concat();
        assert_eq!(attributes_of(&bytes), [(1, &[7u8, 8][..]), (2, &[][..])]);
    }

    proptest! {
        #[test]
        fn whatever_comes_is_read(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            messages_of(&bytes);
            attributes_of(&bytes);
        }
    }
}
