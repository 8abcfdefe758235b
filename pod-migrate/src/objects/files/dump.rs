//! The walk over all descriptor tables.
//!
//! Each descriptor is copied into this process (pidfd_getfd), told apart from those already seen by kcmp(2), and dumped
//! by its kind once. References that need the whole picture (epoll targets, terminals, queues of sockets) are resolved
//! in [`FilesDump::finish`].

mod finish;

use super::classify::{Class, Look, classify};
use super::socket::tcp::summary::Groups;
use super::survey::{self, Seen, Survey};
use super::{
    Fd, FdTable, File, FileState, Owner, OwnerKind, Task, View, device, epoll, eventfd, inotify, locks, memfd, mqueue,
    pidfd, pipe, pty, raise_limit, regular, signalfd, socket, timerfd,
};
use crate::crew;
use crate::freeze::Standstill;
use crate::ids::{FdTableId, FileId, HostPid, PodPid, TaskFd};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::sys::stat::fstat;
use pod_runtime::proc::fdinfo::{self, FdInfo};
use pod_runtime::sys::kcmp::{self, Shared};
use pod_runtime::sys::{descriptor, pidfd as sys_pidfd};
use pod_runtime::{Doing, Problem, Result};
use serde_bytes::ByteBuf;
use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

/// Collects the files of a frozen pod.
#[derive(Debug)]
pub struct FilesDump<'v> {
    pub(super) view: &'v View,
    /// What is not kept exactly, a line each.
    pub(super) warnings: Vec<String>,
    /// By id less one.
    entries: Vec<Entry>,
    by_inode: HashMap<(u64, u64), Alike>,
    /// By the address of the kernel's struct, where it is known.
    by_identity: HashMap<u64, FileId>,
    one_by_one: bool,
    standstill: Option<Standstill>,
    /// References without a descriptor, by inode and access: these share one description.
    by_path: HashMap<(u64, u64, i32), FileId>,
    /// Inodes that several descriptions share: the number each has in the image.
    shared: HashMap<(u64, u64), u64>,
    /// Seen tables in the order of kcmp.
    tables: Vec<(HostPid, FdTableId)>,
    records: BTreeMap<FdTableId, FdTable>,
    unsure: BTreeMap<FdTableId, Vec<TaskFd>>,
    contents: Vec<Contents>,
    removed_queues: Vec<(Vec<u8>, OwnedFd)>,
    terminals: BTreeMap<u32, Terminal>,
    /// Process groups by their number on this host.
    groups: HashMap<i32, PodPid>,
    pub(super) unix_sockets: socket::unix::Sockets,
    /// None until a socket asks for it; `Some(None)` where there is none.
    diag: Option<Option<socket::diag::Diag>>,
}

#[derive(Debug)]
struct Entry {
    fd: Rc<OwnedFd>,
    subject: String,
    /// None while its kind is being dumped.
    file: Option<File>,
    inode: u64,
}

/// Descriptions of one inode: indices into `entries`.
#[derive(Debug, Default)]
struct Alike {
    /// In the order of kcmp.
    sorted: Vec<usize>,
    /// Known by their identity, so they need not be compared before one comes that is not.
    known: Vec<usize>,
}

/// What is known of one pty while the walk goes on.
#[derive(Debug, Default)]
struct Terminal {
    master: Option<usize>,
    slave: Option<usize>,
    session: Option<PodPid>,
    /// On this host.
    foreground: Option<i32>,
}

/// Contents that are too large for a record: sent as raw bytes of `Owner::File`, by offset.
#[derive(Debug)]
pub struct Contents {
    pub file: FileId,
    pub fd: OwnedFd,
    pub bytes: u64,
}

