//! Limits of a container, as `config.json` and `update` have them, in whichever hierarchy the host keeps the controller.
//!
//! Values are those of cgroup v1; v2 gets them translated as all runtimes do. A limit for which this host has no
//! controller or no file is an error that names it: a container that was to be limited does not run without.

use super::wrong;
use crate::cgroup::Cgroup;
use crate::problem::{Doing, Problem, Result};
use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice, LinuxWeightDevice};
use std::fs;
use std::path::{Path, PathBuf};

/// Sets all that is there; what is not stays as it was.
pub fn apply(cgroup: &Cgroup, resources: &LinuxResources) -> Result<()> {
    if let Some(given) = resources.memory() {
        memory(cgroup, given)?;
    }
    if let Some(given) = resources.cpu() {
        cpu(cgroup, given)?;
        cpuset(cgroup, given)?;
    }
    if let Some(given) = resources.pids().filter(|pids| pids.limit() != 0) {
        let value = if given.limit() < 0 { "max".to_owned() } else { given.limit().to_string() };
        put(&controller(cgroup, "pids")?.0, "pids.max", &value)?;
    }
    if let Some(given) = resources.block_io() {
        block(cgroup, given)?;
    }
    for given in resources.hugepage_limits().iter().flatten() {
        let (folder, v2) = controller(cgroup, "hugetlb")?;
        let size = plain(given.page_size())?;
        let file = if v2 { format!("hugetlb.{size}.max") } else { format!("hugetlb.{size}.limit_in_bytes") };
        put(&folder, &file, &given.limit().to_string())?;
    }
    network_and_rdma(cgroup, resources)?;
    for (file, value) in resources.unified().iter().flatten() {
        let folder =
            cgroup.unified().ok_or_else(|| wrong("unified resources need cgroup v2, which this host does not have"))?;
        put(&folder, plain(file)?, value)?;
    }
    Ok(())
}

fn network_and_rdma(cgroup: &Cgroup, resources: &LinuxResources) -> Result<()> {
    if let Some(network) = resources.network() {
        if let Some(class) = network.class_id().filter(|class| *class != 0) {
            put(&controller(cgroup, "net_cls")?.0, "net_cls.classid", &class.to_string())?;
        }
        for given in network.priorities().iter().flatten() {
            let line = format!("{} {}", given.name(), given.priority());
            put(&controller(cgroup, "net_prio")?.0, "net_prio.ifpriomap", &line)?;
        }
    }
    for (device, given) in resources.rdma().iter().flatten() {
        let number = |number: Option<u32>| number.map_or("max".to_owned(), |number| number.to_string());
        let (handles, objects) = (number(given.hca_handles()), number(given.hca_objects()));
        let line = format!("{device} hca_handle={handles} hca_object={objects}");
        put(&controller(cgroup, "rdma")?.0, "rdma.max", &line)?;
    }
    Ok(())
}

fn controller(cgroup: &Cgroup, name: &str) -> Result<(PathBuf, bool)> {
    cgroup.with_controller(name).ok_or_else(|| {
        Problem::new("E-CGROUP", format!("this host has no {name} cgroup controller: the limit cannot be kept"))
    })
}

/// A name of a file, and no path.
fn plain(name: &str) -> Result<&str> {
    if name.is_empty() || name.contains('/') || name.contains("..") {
        return Err(wrong(format!("'{name}' is no file of a cgroup")));
    }
    Ok(name)
}

fn put(folder: &Path, file: &str, value: &str) -> Result<()> {
    fs::write(folder.join(file), value)
        .doing(|| format!("failed to write \"{value}\" to {}", folder.join(file).display()))
}

fn memory(cgroup: &Cgroup, given: &LinuxMemory) -> Result<()> {
    let (limit, swap) = (given.limit().filter(|limit| *limit != 0), given.swap().filter(|swap| *swap != 0));
    let any = limit.or(swap).or(given.reservation()).is_some();
    let other = given.swappiness().is_some() || given.disable_oom_killer() == Some(true);
    if !any && !other {
        return Ok(());
    }
    let (folder, v2) = controller(cgroup, "memory")?;
    if given.check_before_update() == Some(true)
        && let Some(limit) = limit.filter(|limit| *limit > 0)
    {
        let file = if v2 { "memory.current" } else { "memory.usage_in_bytes" };
        let used = fs::read_to_string(folder.join(file)).ok().and_then(|text| text.trim().parse::<i64>().ok());
        if used.is_some_and(|used| used > limit) {
            return Err(wrong(format!("memory limit {limit} is below what is in use now")));
        }
    }
    if v2 { memory_v2(&folder, given, limit, swap) } else { memory_v1(&folder, given, limit, swap) }
}

