//! The source of a move: `pod migrate`.
//!
//! `Connected → Reserved → Copied → Frozen → Sent → committed`: each phase is a struct that owns what must be undone,
//! each step takes the phase and gives the next. A step that fails drops its phase, which leaves the pod running here
//! as if nothing had happened; only [`Sent::commit`] can end otherwise, and says so.

// A failure is made once a move, and read by a person.
#![allow(clippy::result_large_err)]

use super::commit::{Said, commit};
use super::following;
use super::inquiry::{Met, connect_as};
use super::journal::{self, Job, Journal, Phase, Role};
use super::offer;
use super::progress::{Event, Part, Report, Step};
use super::protocol::{Answer, Arrival, CHANGES, FOLLOWS, Hello, KNOCKS, Offer, Purpose, SETTLED, SHARES, STOPS, Say};
use super::throttling::{self, Throttling};
use super::way::{self, Transport};
use super::{repair, turn};
use crate::capture::{Capture, Captured, NotStopped, Still};
use crate::image::Kind;
use crate::laps::{self, lap};
use crate::link::dial::{Dial, Remote};
use crate::link::{ABORTED, Interrupt, LINK, Link, PROTOCOL, TIMEOUT, hear};
use crate::objects::memory::tracking::{LEAST_TO_SEND, Pass};
use crate::rounds::{DOWNTIME, Next, OnStall, Rounds, STALL};
use crate::watchdog::Watchdog;
use pod_runtime::problem::Report as ProblemReport;
use pod_runtime::status::{ProcessKey, now};
use pod_runtime::store::{Pod, Store, new_id};
use pod_runtime::{Problem, Result};
use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Where a move ended that did not succeed: what a script needs to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Something else went wrong before anything was begun.
    Unbegun,
    /// The check found what stands against it; the pod was not touched.
    Blocked,
    /// The destination does not take it.
    Refused,
    /// The transfer failed; the pod runs on here.
    TransferFailed,
    /// It could not be restored there; the pod runs on here.
    RestoreFailed,
    /// Nobody knows: the copy here stays frozen until the destination can be asked.
    Unknown,
    /// As asked; the pod runs on here.
    Aborted,
}

/// A move that did not succeed.
#[derive(Debug)]
pub struct Failure {
    pub ended: Ended,
    pub problem: Problem,
    /// What else stands against it.
    pub more: Vec<Problem>,
    pub job: Option<String>,
}

impl Failure {
    fn new(ended: Ended, problem: Problem) -> Failure {
        let ended = if [ABORTED, TIMEOUT, STALL].contains(&problem.code()) { Ended::Aborted } else { ended };
        Failure { ended, problem, more: Vec::new(), job: None }
    }

    fn several(ended: Ended, mut problems: Vec<Problem>) -> Failure {
        let problem = problems.remove(0);
        Failure { more: problems, ..Failure::new(ended, problem) }
    }
}

/// What a move may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// How long the pod should stand still at most.
    pub downtime: Duration,
    pub on_stall: OnStall,
    /// The pod stands still at once, and its memory comes when it runs there.
    pub postcopy: bool,
    /// Bytes a second on the link while the pod runs. What is left goes as fast as it can: the pod stands still for it.
    pub bandwidth: Option<u64>,
}

impl Limits {
    /// Whether memory may come when the pod runs there.
    fn may_follow(&self) -> bool {
        self.postcopy || self.on_stall == OnStall::Postcopy
    }
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { downtime: DOWNTIME, on_stall: OnStall::default(), postcopy: false, bandwidth: None }
    }
}

/// Told what is going on.
pub type Listener = Rc<RefCell<dyn FnMut(&Event)>>;

