//! Holding all tasks of a pod still, so that they can be looked at, and letting them go again.
//!
//! Every thread is seized and interrupted; new ones that a running thread makes meanwhile are caught by the fork and
//! clone events. Nothing is ever left that only a living tracer undoes: tracees are seized without EXITKILL, so when
//! this process is killed the kernel detaches them and they run on. Dropping [`Frozen`] thaws.
//!
//! ptrace is bound to a thread: a [`Frozen`] must be used and dropped by the thread that made it.

use crate::crew;
use crate::ids::{HostPid, PodPid, TaskFd};
use crate::objects::memory::areas;
use crate::objects::task::glance::{self, Glance, Seen, Spokesmen};
use crate::objects::task::interrupted::{self, Healed, Interrupted};
use crate::objects::task::waits::Waits;
use crate::objects::task::{Life, check};
use pod_runtime::proc::maps::Map;
use pod_runtime::proc::{self, stat, status};
use pod_runtime::sys::pidfd;
use pod_runtime::sys::ptrace::{self, Regs, RseqConfiguration, Wait};
use pod_runtime::{Doing, Problem, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::marker::PhantomData;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A task cannot be stopped now: the parent of a vfork whose child has not yet exec'ed, or one in the middle of I/O.
pub const BUSY: &str = "E-TASK-BUSY";
/// A task is traced by another (a debugger in the pod or outside).
pub const TRACED: &str = "E-TASK-TRACED";
/// A task lives in a pid namespace below the pod's own.
pub const NESTED: &str = "E-NESTED-NAMESPACE";

/// How long all tasks together may take to stop before the freeze is tried again.
const STOP_WITHIN: Duration = Duration::from_millis(500);
const ATTEMPTS: u32 = 8;
/// So often those that have not stopped are looked at again without a sleep.
const YIELDS: u32 = 64;

/// All processes of a pod, each thread in a ptrace stop.
pub struct Frozen {
    processes: Vec<Process>,
    zombies: Vec<Zombie>,
    since: Instant,
    /// ptrace verbs belong to the thread that seized.
    not_send: PhantomData<*const ()>,
}

/// A living process. Its threads are stopped.
pub struct Process {
    pub pid: PodPid,
    /// Of a thread that lives: the first, unless that has ended.
    pub host: HostPid,
    pub pidfd: OwnedFd,
    /// The first thread ended before the others; with this status, as wait(2) reports it.
    pub leader_ended: Option<i32>,
    /// 0 for a root: its parent is outside of the pod.
    pub parent: PodPid,
    pub group: PodPid,
    pub session: PodPid,
    pub life: Life,
    pub comm: String,
    pub exit_signal: i32,
    /// The leader first, unless it ended before the others.
    pub threads: Vec<Thread>,
    pub status: status::Status,
    pub stat: stat::Stat,
    /// Its maps with their flags, once [`Frozen::look`] was called. A frozen process does not change them.
    pub maps: Vec<Map>,
    /// From then on, too.
    pub texts: Texts,
    /// Once [`Frozen::clock_stands`] was called.
    pub standstill: Option<Standstill>,
}

/// When the pod's clocks were noted: from then on they stand still for the pod, and what it reads on a clock that has gone
/// on meanwhile must be put right by so much.
#[derive(Debug, Clone, Copy)]
pub struct Standstill {
    pub here: Instant,
    /// The pod's CLOCK_MONOTONIC then, nanoseconds.
    pub monotonic: i64,
}

impl Standstill {
    /// What remained until an expiry by `clock` when the clocks were noted, of which `left` remains now; `now` is the pod's
    /// CLOCK_MONOTONIC, if a task of the pod was asked. CPU time does not pass while a task stands. 0 is disarmed.
    pub fn remaining(&self, clock: i32, left_ns: u64, now: Option<i64>) -> u64 {
        let of_the_cpu = clock < 0 || [libc::CLOCK_PROCESS_CPUTIME_ID, libc::CLOCK_THREAD_CPUTIME_ID].contains(&clock);
        if left_ns == 0 || of_the_cpu {
            return left_ns;
        }
        let passed = match now {
            Some(now) => now.saturating_sub(self.monotonic).max(0) as u64,
            None => self.here.elapsed().as_nanos() as u64,
        };
        left_ns.saturating_add(passed)
    }
}

/// What /proc says of a process.
#[derive(Debug, Default)]
pub struct Texts {
    pub limits: String,
    pub oom_score_adj: String,
    pub coredump_filter: Option<String>,
    pub timers: String,
}

impl Texts {
    fn read(process: &Process) -> Result<Texts> {
        Ok(Texts {
            limits: process.text("limits")?,
            oom_score_adj: process.text("oom_score_adj")?,
            coredump_filter: process.text("coredump_filter").ok(),
            timers: process.text("timers").unwrap_or_default(),
        })
    }
}

/// A stopped thread.
pub struct Thread {
    pub tid: PodPid,
    pub host: HostPid,
    /// As it stopped; what it goes on with.
    pub regs: Regs,
    /// The stop signal when it is in a group-stop.
    pub group_stop: Option<i32>,
    /// As it was when everything had stopped.
    pub status: status::Status,
    /// The call that the stop has interrupted.
    pub interrupted: Interrupted,
    /// Its registration for restartable sequences, if it was asked for.
    pub rseq: Option<RseqConfiguration>,
    /// Of a process with many threads.
    pub seen: Option<Seen>,
}

/// A process that ended and was not waited for.
#[derive(Debug, Clone)]
pub struct Zombie {
    pub pid: PodPid,
    pub host: HostPid,
    pub parent: PodPid,
    pub group: PodPid,
    pub session: PodPid,
    pub exit_signal: i32,
    /// As wait(2) reports it.
    pub status: i32,
    pub comm: String,
}

impl Process {
    /// A file of its directory in /proc: `maps`, `fd/3`, …
    pub fn proc(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.host))
    }

    /// The text of such a file.
    pub fn text(&self, name: &str) -> Result<String> {
        let path = self.proc(name);
        proc::read(&path).doing(|| format!("read {}", path.display()))
    }

    /// A copy of one of its descriptors.
    pub fn take(&self, fd: TaskFd) -> Result<OwnedFd> {
        pidfd::get_fd(&self.pidfd, fd.0).doing(|| format!("take descriptor {fd} of {}", self.name()))
    }

    /// For messages: "41 (nginx)".
    pub fn name(&self) -> String {
        format!("{} ({})", self.pid, self.comm)
    }

    /// Which of its threads are asked for all.
    pub fn spokesmen(&self) -> Spokesmen {
        Spokesmen::of(self.threads.iter().map(|thread| thread.seen.as_ref()))
    }

    /// Threads, as the host numbers them, of which another one shows what they have.
    fn like_others(&self) -> BTreeSet<i32> {
        let spokesmen = self.spokesmen();
        let others = self.threads.iter().enumerate().filter(|(at, _)| spokesmen.like(*at) != *at);
        others.map(|(_, thread)| thread.host.0).collect()
    }

    /// Any living thread: the leader, unless it ended.
    pub fn leader(&self) -> &Thread {
        &self.threads[0]
    }
}

