//! What is done to a pod from outside: signals, pause, end, removal, burial. Works with and without a monitor.
//!
//! Processes are addressed by pidfd after their start time was checked, or through the pod's cgroup; nothing here can
//! hit a process of somebody else. Every step of a removal may find that it was done before.

use crate::cgroup::{Cgroup, throttle};
use crate::monitor::client;
use crate::network::{self, Attachment};
use crate::problem::{Doing, Problem, Result};
use crate::spec::Spec;
use crate::status::{self, State, Status, wrong_state};
use crate::store::{Cleared, Pod};
use crate::sys::daemon;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// How long dying processes may take.
const DYING: Duration = Duration::from_secs(10);

/// How long the monitor of an ended pod is waited for. What it writes it writes at once; the last unmount of the pod's root
/// may take as long as the disk is busy.
const LEAVING: Duration = Duration::from_secs(1);

/// Sends a signal to the pod's first process.
pub fn kill(pod: &Pod, signal: i32) -> Result<()> {
    let status = pod.status()?;
    let pidfd = init_of(pod, &status)?;
    if status.state == State::Paused && signal == 9 {
        // A frozen process takes SIGKILL only by way of its cgroup on old hierarchies.
        Cgroup::open(pod.id())?.kill()?;
    }
    daemon::pidfd_send_signal(pidfd.as_fd(), signal).doing(|| format!("send signal {signal}"))?;
    pod.store().event(pod, "kill", &[("signal", &signal.to_string())]);
    Ok(())
}

/// Sends the stop signal, gives the pod `patience`, then kills it. Returns when it has ended and that is written down.
pub fn stop(pod: &Pod, signal: i32, patience: Duration) -> Result<()> {
    let status = pod.status()?;
    if matches!(status.state, State::Exited | State::Dead) {
        return Ok(());
    }
    let pidfd = init_of(pod, &status)?;
    if status.state == State::Paused {
        unpause(pod)?;
    }
    daemon::pidfd_send_signal(pidfd.as_fd(), signal).doing(|| format!("send signal {signal}"))?;
    if !ended_within(&pidfd, patience)? {
        Cgroup::open(pod.id())?.kill()?;
        if !ended_within(&pidfd, DYING)? {
            return Err(Problem::new("E-SYSTEM", "the pod's first process does not die"));
        }
    }
    pod.store().event(pod, "stop", &[]);
    settle(pod)
}

/// Kills everything in the pod and waits for its end.
pub fn kill_now(pod: &Pod) -> Result<()> {
    let status = pod.status()?;
    if let Some(pidfd) = status.init.map(|key| key.pidfd()).transpose()?.flatten() {
        Cgroup::open(pod.id())?.kill()?;
        let _ = daemon::pidfd_send_signal(pidfd.as_fd(), 9);
        if !ended_within(&pidfd, DYING)? {
            return Err(Problem::new("E-SYSTEM", "the pod's first process does not die"));
        }
    }
    settle(pod)
}

/// After the pod's end: waits until its monitor has written it down, or does it in the place of a lost one.
fn settle(pod: &Pod) -> Result<()> {
    let deadline = Instant::now() + DYING;
    loop {
        let Ok(status) = pod.status() else { return Ok(()) };
        match status.state {
            State::Exited | State::Moved => return Ok(()),
            State::Dead => break,
            _ if Instant::now() > deadline => break,
            // The monitor is at work; it has no other sign than the file.
            _ => std::thread::sleep(Duration::from_millis(2)),
        }
    }
    pod.update(|status| {
        if status.state.is_live() {
            status.state = State::Exited;
            status.finished = Some(status::now());
            status.init = None;
        }
    })?;
    pod.store().event(pod, "die", &[]);
    give_back(pod)
}

fn ended_within(pidfd: &OwnedFd, patience: Duration) -> Result<bool> {
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Ok(0) if Instant::now() >= deadline => return Ok(false),
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error).doing(|| "wait for the pod's end".into()),
        }
    }
}

