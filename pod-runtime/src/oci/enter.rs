//! A further process in a container: `exec`.
//!
//! One clone: the child is born in the container's pid namespace and groups, joins the other namespaces through a
//! descriptor of the first process, and takes the same way to its program as that did. Before it joins, nothing inside
//! can trace it; when it has joined, nothing of the host is open in it.

use super::first::{self, Program};
use super::namespaces;
use super::store::{Container, Shown, Status};
use super::terminal::{self, Terminal};
use super::{confine, listener, wrong};
use crate::cgroup::{Born, Cgroup};
use crate::init;
use crate::problem::{Doing, Problem, Result};
use crate::rootfs::tree::Tree;
use crate::security::seccomp::Filter;
use crate::sys::clone::{self, Cloned};
use crate::sys::{daemon, process};
use nix::libc;
use nix::unistd::{Gid, Uid, setresgid, setresuid};
use oci_spec::runtime::{Linux, Process};
use std::convert::Infallible;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

#[derive(Debug, Default)]
pub struct Options {
    pub console: Option<UnixStream>,
    pub preserve_fds: i32,
    /// Into a paused container: the process waits until it goes on.
    pub ignore_paused: bool,
}

/// No more is heard from a process that could not become its program.
const BOUND: u64 = 1 << 16;

/// Starts a process in a container and returns its pid on this host when the program runs. It is a child of the caller.
pub fn exec(container: &Container, process: &Process, options: &Options) -> Result<i32> {
    let state = container.state()?;
    check(container.status(&state)?, process, options)?;
    let not_running = || Problem::new("E-OCI-STATE", "container not running");
    // By number, and only then is it verified whose number that is: it might have been used again before.
    let foreign = namespaces::foreign(state.pid);
    let first = container.first(&state).ok_or_else(not_running)?;
    let foreign = foreign?;
    let spec = container.spec()?;
    let none = Linux::default();
    let linux = spec.linux().as_ref().unwrap_or(&none);
    let filter = linux.seccomp().as_ref().map(Filter::of_oci).transpose()?;
    let listener = listener::connect(linux, filter.as_ref())?;
    let shown = container.shown(&state, Status::Running);
    let cgroup = container.cgroup(&state)?;
    // An ordinary user has rights in the others by way of that of users only.
    let of_user = if nix::unistd::geteuid().is_root() { 0 } else { libc::CLONE_NEWUSER };
    let before = foreign & (libc::CLONE_NEWPID | of_user);
    if before != 0 {
        clone::setns(first.as_fd(), before).doing(|| "join the pid namespace".into())?;
    }
    let affinity = process.exec_cpu_affinity().as_ref();
    if let Some(cpus) = affinity.and_then(|affinity| affinity.initial().as_deref()).filter(|cpus| !cpus.is_empty()) {
        confine::run_on(cpus)?;
    }
    let (ours, theirs) = UnixStream::pair().doing(|| "make a socket pair".into())?;
    // The child is born as its maker is: there is no instant at which something inside could trace it.
    process::set_dumpable(false).doing(|| "hide from the container's processes".into())?;
    let cloned = match &cgroup {
        Some(cgroup) => cgroup.fork_beside(state.pid),
        None => clone::clone3(0, None, None).map(|cloned| (cloned, Born::Elsewhere)),
    };
    match cloned.doing(|| "make a process in the container".into())? {
        (Cloned::Child, place) => {
            drop(ours);
            let (joins, other_user) = (foreign & !before, foreign & libc::CLONE_NEWUSER != 0);
            let cgroup = cgroup.as_ref().map(|cgroup| (cgroup, place));
            let (filter, first, new_keyring) = (filter.as_ref(), &first, !state.no_new_keyring);
            let (listener, shown) = (listener.as_ref(), &shown);
            let child = Child {
                process,
                options,
                linux,
                filter,
                listener,
                shown,
                first,
                new_keyring,
                joins,
                other_user,
                cgroup,
            };
            // Nothing of the maker's may be undone here.
            let _ = catch_unwind(AssertUnwindSafe(|| child.live(theirs)));
            daemon::exit_now(1)
        }
        (Cloned::Parent { pid, .. }, _) => {
            drop((theirs, listener));
            // One that has died already has said why.
            let _ = (&ours).write_all(&pid.to_ne_bytes());
            hear(pid, &ours)
        }
    }
}