impl Thread {
    pub fn proc(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/task/{}/{name}", self.host, self.host))
    }
}

impl Frozen {
    /// Stops every task of the pod. `members` lists the processes of its cgroup as the host numbers them and is asked
    /// until nothing new turns up; `init` is the first process. `waits` was asked just before.
    pub fn seize(init: HostPid, members: impl Fn() -> Result<Vec<i32>>, waits: &Waits) -> Result<Frozen> {
        let mut attempt = 0;
        loop {
            let since = Instant::now();
            let mut hunt = Hunt::default();
            // Dropping an unfinished hunt lets go of all that it caught.
            match hunt.all(&|| Ok(with(init, members()?)), waits) {
                Ok(()) => return hunt.settle(init, since, waits),
                Err(problem) if problem.code() == BUSY && attempt < ATTEMPTS => {
                    attempt += 1;
                    drop(hunt);
                    std::thread::sleep(Duration::from_millis(1 << attempt.min(6)));
                }
                Err(problem) => return Err(problem),
            }
        }
    }

    /// As [`Frozen::seize`], but the processes `last` run on when all others stand still, until `then` has returned; it
    /// says what they wait for then.
    pub fn seize_last(
        init: HostPid,
        members: impl Fn() -> Result<Vec<i32>>,
        mut waits: Waits,
        last: &BTreeSet<i32>,
        then: impl FnOnce() -> Waits,
    ) -> Result<Frozen> {
        let mut hunt = Hunt::default();
        let first = || Ok(with(init, members()?).into_iter().filter(|pid| !last.contains(pid)).collect());
        let started = hunt.all(&first, &waits);
        if started.is_ok() {
            waits.extend(then());
            let since = Instant::now();
            match hunt.all(&|| Ok(with(init, members()?)), &waits) {
                Ok(()) => return hunt.settle(init, since, &waits),
                Err(problem) if problem.code() != BUSY => return Err(problem),
                Err(_) => {}
            }
        }
        drop(hunt);
        Frozen::seize(init, members, &waits)
    }

