//! Making the processes of a pod with their pids, parents, sessions and groups.
//!
//! A process gets its session from whoever forks it, so the order matters. A child is made by its parent
//! - *late*, after the parent's setsid(2), when it shares the parent's session or leads its own, or
//! - *early*, before it, when it is in the session that the parent came from.
//!
//! Any other process was reparented to an ancestor after its parent ended: it is made by a short-lived helper that the
//! leader of its session forks (or that has the leader's pid itself, when the leader is gone), and comes to its parent
//! when the helper ends. Roots (no parent in the pod) are entered from outside like `pod exec` does.

use super::plan::{Made, free_pid, plan};
use super::sow::Seed;
use super::{Image, no_room};
use crate::crew;
use crate::ids::{FileId, HostPid, PodPid, RemoteAddress};
use crate::laps::lap;
use crate::objects::files::opener::Memory;
use crate::objects::files::{ControllingTerminal, Opener, Opening};
use crate::objects::task::{Filter, Life, Node, seccomp, signals};
use crate::remote::plain::{OPTIONS, Stub};
use crate::remote::{Arg, RemoteCall};
use crate::{Doing, Problem, Result};
use pod_runtime::birth::{self, Born};
use pod_runtime::proc::{self, maps, status};
use pod_runtime::sys::pidfd;
use pod_runtime::sys::ptrace::{self, Wait};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::OwnedFd;

const CLONE_FLAGS: usize = 0;
const EXIT_SIGNAL: usize = 4;
const SET_TID: usize = 8;
const SET_TID_COUNT: usize = 9;
/// struct clone_args, in words.
const CLONE_ARGS: usize = 11;

/// The tree as it stands: stopped tasks, each with the stub. Dropping it kills the pod.
pub(super) struct Grown {
    pub base: RemoteAddress,
    /// Living processes and those that are to be zombies, by pid.
    pub stubs: BTreeMap<PodPid, Stub>,
    /// All threads of a process but the leader, once they exist.
    pub threads: BTreeMap<PodPid, Vec<Stub>>,
    /// Roots besides the first process, as this host numbers them.
    pub roots: Vec<i32>,
    /// So many filters of each task's chain are installed: all have them in common.
    pub filters: usize,
    /// What all of them have from the first process.
    pub inherited: Inherited,
    /// Where vdso and vvar wait, in every task: name, start, end.
    pub kernel_maps: Vec<(String, u64, u64)>,
    init: OwnedFd,
    armed: bool,
    /// Stopped processes were told so.
    stopped: bool,
}

/// Settings in /proc that a child has from its parent. None where that is not the same for all.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Inherited {
    pub oom_score_adj: Option<i32>,
    pub coredump_filter: Option<u32>,
}

impl Inherited {
    fn from(first: i32) -> Inherited {
        let read = |name| fs::read_to_string(format!("/proc/{first}/{name}")).unwrap_or_default();
        Inherited {
            oom_score_adj: read("oom_score_adj").trim().parse().ok(),
            coredump_filter: u32::from_str_radix(read("coredump_filter").trim(), 16).ok(),
        }
    }
}

impl Drop for Grown {
    fn drop(&mut self) {
        if self.armed {
            // The first process takes all others of its pid namespace with it.
            let _ = pidfd::send_signal(&self.init, libc::SIGKILL);
        }
    }
}

impl Grown {
    /// End of what the engine uses in every address space.
    pub fn reserved_end(&self) -> u64 {
        reserved_end(self.base, &self.kernel_maps)
    }

    /// From here on no task dies with this process: they go where it leaves them. Their cgroup holds them.
    pub fn outlive(&mut self, image: &Image) -> Result<()> {
        self.stop(image)?;
        for stub in self.threads.values().flatten().chain(self.stubs.values()) {
            let set = ptrace::set_options(stub.task.0, OPTIONS & !ptrace::O_EXITKILL);
            set.doing(|| format!("let go of task {}", stub.task))?;
        }
        Ok(())
    }

