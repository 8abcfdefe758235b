//! What is asked of a frozen process and its threads: in /proc and by ptrace from outside, and by remote calls for what
//! only the task itself is told. All of it is questions, so that a process that loses its engine half way has not
//! changed.

use super::glance::Seen;
use super::{
    AlternateStack, Chains, Credentials, Dispatch, Handler, IntervalTimer, Limit, PosixTimer, ProcessState,
    ProcessSwitches, Registers, RobustList, Rseq, Scheduling, Seccomp, ThreadState, ThreadSwitches, interrupted,
    keyrings, switches,
};
use crate::freeze::{Process, Thread};
use crate::ids::{FdTableId, FileId, MmId};
use crate::objects::memory::Told;
use crate::remote::{Arg, Borrowed, RemoteCall};
use pod_runtime::proc::{limits, status::Status, timers};
use pod_runtime::sys::{ptrace, task};
use pod_runtime::{Doing, Result};
use serde_bytes::ByteBuf;
use std::collections::BTreeMap;

const PR_GET_THP_DISABLE: i32 = 42;
const PR_GET_TID_ADDRESS: i32 = 40;
const SIGNALS: i32 = 64;
/// Of a struct robust_list_head: the kernel takes no other.
const ROBUST_LIST_BYTES: u64 = 24;

/// What of a process is kept elsewhere.
#[derive(Debug, Clone, Copy)]
pub struct Parts {
    pub mm: MmId,
    pub fd_table: FdTableId,
    pub cwd: FileId,
    pub root: Option<FileId>,
}

/// What a process is asked, in its first thread.
pub struct Asked {
    timers: Vec<timers::Timer>,
    questions: Questions,
    /// Calls of others that go with them.
    pub more: Vec<RemoteCall>,
}

/// Begins to ask a process what only it knows, and `more`.
pub fn ask(process: &Process, borrowed: &mut Borrowed<'_>, more: Vec<RemoteCall>) -> Result<Asked> {
    let timers = timers::parse(&process.texts.timers);
    let mut questions = Questions::new(&timers, borrowed.fresh_page());
    questions.calls.extend(thread_questions());
    questions.calls.extend(more);
    borrowed.start(process.leader(), &questions.calls)?;
    Ok(Asked { timers, questions, more: Vec::new() })
}

/// Everything of a process but its memory and files, and what only it knows of its memory.
pub fn dump(
    process: &Process,
    borrowed: &mut Borrowed<'_>,
    asked: &mut Asked,
    parts: Parts,
    chains: &mut Chains,
) -> Result<(ProcessState, Told)> {
    let Asked { timers, questions, more } = asked;
    borrowed.finish(process.leader(), &mut questions.calls)?;
    let fixed = thread_questions();
    *more = questions.calls.split_off(Questions::TIMERS + 2 * timers.len() + fixed.len());
    let of_leader = questions.calls.split_off(Questions::TIMERS + 2 * timers.len());
    let everywhere = task::affinity_of_all().doing(|| "ask which CPUs there are".into())?;
    let mut besides = switches::of_a_process_besides(questions.switches());
    if !besides.is_empty() {
        borrowed.run(process.leader(), &mut besides)?;
    }
    keyrings::refuse_session(process, borrowed)?;
    let mut threads = Vec::with_capacity(process.threads.len());
    threads.push(dump_thread(process, process.leader(), &of_leader, &everywhere, chains)?);
    let others = others(process, borrowed, &threads[0], &everywhere, chains)?;
    threads.extend(others);
    if let Some(status) = process.leader_ended {
        threads.insert(0, ended_leader(process, status, &threads[0]));
    }
    let Parts { mm, fd_table, cwd, root } = parts;
    let state = ProcessState {
        pid: process.pid,
        mm,
        fd_table,
        cwd,
        root,
        umask: process.status.umask,
        handlers: questions.handlers(),
        pending: pending(process.leader(), true)?,
        interval_timers: questions.interval_timers(process),
        timers: questions.posix_timers(process, timers),
        limits: limits::parse(&process.texts.limits)
            .into_iter()
            .map(|(resource, soft, hard)| Limit { resource, soft, hard })
            .collect(),
        oom_score_adj: process.texts.oom_score_adj.trim().parse().unwrap_or(0),
        child_subreaper: questions.subreaper(),
        dumpable: questions.result(Questions::DUMPABLE) as u32,
        no_huge_pages: questions.result(Questions::NO_HUGE_PAGES) == 1,
        coredump_filter: process
            .texts
            .coredump_filter
            .as_ref()
            .and_then(|text| u32::from_str_radix(text.trim(), 16).ok()),
        switches: ProcessSwitches::new(questions.switches(), &besides),
        threads,
    };
    Ok((state, questions.told()))
}

