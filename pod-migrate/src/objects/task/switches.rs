//! Switches of prctl(2) and its relatives that nothing in /proc shows: asked in the task itself, set again in the task.
//!
//! A kernel that does not know one answers with an error: then it is off. What is as a fresh task has it is not set.

use crate::remote::{Arg, RemoteCall};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

const PR_GET_TSC: i32 = 25;
const PR_SET_TSC: i32 = 26;
const PR_MCE_KILL: i32 = 33;
const PR_MCE_KILL_GET: i32 = 34;
const PR_GET_SPECULATION_CTRL: i32 = 52;
const PR_SET_SPECULATION_CTRL: i32 = 53;
const PR_SET_IO_FLUSHER: i32 = 57;
const PR_GET_IO_FLUSHER: i32 = 58;
const PR_SET_MDWE: i32 = 65;
const PR_GET_MDWE: i32 = 66;
const PR_SET_MEMORY_MERGE: i32 = 67;
const PR_GET_MEMORY_MERGE: i32 = 68;
const ARCH_GET_CPUID: i32 = 0x1011;
const ARCH_SET_CPUID: i32 = 0x1012;

/// Of membarrier(2): what a process has registered for, by the bits of the commands that register.
const MEMBARRIER_GET_REGISTRATIONS: i32 = 1 << 9;
/// The commands that use a registration; each is followed by the one that registers.
const MEMBARRIER_USES: [i32; 3] = [1 << 3, 1 << 5, 1 << 7];
const MEMBARRIER_REGISTER: [i32; 4] = [1 << 2, 1 << 4, 1 << 6, 1 << 8];

/// modify_ldt(2).
const LDT_READ: i32 = 0;
const LDT_WRITE: i32 = 0x11;
const LDT_BYTES: usize = 8192 * 8;

/// Kinds of speculation that a task may switch: store bypass, indirect branch, L1D flush.
const SPECULATION: [u32; 3] = [0, 1, 2];
/// Of an answer: the task itself decides; disabled in one of three ways.
const SPECULATION_OWN: i64 = 1;
const SPECULATION_DISABLED: i64 = 4 | 8 | 16;

/// What the threads of a process share.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessSwitches {
    /// Commands of membarrier(2) that register, as a mask.
    pub membarrier: u32,
    /// PR_SET_MDWE.
    pub deny_write_execute: u32,
    /// PR_SET_MEMORY_MERGE.
    pub merge_memory: bool,
    /// Segment descriptors of modify_ldt(2), 8 bytes each.
    pub ldt: ByteBuf,
}

/// What each has for itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadSwitches {
    /// PR_MCE_KILL: 0 late, 1 early, 2 as the system has it.
    pub machine_check: u32,
    /// rdtsc and cpuid end in SIGSEGV.
    pub no_tsc: bool,
    pub no_cpuid: bool,
    pub io_flusher: bool,
    /// Kind of speculation and how it is disabled.
    pub speculation: Vec<(u32, u32)>,
    pub dispatch: Option<Dispatch>,
    /// set_mempolicy(2): mode with flags, and the nodes, unless it is the default.
    #[serde(default)]
    pub memory_policy: Option<(i32, ByteBuf)>,
}

/// As a fresh task has them; also those of an image that was written before they were saved.
impl Default for ThreadSwitches {
    fn default() -> Self {
        ThreadSwitches {
            machine_check: 2,
            no_tsc: false,
            no_cpuid: false,
            io_flusher: false,
            speculation: Vec::new(),
            dispatch: None,
            memory_policy: None,
        }
    }
}

/// Syscall user dispatch: calls from outside of a range end in SIGSYS while the selector says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dispatch {
    pub selector: u64,
    pub offset: u64,
    pub bytes: u64,
}

fn prctl(option: i32, arg: Arg) -> RemoteCall {
    RemoteCall::new("prctl", libc::SYS_prctl, vec![option.into(), arg, 0.into(), 0.into(), 0.into()]).may_fail()
}

fn membarrier(command: i32) -> RemoteCall {
    RemoteCall::new("membarrier", libc::SYS_membarrier, vec![command.into(), 0.into(), 0.into()])
}

fn read_ldt(bytes: usize) -> RemoteCall {
    let args = vec![LDT_READ.into(), Arg::Out(bytes), (bytes as u64).into()];
    RemoteCall::new("read the LDT", libc::SYS_modify_ldt, args).may_fail()
}

/// What a process is asked.
pub fn of_a_process() -> [RemoteCall; 4] {
    [
        membarrier(MEMBARRIER_GET_REGISTRATIONS).may_fail(),
        prctl(PR_GET_MDWE, 0.into()),
        prctl(PR_GET_MEMORY_MERGE, 0.into()),
        // One entry, which says whether there are any.
        read_ldt(8),
    ]
}

