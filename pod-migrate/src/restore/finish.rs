//! The last part of a restore: what the maps and pages do not hold.
//!
//! Process by process: descriptors, directories, layout; then threads; then what each thread has for itself, its
//! credentials and filters last; zombies; pending signals. When nothing has to be run in any task any more, the stubs
//! go and every thread gets its own registers.

use super::tree::{self, Grown};
use super::{Image, memory, task_work, write_memory};
use crate::ids::{FileId, HostPid, PodPid};
use crate::image::damaged;
use crate::laps::lap;
use crate::objects::files::{Fd, Opener};
use crate::objects::memory::{Backing, MmState};
use crate::objects::task::{
    Dispatch, Life, ProcessState, ThreadState, Waiting, credentials, interrupted, limits, seccomp, signals, threads,
    timers, undo,
};
use crate::remote::plain::{Job, Stub, begin_all, run_all, single_all, stop_all};
use crate::remote::{Arg, RemoteCall};
use crate::{Doing, Problem, Result};
use pod_runtime::sys::memory as remote_memory;
use pod_runtime::sys::ptrace::{self, Regs};
use std::collections::BTreeMap;
use std::fs;

const PR_SET_MM_MAP: i32 = 14;

pub(super) fn finish(image: &Image, grown: &mut Grown, opener: &Opener) -> Result<()> {
    let states = || image.processes.values();
    let job =
        |grown: &Grown, state: &ProcessState, calls| Job { stub: grown.stubs[&state.pid], calls, space: state.pid.0 };
    let mut undos = undo::restore(&image.undos, &image.ipc.semaphores);
    let own = states().map(|state| {
        let mut calls = process(image, opener, state)?;
        calls.extend(undos.remove(&state.pid).unwrap_or_default());
        Ok(job(grown, state, calls))
    });
    run_all(&mut own.collect::<Result<Vec<_>>>()?)?;
    lap("processes");
    for state in states() {
        make_threads(grown, state)?;
    }
    zombies(image, grown)?;
    lap("threads");
    let sections = states().map(|state| critical_sections(&grown.stubs[&state.pid], state));
    let sections = sections.collect::<Result<Vec<_>>>()?;
    let mut jobs = Vec::new();
    for state in states() {
        let alike = threads::Alike::among(&state.threads);
        each_thread(grown, state, |stub, thread| {
            let calls = before_last(image, grown.filters, state, thread, alike)?;
            jobs.push(Job { stub: *stub, calls, space: state.pid.0 });
            Ok(())
        })?;
    }
    run_all(&mut jobs)?;
    lap("credentials");
    run_all(&mut states().map(|state| job(grown, state, signals::restore_process_pending(state))).collect::<Vec<_>>())?;
    states().for_each(|state| outside_settings(grown, state));
    session_settings(image, grown);
    lap("settings");
    let waits = begin_waits(image, grown)?;
    lap("waits");
    take_stubs_away(image, grown)?;
    // What took the stubs away were calls, of the first thread of each.
    let leaders = states().filter(|state| waits.contains_key(&state.pid)).map(|state| grown.stubs[&state.pid]);
    stop_all(&leaders.collect::<Vec<_>>())?;
    lap("stubs away");
    states()
        .zip(sections)
        .try_for_each(|(state, sections)| last(grown, &image.spaces[&state.mm], state, sections, &waits))
}

/// Leader first.
fn each_thread<'a>(
    grown: &'a Grown,
    state: &'a ProcessState,
    mut work: impl FnMut(&'a Stub, &'a ThreadState) -> Result<()>,
) -> Result<()> {
    let stubs = std::iter::once(&grown.stubs[&state.pid]).chain(grown.threads.get(&state.pid).into_iter().flatten());
    stubs.zip(&state.threads).try_for_each(|(stub, thread)| work(stub, thread))
}

/// What the threads of a process share.
fn process(image: &Image, opener: &Opener, state: &ProcessState) -> Result<Vec<RemoteCall>> {
    let space = &image.spaces[&state.mm];
    let hard = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
        .doing(|| "read the limit of descriptors".into())?
        .1;
    let mut calls = vec![limits::most_descriptors(hard), memory::open_opener(opener)];
    calls.push(memory::take(opener, 0, state.cwd, 1)?);
    calls.push(RemoteCall::new("change directory", libc::SYS_fchdir, vec![1.into()]));
    calls.push(close(1));
    if let Some(root) = state.root {
        calls.extend(change_root(opener, root, state.cwd)?);
    }
    calls.push(memory::take(opener, 0, space.exe, 1)?);
    calls.push(layout(space, 1));
    calls.push(close(1));
    calls.push(RemoteCall::new("set the umask", libc::SYS_umask, vec![u64::from(state.umask).into()]));
    calls.extend(descriptors(opener, &image.files.tables[&state.fd_table].fds)?);
    calls.extend(task_work(image, state));
    calls.extend(memory::afterwards(space));
    calls.extend(signals::restore_handlers(state));
    calls.extend(timers::restore_interval_timers(state));
    if state.no_huge_pages {
        let args = vec![libc::PR_SET_THP_DISABLE.into(), 1.into(), 0.into(), 0.into(), 0.into()];
        calls.push(RemoteCall::new("disable huge pages", libc::SYS_prctl, args));
    }
    calls.extend(state.switches.restore());
    Ok(calls)
}

