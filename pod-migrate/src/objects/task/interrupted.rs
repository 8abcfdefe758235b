//! System calls that our stop interrupted: the program must never see that.
//!
//! A call that the kernel itself restarts is left as it is on the source ([`heal`] does not touch it) and is written
//! into the image the way the kernel would have restarted it ([`resumed`]). Some calls come back with EINTR from any
//! stop though no handler runs (signal(7), "epoll_wait(2)" and below); those are begun again, here and there.
//!
//! Calls with a relative time-out go on with what [`waits`](super::waits) knows to remain. Those that the kernel restarts
//! by itself are restarted by it elsewhere too: restore begins them with that time and stops them at once
//! ([`Waiting`]). The others begin with it here and there; whose time nobody knows, or cannot be given in a register,
//! begin with all of it, and the report says so ([`begun_anew`]).

use super::Waiting;
use super::waits::{Call, Waits, timespec};
use crate::freeze::Process;
use crate::ids::HostPid;
use crate::remote::stranded;
use pod_runtime::proc::{self, status};
use pod_runtime::sys::memory;
use pod_runtime::sys::ptrace::{self, Regs, RseqConfiguration};
use pod_runtime::{Doing, Result};
use std::collections::BTreeMap;
use std::time::Instant;

const EINTR: i64 = -4;
const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;

/// Calls that end with EINTR when the task is stopped, whether or not a signal is handled. Beginning them again is
/// right because they had no effect.
const STOPPABLE: [i64; 24] = [
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_msgrcv,
    libc::SYS_msgsnd,
    libc::SYS_io_getevents,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_accept4,
    // Of sockets with a time-out: also by the calls that know no sockets.
    libc::SYS_accept,
    libc::SYS_connect,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_recvmmsg,
    libc::SYS_sendmmsg,
    libc::SYS_sendfile,
    libc::SYS_splice,
];

/// A task that has just stopped.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Healed {
    /// What it goes on with.
    pub regs: Regs,
    /// The call that waits the whole of its time again.
    anew: Option<i64>,
    pub rseq: Option<RseqConfiguration>,
}

/// What a stop has interrupted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Interrupted {
    /// The call that the kernel restarts by way of restart_syscall(2).
    restarting: Option<i64>,
    /// That call, if it has a time-out and what remains of it is known, and when so much remained.
    pub waiting: Option<(Waiting, Instant)>,
    /// A call that begins with its whole time again.
    anew: Option<i64>,
}

fn syscall_error(regs: &Regs) -> Option<i64> {
    let result = regs.rax as i64;
    ((regs.orig_rax as i64) >= 0 && (-4095..0).contains(&result)).then_some(result)
}

/// The registers of a task that has just stopped. A call that our stop ended with EINTR is begun again, at once, so that
/// it holds even if we are killed. None when the task is gone.
pub(crate) fn heal(tid: i32, waits: &Waits) -> Result<Option<Healed>> {
    let mut regs = match ptrace::regs(tid) {
        Ok(regs) => regs,
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
        Err(error) => return Err(error).doing(|| format!("read the registers of task {tid} of the host")),
    };
    if let Some((saved, mask)) = stranded(tid, regs.rip) {
        let put_back = ptrace::set_signal_mask(tid, mask).and_then(|()| ptrace::set_regs(tid, &saved));
        put_back.doing(|| format!("put task {tid} of the host back where a killed engine found it"))?;
        return Ok(Some(Healed { regs: saved, anew: None, rseq: None }));
    }
    let rseq = ptrace::rseq_configuration(tid).ok();
    let mut changed = rseq.is_some_and(|rseq| leave_sequence(tid, rseq, &mut regs));
    let mut anew = None;
    if syscall_error(&regs) == Some(EINTR) && STOPPABLE.contains(&(regs.orig_rax as i64)) {
        let status = status_of(tid);
        if !signalled(&status) {
            let remaining = waits.remaining(HostPid(tid), &status);
            anew = begin_again(&mut regs, remaining);
            changed = true;
        }
    }
    if changed {
        ptrace::set_regs(tid, &regs).doing(|| format!("begin an interrupted call of task {tid} of the host again"))?;
    }
    Ok(Some(Healed { regs, anew, rseq }))
}

