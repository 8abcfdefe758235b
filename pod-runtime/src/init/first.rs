//! The first process of a pod, from the clone to the moment when it becomes a program or parks.
//!
//! It and the monitor talk over one stream socket: the monitor sends a letter a step ([`GROUPS`], [`GO`]), the process
//! answers with lines of JSON ([`News`]), the console going along with "ready". When the monitor dies, the read fails
//! and the process ends, and the pod with it.

use super::{Tell, become_program, exit_code};
use crate::birth::{self, Clocks, Purpose, Stdio};
use crate::cgroup::{self, Cgroup};
use crate::namespaces::{self, Settings};
use crate::problem::{Doing, Problem, Report, Result};
use crate::rootfs::{self, Beginning, Rootfs};
use crate::spec::{NetworkMode, Spec};
use crate::store::Pod;
use crate::sys::{clone, daemon, memory, process, tty, userfault};
use nix::fcntl::{OFlag, openat};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, fchown};
use serde::{Deserialize, Serialize};
use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// The groups that it was not born into are there. Whether device nodes may work on the pod's storage follows.
pub const GROUPS: u8 = b'c';
/// The files are there; what the clocks show follows.
pub const CLOCKS: u8 = b'k';
/// Memory comes before the files: how many places follows, then each with its start and its end.
pub const PLACES: u8 = b'p';
/// Become the program.
pub const GO: u8 = b'g';

/// What the first process says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum News {
    /// The environment stands. With the console, if there is one.
    Ready {
        warnings: Vec<String>,
    },
    /// The network namespace is there, with its settings.
    Apart,
    /// Files and clocks can come, and memory before them. With the roots of the file systems in memory that will be mounted at
    /// these paths.
    Waiting {
        folders: Vec<String>,
    },
    /// These places are mapped. With a userfaultfd.
    Laid {
        places: Vec<(u64, u64)>,
    },
    Problem(Report),
}

/// All that the process needs to know; it has its own copy of the monitor's memory.
#[derive(Debug)]
pub struct First<'a> {
    pub spec: &'a Spec,
    pub pod: &'a Pod,
    /// To be entered.
    pub cgroup: (&'a Cgroup, cgroup::Born),
    pub purpose: Purpose,
    pub stdio: Stdio,
    pub sync: UnixStream,
    pub outer_pid_max: Option<String>,
    /// Whether files and clocks are still to come.
    pub waits: bool,
}

