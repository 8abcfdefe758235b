//! What must never happen: two copies, no copy, anything left. A part of a move is killed at a random moment, the cable is
//! cut, a disk is full; a client watches. FAULTS says how often each is done (2 unless told otherwise; 50 by hand), SEED
//! repeats a run.

use anyhow::{Context, Result, bail, ensure};
use integration::bed::{Bed, Census, Host};
use integration::pods::{ADDRESS, Client};
use integration::wait::{SOON, until_true};
use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// xorshift: moments need no better.
struct Dice(u64);

impl Dice {
    fn new() -> Dice {
        let given = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok());
        let clock = || {
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |now| now.as_nanos() as u64)
        };
        let seed = given.unwrap_or_else(clock) | 1;
        println!("SEED={seed}");
        Dice(seed)
    }

    fn below(&mut self, limit: Duration) -> Duration {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        Duration::from_nanos(self.0 % limit.as_nanos().max(1) as u64)
    }
}

fn rounds() -> usize {
    std::env::var("FAULTS").ok().and_then(|text| text.parse().ok()).unwrap_or(2)
}

/// Pids on that host whose command line has all of the words.
fn find(host: &Host, words: &[&str]) -> Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(host.root()?.join("proc"))?.flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
        let line =
            String::from_utf8_lossy(&fs::read(entry.path().join("cmdline")).unwrap_or_default()).replace('\0', " ");
        let comm = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if words.iter().all(|word| line.contains(word) || comm.trim() == *word) {
            found.push(pid);
        }
    }
    Ok(found)
}

/// Servers that could answer: how many on each host. By name: a monitor's command line is that of `pod run`.
fn copies(bed: &Bed) -> Result<[usize; 2]> {
    let count = |host: &Host| -> Result<usize> {
        let entries = fs::read_dir(host.root()?.join("proc"))?.flatten();
        let names = entries.filter_map(|entry| fs::read_to_string(entry.path().join("comm")).ok());
        Ok(names.filter(|comm| comm.trim() == "redis-server").count())
    };
    Ok([count(bed.a())?, count(bed.b())?])
}

/// Redis with some memory to send, and a client that loses nothing silently.
fn start(bed: &Bed) -> Result<Client> {
    let address = format!("{ADDRESS}/24");
    bed.a().pod(&[
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
    until_true("redis to answer", SOON, || bed.client().reaches(ADDRESS, 6379))?;
    let fill = ["redis-cli", "-h", ADDRESS, "debug", "populate", "20000", "filler", "1000"];
    bed.client().run(&fill)?;
    Client::start(bed, &["redis", &format!("{ADDRESS}:6379"), "4", "2", "200"])
}

/// Exactly one copy answers, if need be after the command that `pod` names; tells which host it is on.
fn exactly_one<'a>(bed: &'a Bed, said: &str) -> Result<&'a Host> {
    let settled = || copies(bed).is_ok_and(|copies| copies.iter().sum::<usize>() == 1);
    if until_true("one copy", Duration::from_secs(5), settled).is_err() {
        // "fix: pod job resume ID" is what a person would type next.
        let fix = said.lines().find_map(|line| line.trim().strip_prefix("fix:")).map(str::trim);
        if let Some(job) = fix.and_then(|fix| fix.split('`').find(|part| part.starts_with("pod job"))) {
            bed.a().run(&job.split_whitespace().collect::<Vec<_>>())?;
        }
        until_true("one copy", SOON, settled)
            .with_context(|| format!("copies: {:?}; pod said: {said}", copies(bed)))?;
    }
    let at = if copies(bed)?[0] == 1 { bed.a() } else { bed.b() };
    until_true("the copy to answer", SOON, || bed.client().reaches(ADDRESS, 6379))
        .with_context(|| format!("on {}; pod said: {said}", at.name()))?;
    ensure!(copies(bed)?.iter().sum::<usize>() == 1, "copies: {:?}", copies(bed)?);
    Ok(at)
}

fn clean(bed: &Bed, before: &[Census; 2]) -> Result<()> {
    for host in [bed.a(), bed.b()] {
        let _ = host.pod(&["rm", "-f", "redis"]);
    }
    bed.nothing_left(before)
}

