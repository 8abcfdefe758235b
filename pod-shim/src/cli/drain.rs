//! `pod drain`: all pods off a host, as many at a time as are allowed. Also what `pod migrate --all` does.
//!
//! First every pod is looked at and the destinations are asked, so that what cannot go is named before anything moves.
//! Then each goes by a `pod migrate` of its own ([`moves`]): one that fails, or dies, is no other's failure. What failed is
//! in the table at the end, and the worst of it in the exit code.

mod moves;
mod outcome;

use super::migrate::{How, Progress, exit_of};
use super::{Context, Exit};
use crate::output;
use outcome::Outcome;
use pod_migrate::link::Interrupt;
use pod_migrate::link::daemon::PEER;
use pod_migrate::link::dial::{Scheme, Target};
use pod_migrate::migrate::drain::{Destination, Planned, Verdict, plan, running};
use pod_runtime::store::Pod;
use pod_runtime::{Doing, Problem, Result};
use std::process::Stdio;
use std::time::Duration;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pod drain --to hostB,hostC                  this host, two pods at a time
  pod drain hostA --to hostB -j 4 --strict    another host; nothing moves unless everything can
  pod drain --to hostB --dry-run              what would go where, and what would stay

Pods that cannot go are named first, and the others go. One that fails on its way runs on where it was and keeps no other from
going. Ctrl-C stops those that are before their commit; the others finish. --timeout and --bandwidth are for each pod.

Exit codes: 0 all have moved; else of the worst: 14 nobody knows; 13, 12 a move failed; 11 no destination takes it; 10 it
cannot move; 15 stopped as asked (see pod migrate).")]
pub struct Args {
    /// The host to be emptied, reached by ssh; this one when left out
    host: Option<String>,
    /// Where its pods go; of several each time to the one with most room
    #[arg(long, value_name = "[USER@]HOST[:PORT]", value_delimiter = ',', required = true)]
    to: Vec<String>,
    #[command(flatten)]
    many: Many,
    #[command(flatten)]
    how: How,
    /// The end of stdin is what ctrl-C is elsewhere
    #[arg(long, hide = true)]
    while_stdin: bool,
}

#[derive(Debug, clap::Args)]
pub struct Many {
    /// How many pods are on their way at a time
    #[arg(short = 'j', long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..))]
    parallel: u8,
    /// Move nothing unless every pod can go
    #[arg(long)]
    strict: bool,
}

/// What is to be done with some pods.
pub struct Order<'a> {
    pub to: &'a [String],
    pub many: &'a Many,
    pub how: &'a How,
    pub while_stdin: bool,
}

pub fn run(args: Args, context: &Context) -> Result<Exit> {
    if let Some(host) = &args.host {
        return elsewhere(host, &args, context);
    }
    let store = context.store()?;
    let order = Order { to: &args.to, many: &args.many, how: &args.how, while_stdin: args.while_stdin };
    all(&running(&store)?, &order, context)
}

/// Plans, moves and tells.
pub fn all(pods: &[Pod], order: &Order<'_>, context: &Context) -> Result<Exit> {
    let reach = &order.how.reach;
    order.to.iter().try_for_each(|to| Target::parse(to).map(drop))?;
    let mut hosts = Vec::new();
    if !pods.is_empty() {
        let store = context.store()?;
        for to in order.to {
            hosts.push(Destination::ask(to, &reach.to(to, &store)?));
        }
    }
    let planned = plan(pods, &mut hosts);
    let names: Vec<&str> = hosts.iter().map(|host| host.name.as_str()).collect();
    let stays = planned.iter().any(|pod| matches!(pod.verdict, Verdict::Stays { .. }));
    if !context.json {
        say_plan(&planned, &hosts, order.many.strict && stays && !order.how.dry_run);
    }
    let nothing_moves = order.how.dry_run || (order.many.strict && stays);
    let outcomes = match nothing_moves {
        true => planned.iter().map(|pod| Outcome::foreseen(pod, &names)).collect(),
        false => moves::run(&planned, &names, order, context)?,
    };
    outcome::tell(&outcomes, order.how.dry_run, context)?;
    Ok(Exit(outcome::worst(&outcomes)))
}

