//! `pod relay`: leads who was attached to a pod on another host to the pod's monitor here. Started by ssh.

use super::{Context, Exit};
use crate::{elsewhere, output};
use pod_runtime::monitor::client;
use pod_runtime::monitor::wire::Reply;
use pod_runtime::{Doing, Problem, Result};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The pod's id
    id: String,
}

pub fn run(args: Args, context: &Context) -> Result<Exit> {
    // Who listens is a program, which knows problems by the monitor's answers.
    if let Err(problem) = lead(&args.id, context) {
        let mut line = serde_json::to_vec(&Reply::problem(&problem)).doing(|| "put an answer into words".into())?;
        line.push(b'\n');
        output::bytes(&line)?;
    }
    Ok(Exit::OK)
}

fn lead(id: &str, context: &Context) -> Result<()> {
    let store = context.store()?;
    if let Some(pod) = elsewhere::here(&store, id) {
        return relay(client::connect(&pod)?);
    }
    // It may have ended, and then its folder says how; only what went on has a way.
    let moved = store.pod(id).and_then(|pod| pod.status()).is_ok_and(|status| status.moved_to.is_some());
    if !moved {
        return Err(Problem::new("E-NOPOD", "the pod has ended"));
    }
    let error = elsewhere::there(&store, id, &["relay", id])?.exec();
    Err(error).code("E-LINK", || "start ssh".into())
}

/// Bytes both ways until the monitor hangs up, or who listens goes.
fn relay(monitor: UnixStream) -> Result<()> {
    let mut from = monitor.try_clone().doing(|| "copy a descriptor".into())?;
    std::thread::spawn(move || {
        let _ = carry(&mut std::io::stdin().lock(), &mut &monitor);
        let _ = monitor.shutdown(Shutdown::Write);
    });
    let _ = carry(&mut from, &mut std::io::stdout().lock());
    Ok(())
}

/// As it comes: what is typed must not wait for more.
fn carry(from: &mut impl Read, to: &mut impl Write) -> std::io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => to.write_all(&buffer[..n]).and_then(|()| to.flush())?,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
