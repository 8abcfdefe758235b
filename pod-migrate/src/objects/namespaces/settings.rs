//! Settings of the kernel (sysctl) that belong to the network and the IPC namespace, of a pod that may change them.
//!
//! What says something else than in namespaces that nobody has touched ([`usual`]) is kept, and written where the newborn
//! pod's says something else. The kernel shows in /proc/sys the settings of the namespaces of the thread that looks; what
//! is not the namespace's own cannot be written there.

use super::{Namespace, permitted, within};
use crate::crew;
use crate::image::damaged;
use crate::{Doing, Problem, Result};
use nix::sched::{CloneFlags, unshare};
use pod_runtime::namespaces::NETWORK;
use pod_runtime::spec::{NetworkMode, Security, Spec};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// A setting that the pod had cannot be made here.
pub const SETTING: &str = "E-SETTING";

/// By its path below /proc/sys. Record SETTINGS is a list of those that were made, name and value.
pub type Settings = BTreeMap<String, String>;

const IPC: [&str; 9] =
    ["shmmax", "shmall", "shmmni", "shm_rmid_forced", "msgmax", "msgmni", "msgmnb", "auto_msgmni", "sem"];
/// Of a pod's own device, and of no other that a namespace begins with.
const DEVICE: &str = "/eth0/";
const NEW_DEVICES: &str = "/default/";
/// What a person may have written at most: a bitmap of all ports.
const MOST: usize = 1 << 19;
/// More than any namespace has.
const MOST_SETTINGS: usize = 10_000;

/// What every pod has here, if this one may have changed it.
pub fn usual(spec: &Spec) -> Result<Option<Settings>> {
    if !may(&spec.security) {
        return Ok(None);
    }
    let look = || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC).doing(|| "make namespaces to look at".into())?;
        for (name, value) in NETWORK {
            let path = format!("/proc/sys/{}", name.replace('.', "/"));
            if Path::new(&path).exists() {
                fs::write(&path, value).doing(|| format!("set {name} to {value}"))?;
            }
        }
        Ok(of_network().into_iter().chain(of_ipc()).collect())
    };
    let done = std::thread::scope(|scope| scope.spawn(look).join());
    done.unwrap_or_else(|_| Err(Problem::new("E-INTERNAL", "the thread in new namespaces panicked"))).map(Some)
}

/// Root may write to what it can mount a procfs for.
fn may(security: &Security) -> bool {
    security.may("SYS_ADMIN")
}

/// Those that the pod has made.
pub fn dump(spec: &Spec, usual: Option<&Settings>, init: i32) -> Result<Vec<(String, String)>> {
    let Some(usual) = usual else { return Ok(Vec::new()) };
    let mut found = within(init, Namespace::Ipc, || Ok(of_ipc()))?;
    if spec.network.mode != NetworkMode::Host {
        let of_device = usual.keys().filter(|name| name.contains(NEW_DEVICES));
        let of_device = of_device.map(|name| name.replace(NEW_DEVICES, DEVICE));
        let names: Vec<String> = usual.keys().filter(|name| is_network(name)).cloned().chain(of_device).collect();
        // Hundreds of files, while the pod stands still: those of which it is known that they are there, and by all CPUs.
        let read = || crew::share(names.len(), |at| Some((names[at].clone(), setting(&names[at])?)));
        found.extend(within(init, Namespace::Network, || Ok(read()))?.into_iter().flatten());
    }
    // A device begins with what is said for all that come.
    let as_ever = |name: &str| usual.get(&name.replace(DEVICE, NEW_DEVICES));
    found.retain(|name, value| as_ever(name) != Some(value));
    Ok(found.into_iter().collect())
}

/// In the namespaces of a newborn pod.
pub fn restore(init: i32, settings: &[(String, String)], spec: &Spec) -> Result<()> {
    permitted(&spec.security, "SYS_ADMIN", "settings of the kernel of its own")?;
    if settings.len() > MOST_SETTINGS {
        return Err(damaged("the image has more settings than there can be"));
    }
    let (ipc, network): (Vec<_>, Vec<_>) = settings.iter().partition(|(name, _)| is_ipc(name));
    if let Some((name, _)) = network.iter().find(|(name, _)| !is_network(name)) {
        return Err(damaged(format!("{name:?} is no setting of a namespace")));
    }
    if !network.is_empty() && spec.network.mode == NetworkMode::Host {
        return Err(damaged("settings of a network that is the host's"));
    }
    within(init, Namespace::Ipc, || make(&ipc))?;
    within(init, Namespace::Network, || make(&network))
}

