//! The restore walk: from records to a pod that stands still and only has to be let go.
//!
//! It runs in the pod's new monitor, after birth has made the environment and parked the first process there:
//!
//! 1. [`Image::collect`]: everything but pages is read and checked against itself, before anything is made of it.
//! 2. [`tree`]: the opener opens what needs no other process; then every process is made with its own pid from the
//!    right parent, with its session and group, each nothing but the stub.
//! 3. [`memory`]: maps; [`pages`]: pages from the stream straight into their place, and beside it what came [`ahead`].
//! 4. [`finish`]: descriptors, per-process state, threads, per-thread state, credentials, filters; registers last.
//! 5. [`Restored::speak`]: connections leave repair mode; [`Restored::go`]: everything is detached.
//!
//! Until [`Restored::outlive`] every task dies with the tracer (PTRACE_O_EXITKILL), and until [`Restored::speak`] dropping what
//! was made kills the first process and all others with it: a restore that fails leaves nothing.

mod ahead;
mod check;
mod errand;
pub mod filler;
mod finish;
pub(crate) mod heritage;
mod lazy;
mod memory;
mod nursery;
mod pages;
mod plan;
mod premade;
mod same;
mod sow;
mod tree;

pub use ahead::Ahead;
pub(crate) use ahead::latest;

use crate::crew;
use crate::ids::{FileId, MmId, PodPid, SharedMemoryId};
use crate::image::{Kind, Reader, Record, damaged};
use crate::laps::lap;
use crate::objects::files::opener::External;
use crate::objects::files::{self, File, Files, Opener, Opening};
use crate::objects::memory::behind::Behind;
use crate::objects::memory::forked::{Claim, Claims};
use crate::objects::memory::ranges::Ranges;
use crate::objects::memory::{Inherited, Kept, MmState, SharedMemoryState};
use crate::objects::namespaces::cgroups;
use crate::objects::namespaces::ipc::{self, IpcState};
use crate::objects::task::undo::Undo;
use crate::objects::task::{Filter, ProcessState, Seccomp, Tree, seccomp};
use crate::{Doing, Problem, Result};
use filler::Filling;
use lazy::Lazy;
use pod_runtime::birth::Born;
use pod_runtime::cgroup::Cgroup;
use pod_runtime::sys::memory as remote_memory;
use sow::Seed;
use std::collections::BTreeMap;
use std::io::Read;
use std::ops::Range;
use std::time::Duration;
use tree::Grown;

/// So many records are understood at once.
const CROWD: usize = 256;

/// Every task has stopped already when the cgroup is frozen.
const FREEZING: Duration = Duration::from_secs(5);

/// All records of an image but its pages, by id.
#[derive(Debug, Default)]
pub struct Image {
    pub tree: Option<Tree>,
    pub processes: BTreeMap<PodPid, ProcessState>,
    pub spaces: BTreeMap<MmId, MmState>,
    pub shared: BTreeMap<SharedMemoryId, SharedMemoryState>,
    /// What still holds of the pages that came ahead.
    pub kept: BTreeMap<MmId, Ranges>,
    /// What comes when the pod runs.
    pub behind: BTreeMap<MmId, Ranges>,
    /// What spaces have from one another since a fork.
    pub claims: Claims,
    pub files: Files,
    pub ipc: IpcState,
    pub cgroups: Vec<cgroups::Group>,
    pub undos: Vec<Undo>,
}

