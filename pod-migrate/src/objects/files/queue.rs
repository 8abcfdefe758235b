//! What is on its way through a pseudo-terminal: typed and not yet read by the slave, written and not yet read from the
//! master.
//!
//! The kernel has no way to look at it, so it is read and put back at once: output by writing it to the slave again with
//! output processing off, input byte by byte with TIOCSTI under settings that interpret nothing but line ends. All tasks
//! are stopped and the monitor does not read, so nobody sees the moment in between. It is a process of its own that does
//! this: killing the one that dumps leaves it to finish, and the terminal is as it was.
//!
//! What the master wrote may still be in the kernel's hands, on its way to the line discipline: it takes a worker there. It
//! is waited for, under the settings that it was written under, before any of them is changed.
//!
//! In packet mode all of that would be told to the master. So the mode is off meanwhile, what the master was not told yet
//! is read first, and made to be told again by what has the kernel tell it: flushing empty queues, starting output,
//! changing flow control there and back.
//!
//! A line that was ended by an end-of-file character is told from one that waits for its end by the zero byte that the
//! kernel keeps in its place.

use crate::apart::apart;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{FlushArg, tcflush};
use pod_runtime::sys::descriptor::{self, Termios};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::io;
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
const IEXTEN: u32 = 0o100_000;
const VTIME: usize = CHARACTERS + 5;
const VMIN: usize = CHARACTERS + 6;
const VEOF: usize = CHARACTERS + 4;
/// What ends a line beside a line end; the second only with IEXTEN.
const VEOL: usize = CHARACTERS + 11;
const VEOL2: usize = CHARACTERS + 16;
const END_OF_FILE: u8 = 4;

/// Bytes in flight.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Queues {
    pub input: ByteBuf,
    pub output: ByteBuf,
    /// Output is held back (Ctrl-S, TCOOFF).
    pub stopped: bool,
    /// In packet mode: what happened since the master was last read (TIOCPKT_FLUSHREAD and its like); 0 for nothing.
    #[serde(default)]
    pub status: u8,
}

/// What packet mode tells of, as in ioctl_tty(2).
const FLUSH_READ: u8 = 1;
const FLUSH_WRITE: u8 = 2;
const START: u8 = 8;
const NO_STOP: u8 = 16;
const DO_STOP: u8 = 32;
/// The flow control flag of the input flags, and the characters that it is told by.
const IXON: u32 = 0o2000;
const VSTART: usize = CHARACTERS + 8;
const VSTOP: usize = CHARACTERS + 9;

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
    set_word(&mut lines, LOCAL_FLAGS, ICANON | word(termios, LOCAL_FLAGS) & IEXTEN);
    lines[CHARACTERS..CHARACTERS + 19].fill(0);
    lines[VEOF] = END_OF_FILE;
    for end in [VEOL, VEOL2] {
        lines[end] = termios[end];
    }
    lines
}

/// Whether the line ends by what is in it, and not by an end-of-file character.
fn is_line(termios: &Termios, read: &[u8]) -> bool {
    let extended = word(termios, LOCAL_FLAGS) & IEXTEN != 0;
    let ends = [termios[VEOL], if extended { termios[VEOL2] } else { 0 }];
    read.last().is_some_and(|last| *last == b'\n' || *last != 0 && ends.contains(last))
}

fn ready(fd: BorrowedFd<'_>, what: PollFlags, wait: u16) -> io::Result<bool> {
    let mut polled = [PollFd::new(fd, what)];
    poll(&mut polled, PollTimeout::from(wait))?;
    Ok(polled[0].revents().is_some_and(|events| events.contains(what)))
}

/// Copies what is in flight; the terminal is as before when this returns.
pub(super) fn copy(master: BorrowedFd<'_>, slave: BorrowedFd<'_>, packet_mode: bool) -> io::Result<Queues> {
    let termios = descriptor::termios(slave)?;
    // Asking has the kernel hand over what is on its way, so that it is counted.
    let input = ready(slave, PollFlags::POLLIN, 0)?;
    let silent = !input && !is_canonical(&termios) && descriptor::readable_bytes(slave)? == 0;
    if silent && !ready(master, PollFlags::POLLIN, 0)? {
        return Ok(Queues { stopped: !ready(slave, PollFlags::POLLOUT, 0)?, ..Queues::default() });
    }
    apart(|| take_and_put_back(master, slave, &termios, packet_mode))
}

