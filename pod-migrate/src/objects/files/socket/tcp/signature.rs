//! Keys of MD5 signatures (TCP_MD5SIG, RFC 2385): BGP speakers have one a neighbour. A socket does not give them back, but
//! sock_diag tells them to who may administer the network. They must be in place before a connection is made again: the
//! room for the signature is taken from each segment then.
//!
//! The device that a key may be bound to (TCP_MD5SIG_FLAG_IFINDEX) is told by nobody. A socket that neither listens nor is
//! connected cannot be asked for.

use super::super::address::{Endpoint, Family};
use super::super::diag::{Diag, SIGNATURE};
use super::{IPPROTO_TCP, Phase, State};
use libc::{AF_INET, AF_INET6};
use pod_runtime::sys::inet;
use pod_runtime::{Doing, Result};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;

/// Not in libc for this target.
const TCP_MD5SIG_EXT: i32 = 32;
const FLAG_PREFIX: u8 = 1;
/// TCP_MD5SIG_MAXKEYLEN.
const LONGEST: usize = 80;

/// The key for all peers of a network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Key {
    pub network: IpAddr,
    pub prefix: u8,
    pub key: ByteBuf,
}

impl Key {
    /// struct tcp_diag_md5sig: family, prefix, length, address, key.
    fn parse(bytes: &[u8]) -> Option<Key> {
        let bytes: &[u8; SIGNATURE] = bytes.try_into().ok()?;
        let (head, key) = bytes.split_at(20);
        let network = match i32::from(head[0]) {
            AF_INET => IpAddr::from(*head[4..].first_chunk::<4>()?),
            AF_INET6 => IpAddr::from(*head[4..].first_chunk::<16>()?),
            _ => return None,
        };
        let length = usize::from(u16::from_ne_bytes([head[2], head[3]]));
        Some(Key { network, prefix: head[1], key: ByteBuf::from(key.get(..length)?.to_vec()) })
    }

    /// struct tcp_md5sig for a socket of this family.
    fn bytes(&self, family: Family) -> Vec<u8> {
        let ip = match (family, self.network) {
            (Family::V6, IpAddr::V4(ip)) => IpAddr::V6(ip.to_ipv6_mapped()),
            (_, ip) => ip,
        };
        let key = &self.key[..self.key.len().min(LONGEST)];
        let mut bytes = Endpoint { ip, port: 0, scope: 0 }.bytes();
        bytes.resize(128, 0);
        bytes.extend_from_slice(&[FLAG_PREFIX, self.prefix]);
        bytes.extend_from_slice(&(key.len() as u16).to_ne_bytes());
        bytes.extend_from_slice(&0i32.to_ne_bytes());
        bytes.extend_from_slice(key);
        bytes.resize(136 + LONGEST, 0);
        bytes
    }
}

/// The keys of a socket that was read.
pub(in super::super) fn dump(diag: &Diag, fd: BorrowedFd<'_>, state: &State) -> Vec<Key> {
    let (local, peer) = match &state.phase {
        Phase::Listening { local, .. } => (local, None),
        Phase::Connecting { local, peer, .. } => (local, Some(peer)),
        Phase::Connected(connection) => (&connection.local, Some(&connection.peer)),
        Phase::Fresh { .. } | Phase::Ended { .. } => return Vec::new(),
    };
    match diag.signatures(fd, state.family.number(), local, peer) {
        Ok(keys) => keys.iter().filter_map(|key| Key::parse(key)).collect(),
        Err(error) => {
            // A kernel without it; a listener of a group, whose look-up finds another of the group.
            tracing::debug!(%error, "the keys of {local} cannot be asked for");
            Vec::new()
        }
    }
}

pub(super) fn restore(keys: &[Key], fd: BorrowedFd<'_>, family: Family) -> Result<()> {
    for key in keys {
        inet::set_option(fd, IPPROTO_TCP, TCP_MD5SIG_EXT, &key.bytes(family))
            .doing(|| format!("set the MD5 key for {}/{}", key.network, key.prefix))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_tells_is_what_it_is_told() {
        let mut told = vec![AF_INET as u8, 24, 3, 0, 10, 1, 2, 0];
        told.resize(20, 0);
        told.extend_from_slice(b"abc");
        told.resize(SIGNATURE, 0);
        let key = Key::parse(&told).unwrap();
        let wanted = Key { network: "10.1.2.0".parse().unwrap(), prefix: 24, key: ByteBuf::from(b"abc".to_vec()) };
        assert_eq!(key, wanted);
        let bytes = key.bytes(Family::V6);
        assert_eq!(
            (bytes.len(), &bytes[20..24], &bytes[128..136]),
            (216, &[10, 1, 2, 0][..], &[1, 24, 3, 0, 0, 0, 0, 0][..])
        );
        told[2] = 81;
        assert_eq!(Key::parse(&told), None);
    }
}
