//! A server that sends back what it gets, for thousands of connections in one thread, with as much memory beside it as is
//! asked for: what is moved where only the move is to be seen.

use crate::subjects::{fill, many_descriptors, ready};
use anyhow::Result;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;

pub const PORT: u16 = 7000;
const LISTENER: u64 = u64::MAX;

pub fn serve(mebibytes: usize) -> Result<()> {
    many_descriptors()?;
    let memory = fill(mebibytes << 20);
    let listener = TcpListener::bind(("0.0.0.0", PORT))?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
    ready()?;
    let mut clients = HashMap::new();
    let mut events = [EpollEvent::empty(); 128];
    loop {
        let count = match epoll.wait(&mut events, EpollTimeout::NONE) {
            Err(nix::Error::EINTR) => 0,
            other => other?,
        };
        for event in &events[..count] {
            if event.data() == LISTENER {
                let (client, _) = listener.accept()?;
                client.set_nodelay(true)?;
                let number = client.as_raw_fd() as u64;
                epoll.add(&client, EpollEvent::new(EpollFlags::EPOLLIN, number))?;
                clients.insert(number, client);
            } else if clients.get_mut(&event.data()).is_some_and(|client| answer(client).is_err()) {
                clients.remove(&event.data());
            }
        }
        std::hint::black_box(&memory);
    }
}

/// Sends back what is there; an error when the client is gone.
fn answer(client: &mut TcpStream) -> std::io::Result<()> {
    let mut buffer = [0; 4096];
    match client.read(&mut buffer)? {
        0 => Err(std::io::ErrorKind::UnexpectedEof.into()),
        count => client.write_all(&buffer[..count]),
    }
}
