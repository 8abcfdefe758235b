//! A bundle: a folder with a `config.json` and a root. What is read here is refused here, before anything is made.
//!
//! The text is kept as it came ([`Bundle::raw`]), so that fields which this program does not know are not lost; the
//! typed form is what the rest works with.

use super::{unsupported, wrong};
use crate::problem::{Doing, Problem, Result};
use nix::libc;
use oci_spec::runtime::{Linux, LinuxNamespaceType, Process, Spec};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

/// More than this is no configuration.
const BOUND: u64 = 16 << 20;

#[derive(Debug, Clone)]
pub struct Bundle {
    /// Absolute.
    pub folder: PathBuf,
    pub raw: Vec<u8>,
    pub spec: Spec,
}

impl Bundle {
    /// Reads and checks what is in a folder.
    pub fn load(folder: &Path) -> Result<Bundle> {
        let folder = folder.canonicalize().doing(|| format!("open the bundle {}", folder.display()))?;
        let raw = read(&folder.join("config.json"))?;
        let bundle = Bundle { spec: parse(&raw)?, folder, raw };
        check(&bundle.spec)?;
        let root = bundle.rootfs()?;
        if !root.is_dir() {
            return Err(wrong(format!("invalid rootfs: stat {}: no such file or directory", root.display())));
        }
        Ok(bundle)
    }

    /// The container's root on this host.
    pub fn rootfs(&self) -> Result<PathBuf> {
        let root = self.spec.root().as_ref().ok_or_else(|| wrong("root must be specified"))?;
        Ok(self.folder.join(root.path()))
    }
}

/// A file of JSON, no longer than such files are.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    let mut raw = Vec::new();
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) => return Err(wrong(format!("JSON specification file {} not found", path.display())).because(error)),
    };
    file.take(BOUND + 1).read_to_end(&mut raw).doing(|| format!("read {}", path.display()))?;
    if raw.len() as u64 > BOUND {
        return Err(wrong(format!("{} is longer than {BOUND} bytes", path.display())));
    }
    Ok(raw)
}

pub fn parse(raw: &[u8]) -> Result<Spec> {
    serde_json::from_slice(raw)
        .map_err(|error| wrong("config.json is not as the runtime specification has it").because(error))
}

/// A process alone, as `exec --process` gives it.
pub fn parse_process(raw: &[u8]) -> Result<Process> {
    let process: Process = serde_json::from_slice(raw)
        .map_err(|error| wrong("this is no process as the runtime specification has it").because(error))?;
    check_process(&process)?;
    Ok(process)
}

fn check(spec: &Spec) -> Result<()> {
    let version = spec.version();
    let mut numbers = version.split(['.', '-', '+']);
    if numbers.next() != Some("1") || numbers.next().is_none_or(|minor| minor.parse::<u32>().is_err()) {
        return Err(wrong(format!("ociVersion '{version}' is not supported: 1.x.y is")));
    }
    let process = spec.process().as_ref().ok_or_else(|| wrong("process property must not be empty"))?;
    check_process(process)?;
    if spec.root().is_none() {
        return Err(wrong("root must be specified"));
    }
    let none = Linux::default();
    let linux = spec.linux().as_ref().unwrap_or(&none);
    check_namespaces(spec, linux)?;
    check_settings(linux)?;
    check_the_rest(linux)?;
    for mount in spec.mounts().iter().flatten() {
        if mount.destination().components().any(|part| part == Component::ParentDir) {
            return Err(wrong(format!("mount destination {} has '..' in it", mount.destination().display())));
        }
    }
    Ok(())
}

pub fn check_process(process: &Process) -> Result<()> {
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(wrong("args must not be empty"));
    }
    if process.cwd().as_os_str().is_empty() {
        return Err(wrong("cwd property must not be empty"));
    }
    if !process.cwd().is_absolute() {
        return Err(wrong("cwd must be an absolute path"));
    }
    let user = process.user();
    let groups = user.additional_gids().iter().flatten().copied();
    // To the kernel this number is "as before", which is root.
    if groups.chain([user.uid(), user.gid()]).any(|id| id == u32::MAX) {
        return Err(wrong(format!("{} is no user or group", u32::MAX)));
    }
    for line in process.env().iter().flatten() {
        if line.contains('\0') || line.starts_with('=') || !line.contains('=') {
            return Err(wrong(format!("environment variable {line:?} is not NAME=VALUE")));
        }
    }
    let mut kinds = BTreeSet::new();
    for limit in process.rlimits().iter().flatten() {
        if !kinds.insert(limit.typ().to_string()) {
            return Err(wrong(format!("rlimit {} is given twice", limit.typ())));
        }
    }
    let label = process.selinux_label().as_ref().is_some_and(|label| !label.is_empty());
    if label && !Path::new("/sys/fs/selinux/enforce").exists() {
        return Err(unsupported("selinux label is specified in config, but selinux is disabled or not supported"));
    }
    if label {
        return Err(unsupported("selinux labels are not supported yet"));
    }
    let profile = process.apparmor_profile().as_ref().is_some_and(|profile| !profile.is_empty());
    if profile && !Path::new("/sys/kernel/security/apparmor").exists() {
        return Err(unsupported("apparmor profile specified in config, but apparmor is disabled or not supported"));
    }
    Ok(())
}

