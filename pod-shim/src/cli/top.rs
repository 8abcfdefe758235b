//! `pod top`: the processes of a pod.

use super::{Context, Exit};
use crate::output::{self, Table};
use pod_runtime::cgroup::Cgroup;
use pod_runtime::{Result, lifecycle};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name or id of the pod
    pod: String,
}

pub fn run(args: Args, context: &Context) -> Result<Exit> {
    let pod = context.store()?.pod(&args.pod)?;
    lifecycle::init_of(&pod, &pod.status()?)?;
    let init = pod.status()?.init.map_or(0, |key| key.pid);
    let users = users(init);
    let mut rows: Vec<Value> =
        Cgroup::open(pod.id())?.procs()?.into_iter().filter_map(|pid| row(pid, &users)).collect();
    rows.sort_by_key(|row| row["pid"].as_i64());
    if context.json {
        output::json_list("processes", rows)?;
        return Ok(Exit::OK);
    }
    let mut table = Table::new(&["PID", "PPID", "USER", "STAT", "THREADS", "RSS", "TIME", "COMMAND"]);
    for row in rows {
        let text = |key: &str| super::format::text(&row[key]);
        let seconds = row["cpu_seconds"].as_f64().unwrap_or(0.0);
        let time = format!("{}:{:05.2}", seconds as u64 / 60, seconds % 60.0);
        let memory = output::size(row["rss"].as_u64().unwrap_or(0));
        table.row(vec![
            text("pid"),
            text("ppid"),
            text("user"),
            text("stat"),
            text("threads"),
            memory,
            time,
            text("command"),
        ]);
    }
    table.show()?;
    Ok(Exit::OK)
}

/// One process as the pod sees it. It may have ended meanwhile.
fn row(pid: i32, users: &BTreeMap<String, String>) -> Option<Value> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.map(|value| value.split_whitespace().map(str::to_owned).collect::<Vec<_>>()).unwrap_or_default()
    };
    let first = |name: &str| field(name).into_iter().next().unwrap_or_default();
    let uid = field("Uid").into_iter().nth(1).unwrap_or_default();
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let rest: Vec<&str> = stat[stat.rfind(')')? + 1..].split_whitespace().collect();
    let ticks: f64 = rest.get(11..13)?.iter().filter_map(|t| t.parse::<f64>().ok()).sum();
    let parent = inner_pid(rest.get(1)?.parse().ok()?);
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let command = String::from_utf8_lossy(&arguments).trim_end_matches('\0').replace('\0', " ");
    Some(json!({
        "pid": inner_pid(pid)?,
        "ppid": parent.unwrap_or(0),
        "host_pid": pid,
        "user": users.get(&uid).cloned().unwrap_or(uid),
        "stat": rest.first()?,
        "threads": first("Threads").parse::<u64>().unwrap_or(0),
        "rss": first("VmRSS").parse::<u64>().unwrap_or(0) << 10,
        "cpu_seconds": ticks / 100.0,
        "command": if command.is_empty() { format!("[{}]", first("Name")) } else { command },
    }))
}

/// The pid in the innermost namespace; of a process outside of any pod there is none.
fn inner_pid(pid: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    let all: Vec<i32> = line.split_whitespace().filter_map(|n| n.parse().ok()).collect();
    let depth = fs::read_to_string("/proc/self/status").ok()?;
    let mine = depth.lines().find_map(|line| line.strip_prefix("NSpid:"))?.split_whitespace().count();
    // Nested pods: the numbers are from our own namespace inwards.
    all.get(all.len().min(mine.max(1) + 1) - 1).copied().filter(|_| all.len() > mine)
}

/// Names of the pod's own passwd file by number.
fn users(init: i32) -> BTreeMap<String, String> {
    let root = std::path::PathBuf::from(format!("/proc/{init}/root"));
    let text = pod_runtime::copy::read_inside(&root, "etc/passwd").unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            Some((fields.nth(1)?.to_owned(), name.to_owned()))
        })
        .collect()
}
