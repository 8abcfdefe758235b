//! What a move may take: how long it stands still, how long it lasts, how much of the link it uses.

use anyhow::{Context, Result, ensure};
use integration::bed::host::program_of;
use integration::bed::{Bed, Host};
use integration::faults::MONITOR;
use integration::pods::said;
use integration::wait::{SOON, until_true};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// A pod whose program writes all of its memory, over and over, faster than any link takes it.
fn writer(host: &Host, mib: usize) -> Result<()> {
    let program = format!(
        "import os\nsize = {mib} << 20\nblocks = [os.urandom(1 << 20) for _ in range(2)]\nmemory = bytearray(size)\nround = 0\n\
         while True:\n  for at in range(0, size, 1 << 20): memory[at:at + (1 << 20)] = blocks[round % 2]\n  round += 1\n  \
         round == 2 and print('ready', flush=True)\n"
    );
    host.pod(&["run", "-d", "--name", "writer", "--network", "none", "--", "python3", "-c", &program])?;
    said(host, "writer", "ready")
}

/// The pod runs where it ran, and nothing of the attempt is left.
fn runs_on(bed: &Bed, name: &str) -> Result<()> {
    ensure!(bed.a().runs(name) && !bed.b().runs(name), "{name} does not run on where it was");
    let jobs = bed.a().pod(&["job", "ls", "--json"])?;
    let jobs: serde_json::Value = serde_json::from_str(&jobs)?;
    let open = jobs["jobs"].as_array().into_iter().flatten().filter(|job| job["phase"] != "aborted").count();
    ensure!(open == 0, "jobs: {jobs}");
    Ok(())
}

#[test]
fn a_pod_that_writes_too_fast_is_given_up_or_switched() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    writer(bed.a(), 400)?;
    let (code, said) = bed.a().pod_fails(&["migrate", "writer", "--to", "hostB", "--on-stall", "abort"])?;
    ensure!(code == 15 && said.contains("E-STALL") && said.contains("runs on here"), "{code}: {said}");
    runs_on(&bed, "writer")?;
    let moved = bed.a().pod(&["migrate", "writer", "--to", "hostB", "--json"])?;
    let report: serde_json::Value = serde_json::from_str(&moved)?;
    ensure!(bed.b().runs("writer"), "it did not move");
    let warned =
        report["warnings"].as_array().is_some_and(|all| all.iter().any(|one| one.to_string().contains("MiB/s")));
    ensure!(warned, "not said aloud: {report}");
    let (expected, frozen) = (report["expected_ms"].as_f64(), report["frozen_ms"].as_f64());
    let (expected, frozen) = (expected.context("no estimate")?, frozen.context("no figure")?);
    // The guess is made while the program takes its part of the processors, and so is one of the worst case.
    ensure!(
        expected > 30.0 && (30.0..expected * 1.5).contains(&frozen),
        "expected {expected} ms, was still for {frozen}"
    );
    let ram = &report["migration"]["ram"];
    ensure!(ram["dirty-sync-count"].as_u64() >= Some(3) && ram["precopy-bytes"].as_u64() > Some(400 << 20), "{report}");
    // What it may take makes the difference.
    let wide = ["migrate", "writer", "--to", "hostA", "--on-stall", "abort", "--downtime", "60s"];
    bed.b().pod(&wide)?;
    bed.a().pod(&["rm", "-f", "writer"])?;
    bed.b().pod(&["rm", "writer"])?;
    bed.nothing_left(&before)
}

/// A pod that writes 50 MiB in each second of CPU time that it has, and says when it has gone round. It goes on when there is
/// nobody to be told: its pipe ends with its monitor.
fn slow_writer(host: &Host, options: &[&str]) -> Result<()> {
    const PROGRAM: &str = "
import time
memory, block = bytearray(8 << 20), bytes(range(256)) * 256
while True:
    for at in range(0, len(memory), len(block)):
        memory[at:at + len(block)] = block
        until = time.process_time() + 0.00125
        while time.process_time() < until: pass
    try: print('round', flush=True)
    except BrokenPipeError: pass
";
    let head = ["run", "-d", "--name", "writer", "--network", "none"];
    host.pod(&[&head, options, &["--", "python3", "-c", PROGRAM]].concat())?;
    until_true("the writer to go round", SOON, || rounds(host) > 1)
}

