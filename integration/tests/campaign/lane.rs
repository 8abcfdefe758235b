//! Three hosts with one pod and one client that stays connected, and what is done to them in a round.

use super::draw::{Draw, Kind, Phase};
use super::harm::{self, Harm};
use super::tool::{Ended, Tool, Windows};
use anyhow::{Context, Result, bail, ensure};
use integration::bed::{Bed, Census, Host};
use integration::faults::{copies, resume, to_resume};
use integration::pods::{ADDRESS, Client};
use integration::wait::{SOON, until_true};
use serde_json::Value;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

pub const POD: &str = "redis";
/// The exit code that says: nobody knows.
const UNKNOWN: i32 = 14;
const PROGRAM: &str = "redis-server";
/// Where a host keeps its pods: a disk of its own, that can be full.
pub const STORE: &str = "/var/lib/pod";
/// How far the wall clock of a host is ahead, for who looks at it through `clock.c`.
pub const CLOCK: &str = "/run/clock-step";
/// Longer than a destination waits for a source that says nothing.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a round came to.
#[derive(Debug, Clone, Copy)]
pub struct Seen {
    pub moved: bool,
    /// Somebody had to type what `pod` had named.
    pub resumed: bool,
    /// Its monitor was lost, so another pod had to be begun.
    pub anew: bool,
    /// The fault came before the tool had ended.
    pub struck: bool,
    /// The phase that the move was in.
    pub met: Option<Phase>,
}

pub struct Lane {
    bed: Bed,
    before: Vec<Census>,
    client: Option<Client>,
    /// Which of the hosts has the pod.
    at: usize,
    windows: Windows,
    clocks: (PathBuf, PathBuf),
    /// How long it took the last time to do each kind of fault.
    leads: RefCell<BTreeMap<Kind, Duration>>,
    /// Jobs that were looked at.
    known: BTreeSet<String>,
    patient: bool,
}

/// How the tool ended, and a second one; what was done to it, whether it was, and in which phase.
type Disturbed = (Ended, Option<Ended>, String, bool, Option<Phase>);

/// The command line of a move.
pub fn moving<'a>(to: &'a Host, program: Option<&'a str>) -> Vec<&'a str> {
    let mut line = vec!["migrate", POD, "--to", to.name(), "--json", "--progress", "json"];
    line.extend(["--ssh-option", "ConnectTimeout=3"]);
    line.extend(program.into_iter().flat_map(|program| ["--remote-pod", program]));
    line
}

impl Lane {
    pub fn new(patient: bool) -> Result<Lane> {
        let bed = Bed::of_three()?;
        for host in bed.homes() {
            host.run(&["sh", "-c", &format!("mkdir -p {STORE} && mount -t tmpfs -o size=64m store {STORE}")])?;
            harm::set_clock(host, 0)?;
        }
        let clocks = harm::clocks(&bed)?;
        let before = bed.census()?;
        let (client, windows, known) = (None, Windows::default(), BTreeSet::new());
        let mut lane = Lane { bed, before, client, at: 0, windows, clocks, leads: RefCell::default(), known, patient };
        lane.begin()?;
        lane.move_on(1)?;
        Ok(lane)
    }

    fn host(&self, at: usize) -> &Host {
        &self.bed.homes()[at]
    }

    /// Redis, with so much memory that it goes ahead, and a client that loses nothing silently.
    fn begin(&mut self) -> Result<()> {
        let address = format!("{ADDRESS}/24");
        let run = ["run", "-d", "--name", POD, "--network", "bridge:br0", "--ip", &address, "--"];
        let server = [PROGRAM, "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", "--dir", "/tmp"];
        self.host(self.at).pod(&[&run[..], &server, &["--enable-debug-command", "yes"]].concat())?;
        until_true("redis to answer", SOON, || self.bed.client().reaches(ADDRESS, 6379))?;
        self.bed.client().run(&["redis-cli", "-h", ADDRESS, "debug", "populate", "32000", "filler", "1000"])?;
        self.client = Some(Client::start(&self.bed, &["redis", &format!("{ADDRESS}:6379"), "3", "1", "200", "1"])?);
        Ok(())
    }

    /// A move that nobody disturbs.
    fn move_on(&mut self, to: usize) -> Result<()> {
        let tool = Tool::start(self.host(self.at), &moving(self.host(to), None))?;
        let ended = tool.end(|| Ok(()))?;
        ensure!(ended.code == 0, "an undisturbed move ends with {}: {}", ended.code, ended.said);
        self.windows = Windows::of(&ended).with_context(|| format!("not all was told: {}", ended.all()))?;
        let from = std::mem::replace(&mut self.at, to);
        self.host(from).pod(&["rm", POD])?;
        self.one_runs_at(to)
    }

