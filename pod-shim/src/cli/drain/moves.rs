//! The moves of a drain: a `pod migrate` each, so many at a time.
//!
//! What each says comes on pipes, read by a thread each, and is told with the pod's name before it. Who stops the drain
//! stops what waits for its turn; what is under way is told by SIGTERM, and gives up before its commit and finishes after it.

use super::super::Context;
use super::super::migrate::{Progress, named, passed};
use super::Order;
use super::outcome::{Became, Outcome};
use crate::output;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pod_migrate::link::Interrupt;
use pod_migrate::migrate::drain::{Planned, Verdict};
use pod_migrate::migrate::progress::Event;
use pod_runtime::problem::Report;
use pod_runtime::{Doing, Result};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

/// How soon a wish to stop is seen.
const GLANCE: Duration = Duration::from_millis(50);
/// Says nothing worse than a move that was stopped.
const ABORTED: i32 = 15;

/// From the threads that read: of which pod, and what.
enum Told {
    Line(usize, String),
    /// All that it printed; it is about to end.
    Answer(usize, Vec<u8>),
}

/// Pods of which something is to be done, in their order, and those under way.
struct Moves<'a> {
    order: &'a Order<'a>,
    context: &'a Context,
    outcomes: Vec<Outcome>,
    waiting: VecDeque<usize>,
    under_way: Vec<(usize, Child)>,
    sender: Sender<Told>,
}

pub fn run(planned: &[Planned], hosts: &[&str], order: &Order<'_>, context: &Context) -> Result<Vec<Outcome>> {
    let stop = Stop::new(order.while_stdin)?;
    let (sender, receiver) = channel();
    let goes = |(_, pod): &(usize, &Planned)| matches!(pod.verdict, Verdict::To { .. });
    let mut moves = Moves {
        order,
        context,
        outcomes: planned.iter().map(|pod| Outcome::foreseen(pod, hosts)).collect(),
        waiting: planned.iter().enumerate().filter(goes).map(|(index, _)| index).collect(),
        under_way: Vec::new(),
        sender,
    };
    moves.all(&stop, &receiver)?;
    Ok(moves.outcomes)
}

