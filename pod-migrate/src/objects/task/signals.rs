//! Handlers, alternate stacks, pending signals. Masks are set last, with the registers.

use super::{AlternateStack, Handler, ProcessState, ThreadState};
use crate::remote::{Arg, RemoteCall};

/// struct kernel_sigaction as the kernel takes it.
pub fn action(handler: &Handler) -> Vec<u8> {
    [handler.handler, handler.flags, handler.restorer, handler.mask]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect()
}

/// Sets all handlers of a process that has none. That it ignores SIGTRAP comes last of all: a breakpoint of the stub
/// would reset that.
pub fn restore_handlers(state: &ProcessState) -> Vec<RemoteCall> {
    let handlers = (1..=64).zip(&state.handlers).filter(|(_, handler)| **handler != Handler::default());
    let handlers = handlers.filter(|(signal, _)| changeable(*signal));
    let handlers = handlers.filter(|(signal, _)| *signal != libc::SIGTRAP || !ignores_breakpoints(state));
    handlers.map(|(signal, handler)| handle(signal, handler)).collect()
}

/// No handlers at all, in a process before it has children, which inherit that.
pub fn without_handlers() -> impl Iterator<Item = RemoteCall> {
    (1..=64).filter(|signal| changeable(*signal)).map(|signal| handle(signal, &Handler::default()))
}

fn changeable(signal: i32) -> bool {
    signal != libc::SIGKILL && signal != libc::SIGSTOP
}

fn handle(signal: i32, handler: &Handler) -> RemoteCall {
    let args = vec![signal.into(), Arg::In(action(handler)), 0.into(), 8.into()];
    RemoteCall::new(format!("set the handler of signal {signal}"), libc::SYS_rt_sigaction, args)
}

/// The kernel takes that away from who runs into a breakpoint, as the stub does.
pub fn ignores_breakpoints(state: &ProcessState) -> bool {
    state.handlers.get(libc::SIGTRAP as usize - 1).is_some_and(|handler| handler.handler == libc::SIG_IGN as u64)
}

/// sigaltstack(2). A new thread has none; a process has that of whoever forked it, which is in no memory of its own.
pub fn restore_alternate_stack(stack: &AlternateStack, leader: bool) -> Option<RemoteCall> {
    const SS_ONSTACK: i32 = 1;
    const NONE: AlternateStack = AlternateStack { address: 0, flags: libc::SS_DISABLE, bytes: 0 };
    if *stack == NONE && !leader {
        return None;
    }
    let mut bytes = Vec::with_capacity(24);
    bytes.extend_from_slice(&stack.address.to_ne_bytes());
    // Whether the task is on it is seen from its stack pointer.
    bytes.extend_from_slice(&(stack.flags & !SS_ONSTACK).to_ne_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&stack.bytes.to_ne_bytes());
    Some(RemoteCall::new("set the alternate stack", libc::SYS_sigaltstack, vec![Arg::In(bytes), 0.into()]))
}

/// Signals that wait for the process as a whole; to be run in its leader, with everything blocked.
pub fn restore_process_pending(state: &ProcessState) -> Vec<RemoteCall> {
    state
        .pending
        .iter()
        .map(|info| {
            let args = vec![state.pid.0.into(), signal_of(info).into(), Arg::In(info.to_vec())];
            RemoteCall::new("queue a pending signal", libc::SYS_rt_sigqueueinfo, args)
        })
        .collect()
}

/// Signals that wait for one thread; to be run in it.
pub fn restore_thread_pending(state: &ProcessState, thread: &ThreadState) -> Vec<RemoteCall> {
    thread
        .pending
        .iter()
        .map(|info| {
            let signal = signal_of(info);
            let args = vec![state.pid.0.into(), thread.tid.0.into(), signal.into(), Arg::In(info.to_vec())];
            RemoteCall::new("queue a pending signal", libc::SYS_rt_tgsigqueueinfo, args)
        })
        .collect()
}

/// si_signo of a siginfo_t.
fn signal_of(info: &[u8]) -> i32 {
    info.get(..4).map_or(0, |bytes| i32::from_ne_bytes(bytes.try_into().expect("4 bytes")))
}
