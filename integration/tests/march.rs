//! A long march: one pod goes from host to host to host, round and round, while clients write to it and read back every byte. None of
//! them notices, and nothing grows. A few moves in CI; as many as are wanted by hand:
//! `MOVES=500 cargo nextest run --profile long --workspace --no-capture -E 'binary(march)'`.

use anyhow::{Context, Result, ensure};
use integration::bed::{Bed, Host};
use integration::faults::SESSION;
use integration::pods::{ADDRESS, Client};
use integration::wait::{SOON, until_true};
use serde_json::Value;
use std::fs;
use std::path::Path;

const POD: &str = "march";

fn moves() -> usize {
    std::env::var("MOVES").ok().and_then(|text| text.parse().ok()).unwrap_or(6)
}

/// Once around: the first are the measure, for what is made once is made in them.
const HOSTS: usize = 3;

/// Files of the journal on one host: of 64 jobs that both hosts of each know of, an entry, a lock and a log, and of some that
/// the other is told of next time.
const JOURNAL: usize = 3 * (64 + 8);

/// What is seen after a move, on the host that has the pod now.
#[derive(Debug, Clone, Copy)]
struct Sight {
    /// Of the pod's monitor.
    descriptors: usize,
    resident_kib: u64,
    /// Of the server in it: a move must not leave it a descriptor or a mapping more.
    own_descriptors: usize,
    own_mappings: usize,
    /// Below /run/pod, and where pods are kept without the journal.
    run_files: usize,
    store_files: usize,
    cgroups: usize,
    processes: usize,
    /// Of the whole journal, which grows up to [`JOURNAL`], and the list of events, which is put aside when it is long.
    journal: (usize, u64),
    events: u64,
    bytes_sent: u64,
    memory: u64,
    frozen_ms: f64,
}

/// Entries below a folder and their bytes.
fn below(folder: &Path, leave_out: &str) -> (usize, u64) {
    let (mut count, mut bytes) = (0, 0);
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name() == leave_out {
            continue;
        }
        count += 1;
        let Ok(meta) = entry.metadata() else { continue };
        if meta.is_dir() {
            let (more, more_bytes) = below(&entry.path(), leave_out);
            (count, bytes) = (count + more, bytes + more_bytes);
        } else {
            bytes += meta.len();
        }
    }
    (count, bytes)
}

impl Sight {
    fn of(host: &Host, report: &Value) -> Result<Sight> {
        let root = host.root()?;
        let named = |name: &str| -> Result<std::path::PathBuf> {
            let all = fs::read_dir(root.join("proc"))?.flatten().map(|entry| entry.path());
            let is_it =
                |path: &std::path::PathBuf| fs::read_to_string(path.join("comm")).is_ok_and(|c| c.trim() == name);
            all.filter(is_it).last().with_context(|| format!("no {name} on {}", host.name()))
        };
        let (monitor, server) = (named("pod-monitor")?, named("redis-server")?);
        let status = fs::read_to_string(monitor.join("status"))?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
        let number = |name: &str| report[name].as_f64().with_context(|| format!("no {name} in {report}"));
        let (store, run) = (root.join("var/lib/pod"), root.join("run/pod"));
        let cgroups = host.run(&["sh", "-c", "find /sys/fs/cgroup -type d | wc -l"])?;
        let is_process = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().parse::<u32>().is_ok();
        Ok(Sight {
            descriptors: fs::read_dir(monitor.join("fd"))?.count(),
            resident_kib: resident.context("VmRSS")?.parse()?,
            own_descriptors: fs::read_dir(server.join("fd"))?.count(),
            own_mappings: fs::read_to_string(server.join("maps"))?.lines().count(),
            run_files: below(&run, "").0,
            store_files: below(&store, "jobs").0,
            cgroups: cgroups.trim().parse()?,
            processes: fs::read_dir(root.join("proc"))?.flatten().filter(is_process).count(),
            journal: below(&store.join("jobs"), ""),
            events: fs::metadata(store.join("events.jsonl"))?.len(),
            bytes_sent: number("bytes_sent")? as u64,
            memory: number("bytes_memory")? as u64,
            frozen_ms: number("frozen_ms")?,
        })
    }
}

/// The monitor of a pod that has left is the last of it to go.
fn gone(host: &Host) -> Result<()> {
    let gone = || host.output(&["pgrep", "-x", "pod-monitor"]).is_ok_and(|found| !found.status.success());
    until_true("the monitor of a pod that left to be gone", SOON * 2, gone)
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied().unwrap_or_default()
}

