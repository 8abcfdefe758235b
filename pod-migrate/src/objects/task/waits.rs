//! How much longer a call with a time-out would have waited.
//!
//! The kernel keeps that on the stack of a waiting thread and tells nobody: not /proc, not ptrace, and to the program
//! itself only for the few calls that write the rest back. So it is read there, by a walk over the tasks that is run
//! in the kernel (a BPF iterator), just before the pod is stopped: for each thread in such a call, the words of its
//! kernel stack, among which a sleeping timer (`struct hrtimer_sleeper`) is known by the thread that it would wake, by
//! its state, and by a time that the call can have asked for. What is read is used if the thread has not run since.
//!
//! It fails by not knowing: no BPF, no BTF, a locked-down kernel, a layout that does not match. Then a call begins with
//! its whole time again, and the report says so.

use crate::ids::HostPid;
use nix::time::{ClockId, clock_gettime};
use pod_runtime::proc::{self, btf::Btf, status};
use pod_runtime::sys::bpf::{self, EbpfInstruction};
use pod_runtime::sys::memory;
use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

const TIMER_ABSTIME: u64 = 1;
const FUTEX_WAIT: u64 = 0;
const FUTEX_COMMAND: u64 = 127;
/// Rounding, and the time between a call's entry and the start of its timer.
const SLACK: i64 = 50_000_000;
/// Nothing sleeps longer than that: words that say so are no times.
const LONGEST: i64 = 100 * 365 * 86_400 * 1_000_000_000;

/// A call in which a thread waits: its number and arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Call {
    pub number: i64,
    pub args: [u64; 6],
}

/// The time that a call was given, if it was given one that counts from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TimeOut {
    Nanoseconds(i64),
    /// A struct timespec in the task's memory.
    At(u64),
}

impl Call {
    /// From /proc/PID/syscall: `number args… sp pc`, or "running".
    fn parse(text: &str) -> Option<Call> {
        let mut words = text.split_ascii_whitespace();
        let number = words.next()?.parse().ok().filter(|number| *number >= 0)?;
        let mut args = [0; 6];
        for arg in &mut args {
            *arg = u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok()?;
        }
        Some(Call { number, args })
    }

    /// Calls that do not tell a program how much of their time is left, and that are begun again after a stop.
    pub fn time_out(&self) -> Option<TimeOut> {
        let [first, second, third, fourth, ..] = self.args;
        let milliseconds =
            |value: u64| (value as i32 > 0).then(|| TimeOut::Nanoseconds(value as i32 as i64 * 1_000_000));
        let at = |pointer: u64| (pointer != 0).then_some(TimeOut::At(pointer));
        match self.number {
            libc::SYS_nanosleep => at(first),
            libc::SYS_clock_nanosleep if second & TIMER_ABSTIME == 0 => at(third),
            libc::SYS_poll => milliseconds(third),
            libc::SYS_futex if second & FUTEX_COMMAND == FUTEX_WAIT => at(fourth),
            libc::SYS_epoll_wait | libc::SYS_epoll_pwait => milliseconds(fourth),
            libc::SYS_epoll_pwait2 | libc::SYS_semtimedop => at(fourth),
            libc::SYS_rt_sigtimedwait => at(third),
            libc::SYS_io_getevents => at(self.args[4]),
            _ => None,
        }
    }

    /// A call that waits for as long as its socket says.
    pub fn has_no_time_out_of_its_own(&self) -> bool {
        ![
            libc::SYS_epoll_wait,
            libc::SYS_epoll_pwait,
            libc::SYS_epoll_pwait2,
            libc::SYS_semtimedop,
            libc::SYS_rt_sigtimedwait,
            libc::SYS_io_getevents,
        ]
        .contains(&self.number)
    }

    fn clock(&self) -> ClockId {
        match self.number {
            libc::SYS_clock_nanosleep if self.args[0] == libc::CLOCK_BOOTTIME as u64 => ClockId::CLOCK_BOOTTIME,
            _ => ClockId::CLOCK_MONOTONIC,
        }
    }
}

