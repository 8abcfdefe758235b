//! Which overlays a pod's root is made of.
//!
//! The rule is the same at every birth, here and after a move, and depends on the spec, the host's mounts and the
//! layers that the pod already has:
//!
//! * [`Base::Directory`]: one overlay over that folder.
//! * [`Base::Host`]: one overlay over the host's root, and one more over each mount of real storage below it that is a
//!   folder and can be written to, at the same place, since an overlay does not see through mounts. What is not such
//!   storage (a read-only or a foreign file system, a single bound file) is seen read-only as it is. /proc, /sys,
//!   /dev, /run, /tmp are made anew for every pod and are no layers; nor is the runtime's own data.
//! * A layer that the pod has from another host stays one: its lower side is then whatever this host has at that path,
//!   or nothing.
//!
//! Each layer has its own pair of folders, `upper/NAME` and `work/NAME`: `+` is the root, `+var+lib` is /var/lib. What
//! the pod wrote to a path that has become a mount on this host is moved into that mount's layer first.

use crate::problem::{Doing, Problem, Result};
use crate::proc;
use crate::proc::mountinfo::{self, Mount};
use crate::spec::Base;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

/// Folders of a pod that are made anew.
const FRESH: [&str; 5] = ["/proc", "/sys", "/dev", "/run", "/tmp"];