fn close(fd: i32) -> RemoteCall {
    RemoteCall::new("close", libc::SYS_close, vec![fd.into()])
}

fn change_root(opener: &Opener, root: FileId, cwd: FileId) -> Result<Vec<RemoteCall>> {
    let here = || Arg::In(b".\0".to_vec());
    Ok(vec![
        memory::take(opener, 0, root, 1)?,
        RemoteCall::new("go to the root", libc::SYS_fchdir, vec![1.into()]),
        RemoteCall::new("change the root", libc::SYS_chroot, vec![here()]),
        close(1),
        memory::take(opener, 0, cwd, 1)?,
        RemoteCall::new("change directory", libc::SYS_fchdir, vec![1.into()]),
        close(1),
    ])
}

/// prctl(PR_SET_MM_MAP): where code, data, heap, stack, arguments and environment are, and what /proc/PID/exe names.
fn layout(space: &MmState, exe: i32) -> RemoteCall {
    let l = &space.layout;
    let words = [
        l.start_code,
        l.end_code,
        l.start_data,
        l.end_data,
        l.start_brk,
        l.brk,
        l.start_stack,
        l.arg_start,
        l.arg_end,
        l.env_start,
        l.env_end,
        0,
    ];
    let mut block: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    block.extend_from_slice(&(space.auxv.len() as u32).to_ne_bytes());
    block.extend_from_slice(&exe.to_ne_bytes());
    let size = block.len() as u64;
    let map = Arg::Nested(block, vec![(11, space.auxv.to_vec())]);
    let args = vec![libc::PR_SET_MM.into(), PR_SET_MM_MAP.into(), map, size.into(), 0.into()];
    RemoteCall::new("set the memory layout", libc::SYS_prctl, args)
}

/// All descriptors under their numbers. The opener's pidfd, number 0 until now, goes above all of them and then away.
fn descriptors(opener: &Opener, fds: &[Fd]) -> Result<Vec<RemoteCall>> {
    let high = fds.last().map_or(0, |fd| fd.fd.0) + 1;
    let mut calls = Vec::new();
    let mut fds: Vec<Fd> = fds.to_vec();
    fds.sort_by_key(|fd| fd.fd);
    if fds.first().is_some_and(|fd| fd.fd.0 < 0) || fds.windows(2).any(|pair| pair[0].fd == pair[1].fd) {
        return Err(damaged("a descriptor table that cannot be"));
    }
    let high = high.max(1);
    calls.push(
        RemoteCall::new(
            "move the opener away",
            libc::SYS_fcntl,
            vec![0.into(), libc::F_DUPFD_CLOEXEC.into(), high.into()],
        )
        .returns(high.into()),
    );
    calls.push(close(0));
    // The lowest free number is what the kernel gives out; all below it are filled already.
    let mut lowest = 0;
    for fd in &fds {
        let wanted = fd.fd.0;
        calls.push(memory::take(opener, high, fd.file, lowest)?);
        if wanted == lowest {
            lowest += 1;
            if !fd.close_on_exec {
                let args = vec![wanted.into(), libc::F_SETFD.into(), 0.into()];
                calls.push(RemoteCall::new("keep it across exec", libc::SYS_fcntl, args));
            }
        } else {
            let flags = if fd.close_on_exec { libc::O_CLOEXEC } else { 0 };
            let args = vec![lowest.into(), wanted.into(), flags.into()];
            calls.push(
                RemoteCall::new(format!("make descriptor {wanted}"), libc::SYS_dup3, args).returns(wanted.into()),
            );
            calls.push(close(lowest));
        }
    }
    calls.push(close(high));
    Ok(calls)
}