/// Freezes all processes of the pod.
pub fn pause(pod: &Pod) -> Result<()> {
    let status = pod.status()?;
    if status.state != State::Running {
        return Err(wrong_state(&pod.name()?, status.state, "running"));
    }
    Cgroup::open(pod.id())?.freeze(Duration::from_secs(10))?;
    pod.update(|status| status.state = State::Paused)?;
    pod.store().event(pod, "pause", &[]);
    Ok(())
}

pub fn unpause(pod: &Pod) -> Result<()> {
    let status = pod.status()?;
    if status.state != State::Paused {
        return Err(wrong_state(&pod.name()?, status.state, "paused"));
    }
    Cgroup::open(pod.id())?.thaw()?;
    pod.update(|status| status.state = State::Running)?;
    pod.store().event(pod, "unpause", &[]);
    Ok(())
}

/// Gives back what an ended pod has on this host besides its folder: cgroup, cable, lease, published ports.
pub fn give_back(pod: &Pod) -> Result<()> {
    let cgroup = Cgroup::open(pod.id())?;
    let killed = cgroup.kill();
    let released = network::release(&pod.store().network_dir()?, pod.id());
    // Both are tried, the first problem is told.
    let removed = cgroup.remove(DYING);
    killed.and(released).and(removed)
}

/// What nobody has to wait for when a pod has ended: its cable, cut. It goes with the pod's network namespace, too.
#[derive(Debug)]
pub struct Remains {
    /// By its index: a pod of the same id may have one of the same name by now.
    link: Option<u32>,
}

impl Remains {
    /// Takes it away, for which the whole kernel is waited for: 10 to 30 ms.
    pub fn clear(self) -> Result<()> {
        self.link.map_or(Ok(()), network::cable::remove_by_index)
    }
}

/// As [`give_back`], or with `gone` as [`remove`], but for what can be done when everybody knows of the end.
///
/// Everything is tried; the first problem comes along.
pub fn give_back_first(pod: &Pod, gone: bool) -> (Remains, Result<()>) {
    let remains = Remains { link: network::cable::index_of(&network::link_name(pod.id())) };
    let withdrawn = pod.store().network_dir().and_then(|dir| network::withdraw(&dir, pod.id()));
    let removed = Cgroup::open(pod.id()).and_then(|cgroup| cgroup.kill().and(cgroup.remove(DYING)));
    let mut forgotten = Ok(());
    if gone {
        pod.store().event(pod, "remove", &[]);
        forgotten = pod.clone().remove();
    }
    (remains, withdrawn.and(removed).and(forgotten))
}

/// Removes an ended pod with everything it has on this host.
///
/// Its monitor ends first: between the end that it wrote down and its own it writes to the journal and the leases, and
/// what was removed would be there again.
pub fn remove(pod: &Pod) -> Result<()> {
    let given = give_back(pod);
    if !monitor_leaves_within(pod, LEAVING).unwrap_or(true) {
        // What it still does leaves nothing: the disk takes what the pod wrote, or a client does not read.
        tracing::debug!(pod = pod.id(), "the pod's monitor is still there");
    }
    if pod.dir().exists() {
        pod.store().event(pod, "remove", &[]);
    }
    pod.clone().remove()?;
    given
}

/// Leaves of a pod that runs on another host now nothing but its tombstone. Its processes here must be dead. What it wrote is
/// put away only: the rest of the time is nobody's to wait for.
///
/// The tombstone comes last: from then on the pod may come back and have all of these again, under the same names.
pub fn bury(pod: &Pod, to: &str) -> Result<Cleared> {
    let given = give_back(pod);
    let cleared = pod.clear();
    // In any case: it does run there.
    pod.update(|status| {
        status.state = State::Moved;
        status.moved_to = Some(to.to_owned());
        status.moved_at = Some(status::now());
        status.init = None;
        status.monitor = None;
        status.job = None;
    })?;
    pod.store().event(pod, "moved", &[("to", to)]);
    given.and(cleared)
}

