//! Who knocks while the gate ([`super::gate`]) is closed.
//!
//! A SYN that finds no answer is repeated after a second: for a client that connects in the moment of a move the pod would stand
//! still for that long, however short the freeze. So what the gate keeps out is kept: a packet socket on the pod's cable hears it
//! before the gate does. The destination hands it to the pod's stack when the pod runs there; if the pod stays, we do.

use super::cable::{INSIDE, index_of};
use super::wire::inside;
use crate::sys::netdev::{self, Receive};
use crate::{Doing, Result};
use nix::sys::socket::{MsgFlags, recv, send, setsockopt, sockopt};
use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// More are not kept: their clients repeat them.
pub const MOST: usize = 1024;
/// A SYN has no data. With options, and what stands before a frame, it is not larger than this.
pub const LONGEST: usize = 256;
/// Bytes that the kernel may spend on what was not read yet.
const QUEUE: usize = 4 << 20;

/// Listens as long as it lives; then what was heard is handed to the pod, unless that has gone.
#[derive(Debug)]
pub struct Knocks {
    heard: RefCell<Vec<Vec<u8>>>,
    listener: Option<OwnedFd>,
    /// The outside end of the pod's cable.
    link: String,
}

impl Knocks {
    /// Listens on the inside end of a pod's cable, in the network of its first process.
    pub fn listen(init: i32, link: String) -> Result<Knocks> {
        let path = format!("/proc/{init}/ns/net");
        let network = File::open(&path).doing(|| format!("open {path}"))?;
        let open = || -> io::Result<OwnedFd> {
            let control = netdev::control_socket()?;
            let device = netdev::index(control.as_fd(), INSIDE)?;
            let socket = netdev::packet_socket(device, Receive::NewConnections, true)?;
            setsockopt(&socket, sockopt::RcvBufForce, &QUEUE)?;
            Ok(socket)
        };
        let listener = inside(network.as_fd(), open)?.doing(|| "listen on the pod's cable".into())?;
        Ok(Knocks { heard: RefCell::default(), listener: Some(listener), link })
    }

    /// Forgets what was heard: the gate was open until now.
    pub fn forget(&self) {
        self.heard();
        self.heard.borrow_mut().clear();
    }

    /// What was heard until now, each once: frames as [`super::hold::Holder::hand`] takes them.
    pub fn heard(&self) -> Vec<Vec<u8>> {
        let mut heard = self.heard.borrow_mut();
        let mut buffer = [0; LONGEST];
        while let Some(listener) = self.listener.as_ref().filter(|_| heard.len() < MOST) {
            match recv(listener.as_raw_fd(), &mut buffer, MsgFlags::MSG_TRUNC) {
                Ok(length) if length <= LONGEST => {
                    let frame = &buffer[..length];
                    match heard.iter_mut().find(|before| same(before, frame)) {
                        Some(before) => *before = frame.to_vec(),
                        None => heard.push(frame.to_vec()),
                    }
                }
                Ok(_) | Err(nix::Error::EINTR) => {}
                // Empty.
                Err(_) => break,
            }
        }
        heard.clone()
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

/// Whether two SYNs are the same, said again: addresses, ports and number; the checksum, the time and an identification differ.
fn same(one: &[u8], other: &[u8]) -> bool {
    let name = |frame: &[u8]| -> Option<Vec<u8>> {
        let packet = frame.get(netdev::VNET_HEADER + 14..)?;
        let (addresses, tcp) = match packet.first()? >> 4 {
            4 => (12..20, usize::from(packet.first()? & 15) * 4),
            _ => (8..40, 40),
        };
        Some([packet.get(addresses)?, packet.get(tcp..tcp + 8)?].concat())
    };
    name(one).is_some_and(|one| Some(one) == name(other))
}
