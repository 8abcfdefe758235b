//! `pod migrate`: a pod to another host, live.

use super::checkpoint::with_version;
use super::drain::{self, Many};
use super::{Context, Exit, options};
use crate::output;
use indicatif::{ProgressBar, ProgressStyle};
use pod_migrate::link::Interrupt;
use pod_migrate::link::dial::{Dial, Scheme, Target};
use pod_migrate::migrate::progress::{Event, Report, Step};
use pod_migrate::migrate::{self, Ended, Failure, Limits, Listener, journal};
use pod_migrate::rounds::{Estimate, OnStall};
use pod_runtime::store::Store;
use pod_runtime::{Problem, Result, when};
use serde_json::json;
use std::cell::RefCell;
use std::io::IsTerminal;
use std::rc::Rc;
use std::time::{Duration, Instant};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pod migrate web --to root@hostB
  pod migrate web --to hostB --dry-run
  pod migrate --all --to hostB,hostC -j 4     all pods that run here (see also: pod drain)

Exit codes: 0 moved; 10 the check found what stands against it; 11 the destination does not take it; 12 the transfer failed;
13 it could not be restored there; 14 nobody knows (pod job resume); 15 given up as asked. But for 14 the pod runs on here.")]
pub struct Args {
    /// The pod; several are moved as by `pod drain`
    #[arg(value_name = "POD", required_unless_present = "all", conflicts_with = "all")]
    pods: Vec<String>,
    /// All pods that run here
    #[arg(long)]
    all: bool,
    /// The host that it moves to, as ssh knows it; of several the one with most room
    #[arg(long, value_name = "[USER@]HOST[:PORT]", value_delimiter = ',', required = true)]
    to: Vec<String>,
    #[command(flatten)]
    many: Many,
    #[command(flatten)]
    how: How,
}

/// How a pod is moved, one or each of many.
#[derive(Debug, clap::Args)]
pub struct How {
    #[command(flatten)]
    pub reach: Reach,
    #[command(flatten)]
    pub tuning: Tuning,
    /// How to show what is going on
    #[arg(long, value_enum, default_value_t = Progress::Auto)]
    pub progress: Progress,
    /// Only say whether it would work
    #[arg(long)]
    pub dry_run: bool,
}

/// What the move may take.
#[derive(Debug, clap::Args)]
pub struct Tuning {
    /// How long the pod should stand still at most: its memory goes ahead until what is left takes a quarter of it
    #[arg(long, value_name = "TIME", default_value = "30ms", value_parser = time)]
    downtime: Duration,
    /// What to do when the pod writes its memory as fast as it is sent
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = Stall::Switch)]
    on_stall: Stall,
    /// Run it there at once; its memory comes when it is touched, and the rest behind it. If this host ends before all is there,
    /// the pod is lost
    #[arg(long, conflicts_with = "on_stall")]
    postcopy: bool,
    /// Give up when the move has not come to its commit by then; the pod runs on here
    #[arg(long, value_name = "TIME", value_parser = time)]
    timeout: Option<Duration>,
    /// Bytes a second at most while the pod runs, as in 100M; what is left when it stops goes as fast as it can
    #[arg(long, value_name = "BYTES", value_parser = bandwidth)]
    bandwidth: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Stall {
    /// Move it all the same; it stands still for longer
    Switch,
    /// Give it less CPU time, step by step, until its memory settles; the copy there has all of it
    Throttle,
    /// What is left of its memory comes when it runs there; if this host ends before all is there, the pod is lost
    Postcopy,
    /// Give up; it runs on here
    Abort,
}

impl Tuning {
    fn limits(&self) -> Limits {
        let on_stall = match self.on_stall {
            Stall::Switch => OnStall::Switch,
            Stall::Throttle => OnStall::Throttle,
            Stall::Postcopy => OnStall::Postcopy,
            Stall::Abort => OnStall::Abort,
        };
        Limits { downtime: self.downtime, on_stall, postcopy: self.postcopy, bandwidth: self.bandwidth }
    }