    pub fn processes(&self) -> &[Process] {
        &self.processes
    }

    pub fn processes_mut(&mut self) -> &mut [Process] {
        &mut self.processes
    }

    pub fn zombies(&self) -> &[Zombie] {
        &self.zombies
    }

    pub fn process(&self, pid: PodPid) -> Option<&Process> {
        self.processes.iter().find(|process| process.pid == pid)
    }

    /// Reads what /proc shows of all processes, if that was not done: maps (0.2 ms and more each), texts, and what
    /// stands against a process, of which the first is the error. All CPUs have a share.
    pub fn look(&mut self) -> Result<()> {
        enum Seen {
            Maps(Vec<Map>),
            Rest(Texts),
        }
        let Some(first) = self.processes.first().filter(|first| first.maps.is_empty()) else { return Ok(()) };
        let common = check::Common::of(first.host);
        let processes = &self.processes;
        let seen = crew::share(processes.len() * 2, |piece| {
            let process = &processes[piece / 2];
            if piece % 2 == 0 {
                return areas::of(process.host.0, |file| process.text(file)).map(Seen::Maps);
            }
            let others = process.like_others();
            match check::frozen(process.host, &process.status, &common, &others).into_iter().next() {
                Some(problem) => Err(problem),
                None => Texts::read(process).map(Seen::Rest),
            }
        });
        for (piece, seen) in seen.into_iter().enumerate() {
            let process = &mut self.processes[piece / 2];
            match seen? {
                Seen::Maps(maps) => process.maps = maps,
                Seen::Rest(texts) => process.texts = texts,
            }
        }
        Ok(())
    }

    /// Since when nothing runs.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// The clock of the pod has gone on up to here since its tasks were stopped, one after the other: for as long their
    /// waits have waited. What is read of timers later has gone on beyond it.
    pub fn clock_stands(&mut self, standstill: Standstill) {
        let here = standstill.here;
        for process in &mut self.processes {
            process.standstill = Some(standstill);
            for (waiting, then) in process.threads.iter_mut().filter_map(|thread| thread.interrupted.waiting.as_mut()) {
                let waited = here.saturating_duration_since(*then).as_nanos() as u64;
                (waiting.remaining_ns, *then) = (waiting.remaining_ns.saturating_sub(waited), here);
            }
        }
    }

    /// Since when the clocks of the pod stand, if they do.
    pub fn standstill(&self) -> Option<Standstill> {
        self.processes.first()?.standstill
    }

    /// Lets all tasks run on where they were.
    pub fn thaw(self) {
        drop(self);
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for thread in self.processes.iter().flat_map(|process| &process.threads) {
            // ESRCH: it was killed meanwhile.
            let _ = ptrace::detach(thread.host.0, 0);
        }
    }
}

/// Seized tasks on the way to being frozen.
#[derive(Default)]
struct Hunt {
    /// Seized threads by host tid; the value says where each stopped.
    caught: BTreeMap<i32, Option<Stop>>,
    /// Processes with many of them.
    crowded: BTreeSet<i32>,
}

#[derive(Debug, Clone, Copy)]
struct Stop {
    group: Option<i32>,
    healed: Healed,
}

