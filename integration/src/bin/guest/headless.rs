//! A process whose first thread has ended (pthread_exit in main) while another runs on: it is a zombie that answers.

use crate::{Guest, sys};
use anyhow::{Context, Result, ensure};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

struct Headless {
    child: Pid,
    link: UnixStream,
}

/// What the first thread ended with.
const STATUS: i32 = 7;

/// Answers each byte with the next, until nobody asks any more.
fn answer(mut link: UnixStream) {
    let mut byte = [0];
    while link.read_exact(&mut byte).is_ok() {
        let _ = link.write_all(&[byte[0] + 1]);
    }
    sys::end_thread(0);
}

fn make() -> Result<Headless> {
    let (ours, theirs) = UnixStream::pair()?;
    let copy = ours.try_clone()?;
    let child = sys::fork(move || {
        drop((ours, std::thread::spawn(|| answer(theirs))));
        sys::end_thread(STATUS)
    })?;
    let headless = Headless { child, link: copy };
    crate::until("the first thread to end", || headless.ended())?;
    Ok(headless)
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    Ok(Box::new(make()?))
}

impl Headless {
    /// What its stat says behind its name: the state first.
    fn stat(&self) -> Result<Vec<String>> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child))?;
        Ok(stat.rsplit(") ").next().context("a stat")?.split_whitespace().map(str::to_owned).collect())
    }

    fn ended(&self) -> bool {
        // exit_code is the last field.
        self.stat().is_ok_and(|stat| stat[0] == "Z" && stat.last() == Some(&(STATUS << 8).to_string()))
    }
}

impl Guest for Headless {
    fn verify(&mut self) -> Result<()> {
        crate::until("the first thread to have ended", || self.ended())?;
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.child))?.count();
        ensure!(threads == 2, "it has {threads} threads");
        self.link.write_all(b"a")?;
        let mut byte = [0];
        self.link.read_exact(&mut byte)?;
        ensure!(&byte == b"b", "it answers {byte:?}");
        self.link.shutdown(std::net::Shutdown::Both)?;
        let ended = waitpid(self.child, None)?;
        ensure!(ended == WaitStatus::Exited(self.child, 0), "it ended with {ended:?}");
        *self = make()?;
        Ok(())
    }
}
