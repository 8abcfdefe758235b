//! The machine code that runs in a task that we only borrow. It is position independent, needs no stack and touches no state but
//! the general registers, so that a signal frame may be pushed at any moment and vector registers stay as they are.
//!
//! ```text
//! ONE:    syscall                 one call from registers; its result goes to r14
//!         mov r14, rax
//!         jmp end
//! TABLE:  walk r13 entries at r12: {number, six arguments, result}
//! end:    tgkill(own, own, S)     a traced task stops here, whatever S means to it
//! ```
//!
//! The code lies at the end of the vDSO behind a [`HEADER`] of
//!
//! ```text
//! 0 magic   8 cookie   24 address of the borrowed mapping   32 mask   40 registers of the thread that runs the code
//! ```
//!
//! An epilogue follows that the task runs if its tracer is dead by then (S is a signal that it ignores): it sets the signal mask and every register to constants that were written before the first
//! register was changed, and jumps back to where the task was.

use crate::objects::task::Registers;
use pod_runtime::sys::memory;
use pod_runtime::sys::ptrace::Regs;

/// Offset of the entry that makes one call from registers.
pub(super) const ONE: u64 = 0;
/// Offset of the entry that walks a table: r12 is its address, r13 the number of entries, not 0.
pub(super) const TABLE: u64 = 8;
/// Longest code that is generated here, with the epilogue.
pub(super) const CODE_BYTES: usize = 384;

/// How a stub says that it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// Sends itself this signal; pid and tid as the task knows them.
    Signal { signal: i32, pid: i32, tid: i32 },
    /// Makes a harmless call (getpid): the tracer follows by system calls. For a task that catches every signal.
    Mark,
}

/// What a borrowed task goes back to when nobody does it for it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Home {
    pub regs: Regs,
    pub mask: u64,
}

/// Bytes at the end of the vDSO that header and code take; must be zero or ours.
pub(super) const HOME: u64 = 704;
/// Bytes before the code.
pub(super) const HEADER: u64 = 288;
pub(super) const MAGIC: [u8; 8] = *b"pod-stub";
/// Offset of what [`Home::encode`] gives.
pub(super) const SAVED: u64 = 32;

const _: () = assert!(HEADER + CODE_BYTES as u64 <= HOME && SAVED + 8 + size_of::<Regs>() as u64 <= HEADER);

impl Home {
    /// As it stands in the header.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.mask.to_le_bytes().to_vec();
        Registers::from(&self.regs).words().iter().for_each(|word| bytes.extend_from_slice(&word.to_le_bytes()));
        bytes
    }

    fn decode(bytes: &[u8]) -> Home {
        let mut words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")));
        let mask = words.next().unwrap_or(0);
        let mut saved = [0; Registers::WORDS];
        saved.iter_mut().zip(words).for_each(|(slot, word)| *slot = word);
        Home { regs: Registers::from_words(saved).into(), mask }
    }
}

/// A task whose engine was killed may still be inside of the stub when the next one stops it: then this is what it is
/// on the way back to.
pub(crate) fn stranded(tid: i32, rip: u64) -> Option<(Regs, u64)> {
    let end = (rip | 0xfff) + 1;
    if end - rip > HOME - HEADER {
        return None;
    }
    let mut header = [0u8; HEADER as usize];
    memory::read_exact(tid, end - HOME, &mut header).ok()?;
    let home = Home::decode(&header[SAVED as usize..]);
    (header[..8] == MAGIC).then_some((home.regs, home.mask))
}

struct Code(Vec<u8>);

impl Code {
    fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// mov $value, %eax/%edi/%esi/%edx by the opcode byte.
    fn load32(&mut self, opcode: u8, value: i32) {
        self.0.push(opcode);
        self.bytes(&value.to_le_bytes());
    }

    /// mov $value, %register (0 rax … 15 r15).
    fn load64(&mut self, register: u8, value: u64) {
        self.bytes(&[0x48 | (register >> 3), 0xb8 | (register & 7)]);
        self.bytes(&value.to_le_bytes());
    }
}

const EAX: u8 = 0xb8;
const EDX: u8 = 0xba;
const ESI: u8 = 0xbe;
const EDI: u8 = 0xbf;
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// A stub ready to be written anywhere.
pub(super) struct Stub {
    pub bytes: Vec<u8>,
    /// Offset of the instruction after the last call, where the task is when it is done.
    pub end: u64,
}

