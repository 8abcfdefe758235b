//! pidfd_open(2). The process that it refers to is told by the pid namespaces' numbers in fdinfo; made again when the
//! processes exist.

use crate::ids::PodPid;
use pod_runtime::proc::fdinfo::FdInfo;
use pod_runtime::sys::daemon::{self, Fork};
use pod_runtime::sys::pidfd;
use pod_runtime::{Doing, Problem, Result};
use serde::{Deserialize, Serialize};
use std::os::fd::OwnedFd;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// None: the process has ended and was waited for.
    pub pid: Option<PodPid>,
    /// PIDFD_THREAD.
    pub thread: bool,
}

pub(super) fn dump(info: &FdInfo, flags: i32, subject: &str, depth: usize) -> Result<State> {
    let numbers = info.pidfd().unwrap_or_default();
    let thread = flags & libc::O_EXCL != 0;
    match numbers.as_slice() {
        [] | [-1] => Ok(State { pid: None, thread }),
        numbers if numbers.len() > depth => {
            if thread && !leads_process(numbers[0]) {
                let what = format!("{subject}: the pidfd (PIDFD_THREAD) refers to a thread that leads no process");
                return Err(Problem::new("E-FILE-PIDFD", what).fix("close it, or end the program that has it"));
            }
            Ok(State { pid: Some(PodPid(numbers[depth])), thread })
        }
        _ => {
            let what = format!("{subject}: the pidfd refers to a process outside of the pod");
            Err(Problem::new("E-FILE-PIDFD", what).fix("close it, or end the program that has it"))
        }
    }
}

/// Threads are made when every descriptor is in its place already, so a pidfd of one cannot be among these.
fn leads_process(host: i32) -> bool {
    let text = std::fs::read(format!("/proc/{host}/status")).unwrap_or_default();
    let status = pod_runtime::proc::status::parse(&String::from_utf8_lossy(&text));
    status.ns_tgid.first() == status.ns_pid.first()
}

/// After the processes exist.
pub(super) fn restore(state: &State) -> Result<OwnedFd> {
    let State { pid, thread } = state;
    match pid {
        Some(pid) if *thread => pidfd::open_thread(pid.0).doing(|| format!("open a pidfd of thread {pid}")),
        Some(pid) => pidfd::open(pid.0).doing(|| format!("open a pidfd of process {pid}")),
        None => of_a_dead_process().doing(|| "make a pidfd of a process that has ended".into()),
    }
}

fn of_a_dead_process() -> std::io::Result<OwnedFd> {
    match daemon::fork()? {
        Fork::Child => daemon::exit_now(0),
        Fork::Parent(child) => {
            let fd = pidfd::open(child);
            daemon::reap(child)?;
            fd
        }
    }
}
