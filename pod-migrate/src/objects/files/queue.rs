//! What is on its way through a pseudo-terminal: typed and not yet read by the slave, written and not yet read from the
//! master.
//!
//! The kernel has no way to look at it, so it is read and put back at once: output by writing it to the slave again with
//! output processing off, input byte by byte with TIOCSTI under settings that interpret nothing but line ends. All tasks
//! are stopped and the monitor does not read, so nobody sees the moment in between. It is a process of its own that does
//! this: killing the one that dumps leaves it to finish, and the terminal is as it was.
//!
//! A line that was ended by an end-of-file character is told from one that waits for its end by the zero byte that the
//! kernel keeps in its place.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pod_runtime::sys::daemon::{self, Fork};
use pod_runtime::sys::descriptor::{self, Termios};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;

/// More than the kernel keeps in either direction.
const MOST: usize = 1 << 20;
/// The kernel moves bytes between its buffers in a worker: so long may it take.
const SETTLE_MS: u16 = 20;

const INPUT_FLAGS: usize = 0;
const OUTPUT_FLAGS: usize = 4;
const LOCAL_FLAGS: usize = 12;
const CHARACTERS: usize = 17;
const ICANON: u32 = 2;
const VTIME: usize = CHARACTERS + 5;
const VMIN: usize = CHARACTERS + 6;
const VEOF: usize = CHARACTERS + 4;
const END_OF_FILE: u8 = 4;

/// Bytes in flight.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Queues {
    pub input: ByteBuf,
    pub output: ByteBuf,
    /// Output is held back (Ctrl-S, TCOOFF).
    pub stopped: bool,
}

fn word(termios: &Termios, at: usize) -> u32 {
    u32::from_ne_bytes([termios[at], termios[at + 1], termios[at + 2], termios[at + 3]])
}

fn set_word(termios: &mut Termios, at: usize, value: u32) {
    termios[at..at + 4].copy_from_slice(&value.to_ne_bytes());
}

fn is_canonical(termios: &Termios) -> bool {
    word(termios, LOCAL_FLAGS) & ICANON != 0
}

/// Everything passes as it is; reads return what there is.
fn transparent(termios: &Termios) -> Termios {
    let mut raw = *termios;
    set_word(&mut raw, INPUT_FLAGS, 0);
    set_word(&mut raw, OUTPUT_FLAGS, 0);
    set_word(&mut raw, LOCAL_FLAGS, 0);
    raw[VMIN] = 0;
    raw[VTIME] = 0;
    raw
}

/// Only line ends mean something.
fn lines_only(termios: &Termios) -> Termios {
    let mut lines = transparent(termios);
    set_word(&mut lines, LOCAL_FLAGS, ICANON);
    lines[CHARACTERS..CHARACTERS + 19].fill(0);
    lines[VEOF] = END_OF_FILE;
    lines
}

fn ready(fd: BorrowedFd<'_>, what: PollFlags, wait: u16) -> io::Result<bool> {
    let mut polled = [PollFd::new(fd, what)];
    poll(&mut polled, PollTimeout::from(wait))?;
    Ok(polled[0].revents().is_some_and(|events| events.contains(what)))
}

/// Copies what is in flight; the terminal is as before when this returns.
pub(super) fn copy(master: BorrowedFd<'_>, slave: BorrowedFd<'_>, packet_mode: bool) -> io::Result<Queues> {
    let termios = descriptor::termios(slave)?;
    let silent = !is_canonical(&termios) && descriptor::readable_bytes(slave)? == 0;
    if silent && !ready(master, PollFlags::POLLIN, 0)? {
        return Ok(Queues { stopped: !ready(slave, PollFlags::POLLOUT, 0)?, ..Queues::default() });
    }
    let (mut from, mut to) = io::pipe()?;
    match daemon::fork()? {
        Fork::Child => {
            drop(from);
            // A key pressed at the terminal of the one who dumps does not reach it.
            let _ = nix::unistd::setsid();
            let said = take_and_put_back(master, slave, &termios, packet_mode)
                .and_then(|queues| to.write_all(&serde_json::to_vec(&queues)?));
            daemon::exit_now(i32::from(said.is_err()));
        }
        Fork::Parent(child) => {
            drop(to);
            let mut bytes = Vec::new();
            let read = from.read_to_end(&mut bytes);
            daemon::reap(child)?;
            read?;
            serde_json::from_slice(&bytes).map_err(|_| io::Error::other("what is in flight could not be read"))
        }
    }
}

