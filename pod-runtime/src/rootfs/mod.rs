//! The file tree of a pod: private overlays ([`layers`]), fresh kernel file systems ([`special`]), volumes, all built
//! aside by descriptors ([`tree`]) and then made the root. Runs in the pod's first process, in its own mount
//! namespace, from which the host's tree is gone when it is done; when it fails, the namespace ends with the process.

mod files;
pub mod layers;
pub(crate) mod special;
pub(crate) mod tree;
pub mod view;

pub use files::TINY_INIT;

use crate::cgroup;
use crate::problem::{Doing, Problem, Result};
use crate::proc::{bytes, mountinfo};
use crate::spec::{Spec, Volume};
use crate::store::Pod;
use crate::sys::mount::{self, MOUNT_ATTR_NODEV, MOUNT_ATTR_RDONLY};
use layers::{Layer, Layers};
use nix::mount::{MntFlags, MsFlags, umount2};
pub use special::{CgroupView, folders_in_memory, proc};
use std::ffi::CString;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread::ScopedJoinHandle;
use tree::{Tree, Want};

/// A tree that is built but not the root yet.
#[derive(Debug)]
pub struct Rootfs {
    tree: Tree,
    staging: PathBuf,
    null: OwnedFd,
    /// Root of the pod's devpts.
    pub pts: OwnedFd,
    /// What of the host could not be shown as it should.
    pub warnings: Vec<String>,
    layers: Vec<PathBuf>,
    cgroups: CgroupView,
}

/// What of a tree depends neither on its files nor on the pod's groups.
#[derive(Debug)]
pub struct Beginning {
    null: OwnedFd,
    fresh: special::Fresh,
    visible: Vec<(String, String)>,
    unified: bool,
}

impl Beginning {
    /// The caller is alone in its mount and pid namespaces; `proc` is from [`proc`](special::proc).
    pub fn make(spec: &Spec, proc: OwnedFd) -> Result<Beginning> {
        let none: Option<&str> = None;
        nix::mount::mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
            .doing(|| "make the pod's mounts private".into())?;
        let null = special::host_null()?;
        let text = bytes("/proc/self/mountinfo").doing(|| "read the mounts of this host".into())?;
        let mounts = mountinfo::parse(&text).unwrap_or_default();
        let unified = mounts.iter().any(|mount| mount.kind == "cgroup2");
        let visible = cgroup::visible(&mounts);
        Ok(Beginning { null, fresh: special::Fresh::make(spec, proc)?, visible, unified })
    }

    /// The roots of the pod's own file systems in memory, by their paths.
    pub fn in_memory(&self, spec: &Spec) -> Vec<(&'static str, &OwnedFd)> {
        self.fresh.in_memory(spec)
    }

    /// The view of the pod's groups. Must run in the pod's cgroup namespace.
    pub fn cgroups(&self, spec: &Spec) -> Result<CgroupView> {
        CgroupView::make(&self.visible, self.unified, !spec.security.privileged)
    }
}

impl Rootfs {
    /// Builds everything but what lies over all of it. Unless `device_nodes`, device nodes on the pod's storage do not
    /// work: for a host that cannot keep a list of allowed devices.
    pub fn build(
        (beginning, cgroups): (Beginning, CgroupView),
        spec: &Spec,
        pod: &Pod,
        device_nodes: bool,
    ) -> Result<Rootfs> {
        let Beginning { null, fresh, .. } = beginning;
        let own = [pod.store().data(), pod.store().run()];
        let layers = Layers::decide(&spec.root.base, &pod.upper_dir(), &pod.work_dir(), &own)?;
        layers.make()?;
        can_hold_layers(&pod.dir())?;
        files::write(spec, &layers, &own)?;
        let staging = pod.dir().join("root");
        fs::create_dir_all(&staging).doing(|| format!("make {}", staging.display()))?;
        // Taken before anything of the pod's tree could lie over them.
        let volumes = spec.volumes.iter().map(take_volume).collect::<Result<Vec<_>>>()?;
        let bound = layers.bound.iter().map(|path| Ok((path, tree::clone_of_host(path, false)?)));
        let bound = bound.collect::<Result<Vec<_>>>()?;

        let mut warnings = Vec::new();
        let tree = mount_layers(&layers, &staging, device_nodes, &mut warnings)?;
        for (path, copy) in &bound {
            bind(&tree, copy, path, true)?;
        }
        let pts = fresh.mount(&tree)?;
        for (volume, copy) in spec.volumes.iter().zip(&volumes) {
            bind(&tree, copy, &volume.destination, volume.read_only)?;
        }
        special::make_devices(&tree, &spec.devices)?;
        let layers = layers.overlays.into_iter().map(|layer| layer.at).collect();
        Ok(Rootfs { tree, staging, null, pts, warnings, layers, cgroups })
    }

