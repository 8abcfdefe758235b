//! Starting a further process in the pod, as `pod exec` asks for.
//!
//! Its parent is the monitor, its namespaces, cgroup and security are the pod's. A terminal is one of the pod's own
//! devpts, so that the process can move with the pod.

use super::stdio::Stdio;
use super::wire::Exec;
use crate::birth;
use crate::cgroup::Cgroup;
use crate::init;
use crate::problem::{Doing, Problem, Report, Result};
use crate::spec::{Process, Spec};
use crate::sys::{daemon, tty};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{SFlag, fstat, makedev};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// A process that was started, and the monitor's ends of its stdio.
#[derive(Debug)]
pub struct Session {
    pub id: u64,
    pub pid: i32,
    pub pidfd: OwnedFd,
    pub stdio: Stdio,
    /// Who sees it.
    pub client: Option<u64>,
}

/// Starts what `exec` asks for and returns when the program runs.
pub fn start(id: u64, spec: &Spec, init: i32, pidfd: &OwnedFd, cgroup: &Cgroup, exec: &Exec) -> Result<Session> {
    let (stdio, given) = match exec.terminal {
        Some(size) => {
            let (master, terminal) = open_pty(init)?;
            nix::unistd::fchown(&terminal, Some(exec.user.uid.into()), None)
                .doing(|| "give away the terminal".into())?;
            let copy = || terminal.try_clone().doing(|| "copy a descriptor".into());
            let given = [copy()?, copy()?, terminal];
            let stdio = Stdio::new([Some(master), None, None, None])?;
            stdio.resize(size);
            (stdio, given)
        }
        None => Stdio::pipes(exec.interactive, exec.user.uid, exec.user.gid)?,
    };
    let mut spec = spec.clone();
    spec.security.privileged |= exec.privileged;
    let process = Process {
        args: exec.args.clone(),
        env: exec.env.clone(),
        cwd: exec.cwd.clone(),
        user: exec.user.clone(),
        terminal: exec.terminal.is_some(),
        interactive: exec.interactive,
        init: false,
        ..spec.process.clone()
    };
    let (news, tell) = nix::unistd::pipe2(OFlag::O_CLOEXEC).doing(|| "make a pipe".into())?;
    let pid = birth::enter(pidfd, cgroup, None, || {
        let problem = become_it(&spec, &process, &given, &tell);
        let code = init::exit_code(&problem);
        let _ = serde_json::to_vec(&problem.report()).map(|text| File::from(tell).write_all(&text));
        code
    })?;
    drop(given);
    let child = daemon::pidfd_open(pid).doing(|| format!("open a pidfd of process {pid}"));
    match (child, outcome(news)) {
        (Ok(pidfd), Ok(())) => Ok(Session { id, pid, pidfd, stdio, client: None }),
        (_, Err(problem)) | (Err(problem), _) => {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL);
            let _ = daemon::reap(pid);
            Err(problem)
        }
    }
}

/// In the child. Returns only when it fails.
fn become_it(spec: &Spec, process: &Process, given: &[OwnedFd; 3], tell: &OwnedFd) -> Problem {
    let setup = || -> Result<()> {
        nix::unistd::setsid().doing(|| "begin a session".into())?;
        if process.terminal {
            tty::set_controlling_terminal(given[0].as_fd()).doing(|| "take the terminal".into())?;
        }
        for (number, fd) in given.iter().enumerate() {
            daemon::replace_stdio(fd.as_fd(), number as i32).doing(|| "set up stdio".into())?;
        }
        if !process.terminal && !process.interactive {
            let null = File::open("/dev/null").doing(|| "open /dev/null in the pod".into())?;
            daemon::replace_stdio(null.as_fd(), 0).doing(|| "set up stdin".into())?;
        }
        Ok(())
    };
    match setup() {
        Ok(()) => {
            let words = |problem: &Problem| serde_json::to_vec(&problem.report()).unwrap_or_default();
            init::become_program(spec, process, &init::Tell { fd: tell.as_raw_fd(), words: &words })
        }
        Err(problem) => problem,
    }
}

/// What the child says before it becomes the program: nothing, or its problem.
fn outcome(news: OwnedFd) -> Result<()> {
    let mut waiting = [PollFd::new(news.as_fd(), PollFlags::POLLIN)];
    let ready = poll(&mut waiting, PollTimeout::from(10_000u16)).doing(|| "wait for the new process".into())?;
    if ready == 0 {
        return Err(Problem::new("E-MONITOR", "the new process did not become the program within 10 s"));
    }
    let mut text = Vec::new();
    File::from(news).take(64 << 10).read_to_end(&mut text).doing(|| "hear from the new process".into())?;
    if text.is_empty() {
        return Ok(());
    }
    let report: Report = serde_json::from_slice(&text).doing(|| "understand the new process".into())?;
    Err(report.into())
}

/// Opens a new pty of the pod's devpts. The pod may have put anything at that path, so it is looked at before it is
/// opened.
fn open_pty(init: i32) -> Result<(OwnedFd, OwnedFd)> {
    let path = format!("/proc/{init}/root");
    let root = File::open(&path).doing(|| format!("open {path}"))?;
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_IN_ROOT);
    let node = openat2(&root, "dev/pts/ptmx", how).doing(|| "find /dev/pts/ptmx in the pod".into())?;
    let found = fstat(&node).doing(|| "look at /dev/pts/ptmx".into())?;
    let is_ptmx = SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT == SFlag::S_IFCHR;
    if !is_ptmx || found.st_rdev != makedev(5, 2) {
        return Err(Problem::new("E-MONITOR", "/dev/pts/ptmx in the pod is not the device it should be"));
    }
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let path = format!("/proc/self/fd/{}", node.as_raw_fd());
    let master = nix::fcntl::open(path.as_str(), flags, nix::sys::stat::Mode::empty());
    let master = master.doing(|| "open a terminal in the pod".into())?;
    tty::unlock_pty(master.as_fd()).doing(|| "unlock the terminal".into())?;
    let terminal = tty::pty_peer(master.as_fd()).doing(|| "open the terminal's other side".into())?;
    Ok((master, terminal))
}
