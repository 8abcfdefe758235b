//! `pod checkpoint inspect`: what a checkpoint holds.

use super::{Keys, file, with_version};
use crate::cli::{Context, Exit};
use crate::output::{self, Table, plain, size};
use pod_migrate::checkpoint::{self, Inspected, Process};
use pod_runtime::Result;
use pod_runtime::spec::{Base, NetworkMode, Spec};
use pod_runtime::status::now;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Processes that are deeper in the tree are shown no further to the right: an image may have one below each other.
const DEEPEST: usize = 40;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  pod checkpoint inspect web-1\n  pod checkpoint inspect ./web.pod --fds --files\n  \
                        pod --json checkpoint inspect web-1 | jq '.sockets'"
)]
pub struct Args {
    /// Its name, or a file by its path
    #[arg(required_unless_present = "import")]
    name: Option<String>,
    /// A file instead
    #[arg(short = 'i', long, value_name = "FILE", conflicts_with = "name")]
    import: Option<PathBuf>,
    #[command(flatten)]
    keys: Keys,
    /// Show the values of environment variables, not their names only
    #[arg(long)]
    show_env: bool,
    /// List every descriptor of every process
    #[arg(long)]
    fds: bool,
    /// List every file that the checkpoint holds
    #[arg(long)]
    files: bool,
}

pub fn run(args: Args, context: &Context) -> Result<Exit> {
    let path = match (args.import, args.name) {
        (Some(path), _) => path,
        (None, name) => file(&name.unwrap_or_default(), context)?,
    };
    let inspected = checkpoint::inspect(&path, &args.keys.read()?, args.show_env)?;
    if context.json {
        output::json(&with_version(json!(inspected)))?;
        return Ok(Exit::OK);
    }
    let mut text = head(&inspected, args.show_env);
    text.push_str(&processes(&inspected));
    text.push_str(&memory(&inspected));
    text.push_str(&sockets(&inspected));
    text.push_str(&open(&inspected, args.fds));
    text.push_str(&mounts(&inspected));
    text.push_str(&layers(&inspected, args.files));
    text.push_str(&records(&inspected));
    output::data(&text)?;
    Ok(Exit::OK)
}

fn head(of: &Inspected, values: bool) -> String {
    let spec = &of.spec;
    let mut text = format!(
        "{}: whole, {}\n\nsaved     {} ago on {} by pod {}\npod       {} ({}), hostname {}\ncommand   {}\nroot      {}\n\
         network   {}\n",
        of.path.display(),
        size(of.bytes),
        output::age(now().saturating_sub(of.written)),
        plain(&of.host),
        plain(&of.version),
        plain(&of.pod),
        of.id,
        plain(&spec.hostname),
        plain(&of.command.join(" ")),
        root(spec),
        network(of),
    );
    if let Some((host, domain)) = &of.names {
        text.push_str(&format!("names     {} {}, set inside\n", plain(host), plain(domain)));
    }
    let limits = limits(spec);
    if !limits.is_empty() {
        text.push_str(&format!("limits    {limits}\n"));
    }
    let names = |env: &[String], between| plain(&env.join(between));
    match values {
        true => of.environment.iter().for_each(|line| text.push_str(&format!("env       {}\n", plain(line)))),
        false if of.environment.is_empty() => {}
        false => text.push_str(&format!("env       {} (values: --show-env)\n", names(&of.environment, " "))),
    }
    for session in &of.sessions {
        let command = plain(&session.command.join(" "));
        text.push_str(&format!("exec      {}: pid {} {command}\n", session.id, session.pid));
    }
    if of.exposed {
        text.push_str("warning   others can read this file, and it holds the programs' memory: chmod 600\n");
    }
    text
}

fn root(spec: &Spec) -> String {
    let base = match &spec.root.base {
        Base::Host => "the host's own".to_owned(),
        Base::Directory(path) => plain(&path.to_string_lossy()),
    };
    if spec.root.read_only { format!("{base}, read-only") } else { base }
}

fn network(of: &Inspected) -> String {
    let network = &of.spec.network;
    let mut parts = vec![match &network.mode {
        NetworkMode::Named(name) => plain(name),
        NetworkMode::Bridge(name) => format!("bridge {}", plain(name)),
        NetworkMode::None => "none".into(),
        NetworkMode::Host => "the host's own".into(),
    }];
    parts.extend(network.addresses.iter().map(|address| format!("{}/{}", address.ip, address.prefix)));
    parts.extend(network.mac.iter().map(|mac| plain(mac)));
    parts.extend(network.ports.iter().map(|port| {
        let protocol = if port.udp { "udp" } else { "tcp" };
        format!("port {} -> {}/{protocol}", port.host, port.pod)
    }));
    if let Some(made) = of.network.filter(|made| made.addresses + made.routes + made.rules > 0) {
        parts.push(format!("{} addresses, {} routes, {} rules inside", made.addresses, made.routes, made.rules));
    }
    parts.join(", ")
}

fn limits(spec: &Spec) -> String {
    let limits = &spec.resources;
    let memory = limits.memory.map(|bytes| format!("memory {}", size(bytes)));
    let cpus = limits.cpus.map(|cpus| format!("cpus {cpus}"));
    let pids = limits.pids.map(|pids| format!("pids {pids}"));
    [memory, cpus, pids].into_iter().flatten().collect::<Vec<_>>().join(", ")
}