    /// One round.
    pub fn round(&mut self, draw: &Draw) -> Result<(Seen, String)> {
        let mut dice = draw.dice.clone();
        let from = self.at;
        let to = (from + 1 + dice.number() % 2) % 3;
        let hosts = [from, to, 3 - from - to].map(|at| self.host(at).clone());
        let [source, destination, _] = &hosts;
        let (ended, second, what, struck, met) = self.disturbed(draw, &hosts)?;
        let said = ended.iter_all(second.as_ref());
        let tell = || format!("exit {}, {what}; pod said:\n{said}", ended.code);
        let resumed = self.settle(source, &said).with_context(tell)?;
        let at = self.the_one().with_context(tell)?;
        honest(draw, &ended, second.as_ref(), [from, to], at).with_context(tell)?;
        self.check().with_context(tell)?;
        self.jobs_are_over().with_context(tell)?;
        self.at = at;
        let anew = self.states(at).with_context(tell)?;
        let (moved, outcome) = (at != from, if at == from { "stayed" } else { "moved" });
        if anew {
            // Whose monitor may be lost: it was killed, or the kernel gave it no more memory.
            let may = [Kind::KillMonitor, Kind::KillNewMonitor, Kind::ScarceThere];
            ensure!(may.contains(&draw.kind), "the monitor is lost; {}", tell());
            self.start_anew().with_context(tell)?;
        }
        // As somebody would: the same once more, or on from there.
        let next = if at == from { to } else { (at + 1 + dice.number() % 2) % 3 };
        self.move_on(next).with_context(|| format!("the next move, to {}; {}", self.host(next).name(), tell()))?;
        self.check().with_context(tell)?;
        self.jobs_are_over().with_context(tell)?;
        self.nothing_left().with_context(tell)?;
        let met_name = met.map_or("no phase", Phase::name);
        let notes = [(resumed, ", resumed"), (anew, ", monitor lost"), (!struck, ", too late")];
        let notes: String = notes.iter().filter(|(is, _)| *is).map(|(_, note)| *note).collect();
        let line = format!(
            "{}→{}: {what} in {met_name}; exit {}; {outcome}{notes}",
            source.name(),
            destination.name(),
            ended.code
        );
        Ok((Seen { moved, resumed, anew, struck, met }, line))
    }

    /// The move, to which the fault is done.
    fn disturbed(&self, draw: &Draw, hosts: &[Host; 3]) -> Result<Disturbed> {
        let [source, destination, other] = hosts;
        let (library, clocked) = (self.clocks.0.to_string_lossy(), self.clocks.1.to_string_lossy());
        let (source_there, program) = match draw.kind {
            Kind::Clock => (source.with("LD_PRELOAD", &library), Some(&*clocked)),
            _ => (source.clone(), None),
        };
        let harm = RefCell::new(Harm::new(&self.bed, draw, [source, destination, other], self.patient));
        let mut tool = Tool::start(&source_there, &moving(destination, program))?;
        let worked = (|| -> Result<Ended> {
            let mut struck = false;
            let lead = self.leads.borrow().get(&draw.kind).copied().unwrap_or_default();
            while !struck && !tool.over() {
                match self.windows.moment(&tool, draw.phase, draw.into, lead) {
                    Some(moment) if moment <= Instant::now() => {
                        let began = Instant::now();
                        struck = harm.borrow_mut().strike()?;
                        if struck {
                            self.leads.borrow_mut().insert(draw.kind, began.elapsed());
                        }
                    }
                    Some(moment) => {
                        harm.borrow_mut().look()?;
                        let left = moment.saturating_duration_since(Instant::now());
                        std::thread::sleep(left.min(Duration::from_micros(200)));
                    }
                    None => {
                        harm.borrow_mut().look()?;
                        std::thread::sleep(Duration::from_micros(200));
                    }
                }
            }
            let ended = tool.end(|| harm.borrow_mut().look_after())?;
            Ok(ended)
        })();
        let mut harm = harm.into_inner();
        let healed = harm.heal();
        let second = harm.second.take().map(|second| second.end(|| Ok(()))).transpose();
        let ended = worked?;
        healed?;
        let met = harm.at.and_then(|at| self.windows.met(&ended, at));
        let struck = harm.at.is_some();
        let what = if struck { harm.what } else { "nothing".to_owned() };
        Ok((ended, second?, what, struck, met))
    }

