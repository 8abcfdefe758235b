//! Who knocks while the gate ([`super::gate`]) is closed.
//!
//! A SYN that finds no answer is repeated after a second: for a client that connects in the moment of a move the pod would stand
//! still for that long, however short the freeze. So what the gate keeps out is kept: a packet socket on the pod's cable hears it
//! before the gate does, and hears the answer of what was let in. The destination hands the rest to the pod's stack when the pod
//! runs there; if the pod stays, we do.

use super::announce::Mac;
use super::cable::{INSIDE, index_of};
use super::frame::{ACK, RST, SYN, TcpFrame};
use super::wire::inside;
use crate::sys::netdev::{self, Receive};
use crate::{Doing, Result};
use nix::sys::socket::{MsgFlags, recv, send, setsockopt, sockopt};
use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
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
            let socket = netdev::packet_socket(device, Receive::Filtered(&handshakes()), true)?;
            // Without, it keeps fewer.
            let _ = setsockopt(&socket, sockopt::RcvBufForce, &QUEUE);
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
                netdev::close_later(socket);
                Ok(())
            };
            if !frames.is_empty()
                && let Err(error) = handed()
            {
                tracing::debug!("{} that knocked were not let in: {error}", frames.len());
            }
        }
        self.listener.take().into_iter().for_each(netdev::close_later);
    }
}

/// A classic BPF program: frames that have SYN, of IPv4 and of IPv6 without extension headers.
fn handshakes() -> Vec<u8> {
    const LOAD_SHORT: u16 = 0x28;
    const LOAD: u16 = 0x30;
    const LOAD_FROM_X: u16 = 0x50;
    /// X = the length of the IPv4 header there.
    const X_HEADER: u16 = 0xb1;
    const JUMP: u16 = 0x05;
    const JUMP_SAME: u16 = 0x15;
    const JUMP_ANY: u16 = 0x45;
    const AND: u16 = 0x54;
    const RESULT: u16 = 0x06;
    // What is done, with what; if it is a jump, over how many when it holds and when not.
    let program: [(u16, u32, u8, u8); 17] = [
        (LOAD_SHORT, 12, 0, 0),
        (JUMP_SAME, 0x0800, 0, 7),
        (LOAD, 23, 0, 0),
        (JUMP_SAME, 6, 0, 12),
        (LOAD_SHORT, 20, 0, 0),
        // A later fragment has no header.
        (JUMP_ANY, 0x1fff, 10, 0),
        (X_HEADER, 14, 0, 0),
        (LOAD_FROM_X, 14 + 13, 0, 0),
        (JUMP, 4, 0, 0),
        (JUMP_SAME, 0x86dd, 0, 6),
        (LOAD, 20, 0, 0),
        (JUMP_SAME, 6, 0, 4),
        (LOAD, 14 + 40 + 13, 0, 0),
        (AND, u32::from(SYN), 0, 0),
        (JUMP_SAME, u32::from(SYN), 0, 1),
        (RESULT, u32::MAX, 0, 0),
        (RESULT, 0, 0, 0),
    ];
    let bytes =
        |(code, with, yes, no): (u16, u32, u8, u8)| [&code.to_ne_bytes()[..], &[yes, no], &with.to_ne_bytes()].concat();
    program.into_iter().flat_map(bytes).collect()
}

/// Whether a frame is one that [`Knocks::heard`] tells of a pod with this MAC: a whole SYN for it, and nothing that has to be
/// divided.
pub fn is_knock(frame: &[u8], mac: &Mac) -> bool {
    frame.len() <= LONGEST && matches!(Handshake::parse(frame, mac), Some(Handshake::Knock(_)))
}

/// Who knocks, at what, and the number of the SYN: the same when it is said again.
type Name = (SocketAddr, SocketAddr, u32);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Handshake {
    Knock(Name),
    /// To that one.
    Answer(Name),
}

impl Handshake {
    /// Of a frame with what stands before it, to or from the device with this MAC.
    fn parse(frame: &[u8], mac: &Mac) -> Option<Handshake> {
        let (head, ethernet) = frame.split_at_checked(netdev::VNET_HEADER)?;
        let tcp = TcpFrame::parse(ethernet).filter(|_| is_plain(head, ethernet.len()))?;
        match tcp.flags & (SYN | RST | ACK) {
            SYN if tcp.to == *mac => Some(Handshake::Knock((tcp.source, tcp.destination, tcp.sequence))),
            both if both == SYN | ACK && tcp.from == *mac => {
                Some(Handshake::Answer((tcp.destination, tcp.source, tcp.acknowledged.wrapping_sub(1))))
            }
            _ => None,
        }
    }
}

/// What may stand before a frame of so many bytes (struct virtio_net_hdr): it is not to be divided, and a checksum that is due
/// lies in it.
fn is_plain(head: &[u8], bytes: usize) -> bool {
    const NEEDS_CHECKSUM: u8 = 1;
    const IS_VALID: u8 = 2;
    let short = |at: usize| usize::from(u16::from_ne_bytes([head[at], head[at + 1]]));
    let (flags, division) = (head[0], head[1]);
    let due = flags & NEEDS_CHECKSUM != 0;
    flags & !(NEEDS_CHECKSUM | IS_VALID) == 0 && division == 0 && (!due || short(6) + short(8) + 2 <= bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
