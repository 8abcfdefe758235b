//! What a thread has for itself besides registers, signals, credentials and filters.

use super::{ProcessState, Registers, ThreadState};
use crate::remote::{Arg, RemoteCall};
use pod_runtime::sys::ptrace::Regs;

/// prctl(2), by number where libc has no name.
fn prctl(what: &'static str, option: i32, value: u64) -> RemoteCall {
    RemoteCall::new(what, libc::SYS_prctl, vec![option.into(), value.into(), 0.into(), 0.into(), 0.into()])
}

/// Before credentials.
pub fn restore(thread: &ThreadState) -> Vec<RemoteCall> {
    let mut comm = thread.comm.to_vec();
    comm.truncate(15);
    comm.push(0);
    let name = vec![libc::PR_SET_NAME.into(), Arg::In(comm), 0.into(), 0.into(), 0.into()];
    let mut calls = vec![
        RemoteCall::new("set the name", libc::SYS_prctl, name),
        RemoteCall::new("set the tid address", libc::SYS_set_tid_address, vec![thread.clear_tid.into()])
            .returns(thread.tid.0.into()),
        prctl("set the timer slack", libc::PR_SET_TIMERSLACK, thread.timer_slack_ns),
        RemoteCall::new("set the personality", libc::SYS_personality, vec![thread.personality.into()]),
    ];
    if let Some(list) = thread.robust_list {
        let args = vec![list.head.into(), list.bytes.into()];
        calls.push(RemoteCall::new("set the robust list", libc::SYS_set_robust_list, args));
    }
    calls
}

/// After credentials, whose change resets these.
pub fn restore_after_credentials(state: &ProcessState, thread: &ThreadState) -> Vec<RemoteCall> {
    let mut calls = Vec::new();
    if thread.parent_death_signal != 0 {
        let signal = thread.parent_death_signal as u64;
        calls.push(prctl("set the parent death signal", libc::PR_SET_PDEATHSIG, signal));
    }
    if thread.tid == state.pid && state.dumpable < 2 {
        calls.push(prctl("set dumpable", libc::PR_SET_DUMPABLE, state.dumpable.into()));
    }
    calls
}

/// Registers as ptrace takes them. No system call is being restarted: the dump has written them so that the task begins
/// an interrupted call again by itself.
pub fn registers(registers: &Registers) -> Regs {
    let Registers {
        r15,
        r14,
        r13,
        r12,
        rbp,
        rbx,
        r11,
        r10,
        r9,
        r8,
        rax,
        rcx,
        rdx,
        rsi,
        rdi,
        orig_rax: _,
        rip,
        cs,
        eflags,
        rsp,
        ss,
        fs_base,
        gs_base,
        ds,
        es,
        fs,
        gs,
    } = *registers;
    Regs {
        r15,
        r14,
        r13,
        r12,
        rbp,
        rbx,
        r11,
        r10,
        r9,
        r8,
        rax,
        rcx,
        rdx,
        rsi,
        rdi,
        orig_rax: u64::MAX,
        rip,
        cs,
        eflags,
        rsp,
        ss,
        fs_base,
        gs_base,
        ds,
        es,
        fs,
        gs,
    }
}