/// Some change others: what is for all devices goes first, and all are looked at once more.
fn make(settings: &[&(String, String)]) -> Result<()> {
    let mut settings = settings.to_vec();
    settings.sort_by_key(|(name, _)| {
        (!name.ends_with("/ip_forward"), !name.contains("/all/"), !name.contains("/default/"), name.clone())
    });
    for _ in 0..2 {
        for (name, value) in &settings {
            let path = format!("/proc/sys/{name}");
            let now = fs::read_to_string(&path).unwrap_or_default();
            if now.trim_end() != value {
                let what = || format!("{name}, which a program in the pod has set to {value:?}, cannot be set here");
                fs::write(&path, value).map_err(|error| Problem::new(SETTING, what()).because(error))?;
            }
        }
    }
    Ok(())
}

fn is_ipc(name: &str) -> bool {
    name.strip_prefix("kernel/").is_some_and(|name| IPC.contains(&name))
}

/// Below /proc/sys/net and nowhere else.
fn is_network(name: &str) -> bool {
    let parts = || name.split('/');
    let is_name = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains(['\0', '\n']);
    parts().next() == Some("net") && parts().count() > 1 && parts().count() < 16 && parts().all(is_name)
}

fn of_ipc() -> Settings {
    let names = IPC.iter().map(|name| format!("kernel/{name}"));
    names.filter_map(|name| Some((name.clone(), setting(&name)?))).collect()
}

fn setting(name: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/sys/{name}")).ok().filter(|text| text.len() < MOST)?;
    Some(text.trim_end().to_owned())
}

/// All that can be read and written, but what follows from something else (the MTU from that of the link).
fn of_network() -> Settings {
    let mut found = Settings::new();
    let mut to_read = vec!["net".to_owned()];
    while let Some(folder) = to_read.pop() {
        for entry in fs::read_dir(format!("/proc/sys/{folder}")).into_iter().flatten().flatten() {
            let name = format!("{folder}/{}", entry.file_name().to_string_lossy());
            let Ok(about) = entry.metadata() else { continue };
            if about.is_dir() {
                to_read.push(name);
            } else if about.permissions().mode() & 0o600 == 0o600 && !name.ends_with("/mtu") {
                found.extend(setting(&name).map(|text| (name, text)));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_elsewhere() {
        assert!(is_network("net/ipv4/conf/eth0/rp_filter") && is_ipc("kernel/sem"));
        for wrong in
            ["net", "net/../kernel/core_pattern", "kernel/core_pattern", "/net/x", "net//x", "net/./x", "nets/x"]
        {
            assert!(!is_network(wrong) && !is_ipc(wrong), "{wrong}");
        }
    }

    #[test]
    fn what_is_made_is_found_and_made_again() {
        std::thread::spawn(|| {
            let fresh = || unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC).expect("needs root");
            fresh();
            let (usual, ipc) = (of_network(), of_ipc());
            assert!(usual.len() > 100 && ipc.contains_key("kernel/sem"), "{}", usual.len());
            // Many begin as they are on this machine.
            let flipped = if usual["net/ipv4/ip_forward"] == "1" { "0" } else { "1" };
            let set = [("net/ipv4/ip_forward", flipped), ("net/ipv4/tcp_syn_retries", "9"), ("kernel/sem", "1 2 3 4")];
            set.iter().for_each(|(name, value)| fs::write(format!("/proc/sys/{name}"), value).unwrap());
            let made = |usual: &Settings| {
                let all = of_network().into_iter().chain(of_ipc());
                all.filter(|(name, value)| usual.get(name) != Some(value)).collect::<Vec<_>>()
            };
            let (all, whole) = (usual.into_iter().chain(ipc).collect(), made(&Settings::new()));
            let found = made(&all);
            assert!(found.contains(&("net/ipv4/ip_forward".into(), flipped.into())), "{found:?}");
            assert!(found.len() < 20 && found.contains(&("net/ipv4/tcp_syn_retries".into(), "9".into())), "{found:?}");
            fresh();
            make(&found.iter().collect::<Vec<_>>()).unwrap();
            assert_eq!(made(&Settings::new()), whole);
            let other = [("net/ipv4/no_such_setting".to_owned(), "1".to_owned())];
            assert_eq!(make(&other.iter().collect::<Vec<_>>()).unwrap_err().code(), SETTING);
        })
        .join()
        .unwrap();
    }
}