fn memory_v1(folder: &Path, given: &LinuxMemory, limit: Option<i64>, swap: Option<i64>) -> Result<()> {
    // No limit of memory is none of both.
    let swap = if limit == Some(-1) { swap.or(Some(-1)) } else { swap };
    let counted = folder.join("memory.memsw.limit_in_bytes").exists();
    let set_limit = || limit.map_or(Ok(()), |limit| put(folder, "memory.limit_in_bytes", &limit.to_string()));
    let set_both = || match swap {
        Some(swap) if counted => put(folder, "memory.memsw.limit_in_bytes", &swap.to_string()),
        _ => Ok(()),
    };
    // Memory may never be above memory and swap: which goes first depends on which way they move.
    if set_limit().is_ok() {
        set_both()?;
    } else {
        set_both()?;
        set_limit()?;
    }
    if let Some(reservation) = given.reservation() {
        put(folder, "memory.soft_limit_in_bytes", &reservation.to_string())?;
    }
    if let Some(limit) = given.kernel_tcp() {
        put(folder, "memory.kmem.tcp.limit_in_bytes", &limit.to_string())?;
    }
    if let Some(swappiness) = given.swappiness() {
        put(folder, "memory.swappiness", &swappiness.to_string())?;
    }
    if given.disable_oom_killer() == Some(true) {
        put(folder, "memory.oom_control", "1")?;
    }
    Ok(())
}

fn memory_v2(folder: &Path, given: &LinuxMemory, limit: Option<i64>, swap: Option<i64>) -> Result<()> {
    let text = |bytes: i64| if bytes < 0 { "max".to_owned() } else { bytes.to_string() };
    let swap = match (limit, swap) {
        (Some(-1), None) | (_, Some(-1)) => Some("max".to_owned()),
        (_, None) => None,
        (Some(limit), Some(swap)) if limit > 0 => {
            let alone = swap.checked_sub(limit).filter(|swap| *swap >= 0);
            Some(alone.ok_or_else(|| wrong("memory+swap limit should be >= memory limit"))?.to_string())
        }
        (_, Some(_)) => return Err(wrong("unable to set swap limit without memory limit")),
    };
    if let Some(swap) = swap.filter(|_| folder.join("memory.swap.max").exists()) {
        put(folder, "memory.swap.max", &swap)?;
    }
    if let Some(limit) = limit {
        put(folder, "memory.max", &text(limit))?;
    }
    given.reservation().map_or(Ok(()), |reservation| put(folder, "memory.low", &text(reservation)))
}

fn cpu(cgroup: &Cgroup, given: &LinuxCpu) -> Result<()> {
    let shares = given.shares().filter(|shares| *shares != 0);
    let (quota, period) = (given.quota().filter(|quota| *quota != 0), given.period().filter(|period| *period != 0));
    let (runtime, real) = (given.realtime_runtime().filter(|t| *t != 0), given.realtime_period().filter(|t| *t != 0));
    let of_time = quota.or(runtime).or(given.idle()).is_some();
    if !of_time && shares.or(period).or(real).or(given.burst()).is_none() {
        return Ok(());
    }
    let (folder, v2) = controller(cgroup, "cpu")?;
    if v2 {
        return cpu_v2(&folder, given);
    }
    if let Some(idle) = given.idle() {
        put(&folder, "cpu.idle", &idle.to_string())?;
    }
    if let Some(shares) = shares {
        put(&folder, "cpu.shares", &shares.to_string())?;
    }
    let set_period = || period.map_or(Ok(()), |period| put(&folder, "cpu.cfs_period_us", &period.to_string()));
    let set_quota = || quota.map_or(Ok(()), |quota| put(&folder, "cpu.cfs_quota_us", &quota.to_string()));
    // The new period may be too short for the old quota.
    if set_period().is_ok() {
        set_quota()?;
    } else {
        set_quota()?;
        set_period()?;
    }
    let rest = [
        (given.burst().map(|burst| burst.to_string()), "cpu.cfs_burst_us"),
        (real.map(|period| period.to_string()), "cpu.rt_period_us"),
        (runtime.map(|runtime| runtime.to_string()), "cpu.rt_runtime_us"),
    ];
    rest.into_iter().try_for_each(|(value, file)| value.map_or(Ok(()), |value| put(&folder, file, &value)))
}