    /// Stopped processes stop again by themselves.
    fn stop(&mut self, image: &Image) -> Result<()> {
        if std::mem::replace(&mut self.stopped, true) {
            return Ok(());
        }
        for node in image.nodes() {
            let Some(stub) = self.stubs.get(&node.pid) else { continue };
            if let Life::Stopped(signal) = node.life {
                // Pending until the detach; takes effect before the first instruction.
                kill(stub.task.0, signal).doing(|| format!("stop process {}", node.pid))?;
            }
        }
        Ok(())
    }

    /// Lets every task go.
    pub fn detach(&mut self, image: &Image) -> Result<Vec<i32>> {
        self.stop(image)?;
        self.armed = false;
        let threads = self.threads.values().flatten();
        for stub in threads.chain(self.stubs.values()) {
            // ESRCH: somebody killed it meanwhile, as may happen to any process.
            let _ = ptrace::detach(stub.task.0, 0);
        }
        Ok(std::mem::take(&mut self.roots))
    }
}

/// Makes all processes, each nothing but the stub, beside the opener.
pub(super) fn grow(
    image: &Image,
    born: &Born,
    seed: &Seed<'_>,
    opening: Opening,
    memory: Memory,
) -> Result<(Grown, Opener)> {
    let maps = read_maps(born.init)?;
    let base = find_base(image, &maps)?;
    let own = kernel_maps(maps);
    let chains = image.processes.values().flat_map(|process| &process.threads);
    let chains = chains.map(|thread| image.filters(&thread.seccomp)).collect::<Result<Vec<_>>>()?;
    let filters = seccomp::common(chains);
    let init = born.pidfd.try_clone().doing(|| "keep the first process".into())?;
    let mut grown = Grown {
        base,
        stubs: BTreeMap::new(),
        threads: BTreeMap::new(),
        roots: Vec::new(),
        filters: filters.len(),
        inherited: Inherited::from(born.init),
        kernel_maps: Vec::new(),
        init,
        armed: true,
        stopped: false,
    };
    grown.kernel_maps = places(&own, base);
    lap("places");
    let mut opener = opening.open(born, &image.files, memory)?;
    lap("open files");
    let mut children: BTreeMap<PodPid, Vec<&Node>> = BTreeMap::new();
    for node in image.nodes() {
        children.entry(node.parent).or_default().push(node);
    }
    let mut growing = Growing {
        plan: plan(image.nodes())?,
        terminals: image.files.controlling_terminals(),
        children,
        filters,
        opener: &mut opener,
        helper: free_pid(image, 1),
        groups: BTreeMap::new(),
        own,
        born,
        seed,
        image,
        grown,
    };
    for node in image.nodes().iter().filter(|node| node.parent == PodPid(0)) {
        growing.root(node)?;
    }
    lap("make processes");
    growing.all_made()?;
    growing.groups()?;
    growing.verify()?;
    let grown = growing.grown;
    Ok((grown, opener))
}

struct Growing<'a> {
    image: &'a Image,
    plan: BTreeMap<PodPid, Made>,
    terminals: BTreeMap<PodPid, ControllingTerminal>,
    children: BTreeMap<PodPid, Vec<&'a Node>>,
    /// Installed in the roots before they have children.
    filters: &'a [Filter],
    opener: &'a mut Opener,
    born: &'a Born,
    /// Memory that children are to inherit, and that of the first process that stays.
    seed: &'a Seed<'a>,
    own: BTreeMap<String, (u64, u64)>,
    /// The next pid for a helper.
    helper: PodPid,
    /// In which group each process is until [`Growing::groups`].
    groups: BTreeMap<PodPid, PodPid>,
    grown: Grown,
}

