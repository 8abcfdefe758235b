//! Remote calls in a program that must not notice, whatever happens to us meanwhile.
//!
//! The code goes into the zero bytes at the end of the vDSO (a private copy of that page, by /proc/PID/mem); results
//! and arguments go to one borrowed mapping. Both are taken away by [`Borrowed::leave`].
//!
//! **A tracer that is killed at any instant leaves the program as it was.** Before a register is changed, the code ends
//! in an epilogue with the mask and all registers that the thread had; a task that loses its tracer ends its table
//! (questions only) and runs that epilogue. The order is: code, table, registers, mask, go — and back: mask, registers.
//! Signals stay queued in the kernel all the time, because the mask holds them off while the stub runs. What can remain
//! after a kill is the mapping and the code in the vDSO; a header beside the code says where the mapping is (written
//! before it is made) and with which cookie it begins, so that the next engine takes both over; and what the thread in
//! the stub is on the way back to, so that one that the next engine finds still there is put back at once. (A handler
//! that a signal started in the very epilogue returns into it: it must be over before the next engine comes.)
//!
//! Many threads of a process run their tables at once, each with code of its own: in pages behind the mapping that are
//! made for it, the code at the end of a page as in the vDSO.

use super::call::RemoteCall;
use super::layout::{Table, lay_out};
use super::stub::{self, End, HEADER, HOME, Home, MAGIC, SAVED};
use crate::freeze::{Process, Thread};
use crate::objects::task::interrupted;
use pod_runtime::proc::maps::Map;
use pod_runtime::sys::memory;
use pod_runtime::sys::ptrace::{self, Regs, Wait};
use pod_runtime::{Doing, Problem, Result};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

/// No place for code or memory can be found in a process.
pub const NO_ROOM: &str = "E-NO-ROOM";

/// Room for the questions to as many threads as work at once.
const DATA: u64 = 256 << 10;
/// The mapping begins with the cookie; tables come after, up to a page that is never touched.
const TABLES: u64 = 64;
const SPARE: u64 = DATA - 4096;
/// So many threads of a process work at once. Each has a page of its own for its code, behind the mapping.
const SLOTS: usize = 128;
const CODE: u64 = SLOTS as u64 * 4096;

/// A process in which calls are run for us.
pub struct Borrowed<'a> {
    process: &'a Process,
    memory: File,
    home: u64,
    data: u64,
    /// Whether the pages for the code of many threads are there.
    code: bool,
    /// Somebody stopped the process meanwhile (SIGSTOP cannot be held off): it is said again on leaving.
    stop_again: bool,
    left: bool,
    /// What the first thread is at.
    running: Option<Running>,
}

/// A thread that runs the stub.
struct Running {
    tid: i32,
    end: End,
    /// Where header and code are.
    home: u64,
    /// Where it is when it is done.
    done: u64,
    /// What it goes back to.
    mask: u64,
    regs: Regs,
    /// The table that it walks, and how many calls are in it.
    table: Option<(Table, usize)>,
}

impl Running {
    /// Lets it run. One that ends with a mark is followed by its system calls until it is there.
    fn go(&self, marked: bool) -> std::io::Result<()> {
        let by_calls = self.end == End::Mark && !marked;
        if by_calls { ptrace::syscall(self.tid, 0) } else { ptrace::cont(self.tid, 0) }
    }

    fn put_back(&self) -> std::io::Result<()> {
        ptrace::set_signal_mask(self.tid, self.mask)?;
        ptrace::set_regs(self.tid, &self.regs)
    }
}

impl<'a> Borrowed<'a> {
    /// Borrows what the stub needs. `maps` are those of the process as they are now.
    pub fn enter(process: &'a Process, maps: &[Map]) -> Result<Self> {
        let mut borrowed = Borrowed::begin(process, maps)?;
        borrowed.entered()?;
        Ok(borrowed)
    }

