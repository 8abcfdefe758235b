//! Faults of a checkpoint, of a restore, and of what a move needs on the far host, one by one. Those of a move itself are
//! drawn in `campaign`. FAULTS says how often each kill is done (2 unless told otherwise), SEED repeats a run.

use anyhow::{Context, Result, bail, ensure};
use integration::bed::{Bed, Census, Host};
use integration::faults::{self, Dice, MONITOR, Victim};
use integration::pods::{ADDRESS, Client};
use integration::wait::{SOON, until_true};
use nix::sys::signal::Signal;
use std::borrow::Cow;
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

fn rounds() -> usize {
    std::env::var("FAULTS").ok().and_then(|text| text.parse().ok()).unwrap_or(2)
}

/// Servers that could answer: how many on each host.
fn copies(bed: &Bed) -> Result<Vec<usize>> {
    faults::copies(bed, "redis-server")
}

fn text(bytes: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

/// Redis with some memory to send and a child that has ended, which it knows nothing of and does not wait for; and a client that loses
/// nothing silently.
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
        "sh",
        "-c",
        "true & exec redis-server \"$@\"",
        "sh",
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

/// Runs the `pod job resume ID` that was named, if one was.
fn resume(bed: &Bed, said: &str) -> Result<()> {
    faults::resume(bed.a(), said).map(drop)
}

/// Exactly one copy answers, if need be after the command that `pod` names; tells which host it is on.
fn exactly_one<'a>(bed: &'a Bed, said: &str) -> Result<&'a Host> {
    let settled = || copies(bed).is_ok_and(|copies| copies.iter().sum::<usize>() == 1);
    // One that stands still looks like one that runs: where the tool has said what to do, that is done first.
    resume(bed, said)?;
    if until_true("one copy", Duration::from_secs(5), settled).is_err() {
        // What a person would type next: "fix: when hostB can be reached again: pod job resume ID".
        // Where the tool was killed, it is `pod ps` that says so.
        let listed = bed.a().output(&["pod", "ps"])?;
        let said = format!("{said}{}{}", text(&listed.stdout), text(&listed.stderr));
        resume(bed, &said)?;
        bed.b().pod(&["ps"])?;
        until_true("one copy", SOON, settled)
            .with_context(|| format!("copies: {:?}; pod said: {said}", copies(bed)))?;
    }
    let at = if copies(bed)?[0] == 1 { bed.a() } else { bed.b() };
    until_true("the copy to answer", SOON, || bed.client().reaches(ADDRESS, 6379))
        .with_context(|| format!("on {}; pod said: {said}", at.name()))?;
    ensure!(copies(bed)?.iter().sum::<usize>() == 1, "copies: {:?}", copies(bed)?);
    Ok(at)
}

fn clean(bed: &Bed, before: &[Census]) -> Result<()> {
    for host in [bed.a(), bed.b()] {
        let _ = host.pod(&["rm", "-f", "redis"]);
    }
    bed.nothing_left(before)
}

/// Starts `pod` on that host; it is looked at later.
fn begin(host: &Host, args: &[&str]) -> Result<Child> {
    let mut command = host.command("pod");
    command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    Ok(command.spawn()?)
}

/// What a command said that was begun, once it has ended.
fn said(mut child: Child) -> Result<String> {
    until_true("pod to end", Duration::from_secs(60), || matches!(child.try_wait(), Ok(Some(_)) | Err(_)))?;
    Ok(String::from_utf8_lossy(&child.wait_with_output()?.stderr).into_owned())
}

const MOVE: [&str; 4] = ["migrate", "redis", "--to", "hostB"];

/// A command of which a process is killed after that time, if it is not over by then.
fn disturbed(bed: &Bed, args: &[&str], after: Duration, victim: Victim) -> Result<String> {
    let mut child = begin(bed.a(), args)?;
    let moment = Instant::now() + after;
    while Instant::now() < moment && child.try_wait()?.is_none() {
        std::thread::sleep(Duration::from_micros(300).min(moment.saturating_duration_since(Instant::now())));
    }
    victim.kill(bed.a(), &victim.find(bed.a())?)?;
    said(child)
}