/// Moves a pod. `to` is what the tombstone says.
pub fn migrate(
    store: &Store,
    pod: &Pod,
    dial: &Dial,
    limits: Limits,
    interrupt: &Interrupt,
    listener: Listener,
) -> Result<Report, Failure> {
    let began = Instant::now();
    let tell = |step, detail: String| (listener.borrow_mut())(&Event::Step { step, detail });
    tell(Step::Check, String::new());
    let capture = turn::take(store, pod, interrupt, &listener).map_err(|p| Failure::new(Ended::Unbegun, p))?;
    let blockers = offer::blockers(pod).map_err(|p| Failure::new(Ended::Unbegun, p))?;
    if !blockers.is_empty() {
        return Err(Failure::several(Ended::Blocked, blockers));
    }
    let downgrades = offer::downgrades(pod).unwrap_or_default();
    tell(Step::Connect, dial.target.host.clone());
    let connected = Connected::new(store, dial, interrupt).map_err(|p| Failure::new(Ended::TransferFailed, p))?;
    tell(Step::Reserve, connected.peer.hello.host.clone());
    let reserved = connected.reserve(store, pod, dial, capture, limits)?;
    let job = reserved.journal.job.id.clone();
    let setup = began.elapsed();
    tell(Step::Files, String::new());
    let result = reserved.copy(pod, &listener).and_then(|copied| copied.memory(&listener)).and_then(|copied| {
        tell(Step::Freeze, String::new());
        copied.freeze()
    });
    let result = result.and_then(|frozen| {
        let sent = frozen.send()?;
        tell(Step::Commit, String::new());
        sent.commit(store, pod, dial, &listener)
    });
    let mut report = result.map_err(|failure| Failure { job: Some(job.clone()), ..failure })?;
    // The dump names some of them too, and then as they were in the end.
    let named = |problem: &&Problem| !report.warnings.iter().any(|warning| warning.starts_with(problem.code()));
    let more: Vec<&Problem> = downgrades.iter().filter(named).collect();
    report.warnings.extend(more.iter().map(|problem| format!("{}: {}", problem.code(), problem.chain())));
    (report.total_ms, report.setup_ms) = (began.elapsed().as_secs_f64() * 1e3, setup.as_secs_f64() * 1e3);
    for text in &report.warnings {
        (listener.borrow_mut())(&Event::Warning { text: text.clone() });
    }
    Ok(report)
}

// The fields of each phase are in the order in which they are let go: the pod, the link, then what carries it.

/// The far side answers.
struct Connected {
    link: Link,
    remote: Remote,
    peer: Met,
    /// How what is sent gets there, and what should be known of that.
    way: (Transport, Option<String>),
    job: String,
}

/// The far side holds name, address and ports for us.
struct Reserved {
    capture: Capture,
    link: Link,
    remote: Remote,
    transport: Transport,
    journal: Journal,
    warnings: Vec<String>,
    limits: Limits,
    /// Bytes of memory, as they were offered.
    memory: u64,
}

/// The pod runs; its files are there as they were a moment ago, and then its memory.
struct Copied {
    /// The first to be let go: the pod has all of its CPU time again.
    throttling: Throttling,
    reserved: Reserved,
    rounds: Rounds,
}

/// The pod is held still.
struct Frozen {
    still: Still,
    watchdog: Watchdog,
    link: Link,
    remote: Remote,
    journal: Journal,
    warnings: Vec<String>,
    /// What is known by now.
    report: Report,
    /// Of the link, for what comes behind.
    bandwidth: Option<u64>,
}

/// Everything is there, and READY was said.
struct Sent {
    still: Still,
    link: Link,
    /// ssh ends with it.
    _remote: Remote,
    journal: Journal,
    report: Report,
    bandwidth: Option<u64>,
    /// When that was.
    ready: Instant,
}

impl Connected {
    fn new(store: &Store, dial: &Dial, interrupt: &Interrupt) -> Result<Connected> {
        let job = new_id()?[..8].to_owned();
        let settled = journal::settled(store, &dial.target.host);
        let hello = Hello { settled: settled.clone(), ..Hello::new(Purpose::Move { job: job.clone() }) };
        let (remote, mut link, peer) = connect_as(dial, hello, Some(interrupt.clone()))?;
        if link.protocol >= SETTLED {
            journal::known(store, &settled, |_| true);
        }
        let way = if dial.tunnelled {
            (dial.target.scheme.into(), None)
        } else {
            way::seek(&mut link, dial.target.scheme, &peer.hello.host)?
        };
        Ok(Connected { remote, link, peer, way, job })
    }