/// Registers that make the interrupted call again, if they can with what remains of its time; tells the call if they
/// cannot. A time in memory is the program's own and stays as it is.
fn begin_again(regs: &mut Regs, remaining: Option<u64>) -> Option<i64> {
    let number = regs.orig_rax as i64;
    regs.rax = regs.orig_rax;
    regs.rip -= 2;
    regs.orig_rax = u64::MAX;
    let timed = call_of(number, regs).time_out().is_some();
    // Only a socket with a time-out lets a stop be seen.
    let of_a_socket = ![libc::SYS_semop, libc::SYS_msgrcv, libc::SYS_msgsnd].contains(&number)
        && call_of(number, regs).has_no_time_out_of_its_own();
    match (number, remaining) {
        (libc::SYS_epoll_wait | libc::SYS_epoll_pwait, Some(left)) => regs.r10 = milliseconds(left),
        (libc::SYS_epoll_pwait2, Some(left)) => {
            regs.rax = libc::SYS_epoll_pwait as u64;
            regs.r10 = milliseconds(left);
        }
        _ if timed || of_a_socket => return Some(number),
        _ => {}
    }
    None
}

fn milliseconds(ns: u64) -> u64 {
    ns.div_ceil(1_000_000).min(i32::MAX as u64)
}

fn call_of(number: i64, regs: &Regs) -> Call {
    Call { number, args: [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] }
}

fn status_of(tid: i32) -> status::Status {
    status::parse(&proc::read(format!("/proc/{tid}/status")).unwrap_or_default())
}

/// Whether a signal is about to be handled: then EINTR is the truth.
fn signalled(status: &status::Status) -> bool {
    (status.pending | status.shared_pending) & !status.blocked != 0
}

/// What a stopped task was in.
pub(crate) fn look(tid: i32, healed: &Healed, waits: &Waits, status: &status::Status) -> Interrupted {
    let regs = &healed.regs;
    let mut found = Interrupted { anew: healed.anew, ..Interrupted::default() };
    if syscall_error(regs) != Some(ERESTART_RESTARTBLOCK) {
        return found;
    }
    found.restarting = match regs.orig_rax as i64 {
        libc::SYS_restart_syscall => {
            let code = |address, into: &mut [u8]| memory::read_exact(tid, address, into).is_ok();
            let noted = waits.restarted(HostPid(tid), status).map(|number| match number {
                libc::SYS_nanosleep if regs.rdi <= libc::CLOCK_TAI as u64 => libc::SYS_clock_nanosleep,
                number => number,
            });
            noted.or_else(|| number_before(regs.rip, code)).or_else(|| number_by_arguments(tid, regs))
        }
        number => Some(number),
    };
    let Some(number) = found.restarting else {
        found.anew = Some(libc::SYS_restart_syscall);
        return found;
    };
    if call_of(number, regs).time_out().is_some() {
        let left = rest_in_memory(tid, number, regs).or_else(|| waits.remaining(HostPid(tid), status));
        found.waiting = left.map(|remaining_ns| (Waiting { number, remaining_ns }, Instant::now()));
        found.anew = if left.is_none() { Some(number) } else { None };
    }
    found
}

/// The kernel has written the time that remains where the program asked for it.
fn rest_in_memory(tid: i32, number: i64, regs: &Regs) -> Option<u64> {
    let address = match number {
        libc::SYS_nanosleep => regs.rsi,
        libc::SYS_clock_nanosleep => regs.r10,
        _ => 0,
    };
    (address != 0).then(|| timespec(tid, address).map(|left| left.max(0) as u64)).flatten()
}

/// A line for each kind of call of a process that waits longer than it would have.
pub(crate) fn begun_anew(process: &Process) -> Vec<String> {
    let mut calls: BTreeMap<String, usize> = BTreeMap::new();
    for number in process.threads.iter().filter_map(|thread| thread.interrupted.anew) {
        *calls.entry(title(number)).or_default() += 1;
    }
    let line = |(title, threads)| match threads {
        1 => format!("{title} of {} waits its whole time again", process.name()),
        _ => format!("{title} of {} waits its whole time again, in {threads} threads", process.name()),
    };
    calls.into_iter().map(line).collect()
}

