//! Which layers a pod has, and where they are on this host.

use super::{STORAGE, Tree, mounts};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{major, minor};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use pod_runtime::spec::Spec;
use pod_runtime::store::Pod;
use pod_runtime::{Doing, Problem, Result};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// A STORAGE record: which layer the entries up to the next STORAGE_END belong to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Layer {
    pub place: Place,
    /// Only what changed since the pass before.
    pub delta: bool,
    /// The layer is one file, not a directory.
    pub single: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Place {
    /// What the pod wrote to its root.
    Upper,
    /// The n-th volume of the spec.
    Volume(usize),
    /// A tmpfs, by its path in the pod.
    Memory(ByteBuf),
}

impl Place {
    /// Of the /dev of a newborn pod everything stays; what the pod added is put beside.
    pub fn keeps_existing(&self) -> bool {
        matches!(self, Place::Memory(path) if &path[..] == b"/dev")
    }

    pub fn name(&self) -> String {
        match self {
            Place::Upper => "the writable layer".into(),
            Place::Volume(n) => format!("volume {}", n + 1),
            Place::Memory(path) => super::lossy(path),
        }
    }
}

/// The layers on disk, which can be sent while the pod runs: the upper layer and the volumes that belong to the pod.
/// Shared volumes are there on every host; read-only ones are the host's own data.
pub fn layers_at_rest(pod: &Pod, spec: &Spec) -> Result<Vec<(Place, Tree)>> {
    let mut layers = vec![(Place::Upper, Tree::open(&pod.upper_dir())?)];
    for (n, volume) in spec.volumes.iter().enumerate() {
        if !volume.shared && !volume.read_only {
            layers.push((Place::Volume(n), Tree::open(&volume.source)?));
        }
    }
    Ok(layers)
}

/// The tmpfs mounts of a pod that it can write to.
pub fn layers_in_memory(init: i32) -> Result<Vec<(Place, Tree)>> {
    let mut layers: Vec<(Place, Tree)> = Vec::new();
    let mut devices = BTreeSet::new();
    for mount in mounts(init)? {
        let hidden = ["/proc", "/sys"].iter().any(|top| mount.at.starts_with(top));
        if mount.kind != "tmpfs" || mount.read_only || !mount.whole || hidden {
            continue;
        }
        let place = Place::Memory(ByteBuf::from(mount.at.as_os_str().as_bytes()));
        let root = open_in_pod(init, &mount.at)?;
        let device = nix::sys::stat::fstat(&root).code(STORAGE, || format!("look at {}", mount.at.display()))?.st_dev;
        if (major(device), minor(device)) != mount.device {
            continue; // something else lies over it
        }
        // One that is bound elsewhere too is sent once.
        if devices.insert(device) {
            layers.push((place, Tree::at(root, None)?));
        }
    }
    Ok(layers)
}

/// Opens a tmpfs of the pod for writing what came.
pub fn open_memory(init: i32, path: &[u8]) -> Result<OwnedFd> {
    let path = PathBuf::from(std::ffi::OsString::from_vec(path.to_vec()));
    let fd = open_in_pod(init, &path)?;
    let kind = fstatfs(&fd).code(STORAGE, || format!("look at {}", path.display()))?;
    if kind.filesystem_type() != TMPFS_MAGIC {
        let what = format!("the pod had a tmpfs at {} and has none there here", path.display());
        return Err(Problem::new(STORAGE, what));
    }
    Ok(fd)
}

/// A directory by its path in the pod; links count from the pod's root and never lead out of it.
fn open_in_pod(init: i32, path: &Path) -> Result<OwnedFd> {
    let root = format!("/proc/{init}/root");
    let root = File::open(&root).code(STORAGE, || format!("open {root}"))?;
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS | ResolveFlag::RESOLVE_NO_SYMLINKS);
    openat2(&root, path, how).code(STORAGE, || format!("open {} in the pod", path.display()))
}
