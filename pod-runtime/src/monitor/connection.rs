//! One client of the control socket, seen from the monitor.

use super::log::{Log, Stream};
use super::wire::{self, Kind, Reply};
use crate::problem::Result;
use nix::errno::Errno;
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

/// Output that a client has not taken yet; what is more stays in the log until it has.
const OUTPUT_BOUND: usize = 1 << 20;

/// What a client is here for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// Has not asked yet.
    Fresh,
    /// Sees the pod's stdio. `behind`: where in the log it has to go on, when it was too slow.
    Attached {
        behind: Option<u64>,
    },
    /// Sees the stdio of what it started.
    Session(u64),
    /// To be told the exit code.
    Waiting,
    Holding {
        link: bool,
    },
    /// The pod has less CPU time as long as it is here.
    Throttling,
    /// Has been told everything.
    Closing,
}

#[derive(Debug)]
pub struct Connection {
    pub id: u64,
    pub role: Role,
    stream: UnixStream,
    input: Vec<u8>,
    output: VecDeque<u8>,
    /// Went away, or sent nonsense.
    pub gone: bool,
    /// Bytes that it typed and signals that it sent, as far as they were taken.
    pub typed: u64,
    pub signals: u64,
}

impl Connection {
    pub fn new(id: u64, stream: UnixStream, role: Role) -> Result<Connection> {
        super::stdio::nonblocking(stream.as_fd())?;
        Ok(Connection {
            id,
            role,
            stream,
            input: Vec::new(),
            output: VecDeque::new(),
            gone: false,
            typed: 0,
            signals: 0,
        })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    pub fn wants_to_write(&self) -> bool {
        !self.output.is_empty()
    }

    /// Nothing left to say to it.
    pub fn done(&self) -> bool {
        self.gone || (self.role == Role::Closing && self.output.is_empty())
    }

    /// Whether more output may be produced for it.
    pub fn has_room(&self) -> bool {
        self.output.len() < OUTPUT_BOUND
    }

    /// Reads what has come.
    pub fn receive(&mut self) {
        let mut buffer = [0; 16 << 10];
        loop {
            match nix::unistd::read(&self.stream, &mut buffer) {
                Ok(0) => {
                    self.gone = true;
                    return;
                }
                Ok(n) => self.input.extend_from_slice(&buffer[..n]),
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => return,
                Err(_) => {
                    self.gone = true;
                    return;
                }
            }
            if self.input.len() > wire::MAX + 16 {
                return;
            }
        }
    }

    /// The request, once its line is complete.
    pub fn take_line(&mut self) -> Option<Vec<u8>> {
        let Some(end) = self.input.iter().position(|byte| *byte == b'\n') else {
            self.gone |= self.input.len() > wire::MAX;
            return None;
        };
        let line = self.input[..end].to_vec();
        self.input.drain(..=end);
        Some(line)
    }

    /// The next whole frame.
    pub fn take_frame(&mut self) -> Option<(Kind, Vec<u8>)> {
        wire::take(&mut self.input).unwrap_or_else(|_| {
            self.gone = true;
            None
        })
    }

    pub fn reply(&mut self, reply: &Reply) {
        if let Ok(mut line) = serde_json::to_vec(reply) {
            line.push(b'\n');
            self.output.extend(line);
        }
        self.flush();
    }

    pub fn frame(&mut self, kind: Kind, payload: &[u8]) {
        wire::put(&mut self.output, kind, payload);
        self.flush();
    }

    /// Shows what was just written to the log at `offset`, or lets the client catch up from there later.
    pub fn show(&mut self, kind: Kind, payload: &[u8], offset: u64) {
        let full = !self.has_room();
        let Role::Attached { behind } = &mut self.role else { return };
        match behind {
            Some(_) => {}
            None if full => *behind = Some(offset),
            None => self.frame(kind, payload),
        }
    }

    /// Feeds a client that was too slow from the log.
    pub fn catch_up(&mut self, log: &Log) {
        while self.output.len() < OUTPUT_BOUND / 4 {
            let Role::Attached { behind: Some(offset) } = self.role else { return };
            let Ok((records, end)) = log.read(offset, OUTPUT_BOUND / 4) else {
                self.gone = true;
                return;
            };
            for record in &records {
                match record.stream {
                    Stream::Stdout => wire::put(&mut self.output, Kind::Output, &record.bytes),
                    Stream::Stderr => wire::put(&mut self.output, Kind::Error, &record.bytes),
                    Stream::Note => {}
                }
            }
            let level = end >= log.length() || end == offset;
            self.role = Role::Attached { behind: (!level).then_some(end) };
            self.flush();
        }
    }

    /// Sends what the client takes now.
    pub fn flush(&mut self) {
        while !self.output.is_empty() && !self.gone {
            let (front, _) = self.output.as_slices();
            match nix::sys::socket::send(
                std::os::fd::AsRawFd::as_raw_fd(&self.stream),
                front,
                nix::sys::socket::MsgFlags::MSG_NOSIGNAL,
            ) {
                Ok(n) => drop(self.output.drain(..n)),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break,
                Err(_) => self.gone = true,
            }
        }
        if self.output.is_empty() && self.output.capacity() > OUTPUT_BOUND / 2 {
            self.output.shrink_to_fit();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_slow_client_gets_everything_from_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Log::open(dir.path(), Default::default()).unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut client = Connection::new(1, ours, Role::Attached { behind: None }).unwrap();
        let mut wanted = Vec::new();
        for i in 0..400 {
            let piece = vec![i as u8; 16 << 10];
            let offset = log.length();
            log.write(Stream::Stdout, &piece).unwrap();
            client.show(Kind::Output, &piece, offset);
            wanted.extend(piece);
        }
        assert!(matches!(client.role, Role::Attached { behind: Some(_) }));
        theirs.set_nonblocking(true).unwrap();
        let (mut raw, mut got) = (Vec::new(), Vec::new());
        let mut buffer = vec![0; 1 << 20];
        while got.len() < wanted.len() {
            if let Ok(n) = theirs.read(&mut buffer) {
                raw.extend_from_slice(&buffer[..n]);
            }
            client.flush();
            client.catch_up(&log);
            while let Some((kind, payload)) = wire::take(&mut raw).unwrap() {
                assert_eq!(kind, Kind::Output);
                got.extend(payload);
            }
        }
        assert!(got == wanted);
        assert_eq!(client.role, Role::Attached { behind: None });
    }

    #[test]
    fn an_endless_request_is_not_kept() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut client = Connection::new(1, ours, Role::Fresh).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let piece = vec![b'x'; 64 << 10];
        for _ in 0..40 {
            let _ = std::io::Write::write(&mut theirs, &piece);
            client.receive();
            assert!(client.take_line().is_none());
        }
        assert!(client.gone);
    }
}