    /// The first half of [`Borrowed::enter`], which does not wait for the process. To have many processes at work at once
    /// is what makes the halves worth having: nearly all of a call's time is the task's way to a CPU.
    pub fn begin(process: &'a Process, maps: &[Map]) -> Result<Self> {
        let name = process.name();
        let path = process.proc("mem");
        let memory = OpenOptions::new().read(true).write(true).open(&path);
        let memory = memory.doing(|| format!("open the memory of {name}"))?;
        let vdso = maps.iter().find(|map| map.name == "[vdso]" && map.execute);
        let home = vdso.map(|map| map.end - HOME).ok_or_else(|| no_room(&name, "it has no vDSO"))?;
        let mut there = [0u8; HOME as usize];
        memory.read_exact_at(&mut there, home).doing(|| format!("read the vDSO of {name}"))?;
        let mut borrowed =
            Borrowed { process, memory, home, data: 0, code: false, stop_again: false, left: true, running: None };
        if there[..8] == MAGIC {
            if let Some(data) = borrowed.leftover(&there, maps) {
                borrowed.data = data;
                borrowed.code = maps.iter().any(|map| (map.start, map.end) == (data + DATA, data + DATA + CODE));
                borrowed.left = false;
                return Ok(borrowed);
            }
        } else if there.iter().any(|byte| *byte != 0) {
            return Err(no_room(&name, "the end of its vDSO is in use"));
        }
        borrowed.map(maps)?;
        Ok(borrowed)
    }

    /// The second half of [`Borrowed::enter`].
    pub fn entered(&mut self) -> Result<()> {
        let Some(running) = self.running.take() else { return Ok(()) };
        let result = self.land(running)?.r14 as i64;
        let name = self.process.name();
        let wanted = std::mem::take(&mut self.data);
        if result as u64 != wanted {
            let error = std::io::Error::from_raw_os_error(-result as i32);
            return Err(no_room(&name, "it cannot map memory").because(error));
        }
        self.data = wanted;
        let mut cookie = [0u8; 16];
        self.memory.read_exact_at(&mut cookie, self.home + 8).doing(|| format!("read the vDSO of {name}"))?;
        memory::write(self.process.host.0, &cookie, &[(wanted, 16)]).doing(|| format!("write to {name}"))
    }

    /// What is borrowed: no part of the program's memory.
    pub fn range(&self) -> std::ops::Range<u64> {
        self.data..self.data + DATA + CODE
    }

    /// The mapping of an engine that was killed, if it is still there.
    fn leftover(&self, header: &[u8], maps: &[Map]) -> Option<u64> {
        let data = u64::from_le_bytes(header[24..32].try_into().ok()?);
        let map = maps.iter().find(|map| map.start <= data && data + DATA <= map.end)?;
        if !map.read || !map.write || map.shared || map.inode != 0 {
            return None;
        }
        let mut cookie = [0u8; 16];
        self.memory.read_exact_at(&mut cookie, data).ok()?;
        (cookie == header[8..24]).then_some(data)
    }

    fn map(&mut self, maps: &[Map]) -> Result<()> {
        let name = self.process.name();
        let data = hole(maps).ok_or_else(|| no_room(&name, "its address space is full"))?;
        let mut header = Vec::from(MAGIC);
        let cookie: [u8; 16] = random();
        header.extend_from_slice(&cookie);
        header.extend_from_slice(&data.to_le_bytes());
        self.memory.write_all_at(&header, self.home).doing(|| format!("write to the vDSO of {name}"))?;
        self.left = false;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let args = [data, DATA, (libc::PROT_READ | libc::PROT_WRITE) as u64, flags as u64, u64::MAX, 0];
        self.start_one(libc::SYS_mmap, args)?;
        self.data = data;
        Ok(())
    }

    /// Address of a page of the borrowed mapping that nothing was written to: as fresh memory of the process is.
    pub fn fresh_page(&self) -> u64 {
        self.data + SPARE
    }

    /// Runs calls in one of the process's threads. They must be such that running them to the end without us does no
    /// harm.
    pub fn run(&mut self, thread: &Thread, calls: &mut [RemoteCall]) -> Result<()> {
        self.start(thread, calls)?;
        self.finish(thread, calls)
    }

