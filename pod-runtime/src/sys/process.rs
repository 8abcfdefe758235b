//! What a process does to itself on the way to a program: capabilities, prctl, seccomp, limits, terminal.

use nix::errno::Errno;
use nix::libc;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// The three sets that capset(2) sets, a bit a capability.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CapabilitySets {
    pub effective: u64,
    pub permitted: u64,
    pub inheritable: u64,
}

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// _LINUX_CAPABILITY_VERSION_3: two words a set.
const CAP_VERSION: u32 = 0x2008_0522;

/// capget(2) of the caller.
pub fn capabilities() -> nix::Result<CapabilitySets> {
    let mut header = CapHeader { version: CAP_VERSION, pid: 0 };
    let mut data = [CapData::default(); 2];
    // SAFETY: both structs are as version 3 wants them and outlive the call.
    Errno::result(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) })?;
    let join = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    Ok(CapabilitySets {
        effective: join(data[0].effective, data[1].effective),
        permitted: join(data[0].permitted, data[1].permitted),
        inheritable: join(data[0].inheritable, data[1].inheritable),
    })
}

/// capset(2) of the caller.
pub fn set_capabilities(sets: CapabilitySets) -> nix::Result<()> {
    let mut header = CapHeader { version: CAP_VERSION, pid: 0 };
    let half = |shift: u32| CapData {
        effective: (sets.effective >> shift) as u32,
        permitted: (sets.permitted >> shift) as u32,
        inheritable: (sets.inheritable >> shift) as u32,
    };
    let data = [half(0), half(32)];
    // SAFETY: both structs are as version 3 wants them and outlive the call.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) }).map(drop)
}

fn prctl(option: i32, argument: u64, third: u64) -> nix::Result<i32> {
    // SAFETY: used below only with options that take plain integers.
    Errno::result(unsafe { libc::prctl(option, argument, third, 0u64, 0u64) })
}

/// Whether capability number `cap` is in the bounding set; `None` when the kernel does not know it.
pub fn in_bounding_set(cap: u32) -> Option<bool> {
    prctl(libc::PR_CAPBSET_READ, cap.into(), 0).ok().map(|set| set == 1)
}

pub fn drop_from_bounding_set(cap: u32) -> nix::Result<()> {
    prctl(libc::PR_CAPBSET_DROP, cap.into(), 0).map(drop)
}

pub fn clear_ambient_set() -> nix::Result<()> {
    prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as u64, 0).map(drop)
}

/// Adds a capability, which must be permitted and inheritable, to those that survive the exec of an ordinary file.
pub fn raise_ambient(cap: u32) -> nix::Result<()> {
    prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE as u64, cap.into()).map(drop)
}

/// Whether the permitted set survives the change from uid 0 to another. Gone with the next exec.
pub fn keep_capabilities(keep: bool) -> nix::Result<()> {
    prctl(libc::PR_SET_KEEPCAPS, keep.into(), 0).map(drop)
}

pub fn set_dumpable(dumpable: bool) -> nix::Result<()> {
    prctl(libc::PR_SET_DUMPABLE, dumpable.into(), 0).map(drop)
}

pub fn set_no_new_privileges() -> nix::Result<()> {
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0).map(drop)
}

/// One instruction of a seccomp filter, as the kernel's `struct sock_filter`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    pub code: u16,
    pub jt: u8,
    pub jf: u8,
    pub k: u32,
}

/// Installs a seccomp filter on the calling thread. Needs CAP_SYS_ADMIN or no_new_privs.
pub fn install_filter(program: &[Instruction]) -> nix::Result<()> {
    install_filter_with(program, 0).map(drop)
}

/// The same with flags of seccomp(2); the number that comes back is that of a new descriptor when the flags ask for a
/// listener.
pub fn install_filter_with(program: &[Instruction], flags: u64) -> nix::Result<i64> {
    #[repr(C)]
    struct Program {
        len: u16,
        filter: *const Instruction,
    }
    let len = u16::try_from(program.len()).map_err(|_| Errno::EINVAL)?;
    let program = Program { len, filter: program.as_ptr() };
    // SAFETY: the kernel copies `len` instructions, all of them in the slice.
    let done = unsafe {
        libc::syscall(libc::SYS_seccomp, 1 /* SECCOMP_SET_MODE_FILTER */, flags, &raw const program)
    };
    Errno::result(done)
}

/// setdomainname(2).
pub fn set_domain_name(name: &str) -> nix::Result<()> {
    // SAFETY: the kernel reads as many bytes as it is told, all of them in the string.
    Errno::result(unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) }).map(drop)
}

