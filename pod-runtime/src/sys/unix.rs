//! Messages of unix sockets with descriptors and credentials, and the file that a socket is bound to.

use std::io;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// The kernel's SCM_MAX_FD.
const MOST_FDS: usize = 253;

/// pid, uid, gid; the pid in the reader's numbering.
pub type Credentials = (i32, u32, u32);

/// What one recvmsg(2) gave.
#[derive(Debug, Default)]
pub struct Message {
    pub bytes: Vec<u8>,
    /// The sender's sockaddr_un; empty when it has no name.
    pub from: Vec<u8>,
    pub fds: Vec<OwnedFd>,
    pub credentials: Option<Credentials>,
    /// The message (or its control part) was longer.
    pub truncated: bool,
}

/// recvmsg(2) with MSG_PEEK: takes nothing, never waits; descriptors come as copies.
pub fn peek(fd: BorrowedFd<'_>, capacity: usize) -> io::Result<Message> {
    receive(fd, capacity, libc::MSG_PEEK | libc::MSG_DONTWAIT)
}

/// recvmsg(2): waits for one, and takes it.
pub fn take(fd: BorrowedFd<'_>, capacity: usize) -> io::Result<Message> {
    receive(fd, capacity, 0)
}

fn receive(fd: BorrowedFd<'_>, capacity: usize, flags: i32) -> io::Result<Message> {
    let mut bytes = vec![0u8; capacity];
    let mut from = [0u64; 16];
    let mut control = [0u64; 256];
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: capacity };
    // SAFETY: msghdr is plain data for which all zeroes is a value.
    let mut header: libc::msghdr = unsafe { zeroed() };
    header.msg_name = from.as_mut_ptr().cast();
    header.msg_namelen = 128;
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control);
    // SAFETY: all three buffers are writable for the sizes given and outlive the call.
    let length = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut header, flags | libc::MSG_CMSG_CLOEXEC) };
    if length < 0 {
        return Err(io::Error::last_os_error());
    }
    bytes.truncate((length as usize).min(capacity));
    let name = from.iter().flat_map(|eight| eight.to_ne_bytes()).take(header.msg_namelen as usize).collect();
    let truncated = header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0;
    let mut message = Message { bytes, from: name, truncated, ..Message::default() };
    // SAFETY: the CMSG macros walk the control buffer that the kernel has just filled, within msg_controllen; the
    // descriptors in it are new and nobody else owns them; ucred is plain data.
    unsafe {
        let mut next = libc::CMSG_FIRSTHDR(&raw const header);
        while let Some(one) = next.as_ref() {
            let length = one.cmsg_len - libc::CMSG_LEN(0) as usize;
            let data = libc::CMSG_DATA(one);
            if one.cmsg_level == libc::SOL_SOCKET && one.cmsg_type == libc::SCM_RIGHTS {
                for index in 0..length / size_of::<RawFd>() {
                    let number = data.cast::<RawFd>().add(index).read_unaligned();
                    message.fds.push(OwnedFd::from_raw_fd(number));
                }
            }
            if one.cmsg_level == libc::SOL_SOCKET && one.cmsg_type == libc::SCM_CREDENTIALS {
                let ucred = data.cast::<libc::ucred>().read_unaligned();
                message.credentials = Some((ucred.pid, ucred.uid, ucred.gid));
            }
            next = libc::CMSG_NXTHDR(&raw const header, one);
        }
    }
    Ok(message)
}

/// sendmsg(2) without waiting and without SIGPIPE. An empty `to` is the peer.
pub fn send(
    fd: BorrowedFd<'_>,
    bytes: &[u8],
    to: &[u8],
    fds: &[RawFd],
    credentials: Option<Credentials>,
) -> io::Result<usize> {
    if fds.len() > MOST_FDS {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mut control = [0u64; 256];
    let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: msghdr is plain data for which all zeroes is a value.
    let mut header: libc::msghdr = unsafe { zeroed() };
    if !to.is_empty() {
        header.msg_name = to.as_ptr().cast_mut().cast();
        header.msg_namelen = to.len() as libc::socklen_t;
    }
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    let mut used = 0;
    let mut put = |kind: i32, data: &[u8]| {
        // SAFETY: 2048 bytes hold the largest list of descriptors and one ucred; `used` stays aligned by CMSG_SPACE.
        unsafe {
            let at = control.as_mut_ptr().cast::<u8>().add(used).cast::<libc::cmsghdr>();
            (*at).cmsg_level = libc::SOL_SOCKET;
            (*at).cmsg_type = kind;
            (*at).cmsg_len = libc::CMSG_LEN(data.len() as u32) as usize;
            std::ptr::copy_nonoverlapping(data.as_ptr(), libc::CMSG_DATA(at), data.len());
            used += libc::CMSG_SPACE(data.len() as u32) as usize;
        }
    };
    if !fds.is_empty() {
        let data: Vec<u8> = fds.iter().flat_map(|fd| fd.to_ne_bytes()).collect();
        put(libc::SCM_RIGHTS, &data);
    }
    if let Some((pid, uid, gid)) = credentials {
        let data: Vec<u8> = [pid.to_ne_bytes(), uid.to_ne_bytes(), gid.to_ne_bytes()].concat();
        put(libc::SCM_CREDENTIALS, &data);
    }
    if used > 0 {
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = used;
    }
    // SAFETY: all buffers outlive the call and their sizes are given; the kernel only reads them.
    let sent = unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const header, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(sent as usize) }
}

/// socketpair(2), close-on-exec.
pub fn pair(kind: i32) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [-1; 2];
    // SAFETY: the kernel writes two descriptors.
    let done = unsafe { libc::socketpair(libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr()) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: new descriptors that nobody else owns.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}

/// listen(2).
pub fn listen(fd: BorrowedFd<'_>, backlog: i32) -> io::Result<()> {
    // SAFETY: numbers only.
    if unsafe { libc::listen(fd.as_raw_fd(), backlog) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// accept4(2), close-on-exec.
pub fn accept(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: no address is asked for.
    let fd = unsafe { libc::accept4(fd.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// shutdown(2) of SHUT_RD, SHUT_WR or SHUT_RDWR.
pub fn shutdown(fd: BorrowedFd<'_>, how: i32) -> io::Result<()> {
    // SAFETY: numbers only.
    if unsafe { libc::shutdown(fd.as_raw_fd(), how) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// SIOCUNIXFILE: an O_PATH descriptor of the file that the socket is bound to, also when it was unlinked.
pub fn bound_file(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const SIOCUNIXFILE: libc::c_ulong = 0x89e0;
    // SAFETY: the request takes no argument.
    let file = unsafe { libc::ioctl(fd.as_raw_fd(), SIOCUNIXFILE as _) };
    if file < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(file) })
}