/// What has to be asked besides, after the first answers: seldom anything.
pub fn of_a_process_besides(answers: &[RemoteCall]) -> Vec<RemoteCall> {
    let mut more = Vec::new();
    if answers[0].result < 0 {
        // Before Linux 6.3 only a use shows it; it does nothing but wait for the other CPUs.
        more.extend(MEMBARRIER_USES.map(|command| membarrier(command).may_fail()));
    }
    if answers[3].result > 0 {
        more.push(read_ldt(LDT_BYTES));
    }
    more
}

impl ProcessSwitches {
    pub fn new(answers: &[RemoteCall], besides: &[RemoteCall]) -> ProcessSwitches {
        let used = besides.iter().filter(|call| call.number == libc::SYS_membarrier);
        let registered = match answers[0].result {
            mask @ 0.. => mask as u32,
            _ => used.zip(MEMBARRIER_USES).filter(|(call, _)| call.result == 0).map(|(_, use_)| use_ as u32 * 2).sum(),
        };
        let ldt = besides.iter().find(|call| call.number == libc::SYS_modify_ldt && call.result > 0);
        let mut ldt = ldt.map_or(Vec::new(), |call| call.out[0].clone());
        while ldt.last_chunk::<8>() == Some(&[0; 8]) {
            ldt.truncate(ldt.len() - 8);
        }
        ProcessSwitches {
            membarrier: registered,
            deny_write_execute: answers[1].result.max(0) as u32,
            merge_memory: answers[2].result == 1,
            ldt: ByteBuf::from(ldt),
        }
    }

    /// While the process has one thread yet: registering many waits for all CPUs.
    pub fn restore(&self) -> Vec<RemoteCall> {
        let ProcessSwitches { membarrier: registered, deny_write_execute: _, merge_memory, ldt } = self;
        let wanted = MEMBARRIER_REGISTER.into_iter().filter(|command| registered & *command as u32 != 0);
        let mut calls: Vec<RemoteCall> = wanted.map(membarrier).collect();
        if *merge_memory {
            // A kernel without it merges nothing, which a program cannot see.
            calls.push(prctl(PR_SET_MEMORY_MERGE, 1.into()));
        }
        calls.extend(ldt.chunks_exact(8).enumerate().filter_map(|(number, bytes)| descriptor(number, bytes)));
        calls
    }

    /// When no more memory has to be mapped.
    pub fn restore_last(&self) -> Option<RemoteCall> {
        let mut call = prctl(PR_SET_MDWE, u64::from(self.deny_write_execute).into());
        call.what = "deny memory that is written and executed".into();
        call.expect = crate::remote::Expect::Success;
        (self.deny_write_execute != 0).then_some(call)
    }
}

/// One segment descriptor as modify_ldt(2) takes it.
fn descriptor(number: usize, bytes: &[u8]) -> Option<RemoteCall> {
    let bits = u64::from_le_bytes(bytes.try_into().ok()?);
    if bits == 0 {
        return None;
    }
    let bit = |at: u32| (bits >> at & 1) as u32;
    let base = (bits >> 16 & 0xff_ffff | bits >> 56 << 24) as u32;
    let limit = (bits & 0xffff | (bits >> 48 & 0xf) << 16) as u32;
    let contents = (bits >> 42 & 3) as u32;
    let flags = bit(54) | contents << 1 | (bit(41) ^ 1) << 3 | bit(55) << 4 | (bit(47) ^ 1) << 5 | bit(52) << 6;
    let block = [number as u32, base, limit, flags].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let args = vec![LDT_WRITE.into(), Arg::In(block), 16.into()];
    Some(RemoteCall::new("set a segment descriptor", libc::SYS_modify_ldt, args))
}

/// Nodes of memory that a policy can name.
const NODES: usize = 1024;
const MPOL_F_ADDR: u64 = 2;

/// What a thread is asked.
pub fn of_a_thread() -> [RemoteCall; 8] {
    let [a, b, c] = SPECULATION.map(|kind| prctl(PR_GET_SPECULATION_CTRL, kind.into()));
    [
        prctl(PR_MCE_KILL_GET, 0.into()),
        prctl(PR_GET_TSC, Arg::Out(4)),
        RemoteCall::new("arch_prctl", libc::SYS_arch_prctl, vec![ARCH_GET_CPUID.into(), 0.into()]).may_fail(),
        prctl(PR_GET_IO_FLUSHER, 0.into()),
        a,
        b,
        c,
        RemoteCall::new(
            "get_mempolicy",
            libc::SYS_get_mempolicy,
            vec![Arg::Out(4), Arg::Out(NODES / 8), (NODES as u64).into(), 0.into(), 0.into()],
        )
        .may_fail(),
    ]
}

/// What memory policy a map has; most have none, so that the nodes are asked for later ([`nodes_of_map`]).
pub fn policy_of_map(address: u64) -> RemoteCall {
    let args = vec![Arg::Out(4), 0.into(), 0.into(), address.into(), MPOL_F_ADDR.into()];
    RemoteCall::new("get_mempolicy", libc::SYS_get_mempolicy, args).may_fail()
}

