//! The listener of a seccomp filter that asks somebody outside: who that is gets its descriptor by a socket, with the state
//! of the container, before anything of the user's runs.

use super::store::Shown;
use super::wrong;
use crate::problem::{Doing, Result};
use crate::security::seccomp::Filter;
use crate::sys::{process, unix};
use oci_spec::runtime::{Linux, Process};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;

/// Called in the namespaces of the runtime; none when nobody is asked.
pub fn connect(linux: &Linux, filter: Option<&Filter>) -> Result<Option<UnixStream>> {
    let path = linux.seccomp().as_ref().and_then(|seccomp| seccomp.listener_path().as_ref());
    match (filter.is_some_and(|filter| filter.notifies), path) {
        (true, Some(path)) => {
            UnixStream::connect(path).doing(|| format!("connect to the seccomp listener {}", path.display())).map(Some)
        }
        (true, None) => Err(wrong("seccomp listenerPath must be set to use SCMP_ACT_NOTIFY")),
        (false, _) => Ok(None),
    }
}

/// Installs a filter that asks somebody, and tells who that is; any other is left for later. `pid` is the calling process as
/// the host numbers it.
pub fn hand_over(
    filter: Option<&Filter>,
    to: Option<&UnixStream>,
    process: &Process,
    linux: &Linux,
    (shown, pid): (&Shown, i32),
) -> Result<()> {
    let (Some(filter), Some(to)) = (filter.filter(|filter| filter.notifies), to) else { return Ok(()) };
    let metadata = linux.seccomp().as_ref().and_then(|seccomp| seccomp.listener_metadata().clone());
    let state = serde_json::json!({
        "ociVersion": super::VERSION,
        "fds": ["seccompFd"],
        "pid": pid,
        "metadata": metadata.unwrap_or_default(),
        "state": shown,
    });
    let text = serde_json::to_vec(&state).doing(|| "write the state".into())?;
    if process.no_new_privileges().unwrap_or(false) {
        process::set_no_new_privileges().doing(|| "set no_new_privs".into())?;
    }
    let listener = filter.install_with_listener()?;
    unix::send(to.as_fd(), &text, &[], &[listener.as_raw_fd()], None)
        .doing(|| "hand the seccomp listener over".into())
        .map(drop)
}
