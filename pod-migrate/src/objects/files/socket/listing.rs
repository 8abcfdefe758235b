//! What the kernel lists of a socket's network namespace in /proc/net and does not tell by the socket itself: the peer
//! of a connection that is still being made, the multicast groups of its devices.

use libc::{AF_INET, AF_INET6};
use pod_runtime::network::wire::inside;
use pod_runtime::sys::inet;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;

/// A file of /proc/net as the socket's namespace has it.
fn read(fd: BorrowedFd<'_>, name: &str) -> io::Result<String> {
    let namespace = inet::namespace(fd)?;
    let text = inside(namespace.as_fd(), || std::fs::read_to_string(format!("/proc/thread-self/net/{name}")));
    text.map_err(|problem| io::Error::other(problem.chain()))?
}

/// The peer's address of a TCP socket, as the kernel's sockaddr, found by the socket's inode number.
pub fn peer_of(fd: BorrowedFd<'_>) -> io::Result<inet::Address> {
    let file = std::fs::File::from(fd.try_clone_to_owned()?);
    let inode = file.metadata()?.ino().to_string();
    for name in ["tcp", "tcp6"] {
        for line in read(fd, name)?.lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            if fields.get(9) == Some(&inode.as_str())
                && let Some(address) = fields.get(2).and_then(|field| parse_address(field))
            {
                return Ok(address);
            }
        }
    }
    Err(io::Error::from_raw_os_error(libc::ENOTCONN))
}

/// "0100007F:0050", words in the byte order of the host.
fn parse_address(field: &str) -> Option<inet::Address> {
    let (ip, port) = field.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let words: Option<Vec<u8>> = (0..ip.len() / 8)
        .map(|at| u32::from_str_radix(ip.get(at * 8..at * 8 + 8)?, 16).ok())
        .map(|word| word.map(u32::to_ne_bytes))
        .try_fold(Vec::new(), |mut bytes, word| {
            bytes.extend_from_slice(&word?);
            Some(bytes)
        });
    let words = words?;
    let mut address = Vec::with_capacity(28);
    match words.len() {
        4 => {
            address.extend_from_slice(&(AF_INET as u16).to_ne_bytes());
            address.extend_from_slice(&port.to_be_bytes());
            address.extend_from_slice(&words);
            address.extend_from_slice(&[0; 8]);
        }
        16 => {
            address.extend_from_slice(&(AF_INET6 as u16).to_ne_bytes());
            address.extend_from_slice(&port.to_be_bytes());
            address.extend_from_slice(&[0; 4]);
            address.extend_from_slice(&words);
            address.extend_from_slice(&[0; 4]);
        }
        _ => return None,
    }
    Some(address)
}

/// IPv4 groups that devices of the namespace are in, with the device's index.
pub fn groups_v4(fd: BorrowedFd<'_>) -> io::Result<Vec<(u32, Ipv4Addr)>> {
    let text = read(fd, "igmp")?;
    let mut device = 0;
    let mut found = Vec::new();
    for line in text.lines().skip(1) {
        let first = line.split_whitespace().next().unwrap_or_default();
        if line.starts_with(|c: char| c.is_ascii_digit()) {
            device = first.parse().unwrap_or(0);
        } else if let Ok(group) = u32::from_str_radix(first, 16) {
            found.push((device, Ipv4Addr::from(group.to_ne_bytes())));
        }
    }
    Ok(found)
}

/// IPv6 groups that devices of the namespace are in, with the device's index.
pub fn groups_v6(fd: BorrowedFd<'_>) -> io::Result<Vec<(u32, Ipv6Addr)>> {
    let mut found = Vec::new();
    for line in read(fd, "igmp6")?.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if let (Some(Ok(device)), Some(Ok(group))) =
            (fields.first().map(|f| f.parse()), fields.get(2).map(|f| u128::from_str_radix(f, 16)))
        {
            found.push((device, Ipv6Addr::from(group)));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::super::address::Endpoint;
    use super::*;

    #[test]
    fn addresses_of_proc_net() {
        let v4 = Endpoint::parse(&parse_address("0100007F:0050").unwrap()).unwrap();
        assert_eq!(v4.to_string(), "127.0.0.1:80");
        let v6 = parse_address("00000000000000000000000001000000:1F90").unwrap();
        assert_eq!(Endpoint::parse(&v6).unwrap().to_string(), "[::1]:8080");
        assert!(parse_address("01:0050").is_none() && parse_address("zz").is_none());
    }
}