impl Growing<'_> {
    fn root(&mut self, node: &Node) -> Result<()> {
        let first = node.pid == PodPid(1);
        let task = if first {
            HostPid(self.born.init)
        } else {
            let park = || loop {
                nix::unistd::pause();
            };
            let host = birth::enter(&self.born.pidfd, &self.born.cgroup, Some(node.pid.0), park)
                .doing(|| format!("make process {}", node.pid))?;
            self.grown.roots.push(host);
            self.grown.inherited = Inherited::default();
            HostPid(host)
        };
        let stub = self.adopt(task)?;
        self.opener.opened()?;
        // The first one has begun a session, the others are in the monitor's group.
        self.groups.insert(node.pid, if first { node.pid } else { PodPid(0) });
        stub.run(&mut seccomp::install(self.filters))?;
        self.grown.stubs.insert(node.pid, stub);
        self.children(node.pid, node)
    }

    /// Seizes a process that waits in a system call and leaves nothing in it but the stub, vdso and vvar.
    fn adopt(&self, task: HostPid) -> Result<Stub> {
        ptrace::seize(task.0, OPTIONS).doing(|| format!("seize task {task}"))?;
        wait_parked(task)?;
        ptrace::interrupt(task.0).doing(|| format!("stop task {task}"))?;
        match ptrace::wait(task.0, true).doing(|| format!("wait for task {task}"))? {
            Wait::Stopped { event: ptrace::EVENT_STOP, .. } => {}
            other => return Err(Problem::new("E-INTERNAL", format!("the parked task {task} reports {other:?}"))),
        }
        let stub = Stub::install(task, self.grown.base)?;
        let mut calls = vec![super::memory::close_all(), forget_tid()];
        calls.extend(unregister_rseq(task)?);
        calls.extend(signals::without_handlers());
        for (name, to, _) in &self.grown.kernel_maps {
            let (start, end) = self.own[name];
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            let bytes = end - start;
            let args = vec![start.into(), bytes.into(), bytes.into(), flags.into(), (*to).into()];
            calls.push(RemoteCall::new("move the vdso", libc::SYS_mremap, args).returns(*to as i64));
        }
        let ours = self.grown.base.0..self.reserved_end();
        let first = task.0 == self.born.init;
        for (start, end) in gaps_between(&read_maps(task.0)?, &ours) {
            if first && self.seed.laid.keeps(start, end) {
                continue;
            }
            calls.push(RemoteCall::new("unmap", libc::SYS_munmap, vec![start.into(), (end - start).into()]));
        }
        stub.run(&mut calls)?;
        Ok(stub)
    }

    /// End of what the engine uses in every address space: the stub and behind it vdso and vvar.
    fn reserved_end(&self) -> u64 {
        self.grown.reserved_end()
    }

    fn children(&mut self, pid: PodPid, node: &Node) -> Result<()> {
        self.flags_before_children(node)?;
        self.seed.sow(pid, &self.grown.stubs[&pid], self.opener)?;
        self.make_all(pid, Made::Early)?;
        if node.session == pid {
            self.lead(node)?;
        }
        self.make_all(pid, Made::Late)?;
        self.orphans(pid)
    }

    /// What decides where orphans go.
    fn flags_before_children(&self, node: &Node) -> Result<()> {
        if !self.image.processes.get(&node.pid).is_some_and(|state| state.child_subreaper) {
            return Ok(());
        }
        let args = vec![libc::PR_SET_CHILD_SUBREAPER.into(), 1.into(), 0.into(), 0.into(), 0.into()];
        self.grown.stubs[&node.pid].call(RemoteCall::new("become a subreaper", libc::SYS_prctl, args)).map(drop)
    }

    fn make_all(&mut self, parent: PodPid, made: Made) -> Result<()> {
        let children = self.children.get(&parent).into_iter().flatten();
        let nodes: Vec<&Node> = children.copied().filter(|node| self.plan.get(&node.pid) == Some(&made)).collect();
        let stubs = fork_all(&self.grown.stubs[&parent], &nodes)?;
        self.grown.stubs.extend(nodes.iter().map(|node| node.pid).zip(stubs));
        let group = self.group_of(parent);
        self.groups.extend(nodes.iter().map(|node| (node.pid, group)));
        nodes.into_iter().try_for_each(|node| self.children(node.pid, node))
    }

    /// The group that a process is in now.
    fn group_of(&self, pid: PodPid) -> PodPid {
        self.groups.get(&pid).copied().unwrap_or(PodPid(0))
    }

    /// By a maker who is in `group`.
    fn make(&mut self, maker: &Stub, group: PodPid, node: &Node) -> Result<()> {
        let stub = fork(maker, node.pid, node.exit_signal)?;
        self.groups.insert(node.pid, group);
        self.grown.stubs.insert(node.pid, stub);
        self.children(node.pid, node)
    }

    /// setsid, and the controlling terminal before there are children to inherit it.
    fn lead(&mut self, node: &Node) -> Result<()> {
        self.groups.insert(node.pid, node.pid);
        let stub = &self.grown.stubs[&node.pid];
        let now = stub.call(RemoteCall::new("getsid", libc::SYS_getsid, vec![0.into()]))?;
        if now != i64::from(node.pid.0) {
            stub.call(RemoteCall::new("setsid", libc::SYS_setsid, Vec::new()).returns(node.pid.0.into()))?;
        }
        match self.terminals.get(&node.pid) {
            Some(terminal) => take_terminal(stub, self.opener, terminal.file),
            None => Ok(()),
        }
    }

    /// Processes of the session that `leader` leads, and whose parents are gone. Those of sessions without a leader are
    /// made by the first process.
    fn orphans(&mut self, leader: PodPid) -> Result<()> {
        let nodes: BTreeMap<PodPid, &Node> = self.image.nodes().iter().map(|node| (node.pid, node)).collect();
        let mut sessions: BTreeMap<PodPid, Vec<&Node>> = BTreeMap::new();
        for node in self.image.nodes() {
            let Some(Made::Orphan(session)) = self.plan.get(&node.pid) else { continue };
            let dead = !nodes.contains_key(session);
            if *session == leader || (dead && leader == PodPid(1)) {
                sessions.entry(*session).or_default().push(node);
            }
        }
        for (session, orphans) in sessions {
            let maker = self.grown.stubs[&leader];
            let dead = session != leader;
            let pid = if dead { session } else { self.next_helper() };
            if dead && (session == PodPid(0) || self.grown.stubs.contains_key(&session)) {
                let what = format!("process {} is in a session outside of the pod", orphans[0].pid);
                return Err(Problem::new("E-SESSION-OUTSIDE", what).fix("start it with setsid(1) or by `pod exec`"));
            }
            let helper = fork(&maker, pid, libc::SIGCHLD)?;
            if dead {
                helper.call(RemoteCall::new("setsid", libc::SYS_setsid, Vec::new()).returns(pid.0.into()))?;
            }
            let group = if dead { pid } else { self.group_of(leader) };
            for node in orphans {
                self.make(&helper, group, node)?;
            }
            end_helper(&maker, helper, pid)?;
        }
        Ok(())
    }

    fn next_helper(&mut self) -> PodPid {
        self.helper.0 += 1;
        self.helper
    }

    /// A process whose session's leader descends from it is made by nobody. The kernel has no such tree; an image can.
    fn all_made(&self) -> Result<()> {
        match self.image.nodes().iter().find(|node| !self.grown.stubs.contains_key(&node.pid)) {
            None => Ok(()),
            Some(node) => Err(Problem::new("E-TREE-SHAPE", format!("process {} can be made by nobody", node.pid))),
        }
    }

    /// Process groups, once everybody exists. A group whose leader is gone is led by a helper for a moment. (That they
    /// are what was noted while the processes were made, [`Growing::verify`] sees.)
    fn groups(&mut self) -> Result<()> {
        let nodes = self.image.nodes();
        let leaders = nodes.iter().filter(|node| node.group == node.pid && node.session != node.pid);
        for node in leaders {
            self.join_group(node.pid, PodPid(0))?;
        }
        // Also the group of a session's leader that is gone, in which its processes came to be: its number is taken.
        let there = nodes.iter().filter(|node| self.group_of(node.pid) == node.group).map(|node| node.group);
        let there: BTreeSet<PodPid> = nodes.iter().map(|node| node.pid).chain(there).collect();
        let mut helpers = Vec::new();
        let mut led = BTreeSet::new();
        for node in nodes.iter().filter(|node| node.group != node.pid && node.group != PodPid(0)) {
            if !there.contains(&node.group) && led.insert(node.group) {
                let maker = self.grown.stubs[&node.pid];
                let helper = fork(&maker, node.group, libc::SIGCHLD)?;
                helper.call(RemoteCall::new("setpgid", libc::SYS_setpgid, vec![0.into(), 0.into()]))?;
                helpers.push((maker, helper, node.group));
            }
            self.join_group(node.pid, node.group)?;
        }
        helpers.into_iter().try_for_each(|(maker, helper, pid)| end_helper(&maker, helper, pid))
    }

    fn join_group(&self, pid: PodPid, group: PodPid) -> Result<()> {
        let stub = &self.grown.stubs[&pid];
        let wanted = if group == PodPid(0) { pid } else { group };
        if self.group_of(pid) == wanted {
            return Ok(());
        }
        let call = RemoteCall::new(format!("join group {wanted}"), libc::SYS_setpgid, vec![0.into(), group.0.into()]);
        stub.call(call).map(drop)
    }

    /// The tree must be the one that was asked for; a mistake here would only show much later.
    fn verify(&self) -> Result<()> {
        let hosts: BTreeMap<i32, PodPid> = self.grown.stubs.iter().map(|(&pid, stub)| (stub.task.0, pid)).collect();
        let nodes = self.image.nodes();
        let texts = crew::share(nodes.len(), |at| {
            let stub = self.grown.stubs.get(&nodes[at].pid);
            let stub =
                stub.ok_or_else(|| Problem::new("E-INTERNAL", format!("process {} was not made", nodes[at].pid)))?;
            let path = format!("/proc/{}/status", stub.task);
            proc::read(&path).doing(|| format!("read {path}"))
        });
        for (node, text) in nodes.iter().zip(texts) {
            let text = text?;
            let status = status::parse(&text);
            let last = |pids: &[i32]| PodPid(pids.last().copied().unwrap_or(0));
            let parent = hosts.get(&status.parent).copied().unwrap_or(PodPid(0));
            let got = (last(&status.ns_tgid), parent, last(&status.ns_session), last(&status.ns_group));
            let session_known = node.session != PodPid(0);
            let wanted = (node.pid, node.parent, node.session, node.group);
            let same = got.0 == wanted.0
                && got.1 == wanted.1
                && (!session_known || got.2 == wanted.2)
                && (node.group == PodPid(0) || got.3 == wanted.3);
            if !same {
                let what =
                    format!("process {} came out as {got:?} (pid, parent, session, group), not {wanted:?}", node.pid);
                return Err(Problem::new("E-TREE-SHAPE", what));
            }
        }
        Ok(())
    }
}

