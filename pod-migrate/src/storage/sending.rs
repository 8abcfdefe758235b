//! Which layers go out when: those on disk, and those in memory that the other host has already, while the pod runs, over
//! and over; all of them once more when it stands still, and then only what changed.

use super::walk::{Inventory, Manner, Mapped, Sent, Tree, walk};
use super::{Layer, Place, layers_at_rest, layers_in_memory};
use crate::image::{Kind, Writer};
use pod_runtime::Result;
use pod_runtime::cgroup::Cgroup;
use pod_runtime::proc::maps::{self, Map};
use pod_runtime::rootfs::folders_in_memory;
use pod_runtime::spec::Spec;
use pod_runtime::store::Pod;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// After so long, what a running pod has written is worth a pass.
const STALE: Duration = Duration::from_millis(200);
/// A pass that is over sooner costs nothing that counts.
const QUICK: Duration = Duration::from_millis(100);

/// The files of a pod that are on their way.
#[derive(Debug)]
pub struct Sending {
    pod: Pod,
    spec: Spec,
    init: i32,
    cgroup: Cgroup,
    /// To a host that takes changes of files, and file systems in memory before the pod stands still; else to an image.
    to_a_host: bool,
    sent: BTreeMap<Place, Inventory>,
    /// Files that were mapped for writing at a pass.
    mapped: BTreeMap<Place, Mapped>,
    next_id: u64,
    files: Sent,
    began: Option<Instant>,
    /// How long the last passes took while the pod ran, the latest first.
    took: [Option<Duration>; 2],
}

impl Sending {
    pub fn new(pod: &Pod, spec: &Spec, init: i32, cgroup: &Cgroup) -> Sending {
        Sending {
            pod: pod.clone(),
            spec: spec.clone(),
            init,
            cgroup: cgroup.clone(),
            to_a_host: false,
            sent: BTreeMap::new(),
            mapped: BTreeMap::new(),
            next_id: 1,
            files: Sent::default(),
            began: None,
            took: [None; 2],
        }
    }

    /// The other side is a host that knows changes of files. Before the first pass.
    pub fn to_a_host(&mut self) {
        self.to_a_host = true;
    }

    /// In all.
    pub fn done(&self) -> Sent {
        self.files
    }

    /// One pass while the pod runs. `made_inside` are places at which the pod has mounted something itself.
    pub fn ahead<W: Write>(&mut self, w: &mut Writer<W>, made_inside: Option<BTreeSet<Vec<u8>>>) -> Result<()> {
        let began = Instant::now();
        self.began = Some(began);
        self.all(w, made_inside)?;
        self.took = [Some(began.elapsed()), self.took[0]];
        Ok(())
    }

    fn all<W: Write>(&mut self, w: &mut Writer<W>, made_inside: Option<BTreeSet<Vec<u8>>>) -> Result<()> {
        // What they have mapped now they may have written to before it is looked at, and have unmapped by then.
        for pid in self.cgroup.procs()? {
            let text = std::fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
            self.note(&maps::parse(&String::from_utf8_lossy(&text)));
        }
        // Whole files that are mapped are sent when it stands still, and not in every pass before.
        self.disks(w, self.to_a_host)?;
        let Some(made_inside) = made_inside.filter(|_| self.to_a_host) else { return Ok(()) };
        // Where the other host has the same, it is there by now. What lies below another mount is nobody's.
        let there = folders_in_memory(&self.spec).iter().map(|folder| folder.as_bytes());
        let there: BTreeSet<&[u8]> = there.filter(|folder| !made_inside.contains(*folder)).collect();
        // What is being mounted this moment is for later.
        let Ok(layers) = layers_in_memory(self.init) else { return Ok(()) };
        for (place, tree) in layers {
            let other = self.sent.get(&place).is_some_and(|before| !before.is_of(&tree));
            if !other && matches!(&place, Place::Memory(path) if there.contains(&path[..])) {
                self.layer(w, place, &tree, true)?;
            }
        }
        Ok(())
    }

    /// Whether another pass while the pod runs is worth its time: the last one began long ago, measured by what it took. (One over
    /// many files takes what it takes, however little has changed, and memory is written meanwhile.)
    pub fn is_stale(&self) -> bool {
        let age = self.began.map_or(Duration::ZERO, |began| began.elapsed());
        let pays = match self.took {
            [Some(last), Some(before)] => last < QUICK || last < before / 2 || last < age / 4,
            _ => true,
        };
        age >= STALE && pays
    }

    /// What changed on disk since the pass before. The pod stands still, and these are all its maps.
    pub fn at_rest<'a, W: Write>(&mut self, w: &mut Writer<W>, maps: impl Iterator<Item = &'a [Map]>) -> Result<()> {
        maps.for_each(|maps| self.note(maps));
        self.disks(w, true)
    }

    /// A file system in memory, when the pod stands still.
    pub fn in_memory<W: Write>(&mut self, w: &mut Writer<W>, place: Place, tree: &Tree) -> Result<()> {
        self.mapped.entry(place.clone()).or_default().any = true;
        self.layer(w, place, tree, true)
    }

    fn note(&mut self, maps: &[Map]) {
        for map in maps {
            if map.shared && map.write && map.name.starts_with('/') && !map.name.ends_with(" (deleted)") {
                let (place, path) = place_of(&self.spec, Path::new(&map.name));
                self.mapped.entry(place).or_default().paths.insert(path);
            }
        }
    }

    fn disks<W: Write>(&mut self, w: &mut Writer<W>, with_mapped: bool) -> Result<()> {
        for (place, tree) in layers_at_rest(&self.pod, &self.spec)? {
            self.layer(w, place, &tree, with_mapped)?;
        }
        Ok(())
    }

    /// `with_mapped`: those too that are mapped and have their old stamp.
    fn layer<W: Write>(&mut self, w: &mut Writer<W>, place: Place, tree: &Tree, with_mapped: bool) -> Result<()> {
        let manner = if self.to_a_host { Manner::Blocks } else { Manner::Whole };
        let before = self.sent.get(&place).filter(|before| before.is_of(tree));
        let none = Mapped::default();
        let mapped = self.mapped.get(&place).filter(|_| with_mapped).unwrap_or(&none);
        let layer = Layer { place: place.clone(), delta: before.is_some(), single: tree.single() };
        w.put(Kind::STORAGE, 0, &layer)?;
        let (inventory, sent) = walk(tree, w, &mut self.next_id, before, mapped, manner)?;
        w.put(Kind::STORAGE_END, 0, &())?;
        self.files.files += sent.files;
        self.files.bytes += sent.bytes;
        self.files.removed += sent.removed;
        self.sent.insert(place, inventory);
        Ok(())
    }
}

/// Which layer on disk a path of the pod belongs to, and its path there.
fn place_of(spec: &Spec, path: &Path) -> (Place, Vec<u8>) {
    let below = spec
        .volumes
        .iter()
        .enumerate()
        .filter_map(|(n, volume)| path.strip_prefix(&volume.destination).ok().map(|rest| (n, volume, rest)))
        .max_by_key(|(_, volume, _)| volume.destination.as_os_str().len());
    match below {
        Some((n, volume, rest)) if rest.as_os_str().is_empty() => {
            (Place::Volume(n), volume.source.file_name().unwrap_or_default().as_bytes().to_vec())
        }
        Some((n, _, rest)) => (Place::Volume(n), rest.as_os_str().as_bytes().to_vec()),
        None => (Place::Upper, path.strip_prefix("/").unwrap_or(path).as_os_str().as_bytes().to_vec()),
    }
}
