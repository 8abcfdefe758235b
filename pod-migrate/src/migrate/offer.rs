//! What the source offers and what can stand against it at the destination: everything that can be known before the
//! pod is touched.

use super::base::Base as Below;
use super::labels;
use super::protocol::{Cpu, Hello, Offer, Room, Xsave};
use crate::storage::volumes;
use nix::sys::statvfs::statvfs;
use pod_runtime::cgroup::Cgroup;
use pod_runtime::spec::{Base, Spec};
use pod_runtime::status::{State, now};
use pod_runtime::store::{Pod, Store};
use pod_runtime::sys::cpu::xsave_area;
use pod_runtime::sys::userfault;
use pod_runtime::{Doing, Problem, Result, network, proc};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// The destination's clock may differ by so many seconds before somebody should know, where the source cannot tell more
/// exactly: one of the release before.
const SKEW: u64 = 5;

/// Source: what stands against moving the pod at all. Nothing is touched.
pub fn blockers(pod: &Pod) -> Result<Vec<Problem>> {
    let (spec, status) = (pod.spec()?, pod.status()?);
    let mut found = Vec::new();
    let Some(init) = status.init.filter(|_| status.state == State::Running) else {
        found.push(match &status.moved_to {
            Some(to) if status.state == State::Moved => pod_runtime::monitor::moved_problem(&spec.name, to),
            _ => pod_runtime::status::wrong_state(&spec.name, status.state, "running"),
        });
        return Ok(found);
    };
    if status.monitor_lost {
        found.push(Problem::new("E-MONITOR", "the pod's monitor is gone, and with it the pod's terminal or pipes"));
    }
    found.extend(crate::objects::namespaces::mounts::dump(pod, init.pid).err());
    found.extend(crate::objects::namespaces::network::check(&spec, init.pid));
    let cgroup = Cgroup::open(pod.id())?;
    found.extend(crate::objects::namespaces::cgroups::check(&spec.security, &cgroup));
    let members = cgroup.procs()?;
    let outside = crate::capture::outside_now(pod).unwrap_or_default();
    found.extend(crate::check::check(&spec, crate::ids::HostPid(init.pid), &members, outside)?);
    Ok(found)
}

/// Source: what will not be afterwards as it was, as far as it can be known before.
pub fn downgrades(pod: &Pod) -> Result<Vec<Problem>> {
    let (spec, status) = (pod.spec()?, pod.status()?);
    let Some(init) = status.init.filter(|_| status.state == State::Running) else { return Ok(Vec::new()) };
    let network = pod.store().network_dir()?;
    let init = crate::ids::HostPid(init.pid);
    let processes: Vec<_> = Cgroup::open(pod.id())?.procs()?.into_iter().map(crate::ids::HostPid).collect();
    let found = [
        crate::connections::downgrade(&spec, &network, init),
        crate::settle::downgrade(init),
        crate::objects::namespaces::ipc::downgrade(init.0, &processes),
        crate::objects::namespaces::network::downgrade(&spec, init.0),
        crate::objects::memory::dump::downgrade(&processes),
        labels::downgrade(&processes),
    ];
    Ok(found.into_iter().flatten().collect())
}

/// Source: what it would bring.
pub fn offer(pod: &Pod) -> Result<Offer> {
    let cgroup = Cgroup::open(pod.id())?;
    let processes = cgroup.procs()?;
    let memory = cgroup.stats().ok().and_then(|s| s.memory).unwrap_or_else(|| resident(&processes));
    let spec = pod.spec()?;
    let lan = network::lan(&pod.store().network_dir()?, &spec)?;
    Ok(Offer {
        mtu: lan.map(|(_, mtu)| spec.network.mtu.unwrap_or(mtu)),
        base: Below::of(&spec),
        spec,
        memory,
        files: disk_usage(&pod.upper_dir()),
        processes: processes.len() as u64,
        cpu: cpu(),
        features: Vec::new(),
        behind: false,
    })
}

fn resident(processes: &[i32]) -> u64 {
    let pages = |pid: &i32| {
        let text = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
        text.split(' ').nth(1).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0)
    };
    processes.iter().map(pages).sum::<u64>() * 4096
}

fn disk_usage(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let mut bytes = 0;
    let mut to_read = vec![dir.to_owned()];
    while let Some(dir) = to_read.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            bytes += meta.blocks() * 512;
            if meta.is_dir() {
                to_read.push(entry.path());
            }
        }
    }
    bytes
}

