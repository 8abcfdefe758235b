//! The mounts of a container: what of the host goes in is taken by the runtime, in the host's namespaces, as detached
//! trees ([`Plan`]); the first process attaches them, and what is new, one after the other to objects inside the root
//! that it holds ([`Plan::mount`]).
//!
//! No path of the root is walked by the kernel without RESOLVE_IN_ROOT and none twice, so a symlink or a rename in an
//! image or a shared volume leads to another place in the same root at worst. /proc, /sys and /dev must be plain
//! folders: what protects them goes by their names.

use super::options::{Attributes, Options};
use super::{bundle, namespaces, wrong};
use crate::cgroup::Cgroup;
use crate::problem::{Doing, Problem, Result};
use crate::rootfs::CgroupView;
use crate::rootfs::tree::{self, Tree, Want};
use crate::sys::mount::{self, Change, MOUNT_ATTR_RDONLY};
use nix::errno::Errno;
use nix::libc;
use oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// What is mounted, in order.
#[derive(Debug)]
pub struct Plan {
    mounts: Vec<Planned>,
}

#[derive(Debug)]
struct Planned {
    at: PathBuf,
    options: Options,
    what: What,
}

#[derive(Debug)]
enum What {
    /// A tree of the host, detached.
    Bound(OwnedFd),
    New {
        kind: CString,
        source: CString,
    },
    Cgroup,
}

impl Plan {
    /// Called in the namespaces of the runtime, with its rights.
    pub fn open(spec: &Spec, folder: &Path) -> Result<Plan> {
        let mounts = spec.mounts().iter().flatten();
        Ok(Plan { mounts: mounts.map(|mount| open(mount, spec, folder)).collect::<Result<_>>()? })
    }

    /// Whether the container's /dev is to be filled with devices: not when it is the host's.
    pub fn has_own_dev(&self) -> bool {
        !self.mounts.iter().any(|mount| mount.at == Path::new("/dev") && matches!(mount.what, What::Bound(_)))
    }

    /// Mounts all of it into `root`. What comes back is to be made read-only when all that goes into it is there: places
    /// for other mounts, devices, the console.
    pub fn mount(&self, root: &Tree, cgroup: Option<&Cgroup>, cgroup_namespace: bool) -> Result<Vec<OwnedFd>> {
        let mut to_protect = Vec::new();
        for mount in &self.mounts {
            let done = match &mount.what {
                What::Bound(tree) => mount.bind(root, tree),
                What::New { kind, source } => mount.make(root, kind, source).map(|made| to_protect.extend(made)),
                What::Cgroup => mount.show_groups(root, cgroup, cgroup_namespace),
            };
            done.doing(|| format!("error mounting to rootfs at {}", mount.at.display()))?;
        }
        Ok(to_protect)
    }
}

fn open(given: &Mount, spec: &Spec, folder: &Path) -> Result<Planned> {
    let at = Path::new("/").join(given.destination());
    let mut options = Options::parse(given.options().as_deref().unwrap_or_default())?;
    let kind = given.typ().as_deref().unwrap_or("none");
    let maps = given.uid_mappings().is_some() || given.gid_mappings().is_some();
    if maps && options.idmap.is_none() {
        options.idmap = Some(false);
    }
    let what = if options.bind.is_some() || kind == "bind" {
        let source =
            given.source().as_ref().ok_or_else(|| wrong(format!("bind mount {} has no source", at.display())))?;
        What::Bound(take(&folder.join(source), &options, given, spec)?)
    } else if options.idmap.is_some() {
        return Err(wrong(format!("mount {}: only bind mounts can be idmapped", at.display())));
    } else if kind == "cgroup" || kind == "cgroup2" {
        What::Cgroup
    } else {
        let text = |text: &str| CString::new(text).doing(|| format!("mount {}", at.display()));
        let source = given.source().as_ref().map_or(kind.into(), |source| source.to_string_lossy());
        What::New { kind: text(kind)?, source: text(&source)? }
    };
    Ok(Planned { at, options, what })
}