/// What is left when all records are written.
#[derive(Debug)]
pub struct Rest {
    pub contents: Vec<Contents>,
    /// POSIX message queues that have no name, and the names that they are to have.
    pub removed_queues: Vec<(Vec<u8>, OwnedFd)>,
    /// The other ends of the TCP connections that are established. (To ask the kernel for them would be to walk its table of all connections
    /// of the host, which takes milliseconds even when it is empty.)
    pub peers: Vec<IpAddr>,
    /// What is not kept exactly, a line each.
    pub warnings: Vec<String>,
}

impl<'v> FilesDump<'v> {
    /// Raises this process's limit of descriptors: it holds a copy of every open file of the pod.
    pub fn new(view: &'v View) -> Self {
        raise_limit();
        FilesDump {
            view,
            warnings: Vec::new(),
            entries: Vec::new(),
            by_inode: HashMap::new(),
            by_identity: HashMap::new(),
            one_by_one: false,
            standstill: None,
            by_path: HashMap::new(),
            shared: HashMap::new(),
            tables: Vec::new(),
            records: BTreeMap::new(),
            unsure: BTreeMap::new(),
            contents: Vec::new(),
            removed_queues: Vec::new(),
            terminals: BTreeMap::new(),
            groups: HashMap::new(),
            unix_sockets: socket::unix::Sockets::default(),
            diag: None,
        }
    }

    /// As where the kernel does not tell of all descriptors of a task at once.
    pub fn one_by_one(self) -> Self {
        FilesDump { one_by_one: true, ..self }
    }

    /// What remains until timers expire is counted from then.
    pub fn since(self, standstill: Option<Standstill>) -> Self {
        FilesDump { standstill, ..self }
    }

    /// The descriptor table of this task; tasks that share a table get the same id.
    pub fn table(&mut self, task: Task<'_>) -> Result<FdTableId> {
        let doing = || format!("read the descriptors of pid {} ({})", task.pid, task.comm);
        self.terminal_of(task);
        let place = search(&self.tables, |(host, _)| kcmp::compare(task.host.0, host.0, Shared::DescriptorTable))
            .doing(doing)?;
        let place = match place {
            Ok(found) => return Ok(self.tables[found].1),
            Err(place) => place,
        };
        let id = FdTableId(self.tables.len() as u64 + 1);
        self.tables.insert(place, (task.host, id));
        let mut table = FdTable::default();
        match seen(task.host).filter(|_| !self.one_by_one) {
            Some(all) => {
                let mut connections = self.connections(task, &all);
                for seen in all {
                    let connection = connections.remove(&seen.identity);
                    self.seen(task, seen, connection, &mut table)?;
                }
            }
            None => {
                for number in numbers(task.host).doing(doing)? {
                    self.descriptor(task, id, number, &mut table)?;
                }
            }
        }
        self.records.insert(id, table);
        Ok(id)
    }

    /// What lists the sockets of the pod's network; `fd` is one of them. None where the kernel has no such thing.
    pub(super) fn diag(&mut self, fd: BorrowedFd<'_>) -> Option<&socket::diag::Diag> {
        let open = || {
            let opened = socket::diag::Diag::of(fd);
            opened.inspect_err(|error| tracing::debug!(%error, "sock_diag cannot be opened")).ok()
        };
        self.diag.get_or_insert_with(open).as_ref()
    }

    /// Descriptors of which only the task itself can tell whether they are closed by exec. Asked once.
    pub fn unsure(&mut self, id: FdTableId) -> Vec<TaskFd> {
        self.unsure.remove(&id).unwrap_or_default()
    }

    /// Unix sockets of a table of which only a task of the pod can tell whom they tell of as their peer (SO_PEERCRED): it
    /// may have ended, and then its pid means nothing on this host. Each is asked about once.
    pub fn peers_to_ask(&self, id: FdTableId) -> Vec<(TaskFd, FileId)> {
        let Some(table) = self.records.get(&id) else { return Vec::new() };
        let unknown = |file: FileId| {
            let file = self.entries.get(file.0 as usize - 1)?.file.as_ref()?;
            let FileState::Socket(socket::State::Unix(state)) = &file.state else { return None };
            (state.peer_pid == 0 && state.peer_credentials.is_some()).then_some(())
        };
        let mut asked: Vec<(TaskFd, FileId)> = table.fds.iter().map(|fd| (fd.fd, fd.file)).collect();
        asked.retain(|(_, file)| unknown(*file).is_some());
        asked.dedup_by_key(|(_, file)| *file);
        asked
    }

