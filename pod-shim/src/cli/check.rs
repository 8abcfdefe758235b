//! `pod check`: what stands against moving a pod. The first step of every move, without touching anything.

use super::migrate::{Reach, exit_of};
use super::{Context, Exit};
use crate::output;
use pod_migrate::migrate::estimate::Expected;
use pod_migrate::migrate::{self, Ended, Limits};
use pod_runtime::{Problem, Result};
use serde_json::json;

/// What begins anew with every move: CPU time and the like.
const ANEW: &str = "W-ANEW";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The pod
    pod: String,
    /// The host that it would move to
    #[arg(long, value_name = "[USER@]HOST[:PORT]")]
    to: Option<String>,
    #[command(flatten)]
    reach: Reach,
    /// Measure neither the link nor how much the pod writes, which takes a second
    #[arg(long)]
    quick: bool,
    /// What the move may take.
    #[arg(skip)]
    limits: Limits,
}

impl Args {
    /// Of a `pod migrate --dry-run`.
    pub fn new(pod: String, to: String, reach: Reach, limits: Limits) -> Args {
        Args { pod, to: Some(to), reach, quick: false, limits }
    }
}

pub fn run(args: Args, context: &Context) -> Result<Exit> {
    let store = context.store()?;
    let pod = store.pod(&args.pod)?;
    let dial = args.to.as_deref().map(|to| args.reach.to(to, &store)).transpose()?;
    let checked = migrate::check(&pod, dial.as_ref(), (!args.quick).then_some(&args.limits))?;
    let clear = checked.blockers.is_empty() && checked.refused.is_empty();
    let exit = if clear { Exit::OK } else { Exit(exit_of(Ended::Blocked)) };
    if context.json {
        let reports = |problems: &[Problem]| problems.iter().map(|p| json!(p.report())).collect::<Vec<_>>();
        output::json(&json!({
            "schema_version": output::SCHEMA_VERSION,
            "pod": pod.name()?,
            "to": args.to,
            "clear": clear,
            "blockers": reports(&checked.blockers),
            "refused": reports(&checked.refused),
            "downgrades": reports(&checked.downgrades),
            "warnings": checked.warnings,
            // True of every pod, and so no line of its own for people: `pod explain` has it.
            "always": [ANEW],
            "memory_bytes": args.to.as_ref().map(|_| checked.memory),
            "file_bytes": args.to.as_ref().map(|_| checked.files),
            "expected": checked.expected,
            "migration": checked.expected.as_ref().map(Expected::migration),
            "not_measured": checked.unknown,
        }))?;
        return Ok(exit);
    }
    let mut text = String::new();
    if let Some(peer) = &checked.peer {
        text.push_str(&format!("{}: reachable, pod {}, kernel {}\n", peer.host, peer.version, peer.kernel));
        let (memory, files) = (output::size(checked.memory), output::size(checked.files));
        text.push_str(&format!("would go over: {memory} of memory, {files} of files\n"));
        text.push_str(&expectation(&checked));
    }
    let named = |who: &'static str, problems| -> Vec<(&str, &Problem)> {
        let problems: &[Problem] = problems;
        problems.iter().map(|problem| (who, problem)).collect()
    };
    let (blockers, refused) = (named("BLOCKER", &checked.blockers), named("REFUSED", &checked.refused));
    for (who, problem) in [blockers, refused, named("DOWNGRADE", &checked.downgrades)].concat() {
        text.push_str(&format!("{who:<9} {:<20} {}\n", problem.code(), problem.chain()));
        if let Some(fix) = problem.way_out() {
            text.push_str(&format!("          fix: {fix}\n"));
        }
    }
    for warning in &checked.warnings {
        text.push_str(&format!("NOTE      {warning}\n"));
    }
    let count = checked.blockers.len() + checked.refused.len();
    text.push_str(&match count {
        0 => "result: can be moved. Nothing was changed.\n".to_owned(),
        1 => "result: cannot be moved now (1 blocker). Nothing was changed.\n".to_owned(),
        n => format!("result: cannot be moved now ({n} blockers). Nothing was changed.\n"),
    });
    output::data(&text)?;
    Ok(exit)
}

fn expectation(checked: &migrate::Checked) -> String {
    if let Some(why) = &checked.unknown {
        return format!("not measured: {why}\n");
    }
    let Some(expected) = &checked.expected else { return String::new() };
    let rate = |bytes: u64| format!("{}/s", output::size(bytes));
    let passes = match expected.rounds {
        0 => String::new(),
        1 => "1 pass, ".to_owned(),
        n => format!("{n} passes, "),
    };
    format!(
        "measured: the link takes {}, the pod writes {}\nexpected: {passes}{} in {:.1} s, it stands still for about {:.0} ms\n",
        rate(expected.link_bytes_per_second),
        rate(expected.written_per_second),
        output::size(expected.bytes),
        expected.total_ms / 1e3,
        expected.stall_ms,
    )
}
