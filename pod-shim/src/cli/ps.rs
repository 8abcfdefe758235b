//! `pod ps`: the pods of this host.

use super::format::Format;
use super::{Context, Exit, options};
use crate::output::{self, Table};
use pod_runtime::cgroup::Cgroup;
use pod_runtime::monitor::client;
use pod_runtime::spec::{NetworkMode, Port, Spec};
use pod_runtime::status::{self, State, Status};
use pod_runtime::store::Pod;
use pod_runtime::{Result, when};
use serde_json::{Value, json};
use std::collections::BTreeMap;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pod ps -a
  pod ps --filter status=running --filter label=tier=web
  pod ps --format '{{.Name}} {{.Ip}}'
  pod ps --format name,ip,status

Filters: id, name (a part of it), status, label, network.")]
pub struct Args {
    /// Also pods that have ended or moved away
    #[arg(short, long)]
    all: bool,
    /// Ids only
    #[arg(short, long)]
    quiet: bool,
    /// Fields: '{{.Name}}' or name,ip,…
    #[arg(long)]
    format: Option<String>,
    /// Only pods that fit
    #[arg(short, long, value_name = "KEY=VALUE")]
    filter: Vec<String>,
    /// Do not shorten commands
    #[arg(long)]
    no_trunc: bool,
}

pub fn run(args: Args, context: &Context) -> Result<Exit> {
    let filters = options::filters(&args.filter, &["id", "name", "status", "label", "network"])?;
    let store = context.store()?;
    store.sweep()?;
    for job in pod_migrate::migrate::repair(&store)? {
        let (name, peer, id) = (job.name, job.peer, job.id);
        output::say(format!("note: whether {name} moved to {peer} is not known yet: pod job resume {id}"));
    }
    let mut rows = Vec::new();
    for pod in store.pods()? {
        // A pod may be removed while we look.
        let (Ok(spec), Ok(status)) = (pod.spec(), pod.status()) else { continue };
        let shown = args.all || status.state.is_live() || filters.contains_key("status");
        if shown && fits(&filters, &pod, &spec, &status) {
            rows.push(row(&pod, &spec, &status, args.no_trunc));
        }
    }
    if args.quiet {
        let ids: Vec<&str> = rows.iter().filter_map(|row| row["id"].as_str()).collect();
        output::data(&ids.iter().map(|id| format!("{id}\n")).collect::<String>())?;
    } else if context.json || args.format.as_deref() == Some("json") {
        output::json_list("pods", rows)?;
    } else if let Some(format) = &args.format {
        Format::parse(format)?.show(&rows)?;
    } else {
        table(&rows)?;
    }
    Ok(Exit::OK)
}

fn table(rows: &[Value]) -> Result<()> {
    let columns = ["name", "id", "status", "ip", "ports", "pids", "mem", "command"];
    let mut table = Table::new(&columns.map(|c| c.to_uppercase()).each_ref().map(String::as_str));
    for row in rows {
        table.row(columns.iter().map(|column| super::format::text(&row[*column])).collect());
    }
    table.show()
}

fn fits(filters: &BTreeMap<String, Vec<String>>, pod: &Pod, spec: &Spec, status: &Status) -> bool {
    filters.iter().all(|(key, values)| {
        values.iter().any(|value| match key.as_str() {
            "id" => pod.id().starts_with(value.as_str()),
            "name" => spec.name.contains(value.as_str()),
            "status" => status.state.to_string() == *value,
            "label" => match value.split_once('=') {
                Some((label, wanted)) => spec.labels.get(label).is_some_and(|found| found == wanted),
                None => spec.labels.contains_key(value),
            },
            _ => network(spec) == *value,
        })
    })
}

pub fn network(spec: &Spec) -> String {
    match &spec.network.mode {
        NetworkMode::Named(name) => name.clone(),
        NetworkMode::Bridge(link) => format!("bridge:{link}"),
        NetworkMode::None => "none".into(),
        NetworkMode::Host => "host".into(),
    }
}

/// Everything of a pod that a list shows.
pub fn row(pod: &Pod, spec: &Spec, status: &Status, whole: bool) -> Value {
    let live = matches!(status.state, State::Running | State::Paused | State::Migrating);
    let stats = live.then(|| Cgroup::open(pod.id()).and_then(|cgroup| cgroup.stats()).ok()).flatten();
    let command = spec.process.args.join(" ");
    let command = match command.char_indices().nth(30) {
        Some((end, _)) if !whole => format!("{}…", &command[..end]),
        _ => command,
    };
    // An ended pod has given its address and ports back.
    let held = status.state.is_live();
    let memory = stats.and_then(|stats| stats.memory);
    json!({
        "id": pod.id(),
        "name": spec.name,
        "state": status.state,
        "status": phrase(status),
        "ip": spec.network.addresses.iter().filter(|_| held).map(|a| a.ip.to_string()).next().unwrap_or_default(),
        "addresses": spec.network.addresses.iter().map(|a| format!("{}/{}", a.ip, a.prefix)).collect::<Vec<_>>(),
        "network": network(spec),
        "ports": spec.network.ports.iter().filter(|_| held).map(port).collect::<Vec<_>>(),
        "pids": stats.and_then(|stats| stats.pids),
        "memory": memory,
        "mem": memory.map(output::size),
        "command": command,
        "created": when::rfc3339_seconds(spec.created),
        "started": status.started.map(when::rfc3339_seconds),
        "finished": status.finished.map(when::rfc3339_seconds),
        "exit_code": status.exit_code,
        "moved_to": status.moved_to,
        "monitor_lost": status.monitor_lost,
        "exec_sessions": if live && !status.monitor_lost { client::sessions(pod) } else { Vec::new() },
        "labels": spec.labels,
    })
}

/// `8080->80/tcp`
pub fn port(port: &Port) -> String {
    let ip = match port.host_ip {
        Some(std::net::IpAddr::V6(ip)) => format!("[{ip}]:"),
        Some(ip) => format!("{ip}:"),
        None => String::new(),
    };
    format!("{ip}{}->{}/{}", port.host, port.pod, if port.udp { "udp" } else { "tcp" })
}

/// How the pod is doing, for people.
pub fn phrase(status: &Status) -> String {
    let since = |then: Option<u64>| then.map(|then| output::age(status::now().saturating_sub(then)));
    let up = || format!("up {}", since(status.started).unwrap_or_default());
    let ago = |then| since(then).map(|age| format!(" {age} ago")).unwrap_or_default();
    match status.state {
        State::Running if status.monitor_lost => "running (monitor lost)".into(),
        State::Paused if status.monitor_lost => "paused (monitor lost)".into(),
        State::Running => up(),
        State::Paused => format!("{} (paused)", up()),
        State::Migrating => format!("{} (migrating)", up()),
        State::Creating => "creating".into(),
        State::Exited => {
            let code = status.exit_code.map_or("?".into(), |code| code.to_string());
            let oom = if status.oom_killed { ", out of memory" } else { "" };
            format!("exited ({code}{oom}){}", ago(status.finished))
        }
        State::Moved => format!("moved → {}{}", status.moved_to.as_deref().unwrap_or("?"), ago(status.moved_at)),
        State::Dead => "dead".into(),
    }
}