impl Image {
    /// Reads records until the stream says that pages follow. Records of other parts (storage, network) are handed to
    /// `other`, which may read their raw bytes.
    pub fn collect<R: Read>(
        reader: &mut Reader<R>,
        mut other: impl FnMut(&Record, &mut Reader<R>) -> Result<()>,
    ) -> Result<Image> {
        let mut image = Image::default();
        // A space may have several records.
        let mut kept: BTreeMap<MmId, Vec<Range<u64>>> = BTreeMap::new();
        let mut behind = kept.clone();
        let mut large = Vec::new();
        loop {
            let Some(record) = reader.next()? else { return Err(damaged("the image ends before its pages")) };
            match record.kind {
                Kind::READY_FOR_PAGES => break,
                Kind::TREE => {
                    lap("wait for the tree");
                    image.tree = Some(record.state()?);
                }
                Kind::PROCESS | Kind::MM | Kind::FILE => {
                    large.push(record);
                    if large.len() == CROWD {
                        image.take_in(&std::mem::take(&mut large))?;
                    }
                }
                Kind::SHARED_MEMORY => insert(&mut image.shared, SharedMemoryId(record.id), record.state()?)?,
                Kind::KEPT => {
                    let Kept { ranges } = record.state()?;
                    let more = ranges.into_iter().map(|(start, end)| start..end);
                    kept.entry(MmId(record.id)).or_default().extend(more);
                }
                Kind::BEHIND => {
                    let Behind { ranges } = record.state()?;
                    let more = ranges.into_iter().map(|(start, end)| start..end);
                    behind.entry(MmId(record.id)).or_default().extend(more);
                }
                Kind::INHERITED => {
                    let Inherited { ranges } = record.state()?;
                    let claim = |(from, start, end)| Claim { from: MmId(from), range: start..end };
                    image.claims.entry(MmId(record.id)).or_default().extend(ranges.into_iter().map(claim));
                }
                Kind::FD_TABLE => insert(&mut image.files.tables, crate::ids::FdTableId(record.id), record.state()?)?,
                Kind::IPC => image.ipc = record.state()?,
                Kind::UNDO => image.undos = record.state()?,
                Kind::CGROUPS => image.cgroups = record.state()?,
                _ => other(&record, reader)?,
            }
        }
        lap("records");
        let ranges = |of: BTreeMap<MmId, Vec<Range<u64>>>| -> BTreeMap<MmId, Ranges> {
            of.into_iter().map(|(mm, ranges)| (mm, Ranges::of_any(ranges))).collect()
        };
        (image.kept, image.behind) = (ranges(kept), ranges(behind));
        image.take_in(&large)?;
        image.files.share_options()?;
        check::image(&image)?;
        lap("check");
        Ok(image)
    }

    /// Records of processes, of their memory and of files: what takes longest to understand.
    fn take_in(&mut self, records: &[Record]) -> Result<()> {
        enum Understood {
            Process(ProcessState),
            Space(MmState),
            File(Box<File>),
        }
        let understood = crew::share(records.len(), |at| match records[at].kind {
            Kind::PROCESS => records[at].state().map(Understood::Process),
            Kind::FILE => records[at].state().map(Understood::File),
            _ => records[at].state().map(Understood::Space),
        });
        for (record, understood) in records.iter().zip(understood) {
            match understood? {
                Understood::Process(state) => insert(&mut self.processes, PodPid(record.id as i32), state)?,
                Understood::Space(state) => insert(&mut self.spaces, MmId(record.id), state)?,
                Understood::File(file) => insert(&mut self.files.files, FileId(record.id), *file)?,
            }
        }
        Ok(())
    }

    /// The seccomp filters of a task, oldest first.
    fn filters<'a>(&'a self, seccomp: &'a Seccomp) -> Result<&'a [Filter]> {
        seccomp::chain(seccomp, |pid| Some(&self.processes.get(&pid)?.threads.first()?.seccomp))
    }

    fn nodes(&self) -> &[crate::objects::task::Node] {
        self.tree.as_ref().map_or(&[], |tree| &tree.processes)
    }
}

fn insert<K: Ord + std::fmt::Display, V>(map: &mut BTreeMap<K, V>, key: K, value: V) -> Result<()> {
    let text = key.to_string();
    match map.insert(key, value) {
        None => Ok(()),
        Some(_) => Err(damaged(format!("the image has two records for {text}"))),
    }
}

/// A pod that is complete and stands still. Dropping it ends it.
pub struct Restored {
    grown: Grown,
    opener: Opener,
    image: Image,
    external: External,
}

/// How a pod is put together.
pub enum Manner {
    /// Whole, by who lets it go.
    AtOnce,
    /// From a file, most of its memory when it runs already ([`lazy`]).
    Lazily(Filling),
    /// From a link, by a job, with memory behind it if the source says so.
    Behind(Filling, String),
}

