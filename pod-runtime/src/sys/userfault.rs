//! userfaultfd(2) of another process, for two things that need no handler of faults: putting pages into its memory (each
//! is allocated, copied and mapped in one step, which takes half as long as writing to memory that is not there yet),
//! and having the kernel note which of its pages are written (asynchronous write protection, Linux 6.7).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Flags for the process that makes the descriptor. Only faults of user mode could be handled by it, which needs no
/// privilege; none are handled at all here.
pub const FLAGS: i32 = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
const USER_MODE_ONLY: i32 = 1;

const API: u64 = 0xaa;
const MODE_MISSING: u64 = 1;
const MODE_WRITE_PROTECT: u64 = 2;
/// UFFD_FEATURE_WP_UNPOPULATED and UFFD_FEATURE_WP_ASYNC.
const ASYNCHRONOUS: u64 = 1 << 13 | 1 << 15;
/// _IOWR(0xaa, 0x3f, struct uffdio_api)
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
/// _IOWR(0xaa, 0, struct uffdio_register)
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
/// _IOWR(0xaa, 3, struct uffdio_copy)
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;

/// userfaultfd(2): of this process, for whoever gets the descriptor to take.
pub fn make() -> io::Result<OwnedFd> {
    // SAFETY: numbers only.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) } as i32;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A userfaultfd of another process. When it is closed the process's memory is as any other's again.
#[derive(Debug)]
pub struct Userfault(OwnedFd);

impl Userfault {
    /// Takes over a descriptor that the process has just made by userfaultfd(2), to put pages.
    pub fn take(fd: OwnedFd) -> io::Result<Userfault> {
        Userfault::with(fd, 0)
    }

    /// The same to notice writes; EINVAL before Linux 6.7.
    pub fn noticing(fd: OwnedFd) -> io::Result<Userfault> {
        Userfault::with(fd, ASYNCHRONOUS)
    }

    fn with(fd: OwnedFd, features: u64) -> io::Result<Userfault> {
        let fault = Userfault(fd);
        fault.ioctl(UFFDIO_API, &mut [API, features, 0]).map(|()| fault)
    }

    /// Whether the kernel has what [`Userfault::noticing`] needs.
    pub fn can_notice() -> bool {
        make().and_then(Userfault::noticing).is_ok()
    }

    /// From here on writes to a mapping, or a part of one, can be noticed: by `PAGEMAP_SCAN` ([`super::memory`]).
    pub fn notice(&self, start: u64, bytes: u64) -> io::Result<()> {
        self.ioctl(UFFDIO_REGISTER, &mut [start, bytes, MODE_WRITE_PROTECT, 0])
    }

    /// Prepares a private anonymous mapping, or a part of one, to be filled by [`Userfault::copy`].
    pub fn register(&self, start: u64, bytes: u64) -> io::Result<()> {
        self.ioctl(UFFDIO_REGISTER, &mut [start, bytes, MODE_MISSING, 0])
    }

    /// Puts whole pages to `address`, a multiple of the page size. Returns how many bytes were put: it ends early at a
    /// page that is there already (EEXIST when that is the first).
    pub fn copy(&self, address: u64, pages: &[u8]) -> io::Result<usize> {
        let mut argument = [address, pages.as_ptr().addr() as u64, pages.len() as u64, 0, 0];
        let result = self.ioctl(UFFDIO_COPY, &mut argument);
        let copied = argument[4] as i64;
        match result {
            Ok(()) => Ok(pages.len()),
            Err(_) if copied > 0 => Ok(copied as usize),
            Err(error) => Err(error),
        }
    }

    fn ioctl<const N: usize>(&self, request: libc::c_ulong, argument: &mut [u64; N]) -> io::Result<()> {
        // SAFETY: private; each caller above pairs a request with an array of the size of its structure. What UFFDIO_COPY
        // reads from is a live slice, where it writes to is checked by the kernel in the other process.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), request, argument.as_mut_ptr()) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 4096;

    #[test]
    fn pages_come_to_their_place() {
        let Ok(fd) = make() else { return }; // A kernel without.
        let fault = Userfault::take(fd).unwrap();
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping of four pages, used below and never unmapped.
        let memory = unsafe { libc::mmap(std::ptr::null_mut(), 4 * PAGE, protection, flags, -1, 0) };
        // SAFETY: the mapping above; nobody else knows it.
        let memory = unsafe { std::slice::from_raw_parts_mut(memory.cast::<u8>(), 4 * PAGE) };
        memory[2 * PAGE] = 9;
        let base = memory.as_ptr().addr() as u64;
        fault.register(base, 4 * PAGE as u64).unwrap();
        let data = [7; 4 * PAGE];
        assert_eq!(fault.copy(base, &data).unwrap(), 2 * PAGE, "up to the page that is there");
        let there = fault.copy(base + 2 * PAGE as u64, &data[2 * PAGE..]).unwrap_err();
        assert_eq!(there.raw_os_error(), Some(libc::EEXIST));
        assert_eq!(fault.copy(base + 3 * PAGE as u64, &data[3 * PAGE..]).unwrap(), PAGE);
        drop(fault);
        assert!(memory[..2 * PAGE].iter().all(|byte| *byte == 7));
        assert_eq!(memory[2 * PAGE..2 * PAGE + 2], [9, 0]);
    }
}