/// Whether the container gets a namespace of this kind of its own, or one by path.
pub fn apart(linux: &Linux, kind: LinuxNamespaceType) -> bool {
    linux.namespaces().iter().flatten().any(|namespace| namespace.typ() == kind)
}

fn check_namespaces(spec: &Spec, linux: &Linux) -> Result<()> {
    let mut seen = Vec::new();
    for namespace in linux.namespaces().iter().flatten() {
        if seen.contains(&namespace.typ()) {
            return Err(wrong(format!("malformed spec file: duplicated ns {}", namespace.typ())));
        }
        seen.push(namespace.typ());
        if let Some(path) = namespace.path().as_ref().filter(|path| !path.as_os_str().is_empty())
            && !path.is_absolute()
        {
            return Err(wrong(format!("namespace path {} is not absolute", path.display())));
        }
    }
    let named = |name: &Option<String>| name.as_ref().is_some_and(|name| !name.is_empty());
    if named(spec.hostname()) && !apart(linux, LinuxNamespaceType::Uts) {
        return Err(wrong("unable to set hostname without a private UTS namespace"));
    }
    if named(spec.domainname()) && !apart(linux, LinuxNamespaceType::Uts) {
        return Err(wrong("unable to set domainname without a private UTS namespace"));
    }
    let some = |list: &Option<Vec<String>>| list.as_ref().is_some_and(|list| !list.is_empty());
    if (some(linux.masked_paths()) || some(linux.readonly_paths())) && !apart(linux, LinuxNamespaceType::Mount) {
        return Err(wrong("unable to restrict sys entries without a private MNT namespace"));
    }
    check_mounts(spec, linux)?;
    let maps = |list: &Option<Vec<_>>| {
        list.as_ref().is_some_and(|list: &Vec<oci_spec::runtime::LinuxIdMapping>| !list.is_empty())
    };
    let user = linux.namespaces().iter().flatten().find(|namespace| namespace.typ() == LinuxNamespaceType::User);
    let new_user = user.is_some_and(|user| user.path().as_ref().is_none_or(|path| path.as_os_str().is_empty()));
    match (new_user, maps(linux.uid_mappings()), maps(linux.gid_mappings())) {
        (true, true, true) | (false, false, false) => {}
        (true, false, _) => return Err(wrong("user namespaces enabled, but no uid mappings found")),
        (true, _, false) => return Err(wrong("user namespaces enabled, but no gid mappings found")),
        // Docker gives them along with a path.
        (false, ..) if user.is_some() => {}
        (false, ..) => {
            return Err(wrong("user namespace mappings specified, but user namespace isn't enabled in the config"));
        }
    }
    if linux.time_offsets().as_ref().is_some_and(|offsets| !offsets.is_empty())
        && !apart(linux, LinuxNamespaceType::Time)
    {
        return Err(wrong("time namespace offsets specified, but time namespace isn't enabled in the config"));
    }
    Ok(())
}

/// In a mount namespace that others are in nothing is mounted: what asks for it must not be passed over in silence.
fn check_mounts(spec: &Spec, linux: &Linux) -> Result<()> {
    let own = linux.namespaces().iter().flatten().any(|namespace| {
        let by_path = namespace.path().as_ref().is_some_and(|path| !path.as_os_str().is_empty());
        namespace.typ() == LinuxNamespaceType::Mount && !by_path
    });
    let some = |list: &Option<Vec<String>>| list.as_ref().is_some_and(|list| !list.is_empty());
    for (name, asked_for) in [
        ("mounts", spec.mounts().as_ref().is_some_and(|mounts| !mounts.is_empty())),
        ("root.readonly", spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false)),
        ("maskedPaths", some(linux.masked_paths())),
        ("readonlyPaths", some(linux.readonly_paths())),
    ] {
        if asked_for && !own {
            return Err(wrong(format!("{name} cannot be had without a new MNT namespace")));
        }
    }
    Ok(())
}

/// Settings of the kernel belong to a namespace, or they are the host's.
fn check_settings(linux: &Linux) -> Result<()> {
    const IPC: [&str; 8] = [
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
    ];
    let own = |kind| apart(linux, kind);
    for name in linux.sysctl().iter().flat_map(|settings| settings.keys()) {
        let plain = setting(name);
        let (allowed, kind) = match plain.as_str() {
            ipc if IPC.contains(&ipc) || ipc.starts_with("fs.mqueue.") => (own(LinuxNamespaceType::Ipc), "IPC"),
            net if net.starts_with("net.") => (own(LinuxNamespaceType::Network), "network"),
            "kernel.domainname" => (own(LinuxNamespaceType::Uts), "UTS"),
            "kernel.hostname" => return Err(wrong(format!("sysctl {name:?} is set by the field hostname"))),
            user if user.starts_with("user.") => (own(LinuxNamespaceType::User), "user"),
            _ => return Err(wrong(format!("sysctl {name:?} is not in a separate kernel namespace"))),
        };
        if plain.split('.').any(|part| part.is_empty()) || name.contains("..") {
            return Err(wrong(format!("sysctl {name:?} is no name of a setting")));
        }
        if !allowed {
            return Err(wrong(format!("sysctl {name:?} is not allowed in the host's {kind} namespace")));
        }
    }
    Ok(())
}

