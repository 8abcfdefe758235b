//! clone3(2), time namespaces and setns(2) by pidfd: what gives birth to a pod and enters one.

use linux_raw_sys::general::clone_args;
use nix::errno::Errno;
use nix::libc;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Both fit in clone3's flags only.
pub const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
pub const CLONE_NEWTIME: u64 = libc::CLONE_NEWTIME as u64;

/// Which side of a clone this is.
#[derive(Debug)]
pub enum Cloned {
    Parent { pid: i32, pidfd: OwnedFd },
    Child,
}

/// clone3(2) as a fork: memory is copied, nothing is shared. `cgroup` is a v2 directory to be born in, `tid` the pid
/// in the innermost pid namespace. The caller must be single-threaded, as for fork.
pub fn clone3(flags: u64, cgroup: Option<BorrowedFd<'_>>, tid: Option<i32>) -> nix::Result<Cloned> {
    let mut pidfd: i32 = -1;
    let tids = [tid.unwrap_or(0)];
    let parent = flags & libc::CLONE_PARENT as u64 != 0;
    let mut args = clone_args {
        flags: flags | libc::CLONE_PIDFD as u64,
        pidfd: &raw mut pidfd as u64,
        child_tid: 0,
        parent_tid: 0,
        // A sibling inherits the signal; clone3 refuses another.
        exit_signal: if parent { 0 } else { libc::SIGCHLD as u64 },
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: if tid.is_some() { tids.as_ptr() as u64 } else { 0 },
        set_tid_size: tid.iter().len() as u64,
        cgroup: 0,
    };
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: `args` and what it points to outlive the call; without CLONE_VM the child has its own copy of memory, and
    // the caller is single-threaded (callers' rule), so the child may go on as ordinary code.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<clone_args>()) };
    match Errno::result(pid)? {
        0 => Ok(Cloned::Child),
        pid => {
            // SAFETY: the kernel has stored a new descriptor there that nobody else owns.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Cloned::Parent { pid: pid as i32, pidfd })
        }
    }
}

/// unshare(2).
pub fn unshare(flags: i32) -> nix::Result<()> {
    // SAFETY: plain integer.
    Errno::result(unsafe { libc::unshare(flags) }).map(drop)
}

/// setns(2) with a pidfd (several namespaces in one step) or with a namespace's own descriptor.
pub fn setns(fd: BorrowedFd<'_>, kinds: i32) -> nix::Result<()> {
    // SAFETY: the descriptor is open while it is borrowed.
    Errno::result(unsafe { libc::setns(fd.as_raw_fd(), kinds) }).map(drop)
}
