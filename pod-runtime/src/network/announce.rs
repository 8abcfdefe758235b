//! What the neighbours are told: frames that say where an address is now, and the question whether it is taken.
//!
//! A switch, a bridge and a neighbour's cache learn from any frame that carries the pod's MAC or address, so one
//! gratuitous ARP (IPv4) or unsolicited neighbour advertisement (IPv6) moves all of them at once.

use crate::spec::{Address, Spec};
use crate::sys::netdev::{self, Receive};
use crate::{Doing, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

pub type Mac = [u8; 6];

const BROADCAST: Mac = [0xff; 6];
const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;

/// Of a pod that has its lease.
pub fn mac_of(spec: &Spec) -> Option<Mac> {
    parse_mac(spec.network.mac.as_deref()?)
}

/// `02:…` as six bytes.
pub fn parse_mac(text: &str) -> Option<Mac> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        *byte = u8::from_str_radix(parts.next()?, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

pub fn format_mac(mac: &Mac) -> String {
    let [a, b, c, d, e, f] = mac;
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

/// The IPv6 link-local address that belongs to a MAC (modified EUI-64): the same on every host, like the MAC.
pub fn link_local(mac: &Mac) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, *b, *c, 0xff, 0xfe, *d, *e, *f])
}

/// The frames that announce all addresses of a pod.
pub fn frames(mac: &Mac, addresses: &[Address]) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    for address in addresses {
        match address.ip {
            IpAddr::V4(ip) => frames.push(arp(mac, 1, ip, ip)),
            IpAddr::V6(ip) => frames.push(neighbour_advertisement(mac, ip)),
        }
    }
    if frames.is_empty() {
        frames.push(neighbour_advertisement(mac, link_local(mac)));
    }
    frames
}

/// Sends them through a packet socket (without a vnet header).
pub fn send_all(socket: BorrowedFd<'_>, mac: &Mac, addresses: &[Address]) -> Result<()> {
    for frame in frames(mac, addresses) {
        send(socket.as_raw_fd(), &frame, MsgFlags::empty()).doing(|| "announce the pod's addresses".into())?;
    }
    Ok(())
}

/// An ARP frame; operation 1 asks, 2 answers.
fn arp(mac: &Mac, operation: u16, sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let mut frame = ethernet(&BROADCAST, mac, ARP);
    frame.extend_from_slice(&[0, 1, 8, 0, 6, 4]);
    frame.extend_from_slice(&operation.to_be_bytes());
    frame.extend_from_slice(mac);
    frame.extend_from_slice(&sender.octets());
    frame.extend_from_slice(&[0; 6]);
    frame.extend_from_slice(&target.octets());
    frame
}

/// An unsolicited neighbour advertisement to all nodes, with the override flag (RFC 4861 §7.2.6).
fn neighbour_advertisement(mac: &Mac, ip: Ipv6Addr) -> Vec<u8> {
    let all_nodes: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let mut icmp = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
    icmp.extend_from_slice(&ip.octets());
    icmp.extend_from_slice(&[2, 1]);
    icmp.extend_from_slice(mac);
    icmp_frame(&[0x33, 0x33, 0, 0, 0, 1], mac, (ip, all_nodes), icmp)
}

/// A frame with this ICMPv6 message, whose checksum is zero yet.
fn icmp_frame(to: &Mac, from: &Mac, (source, target): (Ipv6Addr, Ipv6Addr), mut icmp: Vec<u8>) -> Vec<u8> {
    let sum = checksum(&source, &target, 58, &icmp);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut frame = ethernet(to, from, IPV6);
    frame.extend_from_slice(&[0x60, 0, 0, 0]);
    frame.extend_from_slice(&(icmp.len() as u16).to_be_bytes());
    frame.extend_from_slice(&[58, 255]);
    frame.extend_from_slice(&source.octets());
    frame.extend_from_slice(&target.octets());
    frame.extend_from_slice(&icmp);
    frame
}

fn ethernet(to: &Mac, from: &Mac, ether_type: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(96);
    frame.extend_from_slice(to);
    frame.extend_from_slice(from);
    frame.extend_from_slice(&ether_type.to_be_bytes());
    frame
}