impl Drop for Hunt {
    fn drop(&mut self) {
        for (&tid, stop) in &self.caught {
            if stop.is_none() {
                // Detaching needs a stop; an interrupt is on its way unless the task cannot take it now. What stays
                // attached is let go by the kernel when this process ends, or caught by the next attempt.
                let _ = ptrace::interrupt(tid);
                let until = Instant::now() + Duration::from_millis(20);
                while matches!(ptrace::wait(tid, false), Ok(Wait::Nothing)) && Instant::now() < until {
                    std::thread::sleep(Duration::from_micros(100));
                }
            }
            let _ = ptrace::detach(tid, 0);
        }
    }
}

const OPTIONS: i32 = ptrace::O_TRACECLONE
    | ptrace::O_TRACEFORK
    | ptrace::O_TRACEVFORK
    | ptrace::O_TRACESYSGOOD
    | ptrace::O_SUSPEND_SECCOMP;

impl Hunt {
    fn all(&mut self, members: &impl Fn() -> Result<Vec<i32>>, waits: &Waits) -> Result<()> {
        loop {
            let mut fresh = false;
            for pid in members()? {
                let tids = threads_of(pid);
                if tids.len() >= glance::MANY {
                    self.crowded.insert(pid);
                }
                for tid in tids {
                    if !self.caught.contains_key(&tid) {
                        fresh |= self.seize(tid)?;
                    }
                }
            }
            self.wait_all(waits)?;
            if !fresh {
                return Ok(());
            }
        }
    }

    /// False when the task is gone.
    fn seize(&mut self, tid: i32) -> Result<bool> {
        match ptrace::seize(tid, OPTIONS) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(false),
            // An earlier attempt could not let go of a task that was too busy to stop.
            Err(_) if read_status(tid).is_ok_and(|status| status.tracer == std::process::id() as i32) => {}
            Err(error) => return refuse_seize(tid, error),
        }
        self.caught.insert(tid, None);
        // ESRCH: it ended between the two; the wait below tells.
        let _ = ptrace::interrupt(tid);
        Ok(true)
    }

    /// Until every caught task has stopped or ended.
    fn wait_all(&mut self, waits: &Waits) -> Result<()> {
        let until = Instant::now() + STOP_WITHIN;
        let mut patience = 0;
        loop {
            let pending: Vec<i32> =
                self.caught.iter().filter(|(_, stop)| stop.is_none()).map(|(&tid, _)| tid).collect();
            if pending.is_empty() {
                return Ok(());
            }
            let mut moved = false;
            for &tid in &pending {
                moved |= self.look_at(tid, waits)?;
            }
            if !moved {
                if Instant::now() > until {
                    return Err(Problem::new(BUSY, format!("{} cannot be stopped now", describe(pending[0])))
                        .fix("try again; it waits for a child that is about to start a program, or for the disk"));
                }
                // A task that can stop does so in some 10 microseconds, and the shortest sleep takes 70.
                patience += 1;
                match patience <= YIELDS {
                    true => std::thread::yield_now(),
                    false => std::thread::sleep(Duration::from_micros(20)),
                }
            }
        }
    }

    /// Handles what one task has to say; true when it said something.
    fn look_at(&mut self, tid: i32, waits: &Waits) -> Result<bool> {
        let stopped = match ptrace::wait(tid, false) {
            Ok(Wait::Nothing) => return Ok(false),
            Ok(Wait::Ended(_)) => None,
            Err(error) if error.raw_os_error() == Some(libc::ECHILD) => None,
            Err(error) => return Err(error).doing(|| format!("wait for {}", describe(tid))),
            Ok(Wait::Stopped { signal, event }) => Some((signal, event)),
        };
        let Some((signal, event)) = stopped else {
            self.caught.remove(&tid);
            return Ok(true);
        };
        match event {
            ptrace::EVENT_STOP => {
                // At once: were we killed now, the program would see an EINTR that our stop has made.
                let Some(healed) = interrupted::heal(tid, waits)? else { return Ok(false) };
                let group = (signal != libc::SIGTRAP).then_some(signal);
                self.caught.insert(tid, Some(Stop { group, healed }));
            }
            ptrace::EVENT_FORK | ptrace::EVENT_VFORK | ptrace::EVENT_CLONE => {
                // The newborn is attached already and stops by itself.
                if let Ok(child) = ptrace::event_message(tid) {
                    self.caught.entry(child as i32).or_insert(None);
                }
                let _ = ptrace::cont(tid, 0);
            }
            // A signal on its way in: let it take effect; the interrupt comes right after.
            0 => drop(ptrace::cont(tid, signal & 0x7f)),
            _ => drop(ptrace::cont(tid, 0)),
        }
        Ok(true)
    }

    /// The threads of crowded processes, if the kernel tells of many at once.
    fn glance(&self) -> BTreeMap<i32, Seen> {
        let Some(glance) = (!self.crowded.is_empty()).then(Glance::get).flatten() else { return BTreeMap::new() };
        let of = |process: &i32| {
            let seen = glance.of(*process);
            seen.inspect_err(|why| tracing::debug!(process, %why, "threads are asked one by one")).unwrap_or_default()
        };
        self.crowded.iter().flat_map(of).collect()
    }

    /// Everything is still: who is who.
    fn settle(mut self, init: HostPid, since: Instant, waits: &Waits) -> Result<Frozen> {
        let mut by_process: BTreeMap<i32, Vec<Thread>> = BTreeMap::new();
        let caught: Vec<(i32, Stop)> = self.caught.iter().filter_map(|(tid, stop)| Some((*tid, (*stop)?))).collect();
        let mut seen = self.glance();
        let statuses = glance::statuses(caught.iter().map(|(tid, _)| *tid), &seen, read_status);
        for ((tid, Stop { group, healed }), status) in caught.into_iter().zip(statuses) {
            let status = status.doing(|| format!("read the status of task {tid}"))?;
            let interrupted = interrupted::look(tid, &healed, waits, &status);
            let process = by_process.entry(status.tgid).or_default();
            process.push(Thread {
                tid: last(&status.ns_pid),
                host: HostPid(tid),
                regs: healed.regs,
                group_stop: group,
                status,
                interrupted,
                rseq: healed.rseq,
                seen: seen.remove(&tid),
            });
        }
        let level = read_status(init.0).doing(|| "read the status of the first process".into())?.ns_pid.len();
        let mut processes = Vec::new();
        let may_have_some = |thread: &&Thread| thread.seen.as_ref().is_none_or(|seen| !seen.childless);
        let tasks = by_process
            .iter()
            .flat_map(|(host, threads)| threads.iter().filter(may_have_some).map(|thread| (*host, thread.host.0)));
        let tasks: Vec<(i32, i32)> = tasks.collect();
        let children = crew::share(tasks.len(), |at| children_of(tasks[at].0, tasks[at].1));
        let children: BTreeSet<i32> = children.into_iter().flatten().collect();
        for (host, mut threads) in by_process {
            threads.sort_by_key(|thread| (thread.host.0 != host, thread.tid));
            processes.push(describe_process(host, threads, level)?);
        }
        // From here on the processes are let go by Frozen.
        self.caught.clear();
        let mut frozen = Frozen { processes, zombies: Vec::new(), since, not_send: PhantomData };
        frozen.parents(&children)?;
        Ok(frozen)
    }
}