/// A child of `maker` with this pid, as by fork.
fn fork(maker: &Stub, pid: PodPid, exit_signal: i32) -> Result<Stub> {
    maker.clone3(clone3(format!("make process {pid}"), 0, exit_signal, pid))
}

/// Children of one process, all at once.
fn fork_all(maker: &Stub, nodes: &[&Node]) -> Result<Vec<Stub>> {
    if nodes.is_empty() {
        return Ok(Vec::new());
    }
    let flags = libc::CLONE_PTRACE as u64;
    let call = |node: &&Node| clone3(format!("make process {}", node.pid), flags, node.exit_signal, node.pid);
    maker.clone3_all(&mut nodes.iter().map(call).collect::<Vec<_>>())?;
    // The kernel lists children in the order in which they came; `verify` sees whether it is so.
    let path = format!("/proc/{0}/task/{0}/children", maker.task);
    let text = proc::read(&path).doing(|| format!("read {path}"))?;
    let all: Vec<i32> = text.split_ascii_whitespace().filter_map(|word| word.parse().ok()).collect();
    let Some(before) = all.len().checked_sub(nodes.len()) else {
        return Err(Problem::new("E-INTERNAL", format!("{} children came of {}", all.len(), nodes.len())));
    };
    all[before..].iter().map(|task| maker.new_process(HostPid(*task))).collect()
}