fn make_threads(grown: &mut Grown, state: &ProcessState) -> Result<()> {
    const FLAGS: i32 = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM
        | libc::CLONE_PTRACE;
    let leader = grown.stubs[&state.pid];
    if state.threads[0].tid != state.pid {
        return Err(damaged(format!("process {} does not begin with its leader", state.pid)));
    }
    if state.threads.len() > 1 {
        leader.run(&mut threads::restore_alike(threads::Alike::among(&state.threads), &state.threads[0]))?;
        let clone = |thread: &ThreadState| tree::clone3("make a thread".into(), FLAGS as u64, 0, thread.tid);
        leader.clone3_all(&mut state.threads[1..].iter().map(clone).collect::<Vec<_>>())?;
        grown.threads.insert(state.pid, new_threads(&leader, state.threads.len() - 1)?);
    }
    leader.run(&mut timers::restore_timers(state))
}

/// The threads of a process but its leader, in the order in which they were made (the kernel lists them so; the first
/// thing that each of them does shows that it is the one that it is taken for). All stopped.
fn new_threads(leader: &Stub, count: usize) -> Result<Vec<Stub>> {
    let path = format!("/proc/{}/task", leader.task);
    let names = fs::read_dir(&path).doing(|| format!("list {path}"))?;
    let tids = names.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    let tids: Vec<i32> = tids.filter(|tid| *tid != leader.task.0).collect();
    if tids.len() != count {
        return Err(Problem::new("E-INTERNAL", format!("{} threads came of {count}", tids.len())));
    }
    tids.into_iter().map(|tid| leader.new_task(HostPid(tid))).collect()
}

/// Ends those that have ended, and takes the signal away that their parents get for it a second time.
fn zombies(image: &Image, grown: &mut Grown) -> Result<()> {
    for node in image.nodes() {
        let Life::Zombie(status) = node.life else { continue };
        let Some(stub) = grown.stubs.remove(&node.pid) else { continue };
        let mut name = node.comm.to_vec();
        name.truncate(15);
        name.push(0);
        let args = vec![libc::PR_SET_NAME.into(), Arg::In(name)];
        stub.run(&mut [RemoteCall::new("name it", libc::SYS_prctl, args)])?;
        let signal = status & 0x7f;
        if signal == 0 {
            stub.end(RemoteCall::new("exit", libc::SYS_exit_group, vec![(status >> 8 & 0xff).into()]))?;
        } else {
            die_by(&stub, node.pid, signal)?;
        }
        if let Some(parent) = grown.stubs.get(&node.parent)
            && node.exit_signal > 0
        {
            parent.run(&mut [tree::swallow(node.exit_signal)])?;
        }
    }
    Ok(())
}

/// The signal's own death, without a core.
fn die_by(stub: &Stub, pid: PodPid, signal: i32) -> Result<()> {
    let default = signals::action(&Default::default());
    let mut calls = vec![
        RemoteCall::new(
            "forbid a core",
            libc::SYS_prlimit64,
            vec![0.into(), libc::RLIMIT_CORE.into(), Arg::In(vec![0; 16]), 0.into()],
        ),
        RemoteCall::new(
            "take the default action",
            libc::SYS_rt_sigaction,
            vec![signal.into(), Arg::In(default), 0.into(), 8.into()],
        )
        .may_fail(),
    ];
    stub.run(&mut calls)?;
    ptrace::set_signal_mask(stub.task.0, 0).doing(|| format!("unblock the signals of process {pid}"))?;
    stub.end(RemoteCall::new("die", libc::SYS_kill, vec![pid.0.into(), signal.into()])).map(drop)
}

/// All that a thread has for itself and did not inherit, in an order in which it may still do what comes next.
fn before_last(
    image: &Image,
    filters: usize,
    state: &ProcessState,
    thread: &ThreadState,
    alike: threads::Alike,
) -> Result<Vec<RemoteCall>> {
    let mut calls = threads::restore(thread, alike);
    calls.extend(signals::restore_alternate_stack(&thread.alternate_stack, thread.tid == state.pid));
    calls.extend(signals::restore_thread_pending(state, thread));
    if thread.tid == state.pid {
        calls.extend(limits::restore(state));
        calls.extend(state.switches.restore_last());
    }
    calls.extend(seccomp::restore(&thread.seccomp, image.filters(&thread.seccomp)?, filters));
    if !alike.ids {
        calls.extend(credentials::restore_ids(&thread.credentials));
    }
    calls.extend(credentials::restore_capabilities(&thread.credentials));
    calls.extend(threads::restore_after_credentials(state, thread));
    calls.extend(threads::restore_rseq(thread));
    Ok(calls)
}