fn rounds(host: &Host) -> usize {
    host.pod(&["logs", "writer"]).unwrap_or_default().lines().filter(|line| *line == "round").count()
}

/// The CPU limit of the only pod of a host, as its control group has it.
fn cpu_limit(host: &Host) -> Result<String> {
    let files = "for file in $(find /sys/fs/cgroup -path '*/pod/*' -name cpu.cfs_quota_us -o -path '*/pod/*' -name \
        cpu.cfs_period_us -o -path '*/pod/*' -name cpu.max | sort); do echo ${file##*/} $(cat $file); done";
    let limit = host.run(&["sh", "-c", files])?;
    ensure!(!limit.is_empty(), "this machine has no cpu controller");
    Ok(limit)
}

/// How often it has used up what its limit gives it.
fn times_throttled(host: &Host) -> Result<String> {
    host.run(&["sh", "-c", "find /sys/fs/cgroup -path '*/pod/*' -name cpu.stat -exec grep nr_throttled {} +"])
}

/// Memory settles when its pod has less CPU time, and that is over when the pod stands still.
#[test]
fn a_pod_that_writes_too_fast_is_throttled_for_its_move() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    // Of a privileged one all that its groups say goes along.
    for options in [&[][..], &["--cpus", "0.8"], &["--cpus", "0.8", "--privileged"]] {
        slow_writer(bed.a(), options)?;
        let limit = cpu_limit(bed.a())?;
        let throttle = ["migrate", "writer", "--to", "hostB", "--on-stall", "throttle", "--json"];
        let throttle = [&throttle[..], &["--bandwidth", "10M", "--downtime", "200ms"]].concat();
        let moved = bed.a().command("pod").args(throttle).args(["--progress", "json"]).output()?;
        let said = String::from_utf8_lossy(&moved.stderr);
        ensure!(moved.status.success(), "{said}");
        let events = said.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let (mut expected, mut stalled, mut percentages) = (0.0, 0.0, Vec::new());
        for event in events {
            expected = event["expected_ms"].as_f64().unwrap_or(expected);
            if let Some(percentage) = event["cpu-throttle-percentage"].as_u64() {
                percentages.push(percentage);
                stalled = expected;
            }
            ensure!(event["event"] != "stalled", "it did not settle: {said}");
        }
        ensure!(!percentages.is_empty() && percentages.is_sorted(), "{percentages:?}: {said}");
        let report: serde_json::Value = serde_json::from_slice(&moved.stdout)?;
        println!("{options:?}: {percentages:?}, {stalled} -> {expected} ms, frozen {} ms", report["frozen_ms"]);
        ensure!(stalled > 200.0 && expected < 200.0, "{stalled} ms were expected, then {expected}");
        let last = percentages.last().copied();
        let named = (&report["throttled"]["percentage"], &report["migration"]["cpu-throttle-percentage"]);
        ensure!((named.0.as_u64(), named.1.as_u64()) == (last, last), "{report}");
        ensure!(report["throttled"]["ms"].as_f64() > Some(0.0), "{report}");
        ensure!(report["warnings"].to_string().contains("was throttled for"), "{report}");
        ensure!(cpu_limit(bed.b())? == limit, "its limit was {limit}, and is {}", cpu_limit(bed.b())?);
        bed.b().pod(&["rm", "-f", "writer"])?;
        bed.a().pod(&["rm", "writer"])?;
    }
    bed.nothing_left(&before)
}