fn check(status: Status, process: &Process, options: &Options) -> Result<()> {
    match status {
        Status::Created | Status::Running => {}
        Status::Paused if options.ignore_paused => {}
        Status::Paused => {
            return Err(Problem::new(
                "E-OCI-STATE",
                "cannot exec in a paused container (use --ignore-paused to override)",
            ));
        }
        Status::Creating | Status::Stopped => {
            return Err(Problem::new("E-OCI-STATE", "cannot exec in a stopped container: container not running"));
        }
    }
    let terminal = process.terminal().unwrap_or(false);
    if terminal != options.console.is_some() {
        return Err(wrong("a terminal needs a console socket, and a console socket a terminal"));
    }
    Ok(())
}

/// The other end closes at the exec.
fn hear(pid: i32, from: &UnixStream) -> Result<i32> {
    let mut said = Vec::new();
    from.take(BOUND).read_to_end(&mut said).doing(|| "hear from the process".into())?;
    if said.is_empty() {
        return Ok(pid);
    }
    let _ = daemon::reap(pid);
    let text = String::from_utf8_lossy(&said).into_owned();
    Err(Problem::new("E-OCI-START", format!("exec failed: {text}")))
}

struct Child<'a> {
    process: &'a Process,
    options: &'a Options,
    linux: &'a Linux,
    filter: Option<&'a Filter>,
    /// Who gets the listener of the filter.
    listener: Option<&'a UnixStream>,
    shown: &'a Shown,
    first: &'a OwnedFd,
    new_keyring: bool,
    /// CLONE_NEW… of the namespaces to be joined.
    joins: i32,
    /// Whether it is in another user namespace then.
    other_user: bool,
    cgroup: Option<(&'a Cgroup, Born)>,
}

impl Child<'_> {
    fn live(&self, mut tell: UnixStream) -> ! {
        let problem = match self.try_to_live(&tell) {
            Err(problem) => problem,
            Ok(never) => match never {},
        };
        let _ = tell.write_all(problem.chain().as_bytes());
        daemon::exit_now(init::exit_code(&problem))
    }

    fn try_to_live(&self, mut tell: &UnixStream) -> Result<Infallible> {
        process::set_dumpable(false).doing(|| "hide from the container's processes".into())?;
        let mut pid = [0; 4];
        tell.read_exact(&mut pid).doing(|| "hear from the runtime".into())?;
        let Child { process, options, linux, .. } = self;
        if let Some((cgroup, born)) = self.cgroup {
            cgroup.enter(born)?;
        }
        if self.joins != 0 {
            clone::setns(self.first.as_fd(), self.joins).doing(|| "join the container's namespaces".into())?;
        }
        if self.other_user {
            setresgid(Gid::from_raw(0), Gid::from_raw(0), Gid::from_raw(0)).doing(|| "become the group root".into())?;
            setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0)).doing(|| "become root".into())?;
            process::set_dumpable(false).doing(|| "hide from the container's processes".into())?;
        }
        let affinity = process.exec_cpu_affinity().as_ref();
        let last = affinity.and_then(|affinity| affinity.cpu_affinity_final().as_deref());
        if let Some(cpus) = last.filter(|cpus| !cpus.is_empty()) {
            confine::run_on(cpus)?;
        }
        nix::unistd::setsid().doing(|| "begin a session".into())?;
        if self.new_keyring {
            // A kernel without keyrings has none to keep away.
            let _ = process::new_session_keyring();
        }
        if let Some(console) = &options.console {
            let Terminal { master, slave } = terminal::make(&Tree::at(Path::new("/"))?, process)?;
            terminal::send(console, &master)?;
            first::take_terminal(&slave)?;
        }
        confine::prepare(process, linux.personality().as_ref(), linux.memory_policy().as_ref())?;
        // Closed before anything of the container's is looked up: no descriptor of the host is there to be found.
        let other = [Some(tell.as_raw_fd()), self.listener.map(AsRawFd::as_raw_fd)];
        let keep: Vec<i32> = (3..3 + options.preserve_fds).chain(other.into_iter().flatten()).collect();
        daemon::close_all_but(&keep);
        first::enter_folder(process)?;
        let program = Program::find(process)?;
        program.settle(options.preserve_fds)?;
        program.keep(&tell)?;
        let state = (self.shown, i32::from_ne_bytes(pid));
        listener::hand_over(self.filter, self.listener, process, linux, state)?;
        confine::confine(process, self.filter.filter(|filter| !filter.notifies))?;
        program.execute(&tell)
    }
}