/// Storage that an overlay can lie over.
const LAYERABLE: [&str; 11] =
    ["ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "overlay", "bcachefs", "nfs", "nfs4", "zfs"];

/// What is no storage at all, or only the kernel's view of itself.
const PSEUDO: [&str; 24] = [
    "proc",
    "sysfs",
    "tmpfs",
    "devtmpfs",
    "devpts",
    "ramfs",
    "cgroup",
    "cgroup2",
    "mqueue",
    "debugfs",
    "tracefs",
    "securityfs",
    "pstore",
    "bpf",
    "configfs",
    "fusectl",
    "hugetlbfs",
    "autofs",
    "binfmt_misc",
    "rpc_pipefs",
    "efivarfs",
    "nsfs",
    "selinuxfs",
    "nfsd",
];

/// One overlay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Where it is in the pod.
    pub at: PathBuf,
    /// What is seen through it.
    pub lower: PathBuf,
    pub upper: PathBuf,
    pub work: PathBuf,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Layers {
    /// The root first, what is above before what is below.
    pub overlays: Vec<Layer>,
    /// Seen read-only at the same path.
    pub bound: Vec<PathBuf>,
}

/// Name of a layer's folders.
pub fn folder_name(at: &Path) -> String {
    at.to_string_lossy().replace('%', "%25").replace('+', "%2B").replace('/', "+")
}

/// The path that a folder stands for; `None` for one that is no layer's.
pub fn path_of(folder: &str) -> Option<PathBuf> {
    if !folder.starts_with('+') {
        return None;
    }
    let path = folder.replace('+', "/").replace("%2B", "+").replace("%25", "%");
    let clean = !path.split('/').any(|part| part == ".." || part == ".");
    clean.then(|| path.into())
}

impl Layers {
    /// Decides, by the rule above. `own` are the runtime's folders.
    pub fn decide(base: &Base, upper: &Path, work: &Path, own: &[&Path]) -> Result<Layers> {
        let layer = |at: &Path, lower: &Path| Layer {
            at: at.to_owned(),
            lower: lower.to_owned(),
            upper: upper.join(folder_name(at)),
            work: work.join(folder_name(at)),
        };
        let root = Path::new("/");
        if let Base::Directory(folder) = base {
            return Ok(Layers { overlays: vec![layer(root, folder)], bound: Vec::new() });
        }
        let text = proc::bytes("/proc/self/mountinfo").doing(|| "read the mounts of this host".into())?;
        let mounts = mountinfo::parse(&text)
            .ok_or_else(|| Problem::new("E-SYSTEM", "/proc/self/mountinfo is not as the kernel writes it"))?;
        let mut layers = Layers::default();
        for mount in candidates(&mounts, own).into_iter().filter(|mount| on_top(mount)) {
            let at = mount.mount_point.as_path();
            if at.is_dir() && can_be_layer(mount) {
                layers.overlays.push(layer(at, at));
            } else {
                layers.bound.push(at.to_owned());
            }
        }
        let known = fs::read_dir(upper).into_iter().flatten().flatten();
        for at in known.filter_map(|entry| path_of(entry.file_name().to_str()?)) {
            if at != root && !layers.overlays.iter().any(|layer| layer.at == at) {
                layers.bound.retain(|bound| *bound != at);
                layers.overlays.push(layer(&at, &at));
            }
        }
        layers.overlays.push(layer(root, root));
        layers.overlays.sort_by(|a, b| a.at.cmp(&b.at));
        layers.bound.sort();
        Ok(layers)
    }

    /// Makes the folders of each layer, with the owner and mode of what lies below.
    pub fn make(&self) -> Result<()> {
        for layer in &self.overlays {
            self.move_into(layer)?;
            let fresh = !layer.upper.exists();
            for folder in [&layer.upper, &layer.work] {
                fs::create_dir_all(folder).doing(|| format!("make {}", folder.display()))?;
            }
            if fresh {
                copy_attributes(&layer.lower, &layer.upper)?;
            }
        }
        Ok(())
    }

    /// What the pod wrote at this path while it was part of the layer above.
    fn move_into(&self, layer: &Layer) -> Result<()> {
        if layer.upper.exists() || layer.at == Path::new("/") {
            return Ok(());
        }
        let Some((above, rest)) = self.place_above(&layer.at) else { return Ok(()) };
        let from = above.upper.join(rest);
        if fs::symlink_metadata(&from).is_ok_and(|found| found.is_dir()) {
            fs::rename(&from, &layer.upper).doing(|| format!("move {} into its own layer", from.display()))?;
        }
        Ok(())
    }

    fn place_above(&self, path: &Path) -> Option<(&Layer, PathBuf)> {
        let above = self.overlays.iter().rev().find(|layer| layer.at != path && path.starts_with(&layer.at))?;
        Some((above, path.strip_prefix(&above.at).ok()?.to_owned()))
    }

    /// The place in an upper folder for `path` of the pod, with the folders above it made as they are below. `None`
    /// when something else than folders leads there, or the path is not in a layer.
    pub fn place(&self, path: &Path) -> Result<Option<PathBuf>> {
        let Some(layer) = self.overlays.iter().rev().find(|layer| path.starts_with(&layer.at)) else {
            return Ok(None);
        };
        if self.bound.iter().any(|bound| path.starts_with(bound) && bound.starts_with(&layer.at)) {
            return Ok(None);
        }
        let Ok(rest) = path.strip_prefix(&layer.at) else { return Ok(None) };
        let (mut upper, mut lower) = (layer.upper.clone(), layer.lower.clone());
        for part in rest.parent().into_iter().flat_map(Path::components) {
            upper.push(part);
            lower.push(part);
            let below = fs::symlink_metadata(&lower);
            if below.as_ref().is_ok_and(|found| !found.is_dir()) {
                return Ok(None);
            }
            match fs::symlink_metadata(&upper) {
                Ok(found) if found.is_dir() => continue,
                Ok(_) => return Ok(None),
                Err(_) => fs::create_dir(&upper).doing(|| format!("make {}", upper.display()))?,
            }
            if below.is_ok() {
                copy_attributes(&lower, &upper)?;
            }
        }
        Ok(rest.file_name().map(|name| upper.join(name)))
    }

    /// Whether the path exists in what the layers lie over.
    pub fn is_below(&self, path: &Path) -> bool {
        let Some(layer) = self.overlays.iter().rev().find(|layer| path.starts_with(&layer.at)) else { return false };
        path.strip_prefix(&layer.at).is_ok_and(|rest| fs::symlink_metadata(layer.lower.join(rest)).is_ok())
    }
}

fn copy_attributes(from: &Path, to: &Path) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let Ok(found) = fs::metadata(from) else { return Ok(()) };
    chown(to, Some(found.uid()), Some(found.gid())).doing(|| format!("give {} its owner", to.display()))?;
    let mode = fs::Permissions::from_mode(found.permissions().mode() & 0o7777);
    fs::set_permissions(to, mode).doing(|| format!("give {} its mode", to.display()))
}

