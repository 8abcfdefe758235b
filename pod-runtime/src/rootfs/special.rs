//! The file systems that every pod gets new: /proc, /sys, /dev with its own devpts, /dev/shm, /tmp, /run, the view of
//! its cgroups; and what of the kernel's own files is masked or read-only, as in docker.

use super::tree::{self, Tree, Want};
use crate::problem::{Doing, Problem, Result};
use crate::spec::{Base, Device, Spec};
use crate::sys::mount::{self, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY};
use nix::errno::Errno;
use nix::sys::stat::{Mode, SFlag, fstat, major, makedev, minor, mkdirat, mknodat};
use nix::unistd::symlinkat;
use std::ffi::{CStr, CString};
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

const QUIET: u64 = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;

/// Kernel files that tell about, or act on, the whole host.
const MASKED: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// All but the cgroup view, made and not mounted yet: what of a tree does not depend on its files.
#[derive(Debug)]
pub struct Fresh {
    proc: OwnedFd,
    sys: OwnedFd,
    dev: OwnedFd,
    pts: OwnedFd,
    /// With their places.
    others: Vec<(&'static str, OwnedFd)>,
}

/// Where a pod has file systems in memory of its own that programs use: mounted new for every pod, and reached by their
/// descriptors before.
pub fn folders_in_memory(spec: &Spec) -> &'static [&'static str] {
    // A folder that was given as a root brings its own /tmp and /run, often with what its programs need there.
    let of_a_host = spec.root.base == Base::Host || spec.root.read_only;
    if of_a_host { &["/dev/shm", "/tmp", "/run"] } else { &["/dev/shm"] }
}

/// The pod's /proc, not mounted yet. The caller is in its pid namespace.
pub fn proc() -> Result<OwnedFd> {
    tree::new("/proc", c"proc", &[], QUIET)
}

impl Fresh {
    /// The caller is in the pod's namespaces.
    pub fn make(spec: &Spec, proc: OwnedFd) -> Result<Fresh> {
        let read_only = if spec.security.privileged { 0 } else { MOUNT_ATTR_RDONLY };
        let sys = tree::new("/sys", c"sysfs", &[], QUIET | read_only)?;
        let dev = tree::new("/dev", c"tmpfs", &[(c"mode", c"755"), (c"size", c"65536k")], MOUNT_ATTR_NOSUID)?;
        fill_dev(&dev, spec)?;
        let pts = [(c"newinstance", c""), (c"ptmxmode", c"0666"), (c"mode", c"0620"), (c"gid", c"5")];
        let pts = tree::new("/dev/pts", c"devpts", &pts, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC)?;
        // No size: half of the host's memory, as on a host. A pod is limited by its cgroup, and a fixed 64 MiB breaks
        // databases.
        let shm = tree::new("/dev/shm", c"tmpfs", &[(c"mode", c"1777")], QUIET)?;
        let mqueue = tree::new("/dev/mqueue", c"mqueue", &[], QUIET)?;
        let mut others = vec![("/dev/shm", shm), ("/dev/mqueue", mqueue)];
        if folders_in_memory(spec).contains(&"/tmp") {
            let skeleton = if spec.root.base == Base::Host { run_folders() } else { Vec::new() };
            let flags = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV;
            let tmp = tree::new("/tmp", c"tmpfs", &[(c"mode", c"1777")], flags)?;
            let run = tree::new("/run", c"tmpfs", &[(c"mode", c"755")], flags)?;
            mkdirat(&run, "lock", Mode::from_bits_truncate(0o1777)).doing(|| "make /run/lock".into())?;
            skeleton.iter().try_for_each(|folder| folder.make(&run))?;
            others.extend([("/tmp", tmp), ("/run", run)]);
        }
        Ok(Fresh { proc, sys, dev, pts, others })
    }

