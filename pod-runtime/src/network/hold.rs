//! The holding port: what a destination host does with a pod's frames while the pod is between two hosts.
//!
//! From the moment the source is frozen until the sockets are restored here, clients go on sending. A frame that is
//! lost in that gap costs its sender a retransmission timeout (200 ms at least), however short the gap. So the
//! destination puts a port with the pod's MAC into its bridge beforehand and announces it when the source freezes; the
//! switches of the LAN then send the pod's frames here, where they wait in the port's own queue. After the sockets are
//! restored they are handed to the pod through the outside end of its cable, past the bridge, so that nobody learns a
//! client's address at the wrong port.
//!
//! The port is a tap device: its queue is the kernel's (bounded by [`QUEUE`] frames, the rest is dropped as a busy
//! switch would), needs no thread, and it vanishes with its fd, also when this process is killed.
//!
//! The order that loses nothing:
//! 1. destination, before the freeze: [`Holder::start`] (silent).
//! 2. source: freezes the pod's tasks and locks its port ([`super::port`]). Its link is still up: what arrives is acknowledged and
//!    lands in socket buffers.
//! 3. destination: [`Holder::announce`]. New frames come here.
//! 4. source: [`Attachment::hold`], then dumps the sockets. Where ports cannot be locked (before Linux 5.16), its last words may
//!    have drawn the switches back to it:
//! 5. destination: [`Holder::announce`] again, whenever it hears from the source, until the sockets are here.
//! 6. destination: [`Holder::gather`], so that there is room for what comes now; [`Attachment::join`], unnoticed
//!    ([`Attachment::notice`]), so that new frames still come here; sockets leave repair mode, [`Holder::hand`] (who knocked at
//!    the source), [`Holder::inject`]. Only then the bridge may know where the pod is, [`Attachment::announce`], and what came
//!    in between is injected. A frame that overtook a held one would show: the client's FIN that was said again is answered,
//!    and when the first one is answered after it the client knows nothing of the connection any more, and says so with a
//!    reset.

use super::announce::{self, Mac, link_local};
use super::cable::{Attachment, silent_up};
use super::frame::{FIN, TcpFrame};
use super::wire::Wire;
use crate::spec::Address;
use crate::sys::netdev::{self, Receive};
use crate::{Doing, Result};
use nix::sys::socket::{MsgFlags, send};
use nix::unistd::{read, write};
use rtnetlink::LinkUnspec;
use std::cell::RefCell;
use std::collections::{HashSet, VecDeque};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// Frames that wait at most. A frame is up to 64 KiB, so this bounds the memory at about 128 MiB in the worst case,
/// and at 3 MiB with frames of an ordinary Ethernet.
pub const QUEUE: u32 = 2048;
/// Bytes of frames that wait here besides, once they were gathered.
const MOST_GATHERED: usize = 128 << 20;
/// Longer than any frame with its header.
const LONGEST: usize = 128 * 1024;

/// A holding port in the bridge of a destination. Dropping it takes the port away and forgets what it held.
#[derive(Debug)]
pub struct Holder {
    tap: OwnedFd,
    /// Sends into the outside end of the pod's cable. Made at the start and closed at the end, because closing a
    /// packet socket waits for the whole kernel as well.
    injector: OwnedFd,
    mac: Mac,
    addresses: Vec<Address>,
    /// What ends a connection and was handed on.
    ends: RefCell<HashSet<End>>,
    gathered: RefCell<Gathered>,
}

/// Frames that were taken from the port, the first one first.
#[derive(Debug, Default)]
struct Gathered {
    frames: VecDeque<Vec<u8>>,
    bytes: usize,
}

impl Holder {
    /// Puts the port into the bridge of a cable that was attached quietly. `None` for a pod without a bridge.
    pub fn start(attachment: &Attachment) -> Result<Option<Holder>> {
        let (Some(link), Some(bridge)) = (&attachment.host_link, &attachment.bridge) else { return Ok(None) };
        let name = link.replacen("pod", "pdh", 1);
        let control = netdev::control_socket().doing(|| "open a socket".into())?;
        let tap = netdev::tap(&name).doing(|| format!("make the holding port {name}"))?;
        let mut wanted = vec![attachment.mac, [0xff; 6]];
        for ip in attachment.addresses.iter().map(|address| address.ip).chain([IpAddr::V6(link_local(&attachment.mac))])
        {
            if let IpAddr::V6(ip) = ip {
                wanted.push(solicited_node(ip));
            }
        }
        netdev::tap_filter(tap.as_fd(), &wanted).doing(|| format!("filter the frames of {name}"))?;
        netdev::set_queue_length(control.as_fd(), &name, QUEUE).doing(|| format!("size the queue of {name}"))?;
        let index = netdev::index(control.as_fd(), &name).doing(|| format!("find {name}"))?;
        // A port with a smaller MTU would lower that of the whole bridge.
        let mtu = netdev::mtu(control.as_fd(), bridge).doing(|| format!("read the MTU of {bridge}"))?;
        let up = silent_up(LinkUnspec::new_with_index(index).mtu(mtu), &name);
        Wire::open()?.batch(up.into())?;
        netdev::bridge_port(control.as_fd(), bridge, index, true).doing(|| format!("plug {name} into {bridge}"))?;
        let outside = netdev::index(control.as_fd(), link).doing(|| format!("find the pod's cable {link}"))?;
        let injector = netdev::packet_socket(outside, Receive::Nothing, true);
        let injector = injector.doing(|| "open a packet socket to the pod".into())?;
        let (mac, addresses) = (attachment.mac, attachment.addresses.clone());
        Ok(Some(Holder { tap, injector, mac, addresses, ends: RefCell::default(), gathered: RefCell::default() }))
    }