/// The whole stub for one thread.
pub(super) fn code(end: End, home: &Home) -> Stub {
    let mut code = Code(Vec::with_capacity(CODE_BYTES));
    code.bytes(&SYSCALL);
    code.bytes(&[0x49, 0x89, 0xc6]); // mov %rax, %r14
    code.bytes(&[0xeb, 0]); // jmp end, patched below
    code.bytes(&[0x90]);
    debug_assert_eq!(code.0.len() as u64, TABLE);
    code.bytes(&[0x49, 0x8b, 0x04, 0x24]); // mov (%r12), %rax
    code.bytes(&[0x49, 0x8b, 0x7c, 0x24, 0x08]); // rdi
    code.bytes(&[0x49, 0x8b, 0x74, 0x24, 0x10]); // rsi
    code.bytes(&[0x49, 0x8b, 0x54, 0x24, 0x18]); // rdx
    code.bytes(&[0x4d, 0x8b, 0x54, 0x24, 0x20]); // r10
    code.bytes(&[0x4d, 0x8b, 0x44, 0x24, 0x28]); // r8
    code.bytes(&[0x4d, 0x8b, 0x4c, 0x24, 0x30]); // r9
    code.bytes(&SYSCALL);
    code.bytes(&[0x49, 0x89, 0x44, 0x24, 0x38]); // mov %rax, 56(%r12)
    code.bytes(&[0x49, 0x83, 0xc4, 0x40]); // add $64, %r12
    code.bytes(&[0x49, 0xff, 0xcd]); // dec %r13
    let back = TABLE as i64 - (code.0.len() as i64 + 2);
    code.bytes(&[0x75, back as u8]); // jnz TABLE
    let end_at = code.0.len();
    code.0[6] = (end_at - 7) as u8;
    finish(&mut code, end);
    let end = code.0.len() as u64;
    epilogue(&mut code, home);
    debug_assert!(code.0.len() <= CODE_BYTES);
    Stub { bytes: code.0, end }
}

fn finish(code: &mut Code, end: End) {
    match end {
        End::Signal { signal, pid, tid } => {
            code.load32(EDI, pid);
            code.load32(ESI, tid);
            code.load32(EDX, signal);
            code.load32(EAX, libc::SYS_tgkill as i32);
        }
        End::Mark => code.load32(EAX, libc::SYS_getpid as i32),
    }
    code.bytes(&SYSCALL);
}

fn epilogue(code: &mut Code, home: &Home) {
    let regs = &home.regs;
    // rt_sigprocmask(SIG_SETMASK, &mask, NULL, 8); the mask lies behind the code.
    code.load32(EDI, libc::SIG_SETMASK);
    code.bytes(&[0x48, 0x8d, 0x35]); // lea mask(%rip), %rsi
    let mask_at = code.0.len();
    code.bytes(&[0; 4]);
    code.bytes(&[0x31, 0xd2]); // xor %edx, %edx
    code.bytes(&[0x41, 0xba, 8, 0, 0, 0]); // mov $8, %r10d
    code.load32(EAX, libc::SYS_rt_sigprocmask as i32);
    code.bytes(&SYSCALL);
    // Flags without a stack: overflow by an addition, the low byte by sahf, direction by cld or std.
    let overflow = if regs.eflags & 0x800 != 0 { 0x7f } else { 0 };
    code.bytes(&[0xb0, overflow, 0x04, 1]); // mov $x, %al; add $1, %al
    code.bytes(&[0xb4, regs.eflags as u8, 0x9e]); // mov $flags, %ah; sahf
    code.bytes(&[if regs.eflags & 0x400 != 0 { 0xfd } else { 0xfc }]);
    let values = [
        regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8, regs.r9, regs.r10,
        regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ];
    for (register, value) in values.into_iter().enumerate() {
        // The stack pointer was never changed.
        if register != 4 {
            code.load64(register as u8, value);
        }
    }
    code.bytes(&[0xff, 0x25, 0, 0, 0, 0]); // jmp *(%rip)
    code.bytes(&regs.rip.to_le_bytes());
    let displacement = (code.0.len() - (mask_at + 4)) as i32;
    code.0[mask_at..mask_at + 4].copy_from_slice(&displacement.to_le_bytes());
    code.bytes(&home.mask.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_thread_goes_back_to_can_be_read_again() {
        let mut words = [0; Registers::WORDS];
        words.iter_mut().enumerate().for_each(|(index, word)| *word = index as u64 * 7);
        let home = Home { regs: Registers::from_words(words).into(), mask: 99 };
        let back = Home::decode(&home.encode());
        assert_eq!((back.mask, back.regs), (99, home.regs));
    }

    #[test]
    fn fits_and_ends_with_the_mask() {
        let home = Home { regs: Registers { rip: 0x1234, ..Default::default() }.into(), mask: 0xabcd };
        let code = code(End::Signal { signal: libc::SIGURG, pid: 1, tid: 1 }, &home).bytes;
        assert!(code.len() <= CODE_BYTES, "{}", code.len());
        assert_eq!(code[code.len() - 8..], 0xabcdu64.to_le_bytes());
        assert_eq!(code[code.len() - 16..code.len() - 8], 0x1234u64.to_le_bytes());
    }
}