impl Frozen {
    /// Pids of parents in the pod's numbers, and the zombies among the children.
    fn parents(&mut self, children: &BTreeSet<i32>) -> Result<()> {
        let pods: BTreeMap<i32, PodPid> =
            self.processes.iter().map(|process| (process.status.tgid, process.pid)).collect();
        for process in &mut self.processes {
            process.parent = pods.get(&process.status.parent).copied().unwrap_or(PodPid(0));
        }
        for &host in children {
            if pods.contains_key(&host) {
                continue;
            }
            let Ok(status) = read_status(host) else { continue };
            let Some(stat) = read_stat(host) else { continue };
            if stat.state != 'Z' {
                return Err(Problem::new(BUSY, format!("{} was born while the pod was being stopped", describe(host))));
            }
            self.zombies.push(Zombie {
                pid: last(&status.ns_tgid),
                host: HostPid(host),
                parent: pods.get(&status.parent).copied().unwrap_or(PodPid(0)),
                group: last(&status.ns_group),
                session: last(&status.ns_session),
                exit_signal: stat.exit_signal,
                status: stat.exit_code,
                comm: stat.comm,
            });
        }
        self.processes.sort_by_key(|process| process.pid);
        self.zombies.sort_by_key(|zombie| zombie.pid);
        Ok(())
    }
}