/// struct timespec at an address of a task, in nanoseconds.
pub(crate) fn timespec(tid: i32, address: u64) -> Option<i64> {
    let mut bytes = [0; 16];
    memory::read_exact(tid, address, &mut bytes).ok()?;
    let half = |range: std::ops::Range<usize>| i64::from_ne_bytes(bytes[range].try_into().expect("eight bytes"));
    half(0..8).checked_mul(1_000_000_000)?.checked_add(half(8..16))
}

fn now(clock: ClockId) -> i64 {
    clock_gettime(clock).map_or(0, |time| time.tv_sec() * 1_000_000_000 + time.tv_nsec())
}

/// Who looks at the threads of processes that run. What the kernel has to check for it (1 ms) it checks in a thread, from
/// the moment on when it is clear that somebody will look.
pub struct Observer {
    loading: Option<JoinHandle<std::io::Result<Walk>>>,
    walk: Option<Walk>,
}

impl Observer {
    /// `folder` is one of this boot, where what the kernel says of itself is noted for the next time.
    pub fn begin(folder: PathBuf) -> Observer {
        Observer { loading: Some(std::thread::spawn(move || Walk::load(&folder))), walk: None }
    }

    pub fn observe(&mut self, processes: &[i32]) -> Waits {
        let mut waits = Waits::default();
        for process in processes {
            let calls = calls_of(*process);
            if calls.is_empty() {
                continue;
            }
            let Some(walk) = self.loaded() else { break };
            match walk.run(*process) {
                Ok(threads) => waits.note(&threads, &calls, &walk.layout),
                Err(why) => tracing::debug!(process, %why, "time-outs cannot be read"),
            }
        }
        waits
    }

    fn loaded(&mut self) -> Option<&Walk> {
        if let Some(loading) = self.loading.take() {
            let walk = loading.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            self.walk = walk.inspect_err(|why| tracing::debug!(%why, "time-outs cannot be read")).ok();
        }
        self.walk.as_ref()
    }
}

/// When waiting calls end.
#[derive(Debug, Default)]
pub struct Waits {
    found: BTreeMap<i32, Wait>,
}

#[derive(Debug, Clone, Copy)]
struct Wait {
    /// On CLOCK_MONOTONIC of the host.
    end: i64,
    /// How often the thread had gone to sleep by then.
    switches: u64,
    /// nanosleep, poll or futex, if the kernel has restarted the call before.
    restarted: Option<i64>,
}

impl Waits {
    /// What was seen later counts.
    pub fn extend(&mut self, later: Waits) {
        self.found.extend(later.found);
    }

    fn note(&mut self, threads: &[Sleeper], calls: &BTreeMap<i32, Call>, layout: &Layout) {
        for thread in threads {
            let Some(call) = calls.get(&thread.tid) else { continue };
            let here = now(call.clock());
            let most = match call.time_out() {
                Some(TimeOut::Nanoseconds(ns)) => ns,
                Some(TimeOut::At(address)) => timespec(thread.tid, address).unwrap_or(LONGEST),
                None => LONGEST,
            };
            let Some(left) = thread.left(layout, here, most) else { continue };
            let end = now(ClockId::CLOCK_MONOTONIC) + left;
            let restarted = thread.restarted(here + left);
            self.found.insert(thread.tid, Wait { end, switches: thread.switches, restarted });
        }
    }

    /// What remains of the call that a thread was in when it was stopped, nanoseconds. None when nobody knows.
    pub(crate) fn remaining(&self, tid: HostPid, status: &status::Status) -> Option<u64> {
        self.of(tid, status).map(|wait| (wait.end - now(ClockId::CLOCK_MONOTONIC)).max(0) as u64)
    }