/// A checkpoint that is killed leaves the pod running, and no file or a whole one.
#[test]
fn pod_checkpoint_is_killed() -> Result<()> {
    const CREATE: [&str; 4] = ["checkpoint", "create", "redis", "saved"];
    let victim = Victim { comm: "pod", line: &["checkpoint", "create"], but: "" };
    let bed = Bed::new()?;
    let before = bed.census()?;
    let client = start(&bed)?;
    let begun = Instant::now();
    bed.a().pod(&CREATE)?;
    let took = begun.elapsed();
    bed.a().pod(&["checkpoint", "rm", "saved"])?;
    let mut dice = Dice::new();
    for round in 1..=rounds() {
        let moment = dice.below(took);
        let said = disturbed(&bed, &CREATE, moment, victim)?;
        let at = exactly_one(&bed, &said).with_context(|| format!("round {round}, {moment:?}"))?;
        ensure!(at.name() == "hostA", "it is elsewhere");
        for name in
            bed.a().pod(&["checkpoint", "ls"])?.lines().skip(1).filter_map(|line| line.split_whitespace().next())
        {
            bed.a().pod(&["checkpoint", "inspect", name]).with_context(|| format!("round {round}, {moment:?}"))?;
            bed.a().pod(&["checkpoint", "rm", name])?;
        }
    }
    client.finish()?;
    clean(&bed, &before)
}

/// The monitor is what puts a pod back on the network that was off it for a checkpoint. Where it is killed just then, the
/// tool does; where both are, the next command.
#[test]
fn the_monitor_is_killed_while_the_pod_is_off_the_network() -> Result<()> {
    const TOOL: Victim = Victim { comm: "pod", line: &["checkpoint", "create"], but: "" };
    let bed = Bed::new()?;
    let before = bed.census()?;
    let mut missed = 0;
    for both in [false, true] {
        let client = start(&bed)?;
        let (monitors, network) = (MONITOR.find(bed.a())?, bed.a().root()?.join("sys/class/net"));
        let mut devices = fs::read_dir(&network)?.flatten().map(|entry| entry.path());
        let is_cable = |path: &PathBuf| path.join("brport").exists() && path.to_string_lossy().contains("/net/pod");
        let flags = devices.find(is_cable).context("the pod has a cable")?.join("flags");
        let is_up = || -> Result<bool> {
            let text = fs::read_to_string(&flags)?;
            Ok(u32::from_str_radix(text.trim().trim_start_matches("0x"), 16)? & 1 != 0)
        };
        let (tool, tools) = loop {
            let mut tool = begin(bed.a(), &["checkpoint", "create", "redis", "saved"])?;
            let mut tools = Vec::new();
            while is_up()? && tool.try_wait()?.is_none() {
                if tools.is_empty() {
                    tools = TOOL.find(bed.a())?;
                }
            }
            if tool.try_wait()?.is_none() && !tools.is_empty() {
                break (tool, tools);
            }
            // It is off for a few milliseconds, which a busy machine looks away for.
            missed += 1;
            ensure!(missed < 100, "the pod was never off the network: {}", said(tool)?);
            said(tool)?;
            bed.a().pod(&["checkpoint", "rm", "saved"])?;
        };
        if both {
            TOOL.kill(bed.a(), &tools)?;
        }
        ensure!(MONITOR.kill(bed.a(), &monitors)? == 1, "the monitor was not there");
        let said = said(tool)?;
        if both {
            // Once the kernel has let go of both.
            let listed = || bed.a().pod(&["ps"]).is_ok_and(|table| table.contains("monitor lost"));
            until_true("the monitor to be lost", SOON, listed)?;
        }
        let at = exactly_one(&bed, &said).with_context(|| format!("both: {both}"))?;
        ensure!(at.name() == "hostA" && bed.a().pod(&["ps"])?.contains("monitor lost"), "{said}");
        client.finish()?;
        let _ = bed.a().pod(&["checkpoint", "rm", "saved"]);
        clean(&bed, &before)?;
    }
    Ok(())
}

/// A restore that is killed has made the pod run or can be done again; what the pod had is not lost in between.
#[test]
fn pod_restore_is_killed() -> Result<()> {
    let victims = [
        Victim { comm: "pod", line: &["restore", "saved"], but: "" },
        Victim { comm: "pod-monitor", line: &["restore", "saved"], but: "" },
    ];
    let bed = Bed::new()?;
    let before = bed.census()?;
    let mut client = start(&bed)?;
    let mut took = Duration::from_millis(500);
    let mut dice = Dice::new();
    for round in 0..=rounds() {
        bed.a().pod(&["checkpoint", "create", "redis", "saved", "--stop"])?;
        let begun = Instant::now();
        // The first is not disturbed: how long it takes.
        if round > 0 {
            disturbed(&bed, &["restore", "saved"], dice.below(took), dice.one_of(&victims))?;
            let settled = || bed.a().pod(&["ps", "-a"]).is_ok_and(|table| !table.contains("creating"));
            until_true("the restore to be over", SOON, settled)?;
        }
        if !bed.a().runs("redis") {
            bed.a().pod(&["restore", "saved"]).with_context(|| format!("round {round}"))?;
        }
        took = if round == 0 { begun.elapsed() } else { took };
        exactly_one(&bed, "").with_context(|| format!("round {round}"))?;
        bed.a().pod(&["checkpoint", "rm", "saved"])?;
        client.finish().with_context(|| format!("round {round}"))?;
        client = Client::start(&bed, &["redis", &format!("{ADDRESS}:6379"), "4", "2", "200"])?;
        // One whose monitor was killed cannot be saved.
        if bed.a().pod(&["ps"])?.contains("monitor lost") {
            bed.a().pod(&["rm", "-f", "redis"])?;
            drop(client);
            client = start(&bed)?;
        }
    }
    client.finish()?;
    clean(&bed, &before)
}

