//! A move of redis with 1 GiB under a writing client, and what the client saw of it.

use crate::report::Report;
use crate::table::{Table, ms};
use crate::{frozen, memory, pod, timed};
use anyhow::{Context, Result};
use std::process::{Command, Stdio};

const RUNS: usize = 6;
pub const ADDRESS: &str = "10.77.0.100";

/// A redis with 1 GiB in a pod of this host.
pub fn start() -> Result<()> {
    let address = format!("{ADDRESS}/24");
    pod(&[
        "run",
        "-d",
        "--name",
        "redis",
        "--network",
        "bridge:br0",
        "--ip",
        &address,
        "--",
        "redis-server",
        "--bind",
        "0.0.0.0",
        "--protected-mode",
        "no",
        "--save",
        "",
        "--dir",
        "/tmp",
        "--enable-debug-command",
        "yes",
    ])?;
    let cli = |words: &[&str]| timed(&[&["ssh", "client", "redis-cli", "-h", ADDRESS], words].concat());
    integration::wait::until_true("redis to answer", integration::wait::SOON, || {
        cli(&["ping"]).is_ok_and(|(answer, _)| answer.trim() == "PONG")
    })?;
    cli(&["debug", "populate", "920000", "key", "1000"])?;
    Ok(())
}

pub fn redis(report: &mut Report) -> Result<()> {
    let mut limits = Table::new("memory of this machine", "GiB/s");
    let (read, touch) = memory::limits(&mut limits)?;
    report.add(limits);
    start()?;
    let client = integration::bed::beside_us("client").context("client is built with us")?.display().to_string();
    let (mut total, mut still, mut pause) = (Vec::new(), Vec::new(), Vec::new());
    for run in 0..RUNS {
        let mut writer = Command::new("ssh")
            .args(["client", &client, "redis", &format!("{ADDRESS}:6379"), "1", "1", "1000"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        let mut out = std::io::BufReader::new(writer.stdout.take().context("a pipe")?);
        std::io::BufRead::read_line(&mut out, &mut line)?;
        let (json, took) = if run % 2 == 0 {
            pod(&["migrate", "redis", "--to", "hostB", "--json"])?
        } else {
            timed(&["ssh", "hostB", "pod", "migrate", "redis", "--to", "hostA", "--json"])?
        };
        total.push(ms(took));
        still.push(ms(frozen(&json)?));
        drop(writer.stdin.take());
        let mut text = String::new();
        std::io::Read::read_to_string(&mut out, &mut text)?;
        anyhow::ensure!(writer.wait()?.success(), "the client lost something: {text}");
        let longest = text.lines().find_map(|line| line.strip_prefix("longest pause: ")?.strip_suffix(" ms"));
        pause.push(longest.context("a summary")?.parse()?);
        timed(if run % 2 == 0 { &["pod", "rm", "redis"] } else { &["ssh", "hostB", "pod", "rm", "redis"] })?;
    }
    pod(&["rm", "-f", "redis"])?;
    let mut table = Table::new("move of redis with 1 GiB, one writing client", "ms");
    let least = 1e3 / read.min(touch);
    table.against("pod migrate, in all", total, least, "the slower of read and touch of 1 GiB");
    table.against("  of it frozen", still, least, "the slower of read and touch of 1 GiB");
    table.row("the client's longest pause", pause);
    report.add(table);
    Ok(())
}
