//! What must never happen: two copies, no copy, anything left. A part of a move is killed at a random moment of each phase,
//! the cable is cut, a disk is full; a client watches. FAULTS says how often each is done (2 unless told otherwise; 50 by
//! hand: `FAULTS=50 integration/test.sh -p integration --test faults`), SEED repeats a run.

use anyhow::{Context, Result, bail, ensure};
use integration::bed::{Bed, Census, Host};
use integration::pods::{ADDRESS, Client};
use integration::wait::{SOON, until_true};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
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

    fn number(&mut self) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 1) as usize
    }

    fn below(&mut self, limit: Duration) -> Duration {
        Duration::from_nanos(self.number() as u64 % limit.as_nanos().max(1) as u64)
    }
}

fn rounds() -> usize {
    std::env::var("FAULTS").ok().and_then(|text| text.parse().ok()).unwrap_or(2)
}

/// Whom to kill: which host it is on, and what its processes are called and were started as.
#[derive(Debug, Clone, Copy)]
struct Victim {
    at: At,
    comm: &'static str,
    line: &'static [&'static str],
}

#[derive(Debug, Clone, Copy)]
enum At {
    Source,
    Destination,
}

impl At {
    fn host(self, bed: &Bed) -> &Host {
        match self {
            At::Source => bed.a(),
            At::Destination => bed.b(),
        }
    }
}

impl Victim {
    /// Its processes now, as the machine numbers them: to be killed by exactly that number.
    fn find(self, bed: &Bed) -> Result<Vec<i32>> {
        let space = fs::read_link(format!("/proc/{}/ns/pid", self.at.host(bed).pid()?))?;
        let numbers =
            fs::read_dir("/proc")?.flatten().filter_map(|e| e.file_name().to_string_lossy().parse::<i32>().ok());
        Ok(numbers.filter(|pid| self.is(*pid, &space)).collect())
    }

    fn is(self, pid: i32, space: &Path) -> bool {
        let text = |name: &str| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
        let words: Vec<String> =
            text("cmdline").split(|b| *b == 0).map(|w| String::from_utf8_lossy(w).into()).collect();
        String::from_utf8_lossy(&text("comm")).trim() == self.comm
            && self.line.iter().all(|word| words.iter().any(|w| w == word))
            && fs::read_link(format!("/proc/{pid}/ns/pid")).is_ok_and(|own| own == space)
    }

    fn kill(self, bed: &Bed, pids: &[i32]) -> Result<usize> {
        let space = fs::read_link(format!("/proc/{}/ns/pid", self.at.host(bed).pid()?))?;
        let is_it = |pid: &&i32| self.is(**pid, &space);
        let killed = pids.iter().filter(is_it).filter(|pid| kill(Pid::from_raw(**pid), Signal::SIGKILL).is_ok());
        Ok(killed.count())
    }
}

const MIGRATE: Victim = Victim { at: At::Source, comm: "pod", line: &["migrate"] };
const SSH: Victim = Victim { at: At::Source, comm: "ssh", line: &["hostB"] };
const RECEIVE: Victim = Victim { at: At::Destination, comm: "pod", line: &["receive"] };
const MONITOR: Victim = Victim { at: At::Source, comm: "pod-monitor", line: &[] };
const NEW_MONITOR: Victim = Victim { at: At::Destination, comm: "pod-monitor", line: &[] };

/// When: somewhere in the whole, or this long after a host's journal says that a phase has begun. The short phases
/// would hardly be met by chance.
#[derive(Debug, Clone, Copy)]
struct Moment {
    phase: Option<(At, &'static str)>,
    then: Duration,
}

/// Every phase, with how long it lasts at most in a small move: one kind of moment each.
const PHASES: [(At, &str, Duration); 5] = [
    (At::Source, "copying", Duration::from_millis(300)),
    (At::Source, "frozen", Duration::from_millis(250)),
    (At::Source, "committing", Duration::from_millis(20)),
    (At::Destination, "running", Duration::from_millis(10)),
    (At::Source, "done", Duration::from_millis(30)),
];

impl Moment {
    /// The nth of a series: all kinds have their turn.
    fn nth(n: usize, dice: &mut Dice, whole: Duration) -> Moment {
        match n.checked_rem(PHASES.len() + 1).and_then(|kind| PHASES.get(kind)) {
            Some((at, phase, long)) => Moment { phase: Some((*at, phase)), then: dice.below(*long) },
            None => Moment { phase: None, then: dice.below(whole) },
        }
    }

