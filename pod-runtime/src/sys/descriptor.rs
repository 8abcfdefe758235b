//! fcntl and ioctl requests on descriptors that nix does not have: owners and signals, pipes, timers, watches,
//! terminals.

use nix::errno::Errno;
use nix::libc::{self, c_int, c_ulong};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// One ioctl whose argument is a pointer to `value`.
fn ioctl_with<T>(fd: BorrowedFd<'_>, request: c_ulong, value: &mut T) -> nix::Result<c_int> {
    // SAFETY: private; each caller below pairs a request with the type that it reads or writes.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request as _, std::ptr::from_mut(value)) })
}

/// One ioctl whose argument is a number.
fn ioctl_number(fd: BorrowedFd<'_>, request: c_ulong, value: c_ulong) -> nix::Result<c_int> {
    // SAFETY: private; each caller below uses a request that takes no pointer.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request as _, value) })
}

fn fcntl_number(fd: BorrowedFd<'_>, command: c_int, value: c_int) -> nix::Result<c_int> {
    // SAFETY: private; each caller below uses a command that takes a number or nothing.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), command, value) })
}

/// F_GETFL.
pub fn status_flags(fd: BorrowedFd<'_>) -> nix::Result<i32> {
    fcntl_number(fd, libc::F_GETFL, 0)
}

/// F_SETFL.
pub fn set_status_flags(fd: BorrowedFd<'_>, flags: i32) -> nix::Result<()> {
    fcntl_number(fd, libc::F_SETFL, flags).map(drop)
}

/// F_GETFD: whether it is closed on exec.
pub fn close_on_exec(fd: BorrowedFd<'_>) -> nix::Result<bool> {
    Ok(fcntl_number(fd, libc::F_GETFD, 0)? & libc::FD_CLOEXEC != 0)
}

/// F_SETFD.
pub fn set_close_on_exec(fd: BorrowedFd<'_>, close: bool) -> nix::Result<()> {
    fcntl_number(fd, libc::F_SETFD, if close { libc::FD_CLOEXEC } else { 0 }).map(drop)
}

/// F_GET_RW_HINT.
pub fn write_hint(fd: BorrowedFd<'_>) -> nix::Result<u64> {
    let mut hint = 0u64;
    // SAFETY: the kernel writes 8 bytes to a place of ours.
    nix::errno::Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), 1035, &raw mut hint) })?;
    Ok(hint)
}

/// F_SET_RW_HINT.
pub fn set_write_hint(fd: BorrowedFd<'_>, hint: u64) -> nix::Result<()> {
    // SAFETY: the kernel reads 8 bytes of ours.
    nix::errno::Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), 1036, &raw const hint) }).map(drop)
}

/// F_GETSIG.
pub fn async_signal(fd: BorrowedFd<'_>) -> nix::Result<i32> {
    const F_GETSIG: c_int = 11;
    fcntl_number(fd, F_GETSIG, 0)
}

/// F_SETSIG.
pub fn set_async_signal(fd: BorrowedFd<'_>, signal: i32) -> nix::Result<()> {
    const F_SETSIG: c_int = 10;
    fcntl_number(fd, F_SETSIG, signal).map(drop)
}

/// struct f_owner_ex: `kind` 0 thread, 1 process, 2 process group. The pid is in the caller's numbering.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AsyncOwner {
    pub kind: i32,
    pub pid: i32,
}

/// F_GETOWN_EX; pid 0 is nobody (or nobody of the caller's pid namespace).
pub fn async_owner(fd: BorrowedFd<'_>) -> nix::Result<AsyncOwner> {
    const F_GETOWN_EX: c_int = 16;
    let mut owner = AsyncOwner::default();
    // SAFETY: the kernel writes a struct f_owner_ex.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), F_GETOWN_EX, &raw mut owner) })?;
    Ok(owner)
}

/// F_SETOWN_EX.
pub fn set_async_owner(fd: BorrowedFd<'_>, owner: AsyncOwner) -> nix::Result<()> {
    const F_SETOWN_EX: c_int = 15;
    // SAFETY: the kernel reads a struct f_owner_ex.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), F_SETOWN_EX, &raw const owner) }).map(drop)
}

/// F_GETOWNER_UIDS: real and effective user that set the owner.
pub fn async_owner_uids(fd: BorrowedFd<'_>) -> nix::Result<(u32, u32)> {
    const F_GETOWNER_UIDS: c_int = 17;
    let mut uids = [0u32; 2];
    // SAFETY: the kernel writes two uid_t.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), F_GETOWNER_UIDS, uids.as_mut_ptr()) })?;
    Ok((uids[0], uids[1]))
}

