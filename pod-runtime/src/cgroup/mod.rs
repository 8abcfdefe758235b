//! A pod's control groups: `pod/ID` in every hierarchy that the host has mounted and that matters; for an OCI container
//! the path that its caller has chosen, in every hierarchy there is ([`Cgroup::at`]).
//!
//! Membership, freezing and killing go through cgroup v2 (`unified`) wherever it is mounted, also on a hybrid host,
//! since a v2-frozen task can still be inspected and killed; limits go where the host keeps the controller. v1
//! controllers are set and read by cgroups-rs, one controller at a time on folders made here: its whole-group
//! operations make folders in foreign hierarchies and move live processes to the root group, which is an escape from
//! limits. A controller that the host does not have is a warning that names it.

mod devices;
mod fresh;
mod hierarchy;
mod limits;
pub mod throttle;

pub(crate) use devices::{Kind as DeviceKind, Rule as DeviceRule, usual as usual_devices};
pub use fresh::Fresh;
pub use hierarchy::{Hierarchies, visible};

use crate::problem::{Doing, Problem, Result};
use crate::spec::{Device, Resources};
use crate::sys::clone::{self, Cloned};
use crate::sys::{daemon, process};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

/// The control groups of one pod.
#[derive(Debug, Clone)]
pub struct Cgroup {
    hierarchies: Hierarchies,
    /// Below each hierarchy's mount.
    path: PathBuf,
    /// What is above it belongs to somebody else and stays.
    leaf_only: bool,
}

/// Where the kernel has put a child that is to be in a pod's groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Born {
    /// In that of v2.
    Inside,
    /// Where its parent is.
    Elsewhere,
}

/// What the pod uses now. `None` where the host has no controller that counts it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Stats {
    /// Bytes, without the page cache that could be given back at once.
    pub memory: Option<u64>,
    /// Bytes; `None` also when unlimited.
    pub memory_limit: Option<u64>,
    /// Microseconds since the pod began here.
    pub cpu: Option<u64>,
    pub pids: Option<u64>,
    /// How often the kernel's OOM killer killed something in it.
    pub oom_kills: Option<u64>,
}

impl Cgroup {
    /// Makes the pod's groups and sets its limits. The strings are what this host cannot limit.
    pub fn create(id: &str, resources: &Resources) -> Result<(Cgroup, Vec<String>)> {
        let cgroup = Self::begin(id)?;
        match cgroup.complete(resources) {
            Ok(warnings) => Ok((cgroup, warnings)),
            Err(problem) => {
                let _ = cgroup.remove(Duration::ZERO);
                Err(problem)
            }
        }
    }

    /// The first half of [`Cgroup::create`]: the group of v2, to be born into.
    pub(crate) fn begin(id: &str) -> Result<Cgroup> {
        let cgroup = Self::open(id)?;
        if let Some(folder) = cgroup.unified() {
            make(&folder).doing(|| format!("make the cgroup {}", folder.display()))?;
            // While nobody is in it: the kernel waits for all CPUs before it moves who is.
            limits::offer(&cgroup, |controller| ["memory", "cpu", "pids"].contains(&controller));
        }
        Ok(cgroup)
    }

    /// The second half: what a process enters later, and the limits.
    pub(crate) fn complete(&self, resources: &Resources) -> Result<Vec<String>> {
        for folder in self.folders() {
            make(&folder).doing(|| format!("make the cgroup {}", folder.display()))?;
        }
        self.copy_cpusets();
        limits::apply(self, resources)
    }

    /// The groups of a pod that was made earlier; never fails for one that is gone (it is then empty).
    pub fn open(id: &str) -> Result<Cgroup> {
        let hierarchies = Hierarchies::find()?;
        if hierarchies.unified.is_none() && hierarchies.v1.is_empty() {
            return Err(Problem::new("E-CGROUP", "this host has no cgroup hierarchy mounted")
                .fix("mount -t cgroup2 cgroup2 /sys/fs/cgroup"));
        }
        Ok(Cgroup { hierarchies, path: Path::new("pod").join(id), leaf_only: false })
    }