fn title(number: i64) -> String {
    const NAMES: [(i64, &str); 11] = [
        (libc::SYS_nanosleep, "nanosleep"),
        (libc::SYS_clock_nanosleep, "clock_nanosleep"),
        (libc::SYS_poll, "poll"),
        (libc::SYS_futex, "futex"),
        (libc::SYS_epoll_wait, "epoll_wait"),
        (libc::SYS_epoll_pwait, "epoll_pwait"),
        (libc::SYS_epoll_pwait2, "epoll_pwait2"),
        (libc::SYS_rt_sigtimedwait, "rt_sigtimedwait"),
        (libc::SYS_semtimedop, "semtimedop"),
        (libc::SYS_io_getevents, "io_getevents"),
        (libc::SYS_restart_syscall, "a restarted call"),
    ];
    let name = NAMES.iter().find(|(known, _)| *known == number);
    name.map_or_else(|| "a call on a socket with a time-out".into(), |(_, name)| (*name).into())
}

/// The registers with which the kernel would let the task go on here: a call that it restarts is restarted by them.
pub(crate) fn restarted_here(regs: &Regs) -> Regs {
    let mut regs = *regs;
    match syscall_error(&regs) {
        Some(ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND) => again(&mut regs, None),
        Some(ERESTART_RESTARTBLOCK) => again(&mut regs, Some(libc::SYS_restart_syscall)),
        _ => {}
    }
    regs.orig_rax = u64::MAX;
    regs
}

/// A thread that stands in a restartable sequence (rseq(2)) is not in it any more once it was stopped: it goes on at
/// the sequence's abort handler, as the kernel would have it.
fn leave_sequence(tid: i32, rseq: RseqConfiguration, regs: &mut Regs) -> bool {
    let read = |address: u64| {
        let mut word = [0; 8];
        memory::read_exact(tid, address, &mut word).ok().map(|()| u64::from_le_bytes(word))
    };
    if rseq.pointer == 0 {
        return false;
    }
    let Some(sequence) = read(rseq.pointer + 8).filter(|sequence| *sequence != 0) else { return false };
    let (Some(start), Some(length), Some(abort)) = (read(sequence + 8), read(sequence + 16), read(sequence + 24))
    else {
        return false;
    };
    let inside = regs.rip.wrapping_sub(start) < length;
    if inside {
        regs.rip = abort;
    }
    inside
}

/// The registers with which the task goes on elsewhere, where the kernel knows nothing of the interrupted call.
pub(crate) fn resumed(regs: &Regs, interrupted: &Interrupted) -> Regs {
    let mut regs = *regs;
    match syscall_error(&regs) {
        Some(ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND) => again(&mut regs, None),
        Some(ERESTART_RESTARTBLOCK) => match interrupted.restarting {
            Some(number) => again(&mut regs, Some(number)),
            // Restarted before, and from a place that does not show what it was.
            None => regs.rax = EINTR as u64,
        },
        _ => {}
    }
    regs.orig_rax = u64::MAX;
    regs
}

fn again(regs: &mut Regs, number: Option<i64>) {
    regs.rax = number.map_or(regs.orig_rax, |number| number as u64);
    regs.rip -= 2;
}

/// The registers of a call that restore has begun and stopped: the kernel restarts it when the task goes on. `before` are
/// those before the call.
pub(crate) fn stopped_in(before: &Regs, number: i64) -> Regs {
    let rax = ERESTART_RESTARTBLOCK as u64;
    Regs { rax, orig_rax: number as u64, rip: before.rip.wrapping_add(2), ..*before }
}

/// Whether a call came to a stop in which the kernel knows how to restart it.
pub(crate) fn restarts(result: i64) -> bool {
    result == ERESTART_RESTARTBLOCK
}