    /// Returns when it has come, or when the move is over. `look` is called meanwhile.
    fn wait(self, bed: &Bed, over: &mut dyn FnMut() -> bool, look: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(30);
        while let Some((at, phase)) = self.phase
            && !in_phase(at.host(bed), phase)?
        {
            look()?;
            ensure!(Instant::now() < end, "phase {phase} never began");
            if over() {
                return Ok(());
            }
            std::thread::yield_now();
        }
        let end = Instant::now() + self.then;
        look()?;
        while Instant::now() < end && !over() {
            std::thread::sleep(Duration::from_micros(300).min(end.saturating_duration_since(Instant::now())));
        }
        Ok(())
    }
}

/// Whether a job on that host that is not over, or was over last, is in that phase.
fn in_phase(host: &Host, phase: &str) -> Result<bool> {
    let folder = host.root()?.join("var/lib/pod/jobs");
    let files = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut jobs = files.filter(|path| path.extension().is_some_and(|e| e == "json"));
    Ok(jobs.any(|path| fs::read_to_string(path).is_ok_and(|text| text.contains(&format!("\"phase\": \"{phase}\"")))))
}

/// The journals of moves before this one are not of this one.
fn forget_jobs(bed: &Bed) -> Result<()> {
    for host in [bed.a(), bed.b()] {
        let _ = fs::remove_dir_all(host.root()?.join("var/lib/pod/jobs"));
    }
    Ok(())
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

fn text(bytes: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(bytes)
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

/// Runs the `pod job resume ID` that was named, if one was.
fn resume(bed: &Bed, said: &str) -> Result<()> {
    let Some((_, job)) = said.split_once("pod job resume ") else { return Ok(()) };
    let id: String = job.chars().take_while(char::is_ascii_hexdigit).collect();
    bed.a().pod(&["job", "resume", &id]).map(drop)
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

fn clean(bed: &Bed, before: &[Census; 2]) -> Result<()> {
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

/// A command during which `harm` is done at some moment.
fn disturbed(
    bed: &Bed,
    args: &[&str],
    moment: Moment,
    look: &mut dyn FnMut() -> Result<()>,
    harm: impl FnOnce() -> Result<()>,
) -> Result<String> {
    let mut child = begin(bed.a(), args)?;
    moment.wait(bed, &mut || matches!(child.try_wait(), Ok(Some(_)) | Err(_)), look)?;
    harm()?;
    said(child)
}

/// How long an undisturbed move takes here and now.
fn usual(bed: &Bed) -> Result<Duration> {
    let client = start(bed)?;
    let begun = Instant::now();
    let said = said(begin(bed.a(), &MOVE)?)?;
    let took = begun.elapsed();
    ensure!(copies(bed)? == [0, 1], "an undisturbed move leaves {:?}: {said}", copies(bed)?);
    client.finish()?;
    Ok(took)
}

/// Kills `victim` at moments in all phases of a move, and looks at what is left. Where the pod stayed as it was, the
/// person tries again at once.
fn killed(victim: Victim) -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    let took = usual(&bed)?;
    clean(&bed, &before)?;
    let mut dice = Dice::new();
    let first = dice.number();
    for round in 1..=rounds() {
        forget_jobs(&bed)?;
        let moment = Moment::nth(first.wrapping_add(round), &mut dice, took);
        let client = start(&bed)?;
        let (found, killed) = (RefCell::new(Vec::new()), Cell::new(0));
        let mut look = || {
            // Only those that are not there yet: looking takes longer than a commit.
            if found.borrow().is_empty() {
                found.replace(victim.find(&bed)?);
            }
            Ok(())
        };
        let said = disturbed(&bed, &MOVE, moment, &mut look, || {
            if found.borrow().is_empty() {
                found.replace(victim.find(&bed)?);
            }
            killed.set(victim.kill(&bed, &found.borrow())?);
            Ok(())
        })?;
        let hits = killed.get();
        let at = exactly_one(&bed, &said).with_context(|| format!("round {round}, {hits} killed, {moment:?}"))?;
        let mut what = format!("round {round}: {hits} killed, {moment:?}, runs on {}", at.name());
        if at.name() == "hostA" && !bed.a().pod(&["ps"])?.contains("monitor lost") {
            bed.a().pod(&MOVE).with_context(|| format!("{what}; and then again"))?;
            ensure!(copies(&bed)? == [0, 1], "{what}, and after the next move {:?}", copies(&bed)?);
            what += ", moved then";
        }
        client.finish().with_context(|| what.clone())?;
        clean(&bed, &before).with_context(|| what.clone())?;
        println!("{what}");
    }
    Ok(())
}

#[test]
fn pod_migrate_is_killed() -> Result<()> {
    killed(MIGRATE)
}

#[test]
fn ssh_is_killed() -> Result<()> {
    killed(SSH)
}

#[test]
fn pod_receive_is_killed() -> Result<()> {
    killed(RECEIVE)
}

#[test]
fn the_monitor_is_killed() -> Result<()> {
    killed(MONITOR)
}

#[test]
fn the_new_monitor_is_killed() -> Result<()> {
    killed(NEW_MONITOR)
}

/// The far host is gone for a while. Once it is back, the next attempt must not wait for the patience of the last.
#[test]
fn the_cable_is_cut() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    let took = usual(&bed)?;
    clean(&bed, &before)?;
    let mut dice = Dice::new();
    let first = dice.number();
    for round in 1..=rounds() {
        forget_jobs(&bed)?;
        let moment = Moment::nth(first.wrapping_add(round), &mut dice, took);
        let client = start(&bed)?;
        let said = disturbed(&bed, &MOVE, moment, &mut || Ok(()), || bed.partition(bed.b()))?;
        bed.heal(bed.b())?;
        let at = exactly_one(&bed, &said).with_context(|| format!("round {round}, cut {moment:?}"))?;
        let mut what = format!("round {round}: cut {moment:?}, runs on {}", at.name());
        if at.name() == "hostA" {
            bed.a().pod(&MOVE).with_context(|| format!("{what}; and then again"))?;
            ensure!(copies(&bed)? == [0, 1], "{what}, and after the next move {:?}", copies(&bed)?);
            what += ", moved then";
        }
        client.finish().with_context(|| what.clone())?;
        clean(&bed, &before).with_context(|| what.clone())?;
        println!("{what}");
    }
    Ok(())
}

/// One goes through, the other is told that it is on its way.
#[test]
fn two_move_one_pod_at_once() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    for _ in 0..rounds().min(10) {
        let client = start(&bed)?;
        let children = [begin(bed.a(), &MOVE)?, begin(bed.a(), &MOVE)?];
        let said = children.into_iter().map(said).collect::<Result<Vec<_>>>()?;
        ensure!(copies(&bed)? == [0, 1], "copies: {:?}; {said:?}", copies(&bed)?);
        let refused = said.iter().filter(|said| said.contains("error[")).collect::<Vec<_>>();
        ensure!(refused.len() == 1 && (refused[0].contains("E-STATE") || refused[0].contains("E-MOVED")), "{said:?}");
        client.finish()?;
        clean(&bed, &before)?;
    }
    Ok(())
}

/// A checkpoint that is killed leaves the pod running, and no file or a whole one.
#[test]
fn pod_checkpoint_is_killed() -> Result<()> {
    const CREATE: [&str; 4] = ["checkpoint", "create", "redis", "saved"];
    let victim = Victim { at: At::Source, comm: "pod", line: &["checkpoint", "create"] };
    let bed = Bed::new()?;
    let before = bed.census()?;
    let client = start(&bed)?;
    let begun = Instant::now();
    bed.a().pod(&CREATE)?;
    let took = begun.elapsed();
    bed.a().pod(&["checkpoint", "rm", "saved"])?;
    let mut dice = Dice::new();
    for round in 1..=rounds() {
        let moment = Moment { phase: None, then: dice.below(took) };
        let said =
            disturbed(&bed, &CREATE, moment, &mut || Ok(()), || victim.kill(&bed, &victim.find(&bed)?).map(drop))?;
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
    const TOOL: Victim = Victim { at: At::Source, comm: "pod", line: &["checkpoint", "create"] };
    let bed = Bed::new()?;
    let before = bed.census()?;
    let mut missed = 0;
    for both in [false, true] {
        let client = start(&bed)?;
        let (monitors, network) = (MONITOR.find(&bed)?, bed.a().root()?.join("sys/class/net"));
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
                    tools = TOOL.find(&bed)?;
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
            TOOL.kill(&bed, &tools)?;
        }
        ensure!(MONITOR.kill(&bed, &monitors)? == 1, "the monitor was not there");
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
        Victim { at: At::Source, comm: "pod", line: &["restore", "saved"] },
        Victim { at: At::Source, comm: "pod-monitor", line: &["restore", "saved"] },
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
            let moment = Moment { phase: None, then: dice.below(took) };
            let victim = victims[dice.number() % 2];
            disturbed(&bed, &["restore", "saved"], moment, &mut || Ok(()), || {
                victim.kill(&bed, &victim.find(&bed)?).map(drop)
            })?;
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