    /// Which call that was, if it is one that the kernel had restarted: nanosleep (also clock_nanosleep), poll or futex.
    pub(crate) fn restarted(&self, tid: HostPid, status: &status::Status) -> Option<i64> {
        self.of(tid, status)?.restarted
    }

    fn of(&self, tid: HostPid, status: &status::Status) -> Option<&Wait> {
        // The stop woke it once.
        self.found.get(&tid.0).filter(|wait| status.voluntary_switches <= wait.switches + 1)
    }
}

/// Threads of a process that wait in calls of which we want to know more.
fn calls_of(process: i32) -> BTreeMap<i32, Call> {
    let Ok(threads) = fs::read_dir(format!("/proc/{process}/task")) else { return BTreeMap::new() };
    let threads = threads.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    threads
        .filter_map(|tid| {
            let text = proc::read(format!("/proc/{process}/task/{tid}/syscall")).ok()?;
            let call = Call::parse(&text)?;
            // A call that the kernel has begun again hides its number.
            (call.time_out().is_some() || call.number == libc::SYS_restart_syscall).then_some((tid, call))
        })
        .collect()
}

/// What the walk says of one thread.
struct Sleeper {
    tid: i32,
    /// Its pid namespace, as an address in the kernel.
    namespace: u64,
    task: u64,
    switches: u64,
    /// struct restart_block: what the kernel has noted for a restart.
    restart: Vec<u64>,
    stack: Vec<u64>,
}

impl Sleeper {
    /// Which call noted this very end for its restart: each keeps it in a place of its own.
    fn restarted(&self, end: i64) -> Option<i64> {
        let [_, _, _, _, third, fourth, ..] = self.restart[..] else { return None };
        let seconds = third.checked_mul(1_000_000_000).and_then(|ns| ns.checked_add(fourth));
        if third as i64 == end {
            Some(libc::SYS_nanosleep)
        } else if fourth as i64 == end {
            Some(libc::SYS_futex)
        } else if seconds == Some(end as u64) {
            Some(libc::SYS_poll)
        } else {
            None
        }
    }

    /// Finds the timer, and how long it has to run.
    fn left(&self, layout: &Layout, now: i64, most: i64) -> Option<i64> {
        const ENQUEUED: u8 = 1;
        let at = |index: usize, offset: u32| self.stack.get(index.checked_add(offset as usize / 8)?).copied();
        let back = layout.sleeper_task as usize / 8;
        let places = self.stack.iter().enumerate().filter(|(_, word)| **word == self.task);
        places.filter_map(|(place, _)| place.checked_sub(back)).find_map(|timer| {
            let state = (at(timer, layout.timer_state)? >> (layout.timer_state % 8 * 8)) as u8;
            let end = at(timer, layout.timer_end)? as i64;
            let left = end.checked_sub(now)?;
            let sensible = left > -SLACK && left <= most.checked_add(SLACK)?;
            (state == ENQUEUED && sensible).then_some(left)
        })
    }
}

/// Where this kernel keeps what, in bytes from the start of the struct.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Layout {
    restart: u32,
    pid: u32,
    pid_level: u32,
    pid_numbers: u32,
    switches: u32,
    stack_pointer: u32,
    timer_end: u32,
    timer_state: u32,
    sleeper_task: u32,
    /// BTF type of the walk's function.
    function: u32,
}

impl Layout {
    /// From the note of an earlier time, which spares reading all types of the kernel (5 MiB).
    fn noted(folder: &Path) -> std::io::Result<Layout> {
        let path = folder.join("kernel-layout");
        let kernel = fs::read_to_string("/proc/version")?;
        if let Some(layout) = fs::read_to_string(&path).ok().and_then(|text| Layout::parse(&text, &kernel)) {
            return Ok(layout);
        }
        let layout = Layout::of_this_kernel()?;
        // Whole or not at all, for others may read it meanwhile. Without the note the next time is as long as this one.
        let fresh = folder.join(format!("kernel-layout.{}", std::process::id()));
        if let Err(error) = fs::write(&fresh, layout.text(&kernel)).and_then(|()| fs::rename(&fresh, &path)) {
            tracing::debug!(%error, "{} was not written", path.display());
        }
        Ok(layout)
    }

