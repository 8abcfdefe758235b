//! Landlock: a program that has restricted itself cannot be restored with its restriction, for the kernel shows neither
//! the rules nor that there are any. What can be seen is one effect that every restriction has: who is restricted may
//! not look at a process that is not (PTRACE_MODE_READ). So a process of ours, which gives the task no other reason to
//! be kept away (same user, no capabilities), is put into the pod for a moment, and the task is asked to compare it
//! with itself by kcmp(2).
//!
//! Only a task that has no_new_privs or CAP_SYS_ADMIN can have restricted itself.

use crate::freeze::{Frozen, Process, Thread};
use crate::objects::task::glance::Spokesmen;
use crate::remote::{Borrowed, RemoteCall};
use pod_runtime::birth;
use pod_runtime::cgroup::Cgroup;
use pod_runtime::proc::{self, status};
use pod_runtime::sys::{daemon, pidfd, process};
use pod_runtime::{Doing, Problem, Result};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// A program has restricted itself with Landlock.
pub const LANDLOCK: &str = "E-LANDLOCK";

const CAP_SYS_ADMIN: u64 = 1 << 21;
const KCMP_VM: u64 = 1;

/// Processes of ours in the pod, by the user and group that they are. Dropping it ends them.
#[derive(Default)]
pub struct Onlookers {
    by_user: BTreeMap<(u32, u32), Onlooker>,
}

struct Onlooker {
    host: i32,
    pidfd: OwnedFd,
    /// As the pod numbers it.
    pid: i32,
}

impl Drop for Onlooker {
    fn drop(&mut self) {
        let _ = pidfd::send_signal(&self.pidfd, libc::SIGKILL);
        let _ = daemon::reap(self.host);
    }
}

fn may_be_restricted(thread: &Thread) -> bool {
    thread.status.no_new_privileges || thread.status.effective & CAP_SYS_ADMIN != 0
}

fn user(thread: &Thread) -> (u32, u32) {
    (thread.status.uids[0], thread.status.gids[0])
}

impl Onlookers {
    /// Puts one into the pod for each user that may have to be asked; none in most pods.
    pub fn enter(frozen: &Frozen, init: &OwnedFd, cgroup: &Cgroup) -> Result<Onlookers> {
        let mut onlookers = Onlookers::default();
        for thread in frozen.processes().iter().flat_map(|process| &process.threads) {
            if may_be_restricted(thread) && !onlookers.by_user.contains_key(&user(thread)) {
                onlookers.by_user.insert(user(thread), Onlooker::enter(init, cgroup, user(thread))?);
            }
        }
        Ok(onlookers)
    }

    /// Refuses a process of which a thread cannot look at its onlooker.
    pub fn ask(&self, process: &Process, borrowed: &mut Borrowed<'_>) -> Result<()> {
        let spokesmen = Spokesmen::of_credentials(process.threads.iter().map(|thread| thread.seen.as_ref()));
        let asked = spokesmen.first().map(|at| &process.threads[at]);
        for thread in asked.filter(|thread| may_be_restricted(thread)) {
            let Some(onlooker) = self.by_user.get(&user(thread)) else { continue };
            let pid = onlooker.pid;
            let args = vec![pid.into(), pid.into(), KCMP_VM.into(), 0.into(), 0.into()];
            let mut calls = [RemoteCall::new("kcmp", libc::SYS_kcmp, args).may_fail()];
            borrowed.run(thread, &mut calls)?;
            if calls[0].result == -i64::from(libc::EPERM) {
                let what = format!("process {} has restricted itself with Landlock", process.name());
                return Err(Problem::new(LANDLOCK, what).fix("start the program without its sandbox, or end it"));
            }
        }
        Ok(())
    }
}

impl Onlooker {
    fn enter(init: &OwnedFd, cgroup: &Cgroup, (uid, gid): (u32, u32)) -> Result<Onlooker> {
        let host = birth::enter(init, cgroup, None, move || become_harmless(uid, gid))?;
        let pidfd = pidfd::open(host).doing(|| format!("open process {host}"))?;
        let mut onlooker = Onlooker { host, pidfd, pid: 0 };
        // It says that it is ready by its name.
        let until = Instant::now() + Duration::from_secs(5);
        loop {
            let text = proc::read(format!("/proc/{host}/status")).doing(|| format!("look at process {host}"))?;
            let status = status::parse(&text);
            if status.name == READY.to_bytes() {
                onlooker.pid = status.ns_tgid.last().copied().unwrap_or(0);
                return Ok(onlooker);
            }
            if status.state == 'Z' || Instant::now() > until {
                return Err(Problem::new("E-INTERNAL", "a process that was put into the pod did not get ready"));
            }
            std::thread::yield_now();
        }
    }
}

const READY: &std::ffi::CStr = c"pod-onlooker";

/// In the pod: somebody whom every process of that user may look at.
fn become_harmless(uid: u32, gid: u32) -> i32 {
    use nix::unistd::{Gid, Uid, pause, setgroups, setresgid, setresuid};
    daemon::close_all_but(&[]);
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    let done = setgroups(&[])
        .and_then(|()| setresgid(gid, gid, gid))
        .and_then(|()| setresuid(uid, uid, uid))
        .and_then(|()| process::set_capabilities(process::CapabilitySets::default()))
        .and_then(|()| process::set_dumpable(true));
    if done.is_err() {
        return 1;
    }
    daemon::end_with_parent();
    daemon::set_comm(READY);
    loop {
        pause();
    }
}