    /// Adds the cgroup view and the protections, and makes the tree the root of the calling process.
    pub fn become_root(self, spec: &Spec) -> Result<()> {
        let privileged = spec.security.privileged;
        self.cgroups.mount(&self.tree)?;
        if !privileged {
            special::protect(&self.tree, &self.null)?;
        }
        if spec.root.read_only {
            // Only what the pod's root is made of: its own /tmp, /run and volumes stay as they are.
            for layer in &self.layers {
                let doing = || format!("make {} read-only", layer.display());
                let at = self.tree.find(layer).doing(doing)?;
                mount::set_attributes(at.as_fd(), MOUNT_ATTR_RDONLY, false).doing(doing)?;
            }
        }
        nix::unistd::chdir(&self.staging).doing(|| "enter the pod's root".into())?;
        nix::unistd::pivot_root(".", ".").doing(|| "make the pod's tree the root".into())?;
        // The old root lies on top of the new one now.
        umount2(".", MntFlags::MNT_DETACH).doing(|| "let go of the host's tree".into())?;
        nix::unistd::chdir("/").doing(|| "enter the pod's root".into())
    }
}

/// The upper side of an overlay cannot be on another one, and the kernel's error would not say so.
fn can_hold_layers(dir: &Path) -> Result<()> {
    let found = nix::sys::statfs::statfs(dir).doing(|| format!("look at {}", dir.display()))?;
    if found.filesystem_type() != nix::sys::statfs::OVERLAYFS_SUPER_MAGIC {
        return Ok(());
    }
    let what = format!("{} is on an overlay, which cannot hold what a pod writes", dir.display());
    Err(Problem::new("E-ROOTFS", what).fix(FIX_STORAGE))
}

const FIX_STORAGE: &str =
    "keep the runtime's data on a file system that can take overlays (ext4, xfs, btrfs, tmpfs): set POD_ROOT";

fn mount_layers(layers: &Layers, staging: &Path, device_nodes: bool, warnings: &mut Vec<String>) -> Result<Tree> {
    let (root, others) =
        layers.overlays.split_first().ok_or_else(|| Problem::new("E-ROOTFS", "the pod has no root"))?;
    let flags = if device_nodes { MsFlags::empty() } else { MsFlags::MS_NODEV };
    let nothing = staging.with_file_name("nothing");
    let others = others.iter().map(|layer| match layer.lower.is_dir() {
        true => Ok((layer, &layer.lower)),
        false => fs::create_dir_all(&nothing).map(|()| (layer, &nothing)),
    });
    let others = others.collect::<std::io::Result<Vec<_>>>().doing(|| format!("make {}", nothing.display()))?;
    // To make one takes half a millisecond: half of several are made by a thread.
    let (now, later) = others.split_at(others.len() / 2);
    std::thread::scope(|scope| {
        let make = || later.iter().map(|(layer, lower)| detached_overlay(layer, lower, device_nodes)).collect();
        let made = (!now.is_empty()).then(|| scope.spawn(make));
        let options = overlay_options(root, &root.lower);
        nix::mount::mount(Some("overlay"), staging, Some("overlay"), flags, Some(options.as_str()))
            .map_err(|error| root_refused(root, error))?;
        let tree = Tree::at(staging)?;
        let mount = |(layer, lower): (&Layer, &PathBuf), made: Option<OwnedFd>, warnings: &mut Vec<String>| {
            let onto = tree.find_or_make(&layer.at, Want::Directory)?;
            let options = overlay_options(layer, lower);
            let mounted = match made {
                Some(made) => mount::attach(&made, onto.as_fd()),
                None => tree::mount_on("overlay", "overlay", &onto, flags, &options),
            };
            let Err(error) = mounted else { return Ok(()) };
            let copy = tree::clone_of_host(lower, false)?;
            bind(&tree, &copy, &layer.at, true)?;
            let at = layer.at.display();
            warnings.push(format!("{at} of this host cannot be seen through an overlay ({error}): it is read-only"));
            Ok::<(), Problem>(())
        };
        now.iter().try_for_each(|other| mount(*other, None, warnings))?;
        let made: Vec<Option<OwnedFd>> = match made.map(ScopedJoinHandle::join) {
            Some(Ok(made)) => made,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Vec::new(),
        };
        let made = made.into_iter().chain(std::iter::repeat_with(|| None));
        later.iter().zip(made).try_for_each(|(other, made)| mount(*other, made, warnings))?;
        Ok(tree)
    })
}

