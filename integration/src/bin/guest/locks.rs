//! Locks on files: POSIX (by range), flock, and of the open file description; a child that cannot get them.

use crate::{Guest, sys};
use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

struct Locks {
    _posix: File,
    _ofd: File,
    _flock: Flock<File>,
    child: UnixStream,
}

fn lock(kind: i32, start: i64, len: i64) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: start, l_len: len, l_pid: 0 }
}

fn open(name: &str) -> Result<File> {
    Ok(File::options().read(true).write(true).create(true).truncate(false).open(format!("/var/tmp/guest-{name}"))?)
}

/// What another process may lock: a letter for each try, upper case when it got it.
fn tries() -> Result<String> {
    let mut answer = String::new();
    let posix = open("posix")?;
    for (letter, range) in
        [('i', lock(libc::F_WRLCK, 15, 1)), ('o', lock(libc::F_WRLCK, 25, 1)), ('r', lock(libc::F_RDLCK, 35, 1))]
    {
        let got = fcntl(&posix, FcntlArg::F_SETLK(&range)).is_ok();
        answer.push(if got { letter.to_ascii_uppercase() } else { letter });
    }
    let got = fcntl(open("ofd")?, FcntlArg::F_OFD_SETLK(&lock(libc::F_WRLCK, 0, 0))).is_ok();
    answer.push(if got { 'D' } else { 'd' });
    let got = Flock::lock(open("flock")?, FlockArg::LockExclusiveNonblock).is_ok();
    answer.push(if got { 'F' } else { 'f' });
    Ok(answer)
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let (ours, mut theirs) = UnixStream::pair()?;
    let other = ours.try_clone()?;
    sys::fork(move || {
        drop(other);
        let mut byte = [0];
        while theirs.read_exact(&mut byte).is_ok() {
            let answer = tries().unwrap_or_else(|error| format!("{error:#}"));
            let _ = writeln!(theirs, "{answer}");
        }
        0
    })?;
    let (posix, ofd) = (open("posix")?, open("ofd")?);
    fcntl(&posix, FcntlArg::F_SETLK(&lock(libc::F_WRLCK, 10, 10)))?;
    fcntl(&posix, FcntlArg::F_SETLK(&lock(libc::F_RDLCK, 30, 10)))?;
    fcntl(&ofd, FcntlArg::F_OFD_SETLK(&lock(libc::F_WRLCK, 0, 0)))?;
    let flock = Flock::lock(open("flock")?, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| error)?;
    Ok(Box::new(Locks { _posix: posix, _ofd: ofd, _flock: flock, child: ours }))
}

impl Guest for Locks {
    fn verify(&mut self) -> Result<()> {
        self.child.write_all(b"?")?;
        let mut answer = Vec::new();
        let mut byte = [0];
        while byte != [b'\n'] {
            self.child.read_exact(&mut byte).context("the child is gone")?;
            answer.push(byte[0]);
        }
        let answer = String::from_utf8_lossy(&answer);
        ensure!(answer.trim() == "iORdf", "others can lock {} (upper case), not iORdf", answer.trim());
        Ok(())
    }
}