/// Whoever dies while a pod is throttled, it has what it had before.
#[test]
fn a_pod_is_throttled_no_longer_than_somebody_wants_it() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    for (options, whose) in [
        (&[][..], &["tool"][..]),
        (&["--cpus", "0.8"], &["tool"]),
        (&[], &["tool, asked"]),
        (&["--cpus", "0.8"], &["monitor"]),
        (&[], &["monitor", "tool"]),
    ] {
        slow_writer(bed.a(), options)?;
        let limit = cpu_limit(bed.a())?;
        let mut command = bed.a().command("pod");
        command.args(["migrate", "writer", "--to", "hostB", "--on-stall", "throttle", "--bandwidth", "10M"]);
        let mut tool = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        let pid = Pid::from_raw(program_of(&tool)?);
        let less = || cpu_limit(bed.a()).is_ok_and(|now| now != limit);
        let throttled = until_true("the pod to be throttled", SOON, less);
        for one in whose.iter().filter(|_| throttled.is_ok()) {
            match *one {
                "tool" => kill(pid, Signal::SIGKILL)?,
                "monitor" => ensure!(MONITOR.kill(bed.a(), &MONITOR.find(bed.a())?)? == 1, "the monitor was not there"),
                _ => kill(pid, Signal::SIGINT)?,
            }
        }
        if throttled.is_err() {
            tool.kill()?;
        }
        let ended = tool.wait_with_output()?;
        throttled.with_context(|| String::from_utf8_lossy(&ended.stderr).into_owned())?;
        if whose.len() > 1 {
            bed.a().pod(&["ps"])?;
        }
        until_true(&format!("{whose:?} gone: the limit to be {limit}"), SOON, || !less())?;
        if !whose.contains(&"monitor") {
            runs_on(&bed, "writer")?;
            let (went, throttled) = (rounds(bed.a()), times_throttled(bed.a())?);
            until_true("the writer to go round", SOON, || rounds(bed.a()) > went + 1)?;
            let now = times_throttled(bed.a())?;
            ensure!(!options.is_empty() || now == throttled, "it is throttled: {throttled}, then {now}");
        }
        bed.a().pod(&["rm", "-f", "writer"])?;
    }
    bed.nothing_left(&before)
}

#[test]
fn a_move_that_takes_too_long_is_given_up() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    bed.a().guest("counter", &[], 100)?;
    let began = Instant::now();
    let slow = ["migrate", "counter", "--to", "hostB", "--bandwidth", "2M", "--timeout", "3s"];
    let (code, said) = bed.a().pod_fails(&slow)?;
    ensure!(code == 15 && said.contains("E-TIMEOUT") && said.contains("runs on here"), "{code}: {said}");
    ensure!(began.elapsed() > Duration::from_secs(3), "it was given up after {:?}", began.elapsed());
    runs_on(&bed, "counter")?;
    bed.a().pod(&["kill", "-s", "USR1", "counter"])?;
    integration::pods::said(bed.a(), "counter", "ok 1")?;
    bed.a().pod(&["rm", "-f", "counter"])?;
    bed.nothing_left(&before)
}

#[test]
fn a_move_uses_no_more_of_the_link_than_it_may() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    bed.a().guest("counter", &[], 100)?;
    let moved = |more: &[&str]| -> Result<(f64, f64)> {
        let (from, to) = if bed.a().runs("counter") { (bed.a(), bed.b()) } else { (bed.b(), bed.a()) };
        let report = from.pod(&[&["migrate", "counter", "--to", to.name(), "--json"], more].concat())?;
        from.pod(&["rm", "counter"])?;
        let report: serde_json::Value = serde_json::from_str(&report)?;
        let of = |name: &str| report[name].as_f64().context("no figure");
        Ok((of("bytes_ahead")?, of("total_ms")?))
    };
    let (bytes, free) = moved(&[])?;
    let least = |bytes: f64| bytes / f64::from(20 << 20) * 1e3;
    ensure!(free < least(bytes), "without a limit {bytes} bytes took {free} ms");
    let (bytes, held) = moved(&["--bandwidth", "20M"])?;
    ensure!(bytes > 1e8 && held > least(bytes), "{bytes} bytes in {held} ms are more than 20 MiB a second");
    ensure!(held < least(bytes) * 2.0 + free, "{bytes} bytes in {held} ms are much less than 20 MiB a second");
    bed.a().pod(&["rm", "-f", "counter"])?;
    bed.nothing_left(&before)
}