/// This host's processor as programs see it.
pub fn cpu() -> Cpu {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let flags =
        field("flags").unwrap_or_default().split(' ').filter(|f| is_instruction(f)).map(str::to_owned).collect();
    let xsave = xsave_area().map(|area| Xsave { features: area.features, size: area.size, parts: area.parts });
    Cpu { model: field("model name").unwrap_or_default(), flags, xsave }
}

/// Flags that stand for instructions or register state that a program may use; the rest are hints and kernel features.
fn is_instruction(flag: &str) -> bool {
    const PREFIXES: &[&str] = &["sse", "avx", "amx", "bmi", "xsave", "sha", "vaes", "vpcl", "kl", "avx512"];
    const NAMES: &[&str] = &[
        "ssse3",
        "pni",
        "fma",
        "f16c",
        "aes",
        "pclmulqdq",
        "gfni",
        "popcnt",
        "movbe",
        "abm",
        "adx",
        "rdrand",
        "rdseed",
        "fsgsbase",
        "cx16",
        "lahf_lm",
        "pku",
        "ospke",
        "clflushopt",
        "clwb",
        "movdiri",
        "movdir64b",
        "rdpid",
        "rdtscp",
        "waitpkg",
        "serialize",
        "enqcmd",
        "rtm",
        "hle",
        "mmx",
        "fxsr",
        "3dnow",
        "tbm",
        "xop",
        "fma4",
    ];
    NAMES.contains(&flag) || PREFIXES.iter().any(|p| flag.starts_with(p))
}

/// Destination: what stands against taking it, and what somebody should know.
pub fn against(store: &Store, offer: &Offer, hello: &Hello) -> (Vec<Problem>, Vec<String>) {
    let mut found: Vec<Problem> = Vec::new();
    let mut warnings = Vec::new();
    let spec = &offer.spec;
    if let Err(problem) = crate::arrival::check_spec(spec) {
        return (vec![problem], warnings);
    }
    let ours = cpu();
    found.extend(missing_instructions(&offer.cpu, &ours));
    found.extend(offer.cpu.xsave.as_ref().and_then(|theirs| other_layout(theirs, &ours.xsave.unwrap_or_default())));
    found.extend(frames(store, offer));
    found.extend(room(store, offer));
    found.extend(volumes::check(store, spec));
    found.extend(root(spec));
    found.extend(taken(store, spec));
    warnings.extend(Below::of(spec).differs(&offer.base));
    let skew = now().abs_diff(hello.time);
    if skew > SKEW && hello.time_ms.is_none() {
        warnings.push(format!("the clocks of the two hosts differ by {skew} s: time in the pod will jump"));
    }
    (found, warnings)
}

/// Memory that comes behind a pod is brought by userfaultfd.
pub fn cannot_follow(offer: &Offer) -> Option<Problem> {
    (offer.behind && !userfault::can_handle()).then(|| {
        Problem::new("E-KERNEL", "the kernel there does not let memory come behind a pod (userfaultfd)")
            .fix("leave --postcopy (or --on-stall postcopy) out")
    })
}

/// A frame that a bridge has no room for it drops without a word.
fn frames(store: &Store, offer: &Offer) -> Option<Problem> {
    let needed = offer.mtu?;
    let (bridge, here) = network::lan(&store.network_dir().ok()?, &offer.spec).ok()??;
    let what = format!("the pod and its peers send frames of up to {needed} bytes, and {bridge} there takes {here}");
    (here < needed).then(|| {
        let fix = format!("on that host: ip link set {bridge} mtu {needed}, and the LAN's interface in it too");
        Problem::new("E-MTU", what).fix(fix)
    })
}

/// Registers are restored as they were saved: every part that there is must be there, in the same place.
fn other_layout(theirs: &Xsave, ours: &Xsave) -> Option<Problem> {
    let missing = theirs.features & !ours.features;
    let moved = theirs.parts.iter().filter(|part| missing & 1 << part.0 == 0).find(|part| !ours.parts.contains(part));
    let what = match (missing, moved) {
        (0, None) => return None,
        (0, Some((part, ..))) => format!("part {part} of the XSAVE area lies elsewhere on this processor"),
        (missing, _) => {
            format!("the XSAVE area of this processor lacks parts that the pod's registers have ({missing:#x})")
        }
    };
    Some(Problem::new("E-XSAVE", what).fix("move it to a host with a processor of the same kind"))
}

