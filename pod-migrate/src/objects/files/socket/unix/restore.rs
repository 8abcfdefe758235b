//! Unix sockets made again, all together: a pair is two of them.
//!
//! Two steps. [`open`]: sockets exist, have their names, listen, and pairs are connected. [`connect`], when all files are
//! open and all processes exist: queues are filled by the other end (or by a helper in its place), clients wait in their
//! listeners' queues again, halves are shut down, ends that had gone go again; options that touch data come last.
//!
//! A connected stream socket with a name got it from its listener, so it is made by connecting to a listener of that name
//! for the moment. Names that are paths are bound before those that have them now, and unlinked where they were.

use super::super::super::opener::broken;
use super::super::super::place::{Aside, Made};
use super::doer::{self, Doer, Who};
use super::{BoundFile, Message, Name, Phase, State};
use crate::ids::FileId;
use nix::unistd::chdir;
use pod_runtime::sys::{inet, unix};
use pod_runtime::{Doing, Result};
use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

/// All unix sockets of an image.
pub type All<'a> = BTreeMap<FileId, &'a State>;

/// Sockets that were made, until they are complete.
#[derive(Debug, Default)]
pub struct Restored {
    pub ends: Vec<(FileId, OwnedFd)>,
    /// By the inode that the pod's socket had: what stands for a peer that is gone.
    helpers: HashMap<u64, OwnedFd>,
}

struct Making<'a, 'd, 'e> {
    by_inode: HashMap<u64, (FileId, &'a State)>,
    made: HashMap<u64, OwnedFd>,
    helpers: HashMap<u64, OwnedFd>,
    doer: &'d mut Doer<'e>,
}

/// How many unnamed pairs of each sort there will be: the more they are, the less each costs when all are known before.
fn pairs(all: &All<'_>) -> HashMap<(Who, i32), usize> {
    let mut ends: HashMap<(Who, i32), usize> = HashMap::new();
    for state in all.values().filter(|state| state.name.is_none() && matches!(state.phase, Phase::Connected(_))) {
        if let Some(who) = doer::peer_of(state) {
            *ends.entry((who, state.kind)).or_default() += 1;
        }
    }
    ends.values_mut().for_each(|count| *count /= 2);
    ends
}

/// Step one.
pub fn open(all: &All<'_>, doer: &mut Doer<'_>) -> Result<Restored> {
    let by_inode = all.iter().map(|(id, state)| (state.inode, (*id, *state))).collect();
    doer.prepare(pairs(all)).doing(|| "make pairs".into())?;
    let mut making = Making { by_inode, made: HashMap::new(), helpers: HashMap::new(), doer };
    for state in all.values().filter(|state| state.kind != libc::SOCK_DGRAM) {
        match state.phase {
            Phase::Connected(peer) if !making.made.contains_key(&state.inode) => making.pair(state, peer)?,
            Phase::PeerGone => making.widow(state)?,
            _ => {}
        }
    }
    // Names that were unlinked before those that are there now.
    let is_gone = |state: &&State| state.name.as_ref().and_then(|n| n.file.as_ref()).is_some_and(|f| f.deleted);
    let (gone, there): (Vec<&State>, Vec<&State>) = all.values().copied().partition(is_gone);
    for state in gone.into_iter().chain(there) {
        if !making.made.contains_key(&state.inode) {
            making.single(state).doing(|| describe(state))?;
        }
    }
    let mut restored = Restored { helpers: making.helpers, ..Restored::default() };
    for (inode, fd) in making.made {
        if let Some((id, state)) = making.by_inode.get(&inode) {
            state.options.before_bind(fd.as_fd(), true)?;
            restored.ends.push((*id, fd));
        }
    }
    Ok(restored)
}

fn describe(state: &State) -> String {
    match &state.name {
        Some(name) => format!("restore unix socket {}", String::from_utf8_lossy(&name.bytes).replace('\0', "@")),
        None => format!("restore unix socket {}", state.inode),
    }
}

