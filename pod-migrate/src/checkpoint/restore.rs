//! From a checkpoint to a pod that runs.
//!
//! The file is read through once before anything of it is used, but for the bytes of memory, which are compared as they
//! are read into tasks that do not run before all of it fitted. The pod comes back with its own identity, and then
//! refuses to come back while it still exists, or with a new one (a clone). What an ended pod of the same identity has
//! in the store is put aside until the restored one runs.
//!
//! Who is killed meanwhile, and what then:
//!
//! | killed | when | what becomes of the pod |
//! |---|---|---|
//! | `pod restore` | before its monitor was forked | as it was before: the store's sweep puts back what was aside |
//! | | later | the monitor goes on alone, and the pod runs |
//! | the monitor | before `letting_go::decide` | nobody has heard of it; `pod restore` removes what there is, or the next sweep |
//! | | after it | it runs without a monitor: `pod restore` lets it go, or the next `pod ps` |

use super::{Identity, open_verified};
use crate::arrival::{self, Reservation, origin};
use crate::image::{Reader, Record, damaged};
use crate::letting_go::{self, logged};
use crate::objects::files::opener;
use crate::restore::{self, Ahead, Manner, Running, filler};
use pod_runtime::birth::{Clocks, Conceived};
use pod_runtime::lifecycle;
use pod_runtime::monitor::{self, About, Beginning, Filled, Filling, Launch, Newborn, Size};
use pod_runtime::network::{self, Attachment, Claim};
use pod_runtime::spec::{Address, Spec};
use pod_runtime::status::{State, now};
use pod_runtime::store::{Pod, Store, new_id};
use pod_runtime::usher::Inside;
use pod_runtime::{Doing, Problem, Result};
use serde::Serialize;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The pod that the checkpoint is of still exists.
pub const STILL: &str = "E-STILL-RUNNING";

#[derive(Debug, Clone, Default)]
pub struct Options {
    /// A new pod of this name with an id of its own, beside the original.
    pub name: Option<String>,
    /// Another address.
    pub address: Option<Address>,
    /// For a checkpoint that is encrypted.
    pub identities: Vec<Identity>,
    /// It runs before all of its memory is there: what it touches comes first, the rest behind it.
    pub lazily: bool,
}

/// The pod that runs again.
#[derive(Debug, Clone, Serialize)]
pub struct Restored {
    pub name: String,
    pub id: String,
    pub init: i32,
    pub total: Duration,
    pub warnings: Vec<String>,
}

pub fn restore(store: &Store, path: &Path, options: &Options) -> Result<Restored> {
    let began = Instant::now();
    let mut reader = open_verified(path, &options.identities)?;
    let origin = origin(&mut reader)?;
    let (spec, claim) = identity(origin.spec, options)?;
    let aside = Aside::make(store, &spec)?;
    let mut reservation = Reservation::take(store, spec, claim).map_err(advise)?;
    let note = format!("restored from a checkpoint of {}", origin.host);
    let (pod, spec) = (reservation.pod()?.clone(), reservation.spec.clone());
    let (name, id) = (spec.name.clone(), spec.id.clone());
    reservation.hand_over();
    let started = monitor::spawn(Launch {
        pod: pod.clone(),
        spec,
        beginning: Beginning::Fill(Box::new(Arriving {
            reader,
            note,
            sessions: Vec::new(),
            ahead: Ahead::default(),
            lazily: options.lazily,
        })),
        size: Size { rows: 24, columns: 80 },
        attach: false,
    });
    let started = match started {
        Ok(started) => Ok((started.init, started.warnings)),
        Err(problem) => match letting_go::settle_at_its_end(&pod) {
            Ok(None) => return Err(problem),
            Ok(Some(init)) => Ok((init.pid, vec![monitor::LOST.to_owned()])),
            Err(left) => Err(left),
        },
    };
    // One that has to run keeps what it has, also if it could not be let go yet.
    reservation.keep();
    aside.forget();
    let (init, warnings) = started?;
    Ok(Restored { name, id, init, total: began.elapsed(), warnings })
}

/// Whose pod it becomes.
fn identity(mut spec: Spec, options: &Options) -> Result<(Spec, Claim)> {
    let mut claim = Claim::Arriving;
    if let Some(name) = &options.name {
        spec.id = new_id()?;
        spec.name = name.clone();
        spec.network.mac = None;
        claim = Claim::New;
    }
    if let Some(address) = options.address {
        spec.network.addresses = vec![address];
        spec.network.gateways.clear();
        claim = Claim::New;
    }
    Ok((spec, claim))
}

fn advise(problem: Problem) -> Problem {
    if problem.code() != "E-ADDRESS-TAKEN" || problem.way_out().is_some_and(|fix| fix.contains("--ip")) {
        return problem;
    }
    problem.fix("give it another address: --ip ADDRESS/PREFIX (connections of the old address are closed then)")
}

/// In the monitor.
struct Arriving {
    reader: Reader<File>,
    /// For the log.
    note: String,
    /// Of `pod exec`.
    sessions: Vec<About>,
    ahead: Ahead,
    lazily: bool,
}

