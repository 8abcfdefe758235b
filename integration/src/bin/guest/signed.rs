//! TCP connections whose segments are signed (TCP_MD5SIG): the keys of the listener and of both ends of a connection.

use crate::{Guest, sys};
use anyhow::{Context, Result, ensure};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, accept, bind, connect, listen, socket};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};

const MD5SIG_EXT: i32 = 32;
const PORT: u16 = 1790;
const ALL: ([u8; 4], u8) = ([127, 0, 0, 0], 8);
/// An accepted connection has the key for its peer alone.
const PEER: ([u8; 4], u8) = ([127, 0, 0, 1], 32);

struct Signed {
    listener: OwnedFd,
    ends: [File; 2],
}

/// struct tcp_md5sig for a network; without a key it takes the key away.
fn key(key: &[u8], network: [u8; 4], prefix: u8) -> Vec<u8> {
    let mut bytes = (libc::AF_INET as u16).to_ne_bytes().to_vec();
    bytes.extend_from_slice(&[0; 2]);
    bytes.extend_from_slice(&network);
    bytes.resize(128, 0);
    // With a prefix.
    bytes.extend_from_slice(&[1, prefix]);
    bytes.extend_from_slice(&(key.len() as u16).to_ne_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(key);
    bytes.resize(216, 0);
    bytes
}

fn tcp() -> Result<OwnedFd> {
    let fd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    sys::set_option(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, &1i32.to_ne_bytes())?;
    sys::set_option(fd.as_raw_fd(), libc::IPPROTO_TCP, MD5SIG_EXT, &key(b"secret", ALL.0, ALL.1))?;
    Ok(fd)
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let here = SockaddrIn::new(127, 0, 0, 1, PORT);
    let listener = tcp()?;
    bind(listener.as_raw_fd(), &here)?;
    listen(&listener, Backlog::new(5)?)?;
    let client = tcp()?;
    connect(client.as_raw_fd(), &here)?;
    let server = sys::owned(accept(listener.as_raw_fd())?);
    Ok(Box::new(Signed { listener, ends: [client.into(), server] }))
}

impl Guest for Signed {
    fn verify(&mut self) -> Result<()> {
        let here = SockaddrIn::new(127, 0, 0, 1, PORT);
        let [client, server] = &mut self.ends;
        for round in 0..2 {
            client.write_all(b"signed")?;
            let mut text = [0; 6];
            server.read_exact(&mut text)?;
            ensure!(&text == b"signed", "the connection gives {text:?} in round {round}");
            std::mem::swap(client, server);
        }
        let another = tcp()?;
        connect(another.as_raw_fd(), &here).context("another client with the key")?;
        drop(sys::owned(accept(self.listener.as_raw_fd())?));
        for (name, fd, (network, prefix)) in [
            ("listener", self.listener.as_raw_fd(), ALL),
            ("client", self.ends[0].as_raw_fd(), ALL),
            ("server", self.ends[1].as_raw_fd(), PEER),
        ] {
            let set = |text: &[u8]| sys::set_option(fd, libc::IPPROTO_TCP, MD5SIG_EXT, &key(text, network, prefix));
            set(b"").with_context(|| format!("the key of the {name} is gone"))?;
            set(b"secret")?;
        }
        Ok(())
    }
}
