//! Host and domain name, of a pod that may change them: others have what their spec says.

use super::{Namespace, permitted, within};
use crate::{Doing, Result};
use pod_runtime::spec::Security;
use serde::{Deserialize, Serialize};
use std::fs;

/// Record UTS.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub host: String,
    pub domain: String,
}

/// Both are of the namespace of the thread that opens them.
const HOST: &str = "/proc/sys/kernel/hostname";
const DOMAIN: &str = "/proc/sys/kernel/domainname";

pub fn dump(security: &Security, init: i32) -> Result<Option<State>> {
    if !security.may("SYS_ADMIN") {
        return Ok(None);
    }
    within(init, Namespace::Uts, || Ok(State { host: read(HOST)?, domain: read(DOMAIN)? })).map(Some)
}

fn read(path: &str) -> Result<String> {
    Ok(fs::read_to_string(path).doing(|| format!("read {path}"))?.trim_end().to_owned())
}

/// In the namespace of a newborn pod, which has another name than this host.
pub fn restore(init: i32, state: &State, security: &Security) -> Result<()> {
    permitted(security, "SYS_ADMIN", "a host name of its own")?;
    let State { host, domain } = state;
    within(init, Namespace::Uts, || {
        fs::write(HOST, host).doing(|| "set the host name of the pod".into())?;
        fs::write(DOMAIN, domain).doing(|| "set the domain name of the pod".into())
    })
}