/// With dots, also when it was written with slashes.
pub fn setting(name: &str) -> String {
    match name.find(['.', '/']) {
        Some(at) if name.as_bytes()[at] == b'/' => name
            .chars()
            .map(|c| {
                if c == '/' {
                    '.'
                } else if c == '.' {
                    '/'
                } else {
                    c
                }
            })
            .collect(),
        _ => name.to_owned(),
    }
}

fn check_the_rest(linux: &Linux) -> Result<()> {
    if linux.intel_rdt().is_some() {
        return Err(unsupported("intelRdt is not supported"));
    }
    if linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty()) {
        return Err(unsupported("netDevices is not supported"));
    }
    if linux.mount_label().as_ref().is_some_and(|label| !label.is_empty()) {
        return Err(unsupported("mountLabel is not supported"));
    }
    if let Some(propagation) = linux.rootfs_propagation().as_deref().filter(|text| !text.is_empty()) {
        root_propagation(propagation)?;
    }
    Ok(())
}

/// MS_… and whether all below the root as well.
pub fn root_propagation(text: &str) -> Result<(u64, bool)> {
    Ok(match text {
        "private" => (libc::MS_PRIVATE, false),
        "rprivate" => (libc::MS_PRIVATE, true),
        "slave" => (libc::MS_SLAVE, false),
        "rslave" => (libc::MS_SLAVE, true),
        "shared" => (libc::MS_SHARED, false),
        "rshared" => (libc::MS_SHARED, true),
        "unbindable" => (libc::MS_UNBINDABLE, false),
        "runbindable" => (libc::MS_UNBINDABLE, true),
        other => return Err(wrong(format!("rootfsPropagation={other} is not supported"))),
    })
}

/// That an id is one, and no path.
pub fn check_id(id: &str) -> Result<()> {
    let good = |c: char| c.is_ascii_alphanumeric() || "_+.-".contains(c);
    if id.is_empty() || id == "." || id == ".." || id.len() > 1024 || !id.chars().all(good) {
        return Err(Problem::new("E-OCI-CONFIG", format!("invalid container ID format: {id:?}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MINIMAL: &str = r#"{"ociVersion": "1.0.2", "root": {"path": "rootfs"},
        "process": {"args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["A=b"]},
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "uts"}, {"type": "ipc"}]},
        "hostname": "x", "futureField": {"a": 1}}"#;

    fn with(from: &str, to: &str) -> Result<()> {
        assert!(MINIMAL.contains(from), "{from}");
        check(&parse(MINIMAL.replace(from, to).as_bytes())?)
    }

    #[test]
    fn what_is_taken_and_what_is_not() {
        with("1.0.2", "1.3.0").unwrap();
        with("1.0.2", "1.99.7-dev").unwrap();
        for (from, to, word) in [
            ("1.0.2", "2.0.0", "ociVersion"),
            ("[\"sh\"]", "[]", "args must not be empty"),
            ("\"cwd\": \"/\"", "\"cwd\": \"tmp\"", "absolute"),
            ("A=b", "A", "NAME=VALUE"),
            ("{\"type\": \"uts\"}, ", "", "UTS"),
            ("{\"type\": \"uts\"}", "{\"type\": \"pid\"}", "duplicated ns"),
            ("\"namespaces\"", "\"sysctl\": {\"kernel.core_pattern\": \"x\"}, \"namespaces\"", "separate kernel"),
            ("\"namespaces\"", "\"sysctl\": {\"net.ipv4.ip_forward\": \"1\"}, \"namespaces\"", "network"),
            ("\"namespaces\"", "\"intelRdt\": {}, \"namespaces\"", "intelRdt"),
            (
                "\"namespaces\"",
                "\"uidMappings\": [{\"containerID\": 0, \"hostID\": 1, \"size\": 1}], \"namespaces\"",
                "isn't enabled",
            ),
        ] {
            let problem = with(from, to).unwrap_err();
            assert!(problem.chain().contains(word), "{}", problem.chain());
        }
        with("\"namespaces\"", "\"sysctl\": {\"kernel.shmmax\": \"1\", \"kernel/shmall\": \"1\"}, \"namespaces\"")
            .unwrap();
    }

    #[test]
    fn names_of_containers() {
        for id in ["a", "0f_9+.-Z", "...a"] {
            check_id(id).unwrap();
        }
        for id in ["", ".", "..", "a/b", "../x", "a b", "ä"] {
            assert!(check_id(id).is_err(), "{id}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(at in 0..MINIMAL.len(), byte: u8) {
            let mut bytes = MINIMAL.as_bytes().to_vec();
            bytes[at] = byte;
            let _ = parse(&bytes).and_then(|spec| check(&spec));
        }
    }
}