/// Whether an answer is worth asking on.
pub fn has_policy(answer: &RemoteCall) -> bool {
    answer.result == 0 && answer.out.first().is_some_and(|mode| mode.iter().any(|byte| *byte != 0))
}

pub fn nodes_of_map(address: u64) -> RemoteCall {
    let args = vec![Arg::Out(4), Arg::Out(NODES / 8), (NODES as u64).into(), address.into(), MPOL_F_ADDR.into()];
    RemoteCall::new("get_mempolicy", libc::SYS_get_mempolicy, args).may_fail()
}

impl ThreadSwitches {
    pub fn new(answers: &[RemoteCall], dispatch: Option<Dispatch>) -> ThreadSwitches {
        const SIGSEGV: [u8; 4] = 2i32.to_ne_bytes();
        let speculation = SPECULATION.into_iter().zip(&answers[4..7]).filter_map(|(kind, call)| {
            let disabled = call.result & SPECULATION_DISABLED;
            (call.result > 0 && call.result & SPECULATION_OWN != 0 && disabled != 0).then_some((kind, disabled as u32))
        });
        ThreadSwitches {
            machine_check: if answers[0].result < 0 { 2 } else { answers[0].result as u32 },
            no_tsc: answers[1].result == 0 && answers[1].out[0] == SIGSEGV,
            no_cpuid: answers[2].result == 0,
            io_flusher: answers[3].result == 1,
            speculation: speculation.collect(),
            dispatch,
            memory_policy: policy(&answers[7]),
        }
    }

    /// Before credentials.
    pub fn restore(&self) -> Vec<RemoteCall> {
        // Dispatch is set from outside, when the thread makes no more calls of ours.
        let ThreadSwitches { machine_check, no_tsc, no_cpuid, io_flusher, speculation, dispatch: _, memory_policy } =
            self;
        let mut calls = Vec::new();
        let mut set = |what: &'static str, option: i32, args: [u64; 2]| {
            let args = vec![option.into(), args[0].into(), args[1].into(), 0.into(), 0.into()];
            calls.push(RemoteCall::new(what, libc::SYS_prctl, args));
        };
        if *machine_check != 2 {
            set("set the machine check policy", PR_MCE_KILL, [1, u64::from(*machine_check)]);
        }
        if *no_tsc {
            set("forbid rdtsc", PR_SET_TSC, [2, 0]);
        }
        if *io_flusher {
            set("become an I/O flusher", PR_SET_IO_FLUSHER, [1, 0]);
        }
        for (kind, how) in speculation {
            set("disable a speculation", PR_SET_SPECULATION_CTRL, [u64::from(*kind), u64::from(*how)]);
        }
        if *no_cpuid {
            let args = vec![ARCH_SET_CPUID.into(), 0.into()];
            calls.push(RemoteCall::new("forbid cpuid", libc::SYS_arch_prctl, args));
        }
        if let Some((mode, nodes)) = memory_policy {
            // Nodes that this host does not have: where memory comes from is nothing that a program can rely on.
            let args = vec![(*mode).into(), Arg::In(nodes.to_vec()), (nodes.len() as u64 * 8).into()];
            calls.push(RemoteCall::new("set the memory policy", libc::SYS_set_mempolicy, args).may_fail());
        }
        calls
    }
}

pub fn policy(answer: &RemoteCall) -> Option<(i32, ByteBuf)> {
    let mode = i32::from_ne_bytes(answer.out.first()?.get(..4)?.try_into().ok()?);
    (answer.result == 0 && mode != 0).then(|| (mode, ByteBuf::from(answer.out[1].clone())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_comes_apart() {
        // As the kernel fills it in for base 0x12345678, limit 0xabcde, 32 bits, pages, usable, writable data.
        let bits: u64 = 0x12 << 56 | 0xda << 48 | 0xf3 << 40 | 0x34_5678 << 16 | 0xbcde;
        let call = descriptor(3, &bits.to_le_bytes()).unwrap();
        let Arg::In(block) = &call.args[1] else { panic!("a block") };
        let words: Vec<u32> = block.chunks_exact(4).map(|b| u32::from_ne_bytes(b.try_into().unwrap())).collect();
        assert_eq!(words, [3, 0x1234_5678, 0xabcde, 1 | 1 << 4 | 1 << 6]);
        assert!(descriptor(0, &[0; 8]).is_none());
    }

    #[test]
    fn registrations_of_an_old_kernel() {
        let mut answers = of_a_process();
        answers[0].result = -22;
        answers.iter_mut().skip(1).for_each(|call| call.result = 0);
        let mut besides = of_a_process_besides(&answers);
        [0, -1, 0].iter().zip(&mut besides).for_each(|(result, call)| call.result = *result);
        assert_eq!(ProcessSwitches::new(&answers, &besides).membarrier, 1 << 4 | 1 << 8);
    }
}