/// F_GETPIPE_SZ.
pub fn pipe_size(fd: BorrowedFd<'_>) -> nix::Result<u32> {
    fcntl_number(fd, libc::F_GETPIPE_SZ, 0).map(|n| n as u32)
}

/// F_SETPIPE_SZ; the kernel may give more.
pub fn set_pipe_size(fd: BorrowedFd<'_>, bytes: u32) -> nix::Result<u32> {
    fcntl_number(fd, libc::F_SETPIPE_SZ, bytes as c_int).map(|n| n as u32)
}

/// F_GETLEASE: F_RDLCK, F_WRLCK or F_UNLCK.
pub fn lease(fd: BorrowedFd<'_>) -> nix::Result<i32> {
    fcntl_number(fd, libc::F_GETLEASE, 0)
}

/// F_SETLEASE.
pub fn set_lease(fd: BorrowedFd<'_>, kind: i32) -> nix::Result<()> {
    fcntl_number(fd, libc::F_SETLEASE, kind).map(drop)
}

/// F_OFD_SETLK (`ofd`) or F_SETLK: never waits.
pub fn set_record_lock(fd: BorrowedFd<'_>, ofd: bool, exclusive: bool, start: u64, length: u64) -> nix::Result<()> {
    let lock = record_lock(exclusive, start, length);
    let command = if ofd { libc::F_OFD_SETLK } else { libc::F_SETLK };
    // SAFETY: the kernel reads a struct flock.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), command, &raw const lock) }).map(drop)
}

/// The same as bytes, for a call that another task makes.
pub fn record_lock_bytes(exclusive: bool, start: u64, length: u64) -> Vec<u8> {
    let lock = record_lock(exclusive, start, length);
    // SAFETY: struct flock is plain data of this size; every byte was zeroed or written.
    unsafe { std::slice::from_raw_parts((&raw const lock).cast::<u8>(), size_of::<libc::flock>()) }.to_vec()
}

fn record_lock(exclusive: bool, start: u64, length: u64) -> libc::flock {
    // SAFETY: all zero is a valid struct flock.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK } as i16;
    lock.l_whence = libc::SEEK_SET as i16;
    lock.l_start = start as i64;
    lock.l_len = length as i64;
    lock
}

/// FIONREAD: bytes that a read would get now.
pub fn readable_bytes(fd: BorrowedFd<'_>) -> nix::Result<usize> {
    let mut bytes: c_int = 0;
    ioctl_with(fd, libc::FIONREAD as c_ulong, &mut bytes)?;
    Ok(bytes.max(0) as usize)
}

/// SIOCOUTQ: bytes sent and not yet taken by the other side.
pub fn unsent_bytes(fd: BorrowedFd<'_>) -> nix::Result<usize> {
    let mut bytes: c_int = 0;
    ioctl_with(fd, libc::TIOCOUTQ as c_ulong, &mut bytes)?;
    Ok(bytes.max(0) as usize)
}

/// TFD_IOC_SET_TICKS: expiries not yet read (at least one).
pub fn set_timer_ticks(fd: BorrowedFd<'_>, ticks: u64) -> nix::Result<()> {
    const TFD_IOC_SET_TICKS: c_ulong = 0x4008_5400;
    let mut ticks = ticks;
    ioctl_with(fd, TFD_IOC_SET_TICKS, &mut ticks).map(drop)
}

/// INOTIFY_IOC_SETNEXTWD: the number that the next watch gets.
pub fn set_next_watch(fd: BorrowedFd<'_>, wd: i32) -> nix::Result<()> {
    const INOTIFY_IOC_SETNEXTWD: c_ulong = 0x4004_4900;
    ioctl_number(fd, INOTIFY_IOC_SETNEXTWD, wd as c_ulong).map(drop)
}

/// struct termios2 of the terminal (of the slave, also when asked of the master).
pub type Termios = [u8; 44];

/// TCGETS2.
pub fn termios(fd: BorrowedFd<'_>) -> nix::Result<Termios> {
    const TCGETS2: c_ulong = 0x802c_542a;
    let mut termios = [0; 44];
    ioctl_with(fd, TCGETS2, &mut termios)?;
    Ok(termios)
}

/// TCSETS2: at once, nothing is flushed.
pub fn set_termios(fd: BorrowedFd<'_>, termios: &Termios) -> nix::Result<()> {
    const TCSETS2: c_ulong = 0x402c_542b;
    let mut termios = *termios;
    ioctl_with(fd, TCSETS2, &mut termios).map(drop)
}

