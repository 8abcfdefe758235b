//! `pod cp`: files between this host and a pod.

use super::{Context, Exit};
use pod_runtime::rootfs::view;
use pod_runtime::status::{State, Status};
use pod_runtime::store::Store;
use pod_runtime::{Problem, Result, copy, lifecycle};
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pod cp web:/etc/nginx ./nginx
  pod cp ./index.html web:/srv/www/

As cp -a: owners, modes, times and symbolic links are kept; a path that ends in '/' or is a folder is copied into. No
symbolic link in the pod leads out of it. The pod need not run; what it had in memory (/tmp, /run) is gone then.")]
pub struct Args {
    /// POD:PATH or a path of this host
    source: String,
    /// A path of this host or POD:PATH
    destination: String,
}

enum Place {
    Here(PathBuf),
    Pod(String, PathBuf),
}

/// As docker: a colon makes it a pod's, unless the text is plainly a path.
fn place(text: &str) -> Place {
    match text.split_once(':') {
        Some((pod, path)) if !pod.is_empty() && !text.starts_with(['/', '.']) => Place::Pod(pod.into(), path.into()),
        _ => Place::Here(text.into()),
    }
}

/// The root of a pod as a path of this host: of one that has ended it is mounted for this process.
fn root(store: &Store, name: &str) -> Result<PathBuf> {
    let pod = store.pod(name)?;
    let status = pod.status()?;
    if matches!(status.state, State::Exited | State::Dead) {
        gone(&status)?;
        return view::mount(&pod.spec()?, &pod);
    }
    lifecycle::init_of(&pod, &status)?;
    let init = status.init.map_or(0, |key| key.pid);
    Ok(format!("/proc/{init}/root").into())
}

/// Waits until the monitor of an ended pod is gone, which has the pod's layers mounted until then.
fn gone(status: &Status) -> Result<()> {
    let Some(monitor) = status.monitor.map(|key| key.pidfd()).transpose()?.flatten() else { return Ok(()) };
    lifecycle::wait_for(&monitor)
}

pub fn run(args: Args, context: &Context) -> Result<Exit> {
    let store = context.store()?;
    match (place(&args.source), place(&args.destination)) {
        (Place::Pod(name, from), Place::Here(to)) => {
            let root = root(&store, &name)?;
            copy::copy(&root, &from, std::path::Path::new("/"), &absolute(&to)?)?;
        }
        (Place::Here(from), Place::Pod(name, to)) => {
            let root = root(&store, &name)?;
            copy::copy(std::path::Path::new("/"), &absolute(&from)?, &root, &to)?;
        }
        (Place::Pod(..), Place::Pod(..)) => {
            return Err(Problem::new("E-USAGE", "copying from pod to pod goes by way of this host")
                .fix("pod cp A:X tmp && pod cp tmp B:X"));
        }
        (Place::Here(_), Place::Here(_)) => {
            return Err(
                Problem::new("E-USAGE", "neither path is in a pod").fix("pod cp POD:PATH DEST, or SRC POD:PATH")
            );
        }
    }
    Ok(Exit::OK)
}

/// With a trailing slash kept: it asks for a folder.
fn absolute(path: &std::path::Path) -> Result<PathBuf> {
    use pod_runtime::Doing;
    let found = std::path::absolute(path).doing(|| format!("resolve {}", path.display()))?;
    let slash = path.as_os_str().as_encoded_bytes().ends_with(b"/");
    Ok(if slash { found.join("") } else { found })
}