    fn parse(text: &str, kernel: &str) -> Option<Layout> {
        let numbers = text.strip_prefix(kernel)?.strip_suffix('\n')?.split(' ').map(|word| word.parse().ok());
        let numbers: [u32; 10] = numbers.collect::<Option<Vec<u32>>>()?.try_into().ok()?;
        let [
            restart,
            pid,
            pid_level,
            pid_numbers,
            switches,
            stack_pointer,
            timer_end,
            timer_state,
            sleeper_task,
            function,
        ] = numbers;
        Some(Layout {
            restart,
            pid,
            pid_level,
            pid_numbers,
            switches,
            stack_pointer,
            timer_end,
            timer_state,
            sleeper_task,
            function,
        })
    }

    fn text(&self, kernel: &str) -> String {
        let Layout {
            restart,
            pid,
            pid_level,
            pid_numbers,
            switches,
            stack_pointer,
            timer_end,
            timer_state,
            sleeper_task,
            function,
        } = *self;
        let numbers = [
            restart,
            pid,
            pid_level,
            pid_numbers,
            switches,
            stack_pointer,
            timer_end,
            timer_state,
            sleeper_task,
            function,
        ];
        format!("{kernel}{}\n", numbers.map(|number| number.to_string()).join(" "))
    }

    fn of_this_kernel() -> std::io::Result<Layout> {
        let unknown = || std::io::Error::other("the kernel does not say where it keeps timers");
        let wanted = [
            ("task_struct", "restart_block"),
            ("task_struct", "thread_pid"),
            ("pid", "level"),
            ("pid", "numbers"),
            ("task_struct", "nvcsw"),
            ("task_struct", "thread"),
            ("thread_struct", "sp"),
            ("hrtimer", "_softexpires"),
            ("hrtimer", "state"),
            ("hrtimer_sleeper", "task"),
        ];
        let found = Btf::of_this_kernel()?.find(&wanted, "bpf_iter_task");
        let members: Option<Vec<u32>> = found.members.into_iter().collect();
        let [restart, pid, pid_level, pid_numbers, switches, thread, sp, timer_end, timer_state, sleeper_task] =
            members.ok_or_else(unknown)?.try_into().map_err(|_| unknown())?;
        let function = found.function.ok_or_else(unknown)?;
        let stack_pointer = thread + sp;
        Ok(Layout {
            restart,
            pid,
            pid_level,
            pid_numbers,
            switches,
            stack_pointer,
            timer_end,
            timer_state,
            sleeper_task,
            function,
        })
    }
}

/// Bytes of a kernel stack that are looked at, from its top in use: a sleeping call takes about half of them.
const STACK: i32 = 2048;
const PIECE: i32 = 256;
/// Before it: the task's address, its pid's level, its switches, stack pointer, pid's address, a word that is free, then
/// its number and pid namespace at each level, then its restart block.
const HEAD: i32 = 48 + LEVELS * 16 + RESTART;
/// Bytes of a struct restart_block.
const RESTART: i32 = 56;
const LEVELS: i32 = 8;
const RECORD: usize = (HEAD + STACK) as usize;

/// The loaded walk.
struct Walk {
    program: OwnedFd,
    layout: Layout,
    /// Our own pid namespace, in which tids are given here.
    namespace: u64,
}

impl Walk {
    fn load(folder: &Path) -> std::io::Result<Walk> {
        let layout = Layout::noted(folder)?;
        let program = bpf::load_task_walk(&program(&layout), layout.function)?;
        let mut walk = Walk { program, layout, namespace: 0 };
        let ours = walk.run(std::process::id() as i32)?;
        walk.namespace = ours.first().map_or(0, |thread| thread.namespace);
        Ok(walk)
    }