/// TIOCGWINSZ: rows, columns, pixels.
pub fn window_size(fd: BorrowedFd<'_>) -> nix::Result<[u16; 4]> {
    let mut size = [0u16; 4];
    ioctl_with(fd, libc::TIOCGWINSZ as c_ulong, &mut size)?;
    Ok(size)
}

/// TIOCSWINSZ; the foreground group gets SIGWINCH when it changes.
pub fn set_window_size(fd: BorrowedFd<'_>, size: [u16; 4]) -> nix::Result<()> {
    let mut size = size;
    ioctl_with(fd, libc::TIOCSWINSZ as c_ulong, &mut size).map(drop)
}

/// TIOCGPTN of a master.
pub fn pty_index(master: BorrowedFd<'_>) -> nix::Result<u32> {
    const TIOCGPTN: c_ulong = 0x8004_5430;
    let mut index = 0u32;
    ioctl_with(master, TIOCGPTN, &mut index)?;
    Ok(index)
}

/// TIOCGDEV: the terminal that is really behind a descriptor (of /dev/tty, of /dev/console).
pub fn terminal_device(fd: BorrowedFd<'_>) -> nix::Result<(u32, u32)> {
    const TIOCGDEV: c_ulong = 0x8004_5432;
    let mut device = 0u32;
    ioctl_with(fd, TIOCGDEV, &mut device)?;
    Ok(((device >> 8) & 0xfff, (device & 0xff) | ((device >> 12) & 0xfff00)))
}

/// TIOCGPTLCK of a master.
pub fn pty_locked(master: BorrowedFd<'_>) -> nix::Result<bool> {
    const TIOCGPTLCK: c_ulong = 0x8004_5439;
    let mut locked: c_int = 0;
    ioctl_with(master, TIOCGPTLCK, &mut locked)?;
    Ok(locked != 0)
}

/// TIOCSPTLCK of a master.
pub fn set_pty_locked(master: BorrowedFd<'_>, locked: bool) -> nix::Result<()> {
    const TIOCSPTLCK: c_ulong = 0x4004_5431;
    let mut locked = c_int::from(locked);
    ioctl_with(master, TIOCSPTLCK, &mut locked).map(drop)
}

/// TIOCGPKT of a master.
pub fn pty_packet_mode(master: BorrowedFd<'_>) -> nix::Result<bool> {
    const TIOCGPKT: c_ulong = 0x8004_5438;
    let mut packet: c_int = 0;
    ioctl_with(master, TIOCGPKT, &mut packet)?;
    Ok(packet != 0)
}

/// TIOCPKT of a master.
pub fn set_pty_packet_mode(master: BorrowedFd<'_>, packet: bool) -> nix::Result<()> {
    let mut packet = c_int::from(packet);
    ioctl_with(master, libc::TIOCPKT as c_ulong, &mut packet).map(drop)
}

/// TIOCGEXCL.
pub fn terminal_exclusive(fd: BorrowedFd<'_>) -> nix::Result<bool> {
    const TIOCGEXCL: c_ulong = 0x8004_5440;
    let mut exclusive: c_int = 0;
    ioctl_with(fd, TIOCGEXCL, &mut exclusive)?;
    Ok(exclusive != 0)
}

/// TIOCEXCL.
pub fn set_terminal_exclusive(fd: BorrowedFd<'_>) -> nix::Result<()> {
    ioctl_number(fd, libc::TIOCEXCL as c_ulong, 0).map(drop)
}

