//! TCP at its ends: a peer in the same pod that has closed, connections that were reset or refused, and a receive buffer
//! that was made small and is full.

use crate::{Guest, sys};
use anyhow::{Result, ensure};
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Duration;

struct Ends {
    listener: TcpListener,
    orphan: TcpStream,
    reset: TcpStream,
    refused: nix_socket::Socket,
    small: (TcpStream, TcpStream),
    queued: usize,
}

/// Connects without waiting.
mod nix_socket {
    use anyhow::Result;
    use nix::errno::Errno;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, connect, getsockopt, socket, sockopt};
    use std::os::fd::{AsRawFd, OwnedFd};

    pub struct Socket(OwnedFd);

    impl Socket {
        pub fn connect(port: u16) -> Result<Socket> {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let fd = socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
            match connect(fd.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, port)) {
                Ok(()) | Err(Errno::EINPROGRESS) => Ok(Socket(fd)),
                Err(error) => Err(error.into()),
            }
        }

        pub fn error(&self) -> Result<i32> {
            Ok(getsockopt(&self.0, sockopt::SocketError)?)
        }
    }
}

const TIMEOUT: Duration = Duration::from_secs(20);

fn pair(listener: &TcpListener) -> Result<(TcpStream, TcpStream)> {
    let client = TcpStream::connect(listener.local_addr()?)?;
    let (server, _) = listener.accept()?;
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(TIMEOUT))?;
    }
    Ok((client, server))
}

fn byte(at: usize) -> u8 {
    (at * 29 % 239) as u8
}

impl Ends {
    fn queue(&mut self) -> Result<()> {
        let (mut closed, orphan) = pair(&self.listener)?;
        closed.write_all(b"bye")?;
        drop(closed);
        let (gone, reset) = pair(&self.listener)?;
        sys::set_option(gone.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, &[1, 0, 0, 0, 0, 0, 0, 0])?;
        drop(gone);
        (self.orphan, self.reset) = (orphan, reset);
        let nobody = TcpListener::bind("127.0.0.1:0")?;
        let port = nobody.local_addr()?.port();
        drop(nobody);
        self.refused = nix_socket::Socket::connect(port)?;
        let (mut refused, mut queued) = (0, 0);
        self.small.0.set_nonblocking(true)?;
        while refused < 50 {
            let part: Vec<u8> = (queued..queued + 4096).map(byte).collect();
            match self.small.0.write(&part) {
                Ok(count) => (queued, refused) = (queued + count, 0),
                Err(_) => {
                    refused += 1;
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
        self.queued = queued;
        Ok(())
    }
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let small = pair(&listener)?;
    sys::set_option(small.1.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVBUF, &8000i32.to_ne_bytes())?;
    // A small window moves a large queue slowly.
    sys::set_option(small.0.as_raw_fd(), libc::SOL_SOCKET, libc::SO_SNDBUF, &10000i32.to_ne_bytes())?;
    let (orphan, reset) = (small.0.try_clone()?, small.0.try_clone()?);
    let refused = nix_socket::Socket::connect(listener.local_addr()?.port())?;
    listener.accept()?;
    let mut ends = Ends { listener, orphan, reset, refused, small, queued: 0 };
    ends.queue()?;
    Ok(Box::new(ends))
}

impl Guest for Ends {
    fn verify(&mut self) -> Result<()> {
        let mut text = String::new();
        self.orphan.read_to_string(&mut text)?;
        ensure!(text == "bye", "the last words were {text:?}");
        let reset = self.reset.read(&mut [0]).map_err(|error| error.kind());
        ensure!(reset == Err(ErrorKind::ConnectionReset), "reading from a connection that was reset: {reset:?}");
        let error = self.refused.error()?;
        ensure!(error == libc::ECONNREFUSED, "the error of a connection that was refused: {error}");
        let mut data = vec![0; self.queued];
        self.small.1.read_exact(&mut data)?;
        ensure!(data.iter().enumerate().all(|(at, got)| *got == byte(at)), "the full connection has other bytes");
        self.queue()
    }
}
