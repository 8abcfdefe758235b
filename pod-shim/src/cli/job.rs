//! `pod job`: moves that are under way, that are over, and that only the other host can settle.

use super::checkpoint::with_version;
use super::{Context, Exit};
use crate::output::{self, Table};
use pod_migrate::migrate::journal::{Job, Journal, Phase, Role, jobs};
use pod_migrate::migrate::{abort, repair, resume};
use pod_runtime::Result;
use pod_runtime::status::now;
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
            let mut text = format!("job {}: pod {} ({}), {}, {}\n", job.id, job.name, job.pod, job.peer, phase(&job));
            if let Some(problem) = &job.problem {
                text.push_str(&format!("because {}: {}\n", problem.code, problem.what));
            }
            if job.phase == Phase::Committing && !job.tool.alive() {
                text.push_str(&format!("fix: pod job resume {}\n", job.id));
            }
            output::data(&text)?;
        }
        Verb::Resume { id } => {
            let there = resume(&store, &id)?;
            let job = Journal::open(&store, &id)?.job;
            let text =
                if there { format!("{} lives on {}", job.name, job.peer) } else { format!("{} runs here", job.name) };
            output::say(text);
        }
        Verb::Abort { id } => abort(&store, &id)?,
    }
    Ok(Exit::OK)
}

fn phase(job: &Job) -> String {
    let name = format!("{:?}", job.phase).to_lowercase();
    if job.phase == Phase::Committing && !job.tool.alive() {
        format!("{name}: pod job resume {}", job.id)
    } else {
        name
    }
}