impl Moves<'_> {
    fn all(&mut self, stop: &Stop, receiver: &Receiver<Told>) -> Result<()> {
        let mut stopped = false;
        loop {
            if !stopped && stop.wanted() {
                stopped = true;
                self.stop();
            }
            while self.under_way.len() < usize::from(self.order.many.parallel) {
                let Some(index) = self.waiting.pop_front() else { break };
                self.start(index)?;
            }
            if self.under_way.is_empty() {
                return Ok(());
            }
            match receiver.recv_timeout(GLANCE) {
                Ok(Told::Line(index, line)) => self.line(index, &line),
                Ok(Told::Answer(index, answer)) => self.end(index, &answer)?,
                Err(_) => {}
            }
        }
    }

    fn stop(&mut self) {
        output::say("stopping what is before its commit; what is after it finishes");
        for index in self.waiting.drain(..) {
            let outcome = &mut self.outcomes[index];
            (outcome.became, outcome.exit_code) = (Became::NotBegun, ABORTED);
        }
        for (_, child) in &self.under_way {
            // It is ours and was not waited for: the number is its own.
            let _ = kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM);
        }
    }

    fn start(&mut self, index: usize) -> Result<()> {
        let outcome = &self.outcomes[index];
        let to = outcome.to.clone().unwrap_or_default();
        let mut command = Command::new("/proc/self/exe");
        if let Some(root) = self.context.root() {
            command.arg("--root").arg(root);
        }
        command.args(["migrate", &outcome.id, "--to", &to, "--json", "--progress", "json"]);
        command.args(self.order.how.reach.words()).args(self.order.how.tuning.words());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().doing(|| format!("start the move of {}", outcome.pod))?;
        let (said, answer) = (child.stderr.take(), child.stdout.take());
        let sender = self.sender.clone();
        thread::spawn(move || {
            let lines = said.into_iter().flat_map(|said| BufReader::new(said).lines()).map_while(Result::ok);
            lines.for_each(|line| drop(sender.send(Told::Line(index, line))));
            let mut bytes = Vec::new();
            // Less than a pipe holds, so it does not wait for us meanwhile.
            let _ = answer.map(|mut answer| answer.read_to_end(&mut bytes));
            let _ = sender.send(Told::Answer(index, bytes));
        });
        self.under_way.push((index, child));
        Ok(())
    }

    fn line(&mut self, index: usize, line: &str) {
        let value: Value = serde_json::from_str(line).unwrap_or_default();
        if let Some(error) = value.get("error") {
            let outcome = &mut self.outcomes[index];
            outcome.errors.extend(serde_json::from_value::<Report>(error.clone()));
            if let Some(job) = value.get("job").and_then(Value::as_str) {
                outcome.job = Some(job.to_owned());
            }
            return;
        }
        match value.get("event") {
            Some(_) => self.event(index, value),
            None => self.say(index, line),
        }
    }

    fn event(&self, index: usize, mut value: Value) {
        match self.progress() {
            Progress::None => {}
            Progress::Json => {
                value["pod"] = json!(self.outcomes[index].pod);
                output::say(value.to_string());
            }
            _ => match serde_json::from_value(value) {
                Ok(Event::Step { step, detail }) => self.say(index, &named(step, &detail)),
                Ok(Event::Pass { pass, bytes, ms, estimate }) => {
                    self.say(index, passed(pass, bytes, ms, estimate).trim_start());
                }
                Ok(Event::Stalled { text } | Event::Throttled { text, .. } | Event::Waiting { text }) => {
                    self.say(index, &text);
                }
                Ok(Event::Warning { text }) => self.say(index, &format!("warning: {text}")),
                _ => {}
            },
        }
    }

    fn progress(&self) -> Progress {
        match self.order.how.progress {
            Progress::Auto if self.context.json => Progress::None,
            other => other,
        }
    }

    fn say(&self, index: usize, text: &str) {
        if !matches!(self.progress(), Progress::None | Progress::Json) {
            output::say(format!("{}: {}", self.outcomes[index].pod, output::plain(text)));
        }
    }

    fn end(&mut self, index: usize, answer: &[u8]) -> Result<()> {
        let Some(at) = self.under_way.iter().position(|(other, _)| *other == index) else { return Ok(()) };
        let (_, mut child) = self.under_way.swap_remove(at);
        let status = child.wait().doing(|| "wait for a move".into())?;
        let outcome = &mut self.outcomes[index];
        outcome.report = serde_json::from_slice(answer).ok().filter(|report: &Value| report.is_object());
        outcome.exit_code = status.code().unwrap_or(1);
        if let Some(job) = outcome.report.as_ref().and_then(|report| report["job"].as_str()) {
            outcome.job = Some(job.to_owned());
        }
        outcome.became = match outcome.exit_code {
            0 => Became::Moved,
            ABORTED => Became::Aborted,
            _ => Became::Failed,
        };
        if outcome.became == Became::Failed && outcome.errors.is_empty() {
            let what = format!("its `pod migrate` ended with {status}");
            outcome.errors.push(Report { code: "E-SYSTEM".into(), what, fix: Some("pod ps; pod job ls".into()) });
        }
        let line = outcome.line();
        self.say(index, &line);
        Ok(())
    }
}

/// Whoever wants it all to end: ctrl-C, or who started us from another host.
struct Stop {
    interrupt: Interrupt,
    let_go: Arc<AtomicBool>,
}

impl Stop {
    fn new(while_stdin: bool) -> Result<Stop> {
        // Before there are threads: they are to leave the signals to us, too.
        let stop = Stop { interrupt: Interrupt::catch(None)?, let_go: Arc::default() };
        if while_stdin {
            let let_go = Arc::clone(&stop.let_go);
            thread::spawn(move || {
                let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
                let_go.store(true, Ordering::Relaxed);
            });
        }
        Ok(stop)
    }

    fn wanted(&self) -> bool {
        self.let_go.load(Ordering::Relaxed) || self.interrupt.check().is_err()
    }
}