fn processes(of: &Inspected) -> String {
    let threads: usize = of.processes.iter().map(|process| process.threads).sum();
    let mut table = Table::new(&["PID", "USER", "THREADS", "FDS", "MAPPED", "SAVED", "COMMAND"]);
    for (depth, process) in tree(&of.processes) {
        let state = if process.state == "running" { String::new() } else { format!(" ({})", process.state) };
        table.row(vec![
            process.pid.to_string(),
            process.uid.to_string(),
            process.threads.to_string(),
            process.descriptors.len().to_string(),
            size(process.mapped_bytes),
            size(process.stored_bytes),
            format!("{}{}{state}", "  ".repeat(depth.min(DEEPEST)), plain(&process.line())),
        ]);
    }
    format!("\nprocesses {}, threads {threads}\n{}", of.processes.len(), table.indented())
}

/// Children below their parents, each with how deep it is. An image may say anything: who is nobody's descendant comes
/// at the end.
fn tree(all: &[Process]) -> Vec<(usize, &Process)> {
    let mut children: BTreeMap<i32, Vec<&Process>> = BTreeMap::new();
    all.iter().for_each(|process| children.entry(process.parent).or_default().push(process));
    let mut found = Vec::new();
    let mut left: Vec<(usize, &Process)> = Vec::new();
    let mut begin = children.remove(&0).unwrap_or_default();
    loop {
        left.extend(begin.iter().rev().map(|process| (0, *process)));
        while let Some((depth, process)) = left.pop() {
            found.push((depth, process));
            let below = children.remove(&process.pid).unwrap_or_default();
            left.extend(below.into_iter().rev().map(|child| (depth + 1, child)));
        }
        match children.pop_first() {
            Some((_, rest)) => begin = rest,
            None => return found,
        }
    }
}

fn memory(of: &Inspected) -> String {
    let mut table = Table::new(&["KIND", "MAPS", "MAPPED", "SAVED"]);
    for (kind, maps) in &of.memory {
        table.row(vec![kind.replace('_', " "), maps.maps.to_string(), size(maps.bytes), size(maps.stored_bytes)]);
    }
    for shared in &of.shared_memory {
        let kind = format!("shared memory {} ({})", shared.id, shared.kind);
        table.row(vec![kind, String::new(), size(shared.bytes), size(shared.stored_bytes)]);
    }
    format!("\nmemory {}\n{}", size(of.memory_bytes), table.indented())
}

fn sockets(of: &Inspected) -> String {
    if of.sockets.is_empty() {
        return String::new();
    }
    let mut table = Table::new(&["PROTOCOL", "STATE", "LOCAL", "PEER", "UNREAD", "UNSENT", "PID/FD"]);
    let bytes = |count: u64| if count == 0 { "-".into() } else { size(count) };
    let text = |text: &str| if text.is_empty() { "-".into() } else { plain(text) };
    for socket in &of.sockets {
        table.row(vec![
            socket.protocol.into(),
            text(socket.state),
            text(&socket.local),
            text(&socket.peer),
            bytes(socket.unread_bytes),
            bytes(socket.unsent_bytes),
            text(&socket.held_by.join(" ")),
        ]);
    }
    format!("\nsockets {}\n{}", of.sockets.len(), table.indented())
}

fn open(of: &Inspected, all: bool) -> String {
    let kinds: Vec<String> = of.open_files.iter().map(|(kind, n)| format!("{n} {kind}")).collect();
    let hint = if all { "" } else { " (each: --fds)" };
    let mut text = format!("\nopen      {}{hint}\n", kinds.join(", "));
    if all {
        let mut table = Table::new(&["PID", "FD", "KIND", "ACCESS", "POSITION", "NAME"]);
        for (process, fd) in of.processes.iter().flat_map(|p| p.descriptors.iter().map(move |fd| (p, fd))) {
            table.row(vec![
                process.pid.to_string(),
                fd.fd.to_string(),
                fd.kind.into(),
                fd.access.into(),
                fd.position.to_string(),
                plain(&fd.name),
            ]);
        }
        text.push_str(&table.indented());
    }
    text
}

fn mounts(of: &Inspected) -> String {
    let mut text = String::new();
    for volume in &of.spec.volumes {
        let how = match (volume.shared, volume.read_only) {
            (true, _) => "shared",
            (_, true) => "read-only",
            _ => "travels",
        };
        let (to, from) = (volume.destination.to_string_lossy(), volume.source.to_string_lossy());
        text.push_str(&format!("volume    {} from {} ({how})\n", plain(&to), plain(&from)));
    }
    for mount in &of.mounts {
        let from = mount.from.as_ref().map_or_else(String::new, |from| format!(" of {}", plain(from)));
        text.push_str(&format!("mount     {} {}{from}, made inside\n", mount.kind, plain(&mount.at)));
    }
    text
}

fn layers(of: &Inspected, all: bool) -> String {
    let mut text = String::new();
    for layer in of.layers.iter().filter(|layer| layer.files > 0) {
        let hint = if all { "" } else { " (each: --files)" };
        let name = plain(&layer.name);
        text.push_str(&format!("files     {name}: {}, {}{hint}\n", layer.files, size(layer.bytes)));
        if all {
            let mut table = Table::new(&["KIND", "SAVED", "PATH"]);
            layer.entries.iter().for_each(|e| table.row(vec![e.kind.into(), size(e.bytes), plain(&e.path)]));
            text.push_str(&table.indented());
        }
    }
    text
}

fn records(of: &Inspected) -> String {
    let mut table = Table::new(&["RECORDS", "NUMBER", "SIZE"]);
    let mut all: Vec<_> = of.records.iter().collect();
    all.sort_by_key(|(_, one)| std::cmp::Reverse(one.bytes));
    for (kind, one) in all {
        table.row(vec![kind.clone(), one.records.to_string(), size(one.bytes)]);
    }
    format!("\nsize {}\n{}", size(of.bytes), table.indented())
}
