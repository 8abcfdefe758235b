//! The namespaces of a container: which are new, which are joined by path, and the maps of a user namespace.
//!
//! Those of processes that are yet to be made (pid, time) are entered by the runtime around its clone, which comes back
//! from them at once: hooks run in the namespaces of the runtime. All others are the first process's own business.

use super::wrong;
use crate::birth::{self, Clocks};
use crate::problem::{Doing, Problem, Result};
use crate::sys::clone::{self, Cloned};
use crate::sys::{daemon, pidfd};
use nix::fcntl::{OFlag, open};
use nix::libc;
use nix::sys::stat::Mode;
use oci_spec::runtime::{Linux, LinuxIdMapping, LinuxNamespaceType};
use std::fs;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

#[derive(Debug)]
pub struct Plan {
    /// CLONE_NEW… of those that are made.
    pub new: i32,
    /// Those that are joined.
    joined: Vec<(i32, OwnedFd)>,
    clocks: Option<Clocks>,
}

fn flag(kind: LinuxNamespaceType) -> i32 {
    match kind {
        LinuxNamespaceType::Mount => libc::CLONE_NEWNS,
        LinuxNamespaceType::Cgroup => libc::CLONE_NEWCGROUP,
        LinuxNamespaceType::Uts => libc::CLONE_NEWUTS,
        LinuxNamespaceType::Ipc => libc::CLONE_NEWIPC,
        LinuxNamespaceType::User => libc::CLONE_NEWUSER,
        LinuxNamespaceType::Pid => libc::CLONE_NEWPID,
        LinuxNamespaceType::Network => libc::CLONE_NEWNET,
        LinuxNamespaceType::Time => libc::CLONE_NEWTIME,
    }
}

impl Plan {
    pub fn open(linux: &Linux) -> Result<Plan> {
        let mut plan = Plan { new: 0, joined: Vec::new(), clocks: None };
        for namespace in linux.namespaces().iter().flatten() {
            let flag = flag(namespace.typ());
            match namespace.path().as_ref().filter(|path| !path.as_os_str().is_empty()) {
                None => plan.new |= flag,
                Some(path) => plan.join(flag, path)?,
            }
        }
        if plan.new & libc::CLONE_NEWTIME != 0 {
            plan.clocks = Some(clocks(linux)?);
        }
        Ok(plan)
    }

    fn join(&mut self, flag: i32, path: &Path) -> Result<()> {
        let namespace = open(path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
            .doing(|| format!("lstat {}: open the namespace", path.display()))?;
        if !is_namespace(namespace.as_fd()) {
            return Err(wrong(format!("{} is no namespace", path.display())));
        }
        self.joined.push((flag, namespace));
        Ok(())
    }

    pub fn has_new(&self, flag: i32) -> bool {
        self.new & flag != 0
    }

    fn joins(&self, flag: i32) -> Option<&OwnedFd> {
        self.joined.iter().find(|(kind, _)| *kind == flag).map(|(_, fd)| fd)
    }

    /// Whether it is in another user namespace than the runtime.
    pub fn has_user(&self) -> bool {
        self.has_new(libc::CLONE_NEWUSER) || self.joins_user()
    }

    /// A user namespace by path: whoever joins it has no way back.
    pub fn joins_user(&self) -> bool {
        self.joins(libc::CLONE_NEWUSER).is_some()
    }

    /// What the clone makes. A cgroup namespace has the group that it is made in as its root, a time namespace is made
    /// before, and the one of the network takes longest: the first process makes it while others have something to do.
    pub fn flags(&self) -> i32 {
        self.new & !(libc::CLONE_NEWCGROUP | libc::CLONE_NEWTIME | libc::CLONE_NEWNET)
    }

    /// Runs `clone`, the child in the pid and time namespaces of the container, the caller back in its own.
    pub fn around<T>(&self, clone: impl FnOnce() -> Result<(Cloned, T)>) -> Result<(Cloned, T)> {
        // With a user namespace that is new, what is joined belongs to another one, in which the child has no rights.
        let early: i32 = libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWCGROUP;
        let early = if self.has_new(libc::CLONE_NEWUSER) { early } else { 0 };
        let kinds: Vec<(i32, &OwnedFd)> = self
            .joined
            .iter()
            .filter(|(kind, _)| kind & (early | libc::CLONE_NEWPID | libc::CLONE_NEWTIME) != 0)
            .map(|(kind, fd)| (*kind, fd))
            .collect();
        let own = kinds.iter().map(|(kind, _)| Ok((*kind, own(*kind)?))).collect::<Result<Vec<_>>>()?;
        for (kind, fd) in kinds {
            clone::setns(fd.as_fd(), kind).doing(|| "join a namespace".into())?;
        }
        let cloned = match self.clocks {
            Some(clocks) => birth::in_time_namespace(clocks, clone),
            None => clone(),
        };
        // Whoever has joined the user namespace has no rights to go back, and nothing to do there.
        if !matches!(cloned, Ok((Cloned::Child, _))) && !self.joins_user() {
            for (kind, fd) in own {
                clone::setns(fd.as_fd(), kind).doing(|| "go back to the own namespace".into())?;
            }
        }
        cloned
    }

    /// In the first process: joins all others but one of mounts.
    pub fn join_the_rest(&self) -> Result<()> {
        let before = libc::CLONE_NEWPID | libc::CLONE_NEWTIME | libc::CLONE_NEWUSER | libc::CLONE_NEWNS;
        let early: i32 = libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWCGROUP;
        let before = before | if self.has_new(libc::CLONE_NEWUSER) { early } else { 0 };
        for (kind, fd) in self.joined.iter().filter(|(kind, _)| kind & before == 0) {
            clone::setns(fd.as_fd(), *kind).doing(|| "join a namespace".into())?;
        }
        Ok(())
    }

    /// The last, for from there on the host's folders are not to be seen.
    pub fn join_mounts(&self) -> Result<()> {
        let Some(mounts) = self.joins(libc::CLONE_NEWNS) else { return Ok(()) };
        clone::setns(mounts.as_fd(), libc::CLONE_NEWNS).doing(|| "join the mount namespace".into())
    }

    /// In whoever goes on in the user namespace that is joined.
    pub fn join_user(&self) -> Result<()> {
        let Some(user) = self.joins(libc::CLONE_NEWUSER) else { return Ok(()) };
        clone::setns(user.as_fd(), libc::CLONE_NEWUSER).doing(|| "join the user namespace".into())
    }
}

fn own(kind: i32) -> Result<OwnedFd> {
    let name = match kind {
        libc::CLONE_NEWNET => "net",
        libc::CLONE_NEWIPC => "ipc",
        libc::CLONE_NEWUTS => "uts",
        libc::CLONE_NEWCGROUP => "cgroup",
        libc::CLONE_NEWPID => "pid",
        _ => "time",
    };
    open(format!("/proc/self/ns/{name}").as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
        .doing(|| format!("open the own {name} namespace"))
}

fn clocks(linux: &Linux) -> Result<Clocks> {
    let mut clocks = Clocks::default();
    for (name, offset) in linux.time_offsets().iter().flatten() {
        let nanoseconds =
            i128::from(offset.secs().unwrap_or(0)) * 1_000_000_000 + i128::from(offset.nanosecs().unwrap_or(0));
        match name.as_str() {
            "monotonic" => clocks.monotonic = nanoseconds,
            "boottime" => clocks.boottime = nanoseconds,
            other => return Err(wrong(format!("invalid clock {other:?} in timeOffsets"))),
        }
    }
    Ok(clocks)
}

/// Writes the maps of a process in a user namespace that it has just been made in.
pub fn write_maps(pid: i32, uids: &[LinuxIdMapping], gids: &[LinuxIdMapping]) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        // Without it the kernel lets an ordinary user map no group.
        fs::write(format!("/proc/{pid}/setgroups"), "deny").doing(|| "give up setting groups".into())?;
    }
    for (file, maps) in [("uid_map", uids), ("gid_map", gids)] {
        let lines: String =
            maps.iter().map(|map| format!("{} {} {}\n", map.container_id(), map.host_id(), map.size())).collect();
        let path = format!("/proc/{pid}/{file}");
        fs::write(&path, lines).doing(|| format!("write {file} of the container's user namespace"))?;
    }
    Ok(())
}