    fn run(&self, process: i32) -> std::io::Result<Vec<Sleeper>> {
        let bytes = bpf::walk_tasks(self.program.as_fd(), process)?;
        let word = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().expect("eight bytes"));
        let sleeper = |record: &[u8]| {
            let words: Vec<u64> = record.chunks_exact(8).map(word).collect();
            let (head, stack) = words.split_at(HEAD as usize / 8);
            let level = (head[1] as u32 as usize).min(LEVELS as usize - 1);
            let (numbers, restart) = head[6..].split_at(LEVELS as usize * 2);
            let mut numbers = numbers.chunks_exact(2).take(level + 1);
            // The innermost when we ask for our own.
            let own = |number: &&[u64]| self.namespace == 0 || number[1] == self.namespace;
            let number = numbers.rfind(own)?;
            let (tid, namespace) = (number[0] as u32 as i32, number[1]);
            let (restart, stack) = (restart.to_vec(), stack.to_vec());
            Some(Sleeper { tid, namespace, task: head[0], switches: head[2], restart, stack })
        };
        Ok(bytes.chunks_exact(RECORD).filter_map(sleeper).collect())
    }
}

/// For each task a record: [`HEAD`], then the top of its kernel stack.
fn program(layout: &Layout) -> Vec<EbpfInstruction> {
    const HEAD_AT: i32 = -HEAD;
    const STACK_AT: i32 = HEAD_AT + 24;
    const PID_AT: i32 = HEAD_AT + 32;
    const PIECE_AT: i32 = HEAD_AT - PIECE;
    let (load, store, set) = (EbpfInstruction::load, EbpfInstruction::store, EbpfInstruction::set);
    // r6: the output, r7: the task, r8: its pid, later its stack pointer, r10: our own stack.
    let read = EbpfInstruction::read_kernel;
    let write = |from, bytes| EbpfInstruction::write_out(6, from, bytes);
    let mut body = vec![set(0, 0)];
    body.extend((0..HEAD / 8).map(|word| store(10, 0, HEAD_AT + word * 8)));
    body.push(store(10, 7, HEAD_AT));
    body.extend(read(HEAD_AT + 16, 8, 7, layout.switches as i32));
    body.extend(read(STACK_AT, 8, 7, layout.stack_pointer as i32));
    body.extend(read(PID_AT, 8, 7, layout.pid as i32));
    body.extend(read(HEAD_AT + HEAD - RESTART, RESTART, 7, layout.restart as i32));
    body.push(load(8, 10, PID_AT));
    body.extend(read(HEAD_AT + 8, 4, 8, layout.pid_level as i32));
    body.extend(read(HEAD_AT + 48, LEVELS * 16, 8, layout.pid_numbers as i32));
    body.push(load(8, 10, STACK_AT));
    body.extend(write(HEAD_AT, HEAD));
    for piece in 0..STACK / PIECE {
        body.extend(read(PIECE_AT, PIECE, 8, piece * PIECE));
        body.extend(write(PIECE_AT, PIECE));
    }
    EbpfInstruction::for_each_task(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_with_a_time_out() {
        let call = |text: &str| Call::parse(text).unwrap();
        assert_eq!(Call::parse("running"), None);
        assert_eq!(Call::parse("-1 0x7ffc 0x7f00"), None);
        let epoll = call("232 0x5 0x7ffc 0x40 0x1388 0x0 0x0 0x7ffc 0x7f00");
        assert_eq!(epoll.time_out(), Some(TimeOut::Nanoseconds(5_000_000_000)));
        let for_ever = call("232 0x5 0x7ffc 0x40 0xffffffff 0x0 0x0 0x7ffc 0x7f00");
        assert_eq!(for_ever.time_out(), None);
        let bitset = call("202 0x7f10 0x189 0x0 0x7f20 0x0 0xffffffff 0x7ffc 0x7f00");
        assert_eq!(bitset.time_out(), None);
        let relative = call("202 0x7f10 0x80 0x0 0x7f20 0x0 0x0 0x7ffc 0x7f00");
        assert_eq!(relative.time_out(), Some(TimeOut::At(0x7f20)));
    }

    #[test]
    fn a_timer_is_known_by_its_thread_and_its_time() {
        let layout = Layout {
            restart: 0,
            pid: 0,
            pid_level: 0,
            pid_numbers: 0,
            switches: 0,
            stack_pointer: 0,
            timer_end: 32,
            timer_state: 56,
            sleeper_task: 64,
            function: 0,
        };
        let mut stack = vec![0u64; 64];
        // A word that is the task's address by chance, with nothing sensible before it.
        stack[20] = 0xffff_8880_0000_1000;
        stack[48] = 0xffff_8880_0000_1000;
        (stack[44], stack[47]) = (5_000_000_000, 1);
        let sleeper =
            Sleeper { tid: 1, namespace: 0, task: 0xffff_8880_0000_1000, switches: 0, restart: vec![0; 7], stack };
        assert_eq!(sleeper.left(&layout, 2_000_000_000, 4_000_000_000), Some(3_000_000_000));
        assert_eq!(sleeper.left(&layout, 2_000_000_000, 1_000_000_000), None);
    }

    #[test]
    fn a_restarted_call_is_known_by_its_note() {
        let sleeper = |third, fourth| Sleeper {
            tid: 1,
            namespace: 0,
            task: 1,
            switches: 0,
            restart: vec![0, 1, 2, 3, third, fourth, 0],
            stack: Vec::new(),
        };
        assert_eq!(sleeper(7_000_000_005, 9).restarted(7_000_000_005), Some(libc::SYS_nanosleep));
        assert_eq!(sleeper(9, 7_000_000_005).restarted(7_000_000_005), Some(libc::SYS_futex));
        assert_eq!(sleeper(7, 5).restarted(7_000_000_005), Some(libc::SYS_poll));
        assert_eq!(sleeper(7, 6).restarted(7_000_000_005), None);
    }

    #[test]
    fn a_note_is_of_one_kernel() {
        let layout = Layout {
            restart: 10,
            pid: 1,
            pid_level: 2,
            pid_numbers: 3,
            switches: 4,
            stack_pointer: 5,
            timer_end: 6,
            timer_state: 7,
            sleeper_task: 8,
            function: 9,
        };
        let text = layout.text("Linux 6.18\n");
        assert_eq!(Layout::parse(&text, "Linux 6.18\n"), Some(layout));
        assert_eq!(Layout::parse(&text, "Linux 6.19\n"), None);
        assert_eq!(Layout::parse(&text[..text.len() - 3], "Linux 6.18\n"), None);
    }

    /// Of this very kernel, where the test may look.
    #[test]
    fn the_rest_of_a_wait_is_found() {
        const TIME_OUT: i32 = 20_000;
        let folder = std::env::temp_dir().join(format!("pod-waits-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        if let Err(why) = Walk::load(&folder) {
            fs::remove_dir_all(&folder).unwrap();
            return pod_runtime::untested::here(format!("no BPF, or no BTF: {why}"));
        }
        std::thread::spawn(|| nix::poll::poll(&mut [], nix::poll::PollTimeout::try_from(TIME_OUT).unwrap()));
        let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
        loop {
            let waits = Observer::begin(folder.clone()).observe(&[std::process::id() as i32]);
            if let Some(wait) = waits.found.values().next() {
                let left = wait.end - now(ClockId::CLOCK_MONOTONIC);
                assert!(left > 0 && left <= i64::from(TIME_OUT) * 1_000_000, "{left} ns");
                break;
            }
            assert!(std::time::Instant::now() < until, "no wait was found");
        }
        fs::remove_dir_all(&folder).unwrap();
    }
}
