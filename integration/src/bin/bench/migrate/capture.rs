//! Frames on the LAN as the client's cable carries them: when the pod's came, which were sent again, which were resets.
//!
//! The kernel puts the beginning of each frame with its time into a ring that we share with it, a block at a time: no system
//! call a frame, for the two processors of a small machine are the load's.

use super::clock;
use anyhow::{Context, Result, ensure};
use integration::bed::Host;
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use std::collections::HashMap;
use std::ffi::c_void;
use std::mem::{offset_of, size_of};
use std::net::Ipv4Addr;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;

const BLOCK: usize = 1 << 20;
const BLOCKS: usize = 32;
/// Enough for Ethernet, IP and TCP with options.
const HEADERS: u32 = 128;
/// After so many milliseconds a block is given to us however little is in it.
const RETIRE: u32 = 20;

/// What was seen: times by [`clock`].
#[derive(Debug, Default)]
pub struct Seen {
    /// Frames of IPv4 that the pod's address sent, sorted.
    pub frames: Vec<u64>,
    pub resets: Vec<u64>,
    /// Segments with data that had gone by before.
    pub again: Vec<u64>,
    /// Frames for which there was no room.
    pub missed: u32,
}

pub struct Capture {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Seen>>,
}

impl Capture {
    /// Looks at a host's cable from now on.
    pub fn start(host: &Host, pod: Ipv4Addr) -> Result<Capture> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = host.thread(move || {
            let ring = Ring::new("eth0")?;
            let mut watch = Watch { pod: pod.octets(), ends: HashMap::new(), seen: Seen::default() };
            let epoch = clock::since_epoch()?;
            let mut next = 0;
            while !stopped.load(Ordering::Relaxed) {
                if !ring.look(next, |frame, time| watch.frame(frame, time.saturating_sub(epoch))) {
                    ring.wait()?;
                    continue;
                }
                next = (next + 1) % BLOCKS;
            }
            watch.seen.missed = ring.missed()?;
            // Two processors put frames into a ring in another order than that of their times.
            watch.seen.frames.sort_unstable();
            Ok(watch.seen)
        })?;
        Ok(Capture { stop, thread })
    }

    pub fn finish(self) -> Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().ok().context("the capture panicked")?
    }
}

/// A packet socket and the memory that it shares with the kernel.
struct Ring {
    socket: OwnedFd,
    memory: NonNull<u8>,
}

fn option<T>(socket: &OwnedFd, level: i32, name: i32, value: &T) -> Result<()> {
    let length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the value lives across the call and is as long as is said.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const *value).cast(), length) };
    Errno::result(result).with_context(|| format!("option {name} of a packet socket"))?;
    Ok(())
}

