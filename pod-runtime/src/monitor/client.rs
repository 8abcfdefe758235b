//! The other side of the control socket: what commands ask a pod's monitor.

use super::serve::moved_problem;
use super::wire::{About, Attach, Ends, Exec, Reply, Request};
use crate::lifecycle;
use crate::problem::{Doing, Problem, Result};
use crate::status::{State, Status};
use crate::store::Pod;
use crate::sys::pidfd;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long a monitor that ends may take to say how.
const PATIENCE: Duration = Duration::from_secs(5);

/// Connects to the pod's monitor.
pub fn connect(pod: &Pod) -> Result<UnixStream> {
    let dir = pod.run_dir();
    let attempt = File::open(&dir).and_then(|dir| {
        let path = format!("/proc/self/fd/{}/ctl.sock", dir.as_raw_fd());
        UnixStream::connect(path)
    });
    attempt.map_err(|error| no_monitor(pod).unwrap_or_else(|problem| problem).because(error))
}

/// A monitor that hung up is about to write down how the pod ended, or was killed: which of them is told.
fn settled<T>(pod: &Pod, answer: Result<T>) -> Result<T> {
    answer.map_err(|problem| if problem.code() == "E-MONITOR" { no_monitor(pod).unwrap_or(problem) } else { problem })
}

