//! The verbs, one a file. A new verb is a `mod` line, a line in [`Command`] and a line in [`Command::run`].

mod completion;
mod explain;
mod man;

use clap::{Args, Parser, Subcommand};
use pod_runtime::store::Store;
use pod_runtime::{Problem, Result};
use std::path::PathBuf;

/// Run programs in pods, save them, and move them live between hosts
#[derive(Debug, Parser)]
#[command(name = "pod", version, propagate_version = true, max_term_width = 100)]
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
            Command::Explain(args) => explain::run(args, context),
            Command::Completion(args) => completion::run(args),
            Command::Man(args) => man::run(args),
        }
    }

    /// For the verbs whose exit code is the program's: the code that says it is `pod` itself that failed.
    pub fn exit_code_of_own_failure(&self) -> Option<i32> {
        None
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
