//! Who knocks while the gate ([`super::gate`]) is closed.
//!
//! A SYN that finds no answer is repeated after a second: for a client that connects in the moment of a move the pod would stand
//! still for that long, however short the freeze. So what the gate keeps out is kept: a packet socket on the pod's cable hears it
//! before the gate does, and hears the answer of what was let in. The destination hands the rest to the pod's stack when the pod
//! runs there; if the pod stays, we do.

use super::announce::Mac;
use super::cable::{INSIDE, index_of};
use super::wire::inside;
use crate::sys::netdev::{self, Receive};
use crate::{Doing, Result};
use nix::sys::socket::{MsgFlags, recv, send, setsockopt, sockopt};
use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// More are not kept: their clients repeat them.
pub const MOST: usize = 1024;
/// With options, and what stands before a frame, a SYN is not larger than this. One with data (TCP Fast Open) is not kept.
pub const LONGEST: usize = 256;
/// So many are looked at in one go, also if they are the same again and again.
const AT_ONCE: usize = 4 * MOST;
/// Bytes that the kernel may spend on what was not read yet.
const QUEUE: usize = 4 << 20;

/// Listens as long as it lives; then what was heard is handed to the pod, unless that has gone.
#[derive(Debug)]
pub struct Knocks {
    heard: RefCell<HashMap<Name, Vec<u8>>>,
    listener: Option<OwnedFd>,
    mac: Mac,
    /// The outside end of the pod's cable.
    link: String,
}

impl Knocks {
    /// Listens on the inside end of a pod's cable, in the network of its first process.
    pub fn listen(init: i32, mac: Mac, link: String) -> Result<Knocks> {
        let path = format!("/proc/{init}/ns/net");
        let network = File::open(&path).doing(|| format!("open {path}"))?;
        let open = || -> io::Result<OwnedFd> {
            let control = netdev::control_socket()?;
            let device = netdev::index(control.as_fd(), INSIDE)?;
            let socket = netdev::packet_socket(device, Receive::Handshakes, true)?;
            setsockopt(&socket, sockopt::RcvBufForce, &QUEUE)?;
            Ok(socket)
        };
        let listener = inside(network.as_fd(), open)?.doing(|| "listen on the pod's cable".into())?;
        Ok(Knocks { heard: RefCell::default(), listener: Some(listener), mac, link })
    }

    /// What was heard and not answered until now, each once: frames as [`super::hold::Holder::hand`] takes them.
    pub fn heard(&self) -> Vec<Vec<u8>> {
        let mut heard = self.heard.borrow_mut();
        let mut buffer = [0; LONGEST];
        for _ in 0..AT_ONCE {
            let Some(listener) = &self.listener else { break };
            match recv(listener.as_raw_fd(), &mut buffer, MsgFlags::MSG_TRUNC) {
                Ok(length) if length <= LONGEST => match Handshake::parse(&buffer[..length], &self.mac) {
                    Some(Handshake::Knock(name)) if heard.len() < MOST || heard.contains_key(&name) => {
                        heard.insert(name, buffer[..length].to_vec());
                    }
                    Some(Handshake::Answer(name)) => drop(heard.remove(&name)),
                    _ => {}
                },
                Err(nix::Error::EAGAIN) => break,
                // A frame that is too long, or has no such form; and the device that goes down is said once.
                Ok(_) | Err(_) => {}
            }
        }
        heard.values().cloned().collect()
    }

    /// The pod runs elsewhere, where what was heard is handed to it.
    pub fn moved(&mut self) {
        self.link.clear();
    }
}

impl Drop for Knocks {
    fn drop(&mut self) {
        if !self.link.is_empty() {
            let frames = self.heard();
            let handed = || -> io::Result<()> {
                let device = index_of(&self.link).ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))?;
                let socket = netdev::packet_socket(device, Receive::Nothing, true)?;
                for frame in &frames {
                    send(socket.as_raw_fd(), frame, MsgFlags::empty())?;
                }
                later(socket);
                Ok(())
            };
            if !frames.is_empty()
                && let Err(error) = handed()
            {
                tracing::debug!("{} that knocked were not let in: {error}", frames.len());
            }
        }
        self.listener.take().into_iter().for_each(later);
    }
}

/// Closing a packet socket waits for the whole kernel (10 ms).
fn later(socket: OwnedFd) {
    let _ = std::thread::Builder::new().spawn(move || drop(socket));
}

/// Whether a frame is one that [`Knocks::heard`] tells of a pod with this MAC: a whole SYN for it, and nothing that has to be
/// divided.
pub fn is_knock(frame: &[u8], mac: &Mac) -> bool {
    frame.len() <= LONGEST && matches!(Handshake::parse(frame, mac), Some(Handshake::Knock(_)))
}

/// Addresses and ports of both sides, and the number of the SYN: the same when it is said again.
type Name = Vec<u8>;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Handshake {
    Knock(Name),
    /// To that one.
    Answer(Name),
}

