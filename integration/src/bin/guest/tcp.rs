//! TCP over loopback, IPv4 and IPv6: a listener, established connections with bytes on the way in both directions and
//! with options, one half-closed, one with more queued than its peer takes.

use crate::Guest;
use anyhow::{Context, Result, ensure};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

struct Family {
    listener: TcpListener,
    open: (TcpStream, TcpStream),
    half: (TcpStream, TcpStream),
    full: (TcpStream, TcpStream),
    queued: usize,
}

struct Tcp {
    families: Vec<Family>,
}

const TIMEOUT: Duration = Duration::from_secs(20);

fn connect(listener: &TcpListener) -> Result<(TcpStream, TcpStream)> {
    let client = TcpStream::connect(listener.local_addr()?)?;
    let (server, _) = listener.accept()?;
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_nodelay(true)?;
    }
    Ok((client, server))
}

fn byte(at: usize) -> u8 {
    (at * 31 % 241) as u8
}

impl Family {
    fn new(address: &str) -> Result<Family> {
        let listener = TcpListener::bind(address)?;
        let half = connect(&listener)?;
        let mut full = connect(&listener)?;
        full.0.set_nonblocking(true)?;
        let (mut queued, mut refused) = (0, 0);
        // Until the sender's buffer is full and stays full.
        while refused < 50 {
            let part: Vec<u8> = (queued..queued + 16384).map(byte).collect();
            match full.0.write(&part) {
                Ok(count) => (queued, refused) = (queued + count, 0),
                Err(_) => refused += 1,
            }
        }
        full.0.set_nonblocking(false)?;
        let mut family = Family { open: connect(&listener)?, listener, half, full, queued };
        family.half.0.write_all(b"last")?;
        family.half.0.shutdown(Shutdown::Write)?;
        family.send()?;
        Ok(family)
    }

    fn send(&mut self) -> Result<()> {
        self.open.0.write_all(b"to the server")?;
        Ok(self.open.1.write_all(b"to the client")?)
    }

    fn verify(&mut self) -> Result<()> {
        let mut text = [0; 13];
        self.open.1.read_exact(&mut text).context("server's side")?;
        ensure!(&text == b"to the server", "the server has {text:?}");
        self.open.0.read_exact(&mut text).context("client's side")?;
        ensure!(&text == b"to the client", "the client has {text:?}");
        ensure!(self.open.0.nodelay()?, "TCP_NODELAY is off");
        let (client, server): (SocketAddr, SocketAddr) = (self.open.0.local_addr()?, self.open.1.peer_addr()?);
        ensure!(client == server, "ends disagree: {client} and {server}");
        // The queue is looked at only the first time: it is empty afterwards.
        let mut rest = std::mem::take(&mut self.queued);
        let mut at = 0;
        while rest > 0 {
            let mut part = vec![0; rest.min(65536)];
            let got = self.full.1.read(&mut part).context("queued bytes")?;
            ensure!(got > 0, "the queue ends {rest} bytes early");
            ensure!(part[..got].iter().enumerate().all(|(i, b)| *b == byte(at + i)), "other bytes after {at}");
            (at, rest) = (at + got, rest - got);
        }
        let mut last = Vec::new();
        if self.half.1.peek(&mut [0])? > 0 {
            last.resize(4, 0);
            self.half.1.read_exact(&mut last)?;
            ensure!(last == b"last", "the half-closed connection has {last:?}");
        }
        ensure!(self.half.1.read(&mut [0])? == 0, "the half-closed connection is open");
        self.half.1.write_all(b"r")?;
        ensure!(self.half.0.read(&mut [0])? == 1, "its other half is closed");
        let (mut client, mut server) = connect(&self.listener).context("a new connection")?;
        client.write_all(b"n")?;
        server.read_exact(&mut [0])?;
        self.send()
    }
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let families = vec![Family::new("127.0.0.1:7001")?, Family::new("[::1]:7002")?];
    Ok(Box::new(Tcp { families }))
}

impl Guest for Tcp {
    fn verify(&mut self) -> Result<()> {
        self.families[0].verify().context("IPv4")?;
        self.families[1].verify().context("IPv6")
    }
}
