//! What a pod that may has made of its control groups: groups below its own, who is in them, and what was set in their
//! files and in those of its own group.
//!
//! What a file says is kept if it says something else in a group that nobody has touched ([`Fresh`]), and is written
//! where the newborn pod's says something else. Counters are left out. Refused is what cannot be read back or would stand
//! in the engine's own way: rules for devices, groups that are frozen, threads apart from their processes, controllers
//! handed down in v2 (nobody may be in the pod's own group then, and the engine is).

use super::permitted;
use crate::crew;
use crate::freeze::Process;
use crate::ids::{HostPid, PodPid};
use crate::image::damaged;
use crate::{Doing, Problem, Result};
use pod_runtime::cgroup::{Cgroup, Fresh};
use pod_runtime::spec::Security;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

/// What a pod has made of its groups cannot be made again.
pub const INSIDE: &str = "E-CGROUP-INSIDE";

/// More groups than a pod is known to make; each is a folder and some twenty files.
const MOST: usize = 10_000;
/// Folders within one another.
const DEEPEST: usize = 64;

/// One group. Record CGROUPS is a list of them, each after the one that it lies in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Controllers of a v1 hierarchy as its mount names them; nothing for v2.
    pub hierarchy: String,
    /// Names of folders below the pod's own group, which is the empty list.
    pub path: Vec<String>,
    /// Permissions, user and group of the folder.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Files that say something else than in a new group.
    pub files: Vec<(String, String)>,
    /// Files that belong to somebody else than root: user and group.
    pub owners: Vec<(String, u32, u32)>,
    /// Processes in a group that is not the pod's own.
    pub members: Vec<PodPid>,
}

/// What was found of one group, members as this host numbers them.
struct Found {
    group: Group,
    members: Vec<i32>,
}

/// Of a pod that stands still. Empty when everything is as it was born.
pub fn dump(security: &Security, cgroup: &Cgroup, usual: Option<&Usual>, processes: &[Process]) -> Result<Vec<Group>> {
    // By the number of the process: of one whose first thread has ended, it is none of the threads that are left.
    let known: BTreeMap<i32, PodPid> = processes.iter().map(|process| (process.status.tgid, process.pid)).collect();
    let mut groups = Vec::new();
    for Found { mut group, members } in found(security, cgroup, usual)? {
        // One who has ended since is in the list for a moment.
        group.members = members.iter().filter_map(|host| known.get(host).copied()).collect();
        groups.push(group);
    }
    Ok(groups)
}

/// Of a pod that runs: what stands against it.
pub fn check(security: &Security, cgroup: &Cgroup) -> Option<Problem> {
    usual(security, cgroup).and_then(|usual| found(security, cgroup, usual.as_ref())).err()
}

/// What files say that nobody has written to, by hierarchy.
pub type Usual = BTreeMap<String, BTreeMap<String, String>>;

/// For a pod that may have written to some: others see their groups and no more.
pub fn usual(security: &Security, cgroup: &Cgroup) -> Result<Option<Usual>> {
    if !security.may("SYS_ADMIN") || (!security.privileged && !has_groups(cgroup)) {
        return Ok(None);
    }
    let fresh = Fresh::beside(cgroup)?;
    let each = cgroup.named_folders().into_iter();
    each.map(|(hierarchy, own)| Ok((hierarchy, settings(&fresh.of(&own))?))).collect::<Result<Usual>>().map(Some)
}

fn has_groups(cgroup: &Cgroup) -> bool {
    cgroup.named_folders().iter().any(|(_, folder)| !subfolders(folder).is_empty())
}

fn found(security: &Security, cgroup: &Cgroup, known: Option<&Usual>) -> Result<Vec<Found>> {
    let asked;
    let usual = match known {
        Some(usual) => usual,
        // One that has made its first group since it was looked at.
        None if security.may("SYS_ADMIN") && has_groups(cgroup) => {
            asked = usual(security, cgroup)?.unwrap_or_default();
            &asked
        }
        None => return Ok(Vec::new()),
    };
    // Hundreds of files, while the pod stands still: by all CPUs.
    let (folders, none) = (cgroup.named_folders(), BTreeMap::new());
    let each = crew::share(folders.len(), |at| {
        let (hierarchy, own) = &folders[at];
        below(hierarchy, own, usual.get(hierarchy).unwrap_or(&none), security)
    });
    let all = each.into_iter().collect::<Result<Vec<_>>>()?.into_iter().flatten().collect::<Vec<_>>();
    if all.len() > MOST { Err(too_many()) } else { Ok(all) }
}

