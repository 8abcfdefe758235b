//! Limits and usage, on whichever side (v1 or v2) the host keeps the controller.

use super::{Cgroup, Stats};
use crate::problem::{Doing, Result};
use crate::spec::Resources;
use cgroups_rs::fs::MaxValue;
use cgroups_rs::fs::cpu::CpuController;
use cgroups_rs::fs::cpuacct::CpuAcctController;
use cgroups_rs::fs::memory::MemController;
use cgroups_rs::fs::pid::PidController;
use std::fs;
use std::path::Path;

/// Microseconds; the kernel's own default.
const CPU_PERIOD: u64 = 100_000;

/// A v1 memory limit above this means none (it is the largest page count in bytes).
const UNLIMITED: u64 = 0x7000_0000_0000_0000;

pub fn apply(cgroup: &Cgroup, resources: &Resources) -> Result<Vec<String>> {
    let offered = |controller: &str| {
        let folder = cgroup.unified()?;
        let given = fs::read_to_string(folder.join("cgroup.controllers")).ok()?;
        given.split_whitespace().any(|c| c == controller).then_some(folder)
    };
    let mut warnings = Vec::new();
    let mut missing = |controller: &str, asked: bool| {
        if asked {
            warnings.push(format!("this host has no {controller} cgroup controller: the limit is not kept"));
        }
    };
    if let Some(folder) = cgroup.v1("memory") {
        memory_v1(&folder, resources.memory)?;
    } else if let Some(folder) = offered("memory") {
        memory_v2(&folder, resources.memory)?;
    } else {
        missing("memory", resources.memory.is_some());
    }
    if let Some(folder) = cgroup.v1("cpu") {
        let quota = resources.cpus.map_or(-1, |cpus| quota(cpus) as i64);
        let controller = CpuController::new(folder.clone(), folder, false);
        if quota > 0 {
            controller.set_cfs_period(CPU_PERIOD).doing(|| "set the period of the CPU limit".into())?;
        }
        controller.set_cfs_quota(quota).doing(|| "set the CPU limit".into())?;
    } else if let Some(folder) = offered("cpu") {
        let quota = resources.cpus.map_or("max".to_owned(), |cpus| quota(cpus).to_string());
        write(&folder, "cpu.max", &format!("{quota} {CPU_PERIOD}"))?;
    } else {
        missing("cpu", resources.cpus.is_some());
    }
    if let Some(folder) = cgroup.v1("pids") {
        let max = resources.pids.map_or(MaxValue::Max, |pids| MaxValue::Value(pids.try_into().unwrap_or(i64::MAX)));
        let controller = PidController::new(folder.clone(), folder, false);
        controller.set_pid_max(max).doing(|| "limit the number of processes".into())?;
    } else if let Some(folder) = offered("pids") {
        write(&folder, "pids.max", &resources.pids.map_or("max".to_owned(), |pids| pids.to_string()))?;
    } else {
        missing("pids", resources.pids.is_some());
    }
    Ok(warnings)
}

/// Asks v2 to hand the controllers that are wanted down to the group.
pub(super) fn offer(cgroup: &Cgroup, wanted: impl Fn(&str) -> bool) {
    let Some(mount) = &cgroup.hierarchies.unified else { return };
    let offered = fs::read_to_string(mount.join("cgroup.controllers")).unwrap_or_default();
    for controller in offered.split_whitespace().filter(|controller| wanted(controller)) {
        let mut above = mount.clone();
        for part in cgroup.path.components() {
            // Refused where processes sit in the upper group itself (a host inside a container): then it is missing
            // below and said so there.
            let _ = fs::write(above.join("cgroup.subtree_control"), format!("+{controller}"));
            above.push(part);
        }
    }
}

fn quota(cpus: f64) -> u64 {
    // The kernel refuses less than a millisecond.
    ((cpus * CPU_PERIOD as f64) as u64).max(1000)
}

/// As docker: as much swap again as memory, where swap is counted.
fn memory_v1(folder: &Path, bytes: Option<u64>) -> Result<()> {
    let bytes = bytes.map_or(-1, |bytes| i64::try_from(bytes).unwrap_or(i64::MAX));
    let both = if bytes == -1 { -1 } else { bytes.saturating_mul(2) };
    let controller = MemController::new(folder.to_owned(), folder.to_owned(), false);
    let swap_counted = folder.join("memory.memsw.limit_in_bytes").exists();
    // Memory may never be above memory and swap: raise from outside, lower from inside.
    let raise = swap_counted && controller.set_memswap_limit(both).is_ok();
    controller.set_limit(bytes).doing(|| "set the memory limit".into())?;
    if swap_counted && !raise {
        controller.set_memswap_limit(both).doing(|| "set the memory and swap limit".into())?;
    }
    Ok(())
}

fn memory_v2(folder: &Path, bytes: Option<u64>) -> Result<()> {
    let value = bytes.map_or("max".to_owned(), |bytes| bytes.to_string());
    write(folder, "memory.max", &value)?;
    if folder.join("memory.swap.max").exists() {
        write(folder, "memory.swap.max", &value)?;
    }
    Ok(())
}

fn write(folder: &Path, file: &str, value: &str) -> Result<()> {
    fs::write(folder.join(file), value).doing(|| format!("write {value} to {file}"))
}

pub fn stats(cgroup: &Cgroup) -> Stats {
    let mut stats = Stats::default();
    if let Some(folder) = cgroup.v1("memory") {
        let memory = MemController::new(folder.clone(), folder.clone(), false).memory_stat();
        let idle = field(&folder.join("memory.stat"), "total_inactive_file").unwrap_or(0);
        stats.memory = Some(memory.usage_in_bytes.saturating_sub(idle));
        stats.memory_limit = u64::try_from(memory.limit_in_bytes).ok().filter(|limit| *limit < UNLIMITED);
        stats.oom_kills = field(&folder.join("memory.oom_control"), "oom_kill");
    } else if let Some(folder) = cgroup.unified() {
        let idle = field(&folder.join("memory.stat"), "inactive_file").unwrap_or(0);
        stats.memory = number(&folder.join("memory.current")).map(|used| used.saturating_sub(idle));
        stats.memory_limit = number(&folder.join("memory.max"));
        stats.oom_kills = field(&folder.join("memory.events"), "oom_kill");
    }
    // Counted by every v2 group, with or without the controller.
    stats.cpu = cgroup.unified().and_then(|folder| field(&folder.join("cpu.stat"), "usage_usec"));
    if stats.cpu.is_none()
        && let Some(folder) = cgroup.v1("cpuacct")
    {
        stats.cpu = Some(CpuAcctController::new(folder.clone(), folder).cpuacct().usage / 1000);
    }
    let pids = cgroup.v1("pids").or_else(|| cgroup.unified());
    stats.pids = pids.and_then(|folder| number(&folder.join("pids.current")));
    if stats.pids.is_none() {
        stats.pids = cgroup.procs().ok().map(|pids| pids.len() as u64);
    }
    stats
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The value on the line `name VALUE`.
fn field(path: &Path, name: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fractions_of_a_cpu() {
        assert_eq!(quota(1.5), 150_000);
        assert_eq!(quota(0.000_001), 1000);
    }
}