/// A clone3 with a chosen pid.
pub(super) fn clone3(what: String, flags: u64, exit_signal: i32, pid: PodPid) -> RemoteCall {
    let mut words = [0u64; CLONE_ARGS];
    words[CLONE_FLAGS] = flags;
    words[EXIT_SIGNAL] = exit_signal as u64;
    words[SET_TID_COUNT] = 1;
    let block: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let arg = Arg::Nested(block, vec![(SET_TID, pid.0.to_ne_bytes().to_vec())]);
    RemoteCall::new(what, libc::SYS_clone3, vec![arg, ((CLONE_ARGS * 8) as u64).into()]).returns(pid.0.into())
}

/// Ends a helper; its children go to their real parent, its maker reaps it and gets no SIGCHLD for it.
fn end_helper(maker: &Stub, helper: Stub, pid: PodPid) -> Result<()> {
    helper.end(RemoteCall::new("end a helper", libc::SYS_exit_group, vec![0.into()]))?;
    reap(maker, pid)
}

/// wait4 by the parent, and away with the signal.
fn reap(parent: &Stub, pid: PodPid) -> Result<()> {
    let args = vec![pid.0.into(), 0.into(), libc::__WALL.into(), 0.into()];
    let mut calls = vec![RemoteCall::new("reap a helper", libc::SYS_wait4, args).returns(pid.0.into())];
    calls.push(swallow(libc::SIGCHLD));
    parent.run(&mut calls)
}