    fn reserve(
        mut self,
        store: &Store,
        pod: &Pod,
        dial: &Dial,
        capture: Capture,
        limits: Limits,
    ) -> Result<Reserved, Failure> {
        let failed = |p| Failure::new(Ended::TransferFailed, p);
        let behind = limits.may_follow();
        if behind && self.link.protocol < FOLLOWS {
            return Err(Failure::new(Ended::Refused, too_old(&self.peer.hello.host)));
        }
        let offer = offer::offer(pod).map_err(|p| Failure::new(Ended::Unbegun, p))?;
        let offer = Offer { behind, ..offer };
        let memory = offer.memory;
        self.link.say(&Say::Offer(Box::new(offer))).map_err(failed)?;
        let mut warnings = match self.link.hear().map_err(failed)? {
            Answer::Reserved { warnings } => warnings,
            Answer::Refused(reports) if !reports.is_empty() => {
                return Err(Failure::several(Ended::Refused, reports.into_iter().map(Problem::from).collect()));
            }
            _ => return Err(failed(Problem::new(PROTOCOL, "the answer to the offer was something else"))),
        };
        warnings.extend(self.peer.skew());
        let (transport, tunnelled) = self.way;
        warnings.extend(tunnelled);
        let journal = Journal::begin(store, job(&self.job, pod, capture.spec().name.clone(), dial).map_err(failed)?);
        let Connected { remote, link, .. } = self;
        Ok(Reserved { remote, link, transport, capture, journal: journal.map_err(failed)?, warnings, limits, memory })
    }
}

fn too_old(host: &str) -> Problem {
    Problem::new(PROTOCOL, format!("pod on {host} is of a version that takes no memory behind a pod"))
        .fix("install this version there, or leave --postcopy (or --on-stall postcopy) out")
}

fn job(id: &str, pod: &Pod, name: String, dial: &Dial) -> Result<Job> {
    Ok(Job {
        id: id.to_owned(),
        role: Role::Source,
        pod: pod.id().to_owned(),
        name,
        peer: dial.target.host.clone(),
        port: dial.target.port,
        scheme: dial.target.scheme,
        behind: false,
        ssh_options: dial.options.clone(),
        remote_pod: Some(dial.remote_pod.clone()),
        phase: Phase::Copying,
        tool: ProcessKey::myself()?,
        receiver: None,
        started: now(),
        updated: now(),
        problem: None,
        known: false,
    })
}

impl Reserved {
    fn copy(mut self, pod: &Pod, listener: &Listener) -> Result<Copied, Failure> {
        let (listener, limits) = (Rc::clone(listener), self.limits);
        let watched = self.link.writer.sink().map(|sink| {
            sink.watch(move |bytes| {
                Watchdog::fed();
                (listener.borrow_mut())(&Event::Sent { bytes });
            });
            sink.pace(limits.bandwidth);
        });
        if self.link.protocol >= CHANGES {
            self.capture.to_a_host(self.link.protocol >= SHARES);
        }
        let sent = watched.and_then(|()| self.capture.first_pass(&mut self.link.writer));
        match sent.and_then(|()| self.link.writer.flush()) {
            Ok(()) => {
                let rounds = Rounds::new(limits.downtime, limits.on_stall);
                Ok(Copied { throttling: Throttling::begin(pod), reserved: self, rounds })
            }
            Err(problem) => Err(broken(problem, &mut self.link, &mut self.journal, &self.remote)),
        }
    }
}

impl Copied {
    /// Memory, while the pod runs on.
    fn memory(mut self, listener: &Listener) -> Result<Copied, Failure> {
        (listener.borrow_mut())(&Event::Step { step: Step::Memory, detail: String::new() });
        let Copied { throttling, reserved, rounds } = &mut self;
        let Reserved { capture, link, journal, remote, warnings, limits, .. } = reserved;
        let mut long = |what: String| {
            (listener.borrow_mut())(&Event::Stalled { text: what.clone() });
            warnings.push(what);
            Ok(false)
        };
        let mut follow = None;
        let again = |pass: Pass| {
            Watchdog::fed();
            let next = rounds.judge(pass);
            let (ms, estimate) = (pass.took.as_secs_f64() * 1e3, rounds.estimate());
            (listener.borrow_mut())(&Event::Pass { pass: rounds.done(), bytes: pass.written, ms, estimate });
            match next? {
                Next::Again => Ok(true),
                Next::Enough => Ok(false),
                Next::Throttle(what) => match throttling.step() {
                    Ok(Some(percentage)) => {
                        rounds.slowed();
                        let text = throttling::slower(&what, percentage);
                        (listener.borrow_mut())(&Event::Throttled { percentage, text });
                        Ok(true)
                    }
                    Ok(None) if rounds.still_pay() => Ok(true),
                    no_less => long(format!("{what}, {}", throttling::no_slower(no_less.err()))),
                },
                Next::Long(what) => long(what),
                Next::Follow(what) => {
                    follow = Some(what);
                    Ok(false)
                }
            }
        };
        let ahead = match limits.postcopy {
            true => capture.watch_memory_that_follows(&mut link.writer, LEAST_TO_SEND),
            false => capture.memory_ahead(&mut link.writer, LEAST_TO_SEND, again),
        };
        if let Some(text) = follow {
            (listener.borrow_mut())(&Event::Stalled { text: text.clone() });
            warnings.push(text);
            capture.follow();
        }
        let problem = match ahead {
            Ok(_) => return Ok(self),
            Err(problem) => problem,
        };
        // Before the other side is told, which may take its time.
        throttling.lift();
        match is_the_links(&problem) {
            true => Err(broken(problem, link, journal, remote)),
            false => Err(gave_up(problem, link, journal)),
        }
    }

