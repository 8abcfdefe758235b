//! The monitor: one small process per pod that outlives every command.
//!
//! It is forked (not executed) by `pod run`, `pod restore` and `pod receive`, leaves their session, and is the parent of
//! the pod's first process and of everything that `pod exec` starts there. It owns the master side of the pod's
//! terminal or the other ends of its stdio pipes, writes the log ([`log`]), reaps, writes down the exit code, and serves
//! the pod's control socket ([`wire`], [`client`]).
//!
//! Rules: one thread, one poll loop ([`serve`]), nothing in it blocks on a client. A client that is slow is fed from the
//! log; what it does never stops the pod. A monitor that is killed takes nothing with it but the terminal: the pod goes
//! on, and [`crate::lifecycle`] stops and removes it without a monitor.

use crate::birth::{Born, Clocks, Conceived};
use crate::network::Attachment;
use crate::problem::{Problem, Result};
use crate::spec::Spec;
use crate::store::Pod;
use crate::usher::Inside;
use std::any::Any;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

pub mod client;
mod connection;
mod exec;
pub mod log;
mod serve;
mod spawn;
mod stdio;
mod talk;
pub mod wire;

pub use serve::moved_problem;
pub use spawn::{LOST, abandon, spawn};
pub use wire::{About, Size};

/// What [`spawn`] is told.
pub struct Launch {
    /// Reserved, with its lease taken.
    pub pod: Pod,
    /// As the pod's spec file has it.
    pub spec: Spec,
    pub beginning: Beginning,
    /// Of the terminal, when the pod has one.
    pub size: Size,
    /// Whether the caller wants to be a client from the first byte on: [`Started::client`].
    pub attach: bool,
}

/// How a pod begins.
pub enum Beginning {
    /// With its program.
    Run,
    /// Empty, to be filled. The pod is off the network (quiet) until it is joined to it.
    Fill(Box<dyn Filling>),
}

/// Who fills a pod, in its monitor.
///
/// What it owns is kept through the fork. Its descriptors must not be 0, 1 or 2, which the monitor gives up. When it
/// fails, the monitor removes everything of the pod from this host.
pub trait Filling {
    /// The pod has its namespaces, its cgroup and its cable, but no file tree. Brings the files that lie on disk, which
    /// must not change once they are mounted, and says what the pod's clocks show. Memory that comes earlier can be put
    /// into `conceived`, which is not there for a filling that is at rest; frames that are for the pod can be held beside its
    /// cable, which is quiet.
    fn files(&mut self, pod: &Pod, spec: &Spec, conceived: Option<&Conceived>, cable: &Attachment) -> Result<Clocks>;

    /// Whether the files are there already, so that they can be brought while the first process joins its cgroups.
    fn at_rest(&self) -> bool {
        false
    }

    /// What a helper does inside the pod while it is filled, if one is needed: it is called early.
    fn inside(&self) -> Option<Inside> {
        None
    }

    /// Fills the first process. Before the pod may run, or is on the network, this must have written down that there is no way
    /// back (a job's entry, or `let_go` of the status), and then that it runs: the monitor may be killed at every line.
    fn fill(self: Box<Self>, newborn: &mut Newborn) -> Result<Filled>;

    /// The birth has failed, before, in or after `files`; `fill` is not called.
    fn failed(&mut self, problem: &Problem);
}

/// A pod that was born and does not run yet.
pub struct Newborn {
    pub pod: Pod,
    pub spec: Spec,
    pub born: Born,
    /// Quiet: in no bridge, nothing announced.
    pub attachment: Option<Attachment>,
}

/// What the engine hands over when the pod runs again.
#[derive(Debug, Default)]
pub struct Filled {
    /// Master side of the pod's terminal.
    pub console: Option<OwnedFd>,
    /// The write end of the pod's stdin.
    pub stdin: Option<OwnedFd>,
    /// The read ends of its stdout and stderr.
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
    /// Processes besides the first whose parent is the monitor (`pod exec` started them), by their pids on this host.
    pub roots: Vec<i32>,
    /// The sessions that these processes are, and such as have ended unheard.
    pub sessions: Vec<Arrived>,
    /// Whether those that had clients wait for them.
    pub awaited: bool,
    /// Read ends of pipes that nobody listens to any more: read and thrown away.
    pub others: Vec<OwnedFd>,
    /// Dropped when nobody waits for the pod any more.
    pub remains: Option<Box<dyn Any>>,
}

/// A session of `pod exec` that came with the pod.
#[derive(Debug)]
pub struct Arrived {
    pub about: wire::About,
    /// Master side of its terminal, or pipe ends: stdin, stdout, stderr.
    pub fds: [Option<OwnedFd>; 4],
}

/// A pod that runs.
#[derive(Debug)]
pub struct Started {
    /// The first process and the monitor, by their pids on this host.
    pub init: i32,
    pub monitor: i32,
    /// What this host could not give and the pod lives without, a line each.
    pub warnings: Vec<String>,
    /// Carries frames of the pod's stdio, as after `attach`.
    pub client: Option<UnixStream>,
}
