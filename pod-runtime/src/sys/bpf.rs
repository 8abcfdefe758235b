//! bpf(2) as far as it is needed here: a device allow-list and a gate before listeners, both attached to a cgroup, and a
//! walk over the threads of a process.

use nix::errno::Errno;
use nix::libc;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const PROG_LOAD: u32 = 5;
const PROG_ATTACH: u32 = 8;
const LINK_CREATE: u32 = 28;
const ITER_CREATE: u32 = 33;
const TRACING: u32 = 26;
const TRACE_ITERATOR: u32 = 28;
const CGROUP_SKB: u32 = 8;
const ATTACH_CGROUP_INGRESS: u32 = 0;
const CGROUP_DEVICE: u32 = 15;
const ATTACH_CGROUP_DEVICE: u32 = 6;

/// Whether that is why something of a kernel's could not be walked through: it has no BTF, or does not let us use BPF.
pub fn is_not_there(why: &std::io::Error) -> bool {
    why.raw_os_error() == Some(libc::EPERM) || why.kind() == std::io::ErrorKind::NotFound
}

/// `struct bpf_insn`: registers are packed as destination in the low and source in the high half.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EbpfInstruction {
    pub code: u8,
    pub registers: u8,
    pub offset: i16,
    pub immediate: i32,
}

/// Of those that programs here are made of. Registers by number: 1 is what a program is called with, 10 ends its stack.
impl EbpfInstruction {
    pub fn new(code: u8, to: u8, from: u8, offset: i32, immediate: i32) -> EbpfInstruction {
        EbpfInstruction { code, registers: to | from << 4, offset: offset as i16, immediate }
    }

    /// Eight bytes from where `from` points.
    pub fn load(to: u8, from: u8, offset: i32) -> EbpfInstruction {
        EbpfInstruction::new(0x79, to, from, offset, 0)
    }

    /// Four bytes.
    pub fn load_half(to: u8, from: u8, offset: i32) -> EbpfInstruction {
        EbpfInstruction::new(0x61, to, from, offset, 0)
    }

    /// Eight bytes to where `to` points.
    pub fn store(to: u8, from: u8, offset: i32) -> EbpfInstruction {
        EbpfInstruction::new(0x7b, to, from, offset, 0)
    }

    pub fn copy(to: u8, from: u8) -> EbpfInstruction {
        EbpfInstruction::new(0xbf, to, from, 0, 0)
    }

    pub fn set(to: u8, value: i32) -> EbpfInstruction {
        EbpfInstruction::new(0xb7, to, 0, 0, value)
    }

    pub fn add(to: u8, value: i32) -> EbpfInstruction {
        EbpfInstruction::new(0x07, to, 0, 0, value)
    }

    pub fn add_register(to: u8, from: u8) -> EbpfInstruction {
        EbpfInstruction::new(0x0f, to, from, 0, 0)
    }

    pub fn shift_left(to: u8, bits: i32) -> EbpfInstruction {
        EbpfInstruction::new(0x67, to, 0, 0, bits)
    }

    pub fn shift_right(to: u8, bits: i32) -> EbpfInstruction {
        EbpfInstruction::new(0x77, to, 0, 0, bits)
    }

    /// Leaves out so many instructions when a register has this value.
    pub fn skip_if(register: u8, value: i32, count: usize) -> EbpfInstruction {
        EbpfInstruction::new(0x15, register, 0, count as i32, value)
    }

    /// The same when it has another.
    pub fn skip_unless(register: u8, value: i32, count: usize) -> EbpfInstruction {
        EbpfInstruction::new(0x55, register, 0, count as i32, value)
    }

    /// Leaves out so many instructions when two registers are the same.
    pub fn skip_if_same(one: u8, other: u8, count: usize) -> EbpfInstruction {
        EbpfInstruction::new(0x1d, one, other, count as i32, 0)
    }

    pub fn call(helper: i32) -> EbpfInstruction {
        EbpfInstruction::new(0x85, 0, 0, 0, helper)
    }

    pub fn exit() -> EbpfInstruction {
        EbpfInstruction::new(0x95, 0, 0, 0, 0)
    }

    /// Copies bytes from a place of the kernel to the stack. What cannot be read is all zeros.
    pub fn read_kernel(to: i32, bytes: i32, from: u8, offset: i32) -> [EbpfInstruction; 6] {
        const READ_KERNEL: i32 = 113;
        let (copy, add) = (EbpfInstruction::copy, EbpfInstruction::add);
        [copy(1, 10), add(1, to), EbpfInstruction::set(2, bytes), copy(3, from), add(3, offset), {
            EbpfInstruction::call(READ_KERNEL)
        }]
    }

    /// Writes bytes of the stack to the output of a walk.
    pub fn write_out(output: u8, from: i32, bytes: i32) -> [EbpfInstruction; 5] {
        const SEQ_WRITE: i32 = 127;
        let (copy, add) = (EbpfInstruction::copy, EbpfInstruction::add);
        [copy(1, output), copy(2, 10), add(2, from), EbpfInstruction::set(3, bytes), EbpfInstruction::call(SEQ_WRITE)]
    }