    fn freeze(self) -> Result<Frozen, Failure> {
        let Copied { throttling, reserved, rounds } = self;
        let Reserved { remote, mut link, transport, capture, mut journal, mut warnings, memory, limits } = reserved;
        let (throttle, throttled) = throttling.end();
        let mut report = Report {
            transport,
            rounds: rounds.done(),
            estimate: rounds.estimate(),
            bytes_memory: memory,
            bytes_ahead: link.writer.bytes(),
            ..Report::default()
        };
        let watchdog = Watchdog::start();
        let full_speed = link.writer.sink().map(|sink| sink.pace(None));
        let still = full_speed.and_then(|_| journal.phase(Phase::Frozen)).and_then(|()| capture.freeze(true, throttle));
        match still {
            Ok(still) => {
                report.throttled = throttled(still.since());
                warnings.extend(report.throttled.iter().map(throttling::told));
                Ok(Frozen { still, watchdog, link, remote, journal, warnings, report, bandwidth: limits.bandwidth })
            }
            Err(problem) => Err(gave_up(problem, &mut link, &mut journal)),
        }
    }
}

impl Frozen {
    fn send(mut self) -> Result<Sent, Failure> {
        let mut failed = None;
        let mut parts = Parts::since(self.still.since());
        laps::begin(self.still.since());
        lap("stop");
        // Its answer is waited for later, when there is nothing else to be done.
        let said = if self.link.protocol >= STOPS { self.link.say(&Say::Stopped) } else { Ok(()) };
        let reader = &mut self.link.reader;
        let holding = || {
            parts.end("files");
            let held = match hear(reader)? {
                Answer::Holding => Ok(()),
                Answer::Failed(report) => {
                    failed = Some(report.clone());
                    Err(report.into())
                }
                _ => Err(Problem::new(PROTOCOL, "something else came where HOLDING was due")),
            };
            parts.end("hold");
            held
        };
        let writer = &mut self.link.writer;
        let dumped = said.and_then(|()| self.still.dump(writer, holding));
        if let Some(report) = failed {
            drop(self.still);
            return Err(not_restored(report, &mut self.journal));
        }
        let captured = match dumped {
            Ok(captured) => captured,
            // Ours: the destination is told, so that it need not wait for its silence to end.
            Err(problem) if !is_the_links(&problem) => {
                drop(self.still);
                return Err(gave_up(problem, &mut self.link, &mut self.journal));
            }
            Err(problem) => {
                drop(self.still);
                return Err(broken(problem, &mut self.link, &mut self.journal, &self.remote));
            }
        };
        parts.end("dump");
        let ready = self.ready();
        parts.end("restore");
        lap("wait for the restore");
        let arrival = match ready {
            Ok(Answer::Ready(arrival)) => arrival,
            other => {
                drop(self.still);
                let problem = match other {
                    Ok(Answer::Failed(report)) => return Err(not_restored(report, &mut self.journal)),
                    Ok(_) => Problem::new(PROTOCOL, "something else came where READY was due"),
                    Err(problem) => problem,
                };
                return Err(broken(problem, &mut self.link, &mut self.journal, &self.remote));
            }
        };
        let report = self.report(captured, arrival, parts.done);
        let Frozen { still, watchdog, link, remote, journal, bandwidth, .. } = self;
        // What comes now outlives us on purpose.
        drop(watchdog);
        Ok(Sent { still, link, _remote: remote, journal, report, bandwidth, ready: parts.last })
    }

