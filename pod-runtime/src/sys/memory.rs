//! The memory of another process: process_vm_readv(2), process_vm_writev(2) and the PAGEMAP_SCAN ioctl.

use libc::{c_void, iovec, pid_t};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

const PAGE: usize = 4096;

/// Reads `remote` (address, bytes) into `local` one after the other. Returns the bytes read: fewer when a page is not
/// there.
pub fn read(pid: pid_t, local: &mut [u8], remote: &[(u64, usize)]) -> io::Result<usize> {
    let into = iovec { iov_base: local.as_mut_ptr().cast(), iov_len: local.len() };
    let from: Vec<_> =
        remote.iter().map(|&(address, bytes)| iovec { iov_base: address as *mut c_void, iov_len: bytes }).collect();
    // SAFETY: `into` covers a live exclusive slice; the addresses in `from` are of the other process, and the kernel
    // checks them there.
    let count = unsafe { libc::process_vm_readv(pid, &raw const into, 1, from.as_ptr(), from.len() as _, 0) };
    if count < 0 { Err(io::Error::last_os_error()) } else { Ok(count as usize) }
}

/// Reads exactly `local.len()` bytes.
pub fn read_exact(pid: pid_t, address: u64, local: &mut [u8]) -> io::Result<()> {
    let wanted = local.len();
    if wanted == 0 {
        return Ok(());
    }
    match read(pid, local, &[(address, wanted)])? {
        count if count == wanted => Ok(()),
        _ => Err(io::Error::from_raw_os_error(libc::EFAULT)),
    }
}

/// Writes all of `local` to consecutive `remote` pieces (address, bytes), which must sum up to the same length.
pub fn write(pid: pid_t, local: &[u8], remote: &[(u64, usize)]) -> io::Result<()> {
    let from = iovec { iov_base: local.as_ptr().cast_mut().cast(), iov_len: local.len() };
    let into: Vec<_> =
        remote.iter().map(|&(address, bytes)| iovec { iov_base: address as *mut c_void, iov_len: bytes }).collect();
    // SAFETY: `from` covers a live slice that is only read; the addresses in `into` are of the other process.
    let count = unsafe { libc::process_vm_writev(pid, &raw const from, 1, into.as_ptr(), into.len() as _, 0) };
    match count {
        -1 => Err(io::Error::last_os_error()),
        count if count as usize == local.len() => Ok(()),
        _ => Err(io::Error::from_raw_os_error(libc::EFAULT)),
    }
}

/// Mappings of this process, a page each, of every sort that a program can have without special rights: they show what a
/// kernel says of each. Gone with it.
#[derive(Debug)]
pub struct Samples {
    pages: Vec<*mut c_void>,
    _writes: Option<super::userfault::Userfault>,
}

impl Samples {
    pub fn make() -> Samples {
        const MADV_GUARD_INSTALL: i32 = 102;
        const MAP_DROPPABLE: i32 = 0x08;
        const MLOCK_ONFAULT: i64 = 1;
        let mut samples = Samples { pages: Vec::new(), _writes: None };
        let (read, write) = (libc::PROT_READ, libc::PROT_WRITE);
        let (private, shared) = (libc::MAP_PRIVATE, libc::MAP_SHARED);
        for (protection, flags) in [
            (read, private),
            (libc::PROT_NONE, private),
            (read | libc::PROT_EXEC, private),
            (read | write, shared),
            (read, shared),
            (read | write, private | libc::MAP_GROWSDOWN),
            (read | write, private | libc::MAP_NORESERVE),
            (read | write, MAP_DROPPABLE),
        ] {
            samples.page(protection, flags);
        }
        for advice in [
            libc::MADV_SEQUENTIAL,
            libc::MADV_RANDOM,
            libc::MADV_DONTFORK,
            libc::MADV_DONTDUMP,
            libc::MADV_WIPEONFORK,
            libc::MADV_HUGEPAGE,
            libc::MADV_NOHUGEPAGE,
            libc::MADV_MERGEABLE,
            MADV_GUARD_INSTALL,
        ] {
            if let Some(page) = samples.page(read | write, private) {
                // SAFETY: a page of ours that nothing refers to. A kernel that does not know the advice refuses it.
                unsafe { libc::madvise(page, PAGE, advice) };
            }
        }
        for flags in [0, MLOCK_ONFAULT] {
            if let Some(page) = samples.page(read | write, private) {
                // SAFETY: as above.
                unsafe { libc::syscall(libc::SYS_mlock2, page, PAGE, flags) };
            }
        }
        if let Some(page) = samples.page(read | write, private) {
            let noticing = super::userfault::make().and_then(super::userfault::Userfault::noticing);
            samples._writes = noticing.and_then(|it| it.notice(page as u64, PAGE as u64).map(|()| it)).ok();
        }
        samples
    }

    /// Two pages apart from any other: mappings that are alike and touch each other are one.
    fn page(&mut self, protection: i32, flags: i32) -> Option<*mut c_void> {
        let room = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let fixed = flags | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: new memory that nothing refers to; the second call replaces its middle.
        unsafe {
            let place = libc::mmap(std::ptr::null_mut(), 3 * PAGE, libc::PROT_NONE, room, -1, 0);
            if place == libc::MAP_FAILED {
                return None;
            }
            self.pages.push(place);
            let page = libc::mmap(place.byte_add(PAGE), PAGE, protection, fixed, -1, 0);
            (page != libc::MAP_FAILED).then_some(page)
        }
    }
}