impl Filling for Arriving {
    fn files(&mut self, pod: &Pod, spec: &Spec, conceived: Option<&Conceived>, _: &Attachment) -> Result<Clocks> {
        let none = |record: &Record, _: &mut _| Err(arrival::misplaced(record));
        let (moment, _, ahead) = arrival::receive_at_rest(&mut self.reader, (pod, spec), conceived, &self.note, none)?;
        self.ahead = ahead;
        let clocks = arrival::clocks(&moment)?;
        self.sessions = moment.sessions;
        Ok(clocks)
    }

    fn at_rest(&self) -> bool {
        true
    }

    fn inside(&self) -> Option<Inside> {
        Some(opener::run_inside)
    }

    fn fill(self: Box<Self>, newborn: &mut Newborn) -> Result<Filled> {
        let manner = match self.lazily {
            true => Manner::Lazily(filler::Filling::begin(&newborn.pod)?),
            false => Manner::AtOnce,
        };
        let Arriving { reader, sessions, ahead, .. } = *self;
        fill(reader, sessions, (ahead, manner), newborn)
    }

    /// Whoever waits for the monitor hears it.
    fn failed(&mut self, _: &Problem) {}
}

fn fill(
    mut reader: Reader<File>,
    sessions: Vec<About>,
    (ahead, manner): (Ahead, Manner),
    newborn: &mut Newborn,
) -> Result<Filled> {
    arrival::receive_memory(&mut reader, newborn)?;
    // To the trailer, whose digest the reader compares.
    let more = |record: &Record| Err(damaged(format!("a {} record after the pod's memory", record.kind)));
    let mut restored = arrival::restore(&mut reader, newborn, ahead, manner, more)?;
    restored.outlive(&newborn.born.cgroup)?;
    network::publish(&newborn.pod.store().network_dir()?, &newborn.spec)?;
    // On the network its kernel answers its clients, before it runs.
    letting_go::decide(&newborn.pod)?;
    if let Err(problem) = newborn.attachment.as_ref().map_or(Ok(()), Attachment::join) {
        // It never was there, so nobody has heard of it.
        letting_go::decide_otherwise(&newborn.pod)?;
        return Err(problem);
    }
    let running = let_go(newborn, &mut restored);
    let mut filled = arrival::filled(running, sessions, false);
    filled.remains = Some(Box::new(restored));
    Ok(filled)
}

/// Nothing here fails: the pod has to run, also if this process ends.
fn let_go(newborn: &Newborn, restored: &mut restore::Restored) -> Running {
    if let Some(attachment) = &newborn.attachment {
        logged("the neighbours were not told of the pod", attachment.announce());
    }
    let went = restored.speak().and_then(|()| restored.go(&newborn.born.cgroup));
    let running = went.unwrap_or_else(|problem| monitor::abandon(&problem));
    let written = newborn.pod.update_quickly(|status| {
        status.state = State::Running;
        status.started = Some(now());
        status.let_go = false;
    });
    logged("that the pod runs could not be written down", written.map(drop));
    running
}

/// The folder of an ended pod of the same identity, out of the way; put back when dropped.
struct Aside {
    pod: Option<(PathBuf, PathBuf)>,
}

impl Aside {
    fn make(store: &Store, spec: &Spec) -> Result<Aside> {
        store.sweep()?;
        let Some(pod) = store.by_id(&spec.id) else { return Ok(Aside { pod: None }) };
        refuse_if_it_lives(&pod, spec)?;
        // What it has is given back after its end was written down, by names that the restored one takes again.
        if !lifecycle::monitor_leaves_within(&pod, LEAVING)? {
            tracing::warn!(pod = pod.id(), "the monitor of the pod that ended is still there");
        }
        // Its cgroup and cable went when it ended; should something be left, it goes now.
        lifecycle::give_back(&pod)?;
        // The store's sweep finds it by its name, should we be killed.
        let aside = store.data().join(format!(".aside-{}-{}", spec.id, std::process::id()));
        fs::rename(pod.dir(), &aside).doing(|| format!("put {} aside", pod.dir().display()))?;
        Ok(Aside { pod: Some((pod.dir(), aside)) })
    }

    /// The restored pod runs: the old one is not needed any more.
    fn forget(mut self) {
        if let Some((_, aside)) = self.pod.take()
            && let Err(error) = fs::remove_dir_all(&aside)
        {
            tracing::warn!(path = %aside.display(), %error, "what the pod was before could not be removed");
        }
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        if let Some((place, aside)) = &self.pod
            && !place.exists()
        {
            let _ = fs::rename(aside, place);
        }
    }
}

/// How long the monitor of the ended pod is waited for: it may have people to tell who do not listen.
const LEAVING: Duration = Duration::from_secs(5);

fn refuse_if_it_lives(pod: &Pod, spec: &Spec) -> Result<()> {
    let status = pod.status()?;
    let name = &spec.name;
    match status.state {
        State::Exited | State::Dead => Ok(()),
        State::Moved => {
            let to = status.moved_to.unwrap_or_default();
            let what = format!("pod '{name}' was moved to {to} and may run there");
            Err(Problem::new(STILL, what).fix("restore it there, or beside it as a new pod: -n NEW"))
        }
        state => Err(Problem::new(STILL, format!("pod '{name}' itself is still here, {state}"))
            .fix(format!("end it first (`pod stop {name}`), or restore beside it as a new pod: -n NEW"))),
    }
}
