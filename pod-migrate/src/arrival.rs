//! The destination side of a migration and of a restore: records in, a pod that stands ready out.
//!
//! The files that are on disk come before the pod is born, because the overlay must not change under a mount; what is
//! in memory (tmpfs contents, then the tasks) comes after, in the monitor ([`fill`]).

use crate::capture::{Moment, Origin, clock};
use crate::image::{Kind, Owner, PageRun, Reader, Record, damaged};
use crate::objects::files::opener::External;
use crate::objects::files::{FileState, socket};
use crate::objects::namespaces::{self, cgroups, mounts, settings, uts};
use crate::restore::{self, Ahead, Image, Manner, Restored, Running};
use crate::storage::{self, Arrived, Layer, Place, Writing, volumes};
use nix::time::ClockId;
use pod_runtime::birth::{Clocks, Conceived};
use pod_runtime::monitor::log::{self, Log};
use pod_runtime::monitor::{About, Arrived as ArrivedSession, Filled, Newborn};
use pod_runtime::spec::{Spec, VERSION};
use pod_runtime::store::{self, Pod, Store};
use pod_runtime::{Doing, Problem, Result, lifecycle, network};
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;

/// Reads the first record and refuses what can be refused by it.
pub fn origin<R: Read>(reader: &mut Reader<R>) -> Result<Origin> {
    let Some(record) = reader.next()? else { return Err(damaged("the image is empty")) };
    if record.kind != Kind::SPEC {
        return Err(damaged(format!("the image begins with a {} record", record.kind)));
    }
    let origin: Origin = record.state()?;
    check_spec(&origin.spec)?;
    Ok(origin)
}

/// A spec that comes from elsewhere: what becomes part of a path must be what it says.
pub fn check_spec(spec: &Spec) -> Result<()> {
    if spec.version != VERSION {
        let what = format!("the pod was made by a version of pod with specs of version {}", spec.version);
        return Err(Problem::new(crate::image::VERSION, what).fix("use that version, or a newer one"));
    }
    store::check_id(&spec.id)?;
    store::check_name(&spec.name)?;
    let absolute = |path: &std::path::Path| path.is_absolute() && !path.components().any(|c| c.as_os_str() == "..");
    let bad = spec.volumes.iter().find(|v| !absolute(&v.source) || !absolute(&v.destination));
    if let Some(volume) = bad {
        return Err(damaged(format!("the volume {} is no absolute path", volume.source.display())));
    }
    Ok(())
}

/// A pod's place on this host: name, id, address, ports, folders. Given back when dropped.
#[derive(Debug)]
pub struct Reservation {
    pod: Option<Pod>,
    pub spec: Spec,
    volumes: volumes::Claimed,
}

impl Reservation {
    pub fn take(store: &Store, mut spec: Spec, claim: network::Claim) -> Result<Reservation> {
        let volumes = volumes::claim(store, &spec)?;
        let pod = store.reserve(&spec)?;
        let mut reservation = Reservation { pod: Some(pod.clone()), spec: spec.clone(), volumes };
        network::lease(&store.network_dir()?, &mut spec, claim)?;
        if spec.network != reservation.spec.network {
            pod.set_spec(&spec)?;
        }
        reservation.spec = spec;
        Ok(reservation)
    }

    pub fn pod(&self) -> Result<&Pod> {
        self.pod.as_ref().ok_or_else(|| Problem::new("E-SYSTEM", "the reservation was given away"))
    }

    /// The monitor has taken over: from here on it removes the pod if anything fails.
    pub fn hand_over(&mut self) {
        self.pod = None;
    }

    /// The pod runs.
    pub fn keep(mut self) {
        self.pod = None;
        std::mem::take(&mut self.volumes).keep();
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(pod) = self.pod.take()
            && let Err(problem) = lifecycle::remove(&pod)
        {
            tracing::warn!(problem = problem.chain(), "what had arrived of a pod could not be removed");
        }
    }
}

/// Receives what lies on disk, up to the moment of the freeze, and what comes of its memory. `from` reads as "moved here
/// from hostA" in the log; `other` is shown what is none of it.
pub fn receive_at_rest<R: Read>(
    reader: &mut Reader<R>,
    (pod, spec): (&Pod, &Spec),
    conceived: Option<&Conceived>,
    from: &str,
    mut other: impl FnMut(&Record, &mut Reader<R>) -> Result<()>,
) -> Result<(Moment, Arrived, Ahead)> {
    let (mut arrived, mut ahead) = (Arrived::default(), Ahead::default());
    loop {
        let Some(record) = reader.next()? else { return Err(damaged("the image ends before the pod's processes")) };
        match record.kind {
            Kind::PLACES => conceived.map_or(Ok(()), |conceived| ahead.expect(&record, conceived))?,
            Kind::AHEAD_PAGES => record.run.map_or(Ok(()), |run| ahead.take(run, reader))?,
            Kind::SHARED_MEMORY if conceived.is_some() => ahead.share(&record)?,
            Kind::SHARED_PAGES if conceived.is_some() => record.run.map_or(Ok(()), |run| ahead.take(run, reader))?,
            Kind::STORAGE => {
                let layer: Layer = record.state()?;
                let root: OwnedFd = match &layer.place {
                    Place::Upper => {
                        let upper = pod.upper_dir();
                        File::open(&upper).doing(|| format!("open {}", upper.display()))?.into()
                    }
                    Place::Volume(n) => match spec.volumes.get(*n) {
                        Some(volume) if !volume.shared && !volume.read_only => {
                            volumes::root(volume, layer.single, layer.delta)?
                        }
                        _ => return Err(damaged("contents of a volume that the pod does not have")),
                    },
                    Place::Memory(path) => match conceived.and_then(|conceived| conceived.in_memory(path)) {
                        Some(root) => root?,
                        None => return Err(damaged("the contents of memory come too early")),
                    },
                };
                let more = storage::receive_layer(reader, Writing::new(root, false))?;
                arrived.files += more.files;
                arrived.bytes += more.bytes;
            }
            Kind::LOG => receive_log(reader, pod, spec, &record)?,
            Kind::MOMENT => {
                note(pod, spec, from)?;
                return Ok((record.state()?, arrived, ahead));
            }
            _ => other(&record, reader)?,
        }
    }
}

