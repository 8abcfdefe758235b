//! Socket options, addresses and queues as the kernel gives them: raw bytes for options, so that what is read on one
//! host is set on another without knowing each option's structure.

use std::ffi::c_int;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// socket(2), close-on-exec.
pub fn socket(family: c_int, kind: c_int, protocol: c_int) -> io::Result<OwnedFd> {
    // SAFETY: no pointers; the result is a new fd that nobody else owns.
    unsafe { Ok(OwnedFd::from_raw_fd(check(libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol))?)) }
}

/// getsockopt(2) into at most `capacity` bytes. Some options (TCP_REPAIR_WINDOW, IP_MSFILTER) also read what is passed
/// in: `input` stands at the beginning of the buffer.
pub fn option(fd: BorrowedFd<'_>, level: c_int, name: c_int, input: &[u8], capacity: usize) -> io::Result<Vec<u8>> {
    let mut value = vec![0; capacity.max(input.len())];
    value[..input.len()].copy_from_slice(input);
    let mut length = value.len() as libc::socklen_t;
    // SAFETY: the buffer is writable for `length` bytes, the kernel writes no more and tells how many.
    check(unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &mut length) })?;
    value.truncate(length as usize);
    Ok(value)
}

/// An option whose value is one int.
pub fn number(fd: BorrowedFd<'_>, level: c_int, name: c_int) -> io::Result<i32> {
    let value = option(fd, level, name, &[], size_of::<c_int>())?;
    let mut bytes = [0; size_of::<c_int>()];
    bytes[..value.len()].copy_from_slice(&value);
    Ok(i32::from_ne_bytes(bytes))
}

/// setsockopt(2).
pub fn set_option(fd: BorrowedFd<'_>, level: c_int, name: c_int, value: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel reads at most the given number of bytes from the buffer. Options whose value contains a
    // pointer (SO_ATTACH_FILTER) have a wrapper of their own.
    check(unsafe {
        libc::setsockopt(fd.as_raw_fd(), level, name, value.as_ptr().cast(), value.len() as libc::socklen_t)
    })?;
    Ok(())
}

pub fn set_number(fd: BorrowedFd<'_>, level: c_int, name: c_int, value: i32) -> io::Result<()> {
    set_option(fd, level, name, &value.to_ne_bytes())
}

/// The classic BPF filter of a socket as `sock_filter`s of 8 bytes; empty without one. EACCES for an eBPF one.
pub fn filter(fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let mut length: libc::socklen_t = 0;
    // SAFETY: with length 0 the kernel writes nothing but the number of instructions.
    check(unsafe {
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_GET_FILTER, std::ptr::null_mut(), &mut length)
    })?;
    let mut value = vec![0; length as usize * 8];
    if length > 0 {
        // SAFETY: for this option the length counts instructions of 8 bytes, and the buffer has room for that many.
        check(unsafe {
            let buffer = value.as_mut_ptr().cast();
            libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_GET_FILTER, buffer, &mut length)
        })?;
        value.truncate(length as usize * 8);
    }
    Ok(value)
}

/// SO_ATTACH_FILTER with instructions as [`filter`] gives them.
pub fn attach_filter(fd: BorrowedFd<'_>, instructions: &[u8]) -> io::Result<()> {
    attach(fd, libc::SO_ATTACH_FILTER, instructions)
}

/// SO_ATTACH_REUSEPORT_CBPF: a classic program for the group that the socket is in.
pub fn attach_reuseport(fd: BorrowedFd<'_>, instructions: &[u8]) -> io::Result<()> {
    attach(fd, libc::SO_ATTACH_REUSEPORT_CBPF, instructions)
}

fn attach(fd: BorrowedFd<'_>, option: c_int, instructions: &[u8]) -> io::Result<()> {
    let count = instructions.len() / 8;
    if count == 0 || count > 4096 || !instructions.len().is_multiple_of(8) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // Aligned as the kernel's structure is; the kernel copies it.
    let aligned: Vec<u64> =
        instructions.chunks_exact(8).map(|eight| u64::from_ne_bytes(eight.try_into().expect("eight bytes"))).collect();
    let program = libc::sock_fprog { len: count as u16, filter: aligned.as_ptr().cast_mut().cast() };
    // SAFETY: the program points to `count` instructions that outlive the call; the kernel verifies and copies them.
    check(unsafe {
        let value = (&raw const program).cast();
        let length = size_of::<libc::sock_fprog>() as libc::socklen_t;
        libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, option, value, length)
    })?;
    Ok(())
}

/// Bytes that wait to be read (SIOCINQ).
pub fn unread(fd: BorrowedFd<'_>) -> io::Result<usize> {
    queue(fd, libc::FIONREAD)
}

/// Bytes that the peer has not acknowledged (SIOCOUTQ); a FIN counts as one.
pub fn unacknowledged(fd: BorrowedFd<'_>) -> io::Result<usize> {
    queue(fd, libc::TIOCOUTQ)
}

/// Bytes that were not sent yet (SIOCOUTQNSD); a FIN counts as one.
pub fn unsent(fd: BorrowedFd<'_>) -> io::Result<usize> {
    const SIOCOUTQNSD: libc::c_ulong = 0x894b;
    queue(fd, SIOCOUTQNSD)
}

