//! The program that divides what comes to a group of sockets on one port (SO_ATTACH_REUSEPORT_CBPF, _EBPF).
//!
//! The kernel gives it back to nobody, so it is read where it lies, by a walk over our own descriptors that is run in the
//! kernel (a BPF iterator) and follows the pointers from the file of the socket. Of a classic program the kernel keeps the
//! instructions as they were attached; one in eBPF is known by having none, and refused.
//!
//! It fails by not knowing: no BPF, no BTF, a locked-down kernel. Then the report says so.

use pod_runtime::Problem;
use pod_runtime::proc::btf::Btf;
use pod_runtime::sys::bpf::{self, EbpfInstruction};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::OnceLock;

/// Most instructions of a classic program (BPF_MAXINSNS), 8 bytes each.
const MOST: u16 = 4096;
/// Bytes that go through the program's stack at a time.
const PIECE: i32 = 256;

/// Where this kernel keeps what.
struct Layout {
    /// From a struct file to the program: file to socket, sock, group, program.
    program: [u32; 4],
    /// In struct bpf_prog.
    original: u32,
    /// In struct sock_fprog_kern.
    instructions: u32,
    /// BTF type of the walk's function.
    function: u32,
}

/// It takes milliseconds to look through all types of the kernel, once a process.
fn layout() -> Option<&'static Layout> {
    static LAYOUT: OnceLock<Option<Layout>> = OnceLock::new();
    let read = || {
        let wanted = [
            ("file", "private_data"),
            ("socket", "sk"),
            ("sock", "sk_reuseport_cb"),
            ("sock_reuseport", "prog"),
            ("bpf_prog", "orig_prog"),
            ("sock_fprog_kern", "filter"),
        ];
        let found = Btf::of_this_kernel().ok()?.find(&wanted, "bpf_iter_task_file");
        let members: Option<Vec<u32>> = found.members.into_iter().collect();
        let [file, socket, sock, group, original, instructions] = members?.try_into().ok()?;
        Some(Layout { program: [file, socket, sock, group], original, instructions, function: found.function? })
    };
    LAYOUT.get_or_init(read).as_ref()
}

/// What became of the question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// Instructions of 8 bytes; none when the group has no program.
    Classic(Vec<u8>),
    Unknown,
}

/// The program of the group that a socket of ours is in. `subject` names it in a refusal.
pub fn program(fd: BorrowedFd<'_>, subject: &str) -> pod_runtime::Result<Found> {
    let Some(layout) = layout() else { return Ok(Found::Unknown) };
    match ask(fd, layout) {
        Ok(Some(instructions)) => Ok(Found::Classic(instructions)),
        Ok(None) => Err(Problem::new(
            "E-SOCKET-EBPF",
            format!(
                "{subject}: the sockets of its port are chosen by an eBPF program, which the kernel does not give back"
            ),
        )
        .fix("detach it (SO_DETACH_REUSEPORT_BPF), or use a classic BPF program")),
        Err(error) => {
            tracing::debug!(%error, "the program of a group of sockets cannot be read");
            Ok(Found::Unknown)
        }
    }
}

/// None for a program that is not classic.
fn ask(fd: BorrowedFd<'_>, layout: &Layout) -> io::Result<Option<Vec<u8>>> {
    let word = |bytes: Vec<u8>| bytes.first_chunk().map_or(0, |eight| u64::from_ne_bytes(*eight));
    let path = &layout.program[..];
    if word(follow(fd, layout.function, path, 8)?) == 0 {
        return Ok(Some(Vec::new()));
    }
    let original = [path, &[layout.original]].concat();
    if word(follow(fd, layout.function, &original, 8)?) == 0 {
        return Ok(None);
    }
    let length = follow(fd, layout.function, &[&original[..], &[0]].concat(), 8)?;
    let length = u16::from_ne_bytes([length[0], length[1]]);
    if length == 0 || length > MOST {
        return Err(io::Error::other(format!("a program of {length} instructions")));
    }
    let instructions = [&original[..], &[layout.instructions, 0]].concat();
    follow(fd, layout.function, &instructions, usize::from(length) * 8).map(Some)
}

/// Follows pointers from the struct file of a descriptor of ours, each at an offset from where the one before leads, and
/// reads so many bytes at the last.
fn follow(fd: BorrowedFd<'_>, function: u32, offsets: &[u32], bytes: usize) -> io::Result<Vec<u8>> {
    let program = bpf::load_task_walk(&walk(fd.as_raw_fd(), offsets, bytes), function)?;
    let mut found = bpf::walk_tasks(program.as_fd(), std::process::id() as i32)?;
    if found.len() < bytes {
        return Err(io::Error::other("the walk did not come by the socket"));
    }
    // Each thread of ours has the descriptor.
    found.truncate(bytes);
    Ok(found)
}

fn walk(number: i32, offsets: &[u32], bytes: usize) -> Vec<EbpfInstruction> {
    let (load, set) = (EbpfInstruction::load, EbpfInstruction::set);
    // r6: the output, r7: where we are, r10: our own stack.
    let read = |bytes, offset| EbpfInstruction::read_kernel(-PIECE, bytes, 7, offset);
    let write = |bytes| EbpfInstruction::write_out(6, -PIECE, bytes);
    let mut body = vec![load(6, 6, 0), set(0, 0)];
    body.extend((1..=PIECE / 8).map(|word| EbpfInstruction::store(10, 0, word * -8)));
    let (last, before) = offsets.split_last().unwrap_or((&0, &[]));
    for offset in before {
        body.extend(read(8, *offset as i32));
        body.push(load(7, 10, -PIECE));
    }
    for at in (0..bytes as i32).step_by(PIECE as usize) {
        let length = PIECE.min(bytes as i32 - at);
        body.extend(read(length, *last as i32 + at));
        body.extend(write(length));
    }
    let end = body.len();
    // The walk's context: its output, the task, the descriptor's number, the file, which is none at the end.
    let mut all = vec![
        load(6, 1, 0),
        load(7, 1, 24),
        EbpfInstruction::skip_if(7, 0, end + 2),
        EbpfInstruction::load_half(8, 1, 16),
        EbpfInstruction::skip_unless(8, number, end),
    ];
    all.extend(body);
    all.extend([set(0, 0), EbpfInstruction::exit()]);
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use pod_runtime::sys::inet;

    /// `ld #0; ret a`: always the first.
    const FIRST: [u8; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 0x16, 0, 0, 0, 0, 0, 0, 0];

    #[test]
    fn a_program_is_read_where_it_lies() {
        let bound = || {
            let socket = inet::socket(libc::AF_INET, libc::SOCK_DGRAM, 0).unwrap();
            inet::set_number(socket.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEPORT, 1).unwrap();
            inet::bind(socket.as_fd(), &[2, 0, 0, 0, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
            socket
        };
        let (with, without) = (bound(), bound());
        inet::attach_reuseport(with.as_fd(), &FIRST).unwrap();
        let found = program(with.as_fd(), "a test").unwrap();
        if found != Found::Unknown {
            assert_eq!(found, Found::Classic(FIRST.to_vec()));
            assert_eq!(program(without.as_fd(), "a test").unwrap(), Found::Classic(Vec::new()));
        }
    }
}
