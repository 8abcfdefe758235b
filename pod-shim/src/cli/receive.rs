//! `pod receive`: the far side of a move, started by ssh. Not for people.

use super::{Context, Exit};
use pod_runtime::{Doing, Result};
use std::os::fd::{AsFd, OwnedFd};

#[derive(Debug, clap::Args)]
pub struct Args {}

pub fn run(_: Args, context: &Context) -> Result<Exit> {
    let store = context.store()?;
    pod_migrate::migrate::repair(&store)?;
    // The monitor gives up 0, 1 and 2; the link must be others.
    let high = |fd: std::os::fd::BorrowedFd<'_>| -> Result<OwnedFd> {
        fd.try_clone_to_owned().doing(|| "copy a descriptor".into())
    };
    let (from, to) = (high(std::io::stdin().as_fd())?, high(std::io::stdout().as_fd())?);
    pod_migrate::migrate::receive(&store, from, to)?;
    Ok(Exit::OK)
}
