//! Processes and threads: what the kernel keeps for each of them, as plain data.
//!
//! [`Tree`] says who exists and in which order they come to be; [`ProcessState`] holds what the threads of a process
//! share, [`ThreadState`] what each has for itself. Pids are the pod's own.

pub mod check;
pub mod credentials;
pub mod dump;
pub mod glance;
pub mod interrupted;
pub mod keyrings;
pub mod keys;
pub mod landlock;
pub mod limits;
pub mod scheduling;
pub mod seccomp;
pub mod signals;
pub mod switches;
pub mod threads;
pub mod timers;
pub mod undo;
pub mod waits;

pub use seccomp::Chains;

use crate::ids::{FdTableId, FileId, MmId, PodPid};
use pod_runtime::sys::ptrace::Regs;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
pub use switches::{Dispatch, ProcessSwitches, ThreadSwitches};

/// All processes of the pod, ordered by pid. One record.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Tree {
    pub processes: Vec<Node>,
    /// The nice values of sessions (sched(7), autogroup) that have another than 0, each by one of its processes.
    #[serde(default)]
    pub autogroups: Vec<(PodPid, i32)>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Node {
    pub pid: PodPid,
    /// 0: its parent is outside (the first process and those that `pod exec` entered).
    pub parent: PodPid,
    pub group: PodPid,
    pub session: PodPid,
    /// The signal its parent gets when it ends.
    pub exit_signal: i32,
    pub life: Life,
    /// The leader first, whether it lives or not, then the others that live.
    pub threads: Vec<PodPid>,
    /// Name of one that ended; the others have it in their state.
    #[serde(default)]
    pub comm: ByteBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Life {
    Running,
    /// Stopped by this signal (job control); goes on at SIGCONT.
    Stopped(i32),
    /// Ended, not yet waited for; the status as wait(2) will report it.
    Zombie(i32),
}

/// What the threads of a process share. One record a process that lives, by its pid.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProcessState {
    pub pid: PodPid,
    pub mm: MmId,
    pub fd_table: FdTableId,
    pub cwd: FileId,
    /// None: the root of the pod.
    pub root: Option<FileId>,
    pub umask: u32,
    /// By signal number, 1 to 64; `[n - 1]`.
    pub handlers: Vec<Handler>,
    /// Each a siginfo_t as the kernel keeps it.
    pub pending: Vec<ByteBuf>,
    pub interval_timers: Vec<IntervalTimer>,
    pub timers: Vec<PosixTimer>,
    pub limits: Vec<Limit>,
    pub oom_score_adj: i32,
    pub child_subreaper: bool,
    /// As PR_GET_DUMPABLE: 0, 1 or 2.
    pub dumpable: u32,
    pub no_huge_pages: bool,
    pub coredump_filter: Option<u32>,
    #[serde(default)]
    pub switches: ProcessSwitches,
    pub threads: Vec<ThreadState>,
}

/// struct kernel_sigaction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handler {
    pub handler: u64,
    pub flags: u64,
    pub restorer: u64,
    pub mask: u64,
}

/// setitimer(2): which is the index; microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IntervalTimer {
    pub interval_us: u64,
    pub value_us: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PosixTimer {
    pub id: i32,
    pub clock: i32,
    pub signal: i32,
    /// SIGEV_SIGNAL, SIGEV_NONE, SIGEV_THREAD or SIGEV_THREAD_ID.
    pub notify: i32,
    /// For SIGEV_THREAD_ID.
    pub thread: Option<PodPid>,
    pub value: u64,
    pub interval_ns: u64,
    /// Until the next expiry; 0 is disarmed.
    pub remaining_ns: u64,
    pub overrun: i32,
}

/// As setrlimit(2); `u64::MAX` is unlimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    pub resource: u32,
    pub soft: u64,
    pub hard: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ThreadState {
    pub tid: PodPid,
    pub comm: ByteBuf,
    pub registers: Registers,
    /// The xsave area as NT_X86_XSTATE gives it.
    pub xstate: ByteBuf,
    pub blocked: u64,
    pub pending: Vec<ByteBuf>,
    pub alternate_stack: AlternateStack,
    /// As set_tid_address(2); 0 is none.
    pub clear_tid: u64,
    pub robust_list: Option<RobustList>,
    pub rseq: Option<Rseq>,
    pub credentials: Credentials,
    pub parent_death_signal: i32,
    pub timer_slack_ns: u64,
    pub scheduling: Scheduling,
    pub personality: u64,
    pub seccomp: Seccomp,
    #[serde(default)]
    pub switches: ThreadSwitches,
    /// In a call with a time-out: its registers are those before the call.
    #[serde(default)]
    pub waiting: Option<Waiting>,
    /// Of a first thread that ended before the others: its status, in the form of wait(2).
    #[serde(default)]
    pub ended: Option<i32>,
}

/// A call that the kernel restarts by itself with the time that remains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiting {
    /// nanosleep, clock_nanosleep, poll or futex.
    pub number: i64,
    pub remaining_ns: u64,
}

/// struct user_regs_struct, in its order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub orig_rax: u64,
    pub rip: u64,
    pub cs: u64,
    pub eflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub ds: u64,
    pub es: u64,
    pub fs: u64,
    pub gs: u64,
}

/// stack_t.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AlternateStack {
    pub address: u64,
    pub flags: i32,
    pub bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RobustList {
    pub head: u64,
    pub bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rseq {
    pub address: u64,
    pub bytes: u32,
    pub signature: u32,
}

/// credentials(7) and capabilities(7) of one thread.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// Real, effective, saved, file system.
    pub uids: [u32; 4],
    pub gids: [u32; 4],
    pub groups: Vec<u32>,
    pub inheritable: u64,
    pub permitted: u64,
    pub effective: u64,
    pub bounding: u64,
    pub ambient: u64,
    pub securebits: u32,
    pub no_new_privileges: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scheduling {
    /// With SCHED_RESET_ON_FORK as the kernel reports it.
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
    /// CPUs that it may run on, as a bit mask; empty is all.
    pub affinity: ByteBuf,
    pub io_priority: u32,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Seccomp {
    #[default]
    Off,
    Strict,
    /// Oldest first, as they were installed.
    Filters(Vec<Filter>),
    /// The same as the first thread of this process, which has them all.
    As(PodPid),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    /// SECCOMP_FILTER_FLAG_*.
    pub flags: u64,
    /// struct sock_filter, 8 bytes each.
    pub program: ByteBuf,
}

/// The names, once, in the kernel's order.
macro_rules! registers {
    ($($name:ident)*) => {
        impl From<&Regs> for Registers {
            fn from(regs: &Regs) -> Self {
                let Regs { $($name),* } = *regs;
                Registers { $($name),* }
            }
        }

        impl From<Registers> for Regs {
            fn from(registers: Registers) -> Self {
                let Registers { $($name),* } = registers;
                Regs { $($name),* }
            }
        }

        impl Registers {
            pub const WORDS: usize = [$(stringify!($name)),*].len();

            /// In the order of struct user_regs_struct.
            pub fn words(&self) -> [u64; Self::WORDS] {
                let Registers { $($name),* } = *self;
                [$($name),*]
            }

            pub fn from_words(words: [u64; Self::WORDS]) -> Self {
                let [$($name),*] = words;
                Registers { $($name),* }
            }
        }
    };
}

registers! {
    r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss fs_base gs_base ds es fs gs
}
