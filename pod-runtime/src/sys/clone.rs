//! clone3(2), time namespaces and setns(2) by pidfd: what gives birth to a pod and enters one.

use crate::sys::daemon::{self, Fork};
use linux_raw_sys::general::clone_args;
use nix::errno::Errno;
use nix::libc;
use std::io::{Read, Write};
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
/// in the innermost pid namespace.
///
/// The C library's locks and its list of threads are as they were in the child: with other threads about, it could wait
/// for good for one that it does not have, in malloc(3) or in setresuid(3). So it is a sibling then, made by a child of
/// fork(3), which puts all that right, and does not go on before its parent knows of it. (Not with CLONE_FILES or
/// CLONE_PARENT: their callers must be single-threaded.)
pub fn clone3(flags: u64, cgroup: Option<BorrowedFd<'_>>, tid: Option<i32>) -> nix::Result<Cloned> {
    if flags & (libc::CLONE_FILES | libc::CLONE_PARENT) as u64 != 0 || alone() {
        return directly(flags, cgroup, tid);
    }
    let pipe = || std::io::pipe().map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)));
    let ((mut told, mut tell), (mut wait, mut go)) = (pipe()?, pipe()?);
    match daemon::fork()? {
        Fork::Child => {
            drop(go);
            let pid = match directly(flags | libc::CLONE_PARENT as u64, cgroup, tid) {
                Ok(Cloned::Child) => {
                    drop(tell);
                    // Who is not known of must not go on.
                    return match wait.read_exact(&mut [0]) {
                        Ok(()) => Ok(Cloned::Child),
                        Err(_) => daemon::exit_now(1),
                    };
                }
                Ok(Cloned::Parent { pid, .. }) => pid,
                Err(error) => -(error as i32),
            };
            daemon::exit_now(i32::from(tell.write_all(&pid.to_ne_bytes()).is_err()))
        }
        Fork::Parent(between) => {
            drop((tell, wait));
            let mut pid = [0; 4];
            let heard = told.read_exact(&mut pid).map_err(|_| Errno::EIO);
            let _ = daemon::reap(between);
            heard?;
            let pid = match i32::from_ne_bytes(pid) {
                refused if refused < 0 => return Err(Errno::from_raw(-refused)),
                pid => pid,
            };
            // Nobody but its parent reaps it: the number is still its own.
            let pidfd = daemon::pidfd_open(pid).and_then(|pidfd| match go.write_all(&[0]) {
                Ok(()) => Ok(pidfd),
                Err(_) => Err(Errno::EIO),
            });
            drop(go);
            match pidfd {
                Ok(pidfd) => Ok(Cloned::Parent { pid, pidfd }),
                Err(error) => {
                    let _ = daemon::reap(pid);
                    Err(error)
                }
            }
        }
    }
}

/// Whether this process has one thread: the kernel lets no other do this, and it does nothing.
fn alone() -> bool {
    unshare(libc::CLONE_THREAD).is_ok()
}

fn directly(flags: u64, cgroup: Option<BorrowedFd<'_>>, tid: Option<i32>) -> nix::Result<Cloned> {
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
    // the caller is single-threaded or shares no lock (see above), so the child may go on as ordinary code.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::pidfd;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use nix::unistd::{getresgid, setresgid};
    use std::os::fd::AsFd;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// Ends at once, if it is not held up by a thread that its parent had.
    fn use_the_library() -> i32 {
        let Ok(ids) = getresgid() else { return 1 };
        if setresgid(ids.real, ids.effective, ids.saved).is_err() {
            return 2;
        }
        let boxes: Vec<_> = (0..100).map(|n| vec![0_u8; 100 + n]).collect();
        i32::from(boxes.len() != 100)
    }

    #[test]
    fn children_of_a_process_with_threads_wait_for_none_of_them() {
        let enough = AtomicBool::new(false);
        let busy = || {
            while !enough.load(Ordering::Relaxed) {
                std::thread::spawn(|| vec![0_u8; 1000].len()).join().unwrap();
            }
        };
        let ended = std::thread::scope(|scope| {
            scope.spawn(busy);
            scope.spawn(busy);
            let mut ended = Vec::new();
            for _ in 0..200 {
                let (pid, pidfd) = match clone3(0, None, None).unwrap() {
                    Cloned::Child => daemon::exit_now(use_the_library()),
                    Cloned::Parent { pid, pidfd } => (pid, pidfd),
                };
                let mut end = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
                let hung = poll(&mut end, PollTimeout::from(20_000_u16)).unwrap() == 0;
                if hung {
                    pidfd::send_signal(&pidfd, libc::SIGKILL).unwrap();
                }
                ended.push((daemon::reap(pid).unwrap().code(), hung));
                if hung {
                    break;
                }
            }
            enough.store(true, Ordering::Relaxed);
            ended
        });
        assert_eq!((ended.len(), ended.last()), (200, Some(&(0, false))));
    }

    #[test]
    fn what_clone_refuses_is_told_by_a_process_with_threads() {
        std::thread::scope(|scope| {
            let (go, wait) = std::sync::mpsc::channel::<()>();
            scope.spawn(move || wait.recv());
            assert!(!alone());
            let refused = clone3(libc::CLONE_THREAD as u64, None, None);
            assert_eq!(refused.map(drop), Err(Errno::EINVAL));
            drop(go);
        });
    }
}