    /// Says that everything was sent, and hears what has become of it there.
    fn ready(&mut self) -> Result<Answer> {
        let knocks = if self.link.protocol >= KNOCKS { self.still.knocks() } else { Vec::new() };
        if !knocks.is_empty() {
            self.link.writer.put(Kind::MESSAGE, 0, &Say::Knocks(knocks))?;
        }
        self.link.say(&Say::Sent)?;
        self.link.hear()
    }

    /// What is known when it stands ready there.
    fn report(&mut self, captured: Captured, arrival: Arrival, frozen: Vec<Part>) -> Report {
        let Captured { dump, files, connections } = captured;
        let mut warnings = std::mem::take(&mut self.warnings);
        warnings.extend(dump.warnings);
        warnings.extend(arrival.warnings);
        Report {
            job: self.journal.job.id.clone(),
            pod: self.journal.job.name.clone(),
            to: self.journal.job.peer.clone(),
            bytes_sent: self.link.writer.bytes(),
            bytes_raw: self.link.writer.raw_bytes(),
            connections_kept: connections.kept,
            connections_closed: connections.closed,
            connections_retried: connections.retried,
            bytes_behind: dump.follows,
            processes: dump.processes,
            files: files.files,
            file_bytes: files.bytes,
            warnings,
            frozen,
            laps_there: arrival.laps,
            ..std::mem::take(&mut self.report)
        }
    }
}

impl Sent {
    /// It runs there. What it does not have yet is brought, and then the copy here is buried.
    fn follow(mut self, store: &Store, pod: &Pod, dial: &Dial, listener: &Listener) -> Result<Report, Failure> {
        let (job, to, began) = (&self.journal.job.id, &self.journal.job.peer, self.journal.job.started);
        let tell = |event: &Event| (listener.borrow_mut())(event);
        tell(&Event::Step { step: Step::Behind, detail: format!("{} MiB", self.report.bytes_behind >> 20) });
        let since = Instant::now();
        let brought = following::bring(Some(self.link), pod, dial, job, self.bandwidth);
        let brought = brought.map_err(|problem| Failure::new(Ended::Unknown, following::unfinished(problem, job, to)));
        match brought {
            Ok(bytes) => {
                self.report.bytes_behind = bytes;
                self.report.behind_ms = since.elapsed().as_secs_f64() * 1e3;
                let (job, to) = (job.clone(), to.clone());
                let bury = || self.still.moved(&job, began, &to);
                finish(store, pod, &mut self.journal, &mut self.report, bury);
                Ok(self.report)
            }
            Err(failure) => {
                // It stands still by its cgroup, and somebody returns to it.
                self.still.leave();
                Err(failure)
            }
        }
    }

    fn commit(mut self, store: &Store, pod: &Pod, dial: &Dial, listener: &Listener) -> Result<Report, Failure> {
        let since = self.still.since();
        let job = self.journal.job.id.clone();
        let to = self.journal.job.peer.clone();
        if let Err(not_stopped) = self.still.stop_for_good(&job) {
            let NotStopped { problem, held } = *not_stopped;
            drop(self.still);
            return Err(match held {
                None => gave_up(problem, &mut self.link, &mut self.journal),
                Some(held) => still_held(held, &job),
            });
        }
        lap("stop for good");
        // Whoever asks what became of it has to know that the copy here is still needed.
        self.journal.job.behind = self.report.bytes_behind > 0;
        let said = match commit(&mut self.link, &mut self.journal) {
            Ok(said) => said,
            Err(problem) => {
                return Err(match self.still.resume(&job) {
                    Ok(()) => gave_up(problem, &mut self.link, &mut self.journal),
                    Err(held) => still_held(held, &job),
                });
            }
        };
        match said {
            Said::Runs(arrival) => {
                self.report.stood_still(since.elapsed(), self.ready.elapsed());
                lap("wait for the commit");
                self.report.laps_here = laps::take();
                self.report.laps_there.extend(arrival.laps);
                if self.journal.job.behind {
                    return self.follow(store, pod, dial, listener);
                }
                let began = self.journal.job.started;
                let bury = || self.still.moved(&job, began, &to);
                finish(store, pod, &mut self.journal, &mut self.report, bury);
                Ok(self.report)
            }
            Said::Refused(problem) => match self.still.resume(&job) {
                Ok(()) => {
                    let _ = self.journal.aborted(&problem);
                    Err(Failure::new(Ended::RestoreFailed, problem))
                }
                Err(held) => Err(still_held(held, &job)),
            },
            Said::Unknown(problem) => {
                // Stays frozen by its cgroup and off the network.
                self.still.leave();
                match repair::settle(store, Some(pod), dial, &mut self.journal) {
                    Ok(true) => {
                        self.report.stood_still(since.elapsed(), self.ready.elapsed());
                        self.report.warnings.push("the answer to the commit was lost and had to be asked for".into());
                        Ok(self.report)
                    }
                    Ok(false) => Err(Failure::new(Ended::TransferFailed, problem)),
                    // It runs there, and that is known.
                    Err(behind) if behind.code() == following::BEHIND => Err(Failure::new(Ended::Unknown, behind)),
                    Err(_) => Err(Failure::new(Ended::Unknown, unknown(problem, &job, &to))),
                }
            }
        }
    }
}

