//! `pod checkpoint diff`: what is different between two checkpoints.

use super::{Keys, file, with_version};
use crate::cli::{Context, Exit};
use crate::output::{self, Table, plain, size};
use pod_migrate::checkpoint::{self, Differences, Socket};
use pod_runtime::Result;
use serde_json::json;

const PAGE: u64 = 4096;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  pod checkpoint diff web-1 web-2\n  pod checkpoint diff web-1 ./web.pod")]
pub struct Args {
    /// The earlier one: its name, or a file by its path
    before: String,
    /// The later one
    after: String,
    #[command(flatten)]
    keys: Keys,
}

pub fn run(args: Args, context: &Context) -> Result<Exit> {
    let found = checkpoint::diff(&file(&args.before, context)?, &file(&args.after, context)?, &args.keys.read()?)?;
    if context.json {
        output::json(&with_version(json!(found)))?;
    } else {
        output::data(&description(&found))?;
    }
    Ok(Exit::OK)
}

fn description(of: &Differences) -> String {
    let (before, after) = (&of.before, &of.after);
    let mut text = String::new();
    if before.id != after.id {
        let (before, after) = (plain(&before.pod), plain(&after.pod));
        text.push_str(&format!("note: these are different pods, {before} and {after}\n"));
    }
    let between = after.written.abs_diff(before.written);
    let which = if after.written >= before.written { "later" } else { "earlier" };
    let (from, to) = (size(before.bytes), size(after.bytes));
    text.push_str(&format!("size      {from} -> {to}, saved {} {which}\n", output::age(between)));
    text.push_str(&processes(of));
    text.push_str(&memory(of));
    text.push_str(&descriptors(of));
    text.push_str(&sockets(of));
    text.push_str(&files(of));
    let mut table = Table::new(&["RECORDS", "BEFORE", "AFTER"]);
    for (kind, (was, is)) in &of.records {
        table.row(vec![kind.clone(), size(was.bytes), size(is.bytes)]);
    }
    if !of.records.is_empty() {
        text.push_str(&format!("\nsize by kind\n{}", table.indented()));
    }
    text
}

fn processes(of: &Differences) -> String {
    let mut table = Table::new(&["", "PID", "WHAT"]);
    for one in &of.processes_come {
        table.row(vec!["+".into(), one.pid.to_string(), plain(&one.command)]);
    }
    for one in &of.processes_gone {
        table.row(vec!["-".into(), one.pid.to_string(), plain(&one.command)]);
    }
    for one in &of.processes_changed {
        for (what, (was, is)) in &one.what {
            let (what, was, is) = match *what {
                "mapped_bytes" => ("mapped", number(was), number(is)),
                what => (what, plain(was), plain(is)),
            };
            table.row(vec!["~".into(), one.pid.to_string(), format!("{what}: {was} -> {is}")]);
        }
    }
    let any = of.processes_come.len() + of.processes_gone.len() + of.processes_changed.len();
    section("processes", any, &table)
}

fn number(text: &str) -> String {
    text.parse().map_or_else(|_| plain(text), size)
}

fn memory(of: &Differences) -> String {
    let mut table = Table::new(&["PID", "ADDED", "REMOVED", "CHANGED", "SAME", "COMMAND"]);
    let pages = |count: u64| size(count * PAGE);
    for one in &of.memory {
        let n = one.pages;
        let counts = [n.added, n.removed, n.changed, n.same].map(pages);
        table.row([vec![one.pid.to_string()], counts.to_vec(), vec![plain(&one.command)]].concat());
    }
    for one in &of.shared_memory {
        let n = one.pages;
        let counts = [n.added, n.removed, n.changed, n.same].map(pages);
        table.row([vec!["-".into()], counts.to_vec(), vec![format!("shared memory {}", one.id)]].concat());
    }
    section("memory", of.memory.len() + of.shared_memory.len(), &table)
}

fn descriptors(of: &Differences) -> String {
    let mut table = Table::new(&["", "PID", "FD", "KIND", "NAME"]);
    for process in &of.descriptors {
        let opened = process.opened.iter().map(|fd| ("+", fd));
        for (sign, fd) in opened.chain(process.closed.iter().map(|fd| ("-", fd))) {
            let name = plain(&fd.name);
            table.row(vec![sign.into(), process.pid.to_string(), fd.fd.to_string(), fd.kind.into(), name]);
        }
    }
    section("descriptors", of.descriptors.len(), &table)
}

fn sockets(of: &Differences) -> String {
    let mut table = Table::new(&["", "PROTOCOL", "LOCAL", "PEER", "STATE"]);
    let mut row = |sign: &str, one: &Socket, state: String| {
        let text = |text: &str| if text.is_empty() { "-".into() } else { plain(text) };
        table.row(vec![sign.into(), one.protocol.into(), text(&one.local), text(&one.peer), state]);
    };
    of.sockets_come.iter().for_each(|one| row("+", one, one.state.into()));
    of.sockets_gone.iter().for_each(|one| row("-", one, one.state.into()));
    for (was, is) in &of.sockets_changed {
        let queued = |one: &Socket| format!("{} {}/{}", one.state, one.unread_bytes, one.unsent_bytes);
        row("~", is, format!("{} -> {}", queued(was), queued(is)));
    }
    section("sockets", of.sockets_come.len() + of.sockets_gone.len() + of.sockets_changed.len(), &table)
}

fn files(of: &Differences) -> String {
    let mut table = Table::new(&["", "BEFORE", "AFTER", "PATH"]);
    for one in &of.files {
        let sign = match one.change {
            "added" => "+",
            "removed" => "-",
            "attributes" => "a",
            _ => "~",
        };
        let path = format!("{}: {}", plain(&one.layer), plain(&one.path));
        table.row(vec![sign.into(), size(one.bytes_before), size(one.bytes), path]);
    }
    section("files", of.files.len(), &table)
}

fn section(name: &str, any: usize, table: &Table) -> String {
    if any == 0 { format!("\n{name}: no difference\n") } else { format!("\n{name}\n{}", table.indented()) }
}
