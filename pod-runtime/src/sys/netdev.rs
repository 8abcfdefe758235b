//! Network devices: the ioctls that are faster than a netlink request, packet sockets, and tap devices.
//!
//! Every function works on the network namespace of the socket that it is given, not of the calling thread.

use super::inet;
use std::ffi::c_int;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Length of `struct virtio_net_hdr`, which stands before each frame of a tap or packet socket opened here: without
/// it frames with partial checksums or more than one segment would arrive damaged.
pub const VNET_HEADER: usize = 10;

const SIOCBRADDIF: libc::c_ulong = 0x89a2;
const SIOCBRDELIF: libc::c_ulong = 0x89a3;
const PACKET_VNET_HDR: c_int = 15;
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETTXFILTER: libc::c_ulong = 0x4004_54d1;
/// Checksums, IPv4 and IPv6 segments with ECN: what a veth hands over unsegmented.
const TUN_OFFLOADS: libc::c_ulong = 0x01 | 0x02 | 0x04 | 0x08;

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// An `ifreq` with its name filled in, or EINVAL for a name that no device can have.
fn request(name: &str) -> io::Result<libc::ifreq> {
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains('\0') {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: ifreq is plain data for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

/// A socket whose only use is to carry device ioctls of the calling thread's network namespace.
pub fn control_socket() -> io::Result<OwnedFd> {
    // SAFETY: no pointers; the result is a new fd that nobody else owns.
    unsafe { Ok(OwnedFd::from_raw_fd(check(libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0))?)) }
}

/// The index of a device by its name; ENODEV when there is none.
pub fn index(socket: BorrowedFd<'_>, name: &str) -> io::Result<u32> {
    let mut request = request(name)?;
    // SAFETY: SIOCGIFINDEX fills `ifru_ifindex` of the ifreq that it is given; the ifreq outlives the call.
    unsafe {
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFINDEX, &mut request))?;
        Ok(request.ifr_ifru.ifru_ifindex as u32)
    }
}

/// The MTU of a device.
pub fn mtu(socket: BorrowedFd<'_>, name: &str) -> io::Result<u32> {
    let mut request = request(name)?;
    // SAFETY: SIOCGIFMTU fills `ifru_mtu` of the ifreq that it is given; the ifreq outlives the call.
    unsafe {
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFMTU, &mut request))?;
        Ok(request.ifr_ifru.ifru_mtu as u32)
    }
}

/// The hardware address of a device.
pub fn hardware_address(socket: BorrowedFd<'_>, name: &str) -> io::Result<[u8; 6]> {
    let mut request = request(name)?;
    // SAFETY: SIOCGIFHWADDR fills `ifru_hwaddr` of the ifreq that it is given; the ifreq outlives the call.
    let data = unsafe {
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFHWADDR, &mut request))?;
        request.ifr_ifru.ifru_hwaddr.sa_data
    };
    let mut mac = [0; 6];
    for (to, from) in mac.iter_mut().zip(data) {
        *to = from as u8;
    }
    Ok(mac)
}

/// Whether a device was brought up.
pub fn is_up(socket: BorrowedFd<'_>, name: &str) -> io::Result<bool> {
    let mut request = request(name)?;
    // SAFETY: SIOCGIFFLAGS fills `ifru_flags` of the ifreq that it is given; the ifreq outlives the call.
    let flags = unsafe {
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &mut request))?;
        request.ifr_ifru.ifru_flags
    };
    Ok(flags & libc::IFF_UP as libc::c_short != 0)
}

/// Brings a device up or down and keeps its other flags. Down takes 0.2 ms and loses no address of the *peer* of a
/// veth: only the peer's carrier goes.
pub fn set_up(socket: BorrowedFd<'_>, name: &str, up: bool) -> io::Result<()> {
    let mut request = request(name)?;
    // SAFETY: both calls read and write `ifru_flags` of the ifreq, which outlives them.
    unsafe {
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &mut request))?;
        let flags = request.ifr_ifru.ifru_flags;
        let bit = libc::IFF_UP as libc::c_short;
        let wanted = if up { flags | bit } else { flags & !bit };
        if wanted != flags {
            request.ifr_ifru.ifru_flags = wanted;
            check(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request))?;
        }
    }
    Ok(())
}

/// Sets how many frames a device keeps for a slow reader.
pub fn set_queue_length(socket: BorrowedFd<'_>, name: &str, frames: u32) -> io::Result<()> {
    let mut request = request(name)?;
    // `ifru_metric` shares its place and type with `ifr_qlen`, which libc does not name.
    request.ifr_ifru.ifru_metric = frames as c_int;
    // SAFETY: SIOCSIFTXQLEN reads the integer of the ifreq, which outlives the call.
    unsafe { check(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFTXQLEN, &request))? };
    Ok(())
}

