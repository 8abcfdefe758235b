//! `pod completion`: a script that teaches a shell the verbs and options.

use super::{Cli, Exit};
use crate::output;
use clap::CommandFactory;
use clap_complete::Shell;
use pod_runtime::Result;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  pod completion bash > /etc/bash_completion.d/pod\n  source <(pod completion zsh)")]
pub struct Args {
    /// bash, zsh or fish
    shell: Shell,
}

pub fn run(args: Args) -> Result<Exit> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "pod", &mut script);
    output::bytes(&script)?;
    Ok(Exit::OK)
}
