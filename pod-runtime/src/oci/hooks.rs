//! Hooks: programs of the host (or, for two of them, of the container) that the bundle wants to be run on the way.
//!
//! One after the other, each with the container's state on stdin, an environment of its own, and a deadline if it has
//! one. What it writes is kept out of everybody's stdio and shown only when it fails.

use super::store::Shown;
use super::wrong;
use crate::problem::{Doing, Problem, Result};
use crate::sys::{daemon, process};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use oci_spec::runtime::Hook;
use std::ffi::CStr;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

/// So much of what a hook wrote is shown.
const BOUND: u64 = 4096;

/// Runs all of a kind; the first that fails is the end.
pub fn run(kind: &str, hooks: &Option<Vec<Hook>>, state: &Shown) -> Result<()> {
    for (number, hook) in hooks.iter().flatten().enumerate() {
        one(hook, state).doing(|| format!("error running {kind} hook #{number} ({})", hook.path().display()))?;
    }
    Ok(())
}

fn one(hook: &Hook, state: &Shown) -> Result<()> {
    if !hook.path().is_absolute() {
        return Err(wrong(format!("the path of a hook is not absolute: {}", hook.path().display())));
    }
    let text = serde_json::to_vec(state).doing(|| "write the state".into())?;
    let output = tempfile(c"hook-output")?;
    // A pipe is full after a while, and then it depends on the hook when the writer goes on.
    let mut input = tempfile(c"hook-input")?;
    input.write_all(&text).and_then(|()| input.rewind()).doing(|| "write the state".into())?;
    let copy = || output.try_clone().doing(|| "copy a descriptor".into());
    let mut command = Command::new(hook.path());
    command.env_clear().stdin(input).stdout(copy()?).stderr(copy()?);
    if let Some(args) = hook.args() {
        let mut args = args.iter();
        args.next().map(|name| command.arg0(name));
        command.args(args);
    }
    for line in hook.env().iter().flatten() {
        let (name, value) = line.split_once('=').unwrap_or((line, ""));
        command.env(name, value);
    }
    let pid = command.spawn().doing(|| "start it".into())?.id() as i32;
    let deadline = hook.timeout().and_then(|seconds| u64::try_from(seconds).ok()).filter(|seconds| *seconds > 0);
    let deadline = deadline.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let in_time = ends(pid, deadline)?;
    let ended = daemon::reap(pid).doing(|| "wait for it".into())?;
    match ended {
        _ if !in_time => Err(Problem::new("E-OCI-HOOK", "it did not end in time")),
        daemon::Ended::Code(0) => Ok(()),
        daemon::Ended::Code(code) => Err(failed(format!("exit status {code}"), output)),
        daemon::Ended::Signal(signal) => Err(failed(format!("signal {signal}"), output)),
    }
}

/// Waits until a child has ended, but does not reap it; kills it at the deadline and says so.
fn ends(pid: i32, deadline: Option<Instant>) -> Result<bool> {
    let pidfd = daemon::pidfd_open(pid).doing(|| "open a pidfd".into())?;
    loop {
        let left = deadline.map(|end| end.saturating_duration_since(Instant::now()));
        let timeout = match left {
            None => PollTimeout::NONE,
            Some(left) => PollTimeout::try_from(left.as_millis().min(60_000) as i32 + 1).unwrap_or(PollTimeout::MAX),
        };
        match poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) if deadline.is_some_and(|end| Instant::now() >= end) => {
                let _ = process::kill_by_pidfd(pidfd.as_fd(), libc::SIGKILL);
                return Ok(false);
            }
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error).doing(|| "wait for it".into()),
        }
    }
}

fn tempfile(name: &CStr) -> Result<File> {
    let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
    nix::sys::memfd::memfd_create(name, flags).map(File::from).doing(|| "make a file in memory".into())
}

fn failed(how: String, mut output: File) -> Problem {
    let mut text = Vec::new();
    let _ = output.rewind();
    let _ = output.take(BOUND).read_to_end(&mut text);
    let text = String::from_utf8_lossy(&text);
    Problem::new("E-OCI-HOOK", format!("{how}, stdout and stderr: {}", text.trim()))
}
