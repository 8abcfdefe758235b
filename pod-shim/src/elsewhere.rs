//! Finding a pod again that has moved away.
//!
//! The way is the one that the pod took: the last job of it on this host says what ssh was told (or whose daemon), and ssh is asked again,
//! without questions, for it is not a person who asks now. There `pod relay` leads to the pod's monitor, or if the pod
//! has moved on, along its next way. So only a host that it was moved from needs to know where it was moved to.

use pod_migrate::link::dial::Dial;
use pod_migrate::migrate::journal::{Role, jobs};
use pod_runtime::monitor::client;
use pod_runtime::monitor::wire::{Attach, Request};
use pod_runtime::status::State;
use pod_runtime::store::{Pod, Store};
use pod_runtime::{Doing, Problem, Result};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

/// How long the other host may take to answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// The pod under this id, when it lives on this host.
pub fn here(store: &Store, id: &str) -> Option<Pod> {
    let pod = store.pod(id).ok().filter(|pod| pod.id() == id)?;
    let state = pod.status().ok()?.state;
    matches!(state, State::Running | State::Paused | State::Migrating).then_some(pod)
}

/// How the pod left this host.
fn way(store: &Store, id: &str) -> Result<Dial> {
    let left = jobs(store)?.into_iter().filter(|job| job.role == Role::Source && job.pod == id);
    let job = left.max_by_key(|job| (job.started, job.updated));
    let job = job.ok_or_else(|| Problem::new("E-NOJOB", "nothing here says how it was moved"))?;
    Ok(job.dial(store))
}

/// `pod VERB…` on the host that the pod went to.
pub fn there(store: &Store, id: &str, args: &[&str]) -> Result<Command> {
    let mut dial = way(store, id)?;
    dial.options.extend(["BatchMode=yes", "ConnectTimeout=10"].map(str::to_owned));
    let mut command = dial.command(args);
    // ctrl-c at our terminal is for us.
    command.process_group(0);
    Ok(command)
}

/// Attaches to the pod wherever it is now.
pub fn attach(store: &Store, id: &str, wanted: &Attach) -> Result<UnixStream> {
    if let Some(pod) = here(store, id) {
        return client::attach(&pod, wanted.clone()).map(|(stream, _)| stream);
    }
    let (mut ours, theirs) = UnixStream::pair().doing(|| "make a socket pair".into())?;
    let theirs = OwnedFd::from(theirs);
    let copy = theirs.try_clone().doing(|| "copy a descriptor".into())?;
    let mut command = there(store, id, &["relay", id])?;
    command.stdin(copy).stdout(theirs).stderr(Stdio::null());
    command.spawn().code("E-LINK", || "start ssh".into())?;
    // ssh alone has the other end now.
    drop(command);
    ours.set_read_timeout(Some(PATIENCE)).doing(|| "set up the connection".into())?;
    client::ask(&mut ours, &Request::Attach(wanted.clone()))?;
    ours.set_read_timeout(None).doing(|| "set up the connection".into())?;
    Ok(ours)
}
