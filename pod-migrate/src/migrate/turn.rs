//! Whose turn it is with a pod: one tool at a time saves or moves it.
//!
//! Who wants to move a pod that is being saved waits, because that ends by itself and an operator who empties a host does not
//! care what else was under way. Who wants to move one that is being moved is told by which job: it will not be here.

use super::journal::{Role, jobs};
use super::progress::Event;
use super::source::Listener;
use crate::capture::{BUSY, Capture};
use crate::link::Interrupt;
use pod_runtime::store::{Pod, Store};
use pod_runtime::{Problem, Result};
use std::time::Duration;

const GLANCE: Duration = Duration::from_millis(20);

/// Begins to capture the pod, when nobody else does any more.
pub(super) fn take(store: &Store, pod: &Pod, interrupt: &Interrupt, listener: &Listener) -> Result<Capture> {
    let mut told = false;
    loop {
        match Capture::new(pod) {
            Err(problem) if problem.code() == BUSY => match mover(store, pod)? {
                Some(job) => return Err(moving(pod, &job)),
                None if told => {}
                None => {
                    told = true;
                    let text = "waiting, for the pod is being saved".to_owned();
                    (listener.borrow_mut())(&Event::Waiting { text });
                }
            },
            other => return other,
        }
        interrupt.check()?;
        std::thread::sleep(GLANCE);
    }
}

/// The job that moves it, if one does.
fn mover(store: &Store, pod: &Pod) -> Result<Option<String>> {
    let moves = |job: &super::journal::Job| {
        job.role == Role::Source && job.pod == pod.id() && !job.phase.is_over() && job.tool.alive()
    };
    Ok(jobs(store)?.into_iter().find(moves).map(|job| job.id))
}

fn moving(pod: &Pod, job: &str) -> Problem {
    let name = pod.name().unwrap_or_else(|_| pod.id().to_owned());
    Problem::new(BUSY, format!("pod '{name}' is being moved already, by job {job}"))
        .fix(format!("pod job info {job}; pod job abort {job} stops it before its commit"))
}
