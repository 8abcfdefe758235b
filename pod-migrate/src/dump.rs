//! The walk that takes a frozen pod apart. The order is the stream's: the tree first, because restore makes it first;
//! pages last, because all else must be there when they arrive.

use crate::freeze::{Frozen, Process};
use crate::ids::{FileId, HostPid, PodPid, TaskFd};
use crate::image::{Kind, Owner, Writer};
use crate::laps::lap;
use crate::objects::files::dump::{Contents, Rest};
use crate::objects::files::{FilesDump, Outside, Task, View};
use crate::objects::memory::dump::Spaces;
use crate::objects::memory::{self, Policy, Told, WentAhead};
use crate::objects::namespaces::ipc;
use crate::objects::task::dump::{self as task, Asked, Parts};
use crate::objects::task::landlock::Onlookers;
use crate::objects::task::{
    Chains, Life, Node, ProcessState, Tree, check, interrupted, keys, scheduling, switches, undo,
};
use crate::remote::{Arg, Borrowed, RemoteCall};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use pod_runtime::cgroup::Cgroup;
use pod_runtime::{Doing, Problem, Result};
use serde_bytes::ByteBuf;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::net::IpAddr;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

/// What was dumped, for the one who asked.
#[derive(Debug, Clone, Default)]
pub struct DumpReport {
    pub processes: usize,
    pub threads: usize,
    /// The other ends of the established TCP connections.
    pub peers: Vec<IpAddr>,
    /// What will not be exactly as it was, a line each.
    pub warnings: Vec<String>,
    /// Bytes of memory that come behind.
    pub follows: u64,
}

/// Dumps everything of the pod but its spec, storage and log, which are the caller's. The pod stays frozen and is not
/// changed. `outside` is what its monitor holds of its files, `ahead` what was sent while it ran.
pub fn dump(
    frozen: &mut Frozen,
    cgroup: &Cgroup,
    outside: Outside,
    ahead: &mut WentAhead,
    w: &mut Writer<impl Write>,
) -> Result<DumpReport> {
    let init = first(frozen)?;
    frozen.look()?;
    let view = View::new(init, outside)?;
    lap("view");
    let mut files = FilesDump::new(&view).since(frozen.standstill());
    let mut spaces = Spaces::new(ahead);
    let mut chains = Chains::default();
    refuse(frozen)?;
    lap("refuse");
    let onlookers = onlookers(frozen, cgroup)?;
    lap("onlookers");
    let tree = tree(frozen);
    w.put(Kind::TREE, 0, &tree)?;
    spaces.find_shared(frozen.processes())?;
    lap("shared memory");
    for processes in frozen.processes().chunks(CROWD) {
        crowd(processes, init, &onlookers, &mut spaces, &mut files, &mut chains, w)?;
    }
    spaces.unattached(init)?;
    lap("unattached");
    let Rest { contents, removed_queues, peers, mut warnings } = files.finish(w)?;
    lap("files and sockets");
    warnings.extend(frozen.processes().iter().flat_map(interrupted::begun_anew));
    warnings.extend(spaces.shared_since_fork(&tree).map(said));
    warnings.extend(frozen.processes().iter().filter_map(keys::downgrade).map(said));
    spaces.records(w)?;
    lap("spaces");
    let ipc = ipc::dump(init.0, &removed_queues)?;
    let numbers: Vec<_> = frozen.processes().iter().map(|process| (process.pid, process.status.tgid)).collect();
    let (undos, forgotten) = undo::of(&numbers, &ipc.sets());
    warnings.extend(forgotten.map(said));
    w.put(Kind::IPC, 0, &ipc)?;
    if !undos.is_empty() {
        w.put(Kind::UNDO, 0, &undos)?;
    }
    lap("ipc");
    let follows = spaces.kept(w)?;
    w.put(Kind::READY_FOR_PAGES, 0, &())?;
    let contents = contents.into_iter().map(|Contents { file, fd, bytes }| memory::Contents {
        source: File::from(fd),
        bytes,
        owner: Owner::File(file),
    });
    spaces.pages(contents.collect(), w)?;
    Ok(DumpReport {
        processes: frozen.processes().len(),
        threads: frozen.processes().iter().map(|process| process.threads.len()).sum(),
        peers,
        warnings,
        follows,
    })
}

/// A line of the report.
fn said(problem: Problem) -> String {
    format!("{}: {}", problem.code(), problem.chain())
}

fn first(frozen: &Frozen) -> Result<HostPid> {
    let first = frozen.process(PodPid(1)).ok_or_else(|| Problem::new("E-SYSTEM", "the pod has no first process"))?;
    Ok(first.host)
}