    /// As options, for another `pod migrate`.
    pub fn words(&self) -> Vec<String> {
        let time = |time: Duration| format!("{}ns", time.as_nanos());
        let on_stall = match self.on_stall {
            Stall::Switch => "switch",
            Stall::Throttle => "throttle",
            Stall::Postcopy => "postcopy",
            Stall::Abort => "abort",
        };
        let mut words: Vec<String> = ["--downtime", &time(self.downtime)].map(str::to_owned).into();
        match self.postcopy {
            true => words.push("--postcopy".to_owned()),
            false => words.extend(["--on-stall", on_stall].map(str::to_owned)),
        }
        words.extend(self.timeout.into_iter().flat_map(|limit| ["--timeout".to_owned(), time(limit)]));
        words.extend(self.bandwidth.into_iter().flat_map(|rate| ["--bandwidth".to_owned(), rate.to_string()]));
        words
    }
}

fn time(text: &str) -> Result<Duration, String> {
    let time = when::parse_duration(text).filter(|time| *time > 0);
    time.map(Duration::from_nanos).ok_or_else(|| "a time as in 300ms, 10s or 5m is due".to_owned())
}

/// With less than this a move takes days, and what is meant is mostly another unit.
const LEAST_BANDWIDTH: u64 = 64 << 10;

fn bandwidth(text: &str) -> Result<u64, String> {
    match options::size(text) {
        Ok(rate) if rate >= LEAST_BANDWIDTH => Ok(rate),
        Ok(_) => Err("at least 64K bytes a second are needed".to_owned()),
        Err(problem) => Err(problem.chain()),
    }
}

/// How to reach the other host.
#[derive(Debug, Clone, clap::Args)]
pub struct Reach {
    /// An option for ssh, as in ssh_config: Compression=yes
    #[arg(long = "ssh-option", value_name = "KEY=VALUE")]
    options: Vec<String>,
    /// The program on the other host
    #[arg(long, value_name = "PATH", default_value = "pod")]
    remote_pod: String,
    /// Send memory through ssh, or the daemon, too, also where the hosts reach each other without
    #[arg(long)]
    tunnelled: bool,
}

impl Reach {
    pub fn to(&self, to: &str, store: &Store) -> Result<Dial> {
        let target = Target::parse(to)?;
        if target.scheme == Scheme::Daemon && (!self.options.is_empty() || self.remote_pod != "pod") {
            return Err(Problem::new("E-USAGE", "--ssh-option and --remote-pod are for ssh, and a daemon is called")
                .fix("leave them out, or pod:// out"));
        }
        let (options, remote_pod) = (self.options.clone(), self.remote_pod.clone());
        Ok(Dial { target, options, remote_pod, tunnelled: self.tunnelled, store: store.clone() })
    }

