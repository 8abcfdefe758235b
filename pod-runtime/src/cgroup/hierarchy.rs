//! Where the host has mounted its control groups, and which of them a pod uses.
//!
//! v1, hybrid and v2 hosts differ only here: a pod has one folder in every hierarchy listed. Foreign named hierarchies
//! and controllers that a pod has no use for are left alone, since joining each costs.

use crate::problem::{Doing, Problem, Result};
use crate::proc;
use crate::proc::mountinfo::{self, Mount};
use std::path::PathBuf;
use std::sync::OnceLock;

/// v1 controllers that a pod uses when the host has them there. cpuset only because a JVM that does not find it takes
/// itself to be outside of any container and sizes its heap by the host's memory.
const USED: [&str; 6] = ["memory", "cpu", "cpuacct", "pids", "devices", "cpuset"];

/// One mounted hierarchy of cgroup v1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct V1 {
    pub mount: PathBuf,
    /// Several when they are mounted together.
    pub controllers: Vec<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hierarchies {
    pub unified: Option<PathBuf>,
    pub v1: Vec<V1>,
}

impl Hierarchies {
    /// What the caller's mount namespace shows.
    pub fn find() -> Result<Hierarchies> {
        let text = proc::bytes("/proc/self/mountinfo").doing(|| "read the mounts of this host".into())?;
        let mounts = mountinfo::parse(&text)
            .ok_or_else(|| Problem::new("E-SYSTEM", "/proc/self/mountinfo is not as the kernel writes it"))?;
        let mut found = Self::among(&mounts);
        // Freezing goes by v2 wherever there is one: a task that v1 froze answers neither ptrace nor SIGKILL.
        if found.unified.is_none() {
            let known = found.v1.clone();
            found.v1.extend(v1_with(&mounts, &["freezer"]).into_iter().filter(|v1| !known.contains(v1)));
        }
        Ok(found)
    }

    /// All that are mounted, those without a controller too, wherever tools may look for a container's groups. Looked for
    /// once: a process that makes containers stays in its mount namespace.
    pub(crate) fn every() -> Result<Hierarchies> {
        static FOUND: OnceLock<Hierarchies> = OnceLock::new();
        if let Some(found) = FOUND.get() {
            return Ok(found.clone());
        }
        let text = proc::bytes("/proc/self/mountinfo").doing(|| "read the mounts of this host".into())?;
        let mounts = mountinfo::parse(&text)
            .ok_or_else(|| Problem::new("E-SYSTEM", "/proc/self/mountinfo is not as the kernel writes it"))?;
        // Whoever has a hierarchy mounted twice has it in its usual place first.
        let unified = mounts.iter().find(|mount| mount.kind == "cgroup2").map(|mount| mount.mount_point.clone());
        let mut v1: Vec<V1> = Vec::new();
        for mount in mounts.iter().filter(|mount| mount.kind == "cgroup") {
            let controllers = controllers(mount);
            if !controllers.is_empty() && !v1.iter().any(|known| known.controllers == controllers) {
                v1.push(V1 { mount: mount.mount_point.clone(), controllers });
            }
        }
        if unified.is_none() && v1.is_empty() {
            return Err(Problem::new("E-CGROUP", "this host has no cgroup hierarchy mounted")
                .fix("mount -t cgroup2 cgroup2 /sys/fs/cgroup"));
        }
        Ok(FOUND.get_or_init(|| Hierarchies { unified, v1 }).clone())
    }

    fn among(mounts: &[Mount]) -> Hierarchies {
        // The last of several mounts of one hierarchy is the one on top.
        let unified = mounts.iter().rev().find(|mount| mount.kind == "cgroup2").map(|mount| mount.mount_point.clone());
        Hierarchies { unified, v1: v1_with(mounts, &USED) }
    }

    /// The hierarchy of a v1 controller.
    pub fn v1_of(&self, controller: &str) -> Option<&V1> {
        self.v1.iter().find(|v1| v1.controllers.iter().any(|c| c == controller))
    }
}

fn v1_with(mounts: &[Mount], wanted: &[&str]) -> Vec<V1> {
    let mut found: Vec<V1> = Vec::new();
    for mount in mounts.iter().rev().filter(|mount| mount.kind == "cgroup") {
        let controllers: Vec<String> = controllers(mount);
        let useful = controllers.iter().any(|c| wanted.contains(&c.as_str()));
        if useful && !found.iter().any(|v1| v1.controllers == controllers) {
            found.push(V1 { mount: mount.mount_point.clone(), controllers });
        }
    }
    found.reverse();
    found
}

/// The v1 hierarchies that a pod is in, as (folder in /sys/fs/cgroup, options to mount it); for the view inside the pod.
/// Of the others it would see the host's groups.
pub fn visible(mounts: &[Mount]) -> Vec<(String, String)> {
    let mut used = v1_with(mounts, &USED);
    if !mounts.iter().any(|mount| mount.kind == "cgroup2") {
        used.extend(v1_with(mounts, &["freezer"]));
    }
    let mut found: Vec<(String, String)> = Vec::new();
    for options in used.into_iter().map(|v1| v1.controllers.join(",")) {
        if !found.iter().any(|(_, known)| *known == options) {
            found.push((options.clone(), options));
        }
    }
    found
}

/// A v1 mount names its controllers (or `name=…`) among the options of the file system.
fn controllers(mount: &Mount) -> Vec<String> {
    const OTHER: [&str; 8] =
        ["rw", "ro", "xattr", "noprefix", "clone_children", "cpuset_v2_mode", "favordynmods", "all"];
    mount
        .super_options
        .split(',')
        .filter(|option| !OTHER.contains(option) && !option.starts_with("release_agent=") && !option.is_empty())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hybrid_with_a_hierarchy_twice() {
        let text = b"31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
            32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
            33 31 0:30 / /old/memory rw - cgroup cgroup rw,memory\n\
            34 31 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
            40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,release_agent=/x,name=systemd\n\
            41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let mounts = mountinfo::parse(text).unwrap();
        let found = Hierarchies::among(&mounts);
        assert_eq!(found.unified, Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(found.v1.len(), 2);
        assert_eq!(found.v1_of("memory").unwrap().mount, PathBuf::from("/sys/fs/cgroup/memory"));
        assert_eq!(found.v1_of("cpuacct"), found.v1_of("cpu"));
        assert_eq!(found.v1_of("freezer"), None);
        let folders: Vec<_> = visible(&mounts).into_iter().map(|(folder, _)| folder).collect();
        assert_eq!(folders, ["cpu,cpuacct", "memory"]);
    }
}
