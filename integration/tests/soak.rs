//! One pod with redis, postgres and a python server in it, under load, saved and restored over and over. Nothing leaks,
//! nothing drifts, and an image grows no more than the programs do. A few times in CI; as often as is wanted by hand:
//! `SOAK=200 cargo nextest run --profile long --workspace --no-capture -E 'binary(soak)'`.

use anyhow::{Context, Result, bail, ensure};
use integration::bed::{Bed, Host};
use integration::pods::{ADDRESS, Client};
use integration::servers::{POSTGRES, PYTHON};
use integration::wait::{SOON, until_true};
use serde_json::Value;
use std::io::Read;
use std::process::Stdio;

const POD: &str = "soak";

/// Three servers that share nothing but the pod; it ends when any of them does. Without what comes and goes by itself (a
/// worker of postgres that cleans up, and its memory) nothing in it should grow.
const PROGRAMS: &str = r#"
redis-server --bind 0.0.0.0 --protected-mode no --save '' --dir /tmp &
python3 -c "$1" &
su -s /bin/bash -c "$2" -- postgres soak -c shared_buffers=16MB -c autovacuum=off &
wait -n
"#;

/// Cycles until what grows at first has grown.
const WARM: usize = 20;

fn cycles() -> usize {
    std::env::var("SOAK").ok().and_then(|text| text.parse().ok()).unwrap_or(3)
}

/// What must stay as it is from one cycle to the next.
#[derive(Debug, Clone, Copy)]
struct Sight {
    /// Bytes of memory in the image.
    memory: u64,
    processes: usize,
    /// Of the pod's monitor.
    descriptors: u64,
    resident_kib: u64,
}

fn number(host: &Host, line: &str) -> Result<u64> {
    let text = host.run(&["sh", "-c", line])?;
    text.trim().parse().with_context(|| format!("{line}: {text:?}"))
}

/// Saves the pod, ends it with that, and restores it.
fn cycle(host: &Host, number_of: usize) -> Result<Sight> {
    let name = format!("{POD}-{number_of}");
    host.pod(&["checkpoint", "create", POD, &name, "--stop"])?;
    let inspected: Value = serde_json::from_str(&host.pod(&["--json", "checkpoint", "inspect", &name])?)?;
    host.pod(&["restore", &name])?;
    host.pod(&["checkpoint", "rm", &name])?;
    // One that it survives, which is read while it runs.
    host.pod(&["checkpoint", "create", POD, &name])?;
    host.pod(&["checkpoint", "rm", &name])?;
    // The one before may still have the disk hold what the pod wrote.
    let monitor = "$(pgrep -n -x pod-monitor)";
    Ok(Sight {
        memory: inspected["memory_bytes"].as_u64().context("an image has memory")?,
        processes: inspected["processes"].as_array().context("an image has processes")?.len(),
        descriptors: number(host, &format!("ls /proc/{monitor}/fd | wc -l"))?,
        resident_kib: number(host, &format!("awk '/^VmRSS:/ {{ print $2 }}' /proc/{monitor}/status"))?,
    })
}

#[test]
fn a_pod_with_three_servers_is_saved_and_restored_over_and_over() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    let host = bed.a();
    let address = format!("{ADDRESS}/24");
    let head = ["run", "-d", "--init", "--name", POD, "--network", "bridge:br0", "--ip", &address];
    host.pod(&[&head[..], &["--", "bash", "-c", PROGRAMS, POD, PYTHON, POSTGRES]].concat())?;
    let client = |line: &str| bed.client().output(&["sh", "-c", line]).is_ok_and(|output| output.status.success());
    for port in [6379, 8000] {
        until_true(&format!("port {port} to answer"), SOON, || bed.client().reaches(ADDRESS, port))?;
    }
    until_true("postgres to answer", SOON, || client(&format!("psql -h {ADDRESS} -U postgres -c 'select 1'")))?;
    ensure!(client(&format!("pgbench -h {ADDRESS} -U postgres -i -q -s 1 postgres")), "pgbench -i failed");
    let redis = Client::start(&bed, &["redis", &format!("{ADDRESS}:6379"), "10", "3", "5000"])?;
    let http = Client::start(&bed, &["http", &format!("{ADDRESS}:8000"), "/some/path", "4"])?;
    let mut pgbench = bed
        .client()
        .command("pgbench")
        .args(["-h", ADDRESS, "-U", "postgres", "-c", "4", "-n", "-T", "100000", "--rate", "200", "postgres"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut seen: Vec<Sight> = Vec::new();
    for number_of in 1..=cycles() {
        let sight = cycle(host, number_of).with_context(|| format!("cycle {number_of}"))?;
        println!("{number_of}: {sight:?}");
        if pgbench.try_wait()?.is_some() {
            let mut said = String::new();
            pgbench.stderr.take().context("stderr is a pipe")?.read_to_string(&mut said)?;
            let log = host.pod(&["logs", "--tail", "30", POD])?;
            bail!("pgbench ended in cycle {number_of}: {said}\nthe pod's log ends:\n{log}");
        }
        let first = *seen.first().unwrap_or(&sight);
        ensure!(sight.descriptors <= first.descriptors, "descriptors of the monitor: {seen:#?}{sight:?}");
        // Buffers and pools fill within the first cycles; what they came to then is the measure.
        if let Some(warm) = seen.get(..WARM) {
            let most = |of: fn(&Sight) -> u64| warm.iter().map(of).max().unwrap_or(0);
            let memory = most(|sight| sight.memory);
            ensure!(sight.memory <= memory / 10 * 11 + (8 << 20), "the image has grown: {seen:#?}{sight:?}");
            let processes = most(|sight| sight.processes as u64);
            ensure!(sight.processes as u64 <= processes + 2, "processes: {seen:#?}{sight:?}");
            let resident = most(|sight| sight.resident_kib);
            ensure!(sight.resident_kib <= resident / 4 * 5, "memory of the monitor: {seen:#?}{sight:?}");
        }
        seen.push(sight);
    }
    println!("redis:\n{}\nhttp:\n{}", redis.finish()?.text, http.finish()?.text);
    ensure!(pgbench.try_wait()?.is_none(), "pgbench had ended");
    pgbench.kill()?;
    pgbench.wait()?;
    host.pod(&["rm", "-f", POD])?;
    bed.nothing_left(&before)
}