impl<'a> Making<'a, '_, '_> {
    /// Two connected sockets of the pod.
    fn pair(&mut self, state: &'a State, peer: u64) -> Result<()> {
        let Some((_, other)) = self.by_inode.get(&peer).copied() else {
            return Err(broken(format!("unix socket {} is connected to one that is not there", state.inode)));
        };
        // The end that has a name is the one that was accepted; of two names, the one that a listener has too.
        let (client, server) = if self.is_accepted(state) { (other, state) } else { (state, other) };
        if client.inode == server.inode {
            return Err(broken(format!("unix socket {} is connected to itself", state.inode)));
        }
        let (a, b) = connected(state.kind, Some(client), server, self.doer).doing(|| describe(server))?;
        self.made.insert(client.inode, a);
        self.made.insert(server.inode, b);
        Ok(())
    }

    fn is_accepted(&self, state: &State) -> bool {
        let Some(name) = &state.name else { return false };
        let Phase::Connected(peer) = state.phase else { return false };
        let peer_has_name = self.by_inode.get(&peer).is_some_and(|(_, other)| other.name.is_some());
        let shared = |inode: &u64, other: &State| *inode != state.inode && other.name.as_ref() == Some(name);
        !peer_has_name || self.by_inode.iter().any(|(inode, (_, other))| shared(inode, other))
    }

    /// One whose peer is gone: a helper stands for it until the queue is filled.
    fn widow(&mut self, state: &'a State) -> Result<()> {
        let (helper, end) = connected(state.kind, None, state, self.doer).doing(|| describe(state))?;
        self.helpers.insert(state.inode, helper);
        self.made.insert(state.inode, end);
        Ok(())
    }

    /// Not connected, listening, waiting to be accepted, or a datagram socket.
    fn single(&mut self, state: &'a State) -> Result<()> {
        if state.kind == libc::SOCK_DGRAM
            && let Phase::Connected(peer) = state.phase
            && let Some((_, other)) = self.by_inode.get(&peer)
            && other.phase == Phase::Connected(state.inode)
            && (state.name.is_none() || other.name.is_none())
            && peer != state.inode
        {
            let (a, b) = self.doer.pair(doer::peer_of(state), state.kind).doing(|| "make a pair".into())?;
            for (fd, state) in [(&a, state), (&b, *other)] {
                bind_as(fd, state.name.as_ref())?;
            }
            self.made.insert(state.inode, a);
            self.made.insert(peer, b);
            return Ok(());
        }
        let fd = inet::socket(libc::AF_UNIX, state.kind, 0).doing(|| "make a socket".into())?;
        bind_as(&fd, state.name.as_ref())?;
        if state.kind == libc::SOCK_DGRAM && state.phase == Phase::PeerGone {
            let peer = autobound().doing(|| "make a peer".into())?;
            let to = inet::local_address(peer.as_fd()).doing(|| "name a peer".into())?;
            inet::connect(fd.as_fd(), &to).doing(|| "connect to a peer".into())?;
            self.helpers.insert(state.inode, peer);
        }
        if let Phase::Listening { backlog, .. } = &state.phase {
            let backlog = (*backlog).min(i32::MAX as u32) as i32;
            self.doer.listen(doer::peer_of(state), fd.as_fd(), backlog).doing(|| "listen".into())?;
        }
        self.made.insert(state.inode, fd);
        Ok(())
    }
}

