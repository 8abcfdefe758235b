//! `pod job`: moves that are under way, that are over, and that only the other host can settle.

use super::checkpoint::with_version;
use super::{Context, Exit};
use crate::output::{self, Table};
use pod_migrate::migrate::journal::{self, Job, Journal, Phase, Role, jobs};
use pod_migrate::migrate::{Lives, abort, repair, resume};
use pod_runtime::status::now;
use pod_runtime::store::Store;
use pod_runtime::{Result, when};
use serde_json::json;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// List the moves of the last days, to and from this host
    #[command(visible_alias = "list")]
    Ls,
    /// Show one
    Info { id: String },
    /// Show what happened in one, a line each with its time
    Log { id: String },
    /// Settle a move whose connection broke in the commit
    Resume { id: String },
    /// Stop a move before its commit
    Abort { id: String },
}

pub fn run(args: Args, context: &Context) -> Result<Exit> {
    let store = context.store()?;
    match args.verb {
        Verb::Ls => {
            repair(&store)?;
            let found = jobs(&store)?;
            if context.json {
                output::json_list("jobs", found.iter().map(|job| json!(job)).collect())?;
                return Ok(Exit::OK);
            }
            let mut table = Table::new(&["ID", "POD", "DIRECTION", "PHASE", "AGE"]);
            for job in &found {
                let arrow = if job.role == Role::Source { "→" } else { "←" };
                table.row(vec![
                    job.id.clone(),
                    job.name.clone(),
                    format!("{arrow} {}", job.peer),
                    phase(job),
                    output::age(now().saturating_sub(job.started)),
                ]);
            }
            table.show()?;
        }
        Verb::Info { id } => {
            let job = Journal::open(&store, &id)?.job;
            if context.json {
                output::json(&with_version(json!(job)))?;
                return Ok(Exit::OK);
            }
            let arrow = if job.role == Role::Source { "to" } else { "from" };
            let ago = |then: u64| format!("{} ago", output::age(now().saturating_sub(then)));
            let mut text =
                format!("job {}: pod {} ({}) {arrow} {}, {}\n", job.id, job.name, job.pod, job.peer, phase(&job));
            let worker =
                if job.tool.alive() { format!("process {}", job.tool.pid) } else { "nobody any more".to_owned() };
            text.push_str(&format!("begun {}, last step {}\n", ago(job.started), ago(job.updated)));
            if !job.phase.is_over() {
                text.push_str(&format!("worked on by {worker}\n"));
            }
            if let Some(problem) = &job.problem {
                text.push_str(&format!("because {}: {}\n", problem.code, problem.what));
            }
            match (job.phase.is_over(), job.tool.alive()) {
                (false, false) => text.push_str(&format!("fix: pod job resume {}\n", job.id)),
                (false, true) => text.push_str(&format!("to stop it before its commit: pod job abort {}\n", job.id)),
                (true, _) => text.push_str(&format!("what happened: pod job log {}\n", job.id)),
            }
            output::data(&text)?;
        }
        Verb::Log { id } => {
            let text = history(&store, &id)?;
            match context.json {
                true => output::json_list("lines", text.lines().map(line).collect())?,
                false => output::data(&text)?,
            }
        }
        Verb::Resume { id } => {
            let lives = resume(&store, &id)?;
            let job = Journal::open(&store, &id)?.job;
            output::say(match lives {
                Lives::There => format!("{} lives on {}", job.name, job.peer),
                Lives::Here => format!("{} lives here", job.name),
                Lives::Nowhere => format!("{} did not move, and is not here any more", job.name),
            });
        }
        Verb::Abort { id } => {
            abort(&store, &id)?;
            output::say(format!("job {id} is told to stop; the pod runs on where it was (pod job info {id})"));
        }
    }
    Ok(Exit::OK)
}

/// Of the log: when, and what.
fn line(text: &str) -> serde_json::Value {
    let (time, what) = text.split_once(' ').unwrap_or(("", text));
    json!({ "time": time, "text": what })
}

/// What was told while it was under way, between what the journal says.
fn history(store: &Store, id: &str) -> Result<String> {
    let job = Journal::open(store, id)?.job;
    let line = |seconds: u64, text: String| format!("{} {text}\n", when::rfc3339(seconds * 1_000_000_000));
    let arrow = if job.role == Role::Source { "to" } else { "from" };
    let mut text = line(job.started, format!("pod {} ({}) {arrow} {}", job.name, job.pod, job.peer));
    text.push_str(&journal::log(store, id)?);
    let because = job.problem.as_ref().map_or_else(String::new, |p| format!(", {}: {}", p.code, p.what));
    text.push_str(&line(job.updated, format!("{}{because}", phase(&job))));
    Ok(text)
}

fn phase(job: &Job) -> String {
    let name = format!("{:?}", job.phase).to_lowercase();
    if job.phase == Phase::Committing && !job.tool.alive() {
        format!("{name}: pod job resume {}", job.id)
    } else {
        name
    }
}
