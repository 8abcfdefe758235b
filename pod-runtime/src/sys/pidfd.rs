//! Processes and their descriptors by pidfd.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// pidfd_open(2).
pub fn open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes numbers only.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// The process's number on this host; none when it has ended and was reaped.
pub fn pid_of(pidfd: impl AsFd) -> io::Result<Option<i32>> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_fd().as_raw_fd()))?;
    let pids = crate::proc::fdinfo::parse(&text).pidfd();
    Ok(pids.and_then(|pids| pids.first().copied()).filter(|pid| *pid > 0))
}

/// pidfd_getfd(2): a copy of descriptor `fd` of that process, close-on-exec.
pub fn get_fd(pidfd: impl AsFd, fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: takes numbers only; `pidfd` is open across the call.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_fd().as_raw_fd(), fd, 0) })
}

/// pidfd_send_signal(2).
pub fn send_signal(pidfd: impl AsFd, signal: i32) -> io::Result<()> {
    let fd = pidfd.as_fd().as_raw_fd();
    // SAFETY: takes numbers and a null siginfo; `pidfd` is open across the call.
    let result =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, std::ptr::null::<libc::siginfo_t>(), 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// pidfd_open(2) with PIDFD_THREAD: of any thread (Linux 6.9 and later; EINVAL before).
pub fn open_thread(tid: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes numbers only.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, tid, libc::O_EXCL) })
}

/// Of a process by its number, or of a thread that does not lead one.
pub fn open_any(tid: i32) -> io::Result<OwnedFd> {
    match open(tid) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => open_thread(tid),
        opened => opened,
    }
}
