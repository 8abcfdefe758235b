//! A host's part of every cgroup hierarchy, v1 and v2: `BED-HOST`, below the machine's mount points.
//!
//! In v2 the host's processes live in a leaf `host`, because a cgroup with processes of its own can hand no controller
//! to the cgroups below it; a real machine's root is exempt from that rule, a host's root here is not.

use super::BEDS;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// One mounted hierarchy of this machine.
pub struct Hierarchy {
    pub mount: PathBuf,
    pub v2: bool,
    /// Options that mount the same hierarchy again: the controllers, or a v1 hierarchy's name.
    pub options: String,
}

/// The hierarchies mounted here, each once.
pub fn hierarchies() -> Vec<Hierarchy> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in text.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let right: Vec<&str> = right.split(' ').collect();
        let (Some(mount), Some(kind), Some(options)) = (left.split(' ').nth(4), right.first(), right.get(2)) else {
            continue;
        };
        if !matches!(*kind, "cgroup" | "cgroup2") || mount.starts_with(BEDS) {
            continue;
        }
        let keep = |option: &&str| !matches!(*option, "rw" | "ro" | "xattr" | "nsdelegate" | "memory_recursiveprot");
        let options = options.split(',').filter(keep).collect::<Vec<_>>().join(",");
        let hierarchy = Hierarchy { mount: mount.into(), v2: *kind == "cgroup2", options };
        if !found.iter().any(|known| known.mount == hierarchy.mount) {
            found.push(hierarchy);
        }
    }
    found
}

fn name(bed: &str, host: &str) -> String {
    format!("pod-bed-{bed}-{host}")
}

/// The host's directories, from outside.
pub fn directories(bed: &str, host: &str) -> Vec<PathBuf> {
    hierarchies().into_iter().map(|h| h.mount.join(name(bed, host))).filter(|path| path.is_dir()).collect()
}

pub fn create(bed: &str, host: &str) -> Result<()> {
    for hierarchy in hierarchies() {
        let ours = hierarchy.mount.join(name(bed, host));
        // A hierarchy that takes no new cgroup (read-only, or not ours) is one that this host does not offer.
        if fs::create_dir_all(&ours).is_err() {
            continue;
        }
        if hierarchy.v2 {
            hand_down(&hierarchy.mount);
            fs::create_dir_all(ours.join("host")).with_context(|| format!("make {}/host", ours.display()))?;
        }
        for file in ["cpuset.cpus", "cpuset.mems"].iter().filter(|_| !hierarchy.v2) {
            // v1 cpusets start out empty and then take no process.
            if let Ok(value) = fs::read(hierarchy.mount.join(file)) {
                let _ = fs::write(ours.join(file), value);
            }
        }
    }
    Ok(())
}

/// Gives every v2 controller of `parent` to its children, one by one: one that is refused must not cost the others.
fn hand_down(parent: &Path) {
    let controllers = fs::read_to_string(parent.join("cgroup.controllers")).unwrap_or_default();
    for controller in controllers.split_whitespace() {
        let _ = fs::write(parent.join("cgroup.subtree_control"), format!("+{controller}"));
    }
}

/// Where a process of a host goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The host's root cgroups, to make a cgroup namespace there.
    Root,
    /// Where the host's own processes live.
    Leaf,
}

/// Moves the calling process into the host's part of every hierarchy.
pub fn join(bed: &str, host: &str, place: Place) -> Result<()> {
    for hierarchy in hierarchies() {
        let mut ours = hierarchy.mount.join(name(bed, host));
        if !ours.is_dir() {
            continue;
        }
        if hierarchy.v2 && place == Place::Leaf {
            ours.push("host");
        }
        fs::write(ours.join("cgroup.procs"), "0").with_context(|| format!("join {}", ours.display()))?;
    }
    Ok(())
}

/// The second step of a host's birth, after its cgroup namespace was made: to the leaf, then controllers to the pods.
pub fn settle(bed: &str, host: &str) -> Result<()> {
    join(bed, host, Place::Leaf)?;
    for hierarchy in hierarchies().iter().filter(|hierarchy| hierarchy.v2) {
        hand_down(&hierarchy.mount.join(name(bed, host)));
    }
    Ok(())
}

/// Removes the host's cgroups, all the way down. Tasks that were just killed hold theirs a few milliseconds longer.
pub fn remove(bed: &str, host: &str) -> Result<()> {
    for ours in directories(bed, host) {
        let what = format!("remove {}", ours.display());
        crate::wait::until_true(&what, crate::wait::SOON, || {
            remove_below(&ours);
            !ours.exists()
        })?;
    }
    Ok(())
}

fn remove_below(path: &Path) {
    if let Ok(entries) = fs::read_dir(path) {
        for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            remove_below(&entry.path());
        }
    }
    let _ = fs::remove_dir(path);
}
