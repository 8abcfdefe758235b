//! Volumes that travel: which folders of this host a pod may fill when it arrives.
//!
//! A volume that is not `shared` and can be written belongs to its pod; its contents travel with it and arrive under
//! the same path. A path that exists is filled only if it is empty or if it was the same pod's before: the pod moved
//! away from here or was saved here, and what lies there is its own old state. `DATA/volumes.json` remembers that.
//! A read-only volume is data of the host: it must be there.

use super::STORAGE;
use nix::fcntl::{Flock, FlockArg};
use pod_runtime::spec::{Spec, Volume};
use pod_runtime::store::{Store, read_json, write_json};
use pod_runtime::{Doing, Problem, Result};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A path that the pod would fill holds somebody else's data.
pub const TAKEN: &str = "E-VOLUME-TAKEN";
/// A path that the pod needs is not there.
pub const MISSING: &str = "E-VOLUME-MISSING";

/// Whose contents lie at a path.
type Owners = BTreeMap<PathBuf, String>;

/// Paths that were claimed for one arrival; taken back when dropped.
#[derive(Debug, Default)]
pub struct Claimed {
    made: Vec<PathBuf>,
}

/// What stands against filling the pod's volumes here.
pub fn check(store: &Store, spec: &Spec) -> Vec<Problem> {
    let owners = read(store).unwrap_or_default();
    spec.volumes.iter().filter_map(|volume| check_one(&owners, spec, volume).err()).collect()
}

fn check_one(owners: &Owners, spec: &Spec, volume: &Volume) -> Result<()> {
    let path = &volume.source;
    if volume.shared || volume.read_only {
        if path.exists() {
            return Ok(());
        }
        let kind = if volume.shared { "shared" } else { "read-only" };
        return Err(Problem::new(MISSING, format!("the {kind} volume {} is not on this host", path.display()))
            .fix(format!("mount or copy it to {} there, then try again", path.display())));
    }
    let empty = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => true,
        Ok(meta) if meta.is_dir() => fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none()),
        _ => false,
    };
    if empty || owners.get(path).is_some_and(|owner| *owner == spec.id) {
        return Ok(());
    }
    Err(Problem::new(TAKEN, format!("the volume {} would overwrite what is there on this host", path.display()))
        .fix("move that away, or declare the volume with `:shared` if it is the same storage on both hosts"))
}

/// Claims the paths of a pod that arrives. Until [`Claimed::keep`] dropping it takes back what it made.
pub fn claim(store: &Store, spec: &Spec) -> Result<Claimed> {
    if spec.volumes.is_empty() {
        return Ok(Claimed::default());
    }
    let _lock = lock(store)?;
    let mut owners = read(store)?;
    let mut claimed = Claimed::default();
    for volume in &spec.volumes {
        check_one(&owners, spec, volume)?;
        if !volume.shared && !volume.read_only {
            if !volume.source.exists() {
                claimed.made.push(volume.source.clone());
            }
            owners.insert(volume.source.clone(), spec.id.clone());
        }
    }
    write(store, &owners)?;
    Ok(claimed)
}

/// The pod leaves its contents here, or was saved here: it may find them again.
pub fn remember(store: &Store, spec: &Spec) -> Result<()> {
    if spec.volumes.iter().all(|v| v.shared || v.read_only) {
        return Ok(());
    }
    let _lock = lock(store)?;
    let mut owners = read(store)?;
    for volume in spec.volumes.iter().filter(|v| !v.shared && !v.read_only) {
        owners.insert(volume.source.clone(), spec.id.clone());
    }
    write(store, &owners)
}

/// Where the contents of a volume go. A first pass begins with nothing there.
pub fn root(volume: &Volume, single: bool, delta: bool) -> Result<OwnedFd> {
    let dir = if single { volume.source.parent().unwrap_or(Path::new("/")) } else { &volume.source };
    if !delta && !single && volume.source.exists() {
        for entry in fs::read_dir(dir).code(STORAGE, || format!("list {}", dir.display()))?.flatten() {
            let path = entry.path();
            let gone = if entry.file_type().is_ok_and(|t| t.is_dir()) {
                fs::remove_dir_all(&path)
            } else {
                fs::remove_file(&path)
            };
            gone.code(STORAGE, || format!("remove {}", path.display()))?;
        }
    }
    let made = fs::DirBuilder::new().recursive(true).mode(0o755).create(dir);
    made.code(STORAGE, || format!("make {}", dir.display()))?;
    File::open(dir).map(OwnedFd::from).code(STORAGE, || format!("open {}", dir.display()))
}

impl Claimed {
    /// The pod has arrived.
    pub fn keep(mut self) {
        self.made.clear();
    }
}

impl Drop for Claimed {
    fn drop(&mut self) {
        for path in &self.made {
            let gone = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
            if let Err(error) = gone
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!(path = %path.display(), %error, "what had arrived of a volume could not be removed");
            }
        }
    }
}

fn read(store: &Store) -> Result<Owners> {
    let path = store.data().join("volumes.json");
    if path.exists() { read_json(&path) } else { Ok(Owners::new()) }
}

fn write(store: &Store, owners: &Owners) -> Result<()> {
    write_json(&store.data().join("volumes.json"), owners)
}

fn lock(store: &Store) -> Result<Flock<File>> {
    let path = store.data().join("volumes.lock");
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let file = file.doing(|| format!("open {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno).doing(|| format!("lock {}", path.display()))
}