fn missing_instructions(theirs: &Cpu, ours: &Cpu) -> Option<Problem> {
    let ours: BTreeSet<&String> = ours.flags.iter().collect();
    let missing: Vec<&str> = theirs.flags.iter().filter(|flag| !ours.contains(flag)).map(String::as_str).collect();
    if missing.is_empty() {
        return None;
    }
    Some(
        Problem::new("E-CPU", format!("this processor lacks what the pod may be using: {}", missing.join(", ")))
            .fix("move it to a host with a processor of the same or a newer kind"),
    )
}

fn room(store: &Store, offer: &Offer) -> Vec<Problem> {
    let mut found = Vec::new();
    let (needed, free) = (offer.memory >> 20, memory_free());
    if let Some(free) = free.filter(|free| *free < offer.memory) {
        let what = format!("the pod uses {needed} MiB of memory and {} MiB are free here", free >> 20);
        found.push(Problem::new("E-MEMORY", what).fix("free memory on that host, or choose another"));
    }
    let (needed, free) = (offer.files >> 20, disk_free(store));
    if let Some(free) = free.filter(|free| *free < offer.files) {
        let place = store.data().display();
        let what = format!("the pod wrote {needed} MiB of files and {} MiB are free in {place}", free >> 20);
        found.push(Problem::new("E-DISK", what).fix("make room there, or give the host another POD_ROOT"));
    }
    found
}

fn memory_free() -> Option<u64> {
    proc::amount(&proc::read("/proc/meminfo").ok()?, "MemAvailable:")
}

fn disk_free(store: &Store) -> Option<u64> {
    statvfs(store.data()).ok().map(|fs| fs.blocks_available() * fs.fragment_size())
}

/// What is free on this host for pods that arrive.
pub fn free(store: &Store) -> Option<Room> {
    Some(Room { memory: memory_free()?, disk: disk_free(store)? })
}

fn root(spec: &Spec) -> Option<Problem> {
    let Base::Directory(path) = &spec.root.base else { return None };
    if path.is_dir() {
        return None;
    }
    let what = format!("the pod's root file system {} is not on this host", path.display());
    Some(
        Problem::new("E-ROOTFS-MISSING", what)
            .fix(format!("copy it there (rsync -aHAX), under the same path {}", path.display())),
    )
}

/// Name and id, without taking them.
fn taken(store: &Store, spec: &Spec) -> Option<Problem> {
    for pod in store.pods().ok()? {
        let state = pod.status().ok()?.state;
        if state == State::Moved || state == State::Dead {
            continue;
        }
        if pod.id() == spec.id {
            let what = format!("pod {} ('{}') is on that host already, {state}", spec.id, spec.name);
            return Some(Problem::new("E-NAME", what).fix(format!("remove it there: pod rm -f {}", spec.id)));
        }
        if pod.name().is_ok_and(|name| name == spec.name) {
            let what = format!("that host has another pod with the name '{}'", spec.name);
            return Some(Problem::new("E-NAME", what).fix(format!("`pod rename {} NEW` on one of them", spec.name)));
        }
    }
    None
}

/// Destination: whether the network could be had; for a check, so nothing is kept.
pub fn network_could(store: &Store, spec: &Spec) -> Result<()> {
    let dir = store.network_dir().doing(|| "find the network's folder".into())?;
    let before = network::leases::of(&dir, &spec.id)?;
    let could = network::lease(&dir, &mut spec.clone(), pod_runtime::network::Claim::Arriving);
    if before.is_none() {
        network::leases::forget(&dir, &spec.id)?;
    }
    could.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_fit_where_all_parts_lie_in_the_same_place() {
        let area = |features, parts: &[(u32, u32, u32)]| Xsave { features, size: 0, parts: parts.to_vec() };
        let avx = area(0b111, &[(2, 576, 256)]);
        let with_keys = area(0x207, &[(2, 576, 256), (9, 2432, 8)]);
        assert_eq!(other_layout(&avx, &with_keys).map(|problem| problem.report()), None, "more does no harm");
        let lacks = other_layout(&with_keys, &avx).unwrap();
        assert!(lacks.code() == "E-XSAVE" && lacks.what().contains("0x200"), "{lacks}");
        let elsewhere = area(0x207, &[(2, 576, 256), (9, 2440, 8)]);
        assert!(other_layout(&with_keys, &elsewhere).unwrap().what().contains("part 9"));
        assert!(other_layout(&avx, &Xsave::default()).is_some(), "no XSAVE at all");
        assert!(other_layout(&cpu().xsave.unwrap_or_default(), &cpu().xsave.unwrap_or_default()).is_none());
    }
}
