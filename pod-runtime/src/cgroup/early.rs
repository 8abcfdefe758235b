//! Having the kernel ready for a process that is to join cgroups.
//!
//! Whoever writes to a `cgroup.procs` waits until every CPU has noticed (an RCU grace period, 5 to 15 ms), unless
//! somebody did just before. So somebody does, as soon as it is clear that a pod is to be made: a child that joins the
//! group that it is in. By the time that the pod's first process joins its groups the wait is over, or nearly.

use super::{Hierarchies, own_group};
use crate::sys::daemon::{self, Fork};
use std::fs;

/// The child that waits. Dropping it waits for its end, which comes by itself.
#[derive(Debug)]
pub struct Early {
    child: Option<i32>,
}

/// Begins to wait. The caller must be single-threaded. Where nothing has to be joined, and where it fails, the first
/// process waits as long as it has to.
pub fn begin() -> Early {
    let child = match daemon::fork() {
        Ok(Fork::Child) => {
            join_where_it_is();
            daemon::exit_now(0)
        }
        Ok(Fork::Parent(child)) => Some(child),
        Err(_) => None,
    };
    Early { child }
}

fn join_where_it_is() {
    daemon::set_comm(c"pod-early");
    let Ok(hierarchies) = Hierarchies::find() else { return };
    // A first process is born into its group of v2, so that one is never waited for.
    let Some(v1) = hierarchies.v1.first() else { return };
    let Some(own) = v1.controllers.first().and_then(|controller| own_group(controller)) else { return };
    let folder = v1.mount.join(own.trim_start_matches('/'));
    // A path that leaves the caller's cgroup namespace names a group that cannot be seen from here: it may not be ours.
    if !own.contains("..") {
        let _ = fs::write(folder.join("cgroup.procs"), "0");
    }
}

impl Drop for Early {
    fn drop(&mut self) {
        if let Some(child) = self.child.take() {
            let _ = daemon::reap(child);
        }
    }
}