/// Whether the client has sent something that was not acknowledged.
fn awaits(bed: &Bed) -> Result<bool> {
    let text = bed.client().run(&["ss", "-Htn", "state", "established", "dport", "=", ":6379"])?;
    let mut queued = text.lines().filter_map(|line| line.split_whitespace().nth(1)).peekable();
    ensure!(queued.peek().is_some(), "the client has no connection");
    Ok(queued.any(|bytes| bytes != "0"))
}

/// Whether a process of that name is held by a tracer.
fn is_traced(host: &Host, name: &str) -> Result<bool> {
    let texts = fs::read_dir(host.root()?.join("proc"))?.flatten();
    let texts = texts.filter_map(|entry| fs::read_to_string(entry.path().join("status")).ok());
    let mut those = texts.filter(|text| text.lines().next().is_some_and(|line| line == format!("Name:\t{name}")));
    Ok(those.any(|text| text.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))))
}

/// `pod restore`.
const RESTORE: Victim = Victim { comm: "pod", line: &["restore", "saved"], but: "" };

/// Stops the pod with a checkpoint, in the middle of its client's requests. Its cable on hostA, which is gone now.
fn save(bed: &Bed) -> Result<PathBuf> {
    let mut devices = fs::read_dir(bed.a().root()?.join("sys/class/net"))?.flatten().map(|entry| entry.path());
    let is_cable = |path: &PathBuf| path.join("brport").exists() && path.to_string_lossy().contains("/net/pod");
    let cable = devices.find(is_cable).context("the pod has a cable")?;
    bed.a().pod(&["checkpoint", "create", "redis", "saved", "--stop"])?;
    until_true("the monitor to leave", SOON, || MONITOR.find(bed.a()).is_ok_and(|found| found.is_empty()))?;
    Ok(cable)
}

/// After a restore that was not met where it was to be: everything as before it.
fn undisturbed(bed: &Bed, client: Client) -> Result<Client> {
    until_true("the restore to be over", SOON, || bed.a().runs("redis"))?;
    client.finish()?;
    bed.a().pod(&["checkpoint", "rm", "saved"])?;
    Client::start(bed, &["redis", &format!("{ADDRESS}:6379"), "4", "2", "200"])
}

/// The monitor goes on alone where `pod restore` is killed, however early: nobody takes its pod for one that never began, and
/// makes it once more.
#[test]
fn pod_restore_is_killed_as_soon_as_it_has_a_monitor() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    let mut client = start(&bed)?;
    let mut missed = 0;
    let monitors = loop {
        let cable = save(&bed)?;
        let mut tool = begin(bed.a(), &["restore", "saved"])?;
        let mut monitors = Vec::new();
        while monitors.is_empty() && tool.try_wait()?.is_none() {
            monitors = MONITOR.find(bed.a())?;
        }
        MONITOR.signal(bed.a(), &monitors, Signal::SIGSTOP)?;
        if !monitors.is_empty() && !cable.exists() && RESTORE.kill(bed.a(), &RESTORE.find(bed.a())?)? == 1 {
            tool.wait()?;
            break monitors;
        }
        MONITOR.signal(bed.a(), &monitors, Signal::SIGCONT)?;
        missed += 1;
        ensure!(missed < 100, "the monitor was never met before it had a cable: {}", said(tool)?);
        client = undisturbed(&bed, client)?;
    };
    let table = bed.a().pod(&["ps", "-a"])?;
    let (_, said) = bed.a().pod_fails(&["restore", "saved"]).context(table)?;
    ensure!(said.contains("E-STILL-RUNNING"), "{said}");
    MONITOR.signal(bed.a(), &monitors, Signal::SIGCONT)?;
    until_true("the pod to run", SOON, || bed.a().runs("redis"))?;
    exactly_one(&bed, "")?;
    client.finish()?;
    bed.a().pod(&["checkpoint", "rm", "saved"])?;
    clean(&bed, &before)
}