/// What stands against all of them together, though a check had found nothing.
fn refuse(frozen: &Frozen) -> Result<()> {
    let hosts: Vec<HostPid> = frozen.processes().iter().map(|process| process.host).collect();
    let mut found = check::shared_spaces(&hosts).into_iter().chain(check::shared_tables(&hosts));
    found.next().map_or(Ok(()), Err)
}

/// Whom the processes of the pod are asked about: who restricted himself may not look at them.
fn onlookers(frozen: &Frozen, cgroup: &Cgroup) -> Result<Onlookers> {
    match frozen.process(PodPid(1)) {
        Some(first) => Onlookers::enter(frozen, &first.pidfd, cgroup),
        None => Ok(Onlookers::default()),
    }
}

/// The leader first, also one that has ended.
fn all_threads(process: &Process) -> Vec<PodPid> {
    let ended = process.leader_ended.map(|_| process.pid);
    ended.into_iter().chain(process.threads.iter().map(|thread| thread.tid)).collect()
}

fn tree(frozen: &Frozen) -> Tree {
    let mut processes: Vec<Node> = frozen
        .processes()
        .iter()
        .map(|process| Node {
            pid: process.pid,
            parent: process.parent,
            group: process.group,
            session: process.session,
            exit_signal: process.exit_signal,
            life: process.life,
            threads: all_threads(process),
            comm: ByteBuf::new(),
        })
        .chain(frozen.zombies().iter().map(|zombie| Node {
            pid: zombie.pid,
            parent: zombie.parent,
            group: zombie.group,
            session: zombie.session,
            exit_signal: zombie.exit_signal,
            life: Life::Zombie(zombie.status),
            threads: Vec::new(),
            comm: ByteBuf::from(zombie.comm.clone().into_bytes()),
        }))
        .collect();
    processes.sort_by_key(|node| node.pid);
    Tree { processes, autogroups: autogroups(frozen) }
}

/// One process of each session is asked: all of a session are in one group, unless they came to it from elsewhere.
fn autogroups(frozen: &Frozen) -> Vec<(PodPid, i32)> {
    let mut sessions = BTreeSet::new();
    let first = |process: &&Process| sessions.insert(process.session);
    let nice = |process: &Process| {
        let text = pod_runtime::proc::read(process.proc("autogroup")).ok()?;
        let nice = scheduling::session_nice(&text)?;
        (nice != 0).then_some((process.pid, nice))
    };
    frozen.processes().iter().filter(first).filter_map(nice).collect()
}

/// A process on its way into the stream. All of a [`CROWD`] are asked at once, so that none is waited for alone.
struct Walk<'a> {
    process: &'a Process,
    borrowed: Borrowed<'a>,
    ours: Range<u64>,
    parts: Parts,
    /// Descriptors of which only the process knows whether they are closed by exec.
    unsure: Vec<TaskFd>,
    /// Unix sockets of which only a process of the pod can tell whom they have as their peer.
    peers: Vec<(TaskFd, FileId)>,
}

/// So many processes at a time: each costs a descriptor or two.
const CROWD: usize = 128;

