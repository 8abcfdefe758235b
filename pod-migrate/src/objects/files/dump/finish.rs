//! The end of the walk: references that need the whole picture, and the records.

use super::{Entry, FilesDump, Rest, peer};
use crate::ids::{FileId, TaskFd};
use crate::image::{Kind, Writer};
use crate::objects::files::classify::Look;
use crate::objects::files::{File, FileState, epoll, inotify, pipe, pty, regular, socket};
use pod_runtime::proc::fdinfo;
use pod_runtime::sys::descriptor;
use pod_runtime::{Doing, Problem, Result};
use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::os::fd::AsFd;

impl FilesDump<'_> {
    /// Writes the FILE and FD_TABLE records. What comes back is to be sent after READY_FOR_PAGES, and the rest.
    pub fn finish(mut self, w: &mut Writer<impl Write>) -> Result<Rest> {
        self.finish_sockets()?;
        self.finish_terminals()?;
        self.finish_epolls()?;
        self.finish_inotifies()?;
        self.finish_pipes();
        self.share_options();
        let files = self.entries.iter().enumerate().map(|(index, entry)| (index as u64 + 1, &entry.file));
        w.put_all(Kind::FILE, &files.collect::<Vec<_>>())?;
        for (index, state) in self.view.outside.closed.iter().enumerate() {
            w.put(Kind::FILE, (self.entries.len() + index) as u64 + 1, &closed(state))?;
        }
        for (id, table) in &self.records {
            w.put(Kind::FD_TABLE, id.0, table)?;
        }
        let peers = self.entries.iter().filter_map(|entry| peer(entry.file.as_ref()?)).collect();
        let (contents, removed_queues) = (self.contents, self.removed_queues);
        Ok(Rest { peers, contents, removed_queues, warnings: self.warnings })
    }

    /// Queues of sockets can hold files that nobody else has, sockets too: until there is nothing new.
    fn finish_sockets(&mut self) -> Result<()> {
        let mut index = 0;
        while index < self.entries.len() {
            let file = self.entries[index].file.as_ref();
            // No other family has anything left.
            let Some(FileState::Socket(state @ socket::State::Unix(_))) = file.map(|file| &file.state) else {
                index += 1;
                continue;
            };
            let mut state = state.clone();
            let (fd, subject) = (self.entries[index].fd.clone(), self.entries[index].subject.clone());
            let mut context = socket::DumpContext { inode: self.entries[index].inode, subject: &subject, files: self };
            socket::finish(&mut state, fd.as_fd(), &mut context)?;
            if let Some(file) = &mut self.entries[index].file {
                file.state = FileState::Socket(state);
            }
            index += 1;
        }
        self.finish_connections()?;
        self.peers_are_inside()
    }

    /// Ends of connections inside the pod, until both tell the same.
    fn finish_connections(&mut self) -> Result<()> {
        const ATTEMPTS: u32 = 100;
        for _ in 0..ATTEMPTS {
            let states =
                self.entries.iter().enumerate().filter_map(|(index, entry)| match &entry.file.as_ref()?.state {
                    FileState::Socket(socket::State::Tcp(state)) => Some((index, state)),
                    _ => None,
                });
            let outdated = socket::tcp::pairs::outdated(states);
            if outdated.is_empty() {
                return Ok(());
            }
            for index in outdated {
                let entry = &mut self.entries[index];
                if let Some(File { state: FileState::Socket(socket::State::Tcp(state)), .. }) = &mut entry.file {
                    let signatures = std::mem::take(&mut state.signatures);
                    let again = socket::tcp::dump(entry.fd.as_fd(), state.family, &entry.subject)?;
                    *state = socket::tcp::State { signatures, ..again };
                }
            }
        }
        Err(Problem::new("E-TCP-STATE", "two processes of the pod have a connection whose ends do not fit")
            .fix("try again in a moment"))
    }

    fn peers_are_inside(&self) -> Result<()> {
        let sockets = |entry: &Entry| match entry.file.as_ref().map(|file| &file.state) {
            Some(FileState::Socket(socket::State::Unix(state))) => Some(state.inode),
            _ => None,
        };
        let inside: HashSet<u64> = self.entries.iter().filter_map(sockets).collect();
        for entry in &self.entries {
            if let Some(File { state: FileState::Socket(socket::State::Unix(state)), .. }) = &entry.file {
                socket::unix::must_be_inside(state, &entry.subject, |inode| inside.contains(&inode))?;
            }
        }
        Ok(())
    }

    fn finish_terminals(&mut self) -> Result<()> {
        for (index, terminal) in std::mem::take(&mut self.terminals) {
            let monitor = self.view.outside.terminals.get(&index);
            let master = terminal.master.map(|i| self.entries[i].fd.as_fd()).or(monitor.map(|(_, fd)| fd.as_fd()));
            let mut slave = terminal.slave;
            if slave.is_none() && terminal.session.is_some() {
                let Some(master) = master else { continue };
                // The session needs a descriptor to take it by, although nobody has one open.
                let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
                let fd = descriptor::pty_slave(master, flags).doing(|| format!("open terminal {index}"))?;
                let subject = format!("controlling terminal {index}");
                slave = Some(self.add(fd, &subject, None)?.0 as usize - 1);
            }
            let master = terminal.master.map(|i| self.entries[i].fd.as_fd()).or(monitor.map(|(_, fd)| fd.as_fd()));
            let pair = pty::dump_pair(master, slave.map(|i| self.entries[i].fd.as_fd()))
                .doing(|| format!("read terminal {index}"))?;
            let foreground = terminal.foreground.and_then(|group| self.groups.get(&group)).copied();
            let mut pair = Some(pair);
            for entry in &mut self.entries {
                if let Some(File { state: FileState::Pty(state), .. }) = &mut entry.file
                    && state.index == index
                {
                    state.external = monitor.map(|(holder, _)| *holder);
                    state.session = terminal.session;
                    state.foreground = foreground;
                    state.pair = pair.take();
                }
            }
        }
        Ok(())
    }

    fn finish_epolls(&mut self) -> Result<()> {
        let mut of_inode: HashMap<u64, Vec<usize>> = HashMap::new();
        for (index, entry) in self.entries.iter().enumerate() {
            of_inode.entry(entry.inode).or_default().push(index);
        }
        // Most are still open under the number by which they were registered, and thousands can be one inode.
        let mut of_number: HashMap<TaskFd, Vec<usize>> = HashMap::new();
        for fd in self.records.values().flat_map(|table| &table.fds) {
            of_number.entry(fd.fd).or_default().push(fd.file.0 as usize - 1);
        }
        for index in 0..self.entries.len() {
            let entry = &self.entries[index];
            if !matches!(entry.file.as_ref().map(|file| &file.state), Some(FileState::Epoll(_))) {
                continue;
            }
            let look = Look::at(entry.fd.as_fd())?;
            let entries = &self.entries;
            let state = epoll::dump(entry.fd.as_fd(), &look.info, &entry.subject, |inode, number| {
                let here = of_number.get(&number).map_or(&[][..], |indices| &indices[..]);
                let here = here.iter().filter(move |index| entries[**index].inode == inode);
                let all = here.chain(of_inode.get(&inode).map_or(&[][..], |indices| &indices[..]));
                all.map(|i| (FileId(*i as u64 + 1), entries[*i].fd.as_fd()))
            })?;
            if let Some(file) = &mut self.entries[index].file {
                file.state = FileState::Epoll(state);
            }
        }
        Ok(())
    }

    fn finish_inotifies(&mut self) -> Result<()> {
        for index in 0..self.entries.len() {
            let entry = &self.entries[index];
            if !matches!(entry.file.as_ref().map(|file| &file.state), Some(FileState::Inotify(_))) {
                continue;
            }
            let look = Look::at(entry.fd.as_fd())?;
            let open = |watch: &fdinfo::InotifyWatch| self.open_inode(watch);
            let state = inotify::dump(entry.fd.as_fd(), &look.info, self.view, &entry.subject, open)?;
            if state.events_lost {
                let subject = &entry.subject;
                let what = "inotify events that were not read yet are lost; its reader is told so (IN_Q_OVERFLOW)";
                self.warnings.push(format!("{subject}: {what}"));
            }
            if let Some(file) = &mut self.entries[index].file {
                file.state = FileState::Inotify(state);
            }
        }
        Ok(())
    }

    /// How a file that the pod has open is watched.
    fn open_inode(&self, watch: &fdinfo::InotifyWatch) -> Option<inotify::Open> {
        let known = self.by_inode.iter().filter(|((_, inode), _)| *inode == watch.inode);
        known.flat_map(|(_, alike)| alike.sorted.iter().chain(&alike.known)).find_map(|index| {
            let entry = &self.entries[*index];
            let Some(FileState::Regular(state)) = entry.file.as_ref().map(|file| &file.state) else { return None };
            if !matches!(state.existence, regular::Existence::Deleted(_)) {
                return Some(inotify::Open::Path(state.path.to_vec()));
            }
            let (kind, handle) = descriptor::file_handle(entry.fd.as_fd()).ok()?;
            let same = kind == watch.handle_type && handle == watch.handle;
            same.then(|| inotify::Open::Nameless(FileId(*index as u64 + 1)))
        })
    }

    /// Options that several sockets have, and that were read once, are with the first of them.
    fn share_options(&mut self) {
        let mut first: HashMap<usize, FileId> = HashMap::new();
        for (index, entry) in self.entries.iter_mut().enumerate() {
            let Some(FileState::Socket(state)) = entry.file.as_mut().map(|file| &mut file.state) else { continue };
            let Some(options) = socket::options_mut(state) else { continue };
            let file = FileId(index as u64 + 1);
            let known = *first.entry(options.values.identity()).or_insert(file);
            if known != file {
                options.values.name(known);
            }
        }
    }

    /// A pipe is in packet mode when one of its writing ends is.
    fn finish_pipes(&mut self) {
        let mut packets: HashSet<u64> = HashSet::new();
        for file in self.entries.iter().filter_map(|entry| entry.file.as_ref()) {
            if let FileState::Pipe(state) = &file.state
                && file.flags & libc::O_DIRECT != 0
            {
                packets.insert(state.pipe);
            }
        }
        for file in self.entries.iter_mut().filter_map(|entry| entry.file.as_mut()) {
            if let FileState::Pipe(pipe::State { pipe, buffer: Some(buffer), .. }) = &mut file.state {
                buffer.packets |= packets.contains(pipe);
            }
        }
    }
}

/// A connection that no process has.
fn closed(state: &socket::tcp::State) -> File {
    let name = match &state.phase {
        socket::tcp::Phase::Connected(connection) => format!("closed connection to {}", connection.peer),
        _ => "closed connection".into(),
    };
    File {
        state: FileState::Socket(socket::State::Tcp(state.clone())),
        flags: libc::O_RDWR,
        position: 0,
        owner: None,
        signal: 0,
        locks: Vec::new(),
        name,
    }
}
