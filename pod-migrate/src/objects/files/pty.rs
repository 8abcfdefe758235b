//! Pseudo-terminals in the pod's own devpts.
//!
//! A pair is stored with its first description. It comes back under its number: numbers are given out from the lowest
//! free one, so pairs are made in ascending order and the numbers in between are held until all are there.
//!
//! Termios, size and modes are read by ioctls that change nothing; bytes on their way by [`queue`].

use super::view::Holder;
use super::{File, queue};
use crate::ids::{FileId, PodPid};
use nix::fcntl::{OFlag, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{Mode, fchmod, fstat, major, minor};
use nix::unistd::{Gid, Uid, fchown};
use pod_runtime::sys::descriptor;
use pod_runtime::{Doing, Problem, Result};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub end: End,
    /// The N of /dev/pts/N.
    pub index: u32,
    /// The master is the monitor's.
    pub external: Option<Holder>,
    /// Whose controlling terminal it is.
    pub session: Option<PodPid>,
    pub foreground: Option<PodPid>,
    /// With the first description of the pair.
    pub pair: Option<Pair>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    Master,
    Slave,
}

/// What both ends share.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pair {
    /// struct termios2 of the slave.
    pub termios: ByteBuf,
    /// Rows, columns, pixels.
    pub size: [u16; 4],
    pub packet_mode: bool,
    pub locked: bool,
    pub exclusive: bool,
    /// The master is closed: the slave hangs.
    pub hung_up: bool,
    /// No slave is open, but one was: the master reads EIO.
    pub slave_closed: bool,
    /// Of the node: user, group, permissions.
    pub owner: Option<(u32, u32, u32)>,
    /// Typed, not yet read by the slave.
    pub input: ByteBuf,
    /// Written by the slave, not yet read from the master.
    pub output: ByteBuf,
    /// Output is held back (Ctrl-S, TCOOFF).
    #[serde(default)]
    pub stopped: bool,
    /// In packet mode: what the master has not been told yet.
    #[serde(default)]
    pub status: u8,
}

/// First number of the Unix 98 slaves' devices.
const SLAVE_MAJOR: u32 = 136;

/// Which pty a descriptor is of; `None` for a slave whose master is closed.
pub(super) fn index(fd: BorrowedFd<'_>, end: End) -> Option<u32> {
    match end {
        End::Master => descriptor::pty_index(fd).ok(),
        End::Slave => {
            let stat = fstat(fd).ok()?;
            let node = (major(stat.st_rdev) as u32, minor(stat.st_rdev) as u32);
            // /dev/tty and /dev/console stand for another one.
            let (major, minor) = if node.0 == 5 { descriptor::terminal_device(fd).ok()? } else { node };
            (SLAVE_MAJOR..SLAVE_MAJOR + 8).contains(&major).then(|| ((major - SLAVE_MAJOR) << 20) | minor)
        }
    }
}

/// The index of the pty that is the controlling terminal, from the tty_nr of /proc/PID/stat.
pub(super) fn index_of_number(tty: i32) -> Option<u32> {
    let tty = tty as u32;
    let (major, minor) = ((tty >> 8) & 0xfff, (tty & 0xff) | ((tty >> 12) & 0xfff00));
    (SLAVE_MAJOR..SLAVE_MAJOR + 8).contains(&major).then(|| ((major - SLAVE_MAJOR) << 20) | minor)
}

