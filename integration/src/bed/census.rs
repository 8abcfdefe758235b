//! The leak check: everything of a host that could be left behind, as lines that can be compared.
//!
//! Taken from outside, through the host init's `/proc` entries, so that the census leaves no trace of its own. Two of
//! them, before and after, differ only in what was left or lost in between.

use super::Host;
use crate::wait;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::Duration;

/// What is on a host at one moment: for each kind of thing, a set of lines.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Census {
    host: String,
    kinds: BTreeMap<String, BTreeSet<String>>,
}

impl Census {
    pub fn of(host: &Host) -> Result<Census> {
        let (pid, root) = (host.pid()?, host.root()?);
        let mut kinds = BTreeMap::new();
        let mut add = |kind: &str, lines: BTreeSet<String>| drop(kinds.insert(kind.to_string(), lines));
        let (processes, networks) = processes(&root.join("proc"))?;
        add("process", processes);
        add("network namespace", networks);
        add("mount", mounts(pid)?);
        add("link", tool(host, &["ip", "-o", "link"], link)?);
        add("address", tool(host, &["ip", "-o", "addr"], address)?);
        add("firewall", tool(host, &["nft", "-s", "list", "ruleset"], |line| Some(line.trim_end().to_string()))?);
        add("cgroup", cgroups(host));
        add("ipc", ipc(pid)?);
        add("loop device", loops(host));
        add("lease", leases(&root));
        for folder in ["var/lib", "run", "dev/shm"] {
            add(folder, files(&root.join(folder)));
        }
        Ok(Census { host: host.name().into(), kinds })
    }

    /// What `after` has and this has not (+), and the other way round (-), a line each.
    pub fn differs_from(&self, after: &Census) -> Vec<String> {
        let mut lines = Vec::new();
        let none = BTreeSet::new();
        for kind in self.kinds.keys().chain(after.kinds.keys()).collect::<BTreeSet<_>>() {
            let (old, new) = (self.kinds.get(kind).unwrap_or(&none), after.kinds.get(kind).unwrap_or(&none));
            lines.extend(new.difference(old).map(|line| format!("{}: + {kind}: {line}", self.host)));
            lines.extend(old.difference(new).map(|line| format!("{}: - {kind}: {line}", self.host)));
        }
        lines
    }

    /// Waits until nothing differs any more and tells what still does at the deadline.
    pub fn settled(&self, host: &Host, deadline: Duration) -> Result<Vec<String>> {
        let mut differs = Vec::new();
        let mut failed = None;
        let _ = wait::until_true("the host to be as before", deadline, || match Census::of(host) {
            Ok(now) => {
                differs = self.differs_from(&now);
                differs.is_empty()
            }
            Err(error) => {
                failed = Some(error);
                true
            }
        });
        failed.map_or(Ok(differs), Err)
    }
}

/// All processes of the host, pods included, and the network namespaces that they are in.
fn processes(proc: &Path) -> Result<(BTreeSet<String>, BTreeSet<String>)> {
    let (mut all, mut networks) = (BTreeSet::new(), BTreeSet::new());
    for entry in fs::read_dir(proc).with_context(|| proc.display().to_string())?.flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.parse::<i32>().is_err() {
            continue;
        }
        // Gone meanwhile: then it is no leak.
        let Ok(comm) = fs::read_to_string(path.join("comm")) else { continue };
        let line = fs::read(path.join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        // The children of sshd come and go with connections, and go a moment after them.
        all.insert(format!("{name} {} [{}]", comm.trim(), line.trim()));
        if let Ok(network) = fs::read_link(path.join("ns/net")) {
            networks.insert(network.to_string_lossy().into_owned());
        }
    }
    Ok((all, networks))
}

/// Mounts of the host: root, mount point, type and source; ids change without meaning.
fn mounts(pid: i32) -> Result<BTreeSet<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    let line = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let left: Vec<&str> = left.split(' ').collect();
        let right: Vec<&str> = right.split(' ').collect();
        Some(format!("{} {} {} {}", left.get(4)?, left.get(3)?, right.first()?, right.get(1)?))
    };
    Ok(text.lines().filter_map(line).collect())
}