    /// What the task told.
    pub fn peer(&mut self, file: FileId, pid: i32) {
        let file = self.entries.get_mut(file.0 as usize - 1).and_then(|entry| entry.file.as_mut());
        if let Some(File { state: FileState::Socket(socket::State::Unix(state)), .. }) = file {
            state.peer_pid = pid;
        }
    }

    /// What the task told of one of them.
    pub fn close_on_exec(&mut self, id: FdTableId, number: TaskFd, close: bool) {
        let table = self.records.get_mut(&id);
        let Some(FdTable { fds, .. }) = table else { return };
        if let Ok(at) = fds.binary_search_by_key(&number, |fd| fd.fd) {
            fds[at].close_on_exec = close;
        }
    }

    fn descriptor(&mut self, task: Task<'_>, id: FdTableId, number: i32, table: &mut FdTable) -> Result<()> {
        let subject = format!("pid {} ({}), fd {number}", task.pid, task.comm);
        let fd = sys_pidfd::get_fd(task.pidfd, number).doing(|| format!("{subject}: copy it"))?;
        let info = info(task, number)?;
        // fdinfo(5) shows the flag also when the file was once opened with it and this descriptor of it is another.
        let close_on_exec = info.flags & libc::O_CLOEXEC != 0;
        if close_on_exec
            && fcntl(&fd, FcntlArg::F_GETFL).doing(|| format!("{subject}: read its flags"))? & libc::O_CLOEXEC != 0
        {
            self.unsure.entry(id).or_default().push(TaskFd(number));
        }
        table.locks.extend(locks::of_table(TaskFd(number), &info));
        let file = self.add(fd, &subject, Some(info))?;
        table.fds.push(Fd { fd: TaskFd(number), file, close_on_exec });
        Ok(())
    }

    /// The same of one that was told of with all others.
    fn seen(
        &mut self,
        task: Task<'_>,
        mut seen: Seen,
        connection: Option<Connection>,
        table: &mut FdTable,
    ) -> Result<()> {
        let Seen { number, identity, close_on_exec, .. } = seen;
        let mut look = seen.info.take();
        if look.is_none() {
            let more = info(task, number)?;
            table.locks.extend(locks::of_table(TaskFd(number), &more));
            look = Some(more);
        }
        let file = match self.by_identity.get(&identity) {
            Some(file) => *file,
            None => {
                let subject = format!("pid {} ({}), fd {number}", task.pid, task.comm);
                let (fd, tcp) = match connection {
                    Some(Connection { fd, read }) => (fd, Some(read)),
                    None => (sys_pidfd::get_fd(task.pidfd, number).doing(|| format!("{subject}: copy it"))?, None),
                };
                seen.info = look;
                self.add_seen(fd, &subject, seen, tcp)?
            }
        };
        table.fds.push(Fd { fd: TaskFd(number), file, close_on_exec });
        Ok(())
    }