/// Takes one pending signal away.
pub(super) fn swallow(signal: i32) -> RemoteCall {
    let set = (1u64 << (signal - 1)).to_ne_bytes().to_vec();
    let args = vec![Arg::In(set), 0.into(), Arg::In(vec![0; 16]), 8.into()];
    RemoteCall::new("swallow a signal", libc::SYS_rt_sigtimedwait, args).may_fail()
}

/// TIOCSCTTY through a descriptor of the opener.
fn take_terminal(stub: &Stub, opener: &Opener, file: FileId) -> Result<()> {
    let number = *opener.numbers().get(&file).ok_or_else(|| crate::image::damaged("a terminal that is not open"))?;
    // A fresh process: its descriptors count from 0.
    let mut calls = vec![
        RemoteCall::new("open the opener", libc::SYS_pidfd_open, vec![opener.pid().0.into(), 0.into()]).returns(0),
        RemoteCall::new("take the terminal", libc::SYS_pidfd_getfd, vec![0.into(), number.into(), 0.into()]).returns(1),
        RemoteCall::new(
            "make it the controlling one",
            libc::SYS_ioctl,
            vec![1.into(), Arg::Value(libc::TIOCSCTTY), 0.into()],
        ),
        RemoteCall::new("close it", libc::SYS_close, vec![1.into()]),
        RemoteCall::new("close the opener", libc::SYS_close, vec![0.into()]),
    ];
    stub.run(&mut calls)
}

/// What the parked process's libc told the kernel about memory that is about to go: the kernel would kill the task when
/// it cannot update its rseq area.
fn unregister_rseq(task: HostPid) -> Result<Option<RemoteCall>> {
    const UNREGISTER: i32 = 1;
    let rseq = ptrace::rseq_configuration(task.0).doing(|| format!("ask for the rseq area of task {task}"))?;
    if rseq.pointer == 0 {
        return Ok(None);
    }
    let args =
        vec![rseq.pointer.into(), u64::from(rseq.size).into(), UNREGISTER.into(), u64::from(rseq.signature).into()];
    Ok(Some(RemoteCall::new("unregister rseq", libc::SYS_rseq, args)))
}

fn forget_tid() -> RemoteCall {
    RemoteCall::new("forget the tid address", libc::SYS_set_tid_address, vec![0.into()])
}

