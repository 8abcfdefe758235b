//! Leaving the process that was started: forking a child that lives on, closing what it must not keep, pidfds.

use nix::errno::Errno;
use nix::libc;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Which side of a fork this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fork {
    Parent(i32),
    Child,
}

/// fork(3). The C library puts its own locks right in the child; of others (those of std's stdio) what another thread held stays
/// held there.
pub fn fork() -> nix::Result<Fork> {
    // SAFETY: the child has the caller's thread alone and its own copy of memory, and takes no lock that another thread of
    // `pod` holds for a while, so it may go on as ordinary code.
    match unsafe { libc::fork() } {
        -1 => Err(Errno::last()),
        0 => Ok(Fork::Child),
        pid => Ok(Fork::Parent(pid)),
    }
}

/// Children that have ended can be waited for, also if whoever started this process had decided otherwise.
pub fn expect_children() {
    // SAFETY: the default action runs no code of ours.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

/// Ends this process without running destructors or exit handlers of the process it was forked from.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit does not return and touches no memory of ours.
    unsafe { libc::_exit(code) }
}

/// pidfd_open(2), close-on-exec.
pub fn pidfd_open(pid: i32) -> nix::Result<OwnedFd> {
    // SAFETY: plain integers; the result is a new descriptor that nobody else owns.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = Errno::result(fd)? as RawFd;
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// pidfd_send_signal(2).
pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> nix::Result<()> {
    // SAFETY: the borrowed descriptor is open; a null siginfo asks for the one that kill(2) sends.
    let done = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, std::ptr::null::<libc::siginfo_t>(), 0)
    };
    Errno::result(done).map(drop)
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Code(i32),
    Signal(i32),
}

impl Ended {
    /// As a shell counts it: the code, or 128 and the signal.
    pub fn code(self) -> i32 {
        match self {
            Ended::Code(code) => code,
            Ended::Signal(signal) => 128 + signal,
        }
    }
}

/// Reaps one child that has ended, any one; `None` when there is none now. By waitid, because waitpid wrappers reject
/// real-time signals.
pub fn reap_any() -> nix::Result<Option<(i32, Ended)>> {
    wait(libc::P_ALL, 0, libc::WNOHANG)
}

/// Waits until this child has ended and reaps it.
pub fn reap(pid: i32) -> nix::Result<Ended> {
    match wait(libc::P_PID, pid as libc::id_t, 0)? {
        Some((_, ended)) => Ok(ended),
        None => Err(Errno::ECHILD),
    }
}

fn wait(kind: libc::idtype_t, id: libc::id_t, flags: i32) -> nix::Result<Option<(i32, Ended)>> {
    loop {
        // SAFETY: siginfo_t is plain data for which all zeroes is valid.
        let mut found: libc::siginfo_t = unsafe { std::mem::zeroed() };
        // SAFETY: `found` outlives the call.
        let done = unsafe { libc::waitid(kind, id, &mut found, libc::WEXITED | libc::__WALL | flags) };
        match Errno::result(done) {
            Err(Errno::EINTR) => continue,
            Err(Errno::ECHILD) if flags & libc::WNOHANG != 0 => return Ok(None),
            Err(error) => return Err(error),
            Ok(_) => {}
        }
        // SAFETY: waitid filled the fields of a SIGCHLD, or left zeroes.
        let (pid, status) = unsafe { (found.si_pid(), found.si_status()) };
        return Ok((pid != 0).then(|| {
            let ended = if found.si_code == libc::CLD_EXITED { Ended::Code(status) } else { Ended::Signal(status) };
            (pid, ended)
        }));
    }
}

/// Closes every descriptor from 3 up that is not in `keep`.
pub fn close_all_but(keep: &[RawFd]) {
    let mut keep: Vec<RawFd> = keep.iter().copied().filter(|fd| *fd > 2).collect();
    keep.sort_unstable();
    let mut from: u32 = 3;
    for fd in keep {
        if fd as u32 > from {
            close_range(from, fd as u32 - 1);
        }
        from = fd as u32 + 1;
    }
    close_range(from, u32::MAX);
}

/// Closes one descriptor by its number. The caller knows that no object owns it any more.
pub fn close_number(fd: RawFd) {
    // SAFETY: the caller's promise; a number that is not open is only refused.
    unsafe { libc::close(fd) };
}

fn close_range(first: u32, last: u32) {
    // SAFETY: called only in a process that was just forked and that names what it keeps; no object that owns one of
    // the closed descriptors is dropped there (it leaves by `exit_now`).
    unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
}

/// Makes `from` also the descriptor `to` (0, 1 or 2), whatever that was.
pub fn replace_stdio(from: BorrowedFd<'_>, to: RawFd) -> io::Result<()> {
    // SAFETY: `from` is open; 0 to 2 are not owned by any object.
    let done = unsafe { libc::dup2(from.as_raw_fd(), to) };
    if done == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Ends this process when the thread that made it ends. A change of user undoes it.
pub fn end_with_parent() {
    // SAFETY: numbers only.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}

/// The name that ps shows for this process.
pub fn set_comm(name: &std::ffi::CStr) {
    // SAFETY: the string is terminated and outlives the call.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_as_a_shell_counts() {
        assert_eq!(Ended::Code(3).code(), 3);
        assert_eq!(Ended::Signal(9).code(), 137);
    }
}