/// All threads but the first. Of those that are alike one is asked, and one in so many to see that they are.
fn others(
    process: &Process,
    borrowed: &mut Borrowed<'_>,
    first: &ThreadState,
    everywhere: &[u8],
    chains: &mut Chains,
) -> Result<Vec<ThreadState>> {
    let all = &process.threads;
    let spokesmen = process.spokesmen();
    let mut ask = |which: &[usize]| {
        let threads: Vec<&Thread> = which.iter().map(|at| &all[*at]).collect();
        let mut answers = vec![thread_questions(); threads.len()];
        borrowed.run_all(&threads, &mut answers)?;
        let states = threads.iter().zip(&answers);
        let states = states.map(|(thread, calls)| dump_thread(process, thread, calls, everywhere, chains));
        states.collect::<Result<Vec<_>>>()
    };
    let asked: Vec<usize> = spokesmen.asked().iter().copied().filter(|at| *at != 0).collect();
    let mut known: BTreeMap<usize, ThreadState> = asked.iter().copied().zip(ask(&asked)?).collect();
    let like = |known: &BTreeMap<usize, ThreadState>, at: usize| {
        let of = spokesmen.like(at);
        let (thread, state) = (&all[at], if of == 0 { Some(first) } else { known.get(&of) });
        let (Some(seen), Some(state)) = (&thread.seen, state) else { return Ok(None) };
        like_another(process, thread, seen, (&all[of], state)).map(Some)
    };
    for at in asked.iter().filter(|at| spokesmen.like(**at) != **at) {
        if like(&known, *at)?.as_ref() != known.get(at) {
            tracing::debug!("threads of {} are not alike as they were taken for: each is asked", process.name());
            return ask(&(1..all.len()).collect::<Vec<_>>());
        }
    }
    for at in 1..all.len() {
        if !known.contains_key(&at)
            && let Some(state) = like(&known, at)?
        {
            known.insert(at, state);
        }
    }
    Ok(known.into_values().collect())
}

/// A thread that has all in common with another but what only it has, of which it is not asked either.
fn like_another(
    process: &Process,
    thread: &Thread,
    seen: &Seen,
    (other, state): (&Thread, &ThreadState),
) -> Result<ThreadState> {
    let tid = thread.host.0;
    let doing = || format!("read the state of task {} of {}", thread.tid, process.name());
    let may_have_one = seen.does_io || other.seen.as_ref().is_none_or(|other| other.does_io);
    let io_priority = if may_have_one { task::io_priority(tid).doing(doing)? } else { state.scheduling.io_priority };
    let shown = Shown::of(process, thread)?;
    Ok(ThreadState {
        tid: thread.tid,
        comm: ByteBuf::from(thread.status.name.clone()),
        registers: shown.registers,
        xstate: shown.xstate,
        blocked: shown.blocked,
        pending: shown.pending,
        rseq: shown.rseq,
        alternate_stack: seen.alternate_stack(thread.regs.rsp),
        clear_tid: seen.clear_tid,
        robust_list: (seen.robust_list != 0).then_some(RobustList { head: seen.robust_list, bytes: ROBUST_LIST_BYTES }),
        scheduling: Scheduling { io_priority, ..state.scheduling.clone() },
        // The first thread's own are kept with it.
        seccomp: match &state.seccomp {
            Seccomp::Filters(_) if std::ptr::eq(other, process.leader()) => Seccomp::As(process.pid),
            as_it_is => as_it_is.clone(),
        },
        waiting: thread.interrupted.waiting.map(|(waiting, _)| waiting),
        ended: None,
        ..state.clone()
    })
}

/// What ptrace shows of a thread from outside.
struct Shown {
    registers: Registers,
    xstate: ByteBuf,
    blocked: u64,
    pending: Vec<ByteBuf>,
    rseq: Option<Rseq>,
}

