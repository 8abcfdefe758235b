//! The opener: a process of ours inside the pod's namespaces that opens every file and holds it until each task has its
//! copies.
//!
//! Order of a restore:
//! 1. [`Opening`] before the tree is made: everything that needs no other process is open then, terminals too, so
//!    that session leaders can take theirs (see [`super::Files::controlling_terminals`]).
//! 2. The tree is made. [`Opener::connect`]: what refers to processes or to other files (pidfds, /proc files, epoll
//!    registrations, unix sockets, owners).
//! 3. Each task takes its descriptors: `pidfd_open(pid)`, `pidfd_getfd(n)`, `dup3`. Contents arrive as raw bytes.
//!    Meanwhile it leaves the pod's freezer ([`Opener::leave`]), for what it does last it does while that holds the pod.
//! 4. [`task_work`] in each task; [`Opener::release`] when nothing can fail any more; [`Opener::finish`].
//!
//! Dropping an opener kills its process, or has it end by itself, as it does when the process that started it is gone;
//! everything that only it held goes with it.

mod inside;
mod leaving;

use super::view::Holder;
use super::{File, Files, epoll, locks};
use crate::crew;
use crate::ids::{FdTableId, FileId, PodPid, SharedMemoryId};
use crate::remote::call::{Arg, RemoteCall};
use leaving::Leaving;
use pod_runtime::birth::{self, Born};
use pod_runtime::cgroup::Outside;
use pod_runtime::problem::Report;
use pod_runtime::sys::{daemon, descriptor, pidfd, unix};
use pod_runtime::usher::Usher;
use pod_runtime::{Doing, Problem, Result};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// An answer is a few bytes a file.
const MOST_BYTES: u64 = 64 << 20;

/// What the pod's new monitor gets: its side of what was the old monitor's.
#[derive(Debug, Default)]
pub struct External {
    pub stdin: Option<OwnedFd>,
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
    /// Master of the pod's terminal.
    pub console: Option<OwnedFd>,
    /// The same of `pod exec` sessions: console, stdin, stdout, stderr.
    pub sessions: BTreeMap<u64, [Option<OwnedFd>; 4]>,
    /// What nobody listens to.
    pub others: Vec<OwnedFd>,
}

/// What the process is told to do; one line of JSON each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Order {
    Connect,
    /// To leave the pod's freezer, as a process with this pid.
    Leave(PodPid),
    Arm,
    Release,
    Finish,
}

/// What it holds now, by its descriptor numbers.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Holding {
    files: BTreeMap<FileId, i32>,
    contents: BTreeMap<FileId, i32>,
    memory: BTreeMap<SharedMemoryId, i32>,
    pipes: Vec<(Holder, i32)>,
    terminals: Vec<(Holder, i32)>,
    warnings: Vec<String>,
    /// A pidfd of the process that goes on in its place, or why there is none.
    successor: Option<std::result::Result<i32, String>>,
}

type Answer = std::result::Result<Holding, Report>;

/// A line from the process.
#[derive(Debug, Serialize, Deserialize)]
enum Said {
    Answer(Answer),
    /// Before the answer: something that a task must do. It waits for the results.
    Errand(Errand),
}

/// Calls that a process of the pod is to make, because the kernel notes who makes them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Errand {
    pub pid: PodPid,
    pub uid: u32,
    pub gid: u32,
    pub deed: Deed,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Deed {
    /// socketpair(2) of this kind; the numbers are told, and the descriptors stay until `Close`.
    Pairs {
        kind: i32,
        count: usize,
    },
    Close,
    /// listen(2) on a descriptor of the opener.
    Listen {
        number: i32,
        backlog: i32,
    },
    Connect {
        number: i32,
        address: ByteBuf,
    },
}

/// Shared memory that is there before the pod's processes.
pub type Memory = BTreeMap<SharedMemoryId, OwnedFd>;

/// An opener that is on its way into the pod.
#[derive(Debug)]
pub struct Opening {
    pid: PodPid,
    usher: Option<Usher>,
}

#[derive(Debug)]
pub struct Opener {
    pid: PodPid,
    /// Dropped before its process: who moves it must not move another that has its number.
    leaving: Option<Leaving>,
    process: Process,
    /// It has not said yet that all is open.
    opening: bool,
    /// It can leave by itself.
    way_out: bool,
    /// Who opened the files, in the pod's freezer, and was killed.
    predecessor: Option<Process>,
    to: UnixStream,
    from: BufReader<UnixStream>,
    holding: Holding,
}

