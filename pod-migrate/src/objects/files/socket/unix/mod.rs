//! Unix sockets: stream, datagram, seqpacket; unnamed, abstract or with a path; queues with descriptors in flight.
//!
//! Nothing is taken from the source: queues are peeked. A stream without descriptors in its queue comes in one peek; for
//! the others SO_PEEK_OFF walks along the queue and is put back to what it was. Peeked descriptors are copies and are
//! dumped like any other file, so they can be sockets too, even those that they are queued in.
//!
//! Who is connected to whom is told by UNIX_DIAG. A peer that no process of the pod has is refused, unless it is gone
//! (then the socket reads its queue and an end of file) or waits in a listener's queue.
//!
//! Not exact: plain bytes of a stream that wait right before descriptors come back as one piece with them, because a peek
//! does not tell where one ends and the other begins (it looks into the next message for descriptors even when it is
//! asked for fewer bytes). an empty datagram that was peeked at before is passed over by
//! the kernel and lost from the copy. What SO_PEERCRED tells is kept by [`doer`]; SO_PEERPIDFD of a process that has ended
//! is that of another one that has, and a client that waits to be accepted is the opener to its server.

mod diag;
pub mod doer;
pub mod restore;

use super::DumpContext;
use super::options::Options;
use crate::ids::FileId;
use diag::Listed;
use nix::sys::stat::fstat;
use pod_runtime::sys::{descriptor, inet, unix};
use pod_runtime::{Doing, Problem, Result};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path};

/// Largest datagram that is carried; the default buffers allow 208 KiB.
const CAPACITY: usize = 1 << 20;
const SO_PEEK_OFF: i32 = 42;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub inode: u64,
    /// SOCK_STREAM, SOCK_DGRAM or SOCK_SEQPACKET.
    pub kind: i32,
    pub name: Option<Name>,
    pub phase: Phase,
    /// 1: receiving, 2: sending.
    pub shut: u8,
    /// The peer went away with unread data: the next call gets ECONNRESET.
    pub reset: bool,
    /// User and group that SO_PEERCRED tells.
    pub peer_credentials: Option<(u32, u32)>,
    /// The pid that it tells, as the pod numbers processes; 0 is not known.
    #[serde(default)]
    pub peer_pid: i32,
    pub options: Options,
    pub queue: Vec<Message>,
}

/// What it is bound to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Name {
    /// sun_path as getsockname(2) gives it: begins with a zero byte when abstract.
    pub bytes: ByteBuf,
    /// For a path: where the file is.
    pub file: Option<BoundFile>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BoundFile {
    /// Absolute, as the pod sees it.
    pub path: ByteBuf,
    /// It was unlinked, or another file has the name now.
    pub deleted: bool,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    Unconnected,
    Listening {
        backlog: u32,
        /// Clients that wait to be accepted, by inode, oldest first.
        pending: Vec<u64>,
    },
    /// With this inode.
    Connected(u64),
    /// Connected to a listener that has not accepted yet: the listener's `pending` has it.
    Waiting,
    /// It was connected; the peer is gone.
    PeerGone,
}

/// One message; of a stream: so many bytes that came together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    pub bytes: ByteBuf,
    /// sun_path of the sender of a datagram.
    pub from: ByteBuf,
    pub files: Vec<FileId>,
    /// pid in the pod (0: not known), uid, gid.
    pub credentials: Option<(i32, u32, u32)>,
}

