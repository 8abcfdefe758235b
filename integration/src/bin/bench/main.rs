//! Benchmarks: one command and one table each, medians of at least five runs, beside limits of this machine that are
//! measured in the same run. `integration/bench` builds what they need, makes the hosts and calls this on the first.
//!
//!   bench run | sleep | memory | mixed | processes | threads | maps | files | connections | redis | lazy | overhead | all

mod lazy;
mod life;
mod memory;
mod moving;
mod overhead;
mod subjects;
mod table;

use anyhow::{Context, Result, bail};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const ALL: [&str; 12] = [
    "run",
    "sleep",
    "memory",
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
    let chosen = if args.is_empty() || args == ["all"] { &ALL[..] } else { args };
    for what in chosen {
        match *what {
            "run" => life::start()?,
            "sleep" => life::saved("a sleep", &["sleep", "1000000"], 11)?,
            "processes" => life::saved("100 processes", &[&us()?, "__processes", "100"], 5)?,
            "threads" => life::saved("1 process with 1000 threads", &[&us()?, "__threads", "1000"], 5)?,
            "maps" => life::saved("10000 maps", &[&us()?, "__maps", "10000"], 5)?,
            "files" => life::saved("10000 descriptors", &[&us()?, "__files", "10000"], 5)?,
            "connections" => life::saved("10000 ends of TCP connections", &[&us()?, "__connections", "10000"], 5)?,
            "memory" => memory::saved()?,
            "mixed" => memory::mixed()?,
            "redis" => moving::redis()?,
            "lazy" => lazy::lazily()?,
            "overhead" => overhead::all()?,
            other => bail!("no benchmark {other:?}; there are {}", ALL.join(", ")),
        }
    }
    Ok(())
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