    /// The groups at a path that is somebody else's choice, in every hierarchy of the host, made or not.
    pub(crate) fn at(path: &Path) -> Result<Cgroup> {
        let path = path.strip_prefix("/").unwrap_or(path);
        if path.as_os_str().is_empty() || path.components().any(|part| !matches!(part, Component::Normal(_))) {
            let what = format!("the cgroup path '{}' is not one below a hierarchy's root", path.display());
            return Err(Problem::new("E-CGROUP", what));
        }
        Ok(Cgroup { hierarchies: Hierarchies::every()?, path: path.to_owned(), leaf_only: true })
    }

    /// The first half of making the groups in all hierarchies, with what is above them: the one of v2, to be born into.
    /// Groups that somebody is in already, or below which somebody is, are refused: the container's end is that of all in it.
    pub(crate) fn begin_here(&self) -> Result<()> {
        for folder in self.folders().filter(|folder| folder.exists()) {
            let mut inside = Vec::new();
            collect(&folder, &mut inside).doing(|| format!("list the processes of {}", folder.display()))?;
            if !inside.is_empty() {
                let what = format!(
                    "container's cgroup is not empty: {} process(es) found in {}",
                    inside.len(),
                    folder.display()
                );
                return Err(Problem::new("E-CGROUP", what));
            }
        }
        if let Some(folder) = self.unified() {
            make(&folder).doing(|| format!("make the cgroup {}", folder.display()))?;
            limits::offer(self, |_| true);
        }
        Ok(())
    }

    /// The second half.
    pub(crate) fn complete_here(&self) -> Result<()> {
        for folder in self.folders() {
            make(&folder).doing(|| format!("make the cgroup {}", folder.display()))?;
        }
        self.copy_cpusets();
        Ok(())
    }

    /// Its folder in the hierarchy that has this controller, and whether that is v2.
    pub(crate) fn with_controller(&self, controller: &str) -> Option<(PathBuf, bool)> {
        if let Some(folder) = self.v1(controller) {
            return Some((folder, false));
        }
        let folder = self.unified()?;
        let given = fs::read_to_string(folder.join("cgroup.controllers")).ok()?;
        given.split_whitespace().any(|c| c == controller).then_some((folder, true))
    }

    /// Puts another process into all groups, from outside. Waits for RCU in v1.
    pub(crate) fn take_in(&self, pid: i32) -> Result<()> {
        self.folders().try_for_each(|folder| join(&folder, pid))
    }

    /// Every v1 hierarchy that it has a folder in, with where that is mounted.
    pub(crate) fn hierarchies(&self) -> &Hierarchies {
        &self.hierarchies
    }

    /// The pod's folder in the v2 hierarchy.
    pub fn unified(&self) -> Option<PathBuf> {
        self.hierarchies.unified.as_ref().map(|mount| mount.join(&self.path))
    }

    /// A descriptor of that.
    fn unified_dir(&self) -> Option<OwnedFd> {
        fs::File::open(self.unified()?).ok().map(OwnedFd::from)
    }

    /// The pod's folder of a v1 controller.
    fn v1(&self, controller: &str) -> Option<PathBuf> {
        self.hierarchies.v1_of(controller).map(|v1| v1.mount.join(&self.path))
    }

    /// Its folder in the hierarchy of a v1 controller, where the host has that.
    pub(crate) fn v1_folder(&self, controller: &str) -> Option<PathBuf> {
        self.v1(controller)
    }

    /// The pod's folder in each hierarchy, with the hierarchy's name: its controllers of v1, nothing for v2.
    pub fn named_folders(&self) -> Vec<(String, PathBuf)> {
        let v1 = self.hierarchies.v1.iter().map(|v1| (v1.controllers.join(","), v1.mount.join(&self.path)));
        self.unified().map(|folder| (String::new(), folder)).into_iter().chain(v1).collect()
    }