/// Everything but the queue, which can hold files: see [`finish`].
pub(super) fn dump(fd: BorrowedFd<'_>, context: &mut DumpContext<'_, '_>) -> Result<State> {
    let subject = context.subject;
    let doing = || format!("{subject}: read a unix socket");
    let kind = inet::number(fd, libc::SOL_SOCKET, libc::SO_TYPE).doing(doing)?;
    let listed = context.files.unix_sockets.listed(fd, context.inode)?;
    let phase = phase(fd, kind, &listed, context)?;
    let events = inet::poll_now(fd, libc::POLLIN).doing(doing)?;
    Ok(State {
        inode: context.inode,
        kind,
        name: name(fd, context).doing(doing)?,
        reset: phase == Phase::PeerGone && events & libc::POLLERR != 0,
        phase,
        shut: listed.shut & 3,
        peer_credentials: peer_credentials(fd),
        // Only a process of the pod can tell, also of one that has ended: see `FilesDump::peers_to_ask`.
        peer_pid: 0,
        options: Options::dump(fd, &[], subject)?,
        queue: Vec::new(),
    })
}

/// Lists of the kernel, read once for each network namespace and kept for the walk.
#[derive(Debug, Default)]
pub struct Sockets {
    listed: HashMap<u64, Listed>,
}

impl Sockets {
    fn listed(&mut self, fd: BorrowedFd<'_>, inode: u64) -> Result<Listed> {
        if !self.listed.contains_key(&inode) {
            self.listed.extend(diag::list(fd)?);
        }
        let listed = self.listed.get(&inode).cloned();
        listed.ok_or_else(|| Problem::new("E-SYSTEM", format!("the kernel does not list unix socket {inode}")))
    }

    /// Whether this socket waits in a listener's queue.
    fn is_pending(&self, inode: u64) -> bool {
        self.listed.values().any(|listed| listed.pending.iter().any(|client| u64::from(*client) == inode))
    }
}

fn phase(fd: BorrowedFd<'_>, kind: i32, listed: &Listed, context: &DumpContext<'_, '_>) -> Result<Phase> {
    if listed.is_listening() {
        let pending: Vec<u64> = listed.pending.iter().map(|client| u64::from(*client)).collect();
        if pending.contains(&0) {
            // What it wrote before it went away is in a queue that only accepting opens.
            return Err(in_queue(context.subject));
        }
        return Ok(Phase::Listening { backlog: listed.backlog, pending });
    }
    match listed.peer {
        Some(0) | None if context.files.unix_sockets.is_pending(context.inode) => {
            let unread = inet::unacknowledged(fd).doing(|| "count unsent bytes".into())?;
            if unread > 0 { Err(in_queue(context.subject)) } else { Ok(Phase::Waiting) }
        }
        // A datagram socket is told of its peer's end by its next call: then it is connected to nobody.
        Some(0) => Ok(Phase::PeerGone),
        Some(peer) => Ok(Phase::Connected(u64::from(peer))),
        None if kind != libc::SOCK_DGRAM && listed.is_connected() => Ok(Phase::PeerGone),
        None => Ok(Phase::Unconnected),
    }
}

/// Watches for the moment at which no connection that waits to be accepted has anything in it.
pub struct Unaccepted {
    diag: netlink_sys::Socket,
}

impl Unaccepted {
    /// Of the network namespace.
    pub fn of(namespace: BorrowedFd<'_>) -> Result<Unaccepted> {
        Ok(Unaccepted { diag: diag::open(namespace)? })
    }

    /// Listeners, by inode, with one that has: then [`dump`] will refuse.
    pub fn written(&self) -> Result<HashSet<u64>> {
        let listed = diag::dump(&self.diag).doing(|| "list the unix sockets of the pod".into())?;
        Ok(diag::with_unread_pending(&listed))
    }
}

fn in_queue(subject: &str) -> Problem {
    let what = format!("{subject}: a client has written before its connection was accepted");
    Problem::new("E-UNIX-QUEUE", what).fix("try again in a moment")
}

fn peer_credentials(fd: BorrowedFd<'_>) -> Option<(u32, u32)> {
    let bytes = inet::option(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, &[], 12).ok()?;
    let word = |at: usize| bytes.get(at..at + 4).map(|b| u32::from_ne_bytes(b.try_into().unwrap_or_default()));
    let (pid, uid, gid) = (word(0)?, word(4)?, word(8)?);
    // Nobody: (0, -1, -1).
    (pid != 0 || uid != u32::MAX).then_some((uid, gid))
}

