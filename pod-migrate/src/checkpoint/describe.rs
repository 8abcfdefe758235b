//! Open files and sockets in words and numbers, for who looks at them.

use crate::ids::PodPid;
use crate::objects::files::socket::{self, tcp, unix};
use crate::objects::files::{File, FileState, pty, regular};
use serde::Serialize;

/// What the description refers to, in one word.
pub(super) fn kind(state: &FileState) -> &'static str {
    match state {
        FileState::Regular(_) => "regular",
        FileState::Pipe(_) => "pipe",
        FileState::Pty(_) => "pty",
        FileState::Device(_) => "device",
        FileState::Memfd(_) => "memfd",
        FileState::Eventfd(_) => "eventfd",
        FileState::Epoll(_) => "epoll",
        FileState::Timerfd(_) => "timerfd",
        FileState::Signalfd(_) => "signalfd",
        FileState::Inotify(_) => "inotify",
        FileState::Pidfd(_) => "pidfd",
        FileState::MessageQueue(_) => "messagequeue",
        FileState::Socket(_) => "socket",
    }
}

/// How it is open.
pub(super) fn access(file: &File) -> &'static str {
    if file.flags & libc::O_PATH != 0 {
        return "path";
    }
    match file.flags & libc::O_ACCMODE {
        libc::O_RDONLY => "r",
        libc::O_WRONLY => "w",
        _ => "rw",
    }
}

/// Its name and what else there is to say.
pub(super) fn name(file: &File) -> String {
    let more = match &file.state {
        FileState::Regular(state) => match &state.existence {
            regular::Existence::Deleted(_) => format!("deleted, {} bytes", state.bytes),
            _ => String::new(),
        },
        FileState::Pipe(state) => match &state.buffer {
            Some(buffer) => unread(buffer.pieces.iter().map(|piece| piece.len() as u64).sum()),
            None => String::new(),
        },
        FileState::Pty(state) => match state.end {
            pty::End::Master => "master".into(),
            pty::End::Slave => String::new(),
        },
        FileState::Memfd(state) => format!("{} bytes", state.bytes),
        FileState::Eventfd(state) => format!("count {}", state.count),
        FileState::Epoll(state) => format!("{} watched", state.targets.len()),
        FileState::Timerfd(state) if state.remaining_ns > 0 => format!("in {} ms", state.remaining_ns / 1_000_000),
        FileState::Inotify(state) => format!("{} watched", state.watches.len()),
        FileState::Pidfd(state) => state.pid.map_or_else(|| "ended".into(), |PodPid(pid)| format!("of pid {pid}")),
        _ => String::new(),
    };
    if more.is_empty() { file.name.clone() } else { format!("{} ({more})", file.name) }
}

fn unread(bytes: u64) -> String {
    if bytes == 0 { String::new() } else { format!("{bytes} bytes unread") }
}

/// One socket.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Socket {
    /// "tcp", "udp", "unix stream", …
    pub protocol: &'static str,
    pub state: &'static str,
    pub local: String,
    pub peer: String,
    /// Bytes that came and that no program has read, and that the other end has not acknowledged or read.
    pub unread_bytes: u64,
    pub unsent_bytes: u64,
    /// "PID/FD", all of them.
    pub held_by: Vec<String>,
}

pub(super) fn socket(state: &socket::State) -> Socket {
    let text = |endpoint: &Option<socket::address::Endpoint>| endpoint.map_or_else(String::new, |e| e.to_string());
    let plain = |protocol, local, peer: String, unread_bytes| {
        let state = if peer.is_empty() { "" } else { "connected" };
        Socket { protocol, state, local, peer, unread_bytes, unsent_bytes: 0, held_by: Vec::new() }
    };
    match state {
        socket::State::Tcp(state) => tcp_socket(state),
        socket::State::Unix(state) => unix_socket(state),
        socket::State::Udp(state) => {
            let protocol = match state.protocol {
                libc::IPPROTO_UDP => "udp",
                libc::IPPROTO_UDPLITE => "udplite",
                _ => "ping",
            };
            let unread = state.queue.iter().map(|datagram| datagram.payload.len() as u64).sum();
            plain(protocol, text(&state.local), text(&state.peer), unread)
        }
        socket::State::Raw(state) => plain("raw", text(&state.local), text(&state.peer), 0),
        socket::State::Packet(state) => plain("packet", format!("{:#06x}", state.protocol), String::new(), 0),
        socket::State::Netlink(state) => plain("netlink", netlink(state.protocol), String::new(), 0),
    }
}

fn netlink(protocol: i32) -> String {
    match protocol {
        0 => "route".into(),
        4 => "sock_diag".into(),
        9 => "audit".into(),
        12 => "netfilter".into(),
        15 => "uevent".into(),
        16 => "generic".into(),
        other => other.to_string(),
    }
}

fn tcp_socket(state: &tcp::State) -> Socket {
    let mut found = Socket {
        protocol: "tcp",
        state: "",
        local: String::new(),
        peer: String::new(),
        unread_bytes: 0,
        unsent_bytes: 0,
        held_by: Vec::new(),
    };
    match &state.phase {
        tcp::Phase::Fresh { local } => {
            found.state = "closed";
            found.local = local.map_or_else(String::new, |local| local.to_string());
        }
        tcp::Phase::Listening { local, .. } => {
            found.state = "listen";
            found.local = local.to_string();
        }
        tcp::Phase::Connecting { local, peer, .. } => {
            found.state = "syn-sent";
            (found.local, found.peer) = (local.to_string(), peer.to_string());
        }
        tcp::Phase::Connected(connection) => {
            found.state = match (connection.received_fin, connection.sent_fin) {
                (false, false) => "established",
                (true, false) => "close-wait",
                (false, true) => "fin-wait",
                (true, true) if connection.sent_fin_first => "closing",
                (true, true) => "last-ack",
            };
            (found.local, found.peer) = (connection.local.to_string(), connection.peer.to_string());
            found.unread_bytes = connection.unread.len() as u64;
            found.unsent_bytes = connection.unacknowledged.len() as u64;
        }
        tcp::Phase::Ended { unread, .. } => {
            found.state = "closed";
            found.unread_bytes = unread.len() as u64;
        }
    }
    found
}

fn unix_socket(state: &unix::State) -> Socket {
    let local = state.name.as_ref().map_or_else(String::new, |name| match name.bytes.split_first() {
        Some((0, rest)) => format!("@{}", String::from_utf8_lossy(rest)),
        _ => String::from_utf8_lossy(&name.bytes).trim_end_matches('\0').to_owned(),
    });
    let (phase, peer) = match &state.phase {
        unix::Phase::Unconnected => ("", String::new()),
        unix::Phase::Listening { .. } => ("listen", String::new()),
        unix::Phase::Connected(inode) if *inode == state.inode => ("connected", "itself".into()),
        unix::Phase::Connected(inode) => ("connected", format!("socket:[{inode}]")),
        unix::Phase::Waiting => ("waits to be accepted", String::new()),
        unix::Phase::PeerGone => ("peer gone", String::new()),
    };
    Socket {
        protocol: match state.kind {
            libc::SOCK_STREAM => "unix stream",
            libc::SOCK_DGRAM => "unix dgram",
            _ => "unix seqpacket",
        },
        state: phase,
        local,
        peer,
        unread_bytes: state.queue.iter().map(|message| message.bytes.len() as u64).sum(),
        unsent_bytes: 0,
        held_by: Vec::new(),
    }
}
