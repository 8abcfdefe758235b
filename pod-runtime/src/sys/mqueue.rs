//! POSIX message queues (mq_overview(7)) of the calling thread's IPC namespace. Names are without the slash.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// struct mq_attr.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Attributes {
    pub flags: i64,
    pub most_messages: i64,
    pub message_bytes: i64,
    pub messages: i64,
    reserved: [i64; 4],
}

fn result(value: libc::c_long) -> io::Result<libc::c_long> {
    if value < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

/// mq_open(3) of one that is there; `flags` of open(2).
pub fn open(name: &CStr, flags: i32) -> io::Result<OwnedFd> {
    // SAFETY: the name is terminated; without O_CREAT nothing else is read; the result is a new descriptor.
    unsafe {
        let fd = result(libc::syscall(libc::SYS_mq_open, name.as_ptr(), flags | libc::O_CLOEXEC, 0, 0))?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// mq_open(3) of a new one, for reading and writing without waiting.
pub fn create(name: &CStr, most_messages: i64, message_bytes: i64) -> io::Result<OwnedFd> {
    let attributes = Attributes { most_messages, message_bytes, ..Attributes::default() };
    let flags = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR | libc::O_NONBLOCK | libc::O_CLOEXEC;
    // SAFETY: name and attributes live through the call; the result is a new descriptor.
    unsafe {
        let fd = result(libc::syscall(libc::SYS_mq_open, name.as_ptr(), flags, 0o600, &raw const attributes))?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// mq_unlink(3).
pub fn unlink(name: &CStr) -> io::Result<()> {
    // SAFETY: the name is terminated.
    result(unsafe { libc::syscall(libc::SYS_mq_unlink, name.as_ptr()) }).map(drop)
}

/// mq_getattr(3).
pub fn attributes(queue: BorrowedFd<'_>) -> io::Result<Attributes> {
    let mut attributes = Attributes::default();
    // SAFETY: the kernel writes one struct of ours.
    result(unsafe { libc::syscall(libc::SYS_mq_getsetattr, queue.as_raw_fd(), 0, &raw mut attributes) })?;
    Ok(attributes)
}

/// Takes the first message off a queue: its priority and text, of at most so many bytes. Waits unless O_NONBLOCK is set.
pub fn receive(queue: BorrowedFd<'_>, bytes: usize) -> io::Result<(u32, Vec<u8>)> {
    let (mut text, mut priority) = (vec![0u8; bytes], 0u32);
    // SAFETY: the kernel writes at most so many bytes, and one number.
    let got = result(unsafe {
        let (fd, to) = (queue.as_raw_fd(), text.as_mut_ptr());
        libc::syscall(libc::SYS_mq_timedreceive, fd, to, bytes, &raw mut priority, 0)
    })?;
    text.truncate(got as usize);
    Ok((priority, text))
}

/// mq_send(3).
pub fn send(queue: BorrowedFd<'_>, priority: u32, text: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel reads as many bytes as are there.
    result(unsafe { libc::syscall(libc::SYS_mq_timedsend, queue.as_raw_fd(), text.as_ptr(), text.len(), priority, 0) })
        .map(drop)
}