    fn folders(&self) -> impl Iterator<Item = PathBuf> + '_ {
        let v1 = self.hierarchies.v1.iter().map(|v1| v1.mount.join(&self.path));
        self.unified().into_iter().chain(v1)
    }

    /// A new v1 cpuset is empty and takes no process.
    fn copy_cpusets(&self) {
        let Some(v1) = self.hierarchies.v1_of("cpuset") else { return };
        let mut above = v1.mount.clone();
        for part in self.path.components() {
            let folder = above.join(part);
            for file in ["cpuset.cpus", "cpuset.mems"] {
                let own = fs::read_to_string(folder.join(file)).unwrap_or_default();
                if own.trim().is_empty()
                    && let Ok(value) = fs::read_to_string(above.join(file))
                {
                    let _ = fs::write(folder.join(file), &value);
                }
            }
            above = folder;
        }
    }

    /// Whether the pod has groups here.
    pub fn exists(&self) -> bool {
        self.folders().any(|folder| folder.exists())
    }

    /// Host pids of all processes in it, none twice, never one ≤ 1.
    pub fn procs(&self) -> Result<Vec<i32>> {
        let mut pids = Vec::new();
        if let Some(folder) = self.folders().next() {
            collect(&folder, &mut pids).doing(|| format!("list the processes of {}", folder.display()))?;
        }
        pids.retain(|pid| *pid > 1);
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// A fork by clone3, with these flags, for a child that is to be in the pod's groups: born into the one of v2
    /// where the kernel can, it must call [`Cgroup::enter`] with what comes back.
    pub(crate) fn fork(&self, flags: u64) -> nix::Result<(Cloned, Born)> {
        let apart = || clone::clone3(flags, None, None).map(|cloned| (cloned, Born::Elsewhere));
        let Some(folder) = self.unified_dir() else { return apart() };
        match clone::clone3(flags, Some(folder.as_fd()), None) {
            // Linux 5.5 and 5.6 have clone3 and not this flag.
            Err(Errno::EINVAL | Errno::E2BIG) => apart(),
            cloned => Ok((cloned?, Born::Inside)),
        }
    }

    /// The same, beside a process that is in the groups. Whoever has given away controllers below a group of v2 (as systemd
    /// in a container does) keeps the kernel from taking processes in there: then it goes where that process has gone.
    pub(crate) fn fork_beside(&self, pid: i32) -> nix::Result<(Cloned, Born)> {
        match self.fork(0) {
            Err(Errno::EBUSY) => {
                let folder = self.group_of(pid).ok_or(Errno::EBUSY)?;
                let folder = fs::File::open(folder).map_err(|_| Errno::EBUSY)?;
                Ok((clone::clone3(0, Some(folder.as_fd()), None)?, Born::Inside))
            }
            cloned => cloned,
        }
    }

    /// The folder of v2 that a process is in, if that is below the own one.
    fn group_of(&self, pid: i32) -> Option<PathBuf> {
        let group = group(&format!("/proc/{pid}/cgroup"), "")?;
        let path = Path::new(&group).strip_prefix("/").ok()?;
        // It is text of the kernel's, but a group that is seen from another namespace begins with "..".
        let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
        let mount = self.hierarchies.unified.as_ref()?;
        (plain && path.starts_with(&self.path)).then(|| mount.join(path))
    }

    /// Puts the caller, which must be single-threaded, into all groups that it was not born into.
    pub(crate) fn enter(&self, born: Born) -> Result<()> {
        if let Some(folder) = self.unified().filter(|_| born == Born::Elsewhere) {
            join(&folder, 0)?;
        }
        // A thread that moves itself needs nobody's promise that its process stays as it is. For a process the kernel
        // (5.4 and later) waits until all CPUs have heard of it, 5 to 15 ms.
        self.hierarchies.v1.iter().try_for_each(|v1| write(&v1.mount.join(&self.path).join("tasks"), 0))
    }

    /// Where a process is made that can work while the pod is frozen: the caller's own group, and the view of the groups from
    /// which it can be seen. None where nothing can be born into a group: see [`Cgroup::step_out`].
    pub fn outside(&self) -> Option<Outside> {
        let own = self.hierarchies.unified.as_ref()?.join(own_group("")?.trim_start_matches('/'));
        let open = |path: &Path| fs::File::open(path).ok().map(OwnedFd::from);
        Some(Outside { group: open(&own)?, view: open(Path::new("/proc/self/ns/cgroup"))? })
    }

    /// Takes a helper of ours out of the group by which the pod is frozen and into the caller's own, so that it can work
    /// while the pod is. What it made before belongs to the pod's group still. Waits for RCU (5 to 10 ms).
    pub fn step_out(&self, pid: i32) -> Result<()> {
        let freezer = self.hierarchies.v1_of("freezer").map(|v1| (&v1.mount, "freezer"));
        let Some((mount, controller)) = self.hierarchies.unified.as_ref().map(|mount| (mount, "")).or(freezer) else {
            return Err(no_freezer());
        };
        let own = own_group(controller).unwrap_or_default();
        let left = join(&mount.join(own.trim_start_matches('/')), pid);
        // The caller's group is not to be seen from its own namespace: then the root of the hierarchy.
        left.or_else(|_| join(mount, pid))
    }

    /// Allows exactly the usual devices and `devices`; everything when `privileged`. The strings are what this host
    /// cannot keep away.
    pub fn allow_devices(&self, devices: &[Device], privileged: bool) -> Result<Vec<String>> {
        devices::allow(self, devices, privileged)
    }

    /// Keeps exactly this list: the last rule that matches counts, and what none matches is denied. The string is why
    /// this host cannot.
    pub(crate) fn keep_device_rules(&self, rules: &[DeviceRule]) -> Result<Option<String>> {
        devices::keep(self, rules)
    }

    pub fn stats(&self) -> Result<Stats> {
        Ok(limits::stats(self))
    }

    /// Returns when everything in it is frozen, or fails and thaws after `deadline`.
    pub fn freeze(&self, deadline: Duration) -> Result<()> {
        let end = Instant::now() + deadline;
        let done = match (self.unified(), self.v1("freezer")) {
            (Some(folder), _) => freeze_v2(&folder, end),
            (None, Some(folder)) => freeze_v1(&folder, end),
            (None, None) => return Err(no_freezer()),
        };
        done.map_err(|error| {
            let _ = self.thaw();
            let what = format!("the pod could not be frozen within {} ms", deadline.as_millis());
            Problem::new("E-CGROUP", what).because(error)
        })
    }

    pub fn thaw(&self) -> Result<()> {
        match (self.unified(), self.v1("freezer")) {
            (Some(folder), _) => fs::write(folder.join("cgroup.freeze"), "0"),
            (None, Some(folder)) => fs::write(folder.join("freezer.state"), "THAWED"),
            (None, None) => return Err(no_freezer()),
        }
        .doing(|| "thaw the pod".into())
    }

    pub fn frozen(&self) -> Result<bool> {
        let text = match (self.unified(), self.v1("freezer")) {
            (Some(folder), _) => fs::read_to_string(folder.join("cgroup.events")),
            (None, Some(folder)) => fs::read_to_string(folder.join("freezer.state")),
            (None, None) => return Ok(false),
        };
        let text = text.doing(|| "ask whether the pod is frozen".into())?;
        Ok(text.lines().any(|line| line == "frozen 1" || line == "FROZEN"))
    }

    /// SIGKILL to all of it, frozen or not. Returns when the kernel has taken the order, not when all are gone.
    pub fn kill(&self) -> Result<()> {
        if let Some(folder) = self.unified()
            && fs::write(folder.join("cgroup.kill"), "1").is_ok()
        {
            return Ok(());
        }
        // Before Linux 5.14: until nothing is found that had not been killed already, as forks go on meanwhile.
        let mut killed = Vec::new();
        for _ in 0..1000 {
            let before = killed.len();
            for pid in self.procs().unwrap_or_default() {
                let Ok(pidfd) = daemon::pidfd_open(pid) else { continue };
                // Only now is the number certain to be what it was in the list.
                let still = self.procs().is_ok_and(|now| now.contains(&pid));
                if still && !killed.contains(&pid) && process::kill_by_pidfd(pidfd.as_fd(), nix::libc::SIGKILL).is_ok()
                {
                    killed.push(pid);
                }
            }
            if killed.len() == before {
                break;
            }
        }
        // v1 holds the signal back until then.
        let _ = self.thaw();
        Ok(())
    }

    /// Removes the groups, nested ones too. Processes in them must be dead or dying: waits for them until the deadline.
    pub fn remove(&self, deadline: Duration) -> Result<()> {
        let end = Instant::now() + deadline;
        let mut failed = None;
        for folder in self.folders() {
            loop {
                match remove_tree(&folder) {
                    Ok(()) => break,
                    // A dead process holds its cgroup until the kernel has put it away.
                    Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) && Instant::now() < end => {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    Err(error) => {
                        failed = Some((folder.clone(), error));
                        break;
                    }
                }
            }
            fresh::forget(&folder);
            // The last pod takes the common parent away.
            if let Some(parent) = folder.parent().filter(|_| !self.leaf_only) {
                let _ = fs::remove_dir(parent);
            }
        }
        match failed {
            None => Ok(()),
            Some((folder, error)) => Err(error).code("E-CGROUP", || format!("remove the cgroup {}", folder.display())),
        }
    }
}

