//! The verbs, one a file. A new verb is a `mod` line, a line in [`Command`] and a line in [`Command::run`].

mod attach;
mod check;
mod checkpoint;
mod completion;
mod config;
mod cp;
mod daemon;
mod dial;
mod doctor;
mod drain;
mod each;
mod events;
mod exec;
mod explain;
mod format;
mod inspect;
mod job;
mod logs;
mod man;
mod migrate;
mod network;
mod options;
mod port;
mod ps;
mod receive;
mod relay;
mod restore;
mod run;
mod stats;
mod top;

use clap::{Args, Parser, Subcommand};
use pod_runtime::store::Store;
use pod_runtime::{Problem, Result};
use std::path::PathBuf;

/// Run programs in pods, save them, and move them live between hosts
#[derive(Debug, Parser)]
#[command(name = "pod", version, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Args)]
pub struct Global {
    /// Where pods are kept [default: /var/lib/pod]
    #[arg(long, global = true, value_name = "DIR", env = "POD_ROOT", hide_env_values = true)]
    pub root: Option<PathBuf>,
    /// Answer in JSON; errors too
    #[arg(long, global = true)]
    pub json: bool,
    /// Tell on stderr what is being done
    #[arg(long, global = true)]
    pub debug: bool,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a program in a new pod
    Run(Box<run::Args>),
    /// List pods
    #[command(visible_alias = "ls")]
    Ps(ps::Args),
    /// Run a further program in a pod
    Exec(exec::Args),
    /// Go to the terminal of a pod
    Attach(attach::Args),
    /// Show what a pod wrote
    Logs(logs::Args),
    /// End pods: ask, then kill
    Stop(each::Stop),
    /// Send pods a signal
    Kill(each::Kill),
    /// Freeze pods
    Pause(each::Pods),
    /// Let frozen pods go on
    Unpause(each::Pods),
    /// Wait for the end of pods and print their exit codes
    Wait(each::Pods),
    /// Remove pods that have ended
    Rm(each::Remove),
    /// Give a pod another name
    Rename(each::Rename),
    /// Copy files into or out of a pod
    Cp(cp::Args),
    /// Move a pod to another host, live
    #[command(visible_alias = "move")]
    Migrate(migrate::Args),
    /// Move all pods off a host
    Drain(drain::Args),
    /// See what stands against moving a pod
    Check(check::Args),
    /// Save pods in files
    Checkpoint(checkpoint::Args),
    /// Bring back a saved pod
    Restore(restore::Args),
    /// Show, settle or stop moves
    Job(job::Args),
    /// Take pods from hosts that are trusted, without ssh
    Daemon(daemon::Args),
    /// Calls the daemon of another host
    #[command(hide = true)]
    Dial(dial::Args),
    /// The far side of a move
    #[command(hide = true)]
    Receive(receive::Args),
    /// Leads to a pod that has moved
    #[command(hide = true)]
    Relay(relay::Args),
    /// Show all that is known of pods
    Inspect(inspect::Args),
    /// Show what pods use
    Stats(stats::Args),
    /// Show the processes of a pod
    Top(top::Args),
    /// Show the published ports of a pod
    Port(port::Args),
    /// Manage the networks that pods are on
    Network(network::Args),
    /// Show what happened to pods
    Events(events::Args),
    /// See whether this host has what pods need
    Doctor(doctor::Args),
    /// Show what pod goes by on this host
    Config(config::Args),
    /// Explain a code that an error showed
    Explain(explain::Args),
    /// Print a completion script for a shell
    Completion(completion::Args),
    /// Print the manual page, or write all of them to a folder
    Man(man::Args),
}

impl Command {
    pub fn run(self, context: &Context) -> Result<Exit> {
        match self {
            Command::Run(args) => run::run(*args, context),
            Command::Ps(args) => ps::run(args, context),
            Command::Exec(args) => exec::run(args, context),
            Command::Attach(args) => attach::run(args, context),
            Command::Logs(args) => logs::run(args, context),
            Command::Stop(args) => each::stop(args, context),
            Command::Kill(args) => each::kill(args, context),
            Command::Pause(args) => each::pause(args, context),
            Command::Unpause(args) => each::unpause(args, context),
            Command::Wait(args) => each::wait(args, context),
            Command::Rm(args) => each::remove(args, context),
            Command::Rename(args) => each::rename(args, context),
            Command::Cp(args) => cp::run(args, context),
            Command::Migrate(args) => migrate::run(args, context),
            Command::Drain(args) => drain::run(args, context),
            Command::Check(args) => check::run(args, context),
            Command::Checkpoint(args) => checkpoint::run(args, context),
            Command::Restore(args) => restore::run(args, context),
            Command::Job(args) => job::run(args, context),
            Command::Daemon(args) => daemon::run(args, context),
            Command::Dial(args) => dial::run(args, context),
            Command::Receive(args) => receive::run(args, context),
            Command::Relay(args) => relay::run(args, context),
            Command::Inspect(args) => inspect::run(args, context),
            Command::Stats(args) => stats::run(args, context),
            Command::Top(args) => top::run(args, context),
            Command::Port(args) => port::run(args, context),
            Command::Network(args) => network::run(args, context),
            Command::Events(args) => events::run(args, context),
            Command::Doctor(args) => doctor::run(args, context),
            Command::Config(args) => config::run(args, context),
            Command::Explain(args) => explain::run(args, context),
            Command::Completion(args) => completion::run(args),
            Command::Man(args) => man::run(args),
        }
    }

    /// For the verbs whose exit code is the program's: the code that says it is `pod` itself that failed.
    pub fn exit_code_of_own_failure(&self) -> Option<fn(&Problem) -> i32> {
        matches!(self, Command::Run(_) | Command::Exec(_)).then_some(|problem: &Problem| match problem.code() {
            "E-COMMAND-NOT-FOUND" => 127,
            "E-COMMAND-NOT-EXECUTABLE" => 126,
            _ => 125,
        })
    }
}

/// What a shell sees. Everything that worked is `Exit::OK`; a problem is an `Err`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit(pub i32);

impl Exit {
    pub const OK: Exit = Exit(0);
}

/// What every verb is given.
pub struct Context {
    /// `--json`.
    pub json: bool,
    root: Option<PathBuf>,
}

impl Context {
    pub fn new(global: &Global) -> Context {
        Context { json: global.json, root: global.root.clone() }
    }

    /// Whether `--root` or its variable says where pods are kept.
    pub fn root_was_given(&self) -> bool {
        self.root.is_some()
    }

    /// `--root`, for another `pod` on this host.
    pub fn root(&self) -> Option<&std::path::Path> {
        self.root.as_deref()
    }

    /// The store of this host; the first thing that needs root.
    pub fn store(&self) -> Result<Store> {
        if !nix::unistd::geteuid().is_root() {
            let uid = nix::unistd::geteuid();
            return Err(Problem::new("E-ROOT", format!("pods belong to root and you are uid {uid}"))
                .fix(format!("sudo {}", std::env::args().collect::<Vec<_>>().join(" "))));
        }
        match (&self.root, std::env::var_os("POD_RUN")) {
            (None, _) => Store::open(),
            (Some(root), Some(run)) if !run.is_empty() => Store::open_at(root.clone(), run.into()),
            (Some(root), _) => Store::open_at(root.clone(), root.join("run")),
        }
    }
}