fn queue(fd: BorrowedFd<'_>, request: libc::c_ulong) -> io::Result<usize> {
    let mut bytes: c_int = 0;
    // SAFETY: all these requests write one int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request, &mut bytes) })?;
    Ok(bytes.max(0) as usize)
}

/// A socket address as bytes: family first, as the kernel has it.
pub type Address = Vec<u8>;

/// getsockname(2).
pub fn local_address(fd: BorrowedFd<'_>) -> io::Result<Address> {
    address(|storage, length| {
        // SAFETY: the storage is writable for `length` bytes; the kernel writes no more and tells how many it has.
        unsafe { libc::getsockname(fd.as_raw_fd(), storage, length) }
    })
}

/// getpeername(2).
pub fn peer_address(fd: BorrowedFd<'_>) -> io::Result<Address> {
    address(|storage, length| {
        // SAFETY: as in `local_address`.
        unsafe { libc::getpeername(fd.as_raw_fd(), storage, length) }
    })
}

fn address(get: impl FnOnce(*mut libc::sockaddr, *mut libc::socklen_t) -> c_int) -> io::Result<Address> {
    let mut storage = [0u64; 16];
    let mut length: libc::socklen_t = 128;
    check(get(storage.as_mut_ptr().cast(), &mut length))?;
    let bytes = storage.iter().flat_map(|eight| eight.to_ne_bytes());
    Ok(bytes.take((length as usize).min(128)).collect())
}

/// bind(2).
pub fn bind(fd: BorrowedFd<'_>, address: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel reads the given number of bytes and checks that they make an address.
    check(unsafe { libc::bind(fd.as_raw_fd(), address.as_ptr().cast(), address.len() as libc::socklen_t) })?;
    Ok(())
}

/// connect(2).
pub fn connect(fd: BorrowedFd<'_>, address: &[u8]) -> io::Result<()> {
    // SAFETY: as in `bind`.
    check(unsafe { libc::connect(fd.as_raw_fd(), address.as_ptr().cast(), address.len() as libc::socklen_t) })?;
    Ok(())
}

/// sendto(2) of one message.
pub fn send_to(fd: BorrowedFd<'_>, bytes: &[u8], address: &[u8], flags: c_int) -> io::Result<usize> {
    // SAFETY: both buffers outlive the call and their sizes are given; an empty address is none.
    let sent = unsafe {
        let to = if address.is_empty() { std::ptr::null() } else { address.as_ptr().cast() };
        let length = address.len() as libc::socklen_t;
        libc::sendto(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags, to, length)
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(sent as usize) }
}

/// What one recvmsg(2) gave.
#[derive(Debug, Default)]
pub struct Message {
    pub bytes: Vec<u8>,
    pub from: Address,
    /// Level, type and data of each control message.
    pub control: Vec<(c_int, c_int, Vec<u8>)>,
    pub flags: c_int,
}

/// recvmsg(2) of at most `capacity` bytes.
pub fn receive(fd: BorrowedFd<'_>, capacity: usize, flags: c_int) -> io::Result<Message> {
    let mut bytes = vec![0u8; capacity];
    let mut from = [0u64; 16];
    let mut control = [0u64; 128];
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: capacity };
    // SAFETY: msghdr is plain data for which all zeroes is a value.
    let mut header: libc::msghdr = unsafe { zeroed() };
    header.msg_name = from.as_mut_ptr().cast();
    header.msg_namelen = 128;
    header.msg_iov = &mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control);
    // SAFETY: all three buffers are writable for the sizes given and outlive the call.
    let length = unsafe { libc::recvmsg(fd.as_raw_fd(), &mut header, flags) };
    if length < 0 {
        return Err(io::Error::last_os_error());
    }
    bytes.truncate((length as usize).min(capacity));
    let from = from.iter().flat_map(|eight| eight.to_ne_bytes()).take(header.msg_namelen as usize).collect();
    let mut messages = Vec::new();
    // SAFETY: the CMSG macros walk the control buffer that the kernel has just filled, within msg_controllen; the data
    // of each message lies inside it.
    unsafe {
        let mut next = libc::CMSG_FIRSTHDR(&header);
        while let Some(one) = next.as_ref() {
            let length = one.cmsg_len - libc::CMSG_LEN(0) as usize;
            let data = std::slice::from_raw_parts(libc::CMSG_DATA(one), length).to_vec();
            messages.push((one.cmsg_level, one.cmsg_type, data));
            next = libc::CMSG_NXTHDR(&header, one);
        }
    }
    Ok(Message { bytes, from, control: messages, flags: header.msg_flags })
}

/// The network namespace that a socket belongs to (SIOCGSKNS).
pub fn namespace(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const SIOCGSKNS: libc::c_ulong = 0x894c;
    // SAFETY: the request takes no argument; the result is a new fd that nobody else owns.
    unsafe { Ok(OwnedFd::from_raw_fd(check(libc::ioctl(fd.as_raw_fd(), SIOCGSKNS))?)) }
}

/// What poll(2) says at this moment, of `events` and the conditions that are always reported.
pub fn poll_now(fd: BorrowedFd<'_>, events: i16) -> io::Result<i16> {
    let mut one = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    // SAFETY: one pollfd is passed and outlives the call.
    check(unsafe { libc::poll(&mut one, 1, 0) })?;
    Ok(one.revents)
}
