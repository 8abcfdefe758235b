//! As many descriptors as a server has: of eventfds, some of them twice, in one epoll, and of connections to itself, most of
//! which have the same options, and some one that is different.

use crate::{Guest, sys};
use anyhow::{Result, ensure};
use libc::{IPPROTO_IP as IP, IPPROTO_TCP as TCP, SOL_SOCKET as ANY};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

const EVENTS: usize = 120;
const CONNECTIONS: usize = 40;
const OPTIONS: [(i32, i32, i32); 8] = [
    (ANY, libc::SO_KEEPALIVE, 1),
    (ANY, libc::SO_PRIORITY, 3),
    (ANY, libc::SO_RCVLOWAT, 2),
    (IP, libc::IP_TTL, 33),
    (IP, libc::IP_RECVTTL, 1),
    (TCP, libc::TCP_NODELAY, 1),
    (TCP, libc::TCP_KEEPIDLE, 77),
    (TCP, libc::TCP_USER_TIMEOUT, 9999),
];

struct Crowd {
    epoll: Epoll,
    events: Vec<EventFd>,
    /// Of each third.
    twins: Vec<OwnedFd>,
    /// Both ends, and what the nearer one answered to each of the options.
    connections: Vec<(TcpStream, TcpStream, Vec<Vec<u8>>)>,
}

fn answers(end: &TcpStream) -> Result<Vec<Vec<u8>>> {
    OPTIONS.iter().map(|(level, name, _)| Ok(sys::option(end.as_raw_fd(), *level, *name)?)).collect()
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let flags = |index: usize| if index.is_multiple_of(2) { EfdFlags::EFD_NONBLOCK } else { EfdFlags::EFD_CLOEXEC };
    let event = |index| EventFd::from_value_and_flags(index as u32, flags(index) | EfdFlags::EFD_NONBLOCK);
    let events = (0..EVENTS).map(event).collect::<nix::Result<Vec<_>>>()?;
    for (index, event) in events.iter().enumerate() {
        epoll.add(event, EpollEvent::new(EpollFlags::EPOLLIN, index as u64))?;
    }
    let twins = events.iter().step_by(3).map(|event| event.as_fd().try_clone_to_owned());
    let twins = twins.collect::<std::io::Result<Vec<_>>>()?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut connections = Vec::new();
    for index in 0..CONNECTIONS {
        let (mut near, far) = (TcpStream::connect(listener.local_addr()?)?, listener.accept()?.0);
        if let Some((level, name, value)) = OPTIONS.get(index / 3).filter(|_| index % 3 == 1) {
            sys::set_option(near.as_raw_fd(), *level, *name, &value.to_ne_bytes())?;
        }
        near.write_all(&[index as u8; 3])?;
        let answers = answers(&near)?;
        connections.push((near, far, answers));
    }
    Ok(Box::new(Crowd { epoll, events, twins, connections }))
}

impl Guest for Crowd {
    fn verify(&mut self) -> Result<()> {
        let mut ready = vec![EpollEvent::empty(); EVENTS];
        let count = self.epoll.wait(&mut ready, EpollTimeout::ZERO)?;
        let mut data: Vec<u64> = ready[..count].iter().map(EpollEvent::data).collect();
        data.sort_unstable();
        // The first has nothing to read.
        ensure!(data == (1..EVENTS as u64).collect::<Vec<_>>(), "ready: {data:?}");
        for (index, event) in self.events.iter().enumerate().skip(1) {
            let value = event.read()?;
            ensure!(value == index as u64, "event {index} has counted {value}");
            if let Some(twin) = self.twins.get(index / 3).filter(|_| index % 3 == 0) {
                let empty = nix::unistd::read(twin, &mut [0; 8]);
                ensure!(empty == Err(nix::Error::EAGAIN), "event {index} and its copy are two: {empty:?}");
                nix::unistd::write(twin, &value.to_ne_bytes())?;
            } else {
                event.write(value)?;
            }
        }
        for (index, (near, far, before)) in self.connections.iter_mut().enumerate() {
            let mut bytes = [0; 3];
            far.read_exact(&mut bytes)?;
            ensure!(bytes == [index as u8; 3], "connection {index} has carried {bytes:?}");
            near.write_all(&bytes)?;
            let now = answers(near)?;
            ensure!(now == *before, "options of connection {index}: {now:?}, they were {before:?}");
        }
        Ok(())
    }
}
