//! Control groups that a program makes below its own: with settings, within one another, of another user, with a process
//! in the innermost.

use crate::{Guest, sys};
use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};

/// What is set, where there is such a file.
const SETTINGS: [(&str, &str); 6] = [
    ("memory.limit_in_bytes", "268435456"),
    ("memory.oom_control", "1"),
    ("cpu.shares", "512"),
    ("pids.max", "50"),
    ("cgroup.max.descendants", "7"),
    ("notify_on_release", "1"),
];

struct Subgroups {
    child: Pid,
    shown: BTreeMap<PathBuf, String>,
}

/// Our own group in each hierarchy.
fn own() -> Result<Vec<PathBuf>> {
    let text = fs::read_to_string("/proc/self/cgroup")?;
    let mut found = Vec::new();
    for line in text.lines() {
        let (names, path) = line.split_once(':').and_then(|(_, rest)| rest.split_once(':')).context("a group")?;
        let names = if names.is_empty() { "unified" } else { names };
        let top = Path::new("/sys/fs/cgroup");
        // With nothing but v2, it is mounted there itself.
        let mount = if top.join("cgroup.procs").exists() { top.to_owned() } else { top.join(names) };
        let folder = mount.join(path.trim_start_matches('/'));
        if folder.join("cgroup.procs").exists() {
            found.push(folder);
        }
    }
    Ok(found)
}

fn show(child: Pid) -> Result<BTreeMap<PathBuf, String>> {
    let mut shown = BTreeMap::new();
    for folder in own()? {
        for group in [folder.join("guest"), folder.join("guest/inner")] {
            let about = fs::metadata(&group).with_context(|| group.display().to_string())?;
            shown.insert(group.clone(), format!("{} {} {:o}", about.uid(), about.gid(), about.mode()));
            for (name, _) in SETTINGS {
                if let Ok(text) = fs::read_to_string(group.join(name)) {
                    shown.insert(group.join(name), text.lines().next().unwrap_or_default().to_owned());
                }
            }
        }
    }
    let groups = fs::read_to_string(format!("/proc/{child}/cgroup"))?;
    let mut its: Vec<&str> = groups.lines().filter_map(|line| line.split_once(':')).map(|(_, rest)| rest).collect();
    its.sort_unstable();
    shown.insert("child".into(), its.join(" "));
    Ok(shown)
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let child = sys::fork(|| {
        loop {
            nix::unistd::pause();
        }
    })?;
    let own = own()?;
    ensure!(!own.is_empty(), "there are no groups here");
    for folder in own {
        let (group, inner) = (folder.join("guest"), folder.join("guest/inner"));
        for made in [&group, &inner] {
            fs::create_dir(made).with_context(|| format!("make {}", made.display()))?;
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if made.join(file).exists() {
                    fs::copy(folder.join(file), made.join(file))?;
                }
            }
        }
        for (name, value) in SETTINGS {
            if group.join(name).exists() {
                fs::write(group.join(name), value).with_context(|| format!("set {name}"))?;
            }
        }
        chown(&group, Some(65534), Some(65534))?;
        fs::write(inner.join("cgroup.procs"), child.to_string())?;
    }
    Ok(Box::new(Subgroups { child, shown: show(child)? }))
}

impl Guest for Subgroups {
    fn verify(&mut self) -> Result<()> {
        let now = show(self.child)?;
        for (what, before) in &self.shown {
            ensure!(now.get(what) == Some(before), "{}: {:?}, not {before:?}", what.display(), now.get(what));
        }
        ensure!(now.len() == self.shown.len(), "there is more than before");
        Ok(())
    }
}
