//! What belongs to a namespace and not to a task. Most of it is shown only to who is in the namespace: a thread of ours
//! enters it ([`within`]).

pub mod cgroups;
pub mod ipc;
pub mod mounts;
pub mod mqueue;
pub mod network;
pub mod settings;
pub mod uts;

use crate::{Doing, Problem, Result};
use nix::sched::{CloneFlags, setns, unshare};
use pod_runtime::spec::Security;
use std::fs::File;

/// A namespace of a process, by its name in /proc/PID/ns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Namespace {
    Ipc,
    Mount,
    Network,
    Uts,
}

impl Namespace {
    fn parts(self) -> (&'static str, CloneFlags) {
        match self {
            Namespace::Ipc => ("ipc", CloneFlags::CLONE_NEWIPC),
            Namespace::Mount => ("mnt", CloneFlags::CLONE_NEWNS),
            Namespace::Network => ("net", CloneFlags::CLONE_NEWNET),
            Namespace::Uts => ("uts", CloneFlags::CLONE_NEWUTS),
        }
    }
}

/// Runs `work` in a thread that has entered a namespace of `pid`; the caller's own threads stay where they are.
pub(crate) fn within<T: Send>(pid: i32, namespace: Namespace, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let (name, flag) = namespace.parts();
    let path = format!("/proc/{pid}/ns/{name}");
    let entered = File::open(&path).doing(|| format!("open {path}"))?;
    std::thread::scope(|scope| {
        let inside = move || {
            if namespace == Namespace::Mount {
                // A root of this thread's own, which the namespace is then entered with.
                unshare(CloneFlags::CLONE_FS).doing(|| "leave the root of this process".into())?;
            }
            setns(&entered, flag).doing(|| format!("enter {path}"))?;
            work()
        };
        let done = scope.spawn(inside).join();
        done.unwrap_or_else(|_| Err(Problem::new("E-INTERNAL", format!("the thread in the {name} namespace panicked"))))
    })
}

/// An image may ask for what its pod could do itself: `what` takes this capability.
pub(crate) fn permitted(security: &Security, capability: &str, what: &str) -> Result<()> {
    if security.may(capability) {
        return Ok(());
    }
    Err(Problem::new("E-IMAGE-RIGHTS", format!("the image has {what}, which its pod has no right to"))
        .fix(format!("restore images of a source that you trust; its spec must have --cap-add {capability}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pod_runtime::spec::Seccomp;

    /// Of a pod that may do nothing; asked before anything is entered or made.
    #[test]
    fn an_image_can_do_no_more_than_its_pod() {
        let nothing = Security { privileged: false, capabilities: vec!["CHOWN".into()], seccomp: Seccomp::Default };
        let own = std::process::id() as i32;
        let name = uts::State { host: "other".into(), domain: "other".into() };
        let mount = mounts::Inside { at: serde_bytes::ByteBuf::from("/mnt"), what: mounts::What::Proc, attributes: 0 };
        for refused in [
            uts::restore(own, &name, &nothing),
            mounts::restore(own, &[mount], &nothing),
            permitted(&nothing, "NET_ADMIN", "routes"),
        ] {
            assert_eq!(refused.unwrap_err().code(), "E-IMAGE-RIGHTS");
        }
        permitted(&nothing, "CHOWN", "a file of another").unwrap();
        permitted(&Security { privileged: true, ..nothing }, "NET_ADMIN", "routes").unwrap();
    }
}
