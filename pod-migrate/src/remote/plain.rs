//! The stub of a task that is ours to spoil: one that is being restored and has nothing of its own yet.
//!
//! The stub is a loop over a table of system calls that ends in a breakpoint. It sits with its table in one private
//! mapping at an address that is free in every address space of the pod, and goes with it at the end. No care is taken
//! for what happens when the tracer dies: the task is killed with it (PTRACE_O_EXITKILL).
//!
//! All signals but SIGTRAP stay blocked in such a task, so that the only stops are the stub's and those of
//! [`Stub::single`].

use super::call::{Expect, RemoteCall};
use super::layout::{self, Table, lay_out};
use crate::ids::{HostPid, RemoteAddress};
use crate::{Doing, Problem, Result};
use pod_runtime::sys::memory;
use pod_runtime::sys::ptrace::{self, Regs, Wait};
use std::collections::{BTreeMap, BTreeSet};

/// How such a task is traced.
pub const OPTIONS: i32 = ptrace::O_EXITKILL
    | ptrace::O_TRACECLONE
    | ptrace::O_TRACEFORK
    | ptrace::O_TRACEVFORK
    | ptrace::O_TRACESYSGOOD
    | ptrace::O_SUSPEND_SECCOMP;

/// What is blocked while the stub runs. A forced SIGTRAP that is blocked would lose its handler.
pub const BLOCKED: u64 = !(1 << (libc::SIGTRAP - 1));

/// ```text
/// loop: mov (%rbx),%rax; cmp $-1,%rax; je end
///       mov 8(%rbx),%rdi; mov 16(%rbx),%rsi; mov 24(%rbx),%rdx; mov 32(%rbx),%r10; mov 40(%rbx),%r8; mov 48(%rbx),%r9
///       syscall; mov %rax,56(%rbx); add $64,%rbx; jmp loop
/// end:  int3
/// ```
const CODE: &[u8] = &[
    0x48, 0x8b, 0x03, // mov (%rbx),%rax
    0x48, 0x83, 0xf8, 0xff, // cmp $-1,%rax
    0x74, 0x24, // je end
    0x48, 0x8b, 0x7b, 0x08, // mov 8(%rbx),%rdi
    0x48, 0x8b, 0x73, 0x10, // mov 16(%rbx),%rsi
    0x48, 0x8b, 0x53, 0x18, // mov 24(%rbx),%rdx
    0x4c, 0x8b, 0x53, 0x20, // mov 32(%rbx),%r10
    0x4c, 0x8b, 0x43, 0x28, // mov 40(%rbx),%r8
    0x4c, 0x8b, 0x4b, 0x30, // mov 48(%rbx),%r9
    0x0f, 0x05, // syscall
    0x48, 0x89, 0x43, 0x38, // mov %rax,56(%rbx)
    0x48, 0x83, 0xc3, 0x40, // add $64,%rbx
    0xeb, 0xd3, // jmp loop
    0xcc, // int3
];
/// Offset of the `syscall` instruction in [`CODE`].
const SYSCALL: u64 = 33;
/// Where the table begins.
const TABLE: u64 = 4096;

/// A stopped task with a stub in its memory.
#[derive(Debug, Clone, Copy)]
pub struct Stub {
    pub task: HostPid,
    base: u64,
}

impl Stub {
    /// Size of the stub's mapping, bytes.
    pub const BYTES: u64 = TABLE + (256 << 10);

    /// A task that inherited the mapping by fork or shares it as a thread.
    pub fn inherited(task: HostPid, base: RemoteAddress) -> Stub {
        Stub { task, base: base.0 }
    }