/// 2 to 262144 of v1 are 1 to 10000 of v2.
fn weight_of_shares(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

fn cpu_v2(folder: &Path, given: &LinuxCpu) -> Result<()> {
    if given.realtime_runtime().or(given.realtime_period().map(|p| p as i64)).is_some_and(|time| time != 0) {
        return Err(wrong("cgroup v2 has no limit of realtime CPU"));
    }
    if let Some(idle) = given.idle() {
        put(folder, "cpu.idle", &idle.to_string())?;
    }
    if let Some(shares) = given.shares().filter(|shares| *shares != 0) {
        put(folder, "cpu.weight", &weight_of_shares(shares).to_string())?;
    }
    let (quota, period) = (given.quota().filter(|quota| *quota != 0), given.period().filter(|period| *period != 0));
    if quota.is_some() || period.is_some() {
        let before = fs::read_to_string(folder.join("cpu.max")).unwrap_or_default();
        let before = before.split_whitespace().next().unwrap_or("max");
        let quota = match quota {
            Some(quota) if quota > 0 => quota.to_string(),
            Some(_) => "max".to_owned(),
            None => before.to_owned(),
        };
        let period = period.map_or(String::new(), |period| format!(" {period}"));
        put(folder, "cpu.max", &format!("{quota}{period}"))?;
    }
    given.burst().map_or(Ok(()), |burst| put(folder, "cpu.max.burst", &burst.to_string()))
}

fn cpuset(cgroup: &Cgroup, given: &LinuxCpu) -> Result<()> {
    for (file, value) in [("cpuset.cpus", given.cpus()), ("cpuset.mems", given.mems())] {
        if let Some(value) = value.as_deref().filter(|value| !value.is_empty()) {
            put(&controller(cgroup, "cpuset")?.0, file, value)?;
        }
    }
    Ok(())
}

fn block(cgroup: &Cgroup, given: &LinuxBlockIo) -> Result<()> {
    let weights: &[LinuxWeightDevice] = given.weight_device().as_deref().unwrap_or_default();
    let none = Vec::new();
    let list = |list: &'_ Option<Vec<LinuxThrottleDevice>>| list.clone().unwrap_or(none.clone());
    let throttles = [
        (list(given.throttle_read_bps_device()), "blkio.throttle.read_bps_device", "rbps"),
        (list(given.throttle_write_bps_device()), "blkio.throttle.write_bps_device", "wbps"),
        (list(given.throttle_read_iops_device()), "blkio.throttle.read_iops_device", "riops"),
        (list(given.throttle_write_iops_device()), "blkio.throttle.write_iops_device", "wiops"),
    ];
    let weight = given.weight().filter(|weight| *weight != 0);
    let leaf = given.leaf_weight().filter(|weight| *weight != 0);
    if weight.or(leaf).is_none() && weights.is_empty() && throttles.iter().all(|(list, ..)| list.is_empty()) {
        return Ok(());
    }
    let v2 = cgroup.v1_folder("blkio").is_none();
    let (folder, _) = controller(cgroup, if v2 { "io" } else { "blkio" })?;
    let bfq = |plain: &'static str, bfq: &'static str| if folder.join(bfq).exists() { bfq } else { plain };
    if let Some(weight) = weight {
        match v2 {
            false => put(&folder, bfq("blkio.weight", "blkio.bfq.weight"), &weight.to_string())?,
            true if folder.join("io.bfq.weight").exists() => put(&folder, "io.bfq.weight", &weight.to_string())?,
            // 10 to 1000 of v1 are 1 to 10000 of v2.
            true => {
                put(&folder, "io.weight", &(1 + (u64::from(weight.clamp(10, 1000)) - 10) * 9999 / 990).to_string())?
            }
        }
    }
    if let Some(weight) = leaf.filter(|_| !v2) {
        put(&folder, "blkio.leaf_weight", &weight.to_string())?;
    }
    for device in weights {
        let Some(weight) = device.weight() else { continue };
        let file = if v2 { "io.bfq.weight" } else { bfq("blkio.weight_device", "blkio.bfq.weight_device") };
        put(&folder, file, &format!("{}:{} {weight}", device.major(), device.minor()))?;
    }
    for (list, file, key) in throttles {
        for device in list {
            let (number, rate) = (format!("{}:{}", device.major(), device.minor()), device.rate());
            match v2 {
                false => put(&folder, file, &format!("{number} {rate}"))?,
                true => put(&folder, "io.max", &format!("{number} {key}={rate}"))?,
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_as_weights() {
        assert_eq!([2, 1024, 262_144].map(weight_of_shares), [1, 39, 10_000]);
        assert_eq!(weight_of_shares(0), 1);
    }

    #[test]
    fn files_are_no_paths() {
        assert!(plain("memory.high").is_ok());
        for name in ["", "../x", "a/b", ".."] {
            assert!(plain(name).is_err(), "{name}");
        }
    }
}