/// The path part of a sockaddr_un.
pub(super) fn path_of(address: &[u8]) -> &[u8] {
    let path = address.get(2..).unwrap_or(&[]);
    match path {
        [0, ..] | [] => path,
        _ => path.split(|byte| *byte == 0).next().unwrap_or(path),
    }
}

fn name(fd: BorrowedFd<'_>, context: &DumpContext<'_, '_>) -> Result<Option<Name>> {
    let address = inet::local_address(fd).doing(|| "read its name".into())?;
    let bytes = path_of(&address);
    if bytes.is_empty() {
        return Ok(None);
    }
    let file = if bytes[0] == 0 { None } else { Some(bound_file(fd, bytes, context)?) };
    Ok(Some(Name { bytes: ByteBuf::from(bytes.to_vec()), file }))
}

fn bound_file(fd: BorrowedFd<'_>, bytes: &[u8], context: &DumpContext<'_, '_>) -> Result<BoundFile> {
    let doing = || "find the file that it is bound to".to_string();
    let file = unix::bound_file(fd).doing(doing)?;
    let stat = fstat(&file).doing(doing)?;
    let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).doing(doing)?;
    let link = link.into_os_string().into_vec();
    let there = context.files.view.stat(&link);
    let deleted = there.is_none_or(|s| (s.st_dev, s.st_ino) != (stat.st_dev, stat.st_ino));
    let path = if deleted { link.strip_suffix(b" (deleted)").unwrap_or(&link).to_vec() } else { link };
    if !leads_to(bytes, &path) {
        let what = format!("{}: a unix socket whose name leads upwards", context.subject);
        return Err(Problem::new("E-UNIX-NAME", what).fix("let the program bind to an absolute path"));
    }
    Ok(BoundFile {
        path: ByteBuf::from(path),
        deleted,
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
    })
}

/// Whether binding to this name from some directory makes that file: any absolute name, and relative ones that go down.
fn leads_to(name: &[u8], path: &[u8]) -> bool {
    let (name, path) = (Path::new(OsStr::from_bytes(name)), Path::new(OsStr::from_bytes(path)));
    let down = || name.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    name.is_absolute() || (down() && path.components().count() > name.components().count())
}

/// The queue, when all tables are known.
pub(super) fn finish(state: &mut State, fd: BorrowedFd<'_>, context: &mut DumpContext<'_, '_>) -> Result<()> {
    if matches!(state.phase, Phase::Listening { .. }) {
        return Ok(());
    }
    let subject = context.subject.to_owned();
    let doing = || format!("{subject}: read the queue of a unix socket");
    let before = inet::number(fd, libc::SOL_SOCKET, SO_PEEK_OFF).unwrap_or(-1);
    if inet::poll_now(fd, libc::POLLPRI).doing(doing)? & libc::POLLPRI != 0 {
        let warning = format!("{subject}: a byte out of band (MSG_OOB) that waits is kept in line with the others");
        context.files.warnings.push(warning);
    }
    let messages = if state.kind == libc::SOCK_STREAM {
        peek_stream(fd, before).doing(doing)?
    } else {
        peek_messages(fd, before).doing(doing)?
    };
    for message in messages {
        let mut files = Vec::new();
        for file in message.fds {
            files.push(context.files.add(file, &format!("{subject}, in its queue"), None)?);
        }
        let credentials = message.credentials.map(|(pid, uid, gid)| {
            let pid = context.files.view.any_pid_in_pod(pid, false);
            (pid.map_or(0, |pid| pid.0), uid, gid)
        });
        state.queue.push(Message {
            bytes: ByteBuf::from(message.bytes),
            from: ByteBuf::from(path_of(&message.from).to_vec()),
            files,
            credentials,
        });
    }
    Ok(())
}

