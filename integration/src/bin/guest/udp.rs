//! UDP: bound, connected, with datagrams waiting, over IPv4 and IPv6.

use crate::Guest;
use anyhow::{Context, Result, ensure};
use std::net::UdpSocket;
use std::time::Duration;

struct Udp {
    pairs: Vec<(UdpSocket, UdpSocket)>,
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let mut pairs = Vec::new();
    for address in ["127.0.0.1:7003", "[::1]:7004"] {
        let server = UdpSocket::bind(address)?;
        let client = UdpSocket::bind(if address.starts_with('[') { "[::1]:0" } else { "127.0.0.1:0" })?;
        client.connect(address)?;
        for socket in [&server, &client] {
            socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        }
        client.set_ttl(33)?;
        pairs.push((server, client));
    }
    let udp = Udp { pairs };
    udp.send()?;
    Ok(Box::new(udp))
}

impl Udp {
    fn send(&self) -> Result<()> {
        for (_, client) in &self.pairs {
            client.send(b"one")?;
            client.send(b"two")?;
        }
        Ok(())
    }
}

impl Guest for Udp {
    fn verify(&mut self) -> Result<()> {
        for (server, client) in &self.pairs {
            let mut text = [0; 16];
            for expected in [b"one", b"two"] {
                let (got, from) = server.recv_from(&mut text).context("a waiting datagram")?;
                ensure!(&text[..got] == expected, "waiting: {:?}", &text[..got]);
                ensure!(from == client.local_addr()?, "it came from {from}");
            }
            server.send_to(b"back", client.local_addr()?)?;
            ensure!(client.recv(&mut text)? == 4, "no answer on the connected socket");
            ensure!(client.peer_addr()? == server.local_addr()?, "connected to {}", client.peer_addr()?);
            ensure!(client.ttl()? == 33, "its TTL is {}", client.ttl()?);
        }
        self.send()
    }
}
