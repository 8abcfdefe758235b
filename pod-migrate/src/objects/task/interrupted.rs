//! System calls that our stop interrupted: the program must never see that.
//!
//! A call that the kernel itself restarts is left as it is on the source ([`heal`] does not touch it) and is written
//! into the image the way the kernel would have restarted it ([`resumed`]). Some calls come back with EINTR from any
//! stop though no handler runs (signal(7), "epoll_wait(2)" and below); those are begun again, here and there.
//!
//! Calls with a relative time-out begin again with the whole of it, unless the time that remains is in memory.

use crate::remote::stranded;
use pod_runtime::proc::{self, status};
use pod_runtime::sys::memory;
use pod_runtime::sys::ptrace::{self, Regs};
use pod_runtime::{Doing, Result};

const EINTR: i64 = -4;
const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;

/// Calls that end with EINTR when the task is stopped, whether or not a signal is handled. Beginning them again is
/// right because they had no effect.
const STOPPABLE: [i64; 14] = [
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
];

fn syscall_error(regs: &Regs) -> Option<i64> {
    let result = regs.rax as i64;
    ((regs.orig_rax as i64) >= 0 && (-4095..0).contains(&result)).then_some(result)
}

/// The registers of a task that has just stopped. A call that our stop ended with EINTR is begun again, at once, so that
/// it holds even if we are killed. None when the task is gone.
pub(crate) fn heal(tid: i32) -> Result<Option<Regs>> {
    let mut regs = match ptrace::regs(tid) {
        Ok(regs) => regs,
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
        Err(error) => return Err(error).doing(|| format!("read the registers of task {tid} of the host")),
    };
    if let Some((saved, mask)) = stranded(tid, regs.rip) {
        let put_back = ptrace::set_signal_mask(tid, mask).and_then(|()| ptrace::set_regs(tid, &saved));
        put_back.doing(|| format!("put task {tid} of the host back where a killed engine found it"))?;
        return Ok(Some(saved));
    }
    let mut changed = leave_sequence(tid, &mut regs);
    if syscall_error(&regs) == Some(EINTR) && STOPPABLE.contains(&(regs.orig_rax as i64)) && !signalled(tid) {
        regs.rax = regs.orig_rax;
        regs.rip -= 2;
        regs.orig_rax = u64::MAX;
        changed = true;
    }
    if changed {
        ptrace::set_regs(tid, &regs).doing(|| format!("begin an interrupted call of task {tid} of the host again"))?;
    }
    Ok(Some(regs))
}

/// Whether a signal is about to be handled: then EINTR is the truth.
fn signalled(tid: i32) -> bool {
    let text = proc::read(format!("/proc/{tid}/status")).unwrap_or_default();
    let status = status::parse(&text);
    (status.pending | status.shared_pending) & !status.blocked != 0
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
fn leave_sequence(tid: i32, regs: &mut Regs) -> bool {
    let Ok(rseq) = ptrace::rseq_configuration(tid) else { return false };
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
/// `code` reads the bytes before an address of the task.
pub(crate) fn resumed(regs: &Regs, code: impl Fn(u64, &mut [u8]) -> bool) -> Regs {
    let mut regs = *regs;
    let Some(error) = syscall_error(&regs) else {
        regs.orig_rax = u64::MAX;
        return regs;
    };
    match error {
        ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => again(&mut regs, None),
        ERESTART_RESTARTBLOCK => {
            let number = match regs.orig_rax as i64 {
                libc::SYS_restart_syscall => number_before(regs.rip, code),
                number => Some(number),
            };
            match number {
                Some(number) => {
                    remaining_time(&mut regs, number);
                    again(&mut regs, Some(number));
                }
                // Restarted before, and from a place that does not show what it was.
                None => regs.rax = EINTR as u64,
            }
        }
        _ => {}
    }
    regs.orig_rax = u64::MAX;
    regs
}

fn again(regs: &mut Regs, number: Option<i64>) {
    regs.rax = number.map_or(regs.orig_rax, |number| number as u64);
    regs.rip -= 2;
}

/// The kernel has written the time that remains where the program asked for it: sleep for that long.
fn remaining_time(regs: &mut Regs, number: i64) {
    const TIMER_ABSTIME: u64 = 1;
    if number == libc::SYS_nanosleep && regs.rsi != 0 {
        regs.rdi = regs.rsi;
    } else if number == libc::SYS_clock_nanosleep && regs.r10 != 0 && regs.rsi & TIMER_ABSTIME == 0 {
        regs.rdx = regs.r10;
    }
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
        let out = resumed(&regs(libc::SYS_read, ERESTARTSYS), |_, _| false);
        assert_eq!((out.rax as i64, out.rip, out.orig_rax), (libc::SYS_read, 0xffe, u64::MAX));
    }

    #[test]
    fn results_stay() {
        let out = resumed(&regs(libc::SYS_read, 17), |_, _| false);
        assert_eq!((out.rax, out.rip, out.orig_rax), (17, 0x1000, u64::MAX));
        let out = resumed(&regs(-1, ERESTARTSYS), |_, _| false);
        assert_eq!((out.rax as i64, out.rip), (ERESTARTSYS, 0x1000));
    }

    #[test]
    fn sleeps_again_after_a_restart() {
        let code = |_: u64, bytes: &mut [u8]| {
            bytes.copy_from_slice(&[
                0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0xb8, 0xe6, 0, 0, 0, 0x0f, 0x05,
            ]);
            true
        };
        let out = resumed(&regs(libc::SYS_restart_syscall, ERESTART_RESTARTBLOCK), code);
        assert_eq!(out.rax as i64, libc::SYS_clock_nanosleep);
    }
}