    /// The TCP sockets among these that are new, read by all CPUs. What cannot be read so is left to be read by itself.
    fn connections(&self, task: Task<'_>, all: &[Seen]) -> HashMap<u64, Connection> {
        let Some(plan) = Survey::get().and_then(Survey::plan) else { return HashMap::new() };
        let mut new: HashMap<u64, &Seen> = HashMap::new();
        for seen in all.iter().filter(|seen| seen.summary.is_some() && !self.by_identity.contains_key(&seen.identity)) {
            new.entry(seen.identity).or_insert(seen);
        }
        let mut new: Vec<&Seen> = new.into_values().collect();
        new.sort_unstable_by_key(|seen| seen.number);
        let groups = Groups::new(plan);
        let read = |index: usize| {
            let seen: &Seen = new[index];
            let subject = format!("pid {} ({}), fd {}", task.pid, task.comm, seen.number);
            let fd = sys_pidfd::get_fd(task.pidfd, seen.number).ok()?;
            let read = socket::tcp::dump_of_many(fd.as_fd(), &subject, &groups, seen.summary.as_ref()?).ok()?;
            Some((seen.identity, Connection { fd, read }))
        };
        let connections = crew::share(new.len(), read).into_iter().flatten().collect();
        if groups.wrong() { HashMap::new() } else { connections }
    }

    /// A file that a task refers to without a descriptor: cwd, root, exe, a mapped file. `fd` is opened through
    /// /proc (`/proc/PID/cwd`, `/proc/PID/map_files/…`) with the access that the restored one needs; O_PATH for
    /// directories.
    pub fn path(&mut self, fd: OwnedFd, used_as: &str) -> Result<FileId> {
        let stat = fstat(&fd).doing(|| format!("stat a {used_as}"))?;
        let flags = descriptor::status_flags(fd.as_fd()).doing(|| format!("read the flags of a {used_as}"))?;
        let key = (stat.st_dev, stat.st_ino, flags & (libc::O_ACCMODE | libc::O_PATH));
        if let Some(id) = self.by_path.get(&key) {
            return Ok(*id);
        }
        let look = Look::with(fd.as_fd(), stat, None).doing(|| used_as.to_owned())?;
        let id = self.insert(fd, look, used_as, None)?;
        self.by_path.insert(key, id);
        Ok(id)
    }

    /// The id of a description of which we hold a copy, dumping it when it is new. `info` is what the fdinfo of one of its
    /// descriptors says, if that was read.
    pub(super) fn add(&mut self, fd: OwnedFd, subject: &str, info: Option<FdInfo>) -> Result<FileId> {
        let stat = fstat(&fd).doing(|| format!("{subject}: stat"))?;
        let place = self.place(&fd, (stat.st_dev, stat.st_ino)).doing(|| format!("{subject}: compare it"))?;
        match place {
            Ok(found) => Ok(FileId(found as u64 + 1)),
            Err(place) => {
                let index = self.entries.len();
                self.by_inode.entry((stat.st_dev, stat.st_ino)).or_default().sorted.insert(place, index);
                let look = Look::with(fd.as_fd(), stat, info).doing(|| subject.to_owned())?;
                self.insert(fd, look, subject, None)
            }
        }
    }

