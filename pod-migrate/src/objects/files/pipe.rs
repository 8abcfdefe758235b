//! Pipes and FIFOs.
//!
//! Contents are copied by tee(2) into a pipe of ours, which consumes nothing. When only the writing end is at hand, the
//! reading end is opened once more through /proc for the moment; the tasks are stopped, so nobody notices.

use super::File;
use super::classify::Look;
use super::regular::reopen;
use super::view::Holder;
use crate::ids::FileId;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, fstat};
use nix::unistd::{pipe2, read, write};
use pod_runtime::sys::descriptor;
use pod_runtime::{Doing, Problem, Result};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A write of at most this many bytes is one packet in packet mode.
const PACKET: usize = 4096;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Ends of one pipe share this.
    pub pipe: u64,
    /// For a FIFO: where it is. None is an anonymous pipe (or a FIFO that was unlinked).
    pub path: Option<ByteBuf>,
    /// The other end is the monitor's.
    pub external: Option<Holder>,
    /// With the first end.
    pub buffer: Option<Buffer>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Buffer {
    /// As F_GETPIPE_SZ.
    pub capacity: u32,
    /// A writing end is in packet mode (O_DIRECT).
    pub packets: bool,
    /// In the order of reading: a packet each in packet mode, else one piece.
    pub pieces: Vec<ByteBuf>,
}

pub(super) fn dump(
    fd: BorrowedFd<'_>,
    look: &Look,
    (pipe, first): (u64, bool),
    external: Option<Holder>,
) -> Result<State> {
    let named = look.link.starts_with(b"/") && !look.link.ends_with(b" (deleted)");
    let buffer =
        if first { Some(buffer(fd, look).doing(|| format!("copy what is in {}", look.name()))?) } else { None };
    Ok(State { pipe, path: named.then(|| ByteBuf::from(look.link.clone())), external, buffer })
}

fn buffer(fd: BorrowedFd<'_>, look: &Look) -> Result<Buffer> {
    let capacity = descriptor::pipe_size(fd).doing(|| "read the size of a pipe".into())?;
    let waiting = descriptor::readable_bytes(fd).doing(|| "count the bytes in a pipe".into())?;
    let mut buffer = Buffer { capacity, packets: false, pieces: Vec::new() };
    if waiting == 0 {
        return Ok(buffer);
    }
    let reader;
    let source = if look.flags & libc::O_ACCMODE == libc::O_WRONLY {
        reader = reopen(fd, OFlag::O_RDONLY | OFlag::O_NONBLOCK).doing(|| "open the other end".into())?;
        reader.as_fd()
    } else {
        fd
    };
    let (out, into) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).doing(|| "make a pipe".into())?;
    descriptor::set_pipe_size(into.as_fd(), capacity).doing(|| format!("make a pipe of {capacity} bytes"))?;
    let copied = descriptor::tee(source, into.as_fd(), waiting).doing(|| "tee".into())?;
    if copied != waiting {
        let what = format!("{copied} of {waiting} bytes of {} could be copied", look.name());
        return Err(Problem::new("E-SYSTEM", what));
    }
    let mut left = copied;
    let mut data = vec![0; copied];
    while left > 0 {
        let n = read(&out, &mut data).doing(|| "read the copy".into())?;
        if n == 0 {
            break;
        }
        left -= n;
        buffer.pieces.push(ByteBuf::from(data[..n].to_vec()));
    }
    buffer.packets = buffer.pieces.len() > 1;
    Ok(buffer)
}

/// A pipe being made again: all ends that tasks have, and the monitor's.
#[derive(Debug, Default)]
pub(super) struct Restored {
    pub ends: Vec<(FileId, OwnedFd)>,
    /// The end that is not the pod's.
    pub external: Option<(Holder, OwnedFd)>,
}

/// Makes one pipe with all its ends.
pub(super) fn restore(ends: &BTreeMap<FileId, (&State, &File)>) -> Result<Restored> {
    let Some((state, file)) = ends.values().next() else { return Ok(Restored::default()) };
    let doing = || format!("make {} again", file.name);
    let nonblocking = OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    // Both ends are held until all are made, so that nothing looks closed in between.
    let (reader, writer) = match &state.path {
        None => pipe2(nonblocking).doing(doing)?,
        Some(path) => {
            let path = Path::new(OsStr::from_bytes(path));
            let both = open(path, nonblocking | OFlag::O_RDWR | OFlag::O_NOCTTY, Mode::empty()).doing(doing)?;
            if fstat(&both).doing(doing)?.st_mode & libc::S_IFMT != libc::S_IFIFO {
                return Err(Problem::new("E-FILE-KIND", format!("{} is no FIFO here", file.name)));
            }
            (both.try_clone().doing(doing)?, both)
        }
    };
    if let Some(buffer) = ends.values().find_map(|(state, _)| state.buffer.as_ref()) {
        fill(&writer, buffer).doing(|| format!("put back what was in {}", file.name))?;
    }
    let mut restored = Restored::default();
    for (id, (_, file)) in ends {
        // Packet mode is set after: open(2) takes O_DIRECT for what it means on files.
        let flags = OFlag::from_bits_retain(file.flags & libc::O_ACCMODE) | nonblocking;
        let from = if file.flags & libc::O_ACCMODE == libc::O_WRONLY { &writer } else { &reader };
        let link = format!("/proc/self/fd/{}", from.as_raw_fd());
        restored.ends.push((*id, open(link.as_str(), flags, Mode::empty()).doing(doing)?));
    }
    if let Some(holder) = ends.values().find_map(|(state, _)| state.external) {
        // The pod reads, so the monitor writes, and the other way round.
        let pod_reads = ends.values().any(|(_, file)| file.flags & libc::O_ACCMODE != libc::O_WRONLY);
        restored.external = Some((holder, if pod_reads { writer } else { reader }));
    }
    Ok(restored)
}