/// Of one hierarchy, from the pod's own group on.
fn below(hierarchy: &str, own: &Path, usual: &BTreeMap<String, String>, security: &Security) -> Result<Vec<Found>> {
    let mut all = Vec::new();
    let mut apart: BTreeMap<i32, usize> = BTreeMap::new();
    let mut to_read = vec![Vec::new()];
    while let Some(path) = to_read.pop() {
        let folder = own.join(path.iter().collect::<PathBuf>());
        for name in subfolders(&folder).into_iter().rev() {
            let name = name.into_string().map_err(|name| refusal(hierarchy, &path, &format!("contains {name:?}")))?;
            to_read.push([&path[..], &[name]].concat());
        }
        refuse(hierarchy, &path, &folder, own, security)?;
        let one = group(hierarchy, path, &folder, usual, &mut apart)?;
        if !one.group.path.is_empty() || !one.group.files.is_empty() {
            all.push(one);
        }
        if all.len() > MOST {
            return Err(too_many());
        }
    }
    Ok(all)
}

fn too_many() -> Problem {
    let what = format!("a program in the pod has made more than {MOST} control groups");
    Problem::new(INSIDE, what).fix("remove some of them before the move")
}

fn group(
    hierarchy: &str,
    path: Vec<String>,
    folder: &Path,
    usual: &BTreeMap<String, String>,
    apart: &mut BTreeMap<i32, usize>,
) -> Result<Found> {
    let doing = || format!("look at the cgroup {}", folder.display());
    let about = fs::metadata(folder).doing(doing)?;
    let files = settings(folder)?.into_iter().filter(|(name, value)| usual.get(name) != Some(value)).collect();
    let mut owners = Vec::new();
    for entry in fs::read_dir(folder).doing(doing)?.flatten() {
        let Ok(about) = entry.metadata() else { continue };
        if about.is_file() && (about.uid(), about.gid()) != (0, 0) {
            owners.push((entry.file_name().to_string_lossy().into_owned(), about.uid(), about.gid()));
        }
    }
    let members = numbers(&folder.join("cgroup.procs")).doing(doing)?;
    // In v1 each thread may be in a group of its own: its process is listed in all of them then.
    for pid in &members {
        let seen = apart.entry(*pid).or_default();
        *seen += 1;
        if *seen > 1 {
            return Err(refusal(hierarchy, &path, "has threads of a process that is in another group, too"));
        }
    }
    let members = if path.is_empty() { Vec::new() } else { members };
    let (mode, uid, gid) = (about.mode() & 0o7777, about.uid(), about.gid());
    let group = Group { hierarchy: hierarchy.to_owned(), path, mode, uid, gid, files, owners, members: Vec::new() };
    Ok(Found { group, members })
}

fn refuse(hierarchy: &str, path: &[String], folder: &Path, own: &Path, security: &Security) -> Result<()> {
    let read = |folder: &Path, name: &str| fs::read_to_string(folder.join(name)).unwrap_or_default();
    let says = |what: &str| Err(refusal(hierarchy, path, what));
    if read(folder, "cgroup.type").trim_end().ends_with("threaded") {
        return says("is for threads");
    }
    if !read(folder, "cgroup.subtree_control").trim().is_empty() {
        return says("hands controllers down (cgroup.subtree_control)");
    }
    let is_frozen = read(folder, "cgroup.freeze").trim() == "1" || read(folder, "freezer.self_freezing").trim() == "1";
    if !path.is_empty() && is_frozen {
        return says("is frozen");
    }
    let rules = |folder: &Path| read(folder, "devices.list");
    if !path.is_empty() && rules(folder) != rules(own) {
        return says("has rules for devices");
    }
    if path.is_empty() && security.privileged && !["", "a *:* rwm\n"].contains(&rules(own).as_str()) {
        return says("has rules for devices");
    }
    Ok(())
}

fn refusal(hierarchy: &str, path: &[String], what: &str) -> Problem {
    let (hierarchy, path) = (if hierarchy.is_empty() { "v2" } else { hierarchy }, path.join("/"));
    Problem::new(INSIDE, format!("the control group /{path} ({hierarchy}) of the pod {what}"))
        .fix("undo that before the move")
}

