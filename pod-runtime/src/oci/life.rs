//! The life of a container after its creation: start, signals, pause, end.
//!
//! A process is only ever signalled through a pidfd or its cgroup, never by a number read from a file, and the end of one
//! is waited for on its pidfd: there is no edge to miss.

use super::first::GO;
use super::hooks;
use super::store::{Container, Containers, State, Status};
use super::{Bundle, bundle, resources, wrong};
use crate::cgroup::Cgroup;
use crate::problem::{Doing, Problem, Result};
use crate::sys::{daemon, process};
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use oci_spec::runtime::LinuxResources;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// How long a freeze, and the end of what was killed, may take.
const DEADLINE: Duration = Duration::from_secs(10);
/// No more is heard from a process that could not become its program.
const BOUND: u64 = 1 << 16;

/// Lets the first process become the user's program, and returns when it has.
pub fn start(container: &Container) -> Result<()> {
    let _lock = container.lock()?;
    let state = container.state()?;
    match container.status(&state)? {
        Status::Created => {}
        Status::Stopped => return Err(state_problem("cannot start a container that has stopped")),
        Status::Paused => return Err(state_problem("cannot start a paused container")),
        Status::Running => return Err(state_problem("cannot start an already running container")),
        Status::Creating => return Err(state_problem("cannot start a container whose making was given up")),
    }
    let (folder, address) = container.start_socket()?;
    let mut first = UnixStream::connect(&address).doing(|| "reach the container's first process".into())?;
    drop(folder);
    first.write_all(&[GO]).doing(|| "start the container's first process".into())?;
    let mut said = Vec::new();
    (&first).take(BOUND).read_to_end(&mut said).doing(|| "hear from the container's first process".into())?;
    container.started();
    if !said.is_empty() {
        return Err(Problem::new("E-OCI-START", String::from_utf8_lossy(&said).into_owned()));
    }
    let spec = container.spec()?;
    let Some(hooks) = spec.hooks() else { return Ok(()) };
    let shown = container.shown(&state, Status::Running);
    hooks::run("poststart", hooks.poststart(), &shown).inspect_err(|_| {
        if let Some(first) = container.first(&state) {
            let _ = process::kill_by_pidfd(first.as_fd(), libc::SIGKILL);
        }
    })
}

fn state_problem(what: &str) -> Problem {
    Problem::new("E-OCI-STATE", what)
}

/// A signal by number or name: `9`, `KILL`, `SIGKILL`, `RTMIN+3`.
pub fn signal(text: &str) -> Result<i32> {
    let unknown = || wrong(format!("unknown signal {text:?}"));
    if let Ok(number) = text.parse::<i32>() {
        return if (0..=64).contains(&number) { Ok(number) } else { Err(unknown()) };
    }
    let plain = text.strip_prefix("SIG").unwrap_or(text);
    if let Some(rest) = plain.strip_prefix("RTMIN") {
        let more = if rest.is_empty() { Some(0) } else { rest.strip_prefix('+').and_then(|more| more.parse().ok()) };
        return more.map(|more: i32| 34 + more).filter(|number| (34..=64).contains(number)).ok_or_else(unknown);
    }
    if let Some(rest) = plain.strip_prefix("RTMAX") {
        let less = if rest.is_empty() { Some(0) } else { rest.strip_prefix('-').and_then(|less| less.parse().ok()) };
        return less.map(|less: i32| 64 - less).filter(|number| (34..=64).contains(number)).ok_or_else(unknown);
    }
    let known: nix::Result<nix::sys::signal::Signal> = format!("SIG{plain}").parse();
    known.map(|signal| signal as i32).map_err(|_| unknown())
}