    /// What a person types next: what the tool has named, or `pod ps` on any of the hosts. Tells whether that was needed.
    fn settle(&self, source: &Host, said: &str) -> Result<bool> {
        let mut resumed = false;
        let named = |host: &Host, said: &str| -> Result<bool> {
            let Some(job) = to_resume(said) else { return Ok(false) };
            let mut last = Ok(false);
            until_true("the job to be settled", PATIENCE, || {
                last = resume(host, said);
                // Somebody else may be at it for a moment yet.
                !last.as_ref().is_err_and(|error| format!("{error:#}").contains("still being worked on"))
            })
            .with_context(|| format!("job {job}"))?;
            last
        };
        resumed |= named(source, said)?;
        for host in self.bed.homes() {
            let listed = host.output(&["pod", "ps"])?;
            let said = [&listed.stdout[..], &listed.stderr].map(String::from_utf8_lossy).concat();
            ensure!(listed.status.success(), "pod ps on {}: {said}", host.name());
            resumed |= named(host, &said)?;
        }
        Ok(resumed)
    }

    /// Waits until there is one copy and says where.
    fn the_one(&self) -> Result<usize> {
        let (mut last, mut asked) = (Vec::new(), Instant::now());
        until_true("exactly one copy", PATIENCE, || {
            // Each command of `pod` looks after what was left.
            if asked.elapsed() > Duration::from_secs(2) {
                let _ = self.bed.homes().iter().map(|host| host.pod(&["ps"])).collect::<Vec<_>>();
                asked = Instant::now();
            }
            last = copies(&self.bed, PROGRAM).unwrap_or_default();
            last.iter().sum::<usize>() == 1
        })
        .with_context(|| format!("copies: {last:?}"))?;
        last.iter().position(|copies| *copies == 1).context("one has the copy")
    }

    fn one_runs_at(&self, at: usize) -> Result<()> {
        let copies = copies(&self.bed, PROGRAM)?;
        ensure!(copies.iter().sum::<usize>() == 1 && copies[at] == 1, "copies: {copies:?}");
        Ok(())
    }

    /// The client has all that was acknowledged to it, over the connections that it always had.
    fn check(&mut self) -> Result<()> {
        self.client.as_mut().context("a lane has a client")?.check()
    }

    /// Runs by its own account here, and nowhere else; tombstones go. Tells whether its monitor is lost.
    fn states(&self, at: usize) -> Result<bool> {
        // A destination that hears late of the end may still be giving back.
        until_true("no pod to be on its way", PATIENCE, || {
            let on_its_way =
                |host: &Host| host.pod(&["ps", "-a", "--json"]).is_ok_and(|all| all.contains("\"creating\""));
            !self.bed.homes().iter().any(on_its_way)
        })?;
        let mut lost = false;
        for (index, host) in self.bed.homes().iter().enumerate() {
            let listed: Value = serde_json::from_str(&host.pod(&["ps", "-a", "--json"])?)?;
            for pod in listed["pods"].as_array().into_iter().flatten() {
                match (index == at, pod["state"].as_str()) {
                    (true, Some("running")) => lost = pod["monitor_lost"] == true,
                    (false, Some("moved")) => drop(host.pod(&["rm", POD])?),
                    (_, state) => bail!("on {} it is {state:?}, and its only copy on host {at}", host.name()),
                }
            }
        }
        let limits = limits_of_the_pod(self.host(at))?;
        ensure!(limits.iter().all(|limit| limit.contains("unlimited")), "its address space has a limit: {limits:?}");
        self.one_runs_at(at)?;
        Ok(lost)
    }

    /// A pod without a monitor cannot move, and says so.
    fn start_anew(&mut self) -> Result<()> {
        let (host, to) = (self.host(self.at), self.host((self.at + 1) % 3));
        let (code, said) = host.pod_fails(&["migrate", POD, "--to", to.name()])?;
        ensure!(code == 10 && said.contains("E-MONITOR"), "{code}: {said}");
        self.client.take().context("a lane has a client")?.finish()?;
        self.host(self.at).pod(&["rm", "-f", POD])?;
        self.begin()
    }

    /// Every job is over on either side, and both say the same.
    fn jobs_are_over(&mut self) -> Result<()> {
        let mut phases = BTreeMap::new();
        let mut wrong = String::new();
        until_true("all jobs to be over", PATIENCE, || {
            wrong.clear();
            match self.new_jobs() {
                Ok(jobs) => phases = jobs,
                Err(error) => wrong = format!("{error:#}"),
            }
            for (job, phases) in &phases {
                let sides: Vec<&str> = phases.iter().map(String::as_str).collect();
                let good = matches!(
                    sides.as_slice(),
                    ["aborted"] | ["aborted", "aborted"] | ["done", "running"] | ["running", "done"]
                );
                if !good {
                    wrong += &format!("job {job} is {sides:?}; ");
                }
            }
            wrong.is_empty()
        })
        .with_context(|| wrong.clone())?;
        self.known.extend(phases.into_keys());
        Ok(())
    }