    /// Forgets what has come: as long as the pod runs elsewhere, what all of the bridge got (broadcasts), and the pod too.
    pub fn forget(&self) {
        self.gathered.replace(Gathered::default());
        let mut buffer = [0; 64];
        // What does not fit is cut off.
        while matches!(read(&self.tap, &mut buffer), Ok(_) | Err(nix::Error::EINTR)) {}
    }

    /// Draws the pod's frames here: gratuitous ARP and neighbour advertisements, from this port.
    pub fn announce(&self) -> Result<()> {
        for frame in announce::frames(&self.mac, &self.addresses) {
            let mut framed = vec![0; netdev::VNET_HEADER];
            framed.extend_from_slice(&frame);
            write(&self.tap, &framed).doing(|| "announce the holding port".into())?;
        }
        Ok(())
    }

    /// Hands to the pod what the source heard before anybody held anything ([`super::knocks`]).
    pub fn hand(&self, frames: &[impl AsRef<[u8]>]) {
        for frame in frames {
            if let Err(error) = send(self.injector.as_raw_fd(), frame.as_ref(), MsgFlags::empty()) {
                tracing::debug!("a frame of the source's was lost: {error}");
            }
        }
    }

    /// Hands everything that was held to the pod. Returns the number of frames. Call it after the pod's port has joined
    /// the bridge and its sockets have left repair mode; its tasks need not run. Drop the holder when the pod runs:
    /// unregistering a device waits for the whole kernel (10–40 ms), and the pod should not wait with it. What strays in until
    /// then can be injected again.
    pub fn inject(&self) -> usize {
        let mut buffer = vec![0; LONGEST];
        let mut frames = 0;
        loop {
            let gathered = self.gathered.borrow_mut().frames.pop_front();
            if let Some(frame) = gathered {
                self.gathered.borrow_mut().bytes -= frame.len();
                frames += usize::from(self.pass_on(&frame));
                continue;
            }
            let Some(length) = self.next(&mut buffer) else { return frames };
            frames += usize::from(self.pass_on(&buffer[..length]));
        }
    }

    /// Takes what waits in the port's queue, so that there is room in it: a full one would drop the answer to the pod's first
    /// question about a neighbour, which is asked again only after a second.
    pub fn gather(&self) {
        let mut buffer = vec![0; LONGEST];
        let Gathered { frames, bytes } = &mut *self.gathered.borrow_mut();
        while *bytes < MOST_GATHERED {
            let Some(length) = self.next(&mut buffer) else { return };
            frames.push_back(buffer[..length].to_vec());
            *bytes += length;
        }
    }

    /// The length of the frame that has waited longest. None waits for one to come.
    fn next(&self, buffer: &mut [u8]) -> Option<usize> {
        loop {
            match read(&self.tap, buffer) {
                Ok(length) => return Some(length),
                Err(nix::Error::EINTR) => {}
                // Empty.
                Err(_) => return None,
            }
        }
    }

    fn pass_on(&self, frame: &[u8]) -> bool {
        // The end of a connection that was waited for long enough to be said again: the first is answered, and whoever
        // sent it knows nothing of the connection when the second is.
        let end = end_of_connection(&frame[netdev::VNET_HEADER.min(frame.len())..]);
        if end.as_ref().is_some_and(|end| self.ends.borrow().contains(end)) {
            return false;
        }
        // A frame that the pod's queue has no room for is lost as on any link; its sender repeats it.
        let sent = send(self.injector.as_raw_fd(), frame, MsgFlags::empty());
        match sent {
            Ok(_) => self.ends.borrow_mut().extend(end),
            Err(error) => tracing::debug!("a held frame of {} bytes was lost: {error}", frame.len()),
        }
        sent.is_ok()
    }
}

/// From where to where, and the number.
type End = (SocketAddr, SocketAddr, u32);

/// What names a FIN without data.
fn end_of_connection(frame: &[u8]) -> Option<End> {
    let tcp = TcpFrame::parse(frame).filter(|tcp| tcp.flags & FIN != 0 && tcp.data == 0)?;
    Some((tcp.source, tcp.destination, tcp.sequence))
}

/// The Ethernet address of the group that is asked for an IPv6 address's neighbour.
fn solicited_node(ip: Ipv6Addr) -> Mac {
    let [.., a, b, c] = ip.octets();
    [0x33, 0x33, 0xff, a, b, c]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ethernet, IPv4 of so many bytes, TCP with a header of 20.
    fn frame(length: u16, number: u8, flags: u8) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend_from_slice(&[8, 0, 0x45, 0]);
        frame.extend_from_slice(&length.to_be_bytes());
        frame.extend_from_slice(&[0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend_from_slice(&[1, 1, 2, 2, 0, 0, 0, number, 0, 0, 0, 9, 5 << 4, flags, 1, 1, 0, 0, 0, 0]);
        frame.resize(64, 0); // as an Ethernet pads it
        frame
    }

    #[test]
    fn an_end_is_known_by_its_number() {
        let end = end_of_connection(&frame(40, 7, 0x11)).unwrap();
        assert_eq!(end, ("10.0.0.1:257".parse().unwrap(), "10.0.0.2:514".parse().unwrap(), 7));
        assert_eq!(end_of_connection(&frame(40, 7, 0x19)).as_ref(), Some(&end));
        assert_ne!(end_of_connection(&frame(40, 8, 0x11)).as_ref(), Some(&end));
        // Data before it, no end, and what is cut short.
        assert_eq!(end_of_connection(&frame(41, 7, 0x11)), None);
        assert_eq!(end_of_connection(&frame(40, 7, 0x10)), None);
        for length in 0..48 {
            end_of_connection(&frame(40, 7, 0x11)[..length]);
        }
    }
}
