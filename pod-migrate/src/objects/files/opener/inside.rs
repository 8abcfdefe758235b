//! The opener's own side: runs in the pod's namespaces as a fork of the monitor, with the image in its memory.

use super::super::socket::unix;
use super::super::view::Holder;
use super::super::{
    File, FileState, Files, OwnerKind, device, epoll, eventfd, inotify, locks, memfd, mqueue, pidfd, pipe, pty,
    raise_limit, regular, room_for, signalfd, socket, timerfd,
};
use super::{Errand, Holding, Memory, Order, Said};
use crate::crew;
use crate::ids::FileId;
use nix::sys::signal::kill;
use nix::unistd::{Pid, Uid, gettid, pause, setresuid};
use pod_runtime::cgroup::Outside;
use pod_runtime::sys::clone::Cloned;
use pod_runtime::sys::daemon;
use pod_runtime::sys::descriptor::{self, AsyncOwner};
use pod_runtime::{Doing, Problem, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};

/// Opens everything, answers, and follows orders until told to finish or until nobody is there any more. `alone`: it was forked
/// by a process of one thread, so it may have several itself.
pub(super) fn run(files: &Files, memory: Memory, outside: Option<Outside>, link: UnixStream, alone: bool) -> i32 {
    // Half of the files of a pod at its limit would not fit under the soft one.
    raise_limit();
    let mut inside = Inside { alone, ..Inside::new(files, memory) };
    let opened = inside.open_all();
    if answer(&link, opened.map(|()| inside.holding())).is_err() {
        return 1;
    }
    let Ok(copy) = link.try_clone() else { return 1 };
    let mut armed = false;
    let mut lines = BufReader::new(copy).lines();
    while let Some(line) = lines.next() {
        let Ok(order) = line.map_err(drop).and_then(|line| serde_json::from_str(&line).map_err(drop)) else { break };
        let done = match order {
            Order::Connect => inside.connect(&mut |errand| {
                say(&link, &Said::Errand(errand.clone()))?;
                let results = lines.next().ok_or(std::io::ErrorKind::UnexpectedEof)??;
                Ok(serde_json::from_str(&results)?)
            }),
            Order::Leave(pid) => {
                let told = match outside.as_ref().map(|outside| outside.succeed(pid.0)) {
                    Some(Ok(Cloned::Child)) => continue,
                    Some(Ok(Cloned::Parent { pidfd, .. })) => wait_for_the_end(&link, &pidfd),
                    // It has to be moved.
                    Some(Err(why)) => answer(&link, Ok(Holding::succeeded_by(Err(why.to_string())))),
                    None => answer(&link, Ok(Holding::default())),
                };
                if told.is_err() {
                    break;
                }
                continue;
            }
            Order::Arm => {
                armed = true;
                Ok(())
            }
            Order::Release => {
                armed = false;
                inside.release()
            }
            Order::Finish => Ok(()),
        };
        // Ten thousand numbers take milliseconds to tell: only where there are new ones.
        let holding = |()| if order == Order::Connect { inside.holding() } else { Holding::default() };
        if answer(&link, done.map(holding)).is_err() || order == Order::Finish {
            break;
        }
    }
    // Whoever gave the orders is gone, at a moment at which the pod may have been decided to run.
    i32::from(armed && inside.release().is_err())
}

impl Holding {
    fn succeeded_by(successor: std::result::Result<i32, String>) -> Holding {
        Holding { successor: Some(successor), ..Holding::default() }
    }
}

/// Says who goes on in the place of this process, which is there until that was taken note of.
fn wait_for_the_end(link: &UnixStream, successor: &OwnedFd) -> ! {
    daemon::end_with_parent();
    if answer(link, Ok(Holding::succeeded_by(Ok(successor.as_raw_fd())))).is_err() {
        daemon::exit_now(1);
    }
    loop {
        pause();
    }
}

fn answer(link: &UnixStream, done: Result<Holding>) -> std::io::Result<()> {
    say(link, &Said::Answer(done.map_err(|problem| problem.report())))
}

fn say(mut link: &UnixStream, said: &Said) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(said)?;
    line.push(b'\n');
    link.write_all(&line)
}

struct Inside<'a> {
    files: &'a Files,
    held: BTreeMap<FileId, OwnedFd>,
    contents: BTreeMap<FileId, OwnedFd>,
    memory: Memory,
    pipes: Vec<(Holder, OwnedFd)>,
    terminals: Vec<(Holder, OwnedFd)>,
    unix: unix::restore::Restored,
    warnings: Vec<String>,
    alone: bool,
}