/// A detached tree of the host, with what the bind mount is to be.
fn take(source: &Path, options: &Options, given: &Mount, spec: &Spec) -> Result<OwnedFd> {
    let recursive = options.bind.unwrap_or(false);
    let tree = tree::clone_of_host(source, recursive)?;
    let change = |change: &Change<'_>, all: bool, what: &str| {
        mount::change(tree.as_fd(), change, all).doing(|| format!("{what} of the bind mount of {}", source.display()))
    };
    // What the host mounts later comes along, and nothing goes back, unless it is asked for.
    let usual = match spec.linux().as_ref().and_then(|linux| linux.rootfs_propagation().as_deref()) {
        Some("private" | "rprivate") => libc::MS_PRIVATE,
        _ => libc::MS_SLAVE,
    };
    let shares = options.propagation.iter().any(|(kind, _)| *kind == libc::MS_SHARED);
    if !shares {
        change(&Change { propagation: usual, ..Change::default() }, true, "set the propagation")?;
    }
    if let Some(all) = options.idmap {
        let of_mount = given.uid_mappings().as_deref().zip(given.gid_mappings().as_deref());
        let linux = spec.linux().as_ref();
        let own = linux.and_then(|linux| linux.uid_mappings().as_deref().zip(linux.gid_mappings().as_deref()));
        let (uids, gids) = of_mount.or(own).ok_or_else(|| {
            wrong(format!("idmap mount of {} has no mappings and the container no user namespace", source.display()))
        })?;
        let owners = namespaces::for_owners(uids, gids)?;
        let owners = Change { owners: Some(owners.as_fd()), ..Change::default() };
        change(&owners, all, "map the owners")?;
    }
    for (attributes, all) in [(options.recursive, true), (options.attributes, false)] {
        if !attributes.is_empty() {
            let Attributes { set, clear } = attributes;
            change(&Change { set, clear, ..Change::default() }, all, "set the attributes")?;
        }
    }
    for (propagation, all) in &options.propagation {
        change(&Change { propagation: *propagation, ..Change::default() }, *all, "set the propagation")?;
    }
    Ok(tree)
}

/// What must be a plain folder of the root.
fn is_the_kernels(at: &Path, kind: &CStr) -> bool {
    [c"proc", c"sysfs"].contains(&kind) || [Path::new("/proc"), Path::new("/sys"), Path::new("/dev")].contains(&at)
}

impl Planned {
    fn bind(&self, root: &Tree, tree: &OwnedFd) -> Result<()> {
        let want = if tree::is_folder(tree)? { Want::Directory } else { Want::File };
        let of_proc = namespaces::is_procfs(tree.as_fd());
        self.check_name(of_proc)?;
        let onto =
            if is_the_kernels(&self.at, c"") { root.own_folder(&self.at)? } else { root.find_or_make(&self.at, want)? };
        self.check_place(&onto, of_proc)?;
        mount::attach(tree, onto.as_fd()).doing(|| format!("attach the bind mount to {}", self.at.display()))
    }

    /// Nothing but a few files lies over a procfs, and nothing but a procfs at /proc: what is read there is believed, by
    /// programs inside and outside.
    fn check_name(&self, of_proc: bool) -> Result<()> {
        let is_proc = self.at == Path::new("/proc");
        let refused = if is_proc { !of_proc } else { self.at.starts_with("/proc") && !is_allowed_below_proc(&self.at) };
        if refused { Err(self.inside_proc()) } else { Ok(()) }
    }

    /// The same, by whatever link of the image the name has led there.
    fn check_place(&self, onto: &OwnedFd, of_proc: bool) -> Result<()> {
        let over_another = self.at == Path::new("/proc") && of_proc;
        if namespaces::is_procfs(onto.as_fd()) && !over_another && !is_allowed_below_proc(&self.at) {
            return Err(self.inside_proc());
        }
        Ok(())
    }

    fn inside_proc(&self) -> Problem {
        wrong(format!("{} cannot be mounted because it is inside /proc", self.at.display()))
    }

    /// What comes back is to be read-only, and is not yet.
    fn make(&self, root: &Tree, kind: &CStr, source: &CStr) -> Result<Option<OwnedFd>> {
        self.check_name(kind == c"proc")?;
        let mut data = vec![(c"source".to_owned(), source.to_owned())];
        for (name, value) in &self.options.data {
            let text = |text: &str| CString::new(text).doing(|| "use a mount option".into());
            data.push((text(name)?, text(value)?));
        }
        let data: Vec<(&CStr, &CStr)> = data.iter().map(|(name, value)| (name.as_c_str(), value.as_c_str())).collect();
        let doing = || format!("make a new {}", kind.to_string_lossy());
        let made = mount::new_filesystem(kind, &data, 0).doing(doing)?;
        let onto = if is_the_kernels(&self.at, kind) {
            root.own_folder(&self.at)?
        } else {
            root.find_or_make(&self.at, Want::Directory)?
        };
        self.check_place(&onto, kind == c"proc")?;
        if self.options.copy_up {
            super::copyup::copy(&onto, &made).doing(|| format!("copy {} up", self.at.display()))?;
        }
        let read_only = self.attributes() & MOUNT_ATTR_RDONLY != 0;
        let later = if kind == c"tmpfs" { MOUNT_ATTR_RDONLY } else { 0 };
        self.finish(&made, later)?;
        mount::attach(&made, onto.as_fd()).doing(|| format!("attach the {}", kind.to_string_lossy()))?;
        Ok((read_only && later != 0).then_some(made))
    }

    /// Those of a new file system, which has nothing below it.
    fn attributes(&self) -> u64 {
        self.options.attributes.set | self.options.recursive.set
    }

