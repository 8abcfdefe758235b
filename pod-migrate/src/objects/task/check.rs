//! What of tasks cannot be made again elsewhere. Dump asks the same functions, so a move that was checked does not fail
//! for what they know.

use crate::freeze::{BUSY, NESTED, Process, TRACED, Thread};
use crate::ids::HostPid;
use pod_runtime::proc::{self, stat, status};
use pod_runtime::sys::kcmp::{Shared, compare};
use pod_runtime::sys::{memory, pidfd, ptrace};
use pod_runtime::{Problem, Result};
use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

/// A program for 32-bit x86.
pub const NARROW: &str = "E-PROGRAM-32BIT";
/// The first thread of a process ended before the others.
pub const LEADER: &str = "E-THREAD-LEADER";
/// A thread does not share what threads share.
pub const THREAD: &str = "E-THREAD-APART";
/// Processes share one address space.
pub const SHARED: &str = "E-SHARED-MEMORY-MAP";
/// Processes share descriptors or directories.
pub const TABLES: &str = "E-SHARED-TABLE";

const NAMESPACES: [(&str, &str); 7] = [
    ("pid", "pid"),
    ("mnt", "mount"),
    ("net", "network"),
    ("ipc", "IPC"),
    ("uts", "UTS"),
    ("user", "user"),
    ("time", "time"),
];

/// A process's number in the pod and its name, for messages.
fn name(pid: i32, status: &status::Status) -> String {
    let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    format!("process {} ({})", status.ns_tgid.last().unwrap_or(&0), comm.trim_end())
}

/// What all processes of a pod must have in common; read once, for to read a link of /proc/PID/ns is dear.
pub struct Common {
    namespaces: [Option<PathBuf>; NAMESPACES.len()],
}

impl Common {
    /// Of the pod with this first process.
    pub fn of(init: HostPid) -> Common {
        Common { namespaces: NAMESPACES.map(|(which, _)| namespace(init.0, which)) }
    }
}

fn namespace(pid: i32, which: &str) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/ns/{which}")).ok()
}

/// Who speaks for a process: its first thread, or, if that has ended, one that lives.
pub fn voice(process: HostPid) -> HostPid {
    let ended = |tid: i32| {
        let text = proc::read(format!("/proc/{tid}/status"));
        text.map_or(true, |text| matches!(status::parse(&text).state, 'Z' | 'X'))
    };
    if !ended(process.0) {
        return process;
    }
    let tids = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten();
    let mut tids = tids.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    tids.find(|tid| !ended(*tid)).map_or(process, HostPid)
}

/// Everything that stands against moving one process of a pod. Needs no freeze. A process that is gone has nothing
/// against it.
pub fn process(host: HostPid, common: &Common) -> Vec<Problem> {
    let Ok(text) = proc::read(format!("/proc/{host}/status")) else { return Vec::new() };
    let status = status::parse(&text);
    let mut found = frozen(host, &status, common, &BTreeSet::new());
    if status.tracer != 0 && status.tracer != std::process::id() as i32 {
        let what = format!("{} is being traced by process {} of the host", name(host.0, &status), status.tracer);
        found.push(Problem::new(TRACED, what).fix("end the debugger, then try again"));
    }
    found
}

/// The same of one that we trace, and whose status is known and does not change. Threads that are `alike` share all with one
/// that is not among them.
pub fn frozen(host: HostPid, status: &status::Status, common: &Common, alike: &BTreeSet<i32>) -> Vec<Problem> {
    let pid = host.0;
    let mut found = Vec::new();
    if status.tgid != pid && pidfd::open_any(pid).is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL)) {
        let what = format!("the first thread of {} has ended while others run on", name(pid, status));
        found.push(Problem::new(LEADER, what).fix("end the program before the move, or use Linux 6.9 or later"));
    }
    for ((which, title), pods) in NAMESPACES.iter().zip(&common.namespaces) {
        let theirs = namespace(pid, which);
        if theirs.is_some() && theirs != *pods {
            let what = format!("{} made a {title} namespace of its own", name(pid, status));
            found.push(Problem::new(NESTED, what).fix("end it, or start it without namespaces of its own"));
            break;
        }
    }
    if is_32_bit(pid) {
        let what = format!("{} is a 32-bit program", name(pid, status));
        found.push(Problem::new(NARROW, what).fix("use the program's 64-bit build"));
    }
    found.extend(threads(pid, status, alike));
    found
}

fn is_32_bit(pid: i32) -> bool {
    use std::io::Read;
    let mut head = [0u8; 5];
    let read = fs::File::open(format!("/proc/{pid}/exe")).and_then(|mut file| file.read_exact(&mut head));
    read.is_ok() && head == [0x7f, b'E', b'L', b'F', 1]
}