/// A client and a server end; without a client's state the client is a helper.
fn connected(kind: i32, client: Option<&State>, server: &State, doer: &mut Doer<'_>) -> Result<(OwnedFd, OwnedFd)> {
    let (client_name, client_sees) = (client.and_then(|c| c.name.as_ref()), client.and_then(doer::peer_of));
    let doing = || "connect a pair".to_string();
    let Some(name) = &server.name else {
        let (a, b) = doer.pair(doer::peer_of(server), kind).doing(doing)?;
        bind_as(&a, client_name)?;
        return Ok((a, b));
    };
    let listener = inet::socket(libc::AF_UNIX, kind, 0).doing(doing)?;
    let bound = name.file.as_ref().map(|file| bound_at(name, file));
    let place = bound.as_deref().map(|at| -> std::io::Result<_> { Ok((Aside::of(at)?, Made::parents_of(at)?)) });
    let place = place.transpose().doing(doing)?;
    in_directory(name, || inet::bind(listener.as_fd(), &address(&name.bytes))).doing(doing)?;
    if let Some(at) = &bound {
        // Anybody may connect to this one, and its file goes at once.
        std::fs::set_permissions(at, std::fs::Permissions::from_mode(0o777)).doing(doing)?;
    }
    // Who listens is what the client sees as its peer, who connects what the server sees.
    doer.listen(client_sees, listener.as_fd(), 1).doing(doing)?;
    let end = inet::socket(libc::AF_UNIX, kind, 0).doing(doing)?;
    bind_as(&end, client_name)?;
    let to = address(&name.bytes);
    let done = in_directory(name, || doer.connect(doer::peer_of(server), end.as_fd(), &to));
    if let Some(at) = &bound {
        let _ = std::fs::remove_file(at);
    }
    drop(place);
    done.doing(doing)?;
    let accepted = unix::accept(listener.as_fd()).doing(doing)?;
    Ok((end, accepted))
}

/// A datagram socket under a name that the kernel chooses.
fn autobound() -> std::io::Result<OwnedFd> {
    let fd = inet::socket(libc::AF_UNIX, libc::SOCK_DGRAM, 0)?;
    inet::bind(fd.as_fd(), &(libc::AF_UNIX as u16).to_ne_bytes())?;
    Ok(fd)
}