/// Settings that /proc takes from outside, unless the process has them from its parents. What this host does not allow
/// changes nothing that the program can rely on.
fn outside_settings(grown: &Grown, state: &ProcessState) {
    let stub = &grown.stubs[&state.pid];
    let write = |name: &str, value: String| {
        if let Err(error) = fs::write(format!("/proc/{}/{name}", stub.task), value) {
            tracing::debug!(pid = state.pid.0, name, %error, "not restored");
        }
    };
    if grown.inherited.oom_score_adj != Some(state.oom_score_adj) {
        write("oom_score_adj", state.oom_score_adj.to_string());
    }
    if let Some(filter) = state.coredump_filter.filter(|_| grown.inherited.coredump_filter != state.coredump_filter) {
        write("coredump_filter", format!("{filter:#x}"));
    }
}

/// As near as this host can, like all of scheduling.
fn session_settings(image: &Image, grown: &Grown) {
    for (pid, nice) in image.tree.iter().flat_map(|tree| &tree.autogroups) {
        let Some(stub) = grown.stubs.get(pid) else { continue };
        if let Err(error) = fs::write(format!("/proc/{}/autogroup", stub.task), nice.to_string()) {
            tracing::debug!(pid = pid.0, %error, "the nice value of its session is not restored");
        }
    }
}

/// The last things of ours in each process: that it ignores SIGTRAP, which a breakpoint of the stub would have reset,
/// and the stub itself.
fn take_stubs_away(image: &Image, grown: &Grown) -> Result<()> {
    let mut handlers = Vec::new();
    for state in image.processes.values().filter(|state| signals::ignores_breakpoints(state)) {
        let leader = grown.stubs[&state.pid];
        let at = leader.scratch(&signals::action(&state.handlers[libc::SIGTRAP as usize - 1]))?;
        handlers.push((leader, libc::SYS_rt_sigaction, [libc::SIGTRAP as u64, at, 0, 8, 0, 0]));
    }
    single_all("ignore SIGTRAP", &handlers)?;
    Stub::remove_all(&image.processes.keys().map(|pid| grown.stubs[pid]).collect::<Vec<_>>())
}

/// Gives every thread its registers.
fn last(grown: &Grown, space: &MmState, state: &ProcessState, sections: Sections, waits: &Waits) -> Result<()> {
    each_thread(grown, state, |stub, thread| {
        let what = || format!("set the registers of thread {}", thread.tid);
        if let Some(status) = thread.ended {
            let rip = system_call(stub, space, state)?;
            let exit =
                Regs { rax: libc::SYS_exit as u64, rdi: (status >> 8 & 0xff) as u64, rip, ..regs_for_exit(thread) };
            ptrace::set_regs(stub.task.0, &exit).doing(what)?;
            // No signal for the process is its affair.
            return ptrace::set_signal_mask(stub.task.0, u64::MAX).doing(what);
        }
        ptrace::set_xstate(stub.task.0, &thread.xstate).doing(what)?;
        let mut registers = threads::registers(&thread.registers);
        if let (Some(result), Some(waiting)) = (waits.get(&thread.tid), thread.waiting) {
            registers = after_wait(&registers, waiting, *result);
        }
        ptrace::set_regs(stub.task.0, &registers).doing(what)?;
        if let Some(dispatch) = thread.switches.dispatch {
            set_dispatch(stub, dispatch).doing(what)?;
        }
        ptrace::set_signal_mask(stub.task.0, thread.blocked).doing(what)
    })?;
    let leader = grown.stubs[&state.pid].task;
    sections.into_iter().try_for_each(|(address, bytes)| write_memory(leader, address, &bytes))
}

/// In no call that could be begun again.
fn regs_for_exit(thread: &ThreadState) -> Regs {
    Regs { orig_rax: u64::MAX, ..threads::registers(&thread.registers) }
}

/// Where in a process a system call can be made when our stub has gone: in the vdso, which falls back to them.
///
/// A first thread that has ended must end by itself, after the tracer has let go of it: the kernel tells nobody of its end
/// but the tracer as long as it has one, and the process's parent would never hear of it.
fn system_call(stub: &Stub, space: &MmState, state: &ProcessState) -> Result<u64> {
    const SYSCALL: [u8; 2] = [0x0f, 0x05];
    let vdso = space.maps.iter().find(|map| map.backing == Backing::Vdso);
    let found = vdso.and_then(|vdso| {
        let mut code = vec![0; (vdso.end - vdso.start) as usize];
        remote_memory::read_exact(stub.task.0, vdso.start, &mut code).ok()?;
        code.windows(2).position(|two| two == SYSCALL).map(|at| vdso.start + at as u64)
    });
    found.ok_or_else(|| {
        Problem::new(
            "E-THREAD-LEADER",
            format!("the first thread of process {} has ended, and without a vdso it cannot end again", state.pid),
        )
    })
}