/// The restored pod's kernel answers its clients as soon as it is on the network: from then on there is no way back to the
/// checkpoint, whoever is killed. The monitor is stopped when it has plugged the pod in and not let go of it yet.
#[test]
fn the_monitor_is_killed_while_it_lets_a_restored_pod_go() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    let mut missed = 0;
    for both in [false, true] {
        let mut client = start(&bed)?;
        let (tool, monitors) = loop {
            let plugged = save(&bed)?.join("brport");
            // Unless all that it asks was acknowledged while the pod stood still before it was cut off.
            let asks =
                until_true("the client to ask", Duration::from_secs(2), || awaits(&bed).unwrap_or(false)).is_ok();
            let mut tool = begin(bed.a(), &["restore", "saved"])?;
            let mut monitors = Vec::new();
            while !plugged.exists() && tool.try_wait()?.is_none() {
                if monitors.is_empty() {
                    monitors = MONITOR.find(bed.a())?;
                }
            }
            MONITOR.signal(bed.a(), &monitors, Signal::SIGSTOP)?;
            if asks && plugged.exists() && is_traced(bed.a(), "redis-server")? {
                break (tool, monitors);
            }
            MONITOR.signal(bed.a(), &monitors, Signal::SIGCONT)?;
            missed += 1;
            let said = said(tool)?;
            ensure!(missed < 100, "the monitor was never met between the two: {said}");
            client = undisturbed(&bed, client).context(said)?;
        };
        until_true("the pod's kernel to answer", SOON, || awaits(&bed).is_ok_and(|awaits| !awaits))?;
        if both {
            RESTORE.kill(bed.a(), &RESTORE.find(bed.a())?)?;
        }
        ensure!(MONITOR.kill(bed.a(), &monitors)? == 1, "the monitor was not there");
        let said = said(tool)?;
        let listed = || bed.a().pod(&["ps", "-a"]).is_ok_and(|table| !table.contains("creating"));
        until_true("the restore to be over", SOON, listed)?;
        if !bed.a().runs("redis") {
            bed.a().pod(&["restore", "saved"]).with_context(|| said.clone())?;
        }
        exactly_one(&bed, "").with_context(|| format!("both: {both}; {said}"))?;
        client.finish().with_context(|| format!("both: {both}; {said}"))?;
        ensure!(bed.a().pod(&["ps"])?.contains("monitor lost"), "it does not say so: {said}");
        bed.a().pod(&["checkpoint", "rm", "saved"])?;
        clean(&bed, &before)?;
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

/// After the commit the pod's port is refused by its bridge: it runs without the network, and is not lost.
#[test]
fn the_destinations_bridge_is_full() -> Result<()> {
    /// Of which the pod's holding port takes the last one.
    const PORTS: usize = 1023;
    let bed = Bed::new()?;
    for host in [bed.a(), bed.b()] {
        host.run(&["ip", "link", "add", "br9", "type", "bridge"])?;
        host.run(&["ip", "link", "set", "br9", "up"])?;
    }
    let before = bed.census()?;
    let network = ["--network", "bridge:br9", "--ip", "10.9.0.2/24"];
    bed.a().pod(&[&["run", "-d", "--name", "redis"], &network[..], &["--", "redis-server", "--save", ""]].concat())?;
    let pairs = (0..PORTS / 2).map(|n| {
        format!("link add a{n} type veth peer name b{n}\nlink set a{n} master br9\nlink set b{n} master br9\n")
    });
    let file = bed.shared().join("ports");
    fs::write(&file, pairs.collect::<String>())?;
    bed.b().run(&["ip", "-batch", &file.to_string_lossy()])?;
    let said = said(begin(bed.a(), &MOVE)?)?;
    ensure!(copies(&bed)? == [0, 1], "copies: {:?}; pod said: {said}", copies(&bed)?);
    ensure!(bed.b().pod(&["ps"])?.contains(" up "), "{}", bed.b().pod(&["ps", "-a"])?);
    bed.b().pod(&["exec", "redis", "redis-cli", "ping"])?;
    let links = bed.b().run(&["ip", "-o", "link", "show", "master", "br9"])?;
    ensure!(!links.contains(" pod"), "the bridge took the pod's port: the test tests nothing");
    let removed = (0..PORTS / 2).map(|n| format!("link del a{n}\n"));
    fs::write(&file, removed.collect::<String>())?;
    bed.b().run(&["ip", "-batch", &file.to_string_lossy()])?;
    clean(&bed, &before)
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

/// The log of a monitor is on a disk that may be full, also just after the commit: what it has to tell then is lost, and nothing else.
#[test]
fn a_log_that_cannot_be_written_ends_nobody() -> Result<()> {
    let bed = Bed::new()?;
    // On a host without the default network, whose making is logged.
    let line = "POD_LOG=trace exec pod run -d --name logged -- sleep 1000 2>/dev/full";
    bed.a().run(&["sh", "-c", line])?;
    ensure!(bed.a().runs("logged"), "it does not run");
    bed.a().pod(&["rm", "-f", "logged"]).map(drop)
}