/// Reads a pair through whatever ends are at hand.
pub(super) fn dump_pair(master: Option<BorrowedFd<'_>>, slave: Option<BorrowedFd<'_>>) -> Result<Pair> {
    let Some(any) = slave.or(master) else {
        return Err(Problem::new("E-SYSTEM", "a terminal without any end"));
    };
    let mut pair = Pair {
        termios: ByteBuf::new(),
        size: [0; 4],
        packet_mode: false,
        locked: false,
        exclusive: false,
        hung_up: false,
        slave_closed: false,
        owner: None,
        input: ByteBuf::new(),
        output: ByteBuf::new(),
        stopped: false,
        status: 0,
    };
    let Ok(termios) = descriptor::termios(any) else {
        // A hung up terminal answers EIO to everything.
        pair.hung_up = true;
        return Ok(pair);
    };
    let doing = || "read the state of a terminal".to_string();
    pair.termios = ByteBuf::from(termios.to_vec());
    pair.size = descriptor::window_size(any).doing(doing)?;
    pair.exclusive = descriptor::terminal_exclusive(any).unwrap_or(false);
    if let Some(slave) = slave {
        let stat = fstat(slave).doing(doing)?;
        pair.owner = Some((stat.st_uid, stat.st_gid, stat.st_mode & 0o7777));
    }
    if let (Some(master), None) = (master, slave) {
        let mut polled = [PollFd::new(master, PollFlags::POLLIN)];
        poll(&mut polled, PollTimeout::ZERO).doing(doing)?;
        pair.slave_closed = polled[0].revents().is_some_and(|e| e.contains(PollFlags::POLLHUP));
    }
    // What was written before the slave was closed can still be read, and what was typed by whoever opens it next. One
    // that was never opened must stay so: closing it is an end of file for the master.
    let again = match master {
        Some(master) if pair.slave_closed => {
            let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
            // Locked against it: nobody else can read what is in there either.
            descriptor::pty_slave(master, flags).ok()
        }
        _ => None,
    };
    if let (Some(master), Some(slave)) = (master, slave.or(again.as_ref().map(|fd| fd.as_fd()))) {
        let packet_mode = descriptor::pty_packet_mode(master).doing(doing)?;
        let queues = queue::copy(master, slave, packet_mode).doing(|| "read what is on its way".into())?;
        (pair.input, pair.output) = (queues.input, queues.output);
        (pair.stopped, pair.status) = (queues.stopped, queues.status);
    }
    drop(again);
    if let Some(master) = master {
        pair.packet_mode = descriptor::pty_packet_mode(master).doing(doing)?;
        pair.locked = descriptor::pty_locked(master).doing(doing)?;
    }
    Ok(pair)
}

/// All descriptions of the terminals, made again.
#[derive(Debug, Default)]
pub(super) struct Restored {
    pub ends: Vec<(FileId, OwnedFd)>,
    /// Masters that are the monitor's.
    pub external: Vec<(Holder, OwnedFd)>,
}

/// Makes all pairs, in the order of their numbers.
pub(super) fn restore(all: &BTreeMap<FileId, (&State, &File)>) -> Result<Restored> {
    let mut by_index: BTreeMap<u32, Vec<(FileId, &State, &File)>> = BTreeMap::new();
    let mut hung_up = Vec::new();
    for (id, (state, file)) in all {
        if state.pair.as_ref().is_some_and(|pair| pair.hung_up) {
            hung_up.push((*id, *file));
        } else {
            by_index.entry(state.index).or_default().push((*id, *state, *file));
        }
    }
    let mut restored = Restored::default();
    let mut between = Vec::new();
    for (index, ends) in &by_index {
        let master = master_with_index(*index, &mut between)?;
        restore_pair(master, ends, &mut restored).doing(|| format!("make terminal {index} again"))?;
    }
    for (id, file) in hung_up {
        restored.ends.push((id, slave_without_master(file).doing(|| "make a closed terminal again".into())?));
    }
    Ok(restored)
}

fn open_master() -> std::io::Result<OwnedFd> {
    Ok(open("/dev/ptmx", OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC, Mode::empty())?)
}

/// An upper bound of what an image can make us open.
const MOST: u32 = 4096;