/// What is set by writing and can be read again: all files that root may do both with, but members, counters (to write to
/// one is to set it to zero) and what is done at once and not kept.
fn settings(folder: &Path) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).doing(|| format!("list the cgroup {}", folder.display()))?.flatten() {
        let (name, about) = (entry.file_name().to_string_lossy().into_owned(), entry.metadata());
        let both = about.is_ok_and(|about| about.is_file() && about.permissions().mode() & 0o600 == 0o600);
        if !both || !is_setting(&name) {
            continue;
        }
        if let Ok(text) = fs::read_to_string(entry.path()) {
            found.insert(name.clone(), value(&name, &text).to_owned());
        }
    }
    Ok(found)
}

fn is_setting(name: &str) -> bool {
    const OTHER: [&str; 9] = [
        "cgroup.procs",
        "cgroup.threads",
        "tasks",
        "cgroup.freeze",
        "freezer.state",
        "cgroup.type",
        "cgroup.subtree_control",
        "cgroup.event_control",
        "memory.force_empty",
    ];
    let counts = ["failcnt", "max_usage_in_bytes", ".peak", "cpuacct.usage", "shown_ram_in_bytes"];
    let is_pressure = name.ends_with(".pressure") && name != "cgroup.pressure";
    !OTHER.contains(&name) && !counts.iter().any(|end| name.ends_with(end)) && !is_pressure && name != "memory.reclaim"
}

/// As it can be written.
fn value<'a>(name: &str, text: &'a str) -> &'a str {
    match name {
        "memory.oom_control" => {
            text.lines().find_map(|line| line.strip_prefix("oom_kill_disable ")).unwrap_or_default()
        }
        _ => text.trim_end(),
    }
}

fn numbers(path: &Path) -> io::Result<Vec<i32>> {
    Ok(fs::read_to_string(path)?.lines().filter_map(|line| line.parse().ok()).collect())
}

fn subfolders(folder: &Path) -> Vec<std::ffi::OsString> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.file_name())
        .collect();
    names.sort();
    names
}

/// What is believed of an image's groups: no name leads elsewhere, nothing is named twice.
pub fn believe(groups: &[Group], known: impl Fn(PodPid) -> bool) -> Result<()> {
    if groups.len() > MOST {
        return Err(damaged("the image has more control groups than there can be"));
    }
    let is_name = |name: &String| {
        !name.is_empty() && name.len() < 256 && name != "." && name != ".." && !name.contains(['/', '\0', '\n'])
    };
    let (mut seen, mut places) = (BTreeSet::new(), BTreeSet::new());
    for group in groups {
        let wrong =
            |what: &str| Err(damaged(format!("the control group {:?} of the image {what}", group.path.join("/"))));
        let names = group.files.iter().map(|(name, _)| name).chain(group.owners.iter().map(|(name, _, _)| name));
        if group.path.len() > DEEPEST || !group.path.iter().all(is_name) || !names.clone().all(is_name) {
            return wrong("has a name that there cannot be");
        }
        if !group.files.iter().all(|(name, _)| is_setting(name)) {
            return wrong("sets what is no setting");
        }
        if !seen.insert((&group.hierarchy, &group.path)) {
            return wrong("is there twice");
        }
        if group.path.is_empty() && !group.members.is_empty() {
            return wrong("lists members of the pod's own group");
        }
        for member in &group.members {
            if !known(*member) || !places.insert((&group.hierarchy, *member)) {
                return wrong("has a member that is no process of the pod, or is in two groups");
            }
        }
    }
    Ok(())
}

/// The groups of a pod that was just born, before anything is opened in it. Members come by [`enter`].
pub fn restore(groups: &[Group], cgroup: &Cgroup, security: &Security) -> Result<()> {
    if groups.is_empty() {
        return Ok(());
    }
    permitted(security, "SYS_ADMIN", "control groups of its own")?;
    // All before anything is set: some settings go over to what is made below.
    for group in groups.iter().filter(|group| !group.path.is_empty()) {
        let folder = folder(group, cgroup)?;
        fs::create_dir(&folder).doing(|| format!("make the cgroup {}", folder.display()))?;
    }
    for group in groups {
        let folder = folder(group, cgroup)?;
        let doing = || format!("set up the cgroup {}", folder.display());
        let mut now = settings(&folder)?;
        let mut left: Vec<&(String, String)> =
            group.files.iter().filter(|(name, value)| now.get(name) != Some(value)).collect();
        // One may stand in the way of another: a limit of memory and that of memory with swap.
        while !left.is_empty() {
            let (before, mut last) = (left.len(), None);
            left.retain(|(name, value)| match set(&folder, name, value, &now) {
                Ok(()) => false,
                Err(error) => {
                    last = Some((name.clone(), error));
                    true
                }
            });
            if let Some((name, error)) = last.filter(|_| left.len() == before) {
                let what = format!("{name} of the pod's control group /{} cannot be set here", group.path.join("/"));
                return Err(Problem::new(INSIDE, what).because(error));
            }
            now = settings(&folder)?;
        }
        for (name, uid, gid) in &group.owners {
            chown(folder.join(name), Some(*uid), Some(*gid)).doing(doing)?;
        }
        if !group.path.is_empty() {
            chown(&folder, Some(group.uid), Some(group.gid)).doing(doing)?;
            fs::set_permissions(&folder, fs::Permissions::from_mode(group.mode & 0o7777)).doing(doing)?;
        }
    }
    Ok(())
}

