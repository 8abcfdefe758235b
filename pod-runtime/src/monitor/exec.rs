//! Starting a further process in the pod, as `pod exec` asks for.
//!
//! Its parent is the monitor, its namespaces, cgroup and security are the pod's. A terminal is one of the pod's own
//! devpts, so that the process can move with the pod.

use super::stdio::Stdio;
use super::wire::{About, Exec, Kind, SessionEnds};
use crate::birth;
use crate::cgroup::Cgroup;
use crate::init;
use crate::problem::{Doing, Problem, Report, Result};
use crate::proc;
use crate::spec::{Process, Spec};
use crate::status;
use crate::sys::{daemon, tty};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{SFlag, fstat, makedev};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// How long the output of a session waits for a client that it had before the pod moved.
pub const AWAITED: Duration = Duration::from_secs(60);

/// A process that was started, and the monitor's ends of its stdio.
#[derive(Debug)]
pub struct Session {
    /// As others know it; who is attached is in `client`.
    about: About,
    pub pid: i32,
    pub pidfd: OwnedFd,
    pub stdio: Stdio,
    /// Who sees it.
    pub client: Option<u64>,
    /// Its client lost it when the pod moved, and is waited for until then: nothing is read meanwhile.
    pub awaited: Option<Instant>,
}

impl Session {
    pub fn id(&self) -> u64 {
        self.about.id
    }

    /// One that came with the pod from another host.
    pub fn arrived(about: About, pid: i32, fds: [Option<OwnedFd>; 4], awaited: bool) -> Result<Session> {
        let pidfd = daemon::pidfd_open(pid).doing(|| format!("open a pidfd of process {pid}"))?;
        let awaited = (awaited && about.attached).then(|| Instant::now() + AWAITED);
        Ok(Session { about, pid, pidfd, stdio: Stdio::new(fds)?, client: None, awaited })
    }

    pub fn about(&self) -> About {
        About { attached: self.client.is_some() || self.awaited.is_some(), ..self.about.clone() }
    }

    pub fn ends(&self) -> SessionEnds {
        SessionEnds { about: self.about(), numbers: self.stdio.numbers() }
    }
}

/// A session that has ended, until somebody hears of it.
#[derive(Debug)]
pub struct Ended {
    pub about: About,
    /// What it wrote last.
    pub output: Vec<(Kind, Vec<u8>)>,
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
        (Ok(pidfd), Ok(())) => {
            let about = About {
                id,
                pid: pid_inside(pid),
                command: exec.args.clone(),
                uid: exec.user.uid,
                terminal: exec.terminal.is_some(),
                interactive: exec.interactive,
                started: status::now(),
                attached: false,
                exit_code: None,
            };
            Ok(Session { about, pid, pidfd, stdio, client: None, awaited: None })
        }
        (_, Err(problem)) | (Err(problem), _) => {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL);
            let _ = daemon::reap(pid);
            Err(problem)
        }
    }
}

/// The pod's own number of a process of this host; 0 when it is gone already.
pub fn pid_inside(pid: i32) -> i32 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    proc::status::parse(&text).ns_tgid.last().copied().unwrap_or(0)
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