    /// The index of a description among those of its inode, or where it belongs in the order of kcmp.
    fn place(&mut self, fd: &OwnedFd, inode: (u64, u64)) -> nix::Result<std::result::Result<usize, usize>> {
        let Some(alike) = self.by_inode.get_mut(&inode) else { return Ok(Err(0)) };
        let entries = &self.entries;
        let me = std::process::id() as i32;
        let search = |sorted: &[usize], fd: BorrowedFd<'_>| {
            search(sorted, |index| kcmp::compare_files(me, fd, entries[*index].fd.as_fd()))
        };
        for index in std::mem::take(&mut alike.known) {
            if let Err(place) = search(&alike.sorted, entries[index].fd.as_fd())? {
                alike.sorted.insert(place, index);
            }
        }
        Ok(search(&alike.sorted, fd.as_fd())?.map(|found| alike.sorted[found]))
    }

    /// The same of one whose identity is known, and is new. Another table may have it, that could not be told of so.
    fn add_seen(&mut self, fd: OwnedFd, subject: &str, seen: Seen, tcp: Option<socket::tcp::Read>) -> Result<FileId> {
        let identity = seen.identity;
        let stat = match &seen.plain {
            Some((stat, _)) => *stat,
            None => fstat(&fd).doing(|| format!("{subject}: stat"))?,
        };
        let inode = (stat.st_dev, stat.st_ino);
        let file = if self.by_inode.get(&inode).is_some_and(|alike| !alike.sorted.is_empty()) {
            // What was told apart from it is not in its info.
            self.add(fd, subject, seen.info.filter(|_| seen.eventfd.is_none()))?
        } else {
            self.by_inode.entry(inode).or_default().known.push(self.entries.len());
            let Seen { plain, info, flags, unowned, eventfd, .. } = seen;
            let look = match (plain, info) {
                (Some((stat, link)), Some(info)) => Look { stat, link, flags, info },
                (_, info) => Look::with(fd.as_fd(), stat, info).doing(|| subject.to_owned())?,
            };
            self.insert(fd, look, subject, Some(Told { unowned, eventfd, tcp }))?
        };
        self.by_identity.insert(identity, file);
        Ok(file)
    }

    fn insert(&mut self, fd: OwnedFd, look: Look, subject: &str, told: Option<Told>) -> Result<FileId> {
        let index = self.entries.len();
        let fd = Rc::new(fd);
        self.entries.push(Entry { fd: fd.clone(), subject: subject.to_owned(), file: None, inode: look.stat.st_ino });
        let file = self.describe(index, &fd, look, subject, told)?;
        self.entries[index].file = Some(file);
        Ok(FileId(index as u64 + 1))
    }

    fn describe(&mut self, index: usize, fd: &OwnedFd, look: Look, subject: &str, told: Option<Told>) -> Result<File> {
        let Told { unowned, eventfd, tcp } = told.unwrap_or_default();
        let class = classify(fd.as_fd(), &look, subject)?;
        let state = match (eventfd, tcp) {
            (Some(state), _) => FileState::Eventfd(state),
            (_, Some(read)) => {
                let mut context = socket::DumpContext { inode: look.stat.st_ino, subject, files: self };
                FileState::Socket(socket::dumped(fd.as_fd(), read, &mut context))
            }
            _ => self.state(index, class, fd.as_fd(), &look, subject)?,
        };
        let path_only = look.is_path_only();
        let position = match class {
            Class::Regular | Class::Memfd if !path_only => look.info.position,
            _ => 0,
        };
        let (owner, signal) = if path_only || unowned { (None, 0) } else { self.owner(fd.as_fd(), subject)? };
        if owner.is_some() && look.format() == libc::S_IFDIR {
            // The kernel sets one for F_NOTIFY, and nobody else does for a directory.
            let what = "directory notifications (F_NOTIFY) are not kept";
            self.warnings.push(format!("{subject}: {what}: {}", look.name()));
        }
        Ok(File {
            state,
            flags: look.flags,
            position,
            owner,
            signal,
            locks: locks::of_description(&look.info),
            name: look.name(),
        })
    }

    fn state(
        &mut self,
        index: usize,
        class: Class,
        fd: BorrowedFd<'_>,
        look: &Look,
        subject: &str,
    ) -> Result<FileState> {
        let key = (look.stat.st_dev, look.stat.st_ino);
        Ok(match class {
            Class::Regular => {
                let view = self.view;
                let dumped = regular::dump(fd, look, view, subject, || self.number(key))?;
                self.warnings.extend(dumped.warning);
                self.raw(index, dumped.raw);
                FileState::Regular(dumped.state)
            }
            Class::Namespace => FileState::Regular(self.namespace(look, subject)?),
            Class::Pipe => {
                let external = self.view.outside.pipes.get(&look.stat.st_ino).copied();
                FileState::Pipe(pipe::dump(fd, look, self.number(key), external)?)
            }
            Class::PtyMaster => FileState::Pty(self.terminal(index, fd, pty::End::Master)),
            Class::PtySlave => FileState::Pty(self.terminal(index, fd, pty::End::Slave)),
            Class::Device => FileState::Device(device::dump(look)),
            Class::Memfd => {
                let (state, raw) = memfd::dump(fd, look, self.number(key))?;
                self.raw(index, raw);
                FileState::Memfd(state)
            }
            Class::Eventfd => FileState::Eventfd(eventfd::dump(&look.info).doing(|| subject.to_owned())?),
            // The targets follow in `finish`, when all files are known.
            Class::Epoll => FileState::Epoll(epoll::State { targets: Vec::new() }),
            Class::Timerfd => {
                FileState::Timerfd(timerfd::dump(&look.info, self.standstill).doing(|| subject.to_owned())?)
            }
            Class::Signalfd => FileState::Signalfd(signalfd::dump(&look.info).doing(|| subject.to_owned())?),
            // The watches too: a file without a name can only be told when all that are open are known.
            Class::Inotify => FileState::Inotify(inotify::State::default()),
            Class::MessageQueue => FileState::MessageQueue(self.message_queue(fd, look, subject)?),
            Class::Pidfd => FileState::Pidfd(pidfd::dump(&look.info, look.flags, subject, self.view.depth)?),
            Class::Socket => {
                let mut context = socket::DumpContext { inode: look.stat.st_ino, subject, files: self };
                FileState::Socket(socket::dump(fd, &mut context)?)
            }
        })
    }

    /// The number that an inode has in the image, and whether it is new.
    fn number(&mut self, key: (u64, u64)) -> (u64, bool) {
        let next = self.shared.len() as u64 + 1;
        let number = *self.shared.entry(key).or_insert(next);
        (number, number == next)
    }

    fn raw(&mut self, index: usize, raw: Option<(OwnedFd, u64)>) {
        self.contents.extend(raw.map(|(fd, bytes)| Contents { file: FileId(index as u64 + 1), fd, bytes }));
    }

    /// Removed ones are handed on to whoever keeps the contents of all.
    fn message_queue(&mut self, fd: BorrowedFd<'_>, look: &Look, subject: &str) -> Result<mqueue::State> {
        let (number, first) = self.number((look.stat.st_dev, look.stat.st_ino));
        let state = mqueue::dump(fd, &look.link, number, subject)?;
        if state.removed && first {
            let queue = fd.try_clone_to_owned().doing(|| "copy a descriptor".into())?;
            self.removed_queues.push((state.name.to_vec(), queue));
        }
        Ok(state)
    }

    /// One of the pod's own namespaces can be opened again by its path.
    fn namespace(&self, look: &Look, subject: &str) -> Result<regular::State> {
        let name = look.name();
        let kind = name.split_once(':').map_or("", |(kind, _)| kind);
        let own = std::fs::read_link(format!("/proc/{}/ns/{kind}", self.view.init));
        if !own.is_ok_and(|own| own.to_string_lossy() == name) {
            let what = format!("{subject}: {name} is a namespace that the pod made inside");
            return Err(Problem::new("E-FILE-NAMESPACE", what));
        }
        Ok(regular::State {
            path: ByteBuf::from(format!("/proc/1/ns/{kind}").into_bytes()),
            mode: look.stat.st_mode,
            bytes: 0,
            existence: regular::Existence::Proc,
            to_read: None,
            write_hint: 0,
        })
    }

    /// F_SETOWN and F_SETSIG.
    fn owner(&self, fd: BorrowedFd<'_>, subject: &str) -> Result<(Option<Owner>, i32)> {
        let doing = || format!("{subject}: read who gets its signals");
        let signal = descriptor::async_signal(fd).doing(doing)?;
        let owner = descriptor::async_owner(fd).doing(doing)?;
        if owner.pid == 0 {
            return Ok((None, signal));
        }
        let kind = match owner.kind {
            0 => OwnerKind::Thread,
            1 => OwnerKind::Process,
            _ => OwnerKind::Group,
        };
        let Some(id) = self.view.any_pid_in_pod(owner.pid, kind == OwnerKind::Group) else { return Ok((None, signal)) };
        let (uid, euid) = descriptor::async_owner_uids(fd).unwrap_or((0, 0));
        Ok((Some(Owner { kind, id, uid, euid }), signal))
    }

    /// Notes an end of a pty; what both ends share follows in `finish`.
    fn terminal(&mut self, index: usize, fd: BorrowedFd<'_>, end: pty::End) -> pty::State {
        let number = pty::index(fd, end);
        let hung_up = number.is_none() || descriptor::termios(fd).is_err();
        let number = number.unwrap_or(u32::MAX);
        let mut state = pty::State { end, index: number, external: None, session: None, foreground: None, pair: None };
        if hung_up {
            state.pair = pty::dump_pair(None, Some(fd)).ok();
            return state;
        }
        let terminal = self.terminals.entry(number).or_default();
        match end {
            pty::End::Master => terminal.master.get_or_insert(index),
            pty::End::Slave => terminal.slave.get_or_insert(index),
        };
        state
    }

    /// Notes which terminal controls the session of this task.
    fn terminal_of(&mut self, task: Task<'_>) {
        let (stat, status) = (task.stat, task.status);
        let depth = self.view.depth;
        if let Some(group) = status.ns_group.get(depth) {
            self.groups.insert(stat.group, PodPid(*group));
        }
        let Some(index) = pty::index_of_number(stat.terminal) else { return };
        let terminal = self.terminals.entry(index).or_default();
        terminal.session = status.ns_session.get(depth).map(|session| PodPid(*session));
        terminal.foreground = Some(stat.terminal_group);
    }
}

