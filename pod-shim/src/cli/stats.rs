//! `pod stats`: what pods use.

use super::{Context, Exit};
use crate::output::{self, Table};
use pod_runtime::cgroup::{Cgroup, Stats};
use pod_runtime::status::State;
use pod_runtime::store::{Pod, Store};
use pod_runtime::{Result, lifecycle};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::io::IsTerminal;
use std::thread::sleep;
use std::time::{Duration, Instant};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Once, and not again every second
    #[arg(long)]
    no_stream: bool,
    /// Names or ids [default: all that run]
    #[arg(value_name = "POD")]
    pods: Vec<String>,
}

struct Sample {
    at: Instant,
    name: String,
    stats: Stats,
    received: u64,
    sent: u64,
}

pub fn run(args: Args, context: &Context) -> Result<Exit> {
    let store = context.store()?;
    for name in &args.pods {
        let pod = store.pod(name)?;
        lifecycle::init_of(&pod, &pod.status()?)?;
    }
    let mut before = samples(&store, &args.pods);
    // CPU use is what happens between two looks.
    sleep(Duration::from_millis(500));
    loop {
        let now = samples(&store, &args.pods);
        let rows: Vec<Value> = now.iter().map(|(id, sample)| row(id, sample, before.get(id))).collect();
        if context.json {
            output::json_list("stats", rows)?;
        } else {
            if !args.no_stream && std::io::stdout().is_terminal() {
                output::data("\x1b[H\x1b[J")?;
            }
            table(&rows)?;
        }
        if args.no_stream || unread() {
            return Ok(Exit::OK);
        }
        before = now;
        sleep(Duration::from_secs(1));
    }
}

/// Whether stdout's reader went away.
fn unread() -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;
    let stdout = std::io::stdout();
    let mut fds = [PollFd::new(stdout.as_fd(), PollFlags::empty())];
    let _ = poll(&mut fds, PollTimeout::ZERO);
    fds[0].revents().is_some_and(|flags| flags.contains(PollFlags::POLLERR))
}

fn samples(store: &Store, wanted: &[String]) -> BTreeMap<String, Sample> {
    let pods: Vec<Pod> = if wanted.is_empty() {
        store.pods().unwrap_or_default()
    } else {
        wanted.iter().filter_map(|name| store.pod(name).ok()).collect()
    };
    pods.into_iter().filter_map(|pod| Some((pod.id().to_owned(), sample(&pod)?))).collect()
}

fn sample(pod: &Pod) -> Option<Sample> {
    let status = pod.status().ok()?;
    if !matches!(status.state, State::Running | State::Paused | State::Migrating) {
        return None;
    }
    let stats = Cgroup::open(pod.id()).and_then(|cgroup| cgroup.stats()).ok()?;
    let (received, sent) = traffic(status.init?.pid);
    Some(Sample { at: Instant::now(), name: pod.name().ok()?, stats, received, sent })
}

/// Bytes over the pod's own cable so far.
fn traffic(init: i32) -> (u64, u64) {
    let text = fs::read_to_string(format!("/proc/{init}/net/dev")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.trim_start().strip_prefix("eth0:"));
    let numbers: Vec<u64> = line.unwrap_or_default().split_whitespace().filter_map(|n| n.parse().ok()).collect();
    (numbers.first().copied().unwrap_or(0), numbers.get(8).copied().unwrap_or(0))
}

fn row(id: &str, now: &Sample, before: Option<&Sample>) -> Value {
    let cpu = before.and_then(|before| {
        let used = now.stats.cpu?.saturating_sub(before.stats.cpu?) as f64;
        Some((used / (now.at - before.at).as_micros().max(1) as f64 * 10_000.0).round() / 100.0)
    });
    json!({
        "id": id,
        "name": now.name,
        "cpu_percent": cpu,
        "memory": now.stats.memory,
        "memory_limit": now.stats.memory_limit,
        "pids": now.stats.pids,
        "net_received": now.received,
        "net_sent": now.sent,
    })
}

fn table(rows: &[Value]) -> Result<()> {
    let mut table = Table::new(&["NAME", "CPU %", "MEM / LIMIT", "PIDS", "NET IN / OUT"]);
    let bytes = |value: &Value| value.as_u64().map_or("-".to_owned(), output::size);
    for row in rows {
        table.row(vec![
            super::format::text(&row["name"]),
            row["cpu_percent"].as_f64().map_or("-".into(), |percent| format!("{percent:.2}")),
            format!("{} / {}", bytes(&row["memory"]), bytes(&row["memory_limit"])),
            super::format::text(&row["pids"]),
            format!("{} / {}", bytes(&row["net_received"]), bytes(&row["net_sent"])),
        ]);
    }
    table.show()
}
