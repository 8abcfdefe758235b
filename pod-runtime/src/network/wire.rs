//! Requests to the kernel's routing netlink, sent in one go and answered in one go.
//!
//! The messages are built by rtnetlink; the transport is a blocking socket of our own, because a cable needs ten
//! requests and a round trip each through an asynchronous runtime costs more than all of them together. A socket
//! belongs to the network namespace of the thread that made it, for life: [`Wire::of`] makes one inside another
//! namespace in a short-lived thread and uses it from here.

use crate::{Doing, Problem, Result};
use netlink_packet_core::{
    DoneMessage, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// One request of a batch.
pub struct Request {
    /// Reads as the failed action: "add 10.0.0.1/24 to eth0".
    pub what: String,
    pub message: RouteNetlinkMessage,
    /// Besides REQUEST and ACK.
    pub flags: u16,
    /// Errors that are as good as success, as errno.
    pub tolerate: &'static [i32],
}

impl Request {
    pub fn new(what: impl Into<String>, message: RouteNetlinkMessage) -> Self {
        Request { what: what.into(), message, flags: 0, tolerate: &[] }
    }

    #[must_use]
    pub fn flags(mut self, flags: u16) -> Self {
        self.flags = flags;
        self
    }

    #[must_use]
    pub fn tolerate(mut self, errors: &'static [i32]) -> Self {
        self.tolerate = errors;
        self
    }
}

/// A netlink socket of one network namespace.
pub struct Wire {
    socket: OwnedFd,
    sequence: u32,
}

impl Wire {
    /// In the namespace of the calling thread.
    pub fn open() -> Result<Wire> {
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)
            .doing(|| "open a netlink socket".into())?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0)).doing(|| "bind a netlink socket".into())?;
        Ok(Wire { socket, sequence: 0 })
    }

    /// In the namespace that `netns` refers to.
    pub fn of(netns: BorrowedFd<'_>) -> Result<Wire> {
        inside(netns, Wire::open)?
    }

    /// Sends all requests at once and reads an answer for each. The first failure (in their order) is returned; the
    /// kernel carries the later ones out all the same, so undo must expect them.
    pub fn batch(&mut self, requests: Vec<Request>) -> Result<()> {
        let first = self.sequence + 1;
        let mut bytes = Vec::new();
        for request in &requests {
            self.put(&mut bytes, request.message.clone(), NLM_F_REQUEST | NLM_F_ACK | request.flags);
        }
        self.send(&bytes)?;
        let mut failed: Option<(u32, i32)> = None;
        let mut left = requests.len();
        while left > 0 {
            for answer in self.receive()? {
                let at = answer.header.sequence_number.wrapping_sub(first);
                let NetlinkPayload::Error(error) = answer.payload else { continue };
                let Some(request) = requests.get(at as usize) else { continue };
                left -= 1;
                let errno = error.code.map_or(0, |code| -code.get());
                if errno != 0 && !request.tolerate.contains(&errno) && failed.is_none_or(|(before, _)| at < before) {
                    failed = Some((at, errno));
                }
            }
        }
        match failed {
            None => Ok(()),
            Some((at, errno)) => Err(io::Error::from_raw_os_error(errno)).doing(|| requests[at as usize].what.clone()),
        }
    }

    /// One request.
    pub fn ask(&mut self, request: Request) -> Result<()> {
        self.batch(vec![request])
    }

    /// The one object that a GET request names.
    pub fn get(&mut self, message: RouteNetlinkMessage) -> Result<RouteNetlinkMessage> {
        let found = self.found(message, NLM_F_ACK)?.pop().ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT));
        found.doing(|| "look a network object up".into())
    }

    /// Everything that the kernel lists for a GET request.
    pub fn dump(&mut self, message: RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>> {
        self.found(message, NLM_F_DUMP)
    }

    fn found(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<Vec<RouteNetlinkMessage>> {
        let mut bytes = Vec::new();
        self.put(&mut bytes, message, NLM_F_REQUEST | flags);
        self.send(&bytes)?;
        let mut found = Vec::new();
        loop {
            for answer in self.receive()? {
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::InnerMessage(message) => found.push(message),
                    NetlinkPayload::Done(DoneMessage { .. }) => return Ok(found),
                    NetlinkPayload::Error(error) => {
                        return match error.code {
                            None => Ok(found),
                            Some(code) => {
                                Err(io::Error::from_raw_os_error(-code.get())).doing(|| "list network objects".into())
                            }
                        };
                    }
                    _ => {}
                }
            }
        }
    }

    fn put(&mut self, bytes: &mut Vec<u8>, message: RouteNetlinkMessage, flags: u16) {
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        message.finalize();
        let start = bytes.len();
        // Each message begins at a multiple of four (NLMSG_ALIGN).
        bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut bytes[start..start + message.buffer_len()]);
    }

    fn send(&self, bytes: &[u8]) -> Result<()> {
        let sent = send(self.socket.as_raw_fd(), bytes, MsgFlags::empty()).doing(|| "send to netlink".into())?;
        if sent == bytes.len() { Ok(()) } else { Err(Problem::new(crate::problem::SYSTEM, "netlink took a part only")) }
    }

    fn receive(&self) -> Result<Vec<NetlinkMessage<RouteNetlinkMessage>>> {
        let mut buffer = vec![0; 64 * 1024];
        let length = loop {
            match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Err(nix::Error::EINTR) => {}
                other => break other.doing(|| "read from netlink".into())?,
            }
        };
        let mut rest = &buffer[..length];
        let mut messages = Vec::new();
        while rest.len() >= 16 {
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                .doing(|| "understand an answer of netlink".into())?;
            let step = (message.header.length as usize).next_multiple_of(4).clamp(16, rest.len());
            rest = &rest[step..];
            messages.push(message);
        }
        Ok(messages)
    }
}

/// Runs `f` in a thread that is inside the network namespace, and waits for it. Sockets that it makes stay in that
/// namespace; nothing else of the caller changes.
pub fn inside<T: Send>(netns: BorrowedFd<'_>, f: impl FnOnce() -> T + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| setns(netns.as_fd(), CloneFlags::CLONE_NEWNET).map(|()| f()));
        match thread.join() {
            Ok(result) => result.doing(|| "enter the pod's network namespace".into()),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