fn path(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

/// A sockaddr_un.
fn address(sun_path: &[u8]) -> Vec<u8> {
    let mut bytes = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    bytes.extend_from_slice(sun_path);
    if sun_path.first().is_some_and(|first| *first != 0) && sun_path.len() < 108 {
        bytes.push(0);
    }
    bytes
}

/// Gives a socket its name; a file that is there already is the dead one that travelled with the pod's files.
fn bind_as(fd: &OwnedFd, name: Option<&Name>) -> Result<()> {
    let Some(name) = name else { return Ok(()) };
    let doing = || format!("bind to {}", String::from_utf8_lossy(&name.bytes).replace('\0', "@"));
    let Some(file) = &name.file else { return inet::bind(fd.as_fd(), &address(&name.bytes)).doing(doing) };
    let at = path(&file.path);
    if !file.deleted && std::fs::symlink_metadata(at).is_ok_and(|m| m.file_type().is_socket()) {
        std::fs::remove_file(at).doing(doing)?;
    }
    let bound = bound_at(name, file);
    let passing = file.deleted || bound != at;
    let aside = if passing { Some(Aside::of(&bound).doing(doing)?) } else { None };
    let made = Made::parents_of(&bound).doing(doing)?;
    in_directory(name, || inet::bind(fd.as_fd(), &address(&name.bytes))).doing(doing)?;
    if !file.deleted && bound != at {
        std::fs::rename(&bound, at).doing(doing)?;
    }
    if file.deleted {
        std::fs::remove_file(&bound).doing(doing)?;
    }
    drop((made, aside));
    if file.deleted {
        return Ok(());
    }
    std::os::unix::fs::lchown(at, Some(file.uid), Some(file.gid)).doing(doing)?;
    std::fs::set_permissions(at, std::fs::Permissions::from_mode(file.mode & 0o7777)).doing(doing)
}

/// Where bind(2) makes the file: it may have been renamed since.
fn bound_at(name: &Name, file: &BoundFile) -> PathBuf {
    let bound = path(&name.bytes);
    if bound.is_absolute() { bound.to_owned() } else { path(&file.path).to_owned() }
}

/// The address by which a name's file is reached now, from the directory that the caller is to be in.
fn reach<T>(name: &Name, f: impl FnOnce(&[u8]) -> std::io::Result<T>) -> std::io::Result<T> {
    let Some(file) = &name.file else { return f(&address(&name.bytes)) };
    let at = path(&file.path);
    chdir(at.parent().unwrap_or(Path::new("/")))?;
    let done = f(&address(at.file_name().unwrap_or_default().as_bytes()));
    chdir("/")?;
    done
}

/// A relative name is looked up from where it was bound: the directory that makes it lead to the file.
fn in_directory<T>(name: &Name, f: impl FnOnce() -> std::io::Result<T>) -> std::io::Result<T> {
    let relative = path(&name.bytes);
    let Some(file) = name.file.as_ref().filter(|_| relative.is_relative()) else { return f() };
    let mut base = PathBuf::from(path(&file.path));
    for component in relative.components() {
        match component {
            Component::Normal(_) => drop(base.pop()),
            Component::CurDir => {}
            _ => return Err(std::io::Error::other("a relative name that leads upwards")),
        }
    }
    chdir(&base)?;
    let done = f();
    chdir("/")?;
    done
}

/// Step two. `held` gives any file of the image.
pub fn connect<'h>(
    all: &All<'_>,
    restored: &mut Restored,
    held: &dyn Fn(FileId) -> Option<BorrowedFd<'h>>,
) -> Result<()> {
    let by_inode: HashMap<u64, (FileId, &State)> = all.iter().map(|(id, s)| (s.inode, (*id, *s))).collect();
    let socket = |inode: u64| -> Result<BorrowedFd<'h>> {
        let found = by_inode.get(&inode).and_then(|(id, _)| held(*id));
        found.ok_or_else(|| broken(format!("unix socket {inode} is not there")))
    };
    for state in all.values() {
        let datagrams = state.kind == libc::SOCK_DGRAM;
        let is_pair = || -> Result<bool> { Ok(inet::peer_address(socket(state.inode)?).is_ok()) };
        let sender = match (&state.phase, restored.helpers.get(&state.inode)) {
            (_, Some(helper)) if !datagrams => Some(helper.as_fd()),
            // One with a name hears anybody until it is connected, which comes after.
            (Phase::Connected(peer), _) if !datagrams || is_pair()? => Some(socket(*peer)?),
            _ => None,
        };
        fill(state, sender, all, held).doing(|| describe(state))?;
    }
    for state in all.values() {
        if let Phase::Listening { pending, .. } = &state.phase
            && let Some(name) = &state.name
        {
            for client in pending {
                let client = socket(*client)?;
                reach(name, |to| inet::connect(client, to)).doing(|| describe(state))?;
            }
        }
        if let (libc::SOCK_DGRAM, Phase::Connected(peer)) = (state.kind, &state.phase) {
            connect_datagram(state, socket(state.inode)?, by_inode.get(peer).map(|(_, peer)| *peer))?;
        }
    }
    for state in all.values() {
        finish(state, socket(state.inode)?, restored.helpers.remove(&state.inode)).doing(|| describe(state))?;
    }
    Ok(())
}

/// A datagram socket that is no half of an unnamed pair.
fn connect_datagram(state: &State, fd: BorrowedFd<'_>, peer: Option<&State>) -> Result<()> {
    if inet::peer_address(fd).is_ok() {
        return Ok(());
    }
    let Some(name) = peer.and_then(|peer| peer.name.as_ref()) else {
        return Err(broken(format!("unix socket {} sends to one without a name", state.inode)));
    };
    reach(name, |to| inet::connect(fd, to)).doing(|| describe(state))
}