/// Kills and reaps on drop.
#[derive(Debug)]
struct Process {
    host: i32,
    pidfd: OwnedFd,
    reaped: bool,
}

impl Opening {
    /// `free_pid` is one that no restored task has. Called in the monitor, whose child the opener is.
    pub fn begin(born: &mut Born, free_pid: PodPid) -> Result<Opening> {
        let mut usher = born.usher.take();
        usher.as_mut().map_or(Ok(()), |usher| usher.lead(free_pid.0))?;
        Ok(Opening { pid: free_pid, usher })
    }

    /// Has it open the files, for which [`Opener::opened`] waits, and hold the memory for tasks that map it.
    pub fn open(self, born: &Born, files: &Files, memory: Memory) -> Result<Opener> {
        let pid = self.pid;
        let Some(usher) = self.usher else {
            let enter = |f: Box<dyn FnOnce() -> i32 + '_>| birth::enter(&born.pidfd, &born.cgroup, Some(pid.0), f);
            return Opener::start_by(pid, (files, memory), enter);
        };
        let (host, link) = usher.led()?;
        let outside = born.cgroup.outside();
        let opener = Opener { opening: true, way_out: outside.is_some(), ..Opener::of(pid, host, link)? };
        hand_over(files, &memory, outside.as_ref(), &opener.to)?;
        Ok(opener)
    }
}

impl Opener {
    /// Returns when everything is open that needs no process of the pod.
    pub fn opened(&mut self) -> Result<()> {
        if std::mem::take(&mut self.opening) {
            self.holding = self.answer()?;
        }
        Ok(())
    }