fn take_and_put_back(
    master: BorrowedFd<'_>,
    slave: BorrowedFd<'_>,
    termios: &Termios,
    packet_mode: bool,
) -> io::Result<Queues> {
    let status = if packet_mode { status(master)? } else { 0 };
    descriptor::set_pty_packet_mode(master, false)?;
    let taken = take(master, slave, termios).map(|queues| Queues { status, ..queues });
    let put = match &taken {
        Ok(queues) => put_all(master, slave, termios, queues, packet_mode),
        Err(_) => descriptor::set_pty_packet_mode(master, packet_mode).map_err(Into::into),
    };
    descriptor::set_termios(slave, termios)?;
    put?;
    taken
}

/// What a master in packet mode is to be told; it comes alone.
fn status(master: BorrowedFd<'_>) -> io::Result<u8> {
    let mut byte = [0];
    if ready(master, PollFlags::POLLPRI, 0)? {
        nix::unistd::read(master, &mut byte)?;
    }
    Ok(byte[0])
}

/// Puts everything back, and packet mode; `termios` are the slave's before and after.
pub(super) fn put_all(
    master: BorrowedFd<'_>,
    slave: BorrowedFd<'_>,
    termios: &Termios,
    queues: &Queues,
    packet_mode: bool,
) -> io::Result<()> {
    let told = packet_mode && queues.status != 0;
    // Turning it on forgets what was to be told.
    descriptor::set_pty_packet_mode(master, told)?;
    if told {
        for (bit, queue) in [(FLUSH_READ, FlushArg::TCIFLUSH), (FLUSH_WRITE, FlushArg::TCOFLUSH)] {
            if queues.status & bit != 0 {
                tcflush(slave, queue)?;
            }
        }
    }
    put(slave, termios, queues)?;
    descriptor::set_termios(slave, termios)?;
    if !told {
        return Ok(descriptor::set_pty_packet_mode(master, packet_mode)?);
    }
    if queues.status & START != 0 {
        descriptor::set_flow(slave, false)?;
        descriptor::set_flow(slave, true)?;
    }
    if queues.status & (NO_STOP | DO_STOP) != 0 {
        let mut other = *termios;
        let usual = word(termios, INPUT_FLAGS) & IXON != 0 && (termios[VSTART], termios[VSTOP]) == (0o21, 0o23);
        let flags = word(termios, INPUT_FLAGS);
        set_word(&mut other, INPUT_FLAGS, if usual { flags & !IXON } else { flags | IXON });
        (other[VSTART], other[VSTOP]) = (0o21, 0o23);
        descriptor::set_termios(slave, &other)?;
        descriptor::set_termios(slave, termios)?;
    }
    Ok(())
}

/// Leaves settings behind that the caller replaces.
fn take(master: BorrowedFd<'_>, slave: BorrowedFd<'_>, termios: &Termios) -> io::Result<Queues> {
    let mut queues = Queues::default();
    let mut piece = vec![0; 64 << 10];
    let canonical = is_canonical(termios);
    if !canonical {
        let mut at_once = *termios;
        (at_once[VMIN], at_once[VTIME]) = (0, 0);
        descriptor::set_termios(slave, &at_once)?;
    }
    // Where there is nothing to read, asking waits for what is on its way; where there is something, not. So all is read.
    while queues.input.len() < MOST && ready(slave, PollFlags::POLLIN, 0)? {
        let n = nix::unistd::read(slave, &mut piece)?;
        queues.input.extend_from_slice(&piece[..n]);
        if canonical && !is_line(termios, &piece[..n]) {
            queues.input.push(0);
        }
    }
    // A line that has no end yet.
    descriptor::set_termios(slave, &transparent(termios))?;
    while queues.input.len() < MOST && descriptor::readable_bytes(slave)? > 0 {
        let n = nix::unistd::read(slave, &mut piece)?;
        queues.input.extend_from_slice(&piece[..n]);
    }
    let mut wait = 0;
    while queues.output.len() < MOST && ready(master, PollFlags::POLLIN, wait)? {
        let n = nix::unistd::read(master, &mut piece)?;
        queues.output.extend_from_slice(&piece[..n]);
        wait = SETTLE_MS;
    }
    // With nothing on its way there is room, unless output is held back.
    queues.stopped = !ready(slave, PollFlags::POLLOUT, SETTLE_MS)?;
    Ok(queues)
}