impl Shown {
    fn of(process: &Process, thread: &Thread) -> Result<Shown> {
        let tid = thread.host.0;
        let doing = || format!("read the state of task {} of {}", thread.tid, process.name());
        let rseq = thread.rseq.or_else(|| ptrace::rseq_configuration(tid).ok());
        Ok(Shown {
            registers: Registers::from(&interrupted::resumed(&thread.regs, &thread.interrupted)),
            xstate: ByteBuf::from(ptrace::xstate(tid).doing(doing)?),
            blocked: ptrace::signal_mask(tid).doing(doing)?,
            pending: pending(thread, false)?,
            rseq: rseq.filter(|rseq| rseq.pointer != 0).map(|rseq| Rseq {
                address: rseq.pointer,
                bytes: rseq.size,
                signature: rseq.signature,
            }),
        })
    }
}

/// One table for a process: fixed questions first, then handlers, then timers.
struct Questions {
    calls: Vec<RemoteCall>,
}

impl Questions {
    const BRK: usize = 0;
    const DUMPABLE: usize = 1;
    const SUBREAPER: usize = 2;
    const NO_HUGE_PAGES: usize = 3;
    const INTERVAL: usize = 4;
    const SWITCHES: usize = 7;
    const RESIDENT: usize = 11;
    const DISCARD: usize = 12;
    const CLOCK: usize = 13;
    const HANDLERS: usize = 14;
    const TIMERS: usize = Self::HANDLERS + SIGNALS as usize;

    fn new(timers: &[timers::Timer], fresh: u64) -> Self {
        let prctl = |option: i32, arg: Arg| {
            RemoteCall::new("prctl", libc::SYS_prctl, vec![option.into(), arg, 0.into(), 0.into(), 0.into()]).may_fail()
        };
        let mut calls = vec![
            RemoteCall::new("brk", libc::SYS_brk, vec![0.into()]),
            prctl(libc::PR_GET_DUMPABLE, 0.into()),
            prctl(libc::PR_GET_CHILD_SUBREAPER, Arg::Out(4)),
            prctl(PR_GET_THP_DISABLE, 0.into()),
        ];
        for which in 0..3 {
            calls.push(RemoteCall::new("getitimer", libc::SYS_getitimer, vec![which.into(), Arg::Out(32)]));
        }
        calls.extend(switches::of_a_process());
        // Memory that was mapped just now is locked if all future memory is: it is there already, unless it is locked
        // on its first use only, and it cannot be discarded.
        let page = |what, number, last| RemoteCall::new(what, number, vec![fresh.into(), 4096.into(), last]);
        calls.push(page("mincore", libc::SYS_mincore, Arg::Out(1)));
        calls.push(page("madvise", libc::SYS_madvise, libc::MADV_DONTNEED.into()).may_fail());
        // Between the timers: by so much all of them have gone on.
        let clock = vec![libc::CLOCK_MONOTONIC.into(), Arg::Out(16)];
        calls.push(RemoteCall::new("clock_gettime", libc::SYS_clock_gettime, clock));
        for signal in 1..=SIGNALS {
            let args = vec![signal.into(), 0.into(), Arg::Out(32), 8.into()];
            // SIGKILL and SIGSTOP may be asked for too.
            calls.push(RemoteCall::new("rt_sigaction", libc::SYS_rt_sigaction, args));
        }
        for timer in timers {
            let id = Arg::from(timer.id);
            calls.push(RemoteCall::new("timer_gettime", libc::SYS_timer_gettime, vec![id.clone(), Arg::Out(32)]));
            calls.push(RemoteCall::new("timer_getoverrun", libc::SYS_timer_getoverrun, vec![id]).may_fail());
        }
        Questions { calls }
    }

    fn result(&self, index: usize) -> i64 {
        self.calls[index].result
    }

    fn words(&self, index: usize) -> [u64; 4] {
        let mut words = [0; 4];
        for (word, bytes) in words.iter_mut().zip(self.calls[index].out[0].chunks_exact(8)) {
            *word = u64::from_ne_bytes(bytes.try_into().expect("eight bytes"));
        }
        words
    }

    fn switches(&self) -> &[RemoteCall] {
        &self.calls[Self::SWITCHES..Self::RESIDENT]
    }