/// The state of a pod whose monitor does not answer. One that is alive and does not listen is closing up, or dying; which
/// of them, the file says in a moment.
pub(crate) fn settled_status(pod: &Pod) -> Result<Status> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = pod.status()?;
        if !status.state.is_live() || status.monitor_lost || Instant::now() > deadline {
            return Ok(status);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Why there is nobody to talk to.
fn no_monitor(pod: &Pod) -> Result<Problem> {
    let (name, status) = (pod.name()?, settled_status(pod)?);
    Ok(match (status.state, &status.moved_to) {
        (State::Moved, Some(to)) => moved_problem(&name, to),
        (State::Running | State::Paused | State::Migrating, _) => {
            Problem::new("E-MONITOR", format!("the monitor of pod '{name}' is gone, though the pod runs"))
                .fix(format!("`pod stop {name}` and `pod rm {name}` work without it"))
        }
        (state, _) => crate::status::wrong_state(&name, state, "running"),
    })
}

/// Says one request on a connection, also one that leads to the monitor of another host, and hears the answer.
pub fn ask(stream: &mut UnixStream, request: &Request) -> Result<Reply> {
    let mut line = serde_json::to_vec(request).doing(|| "put a request into words".into())?;
    line.push(b'\n');
    let lost = |error| Problem::new("E-MONITOR", "the monitor hung up").because(error);
    stream.write_all(&line).map_err(lost)?;
    // Frames may follow the line: no further than its end is read.
    let mut answer = Vec::new();
    while !answer.ends_with(b"\n") {
        let mut buffer = [0; 4096];
        let there = match recv(stream.as_raw_fd(), &mut buffer, MsgFlags::MSG_PEEK) {
            Ok(0) => return Err(lost(ErrorKind::UnexpectedEof.into())),
            Ok(there) => there,
            Err(Errno::EINTR) => continue,
            Err(error) => return Err(lost(error.into())),
        };
        let most = buffer[..there].iter().position(|byte| *byte == b'\n').map_or(there, |at| at + 1);
        stream.read_exact(&mut buffer[..most]).map_err(lost)?;
        answer.extend_from_slice(&buffer[..most]);
    }
    let reply: Reply = serde_json::from_slice(&answer).doing(|| "understand the monitor".into())?;
    reply.into_result()
}

/// The monitor's pid, when it answers.
pub fn ping(pod: &Pod) -> Result<i32> {
    let reply = ask(&mut connect(pod)?, &Request::Ping)?;
    reply.pid.ok_or_else(|| Problem::new("E-MONITOR", "the monitor does not say who it is"))
}

/// Becomes a client of the stdio of the pod or of a session in it: frames from now on.
pub fn attach(pod: &Pod, wanted: Attach) -> Result<(UnixStream, Reply)> {
    let mut stream = connect(pod)?;
    let reply = settled(pod, ask(&mut stream, &Request::Attach(wanted)))?;
    Ok((stream, reply))
}

/// Starts a process in the pod; frames of its stdio from now on, unless it is detached.
pub fn exec(pod: &Pod, exec: Exec) -> Result<(UnixStream, Reply)> {
    let mut stream = connect(pod)?;
    let reply = settled(pod, ask(&mut stream, &Request::Exec(exec)))?;
    Ok((stream, reply))
}

/// What `pod exec` started there. Nothing of a monitor that does not answer at once: this is for lists.
pub fn sessions(pod: &Pod) -> Vec<About> {
    let asked = || -> Result<Reply> {
        let mut stream = connect(pod)?;
        stream.set_read_timeout(Some(Duration::from_secs(1))).doing(|| "set up the connection".into())?;
        ask(&mut stream, &Request::Sessions)
    };
    asked().map(|reply| reply.sessions).unwrap_or_default()
}

/// Waits for the pod's end: its exit code.
pub fn wait(pod: &Pod) -> Result<i32> {
    let reply = settled(pod, ask(&mut connect(pod)?, &Request::Wait))?;
    reply.exit_code.ok_or_else(|| Problem::new("E-MONITOR", "the monitor does not say how the pod ended"))
}

/// A connection that becomes readable when the pod has ended.
pub fn wait_later(pod: &Pod) -> Result<UnixStream> {
    let mut stream = connect(pod)?;
    let mut line = serde_json::to_vec(&Request::Wait).doing(|| "put a request into words".into())?;
    line.push(b'\n');
    stream.write_all(&line).doing(|| "ask the monitor".into())?;
    Ok(stream)
}

/// The monitor reads nothing of the pod's stdio and, if asked so, the pod is off the network; until this is dropped.
///
/// A pod that was taken off the network comes back to it when this is dropped, by its monitor or, where that has been
/// killed meanwhile, by us. Where we are killed, the monitor sees it; where both are, the next command that lists pods
/// does ([`lifecycle::reconnect`]).
#[derive(Debug)]
pub struct Hold {
    stream: UnixStream,
    pod: Pod,
    /// Off the network, or the neighbours may be told that the pod is elsewhere: to be put right.
    cut: bool,
    /// Length of the log: what the pod wrote before is in it, what it wrote after is in its terminal or pipes.
    pub log: u64,
    /// The monitor.
    pub monitor: i32,
    /// It opens the pod's port in the bridge when it puts the pod back: one of an older release does not, and what it would not
    /// undo must not be done ([`crate::network::port`]).
    pub opens_port: bool,
    /// Numbers of its descriptors that the pod's processes talk to.
    pub ends: Ends,
}

impl Hold {
    /// A copy of one of the monitor's descriptors ([`Hold::ends`]); `None` when it has closed it since: what a `pod exec`
    /// had started may have ended before the pod stood still.
    pub fn end(&self, number: i32) -> Result<Option<OwnedFd>> {
        let here = || format!("copy descriptor {number} of the monitor");
        let process = match pidfd::open(self.monitor) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {
                return Err(no_monitor(&self.pod)?.because(error));
            }
            other => other.doing(here)?,
        };
        match pidfd::get_fd(&process, number) {
            Ok(copy) => Ok(Some(copy)),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EBADF)) => {
                // What a killed process had open goes before the process does, and all at once.
                match pidfd::get_fd(&process, libc::STDERR_FILENO) {
                    Ok(_) => Ok(None),
                    Err(_) => Err(no_monitor(&self.pod)?.because(error)),
                }
            }
            Err(error) => Err(error).doing(here),
        }
    }

    /// The pod has ended: there is nothing to be put back.
    pub fn over(mut self) {
        self.cut = false;
    }

    /// Takes the pod off the network as well, until this is dropped. Later than the hold itself, when nothing in the
    /// pod runs any more: a segment that it sent into a cut cable would be lost for a whole timeout.
    pub fn cut(&mut self) -> Result<()> {
        // Also where the answer does not come.
        self.cut = true;
        ask(&mut self.stream, &Request::Hold { link: true, leaving: false }).map(drop)
    }

    /// Tells the monitor that the pod lives elsewhere now: it kills the copy here, sets the tombstone and goes.
    pub fn moved(mut self, to: &str) -> Result<()> {
        self.cut = false;
        ask(&mut self.stream, &Request::Moved { to: to.to_owned(), job: None }).map(drop)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if !self.cut {
            return;
        }
        let _ = self.stream.set_read_timeout(Some(PATIENCE));
        let released = match ask(&mut self.stream, &Request::Release) {
            Err(problem) if problem.code() == "E-MONITOR" => {
                // One that lives and does not answer sees at least that we are gone.
                let _ = self.stream.shutdown(Shutdown::Both);
                lifecycle::reconnect(&self.pod)
            }
            other => other.map(drop),
        };
        if let Err(problem) = released {
            tracing::error!(problem = problem.chain(), "the pod could not be put back on the network");
        }
    }
}

