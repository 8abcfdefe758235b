//! Benchmarks: one command and one table each, medians of at least five runs, beside limits of this machine that are
//! measured in the same run. `integration/bench` builds what they need, makes the hosts and calls this on the first.
//!
//!   bench run | sleep | memory | disk | tool | mixed | processes | threads | maps | files | connections | redis | lazy | overhead | all
//!   bench migrate [WORKLOAD…]     moves under load, as their clients see them; makes hosts itself

mod echo;
mod lazy;
mod life;
mod memory;
mod migrate;
mod moving;
mod overhead;
mod plot;
mod report;
mod subjects;
mod table;

use crate::life::Subject;
use crate::report::Report;
use anyhow::{Context, Result, bail};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const ALL: [&str; 14] = [
    "run",
    "sleep",
    "memory",
    "disk",
    "tool",
    "mixed",
    "processes",
    "threads",
    "maps",
    "files",
    "connections",
    "redis",
    "lazy",
    "overhead",
];

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    if let Err(error) = run(&args) {
        eprintln!("bench: {error:#}");
        std::process::exit(1);
    }
}

fn run(args: &[&str]) -> Result<()> {
    if let [subject, rest @ ..] = args
        && subject.starts_with("__")
    {
        return subjects::become_one(subject, rest);
    }
    if let ["migrate", rest @ ..] = args {
        return migrate::run(rest);
    }
    let chosen = if args.is_empty() || args == ["all"] { &ALL[..] } else { args };
    let mut report = Report::default();
    let us = us()?;
    let many = |report: &mut Report, what: &str, count: u32, subject: &str, each: f64| {
        let program = [us.as_str(), subject, &count.to_string()];
        life::many(report, count, &Subject { what, program: &program, runs: 5 }, each)
    };
    for what in chosen {
        let report = &mut report;
        match *what {
            "run" => life::start(report)?,
            "sleep" => {
                let subject = Subject { what: "a sleep", program: &["sleep", "1000000"], runs: 11 };
                let costs = life::saved(report, &subject)?;
                report.aim("a sleep: checkpoint", 10.0, "ms", costs.create);
                report.aim("a sleep: restore", 10.0, "ms", costs.restore);
            }
            "processes" => many(report, "100 processes", 100, "__processes", 200.0)?,
            "threads" => many(report, "1 process with 1000 threads", 1000, "__threads", 25.0)?,
            "maps" => many(report, "10000 maps", 10_000, "__maps", 1.0)?,
            "files" => many(report, "10000 descriptors", 10_000, "__files", 5.0)?,
            "connections" => many(report, "10000 ends of TCP connections", 10_000, "__connections", 60.0)?,
            "memory" => memory::saved(report)?,
            "disk" => memory::on_disk(report)?,
            "tool" => memory::of_the_tool(report)?,
            "mixed" => memory::mixed(report)?,
            "redis" => moving::redis(report)?,
            "lazy" => lazy::lazily(report)?,
            "overhead" => overhead::all(report)?,
            other => bail!("no benchmark {other:?}; there are {}", ALL.join(", ")),
        }
    }
    report.finish()
}

/// This program, to be run in a pod.
fn us() -> Result<String> {
    Ok(std::env::current_exe()?.to_string_lossy().into_owned())
}

/// Runs a command line to its end: its stdout and how long it took.
fn timed(line: &[&str]) -> Result<(String, Duration)> {
    let (program, args) = line.split_first().context("an empty command line")?;
    let begun = Instant::now();
    let output = Command::new(program).args(args).stdin(Stdio::null()).output().with_context(|| line.join(" "))?;
    let took = begun.elapsed();
    if !output.status.success() {
        bail!("{}: {}\n{}", line.join(" "), output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok((String::from_utf8_lossy(&output.stdout).into_owned(), took))
}

fn pod(args: &[&str]) -> Result<(String, Duration)> {
    timed(&[&["pod"], args].concat())
}

/// Waits until a pod has said a line.
fn said(name: &str, line: &str) -> Result<()> {
    integration::wait::until_true(&format!("{name} to say {line}"), Duration::from_secs(60), || {
        pod(&["logs", name]).is_ok_and(|(log, _)| log.lines().any(|said| said.trim() == line))
    })
}

/// A number of milliseconds out of what a command with `--json` printed: `frozen_ms`, or `frozen` as a duration.
fn frozen(json: &str) -> Result<Duration> {
    let report: serde_json::Value = serde_json::from_str(json).with_context(|| format!("not JSON: {json}"))?;
    if let Some(ms) = report["frozen_ms"].as_f64() {
        return Ok(Duration::from_secs_f64(ms / 1e3));
    }
    let (secs, nanos) = (report["frozen"]["secs"].as_u64(), report["frozen"]["nanos"].as_u64());
    let whole = secs.zip(nanos).with_context(|| format!("how long was it frozen? {json}"))?;
    Ok(Duration::new(whole.0, whole.1 as u32))
}
