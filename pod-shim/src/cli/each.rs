//! The verbs that do one thing to each of several pods: stop, kill, pause, unpause, rm, wait; and rename.
//!
//! One pod's problem does not keep the others from their turn; the last problem decides the exit code.

use super::{Context, Exit, options};
use crate::output;
use pod_runtime::monitor::client;
use pod_runtime::status::State;
use pod_runtime::store::{Pod, Store};
use pod_runtime::{Problem, Result, lifecycle};
use serde_json::json;
use std::time::Duration;

#[derive(Debug, clap::Args)]
pub struct Stop {
    /// Seconds until it is killed [default: the pod's own, 10]
    #[arg(short, long, visible_alias = "timeout", value_name = "SECONDS")]
    time: Option<u32>,
    /// Signal to send first [default: the pod's own, TERM]
    #[arg(short, long)]
    signal: Option<String>,
    #[command(flatten)]
    pods: Pods,
}

#[derive(Debug, clap::Args)]
pub struct Kill {
    /// Name or number
    #[arg(short, long, default_value = "KILL")]
    signal: String,
    #[command(flatten)]
    pods: Pods,
}

#[derive(Debug, clap::Args)]
pub struct Remove {
    /// Also when it runs: kill it first
    #[arg(short, long)]
    force: bool,
    #[command(flatten)]
    pods: Pods,
}

#[derive(Debug, clap::Args)]
pub struct Pods {
    /// Names or ids
    #[arg(required = true, num_args = 1.., value_name = "POD")]
    pods: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub struct Rename {
    /// Name or id of the pod
    pod: String,
    /// Its name from now on
    name: String,
}

/// Does `act` to each; says the name of each that it was done to, as docker does.
fn each(pods: &Pods, context: &Context, act: impl Fn(&Store, &str) -> Result<()>) -> Result<Exit> {
    let store = context.store()?;
    let mut last = None;
    let mut done = Vec::new();
    for name in &pods.pods {
        match act(&store, name) {
            Ok(()) if context.json => done.push(json!(name)),
            Ok(()) => output::data(&format!("{name}\n"))?,
            Err(problem) => {
                if let Some(earlier) = last.replace(problem) {
                    output::problem(&earlier, context.json);
                }
            }
        }
    }
    if context.json {
        output::json_list("done", done)?;
    }
    last.map_or(Ok(Exit::OK), Err)
}

pub fn stop(args: Stop, context: &Context) -> Result<Exit> {
    let signal = args.signal.as_deref().map(options::signal).transpose()?;
    each(&args.pods, context, |store, name| {
        let pod = store.pod(name)?;
        let spec = pod.spec()?;
        let patience = Duration::from_secs(args.time.unwrap_or(spec.stop_timeout).into());
        lifecycle::stop(&pod, signal.unwrap_or(spec.stop_signal), patience)
    })
}

pub fn kill(args: Kill, context: &Context) -> Result<Exit> {
    let signal = options::signal(&args.signal)?;
    each(&args.pods, context, |store, name| {
        let pod = store.pod(name)?;
        lifecycle::kill(&pod, signal)
    })
}

pub fn pause(args: Pods, context: &Context) -> Result<Exit> {
    each(&args, context, |store, name| lifecycle::pause(&store.pod(name)?))
}

pub fn unpause(args: Pods, context: &Context) -> Result<Exit> {
    each(&args, context, |store, name| lifecycle::unpause(&store.pod(name)?))
}

pub fn remove(args: Remove, context: &Context) -> Result<Exit> {
    each(&args.pods, context, |store, name| {
        let pod = match store.pod(name) {
            // As docker: with -f nothing to remove is no error.
            Err(problem) if args.force && problem.code() == "E-NOPOD" => return Ok(()),
            found => found?,
        };
        let state = pod.status()?.state;
        if state.is_live() {
            if !args.force {
                let problem = Problem::new("E-STATE", format!("pod '{name}' is {state}"));
                return Err(problem.fix(format!("pod stop {name}, or pod rm -f {name}")));
            }
            lifecycle::kill_now(&pod)?;
        }
        store.forget_aside(&pod)?;
        // With `--rm` its monitor was faster.
        if pod.dir().exists() { lifecycle::remove(&pod) } else { Ok(()) }
    })
}

/// Prints the exit code of each pod as it ends; exits with nothing of them, as docker.
pub fn wait(args: Pods, context: &Context) -> Result<Exit> {
    let store = context.store()?;
    let mut codes = Vec::new();
    for name in &args.pods {
        let pod = store.pod(name)?;
        let code = exit_code(&pod)?;
        codes.push(json!({ "pod": name, "exit_code": code }));
        if !context.json {
            output::data(&code.map_or("unknown\n".to_owned(), |code| format!("{code}\n")))?;
        }
    }
    if context.json {
        output::json_list("pods", codes)?;
    }
    Ok(Exit::OK)
}

/// The exit code once the pod has ended; `None` when it ended unseen.
fn exit_code(pod: &Pod) -> Result<Option<i32>> {
    let status = pod.status()?;
    match (status.state, status.moved_to) {
        (State::Exited | State::Dead, _) => return Ok(status.exit_code),
        (State::Moved, Some(to)) => return Err(pod_runtime::monitor::moved_problem(&pod.name()?, &to)),
        _ => {}
    }
    match client::wait(pod) {
        Ok(code) => Ok(Some(code)),
        // It ended between the two questions, or its monitor is lost: then the first process itself is watched.
        Err(problem) if ["E-MONITOR", "E-STATE"].contains(&problem.code()) => {
            if let Some(pidfd) = status.init.map(|key| key.pidfd()).transpose()?.flatten() {
                lifecycle::wait_for(&pidfd)?;
            }
            Ok(pod.status().map_or(None, |status| status.exit_code))
        }
        Err(problem) => Err(problem),
    }
}

pub fn rename(args: Rename, context: &Context) -> Result<Exit> {
    let store = context.store()?;
    let pod = store.pod(&args.pod)?;
    let before = pod.name()?;
    store.rename(&pod, &args.name)?;
    store.event(&pod, "rename", &[("from", &before)]);
    Ok(Exit::OK)
}
