//! The files of a pod that does not run, as it would see them: for copying into and out of it.

use super::layers::Layers;
use super::{bind, mount_layers, take_volume, tree};
use crate::problem::{Doing, Result};
use crate::spec::Spec;
use crate::store::Pod;
use crate::sys::mount::{MOUNT_ATTR_RDONLY, set_attributes};
use nix::mount::MsFlags;
use nix::sched::{CloneFlags, unshare};
use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

/// What is in memory while a pod runs, and nowhere when it does not.
const IN_MEMORY: [&str; 5] = ["/proc", "/sys", "/dev", "/run", "/tmp"];

/// Mounts the pod's layers and volumes for this process alone, which must be single-threaded, and tells where. What is
/// mounted goes with the process. No other process may have them mounted: the pod must have ended.
pub fn mount(spec: &Spec, pod: &Pod) -> Result<PathBuf> {
    let none: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS).doing(|| "make a mount namespace".into())?;
    nix::mount::mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .doing(|| "make mounts private".into())?;
    let own = [pod.store().data(), pod.store().run()];
    let layers = Layers::decide(&spec.root.base, &pod.upper_dir(), &pod.work_dir(), &own)?;
    layers.make()?;
    let staging = pod.dir().join("root");
    fs::create_dir_all(&staging).doing(|| format!("make {}", staging.display()))?;
    let volumes = spec.volumes.iter().map(take_volume).collect::<Result<Vec<_>>>()?;
    let bound = layers.bound.iter().map(|path| Ok((path, tree::clone_of_host(path, false)?)));
    let bound = bound.collect::<Result<Vec<_>>>()?;
    let tree = mount_layers(&layers, &staging, false, &mut Vec::new())?;
    for (path, copy) in &bound {
        bind(&tree, copy, path, true)?;
    }
    let empty = |path: &Path| -> Result<()> {
        // Of a base that lacks the folder there is nothing to hide.
        let Ok(onto) = tree.find(path) else { return Ok(()) };
        tree::mount_on("tmpfs", "tmpfs", &onto, MsFlags::empty(), "mode=0755")
            .doing(|| format!("hide what this host has in {}", path.display()))
    };
    IN_MEMORY.iter().try_for_each(|path| empty(Path::new(path)))?;
    for (volume, copy) in spec.volumes.iter().zip(&volumes) {
        bind(&tree, copy, &volume.destination, volume.read_only)?;
    }
    // Nothing can be put where it would be lost.
    for path in IN_MEMORY.map(Path::new) {
        if let Ok(at) = tree.find(path) {
            set_attributes(at.as_fd(), MOUNT_ATTR_RDONLY, false).doing(|| format!("close {}", path.display()))?;
        }
    }
    Ok(staging)
}