/// Only what a group has and says otherwise.
fn set(folder: &Path, name: &str, value: &str, now: &BTreeMap<String, String>) -> io::Result<()> {
    if !now.contains_key(name) {
        return Err(io::Error::new(io::ErrorKind::NotFound, "this host has no such file"));
    }
    fs::write(folder.join(name), value)
}

/// Below the pod's own group, and there is no other group of the name in the way.
fn folder(group: &Group, cgroup: &Cgroup) -> Result<PathBuf> {
    let own = cgroup.named_folders().into_iter().find(|(hierarchy, _)| *hierarchy == group.hierarchy);
    let Some((_, own)) = own else {
        let hierarchy = if group.hierarchy.is_empty() { "v2" } else { &group.hierarchy };
        let what = format!("the pod has control groups of its own in the hierarchy {hierarchy}, which is not here");
        return Err(Problem::new(INSIDE, what).fix("restore it on a host with the same hierarchies of control groups"));
    };
    Ok(own.join(group.path.iter().collect::<PathBuf>()))
}

/// Processes that stand still go to their groups, with all threads.
pub fn enter(groups: &[Group], cgroup: &Cgroup, host: impl Fn(PodPid) -> Option<HostPid>) -> Result<()> {
    for group in groups.iter().filter(|group| !group.members.is_empty()) {
        let members = folder(group, cgroup)?.join("cgroup.procs");
        for task in group.members.iter().filter_map(|member| host(*member)) {
            fs::write(&members, task.0.to_string())
                .doing(|| format!("put process {task} into {}", members.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::DAMAGED;

    fn one(hierarchy: &str, path: &[&str], files: &[&str], members: &[i32]) -> Group {
        Group {
            hierarchy: hierarchy.into(),
            path: path.iter().map(|name| (*name).into()).collect(),
            mode: 0o755,
            uid: 0,
            gid: 0,
            files: files.iter().map(|name| ((*name).into(), "1".into())).collect(),
            owners: Vec::new(),
            members: members.iter().map(|pid| PodPid(*pid)).collect(),
        }
    }

    #[test]
    fn groups_that_there_cannot_be() {
        let known = |pid: PodPid| pid.0 < 10;
        let good = [
            one("cpu", &[], &["cpu.shares"], &[]),
            one("cpu", &["a"], &["cpu.shares"], &[1]),
            one("", &["a"], &[], &[1]),
        ];
        believe(&good, known).unwrap();
        for wrong in [
            vec![one("cpu", &[".."], &[], &[])],
            vec![one("cpu", &["a/b"], &[], &[])],
            vec![one("cpu", &[""], &[], &[])],
            vec![one("cpu", &["a"], &["../../cpu.shares"], &[])],
            vec![one("cpu", &["a"], &["cgroup.procs"], &[])],
            vec![one("cpu", &["a"], &[], &[11])],
            vec![one("cpu", &[], &[], &[1])],
            vec![one("cpu", &["a"], &[], &[1]), one("cpu", &["b"], &[], &[1])],
            vec![one("cpu", &["a"], &[], &[]), one("cpu", &["a"], &[], &[])],
            vec![one("cpu", &["a"; DEEPEST + 1], &[], &[])],
        ] {
            assert_eq!(believe(&wrong, known).unwrap_err().code(), DAMAGED, "{wrong:?}");
        }
    }

    #[test]
    fn counters_are_no_settings() {
        for name in ["memory.limit_in_bytes", "pids.max", "cpu.max", "cgroup.pressure", "notify_on_release"] {
            assert!(is_setting(name), "{name}");
        }
        for name in ["tasks", "memory.failcnt", "memory.memsw.max_usage_in_bytes", "io.pressure", "memory.swap.peak"] {
            assert!(!is_setting(name), "{name}");
        }
        assert_eq!(value("memory.oom_control", "oom_kill_disable 1\nunder_oom 0\n"), "1");
    }
}
