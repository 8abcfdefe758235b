//! A port that two sockets share, and the program that chooses between them.

use crate::{Guest, sys};
use anyhow::{Context, Result, ensure};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, getsockname, socket};
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

struct Reuseport {
    sockets: [UdpSocket; 2],
}

const PORT: u16 = 7005;

fn one() -> Result<UdpSocket> {
    let fd: OwnedFd = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    sys::set_option(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_REUSEPORT, &1i32.to_ne_bytes())?;
    bind(fd.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, PORT))?;
    ensure!(getsockname::<SockaddrIn>(fd.as_raw_fd())?.port() == PORT, "it has another port");
    let socket = UdpSocket::from(fd);
    socket.set_read_timeout(Some(Duration::from_secs(10)))?;
    Ok(socket)
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let sockets = [one()?, one()?];
    sys::choose_second_of_port(sockets[0].as_raw_fd())?;
    Ok(Box::new(Reuseport { sockets }))
}

impl Guest for Reuseport {
    fn verify(&mut self) -> Result<()> {
        let [first, second] = &self.sockets;
        // Without a program each of these is as likely to come to one as to the other.
        for _ in 0..16 {
            let client = UdpSocket::bind("127.0.0.1:0")?;
            client.send_to(b"x", ("127.0.0.1", PORT))?;
            ensure!(second.recv(&mut [0]).context("the second socket gets it")? == 1);
        }
        first.set_nonblocking(true)?;
        ensure!(first.recv(&mut [0]).is_err(), "the first socket was chosen");
        first.set_nonblocking(false)?;
        Ok(())
    }
}
