//! `pod exec`: a further program in a running pod.

use super::{Context, Exit, options, run};
use crate::output;
use crate::terminal::{self, View};
use pod_runtime::monitor::{client, wire};
use pod_runtime::security::user;
use pod_runtime::spec::Base;
use pod_runtime::status::{State, wrong_state};
use pod_runtime::{Problem, Result, lifecycle};
use serde_json::json;
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pod exec -it web bash
  pod exec web cat /etc/hostname
  pod exec -d -u www-data -w /srv web ./job --once

One that was left with ctrl-p ctrl-q is taken again by `pod attach --exec SESSION`. The exit code is the program's; 125: pod failed, 126: the program cannot be executed, 127: not found.")]
pub struct Args {
    /// Keep stdin open
    #[arg(short, long)]
    interactive: bool,
    /// Give the program a terminal
    #[arg(short, long)]
    tty: bool,
    /// Do not wait for the program
    #[arg(short, long)]
    detach: bool,
    /// Set a variable, or pass on the one that is set here
    #[arg(short, long, value_name = "K=V|K")]
    env: Vec<String>,
    /// Read variables from a file
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// Folder to begin in [default: the pod's]
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<PathBuf>,
    /// Who the program runs as [default: as the pod's first process]
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// All capabilities, no seccomp filter
    #[arg(long)]
    privileged: bool,
    /// Keys that leave a terminal without ending the program
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q")]
    detach_keys: String,
    /// Name or id of the pod
    pod: String,
    /// The program and its arguments
    #[arg(required = true, num_args = 1.., trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<String>,
}

pub fn run(args: Args, context: &Context) -> Result<Exit> {
    let detach_keys = options::detach_keys(&args.detach_keys)?;
    if args.tty && args.interactive && !args.detach && !std::io::stdin().is_terminal() {
        return Err(Problem::new("E-USAGE", "-t needs a terminal, and stdin is none").fix("leave -t away"));
    }
    let pod = context.store()?.pod(&args.pod)?;
    let status = pod.status()?;
    let spec = pod.spec()?;
    if status.state == State::Paused {
        return Err(wrong_state(&spec.name, status.state, "running").fix(format!("pod unpause {}", spec.name)));
    }
    lifecycle::init_of(&pod, &status)?;
    let init = status.init.map_or(0, |key| key.pid);
    let mut env: BTreeMap<String, String> = spec.process.env.iter().map(|line| options::label(line)).collect();
    let mut who = spec.process.user.clone();
    if let Some(wanted) = &args.user {
        // By the files as they are in the pod now.
        let (found, home) = user::look_up(&Base::Directory(format!("/proc/{init}/root").into()), wanted)?;
        who = found;
        env.insert("HOME".into(), home.unwrap_or_else(|| "/".into()));
    }
    if args.tty {
        env.insert("TERM".into(), std::env::var("TERM").unwrap_or_else(|_| "xterm".into()));
    }
    env.extend(run::variables(&args.env, &args.env_file)?);
    let request = wire::Exec {
        args: args.command,
        env: env.into_iter().map(|(key, value)| format!("{key}={value}")).collect(),
        cwd: args.workdir.unwrap_or_else(|| spec.process.cwd.clone()),
        user: who,
        terminal: args.tty.then(terminal::size),
        interactive: args.interactive && !args.detach,
        detach: args.detach,
        privileged: args.privileged,
    };
    let (stream, reply) = client::exec(&pod, request)?;
    let session = reply.session;
    if args.detach {
        if context.json {
            let pid = reply.pid;
            output::json(&json!({ "schema_version": output::SCHEMA_VERSION, "pid": pid, "session": session }))?;
        }
        return Ok(Exit::OK);
    }
    let (input, terminal) = (args.interactive, args.tty);
    View { stream, input, terminal, detach_keys, proxy: false, pod, session }.show(&spec.name)
}