/// Which call has such arguments, when nothing else shows it: the only one of those that restart which can have them.
fn number_by_arguments(tid: i32, regs: &Regs) -> Option<i64> {
    const FUTEX_FLAGS: u64 = 128 | 256;
    const FUTEX_WAIT_BITSET: u64 = 9;
    let time = |address: u64| address != 0 && timespec(tid, address).is_some_and(|time| time >= 0);
    let operation = regs.rsi & !FUTEX_FLAGS;
    let futex = regs.rdi != 0 && regs.rdi & 3 == 0 && [0, FUTEX_WAIT_BITSET].contains(&operation) && time(regs.r10);
    let milliseconds = regs.rdx as i32 != 0 && (regs.rdx >> 32 == 0 || regs.rdx == u64::MAX);
    let polls = milliseconds && regs.rsi < 1 << 20 && (regs.rsi == 0 || regs.rdi != 0);
    let can_be = [
        (libc::SYS_futex, futex),
        (libc::SYS_clock_nanosleep, regs.rdi <= libc::CLOCK_TAI as u64 && regs.rsi <= 1 && time(regs.rdx)),
        (libc::SYS_nanosleep, time(regs.rdi) && (regs.rsi == 0 || time(regs.rsi))),
        (libc::SYS_poll, polls),
    ];
    let mut found = can_be.into_iter().filter_map(|(number, can_be)| can_be.then_some(number));
    found.next().filter(|_| found.next().is_none())
}

/// What a `mov $number, %eax` shortly before the `syscall` at `rip - 2` says.
fn number_before(rip: u64, code: impl Fn(u64, &mut [u8]) -> bool) -> Option<i64> {
    const RESTARTING: [i64; 4] = [libc::SYS_nanosleep, libc::SYS_clock_nanosleep, libc::SYS_poll, libc::SYS_futex];
    let mut bytes = [0u8; 18];
    if !code(rip.checked_sub(18)?, &mut bytes) || bytes[16..] != [0x0f, 0x05] {
        return None;
    }
    (0..=11).rev().find_map(|at| {
        let number = i64::from(u32::from_le_bytes(bytes[at + 1..at + 5].try_into().ok()?));
        (bytes[at] == 0xb8 && RESTARTING.contains(&number)).then_some(number)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regs(number: i64, result: i64) -> Regs {
        let mut regs: Regs = crate::objects::task::Registers::default().into();
        (regs.orig_rax, regs.rax, regs.rip) = (number as u64, result as u64, 0x1000);
        regs
    }

    #[test]
    fn restarts_as_the_kernel_would() {
        let out = resumed(&regs(libc::SYS_read, ERESTARTSYS), &Interrupted::default());
        assert_eq!((out.rax as i64, out.rip, out.orig_rax), (libc::SYS_read, 0xffe, u64::MAX));
    }

    #[test]
    fn results_stay() {
        let out = resumed(&regs(libc::SYS_read, 17), &Interrupted::default());
        assert_eq!((out.rax, out.rip, out.orig_rax), (17, 0x1000, u64::MAX));
        let out = resumed(&regs(-1, ERESTARTSYS), &Interrupted::default());
        assert_eq!((out.rax as i64, out.rip), (ERESTARTSYS, 0x1000));
    }

    #[test]
    fn the_code_shows_what_was_restarted() {
        let code = |_: u64, bytes: &mut [u8]| {
            bytes.copy_from_slice(&[
                0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0xb8, 0xe6, 0, 0, 0, 0x0f, 0x05,
            ]);
            true
        };
        assert_eq!(number_before(0x1000, code), Some(libc::SYS_clock_nanosleep));
        let interrupted = Interrupted { restarting: Some(libc::SYS_clock_nanosleep), ..Interrupted::default() };
        let out = resumed(&regs(libc::SYS_restart_syscall, ERESTART_RESTARTBLOCK), &interrupted);
        assert_eq!(out.rax as i64, libc::SYS_clock_nanosleep);
    }

    #[test]
    fn epoll_waits_for_the_rest() {
        let mut waiting = Regs { r10: 60_000, ..regs(libc::SYS_epoll_wait, EINTR) };
        assert_eq!(begin_again(&mut waiting, Some(1_500_001)), None);
        assert_eq!((waiting.rax as i64, waiting.r10, waiting.rip), (libc::SYS_epoll_wait, 2, 0xffe));
        let mut unknown = Regs { r10: 60_000, ..regs(libc::SYS_epoll_wait, EINTR) };
        assert_eq!(begin_again(&mut unknown, None), Some(libc::SYS_epoll_wait));
        assert_eq!(unknown.r10, 60_000);
        let mut for_ever = Regs { r10: u64::MAX, ..regs(libc::SYS_epoll_wait, EINTR) };
        assert_eq!(begin_again(&mut for_ever, None), None);
    }
}