/// Threads share descriptors, directories and namespaces here; one that left is refused.
fn threads(pid: i32, status: &status::Status, alike: &BTreeSet<i32>) -> Option<Problem> {
    let net = namespace(pid, "net");
    let tids = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    for tid in tids.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok()) {
        // One that has ended has nothing to share.
        if alike.contains(&tid) || tid == pid || (tid == status.tgid && pid != status.tgid) {
            continue;
        }
        let apart = |what| matches!(compare(pid, tid, what), Ok(order) if order != Ordering::Equal);
        let what = if apart(Shared::DescriptorTable) {
            "descriptors"
        } else if apart(Shared::FsState) {
            "working directory"
        } else if namespace(tid, "net").is_some_and(|theirs| Some(theirs) != net) {
            "network namespace"
        } else {
            continue;
        };
        // Its tables go before it does.
        let ends = |tid: i32| {
            let text = proc::read(format!("/proc/{tid}/stat"));
            text.ok().and_then(|text| stat::parse(&text)).is_none_or(|stat| stat.is_exiting())
        };
        if ends(tid) || ends(pid) {
            continue;
        }
        let what = format!("a thread of {} has its own {what}", name(pid, status));
        return Some(Problem::new(THREAD, what).fix("end the program, or start it without that"));
    }
    None
}

/// A process whose threads can be asked: while syscall user dispatch blocks calls of a thread, one of ours would end in
/// a SIGSYS, and the kernel would take the program's handler away, because we hold signals off.
pub fn answers(process: &Process) -> Result<()> {
    const BLOCK: u8 = 1;
    let blocks = |thread: &&Thread| {
        let dispatch = ptrace::user_dispatch(thread.host.0).unwrap_or_default();
        if dispatch.mode == 0 {
            return false;
        }
        let mut selector = [0];
        let read = memory::read_exact(thread.host.0, dispatch.selector, &mut selector);
        dispatch.selector == 0 || (read.is_ok() && selector[0] == BLOCK)
    };
    match process.spokesmen().first().map(|at| &process.threads[at]).find(blocks) {
        None => Ok(()),
        Some(thread) => {
            let what = format!("thread {} of {} blocks its system calls now", thread.tid, process.name());
            Err(Problem::new(BUSY, what).fix("try again; it does so while it runs code of another system"))
        }
    }
}

/// Processes (not threads) that share one address space.
pub fn shared_spaces(processes: &[HostPid]) -> Vec<Problem> {
    let pairs = sharing(processes, Shared::Memory);
    let problem = |pair| {
        let [one, other] = names(pair);
        Problem::new(SHARED, format!("{one} and {other} share one address space"))
            .fix("wait until the one that is starting a program has started it")
    };
    pairs.into_iter().map(problem).collect()
}

/// Processes that share descriptors or directories without being threads.
pub fn shared_tables(processes: &[HostPid]) -> Vec<Problem> {
    let kinds = [(Shared::DescriptorTable, "table of descriptors"), (Shared::FsState, "working directory")];
    let problem = |pair, what| {
        let [one, other] = names(pair);
        Problem::new(TABLES, format!("{one} and {other} share one {what}"))
            .fix("end the program; it made them with clone(2) so that a change of one is seen by the other")
    };
    kinds
        .into_iter()
        .flat_map(|(kind, what)| sharing(processes, kind).into_iter().map(move |pair| problem(pair, what)))
        .collect()
}

/// Pairs of processes that share something.
fn sharing(processes: &[HostPid], what: Shared) -> Vec<[i32; 2]> {
    let mut sorted: Vec<i32> = Vec::new();
    let mut pairs = Vec::new();
    for HostPid(pid) in processes {
        // The kernel gives an order. A process that ends meanwhile may spoil it, which then finds nothing.
        match sorted.binary_search_by(|other| compare(*other, *pid, what).unwrap_or(Ordering::Less)) {
            Ok(at) => pairs.push([sorted[at], *pid]),
            Err(at) => sorted.insert(at, *pid),
        }
    }
    pairs
}

fn names(pair: [i32; 2]) -> [String; 2] {
    pair.map(|pid| {
        let text = fs::read(format!("/proc/{pid}/status")).unwrap_or_default();
        name(pid, &status::parse(&String::from_utf8_lossy(&text)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

    #[test]
    fn a_thread_that_ends_has_nothing_of_its_own() {
        let own = HostPid(std::process::id() as i32);
        let (common, over) = (Common::of(own), AtomicBool::new(false));
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !over.load(Relaxed) {
                        std::thread::spawn(|| ()).join().unwrap();
                    }
                });
            }
            let found = (0..5000).flat_map(|_| process(own, &common)).map(|it| it.chain()).next();
            over.store(true, Relaxed);
            assert_eq!(found, None);
        });
    }
}
