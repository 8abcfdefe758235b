//! `pod cp`: files between this host and a pod.

use super::{Context, Exit};
use pod_runtime::store::{Pod, Store};
use pod_runtime::{Problem, Result, copy, lifecycle};
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pod cp web:/etc/nginx ./nginx
  pod cp ./index.html web:/srv/www/

As cp -a: owners, modes, times and symbolic links are kept; a path that ends in '/' or is a folder is copied into. No
symbolic link in the pod leads out of it.")]
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

/// The root of a running pod as a path of this host.
fn root(store: &Store, name: &str) -> Result<(Pod, PathBuf)> {
    let pod = store.pod(name)?;
    let status = pod.status()?;
    lifecycle::init_of(&pod, &status)?;
    let init = status.init.map_or(0, |key| key.pid);
    Ok((pod, format!("/proc/{init}/root").into()))
}

pub fn run(args: Args, context: &Context) -> Result<Exit> {
    let store = context.store()?;
    match (place(&args.source), place(&args.destination)) {
        (Place::Pod(name, from), Place::Here(to)) => {
            let (_pod, root) = root(&store, &name)?;
            copy::copy(&root, &from, std::path::Path::new("/"), &absolute(&to)?)?;
        }
        (Place::Here(from), Place::Pod(name, to)) => {
            let (_pod, root) = root(&store, &name)?;
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
