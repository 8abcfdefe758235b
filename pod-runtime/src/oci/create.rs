//! The creation of a container from outside: its folder, its groups, one clone, its hooks, its pid file.
//!
//! What is made is owned by [`Half`], which takes it away again when anything fails: a container is there whole or not
//! at all. When [`create`] returns, no process of the runtime is left between the caller and the first process.

use super::bundle::{self, Bundle};
use super::first::{First, GO, News};
use super::mounts::{self, Plan as Mounts};
use super::namespaces::{self, Plan as Namespaces};
use super::store::{Container, Containers, Lock, State, Status, began, write_file};
use super::{devices, hooks, life, listener, resources, wrong};
use crate::cgroup::{Born, Cgroup};
use crate::problem::{Doing, Problem, Result};
use crate::security::seccomp::Filter;
use crate::sys::clone::{self, Cloned};
use crate::sys::{daemon, process};
use crate::when;
use nix::libc;
use oci_spec::runtime::{Hooks, Linux, Spec};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What the caller wants beside the bundle.
#[derive(Debug, Default)]
pub struct Options {
    pub bundle: PathBuf,
    /// Who gets the terminal.
    pub console: Option<UnixStream>,
    pub pid_file: Option<PathBuf>,
    /// So many descriptors from 3 on go to the program.
    pub preserve_fds: i32,
    pub no_pivot: bool,
    pub no_new_keyring: bool,
    /// No control groups at all.
    pub no_cgroups: bool,
}

/// A message of the first process is no longer.
const BOUND: u64 = 1 << 20;

/// Makes a container that waits to be started.
pub fn create(containers: &Containers, id: &str, options: &Options) -> Result<Container> {
    bundle::check_id(id)?;
    let mut bundle = Bundle::load(&options.bundle)?;
    if bundle.spec.linux().is_none() {
        bundle.spec.set_linux(Some(Linux::default()));
    }
    check_terminal(&bundle.spec, options)?;
    let rootfs = bundle.rootfs()?.canonicalize().doing(|| "find the root of the bundle".into())?;
    let annotations = bundle.spec.annotations().iter().flatten().map(|(name, value)| (name.clone(), value.clone()));
    let state = State {
        id: id.to_owned(),
        bundle: bundle.folder.clone(),
        rootfs: rootfs.clone(),
        created: when::rfc3339(when::now_ns()),
        owner: owner(),
        annotations: annotations.collect::<BTreeMap<_, _>>(),
        cgroup: None,
        creating: true,
        no_new_keyring: options.no_new_keyring,
        ..State::default()
    };
    let (container, lock) = containers.claim(&state, &bundle.raw)?;
    let hooks = bundle.spec.hooks().clone();
    let mut half = Half { container: Some(container.clone()), cgroup: None, first: None, state, hooks, lock };
    make(&mut half, &container, &bundle, options)?;
    half.container = None;
    half.first = None;
    Ok(container)
}

fn check_terminal(spec: &Spec, options: &Options) -> Result<()> {
    let wants = spec.process().as_ref().and_then(|process| process.terminal()).unwrap_or(false);
    match (wants, &options.console) {
        (true, None) => Err(wrong("cannot allocate tty if runtime will detach without setting console socket")),
        (false, Some(_)) => Err(wrong("cannot use console socket if runtime will not detach or allocate tty")),
        _ => Ok(()),
    }
}

fn cgroup_path(spec: &Spec, id: &str) -> PathBuf {
    let given = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().as_ref());
    match given.filter(|path| !path.as_os_str().is_empty()) {
        Some(path) => Path::new("/").join(path),
        None => Path::new("/").join(id),
    }
}

fn owner() -> String {
    let uid = nix::unistd::getuid();
    if uid.is_root() { "root".to_owned() } else { uid.to_string() }
}