    /// Attributes, but those that come later, and propagation of a new file system.
    fn finish(&self, made: &OwnedFd, later: u64) -> Result<()> {
        let clear = self.options.attributes.clear | self.options.recursive.clear;
        let set = self.attributes() & !later;
        let change = Change { set, clear, propagation: libc::MS_PRIVATE, owners: None };
        mount::change(made.as_fd(), &change, false).doing(|| "set the attributes".into())?;
        for (propagation, all) in &self.options.propagation {
            let change = Change { propagation: *propagation, ..Change::default() };
            mount::change(made.as_fd(), &change, *all).doing(|| "set the propagation".into())?;
        }
        Ok(())
    }

    /// The container's own groups: through its cgroup namespace, or, without one, as a bind of its folders.
    fn show_groups(&self, root: &Tree, cgroup: Option<&Cgroup>, namespace: bool) -> Result<()> {
        let Some(cgroup) = cgroup else { return Ok(()) };
        self.check_name(false)?;
        let found = cgroup.hierarchies();
        let name = |mount: &Path| mount.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let folders = cgroup.named_folders();
        let folder = |names: &str| folders.iter().find(|(known, _)| known == names).map(|(_, folder)| folder);
        let mut views = Vec::new();
        for v1 in &found.v1 {
            let names = v1.controllers.join(",");
            let view = match folder(&names).filter(|_| !namespace) {
                Some(folder) => tree::clone_of_host(folder, false)?,
                None => hierarchy(&v1.controllers)?,
            };
            views.push((name(&v1.mount), view));
        }
        if let Some(mount) = &found.unified {
            let view = match folder("").filter(|_| !namespace) {
                Some(folder) => tree::clone_of_host(folder, false)?,
                None => {
                    mount::new_filesystem(c"cgroup2", &[(c"source", c"cgroup")], 0).doing(|| "make a cgroup2".into())?
                }
            };
            views.push((name(mount), view));
        }
        let single = found.v1.is_empty();
        let read_only = self.options.attributes.set & MOUNT_ATTR_RDONLY != 0;
        views.iter().try_for_each(|(_, view)| self.finish(view, 0))?;
        CgroupView::assemble(views, single, read_only)?.mount_at(root, &self.at)
    }
}

fn hierarchy(controllers: &[String]) -> Result<OwnedFd> {
    let mut options = Vec::new();
    for controller in controllers {
        let (name, value) = controller.split_once('=').unwrap_or((controller, ""));
        let text = |text: &str| CString::new(text).doing(|| "name a cgroup controller".into());
        if name == "name" {
            options.push((c"none".to_owned(), c"".to_owned()));
        }
        options.push((text(name)?, text(value)?));
    }
    let options: Vec<(&CStr, &CStr)> =
        options.iter().map(|(name, value)| (name.as_c_str(), value.as_c_str())).collect();
    mount::new_filesystem(c"cgroup", &options, 0)
        .doing(|| format!("make the view of the cgroup {}", controllers.join(",")))
}

/// Files that tools lay over the kernel's, about the container's own limits.
fn is_allowed_below_proc(at: &Path) -> bool {
    const FILES: [&str; 11] = [
        "/proc/cpuinfo",
        "/proc/diskstats",
        "/proc/meminfo",
        "/proc/stat",
        "/proc/swaps",
        "/proc/uptime",
        "/proc/loadavg",
        "/proc/slabinfo",
        "/proc/sys/kernel/ns_last_pid",
        "/proc/sys/crypto/fips_enabled",
        "/proc/net/dev",
    ];
    FILES.iter().any(|file| at == Path::new(file))
}

/// The container's root as a mount, detached.
pub fn root(path: &Path) -> Result<OwnedFd> {
    tree::clone_of_host(path, true)
}

/// Attaches the root where the host has it, or, where that cannot be reached from the container's user namespace, over
/// all.
pub fn attach_root(root: &OwnedFd, path: &Path, propagation: u64) -> Result<()> {
    let doing = || "attach the container's root".to_owned();
    let change = Change { propagation, ..Change::default() };
    mount::change(root.as_fd(), &change, true).doing(doing)?;
    let flags = nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_DIRECTORY | nix::fcntl::OFlag::O_CLOEXEC;
    let open = |path: &Path| nix::fcntl::open(path, flags, nix::sys::stat::Mode::empty());
    let onto = match open(path) {
        Err(Errno::EACCES | Errno::EPERM) => open(Path::new("/")),
        other => other,
    };
    mount::attach(root, onto.doing(doing)?.as_fd()).doing(doing)
}

/// Whether the container has a cgroup namespace.
pub fn cgroup_namespace(spec: &Spec) -> bool {
    spec.linux().as_ref().is_some_and(|linux| bundle::apart(linux, LinuxNamespaceType::Cgroup))
}