    /// Begins to run calls, without waiting. Nothing else can be run before [`Borrowed::finish`] with the same.
    pub fn start(&mut self, thread: &Thread, calls: &[RemoteCall]) -> Result<()> {
        if calls.is_empty() {
            return Ok(());
        }
        let base = self.data + TABLES;
        let (table, count) = lay_out(calls, base, (SPARE - TABLES) as usize)?;
        memory::write(self.process.host.0, &table.bytes, &[(base, table.bytes.len())])
            .doing(|| format!("write remote calls to {}", self.process.name()))?;
        let mut running =
            self.launch(thread, self.home, stub::TABLE, |regs| (regs.r12, regs.r13) = (base, count as u64))?;
        running.table = Some((table, count));
        self.running = Some(running);
        Ok(())
    }

    /// Waits for what was started, and runs what did not fit.
    pub fn finish(&mut self, thread: &Thread, calls: &mut [RemoteCall]) -> Result<()> {
        let mut rest = calls;
        while let Some(mut running) = self.running.take() {
            let table = running.table.take();
            self.land(running)?;
            let Some((table, count)) = table else { break };
            let (base, pid) = (self.data + TABLES, self.process.host.0);
            let mut back = vec![0; table.bytes.len()];
            memory::read_exact(pid, base, &mut back).doing(|| format!("read results of {}", self.process.name()))?;
            let (now, later) = rest.split_at_mut(count);
            table.read_back(&back, now, &self.process.name())?;
            rest = later;
            self.start(thread, rest)?;
        }
        Ok(())
    }

    /// Runs calls in many threads, as many of them at once as can be.
    pub fn run_all(&mut self, threads: &[&Thread], calls: &mut [Vec<RemoteCall>]) -> Result<()> {
        if threads.len() < 2 || !self.map_code()? {
            return threads.iter().zip(calls).try_for_each(|(thread, calls)| self.run(thread, calls));
        }
        let crowds = threads.chunks(SLOTS).zip(calls.chunks_mut(SLOTS));
        crowds.into_iter().try_for_each(|(threads, calls)| self.run_crowd(threads, calls))
    }

    /// Pages for the code of many threads, at whose ends it lies as in the vDSO, so that threads which are stranded there
    /// are recognised. False when the process may not have them (it must not make memory executable, say).
    fn map_code(&mut self) -> Result<bool> {
        if !self.code {
            let at = self.data + DATA;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
            let protection = libc::PROT_READ | libc::PROT_EXEC;
            let args = vec![at.into(), CODE.into(), protection.into(), flags.into(), u64::MAX.into(), 0.into()];
            let mut calls = [RemoteCall::new("mmap", libc::SYS_mmap, args).may_fail()];
            self.run(self.process.leader(), &mut calls)?;
            self.code = calls[0].result as u64 == at;
        }
        Ok(self.code)
    }

    fn run_crowd(&mut self, threads: &[&Thread], calls: &mut [Vec<RemoteCall>]) -> Result<()> {
        let (pid, base) = (self.process.host.0, self.data + TABLES);
        let (mut bytes, mut tables) = (Vec::new(), Vec::new());
        for calls in calls.iter() {
            let at = bytes.len();
            let (table, count) = lay_out(calls, base + at as u64, (SPARE - TABLES) as usize - at)?;
            if count < calls.len() {
                return Err(Problem::new("E-INTERNAL", "the calls of many threads do not fit"));
            }
            bytes.extend_from_slice(&table.bytes);
            tables.push((at, table, count));
        }
        memory::write(pid, &bytes, &[(base, bytes.len())])
            .doing(|| format!("write remote calls to {}", self.process.name()))?;
        let mut running = Vec::with_capacity(threads.len());
        let mut done = Ok(());
        for (slot, (thread, (at, _, count))) in threads.iter().zip(&tables).enumerate() {
            let home = self.data + DATA + (slot as u64 + 1) * 4096 - HOME;
            let marked = self.memory.write_all_at(&MAGIC, home).doing(|| format!("write to {}", self.process.name()));
            let launched = marked.and_then(|()| {
                let set = |regs: &mut Regs| (regs.r12, regs.r13) = (base + *at as u64, *count as u64);
                self.launch(thread, home, stub::TABLE, set)
            });
            match launched {
                Ok(launched) => running.push(launched),
                Err(problem) => {
                    done = Err(problem);
                    break;
                }
            }
        }
        // All that were let go must be put back, whatever happened.
        for running in running {
            done = self.land(running).map(drop).and(done);
        }
        done?;
        memory::read_exact(pid, base, &mut bytes).doing(|| format!("read results of {}", self.process.name()))?;
        for ((at, table, _), calls) in tables.iter().zip(calls) {
            table.read_back(&bytes[*at..*at + table.bytes.len()], calls, &self.process.name())?;
        }
        Ok(())
    }