fn candidates<'a>(mounts: &'a [Mount], own: &[&Path]) -> Vec<&'a Mount> {
    let root = Path::new("/");
    let mut found: Vec<&Mount> = Vec::new();
    for mount in mounts {
        let at = mount.mount_point.as_path();
        let fresh = FRESH.iter().any(|fresh| at.starts_with(fresh));
        let ours = own.iter().any(|own| at.starts_with(own));
        if at == root || fresh || ours || PSEUDO.contains(&mount.kind.as_str()) {
            continue;
        }
        found.retain(|earlier| earlier.mount_point != at);
        found.push(mount);
    }
    found
}

fn can_be_layer(mount: &Mount) -> bool {
    let writable = !mount.super_options.split(',').any(|option| option == "ro");
    LAYERABLE.contains(&mount.kind.as_str()) && writable
}

/// Whether a mount is what its path leads to: another may have been mounted over it or over a folder above.
fn on_top(mount: &Mount) -> bool {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let Ok(fd) = open(&mount.mount_point, flags, Mode::empty()) else { return false };
    let Ok(text) = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())) else { return false };
    text.lines().any(|line| line.strip_prefix("mnt_id:").is_some_and(|id| id.trim() == mount.id.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_folders() {
        for path in ["/", "/etc", "/var/lib", "/a+b/c%d", "/with space"] {
            assert_eq!(path_of(&folder_name(Path::new(path))), Some(path.into()), "{path}");
        }
        assert_eq!(folder_name(Path::new("/var/lib")), "+var+lib");
        assert_eq!(path_of("root"), None);
        assert_eq!(path_of("+..+etc"), None);
    }

    #[test]
    fn storage_and_no_storage() {
        let text = b"27 1 254:0 / / rw - ext4 /dev/vda rw\n\
            28 27 0:25 / /etc rw - overlay overlay rw,lowerdir=/etc\n\
            29 27 254:0 /x /var/lib rw - ext4 /dev/vda rw\n\
            30 27 0:5 / /proc rw - proc proc rw\n\
            31 29 254:1 / /var/lib/pod rw - ext4 /dev/vdb rw\n\
            32 27 0:9 / /tmp rw - ext4 /dev/vdc rw\n\
            33 27 0:9 / /snap/x ro - squashfs /dev/loop0 ro\n\
            34 27 0:9 / /mnt rw - tmpfs x rw\n";
        let mounts = mountinfo::parse(text).unwrap();
        let found = candidates(&mounts, &[Path::new("/var/lib/pod")]);
        let at: Vec<_> = found.iter().map(|mount| mount.mount_point.to_str().unwrap()).collect();
        assert_eq!(at, ["/etc", "/var/lib", "/snap/x"]);
        assert!(can_be_layer(found[0]) && can_be_layer(found[1]) && !can_be_layer(found[2]));
    }

    #[test]
    fn places_have_the_folders_that_lead_there() {
        let dir = tempfile::tempdir().unwrap();
        let (lower, upper) = (dir.path().join("lower"), dir.path().join("upper"));
        fs::create_dir_all(lower.join("etc")).unwrap();
        fs::set_permissions(lower.join("etc"), fs::Permissions::from_mode(0o711)).unwrap();
        std::os::unix::fs::symlink("/", lower.join("link")).unwrap();
        let base = Base::Directory(lower);
        let layers = Layers::decide(&base, &upper, &dir.path().join("work"), &[]).unwrap();
        layers.make().unwrap();
        let place = layers.place(Path::new("/etc/hosts")).unwrap().unwrap();
        assert_eq!(place, upper.join("+/etc/hosts"));
        assert_eq!(fs::metadata(upper.join("+/etc")).unwrap().permissions().mode() & 0o777, 0o711);
        assert_eq!(layers.place(Path::new("/link/hosts")).unwrap(), None);
    }
}