fn fill(writer: &OwnedFd, buffer: &Buffer) -> std::io::Result<()> {
    let Buffer { capacity, packets, pieces } = buffer;
    if descriptor::pipe_size(writer.as_fd())? != *capacity {
        // More than 1 MiB needs CAP_SYS_RESOURCE; a smaller pipe is as good unless it holds more than that.
        let _ = descriptor::set_pipe_size(writer.as_fd(), *capacity);
    }
    for piece in pieces {
        let packet = *packets && piece.len() <= PACKET;
        let mode = if packet { libc::O_DIRECT } else { 0 };
        descriptor::set_status_flags(writer.as_fd(), libc::O_NONBLOCK | mode)?;
        let mut rest = &piece[..];
        while !rest.is_empty() {
            rest = &rest[write(writer, rest)?..];
        }
    }
    descriptor::set_status_flags(writer.as_fd(), libc::O_NONBLOCK)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn look(fd: &OwnedFd) -> Look {
        Look::at(fd.as_fd()).unwrap()
    }

    fn file(flags: i32) -> File {
        File {
            state: super::super::FileState::Eventfd(super::super::eventfd::State { count: 0, semaphore: false }),
            flags,
            position: 0,
            owner: None,
            signal: 0,
            locks: Vec::new(),
            name: "pipe:[1]".into(),
        }
    }

    #[test]
    fn contents_are_copied_and_stay() {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let mut writer = std::fs::File::from(writer);
        writer.write_all(&[7; 10_000]).unwrap();
        let writer = OwnedFd::from(writer);
        // From the writing end only, as when the reader is the monitor's.
        let state = dump(writer.as_fd(), &look(&writer), (1, true), None).unwrap();
        assert_eq!(state.buffer.as_ref().unwrap().pieces[0].to_vec(), vec![7; 10_000]);
        assert_eq!(descriptor::readable_bytes(reader.as_fd()).unwrap(), 10_000);

        let (read_file, write_file) = (file(libc::O_RDONLY), file(libc::O_WRONLY));
        let other = State { buffer: None, ..state.clone() };
        let ends = BTreeMap::from([(FileId(1), (&state, &write_file)), (FileId(2), (&other, &read_file))]);
        let mut restored = restore(&ends).unwrap();
        assert!(restored.external.is_none());
        let mut reader = std::fs::File::from(restored.ends.pop().unwrap().1);
        drop(restored);
        let mut back = Vec::new();
        reader.read_to_end(&mut back).unwrap();
        assert_eq!(back, vec![7; 10_000]);
    }

    #[test]
    fn packets_stay_packets() {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_DIRECT).unwrap();
        for packet in [&b"one"[..], b"second", b"3"] {
            write(&writer, packet).unwrap();
        }
        let state = dump(reader.as_fd(), &look(&reader), (1, true), None).unwrap();
        let pieces = &state.buffer.as_ref().unwrap().pieces;
        assert_eq!(pieces.iter().map(|p| p.len()).collect::<Vec<_>>(), [3, 6, 1]);
        let read_file = file(libc::O_RDONLY);
        let restored = restore(&BTreeMap::from([(FileId(2), (&state, &read_file))])).unwrap();
        let mut buffer = [0; 100];
        assert_eq!(read(&restored.ends[0].1, &mut buffer).unwrap(), 3);
        assert_eq!(read(&restored.ends[0].1, &mut buffer).unwrap(), 6);
    }

    #[test]
    fn the_monitor_gets_the_other_end() {
        let (_reader, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let state = dump(writer.as_fd(), &look(&writer), (1, true), Some(Holder::Pod(1))).unwrap();
        let write_file = file(libc::O_WRONLY);
        let restored = restore(&BTreeMap::from([(FileId(1), (&state, &write_file))])).unwrap();
        let (number, reader) = restored.external.unwrap();
        assert_eq!(number, Holder::Pod(1));
        write(&restored.ends[0].1, b"x").unwrap();
        assert_eq!(read(&reader, &mut [0; 8]).unwrap(), 1);
    }
}