impl<'a> Inside<'a> {
    fn new(files: &'a Files, memory: Memory) -> Self {
        Inside {
            files,
            held: BTreeMap::new(),
            contents: BTreeMap::new(),
            memory,
            pipes: Vec::new(),
            terminals: Vec::new(),
            unix: unix::restore::Restored::default(),
            warnings: Vec::new(),
            alone: false,
        }
    }

    fn holding(&self) -> Holding {
        let numbers = |fds: &BTreeMap<FileId, OwnedFd>| fds.iter().map(|(id, fd)| (*id, fd.as_raw_fd())).collect();
        let ends = |fds: &[(Holder, OwnedFd)]| fds.iter().map(|(holder, fd)| (*holder, fd.as_raw_fd())).collect();
        Holding {
            files: numbers(&self.held),
            contents: numbers(&self.contents),
            memory: self.memory.iter().map(|(id, fd)| (*id, fd.as_raw_fd())).collect(),
            pipes: ends(&self.pipes),
            terminals: ends(&self.terminals),
            warnings: self.warnings.clone(),
            successor: None,
        }
    }

    /// All that needs no process of the pod.
    fn open_all(&mut self) -> Result<()> {
        let files = self.files;
        let mut pipes: BTreeMap<u64, BTreeMap<FileId, (&pipe::State, &File)>> = BTreeMap::new();
        let mut terminals = BTreeMap::new();
        // Firsts before those that share their inode.
        let (connections, rest): (Vec<_>, Vec<_>) = files.files.iter().partition(|(_, file)| is_connection(file));
        let (first, others): (Vec<_>, Vec<_>) = rest.into_iter().partition(|(_, file)| is_first(file));
        self.open_connections(&connections)?;
        for (id, file) in first.into_iter().chain(others) {
            match &file.state {
                FileState::Pipe(state) => {
                    pipes.entry(state.pipe).or_default().insert(*id, (state, file));
                }
                FileState::Pty(state) => {
                    terminals.insert(*id, (state, file));
                }
                _ => self.open(*id, file).doing(|| format!("restore {}", file.name))?,
            }
        }
        mqueue::remove(files.files.values().filter_map(|file| match &file.state {
            FileState::MessageQueue(state) => Some(state),
            _ => None,
        }))?;
        for ends in pipes.values() {
            let restored = pipe::restore(ends)?;
            self.pipes.extend(restored.external);
            self.held.extend(restored.ends);
        }
        let restored = pty::restore(&terminals)?;
        self.terminals.extend(restored.external);
        self.held.extend(restored.ends);
        for (id, file) in &files.files {
            let Some(fd) = self.held.get(id) else { continue };
            set_flags(file, fd)?;
            for lock in file.locks.iter().filter(|lock| lock.kind != locks::LockKind::Lease) {
                locks::restore(lock, fd.as_fd()).doing(|| format!("lock {}", file.name))?;
            }
        }
        Ok(())
    }

    /// Established connections, by all CPUs: they are of a kind of which many are open, and none needs another file. Their order
    /// to listeners of the same port does not matter either.
    fn open_connections(&mut self, connections: &[(&FileId, &File)]) -> Result<()> {
        // Their numbers are above those by which epolls know them, which then need not be put aside one by one.
        let above = self.files.tables.values().filter_map(|table| table.fds.last()).map(|fd| fd.fd.0).max();
        let above = above.unwrap_or(0).saturating_add(1);
        room_for(connections.len() + above as usize);
        let restored = self.share(connections.len(), |at| {
            let (_, file) = connections[at];
            let FileState::Socket(state) = &file.state else {
                return Err(Problem::new("E-INTERNAL", "a connection that is no socket"));
            };
            let fd = socket::restore(state).doing(|| format!("restore {}", file.name))?;
            Ok(descriptor::dup_above(fd.as_fd(), above).unwrap_or(fd))
        });
        for ((id, _), fd) in connections.iter().zip(restored) {
            self.held.insert(**id, fd?);
        }
        Ok(())
    }

    fn share<T: Send>(&self, count: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
        if self.alone { share(count, work) } else { (0..count).map(work).collect() }
    }

