//! Sockets below TCP and UDP: raw IP with a header of one's own, ping, netlink with groups.

use crate::{Guest, sys};
use anyhow::{Context, Result, ensure};
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, SockaddrIn};
use nix::sys::socket::{bind, getsockname, recv, sendto, setsockopt, socket, sockopt};
use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;

const RTMGRP_LINK: u32 = 1;
const HEADER_INCLUDED: i32 = 3;

struct Raw {
    raw: File,
    ping: File,
    port: u16,
    netlink: File,
    address: (u32, u32),
}

fn opened(family: i32, kind: i32, protocol: i32) -> Result<File> {
    let flags = kind | libc::SOCK_CLOEXEC;
    let made = sys::call(libc::SYS_socket, [family.into(), flags.into(), protocol.into(), 0, 0]);
    Ok(sys::owned(made.with_context(|| format!("socket {family} {kind} {protocol}"))? as i32))
}

fn loopback() -> SockaddrIn {
    SockaddrIn::new(127, 0, 0, 1, 0)
}

fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes.chunks(2).map(|two| u32::from(two[0]) << 8 | u32::from(*two.get(1).unwrap_or(&0))).sum();
    !((sum & 0xffff) + (sum >> 16)) as u16
}

/// ICMP echo.
fn echo(id: u16) -> Vec<u8> {
    let mut message = vec![8, 0, 0, 0, (id >> 8) as u8, id as u8, 0, 1, b'g', b'u'];
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}

fn netlink_address(socket: &File) -> Result<(u32, u32)> {
    let address: NetlinkAddr = getsockname(socket.as_raw_fd())?;
    Ok((address.pid(), address.groups()))
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    // A pod is born with it.
    let _ = std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647");
    let raw = opened(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP)?;
    sys::set_option(raw.as_raw_fd(), libc::IPPROTO_IP, HEADER_INCLUDED, &1i32.to_ne_bytes())?;
    let ping = opened(libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_ICMP)?;
    bind(ping.as_raw_fd(), &SockaddrIn::from(std::net::SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 4711)))?;
    let port = getsockname::<SockaddrIn>(ping.as_raw_fd())?.port();
    let netlink = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    bind(netlink.as_raw_fd(), &NetlinkAddr::new(0, RTMGRP_LINK))?;
    let netlink = File::from(netlink);
    setsockopt(&netlink, sockopt::ReceiveTimeout, &nix::sys::time::TimeVal::new(10, 0))?;
    setsockopt(&ping, sockopt::ReceiveTimeout, &nix::sys::time::TimeVal::new(10, 0))?;
    setsockopt(&raw, sockopt::ReceiveTimeout, &nix::sys::time::TimeVal::new(10, 0))?;
    let address = netlink_address(&netlink)?;
    let mut all = Raw { raw, ping, port, netlink, address };
    all.verify()?;
    Ok(Box::new(all))
}

impl Raw {
    /// What arrives at the raw socket, until it is empty: there are others who ping.
    fn drain(&self) {
        while recv(self.raw.as_raw_fd(), &mut [0; 256], MsgFlags::MSG_DONTWAIT).is_ok() {}
    }
}

impl Guest for Raw {
    fn verify(&mut self) -> Result<()> {
        let included = sys::option(self.raw.as_raw_fd(), libc::IPPROTO_IP, HEADER_INCLUDED)?;
        ensure!(included.first() == Some(&1), "headers are not included");
        self.drain();
        // With a header of its own: version, length, TTL, protocol; the kernel fills the rest in.
        let mut packet = vec![0x45, 0, 0, 30, 0, 0, 0, 0, 64, 1, 0, 0, 127, 0, 0, 1, 127, 0, 0, 1];
        packet.extend(echo(0x7777));
        sendto(self.raw.as_raw_fd(), &packet, &loopback(), MsgFlags::empty())?;
        let mut buffer = [0; 256];
        let is_reply = |got: &[u8]| got.get(20) == Some(&0) && got.get(24..26) == Some(&[0x77, 0x77]);
        loop {
            let got =
                recv(self.raw.as_raw_fd(), &mut buffer, MsgFlags::empty()).context("a reply at the raw socket")?;
            if is_reply(&buffer[..got]) {
                break;
            }
        }
        ensure!(getsockname::<SockaddrIn>(self.ping.as_raw_fd())?.port() == self.port, "ping has another number");
        sendto(self.ping.as_raw_fd(), &echo(0), &loopback(), MsgFlags::empty())?;
        let got = recv(self.ping.as_raw_fd(), &mut buffer, MsgFlags::empty()).context("a reply at the ping socket")?;
        ensure!(buffer[..got].first() == Some(&0) && buffer[4..6] == self.port.to_be_bytes(), "{:?}", &buffer[..got]);
        self.drain();

        let address = netlink_address(&self.netlink)?;
        ensure!(address == self.address, "netlink: {address:?}, not {:?}", self.address);
        // RTM_GETLINK, of the first device.
        let mut request = [0u8; 32];
        (request[0], request[4], request[6], request[20]) = (32, 18, 1, 1);
        ensure!(nix::unistd::write(&self.netlink, &request)? == 32);
        // What others do to devices is told too.
        crate::until("an answer of RTM_NEWLINK", || {
            let got = recv(self.netlink.as_raw_fd(), &mut buffer, MsgFlags::empty()).unwrap_or(0);
            got > 20 && buffer[4] == 16
        })
    }
}