    /// Those of [`folders_in_memory`].
    pub fn in_memory(&self, spec: &Spec) -> Vec<(&'static str, &OwnedFd)> {
        let folders = folders_in_memory(spec);
        self.others.iter().filter(|(path, _)| folders.contains(path)).map(|(path, made)| (*path, made)).collect()
    }

    /// Mounts them. The root of the devpts comes back.
    pub fn mount(self, tree: &Tree) -> Result<OwnedFd> {
        let first = [("/proc", &self.proc), ("/sys", &self.sys), ("/dev", &self.dev), ("/dev/pts", &self.pts)];
        first.into_iter().try_for_each(|(path, made)| tree.mount(path, made))?;
        self.others.iter().try_for_each(|(path, made)| tree.mount(path, made))?;
        Ok(self.pts)
    }
}

/// A folder of the host's /run: programs installed there expect theirs, made at boot, to exist.
struct RunFolder {
    name: String,
    mode: u32,
    owner: (u32, u32),
}

impl RunFolder {
    fn make(&self, run: &OwnedFd) -> Result<()> {
        use nix::sys::stat::{FchmodatFlags, fchmodat};
        use nix::unistd::{Gid, Uid, fchownat};
        let doing = || format!("make /run/{}", self.name);
        match mkdirat(run, self.name.as_str(), Mode::from_bits_truncate(0o755)) {
            Ok(()) => {}
            Err(Errno::EEXIST) => return Ok(()),
            Err(error) => return Err(error).doing(doing),
        }
        let (uid, gid) = (Uid::from_raw(self.owner.0), Gid::from_raw(self.owner.1));
        fchownat(run, self.name.as_str(), Some(uid), Some(gid), nix::fcntl::AtFlags::empty()).doing(doing)?;
        let mode = Mode::from_bits_truncate(self.mode & 0o7777);
        fchmodat(run, self.name.as_str(), mode, FchmodatFlags::FollowSymlink).doing(doing)
    }
}

fn run_folders() -> Vec<RunFolder> {
    /// What belongs to the host's own services.
    const NOT: [&str; 7] = ["pod", "user", "systemd", "udev", "containerd", "docker", "netns"];
    let entries = fs::read_dir("/run").into_iter().flatten().flatten();
    let folders = entries.filter_map(|entry| {
        let (name, found) = (entry.file_name().into_string().ok()?, entry.metadata().ok()?);
        let wanted = found.is_dir() && !NOT.contains(&name.as_str());
        wanted.then(|| RunFolder { name, mode: found.permissions().mode(), owner: (found.uid(), found.gid()) })
    });
    folders.take(256).collect()
}

fn fill_dev(dev: &OwnedFd, spec: &Spec) -> Result<()> {
    for (name, major, minor) in
        [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)]
    {
        node(dev, name, SFlag::S_IFCHR, 0o666, (major, minor))?;
    }
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
        ("ptmx", "pts/ptmx"),
    ] {
        symlinkat(target, dev, name).doing(|| format!("make /dev/{name}"))?;
    }
    if spec.process.terminal {
        symlinkat("pts/0", dev, "console").doing(|| "make /dev/console".into())?;
    }
    for folder in ["pts", "shm", "mqueue"] {
        mkdirat(dev, folder, Mode::from_bits_truncate(0o755)).doing(|| format!("make /dev/{folder}"))?;
    }
    if spec.security.privileged {
        host_devices(dev)?;
    }
    Ok(())
}

fn node(dir: &OwnedFd, name: &str, kind: SFlag, mode: u32, (major, minor): (u64, u64)) -> Result<()> {
    match mknodat(dir, name, kind, Mode::from_bits_truncate(mode), makedev(major, minor)) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(error).doing(|| format!("make the device {name}")),
    }
}

