//! Packets that a restore hands to the pod's own stack as if a peer had sent them: a FIN or RST that brings a socket
//! into the state that it was in, datagrams that were queued. They go through a raw socket to an address of the pod
//! itself, so they never leave it.

use super::address::Endpoint;
use libc::{AF_INET, AF_INET6, IPPROTO_RAW, IPPROTO_TCP, IPPROTO_UDP, SOCK_RAW};
use pod_runtime::sys::inet;
use pod_runtime::{Doing, Result};
use std::net::IpAddr;
use std::os::fd::AsFd;

/// A TCP segment without options.
pub struct Segment {
    pub from: Endpoint,
    pub to: Endpoint,
    pub sequence: u32,
    pub acknowledge: u32,
    pub flags: u8,
    /// As on the wire, before scaling.
    pub window: u16,
}

impl Segment {
    pub fn inject(&self) -> Result<()> {
        self.inject_with(&[])
    }

    pub fn inject_with(&self, data: &[u8]) -> Result<()> {
        let mut tcp = Vec::with_capacity(20 + data.len());
        tcp.extend_from_slice(&self.from.port.to_be_bytes());
        tcp.extend_from_slice(&self.to.port.to_be_bytes());
        tcp.extend_from_slice(&self.sequence.to_be_bytes());
        tcp.extend_from_slice(&self.acknowledge.to_be_bytes());
        tcp.extend_from_slice(&[5 << 4, self.flags]);
        tcp.extend_from_slice(&self.window.to_be_bytes());
        tcp.extend_from_slice(&[0; 4]);
        tcp.extend_from_slice(data);
        let sum = checksum(self.from.wire_ip(), self.to.wire_ip(), IPPROTO_TCP as u8, &tcp);
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        send(self.from.wire_ip(), self.to, IPPROTO_TCP as u8, &tcp)
            .doing(|| format!("hand a segment from {} to the pod's stack", self.from))
    }
}

/// A UDP datagram.
pub fn datagram(from: Endpoint, to: Endpoint, payload: &[u8]) -> Result<()> {
    let mut udp = Vec::with_capacity(8 + payload.len());
    udp.extend_from_slice(&from.port.to_be_bytes());
    udp.extend_from_slice(&to.port.to_be_bytes());
    udp.extend_from_slice(&((8 + payload.len()) as u16).to_be_bytes());
    udp.extend_from_slice(&[0; 2]);
    udp.extend_from_slice(payload);
    let sum = match checksum(from.wire_ip(), to.wire_ip(), IPPROTO_UDP as u8, &udp) {
        // Zero on the wire means "no checksum".
        0 => 0xffff,
        sum => sum,
    };
    udp[6..8].copy_from_slice(&sum.to_be_bytes());
    send(from.wire_ip(), to, IPPROTO_UDP as u8, &udp)
        .doing(|| format!("hand a datagram from {from} to the pod's stack"))
}

fn send(from: IpAddr, to: Endpoint, protocol: u8, payload: &[u8]) -> std::io::Result<()> {
    let mut packet = Vec::with_capacity(40 + payload.len());
    let family = match (from, to.wire_ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            packet.extend_from_slice(&[0x45, 0]);
            packet.extend_from_slice(&((20 + payload.len()) as u16).to_be_bytes());
            // Identification and the header's checksum are filled in by the kernel.
            packet.extend_from_slice(&[0, 0, 0x40, 0, 64, protocol, 0, 0]);
            packet.extend_from_slice(&from.octets());
            packet.extend_from_slice(&to.octets());
            AF_INET
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            packet.extend_from_slice(&[0x60, 0, 0, 0]);
            packet.extend_from_slice(&(payload.len() as u16).to_be_bytes());
            packet.extend_from_slice(&[protocol, 64]);
            packet.extend_from_slice(&from.octets());
            packet.extend_from_slice(&to.octets());
            AF_INET6
        }
        _ => return Err(std::io::Error::from_raw_os_error(libc::EAFNOSUPPORT)),
    };
    packet.extend_from_slice(payload);
    let raw = inet::socket(family, SOCK_RAW, IPPROTO_RAW)?;
    let target = Endpoint { ip: to.wire_ip(), port: 0, scope: to.scope };
    inet::send_to(raw.as_fd(), &packet, &target.bytes(), 0).map(drop)
}

/// The internet checksum over a pseudo header and a payload whose checksum field is zero.
fn checksum(from: IpAddr, to: IpAddr, protocol: u8, payload: &[u8]) -> u16 {
    let mut sum = u64::from(protocol) + payload.len() as u64;
    let mut add = |bytes: &[u8]| {
        for pair in bytes.chunks(2) {
            sum += u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        }
    };
    for ip in [from, to] {
        match ip {
            IpAddr::V4(ip) => add(&ip.octets()),
            IpAddr::V6(ip) => add(&ip.octets()),
        }
    }
    add(payload);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