    /// A walk over tasks that does this for each: it finds the output in register 6 and the task in 7.
    pub fn for_each_task(body: Vec<EbpfInstruction>) -> Vec<EbpfInstruction> {
        EbpfInstruction::for_each(8, body)
    }

    /// A walk over the mappings of tasks: the mapping is in register 7.
    pub fn for_each_mapping(body: Vec<EbpfInstruction>) -> Vec<EbpfInstruction> {
        EbpfInstruction::for_each(16, body)
    }

    fn for_each(argument: i32, body: Vec<EbpfInstruction>) -> Vec<EbpfInstruction> {
        let (load, set) = (EbpfInstruction::load, EbpfInstruction::set);
        // What it is called with: where the output is, and the object, which is none at the end.
        let end = EbpfInstruction::skip_if(7, 0, body.len() + 1);
        let mut all = vec![load(6, 1, 0), load(7, 1, argument), end, load(6, 6, 0)];
        all.extend(body);
        all.extend([set(0, 0), EbpfInstruction::exit()]);
        all
    }
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

/// `union bpf_attr` for loading, on to the last field that is used.
#[repr(C)]
#[derive(Default)]
struct WalkAttributes {
    load: LoadAttributes,
    btf: u32,
    function_info_bytes: u32,
    function_info: u64,
    function_info_count: u32,
    line_info_bytes: u32,
    line_info: u64,
    line_info_count: u32,
    attach_btf_id: u32,
    attach_program: u32,
    pad: u32,
}

#[repr(C)]
#[derive(Default)]
struct WalkLinkAttributes {
    program: u32,
    target: u32,
    kind: u32,
    flags: u32,
    info: u64,
    info_bytes: u32,
    pad: u32,
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

/// The program that a walk over tasks, or their mappings, runs for each; `function` is the BTF type of `bpf_iter_task`, or
/// `bpf_iter_task_vma`, in this kernel.
///
/// The helpers that read kernel memory and write to the walk's output are lent to programs under the GPL only: the few
/// instructions that are loaded here may be had under it as well as under the MIT licence.
pub fn load_task_walk(program: &[EbpfInstruction], function: u32) -> nix::Result<OwnedFd> {
    let license = c"Dual MIT/GPL";
    let attributes = WalkAttributes {
        load: LoadAttributes {
            kind: TRACING,
            count: program.len() as u32,
            instructions: program.as_ptr() as u64,
            license: license.as_ptr() as u64,
            name: *b"pod_waits\0\0\0\0\0\0\0",
            expected_attach_type: TRACE_ITERATOR,
            ..LoadAttributes::default()
        },
        attach_btf_id: function,
        ..WalkAttributes::default()
    };
    let fd = bpf(PROG_LOAD, &attributes)?;
    // SAFETY: the kernel returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Runs such a program for every thread of a process, and returns what it wrote.
pub fn walk_tasks(program: BorrowedFd<'_>, process: i32) -> std::io::Result<Vec<u8>> {
    walk(program, [0, process as u32, 0, 0])
}

/// Runs it for one thread.
pub fn walk_task(program: BorrowedFd<'_>, thread: i32) -> std::io::Result<Vec<u8>> {
    walk(program, [thread as u32, 0, 0, 0])
}

/// Runs such a program for every mapping of a process. It writes records of so many bytes, which begin with the address. A
/// walk may come to the last one again and again: it ends where addresses do not rise any more.
pub fn walk_mappings(program: BorrowedFd<'_>, process: i32, bytes: usize) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    let mut walk = begin(program, [process as u32, 0, 0, 0])?;
    let (mut all, mut buffer, mut before) = (Vec::new(), vec![0; ROOM], None);
    loop {
        // The kernel hands out whole records as long as there is room for all that it has made.
        let read = walk.read(&mut buffer)?;
        for record in buffer[..read].chunks(bytes) {
            let start = record.first_chunk().map(|start| u64::from_ne_bytes(*start));
            if record.len() < bytes || start <= before {
                return Ok(all);
            }
            before = start;
            all.extend_from_slice(record);
        }
        if read == 0 {
            return Ok(all);
        }
    }
}

/// Bytes that the kernel makes at a time.
const ROOM: usize = 32 << 10;

fn walk(program: BorrowedFd<'_>, info: [u32; 4]) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::with_capacity(ROOM);
    begin(program, info)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// `info` is `union bpf_iter_link_info` of tasks: tid, pid, pidfd.
fn begin(program: BorrowedFd<'_>, info: [u32; 4]) -> std::io::Result<std::fs::File> {
    let attributes = WalkLinkAttributes {
        program: program.as_raw_fd() as u32,
        kind: TRACE_ITERATOR,
        info: info.as_ptr() as u64,
        info_bytes: size_of_val(&info) as u32,
        ..WalkLinkAttributes::default()
    };
    let link = bpf(LINK_CREATE, &attributes)?;
    // SAFETY: as above.
    let link = unsafe { OwnedFd::from_raw_fd(link as i32) };
    let fd = bpf(ITER_CREATE, &[link.as_raw_fd() as u32, 0])?;
    // SAFETY: as above.
    Ok(std::fs::File::from(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
}
