//! What a thread has for itself besides registers, signals, credentials and filters.

use super::{ProcessState, Registers, ThreadState, credentials, scheduling};
use crate::remote::{Arg, RemoteCall};
use pod_runtime::sys::ptrace::Regs;

/// prctl(2), by number where libc has no name.
fn prctl(what: &'static str, option: i32, value: u64) -> RemoteCall {
    RemoteCall::new(what, libc::SYS_prctl, vec![option.into(), value.into(), 0.into(), 0.into(), 0.into()])
}

/// What of the first thread's own state all threads of a process have as well: it is set before they are made, and they
/// inherit it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Alike {
    pub name: bool,
    pub timer_slack: bool,
    pub personality: bool,
    pub scheduling: bool,
    pub ids: bool,
}

impl Alike {
    pub fn among(threads: &[ThreadState]) -> Alike {
        let Some((first, others)) = threads.split_first() else { return Alike::default() };
        let all = |same: &dyn Fn(&ThreadState) -> bool| !others.is_empty() && others.iter().all(same);
        Alike {
            name: all(&|thread| thread.comm == first.comm),
            timer_slack: all(&|thread| thread.timer_slack_ns == first.timer_slack_ns),
            personality: all(&|thread| thread.personality == first.personality),
            scheduling: scheduling::is_inherited(&first.scheduling)
                && all(&|thread| thread.scheduling == first.scheduling),
            ids: all(&|thread| thread.credentials == first.credentials),
        }
    }
}

/// What is alike, in the first thread, before there are others.
pub fn restore_alike(alike: Alike, first: &ThreadState) -> Vec<RemoteCall> {
    let mut calls = Vec::new();
    calls.extend(alike.name.then(|| name(first)));
    calls.extend(alike.timer_slack.then(|| timer_slack(first)));
    calls.extend(alike.personality.then(|| personality(first)));
    if alike.scheduling {
        calls.extend(scheduling::restore(&first.scheduling));
    }
    if alike.ids {
        calls.extend(credentials::restore_ids(&first.credentials));
    }
    calls
}

fn name(thread: &ThreadState) -> RemoteCall {
    let mut comm = thread.comm.to_vec();
    comm.truncate(15);
    comm.push(0);
    let args = vec![libc::PR_SET_NAME.into(), Arg::In(comm), 0.into(), 0.into(), 0.into()];
    RemoteCall::new("set the name", libc::SYS_prctl, args)
}

fn timer_slack(thread: &ThreadState) -> RemoteCall {
    prctl("set the timer slack", libc::PR_SET_TIMERSLACK, thread.timer_slack_ns)
}

fn personality(thread: &ThreadState) -> RemoteCall {
    RemoteCall::new("set the personality", libc::SYS_personality, vec![thread.personality.into()])
}

/// Before credentials; not again what is alike.
pub fn restore(thread: &ThreadState, alike: Alike) -> Vec<RemoteCall> {
    // Its result also shows that the task is the thread that it is taken for.
    let tid_address = RemoteCall::new("set the tid address", libc::SYS_set_tid_address, vec![thread.clear_tid.into()]);
    let mut calls = vec![tid_address.returns(thread.tid.0.into())];
    calls.extend((!alike.name).then(|| name(thread)));
    calls.extend((!alike.timer_slack).then(|| timer_slack(thread)));
    calls.extend((!alike.personality).then(|| personality(thread)));
    if !alike.scheduling {
        calls.extend(scheduling::restore(&thread.scheduling));
    }
    if let Some(list) = thread.robust_list {
        let args = vec![list.head.into(), list.bytes.into()];
        calls.push(RemoteCall::new("set the robust list", libc::SYS_set_robust_list, args));
    }
    calls.extend(thread.switches.restore());
    calls
}

/// rseq(2). The kernel clears a critical section that the stub is not in: see `restore::finish`.
pub fn restore_rseq(thread: &ThreadState) -> Option<RemoteCall> {
    let rseq = thread.rseq?;
    let args = vec![rseq.address.into(), rseq.bytes.into(), 0.into(), rseq.signature.into()];
    Some(RemoteCall::new("register rseq", libc::SYS_rseq, args))
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