/// Puts bytes in flight again; leaves settings behind that the caller replaces.
fn put(slave: BorrowedFd<'_>, termios: &Termios, queues: &Queues) -> io::Result<()> {
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
    use std::io::{Read, Write};
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

    /// The kernel's worker has not always come when one looks: each time it must be waited for, by input under its settings.
    #[test]
    fn what_is_on_its_way_is_waited_for() {
        let (mut master, mut slave) = pair();
        let mut termios = descriptor::termios(slave.as_fd()).unwrap();
        set_word(&mut termios, LOCAL_FLAGS, ICANON | IEXTEN);
        set_word(&mut termios, INPUT_FLAGS, 0o400); // ICRNL
        (termios[VEOL], termios[VEOL2]) = (b';', b'!');
        let mut raw = transparent(&termios);
        raw[VMIN] = 200;
        let mut bytes = [0; 100];
        for round in 0..300 {
            descriptor::set_termios(slave.as_fd(), &termios).unwrap();
            for part in ["one\r", "eof\x04", "\x04", "two;", "three!par", "t"] {
                master.write_all(part.as_bytes()).unwrap();
            }
            let queues = copy(master.as_fd(), slave.as_fd(), false).unwrap();
            assert_eq!(queues.input.as_slice(), b"one\neof\0\0two;three!part", "round {round}");
            for line in ["one\n", "eof", "", "two;", "three!"] {
                assert!(ready(slave.as_fd(), PollFlags::POLLIN, 0).unwrap(), "{line:?} in round {round}");
                let n = slave.read(&mut bytes).unwrap();
                assert_eq!(&bytes[..n], line.as_bytes(), "round {round}");
            }
            assert!(!ready(slave.as_fd(), PollFlags::POLLIN, 0).unwrap(), "the rest waits for its end");
            descriptor::set_termios(slave.as_fd(), &raw).unwrap();
            tcflush(slave.as_fd(), FlushArg::TCIFLUSH).unwrap();
            master.write_all(b"few").unwrap();
            let queues = copy(master.as_fd(), slave.as_fd(), false).unwrap();
            assert_eq!(queues.input.as_slice(), b"few", "round {round}");
            tcflush(slave.as_fd(), FlushArg::TCIFLUSH).unwrap();
        }
    }

    #[test]
    fn what_packet_mode_has_to_tell_stays() {
        let (mut master, mut slave) = pair();
        descriptor::set_pty_packet_mode(master.as_fd(), true).unwrap();
        let termios = descriptor::termios(slave.as_fd()).unwrap();
        slave.write_all(b"shown").unwrap();
        let mut bytes = [0; 100];
        for status in [0, FLUSH_READ | FLUSH_WRITE, START, DO_STOP] {
            if status == FLUSH_READ | FLUSH_WRITE {
                // What has reached the master's side stays.
                assert!(ready(master.as_fd(), PollFlags::POLLIN, 1000).unwrap());
                tcflush(slave.as_fd(), FlushArg::TCIOFLUSH).unwrap();
            }
            if status == START {
                descriptor::set_flow(slave.as_fd(), false).unwrap();
                descriptor::set_flow(slave.as_fd(), true).unwrap();
            }
            if status == DO_STOP {
                descriptor::set_termios(slave.as_fd(), &transparent(&termios)).unwrap();
                descriptor::set_termios(slave.as_fd(), &termios).unwrap();
            }
            for _ in 0..2 {
                let queues = copy(master.as_fd(), slave.as_fd(), true).unwrap();
                // What is true of flow control may be told once more.
                assert_eq!((queues.status & !DO_STOP, status & !DO_STOP), (status & !DO_STOP, status & !DO_STOP));
                assert_eq!(queues.output.as_slice(), b"shown");
            }
            if status != 0 {
                assert_eq!(master.read(&mut bytes).unwrap(), 1, "a status");
                assert_eq!(bytes[0] & status, status);
            }
        }
        assert_eq!(master.read(&mut bytes).unwrap(), 6);
        assert_eq!(&bytes[..6], b"\0shown");
        assert_eq!(descriptor::termios(slave.as_fd()).unwrap(), termios);
    }
}