/// The move did not happen, and the copy here could not be let go, or that could not be written down. The job stays open, so that
/// somebody returns to it.
fn still_held(problem: Problem, job: &str) -> Failure {
    let held = Problem::new("E-UNKNOWN", "the pod did not move, and could not be let go on here as it was")
        .because(problem)
        .fix(format!("when what stands against that is gone: pod job resume {job}"));
    Failure::new(Ended::Unknown, held)
}

fn unknown(problem: Problem, job: &str, to: &str) -> Problem {
    let what =
        format!("the connection to {to} broke in the commit: the pod runs there or stands still here, never both");
    Problem::new("E-UNKNOWN", what)
        .because(problem)
        .fix(format!("when {to} can be reached again: pod job resume {job}"))
}

/// What the time went to for which the pod stood still.
struct Parts {
    last: Instant,
    done: Vec<Part>,
}

impl Parts {
    fn since(last: Instant) -> Parts {
        Parts { last, done: Vec::new() }
    }

    fn end(&mut self, part: &'static str) {
        let now = Instant::now();
        self.done.push(Part { part, ms: (now - self.last).as_secs_f64() * 1e3 });
        self.last = now;
    }
}

/// The destination runs it: what is left here goes. Where it does not, the job stays open, so that somebody returns to it.
fn finish(store: &Store, pod: &Pod, journal: &mut Journal, report: &mut Report, bury: impl FnOnce() -> Result<()>) {
    if let Ok(spec) = pod.spec() {
        let _ = crate::storage::volumes::remember(store, &spec);
    }
    if let Err(problem) = bury() {
        let (left, id) = (problem.chain(), &journal.job.id);
        report.warnings.push(format!("not everything here could be removed: {left}; once more: pod job resume {id}"));
    } else if let Err(problem) = journal.phase(Phase::Done) {
        report.warnings.push(problem.chain());
    }
}

/// Whether it is the link's, or came while something on it was waited for.
fn is_the_links(problem: &Problem) -> bool {
    [LINK, ABORTED, TIMEOUT].contains(&problem.code())
}

/// We give up: the destination is told why.
fn gave_up(problem: Problem, link: &mut Link, journal: &mut Journal) -> Failure {
    let _ = link.say(&Say::Abort(problem.report()));
    let _ = journal.aborted(&problem);
    Failure::new(Ended::TransferFailed, problem)
}

fn not_restored(report: ProblemReport, journal: &mut Journal) -> Failure {
    let problem = Problem::from(report);
    let _ = journal.aborted(&problem);
    // It may hear us no more by the direct way, and we it by ssh.
    let ended = if problem.code() == LINK { Ended::TransferFailed } else { Ended::RestoreFailed };
    Failure::new(ended, problem)
}

/// The link broke, or the destination gave up and closed it: then it has said why.
fn broken(problem: Problem, link: &mut Link, journal: &mut Journal, remote: &Remote) -> Failure {
    if [ABORTED, TIMEOUT].contains(&problem.code()) {
        return gave_up(problem, link, journal);
    }
    link.patience(Duration::from_millis(1500));
    if let Ok(Answer::Failed(report)) = link.hear() {
        return not_restored(report, journal);
    }
    let words = remote.words();
    let problem = match words.lines().map(str::trim).rfind(|line| !line.is_empty()) {
        Some(last) if problem.code() == LINK => {
            Problem::new(LINK, problem.what().to_owned()).because(last.to_owned()).fix("try again")
        }
        _ => problem,
    };
    let _ = journal.aborted(&problem);
    Failure::new(Ended::TransferFailed, problem)
}