    fn told(&self) -> Told {
        let locked = self.result(Self::DISCARD) == -i64::from(libc::EINVAL);
        let there = self.calls[Self::RESIDENT].out[0][0] & 1 != 0;
        Told {
            policies: BTreeMap::new(),
            brk: self.result(Self::BRK) as u64,
            lock_future: locked,
            lock_future_on_fault: locked && !there,
        }
    }

    fn subreaper(&self) -> bool {
        self.calls[Self::SUBREAPER].out[0] != [0; 4]
    }

    fn handlers(&self) -> Vec<Handler> {
        (0..SIGNALS as usize)
            .map(|index| {
                let [handler, flags, restorer, mask] = self.words(Self::HANDLERS + index);
                Handler { handler, flags, restorer, mask }
            })
            .collect()
    }

    /// What remained until a timer expires when the pod's clocks were noted.
    fn remaining(&self, process: &Process, clock: i32, left_ns: u64) -> u64 {
        let [seconds, nanoseconds, ..] = self.words(Self::CLOCK);
        let now = (seconds * 1_000_000_000 + nanoseconds) as i64;
        process.standstill.map_or(left_ns, |standstill| standstill.remaining(clock, left_ns, Some(now)))
    }

    fn interval_timers(&self, process: &Process) -> Vec<IntervalTimer> {
        // ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF.
        [libc::CLOCK_MONOTONIC, libc::CLOCK_PROCESS_CPUTIME_ID, libc::CLOCK_PROCESS_CPUTIME_ID]
            .into_iter()
            .enumerate()
            .map(|(which, clock)| {
                let [interval_s, interval_us, value_s, value_us] = self.words(Self::INTERVAL + which);
                let interval = interval_s * 1_000_000 + interval_us;
                let value = match value_s * 1_000_000 + value_us {
                    // It has expired and nobody has taken its SIGALRM yet, which is when the kernel starts it again; when it
                    // is due nobody tells. One that is restored without a value would be off for good.
                    0 if which == libc::ITIMER_REAL as usize => interval,
                    value => self.remaining(process, clock, value * 1000).div_ceil(1000),
                };
                IntervalTimer { interval_us: interval, value_us: value }
            })
            .collect()
    }

    fn posix_timers(&self, process: &Process, timers: &[timers::Timer]) -> Vec<PosixTimer> {
        timers
            .iter()
            .enumerate()
            .map(|(index, timer)| {
                let at = Self::TIMERS + 2 * index;
                let [interval_s, interval_ns, value_s, value_ns] = self.words(at);
                let directed = timer.notify & libc::SIGEV_THREAD_ID != 0;
                let target = || process.threads.iter().find(|thread| thread.host.0 == timer.target);
                PosixTimer {
                    id: timer.id,
                    clock: timer.clock,
                    signal: timer.signal,
                    notify: timer.notify,
                    thread: if directed { target().map(|thread| thread.tid) } else { None },
                    value: timer.value,
                    interval_ns: interval_s * 1_000_000_000 + interval_ns,
                    remaining_ns: self.remaining(process, timer.clock, value_s * 1_000_000_000 + value_ns),
                    overrun: self.calls[at + 1].result.max(0) as i32,
                }
            })
            .collect()
    }
}

fn pending(thread: &Thread, shared: bool) -> Result<Vec<ByteBuf>> {
    let found = ptrace::pending_signals(thread.host.0, shared);
    let found = found.doing(|| format!("read the pending signals of task {}", thread.tid))?;
    Ok(found.into_iter().map(|info| ByteBuf::from(info.to_vec())).collect())
}

/// What each thread is asked.
fn thread_questions() -> Vec<RemoteCall> {
    let prctl = |option: i32, arg: Arg| RemoteCall::new("prctl", libc::SYS_prctl, vec![option.into(), arg]).may_fail();
    let mut calls = vec![
        RemoteCall::new("sigaltstack", libc::SYS_sigaltstack, vec![0.into(), Arg::Out(24)]),
        prctl(libc::PR_GET_PDEATHSIG, Arg::Out(4)),
        prctl(PR_GET_TID_ADDRESS, Arg::Out(8)),
        prctl(libc::PR_GET_SECUREBITS, 0.into()),
        prctl(libc::PR_GET_TIMERSLACK, 0.into()),
        RemoteCall::new("personality", libc::SYS_personality, vec![Arg::Value(0xffff_ffff)]).may_fail(),
    ];
    calls.extend(switches::of_a_thread());
    calls.extend(keyrings::of_a_thread());
    calls
}