    fn new_jobs(&self) -> Result<BTreeMap<String, Vec<String>>> {
        let mut phases: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for host in self.bed.homes() {
            for entry in fs::read_dir(host.root()?.join(&STORE[1..]).join("jobs")).into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                // What was never an entry goes when the next job begins.
                let written = name.strip_prefix('.').and_then(|name| name.split_once(".json")).map(|(id, _)| id);
                let left = written.is_some_and(|id| entry.path().with_file_name(format!("{id}.json")).exists());
                ensure!(!left, "on {} {name} was left", host.name());
                let Some(id) = name.strip_suffix(".json").filter(|id| !self.known.contains(*id)) else { continue };
                let job: Value = serde_json::from_str(&fs::read_to_string(entry.path())?)?;
                phases.entry(id.to_owned()).or_default().push(job["phase"].as_str().unwrap_or_default().to_owned());
            }
        }
        Ok(phases)
    }

    /// Where the pod is not, everything is as it was before it had been there.
    fn nothing_left(&self) -> Result<()> {
        for (index, (host, before)) in self.bed.homes().iter().zip(&self.before).enumerate() {
            if index != self.at {
                let left = before.settled(host, PATIENCE)?;
                ensure!(left.is_empty(), "left on {}:\n{}", host.name(), left.join("\n"));
            }
        }
        Ok(())
    }

    /// For whoever has to find out what happened.
    pub fn scene(&self) -> String {
        let mut scene = format!("copies: {:?}\n", copies(&self.bed, PROGRAM));
        let look = "pod ps -a; pod job ls; ps axo pid,ppid,stat,comm,args; cd /var/lib/pod; tail -n 40 pods/*/monitor.log; \
                    tail -n 6 events.jsonl; for j in $(ls -t jobs/*.json | head -4); do echo $j; cat $j; done; cat network/leases.json";
        for host in self.bed.homes() {
            let output = host.output(&["timeout", "20", "sh", "-c", look]);
            let text = output.map_or_else(
                |error| format!("{error:#}"),
                |output| [&output.stdout[..], &output.stderr].map(String::from_utf8_lossy).concat(),
            );
            scene += &format!("--- {}\n{text}\n", host.name());
        }
        scene
    }

    /// Nothing at all is left of it.
    pub fn end(mut self) -> Result<()> {
        let summary = self.client.take().context("a lane has a client")?.finish()?;
        self.host(self.at).pod(&["rm", "-f", POD])?;
        self.bed.nothing_left(&self.before)?;
        println!("a lane ends; its last client: {}", summary.text.lines().rev().take(4).collect::<Vec<_>>().join(", "));
        Ok(())
    }
}

impl Ended {
    fn iter_all(&self, second: Option<&Ended>) -> String {
        let second = second.map(|second| format!("the second tool, exit {}: {}", second.code, second.all()));
        format!("{}{}", self.all(), second.unwrap_or_default())
    }
}

/// A tool says what is so: it moved, or it runs on here, or nobody knows.
fn honest(draw: &Draw, ended: &Ended, second: Option<&Ended>, [from, to]: [usize; 2], at: usize) -> Result<()> {
    let tools = [(Some(ended), to), (second, if draw.kind == Kind::TwiceSame { to } else { 3 - from - to })];
    let tools: Vec<(&Ended, usize)> = tools.into_iter().filter_map(|(tool, to)| Some((tool?, to))).collect();
    let moved: Vec<usize> = tools.iter().filter(|(tool, _)| tool.code == 0).map(|(_, to)| *to).collect();
    ensure!(moved.is_empty() || moved == [at], "said to have moved to host {moved:?}, and runs on host {at}");
    for (tool, _) in &tools {
        let killed = tool.code >= 128 || matches!(draw.kind, Kind::ScarceHere);
        ensure!(killed || (0..16).contains(&tool.code), "exit code {}", tool.code);
        ensure!(killed || tool.code == 0 || tool.all().contains("\"E-"), "an error without a code");
        ensure!(draw.kind == Kind::ScarceHere || !tool.all().contains("panicked"), "a panic");
    }
    let all_stayed = tools.iter().all(|(tool, _)| (1..16).contains(&tool.code) && tool.code != UNKNOWN);
    ensure!(!all_stayed || at == from, "said to run on, and runs on host {at}");
    if second.is_some() {
        ensure!(moved.len() == 1, "of two tools that nothing disturbed {} moved it", moved.len());
    }
    Ok(())
}

/// What the kernel says of the address space of the pod's server.
fn limits_of_the_pod(host: &Host) -> Result<Vec<String>> {
    let proc = fs::read_dir(host.root()?.join("proc"))?.flatten().map(|entry| entry.path());
    let servers = proc.filter(|path| fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.trim() == PROGRAM));
    let limits = servers.filter_map(|path| fs::read_to_string(path.join("limits")).ok());
    let line = |text: String| text.lines().find(|line| line.starts_with("Max address space")).map(str::to_owned);
    Ok(limits.filter_map(line).collect())
}
