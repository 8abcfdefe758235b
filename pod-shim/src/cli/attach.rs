//! `pod attach`: the terminal, or the stdio, of a running pod.

use super::{Context, Exit, options, run};
use crate::terminal::{self, View};
use pod_runtime::monitor::client;
use pod_runtime::{Result, lifecycle};

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  pod attach web          leave it again with ctrl-p ctrl-q; the pod goes on")]
pub struct Args {
    /// Name or id of the pod
    pod: String,
    /// Only look
    #[arg(long)]
    no_stdin: bool,
    /// Do not pass on signals to the program (without a terminal)
    #[arg(long)]
    no_sig_proxy: bool,
    /// Keys that leave a terminal without ending the program
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q")]
    detach_keys: String,
}

pub fn run(args: Args, context: &Context) -> Result<Exit> {
    let detach_keys = options::detach_keys(&args.detach_keys)?;
    let pod = context.store()?.pod(&args.pod)?;
    let spec = pod.spec()?;
    let pidfd = lifecycle::init_of(&pod, &pod.status()?)?;
    let terminal = spec.process.terminal;
    let stream = client::attach(&pod, terminal.then(terminal::size))?;
    let view = View {
        stream,
        input: spec.process.interactive && !args.no_stdin,
        terminal,
        detach_keys,
        proxy: (!terminal && !args.no_sig_proxy).then_some(pidfd),
    };
    Ok(Exit(run::tell(&spec.name, view.run()?)))
}