/// A parked process has to be inside of its system call: the stub is brought in through that very instruction.
fn wait_parked(task: HostPid) -> Result<()> {
    let path = format!("/proc/{task}/syscall");
    let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
    loop {
        let text = fs::read_to_string(&path).doing(|| format!("read {path}"))?;
        let number = text.split_ascii_whitespace().next().and_then(|word| word.parse::<i64>().ok());
        if number.is_some_and(|number| {
            [libc::SYS_read, libc::SYS_recvfrom, libc::SYS_pause, libc::SYS_ppoll].contains(&number)
        }) {
            return Ok(());
        }
        if std::time::Instant::now() > until {
            return Err(Problem::new(
                "E-INTERNAL",
                format!("the parked task {task} does not wait: {}", text.trim_end()),
            ));
        }
        std::thread::sleep(std::time::Duration::from_micros(50));
    }
}

fn read_maps(pid: i32) -> Result<Vec<maps::Map>> {
    let path = format!("/proc/{pid}/maps");
    let text = fs::read(&path).doing(|| format!("read {path}"))?;
    Ok(maps::parse(&String::from_utf8_lossy(&text)))
}

/// Those of vdso and vvar, by name.
fn kernel_maps(maps: Vec<maps::Map>) -> BTreeMap<String, (u64, u64)> {
    maps.into_iter().filter(|map| is_kernel_map(&map.name)).map(|map| (map.name, (map.start, map.end))).collect()
}

pub(super) fn is_kernel_map(name: &str) -> bool {
    name == "[vdso]" || name.starts_with("[vvar")
}

/// Where they wait behind the stub, in the order and with the distances that they have.
fn places(own: &BTreeMap<String, (u64, u64)>, base: RemoteAddress) -> Vec<(String, u64, u64)> {
    let first = own.values().map(|(start, _)| *start).min().unwrap_or(0);
    let at = base.0 + Stub::BYTES;
    let mut places: Vec<_> =
        own.iter().map(|(name, (start, end))| (name.clone(), at + (start - first), at + (end - first))).collect();
    places.sort_by_key(|(_, start, _)| *start);
    places
}

fn reserved_end(base: RemoteAddress, kernel_maps: &[(String, u64, u64)]) -> u64 {
    kernel_maps.iter().map(|(_, _, end)| *end).max().unwrap_or(0).max(base.0 + Stub::BYTES)
}

/// Ranges to unmap: all that is mapped, but what the engine keeps and what the kernel does not give away.
fn gaps_between(maps: &[maps::Map], keep: &std::ops::Range<u64>) -> Vec<(u64, u64)> {
    let mut ranges = Vec::new();
    for map in maps.iter().filter(|map| !is_kernel_map(&map.name) && map.name != "[vsyscall]") {
        if map.start >= keep.end || map.end <= keep.start {
            ranges.push((map.start, map.end));
        }
    }
    ranges
}

/// An address at which nothing is in any address space of the image, nor in the parked process.
fn find_base(image: &Image, parked: &[maps::Map]) -> Result<RemoteAddress> {
    const LOWEST: u64 = 1 << 20;
    const HIGHEST: u64 = 0x7fff_0000_0000;
    /// Room for the stub and for vdso and vvar behind it.
    const NEEDED: u64 = Stub::BYTES + (1 << 20);
    let mut taken: Vec<(u64, u64)> =
        image.spaces.values().flat_map(|space| space.maps.iter().map(|map| (map.start, map.end))).collect();
    taken.extend(parked.iter().map(|map| (map.start, map.end)));
    taken.sort_unstable();
    let mut free_from = LOWEST;
    for (start, end) in taken {
        // A growing stack needs its guard below.
        if start.saturating_sub(free_from) > NEEDED + (2 << 20) && free_from + NEEDED < HIGHEST {
            return Ok(RemoteAddress(free_from + (1 << 20)));
        }
        free_from = free_from.max(end).next_multiple_of(4096);
    }
    Err(no_room())
}

fn kill(task: i32, signal: i32) -> nix::Result<()> {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(task), nix::sys::signal::Signal::try_from(signal)?)
}