fn no_freezer() -> Problem {
    Problem::new("E-CGROUP", "this host can freeze nothing: neither cgroup v2 nor the v1 freezer is mounted")
        .fix("mount -t cgroup2 cgroup2 /sys/fs/cgroup")
}

/// Another pod's end may take the common parent away in between: then once more.
fn make(folder: &Path) -> io::Result<()> {
    for _ in 0..100 {
        match fs::create_dir(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => match folder.parent() {
                Some(parent) => make(parent)?,
                None => return Err(error),
            },
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
            other => return other,
        }
    }
    Err(io::Error::from(io::ErrorKind::NotFound))
}

/// The caller's group in the hierarchy of a v1 controller, or in that of v2 (`""`).
fn own_group(controller: &str) -> Option<String> {
    group("/proc/self/cgroup", controller)
}

fn group(file: &str, controller: &str) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let is_it =
        |names: &str| if controller.is_empty() { names.is_empty() } else { names.split(',').any(|n| n == controller) };
    text.lines().find_map(|line| {
        let (names, path) = line.split_once(':')?.1.split_once(':')?;
        is_it(names).then(|| path.to_owned())
    })
}

/// Descriptors of a group that is not the pod's, and of a cgroup namespace that shows it.
#[derive(Debug)]
pub struct Outside {
    pub group: OwnedFd,
    pub view: OwnedFd,
}