/// The internet checksum over an IPv6 pseudo header and a payload whose checksum field is zero.
fn checksum(from: &Ipv6Addr, to: &Ipv6Addr, protocol: u8, payload: &[u8]) -> u16 {
    let mut sum = u32::from(protocol) + payload.len() as u32;
    for chunk in from.octets().chunks(2).chain(to.octets().chunks(2)).chain(payload.chunks(2)) {
        sum += u32::from(u16::from_be_bytes([chunk[0], chunk.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Asks the LAN behind a device whether anybody but `known` has this address (ARP with sender 0.0.0.0, RFC 5227; a neighbour
/// solicitation from nowhere, RFC 4862) and waits `patience` for an answer. A station of a LAN answers within a millisecond
/// or two.
pub fn somebody_has(
    device: u32,
    mac: &Mac,
    ip: IpAddr,
    known: Option<&Mac>,
    patience: Duration,
) -> Result<Option<Mac>> {
    let (kind, question) = match ip {
        IpAddr::V4(ip) => (ARP, arp(mac, 1, Ipv4Addr::UNSPECIFIED, ip)),
        IpAddr::V6(ip) => (IPV6, neighbour_solicitation(mac, ip)),
    };
    let socket = netdev::packet_socket(device, Receive::Protocol(kind), false)
        .doing(|| "open a packet socket to probe the address".into())?;
    let end = Instant::now() + patience;
    let mut buffer = [0; 256];
    for share in [patience / 3, patience] {
        send(socket.as_raw_fd(), &question, MsgFlags::empty()).doing(|| format!("ask the LAN for {ip}"))?;
        let until = (Instant::now() + share).min(end);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
            let timeout = PollTimeout::try_from(left.as_millis() as i32 + 1).unwrap_or(PollTimeout::ZERO);
            if poll(&mut fds, timeout).unwrap_or(0) == 0 {
                continue;
            }
            while let Ok(length) = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                // A frame may be longer than what is looked at.
                let owner = speaks_as(&buffer[..length.min(256)], ip);
                if let Some(owner) = owner.filter(|owner| owner != mac && Some(owner) != known) {
                    return Ok(Some(owner));
                }
            }
        }
    }
    Ok(None)
}

/// The question whether an IPv6 address is taken, to the group that who has it listens to.
fn neighbour_solicitation(mac: &Mac, ip: Ipv6Addr) -> Vec<u8> {
    let [.., a, b, c] = ip.octets();
    let group = Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c]);
    let mut icmp = vec![135, 0, 0, 0, 0, 0, 0, 0];
    icmp.extend_from_slice(&ip.octets());
    icmp_frame(&[0x33, 0x33, 0xff, a, b, c], mac, (Ipv6Addr::UNSPECIFIED, group), icmp)
}

/// The MAC that an ARP frame or a neighbour advertisement gives for `ip`, if it gives one.
fn speaks_as(frame: &[u8], ip: IpAddr) -> Option<Mac> {
    let is = |at: usize, bytes: &[u8]| frame.get(at..at + bytes.len()) == Some(bytes);
    let (said, at) = match ip {
        IpAddr::V4(ip) => (is(12, &ARP.to_be_bytes()) && is(28, &ip.octets()), 22),
        // With its own address behind it: an advertisement to a question from nowhere has that.
        IpAddr::V6(ip) => {
            let advertises = is(12, &IPV6.to_be_bytes()) && is(20, &[58]) && is(54, &[136]);
            (advertises && is(62, &ip.octets()) && is(78, &[2, 1]), 80)
        }
    };
    frame.get(at..at + 6).filter(|_| said)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn macs_in_and_out() {
        let mac = parse_mac("02:0a:ff:00:10:01").unwrap();
        assert_eq!(mac, [2, 10, 255, 0, 16, 1]);
        assert_eq!(format_mac(&mac), "02:0a:ff:00:10:01");
        assert!(parse_mac("02:0a:ff:00:10").is_none());
        assert!(parse_mac("02:0a:ff:00:10:01:02").is_none());
        assert_eq!(link_local(&mac).to_string(), "fe80::a:ffff:fe00:1001");
    }

    #[test]
    fn advertisement_has_a_valid_checksum() {
        let mac = [2, 0, 0, 0, 0, 1];
        let ip: Ipv6Addr = "fd77::100".parse().unwrap();
        let frame = neighbour_advertisement(&mac, ip);
        let all_nodes: Ipv6Addr = "ff02::1".parse().unwrap();
        // Summing a payload with its checksum in place gives the complement of zero.
        assert_eq!(checksum(&ip, &all_nodes, 58, &frame[54..]), 0);
        assert_eq!(frame.len(), 14 + 40 + 32);
    }

    #[test]
    fn an_arp_answer_is_recognised() {
        let ip = Ipv4Addr::new(10, 0, 0, 7);
        let frame = arp(&[2, 0, 0, 0, 0, 9], 2, ip, ip);
        assert_eq!(speaks_as(&frame, ip.into()), Some([2, 0, 0, 0, 0, 9]));
        assert_eq!(speaks_as(&frame, Ipv4Addr::new(10, 0, 0, 8).into()), None);
        assert_eq!(speaks_as(&frame[..20], ip.into()), None);
    }

    #[test]
    fn an_advertisement_is_recognised_and_a_question_is_none() {
        let (mac, ip): (Mac, Ipv6Addr) = ([2, 0, 0, 0, 0, 9], "fd77::7".parse().unwrap());
        let frame = neighbour_advertisement(&mac, ip);
        assert_eq!(speaks_as(&frame, ip.into()), Some(mac));
        assert_eq!(speaks_as(&frame, "fd77::8".parse().unwrap()), None);
        assert_eq!(speaks_as(&frame[..80], ip.into()), None);
        let question = neighbour_solicitation(&mac, ip);
        assert_eq!(speaks_as(&question, ip.into()), None);
        let group = "ff02::1:ff00:7".parse().unwrap();
        assert_eq!(checksum(&Ipv6Addr::UNSPECIFIED, &group, 58, &question[54..]), 0);
    }
}
