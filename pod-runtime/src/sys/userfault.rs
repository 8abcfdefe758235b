//! userfaultfd(2) of another process, for three things: putting pages into its memory (each is allocated, copied and
//! mapped in one step, which takes half as long as writing to memory that is not there yet), having the kernel note which
//! of its pages are written (asynchronous write protection, Linux 6.7), and giving it pages when it touches them, for
//! which alone faults and what becomes of the memory meanwhile are read ([`Userfault::read`]).

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Flags for the process that makes the descriptor. Only faults of user mode could be handled by it, which needs no
/// privilege; where none are handled at all that is enough.
pub const FLAGS: i32 = HANDLING | USER_MODE_ONLY;
/// Where faults are handled, also those of system calls: the process needs CAP_SYS_PTRACE.
pub const HANDLING: i32 = libc::O_CLOEXEC | libc::O_NONBLOCK;
const USER_MODE_ONLY: i32 = 1;

const API: u64 = 0xaa;
const MODE_MISSING: u64 = 1;
const MODE_WRITE_PROTECT: u64 = 2;
/// UFFD_FEATURE_WP_UNPOPULATED and UFFD_FEATURE_WP_ASYNC.
const ASYNCHRONOUS: u64 = 1 << 13 | 1 << 15;
/// UFFD_FEATURE_EVENT_FORK, _REMAP, _REMOVE and _UNMAP.
const EVENTS: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6;
/// _IOWR(0xaa, 0x3f, struct uffdio_api)
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
/// _IOWR(0xaa, 0, struct uffdio_register)
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
/// _IOWR(0xaa, 3, struct uffdio_copy)
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
/// _IOWR(0xaa, 4, struct uffdio_zeropage)
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;

/// _IOR(0xaa, 2, struct uffdio_range)
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;

/// Bytes of a struct uffd_msg.
const MESSAGE: usize = 32;
const PAGE: u64 = 4096;

/// What a process did that has to do with memory that is not there yet. It waits until it was read, and then, if it was
/// a fault, until there is a page.
#[derive(Debug)]
pub enum Event {
    /// It touched this page.
    Fault(u64),
    /// It has a child with the same memory, and the same missing.
    Fork(Userfault),
    /// What was in the range is now so many bytes long at `to`, missing or not.
    Remap { from: Range<u64>, to: u64 },
    /// Nothing is in the range any more: it reads as zeros, or is not mapped.
    Remove(Range<u64>),
}

/// Whether this process may make one that handles faults of system calls too.
pub fn can_handle() -> bool {
    // SAFETY: numbers only.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, HANDLING) } as i32;
    if fd < 0 {
        return false;
    }
    // SAFETY: a new descriptor that nobody else owns.
    Userfault::handling(unsafe { OwnedFd::from_raw_fd(fd) }).is_ok()
}

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

    /// The same to give it pages when it touches them. The caller needs CAP_SYS_PTRACE.
    pub fn handling(fd: OwnedFd) -> io::Result<Userfault> {
        Userfault::with(fd, EVENTS)
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

    /// Zeros for the page at `address`.
    pub fn zero(&self, address: u64) -> io::Result<()> {
        self.ioctl(UFFDIO_ZEROPAGE, &mut [address, PAGE, 0, 0])
    }

    /// Whoever waits for the page at `address` looks once more: it may be there, and nobody was woken by it.
    pub fn wake(&self, address: u64) -> io::Result<()> {
        self.ioctl(UFFDIO_WAKE, &mut [address, PAGE])
    }

    /// What has happened since, oldest first but for faults, which come before all else. Empty when there is nothing.
    pub fn read(&self) -> io::Result<Vec<Event>> {
        const MOST: usize = 16;
        let mut buffer = [0u8; MOST * MESSAGE];
        let count = match nix::unistd::read(&self.0, &mut buffer) {
            Ok(count) => count,
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => 0,
            Err(error) => return Err(error.into()),
        };
        buffer[..count].chunks_exact(MESSAGE).map(event).collect()
    }

    /// The same by another descriptor.
    pub fn copied(&self) -> io::Result<Userfault> {
        self.0.try_clone().map(Userfault)
    }

    /// Another descriptor of the same.
    pub fn try_clone(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }

    fn ioctl<const N: usize>(&self, request: libc::c_ulong, argument: &mut [u64; N]) -> io::Result<()> {
        // SAFETY: private; each caller above pairs a request with an array of the size of its structure. What UFFDIO_COPY
        // reads from is a live slice, where it writes to is checked by the kernel in the other process.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), request, argument.as_mut_ptr()) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A struct uffd_msg.
fn event(message: &[u8]) -> io::Result<Event> {
    let word = |at: usize| message[at..].first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes));
    let range = |from: u64, bytes: u64| from..from.saturating_add(bytes);
    match message[0] {
        0x12 => Ok(Event::Fault(word(16) & !(PAGE - 1))),
        // SAFETY: the kernel has just made the descriptor for who reads the message; the number is its low half.
        0x13 => Ok(Event::Fork(Userfault(unsafe { OwnedFd::from_raw_fd(word(8) as u32 as i32) }))),
        0x14 => Ok(Event::Remap { from: range(word(8), word(24)), to: word(16) }),
        0x15 | 0x16 => Ok(Event::Remove(word(8)..word(16))),
        other => Err(io::Error::other(format!("a userfaultfd tells of {other:#x}"))),
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