/// `calls` are its answers.
fn dump_thread(
    process: &Process,
    thread: &Thread,
    calls: &[RemoteCall],
    everywhere: &[u8],
    chains: &mut Chains,
) -> Result<ThreadState> {
    let tid = thread.host.0;
    let doing = || format!("read the state of task {} of {}", thread.tid, process.name());
    let status = &thread.status;
    let (calls, keys) = calls.split_at(calls.len() - 2);
    keyrings::refuse(process, keys)?;
    let stack = &calls[0].out[0];
    let word = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().expect("eight bytes"));
    let half = |bytes: &[u8]| i32::from_ne_bytes(bytes.try_into().expect("four bytes"));
    let shown = Shown::of(process, thread)?;
    Ok(ThreadState {
        tid: thread.tid,
        comm: ByteBuf::from(status.name.clone()),
        registers: shown.registers,
        xstate: shown.xstate,
        blocked: shown.blocked,
        pending: shown.pending,
        alternate_stack: AlternateStack {
            address: word(&stack[..8]),
            flags: half(&stack[8..12]),
            bytes: word(&stack[16..]),
        },
        clear_tid: word(&calls[2].out[0]),
        robust_list: task::robust_list(tid)
            .ok()
            .filter(|(head, _)| *head != 0)
            .map(|(head, bytes)| RobustList { head, bytes }),
        rseq: shown.rseq,
        credentials: credentials(status, calls[3].result as u32),
        parent_death_signal: half(&calls[1].out[0]),
        timer_slack_ns: calls[4].result.max(0) as u64,
        scheduling: scheduling(tid, everywhere).doing(doing)?,
        personality: calls[5].result.max(0) as u64,
        seccomp: chains
            .dump(tid, status, std::ptr::eq(thread, process.leader()).then_some(process.pid))
            .doing(doing)?,
        switches: ThreadSwitches::new(&calls[6..], dispatch(tid)),
        waiting: thread.interrupted.waiting.map(|(waiting, _)| waiting),
        ended: None,
    })
}

/// A first thread that has ended: it has nothing of its own any more but its number, its name and how it ended. What all
/// threads have it makes again before it ends once more.
fn ended_leader(process: &Process, status: i32, other: &ThreadState) -> ThreadState {
    ThreadState {
        tid: process.pid,
        comm: ByteBuf::from(process.comm.clone().into_bytes()),
        pending: Vec::new(),
        alternate_stack: AlternateStack { flags: libc::SS_DISABLE, ..AlternateStack::default() },
        clear_tid: 0,
        robust_list: None,
        rseq: None,
        parent_death_signal: 0,
        switches: ThreadSwitches { dispatch: None, ..other.switches.clone() },
        waiting: None,
        ended: Some(status),
        ..other.clone()
    }
}

/// Syscall user dispatch, if it is on; a kernel that cannot say (before 6.4) has it off for all that is known.
fn dispatch(tid: i32) -> Option<Dispatch> {
    let found = ptrace::user_dispatch(tid).ok()?;
    (found.mode != 0).then_some(Dispatch { selector: found.selector, offset: found.offset, bytes: found.bytes })
}

fn credentials(status: &Status, securebits: u32) -> Credentials {
    Credentials {
        uids: status.uids,
        gids: status.gids,
        groups: status.groups.clone(),
        inheritable: status.inheritable,
        permitted: status.permitted,
        effective: status.effective,
        bounding: status.bounding,
        ambient: status.ambient,
        securebits,
        no_new_privileges: status.no_new_privileges,
    }
}

fn scheduling(tid: i32, everywhere: &[u8]) -> std::io::Result<Scheduling> {
    let attributes = task::scheduling(tid)?;
    let affinity = task::affinity(tid)?;
    // A task that may run everywhere here may run everywhere there, however many CPUs that is.
    let everywhere = affinity == everywhere;
    Ok(Scheduling {
        policy: attributes.policy,
        flags: attributes.flags,
        nice: attributes.nice,
        priority: attributes.priority,
        runtime: attributes.runtime,
        deadline: attributes.deadline,
        period: attributes.period,
        affinity: ByteBuf::from(if everywhere { Vec::new() } else { affinity }),
        io_priority: task::io_priority(tid)?,
    })
}