impl Ring {
    fn new(device: &str) -> Result<Ring> {
        let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None::<SockProtocol>)?;
        option(&socket, libc::SOL_PACKET, libc::PACKET_VERSION, &(libc::tpacket_versions::TPACKET_V3 as i32))?;
        // A program of one instruction: that much of every frame.
        let mut all = libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: HEADERS };
        let program = libc::sock_fprog { len: 1, filter: &raw mut all };
        option(&socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)?;
        let shape = libc::tpacket_req3 {
            tp_block_size: BLOCK as u32,
            tp_block_nr: BLOCKS as u32,
            tp_frame_size: 2048,
            tp_frame_nr: (BLOCK * BLOCKS / 2048) as u32,
            tp_retire_blk_tov: RETIRE,
            tp_sizeof_priv: 0,
            tp_feature_req_word: 0,
        };
        option(&socket, libc::SOL_PACKET, libc::PACKET_RX_RING, &shape)?;
        let length = NonZeroUsize::new(BLOCK * BLOCKS).context("a ring has a size")?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let memory = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, socket.as_fd(), 0)? }.cast();
        let ring = Ring { socket, memory };
        ring.bind(device)?;
        Ok(ring)
    }

    fn bind(&self, device: &str) -> Result<()> {
        let index = nix::net::if_::if_nametoindex(device).with_context(|| device.to_owned())?;
        // SAFETY: all of it may be zero.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = index as i32;
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: the address lives across the call and is as long as is said.
        let result = unsafe { libc::bind(self.socket.as_raw_fd(), (&raw const address).cast(), length) };
        Errno::result(result).context("bind a packet socket")?;
        Ok(())
    }

    /// Who the block belongs to: a word that the kernel changes.
    fn status(&self, block: usize) -> &AtomicU32 {
        let at = offset_of!(libc::tpacket_block_desc, hdr) + offset_of!(libc::tpacket_hdr_v1, block_status);
        // SAFETY: inside of the ring, aligned, and only accessed as an atomic while it lives.
        unsafe { AtomicU32::from_ptr(self.memory.as_ptr().add(block * BLOCK + at).cast()) }
    }

    /// Shows the frames of a block with their times of the day and gives it back; false when it is not ours yet.
    fn look(&self, block: usize, mut show: impl FnMut(&[u8], u64)) -> bool {
        if self.status(block).load(Ordering::Acquire) & libc::TP_STATUS_USER == 0 {
            return false;
        }
        // SAFETY: inside of the ring; the kernel does not write it before the status says that it is its own again.
        let bytes = unsafe { std::slice::from_raw_parts(self.memory.as_ptr().add(block * BLOCK), BLOCK) };
        let header = offset_of!(libc::tpacket_block_desc, hdr);
        let count = word(bytes, header + offset_of!(libc::tpacket_hdr_v1, num_pkts));
        let mut at = word(bytes, header + offset_of!(libc::tpacket_hdr_v1, offset_to_first_pkt)) as usize;
        for _ in 0..count {
            let field = |offset| word(bytes, at + offset);
            let time = u64::from(field(offset_of!(libc::tpacket3_hdr, tp_sec))) * 1_000_000_000
                + u64::from(field(offset_of!(libc::tpacket3_hdr, tp_nsec)));
            // Two halves of a word: tp_mac is the first in memory.
            let mac = field(offset_of!(libc::tpacket3_hdr, tp_mac)).to_ne_bytes();
            let from = at + usize::from(u16::from_ne_bytes([mac[0], mac[1]]));
            show(&bytes[from..from + field(offset_of!(libc::tpacket3_hdr, tp_snaplen)) as usize], time);
            at += field(offset_of!(libc::tpacket3_hdr, tp_next_offset)) as usize;
        }
        self.status(block).store(libc::TP_STATUS_KERNEL, Ordering::Release);
        true
    }

    fn wait(&self) -> Result<()> {
        match poll(&mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)], PollTimeout::from(100u8)) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Frames that found the ring full.
    fn missed(&self) -> Result<u32> {
        // SAFETY: all of it may be zero.
        let mut counts: libc::tpacket_stats_v3 = unsafe { std::mem::zeroed() };
        let mut length = size_of::<libc::tpacket_stats_v3>() as libc::socklen_t;
        let socket = self.socket.as_raw_fd();
        // SAFETY: both live across the call, and the counts have room for what the length says.
        let result = unsafe {
            let into = (&raw mut counts).cast();
            libc::getsockopt(socket, libc::SOL_PACKET, libc::PACKET_STATISTICS, into, &raw mut length)
        };
        Errno::result(result).context("statistics of a packet socket")?;
        ensure!(length as usize >= size_of::<libc::tpacket_stats>(), "short statistics");
        Ok(counts.tp_drops)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: ours, mapped with this length, and nothing of it is borrowed any more.
        let _ = unsafe { munmap(self.memory.cast::<c_void>(), BLOCK * BLOCKS) };
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// What is known of the flows so far.
struct Watch {
    pod: [u8; 4],
    /// By direction and ports: up to where data has gone by.
    ends: HashMap<(bool, u16, u16), u32>,
    seen: Seen,
}

impl Watch {
    fn frame(&mut self, frame: &[u8], time: u64) {
        const IPV4: [u8; 2] = [8, 0];
        let Some(ip) = frame.get(14..).filter(|_| frame[12..14] == IPV4) else { return };
        if ip.len() < 20 || (ip[12..16] != self.pod && ip[16..20] != self.pod) {
            return;
        }
        let out = ip[12..16] == self.pod;
        if out {
            self.seen.frames.push(time);
        }
        let (length, header) = (usize::from(u16::from_be_bytes([ip[2], ip[3]])), usize::from(ip[0] & 15) * 4);
        const TCP: u8 = 6;
        if ip[9] == TCP
            && let Some(tcp) = ip.get(header..header + 20)
        {
            let data = length.saturating_sub(header + usize::from(tcp[12] >> 4) * 4);
            self.segment(out, tcp, data as u32, time);
        }
    }

    fn segment(&mut self, out: bool, tcp: &[u8], data: u32, time: u64) {
        const SYN: u8 = 2;
        const RST: u8 = 4;
        let two = |at: usize| u16::from_be_bytes([tcp[at], tcp[at + 1]]);
        let (key, flags) = ((out, two(0), two(2)), tcp[13]);
        let sequence = u32::from(two(4)) << 16 | u32::from(two(6));
        let end = sequence.wrapping_add(data);
        if flags & RST != 0 {
            self.seen.resets.push(time);
        }
        let known = self.ends.entry(key).or_insert(sequence);
        // Numbers go round; what lies up to half of them behind is old.
        if flags & SYN != 0 {
            *known = sequence.wrapping_add(1);
        } else if end.wrapping_sub(*known) as i32 > 0 {
            *known = end;
        } else if data > 0 {
            self.seen.again.push(time);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(from: [u8; 4], to: [u8; 4], sequence: u32, flags: u8, data: u16) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([8, 0, 0x45, 0]);
        frame.extend((40 + data).to_be_bytes());
        frame.extend([0, 0, 0, 0, 64, 6, 0, 0]);
        frame.extend(from);
        frame.extend(to);
        frame.extend([0, 80, 0, 99]);
        frame.extend(sequence.to_be_bytes());
        frame.extend([0, 0, 0, 0, 5 << 4, flags, 0, 0, 0, 0, 0, 0]);
        frame
    }

    #[test]
    fn what_goes_by_twice_is_sent_again() {
        let (pod, client) = ([10, 0, 0, 1], [10, 0, 0, 2]);
        let mut watch = Watch { pod, ends: HashMap::new(), seen: Seen::default() };
        watch.frame(&frame(pod, client, u32::MAX - 9, 0, 100), 1);
        watch.frame(&frame(pod, client, 90, 0, 10), 2);
        watch.frame(&frame(pod, client, u32::MAX - 9, 0, 100), 3);
        watch.frame(&frame(client, pod, 7, 0, 0), 4);
        watch.frame(&frame(client, pod, 7, 4, 0), 5);
        watch.frame(&frame(client, client, 7, 4, 0), 6);
        assert_eq!((watch.seen.frames, watch.seen.again, watch.seen.resets), (vec![1, 2, 3], vec![3], vec![5]));
    }
}
