//! Packet sockets: which device they listen on, promiscuous mode and multicast memberships, a fanout group.

use crate::{Guest, sys};
use anyhow::{Result, ensure};
use libc::SOL_PACKET;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use std::os::fd::{AsRawFd, OwnedFd};

const ADD: i32 = libc::PACKET_ADD_MEMBERSHIP;
const FANOUT: i32 = 18;
/// The loopback device.
const DEVICE: i32 = 1;

struct Packets {
    listener: OwnedFd,
    group: [OwnedFd; 2],
    fanout: Vec<u8>,
    listed: Vec<u8>,
}

fn packet_socket() -> Result<OwnedFd> {
    let fd = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
    sys::bind_to_device(fd.as_raw_fd(), DEVICE)?;
    Ok(fd)
}

/// struct packet_mreq: promiscuous mode, and a group of Ethernet.
fn memberships() -> [Vec<u8>; 2] {
    [(libc::PACKET_MR_PROMISC, &[][..]), (libc::PACKET_MR_MULTICAST, &[1, 0, 0x5e, 1, 2, 3])].map(|(kind, address)| {
        let mut bytes = DEVICE.to_ne_bytes().to_vec();
        bytes.extend_from_slice(&(kind as u16).to_ne_bytes());
        bytes.extend_from_slice(&(address.len() as u16).to_ne_bytes());
        bytes.extend_from_slice(address);
        bytes.resize(16, 0);
        bytes
    })
}

/// What sock_diag(7) lists of the memberships of a packet socket, in the kernel's own form.
fn listed(fd: &OwnedFd) -> Result<Vec<u8>> {
    use nix::sys::socket::{MsgFlags, SockProtocol, recv, send};
    let inode = nix::sys::stat::fstat(fd)?.st_ino as u32;
    let kind = SockProtocol::NetlinkSockDiag;
    let diag = socket(AddressFamily::Netlink, SockType::Datagram, SockFlag::SOCK_CLOEXEC, kind)?;
    // SOCK_DIAG_BY_FAMILY, a dump; of packet sockets, with their memberships, all cookies.
    let mut request = [36u32, 20 | 0x301 << 16, 0, 0, libc::AF_PACKET as u32, 0, 2, u32::MAX, u32::MAX];
    request[0] = size_of_val(&request) as u32;
    let bytes: Vec<u8> = request.iter().flat_map(|word| word.to_ne_bytes()).collect();
    send(diag.as_raw_fd(), &bytes, MsgFlags::empty())?;
    let mut answer = vec![0; 64 << 10];
    let got = recv(diag.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    let mut rest = &answer[..got];
    while rest.len() > 36 {
        let (message, more) = rest.split_at((rest[0] as usize | (rest[1] as usize) << 8).min(rest.len()));
        if message.get(20..24) == Some(&inode.to_ne_bytes()) {
            return Ok(message[32..].to_vec());
        }
        rest = more;
    }
    anyhow::bail!("sock_diag does not list the socket")
}

/// Promiscuous mode twice, which is to be given up twice.
const TIMES: usize = 2;

pub fn set_up() -> Result<Box<dyn Guest>> {
    let listener = packet_socket()?;
    for membership in memberships() {
        for _ in 0..TIMES {
            sys::set_option(listener.as_raw_fd(), SOL_PACKET, ADD, &membership)?;
        }
    }
    let group = [packet_socket()?, packet_socket()?];
    for fd in &group {
        // Group 7, the least loaded (1).
        sys::set_option(fd.as_raw_fd(), SOL_PACKET, FANOUT, &(7i32 | 1 << 16).to_ne_bytes())?;
    }
    let fanout = sys::option(group[0].as_raw_fd(), SOL_PACKET, FANOUT)?;
    let listed = listed(&listener)?;
    Ok(Box::new(Packets { listener, group, fanout, listed }))
}

impl Guest for Packets {
    fn verify(&mut self) -> Result<()> {
        let listed = listed(&self.listener)?;
        ensure!(listed == self.listed, "it listens to {listed:?}, not {:?}", self.listed);
        for fd in &self.group {
            let fanout = sys::option(fd.as_raw_fd(), SOL_PACKET, FANOUT)?;
            ensure!(fanout == self.fanout, "the fanout group is {fanout:?}, not {:?}", self.fanout);
        }
        Ok(())
    }
}