/// What a survey told of a description besides its look.
#[derive(Debug, Default)]
struct Told {
    unowned: bool,
    eventfd: Option<eventfd::State>,
    tcp: Option<socket::tcp::Read>,
}

/// A TCP socket that was read with others.
struct Connection {
    fd: OwnedFd,
    read: socket::tcp::Read,
}

/// All descriptors of a task, where it has so many that it pays to ask for them at once and the kernel tells.
fn seen(task: HostPid) -> Option<Vec<Seen>> {
    let count = Some(survey::count(task.0)).filter(|count| *count >= survey::MANY)?;
    let seen = Survey::get()?.of(task.0);
    let seen = seen.inspect_err(|error| tracing::debug!(%error, "the descriptors of {task} are asked for one by one"));
    // None may be left out.
    seen.ok().filter(|seen| seen.len() == count)
}

/// Their numbers.
fn numbers(task: HostPid) -> std::io::Result<Vec<i32>> {
    let entries = std::fs::read_dir(format!("/proc/{task}/fd"))?;
    let mut numbers: Vec<i32> = entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok()).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

fn info(task: Task<'_>, number: i32) -> Result<FdInfo> {
    let path = format!("/proc/{}/fdinfo/{number}", task.host);
    let text = pod_runtime::proc::bytes(&path).doing(|| format!("read {path}"))?;
    Ok(fdinfo::parse(&String::from_utf8_lossy(&text)))
}

/// Binary search with an order that can fail.
fn search<T>(
    sorted: &[T],
    order: impl Fn(&T) -> nix::Result<Ordering>,
) -> nix::Result<std::result::Result<usize, usize>> {
    let (mut low, mut high) = (0, sorted.len());
    while low < high {
        let middle = low + (high - low) / 2;
        match order(&sorted[middle])? {
            Ordering::Equal => return Ok(Ok(middle)),
            Ordering::Less => high = middle,
            Ordering::Greater => low = middle + 1,
        }
    }
    Ok(Err(low))
}

/// The other end of an established connection.
fn peer(file: &File) -> Option<IpAddr> {
    let FileState::Socket(socket::State::Tcp(state)) = &file.state else { return None };
    let socket::tcp::Phase::Connected(connection) = &state.phase else { return None };
    (!connection.received_fin && !connection.sent_fin).then_some(connection.peer.ip)
}