impl Handshake {
    /// Of a frame with what stands before it (struct virtio_net_hdr), to or from the device with this MAC.
    fn parse(frame: &[u8], mac: &Mac) -> Option<Handshake> {
        const NEEDS_CHECKSUM: u8 = 1;
        const IS_VALID: u8 = 2;
        const TCP: u8 = 6;
        const SYN: u8 = 0x02;
        const RST: u8 = 0x04;
        const ACK: u8 = 0x10;
        let (head, ethernet) = frame.split_at_checked(netdev::VNET_HEADER)?;
        let short = |at: usize| u16::from_ne_bytes([head[at], head[at + 1]]);
        // Flags, the kind of division (none), where a checksum is due.
        if head[0] & !(NEEDS_CHECKSUM | IS_VALID) != 0 || head[1] != 0 {
            return None;
        }
        if head[0] & NEEDS_CHECKSUM != 0 && usize::from(short(6)) + usize::from(short(8)) + 2 > ethernet.len() {
            return None;
        }
        let packet = ethernet.get(14..)?;
        let (from, to, tcp): (&[u8], &[u8], usize) = match (ethernet.get(12..14)?, packet.first()?) {
            ([0x08, 0x00], first) if first >> 4 == 4 && packet.get(9) == Some(&TCP) => {
                (packet.get(12..16)?, packet.get(16..20)?, usize::from(first & 15) * 4)
            }
            ([0x86, 0xdd], _) if packet.get(6) == Some(&TCP) => (packet.get(8..24)?, packet.get(24..40)?, 40),
            _ => return None,
        };
        let segment = packet.get(tcp..).filter(|segment| tcp >= 20 && segment.len() >= 20)?;
        let number = |at: usize| segment.get(at..at + 4)?.first_chunk().map(|four| u32::from_be_bytes(*four));
        let name = |from: &[u8], to: &[u8], ports: [&[u8]; 2], number: u32| {
            [from, to, ports[0], ports[1], &number.to_be_bytes()].concat()
        };
        let (source, destination) = (&segment[0..2], &segment[2..4]);
        match segment[13] & (SYN | RST | ACK) {
            SYN if ethernet[..6] == *mac => Some(Handshake::Knock(name(from, to, [source, destination], number(4)?))),
            both if both == SYN | ACK && ethernet[6..12] == *mac => {
                Some(Handshake::Answer(name(to, from, [destination, source], number(8)?.wrapping_sub(1))))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const POD: Mac = [2, 2, 2, 2, 2, 2];
    const CLIENT: Mac = [4, 4, 4, 4, 4, 4];

    /// IPv4 without options, TCP without options.
    fn frame(to: Mac, from: Mac, ends: [u8; 2], number: u32, acknowledged: u32, flags: u8) -> Vec<u8> {
        let mut frame = vec![0; netdev::VNET_HEADER];
        frame.extend_from_slice(&to);
        frame.extend_from_slice(&from);
        frame.extend_from_slice(&[8, 0, 0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, ends[0], 10, 0, 0, ends[1]]);
        frame.extend_from_slice(&[0, ends[0], 0, ends[1]]);
        frame.extend_from_slice(&number.to_be_bytes());
        frame.extend_from_slice(&acknowledged.to_be_bytes());
        frame.extend_from_slice(&[5 << 4, flags, 1, 1, 0, 0, 0, 0]);
        frame
    }

    #[test]
    fn an_answer_names_its_knock() {
        let knock = frame(POD, CLIENT, [1, 2], u32::MAX, 0, 0x02);
        let answer = frame(CLIENT, POD, [2, 1], 77, 0, 0x12);
        let Some(Handshake::Knock(name)) = Handshake::parse(&knock, &POD) else { panic!("no knock") };
        assert_eq!(Handshake::parse(&answer, &POD), Some(Handshake::Answer(name)));
        assert!(is_knock(&knock, &POD));
        // What the pod itself begins, what is for another, an answer to the pod, the end of one.
        assert_eq!(Handshake::parse(&frame(CLIENT, POD, [2, 1], 1, 0, 0x02), &POD), None);
        assert_eq!(Handshake::parse(&knock, &CLIENT), None);
        assert_eq!(Handshake::parse(&frame(POD, CLIENT, [1, 2], 1, 1, 0x12), &POD), None);
        assert_eq!(Handshake::parse(&frame(POD, CLIENT, [1, 2], 1, 1, 0x06), &POD), None);
    }

    #[test]
    fn what_a_peer_says_that_it_heard_is_looked_at() {
        let knock = frame(POD, CLIENT, [1, 2], 7, 0, 0x02);
        let with = |at: usize, value: u8| {
            let mut other = knock.clone();
            other[at] = value;
            other
        };
        // To be divided, another flag, a checksum beyond the end, no TCP, another protocol.
        for (at, value) in [(1, 1), (0, 4), (netdev::VNET_HEADER + 14 + 9, 17), (netdev::VNET_HEADER + 12, 9)] {
            assert!(!is_knock(&with(at, value), &POD), "{at}");
        }
        let mut beyond = with(0, 1);
        beyond[6..8].copy_from_slice(&60000u16.to_ne_bytes());
        assert!(!is_knock(&beyond, &POD));
        assert!(!is_knock(&[&knock[..], &[0; LONGEST]].concat(), &POD));
        for length in 0..knock.len() {
            assert!(!is_knock(&knock[..length], &POD), "{length}");
        }
    }

    proptest! {
        #[test]
        fn whatever_comes_is_read(bytes in proptest::collection::vec(any::<u8>(), 0..120), v6: bool) {
            let mut frame = vec![0; netdev::VNET_HEADER + 12];
            frame.extend_from_slice(if v6 { &[0x86, 0xdd, 0x60] } else { &[8, 0, 0x45] });
            frame.extend_from_slice(&bytes);
            Handshake::parse(&frame, &[0; 6]);
        }
    }
}