/// A container that is being made. Dropping it takes away what there is.
struct Half {
    container: Option<Container>,
    cgroup: Option<Cgroup>,
    first: Option<(i32, OwnedFd)>,
    state: State,
    /// Those that run after the end.
    hooks: Option<Hooks>,
    /// Held until the container is whole, or gone again.
    lock: Lock,
}

impl Half {
    /// Groups that nobody is in; they are the container's only after that is known.
    fn begin_groups(&mut self, container: &Container, spec: &Spec, options: &Options) -> Result<()> {
        if options.no_cgroups {
            return Ok(());
        }
        let path = cgroup_path(spec, container.id());
        let cgroup = Cgroup::at(&path)?;
        cgroup.begin_here()?;
        self.cgroup = Some(cgroup);
        self.state.cgroup = Some(path);
        container.set_state(&self.state)
    }
}

impl Drop for Half {
    fn drop(&mut self) {
        if let Some((pid, pidfd)) = &self.first {
            let _ = process::kill_by_pidfd(pidfd.as_fd(), libc::SIGKILL);
            let _ = daemon::reap(*pid);
        }
        let Some(container) = &self.container else { return };
        if let Some(cgroup) = &self.cgroup {
            let _ = cgroup.kill();
            let _ = cgroup.remove(Duration::from_secs(2));
        }
        container.forget();
        if self.first.is_some() {
            let shown = container.shown(&self.state, Status::Stopped);
            let hooks = self.hooks.as_ref().and_then(|hooks| hooks.poststop().as_ref());
            for hook in hooks.into_iter().flatten() {
                // The problem that is told is the one that ended it.
                let _ = hooks::run("poststop", &Some(vec![hook.clone()]), &shown);
            }
        }
    }
}

fn make(half: &mut Half, container: &Container, bundle: &Bundle, options: &Options) -> Result<()> {
    let linux = bundle.spec.linux().clone().unwrap_or_default();
    let namespaces = Namespaces::open(&linux)?;
    let hidden = hide()?;
    let filter = linux.seccomp().as_ref().map(Filter::of_oci).transpose()?;
    let listener = listener::connect(&linux, filter.as_ref())?;
    let (folder, address) = container.start_socket()?;
    let start = UnixListener::bind(&address).doing(|| "make the start socket".into())?;
    // An ordinary user may take nothing of the host's mounts: there the first process takes what it sees of them.
    let taken = match nix::unistd::geteuid().is_root() {
        true => Some((mounts::root(&half.state.rootfs)?, Mounts::open(&bundle.spec, &bundle.folder)?)),
        false => None,
    };
    half.begin_groups(container, &bundle.spec, options)?;
    let cgroup = half.cgroup.clone();
    let (ours, theirs) = UnixStream::pair().doing(|| "make a socket pair".into())?;
    let own_groups = cgroup.as_ref().filter(|_| !namespaces.has_user());
    let born = around(&namespaces, own_groups)?;
    let (pid, pidfd) = match born {
        (Cloned::Child, place) => {
            drop((ours, folder));
            // It is the maker's alone, and free when that dies.
            daemon::close_number(half.lock.as_raw_fd());
            let first = First {
                bundle,
                shown: container.shown(&half.state, Status::Creating),
                namespaces: &namespaces,
                taken,
                rootfs: &half.state.rootfs.clone(),
                enter: own_groups.map(|cgroup| (cgroup, place)),
                cgroup: cgroup.as_ref(),
                sync: theirs,
                start: &start,
                console: options.console.as_ref(),
                listener: listener.as_ref(),
                filter: filter.as_ref(),
                no_pivot: options.no_pivot,
                new_keyring: !options.no_new_keyring,
                preserve_fds: options.preserve_fds,
                hidden,
            };
            // Nothing of the maker's may be undone here.
            let _ = catch_unwind(AssertUnwindSafe(|| first.live()));
            daemon::exit_now(1)
        }
        (Cloned::Parent { pid, pidfd }, _) => (pid, pidfd),
    };
    drop((theirs, start, taken));
    half.first = Some((pid, pidfd));
    half.state.pid = pid;
    // One that has died already has said why.
    half.state.start_time = began(pid).unwrap_or(0);
    // From here on whoever deletes what is left of it knows whom to end.
    container.set_state(&half.state)?;
    let groups = (cgroup.as_ref(), own_groups.is_none());
    supply(pid, groups, &namespaces, &bundle.spec).map_err(|problem| said(&ours).unwrap_or(problem))?;
    attend(half, container, bundle, &ours)?;
    finish(half, container, options)
}

