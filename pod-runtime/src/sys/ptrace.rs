//! ptrace(2), and waiting for tracees. Raw because nix knows neither the register sets nor the newer requests, and
//! turns stops by real-time signals into errors.
//!
//! Every call needs the target to be a tracee of the calling *thread* and stopped (but for seize and interrupt);
//! ESRCH means that it is not, or that it died. Nothing here keeps that rule: `pod-migrate::freeze` does.

use libc::{c_int, c_long, c_void, pid_t};
use std::io;

pub const EVENT_FORK: i32 = libc::PTRACE_EVENT_FORK;
pub const EVENT_VFORK: i32 = libc::PTRACE_EVENT_VFORK;
pub const EVENT_CLONE: i32 = libc::PTRACE_EVENT_CLONE;
pub const EVENT_STOP: i32 = libc::PTRACE_EVENT_STOP;

pub const O_TRACECLONE: i32 = libc::PTRACE_O_TRACECLONE;
pub const O_TRACEFORK: i32 = libc::PTRACE_O_TRACEFORK;
pub const O_TRACEVFORK: i32 = libc::PTRACE_O_TRACEVFORK;
pub const O_TRACESYSGOOD: i32 = libc::PTRACE_O_TRACESYSGOOD;
pub const O_SUSPEND_SECCOMP: i32 = libc::PTRACE_O_SUSPEND_SECCOMP;
pub const O_EXITKILL: i32 = libc::PTRACE_O_EXITKILL;

const NT_PRSTATUS: usize = 1;
const NT_X86_XSTATE: usize = 0x202;
const PTRACE_PEEKSIGINFO: u32 = 0x4209;
const PTRACE_GETSIGMASK: u32 = 0x420a;
const PTRACE_SETSIGMASK: u32 = 0x420b;
const PTRACE_SECCOMP_GET_FILTER: u32 = 0x420c;
const PTRACE_SECCOMP_GET_METADATA: u32 = 0x420d;
const PTRACE_GET_RSEQ_CONFIGURATION: u32 = 0x420f;
const PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4210;
const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4211;

/// struct user_regs_struct.
pub type Regs = libc::user_regs_struct;

/// struct ptrace_rseq_configuration.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct RseqConfiguration {
    pub pointer: u64,
    pub size: u32,
    pub signature: u32,
    pub flags: u32,
    pub pad: u32,
}

fn request(request: u32, pid: pid_t, address: usize, data: usize) -> io::Result<c_long> {
    // SAFETY: every caller in this file passes addresses of live objects of the size that the request reads or
    // writes, or plain numbers for the requests that take numbers.
    let result = unsafe { libc::ptrace(request as _, pid, address as *mut c_void, data as *mut c_void) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

pub fn seize(tid: pid_t, options: i32) -> io::Result<()> {
    request(libc::PTRACE_SEIZE, tid, 0, options as usize).map(drop)
}

pub fn interrupt(tid: pid_t) -> io::Result<()> {
    request(libc::PTRACE_INTERRUPT, tid, 0, 0).map(drop)
}

pub fn set_options(tid: pid_t, options: i32) -> io::Result<()> {
    request(libc::PTRACE_SETOPTIONS, tid, 0, options as usize).map(drop)
}

pub fn cont(tid: pid_t, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_CONT, tid, 0, signal as usize).map(drop)
}

/// As [`cont`], to the next entry or exit of a system call.
pub fn syscall(tid: pid_t, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_SYSCALL, tid, 0, signal as usize).map(drop)
}

pub fn detach(tid: pid_t, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_DETACH, tid, 0, signal as usize).map(drop)
}

/// What came with the last event: the new task of a fork or clone.
pub fn event_message(tid: pid_t) -> io::Result<u64> {
    let mut message: libc::c_ulong = 0;
    request(libc::PTRACE_GETEVENTMSG, tid, 0, &raw mut message as usize)?;
    Ok(message)
}

pub fn regs(tid: pid_t) -> io::Result<Regs> {
    // SAFETY: user_regs_struct is plain integers, for which zero is a value.
    let mut regs: Regs = unsafe { std::mem::zeroed() };
    let mut iov = libc::iovec { iov_base: (&raw mut regs).cast(), iov_len: size_of::<Regs>() };
    request(libc::PTRACE_GETREGSET, tid, NT_PRSTATUS, &raw mut iov as usize)?;
    Ok(regs)
}

pub fn set_regs(tid: pid_t, regs: &Regs) -> io::Result<()> {
    let mut iov = libc::iovec { iov_base: (&raw const *regs).cast_mut().cast(), iov_len: size_of::<Regs>() };
    request(libc::PTRACE_SETREGSET, tid, NT_PRSTATUS, &raw mut iov as usize).map(drop)
}

/// The xsave area: x87, SSE, AVX, AVX-512, PKRU, as long as this CPU has it.
pub fn xstate(tid: pid_t) -> io::Result<Vec<u8>> {
    // On the stack: of a thousand threads each area is kept, and is a fifth of this.
    let mut area = [0u8; 16384];
    let mut iov = libc::iovec { iov_base: area.as_mut_ptr().cast(), iov_len: area.len() };
    request(libc::PTRACE_GETREGSET, tid, NT_X86_XSTATE, &raw mut iov as usize)?;
    Ok(area[..iov.iov_len.min(area.len())].to_vec())
}

