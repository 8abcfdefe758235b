//! What became of each pod of a drain, as a table, as JSON, as an exit code.

use super::super::Context;
use super::exit_of_stay;
use crate::output::{self, Table};
use pod_migrate::migrate::drain::{Planned, Verdict, running};
use pod_runtime::Result;
use pod_runtime::problem::Report;
use serde::Serialize;
use serde_json::{Value, json};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Became {
    Moved,
    /// Of a dry run.
    WouldMove,
    /// It could not go, and was not touched.
    Stays,
    /// It runs on here, or nobody knows (exit code 14).
    Failed,
    /// As asked, before its commit.
    Aborted,
    /// Somebody stopped it all before its turn, or another could not go (`--strict`).
    NotBegun,
}

#[derive(Debug, Serialize)]
pub struct Outcome {
    pub pod: String,
    pub id: String,
    pub to: Option<String>,
    pub became: Became,
    pub exit_code: i32,
    pub memory_bytes: u64,
    pub file_bytes: u64,
    pub warnings: Vec<String>,
    pub errors: Vec<Report>,
    pub job: Option<String>,
    /// Of the move, as `pod migrate --json` has it.
    pub report: Option<Value>,
}

impl Outcome {
    /// Of a pod that nothing is done with.
    pub fn foreseen(pod: &Planned, hosts: &[&str]) -> Outcome {
        let (to, became, warnings, errors) = match &pod.verdict {
            Verdict::To { host, warnings } => {
                (hosts.get(*host).map(|host| (*host).to_owned()), Became::WouldMove, warnings.clone(), Vec::new())
            }
            Verdict::Stays { problems, .. } => {
                (None, Became::Stays, Vec::new(), problems.iter().map(pod_runtime::Problem::report).collect())
            }
        };
        Outcome {
            pod: pod.name.clone(),
            id: pod.id.clone(),
            to,
            became,
            exit_code: exit_of_stay(&pod.verdict),
            memory_bytes: pod.needed.memory,
            file_bytes: pod.needed.disk,
            warnings,
            errors,
            job: None,
            report: None,
        }
    }

    fn figure(&self, name: &str) -> Option<f64> {
        self.report.as_ref()?.get(name)?.as_f64()
    }

    /// The first thing that stands against it.
    fn reason(&self) -> String {
        self.errors.first().map_or_else(String::new, |error| format!("{}: {}", error.code, error.what))
    }

    /// A line for who watches.
    pub fn line(&self) -> String {
        let to = self.to.as_deref().unwrap_or("?");
        match self.became {
            Became::Moved => {
                let (total, frozen) = (self.figure("total_ms").unwrap_or(0.0), self.figure("frozen_ms").unwrap_or(0.0));
                format!("moved to {to} in {:.2} s, frozen {frozen:.1} ms", total / 1e3)
            }
            _ => format!("{} ({}): {}", self.word(), self.exit_code, self.reason()),
        }
    }

    fn word(&self) -> &'static str {
        match self.became {
            Became::Moved => "moved",
            Became::WouldMove => "would move",
            Became::Stays => "stays",
            Became::Failed if self.exit_code == 14 => "unknown",
            Became::Failed => "failed",
            Became::Aborted => "stopped",
            Became::NotBegun => "not begun",
        }
    }

    fn row(&self) -> Vec<String> {
        let figure = |name, show: fn(f64) -> String| self.figure(name).map_or_else(|| "-".to_owned(), show);
        vec![
            self.pod.clone(),
            self.to.clone().unwrap_or_else(|| "-".to_owned()),
            self.word().to_owned(),
            output::size(self.memory_bytes),
            figure("total_ms", |ms| format!("{:.2} s", ms / 1e3)),
            figure("frozen_ms", |ms| format!("{ms:.1} ms")),
            figure("bytes_sent", |bytes| output::size(bytes as u64)),
            output::plain(&self.reason()),
        ]
    }
}

/// Which of two exit codes says more of what somebody has to see to.
fn weight(code: i32) -> i32 {
    match code {
        0 => 0,
        // Stopped as asked is the least, but for nothing.
        15 => 1,
        10..=14 => code,
        _ => 2,
    }
}

pub fn worst(outcomes: &[Outcome]) -> i32 {
    outcomes.iter().map(|outcome| outcome.exit_code).max_by_key(|code| weight(*code)).unwrap_or(0)
}

/// The table, or the document.
pub fn tell(outcomes: &[Outcome], dry_run: bool, context: &Context) -> Result<()> {
    let left: Vec<String> = running(&context.store()?)?.iter().filter_map(|pod| pod.name().ok()).collect();
    let count = |wanted| outcomes.iter().filter(|outcome| outcome.became == wanted).count();
    if context.json {
        return output::json(&json!({
            "schema_version": output::SCHEMA_VERSION,
            "dry_run": dry_run,
            "moved": count(Became::Moved),
            "not_moved": outcomes.len() - count(Became::Moved),
            "exit_code": worst(outcomes),
            "running_here": left,
            "pods": outcomes,
        }));
    }
    if outcomes.is_empty() {
        return Ok(());
    }
    let mut table = Table::new(&["POD", "TO", "RESULT", "MEMORY", "TIME", "FROZEN", "SENT", "REASON"]);
    outcomes.iter().for_each(|outcome| table.row(outcome.row()));
    table.show()?;
    if !dry_run {
        let still = if left.is_empty() {
            "none runs here any more".to_owned()
        } else {
            format!("still here: {}", left.join(", "))
        };
        output::say(format!("{} of {} moved; {still}", count(Became::Moved), outcomes.len()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_is_what_somebody_has_to_see_to() {
        let worst = |codes: &[i32]| codes.iter().copied().max_by_key(|code| weight(*code)).unwrap_or(0);
        assert_eq!(worst(&[]), 0);
        assert_eq!(worst(&[0, 15, 0]), 15);
        assert_eq!(worst(&[15, 10, 0]), 10);
        assert_eq!(worst(&[12, 14, 13]), 14);
        assert_eq!(worst(&[1, 15]), 1);
        assert_eq!(worst(&[3, 11]), 11);
    }
}