/// Puts a device into a bridge or takes it out.
pub fn bridge_port(socket: BorrowedFd<'_>, bridge: &str, port: u32, member: bool) -> io::Result<()> {
    let mut request = request(bridge)?;
    request.ifr_ifru.ifru_ifindex = port as c_int;
    let call = if member { SIOCBRADDIF } else { SIOCBRDELIF };
    // SAFETY: both calls read `ifru_ifindex` of the ifreq, which outlives them.
    unsafe { check(libc::ioctl(socket.as_raw_fd(), call, &request))? };
    Ok(())
}

/// What a packet socket takes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Receive<'a> {
    Nothing,
    /// One EtherType.
    Protocol(u16),
    /// In both directions what a classic BPF program takes, whose instructions are as [`inet::attach_filter`] takes them.
    Filtered(&'a [u8]),
}

/// A raw packet socket bound to a device of the calling thread's namespace. The device must be up before frames are
/// sent, or the first send fails with ENETDOWN. With `vnet_header`, each frame has [`VNET_HEADER`] bytes before it.
pub fn packet_socket(device: u32, receive: Receive<'_>, vnet_header: bool) -> io::Result<OwnedFd> {
    let protocol = match receive {
        Receive::Nothing => 0,
        Receive::Protocol(ether_type) => ether_type.to_be(),
        Receive::Filtered(_) => (libc::ETH_P_ALL as u16).to_be(),
    };
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no pointers; the result is a new fd that nobody else owns.
    let socket = unsafe { OwnedFd::from_raw_fd(check(libc::socket(libc::AF_PACKET, kind, 0))?) };
    let on: c_int = 1;
    if vnet_header {
        // SAFETY: the option value is an int that outlives the call.
        check(unsafe {
            let value = (&raw const on).cast();
            libc::setsockopt(socket.as_raw_fd(), libc::SOL_PACKET, PACKET_VNET_HDR, value, size_of::<c_int>() as u32)
        })?;
    }
    if let Receive::Filtered(instructions) = receive {
        inet::attach_filter(socket.as_fd(), instructions)?;
    }
    // SAFETY: sockaddr_ll is plain data for which all zeroes is a value.
    let mut address: libc::sockaddr_ll = unsafe { zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = device as c_int;
    // SAFETY: the address is a whole sockaddr_ll that outlives the call, and its size is given.
    check(unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of::<libc::sockaddr_ll>() as u32)
    })?;
    Ok(socket)
}

/// Closes a packet socket, for which the whole kernel is waited for (10 ms), in a thread; here where none can be had.
pub fn close_later(socket: OwnedFd) {
    let _ = std::thread::Builder::new().spawn(move || drop(socket));
}

/// Makes a tap device in the calling thread's namespace. It goes away with the fd, so nothing is left of it when its
/// owner is killed. Frames have [`VNET_HEADER`] bytes before them and come unsegmented; the fd does not block.
pub fn tap(name: &str) -> io::Result<OwnedFd> {
    let device = c"/dev/net/tun";
    // SAFETY: the path is a C string; the result is a new fd that nobody else owns.
    let tap = unsafe {
        OwnedFd::from_raw_fd(check(libc::open(device.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC | libc::O_NONBLOCK))?)
    };
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes the ifreq, which outlives the call; TUNSETOFFLOAD takes a number.
    unsafe {
        check(libc::ioctl(tap.as_raw_fd(), TUNSETIFF, &mut request))?;
        check(libc::ioctl(tap.as_raw_fd(), TUNSETOFFLOAD, TUN_OFFLOADS))?;
    }
    Ok(tap)
}

/// Lets only frames to these addresses into a tap's queue. At most 8 are matched exactly by the kernel; multicast
/// addresses beyond are matched by hash, which lets a few others in.
pub fn tap_filter(tap: BorrowedFd<'_>, addresses: &[[u8; 6]]) -> io::Result<()> {
    // struct tun_filter { __u16 flags; __u16 count; __u8 addr[][6]; }
    let mut filter = Vec::with_capacity(4 + addresses.len() * 6);
    filter.extend_from_slice(&0u16.to_ne_bytes());
    filter.extend_from_slice(&(addresses.len() as u16).to_ne_bytes());
    filter.extend(addresses.iter().flatten());
    // SAFETY: the kernel reads `count` addresses after the two numbers, and that many are there.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETTXFILTER, filter.as_ptr()) })?;
    Ok(())
}
