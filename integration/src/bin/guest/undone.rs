//! Semaphores with what is to be undone when a process ends: one that raised and lowered them ends, and they are as before.

use crate::{Guest, sys};
use anyhow::{Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

const FIRST: [i64; 3] = [3, 20, 0];
/// What the process does; the last is more than the value is worth by itself.
const BY: [i16; 3] = [5, -7, 30000];

struct Undone {
    set: i64,
    child: Pid,
}

fn values(set: i64) -> Result<Vec<i64>> {
    (0..FIRST.len() as i64).map(|n| Ok(sys::call(libc::SYS_semctl, [set, n, libc::GETVAL.into(), 0, 0])?)).collect()
}

/// A process that operates on all, so that it is undone, and waits until it is killed.
fn operate(set: i64) -> Result<Pid> {
    let (ours, theirs) = UnixStream::pair()?;
    let child = sys::fork(move || {
        let done = (0u16..).zip(BY).all(|(number, by)| {
            let operation = [number as i16, by, libc::SEM_UNDO as i16];
            sys::call(libc::SYS_semop, [set, operation.as_ptr() as i64, 1, 0, 0]).is_ok()
        });
        // What was raised is taken by somebody else, for whom nothing is undone.
        let taken = [2i16, -29990, 0];
        let taken = sys::call(libc::SYS_semop, [set, taken.as_ptr() as i64, 1, 0, 0]).is_ok();
        let _ = (&theirs).write_all(&[u8::from(done && taken)]);
        loop {
            nix::unistd::pause();
        }
    })?;
    let mut done = [0];
    (&ours).read_exact(&mut done)?;
    ensure!(done == [1], "the process could not");
    Ok(child)
}

fn set_values(set: i64) -> Result<()> {
    for (number, value) in (0..).zip(FIRST) {
        sys::call(libc::SYS_semctl, [set, number, libc::SETVAL.into(), value, 0])?;
    }
    Ok(())
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let set = sys::call(libc::SYS_semget, [libc::IPC_PRIVATE.into(), FIRST.len() as i64, 0o600, 0, 0])?;
    set_values(set)?;
    Ok(Box::new(Undone { set, child: operate(set)? }))
}

impl Guest for Undone {
    fn verify(&mut self) -> Result<()> {
        let now = values(self.set)?;
        ensure!(now == [8, 13, 10], "before the end of the process the values are {now:?}");
        kill(self.child, Signal::SIGKILL)?;
        sys::reap(self.child)?;
        let now = values(self.set)?;
        // The kernel takes no more than there is.
        ensure!(now == [3, 20, 0], "after the end of the process the values are {now:?}");
        set_values(self.set)?;
        self.child = operate(self.set)?;
        Ok(())
    }
}