/// A privileged pod sees the devices of the host.
fn host_devices(dev: &OwnedFd) -> Result<()> {
    for entry in fs::read_dir("/dev").into_iter().flatten().flatten() {
        let (Ok(found), Ok(name)) = (entry.metadata(), entry.file_name().into_string()) else { continue };
        let kind = match found.file_type() {
            kind if kind.is_char_device() => SFlag::S_IFCHR,
            kind if kind.is_block_device() => SFlag::S_IFBLK,
            _ => continue,
        };
        node(dev, &name, kind, found.permissions().mode() & 0o7777, (major(found.rdev()), minor(found.rdev())))?;
    }
    Ok(())
}

/// `--device` nodes, at their paths inside.
pub fn make_devices(tree: &Tree, devices: &[Device]) -> Result<()> {
    for device in devices {
        let (Some(folder), Some(name)) = (device.path.parent(), device.path.file_name()) else {
            return Err(Problem::new("E-USAGE", format!("'{}' is no path for a device", device.path.display())));
        };
        let folder = tree.find_or_make(folder, Want::Directory)?;
        let kind = if device.kind == "b" { SFlag::S_IFBLK } else { SFlag::S_IFCHR };
        node(&folder, &name.to_string_lossy(), kind, 0o666, (device.major.into(), device.minor.into()))?;
    }
    Ok(())
}

/// The pod's own groups as they are seen in /sys/fs/cgroup, made and not mounted yet: on a v2 host one hierarchy,
/// otherwise a folder each.
#[derive(Debug)]
pub struct CgroupView {
    /// A tmpfs with their folders, where there are several.
    folder: Option<OwnedFd>,
    /// With their names in it.
    hierarchies: Vec<(String, OwnedFd)>,
    read_only: bool,
}

impl CgroupView {
    /// Must run in the pod's cgroup namespace.
    pub fn make(visible: &[(String, String)], unified: bool, read_only: bool) -> Result<CgroupView> {
        let attributes = if read_only { QUIET | MOUNT_ATTR_RDONLY } else { QUIET };
        let own = |kind, options: &[(&CStr, &CStr)], name: &str| {
            mount::new_filesystem(kind, options, attributes).doing(|| format!("make the view of the cgroup {name}"))
        };
        let mut hierarchies = Vec::new();
        for (name, options) in visible {
            let flags = options.split(',').map(CString::new).collect::<std::result::Result<Vec<_>, _>>();
            let flags = flags.doing(|| format!("name the cgroup {name}"))?;
            let flags = flags.iter().map(|flag| (flag.as_c_str(), c"")).collect::<Vec<_>>();
            hierarchies.push((name.clone(), own(c"cgroup", &flags, name)?));
        }
        if unified {
            hierarchies.push(("unified".to_owned(), own(c"cgroup2", &[(c"source", c"cgroup")], "unified")?));
        }
        Self::assemble(hierarchies, visible.is_empty(), read_only)
    }

    /// Of roots of hierarchies with their names; `single` is the only one and no folder among others.
    pub fn assemble(hierarchies: Vec<(String, OwnedFd)>, single: bool, read_only: bool) -> Result<CgroupView> {
        if single {
            return Ok(CgroupView { folder: None, hierarchies, read_only });
        }
        let folder = mount::new_filesystem(c"tmpfs", &[(c"mode", c"755")], QUIET).doing(|| "make a tmpfs".into())?;
        for (name, _) in &hierarchies {
            let name = name.as_str();
            mkdirat(&folder, name, Mode::from_bits_truncate(0o755)).doing(|| format!("make /sys/fs/cgroup/{name}"))?;
            for single in name.split(',').filter(|single| *single != name) {
                symlinkat(name, &folder, single).doing(|| format!("name the cgroup {single}"))?;
            }
        }
        Ok(CgroupView { folder: Some(folder), hierarchies, read_only })
    }

    pub fn mount(&self, tree: &Tree) -> Result<()> {
        self.mount_at(tree, Path::new("/sys/fs/cgroup"))
    }

