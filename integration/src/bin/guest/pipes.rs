//! Pipes: with bytes in them, of another size, in packet mode, shared with a child, with a closed end.

use crate::{Guest, sys};
use anyhow::{Result, ensure};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{pipe, pipe2, read, write};
use std::os::fd::{AsFd, OwnedFd};

struct Pipes {
    full: (OwnedFd, OwnedFd),
    packets: (OwnedFd, OwnedFd),
    closed: OwnedFd,
    to_child: OwnedFd,
    from_child: OwnedFd,
}

fn text() -> Vec<u8> {
    (0..100_000u32).map(|i| (i * 7 % 251) as u8).collect()
}

impl Pipes {
    fn fill(&self) -> Result<()> {
        let mut done = 0;
        while done < text().len() {
            done += write(&self.full.1, &text()[done..])?;
        }
        for packet in [&b"one"[..], b"twotwo", b"3"] {
            write(&self.packets.1, packet)?;
        }
        Ok(())
    }
}

fn exactly(fd: impl AsFd, bytes: usize) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    while all.len() < bytes {
        let mut part = vec![0; bytes - all.len()];
        let got = read(fd.as_fd(), &mut part)?;
        ensure!(got > 0, "end of file after {} of {bytes} bytes", all.len());
        all.extend_from_slice(&part[..got]);
    }
    Ok(all)
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let (child_in, to_child) = pipe()?;
    let (from_child, child_out) = pipe()?;
    let (end, other) = (to_child.try_clone()?, from_child.try_clone()?);
    sys::fork(move || {
        drop((end, other));
        let mut byte = [0];
        while read(&child_in, &mut byte) == Ok(1) {
            let _ = write(&child_out, &[byte[0] + 1]);
        }
        0
    })?;
    let full = pipe2(OFlag::O_NONBLOCK)?;
    fcntl(&full.0, FcntlArg::F_SETPIPE_SZ(256 * 1024))?;
    let (closed, writer) = pipe()?;
    write(&writer, b"last words")?;
    drop(writer);
    let pipes = Pipes { full, packets: pipe2(OFlag::O_DIRECT)?, closed, to_child, from_child };
    pipes.fill()?;
    Ok(Box::new(pipes))
}

impl Guest for Pipes {
    fn verify(&mut self) -> Result<()> {
        ensure!(exactly(&self.full.0, text().len())? == text(), "the pipe holds something else");
        let mut byte = [0];
        ensure!(read(&self.full.0, &mut byte) == Err(nix::errno::Errno::EAGAIN), "and more, or it blocks");
        let size = fcntl(&self.full.0, FcntlArg::F_GETPIPE_SZ)?;
        ensure!(size == 256 * 1024, "its size is {size}");
        for expected in [&b"one"[..], b"twotwo", b"3"] {
            let mut packet = [0; 100];
            let got = read(&self.packets.0, &mut packet)?;
            ensure!(&packet[..got] == expected, "packet {:?}", &packet[..got]);
        }
        let words = exactly(&self.closed, 10)?;
        ensure!(words == b"last words", "{words:?} are in the half-closed pipe");
        ensure!(read(&self.closed, &mut byte)? == 0, "a writer of the closed pipe came back");
        // It cannot be filled again by that end: put the words there by a new one of the same pipe.
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&self.closed));
        std::fs::write(path, "last words")?;
        write(&self.to_child, &[41])?;
        ensure!(exactly(&self.from_child, 1)? == [42], "the child answers something else");
        self.fill()
    }
}