/// TIOCGPTPEER: opens the slave of this master, wherever devpts is mounted.
pub fn pty_slave(master: BorrowedFd<'_>, flags: i32) -> nix::Result<OwnedFd> {
    const TIOCGPTPEER: c_ulong = 0x5441;
    let fd = ioctl_number(master, TIOCGPTPEER, flags as c_ulong)?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

fn owned(fd: c_int) -> nix::Result<OwnedFd> {
    let fd = Errno::result(fd)?;
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// eventfd(2).
pub fn eventfd(semaphore: bool) -> nix::Result<OwnedFd> {
    let flags = libc::EFD_CLOEXEC | libc::EFD_NONBLOCK | if semaphore { libc::EFD_SEMAPHORE } else { 0 };
    // SAFETY: numbers only.
    owned(unsafe { libc::eventfd(0, flags) })
}

/// signalfd(2) with a new descriptor; bit n - 1 of `mask` is signal n.
pub fn signalfd(mask: u64) -> nix::Result<OwnedFd> {
    // SAFETY: the kernel reads 8 bytes of mask.
    let fd = unsafe { libc::syscall(libc::SYS_signalfd4, -1, &raw const mask, 8, libc::SFD_CLOEXEC) };
    owned(fd as c_int)
}

/// timerfd_create(2).
pub fn timerfd(clock: i32) -> nix::Result<OwnedFd> {
    // SAFETY: numbers only.
    owned(unsafe { libc::timerfd_create(clock, libc::TFD_CLOEXEC) })
}

/// timerfd_settime(2), nanoseconds.
pub fn set_timer(fd: BorrowedFd<'_>, flags: u32, value_ns: u64, interval_ns: u64) -> nix::Result<()> {
    let time = |ns: u64| libc::timespec { tv_sec: (ns / 1_000_000_000) as i64, tv_nsec: (ns % 1_000_000_000) as i64 };
    let value = libc::itimerspec { it_interval: time(interval_ns), it_value: time(value_ns) };
    // SAFETY: the kernel reads one itimerspec; the old one is not asked for.
    let done = unsafe { libc::timerfd_settime(fd.as_raw_fd(), flags as c_int, &raw const value, std::ptr::null_mut()) };
    Errno::result(done).map(drop)
}

/// clock_gettime(2) in nanoseconds, as this process's time namespace shows it.
pub fn clock(id: i32) -> nix::Result<u64> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one timespec.
    Errno::result(unsafe { libc::clock_gettime(id, &raw mut time) })?;
    Ok(time.tv_sec.max(0) as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

/// epoll_create1(2).
pub fn epoll() -> nix::Result<OwnedFd> {
    // SAFETY: numbers only.
    owned(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })
}

/// EPOLL_CTL_ADD of `target` as it is numbered now.
pub fn epoll_add(epoll: BorrowedFd<'_>, target: RawFd, events: u32, data: u64) -> nix::Result<()> {
    let mut event = libc::epoll_event { events, u64: data };
    // SAFETY: the kernel reads one epoll_event; a number that is not open is EBADF.
    let done = unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, target, &raw mut event) };
    Errno::result(done).map(drop)
}

/// inotify_init1(2).
pub fn inotify() -> nix::Result<OwnedFd> {
    // SAFETY: numbers only.
    owned(unsafe { libc::inotify_init1(libc::IN_CLOEXEC) })
}

/// inotify_add_watch(2).
pub fn add_watch(inotify: BorrowedFd<'_>, path: &std::ffi::CStr, mask: u32) -> nix::Result<i32> {
    // SAFETY: a C string that lives across the call.
    Errno::result(unsafe { libc::inotify_add_watch(inotify.as_raw_fd(), path.as_ptr(), mask) })
}

/// inotify_rm_watch(2).
pub fn remove_watch(inotify: BorrowedFd<'_>, wd: i32) -> nix::Result<()> {
    // SAFETY: numbers only.
    Errno::result(unsafe { libc::inotify_rm_watch(inotify.as_raw_fd(), wd) }).map(drop)
}

/// name_to_handle_at(2) with AT_HANDLE_FID (Linux 6.5): what identifies the file itself, as fdinfo shows it of a watch.
pub fn file_handle(fd: BorrowedFd<'_>) -> nix::Result<(i32, Vec<u8>)> {
    const AT_HANDLE_FID: c_int = 0x200;
    const MOST: usize = 128;
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: i32,
        data: [u8; MOST],
    }
    let mut handle = Handle { bytes: MOST as u32, kind: 0, data: [0; MOST] };
    let mut mount: c_int = 0;
    // SAFETY: the handle has room for as many bytes as it says, and outlives the call as the empty path does.
    let done = unsafe {
        libc::name_to_handle_at(
            fd.as_raw_fd(),
            c"".as_ptr(),
            (&raw mut handle).cast(),
            &raw mut mount,
            libc::AT_EMPTY_PATH | AT_HANDLE_FID,
        )
    };
    Errno::result(done)?;
    Ok((handle.kind, handle.data[..(handle.bytes as usize).min(MOST)].to_vec()))
}