/// An overlay that is mounted nowhere yet. None where it cannot be made so: by the calls that take its options one by one,
/// which agree with mount(2) about all but the characters that have to be escaped there.
fn detached_overlay(layer: &Layer, lower: &Path, device_nodes: bool) -> Option<OwnedFd> {
    let plain = |path: &Path| {
        let bytes = path.as_os_str().as_encoded_bytes();
        CString::new(bytes).ok().filter(|_| !bytes.iter().any(|byte| b"\\:,".contains(byte)))
    };
    let (lower, upper, work) = (plain(lower)?, plain(&layer.upper)?, plain(&layer.work)?);
    let options = [
        (c"lowerdir", lower.as_c_str()),
        (c"upperdir", upper.as_c_str()),
        (c"workdir", work.as_c_str()),
        (c"index", c"off"),
        (c"redirect_dir", c"off"),
        (c"metacopy", c"off"),
    ];
    let attributes = if device_nodes { 0 } else { MOUNT_ATTR_NODEV };
    mount::new_filesystem(c"overlay", &options, attributes).ok()
}

/// `index` and `redirect_dir` would write this host's file handles and paths into the upper layer, which travels.
fn overlay_options(layer: &Layer, lower: &Path) -> String {
    let escape = |path: &Path| {
        let text = path.to_string_lossy();
        text.replace('\\', "\\\\").replace(':', "\\:").replace(',', "\\,")
    };
    format!(
        "lowerdir={},upperdir={},workdir={},index=off,redirect_dir=off,metacopy=off",
        escape(lower),
        escape(&layer.upper),
        escape(&layer.work),
    )
}

fn root_refused(root: &Layer, error: nix::Error) -> Problem {
    let (lower, upper) = (root.lower.display(), root.upper.display());
    let what = format!("this host mounts no overlay of {lower} with what the pod writes in {upper}");
    Problem::new("E-ROOTFS", what).fix(FIX_STORAGE).because(error)
}

/// A volume's source as it is now, made when it is not there.
fn take_volume(volume: &Volume) -> Result<OwnedFd> {
    if !volume.source.exists() {
        fs::create_dir_all(&volume.source).doing(|| format!("make the volume {}", volume.source.display()))?;
    }
    tree::clone_of_host(&volume.source, true)
}

fn bind(tree: &Tree, copy: &OwnedFd, destination: &Path, read_only: bool) -> Result<()> {
    let doing = || format!("mount {} in the pod", destination.display());
    let attributes = if read_only { MOUNT_ATTR_RDONLY } else { 0 };
    mount::set_attributes(copy.as_fd(), attributes, true).doing(doing)?;
    let want = if tree::is_folder(copy)? { Want::Directory } else { Want::File };
    let onto = tree.find_or_make(destination, want)?;
    mount::attach(copy, onto.as_fd()).doing(doing)
}