/// Gives the first process, or `all` of the container, a signal.
pub fn kill(container: &Container, signal: i32, all: bool) -> Result<()> {
    let state = container.state()?;
    let cgroup = container.cgroup(&state)?;
    if all && let Some(cgroup) = &cgroup {
        return kill_all(cgroup, signal);
    }
    let not_running = || Problem::new("E-OCI-STATE", "container not running");
    let first = container.first(&state).ok_or_else(not_running)?;
    match process::kill_by_pidfd(first.as_fd(), signal) {
        Err(Errno::ESRCH) => return Err(not_running()),
        other => other.doing(|| format!("signal container {}", container.id()))?,
    }
    // A frozen process of v1 takes no signal.
    if signal == libc::SIGKILL && container.status(&state)? == Status::Paused {
        thaw(cgroup.as_ref())?;
    }
    Ok(())
}

fn kill_all(cgroup: &Cgroup, signal: i32) -> Result<()> {
    if signal == libc::SIGKILL {
        return cgroup.kill();
    }
    for pid in cgroup.procs()? {
        let Ok(pidfd) = daemon::pidfd_open(pid) else { continue };
        // Only now is the number certain to be what it was in the list.
        if cgroup.procs()?.contains(&pid) {
            let _ = process::kill_by_pidfd(pidfd.as_fd(), signal);
        }
    }
    Ok(())
}

fn groups(container: &Container, state: &State) -> Result<Cgroup> {
    container
        .cgroup(state)?
        .ok_or_else(|| state_problem("the container has no cgroups: it cannot be paused or limited"))
}

pub fn pause(container: &Container) -> Result<()> {
    let _lock = container.lock()?;
    let state = container.state()?;
    match container.status(&state)? {
        Status::Running | Status::Created => groups(container, &state)?.freeze(DEADLINE),
        status => Err(state_problem(&format!("container not running or created: {}", status.word()))),
    }
}

pub fn resume(container: &Container) -> Result<()> {
    let _lock = container.lock()?;
    let state = container.state()?;
    match container.status(&state)? {
        Status::Paused => groups(container, &state)?.thaw(),
        _ => Err(state_problem("container not paused")),
    }
}

fn thaw(cgroup: Option<&Cgroup>) -> Result<()> {
    cgroup.map_or(Ok(()), Cgroup::thaw)
}

/// Takes a container that has ended, or was never started, away; with `force` ends it first. The problems that come back
/// are those of hooks that nothing depends on any more.
pub fn delete(container: &Container, force: bool) -> Result<Vec<Problem>> {
    let lock = container.lock_within(DEADLINE)?;
    // Somebody else was quicker.
    let Ok(state) = container.state() else {
        return Err(Problem::new("E-OCI-ABSENT", format!("container \"{}\" does not exist", container.id())));
    };
    let status = match container.status(&state)? {
        // Whoever was making it would have the lock.
        Status::Creating => Status::Stopped,
        status => status,
    };
    if !force && !matches!(status, Status::Stopped | Status::Created) {
        let what = format!("cannot delete container {} that is not stopped: {}", container.id(), status.word());
        return Err(Problem::new("E-OCI-STATE", what));
    }
    let first = container.first(&state);
    if let Some(first) = &first {
        match process::kill_by_pidfd(first.as_fd(), libc::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => return Err(error).doing(|| format!("end container {}", container.id())),
        }
    }
    let cgroup = container.cgroup(&state)?;
    if let Some(cgroup) = cgroup.as_ref().filter(|cgroup| cgroup.exists()) {
        // Without a pid namespace of its own the others live on.
        cgroup.kill()?;
    }
    if let Some(first) = first {
        await_end(&first)?;
    }
    if let Some(cgroup) = cgroup {
        cgroup.remove(DEADLINE)?;
    }
    let hooks = container.spec().ok().and_then(|spec| spec.hooks().clone());
    let shown = container.shown(&state, Status::Stopped);
    container.forget();
    drop(lock);
    // The container is gone already: the others run all the same.
    let hooks = hooks.iter().flat_map(|hooks| hooks.poststop().iter().flatten());
    Ok(hooks.filter_map(|hook| hooks::run("poststop", &Some(vec![hook.clone()]), &shown).err()).collect())
}