pub fn set_xstate(tid: pid_t, area: &[u8]) -> io::Result<()> {
    let mut iov = libc::iovec { iov_base: area.as_ptr().cast_mut().cast(), iov_len: area.len() };
    request(libc::PTRACE_SETREGSET, tid, NT_X86_XSTATE, &raw mut iov as usize).map(drop)
}

/// The mask that will hold when the task runs on (the saved one, inside of a sigsuspend and the like).
pub fn signal_mask(tid: pid_t) -> io::Result<u64> {
    let mut mask = 0u64;
    request(PTRACE_GETSIGMASK, tid, 8, &raw mut mask as usize)?;
    Ok(mask)
}

pub fn set_signal_mask(tid: pid_t, mask: u64) -> io::Result<()> {
    request(PTRACE_SETSIGMASK, tid, 8, &raw const mask as usize).map(drop)
}

#[repr(C)]
struct PeekArguments {
    offset: u64,
    flags: u32,
    count: i32,
}

/// All pending signals of the thread, or of its process when `shared`, as siginfo_t, without taking them.
pub fn pending_signals(tid: pid_t, shared: bool) -> io::Result<Vec<[u8; 128]>> {
    let mut found = Vec::new();
    loop {
        let arguments = PeekArguments { offset: found.len() as u64, flags: u32::from(shared), count: 32 };
        let mut buffer = [[0u8; 128]; 32];
        let count = request(PTRACE_PEEKSIGINFO, tid, &raw const arguments as usize, buffer.as_mut_ptr() as usize)?;
        found.extend_from_slice(&buffer[..count as usize]);
        if count < 32 {
            return Ok(found);
        }
    }
}

/// The siginfo_t of the stop that the task is in.
pub fn signal_info(tid: pid_t) -> io::Result<[u8; 128]> {
    let mut info = [0u8; 128];
    request(libc::PTRACE_GETSIGINFO, tid, 0, info.as_mut_ptr() as usize)?;
    Ok(info)
}

pub fn rseq_configuration(tid: pid_t) -> io::Result<RseqConfiguration> {
    let mut configuration = RseqConfiguration::default();
    let size = size_of::<RseqConfiguration>();
    request(PTRACE_GET_RSEQ_CONFIGURATION, tid, size, &raw mut configuration as usize)?;
    Ok(configuration)
}

/// struct ptrace_sud_config: syscall user dispatch; mode 0 is off.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct UserDispatch {
    pub mode: u64,
    pub selector: u64,
    pub offset: u64,
    pub bytes: u64,
}

pub fn user_dispatch(tid: pid_t) -> io::Result<UserDispatch> {
    let mut found = UserDispatch::default();
    let size = size_of::<UserDispatch>();
    request(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, tid, size, &raw mut found as usize)?;
    Ok(found)
}

pub fn set_user_dispatch(tid: pid_t, dispatch: &UserDispatch) -> io::Result<()> {
    let size = size_of::<UserDispatch>();
    request(PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG, tid, size, &raw const *dispatch as usize).map(drop)
}

/// The program of the `index`th filter, 0 being the one installed first, as struct sock_filter; None past the last.
pub fn seccomp_filter(tid: pid_t, index: usize) -> io::Result<Option<Vec<u8>>> {
    let count = match request(PTRACE_SECCOMP_GET_FILTER, tid, index, 0) {
        Ok(count) => count as usize,
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut program = vec![0u8; count * 8];
    request(PTRACE_SECCOMP_GET_FILTER, tid, index, program.as_mut_ptr() as usize)?;
    Ok(Some(program))
}

/// SECCOMP_FILTER_FLAG_* of the `index`th filter.
pub fn seccomp_flags(tid: pid_t, index: usize) -> io::Result<u64> {
    let mut metadata = [index as u64, 0];
    request(PTRACE_SECCOMP_GET_METADATA, tid, 16, metadata.as_mut_ptr() as usize)?;
    Ok(metadata[1])
}

/// What wait(2) says of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// Nothing yet (only without blocking).
    Nothing,
    /// Stopped by this signal, with this PTRACE_EVENT_* (0: signal-delivery-stop, or a syscall-stop with bit 7 set).
    Stopped { signal: i32, event: i32 },
    /// Ended; the raw status.
    Ended(i32),
}

/// Waits for one tracee or child.
pub fn wait(tid: pid_t, block: bool) -> io::Result<Wait> {
    let mut status: c_int = 0;
    let flags = libc::__WALL | if block { 0 } else { libc::WNOHANG };
    loop {
        // SAFETY: `status` lives across the call.
        let pid = unsafe { libc::waitpid(tid, &raw mut status, flags) };
        match pid {
            -1 if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            -1 => return Err(io::Error::last_os_error()),
            0 => return Ok(Wait::Nothing),
            _ if libc::WIFSTOPPED(status) => {
                return Ok(Wait::Stopped { signal: (status >> 8) & 0xff, event: status >> 16 });
            }
            _ => return Ok(Wait::Ended(status)),
        }
    }
}