    /// Ends what was borrowed.
    fn unmap(&mut self) -> Result<()> {
        let bytes = if self.code { DATA + CODE } else { DATA };
        self.start_one(libc::SYS_munmap, [self.data, bytes, 0, 0, 0, 0])?;
        self.data = 0;
        Ok(())
    }

    fn start_one(&mut self, number: i64, args: [u64; 6]) -> Result<()> {
        let process = self.process;
        let running = self.launch(process.leader(), self.home, stub::ONE, |regs| {
            regs.rax = number as u64;
            [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = args;
        })?;
        self.running = Some(running);
        Ok(())
    }

    /// Lets a thread run the stub once. It must be landed.
    fn launch(&self, thread: &Thread, at: u64, entry: u64, set: impl FnOnce(&mut Regs)) -> Result<Running> {
        let tid = thread.host.0;
        let doing = || format!("run calls in {}", self.process.name());
        let mask = ptrace::signal_mask(tid).doing(doing)?;
        let back = Home { regs: interrupted::restarted_here(&thread.regs), mask };
        let end = self.end(thread, mask);
        let code = stub::code(end, &back);
        let (home, at) = (at, at + HEADER);
        // Both at once; what lies between them is zero.
        let mut bytes = back.encode();
        bytes.resize((HEADER - SAVED) as usize, 0);
        bytes.extend_from_slice(&code.bytes);
        self.memory.write_all_at(&bytes, home + SAVED).doing(doing)?;
        let mut regs = thread.regs;
        regs.orig_rax = u64::MAX;
        regs.rip = at + entry;
        set(&mut regs);
        let done = at + code.end;
        let held = match end {
            End::Signal { signal, .. } => !(1u64 << (signal - 1)),
            _ => u64::MAX,
        };
        let running = Running { tid, end, home, done, mask, regs: thread.regs, table: None };
        ptrace::set_regs(tid, &regs).doing(doing)?;
        let gone = ptrace::set_signal_mask(tid, held).and_then(|()| running.go(false)).doing(doing);
        gone.inspect_err(|_| drop(running.put_back()))?;
        Ok(running)
    }

    /// Waits for the end of the stub and puts the thread back. Returns the registers at its end.
    fn land(&mut self, running: Running) -> Result<Regs> {
        let after = self.follow(&running);
        let put_back = running.put_back();
        let after = after?;
        put_back.doing(|| format!("put back the registers of {}", self.process.name()))?;
        Ok(after)
    }

    /// How the thread can say that it is done: by a signal that it ignores, or not at all.
    fn end(&self, thread: &Thread, mask: u64) -> End {
        let status = &thread.status;
        let taken = status.caught | status.pending | status.shared_pending | mask;
        let free = [libc::SIGURG, libc::SIGWINCH, libc::SIGCHLD].into_iter().find(|s| taken & (1 << (s - 1)) == 0);
        match free {
            Some(signal) => End::Signal { signal, pid: self.process.pid.0, tid: thread.tid.0 },
            None => End::Mark,
        }
    }

    /// Lets the thread run until it is at its end and cannot go on.
    fn follow(&mut self, running: &Running) -> Result<Regs> {
        let Running { tid, home, done, .. } = *running;
        let name = || self.process.name();
        let mut marked = false;
        let mut went = true;
        loop {
            if !std::mem::take(&mut went) {
                running.go(marked).doing(|| format!("continue {}", name()))?;
            }
            let (signal, event) = match ptrace::wait(tid, true).doing(|| format!("wait for {}", name()))? {
                Wait::Stopped { signal, event } => (signal, event),
                Wait::Nothing => continue,
                Wait::Ended(_) => return Err(Problem::new("E-SYSTEM", format!("{} ended while it was asked", name()))),
            };
            let regs = ptrace::regs(tid).doing(|| format!("read the registers of {}", name()))?;
            match (signal, event) {
                // At a system call's exit nothing would restart the call that the thread was in: stop it once more.
                (trap, 0)
                    if trap == libc::SIGTRAP | 0x80
                        && regs.rip == done
                        && regs.rax as i64 != -i64::from(libc::ENOSYS) =>
                {
                    marked = true;
                    ptrace::interrupt(tid).doing(|| format!("stop {}", name()))?;
                }
                (trap, 0) if trap == libc::SIGTRAP | 0x80 => {}
                (_, ptrace::EVENT_STOP) if marked => return Ok(regs),
                (_, event) if event != 0 => {}
                (libc::SIGSTOP, _) => self.stop_again = true,
                (libc::SIGSEGV | libc::SIGBUS | libc::SIGILL, _) if regs.rip >= home && regs.rip <= done => {
                    let what = format!("{} got signal {signal} while it was asked", name());
                    return Err(Problem::new("E-SYSTEM", what));
                }
                _ if regs.rip == done => return Ok(regs),
                _ => {}
            }
        }
    }

    /// Begins to give everything back, without waiting.
    pub fn begin_leaving(&mut self) -> Result<()> {
        if self.left || self.running.is_some() || self.data == 0 {
            return Ok(());
        }
        self.unmap()
    }

    /// Gives everything back.
    pub fn leave(mut self) -> Result<()> {
        self.give_back()
    }

    fn give_back(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.left, true) {
            return Ok(());
        }
        if self.running.is_none() && self.data != 0 {
            self.unmap()?;
        }
        // The end of what was begun, also by one who then failed: a mapping that was not made must not be unmapped.
        while let Some(running) = self.running.take() {
            let mapping = running.table.is_none();
            let result = self.land(running)?.r14;
            if mapping && result != self.data {
                self.data = 0;
            }
            if self.data != 0 {
                self.unmap()?;
            }
        }
        self.memory
            .write_all_at(&[0; HOME as usize], self.home)
            .doing(|| format!("clear the vDSO of {}", self.process.name()))?;
        if self.stop_again {
            let pid = nix::unistd::Pid::from_raw(self.process.host.0);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP)
                .doing(|| format!("stop {}", self.process.name()))?;
        }
        Ok(())
    }
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        if let Err(problem) = self.give_back() {
            tracing::warn!("a borrowed mapping stays in {}: {}", self.process.name(), problem.chain());
        }
    }
}

fn no_room(name: &str, why: &str) -> Problem {
    Problem::new(NO_ROOM, format!("{name} has no room for the calls that save its state: {why}"))
}

/// The middle of the lowest gap that leaves plenty around.
fn hole(maps: &[Map]) -> Option<u64> {
    const PLENTY: u64 = 64 << 20;
    maps.windows(2)
        .find(|pair| pair[1].start.saturating_sub(pair[0].end) >= 2 * PLENTY && !pair[1].name.starts_with("[vsyscall"))
        .or_else(|| {
            maps.windows(2).find(|pair| {
                pair[1].start.saturating_sub(pair[0].end) >= DATA + CODE + (2 << 20)
                    && !pair[1].name.starts_with("[vsyscall")
            })
        })
        .map(|pair| (pair[0].end + (pair[1].start - pair[0].end) / 2) & !0xfff)
}

fn random() -> [u8; 16] {
    // A hasher is seeded from the kernel's randomness; two give 16 bytes.
    use std::hash::{BuildHasher, RandomState};
    let (a, b) = (RandomState::new().hash_one(1), RandomState::new().hash_one(2));
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&a.to_le_bytes());
    bytes[8..].copy_from_slice(&b.to_le_bytes());
    bytes
}