/// What it makes is born as it is, so that there is no instant at which something inside could look at it or trace it.
/// An ordinary user would be kept from writing the maps of what it makes.
fn hide() -> Result<bool> {
    let root = nix::unistd::geteuid().is_root();
    if root {
        process::set_dumpable(false).doing(|| "hide from the container's processes".into())?;
    }
    Ok(root)
}

/// What the first process cannot give itself, made while it makes the rest. Whether it is to be put into the groups.
fn supply(pid: i32, groups: (Option<&Cgroup>, bool), namespaces: &Namespaces, spec: &Spec) -> Result<()> {
    let none = Linux::default();
    let linux = spec.linux().as_ref().unwrap_or(&none);
    if let Some(cgroup) = groups.0 {
        set_up(cgroup, linux)?;
    }
    if namespaces.has_new(libc::CLONE_NEWUSER) {
        let (uids, gids) = (linux.uid_mappings().as_deref(), linux.gid_mappings().as_deref());
        namespaces::write_maps(pid, uids.unwrap_or_default(), gids.unwrap_or_default())?;
    }
    if let (Some(cgroup), true) = groups {
        cgroup.take_in(pid)?;
    }
    adjust_oom_score(spec, pid)
}

/// What the first process has complained of, if it has.
fn said(sync: &UnixStream) -> Option<Problem> {
    sync.set_nonblocking(true).ok()?;
    let mut line = String::new();
    BufReader::new(sync).take(BOUND).read_line(&mut line).ok()?;
    match serde_json::from_str(&line).ok()? {
        News::Problem(report) => Some(report.into()),
        _ => None,
    }
}

/// The clone. In a user namespace by path it is made by a child that has gone there, as its sibling.
fn around(namespaces: &Namespaces, cgroup: Option<&Cgroup>) -> Result<(Cloned, Born)> {
    let flags = namespaces.flags() as u64;
    if namespaces.joins_user() {
        return in_joined_user(namespaces, flags);
    }
    namespaces.around(|| {
        let cloned = match cgroup {
            Some(cgroup) => cgroup.fork(flags),
            None => clone::clone3(flags, None, None).map(|cloned| (cloned, Born::Elsewhere)),
        };
        cloned.doing(|| "make the container's namespaces".into())
    })
}

fn in_joined_user(namespaces: &Namespaces, flags: u64) -> Result<(Cloned, Born)> {
    let (mut told, mut tell) = std::io::pipe().doing(|| "make a pipe".into())?;
    match daemon::fork().doing(|| "fork".into())? {
        daemon::Fork::Child => {
            let parent = libc::CLONE_PARENT as u64;
            let joined = namespaces.join_user();
            // The change of rights has made it visible to who is in there, and what it makes next with it.
            let hidden = joined
                .and_then(|()| process::set_dumpable(false).doing(|| "hide from the container's processes".into()));
            let cloned = hidden.and_then(|()| {
                namespaces.around(|| {
                    let cloned = clone::clone3(flags | parent, None, None);
                    Ok((cloned.doing(|| "make the container's namespaces".into())?, Born::Elsewhere))
                })
            });
            let said = match cloned {
                Ok((Cloned::Child, place)) => return Ok((Cloned::Child, place)),
                Ok((Cloned::Parent { pid, .. }, _)) => Ok(pid),
                Err(problem) => Err(problem.report()),
            };
            let _ = tell.write_all(&serde_json::to_vec(&said).unwrap_or_default());
            daemon::exit_now(0)
        }
        daemon::Fork::Parent(between) => {
            drop(tell);
            let _ = daemon::reap(between);
            // The child of the child holds the other end open: what is there is all.
            let mut said = [0; 4096];
            let count = told.read(&mut said).doing(|| "hear from a helper".into())?;
            let pid: std::result::Result<i32, crate::problem::Report> =
                serde_json::from_slice(&said[..count]).doing(|| "join the user namespace".into())?;
            let pid = pid.map_err(Problem::from)?;
            Ok((Cloned::Parent { pid, pidfd: namespaces::process(pid)? }, Born::Elsewhere))
        }
    }
}