/// Puts the pod together around the parked first process; `ahead` is what came of its memory before. `reader`
/// stands behind READY_FOR_PAGES; `other` gets the records that are not pages. Ends behind the stream's trailer, or where `until` says that enough was read.
pub fn restore<R: Read>(
    (image, mut ahead): (Image, Ahead),
    reader: &mut Reader<R>,
    born: &mut Born,
    manner: Manner,
    mut other: impl FnMut(&Record, &mut Reader<R>) -> Result<bool>,
) -> Result<Restored> {
    let opening = Opening::begin(born, plan::free_pid(&image, 0))?;
    lap("opener");
    let mut heritage = sow::plan(&image, &ahead.usable(&image));
    let laid = ahead.settle(&image, &heritage.foreign(PodPid(1), nursery::FIRST))?;
    lap("settle");
    ipc::restore(born.init, &image.ipc)?;
    let file = reader.file().map(std::fs::File::try_clone).transpose().doing(|| "copy a descriptor".into())?;
    let seed = Seed { heritage: &heritage, ahead: &ahead, laid: &laid, file: file.as_ref() };
    let (mut grown, mut opener) = tree::grow(&image, born, &seed, opening, ahead.shared(&image)?)?;
    lap("tree");
    let copied = std::mem::take(&mut heritage.copied);
    let laid = sow::laid(heritage, laid, &grown);
    let own = opener.pid();
    opener.connect(|errand| errand::run(&grown, own, errand))?;
    lap("connect");
    opener.leave(&born.cgroup, plan::free_pid(&image, 2))?;
    let shared = memory::map_all((&image, ahead.shared(&image)?), &mut grown, &laid, &opener)?;
    lap("maps");
    let mut lazy = match manner {
        Manner::Lazily(filling) => Some(Lazy::open(&image, &grown, filling)),
        Manner::Behind(filling, job) if !image.behind.is_empty() => Some(Lazy::behind(&image, &grown, (filling, job))?),
        Manner::AtOnce | Manner::Behind(..) => None,
    };
    if lazy.is_none() && !image.behind.is_empty() {
        return Err(damaged("the image has pages behind it, and nobody who brings them"));
    }
    pages::fill((&image, &grown, &opener), shared, (&ahead, &laid, &copied), (reader, lazy.as_mut()), &mut other)?;
    lap("pages");
    drop(ahead);
    opener.hand_on(&born.cgroup)?;
    // From here on the pod's memory may be waited for, by us, too.
    if let Some(lazy) = lazy {
        // It is forked, and by one thread.
        opener.has_left(&born.cgroup)?;
        lazy.start(reader.file(), born.init)?;
    }
    let external = opener.external()?;
    lap("external");
    finish::finish(&image, &mut grown, &opener)?;
    cgroups::enter(&image.cgroups, &born.cgroup, |pid| grown.stubs.get(&pid).map(|stub| stub.task))?;
    lap("groups");
    Ok(Restored { grown, opener, image, external })
}

/// What the monitor takes over from a restore.
#[derive(Debug)]
pub struct Running {
    pub external: External,
    /// Processes besides the first whose parent is the monitor, as this host numbers them.
    pub roots: Vec<i32>,
}

impl Restored {
    /// The pod's own memory in use, bytes: for reports.
    pub fn processes(&self) -> usize {
        self.image.processes.len()
    }

    /// Has the pod outlive this process: held still by its cgroup, not by us. Until then it dies with us, which is right
    /// as long as nobody has heard of it, and wrong afterwards.
    pub fn outlive(&mut self, cgroup: &Cgroup) -> Result<()> {
        self.opener.has_left(cgroup)?;
        self.opener.arm()?;
        cgroup.freeze(FREEZING)?;
        self.grown.outlive(&self.image)
    }

    /// Connections speak again, which their kernel does: no task runs. From here on there is no way back: who must not end a
    /// pod that does not get to run must not drop this after an error.
    pub fn speak(&mut self) -> Result<()> {
        self.opener.release()
    }

    /// Lets the pod run, which speaks already and which its cgroup holds besides us.
    pub fn go(&mut self, frozen: &Cgroup) -> Result<Running> {
        self.opener.dismiss();
        let roots = self.grown.detach(&self.image)?;
        frozen.thaw()?;
        Ok(Running { external: std::mem::take(&mut self.external), roots })
    }
}

/// Calls that a process makes itself once its descriptors are in place.
fn task_work(image: &Image, state: &ProcessState) -> Vec<crate::remote::RemoteCall> {
    files::task_work(&image.files, state.pid, state.fd_table)
}

fn write_memory(task: crate::ids::HostPid, address: u64, bytes: &[u8]) -> Result<()> {
    remote_memory::write(task.0, bytes, &[(address, bytes.len())])
        .doing(|| format!("write {} bytes at {address:#x} of task {task}", bytes.len()))
}

fn no_room() -> Problem {
    Problem::new("E-ADDRESS-SPACE", "no address is free in all processes of the pod for the engine's own page")
}
