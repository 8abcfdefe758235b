//! Host and domain name, of a pod that may change them: others have what their spec says.

use crate::{Doing, Problem, Result};
use nix::sched::{CloneFlags, setns};
use pod_runtime::spec::Security;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};

/// Record UTS.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub host: String,
    pub domain: String,
}

const HOST: &str = "/proc/sys/kernel/hostname";
const DOMAIN: &str = "/proc/sys/kernel/domainname";

fn may(security: &Security) -> bool {
    security.privileged || security.capabilities.iter().any(|held| held == "SYS_ADMIN")
}

pub fn dump(security: &Security, init: i32) -> Result<Option<State>> {
    if !may(security) {
        return Ok(None);
    }
    within(init, || Ok(State { host: read(HOST)?, domain: read(DOMAIN)? })).map(Some)
}

fn read(path: &str) -> Result<String> {
    Ok(fs::read_to_string(path).doing(|| format!("read {path}"))?.trim_end().to_owned())
}

/// In the namespace of a newborn pod, which has another name than this host.
pub fn restore(init: i32, state: &State, security: &Security) -> Result<()> {
    if !may(security) {
        let what = "the image has a host name of its own, which its pod has no right to";
        return Err(Problem::new("E-IMAGE-RIGHTS", what)
            .fix("restore images of a source that you trust; its spec must have --cap-add SYS_ADMIN"));
    }
    let State { host, domain } = state;
    within(init, || {
        fs::write(HOST, host).doing(|| "set the host name of the pod".into())?;
        fs::write(DOMAIN, domain).doing(|| "set the domain name of the pod".into())
    })
}

/// The files are of the namespace of the thread that opens them.
fn within<T: Send>(init: i32, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let path = format!("/proc/{init}/ns/uts");
    let namespace = File::open(&path).doing(|| format!("open {path}"))?;
    std::thread::scope(|scope| {
        let inside = move || {
            setns(&namespace, CloneFlags::CLONE_NEWUTS).doing(|| "enter the UTS namespace of the pod".into())?;
            work()
        };
        let done = scope.spawn(inside).join();
        done.unwrap_or_else(|_| Err(Problem::new("E-INTERNAL", "the thread in the UTS namespace panicked")))
    })
}