/// Runs a tool in the host's network namespace. A machine without it cannot have what it lists.
fn tool(host: &Host, line: &[&str], keep: impl Fn(&str) -> Option<String>) -> Result<BTreeSet<String>> {
    match host.in_network(line[0])?.args(&line[1..]).output() {
        Ok(output) => Ok(String::from_utf8_lossy(&output.stdout).lines().filter_map(keep).collect()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(BTreeSet::new()),
        Err(error) => Err(error.into()),
    }
}

/// `2: eth0@if3: <…> … master br0 …` → name and master.
fn link(line: &str) -> Option<String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let master = words.iter().position(|word| *word == "master").and_then(|at| words.get(at + 1));
    Some(format!("{} in {}", words.get(1)?.split('@').next()?.trim_end_matches(':'), master.unwrap_or(&"-")))
}

/// `2: br0    inet 10.77.0.11/24 …` → device and address; link-local ones follow from the links.
fn address(line: &str) -> Option<String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let address = words.get(3)?;
    (!address.starts_with("fe80:")).then(|| format!("{} {address}", words[1]))
}

fn cgroups(host: &Host) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for top in host.cgroups() {
        walk(&top, &mut |path, directory| {
            if directory {
                found.insert(path.display().to_string());
            }
        });
    }
    found
}

/// System V objects of the host's IPC namespace, by key, id and owner.
fn ipc(pid: i32) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for kind in ["shm", "sem", "msg"] {
        let output = std::process::Command::new("nsenter")
            .args(["-t", &pid.to_string(), "-i", "cat", &format!("/proc/sysvipc/{kind}")])
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let lines = text.lines().skip(1);
        found.extend(
            lines.map(|line| format!("{kind} {}", line.split_whitespace().take(3).collect::<Vec<_>>().join(" "))),
        );
    }
    Ok(found)
}

/// Loop devices are the machine's; those that back a file of this host are the host's.
fn loops(host: &Host) -> BTreeSet<String> {
    let Ok(entries) = fs::read_dir("/sys/block") else { return BTreeSet::new() };
    let ours = format!("/{}/{}/", host.bed(), host.name());
    let backing = entries.flatten().filter_map(|entry| fs::read_to_string(entry.path().join("loop/backing_file")).ok());
    backing.filter(|file| file.contains(&ours)).map(|file| file.trim().to_string()).collect()
}

/// What `pod` keeps for good, below `/var/lib`: the journal that `pod job ls` shows and that settles a lost answer, and
/// which volumes came from where.
const KEPT: [&str; 2] = ["pod/jobs", "pod/volumes."];

/// What it keeps below `/run` until the host is started again: where the kernel has what a dump reads of waiting calls,
/// noted by the first dump that meets one.
const NOTED: &str = "pod/kernel-layout";

/// The pods to which this host's addresses and ports are leased.
fn leases(root: &Path) -> BTreeSet<String> {
    let text = fs::read_to_string(root.join("var/lib/pod/network/leases.json")).unwrap_or_default();
    let book: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    book["leases"].as_object().map(|leases| leases.keys().cloned().collect()).unwrap_or_default()
}

/// Everything below a folder, by path.
fn files(top: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    walk(top, &mut |path, _| {
        let path = path.strip_prefix(top).unwrap_or(path).display().to_string();
        if path != NOTED && !KEPT.iter().any(|kept| path.starts_with(kept)) {
            found.insert(path);
        }
    });
    found
}

/// Calls `see` for all entries below `top`, without following links and without leaving `top` by them.
fn walk(top: &Path, see: &mut dyn FnMut(&Path, bool)) {
    let Ok(entries) = fs::read_dir(top) else { return };
    for entry in entries.flatten() {
        let directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        see(&entry.path(), directory);
        if directory {
            walk(&entry.path(), see);
        }
    }
}