/// Whether the peer is one of the pod's; asked when all sockets are known.
pub fn must_be_inside(state: &State, subject: &str, inside: impl Fn(u64) -> bool) -> Result<()> {
    match &state.phase {
        Phase::Connected(peer) if !inside(*peer) => Err(diag::external(subject, *peer)),
        Phase::Listening { pending, .. } => match pending.iter().find(|client| !inside(**client)) {
            Some(client) => Err(diag::external(subject, *client)),
            None => Ok(()),
        },
        _ => Ok(()),
    }
}

/// Puts SO_PEEK_OFF back however the walk ends.
struct PeekOffset<'a> {
    fd: BorrowedFd<'a>,
    before: i32,
}

impl<'a> PeekOffset<'a> {
    fn at_start(fd: BorrowedFd<'a>, before: i32) -> std::io::Result<Self> {
        inet::set_number(fd, libc::SOL_SOCKET, SO_PEEK_OFF, 0)?;
        Ok(PeekOffset { fd, before })
    }

    fn set(&self, offset: usize) -> std::io::Result<()> {
        inet::set_number(self.fd, libc::SOL_SOCKET, SO_PEEK_OFF, offset as i32)
    }
}

impl Drop for PeekOffset<'_> {
    fn drop(&mut self) {
        if let Err(error) = inet::set_number(self.fd, libc::SOL_SOCKET, SO_PEEK_OFF, self.before) {
            tracing::warn!("a socket's SO_PEEK_OFF could not be put back: {error}");
        }
    }
}

/// A peek, or `None` at the end of what is there.
fn next(fd: BorrowedFd<'_>, capacity: usize) -> std::io::Result<Option<unix::Message>> {
    match unix::peek(fd, capacity) {
        Ok(message) => Ok(Some(message)),
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Ok(None),
        // An error is pending, or it is not connected: nothing to read.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ECONNRESET | libc::ENOTCONN | libc::EINVAL)) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn peek_stream(fd: BorrowedFd<'_>, before: i32) -> std::io::Result<Vec<unix::Message>> {
    let waiting = descriptor::readable_bytes(fd)?;
    if waiting == 0 {
        return Ok(Vec::new());
    }
    if before < 0
        && let Some(message) = next(fd, waiting + 1)?
        && message.bytes.len() == waiting
        && message.fds.is_empty()
    {
        return Ok(vec![message]);
    }
    let offset = PeekOffset::at_start(fd, before)?;
    let mut messages = Vec::new();
    let mut at = 0;
    while at < waiting {
        offset.set(at)?;
        let Some(message) = next(fd, waiting - at)? else { break };
        if message.bytes.is_empty() {
            break;
        }
        at += message.bytes.len();
        messages.push(message);
    }
    Ok(messages)
}

fn peek_messages(fd: BorrowedFd<'_>, before: i32) -> std::io::Result<Vec<unix::Message>> {
    if inet::poll_now(fd, libc::POLLIN)? & libc::POLLIN == 0 {
        return Ok(Vec::new());
    }
    // Of a seqpacket socket: of all messages together.
    let waiting = descriptor::readable_bytes(fd)?;
    let _offset = PeekOffset::at_start(fd, before)?;
    let mut messages = Vec::new();
    let mut seen = 0;
    while let Some(message) = next(fd, CAPACITY)? {
        if message.truncated {
            return Err(std::io::Error::other("a message of more than 1 MiB"));
        }
        // The end of file of a seqpacket socket looks like an empty message, again and again.
        if message.bytes.is_empty()
            && message.fds.is_empty()
            && seen >= waiting
            && inet::poll_now(fd, libc::POLLRDHUP)? & libc::POLLRDHUP != 0
        {
            break;
        }
        seen += message.bytes.len();
        messages.push(message);
    }
    Ok(messages)
}

#[cfg(test)]
mod tests;
