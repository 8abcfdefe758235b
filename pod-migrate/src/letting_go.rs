//! A pod that has to run and was not let go: its monitor was killed at the last step of a restore or of an arrival.
//!
//! As soon as a pod is on the network its kernel answers its clients, also while its tasks stand still; and before its last
//! task is let go others have run. So there is one line up to which a restore that is killed leaves nothing and can be done
//! again, and from which on there is no way back but to let the pod run, or its clients would be ahead of what is restored
//! next: for a move that is the commit, for a restore the mark `let_go` in the status, which is written before the cable is
//! plugged in. Before that line the tasks are made to outlive the monitor (`Restored::outlive`): they stand still by their
//! cgroup, and the opener lets the connections go by itself. What is left then is said in [`finish`], which `pod restore`
//! does, `pod receive`, or the next `pod ps`.

use pod_runtime::cgroup::Cgroup;
use pod_runtime::network::{self, Attachment};
use pod_runtime::proc::{self, stat};
use pod_runtime::status::{ProcessKey, State, Status, now};
use pod_runtime::store::Pod;
use pod_runtime::{Problem, Result};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long the opener may take to let the connections go.
const LETTING_GO: Duration = Duration::from_secs(20);
/// How long a process that was killed may take to be gone.
const ENDING: Duration = Duration::from_secs(2);

/// A step from which there is no way back.
pub(crate) fn logged(without: &str, step: Result<()>) {
    if let Err(problem) = step {
        tracing::error!(problem = problem.chain(), "{without}");
    }
}

/// From here on a restored pod has to run. Not waited for to be on the disk: a power cut ends the pod and all that it may
/// have said.
pub(crate) fn decide(pod: &Pod) -> Result<()> {
    pod.update_quickly(|status| {
        status.let_go = true;
        status.started = Some(now());
    })?;
    Ok(())
}

/// Undoes [`decide`], for a pod that could not be heard.
pub(crate) fn decide_otherwise(pod: &Pod) -> Result<()> {
    pod.update_quickly(|status| {
        status.let_go = false;
        status.started = None;
    })?;
    Ok(())
}

/// Whether a restored pod was left at the last step.
fn was_left(status: &Status) -> bool {
    status.let_go && (status.monitor_lost || status.state == State::Dead)
}

/// Lets a restored pod run, if it has to and its monitor is gone: its first process. None of one that nobody has heard of.
pub(crate) fn settle(pod: &Pod) -> Result<Option<ProcessKey>> {
    // Others may be at it: `pod restore`, and whoever looks.
    pod.store().exclusively(|| {
        if !pod.dir().exists() || !was_left(&pod.status()?) {
            return Ok(None);
        }
        finish(pod, "restore")?;
        let status = pod.status()?;
        let gone = || Problem::new("E-MONITOR", "the pod ended with its monitor as soon as it was restored");
        status.init.filter(|_| status.state == State::Running).map(Some).ok_or_else(gone)
    })
}

/// The same of a pod whose monitor has hung up, and may take a moment more to end.
pub(crate) fn settle_at_its_end(pod: &Pod) -> Result<Option<ProcessKey>> {
    let until = Instant::now() + ENDING;
    let is_ending = || pod.dir().exists() && pod.status().is_ok_and(|status| status.let_go && !was_left(&status));
    while is_ending() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(2));
    }
    settle(pod)
}

/// Lets a pod run in the place of its monitor; doing it twice is no harm. `event`: what has become of it then.
pub(crate) fn finish(pod: &Pod, event: &str) -> Result<()> {
    let status = pod.status()?;
    let Some(init) = status.init.filter(ProcessKey::alive) else { return it_ended(pod) };
    let (spec, cgroup) = (pod.spec()?, Cgroup::open(pod.id())?);
    let dir = pod.store().network_dir()?;
    match Attachment::open(&dir, &spec, Some(init.pid)) {
        Ok(attachment) => {
            logged("the pod is not on the network", attachment.join());
            logged("the bridge does not learn where the pod is", attachment.notice(true));
            logged("the neighbours were not told of the pod", attachment.announce());
        }
        Err(problem) => logged("the pod is not on the network", Err(problem)),
    }
    wait_for_the_opener(init.pid, &cgroup)?;
    cgroup.thaw()?;
    pod.update_quickly(|status| {
        status.state = State::Running;
        status.started = Some(now());
        status.job = None;
        status.let_go = false;
    })?;
    pod.store().event(pod, event, &[]);
    logged("published ports are not open", network::publish(&dir, &spec));
    Ok(())
}

/// It ran here, and has ended with nobody there, as in a power cut: what it left is the only copy.
fn it_ended(pod: &Pod) -> Result<()> {
    pod.update(|status| {
        status.state = State::Dead;
        status.init = None;
        status.started = status.started.or_else(|| Some(now()));
        status.job = None;
        status.let_go = false;
    })?;
    Ok(())
}

/// Until nothing is in the pod's pid namespace but what is in its cgroup. What has ended and is not waited for is in none, and
/// what was born a moment ago is in none that was read before.
fn wait_for_the_opener(init: i32, cgroup: &Cgroup) -> Result<()> {
    let space = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let own = space(init);
    let deadline = Instant::now() + LETTING_GO;
    loop {
        let pids = fs::read_dir(Path::new("/proc")).into_iter().flatten().flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let inside: Vec<i32> = pids.filter(|pid| space(*pid) == own && !has_ended(*pid)).collect();
        let members = cgroup.procs()?;
        if own.is_none() || inside.iter().all(|pid| members.contains(pid) || has_ended(*pid)) {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(Problem::new("E-SYSTEM", "the pod's connections are not let go"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn has_ended(pid: i32) -> bool {
    let stat = proc::read(format!("/proc/{pid}/stat")).ok().and_then(|text| stat::parse(&text));
    stat.is_none_or(|stat| matches!(stat.state, 'Z' | 'X'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_not_waited_for_has_ended() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id() as i32;
        let until = Instant::now() + Duration::from_secs(10);
        while !has_ended(pid) {
            assert!(Instant::now() < until, "it runs");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(Path::new(&format!("/proc/{pid}/ns/pid")).symlink_metadata().is_ok(), "it is still there");
        child.wait().unwrap();
        assert!(has_ended(pid) && !has_ended(std::process::id() as i32));
    }
}