/// One move with `harm` done to it at some moment; the client must not notice more than a pause.
fn move_with(bed: &Bed, moment: Duration, harm: impl FnOnce(&Bed) -> Result<()>) -> Result<String> {
    let mut command = bed.a().command("pod");
    command
        .args(["migrate", "redis", "--to", "hostB"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut moving = command.spawn()?;
    std::thread::sleep(moment);
    harm(bed)?;
    until_true("pod migrate to end", Duration::from_secs(60), || matches!(moving.try_wait(), Ok(Some(_)) | Err(_)))?;
    let said = moving.wait_with_output()?;
    Ok(String::from_utf8_lossy(&said.stderr).into_owned())
}

/// How long an undisturbed move takes here and now.
fn usual(bed: &Bed) -> Result<Duration> {
    let client = start(bed)?;
    let begun = Instant::now();
    move_with(bed, Duration::ZERO, |_| Ok(()))?;
    let took = begun.elapsed();
    ensure!(copies(bed)? == [0, 1], "an undisturbed move leaves {:?}", copies(bed)?);
    client.finish()?;
    Ok(took)
}

/// Where and what to kill.
type Victim = fn(&Bed) -> Result<(&Host, Vec<i32>)>;

/// Kills what `victim` finds, at random moments of a move, and looks at what is left.
fn killed(victim: Victim) -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    let took = usual(&bed)?;
    clean(&bed, &before)?;
    let mut dice = Dice::new();
    for round in 1..=rounds() {
        let moment = dice.below(took);
        let client = start(&bed)?;
        let mut hits = 0;
        let said = move_with(&bed, moment, |bed| {
            let (host, pids) = victim(bed)?;
            hits = pids.len();
            for pid in pids {
                let _ = host.output(&["kill", "-KILL", &pid.to_string()])?;
            }
            Ok(())
        })?;
        let at = exactly_one(&bed, &said).with_context(|| format!("round {round}, {hits} killed after {moment:?}"))?;
        let said = format!("round {round}: {hits} killed after {moment:.1?}, runs on {}", at.name());
        client.finish().with_context(|| said.clone())?;
        clean(&bed, &before).with_context(|| said.clone())?;
        println!("{said}");
    }
    Ok(())
}

#[test]
fn pod_migrate_is_killed() -> Result<()> {
    killed(|bed| Ok((bed.a(), find(bed.a(), &["pod migrate redis"])?)))
}

#[test]
fn ssh_is_killed() -> Result<()> {
    killed(|bed| Ok((bed.a(), find(bed.a(), &["ssh ", "hostB"])?)))
}

#[test]
fn pod_receive_is_killed() -> Result<()> {
    killed(|bed| Ok((bed.b(), find(bed.b(), &["pod receive"])?)))
}

#[test]
fn the_monitor_is_killed() -> Result<()> {
    killed(|bed| Ok((bed.a(), find(bed.a(), &["pod-monitor"])?)))
}

#[test]
fn the_cable_is_cut() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    let took = usual(&bed)?;
    clean(&bed, &before)?;
    let mut dice = Dice::new();
    for round in 1..=rounds() {
        let moment = dice.below(took);
        let client = start(&bed)?;
        let said = move_with(&bed, moment, |bed| bed.partition(bed.b()))?;
        bed.heal(bed.b())?;
        let at = exactly_one(&bed, &said).with_context(|| format!("round {round}, cut after {moment:?}"))?;
        let said = format!("round {round}: cut after {moment:.1?}, runs on {}", at.name());
        client.finish().with_context(|| said.clone())?;
        clean(&bed, &before).with_context(|| said.clone())?;
        println!("{said}");
    }
    Ok(())
}

#[test]
fn the_destination_has_no_room() -> Result<()> {
    let bed = Bed::new()?;
    bed.b().run(&["sh", "-c", "mkdir -p /var/lib/pod && mount -t tmpfs -o size=4m small /var/lib/pod"])?;
    let before = bed.census()?;
    let client = start(&bed)?;
    bed.a().pod(&["exec", "redis", "dd", "if=/dev/urandom", "of=/var/big", "bs=1M", "count=16", "status=none"])?;
    let (_, said) = bed.a().pod_fails(&["migrate", "redis", "--to", "hostB"])?;
    ensure!(said.contains("error[E-"), "no code in: {said}");
    ensure!(exactly_one(&bed, &said)?.name() == "hostA", "it is elsewhere");
    client.finish()?;
    bed.a().pod(&["rm", "-f", "redis"])?;
    bed.nothing_left(&before)
}

#[test]
fn a_checkpoint_has_no_room() -> Result<()> {
    let bed = Bed::new()?;
    bed.a().run(&["sh", "-c", "mkdir -p /mnt && mount -t tmpfs -o size=4m small /mnt"])?;
    let client = start(&bed)?;
    let (_, said) = bed.a().pod_fails(&["checkpoint", "create", "redis", "-e", "/mnt/redis.pod"])?;
    ensure!(said.contains("error[E-"), "no code in: {said}");
    ensure!(exactly_one(&bed, &said)?.name() == "hostA", "it is elsewhere");
    client.finish()?;
    let left = bed.a().run(&["ls", "-A", "/mnt"])?;
    if !left.trim().is_empty() {
        bail!("left of the checkpoint: {left}");
    }
    Ok(())
}