/// A user namespace with these maps, for the owners of files of a mount. Its only process is one that the caller makes:
/// hidden, if the caller is.
pub fn for_owners(uids: &[LinuxIdMapping], gids: &[LinuxIdMapping]) -> Result<OwnedFd> {
    let (mut wait, go) = std::io::pipe().doing(|| "make a pipe".into())?;
    let flags = libc::CLONE_NEWUSER as u64;
    match clone::clone3(flags, None, None).doing(|| "make a user namespace".into())? {
        Cloned::Child => {
            drop(go);
            let _ = wait.read(&mut [0]);
            daemon::exit_now(0)
        }
        Cloned::Parent { pid, .. } => {
            let open = || {
                let path = format!("/proc/{pid}/ns/user");
                nix::fcntl::open(path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
                    .doing(|| "open a user namespace".into())
            };
            let made = write_maps(pid, uids, gids).and_then(|()| open());
            drop(go);
            let _ = daemon::reap(pid);
            made
        }
    }
}

const PROC: i64 = 0x9fa0;
const NAMESPACES: i64 = 0x6e73_6673;

fn is_namespace(fd: BorrowedFd<'_>) -> bool {
    nix::sys::statfs::fstatfs(fd).is_ok_and(|found| found.filesystem_type().0 == NAMESPACES)
}

pub fn is_procfs(fd: BorrowedFd<'_>) -> bool {
    nix::sys::statfs::fstatfs(fd).is_ok_and(|found| found.filesystem_type().0 == PROC)
}

/// Those of a process's namespaces that are not the caller's, as flags for setns(2).
pub fn foreign(pid: i32) -> Result<i32> {
    let kinds = [
        ("user", libc::CLONE_NEWUSER),
        ("mnt", libc::CLONE_NEWNS),
        ("net", libc::CLONE_NEWNET),
        ("ipc", libc::CLONE_NEWIPC),
        ("uts", libc::CLONE_NEWUTS),
        ("cgroup", libc::CLONE_NEWCGROUP),
        ("pid", libc::CLONE_NEWPID),
        ("time", libc::CLONE_NEWTIME),
    ];
    let mut flags = 0;
    for (name, flag) in kinds {
        let link = |whose: &str| fs::read_link(format!("/proc/{whose}/ns/{name}"));
        let (Ok(own), found) = (link("self"), link(&pid.to_string())) else { continue };
        let found = found.doing(|| format!("look at the {name} namespace of process {pid}"))?;
        if own != found {
            flags |= flag;
        }
    }
    Ok(flags)
}

/// A process that is there, by number, as an object.
pub fn process(pid: i32) -> Result<OwnedFd> {
    pidfd::open(pid).map_err(|error| Problem::new("E-OCI-STATE", "container not running").because(error))
}
