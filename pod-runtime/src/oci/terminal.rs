//! The terminal of a process in a container: a pty of the container's own devpts, its master handed to whoever asked,
//! by a message on a unix socket.
//!
//! Neither side is opened by a path that the container could have changed: the master in a file system that is verified
//! to be devpts, the slave through its master.

use super::wrong;
use crate::problem::{Doing, Problem, Result};
use crate::rootfs::tree::Tree;
use crate::sys::{tty, unix};
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, fchown};
use oci_spec::runtime::Process;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

const DEVPTS: i64 = 0x1cd1;

#[derive(Debug)]
pub struct Terminal {
    pub master: OwnedFd,
    pub slave: OwnedFd,
}

/// Who gets the master.
pub fn connect(socket: &Path) -> Result<UnixStream> {
    UnixStream::connect(socket).doing(|| format!("connect to the console socket {}", socket.display()))
}

/// A new pty in the devpts of a tree that is mounted.
pub fn make(root: &Tree, process: &Process) -> Result<Terminal> {
    let doing = || "make the terminal".to_owned();
    let pts = root.find(Path::new("/dev/pts")).doing(|| "find /dev/pts for the terminal".into())?;
    let found = nix::sys::statfs::fstatfs(&pts).doing(doing)?;
    if found.filesystem_type().0 != DEVPTS {
        return Err(wrong("/dev/pts of the container is no devpts: it can have no terminal"));
    }
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master = openat(&pts, "ptmx", flags, Mode::empty()).doing(doing)?;
    tty::unlock_pty(master.as_fd()).doing(doing)?;
    if let Some(size) = process.console_size() {
        let side = |cells: u64| u16::try_from(cells).unwrap_or(u16::MAX);
        tty::set_window_size(master.as_fd(), side(size.height()), side(size.width())).doing(doing)?;
    }
    let slave = tty::pty_peer(master.as_fd()).doing(doing)?;
    if process.user().uid() != 0 {
        fchown(&slave, Some(Uid::from_raw(process.user().uid())), None::<Gid>).doing(doing)?;
    }
    Ok(Terminal { master, slave })
}

/// One message with one descriptor.
pub fn send(to: &UnixStream, master: &OwnedFd) -> Result<()> {
    unix::send(to.as_fd(), b"/dev/ptmx", &[], &[master.as_raw_fd()], None)
        .doing(|| "send the terminal to the console socket".into())
        .map(drop)
}

/// The other end of [`send`].
pub fn receive(from: &UnixStream) -> Result<OwnedFd> {
    let message = unix::take(from.as_fd(), 64).doing(|| "receive the terminal".into())?;
    message.fds.into_iter().next().ok_or_else(|| Problem::new("E-SYSTEM", "the process died before it had a terminal"))
}