impl Drop for Samples {
    fn drop(&mut self) {
        for place in &self.pages {
            // SAFETY: it was mapped by us, and nothing refers to it.
            unsafe { libc::munmap(*place, 3 * PAGE) };
        }
    }
}

/// Maps private anonymous memory at an address where this process has nothing (EEXIST if it has), readable and writable,
/// for somebody else to fill. A child of this process does not get it.
pub fn lay_out(start: u64, bytes: usize) -> io::Result<()> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
    let wanted = start as *mut c_void;
    // SAFETY: with MAP_FIXED_NOREPLACE nothing is replaced, and nothing of this program refers to the new memory.
    let place = unsafe { libc::mmap(wanted, bytes, protection, flags, -1, 0) };
    if place == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the memory mapped just now (a kernel that does not know the flag may have put it elsewhere).
    let advised = unsafe { libc::madvise(place, bytes, libc::MADV_DONTFORK) };
    if advised == 0 && place == wanted {
        return Ok(());
    }
    let error = if advised == 0 { io::ErrorKind::AddrInUse.into() } else { io::Error::last_os_error() };
    // SAFETY: as above.
    unsafe { libc::munmap(place, bytes) };
    Err(error)
}

/// Shared anonymous memory that nobody has mapped yet: whoever maps the file has what mmap(MAP_SHARED | MAP_ANONYMOUS) would
/// have given him. Gone with the last who has it.
pub fn make_shared(bytes: u64) -> io::Result<File> {
    let length = usize::try_from(bytes).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
    // Whether a host promises memory for all of it was settled when the program asked for it.
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: new memory at an address of the kernel's choice, to which nothing refers.
    let place = unsafe { libc::mmap(std::ptr::null_mut(), length, libc::PROT_NONE, flags, -1, 0) };
    if place == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let start = place as u64;
    let path = format!("/proc/self/map_files/{start:x}-{:x}", start + bytes.next_multiple_of(PAGE as u64));
    let opened = File::options().read(true).write(true).open(path);
    // SAFETY: the memory mapped just now.
    unsafe { libc::munmap(place, length) };
    opened
}

/// Writes to it are noticed.
pub const PAGE_IS_WATCHED: u64 = 1;
/// Since it was protected last.
pub const PAGE_IS_WRITTEN: u64 = 1 << 1;
pub const PAGE_IS_FILE: u64 = 1 << 2;
pub const PAGE_IS_PRESENT: u64 = 1 << 3;
pub const PAGE_IS_SWAPPED: u64 = 1 << 4;
pub const PAGE_IS_PFNZERO: u64 = 1 << 5;
/// Linux 6.15.
pub const PAGE_IS_GUARD: u64 = 1 << 8;

/// struct page_region.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct PageRegion {
    pub start: u64,
    pub end: u64,
    pub categories: u64,
}

/// struct pm_scan_arg.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct ScanArguments {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// _IOWR('f', 16, struct pm_scan_arg)
const PAGEMAP_SCAN: libc::c_ulong =
    (3 << 30) | ((size_of::<ScanArguments>() as libc::c_ulong) << 16) | (0x66 << 8) | 16;

/// What to look for among pages; each field is a set of PAGE_IS_*.
#[derive(Debug, Clone, Copy, Default)]
pub struct Look {
    /// At least one of these (0: whatever it is).
    pub any: u64,
    /// All of these.
    pub all: u64,
    /// None of these.
    pub not: u64,
    /// What is told of each region; what is not asked for does not divide neighbours.
    pub tell: u64,
    /// Found pages count as not written from here on, until they are. EPERM where writes are not noticed.
    pub protect: bool,
}

/// Finds the pages of `start..end` that are in at least one category of `any` and in none of `not`; `pagemap` is an
/// open /proc/PID/pagemap. ENOTTY before Linux 6.7.
pub fn scan_pages(pagemap: &File, start: u64, end: u64, any: u64, not: u64) -> io::Result<Vec<PageRegion>> {
    look_for_pages(pagemap, start, end, &Look { any, not, ..Look::default() })
}

/// Finds the pages of `start..end` that `look` describes.
pub fn look_for_pages(pagemap: &File, start: u64, end: u64, look: &Look) -> io::Result<Vec<PageRegion>> {
    const WP_MATCHING: u64 = 1;
    const CHECK_WPASYNC: u64 = 2;
    let mut found = Vec::new();
    let mut from = start;
    let mut buffer = vec![PageRegion::default(); 512];
    while from < end {
        let mut arguments = ScanArguments {
            size: size_of::<ScanArguments>() as u64,
            flags: if look.protect { WP_MATCHING | CHECK_WPASYNC } else { 0 },
            start: from,
            end,
            vec: buffer.as_mut_ptr() as u64,
            vec_len: buffer.len() as u64,
            category_inverted: look.not,
            category_mask: look.not | look.all,
            category_anyof_mask: look.any,
            return_mask: look.tell | look.not,
            ..Default::default()
        };
        // SAFETY: `arguments` and the buffer that it points to live across the call and have the lengths they claim.
        let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arguments) };
        if count < 0 {
            return Err(io::Error::last_os_error());
        }
        found.extend_from_slice(&buffer[..count as usize]);
        if arguments.walk_end <= from {
            break;
        }
        from = arguments.walk_end;
    }
    Ok(found)
}