/// A record that belongs elsewhere.
pub fn misplaced(record: &Record) -> Problem {
    damaged(format!("a {} record among the files", record.kind))
}

/// What the pod's clocks must show more than this host's, to go on from where they stopped.
pub fn clocks(moment: &Moment) -> Result<Clocks> {
    let offset = |then: i64, id| -> Result<i128> { Ok(i128::from(then) - i128::from(clock(id)?)) };
    Ok(Clocks {
        monotonic: offset(moment.monotonic, ClockId::CLOCK_MONOTONIC)?,
        boottime: offset(moment.boottime, ClockId::CLOCK_BOOTTIME)?,
    })
}

/// Receives what was made inside the newborn's namespaces and the contents of its tmpfs mounts; the record after them
/// stays in the reader.
pub fn receive_memory<R: Read>(reader: &mut Reader<R>, newborn: &Newborn) -> Result<Arrived> {
    let mut arrived = Arrived::default();
    while let Some(record) = reader.next()? {
        let (init, spec) = (newborn.born.init, &newborn.spec);
        match record.kind {
            Kind::NETWORK => namespaces::network::restore(init, &record.state()?, spec)?,
            Kind::SETTINGS => settings::restore(init, &record.state::<Vec<_>>()?, spec)?,
            Kind::UTS => uts::restore(init, &record.state()?, &spec.security)?,
            Kind::MOUNTS => mounts::restore(init, &record.state::<Vec<mounts::Inside>>()?, &spec.security)?,
            Kind::STORAGE => {
                let layer: Layer = record.state()?;
                let Place::Memory(path) = &layer.place else { return Err(damaged("files on disk come too late")) };
                let root = storage::open_memory(newborn.born.init, path)?;
                let more = storage::receive_layer(reader, Writing::new(root, layer.place.keeps_existing()))?;
                arrived.files += more.files;
                arrived.bytes += more.bytes;
            }
            _ => {
                reader.put_back(record);
                return Ok(arrived);
            }
        }
    }
    Err(damaged("the image ends before the pod's processes"))
}

fn receive_log<R: Read>(reader: &mut Reader<R>, pod: &Pod, spec: &Spec, record: &Record) -> Result<()> {
    let Some(run) = record.run.filter(|run| run.owner == Owner::Log) else { return Err(damaged("a log of nothing")) };
    let here = || "write the pod's log".into();
    // Its limits are the pod's own, also those that a hostile image has.
    let mut log = Log::resume(&pod.dir(), spec.log).doing(here)?;
    reader.each_piece(run.address, &mut vec![0; 64 << 10], |at, lines| log.receive(at, lines).doing(here))
}

/// A line of our own in the pod's log.
fn note(pod: &Pod, spec: &Spec, text: &str) -> Result<()> {
    let log = Log::open(&pod.dir(), spec.log);
    let written = log.and_then(|mut log| log.write(log::Stream::Note, format!("{text}\n").as_bytes()));
    written.doing(|| "write the pod's log".into())
}

/// Fills the newborn from the records and pages that come now. It stands ready then, all of it stopped. `until` is
/// shown each record that is no part of the pod and says whether it is the last.
pub fn restore<R: Read>(
    reader: &mut Reader<R>,
    newborn: &mut Newborn,
    mut ahead: Ahead,
    manner: Manner,
    mut until: impl FnMut(&Record) -> Result<bool>,
) -> Result<Restored> {
    let foreign = |record: &Record| damaged(format!("a {} record among the pod's own", record.kind));
    let image = Image::collect(reader, |record, reader| match record.run {
        Some(run @ PageRun { owner: Owner::Ahead(_), .. }) => ahead.take(run, reader),
        _ => Err(foreign(record)),
    })?;
    for file in image.files.files.values() {
        if let FileState::Socket(state) = &file.state {
            socket::permitted(state, &newborn.spec.security)?;
        }
    }
    cgroups::restore(&image.cgroups, &newborn.born.cgroup, &newborn.spec.security)?;
    restore::restore((image, ahead), reader, &mut newborn.born, manner, |record, _| until(record))
}

/// What the monitor takes over from a pod that runs. `sessions` are those that the image speaks of; `awaited`: the clients that they had may come back.
pub fn filled(running: Running, sessions: Vec<About>, awaited: bool) -> Filled {
    let Running { external: External { stdin, stdout, stderr, console, sessions: mut ends, others }, roots } = running;
    let arrived = |about: About| ArrivedSession { fds: ends.remove(&about.id).unwrap_or_default(), about };
    let sessions = sessions.into_iter().map(arrived).collect();
    Filled { console, stdin, stdout, stderr, roots, sessions, awaited, others, remains: None }
}