impl<'a> Walk<'a> {
    fn begin(process: &'a Process, init: HostPid, files: &mut FilesDump<'_>) -> Result<Walk<'a>> {
        let task = Task {
            pid: process.pid,
            host: process.host,
            pidfd: process.pidfd.as_fd(),
            comm: &process.comm,
            stat: &process.stat,
            status: &process.status,
        };
        check::answers(process)?;
        let borrowed = Borrowed::begin(process, &process.maps)?;
        let parts = Parts {
            mm: crate::ids::MmId(process.pid.0 as u64),
            fd_table: files.table(task)?,
            cwd: files.path(directory(process, "cwd")?, "working directory")?,
            root: root(process, init, files)?,
        };
        let (unsure, peers) = (files.unsure(parts.fd_table), files.peers_to_ask(parts.fd_table));
        Ok(Walk { process, borrowed, ours: 0..0, parts, unsure, peers })
    }

    fn ask(&mut self) -> Result<Asked> {
        self.borrowed.entered()?;
        self.ours = self.borrowed.range();
        let call = |fd: &TaskFd| RemoteCall::new("fcntl", libc::SYS_fcntl, vec![fd.0.into(), libc::F_GETFD.into()]);
        let closes = self.unsure.iter().map(call);
        let peers = self.peers.iter().map(|(fd, _)| peer_question(*fd));
        let maps = if has_nodes() { &self.process.maps[..] } else { &[] };
        let more = closes.chain(peers).chain(maps.iter().map(|map| switches::policy_of_map(map.start))).collect();
        task::ask(self.process, &mut self.borrowed, more)
    }

    fn hear(
        &mut self,
        mut asked: Asked,
        onlookers: &Onlookers,
        files: &mut FilesDump<'_>,
        chains: &mut Chains,
    ) -> Result<(ProcessState, Told)> {
        let (state, mut told) = task::dump(self.process, &mut self.borrowed, &mut asked, self.parts, chains)?;
        onlookers.ask(self.process, &mut self.borrowed)?;
        for (fd, call) in self.unsure.iter().zip(&asked.more) {
            files.close_on_exec(self.parts.fd_table, *fd, call.result & i64::from(libc::FD_CLOEXEC) != 0);
        }
        let answers = asked.more.iter().skip(self.unsure.len());
        for ((_, file), call) in self.peers.iter().zip(answers).filter(|(_, call)| call.result == 0) {
            let pid = call.out.first().and_then(|ucred| ucred.first_chunk());
            files.peer(*file, pid.map_or(0, |pid| i32::from_ne_bytes(*pid)));
        }
        told.policies = self.policies(&asked.more[self.unsure.len() + self.peers.len()..])?;
        self.borrowed.begin_leaving()?;
        Ok((state, told))
    }

    /// `answers` are those of all maps, if they were asked for.
    fn policies(&mut self, answers: &[RemoteCall]) -> Result<BTreeMap<u64, Policy>> {
        let with = self.process.maps.iter().zip(answers).filter(|(_, answer)| switches::has_policy(answer));
        let starts: Vec<u64> = with.map(|(map, _)| map.start).collect();
        if starts.is_empty() {
            return Ok(BTreeMap::new());
        }
        let mut calls: Vec<RemoteCall> = starts.iter().map(|start| switches::nodes_of_map(*start)).collect();
        self.borrowed.run(self.process.leader(), &mut calls)?;
        Ok(starts.into_iter().zip(&calls).filter_map(|(start, call)| Some((start, switches::policy(call)?))).collect())
    }
}

/// Whether this kernel knows of memory policies.
fn has_nodes() -> bool {
    std::path::Path::new("/proc/self/numa_maps").exists()
}

/// SO_PEERCRED.
fn peer_question(fd: TaskFd) -> RemoteCall {
    /// struct ucred: pid, user, group.
    const UCRED: usize = 12;
    let length = Arg::InOut((UCRED as u32).to_ne_bytes().to_vec());
    let args = vec![fd.0.into(), libc::SOL_SOCKET.into(), libc::SO_PEERCRED.into(), Arg::Out(UCRED), length];
    RemoteCall::new("getsockopt", libc::SYS_getsockopt, args).may_fail()
}

fn crowd(
    processes: &[Process],
    init: HostPid,
    onlookers: &Onlookers,
    spaces: &mut Spaces<'_>,
    files: &mut FilesDump<'_>,
    chains: &mut Chains,
    w: &mut Writer<impl Write>,
) -> Result<()> {
    let walks = processes.iter().map(|process| Walk::begin(process, init, files));
    let mut walks = walks.collect::<Result<Vec<_>>>()?;
    lap("descriptors");
    let asked = walks.iter_mut().map(Walk::ask).collect::<Result<Vec<_>>>()?;
    lap("ask tasks");
    let heard = walks.iter_mut().zip(asked).map(|(walk, asked)| walk.hear(asked, onlookers, files, chains));
    let heard = heard.collect::<Result<Vec<_>>>()?;
    lap("hear tasks");
    for (Walk { process, borrowed, ours, .. }, (state, told)) in walks.into_iter().zip(heard) {
        borrowed.leave()?;
        let space = spaces.space((process, &state), told, &ours, files)?;
        w.put(Kind::PROCESS, process.pid.0 as u64, &state)?;
        w.put(Kind::MM, space.id.0, &space)?;
    }
    lap("maps");
    Ok(())
}

fn directory(process: &Process, name: &str) -> Result<OwnedFd> {
    let path = process.proc(name);
    open(&path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
        .doing(|| format!("open the {name} of {}", process.name()))
}

/// None when it is the pod's own.
fn root(process: &Process, init: HostPid, files: &mut FilesDump<'_>) -> Result<Option<FileId>> {
    let fd = directory(process, "root")?;
    let key = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
    let theirs = File::from(fd.try_clone().doing(|| "copy a descriptor".into())?).metadata();
    let ours = std::fs::metadata(format!("/proc/{init}/root"));
    if let (Ok(theirs), Ok(ours)) = (theirs, ours)
        && key(theirs) == key(ours)
    {
        return Ok(None);
    }
    files.path(fd, "root directory").map(Some)
}