    /// `spawn` runs the closure in a child and returns its pid on this host.
    pub fn start_by(
        pid: PodPid,
        (files, memory): (&Files, Memory),
        spawn: impl FnOnce(Box<dyn FnOnce() -> i32 + '_>) -> Result<i32>,
    ) -> Result<Opener> {
        let (ours, theirs) = UnixStream::pair().doing(|| "make a socket pair".into())?;
        let ours_number = ours.as_raw_fd();
        let host = spawn(Box::new(move || {
            // The child's own copy of our end, which nothing in it owns: with it the link would never end.
            descriptor::close_number(ours_number);
            inside::run(files, memory, None, theirs, false)
        }))?;
        let mut opener = Opener::of(pid, host, ours)?;
        opener.holding = opener.answer()?;
        Ok(opener)
    }

    fn of(pid: PodPid, host: i32, to: UnixStream) -> Result<Opener> {
        let pidfd = pidfd::open(host).doing(|| "open a pidfd of the opener".into())?;
        let process = Process { host, pidfd, reaped: false };
        let from = BufReader::new(to.try_clone().doing(|| "copy a socket".into())?);
        let (leaving, predecessor, holding) = (None, None, Holding::default());
        Ok(Opener { pid, leaving, process, opening: false, way_out: false, predecessor, to, from, holding })
    }

    /// Its pid in the pod: what tasks call pidfd_open with.
    pub fn pid(&self) -> PodPid {
        self.pid
    }

    /// Under which number the opener holds each file. Complete after [`Opener::connect`].
    pub fn numbers(&self) -> &BTreeMap<FileId, i32> {
        &self.holding.files
    }

    /// The same of shared memory that it was given.
    pub fn memory(&self) -> &BTreeMap<SharedMemoryId, i32> {
        &self.holding.memory
    }

    /// What could not be restored exactly, a line each.
    pub fn warnings(&self) -> &[String] {
        &self.holding.warnings
    }

    /// After all processes of the pod exist. `run` lets one of them do an errand, and tells the results; `None` when it
    /// is not there.
    pub fn connect(&mut self, mut run: impl FnMut(&Errand) -> Result<Option<Vec<i64>>>) -> Result<()> {
        self.tell(&Order::Connect)?;
        loop {
            match self.hear()? {
                Said::Answer(answer) => {
                    self.holding = answer.map_err(Problem::from)?;
                    return Ok(());
                }
                Said::Errand(errand) => {
                    let results = run(&errand)?;
                    self.tell(&results)?;
                }
            }
        }
    }

    /// A copy of a file for the engine.
    pub fn take(&self, file: FileId) -> Result<OwnedFd> {
        let number = self.holding.files.get(&file).ok_or_else(|| broken(format!("file {file} is not there")))?;
        self.copy(*number)
    }

    /// A writable descriptor of a file whose contents come as raw bytes.
    pub fn contents(&self, file: FileId) -> Result<OwnedFd> {
        let number = self.holding.contents.get(&file);
        self.copy(*number.ok_or_else(|| broken(format!("file {file} takes no contents")))?)
    }

    /// What the new monitor gets. Once.
    pub fn external(&mut self) -> Result<External> {
        let mut external = External::default();
        // In the order of the numbers that the monitor's own descriptors then have: its own stdio first.
        let mut terminals = std::mem::take(&mut self.holding.terminals);
        terminals.sort_unstable();
        let mut pipes = std::mem::take(&mut self.holding.pipes);
        pipes.sort_unstable();
        for (holder, number) in terminals {
            let fd = self.copy(number)?;
            match holder {
                Holder::Pod(_) if external.console.is_none() => external.console = Some(fd),
                Holder::Session(id, _) => external.sessions.entry(id).or_default()[0] = Some(fd),
                _ => external.others.push(fd),
            }
        }
        for (holder, number) in pipes {
            let fd = self.copy(number)?;
            match holder {
                Holder::Pod(0) => external.stdin = Some(fd),
                Holder::Pod(1) => external.stdout = Some(fd),
                Holder::Pod(_) => external.stderr = Some(fd),
                Holder::Session(id, which @ 0..=2) => {
                    external.sessions.entry(id).or_default()[1 + usize::from(which)] = Some(fd);
                }
                Holder::Session(..) | Holder::Nobody => external.others.push(fd),
            }
        }
        Ok(external)
    }

    /// There is nothing more for it to do. It holds more than the pod may have, which is about to run.
    pub fn dismiss(&self) {
        self.process.kill();
    }

    /// From here on the opener does by itself what [`Opener::release`] asks for when who started it is gone. If the pod
    /// is not to run after all nothing is lost: its cable is in no bridge.
    pub fn arm(&mut self) -> Result<()> {
        self.order(Order::Arm).map(drop)
    }

    /// The last moment before the tasks go: connections leave repair mode, seals are set.
    pub fn release(&mut self) -> Result<()> {
        self.order(Order::Release).map(drop)
    }

    /// Ends the opener's process and reaps it.
    pub fn finish(&mut self) -> Result<()> {
        self.order(Order::Finish)?;
        daemon::reap(self.process.host).doing(|| "wait for the opener".into())?;
        self.process.reaped = true;
        Ok(())
    }

    fn copy(&self, number: i32) -> Result<OwnedFd> {
        pidfd::get_fd(&self.process.pidfd, number).doing(|| "take a file from the opener".into())
    }

    fn order(&mut self, order: Order) -> Result<Holding> {
        self.tell(&order)?;
        self.answer()
    }

    fn tell(&mut self, what: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(what).doing(|| "tell the opener".into())?;
        line.push(b'\n');
        self.to.write_all(&line).doing(|| "tell the opener".into())
    }

    fn answer(&mut self) -> Result<Holding> {
        match self.hear()? {
            Said::Answer(answer) => answer.map_err(Problem::from),
            Said::Errand(_) => Err(Problem::new("E-INTERNAL", "the opener asks for something out of turn")),
        }
    }

    fn hear(&mut self) -> Result<Said> {
        let mut line = Vec::new();
        let read = self.from.by_ref().take(MOST_BYTES).read_until(b'\n', &mut line);
        read.doing(|| "hear from the opener".into())?;
        if line.is_empty() {
            return Err(died());
        }
        serde_json::from_slice(&line).doing(|| "understand the opener".into())
    }
}

fn died() -> Problem {
    Problem::new("E-SYSTEM", "the process that opens the pod's files has died")
}

impl Process {
    fn kill(&self) {
        let _ = daemon::pidfd_send_signal(self.pidfd.as_fd(), libc::SIGKILL);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.reaped {
            self.kill();
            let _ = daemon::reap(self.host);
        }
    }
}

/// What an opener does that was not forked with the files in its memory: it is told them first.
pub fn run_inside(link: UnixStream) -> i32 {
    match taken_over(&link) {
        Ok((files, memory, outside)) => inside::run(&files, memory, outside, link, true),
        // Nobody is there any more, or it hears that the link has ended.
        Err(_) => 1,
    }
}

/// So many files are told of in one part.
const PART: usize = 256;

/// The descriptors first, while nothing is in their way. Then what is to be opened in parts, each CBOR behind its length, which
/// both sides work on with all CPUs; the first has the tables, and whose memory the descriptors are.
fn hand_over(files: &Files, memory: &Memory, outside: Option<&Outside>, mut link: &UnixStream) -> Result<()> {
    let doing = || "tell the opener".to_owned();
    let way_out = outside.into_iter().flat_map(|outside| [&outside.group, &outside.view]);
    let numbers: Vec<i32> = memory.values().chain(way_out).map(AsRawFd::as_raw_fd).collect();
    unix::send(link.as_fd(), &[0], &[], &numbers, None).doing(doing)?;
    let ids: Vec<SharedMemoryId> = memory.keys().copied().collect();
    let all: Vec<(&FileId, &File)> = files.files.iter().collect();
    let parts: Vec<&[(&FileId, &File)]> = all.chunks(PART).collect();
    link.write_all(&(parts.len() as u64 + 1).to_le_bytes()).doing(doing)?;
    link.write_all(&part(&(&files.tables, ids, outside.is_some()))?).doing(doing)?;
    for part in crew::share(parts.len(), |at| part(parts[at])) {
        link.write_all(&part?).doing(doing)?;
    }
    Ok(())
}

fn part(of: &(impl Serialize + ?Sized)) -> Result<Vec<u8>> {
    let mut bytes = vec![0; 8];
    ciborium::into_writer(of, &mut bytes).doing(|| "tell the opener".to_owned())?;
    let length = (bytes.len() as u64 - 8).to_le_bytes();
    bytes[..8].copy_from_slice(&length);
    Ok(bytes)
}

fn number(mut link: &UnixStream) -> Result<u64> {
    let mut bytes = [0; 8];
    link.read_exact(&mut bytes).doing(|| "hear which files are to be opened".to_owned())?;
    Ok(u64::from_le_bytes(bytes))
}

fn taken_over(link: &UnixStream) -> Result<(Files, Memory, Option<Outside>)> {
    let doing = || "hear which files are to be opened".to_owned();
    let mut fds = unix::take(link.as_fd(), 1).doing(doing)?.fds;
    let mut parts = Vec::new();
    for _ in 0..number(link)? {
        let length = number(link)?;
        let mut bytes = Vec::new();
        link.take(length).read_to_end(&mut bytes).doing(doing)?;
        parts.push(bytes);
    }
    let (tables, parts) = parts.split_first().ok_or_else(|| Problem::new("E-INTERNAL", "nothing is to be opened"))?;
    let (tables, ids, way_out): (_, Vec<SharedMemoryId>, bool) = ciborium::from_reader(&tables[..]).doing(doing)?;
    if fds.len() != ids.len() + 2 * usize::from(way_out) {
        return Err(Problem::new("E-SYSTEM", format!("of {} pieces of memory {} came", ids.len(), fds.len())));
    }
    let mut way_out = fds.split_off(ids.len()).into_iter();
    let outside = way_out.next().zip(way_out.next()).map(|(group, view)| Outside { group, view });
    let mut files = Files { tables, ..Files::default() };
    let read = |at: usize| ciborium::from_reader::<Vec<(FileId, File)>, _>(&parts[at][..]);
    for part in inside::share(parts.len(), read) {
        files.files.extend(part.doing(doing)?);
    }
    files.share_options()?;
    Ok((files, ids.into_iter().zip(fds).collect(), outside))
}

/// An image that contradicts itself.
pub(super) fn broken(what: String) -> Problem {
    Problem::new(crate::image::DAMAGED, what)
}

/// Calls that a process must make itself after its descriptors are in place and all processes exist: epoll registrations
/// of signalfds and POSIX record locks (they belong to the table, which no other process has), and the foreground group
/// by the session's leader.
pub fn task_work(files: &Files, pid: PodPid, table: FdTableId) -> Vec<RemoteCall> {
    let mut calls = epoll::own_calls(files, table);
    if let Some(table) = files.tables.get(&table) {
        calls.extend(table.locks.iter().map(locks::posix_call));
    }
    calls.extend(foreground_call(files, pid, table));
    calls
}

/// tcsetpgrp(3) through any descriptor of its terminal that the leader has. One that has none keeps its own group in the
/// foreground.
fn foreground_call(files: &Files, pid: PodPid, table: FdTableId) -> Option<RemoteCall> {
    let group = files.controlling_terminals().get(&pid)?.foreground?;
    let is_own = |file: &FileId| match &files.files.get(file)?.state {
        super::FileState::Pty(state) => {
            (state.session == Some(pid) && state.end == super::pty::End::Slave).then_some(())
        }
        _ => None,
    };
    let fd = files.tables.get(&table)?.fds.iter().find(|fd| is_own(&fd.file).is_some())?;
    let args = vec![Arg::from(fd.fd.0), Arg::from(libc::TIOCSPGRP), Arg::In(group.0.to_ne_bytes().to_vec())];
    Some(RemoteCall::new("set the foreground group of a terminal", libc::SYS_ioctl, args).may_fail())
}
