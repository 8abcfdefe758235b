//! A pty of the pod's own: its number, settings, size, unread input and output, its session and foreground group.

use crate::{Guest, sys};
use anyhow::{Result, ensure};
use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::termios::{FlushArg, LocalFlags, SetArg, tcflush, tcgetattr, tcsetattr};
use nix::unistd::{Pid, read, ttyname, write};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

struct Pty {
    ends: OpenptyResult,
    name: PathBuf,
    child: Pid,
    /// The master of one whose slave is closed, and the slave's name.
    left: (OwnedFd, PathBuf),
    /// In packet mode, with something to be told.
    packets: OpenptyResult,
}

/// A terminal in packet mode: its input was thrown away, then something was shown.
fn packets() -> Result<OpenptyResult> {
    let ends = openpty(None, None)?;
    sys::packet_mode(ends.master.as_raw_fd())?;
    tcflush(&ends.slave, FlushArg::TCIFLUSH)?;
    write(&ends.slave, b"shown")?;
    Ok(ends)
}

/// A terminal that was written to from both sides before its slave was closed.
fn left() -> Result<(OwnedFd, PathBuf)> {
    let ends = openpty(None, None)?;
    let mut settings = tcgetattr(&ends.slave)?;
    settings.local_flags.remove(LocalFlags::ECHO);
    tcsetattr(&ends.slave, SetArg::TCSANOW, &settings)?;
    write(&ends.slave, b"last words")?;
    write(&ends.master, b"for the next\n")?;
    Ok((ends.master, ttyname(&ends.slave)?))
}

fn put(pty: &OpenptyResult) -> Result<()> {
    write(&pty.master, b"typed\n")?;
    write(&pty.slave, b"shown")?;
    Ok(())
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let size = Winsize { ws_row: 33, ws_col: 111, ws_xpixel: 0, ws_ypixel: 0 };
    let ends = openpty(Some(&size), None)?;
    let mut settings = tcgetattr(&ends.slave)?;
    settings.local_flags.remove(LocalFlags::ECHO);
    tcsetattr(&ends.slave, SetArg::TCSANOW, &settings)?;
    let name = ttyname(&ends.slave)?;
    let path = name.clone();
    let child = sys::fork(move || {
        let _ = nix::unistd::setsid();
        // Opened by a session leader without a terminal: it becomes its own.
        let _terminal = File::options().read(true).write(true).open(&path);
        loop {
            nix::unistd::pause();
        }
    })?;
    crate::until("the child to have its terminal", || terminal_of(child).is_ok_and(|(tty, _)| tty != 0))?;
    put(&ends)?;
    Ok(Box::new(Pty { ends, name, child, left: left()?, packets: packets()? }))
}

/// Controlling terminal and its foreground group, as /proc tells them.
fn terminal_of(pid: Pid) -> Result<(i64, i64)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    Ok((fields[4].parse()?, fields[5].parse()?))
}

impl Guest for Pty {
    fn verify(&mut self) -> Result<()> {
        let mut text = [0; 100];
        let got = read(&self.ends.slave, &mut text)?;
        ensure!(&text[..got] == b"typed\n", "unread input: {:?}", &text[..got]);
        let got = read(&self.ends.master, &mut text)?;
        ensure!(&text[..got] == b"shown", "unread output: {:?}", &text[..got]);
        ensure!(ttyname(&self.ends.slave)? == self.name, "it is {:?} now", ttyname(&self.ends.slave)?);
        ensure!(!tcgetattr(&self.ends.slave)?.local_flags.contains(LocalFlags::ECHO), "its settings are others");
        let size = sys::window(self.ends.slave.as_raw_fd())?;
        ensure!(size == (33, 111), "its size is {size:?}");
        let (terminal, group) = terminal_of(self.child)?;
        ensure!(terminal != 0, "the child lost its terminal");
        ensure!(group == self.child.as_raw() as i64, "the foreground group is {group}");
        put(&self.ends)?;
        let (master, name) = &self.left;
        let got = read(master, &mut text)?;
        ensure!(&text[..got] == b"last words", "output of a closed slave: {:?}", &text[..got]);
        ensure!(read(master, &mut text).is_err(), "the slave is open");
        let slave = File::options().read(true).write(true).custom_flags(libc::O_NOCTTY).open(name)?;
        let got = read(&slave, &mut text)?;
        ensure!(&text[..got] == b"for the next\n", "input of a closed slave: {:?}", &text[..got]);
        drop(slave);
        self.left = left()?;
        const FLUSH_READ: u8 = 1;
        let got = read(&self.packets.master, &mut text)?;
        ensure!(got == 1 && text[0] & FLUSH_READ != 0, "packet mode tells {:?}", &text[..got]);
        let got = read(&self.packets.master, &mut text)?;
        ensure!(&text[..got] == b"\0shown", "packet mode goes on with {:?}", &text[..got]);
        self.packets = packets()?;
        Ok(())
    }
}
