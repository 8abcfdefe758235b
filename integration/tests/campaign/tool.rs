//! A `pod migrate` that runs, and what it has told by now; how long each phase of a move lasts.

use super::draw::Phase;
use anyhow::{Context, Result};
use integration::bed::Host;
use integration::wait::until_true;
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// A fault that takes no longer happens at once.
const SHORT: Duration = Duration::from_millis(1);
/// Longer than all patience in it together.
const LONGEST: Duration = Duration::from_secs(200);

pub struct Tool {
    child: Child,
    steps: Arc<Mutex<Vec<(String, Instant)>>>,
    err: JoinHandle<String>,
    out: JoinHandle<String>,
}

/// How it ended.
#[derive(Debug, Clone)]
pub struct Ended {
    /// 128 and more: by a signal.
    pub code: i32,
    pub said: String,
    pub out: String,
    steps: Vec<(String, Instant)>,
    at: Instant,
}

impl Tool {
    pub fn start(host: &Host, args: &[&str]) -> Result<Tool> {
        let mut command = host.command("pod");
        command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // A group of its own: the kernel sends SIGHUP to all of an orphaned group when one of it ends and another is stopped, and the
        // tools of the other lanes would take it for somebody's wish that they end.
        command.process_group(0);
        let mut child = command.spawn()?;
        let steps = Arc::new(Mutex::new(Vec::new()));
        let (err, noted) = (child.stderr.take().context("stderr is a pipe")?, Arc::clone(&steps));
        let err = thread::spawn(move || {
            let mut said = String::new();
            for line in BufReader::new(err).lines().map_while(Result::ok) {
                let now = Instant::now();
                if let Ok(event) = serde_json::from_str::<Value>(&line)
                    && let Some(step) = event["step"].as_str()
                    && let Ok(mut noted) = noted.lock()
                {
                    noted.push((step.to_owned(), now));
                }
                said += &line;
                said.push('\n');
            }
            said
        });
        let mut out = child.stdout.take().context("stdout is a pipe")?;
        let out = thread::spawn(move || {
            let mut text = String::new();
            let _ = out.read_to_string(&mut text);
            text
        });
        Ok(Tool { child, steps, err, out })
    }

    pub fn over(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)) | Err(_))
    }

    /// When it said that this step begins.
    pub fn step(&self, name: &str) -> Option<Instant> {
        let steps = self.steps.lock().ok()?;
        steps.iter().find(|(step, _)| step == name).map(|(_, at)| *at)
    }

    /// Waits for its end; `meanwhile` is called now and then.
    pub fn end(mut self, mut meanwhile: impl FnMut() -> Result<()>) -> Result<Ended> {
        let mut failed = Ok(());
        until_true("pod migrate to end", LONGEST, || {
            failed = meanwhile();
            failed.is_err() || self.over()
        })?;
        failed?;
        let at = Instant::now();
        let code = self.child.wait()?.code().unwrap_or(255);
        let text = |thread: JoinHandle<String>| thread.join().unwrap_or_default();
        let (said, out) = (text(self.err), text(self.out));
        let steps = self.steps.lock().map(|steps| steps.clone()).unwrap_or_default();
        Ok(Ended { code, said, out, steps, at })
    }
}

impl Ended {
    pub fn all(&self) -> String {
        format!("{}{}", self.said, self.out)
    }

    fn step(&self, name: &str) -> Option<Instant> {
        self.steps.iter().find(|(step, _)| step == name).map(|(_, at)| *at)
    }
}

/// How long each phase lasts here and now, by the last move that nobody disturbed.
#[derive(Debug, Clone, Default)]
pub struct Windows([Duration; 10]);

impl Windows {
    /// None where a move did not tell all of it.
    pub fn of(ended: &Ended) -> Option<Windows> {
        let report: Value = serde_json::from_str(&ended.out).ok()?;
        let part = |name: &str| -> Duration {
            let parts = report["frozen"].as_array().into_iter().flatten();
            let ms = parts.filter(|part| part["part"] == name).filter_map(|part| part["ms"].as_f64()).sum::<f64>();
            Duration::from_secs_f64(ms / 1e3)
        };
        let names = ["connect", "reserve", "files", "memory", "freeze", "commit"];
        let mut at = names.iter().map(|name| ended.step(name));
        let mut next = || at.next().flatten();
        let (connect, reserve, files, memory, freeze, commit) = (next()?, next()?, next()?, next()?, next()?, next()?);
        let (hold, dump, restore, committed) = (part("hold"), part("dump"), part("restore"), part("commit"));
        Some(Windows([
            reserve - connect,
            files - reserve,
            memory - files,
            freeze - memory,
            (commit - freeze).saturating_sub(hold + dump + restore),
            hold,
            dump,
            restore,
            committed,
            (ended.at - commit).saturating_sub(committed),
        ]))
    }

    /// The step that a moment is counted from, and the phases in between.
    fn since(phase: Phase) -> (&'static str, &'static [Phase]) {
        match phase {
            Phase::Connecting => ("connect", &[]),
            Phase::Reserve => ("reserve", &[]),
            Phase::Files => ("files", &[]),
            Phase::Memory => ("memory", &[]),
            Phase::Freeze => ("freeze", &[]),
            Phase::Hold => ("freeze", &[Phase::Freeze]),
            Phase::Dump => ("freeze", &[Phase::Freeze, Phase::Hold]),
            Phase::Restore => ("freeze", &[Phase::Freeze, Phase::Hold, Phase::Dump]),
            Phase::Commit => ("commit", &[]),
            Phase::Finishing => ("commit", &[Phase::Commit]),
        }
    }

    fn length(&self, phase: Phase) -> Duration {
        self.0[phase as usize]
    }

    /// When that moment is, once it can be known, less the `lead` that the fault needs to happen. A commit is shorter than that:
    /// then it is counted from the step before.
    pub fn moment(&self, tool: &Tool, phase: Phase, into: f64, lead: Duration) -> Option<Instant> {
        const ALL: &[Phase] = &[Phase::Freeze, Phase::Hold, Phase::Dump, Phase::Restore, Phase::Commit];
        let (step, between) = match phase {
            Phase::Commit if lead > SHORT => ("freeze", &ALL[..4]),
            Phase::Finishing if lead > SHORT => ("freeze", ALL),
            _ => Windows::since(phase),
        };
        let before: Duration = between.iter().map(|phase| self.length(*phase)).sum();
        let moment = tool.step(step)? + before + self.length(phase).mul_f64(into);
        Some(moment.checked_sub(lead).unwrap_or(moment))
    }

    /// In which phase a move was then: between two of its steps as far as it is known, by the clock.
    pub fn met(&self, ended: &Ended, then: Instant) -> Option<Phase> {
        let mut met = None;
        for phase in super::draw::PHASES {
            let (step, between) = Windows::since(phase);
            let before: Duration = between.iter().map(|phase| self.length(*phase)).sum();
            if ended.step(step).is_some_and(|at| at + before <= then) {
                met = Some(phase);
            }
        }
        met
    }
}
