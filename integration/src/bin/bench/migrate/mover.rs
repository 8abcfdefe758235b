//! One move, by the command that a user has: when its parts began, by our clock, and what it says of itself.

use super::clock;
use anyhow::{Context, Result, bail};
use integration::bed::Host;
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::process::{ChildStderr, Stdio};

/// What a move was.
#[derive(Debug, Clone, Default)]
pub struct Move {
    pub begun: u64,
    pub ended: u64,
    /// From then on it stood still, counted back from the begin of the commit by what came before it.
    pub frozen_at: u64,
    pub frozen_ms: f64,
    pub total_ms: f64,
    pub bytes_sent: u64,
    pub rounds: u64,
    /// What the frozen time went to, in its order.
    pub parts: Vec<(String, f64)>,
    /// The same more closely, on each host, which work at the same time.
    pub laps: Vec<(String, f64)>,
}

impl Move {
    pub fn thawed_at(&self) -> u64 {
        self.frozen_at + (self.frozen_ms * 1e6) as u64
    }
}

/// The part of the frozen time that begins with the step of that name.
const COMMIT: &str = "commit";

/// Reads events, each stamped as it comes: when the commit began, and all that is no event.
fn listen(events: ChildStderr) -> (Option<u64>, String) {
    let (mut commit, mut said) = (None, String::new());
    for line in BufReader::new(events).lines().map_while(|line| line.ok()) {
        match serde_json::from_str::<Value>(&line) {
            Ok(event) if event["step"] == COMMIT => commit = Some(clock::now()),
            Ok(event) if event["event"].is_string() => {}
            _ => said += &format!("{line}\n"),
        }
    }
    (commit, said)
}

/// Moves a pod and removes the note of it.
pub fn once(from: &Host, to: &Host, pod: &str, on_stall: &str) -> Result<Move> {
    let begun = clock::now();
    let mut child = from
        .command("pod")
        .args(["migrate", pod, "--to", to.name(), "--on-stall", on_stall, "--json", "--progress", "json"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let events = child.stderr.take().context("a pipe")?;
    let listener = std::thread::spawn(move || listen(events));
    let mut json = String::new();
    child.stdout.take().context("a pipe")?.read_to_string(&mut json)?;
    let status = child.wait()?;
    let ended = clock::now();
    let (commit, said) = listener.join().ok().context("who listens to a move panicked")?;
    if !status.success() {
        bail!("from {} to {}: {status}: {said}{json}", from.name(), to.name());
    }
    from.pod(&["rm", pod]).context("the note that it moved")?;
    let report = serde_json::from_str(&json).with_context(|| format!("not JSON: {json}"))?;
    let moved = understood(&report, commit.unwrap_or(ended))?;
    Ok(Move { begun, ended, ..moved })
}

fn understood(report: &Value, commit: u64) -> Result<Move> {
    let number = |name: &str| report[name].as_f64().with_context(|| format!("no {name} in {report}"));
    let parts = report["frozen"].as_array().into_iter().flatten();
    let part = |part: &Value| Some((part["part"].as_str()?.to_owned(), part["ms"].as_f64()?));
    let parts: Vec<(String, f64)> = parts.filter_map(part).collect();
    let laps = |side: &str, laps: &Value| -> Vec<(String, f64)> {
        let lap = |lap: &Value| Some((format!("{side}: {}", lap["lap"].as_str()?), lap["ms"].as_f64()?));
        laps.as_array().into_iter().flatten().filter_map(lap).collect()
    };
    let before: f64 = parts.iter().take_while(|(name, _)| name != COMMIT).map(|(_, ms)| ms).sum();
    Ok(Move {
        frozen_at: commit - (before * 1e6) as u64,
        frozen_ms: number("frozen_ms")?,
        total_ms: number("total_ms")?,
        bytes_sent: number("bytes_sent")? as u64,
        rounds: number("rounds")? as u64,
        parts,
        laps: [laps("source", &report["laps_here"]), laps("destination", &report["laps_there"])].concat(),
        ..Move::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_freeze_is_found_from_the_commit_backwards() {
        let report = serde_json::json!({
            "frozen_ms": 80.0, "total_ms": 900.0, "bytes_sent": 5, "rounds": 2,
            "frozen": [{"part": "files", "ms": 10.0}, {"part": "dump", "ms": 50.0}, {"part": "commit", "ms": 20.0}],
            "laps_here": [{"lap": "stop", "ms": 1.5}], "laps_there": [{"lap": "tree", "ms": 2.5}],
        });
        let moved = understood(&report, 1_000_000_000).unwrap();
        assert_eq!((moved.frozen_at, moved.thawed_at()), (940_000_000, 1_020_000_000));
        assert_eq!(moved.parts.len(), 3);
        assert_eq!(moved.laps, [("source: stop".to_owned(), 1.5), ("destination: tree".to_owned(), 2.5)]);
    }
}