/// The processes of the cgroup, and the first one, which belongs to the pod wherever it is.
fn with(init: HostPid, mut members: Vec<i32>) -> Vec<i32> {
    if !members.contains(&init.0) {
        members.push(init.0);
    }
    members
}

fn last(pids: &[i32]) -> PodPid {
    PodPid(pids.last().copied().unwrap_or(0))
}

fn describe_process(host: i32, threads: Vec<Thread>, level: usize) -> Result<Process> {
    // A leader that has ended has no memory, files or capabilities: a living thread speaks for the process.
    let voice = threads.first().map_or(host, |thread| thread.host.0);
    let status = match threads.first() {
        Some(thread) => thread.status.clone(),
        None => read_status(host).doing(|| format!("read the status of process {host}"))?,
    };
    let stat = |task| read_stat(task).ok_or_else(|| Problem::new("E-SYSTEM", format!("process {host} has no stat")));
    let (leader, stat) = (stat(host)?, stat(voice)?);
    let pidfd = pidfd::open_any(voice).doing(|| format!("open process {host}"))?;
    if status.ns_tgid.len() != level {
        let what = format!("{} lives in a pid namespace of its own inside the pod", describe(host));
        return Err(Problem::new(NESTED, what).fix("end it, or start it without a pid namespace"));
    }
    let life = match threads.iter().find_map(|thread| thread.group_stop) {
        Some(signal) => Life::Stopped(signal),
        None => Life::Running,
    };
    Ok(Process {
        pid: last(&status.ns_tgid),
        host: HostPid(voice),
        pidfd,
        leader_ended: (voice != host).then_some(leader.exit_code),
        parent: PodPid(0),
        group: last(&status.ns_group),
        session: last(&status.ns_session),
        life,
        comm: leader.comm,
        exit_signal: leader.exit_signal,
        threads,
        status,
        stat,
        maps: Vec::new(),
        texts: Texts::default(),
        standstill: None,
    })
}

/// For messages, when only the host's number is known.
fn describe(tid: i32) -> String {
    let comm = fs::read_to_string(format!("/proc/{tid}/comm")).unwrap_or_default();
    let pod = read_status(tid).ok().map_or(PodPid(0), |status| last(&status.ns_pid));
    format!("process {pod} ({})", comm.trim_end())
}

fn refuse_seize(tid: i32, error: io::Error) -> Result<bool> {
    let Ok(status) = read_status(tid) else { return Ok(false) };
    if status.state == 'Z' || status.state == 'X' {
        return Ok(false);
    }
    if status.tracer != 0 {
        let what = format!("{} is being traced by process {} of the host", describe(tid), status.tracer);
        return Err(Problem::new(TRACED, what).fix("end the debugger, then try again"));
    }
    Err(error).doing(|| format!("stop {}", describe(tid)))
}

fn threads_of(pid: i32) -> Vec<i32> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
}

fn children_of(pid: i32, tid: i32) -> Vec<i32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{tid}/children")).unwrap_or_default();
    text.split_ascii_whitespace().filter_map(|word| word.parse().ok()).collect()
}

fn read_status(tid: i32) -> io::Result<status::Status> {
    Ok(status::parse(&proc::read(format!("/proc/{tid}/status"))?))
}

fn read_stat(pid: i32) -> Option<stat::Stat> {
    stat::parse(&proc::read(format!("/proc/{pid}/stat")).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_that_stand_are_counted_from_when_they_were_noted() {
        let standstill = Standstill { here: Instant::now(), monotonic: 1000 };
        let remaining = |clock, left| standstill.remaining(clock, left, Some(1500));
        for clock in [libc::CLOCK_REALTIME, libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME] {
            assert_eq!((remaining(clock, 7), remaining(clock, 0), remaining(clock, u64::MAX)), (507, 0, u64::MAX));
        }
        // -6 is how the kernel writes a CPU clock of the process itself.
        for clock in [libc::CLOCK_PROCESS_CPUTIME_ID, libc::CLOCK_THREAD_CPUTIME_ID, -6] {
            assert_eq!(remaining(clock, 7), 7);
        }
        let earlier = Standstill { here: Instant::now() - Duration::from_secs(5), monotonic: 0 };
        assert!(earlier.remaining(libc::CLOCK_MONOTONIC, 7, None) > 5_000_000_000);
    }
}