#[test]
fn what_it_may_take_is_understood_or_refused() -> Result<()> {
    let bed = Bed::new()?;
    for (option, value) in [("--downtime", "soon"), ("--timeout", "0s"), ("--bandwidth", "1"), ("--on-stall", "pray")] {
        let (code, said) = bed.a().pod_fails(&["migrate", "nobody", "--to", "hostB", option, value])?;
        ensure!(code == 2 && said.contains(option), "{option} {value}: {code}: {said}");
    }
    Ok(())
}

/// Changes a file in each place that travels, somewhere in a part that moves on slowly, one of them through a map; compares
/// each with what it remembers of it, over and over, and says so.
const EDITOR: &str = "
import mmap, os, random
size, files = 16 << 20, {}
for path in ['/dev/shm/mapped', '/tmp/written', '/var/tmp/layer']:
    opened = open(path, 'w+b', buffering=0)
    opened.write(os.urandom(size))
    files[path] = (opened, bytearray(open(path, 'rb').read()))
mapped = mmap.mmap(files['/dev/shm/mapped'][0].fileno(), size)
rounds = 0
while True:
    for _ in range(300):
        for path, (opened, remembered) in files.items():
            at, text = (rounds * 65536 + random.randrange(1 << 20)) % (size - 100), os.urandom(100)
            remembered[at:at + 100] = text
            if path == '/dev/shm/mapped':
                mapped[at:at + 100] = text
            else:
                os.pwrite(opened.fileno(), text, at)
    for path, (opened, remembered) in files.items():
        for at in range(0, size, 65536):
            if os.pread(opened.fileno(), 65536, at) != remembered[at:at + 65536]:
                print('FAIL', path, at, flush=True)
    rounds += 1
    print('compared', rounds, flush=True)
";

/// How often the editor has compared, by what it said.
fn compared(host: &Host) -> Result<u64> {
    let log = host.pod(&["logs", "editor"])?;
    ensure!(!log.contains("FAIL"), "a file is not what it was:\n{log}");
    Ok(log.lines().filter_map(|line| line.strip_prefix("compared ")?.parse().ok()).next_back().unwrap_or(0))
}

#[test]
fn files_go_ahead_and_only_changes_of_them_come_after() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    bed.a().pod(&["run", "-d", "--name", "editor", "--network", "none", "--", "python3", "-c", EDITOR])?;
    said(bed.a(), "editor", "compared 1")?;
    for (from, to) in [(bed.a(), bed.b()), (bed.b(), bed.a()), (bed.a(), bed.b())] {
        let moved = from.pod(&["migrate", "editor", "--to", to.name(), "--json"])?;
        let report: serde_json::Value = serde_json::from_str(&moved)?;
        let ram = &report["migration"]["ram"];
        println!("{} frozen, {ram}", report["frozen_ms"]);
        ensure!(ram["precopy-bytes"].as_u64() > Some(48 << 20), "{report}");
        // A mebibyte of each file and of what is remembered of it, and as much again for a while.
        ensure!(ram["downtime-bytes"].as_u64() < Some(16 << 20), "all came while it stood still: {report}");
        let then = compared(to)?;
        until_true("the editor to compare again", SOON, || compared(to).map_or(true, |now| now > then + 2))?;
        compared(to)?;
    }
    bed.b().pod(&["rm", "-f", "editor"])?;
    bed.a().pod(&["rm", "editor"])?;
    bed.nothing_left(&before)
}