#[test]
fn a_pod_goes_round_three_hosts_under_load() -> Result<()> {
    let bed = Bed::of_three()?;
    let before = bed.census()?;
    let address = format!("{ADDRESS}/24");
    let run = ["run", "-d", "--name", POD, "--network", "bridge:br0", "--ip", &address, "--", "redis-server"];
    let server = ["--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", "--dir", "/tmp"];
    bed.a().pod(&[&run[..], &server, &["--enable-debug-command", "yes"]].concat())?;
    until_true("redis to answer", SOON, || bed.client().reaches(ADDRESS, 6379))?;
    bed.client().run(&["redis-cli", "-h", ADDRESS, "debug", "populate", "32000", "filler", "1000"])?;
    let mut client = Client::start(&bed, &["redis", &format!("{ADDRESS}:6379"), "10", "3", "2000", "1"])?;
    let mut seen: Vec<Sight> = Vec::new();
    for number in 1..=moves() {
        let (from, to) = (&bed.homes()[(number - 1) % HOSTS], &bed.homes()[number % HOSTS]);
        let moved =
            from.pod(&["migrate", POD, "--to", to.name(), "--json"]).with_context(|| format!("move {number}"))?;
        from.pod(&["rm", POD])?;
        client.check().with_context(|| format!("after move {number}"))?;
        bed.homes().iter().filter(|host| host.name() != to.name()).try_for_each(gone)?;
        until_true("ssh's session to be gone", SOON, || SESSION.find(to).is_ok_and(|left| left.is_empty()))?;
        let sight = Sight::of(to, &serde_json::from_str(&moved)?)?;
        println!("{number} {}→{}: {sight:?}", from.name(), to.name());
        // The same host a round before: hosts need not be alike.
        if let Some(old) = seen.get(number % HOSTS + HOSTS - 1).filter(|_| number > 2 * HOSTS) {
            grows_not(old, &sight).with_context(|| format!("after move {number}: {sight:?}\nbefore: {old:?}"))?;
        }
        seen.push(sight);
    }
    let frozen: Vec<f64> = seen.iter().map(|sight| sight.frozen_ms).collect();
    let third = frozen.len() / 3;
    let (early, late) = (median(frozen[..third].to_vec()), median(frozen[frozen.len() - third..].to_vec()));
    let (first, last) = (&seen[seen.len().min(HOSTS) - 1], &seen[seen.len() - 1]);
    let entries = last.journal.0 - first.journal.0;
    println!("frozen: {early:.1} ms at first, {late:.1} ms at last");
    let more = (
        last.journal.1 - first.journal.1,
        last.events.saturating_sub(first.events),
        seen.len() - seen.len().min(HOSTS),
    );
    println!(
        "on one host: {entries} files and {} bytes of journal, {} bytes of events more in {} moves",
        more.0, more.1, more.2
    );
    let summary = client.finish()?.text;
    summary.lines().filter(|line| line.contains(": ")).for_each(|line| println!("{line}"));
    ensure!(last.journal.0 <= JOURNAL, "{} files of journal after {} moves", last.journal.0, moves());
    ensure!(late < early * 2.0 + 50.0, "it stands still longer and longer: {frozen:?}");
    bed.homes()[moves() % HOSTS].pod(&["rm", "-f", POD])?;
    bed.nothing_left(&before)
}

fn grows_not(old: &Sight, new: &Sight) -> Result<()> {
    ensure!(new.descriptors <= old.descriptors, "descriptors of the monitor");
    ensure!(new.resident_kib <= old.resident_kib / 4 * 5, "memory of the monitor");
    ensure!(new.own_descriptors <= old.own_descriptors, "descriptors of the server");
    ensure!(new.own_mappings <= old.own_mappings, "mappings of the server");
    ensure!(new.run_files <= old.run_files, "files in /run");
    ensure!(new.store_files <= old.store_files, "files in the store");
    ensure!(new.cgroups <= old.cgroups, "cgroups");
    ensure!(new.processes <= old.processes, "processes");
    ensure!(new.memory <= old.memory / 10 * 11 + (4 << 20), "memory of the pod");
    ensure!(new.bytes_sent <= old.bytes_sent / 2 * 3 + (16 << 20), "what is sent");
    Ok(())
}