/// Entries of a directory from its offset to its end, with the offset behind each.
pub fn entries(directory: BorrowedFd<'_>) -> nix::Result<Vec<(Vec<u8>, i64)>> {
    let mut buffer = vec![0u8; 64 << 10];
    let mut found = Vec::new();
    loop {
        // SAFETY: the kernel writes at most as many bytes as the buffer has.
        let read =
            unsafe { libc::syscall(libc::SYS_getdents64, directory.as_raw_fd(), buffer.as_mut_ptr(), buffer.len()) };
        let read = Errno::result(read)? as usize;
        if read == 0 {
            return Ok(found);
        }
        // struct linux_dirent64: inode, offset (8 bytes each), length (2), kind (1), name up to a zero.
        let mut rest = &buffer[..read];
        while rest.len() > 19 {
            let length = usize::from(u16::from_ne_bytes([rest[16], rest[17]])).clamp(20, rest.len());
            let offset = i64::from_ne_bytes(rest[8..16].try_into().unwrap_or_default());
            let name = rest[19..length].split(|byte| *byte == 0).next().unwrap_or_default();
            found.push((name.to_vec(), offset));
            rest = &rest[length..];
        }
    }
}

/// memfd_create(2).
pub fn memfd(name: &std::ffi::CStr, flags: u32) -> nix::Result<OwnedFd> {
    // SAFETY: a C string that lives across the call.
    owned(unsafe { libc::memfd_create(name.as_ptr(), flags) })
}

/// F_GET_SEALS.
pub fn seals(fd: BorrowedFd<'_>) -> nix::Result<u32> {
    fcntl_number(fd, libc::F_GET_SEALS, 0).map(|s| s as u32)
}

/// F_ADD_SEALS.
pub fn add_seals(fd: BorrowedFd<'_>, seals: u32) -> nix::Result<()> {
    fcntl_number(fd, libc::F_ADD_SEALS, seals as c_int).map(drop)
}

/// dup3(2) to exactly `number`, whatever was there; the number belongs to the caller.
pub fn dup_to(fd: BorrowedFd<'_>, number: RawFd) -> nix::Result<()> {
    // SAFETY: numbers only; the caller keeps track of who owns `number`.
    Errno::result(unsafe { libc::dup3(fd.as_raw_fd(), number, libc::O_CLOEXEC) }).map(drop)
}

/// F_DUPFD_CLOEXEC: a copy with the lowest free number that is at least `least`.
pub fn dup_above(fd: BorrowedFd<'_>, least: RawFd) -> nix::Result<OwnedFd> {
    owned(fcntl_number(fd, libc::F_DUPFD_CLOEXEC, least)?)
}

/// close(2) of a number that no [`OwnedFd`] stands for.
pub fn close_number(number: RawFd) {
    // SAFETY: the caller put it there by `dup_to` and nothing owns it.
    unsafe { libc::close(number) };
}

/// Whether this number is open.
pub fn is_open(number: RawFd) -> bool {
    // SAFETY: F_GETFD touches no memory.
    unsafe { libc::fcntl(number, libc::F_GETFD) >= 0 }
}

/// flock(2), without waiting.
pub fn set_flock(fd: BorrowedFd<'_>, exclusive: bool) -> nix::Result<()> {
    let operation = libc::LOCK_NB | if exclusive { libc::LOCK_EX } else { libc::LOCK_SH };
    // SAFETY: numbers only.
    Errno::result(unsafe { libc::flock(fd.as_raw_fd(), operation) }).map(drop)
}

/// A copy of a number of ours (that some other [`OwnedFd`] stands for), at least `least`.
pub fn duplicate_number(number: RawFd, least: RawFd) -> nix::Result<OwnedFd> {
    // SAFETY: numbers only; one that is not open is EBADF.
    owned(unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, least) })
}

/// tee(2) without waiting: copies what is in one pipe into another and leaves it there.
pub fn tee(from: BorrowedFd<'_>, to: BorrowedFd<'_>, bytes: usize) -> nix::Result<usize> {
    // SAFETY: numbers only.
    let n = unsafe { libc::tee(from.as_raw_fd(), to.as_raw_fd(), bytes, libc::SPLICE_F_NONBLOCK) };
    Errno::result(n).map(|n| n as usize)
}

/// TIOCSTI: one byte as if it had been typed, taken in before this returns. Needs CAP_SYS_ADMIN when the terminal is not
/// the caller's own.
pub fn type_byte(slave: BorrowedFd<'_>, byte: u8) -> nix::Result<()> {
    let mut byte = byte;
    ioctl_with(slave, libc::TIOCSTI as c_ulong, &mut byte).map(drop)
}

/// tcflow(3): whether output is let through.
pub fn set_flow(terminal: BorrowedFd<'_>, on: bool) -> nix::Result<()> {
    let action = if on { libc::TCOON } else { libc::TCOOFF };
    ioctl_number(terminal, libc::TCXONC as c_ulong, action as c_ulong).map(drop)
}