/// Groups, limits, devices, before anything of the user's is in them.
fn set_up(cgroup: &Cgroup, linux: &Linux) -> Result<()> {
    cgroup.complete_here()?;
    let none = oci_spec::runtime::LinuxResources::default();
    let given = linux.resources().as_ref().unwrap_or(&none);
    let rules = devices::rules(given.devices().as_deref().unwrap_or_default())?;
    if let Some(why) = cgroup.keep_device_rules(&rules)? {
        return Err(Problem::new("E-CGROUP", why));
    }
    resources::apply(cgroup, given)
}

fn adjust_oom_score(spec: &Spec, pid: i32) -> Result<()> {
    let Some(score) = spec.process().as_ref().and_then(|process| process.oom_score_adj()) else { return Ok(()) };
    let path = format!("/proc/{pid}/oom_score_adj");
    let now = fs::read_to_string(&path).unwrap_or_default();
    if now.trim() == score.to_string() {
        return Ok(());
    }
    fs::write(&path, score.to_string()).doing(|| format!("write {score} to oom_score_adj"))
}

/// Does its part while the first process builds the container.
fn attend(half: &Half, container: &Container, bundle: &Bundle, sync: &UnixStream) -> Result<()> {
    let died = || Problem::new("E-SYSTEM", "the container's first process died while it was made");
    let mut go = vec![GO];
    go.extend_from_slice(&half.state.pid.to_ne_bytes());
    // One that is gone has said why before.
    let _ = (&mut &*sync).write_all(&go);
    let hooks = bundle.spec.hooks().clone().unwrap_or_default();
    let mut lines = BufReader::new(sync).take(BOUND);
    loop {
        let mut line = String::new();
        if lines.read_line(&mut line).doing(|| "hear from the first process".into())? == 0 {
            return Err(died());
        }
        match serde_json::from_str(&line).doing(|| "hear from the first process".into())? {
            News::Built => {
                let shown = container.shown(&half.state, Status::Creating);
                #[allow(deprecated)]
                hooks::run("prestart", hooks.prestart(), &shown)?;
                hooks::run("createRuntime", hooks.create_runtime(), &shown)?;
                let _ = (&mut &*sync).write_all(&[GO]);
            }
            // It closes its end next: what it has open from then on is what it will have.
            News::Ready => {
                let mut rest = Vec::new();
                return lines.read_to_end(&mut rest).doing(|| "hear from the first process".into()).map(drop);
            }
            News::Problem(report) => return Err(report.into()),
        }
    }
}

fn finish(half: &mut Half, container: &Container, options: &Options) -> Result<()> {
    if let Some(path) = &options.pid_file {
        write_file(path, half.state.pid.to_string().as_bytes(), 0o644)?;
    }
    half.state.creating = false;
    container.set_state(&half.state)
}

/// Creates and starts.
pub fn run(containers: &Containers, id: &str, options: &Options) -> Result<Container> {
    let container = create(containers, id, options)?;
    match life::start(&container) {
        Ok(()) => Ok(container),
        Err(problem) => {
            let _ = life::delete(&container, true);
            Err(problem)
        }
    }
}
