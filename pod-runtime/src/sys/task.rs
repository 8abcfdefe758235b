//! What one may ask about another task without stopping it, and what a process may ask for itself: scheduling, I/O
//! priority, CPUs, memory policy, robust futexes.

use nix::errno::Errno;
use std::io;

/// struct sched_attr, first version.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct SchedulingAttributes {
    pub size: u32,
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
}

fn checked(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// sched_getattr(2).
pub fn scheduling(tid: i32) -> io::Result<SchedulingAttributes> {
    let mut attributes = SchedulingAttributes::default();
    let size = size_of::<SchedulingAttributes>();
    // SAFETY: the kernel writes at most `size` bytes to `attributes`, which lives across the call.
    checked(unsafe { libc::syscall(libc::SYS_sched_getattr, tid, &raw mut attributes, size, 0) })?;
    Ok(attributes)
}

/// sched_getaffinity(2): one bit a CPU, without trailing zero bytes.
pub fn affinity(tid: i32) -> io::Result<Vec<u8>> {
    let mut mask = vec![0u8; 1024];
    // SAFETY: the kernel writes at most `mask.len()` bytes to `mask`.
    let bytes =
        checked(unsafe { libc::syscall(libc::SYS_sched_getaffinity, tid, mask.len(), mask.as_mut_ptr()) })? as usize;
    mask.truncate(bytes);
    while mask.last() == Some(&0) {
        mask.pop();
    }
    Ok(mask)
}

/// ioprio_get(2) of one task; class and level in one number, 0 for none of its own.
pub fn io_priority(tid: i32) -> io::Result<u32> {
    const IOPRIO_WHO_PROCESS: i32 = 1;
    // SAFETY: takes numbers only.
    checked(unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, tid) }).map(|value| value as u32)
}

/// sched_setattr(2) of the caller.
pub fn set_scheduling(mut attributes: SchedulingAttributes) -> nix::Result<()> {
    attributes.size = size_of::<SchedulingAttributes>() as u32;
    // SAFETY: the kernel reads `size` bytes of the struct, which lives across the call.
    Errno::result(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) }).map(drop)
}

/// sched_setaffinity(2) of the caller, in the form of [`affinity`].
pub fn set_affinity(mask: &[u8]) -> nix::Result<()> {
    // SAFETY: the kernel reads at most `mask.len()` bytes.
    Errno::result(unsafe { libc::syscall(libc::SYS_sched_setaffinity, 0, mask.len(), mask.as_ptr()) }).map(drop)
}

/// ioprio_set(2) of the caller; class and level in one number.
pub fn set_io_priority(value: u32) -> nix::Result<()> {
    const IOPRIO_WHO_PROCESS: i32 = 1;
    // SAFETY: takes numbers only.
    Errno::result(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, value) }).map(drop)
}

/// set_mempolicy(2) of the caller; one bit a node.
pub fn set_memory_policy(mode: u32, nodes: &[u64]) -> nix::Result<()> {
    let bits = if nodes.is_empty() { 0 } else { nodes.len() * 64 + 1 };
    // SAFETY: the kernel reads as many words as hold `bits - 1` bits, all of them in the slice.
    Errno::result(unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, nodes.as_ptr(), bits) }).map(drop)
}

/// get_robust_list(2): address and length of the head.
pub fn robust_list(tid: i32) -> io::Result<(u64, u64)> {
    let (mut head, mut length) = (0u64, 0u64);
    // SAFETY: the kernel writes one word to each of the two, which live across the call.
    checked(unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &raw mut head, &raw mut length) })?;
    Ok((head, length))
}

/// The CPUs that are online, in the form of [`affinity`]. Asked once: it is to read a file of /sys.
pub fn affinity_of_all() -> io::Result<Vec<u8>> {
    static ONLINE: std::sync::OnceLock<usize> = std::sync::OnceLock::new();
    // SAFETY: takes a number only.
    let count = *ONLINE.get_or_init(|| unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) }.max(1) as usize);
    let mut mask = vec![0u8; count.div_ceil(8)];
    for cpu in 0..count {
        mask[cpu / 8] |= 1 << (cpu % 8);
    }
    Ok(mask)
}

/// Where in the state of the processor, as ptrace gives it, the rights of protection keys (PKRU) are; nowhere on one that
/// has none.
pub fn key_rights_at() -> Option<usize> {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    const STATE: u32 = 0xd;
    const RIGHTS: u32 = 9;
    if __cpuid(0).eax < STATE {
        return None;
    }
    let part = __cpuid_count(STATE, RIGHTS);
    (part.eax >= 4).then_some(part.ebx as usize)
}