    fn open(&mut self, id: FileId, file: &File) -> Result<()> {
        let (fd, contents) = match &file.state {
            // Need processes: see `connect`.
            FileState::Regular(regular::State { existence: regular::Existence::Proc, .. }) | FileState::Pidfd(_) => {
                return Ok(());
            }
            FileState::Regular(state) => regular::restore(state, file, |inode| self.number_of_inode(inode))?,
            FileState::Memfd(state) => memfd::restore(state, file, |inode| self.number_of_inode(inode))?,
            FileState::Device(state) => (device::restore(state, file)?, None),
            FileState::Eventfd(state) => (eventfd::restore(state)?, None),
            FileState::Epoll(_) => (epoll::restore()?, None),
            FileState::Timerfd(state) => (timerfd::restore(state)?, None),
            FileState::MessageQueue(state) => (mqueue::restore(state, file)?, None),
            FileState::Signalfd(state) => (signalfd::restore(state)?, None),
            FileState::Inotify(_) => (inotify::restore()?, None),
            FileState::Socket(socket::State::Unix(_)) => return Ok(()),
            FileState::Socket(state) => (socket::restore(state)?, None),
            FileState::Pipe(_) | FileState::Pty(_) => return Ok(()),
        };
        self.held.insert(id, fd);
        self.contents.extend(contents.map(|fd| (id, fd)));
        Ok(())
    }

    fn unix_sockets(&self) -> unix::restore::All<'a> {
        let sockets = self.files.files.iter().filter_map(|(id, file)| match &file.state {
            FileState::Socket(socket::State::Unix(state)) => Some((*id, state)),
            _ => None,
        });
        sockets.collect()
    }

    /// The first description of a shared inode.
    fn number_of_inode(&self, inode: u64) -> Option<i32> {
        let is_it = |file: &File| is_first(file) && inode_of(file) == Some(inode);
        let (id, _) = self.files.files.iter().find(|(_, file)| is_it(file))?;
        self.held.get(id).map(|fd| fd.as_raw_fd())
    }

    /// All processes exist.
    fn connect(&mut self, ask: &mut dyn FnMut(&Errand) -> std::io::Result<Option<Vec<i64>>>) -> Result<()> {
        let files = self.files;
        self.unix = unix::restore::open(&self.unix_sockets(), &mut unix::doer::Doer::new(ask))?;
        for (id, fd) in std::mem::take(&mut self.unix.ends) {
            set_flags(&files.files[&id], &fd)?;
            self.held.insert(id, fd);
        }
        for (id, file) in &files.files {
            let doing = || format!("restore {}", file.name);
            let fd = match &file.state {
                FileState::Regular(state) if state.existence == regular::Existence::Proc => {
                    regular::restore(state, file, |_| None).doing(doing)?.0
                }
                FileState::Pidfd(state) => pidfd::restore(state).doing(doing)?,
                _ => continue,
            };
            set_flags(file, &fd)?;
            self.held.insert(*id, fd);
        }
        let held = &self.held;
        for (id, file) in &files.files {
            let Some(fd) = held.get(id) else { continue };
            if let FileState::Epoll(state) = &file.state {
                let by_itself = |target: &epoll::Target| epoll::registers_itself(files, *id, target).is_some();
                epoll::register(state, fd.as_fd(), |id| held.get(&id).map(|fd| fd.as_fd()), by_itself)
                    .doing(|| format!("restore {}", file.name))?;
            }
        }
        let mut sockets = std::mem::take(&mut self.unix);
        unix::restore::connect(&self.unix_sockets(), &mut sockets, &|id| self.held.get(&id).map(|fd| fd.as_fd()))?;
        for (id, file) in &files.files {
            let Some(fd) = held.get(id) else { continue };
            set_owner(file, fd).doing(|| format!("set who gets the signals of {}", file.name))?;
            for lock in file.locks.iter().filter(|lock| lock.kind == locks::LockKind::Lease) {
                locks::restore(lock, fd.as_fd()).doing(|| format!("lease {}", file.name))?;
            }
        }
        for (id, file) in &files.files {
            if let (FileState::Inotify(state), Some(fd)) = (&file.state, held.get(id)) {
                inotify::watch(state, fd.as_fd(), |id| held.get(&id).map(|fd| fd.as_fd()))
                    .doing(|| format!("restore {}", file.name))?;
            }
        }
        Ok(())
    }

    fn release(&mut self) -> Result<()> {
        let held = &self.held;
        let quiet = |file: &File| matches!(&file.state, FileState::Socket(state) if socket::is_quiet(state));
        // Those that say nothing yet first, so that both ends listen where one of them speaks to the other.
        let (first, others): (Vec<_>, Vec<_>) = self.files.files.iter().partition(|(_, file)| quiet(file));
        let released = self.share(first.len(), |at| match (&first[at].1.state, held.get(first[at].0)) {
            (FileState::Socket(state), Some(fd)) => socket::release(state, fd.as_fd()),
            _ => Ok(()),
        });
        released.into_iter().collect::<Result<()>>()?;
        for (id, file) in others {
            let Some(fd) = self.held.get(id) else { continue };
            match &file.state {
                FileState::Memfd(state) if state.first => memfd::seal(state, fd.as_fd())?,
                FileState::Socket(state) => socket::release(state, fd.as_fd())?,
                // Writing the contents has changed its times.
                FileState::Regular(state) if self.contents.contains_key(id) => {
                    regular::set_times(state, fd.as_fd()).doing(|| format!("set the times of {}", file.name))?;
                }
                _ => {}
            }
        }
        self.contents.clear();
        Ok(())
    }
}

