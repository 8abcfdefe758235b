//! What the kernel lists of unix sockets (UNIX_DIAG): peers, pending connections, how a socket was shut down.

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::unix::{ShowFlags, StateFlags, UnixRequest, nlas::Nla};
use netlink_sys::{Socket, protocols::NETLINK_SOCK_DIAG};
use pod_runtime::network::wire::inside;
use pod_runtime::sys::inet;
use pod_runtime::{Doing, Problem, Result};
use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

const LISTENING: u8 = 10;
const ESTABLISHED: u8 = 1;

#[derive(Debug, Clone, Default)]
pub(super) struct Listed {
    state: u8,
    /// 0: none, or one that no process has (any more, or not yet).
    pub peer: Option<u32>,
    /// Of a listener: the clients that wait, in their order; 0 for one that is gone.
    pub pending: Vec<u32>,
    /// Of a listener.
    pub backlog: u32,
    /// 1 receiving, 2 sending.
    pub shut: u8,
    /// Of one that is no listener: bytes that its peer has not read, as the kernel accounts for them.
    unread: u32,
}

impl Listed {
    pub fn is_listening(&self) -> bool {
        self.state == LISTENING
    }

    pub fn is_connected(&self) -> bool {
        self.state == ESTABLISHED
    }
}

/// All unix sockets of the network namespace that `fd` belongs to, by inode number.
pub(super) fn list(fd: BorrowedFd<'_>) -> Result<HashMap<u64, Listed>> {
    let namespace = inet::namespace(fd).doing(|| "list the unix sockets of the pod".into())?;
    dump(&open(namespace.as_fd())?).doing(|| "list the unix sockets of the pod".into())
}

/// A socket that lists those of a network namespace.
pub(super) fn open(namespace: BorrowedFd<'_>) -> Result<Socket> {
    let make = || {
        let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
        socket.bind_auto()?;
        io::Result::Ok(socket)
    };
    inside(namespace, make)?.doing(|| "open a sock_diag socket in the pod".into())
}

/// Listeners with a connection to which a client has written, or which it has left, and that is not accepted yet, by
/// inode: see [`super::in_queue`].
pub(super) fn with_unread_pending(all: &HashMap<u64, Listed>) -> HashSet<u64> {
    let unread = |client: &u32| all.get(&u64::from(*client)).is_none_or(|client| client.unread > 0);
    let listeners = all.iter().filter(|(_, listed)| listed.pending.iter().any(unread));
    listeners.map(|(inode, _)| *inode).collect()
}

pub(super) fn dump(socket: &Socket) -> io::Result<HashMap<u64, Listed>> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let show = ShowFlags::PEER | ShowFlags::ICONS | ShowFlags::RQLEN;
    let request = UnixRequest {
        state_flags: StateFlags::from_bits_retain(u32::MAX),
        inode: 0,
        show_flags: show,
        cookie: [0xff; 8],
    };
    let mut message = NetlinkMessage::new(header, SockDiagMessage::UnixRequest(request).into());
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let mut all = HashMap::new();
    loop {
        let (answer, _) = socket.recv_from_full()?;
        let mut rest = &answer[..];
        while rest.len() >= 16 {
            let message = NetlinkMessage::<SockDiagMessage>::deserialize(rest).map_err(io::Error::other)?;
            let length = (message.header.length as usize).next_multiple_of(4);
            rest = rest.get(length..).unwrap_or(&[]);
            match message.payload {
                NetlinkPayload::InnerMessage(SockDiagMessage::UnixResponse(response)) => {
                    let mut listed = Listed { state: response.header.state, ..Listed::default() };
                    for nla in &response.nlas {
                        match nla {
                            Nla::Peer(peer) => listed.peer = Some(*peer),
                            Nla::PendingConnections(pending) => listed.pending.clone_from(pending),
                            Nla::ReceiveQueueLength(_, most) if listed.state == LISTENING => listed.backlog = *most,
                            Nla::ReceiveQueueLength(_, unread) => listed.unread = *unread,
                            Nla::Shutdown(shut) => listed.shut = *shut,
                            _ => {}
                        }
                    }
                    all.insert(u64::from(response.header.inode), listed);
                }
                NetlinkPayload::Done(_) => return Ok(all),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                _ => {}
            }
        }
    }
}

/// Whose socket this is, looked for among all processes of this host: for a message only.
pub(super) fn owner_of(inode: u64) -> Option<String> {
    let wanted = format!("socket:[{inode}]");
    for process in std::fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let Ok(fds) = std::fs::read_dir(process.path().join("fd")) else { continue };
        let has = fds.flatten().any(|fd| std::fs::read_link(fd.path()).is_ok_and(|l| l.as_os_str() == wanted.as_str()));
        if has {
            let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            return Some(format!("process {pid} ({}) of the host", comm.trim()));
        }
    }
    None
}

/// E-UNIX-EXTERNAL.
pub(super) fn external(subject: &str, peer: u64) -> Problem {
    let other = owner_of(peer).unwrap_or_else(|| format!("socket {peer}, which no process of this host shows"));
    Problem::new("E-UNIX-EXTERNAL", format!("{subject}: a unix socket connected to {other}"))
        .fix("close the connection, or stop what uses it")
}