fn fill<'h>(
    state: &State,
    sender: Option<BorrowedFd<'_>>,
    all: &All<'_>,
    held: &dyn Fn(FileId) -> Option<BorrowedFd<'h>>,
) -> Result<()> {
    const PLENTY: i32 = 64 << 20;
    for message in &state.queue {
        let numbers: Option<Vec<i32>> = message.files.iter().map(|id| held(*id).map(|fd| fd.as_raw_fd())).collect();
        let numbers = numbers.ok_or_else(|| broken("a queued file is not there".into()))?;
        let own;
        let from = match sender {
            Some(sender) => sender,
            None if state.name.is_none() => return Err(broken("messages to a socket without a name".into())),
            None => {
                own = stranger(message, all, held)?;
                own.as_fd()
            }
        };
        let before = inet::number(from, libc::SOL_SOCKET, libc::SO_SNDBUF).unwrap_or(0);
        inet::set_number(from, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, PLENTY).doing(|| "size a buffer".into())?;
        let sent = match &state.name {
            Some(name) if sender.is_none() => reach(name, |to| deliver(from, message, to, &numbers)),
            _ => deliver(from, message, &[], &numbers),
        };
        let _ = inet::set_number(from, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, before / 2);
        sent.doing(|| "put a message back".into())?;
    }
    Ok(())
}

/// A socket that sends under the name that the message came from.
fn stranger<'h>(message: &Message, all: &All<'_>, held: &dyn Fn(FileId) -> Option<BorrowedFd<'h>>) -> Result<OwnedFd> {
    let doing = || "make a sender".to_string();
    let has_name = |state: &&State| state.name.as_ref().is_some_and(|name| name.bytes == message.from);
    if !message.from.is_empty()
        && let Some((id, _)) = all.iter().find(|(_, state)| has_name(state))
        && let Some(fd) = held(*id)
    {
        return fd.try_clone_to_owned().doing(doing);
    }
    let fd = inet::socket(libc::AF_UNIX, libc::SOCK_DGRAM, 0).doing(doing)?;
    if !message.from.is_empty() {
        let at = path(&message.from);
        let named = message.from[0] != 0 && at.is_absolute();
        let place = if named { Some((Aside::of(at).doing(doing)?, Made::parents_of(at).doing(doing)?)) } else { None };
        // A relative path: the message comes without its sender's name.
        if message.from[0] == 0 || named {
            inet::bind(fd.as_fd(), &address(&message.from)).doing(doing)?;
        }
        if named {
            std::fs::remove_file(at).doing(doing)?;
        }
        drop(place);
    }
    Ok(fd)
}

fn deliver(from: BorrowedFd<'_>, message: &Message, to: &[u8], numbers: &[i32]) -> std::io::Result<()> {
    let credentials = message.credentials;
    let me = std::process::id() as i32;
    let mut sent = match unix::send(from, &message.bytes, to, numbers, credentials) {
        // The sender has ended since: its user and group are what counts.
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) || credentials.is_some_and(|c| c.0 == 0) => {
            let credentials = credentials.map(|(_, uid, gid)| (me, uid, gid));
            unix::send(from, &message.bytes, to, numbers, credentials)?
        }
        other => other?,
    };
    while sent < message.bytes.len() {
        sent += unix::send(from, &message.bytes[sent..], to, &[], credentials)?;
    }
    Ok(())
}

fn finish(state: &State, fd: BorrowedFd<'_>, helper: Option<OwnedFd>) -> Result<()> {
    if let Some(helper) = helper {
        if state.reset {
            // Closing with something unread is what the other end calls a reset.
            unix::send(fd, b"!", &[], &[], None).doing(|| "write to a helper".into())?;
        }
        drop(helper);
    } else {
        let how = match state.shut {
            1 => Some(libc::SHUT_RD),
            2 => Some(libc::SHUT_WR),
            3 => Some(libc::SHUT_RDWR),
            _ => None,
        };
        if let Some(how) = how.filter(|_| !matches!(state.phase, Phase::Listening { .. })) {
            match unix::shutdown(fd, how) {
                Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => {}
                other => other.doing(|| "shut down a half".into())?,
            }
        }
    }
    state.options.after_bind(fd)?;
    state.options.last(fd)
}
