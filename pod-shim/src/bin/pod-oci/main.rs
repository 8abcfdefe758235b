//! `pod-oci`: an OCI runtime, called as runc is: by podman (conmon), Docker and containerd, or by hand.
//!
//! It reads the command line ([`args`]), makes one call into `pod_runtime::oci` ([`verbs`]), and says what went wrong in
//! the log that the caller named ([`log`]). Exit codes: 0; 1 for a failure, 255 for one of `exec`; that of the program for
//! `run` and `exec` in the foreground. The process stays single-threaded: containers are cloned out of it.
#![deny(unsafe_code)]

mod args;
mod exec;
mod foreground;
mod log;
mod show;
mod update;
mod verbs;

use args::{Given, Known, Until, switch, usage, value};
use log::Log;
use pod_runtime::Result;
use pod_runtime::oci::{self, Containers};
use pod_runtime::sys::daemon;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const GLOBAL: [Known; 10] = [
    value("root"),
    value("log"),
    value("log-format"),
    value("cgroup-manager"),
    value("rootless"),
    value("criu"),
    switch("systemd-cgroup"),
    switch("debug"),
    switch("version").or('v'),
    switch("help").or('h'),
];

/// What holds for every verb.
pub struct Context<'a> {
    pub containers: Containers,
    pub log: &'a Log,
    pub no_cgroups: bool,
}

fn main() -> ExitCode {
    daemon::expect_children();
    let all: Vec<String> = std::env::args_os().skip(1).map(|arg| arg.to_string_lossy().into_owned()).collect();
    let at = position_of_verb(&all).unwrap_or(all.len());
    let mut log = Log::default();
    let done = Given::parse(&all[..at], &GLOBAL, Until::End).and_then(|given| run(&given, &all[at..], &mut log));
    match done {
        Ok(code) => ExitCode::from(code.clamp(0, 255) as u8),
        Err(problem) => {
            log.error(&match problem.way_out() {
                Some(way) => format!("{} ({way})", problem.chain()),
                None => problem.chain(),
            });
            ExitCode::from(if all.get(at).is_some_and(|verb| verb == "exec") { 255 } else { 1 })
        }
    }
}

/// The first word that is neither an option nor the value of one.
fn position_of_verb(all: &[String]) -> Option<usize> {
    let mut at = 0;
    while let Some(arg) = all.get(at) {
        let Some(text) = arg.strip_prefix('-') else { return Some(at) };
        let text = text.strip_prefix('-').unwrap_or(text);
        let takes = GLOBAL.iter().any(|option| option.takes_value && option.name == text);
        at += if takes { 2 } else { 1 };
    }
    None
}

fn run(given: &Given, rest: &[String], log: &mut Log) -> Result<i32> {
    log.file = given.get("log").filter(|path| !path.is_empty()).map(PathBuf::from);
    log.debug = given.has("debug");
    log.json = match given.get("log-format").unwrap_or("text") {
        "json" => true,
        "text" | "" => false,
        other => return Err(usage(format!("invalid log-format: {other}"))),
    };
    if given.has("version") {
        show::version();
        return Ok(0);
    }
    let Some((verb, args)) = rest.split_first().filter(|(verb, _)| !given.has("help") && *verb != "help") else {
        show::help();
        return Ok(0);
    };
    let no_cgroups = without_cgroups(given)?;
    let root = given.get("root").filter(|root| !root.is_empty()).map_or_else(Containers::usual_root, PathBuf::from);
    log.debug(&format!("{verb} of a container below {}", root.display()));
    verbs::run(&Context { containers: Containers::at(&root)?, log, no_cgroups }, verb, args)
}

fn without_cgroups(given: &Given) -> Result<bool> {
    if given.has("systemd-cgroup") || given.get("cgroup-manager") == Some("systemd") {
        return Err(oci::unsupported(match Path::new("/run/systemd/system").is_dir() {
            true => "--systemd-cgroup is not supported yet: cgroups are made in the file system",
            false => "systemd cgroup flag passed, but systemd support for managing cgroups is not available",
        }));
    }
    match given.get("cgroup-manager") {
        None | Some("cgroupfs") => Ok(false),
        Some("disabled") => Ok(true),
        Some(other) => Err(usage(format!("invalid cgroup-manager: {other}"))),
    }
}