impl First<'_> {
    /// The life of the process.
    pub fn live(mut self) -> ! {
        let stdio = match self.prepare() {
            Ok(stdio) => stdio,
            Err(problem) => self.fail(&problem, 125),
        };
        if matches!(self.purpose, Purpose::Fill(_)) {
            self.park();
        }
        if !self.told(GO) {
            daemon::exit_now(125);
        }
        if let Some(files) = stdio
            && let Err(problem) = take_stdio(&files)
        {
            self.fail(&problem, 125);
        }
        let words = |problem: &Problem| serde_json::to_vec(&News::Problem(problem.report())).unwrap_or_default();
        let tell = Tell { fd: self.sync.as_raw_fd(), words: &words };
        let problem = become_program(self.spec, &self.spec.process, &tell);
        self.fail(&problem, exit_code(&problem))
    }

    fn fail(&mut self, problem: &Problem, code: i32) -> ! {
        let _ = self.say(&News::Problem(problem.report()), &[]);
        daemon::exit_now(code)
    }

    /// Builds the pod's inside and says so. What 0, 1 and 2 will be comes back.
    fn prepare(&mut self) -> Result<Option<[OwnedFd; 3]>> {
        let spec = self.spec;
        if spec.network.mode != NetworkMode::Host {
            clone::unshare(nix::libc::CLONE_NEWNET).doing(|| "make a network namespace".into())?;
        }
        let proc = rootfs::proc()?;
        // Before there are devices, which take theirs from them.
        namespaces::settle(spec, &Settings { proc: &proc }, self.outer_pid_max.as_deref())?;
        self.say(&News::Apart, &[])?;
        process::reset_signals();
        // A session of its own, which the terminal of whoever started the pod does not control.
        nix::unistd::setsid().doing(|| "begin a session".into())?;
        nix::sys::stat::umask(Mode::empty());
        let _ = process::new_session_keyring();
        let beginning = Beginning::make(spec, proc)?;
        let device_nodes = self.enter_groups()?;
        let cgroups = beginning.cgroups(spec)?;
        if self.waits {
            let in_memory = beginning.in_memory(spec);
            let folders = in_memory.iter().map(|(path, _)| (*path).to_owned()).collect();
            let roots: Vec<&OwnedFd> = in_memory.iter().map(|(_, root)| *root).collect();
            self.say(&News::Waiting { folders }, &roots)?;
            birth::enter_time_namespace(self.clocks())?;
        }
        let mut rootfs = Rootfs::build((beginning, cgroups), spec, self.pod, device_nodes)?;
        let warnings = std::mem::take(&mut rootfs.warnings);
        let (stdio, console) = match self.purpose {
            Purpose::Run => self.make_stdio(&rootfs.pts)?,
            Purpose::Fill(_) => (None, None),
        };
        rootfs.become_root(spec)?;
        let stdio = match (self.purpose, stdio) {
            (Purpose::Run, None) => Some(nothing_three_times()?),
            (_, stdio) => stdio,
        };
        self.say(&News::Ready { warnings }, &Vec::from_iter(&console))?;
        Ok(stdio)
    }

    /// Waits until they are there. The root of a cgroup namespace is the group that it is made in.
    fn enter_groups(&mut self) -> Result<bool> {
        let mut device_nodes = [0];
        if !self.told(GROUPS) || self.sync.read_exact(&mut device_nodes).is_err() {
            daemon::exit_now(125);
        }
        let (cgroup, born) = self.cgroup;
        cgroup.enter(born)?;
        clone::unshare(nix::libc::CLONE_NEWCGROUP).doing(|| "make a cgroup namespace".into())?;
        Ok(device_nodes != [0])
    }

    /// Waits until the files are there. Memory may come before them.
    fn clocks(&mut self) -> Clocks {
        let mut letter = [0];
        let mut bytes = [0; Clocks::BYTES];
        loop {
            let heard = self.sync.read_exact(&mut letter);
            match (heard, letter[0]) {
                (Ok(()), CLOCKS) if self.sync.read_exact(&mut bytes).is_ok() => return Clocks::decode(&bytes),
                (Ok(()), PLACES) if self.lay_out().is_ok() => {}
                _ => daemon::exit_now(125),
            }
        }
    }

    /// Maps memory for others to fill. Places where something lies are left out, and so are all of them on a host
    /// without userfaultfd.
    fn lay_out(&mut self) -> Result<()> {
        let doing = || "hear from the monitor".to_owned();
        let mut word = || {
            let mut bytes = [0; 8];
            self.sync.read_exact(&mut bytes).map(|()| u64::from_ne_bytes(bytes)).doing(doing)
        };
        let count = word()?;
        let wanted: Vec<(u64, u64)> = (0..count).map(|_| Ok((word()?, word()?))).collect::<Result<_>>()?;
        let fault = match userfault::make() {
            Ok(fault) => fault,
            Err(error) => {
                let problem = Problem::new("E-KERNEL", "make a userfaultfd").because(error);
                return self.say(&News::Problem(problem.report()), &[]);
            }
        };
        let mapped = |&(start, end): &(u64, u64)| memory::lay_out(start, end.saturating_sub(start) as usize).is_ok();
        let places = wanted.into_iter().filter(mapped).collect();
        self.say(&News::Laid { places }, &[&fault])
    }

    /// The three files, and the master of a new pty.
    fn make_stdio(&mut self, pts: &OwnedFd) -> Result<(Option<[OwnedFd; 3]>, Option<OwnedFd>)> {
        match std::mem::replace(&mut self.stdio, Stdio::Null) {
            Stdio::Files(files) => Ok((Some(files), None)),
            Stdio::Null => Ok((None, None)),
            Stdio::Terminal { rows, columns } => {
                let doing = || "make the pod's terminal".to_owned();
                let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
                let master = openat(pts, "ptmx", flags, Mode::empty()).doing(doing)?;
                tty::unlock_pty(master.as_fd()).doing(doing)?;
                tty::set_window_size(master.as_fd(), rows, columns).doing(doing)?;
                // By the master and no path: nothing in the pod's tree can stand in its place.
                let terminal = tty::pty_peer(master.as_fd()).doing(doing)?;
                let user = &self.spec.process.user;
                if user.uid != 0 {
                    fchown(&terminal, Some(Uid::from_raw(user.uid)), None::<Gid>).doing(doing)?;
                }
                tty::set_controlling_terminal(terminal.as_fd()).doing(doing)?;
                let copy = || terminal.try_clone().doing(doing);
                Ok((Some([copy()?, copy()?, copy()?]), Some(master)))
            }
        }
    }

    fn say(&mut self, news: &News, with: &[&OwnedFd]) -> Result<()> {
        let mut line = serde_json::to_vec(news).doing(|| "write to the monitor".into())?;
        line.push(b'\n');
        let fds: Vec<_> = with.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &rights[..0] } else { &rights[..] };
        let flags = MsgFlags::MSG_NOSIGNAL;
        let sent = sendmsg::<()>(self.sync.as_raw_fd(), &[IoSlice::new(&line)], rights, flags, None)
            .doing(|| "write to the monitor".into())?;
        self.sync.write_all(&line[sent..]).doing(|| "write to the monitor".into())
    }

    /// Waits for a letter; false when the monitor is gone.
    fn told(&mut self, letter: u8) -> bool {
        let mut heard = [0];
        self.sync.read_exact(&mut heard).is_ok() && heard[0] == letter
    }

    /// Keeps nothing but the socket and waits to be taken over; whatever is heard instead is the end.
    fn park(&mut self) -> ! {
        let keep = self.sync.as_raw_fd();
        daemon::close_all_but(&[keep]);
        for number in 0..3 {
            daemon::close_number(number);
        }
        let mut heard = [0];
        let _ = self.sync.read(&mut heard);
        daemon::exit_now(125)
    }
}

/// The pod's own /dev/null.
fn nothing_three_times() -> Result<[OwnedFd; 3]> {
    let open = || {
        let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC;
        nix::fcntl::open("/dev/null", flags, Mode::empty()).doing(|| "open /dev/null in the pod".into())
    };
    Ok([open()?, open()?, open()?])
}

fn take_stdio(files: &[OwnedFd; 3]) -> Result<()> {
    for (number, file) in files.iter().enumerate() {
        daemon::replace_stdio(file.as_fd(), number as i32).doing(|| "set up stdio".into())?;
    }
    Ok(())
}