fn take_and_put_back(
    master: BorrowedFd<'_>,
    slave: BorrowedFd<'_>,
    termios: &Termios,
    packet_mode: bool,
) -> io::Result<Queues> {
    descriptor::set_termios(slave, &transparent(termios))?;
    let taken = take(master, slave, packet_mode);
    let put = match &taken {
        Ok(queues) => put(slave, termios, queues),
        Err(_) => Ok(()),
    };
    descriptor::set_termios(slave, termios)?;
    put?;
    taken
}

fn take(master: BorrowedFd<'_>, slave: BorrowedFd<'_>, packet_mode: bool) -> io::Result<Queues> {
    let mut queues = Queues::default();
    let mut piece = vec![0; 64 << 10];
    while queues.input.len() < MOST && descriptor::readable_bytes(slave)? > 0 {
        let n = nix::unistd::read(slave, &mut piece)?;
        queues.input.extend_from_slice(&piece[..n]);
    }
    let mut wait = 0;
    while queues.output.len() < MOST && ready(master, PollFlags::POLLIN, wait)? {
        let n = nix::unistd::read(master, &mut piece)?;
        // In packet mode a byte before the data says what it is.
        let data = if packet_mode { piece[..n].strip_prefix(&[0]).unwrap_or(&[]) } else { &piece[..n] };
        queues.output.extend_from_slice(data);
        wait = SETTLE_MS;
    }
    // With nothing on its way there is room, unless output is held back.
    queues.stopped = !ready(slave, PollFlags::POLLOUT, SETTLE_MS)?;
    Ok(queues)
}

/// Puts bytes in flight again; leaves settings behind that the caller replaces.
pub(super) fn put(slave: BorrowedFd<'_>, termios: &Termios, queues: &Queues) -> io::Result<()> {
    if !queues.stopped {
        return put_bytes(slave, termios, queues);
    }
    descriptor::set_flow(slave, true)?;
    let put = put_bytes(slave, termios, queues);
    descriptor::set_flow(slave, false)?;
    put
}

fn put_bytes(slave: BorrowedFd<'_>, termios: &Termios, queues: &Queues) -> io::Result<()> {
    descriptor::set_termios(slave, &transparent(termios))?;
    let mut rest = &queues.output[..];
    while !rest.is_empty() {
        if !ready(slave, PollFlags::POLLOUT, SETTLE_MS * 50)? {
            return Err(io::Error::other("the terminal takes no output"));
        }
        let most = rest.len().min(1024);
        rest = &rest[nix::unistd::write(slave, &rest[..most])?..];
    }
    let canonical = is_canonical(termios);
    if canonical {
        descriptor::set_termios(slave, &lines_only(termios))?;
    }
    for byte in queues.input.iter() {
        descriptor::type_byte(slave, if canonical && *byte == 0 { END_OF_FILE } else { *byte })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn pair() -> (std::fs::File, std::fs::File) {
        let master = std::fs::File::options().read(true).write(true).open("/dev/ptmx").unwrap();
        descriptor::set_pty_locked(master.as_fd(), false).unwrap();
        let slave = descriptor::pty_slave(master.as_fd(), libc::O_RDWR | libc::O_NOCTTY).unwrap();
        (master, slave.into())
    }

    #[test]
    fn both_directions_are_copied_and_stay() {
        let (mut master, mut slave) = pair();
        let mut termios = descriptor::termios(slave.as_fd()).unwrap();
        termios[LOCAL_FLAGS] &= !8; // no ECHO
        descriptor::set_termios(slave.as_fd(), &termios).unwrap();
        master.write_all(b"one\ntwo\npart").unwrap();
        slave.write_all(b"shown\n").unwrap();
        for _ in 0..2 {
            let queues = copy(master.as_fd(), slave.as_fd(), false).unwrap();
            assert_eq!(queues.input.as_slice(), b"one\ntwo\npart");
            assert_eq!(queues.output.as_slice(), b"shown\r\n");
        }
        assert_eq!(descriptor::termios(slave.as_fd()).unwrap(), termios);
        let mut bytes = [0; 100];
        assert_eq!(slave.read(&mut bytes).unwrap(), 4, "a line at a time");
        assert_eq!(slave.read(&mut bytes).unwrap(), 4);
        assert_eq!(descriptor::readable_bytes(slave.as_fd()).unwrap(), 0, "the rest waits for its end");
        master.write_all(b"ial\n").unwrap();
        assert_eq!(slave.read(&mut bytes).unwrap(), 8);
        assert_eq!(&bytes[..8], b"partial\n");
        assert_eq!(master.read(&mut bytes).unwrap(), 7);
    }
}