/// Before anything is moved: which destinations cannot be asked, and which pods cannot go.
fn say_plan(planned: &[Planned], hosts: &[Destination], strict: bool) {
    for host in hosts {
        if let Err(problem) = &host.inquiry {
            output::say(format!("{} takes no part: {}: {}", host.name, problem.code(), problem.chain()));
        }
    }
    for pod in planned {
        let Verdict::Stays { problems, .. } = &pod.verdict else { continue };
        for problem in problems {
            output::say(format!("{} cannot go: {}: {}", pod.name, problem.code(), problem.chain()));
            if let Some(fix) = problem.way_out() {
                output::say(format!("  fix: {fix}"));
            }
        }
    }
    if strict {
        output::say("nothing is moved, for not everything can go (--strict)");
    }
    if planned.is_empty() {
        output::say("no pod runs here");
    }
}

/// `pod drain` on another host. It ends its moves when our end of its stdin goes, by ctrl-C or with us.
fn elsewhere(host: &str, args: &Args, context: &Context) -> Result<Exit> {
    let dial = args.how.reach.to(host, &context.store()?)?;
    if dial.target.scheme == Scheme::Daemon {
        return Err(Problem::new(PEER, "a daemon takes pods and does not send any when it is called")
            .fix(format!("drain {} by ssh, or run pod drain there", dial.target.host)));
    }
    let words: Vec<String> = there(args, context).iter().map(|word| quoted(word)).collect();
    let interrupt = Interrupt::catch(None)?;
    let mut command = dial.command(&words.iter().map(String::as_str).collect::<Vec<_>>());
    let mut child = command.stdin(Stdio::piped()).spawn().code("E-LINK", || "start ssh".into())?;
    let mut lifeline = child.stdin.take();
    loop {
        if let Some(status) = child.try_wait().doing(|| "wait for ssh".into())? {
            return match status.code() {
                Some(255) | None => Err(Problem::new("E-LINK", format!("the connection to {host} is lost, or was never made"))
                    .fix(format!("`ssh {host} pod --version` must work without a question; `pod job ls` there shows what became of its moves"))),
                Some(127) => Err(Problem::new("E-LINK", format!("{host} has no program '{}'", dial.remote_pod))
                    .fix("copy pod there, or name it: --remote-pod PATH")),
                Some(code) => Ok(Exit(code)),
            };
        }
        if lifeline.is_some() && interrupt.check().is_err() {
            lifeline = None;
            output::say(format!("stopping what is before its commit on {host}"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The same command line for the host itself. How it reaches the others is its own ssh's business.
fn there(args: &Args, context: &Context) -> Vec<String> {
    let How { reach: _, tuning, progress, dry_run } = &args.how;
    let to = args.to.join(",");
    let parallel = args.many.parallel.to_string();
    let progress = match progress {
        Progress::Auto | Progress::Plain => "plain",
        Progress::Json => "json",
        Progress::None => "none",
    };
    let mut words: Vec<String> =
        ["drain", "--while-stdin", "--to", &to, "-j", &parallel, "--progress", progress].map(str::to_owned).into();
    words.extend(tuning.words());
    let flags = [(args.many.strict, "--strict"), (*dry_run, "--dry-run"), (context.json, "--json")];
    words.extend(flags.iter().filter(|(given, _)| *given).map(|(_, flag)| (*flag).to_owned()));
    words
}

/// A word as the shell there takes it for one.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// The exit code of a pod that would not even begin.
fn exit_of_stay(verdict: &Verdict) -> i32 {
    match verdict {
        Verdict::To { .. } => 0,
        Verdict::Stays { ended, .. } => exit_of(*ended),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_stays_one_word() {
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("it's $HOME"), "'it'\\''s $HOME'");
    }
}