    /// As options, for another `pod migrate`.
    pub fn words(&self) -> Vec<String> {
        let options = self.options.iter().flat_map(|option| ["--ssh-option", option]);
        let tunnelled = self.tunnelled.then_some("--tunnelled");
        ["--remote-pod", &self.remote_pod].into_iter().chain(options).chain(tunnelled).map(str::to_owned).collect()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Progress {
    /// A live line on a terminal, else plain
    Auto,
    /// A line a step
    Plain,
    /// A JSON object an event, on stderr
    Json,
    None,
}

pub fn run(args: Args, context: &Context) -> Result<Exit> {
    match (&args.pods[..], &args.to[..]) {
        ([pod], [to]) => one(pod, to, &args.how, context),
        (pods, to) => several(pods, to, &args, context),
    }
}

fn several(pods: &[String], to: &[String], args: &Args, context: &Context) -> Result<Exit> {
    let store = context.store()?;
    let pods = match args.all {
        true => migrate::drain::running(&store)?,
        false => pods.iter().map(|pod| store.pod(pod)).collect::<Result<_>>()?,
    };
    drain::all(&pods, &drain::Order { to, many: &args.many, how: &args.how, while_stdin: false }, context)
}

fn one(pod: &str, to: &str, how: &How, context: &Context) -> Result<Exit> {
    if how.dry_run {
        let check = super::check::Args::new(pod.to_owned(), to.to_owned(), how.reach.clone(), how.tuning.limits());
        return super::check::run(check, context);
    }
    let store = context.store()?;
    let pod = store.pod(pod)?;
    let dial = how.reach.to(to, &store)?;
    let interrupt = Interrupt::catch(how.tuning.timeout)?;
    let name = pod.name()?;
    let (listener, show) = show(how.progress, context.json);
    let moved = migrate::migrate(&store, &pod, &dial, how.tuning.limits(), &interrupt, listener);
    show.borrow_mut().end();
    if moved.is_ok() && interrupt.check().is_err() {
        output::say("too late to stop: the pod had moved already");
    }
    keep(&store, &moved, &show.borrow().told);
    match moved {
        Ok(report) if context.json => {
            let mut all = json!(report);
            all["migration"] = json!(report.migration());
            output::json(&with_version(all))?;
            Ok(Exit::OK)
        }
        Ok(report) => {
            output::data(&words(&report))?;
            Ok(Exit::OK)
        }
        Err(failure) => Ok(failed(&name, failure, context.json)),
    }
}

/// For `pod job log`: what was told, and how it ended.
fn keep(store: &Store, moved: &Result<Report, Failure>, told: &str) {
    let (job, mut lines) = match moved {
        Ok(report) => (Some(&report.job), words(report)),
        Err(failure) => {
            let problems = std::iter::once(&failure.problem).chain(&failure.more);
            let lines = problems.map(|problem| format!("{}: {}\n", problem.code(), problem.chain())).collect();
            (failure.job.as_ref(), lines)
        }
    };
    lines = lines.lines().map(stamped).collect();
    if let Some(job) = job
        && let Err(problem) = journal::keep_log(store, job, &format!("{told}{lines}"))
    {
        tracing::warn!("{}", problem.chain());
    }
}

fn stamped(line: &str) -> String {
    format!("{} {line}\n", when::rfc3339(when::now_ns()))
}

/// The exit code of a move that did not succeed.
pub fn exit_of(ended: Ended) -> i32 {
    match ended {
        Ended::Unbegun => 1,
        Ended::Blocked => 10,
        Ended::Refused => 11,
        Ended::TransferFailed => 12,
        Ended::RestoreFailed => 13,
        Ended::Unknown => 14,
        Ended::Aborted => 15,
    }
}

fn failed(name: &str, failure: Failure, as_json: bool) -> Exit {
    let first = with_version(json!({ "error": failure.problem.report(), "job": failure.job }));
    match as_json {
        true => output::say(first.to_string()),
        false => output::problem(&failure.problem, false),
    }
    for more in &failure.more {
        output::problem(more, as_json);
    }
    if !as_json {
        let runs = match failure.ended {
            Ended::Unknown => format!("{name} stands still here until {name}'s fate there is known"),
            Ended::Unbegun | Ended::Blocked => format!("{name} was not touched"),
            _ => format!("{name} runs on here"),
        };
        let job = failure.job.map_or_else(String::new, |job| format!(" (job {job})"));
        output::say(format!("{runs}{job}"));
    }
    let exit = match failure.ended {
        Ended::Unbegun => output::exit_code(&failure.problem),
        ended => exit_of(ended),
    };
    Exit(exit)
}

/// The six lines.
fn words(report: &Report) -> String {
    let retried = match report.connections_retried {
        0 => String::new(),
        n => format!(", {n} half-open left to the client's retransmission"),
    };
    let rounds = match report.rounds {
        0 => String::new(),
        1 => ", memory ahead in 1 pass".to_owned(),
        n => format!(", memory ahead in {n} passes"),
    };
    let mut text = format!(
        "{} moved to {} in {:.2} s, frozen {:.1} ms\n\
         memory and files  {} sent ({} raw){}\n\
         processes         {}\n\
         connections       {} kept, {} closed{}\n\
         files             {}, {}\n",
        report.pod,
        report.to,
        report.total_ms / 1e3,
        report.frozen_ms,
        output::size(report.bytes_sent),
        output::size(report.bytes_raw),
        rounds,
        report.processes,
        report.connections_kept,
        report.connections_closed,
        retried,
        report.files,
        output::size(report.file_bytes),
    );
    if report.bytes_behind > 0 {
        let (bytes, seconds) = (output::size(report.bytes_behind), report.behind_ms / 1e3);
        text.push_str(&format!("memory behind     {bytes}, there {seconds:.1} s after it ran\n"));
    }
    match report.warnings.is_empty() {
        true => text.push_str("warnings          none\n"),
        false => {
            report.warnings.iter().for_each(|w| text.push_str(&format!("warning           {}\n", output::harmless(w))))
        }
    }
    text
}

/// What shows a move.
struct Show {
    how: Progress,
    bar: Option<ProgressBar>,
    bytes: u64,
    began: Instant,
    said: Instant,
    step: Option<Step>,
    /// Every step with its time.
    told: String,
}

fn show(how: Progress, json: bool) -> (Listener, Rc<RefCell<Show>>) {
    let how = match how {
        Progress::Auto if json => Progress::None,
        Progress::Auto if !std::io::stderr().is_terminal() => Progress::Plain,
        other => other,
    };
    let bar = (how == Progress::Auto).then(|| {
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
            bar.set_style(style);
        }
        bar
    });
    let now = Instant::now();
    let show =
        Rc::new(RefCell::new(Show { how, bar, bytes: 0, began: now, said: now, step: None, told: String::new() }));
    let told = Rc::clone(&show);
    (Rc::new(RefCell::new(move |event: &Event| told.borrow_mut().event(event))), show)
}

pub fn named(step: Step, detail: &str) -> String {
    match step {
        Step::Connect => format!("connect to {detail}"),
        Step::Check => "check".to_owned(),
        Step::Reserve => format!("reserve on {detail}"),
        Step::Files => "files, while the pod runs".to_owned(),
        Step::Memory => "memory, while the pod runs".to_owned(),
        Step::Freeze => "freeze; what has changed, and the rest".to_owned(),
        Step::Commit => "commit".to_owned(),
        Step::Behind => format!("it runs there; {detail} of memory, behind it"),
    }
}

pub fn passed(pass: u32, bytes: u64, ms: f64, estimate: Option<Estimate>) -> String {
    let still = |estimate: Estimate| format!(", would stand still for {:.0} ms of memory", estimate.expected_ms);
    let expected = estimate.map(still).unwrap_or_default();
    format!("  pass {pass}: {} in {ms:.0} ms{expected}", output::size(bytes))
}

impl Show {
    fn event(&mut self, event: &Event) {
        match event {
            Event::Step { step, detail } => self.told.push_str(&stamped(&named(*step, detail))),
            Event::Pass { pass, bytes, ms, estimate } => {
                self.told.push_str(&stamped(&passed(*pass, *bytes, *ms, *estimate)));
            }
            Event::Stalled { text } | Event::Throttled { text, .. } | Event::Waiting { text } => {
                self.told.push_str(&stamped(text));
            }
            _ => {}
        }
        match (self.how, event) {
            (Progress::None, _) => {}
            (Progress::Json, Event::Sent { .. }) if self.said.elapsed() < Duration::from_millis(500) => {}
            (Progress::Json, event) => {
                self.said = Instant::now();
                output::say(json!(event).to_string());
            }
            (_, Event::Step { step, detail }) => self.step(*step, detail),
            (_, Event::Sent { bytes }) => {
                self.bytes += bytes;
                if self.said.elapsed() > Duration::from_millis(100) {
                    self.said = Instant::now();
                    self.line();
                }
            }
            (Progress::Plain, Event::Pass { pass, bytes, ms, estimate }) => {
                output::say(passed(*pass, *bytes, *ms, *estimate));
            }
            (_, Event::Pass { .. }) => self.line(),
            (_, Event::Stalled { text } | Event::Throttled { text, .. } | Event::Waiting { text }) => match &self.bar {
                Some(bar) => bar.println(text),
                None => output::say(text.clone()),
            },
            (_, Event::Warning { .. }) => {} // in the report
        }
    }

    fn step(&mut self, step: Step, detail: &str) {
        self.step = Some(step);
        let words = named(step, detail);
        match &self.bar {
            Some(bar) => bar.set_message(words),
            None => output::say(words),
        }
        self.line();
    }

    fn line(&self) {
        if let Some(bar) = &self.bar {
            let seconds = self.began.elapsed().as_secs_f64().max(0.001);
            let rate = output::size((self.bytes as f64 / seconds) as u64);
            let step = self.step.map_or_else(String::new, |s| format!("{s:?}").to_lowercase());
            bar.set_message(format!("{step:<8} {} sent, {rate}/s", output::size(self.bytes)));
            bar.tick();
        }
    }

    fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