impl Outside {
    /// Goes on as a new process, a sibling with this pid that is in that group and in the caller's of all other hierarchies, and
    /// shares all descriptors. Nothing is waited for, as it is to move a process. The caller is single-threaded.
    pub fn succeed(&self, pid: i32) -> nix::Result<Cloned> {
        // Where groups are delegated by namespaces (systemd), both groups must be seen from that of the caller.
        clone::setns(self.view.as_fd(), libc::CLONE_NEWCGROUP)?;
        clone::clone3((libc::CLONE_FILES | libc::CLONE_PARENT) as u64, Some(self.group.as_fd()), Some(pid))
    }
}

/// 0 is the caller.
fn join(folder: &Path, pid: i32) -> Result<()> {
    write(&folder.join("cgroup.procs"), pid)
}

fn write(members: &Path, pid: i32) -> Result<()> {
    let folder = members.parent().unwrap_or(members).display();
    fs::write(members, pid.to_string()).doing(|| format!("put process {pid} into the cgroup {folder}"))
}

fn collect(folder: &Path, pids: &mut Vec<i32>) -> io::Result<()> {
    match fs::read_to_string(folder.join("cgroup.procs")) {
        Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        // A threaded group of the pod's own: its processes are listed in the group above.
        Err(error) if error.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => {}
        Err(error) if error.raw_os_error() == Some(Errno::ENODEV as i32) => return Ok(()),
        Err(error) => return Err(error),
    }
    for below in subfolders(folder) {
        collect(&below, pids)?;
    }
    Ok(())
}

fn subfolders(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect()
}

fn remove_tree(folder: &Path) -> io::Result<()> {
    // Most have nothing below them, and to list one of these folders takes longer than to remove it.
    match fs::remove_dir(folder) {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(_) => {}
    }
    for below in subfolders(folder) {
        remove_tree(&below)?;
    }
    match fs::remove_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn freeze_v2(folder: &Path, end: Instant) -> io::Result<()> {
    let mut events = fs::File::open(folder.join("cgroup.events"))?;
    fs::write(folder.join("cgroup.freeze"), "1")?;
    loop {
        let mut text = String::new();
        events.rewind()?;
        events.read_to_string(&mut text)?;
        if text.lines().any(|line| line == "frozen 1") {
            return Ok(());
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // The kernel raises POLLPRI when the file has changed since it was read.
        let timeout = PollTimeout::try_from(left.as_millis().clamp(1, 1000) as i32).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(events.as_fd(), PollFlags::POLLPRI)], timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The state reads FREEZING for a while, and a task that forks meanwhile can keep it there until it is asked again.
fn freeze_v1(folder: &Path, end: Instant) -> io::Result<()> {
    let state = folder.join("freezer.state");
    loop {
        fs::write(&state, "FROZEN")?;
        if fs::read_to_string(&state)?.trim() == "FROZEN" {
            return Ok(());
        }
        if Instant::now() >= end {
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}
