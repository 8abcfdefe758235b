//! `pod attach`: the terminal, or the stdio, of a running pod.

use super::{Context, Exit, options};
use crate::terminal::{self, View};
use pod_runtime::monitor::client;
use pod_runtime::monitor::wire::Attach;
use pod_runtime::{Result, lifecycle};
use std::io::IsTerminal;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pod attach web              leave it again with ctrl-p ctrl-q; the pod goes on
  pod attach web --exec 2     what `pod exec` started; `pod inspect web` lists exec_sessions

When the pod moves to another host, it is followed there by ssh.")]
pub struct Args {
    /// Name or id of the pod
    pod: String,
    /// A session of `pod exec` instead of the pod's first program
    #[arg(long, value_name = "SESSION")]
    exec: Option<u64>,
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
    lifecycle::init_of(&pod, &pod.status()?)?;
    let size = std::io::stdin().is_terminal().then(terminal::size);
    let wanted = Attach { size, session: args.exec, ..Attach::default() };
    let (stream, reply) = client::attach(&pod, wanted)?;
    let view = View {
        stream,
        input: reply.interactive && !args.no_stdin,
        terminal: reply.terminal,
        detach_keys,
        // As docker: what `exec` started gets no signals.
        proxy: !reply.terminal && !args.no_sig_proxy && args.exec.is_none(),
        pod,
        session: args.exec,
    };
    view.show(&spec.name)
}
