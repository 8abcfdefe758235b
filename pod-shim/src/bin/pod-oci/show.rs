//! What is printed: version, help, lists of containers and processes.

use crate::Context;
use crate::args::{Given, usage};
use pod_runtime::oci::{self, life};
use pod_runtime::problem::{Doing, Problem, Result};
use serde_json::json;
use std::fmt::Write as _;
use std::io::Write;
use std::process::Command;

/// In the lines that clients take apart.
pub fn version() {
    println!("pod-oci version {}\ncommit: pod\nspec: {}", env!("CARGO_PKG_VERSION"), oci::VERSION);
}

pub fn help() {
    println!(
        "pod-oci: an OCI runtime\n\n\
         usage: pod-oci [--root DIR] [--log FILE] [--log-format text|json] [--debug]\n\
         \x20      [--cgroup-manager cgroupfs|disabled] COMMAND ...\n\n\
         commands: create start state kill delete run exec ps list pause resume update events spec features\n\n\
         pod-oci COMMAND --help says more; pod-oci --version says which this is"
    );
}

pub fn help_of(verb: &str) {
    let usage = match verb {
        "create" => {
            "[--bundle DIR] [--console-socket PATH] [--pid-file PATH] [--preserve-fds N]\n\
             \x20      [--no-pivot] [--no-new-keyring] ID"
        }
        "run" => {
            "[--bundle DIR] [--console-socket PATH] [--pid-file PATH] [--preserve-fds N]\n\
             \x20      [--no-pivot] [--no-new-keyring] [--detach] [--keep] ID"
        }
        "exec" => {
            "[--process FILE] [--console-socket PATH] [--pid-file PATH] [--detach] [--tty] [--cwd DIR]\n\
             \x20      [--env K=V] [--user UID[:GID]] [--additional-gids GID] [--cap NAME] [--no-new-privs]\n\
             \x20      [--preserve-fds N] [--ignore-paused] ID COMMAND [ARG...]"
        }
        "kill" => "[--all] ID [SIGNAL]",
        "delete" => "[--force] ID",
        "list" => "[--format table|json] [--quiet]",
        "ps" => "[--format table|json] ID [PS-OPTION...]",
        "update" => "[--resources FILE|-] [--memory SIZE] [--cpu-quota N] [--pids-limit N] ... ID",
        "events" => "[--stats] [--interval 5s] ID",
        "spec" => "[--bundle DIR] [--rootless]",
        "features" => "",
        _ => "ID",
    };
    println!("usage: pod-oci {verb} {usage}");
}

pub fn list(context: &Context<'_>, given: &Given) -> Result<i32> {
    let [] = given.exactly("list")?;
    let mut shown = Vec::new();
    for container in context.containers.all()? {
        // One that is being removed this moment is no fault.
        let Ok(state) = container.state() else { continue };
        let status = container.status(&state)?;
        shown.push(container.shown(&state, status));
    }
    let mut text = String::new();
    match given.get("format").unwrap_or("table") {
        _ if given.has("quiet") => text = shown.iter().map(|one| format!("{}\n", one.id)).collect(),
        "json" => {
            let all = serde_json::to_string(&shown).doing(|| "show the containers".into())?;
            text = all + "\n";
        }
        "table" => {
            let width = shown.iter().map(|one| one.id.len()).chain([2]).max().unwrap_or(2);
            let _ = writeln!(
                text,
                "{:width$}  {:<8} {:<9} {:<40} {:<30} OWNER",
                "ID", "PID", "STATUS", "BUNDLE", "CREATED"
            );
            for one in &shown {
                let (status, bundle) = (one.status.word(), one.bundle.display().to_string());
                let _ = writeln!(
                    text,
                    "{:width$}  {:<8} {:<9} {:<40} {:<30} {}",
                    one.id, one.pid, status, bundle, one.created, one.owner
                );
            }
        }
        other => return Err(usage(format!("invalid format option: {other}"))),
    }
    std::io::stdout().write_all(text.as_bytes()).doing(|| "write the list".into())?;
    Ok(0)
}

pub fn processes(context: &Context<'_>, given: &Given) -> Result<i32> {
    let (id, options) = given.words.split_first().ok_or_else(|| usage("pod-oci: \"ps\" requires a container ID"))?;
    let pids = life::processes(&context.containers.get(id)?)?;
    match given.get("format").unwrap_or("table") {
        "json" => {
            writeln!(std::io::stdout(), "{}", json!(pids)).doing(|| "write the list".into())?;
            return Ok(0);
        }
        "table" => {}
        other => return Err(usage(format!("invalid format option: {other}"))),
    }
    let options = if options.is_empty() { vec!["-ef".to_owned()] } else { options.to_vec() };
    let output = Command::new("ps").args(&options).output().doing(|| "run ps".into())?;
    if !output.status.success() {
        return Err(Problem::new("E-SYSTEM", format!("ps: {}", String::from_utf8_lossy(&output.stderr).trim())));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let mut lines = text.lines();
    let head = lines.next().unwrap_or_default();
    let column = head.split_whitespace().position(|name| name == "PID");
    let column = column.ok_or_else(|| usage("couldn't find PID field in ps output"))?;
    let is_ours = |line: &&str| {
        let pid = line.split_whitespace().nth(column).and_then(|text| text.parse::<i32>().ok());
        pid.is_some_and(|pid| pids.contains(&pid))
    };
    let mut out = std::io::stdout().lock();
    for line in std::iter::once(head).chain(lines.filter(is_ours)) {
        writeln!(out, "{line}").doing(|| "write the list".into())?;
    }
    Ok(0)
}