/// What a firewall does with the ports of the direct way.
fn close(host: &Host, hook: &str, port: &str, how: &str) -> Result<()> {
    let rules = format!(
        "table inet closed {{ chain c {{ type filter hook {hook} priority 0; tcp {port} 49152-49215 {how}; }}; }}"
    );
    host.run(&["nft", &rules]).map(drop)
}

fn open(host: &Host) -> Result<()> {
    host.run(&["nft", "delete table inet closed"]).map(drop)
}

/// Memory goes past ssh where the hosts reach each other, through it where they do not, which is said, or where that is wanted.
#[test]
fn memory_goes_past_ssh_if_there_is_a_way() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    let hosts = [bed.a(), bed.b()];
    bed.a().guest("counter", &[], 0)?;
    let close = |how: &str| hosts.iter().try_for_each(|host| close(host, "input", "dport", how));
    let open = || hosts.iter().try_for_each(|host| open(host));
    let sudo: &[&str] = &["--remote-pod", "env -u SSH_CONNECTION pod"];
    // What the firewall does, options, which way it goes, and what is said of that.
    for (closed, options, transport, warned) in [
        (None, &[][..], "tls", None),
        (None, &["--tunnelled"], "ssh", None),
        (Some("reject with tcp reset"), &[], "ssh", Some("49152 to 49215")),
        (Some("drop"), &[], "ssh", Some("49152 to 49215")),
        (Some("drop"), &["--tunnelled"], "ssh", None),
        (None, sudo, "ssh", Some("env_keep")),
        (None, &[], "tls", None),
    ] {
        closed.map_or(Ok(()), close)?;
        let (from, to) = if bed.a().runs("counter") { (bed.a(), "hostB") } else { (bed.b(), "hostA") };
        let report = from.pod(&[&["migrate", "counter", "--to", to, "--json"], options].concat())?;
        closed.map_or(Ok(()), |_| open())?;
        let report: serde_json::Value = serde_json::from_str(&report)?;
        ensure!(report["transport"] == transport, "{closed:?} {options:?}: {report}");
        let warnings = report["warnings"].to_string();
        let said = warned.is_none_or(|text| warnings.contains(text));
        ensure!(said && warnings.contains("W-TUNNELLED") == warned.is_some(), "{closed:?} {options:?}: {report}");
    }
    bed.b().pod(&["rm", "-f", "counter"])?;
    bed.a().pod(&["rm", "counter"])?;
    bed.nothing_left(&before)
}

/// ssh lives on meanwhile, and each side can tell the other.
#[test]
fn a_direct_way_that_breaks_is_a_transfer_that_failed() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    bed.a().guest("counter", &[], 100)?;
    // Who sends there is told that nobody is: the source, and the destination with its acknowledgements.
    for (end, port) in [(bed.a(), "dport"), (bed.b(), "sport")] {
        let mut command = bed.a().command("pod");
        command.args(["migrate", "counter", "--to", "hostB", "--bandwidth", "2M"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let under_way = || bed.a().run(&["ss", "-Htn", "state", "established", "dport", "ge", "49152"]);
        let sending = |text: String| text.lines().any(|line| !line.trim().is_empty());
        let sent = until_true("memory goes the direct way", SOON, || under_way().is_ok_and(sending));
        let closed = sent.and_then(|()| close(end, "output", port, "reject with tcp reset"));
        if closed.is_err() {
            child.kill()?;
        }
        let ended = child.wait_with_output()?;
        closed?;
        open(end)?;
        let said = String::from_utf8_lossy(&ended.stderr);
        ensure!(ended.status.code() == Some(12) && said.contains("E-LINK"), "{port}: {:?}: {said}", ended.status);
        runs_on(&bed, "counter")?;
    }
    bed.a().pod(&["migrate", "counter", "--to", "hostB"])?;
    bed.b().pod(&["rm", "-f", "counter"])?;
    bed.a().pod(&["rm", "counter"])?;
    bed.nothing_left(&before)
}
