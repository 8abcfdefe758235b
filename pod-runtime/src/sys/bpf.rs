//! bpf(2) as far as cgroup v2 needs it here, for a device allow-list and for a gate before listeners: load a small
//! program and attach it.

use nix::errno::Errno;
use nix::libc;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const PROG_LOAD: u32 = 5;
const PROG_ATTACH: u32 = 8;
const LINK_CREATE: u32 = 28;
const CGROUP_SKB: u32 = 8;
const ATTACH_CGROUP_INGRESS: u32 = 0;
const CGROUP_DEVICE: u32 = 15;
const ATTACH_CGROUP_DEVICE: u32 = 6;

/// `struct bpf_insn`: registers are packed as destination in the low and source in the high half.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EbpfInstruction {
    pub code: u8,
    pub registers: u8,
    pub offset: i16,
    pub immediate: i32,
}

#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    ifindex: u32,
    expected_attach_type: u32,
}

#[repr(C)]
#[derive(Default)]
struct AttachAttributes {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

fn bpf<T>(command: u32, attributes: &T) -> nix::Result<i64> {
    // SAFETY: `T` is one of the structs above, laid out as the kernel's for this command; what it points to lives as
    // long as the call.
    let done = unsafe { libc::syscall(libc::SYS_bpf, command, &raw const *attributes, size_of::<T>()) };
    Errno::result(done)
}

/// Loads a device filter: returns 1 to allow, 0 to deny.
pub fn load_device_filter(program: &[EbpfInstruction]) -> nix::Result<OwnedFd> {
    load(program, CGROUP_DEVICE, ATTACH_CGROUP_DEVICE, *b"pod_devices\0\0\0\0\0")
}

/// Loads a filter of packets that arrive for sockets of a group: returns 1 to let in, 0 to drop.
pub fn load_ingress_filter(program: &[EbpfInstruction]) -> nix::Result<OwnedFd> {
    load(program, CGROUP_SKB, ATTACH_CGROUP_INGRESS, *b"pod_ingress\0\0\0\0\0")
}

fn load(program: &[EbpfInstruction], kind: u32, expected_attach_type: u32, name: [u8; 16]) -> nix::Result<OwnedFd> {
    let license = c"Apache-2.0";
    let attributes = LoadAttributes {
        kind,
        count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        name,
        expected_attach_type,
        ..LoadAttributes::default()
    };
    let fd = bpf(PROG_LOAD, &attributes)?;
    // SAFETY: the kernel returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Attaches an ingress filter to a cgroup for as long as the returned descriptor is open (Linux >= 5.7).
pub fn attach_ingress_filter(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> nix::Result<OwnedFd> {
    // `link_create` begins with the same four numbers, in another order.
    let attributes = AttachAttributes {
        target: program.as_raw_fd() as u32,
        program: cgroup.as_raw_fd() as u32,
        kind: ATTACH_CGROUP_INGRESS,
        flags: 0,
    };
    let fd = bpf(LINK_CREATE, &attributes)?;
    // SAFETY: the kernel returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Attaches a loaded filter to a cgroup for as long as the cgroup lives.
pub fn attach_device_filter(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> nix::Result<()> {
    /// Groups below may add filters; all must allow.
    const ALLOW_MULTI: u32 = 2;
    let attributes = AttachAttributes {
        target: cgroup.as_raw_fd() as u32,
        program: program.as_raw_fd() as u32,
        kind: ATTACH_CGROUP_DEVICE,
        flags: ALLOW_MULTI,
    };
    bpf(PROG_ATTACH, &attributes).map(drop)
}
