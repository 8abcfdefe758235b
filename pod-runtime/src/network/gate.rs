//! The gate before a pod's listeners: while it is closed, new TCP connections from outside the pod are not begun.
//!
//! A connection that the kernel has accepted and no program yet has no descriptor, so nobody can save it. Before a move
//! the gate keeps new ones out, the programs accept those that are there, and nothing is lost: who was kept out is heard
//! ([`super::knocks`]) and answered where the pod runs on, or else repeats its SYN after a second.
//!
//! It is a BPF program on the pod's cgroup, tied to a descriptor: it opens when [`Gate`] is dropped or its owner killed.
//! Hosts without cgroup v2 or without BPF have no gate; there a handshake in the moment of the move may be lost.

use crate::cgroup::Cgroup;
use crate::sys::bpf::{self, EbpfInstruction};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

/// Closed as long as it lives.
#[derive(Debug)]
pub struct Gate {
    _link: OwnedFd,
}

impl Gate {
    pub fn close(cgroup: &Cgroup) -> Option<Gate> {
        let folder = File::open(cgroup.unified()?).ok()?;
        let closed = bpf::load_ingress_filter(&program())
            .and_then(|program| bpf::attach_ingress_filter(folder.as_fd(), program.as_fd()));
        match closed {
            Ok(link) => Some(Gate { _link: link }),
            Err(error) => {
                tracing::debug!("this kernel takes no ingress filter ({error}): connections go on being made");
                None
            }
        }
    }
}

/// Where a jump goes; filled in when all is known.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Label {
    Allow,
    V6,
    Flags,
}

/// Registers by number: 0 result, 1–4 arguments, 6 context, 7 an offset, 8 a byte, 10 the stack's end.
struct Assembler {
    code: Vec<EbpfInstruction>,
    jumps: Vec<(usize, Label)>,
}

impl Assembler {
    fn put(&mut self, code: u8, destination: u8, source: u8, offset: i16, immediate: i32) {
        self.code.push(EbpfInstruction { code, registers: destination | source << 4, offset, immediate });
    }

    fn move_number(&mut self, to: u8, value: i32) {
        self.put(0xb7, to, 0, 0, value);
    }

    fn move_register(&mut self, to: u8, from: u8) {
        self.put(0xbf, to, from, 0, 0);
    }

    /// Arithmetic with a number: add 0x07, and 0x57, shift left 0x67, shift right 0x77.
    fn number(&mut self, code: u8, register: u8, value: i32) {
        self.put(code, register, 0, 0, value);
    }

    /// Jump if equal 0x15, if not equal 0x55, always 0x05.
    fn jump(&mut self, code: u8, register: u8, value: i32, label: Label) {
        self.jumps.push((self.code.len(), label));
        self.put(code, register, 0, 0, value);
    }

    /// Register 8 = the packet's byte at the offset in register 2; out if the packet is shorter.
    fn load_byte(&mut self) {
        const LOAD_BYTES: i32 = 26;
        self.move_register(1, 6);
        self.move_register(3, 10);
        self.number(0x07, 3, -8);
        self.move_number(4, 1);
        self.put(0x85, 0, 0, 0, LOAD_BYTES);
        self.jump(0x55, 0, 0, Label::Allow);
        // r8 = *(u8 *)(r10 - 8)
        self.put(0x71, 8, 10, -8, 0);
    }

    fn place(&mut self, label: Label) {
        let here = self.code.len();
        let (now, later) = self.jumps.drain(..).partition(|(_, wanted)| *wanted == label);
        self.jumps = later;
        let now: Vec<(usize, Label)> = now;
        for (at, _) in now {
            self.code[at].offset = (here - at - 1) as i16;
        }
    }
}

/// Drops a segment that has SYN and not ACK and did not come by loopback. Extension headers of IPv6 are not walked:
/// TCP has none in practice, and what is not understood is let in.
fn program() -> Vec<EbpfInstruction> {
    const LOOPBACK: i32 = 1;
    const IFINDEX: i16 = 40;
    const TCP: i32 = 6;
    let mut asm = Assembler { code: Vec::new(), jumps: Vec::new() };
    asm.move_register(6, 1);
    asm.put(0x61, 0, 1, IFINDEX, 0);
    asm.jump(0x15, 0, LOOPBACK, Label::Allow);
    asm.move_number(2, 0);
    asm.load_byte();
    asm.move_register(7, 8);
    asm.number(0x77, 8, 4);
    asm.jump(0x15, 8, 6, Label::V6);
    asm.jump(0x55, 8, 4, Label::Allow);
    asm.move_number(2, 9);
    asm.load_byte();
    asm.jump(0x55, 8, TCP, Label::Allow);
    // The header's length in words, then the flags at 13 in the TCP header.
    asm.number(0x57, 7, 15);
    asm.number(0x67, 7, 2);
    asm.number(0x07, 7, 13);
    asm.jump(0x05, 0, 0, Label::Flags);
    asm.place(Label::V6);
    asm.move_number(2, 6);
    asm.load_byte();
    asm.jump(0x55, 8, TCP, Label::Allow);
    asm.move_number(7, 40 + 13);
    asm.place(Label::Flags);
    asm.move_register(2, 7);
    asm.load_byte();
    asm.number(0x57, 8, 0x12);
    asm.jump(0x55, 8, 0x02, Label::Allow);
    asm.move_number(0, 0);
    asm.put(0x95, 0, 0, 0, 0);
    asm.place(Label::Allow);
    asm.move_number(0, 1);
    asm.put(0x95, 0, 0, 0, 0);
    asm.code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_jump_lands_inside() {
        let program = program();
        for (at, instruction) in program.iter().enumerate() {
            if [0x05, 0x15, 0x55].contains(&instruction.code) {
                assert!(instruction.offset > 0 && at + 1 + (instruction.offset as usize) < program.len(), "{at}");
            }
        }
        assert_eq!(program.last().unwrap().code, 0x95);
    }
}
