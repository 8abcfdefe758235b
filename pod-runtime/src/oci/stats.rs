//! What a container uses, in the form in which `events --stats` has always printed it.

use super::store::Container;
use crate::cgroup::Cgroup;
use crate::problem::{Problem, Result};
use serde_json::{Map, Value, json};
use std::fs;
use std::path::Path;

/// One line: `{"type": "stats", "id": …, "data": …}`.
pub fn of(container: &Container) -> Result<Value> {
    let state = container.state()?;
    let Some(cgroup) = container.cgroup(&state)?.filter(Cgroup::exists) else {
        return Err(Problem::new("E-OCI-STATE", "container not running: it has no cgroups"));
    };
    let data =
        json!({"cpu": cpu(&cgroup), "memory": memory(&cgroup), "pids": pids(&cgroup), "blkio": {}, "hugetlb": {}});
    Ok(json!({"type": "stats", "id": container.id(), "data": data}))
}

fn number(path: &Path) -> u64 {
    fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

/// The lines `NAME NUMBER` of a file.
fn table(path: &Path) -> Map<String, Value> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let line = |line: &str| {
        let (name, value) = line.split_once(' ')?;
        Some((name.to_owned(), json!(value.trim().parse::<u64>().ok()?)))
    };
    text.lines().filter_map(line).collect()
}

fn cpu(cgroup: &Cgroup) -> Value {
    let field = |table: &Map<String, Value>, name: &str| table.get(name).and_then(Value::as_u64).unwrap_or(0);
    let throttling = |table: &Map<String, Value>, time: u64| json!({"periods": field(table, "nr_periods"), "throttledPeriods": field(table, "nr_throttled"), "throttledTime": time});
    if let Some(folder) = cgroup.v1_folder("cpuacct") {
        let per_cpu: Vec<u64> = fs::read_to_string(folder.join("cpuacct.usage_percpu"))
            .unwrap_or_default()
            .split_whitespace()
            .filter_map(|text| text.parse().ok())
            .collect();
        let limits = cgroup.v1_folder("cpu").map(|folder| table(&folder.join("cpu.stat"))).unwrap_or_default();
        return json!({
            "usage": {
                "total": number(&folder.join("cpuacct.usage")),
                "percpu": per_cpu,
                "kernel": number(&folder.join("cpuacct.usage_sys")),
                "user": number(&folder.join("cpuacct.usage_user")),
            },
            "throttling": throttling(&limits, field(&limits, "throttled_time")),
        });
    }
    let table = cgroup.unified().map(|folder| table(&folder.join("cpu.stat"))).unwrap_or_default();
    json!({
        "usage": {
            "total": field(&table, "usage_usec") * 1000,
            "kernel": field(&table, "system_usec") * 1000,
            "user": field(&table, "user_usec") * 1000,
        },
        "throttling": throttling(&table, field(&table, "throttled_usec") * 1000),
    })
}

fn memory(cgroup: &Cgroup) -> Value {
    if let Some(folder) = cgroup.v1_folder("memory") {
        let entry = |name: &str| {
            let file = |rest: &str| number(&folder.join(format!("memory.{name}{rest}")));
            json!({"limit": file("limit_in_bytes"), "usage": file("usage_in_bytes"),
                   "max": file("max_usage_in_bytes"), "failcnt": file("failcnt")})
        };
        let raw = table(&folder.join("memory.stat"));
        let cache = raw.get("cache").cloned().unwrap_or(json!(0));
        return json!({"cache": cache, "usage": entry(""), "swap": entry("memsw."), "kernel": entry("kmem."),
            "kernelTCP": entry("kmem.tcp."), "raw": raw});
    }
    let Some(folder) = cgroup.unified() else { return json!({}) };
    let limit = fs::read_to_string(folder.join("memory.max")).ok().and_then(|text| text.trim().parse::<u64>().ok());
    let raw = table(&folder.join("memory.stat"));
    let cache = raw.get("file").cloned().unwrap_or(json!(0));
    json!({"cache": cache, "raw": raw,
        "usage": {"limit": limit.unwrap_or(u64::MAX), "usage": number(&folder.join("memory.current")),
                  "max": number(&folder.join("memory.peak")), "failcnt": 0}})
}

fn pids(cgroup: &Cgroup) -> Value {
    let folder = cgroup.v1_folder("pids").or_else(|| cgroup.unified()).unwrap_or_default();
    let current = match folder.join("pids.current").exists() {
        true => number(&folder.join("pids.current")),
        false => cgroup.procs().map_or(0, |pids| pids.len() as u64),
    };
    json!({"current": current, "limit": number(&folder.join("pids.max"))})
}