    pub fn mount_at(&self, tree: &Tree, at: &Path) -> Result<()> {
        let Some(folder) = &self.folder else {
            let Some((_, only)) = self.hierarchies.first() else { return Ok(()) };
            let onto = tree.own_folder(at)?;
            return mount::attach(only, onto.as_fd()).doing(|| "mount the pod's cgroup".into());
        };
        mount::attach(folder, tree.own_folder(at)?.as_fd()).doing(|| format!("mount {}", at.display()))?;
        for (name, hierarchy) in &self.hierarchies {
            let onto = tree.own_folder(&at.join(name))?;
            mount::attach(hierarchy, onto.as_fd()).doing(|| format!("mount the cgroup {name}"))?;
        }
        if self.read_only {
            mount::set_attributes(folder.as_fd(), MOUNT_ATTR_RDONLY, false)
                .doing(|| "protect /sys/fs/cgroup".into())?;
        }
        Ok(())
    }
}

/// Masks and write-protects what the lists above name. `null` is the host's /dev/null, held since before anything of
/// the pod's was looked at.
pub fn protect(tree: &Tree, null: &OwnedFd) -> Result<()> {
    mask(tree, null, MASKED)?;
    write_protect(tree, READ_ONLY, QUIET)
}

/// Lies nothing over each of these paths that there is: an empty folder over a folder, the null device over all else.
pub fn mask(tree: &Tree, null: &OwnedFd, paths: impl IntoIterator<Item = impl AsRef<Path>>) -> Result<()> {
    let mut empty: Option<OwnedFd> = None;
    for path in paths {
        let path = path.as_ref();
        let Some(at) = existing(tree, path)? else { continue };
        let is_folder = tree::is_folder(&at)?;
        let mask = match (&empty, is_folder) {
            (_, false) => mount::clone_tree(null.as_fd(), c"", false),
            // One empty folder is enough for all.
            (Some(first), true) => mount::clone_tree(first.as_fd(), c"", false),
            (None, true) => mount::new_filesystem(c"tmpfs", &[(c"size", c"0k")], QUIET | MOUNT_ATTR_RDONLY),
        };
        let mask = mask.doing(|| format!("make a mask for {}", path.display()))?;
        mount::attach(&mask, at.as_fd()).doing(|| format!("mask {}", path.display()))?;
        if is_folder && empty.is_none() {
            empty = Some(mask);
        }
    }
    Ok(())
}

/// Makes each of these paths that there is read-only, with all below it, and gives it these attributes too.
pub fn write_protect(tree: &Tree, paths: impl IntoIterator<Item = impl AsRef<Path>>, attributes: u64) -> Result<()> {
    for path in paths {
        let path = path.as_ref();
        let Some(at) = existing(tree, path)? else { continue };
        let doing = || format!("make {} read-only", path.display());
        let copy = mount::clone_tree(at.as_fd(), c"", true).doing(doing)?;
        mount::set_attributes(copy.as_fd(), attributes | MOUNT_ATTR_RDONLY, true).doing(doing)?;
        mount::attach(&copy, at.as_fd()).doing(doing)?;
    }
    Ok(())
}

fn existing(tree: &Tree, path: &Path) -> Result<Option<OwnedFd>> {
    match tree.find(path) {
        Ok(at) => Ok(Some(at)),
        Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
        Err(error) => Err(error).doing(|| format!("find {}", path.display())),
    }
}

/// The host's /dev/null, if that is what it is.
pub fn host_null() -> Result<OwnedFd> {
    let flags = nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_NOFOLLOW | nix::fcntl::OFlag::O_CLOEXEC;
    let null = nix::fcntl::open("/dev/null", flags, Mode::empty()).doing(|| "open /dev/null".into())?;
    let found = fstat(&null).doing(|| "look at /dev/null".into())?;
    let device = found.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFCHR.bits() && found.st_rdev == makedev(1, 3);
    if !device {
        return Err(Problem::new("E-ROOTFS", "/dev/null of this host is not the null device")
            .fix("rm /dev/null; mknod -m 666 /dev/null c 1 3"));
    }
    Ok(null)
}