    /// Maps a stub into a task that is stopped in a system call, at an address that is free there.
    pub fn install(task: HostPid, base: RemoteAddress) -> Result<Stub> {
        ptrace::set_signal_mask(task.0, BLOCKED).doing(|| format!("block the signals of task {task}"))?;
        let regs = ptrace::regs(task.0).doing(|| format!("read the registers of task {task}"))?;
        let instruction = regs.rip.wrapping_sub(2);
        let mut bytes = [0; 2];
        memory::read_exact(task.0, instruction, &mut bytes).doing(|| format!("read the code of task {task}"))?;
        if bytes != [0x0f, 0x05] {
            return Err(Problem::new("E-INTERNAL", format!("task {task} was not stopped in a system call")));
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let args = [base.0, Stub::BYTES, protection as u64, flags as u64, u64::MAX, 0];
        let got = single(task, instruction, libc::SYS_mmap, args)?;
        if got as u64 != base.0 {
            let error = std::io::Error::from_raw_os_error(-got as i32);
            return Err(error).doing(|| format!("map the stub into task {task} at {:#x}", base.0));
        }
        memory::write(task.0, CODE, &[(base.0, CODE.len())]).doing(|| format!("write the stub of task {task}"))?;
        Ok(Stub { task, base: base.0 })
    }

    /// Runs all calls, in as few tables as they fit into.
    ///
    /// # Errors
    /// The first call whose result is not what it expects, or the task's death.
    pub fn run(&self, calls: &mut [RemoteCall]) -> Result<()> {
        let mut rest = calls;
        while !rest.is_empty() {
            let base = self.base + TABLE;
            let (table, count) = lay_out(rest, base, (Stub::BYTES - TABLE) as usize)?;
            self.start(&table.bytes)?;
            self.until_breakpoint()?;
            let mut after = table.bytes.clone();
            memory::read_exact(self.task.0, base, &mut after)
                .doing(|| format!("read results of task {}", self.task))?;
            let (now, later) = rest.split_at_mut(count);
            table.read_back(&after, now, &self.task)?;
            rest = later;
        }
        Ok(())
    }

    /// Runs calls that make tasks, each with CLONE_PTRACE. The new tasks stop at once and are tracees like this one, which
    /// does not stop itself for each of them. They have the same stub.
    pub fn clone3_all(&self, calls: &mut [RemoteCall]) -> Result<()> {
        self.trace(OPTIONS & !(ptrace::O_TRACECLONE | ptrace::O_TRACEFORK | ptrace::O_TRACEVFORK))?;
        self.run(calls)?;
        self.trace(OPTIONS)
    }

    fn trace(&self, options: i32) -> Result<()> {
        ptrace::set_options(self.task.0, options).doing(|| format!("set how task {} is traced", self.task))
    }

    /// As [`Stub::new_task`], of a process that was made by [`Stub::clone3_all`]: it is to have children, too, and is
    /// traced as its maker was at that moment.
    pub fn new_process(&self, task: HostPid) -> Result<Stub> {
        let stub = self.new_task(task)?;
        stub.trace(OPTIONS)?;
        Ok(stub)
    }

    /// A task that this one has just made, once it has stopped.
    pub fn new_task(&self, task: HostPid) -> Result<Stub> {
        match ptrace::wait(task.0, true).doing(|| format!("wait for the new task {task}"))? {
            Wait::Stopped { event: ptrace::EVENT_STOP, .. } => Ok(Stub { task, base: self.base }),
            other => Err(Problem::new("E-INTERNAL", format!("the new task {task} reports {other:?}"))),
        }
    }

    /// Runs one call and returns its result.
    pub fn call(&self, call: RemoteCall) -> Result<i64> {
        let mut calls = [call];
        self.run(&mut calls)?;
        Ok(calls[0].result)
    }

    /// Runs a clone3 and returns the new task, stopped, with the same stub.
    pub fn clone3(&self, call: RemoteCall) -> Result<Stub> {
        let mut calls = [call];
        let (table, _) = lay_out(&calls, self.base + TABLE, (Stub::BYTES - TABLE) as usize)?;
        self.start(&table.bytes)?;
        let mut child = None;
        loop {
            match self.wait()? {
                (_, ptrace::EVENT_FORK | ptrace::EVENT_VFORK | ptrace::EVENT_CLONE) => {
                    let tid = ptrace::event_message(self.task.0).doing(|| "learn the new task".into())?;
                    child = Some(HostPid(tid as i32));
                    ptrace::cont(self.task.0, 0).doing(|| format!("continue task {}", self.task))?;
                }
                (libc::SIGTRAP, 0) => break,
                stop => return Err(unexpected(self.task, stop)),
            }
        }
        let mut after = table.bytes.clone();
        let base = self.base + TABLE;
        memory::read_exact(self.task.0, base, &mut after).doing(|| format!("read results of task {}", self.task))?;
        table.read_back(&after, &mut calls, &self.task)?;
        let child = child.ok_or_else(|| Problem::new("E-INTERNAL", "a clone made no task"))?;
        self.new_task(child)
    }

    /// One call between two syscall stops: the task does not run in user mode after it. For what must not be followed
    /// by anything of the stub.
    pub fn single(&self, number: i64, args: [u64; 6]) -> Result<i64> {
        single(self.task, self.base + SYSCALL, number, args)
    }

    /// So many bytes can be had by [`Stub::scratch`].
    pub const SCRATCH: usize = (Stub::BYTES - TABLE) as usize;

    /// Writes bytes for single calls to point at; the next table covers them.
    pub fn scratch(&self, bytes: &[u8]) -> Result<u64> {
        let at = self.base + TABLE;
        memory::write(self.task.0, bytes, &[(at, bytes.len())])
            .doing(|| format!("write an argument to task {}", self.task))?;
        Ok(at)
    }

    /// Unmaps the stubs from their address spaces. The tasks then have no code of ours and must get their own registers;
    /// so must every other thread.
    pub fn remove_all(stubs: &[Stub]) -> Result<()> {
        let call = |stub: &Stub| (*stub, libc::SYS_munmap, [stub.base, Stub::BYTES, 0, 0, 0, 0]);
        single_all("remove the stub", &stubs.iter().map(call).collect::<Vec<_>>())
    }

    /// Runs a call that ends the task, and returns its status as wait(2) reports it.
    pub fn end(&self, call: RemoteCall) -> Result<i32> {
        let (table, _) = lay_out(&[call], self.base + TABLE, (Stub::BYTES - TABLE) as usize)?;
        self.start(&table.bytes)?;
        loop {
            match ptrace::wait(self.task.0, true).doing(|| format!("wait for the end of task {}", self.task))? {
                Wait::Ended(status) => return Ok(status),
                // The signal that it sent to itself, on its way in.
                Wait::Stopped { signal, event: 0 } => {
                    ptrace::cont(self.task.0, signal).doing(|| format!("continue task {}", self.task))?;
                }
                other => return Err(Problem::new("E-INTERNAL", format!("task {} reports {other:?}", self.task))),
            }
        }
    }

    fn start(&self, table: &[u8]) -> Result<()> {
        let at = self.base + TABLE;
        memory::write(self.task.0, table, &[(at, table.len())])
            .doing(|| format!("write a table to task {}", self.task))?;
        self.go(at)
    }

    /// Lets the task walk the table at `at`.
    fn go(&self, at: u64) -> Result<()> {
        let mut regs = clean(self.task)?;
        regs.rip = self.base;
        regs.rbx = at;
        ptrace::set_regs(self.task.0, &regs).doing(|| format!("set the registers of task {}", self.task))?;
        ptrace::cont(self.task.0, 0).doing(|| format!("continue task {}", self.task))
    }

    fn until_breakpoint(&self) -> Result<()> {
        match self.wait()? {
            (libc::SIGTRAP, 0) => Ok(()),
            stop => Err(unexpected(self.task, stop)),
        }
    }

    fn wait(&self) -> Result<(i32, i32)> {
        wait(self.task)
    }
}

/// One call in each of several tasks as by [`Stub::single`], in all of them at once. Every result must be 0.
pub fn single_all(what: &'static str, calls: &[(Stub, i64, [u64; 6])]) -> Result<()> {
    for (stub, number, args) in calls {
        prepare(stub.task, stub.base + SYSCALL, *number, *args)?;
    }
    for _ in STOPS {
        for (stub, ..) in calls {
            ptrace::syscall(stub.task.0, 0).doing(|| format!("continue task {}", stub.task))?;
        }
        calls.iter().try_for_each(|(stub, ..)| stopped_at_call(stub.task))?;
    }
    calls.iter().try_for_each(|(stub, number, _)| {
        let regs = ptrace::regs(stub.task.0).doing(|| format!("read the registers of task {}", stub.task))?;
        check_single(what, *number, regs.rax as i64, stub.task)
    })
}

/// Begins a call that waits in each of several tasks and stops it at once. What each returned: the kernel's note to
/// itself that it is to be restarted, unless it had nothing to wait for. The tasks are in a stop from which a restart is
/// possible.
pub fn begin_all(calls: &[(Stub, i64, [u64; 6])]) -> Result<Vec<i64>> {
    for (stub, number, args) in calls {
        prepare(stub.task, stub.base + SYSCALL, *number, *args)?;
        ptrace::syscall(stub.task.0, 0).doing(|| format!("begin a call of task {}", stub.task))?;
    }
    calls.iter().try_for_each(|(stub, ..)| stopped_at_call(stub.task))?;
    stop_all(&calls.iter().map(|(stub, ..)| *stub).collect::<Vec<_>>())?;
    let result = |task: HostPid| Ok(ptrace::regs(task.0).doing(|| format!("begin a call of task {task}"))?.rax as i64);
    calls.iter().map(|(stub, ..)| result(stub.task)).collect()
}

/// Lets tasks go on to where the kernel restarts calls, and stops them there: not an instruction of them runs.
pub fn stop_all(stubs: &[Stub]) -> Result<()> {
    for stub in stubs {
        let doing = || format!("stop task {}", stub.task);
        ptrace::interrupt(stub.task.0).doing(doing)?;
        ptrace::cont(stub.task.0, 0).doing(doing)?;
    }
    stubs.iter().try_for_each(|stub| match stub.wait()? {
        (_, ptrace::EVENT_STOP) => Ok(()),
        stop => Err(unexpected(stub.task, stop)),
    })
}

/// Calls for one task.
pub struct Job {
    pub stub: Stub,
    pub calls: Vec<RemoteCall>,
    /// Tasks with the same number share their memory, and so the room for tables.
    pub space: i32,
}

/// Runs the calls of many tasks, all of them at once: what takes long is to have a task scheduled, not its calls. All
/// tasks are such that nothing but a stub runs in them.
pub fn run_all(jobs: &mut [Job]) -> Result<()> {
    let mut waiting: Vec<&mut Job> = jobs.iter_mut().filter(|job| !job.calls.is_empty()).collect();
    while !waiting.is_empty() {
        let mut spaces: BTreeMap<i32, Vec<u8>> = BTreeMap::new();
        let (mut now, mut later) = (Vec::new(), Vec::new());
        for job in waiting {
            let bytes = spaces.entry(job.space).or_default();
            match one_table(job, bytes)? {
                Some(at) => now.push((at, job)),
                // Alone it must fit in as many tables as it takes.
                None if bytes.is_empty() => job.stub.run(&mut job.calls)?,
                None => later.push(job),
            }
        }
        run_once(&spaces, &mut now)?;
        waiting = later;
    }
    Ok(())
}

/// Adds the whole table of a job to the bytes for its space; where it is there. None when it does not fit.
fn one_table(job: &Job, bytes: &mut Vec<u8>) -> Result<Option<(usize, Table)>> {
    let (room, at) = ((Stub::BYTES - TABLE) as usize - bytes.len(), bytes.len());
    let Ok((table, count)) = lay_out(&job.calls, job.stub.base + TABLE + at as u64, room) else { return Ok(None) };
    if count < job.calls.len() || table.bytes.len() > room {
        return Ok(None);
    }
    bytes.extend_from_slice(&table.bytes);
    Ok(Some((at, table)))
}

type Placed<'a> = ((usize, Table), &'a mut Job);

