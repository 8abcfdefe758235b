//! `pod dial`: what ssh is for hosts that are reached by it, where a daemon answers. Not for people.

use super::{Context, Exit};
use pod_migrate::link::daemon::call::call;
use pod_runtime::{Doing, Result};
use std::os::fd::{AsFd, OwnedFd};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[arg(long)]
    port: Option<u16>,
    /// The name under which it is trusted
    host: String,
    /// What pod is to do there
    #[arg(last = true, required = true)]
    args: Vec<String>,
}

pub fn run(args: Args, context: &Context) -> Result<Exit> {
    let copy = |fd: std::os::fd::BorrowedFd<'_>| -> Result<OwnedFd> {
        fd.try_clone_to_owned().doing(|| "copy a descriptor".into())
    };
    let stdio = [copy(std::io::stdin().as_fd())?, copy(std::io::stdout().as_fd())?, copy(std::io::stderr().as_fd())?];
    call(&context.store()?, &args.host, args.port, &args.args, stdio).map(Exit)
}
