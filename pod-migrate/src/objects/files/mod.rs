//! Open files: descriptor tables, open file descriptions and what they refer to.
//!
//! A [`File`] is one *open file description* (what dup, fork and SCM_RIGHTS share), dumped once, opened once by the
//! [`Opener`] and given to every task that has it; an [`FdTable`] says under which numbers. What several descriptions
//! refer to together (a pipe, a pty, a memfd) is stored with the first of them, and the others name it by its id.
//!
//! Paths are those that the pod sees. They are opened by a process inside the pod's namespaces, never on the host's
//! side, so a hostile image reaches nothing that the pod could not reach itself.
//!
//! Dumping changes nothing in the source: descriptors come as copies (pidfd_getfd), contents of pipes by tee, queues of
//! sockets by peeking. Each kind says in its file how, and what is left where the kernel has no such way.

pub mod classify;
mod deleted;
pub mod device;
pub mod dump;
pub mod epoll;
pub mod eventfd;
pub mod inotify;
pub mod locks;
pub mod memfd;
pub mod mqueue;
pub mod opener;
pub mod pidfd;
pub mod pipe;
mod place;
pub mod pty;
mod queue;
pub mod regular;
pub mod signalfd;
pub mod socket;
pub mod survey;
pub mod timerfd;
pub mod view;

pub use classify::check;
pub use dump::FilesDump;
pub use opener::{Opener, Opening, task_work};
pub use view::{Holder, Outside, Task, View};

use crate::ids::{FdTableId, FileId, PodPid, TaskFd};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use pod_runtime::Result;
use pod_runtime::sys::descriptor;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::os::fd::AsFd;

/// One open file description. Record `FILE`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct File {
    pub state: FileState,
    /// Access mode and status flags (O_APPEND, O_NONBLOCK, O_PATH, …) as F_GETFL gives them.
    pub flags: i32,
    /// The file offset, where the kind has one.
    pub position: u64,
    pub owner: Option<Owner>,
    /// What F_SETSIG set; 0 is SIGIO.
    pub signal: i32,
    /// Locks that belong to the description: flock(2) and OFD locks.
    pub locks: Vec<locks::Lock>,
    /// As the pod sees it: a path, or `pipe:[17]`. For messages only.
    pub name: String,
}

/// What the description refers to. One line a kind; [`opener`] opens them in an order of its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum FileState {
    /// A file or directory with a path, also a deleted one.
    Regular(regular::State),
    /// A pipe or a FIFO.
    Pipe(pipe::State),
    /// The master or the slave of a pseudo-terminal.
    Pty(pty::State),
    Device(device::State),
    Memfd(memfd::State),
    Eventfd(eventfd::State),
    Epoll(epoll::State),
    Timerfd(timerfd::State),
    Signalfd(signalfd::State),
    Inotify(inotify::State),
    Pidfd(pidfd::State),
    MessageQueue(mqueue::State),
    Socket(socket::State),
}

/// Who gets SIGIO (F_SETOWN_EX).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    pub kind: OwnerKind,
    pub id: PodPid,
    /// Real and effective user that set it.
    pub uid: u32,
    pub euid: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum OwnerKind {
    Thread,
    Process,
    Group,
}

/// A descriptor table. Record `FD_TABLE`. The threads of one process share it; processes do
/// not (E-SHARED-TABLE).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct FdTable {
    /// By number.
    pub fds: Vec<Fd>,
    /// POSIX record locks belong to the table, not to the description.
    pub locks: Vec<locks::PosixLock>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fd {
    pub fd: TaskFd,
    pub file: FileId,
    pub close_on_exec: bool,
}

/// All of it, as read from an image.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Files {
    pub files: BTreeMap<FileId, File>,
    pub tables: BTreeMap<FdTableId, FdTable>,
}

/// A session's controlling terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ControllingTerminal {
    /// A slave of the terminal, held by the opener.
    pub file: FileId,
    /// The foreground process group.
    pub foreground: Option<PodPid>,
}

/// Lets this process have as many descriptors as it may.
fn raise_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Has this process's table of descriptors grow now by that many. When several threads have the table, the kernel waits for all
/// CPUs each time that it grows.
fn room_for(more: usize) {
    let Ok(number) = i32::try_from(more.saturating_add(64)) else { return };
    let Ok(any) = descriptor::eventfd(false) else { return };
    // Above the limit it fails, and so will whoever needs the room.
    let _ = descriptor::dup_above(any.as_fd(), number);
}

impl Files {
    /// Sockets whose options are in the record of another one have them after this.
    pub fn share_options(&mut self) -> Result<()> {
        let values = |file: &File| match &file.state {
            FileState::Socket(state) => socket::options(state).map(|options| options.values.clone()),
            _ => None,
        };
        let named = self.files.iter().filter_map(|(id, file)| Some((*id, values(file)?.of()?)));
        let named: Vec<(FileId, FileId)> = named.collect();
        for (id, of) in named {
            let known = self.files.get(&of).and_then(values).filter(|values| values.of().is_none());
            let known =
                known.ok_or_else(|| opener::broken(format!("file {id} has the options of {of}, which has none")))?;
            let Some(FileState::Socket(state)) = self.files.get_mut(&id).map(|file| &mut file.state) else { continue };
            let connected = socket::is_connection(state);
            if let Some(options) = socket::options_mut(state) {
                options.values.take(&known, connected);
            }
        }
        Ok(())
    }

    /// By session leader: the terminal that it must take with `TIOCSCTTY` right after its setsid(2), before it has
    /// children, because they get it by fork only.
    pub fn controlling_terminals(&self) -> BTreeMap<PodPid, ControllingTerminal> {
        let mut terminals = BTreeMap::new();
        for (id, file) in &self.files {
            if let FileState::Pty(state) = &file.state
                && let (pty::End::Slave, Some(session)) = (&state.end, state.session)
            {
                terminals.entry(session).or_insert(ControllingTerminal { file: *id, foreground: state.foreground });
            }
        }
        terminals
    }
}