/// Work for all CPUs. A thread has a number in the pod that one of its processes may want next, so all of them are gone when this
/// returns.
pub(super) fn share<T: Send>(count: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let threads = Mutex::new(BTreeSet::new());
    let done = crew::share(count, |at| {
        threads.lock().unwrap_or_else(PoisonError::into_inner).insert(gettid().as_raw());
        work(at)
    });
    let threads = threads.into_inner().unwrap_or_else(PoisonError::into_inner);
    for thread in threads.into_iter().filter(|thread| *thread != gettid().as_raw()) {
        while kill(Pid::from_raw(thread), None).is_ok() {
            std::thread::yield_now();
        }
    }
    done
}

fn is_connection(file: &File) -> bool {
    matches!(&file.state, FileState::Socket(state) if socket::is_connection(state))
}

fn inode_of(file: &File) -> Option<u64> {
    match &file.state {
        FileState::Memfd(state) => Some(state.inode),
        FileState::Regular(regular::State { existence: regular::Existence::Deleted(deleted), .. }) => {
            Some(deleted.inode)
        }
        _ => None,
    }
}

/// Not to be opened through another description.
fn is_first(file: &File) -> bool {
    match &file.state {
        FileState::Memfd(state) => state.first,
        FileState::Regular(regular::State { existence: regular::Existence::Deleted(deleted), .. }) => deleted.first,
        _ => true,
    }
}

/// The status flags that can be set after opening, but for O_ASYNC, which needs an owner first.
fn set_flags(file: &File, fd: &OwnedFd) -> Result<()> {
    if file.flags & libc::O_PATH != 0 {
        return Ok(());
    }
    let flags = file.flags & (libc::O_APPEND | libc::O_NONBLOCK | libc::O_DIRECT | libc::O_NOATIME);
    let now = descriptor::status_flags(fd.as_fd()).doing(|| format!("read the flags of {}", file.name))?;
    if now & (libc::O_APPEND | libc::O_NONBLOCK | libc::O_DIRECT | libc::O_NOATIME) == flags {
        return Ok(());
    }
    descriptor::set_status_flags(fd.as_fd(), flags).doing(|| format!("set the flags of {}", file.name))
}

/// The kernel notes who set an owner and lets signals through by that: so it is set as that user.
fn set_owner(file: &File, fd: &OwnedFd) -> std::io::Result<()> {
    if file.flags & libc::O_PATH != 0 {
        return Ok(());
    }
    if file.signal != 0 {
        descriptor::set_async_signal(fd.as_fd(), file.signal)?;
    }
    if let Some(owner) = file.owner {
        let kind = match owner.kind {
            OwnerKind::Thread => 0,
            OwnerKind::Process => 1,
            OwnerKind::Group => 2,
        };
        setresuid(Uid::from_raw(owner.uid), Uid::from_raw(owner.euid), Uid::from_raw(0))?;
        let set = descriptor::set_async_owner(fd.as_fd(), AsyncOwner { kind, pid: owner.id.0 });
        setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0))?;
        match set {
            // The owner ended before; nobody gets the signals, as before.
            Err(nix::errno::Errno::ESRCH) => {}
            other => other?,
        }
    }
    if file.flags & libc::O_ASYNC != 0 {
        let now = descriptor::status_flags(fd.as_fd())?;
        descriptor::set_status_flags(fd.as_fd(), now | libc::O_ASYNC)?;
    }
    Ok(())
}