/// All descriptors from `first` on close at the next exec.
pub fn close_on_exec_from(first: u32) -> nix::Result<()> {
    // SAFETY: plain integers; nothing is closed now.
    let done = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    Errno::result(done).map(drop)
}

/// getrlimit and setrlimit by number: (soft, hard).
pub fn limit(kind: u32) -> nix::Result<(u64, u64)> {
    let mut limit = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the struct outlives the call.
    Errno::result(unsafe { libc::prlimit64(0, kind, std::ptr::null(), &mut limit) })?;
    Ok((limit.rlim_cur, limit.rlim_max))
}

pub fn set_limit(kind: u32, soft: u64, hard: u64) -> nix::Result<()> {
    let limit = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
    // SAFETY: the struct outlives the call.
    Errno::result(unsafe { libc::prlimit64(0, kind, &limit, std::ptr::null_mut()) }).map(drop)
}

/// All signals to their default action and none blocked, as a new program expects it.
pub fn reset_signals() {
    for signal in 1..=64 {
        if signal == libc::SIGKILL || signal == libc::SIGSTOP {
            continue;
        }
        // SAFETY: SIG_DFL is a valid action for every signal; glibc refuses its own two, which stay default.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: the set is initialised by sigemptyset before it is read.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
    }
}

/// An anonymous session keyring, so that the pod does not possess the keys of who started it.
pub fn new_session_keyring() -> nix::Result<()> {
    // SAFETY: a null name asks for an anonymous keyring.
    let done = unsafe {
        libc::syscall(libc::SYS_keyctl, 1 /* JOIN_SESSION_KEYRING */, std::ptr::null::<u8>(), 0, 0, 0)
    };
    Errno::result(done).map(drop)
}

/// Brings the loopback device of the caller's network namespace up.
pub fn loopback_up() -> io::Result<()> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: ifreq is plain data for which all zeroes is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the kernel reads one ifreq.
    Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) })?;
    Ok(())
}

/// Gives a pidfd's process a signal if it is still there; never by a number that may be reused.
pub fn kill_by_pidfd(pidfd: BorrowedFd<'_>, signal: i32) -> nix::Result<()> {
    super::daemon::pidfd_send_signal(pidfd, signal)
}

/// A descriptor that the kernel has just installed for this process (SCM_RIGHTS), as an object.
pub fn received(fd: i32) -> OwnedFd {
    // SAFETY: the caller got the number from the kernel a moment ago and nobody else owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Whether this number is an open descriptor.
pub fn is_open(fd: i32) -> bool {
    // SAFETY: plain integers.
    unsafe { libc::fcntl(fd, libc::F_GETFD) != -1 }
}

/// A descriptor that is marked to close at exec stays open at the next one.
pub fn keep_at_exec(fd: i32) -> nix::Result<()> {
    // SAFETY: plain integers.
    Errno::result(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) }).map(drop)
}

/// A file in memory with this content that nobody can ever change.
pub fn sealed_file(name: &std::ffi::CStr, content: &[u8]) -> io::Result<OwnedFd> {
    let make = |flags| {
        // SAFETY: the name is terminated.
        Errno::result(unsafe { libc::memfd_create(name.as_ptr(), flags) })
    };
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // Linux before 6.3 does not know the flag and makes every such file executable.
    let fd = make(flags | libc::MFD_EXEC).or_else(|_| make(flags))?;
    // SAFETY: a new descriptor that nobody else owns.
    let file = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut writer = std::fs::File::from(file);
    io::Write::write_all(&mut writer, content)?;
    let seals = libc::F_SEAL_SEAL | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_WRITE;
    // SAFETY: plain integers.
    Errno::result(unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) })?;
    Ok(writer.into())
}

/// Whether a file is one that [`sealed_file`] has made.
pub fn is_sealed(file: BorrowedFd<'_>) -> bool {
    // SAFETY: plain integers.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    seals != -1 && seals & libc::F_SEAL_WRITE != 0
}

/// execveat(2) of an open file; returns only with an error. By way of /proc where a filter denies that call.
pub fn execute_file(file: BorrowedFd<'_>, args: &[std::ffi::CString], env: &[std::ffi::CString]) -> nix::Error {
    match nix::unistd::execveat(file, c"", args, env, nix::fcntl::AtFlags::AT_EMPTY_PATH) {
        Err(Errno::EPERM | Errno::ENOSYS) => {}
        Err(error) => return error,
        Ok(never) => match never {},
    }
    let path = std::ffi::CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap_or_default();
    match nix::unistd::execve(&path, args, env) {
        Err(error) => error,
        Ok(never) => match never {},
    }
}