fn await_end(first: &OwnedFd) -> Result<()> {
    let timeout = PollTimeout::try_from(DEADLINE.as_millis() as i32).unwrap_or(PollTimeout::MAX);
    loop {
        match poll(&mut [PollFd::new(first.as_fd(), PollFlags::POLLIN)], timeout) {
            Err(Errno::EINTR) => {}
            Ok(0) => return Err(state_problem("the container's first process does not end")),
            other => return other.doing(|| "wait for the container's first process".into()).map(drop),
        }
    }
}

/// `delete --force` of what may not be there, or only a folder without a state.
pub fn delete_if_there(containers: &Containers, id: &str) -> Result<Vec<Problem>> {
    bundle::check_id(id)?;
    match containers.get(id).and_then(|container| delete(&container, true)) {
        Err(problem) if problem.code() == "E-OCI-ABSENT" => {
            containers.remove_remains(id, DEADLINE).map(|()| Vec::new())
        }
        other => other,
    }
}

/// Host pids of all its processes.
pub fn processes(container: &Container) -> Result<Vec<i32>> {
    let state = container.state()?;
    match container.cgroup(&state)? {
        Some(cgroup) => cgroup.procs(),
        None => Err(state_problem("the container has no cgroups: its processes are not known")),
    }
}

/// Sets limits of a container that is there, and writes them down.
pub fn update(container: &Container, change: &serde_json::Value) -> Result<()> {
    let _lock = container.lock()?;
    let state = container.state()?;
    if container.status(&state)? == Status::Stopped {
        return Err(Problem::new("E-OCI-STATE", "container not running"));
    }
    let given: LinuxResources = serde_json::from_value(change.clone())
        .map_err(|error| wrong("these are no resources as the runtime specification has them").because(error))?;
    resources::apply(&groups(container, &state)?, &given)?;
    let mut config: serde_json::Value =
        serde_json::from_slice(&container.config()?).doing(|| "read the configuration".into())?;
    // One that was written as a list can be read, and not be changed.
    if !config.is_object() || !config["linux"].is_object() && !config["linux"].is_null() {
        return Err(wrong("linux is not as the runtime specification has it"));
    }
    merge(&mut config["linux"]["resources"], change);
    container.set_config(&serde_json::to_vec(&config).doing(|| "write the configuration".into())?)
}

fn merge(into: &mut serde_json::Value, change: &serde_json::Value) {
    match (into, change) {
        (into, serde_json::Value::Object(fields)) => {
            if !into.is_object() {
                *into = serde_json::json!({});
            }
            for (name, value) in fields {
                merge(&mut into[name], value);
            }
        }
        (into, other) => *into = other.clone(),
    }
}

/// Waits for the first process, a child of the caller, and gives its exit code as a shell counts it.
pub fn await_child(container: &Container) -> Result<i32> {
    let pid = container.state()?.pid;
    daemon::reap(pid).doing(|| "wait for the container".into()).map(daemon::Ended::code)
}

/// The configuration that a container was made with, in its bundle.
pub fn bundle_of(container: &Container) -> Result<Bundle> {
    let state = container.state()?;
    Ok(Bundle { folder: state.bundle, raw: container.config()?, spec: container.spec()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_by_number_and_name() {
        for (text, number) in
            [("9", 9), ("KILL", 9), ("SIGTERM", 15), ("34", 34), ("0", 0), ("RTMIN+3", 37), ("RTMAX", 64)]
        {
            assert_eq!(signal(text).unwrap(), number, "{text}");
        }
        for text in ["kill", "-1", "65", "", "SIG", "RTMIN+99", "99999999999"] {
            assert!(signal(text).is_err(), "{text}");
        }
    }

    #[test]
    fn limits_are_merged_into_the_configuration() {
        let mut config = serde_json::json!({"memory": {"limit": 5, "future": 1}, "other": [1]});
        merge(&mut config, &serde_json::json!({"memory": {"limit": 6}, "pids": {"limit": 3}}));
        assert_eq!(
            config,
            serde_json::json!({"memory": {"limit": 6, "future": 1}, "other": [1], "pids": {"limit": 3}})
        );
    }
}