fn run_once(spaces: &BTreeMap<i32, Vec<u8>>, jobs: &mut [Placed<'_>]) -> Result<()> {
    let mut written = BTreeSet::new();
    for ((at, _), job) in jobs.iter() {
        let (stub, base) = (job.stub, job.stub.base + TABLE);
        if written.insert(job.space) {
            let bytes = &spaces[&job.space];
            memory::write(stub.task.0, bytes, &[(base, bytes.len())])
                .doing(|| format!("write tables to task {}", stub.task))?;
        }
        stub.go(base + *at as u64)?;
    }
    for (_, job) in jobs.iter() {
        job.stub.until_breakpoint()?;
    }
    let mut read: BTreeMap<i32, Vec<u8>> = BTreeMap::new();
    for ((at, table), job) in jobs.iter_mut() {
        let (stub, space) = (job.stub, job.space);
        if let std::collections::btree_map::Entry::Vacant(empty) = read.entry(space) {
            let bytes = empty.insert(vec![0; spaces[&space].len()]);
            memory::read_exact(stub.task.0, stub.base + TABLE, bytes)
                .doing(|| format!("read results of task {}", stub.task))?;
        }
        table.read_back(&read[&space][*at..*at + table.bytes.len()], &mut job.calls, &stub.task)?;
    }
    Ok(())
}

/// Registers with which a system call can be made: none is being restarted.
fn clean(task: HostPid) -> Result<Regs> {
    let mut regs = ptrace::regs(task.0).doing(|| format!("read the registers of task {task}"))?;
    regs.orig_rax = u64::MAX;
    Ok(regs)
}

fn wait(task: HostPid) -> Result<(i32, i32)> {
    match ptrace::wait(task.0, true).doing(|| format!("wait for task {task}"))? {
        Wait::Stopped { signal, event } => Ok((signal, event)),
        Wait::Ended(status) => {
            Err(Problem::new("E-REMOTE-CALL", format!("task {task} died while it was restored (status {status:#x})")))
        }
        Wait::Nothing => Err(Problem::new("E-INTERNAL", "a blocking wait returned nothing")),
    }
}

fn unexpected(task: HostPid, (signal, event): (i32, i32)) -> Problem {
    let at = ptrace::regs(task.0).map_or(0, |regs| regs.rip);
    let what = format!("task {task} stopped by signal {signal} (event {event}) at {at:#x} while it was restored");
    Problem::new("E-REMOTE-CALL", what)
}

/// One system call by the instruction at `instruction`, from one syscall stop to the next.
fn single(task: HostPid, instruction: u64, number: i64, args: [u64; 6]) -> Result<i64> {
    prepare(task, instruction, number, args)?;
    for _ in STOPS {
        ptrace::syscall(task.0, 0).doing(|| format!("continue task {task}"))?;
        stopped_at_call(task)?;
    }
    let regs = ptrace::regs(task.0).doing(|| format!("read the registers of task {task}"))?;
    Ok(regs.rax as i64)
}

const STOPS: [&str; 2] = ["entry", "exit"];

fn prepare(task: HostPid, instruction: u64, number: i64, args: [u64; 6]) -> Result<()> {
    let mut regs = clean(task)?;
    regs.rip = instruction;
    regs.rax = number as u64;
    [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = args;
    ptrace::set_regs(task.0, &regs).doing(|| format!("set the registers of task {task}"))
}

fn stopped_at_call(task: HostPid) -> Result<()> {
    const SYSCALL_STOP: (i32, i32) = (libc::SIGTRAP | 0x80, 0);
    let stop = wait(task)?;
    if stop == SYSCALL_STOP { Ok(()) } else { Err(unexpected(task, stop)) }
}

/// As [`layout::expected`], for a call made by [`Stub::single`].
fn check_single(what: &'static str, number: i64, result: i64, task: HostPid) -> Result<()> {
    let mut call = RemoteCall::new(what, number, Vec::new());
    call.result = result;
    call.expect = Expect::Exactly(0);
    layout::expected(&call, &task)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_offsets() {
        assert_eq!(CODE[SYSCALL as usize..][..2], [0x0f, 0x05]);
        // je: from after itself to the breakpoint.
        assert_eq!(9 + usize::from(CODE[8]), CODE.len() - 1);
        assert_eq!(CODE[CODE.len() - 1], 0xcc);
        // jmp: back to the start.
        assert_eq!(CODE.len() as i64 - 1 + i64::from(CODE[CODE.len() - 2] as i8), 0);
    }
}