/// See [`Hold`]. `link`: also off the network.
pub fn hold(pod: &Pod, link: bool) -> Result<Hold> {
    begin(pod, link, false)
}

/// The same of a pod that is to leave: another host may draw its frames from now on, and when this is dropped the neighbours
/// are told that they come here.
pub fn hold_leaving(pod: &Pod) -> Result<Hold> {
    begin(pod, false, true)
}

fn begin(pod: &Pod, link: bool, leaving: bool) -> Result<Hold> {
    let mut hold = Hold {
        stream: connect(pod)?,
        pod: pod.clone(),
        cut: false,
        log: 0,
        monitor: 0,
        opens_port: false,
        ends: Ends::default(),
    };
    let asked = ask(&mut hold.stream, &Request::Hold { link, leaving });
    // A monitor that hung up may have done it; one that refuses has not.
    hold.cut = (link || leaving) && asked.as_ref().err().is_none_or(|problem| problem.code() == "E-MONITOR");
    let reply = asked?;
    (hold.log, hold.ends) = (reply.log.unwrap_or_default(), reply.ends.unwrap_or_default());
    hold.monitor = reply.pid.unwrap_or_default();
    hold.opens_port = reply.opens_port;
    Ok(hold)
}

/// The pod gets less CPU time until this is dropped. Where we are killed, the monitor sees it; where it is killed, we put back
/// what was there; where both are, the next command that lists pods does ([`lifecycle::unthrottle`]).
#[derive(Debug)]
pub struct Throttle {
    stream: UnixStream,
    pod: Pod,
}

impl Throttle {
    /// At most so many millionths of a CPU from now on.
    pub fn begin(pod: &Pod, cpu: u64) -> Result<Throttle> {
        let stream = connect(pod)?;
        stream.set_read_timeout(Some(PATIENCE)).doing(|| "set up the connection".into())?;
        let mut throttle = Throttle { stream, pod: pod.clone() };
        throttle.set(cpu)?;
        Ok(throttle)
    }

    /// Less than before.
    pub fn set(&mut self, cpu: u64) -> Result<()> {
        ask(&mut self.stream, &Request::Throttle { cpu }).map(drop)
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        // Answered when it is done: what comes next is to find the pod as it was.
        let Err(problem) = ask(&mut self.stream, &Request::Release) else { return };
        // One that lives and does not answer sees at least that we are gone.
        let _ = self.stream.shutdown(Shutdown::Both);
        if let Err(problem) =
            lifecycle::unthrottle(&self.pod).and_then(|put_back| if put_back { Ok(()) } else { Err(problem) })
        {
            tracing::error!(problem = problem.chain(), "the pod's CPU limit could not be put back");
        }
    }
}

/// As [`Hold::moved`], without a hold: if the pod was stopped for good for that job.
pub fn moved(pod: &Pod, job: &str, to: &str) -> Result<()> {
    ask(&mut connect(pod)?, &Request::Moved { to: to.to_owned(), job: Some(job.to_owned()) }).map(drop)
}
