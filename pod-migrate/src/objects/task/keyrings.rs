//! Keys that a program keeps in the kernel (keyrings(7)): they are bound to this kernel, and a restored program would
//! miss them. A pod has a session keyring of its own from its birth; one that holds nothing is made again by that.
//!
//! The usual seccomp profile denies these calls, so that only programs that run without it can have any.

use crate::freeze::Process;
use crate::remote::{Arg, Borrowed, RemoteCall};
use pod_runtime::{Problem, Result};

/// A process holds keys.
pub const KEYRING: &str = "E-KEYRING";

const KEYCTL_GET_KEYRING_ID: i32 = 0;
const KEYCTL_DESCRIBE: i32 = 6;
const KEYCTL_READ: i32 = 11;
const THREAD: i32 = -1;
const PROCESS: i32 = -2;
const SESSION: i32 = -3;

fn keyctl(command: i32, key: i32, rest: [Arg; 2]) -> RemoteCall {
    let [third, fourth] = rest;
    RemoteCall::new("keyctl", libc::SYS_keyctl, vec![command.into(), key.into(), third, fourth]).may_fail()
}

/// What a thread is asked: whether it has a keyring, and its process one.
pub fn of_a_thread() -> [RemoteCall; 2] {
    [THREAD, PROCESS].map(|which| keyctl(KEYCTL_GET_KEYRING_ID, which, [0.into(), 0.into()]))
}

/// Refuses a thread that has either.
pub fn refuse(process: &Process, answers: &[RemoteCall]) -> Result<()> {
    match answers.iter().any(|call| call.result > 0) {
        true => Err(problem(process, "a keyring of its own")),
        false => Ok(()),
    }
}

/// Refuses a process whose session keyring holds keys. Keyrings that are linked into it (of the user) are not counted:
/// what is in them belongs to the host's user.
pub fn refuse_session(process: &Process, borrowed: &mut Borrowed<'_>) -> Result<()> {
    const KEYS: usize = 64;
    // Without a filter only: the usual profile lets nobody near.
    if process.leader().status.seccomp != 0 {
        return Ok(());
    }
    let mut list = [keyctl(KEYCTL_READ, SESSION, [Arg::Out(KEYS * 4), ((KEYS * 4) as u64).into()])];
    borrowed.run(process.leader(), &mut list)?;
    let count = (list[0].result.max(0) as usize / 4).min(KEYS);
    let serials = list[0].out[0].chunks_exact(4).take(count);
    let describe = |serial: &[u8]| {
        let serial = i32::from_ne_bytes(serial.try_into().expect("four bytes"));
        keyctl(KEYCTL_DESCRIBE, serial, [Arg::Out(64), 64.into()])
    };
    let mut keys: Vec<RemoteCall> = serials.map(describe).collect();
    if keys.is_empty() {
        return Ok(());
    }
    borrowed.run(process.leader(), &mut keys)?;
    match keys.iter().any(|key| key.result > 0 && !key.out[0].starts_with(b"keyring;")) {
        true => Err(problem(process, "keys in its session keyring")),
        false => Ok(()),
    }
}

fn problem(process: &Process, what: &str) -> Problem {
    let what = format!("process {} has {what}, which cannot be taken along", process.name());
    Problem::new(KEYRING, what).fix("let the program keep its keys in files, or end it before the move")
}
