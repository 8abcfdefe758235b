//! kcmp(2): whether two tasks share a kernel object, and an order among objects.

use nix::errno::Errno;
use nix::libc;
use std::cmp::Ordering;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

const KCMP_FILE: i32 = 0;
const KCMP_VM: i32 = 1;
const KCMP_FILES: i32 = 2;
const KCMP_FS: i32 = 3;
const KCMP_SIGHAND: i32 = 4;
const KCMP_SYSVSEM: i32 = 6;
const KCMP_EPOLL_TFD: i32 = 7;

/// What two tasks can share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shared {
    Memory,
    DescriptorTable,
    FsState,
    SignalHandlers,
    SemaphoreUndo,
}

/// How the object of task `a` compares with that of task `b`, in an order that holds while both exist.
pub fn compare(a: i32, b: i32, what: Shared) -> nix::Result<Ordering> {
    let kind = match what {
        Shared::Memory => KCMP_VM,
        Shared::DescriptorTable => KCMP_FILES,
        Shared::FsState => KCMP_FS,
        Shared::SignalHandlers => KCMP_SIGHAND,
        Shared::SemaphoreUndo => KCMP_SYSVSEM,
    };
    kcmp(a, b, kind, 0, 0)
}

/// Whether (and in which order) two of our own descriptors are the same open file description. `me` is our own pid: to
/// ask for it costs as much as the comparison.
pub fn compare_files(me: i32, a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> nix::Result<Ordering> {
    kcmp(me, me, KCMP_FILE, a.as_raw_fd() as u64, b.as_raw_fd() as u64)
}

#[repr(C)]
struct EpollSlot {
    epoll: u32,
    target: u32,
    offset: u32,
}

/// Whether our own descriptor `file` is what was registered in our own epoll descriptor under the number `target`.
/// Several files can be registered under one number (closed and used again): `offset` counts them from 0; ENOENT says
/// that there are no more.
pub fn is_epoll_target(file: BorrowedFd<'_>, epoll: BorrowedFd<'_>, target: RawFd, offset: u32) -> nix::Result<bool> {
    let me = std::process::id() as i32;
    let slot = EpollSlot { epoll: epoll.as_raw_fd() as u32, target: target as u32, offset };
    let pointer = std::ptr::from_ref(&slot) as u64;
    // The kernel reads `slot`, which lives until the call has returned.
    Ok(kcmp(me, me, KCMP_EPOLL_TFD, file.as_raw_fd() as u64, pointer)? == Ordering::Equal)
}

fn kcmp(a: i32, b: i32, kind: i32, first: u64, second: u64) -> nix::Result<Ordering> {
    // SAFETY: integers, or for KCMP_EPOLL_TFD a pointer to a slot that the caller above keeps alive.
    let order = Errno::result(unsafe { libc::syscall(libc::SYS_kcmp, a, b, kind, first, second) })?;
    Ok(match order {
        0 => Ordering::Equal,
        1 => Ordering::Less,
        2 => Ordering::Greater,
        // "Not equal, but no order": only where kernels hide pointers; treat as an order so that equality stays exact.
        _ => Ordering::Greater,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_dup_is_the_same_description() {
        let a = std::fs::File::open("/dev/null").unwrap();
        let b = a.try_clone().unwrap();
        let c = std::fs::File::open("/dev/null").unwrap();
        let me = std::process::id() as i32;
        assert_eq!(compare_files(me, a.as_fd(), b.as_fd()).unwrap(), Ordering::Equal);
        assert_ne!(compare_files(me, a.as_fd(), c.as_fd()).unwrap(), Ordering::Equal);
        assert_eq!(
            compare_files(me, a.as_fd(), c.as_fd()).unwrap(),
            compare_files(me, c.as_fd(), b.as_fd()).unwrap().reverse()
        );
    }

    #[test]
    fn this_process_shares_with_itself() {
        let me = std::process::id() as i32;
        for what in [Shared::Memory, Shared::DescriptorTable, Shared::FsState, Shared::SignalHandlers] {
            assert_eq!(compare(me, me, what).unwrap(), Ordering::Equal);
        }
    }
}