/// From outside, for no call of the task would get through after it.
fn set_dispatch(stub: &Stub, dispatch: Dispatch) -> std::io::Result<()> {
    let Dispatch { selector, offset, bytes } = dispatch;
    ptrace::set_user_dispatch(stub.task.0, &ptrace::UserDispatch { mode: 1, selector, offset, bytes })
}

/// What calls returned that were begun, by thread.
type Waits = BTreeMap<PodPid, i64>;

/// Begins the calls in which threads wait, all at once, each with the time that remains: the kernel keeps it for the
/// restart. What each returned.
fn begin_waits(image: &Image, grown: &Grown) -> Result<Waits> {
    let (mut threads, mut calls) = (Vec::new(), Vec::new());
    let mut results = Waits::new();
    for state in image.processes.values() {
        let mut waiting = Vec::new();
        each_thread(grown, state, |stub, thread| {
            waiting.extend(thread.waiting.map(|wait| (*stub, thread, wait)));
            Ok(())
        })?;
        let leader = grown.stubs[&state.pid];
        for (crowd, waiting) in waiting.chunks(Stub::SCRATCH / TIME).enumerate() {
            if crowd > 0 {
                // What the last ones were told lies where these look.
                results.extend(begin(&mut threads, &mut calls)?);
            }
            let times: Vec<u8> = waiting.iter().flat_map(|(.., wait)| timespec(wait.remaining_ns)).collect();
            let at = if times.is_empty() { 0 } else { leader.scratch(&times)? };
            for (nth, (stub, thread, wait)) in waiting.iter().enumerate() {
                threads.push(thread.tid);
                calls.push((*stub, wait.number, wait_arguments(thread, *wait, at + (nth * TIME) as u64)?));
            }
        }
    }
    results.extend(begin(&mut threads, &mut calls)?);
    Ok(results)
}

type Begun = Vec<(Stub, i64, [u64; 6])>;

fn begin(threads: &mut Vec<PodPid>, calls: &mut Begun) -> Result<Waits> {
    let results = begin_all(calls)?;
    calls.clear();
    Ok(threads.drain(..).zip(results).collect())
}

/// Bytes of a struct timespec.
const TIME: usize = 16;

fn timespec(ns: u64) -> Vec<u8> {
    [ns / 1_000_000_000, ns % 1_000_000_000].map(u64::to_ne_bytes).concat()
}

/// `at` is where the time that remains is.
fn wait_arguments(thread: &ThreadState, wait: Waiting, at: u64) -> Result<[u64; 6]> {
    let Waiting { number, remaining_ns } = wait;
    let r = &thread.registers;
    let mut args = [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9];
    match number {
        libc::SYS_nanosleep => args[0] = at,
        libc::SYS_clock_nanosleep => args[2] = at,
        libc::SYS_futex => args[3] = at,
        libc::SYS_poll => args[2] = remaining_ns.div_ceil(1_000_000).min(i32::MAX as u64),
        _ => return Err(damaged(format!("thread {} waits in call {number}", thread.tid))),
    }
    Ok(args)
}

/// The registers of a thread whose call was begun.
fn after_wait(before: &Regs, waiting: Waiting, result: i64) -> Regs {
    if interrupted::restarts(result) {
        return interrupted::stopped_in(before, waiting.number);
    }
    if waiting.number == libc::SYS_poll && result != 0 {
        // Not everything that it looks at may be in its last state yet: it looks once more.
        let left = waiting.remaining_ns.div_ceil(1_000_000).min(i32::MAX as u64);
        return Regs { rdx: left, ..*before };
    }
    // It has ended meanwhile.
    Regs { rax: result as u64, rip: before.rip.wrapping_add(2), ..*before }
}

/// Addresses and contents.
type Sections = Vec<(u64, [u8; 8])>;

/// The critical sections that threads are in, from memory, before rseq areas are registered: from then on the kernel clears
/// those that the stub is not in. They are written once more when no stub runs any more; then the kernel aborts them
/// properly at the thread's first instruction.
fn critical_sections(leader: &Stub, state: &ProcessState) -> Result<Sections> {
    /// Offset of rseq_cs in struct rseq.
    const SECTION: u64 = 8;
    let mut sections = Vec::new();
    for rseq in state.threads.iter().filter_map(|thread| thread.rseq) {
        let mut bytes = [0; 8];
        let address = rseq.address.wrapping_add(SECTION);
        remote_memory::read_exact(leader.task.0, address, &mut bytes)
            .doing(|| format!("read the rseq area at {:#x}", rseq.address))?;
        if bytes != [0; 8] {
            sections.push((address, bytes));
        }
    }
    Ok(sections)
}
