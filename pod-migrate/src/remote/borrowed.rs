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

use super::call::RemoteCall;
use super::layout::lay_out;
use super::stub::{self, End, HEADER, HOME, Home, MAGIC, SAVED};
use crate::freeze::{Process, Thread};
use crate::objects::task::interrupted;
use pod_runtime::proc::maps::{self, Map};
use pod_runtime::sys::memory;
use pod_runtime::sys::ptrace::{self, Regs, Wait};
use pod_runtime::{Doing, Problem, Result};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

/// No place for code or memory can be found in a process.
pub const NO_ROOM: &str = "E-NO-ROOM";

const DATA: u64 = 128 << 10;
/// The mapping begins with the cookie; tables come after.
const TABLES: u64 = 64;

/// A process in which calls are run for us.
pub struct Borrowed<'a> {
    process: &'a Process,
    memory: File,
    home: u64,
    data: u64,
    /// Somebody stopped the process meanwhile (SIGSTOP cannot be held off): it is said again on leaving.
    stop_again: bool,
    left: bool,
}

impl<'a> Borrowed<'a> {
    /// Borrows what the stub needs. `maps` are those of the process as they are now.
    pub fn enter(process: &'a Process, maps: &[Map]) -> Result<Self> {
        let name = process.name();
        let path = process.proc("mem");
        let memory = OpenOptions::new().read(true).write(true).open(&path);
        let memory = memory.doing(|| format!("open the memory of {name}"))?;
        let vdso = maps.iter().find(|map| map.name == "[vdso]" && map.execute);
        let home = vdso.map(|map| map.end - HOME).ok_or_else(|| no_room(&name, "it has no vDSO"))?;
        let mut there = [0u8; HOME as usize];
        memory.read_exact_at(&mut there, home).doing(|| format!("read the vDSO of {name}"))?;
        let mut borrowed = Borrowed { process, memory, home, data: 0, stop_again: false, left: true };
        if there[..8] == MAGIC {
            if let Some(data) = borrowed.leftover(&there, maps) {
                borrowed.data = data;
                borrowed.left = false;
                return Ok(borrowed);
            }
        } else if there.iter().any(|byte| *byte != 0) {
            return Err(no_room(&name, "the end of its vDSO is in use"));
        }
        borrowed.map(maps)?;
        Ok(borrowed)
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
        let result = self.one(libc::SYS_mmap, args)?;
        if result as u64 != data {
            let error = std::io::Error::from_raw_os_error(-result as i32);
            return Err(no_room(&name, "it cannot map memory").because(error));
        }
        self.data = data;
        memory::write(self.process.host.0, &cookie, &[(data, 16)]).doing(|| format!("write to {name}"))
    }

    /// Runs calls in one of the process's threads. They must be such that running them to the end without us does no
    /// harm.
    pub fn run(&mut self, thread: &Thread, calls: &mut [RemoteCall]) -> Result<()> {
        let base = self.data + TABLES;
        let pid = self.process.host.0;
        let mut from = 0;
        while from < calls.len() {
            let (table, count) = lay_out(&calls[from..], base, (DATA - TABLES) as usize)?;
            memory::write(pid, &table.bytes, &[(base, table.bytes.len())])
                .doing(|| format!("write remote calls to {}", self.process.name()))?;
            self.execute(thread, stub::TABLE, |regs| (regs.r12, regs.r13) = (base, count as u64))?;
            let mut back = vec![0; table.bytes.len()];
            memory::read_exact(pid, base, &mut back).doing(|| format!("read results of {}", self.process.name()))?;
            table.read_back(&back, &mut calls[from..from + count], &self.process.name())?;
            from += count;
        }
        Ok(())
    }

    fn one(&mut self, number: i64, args: [u64; 6]) -> Result<i64> {
        let process = self.process;
        let after = self.execute(process.leader(), stub::ONE, |regs| {
            regs.rax = number as u64;
            [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = args;
        })?;
        Ok(after.r14 as i64)
    }

    /// Runs the stub once and puts the thread back. Returns the registers at its end.
    fn execute(&mut self, thread: &Thread, entry: u64, set: impl FnOnce(&mut Regs)) -> Result<Regs> {
        let tid = thread.host.0;
        let doing = || format!("run calls in {}", self.process.name());
        let mask = ptrace::signal_mask(tid).doing(doing)?;
        let home = Home { regs: interrupted::restarted_here(&thread.regs), mask };
        let end = self.end(thread, mask);
        let code = stub::code(end, &home);
        let at = self.home + HEADER;
        self.memory.write_all_at(&home.encode(), self.home + SAVED).doing(doing)?;
        self.memory.write_all_at(&code.bytes, at).doing(doing)?;
        let mut regs = thread.regs;
        regs.orig_rax = u64::MAX;
        regs.rip = at + entry;
        set(&mut regs);
        let done = at + code.end;
        let held = match end {
            End::Signal { signal, .. } => !(1u64 << (signal - 1)),
            _ => u64::MAX,
        };
        ptrace::set_regs(tid, &regs).doing(doing)?;
        let after = ptrace::set_signal_mask(tid, held).doing(doing).and_then(|()| self.follow(thread, end, done));
        let put_back = ptrace::set_signal_mask(tid, mask).and_then(|()| ptrace::set_regs(tid, &thread.regs));
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

    /// Lets the thread run until it is at `done` and cannot go on.
    fn follow(&mut self, thread: &Thread, end: End, done: u64) -> Result<Regs> {
        let tid = thread.host.0;
        let name = || self.process.name();
        let mut marked = false;
        loop {
            let go = if end == End::Mark && !marked { ptrace::syscall(tid, 0) } else { ptrace::cont(tid, 0) };
            go.doing(|| format!("continue {}", name()))?;
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
                (libc::SIGSEGV | libc::SIGBUS | libc::SIGILL, _) if regs.rip >= self.home && regs.rip <= done => {
                    let what = format!("{} got signal {signal} while it was asked", name());
                    return Err(Problem::new("E-SYSTEM", what));
                }
                _ if regs.rip == done => return Ok(regs),
                _ => {}
            }
        }
    }

    /// Gives everything back.
    pub fn leave(mut self) -> Result<()> {
        self.give_back()
    }

    fn give_back(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.left, true) {
            return Ok(());
        }
        if self.data != 0 {
            self.one(libc::SYS_munmap, [self.data, DATA, 0, 0, 0, 0])?;
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
                pair[1].start.saturating_sub(pair[0].end) >= DATA + (2 << 20) && !pair[1].name.starts_with("[vsyscall")
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

/// The maps of a process as it is now, with flags.
pub fn maps_of(process: &Process) -> Result<Vec<Map>> {
    Ok(maps::parse(&process.text("maps")?))
}
