//! Switches that nothing in /proc shows: registrations of membarrier(2), the LDT, no memory that is written and
//! executed, merging of equal pages, machine checks; in a child, rdtsc forbidden and system calls dispatched.

use crate::{Guest, sys};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};

const PR_SET_SYSCALL_USER_DISPATCH: i64 = 59;
const PR_SET_MDWE: i64 = 65;
const PR_GET_MDWE: i64 = 66;
const PR_SET_MEMORY_MERGE: i64 = 67;
const PR_GET_MEMORY_MERGE: i64 = 68;

static TSC: AtomicI32 = AtomicI32::new(0);
/// 0: system calls go through; 1: they end in SIGSYS.
static SELECTOR: AtomicU8 = AtomicU8::new(0);

struct Switches {
    before: BTreeMap<&'static str, i64>,
    child: UnixStream,
}

fn prctl(option: i64, arg: i64) -> i64 {
    sys::call(libc::SYS_prctl, [option, arg, 0, 0, 0]).unwrap_or(-1)
}

fn membarrier(command: i64) -> i64 {
    sys::call(libc::SYS_membarrier, [command, 0, 0, 0, 0]).unwrap_or(-1)
}

fn now() -> BTreeMap<&'static str, i64> {
    BTreeMap::from([
        ("deny write and execute", prctl(PR_GET_MDWE, 0)),
        // An engine that works by breakpoints could lose it.
        ("ignores SIGTRAP", sys::action(libc::SIGTRAP).is_ok_and(|(_, to)| to == libc::SIG_IGN).into()),
        ("merge memory", prctl(PR_GET_MEMORY_MERGE, 0)),
        ("machine checks", prctl(libc::PR_MCE_KILL_GET.into(), 0)),
        ("membarrier private", membarrier(1 << 3)),
        ("membarrier sync core", membarrier(1 << 5)),
        ("segment descriptor", sys::segment(7).map_or(-1, |bits| bits as i64)),
    ])
}

/// Answers with what rdtsc does and how many system calls were dispatched, of which it makes one a question.
fn child(mut link: UnixStream) -> i32 {
    let forbidden = prctl(libc::PR_SET_TSC.into(), libc::PR_TSC_SIGSEGV.into()) == 0;
    // A handler that would like an alternate stack, where there is none.
    let on = sys::no_altstack().is_ok() && sys::dispatch_calls(PR_SET_SYSCALL_USER_DISPATCH, &SELECTOR).is_ok();
    let mut byte = [0];
    while link.read_exact(&mut byte).is_ok() {
        let before = sys::signals(libc::SIGSYS);
        SELECTOR.store(1, Ordering::SeqCst);
        let _ = sys::call(libc::SYS_getppid, [0; 5]);
        SELECTOR.store(0, Ordering::SeqCst);
        let dispatched = sys::signals(libc::SIGSYS) - before;
        prctl(libc::PR_GET_TSC.into(), TSC.as_ptr() as i64);
        let answer = [u8::from(forbidden && on), TSC.load(Ordering::SeqCst) as u8, dispatched as u8];
        if link.write_all(&answer).is_err() {
            break;
        }
    }
    0
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    sys::ignore(libc::SIGTRAP);
    let (ours, theirs) = UnixStream::pair()?;
    let for_child = ours.try_clone()?;
    sys::fork(|| {
        drop(for_child);
        child(theirs)
    })?;
    for register in [1 << 4, 1 << 6] {
        ensure!(membarrier(register) == 0, "membarrier {register}");
    }
    prctl(libc::PR_MCE_KILL.into(), 1);
    sys::call(libc::SYS_prctl, [libc::PR_MCE_KILL.into(), libc::PR_MCE_KILL_SET.into(), 1, 0, 0])?;
    prctl(PR_SET_MEMORY_MERGE, 1);
    sys::set_segment(7, 0x1000)?;
    prctl(PR_SET_MDWE, 1);
    let mut switches = Switches { before: now(), child: ours };
    switches.verify()?;
    Ok(Box::new(switches))
}

impl Guest for Switches {
    fn verify(&mut self) -> Result<()> {
        ensure!(now() == self.before, "{:?}, not {:?}", now(), self.before);
        self.child.write_all(&[0])?;
        let mut answer = [0; 3];
        self.child.read_exact(&mut answer).context("the child ended")?;
        ensure!(answer[0] == 1, "this kernel does not have the child's switches");
        ensure!(answer[1] == libc::PR_TSC_SIGSEGV as u8, "rdtsc is allowed again");
        ensure!(answer[2] == 1, "{} calls were dispatched, not 1", answer[2]);
        Ok(())
    }
}