fn master_with_index(index: u32, between: &mut Vec<OwnedFd>) -> Result<OwnedFd> {
    let doing = || format!("open terminal {index}");
    loop {
        let master = open_master().doing(doing)?;
        let got = descriptor::pty_index(master.as_fd()).doing(doing)?;
        if got == index {
            return Ok(master);
        }
        if got > index || got > MOST {
            return Err(Problem::new("E-SYSTEM", format!("the number {index} of a terminal is taken")));
        }
        between.push(master);
    }
}

fn restore_pair(master: OwnedFd, ends: &[(FileId, &State, &File)], restored: &mut Restored) -> Result<()> {
    let pair = ends.iter().find_map(|(_, state, _)| state.pair.as_ref());
    let pair = pair.ok_or_else(|| super::opener::broken("a terminal without its state".into()))?;
    let doing = || "restore the state".to_string();
    descriptor::set_pty_locked(master.as_fd(), false).doing(doing)?;
    let has_slave = ends.iter().any(|(_, state, _)| state.end == End::Slave);
    if has_slave || pair.slave_closed {
        let slave =
            descriptor::pty_slave(master.as_fd(), libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC).doing(doing)?;
        put_back(&master, &slave, pair).doing(doing)?;
        if let Some((uid, gid, mode)) = pair.owner {
            fchown(&slave, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).doing(doing)?;
            fchmod(&slave, Mode::from_bits_truncate(mode)).doing(doing)?;
        }
        for (id, state, file) in ends.iter().filter(|(_, state, _)| state.end == End::Slave) {
            let path = format!("/dev/pts/{}", state.index);
            let flags = OFlag::from_bits_retain(file.flags & libc::O_ACCMODE) | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
            restored.ends.push((*id, open(path.as_str(), flags, Mode::empty()).doing(|| format!("open {path}"))?));
        }
    } else {
        set_modes(&master, pair).doing(doing)?;
        descriptor::set_pty_packet_mode(master.as_fd(), pair.packet_mode).doing(doing)?;
    }
    descriptor::set_pty_locked(master.as_fd(), pair.locked).doing(doing)?;
    if pair.exclusive {
        descriptor::set_terminal_exclusive(master.as_fd()).doing(doing)?;
    }
    match ends.iter().find(|(_, state, _)| state.end == End::Master) {
        Some((id, _, _)) => restored.ends.push((*id, master)),
        // When nobody held it, closing it hangs the slaves up, as they were.
        None => restored.external.extend(ends.iter().find_map(|(_, state, _)| state.external).map(|h| (h, master))),
    }
    Ok(())
}

fn set_modes(end: &OwnedFd, pair: &Pair) -> std::io::Result<()> {
    let termios: descriptor::Termios =
        pair.termios.as_slice().try_into().map_err(|_| std::io::Error::other("termios of a wrong size"))?;
    descriptor::set_termios(end.as_fd(), &termios)?;
    Ok(descriptor::set_window_size(end.as_fd(), pair.size)?)
}

/// Modes, and what was on its way in both directions.
fn put_back(master: &OwnedFd, slave: &OwnedFd, pair: &Pair) -> std::io::Result<()> {
    set_modes(slave, pair)?;
    if pair.input.is_empty() && pair.output.is_empty() && !pair.stopped && pair.status == 0 {
        return Ok(descriptor::set_pty_packet_mode(master.as_fd(), pair.packet_mode)?);
    }
    let (input, output) = (pair.input.clone(), pair.output.clone());
    let queues = queue::Queues { input, output, stopped: pair.stopped, status: pair.status };
    let termios = descriptor::termios(slave.as_fd())?;
    queue::put_all(master.as_fd(), slave.as_fd(), &termios, &queues, pair.packet_mode)
}

fn slave_without_master(file: &File) -> std::io::Result<OwnedFd> {
    let master = open_master()?;
    descriptor::set_pty_locked(master.as_fd(), false)?;
    let flags = (file.flags & libc::O_ACCMODE) | libc::O_NOCTTY | libc::O_CLOEXEC;
    Ok(descriptor::pty_slave(master.as_fd(), flags)?)
}