/// Ends the source of a finished move, which began at that second: by the pod's monitor, or in the place of a lost one.
/// A pod that has come back meanwhile is left alone.
pub fn moved(pod: &Pod, job: &str, began: u64, to: &str) -> Result<()> {
    let status = || if pod.dir().exists() { pod.status().map(Some) } else { Ok(None) };
    let leaves = || Ok::<_, Problem>(status()?.is_some_and(|status| status.is_leaving(job)));
    if leaves()? {
        match client::moved(pod, job, to) {
            Ok(()) => return Ok(()),
            Err(problem) if problem.code() != "E-MONITOR" && leaves()? => return Err(problem),
            Err(_) => {}
        }
    }
    // Nobody comes back meanwhile.
    let cleared = pod.store().exclusively(|| {
        let Some(status) = status()? else { return Ok(None) };
        // With its host, say; one that came back and died then began later.
        let died = status.state == State::Dead && status.started.is_none_or(|at| at <= began);
        if !died && !status.is_leaving(job) {
            return Ok(None);
        }
        Cgroup::open(pod.id())?.kill()?;
        if let Some(pidfd) = status.init.map(|key| key.pidfd()).transpose()?.flatten() {
            ended_within(&pidfd, DYING)?;
        }
        bury(pod, to).map(Some)
    })?;
    cleared.map_or(Ok(()), Cleared::remove)
}

/// Puts a pod that was held off the network back on it in the place of its monitor, which was killed meanwhile. Nothing is
/// done where the monitor lives, or where the pod may run on another host.
pub fn reconnect(pod: &Pod) -> Result<()> {
    if !pod.dir().exists() {
        return Ok(());
    }
    let status = client::settled_status(pod)?;
    if !status.monitor_lost || !matches!(status.state, State::Running | State::Paused) {
        return Ok(());
    }
    mend_connections(&Cgroup::open(pod.id())?);
    let init = status.init.map(|key| key.pid);
    Attachment::open(&pod.store().network_dir()?, &pod.spec()?, init)?.release()
}

/// Gives a pod the CPU limit that it had, in the place of its monitor, which was killed while the pod was throttled. Nothing is
/// done where the monitor lives. Returns whether the pod has it.
pub fn unthrottle(pod: &Pod) -> Result<bool> {
    if throttle::is_noted(&pod.run_dir()) && client::settled_status(pod)?.monitor_lost {
        throttle::undo(&Cgroup::open(pod.id())?, &pod.run_dir());
    }
    Ok(!throttle::is_noted(&pod.run_dir()))
}

/// Whoever held the pod may have been killed while it read a connection.
pub(crate) fn mend_connections(cgroup: &Cgroup) {
    let mended = network::repair::mend(&cgroup.procs().unwrap_or_default());
    if mended > 0 {
        tracing::warn!(mended, "connections were taken out of the repair mode that a killed tool left them in");
    }
}

/// A descriptor of the pod's first process, when it is live.
pub fn init_of(pod: &Pod, status: &Status) -> Result<OwnedFd> {
    let live = matches!(status.state, State::Running | State::Paused | State::Migrating);
    let pidfd = if live { status.init.map(|key| key.pidfd()).transpose()?.flatten() } else { None };
    pidfd.ok_or_else(|| match (&status.state, &status.moved_to) {
        (State::Moved, Some(to)) => crate::monitor::moved_problem(&pod.name().unwrap_or_default(), to),
        (state, _) => wrong_state(&pod.name().unwrap_or_default(), *state, "running"),
    })
}

/// Takes the lease of a new pod and writes what it settles into the spec, here and on disk.
pub fn settle_network(pod: &Pod, spec: &mut Spec) -> Result<()> {
    network::lease(&pod.store().network_dir()?, spec, network::Claim::New)?;
    pod.set_spec(spec)
}

/// Whether the pod's monitor, if it has one other than this process, has ended by then.
pub fn monitor_leaves_within(pod: &Pod, patience: Duration) -> Result<bool> {
    let own = std::process::id() as i32;
    let monitor = pod.status()?.monitor.filter(|key| key.pid != own);
    let monitor = monitor.map(|key| key.pidfd()).transpose()?.flatten();
    monitor.map_or(Ok(true), |monitor| ended_within(&monitor, patience))
}

/// Waits until a process has ended, however long that takes.
pub fn wait_for(pidfd: &OwnedFd) -> Result<()> {
    while !ended_within(pidfd, Duration::from_secs(3600))? {}
    Ok(())
}
