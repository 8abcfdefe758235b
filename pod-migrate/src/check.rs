//! What stands against taking a pod away, found without stopping it. The classifying functions are those that dump asks.

use crate::ids::HostPid;
use crate::objects::files::{self, Outside, View};
use crate::objects::memory;
use crate::objects::task::check as task;
use pod_runtime::spec::{NetworkMode, Spec};
use pod_runtime::{Problem, Result};

/// The pod uses the host's network and cannot take it along.
pub const HOST_NETWORK: &str = "E-NETWORK-HOST";

/// All of it, each a refusal by name. `members` are the processes of the pod's cgroup as this host numbers them.
pub fn check(spec: &Spec, init: HostPid, members: &[i32], outside: Outside) -> Result<Vec<Problem>> {
    let processes: Vec<HostPid> = members.iter().map(|pid| task::voice(HostPid(*pid))).collect();
    let init = task::voice(init);
    let mut found = Vec::new();
    if spec.network.mode == NetworkMode::Host {
        let what = format!("pod {} uses the network of this host", spec.name);
        found.push(Problem::new(HOST_NETWORK, what).fix("start it without `--network host`"));
    }
    let common = task::Common::of(init);
    for process in &processes {
        found.extend(task::process(*process, &common));
        found.extend(memory::dump::check(*process));
    }
    found.extend(shared_for_long(&processes));
    found.extend(task::shared_tables(&processes));
    found.extend(files::check(&View::new(init, outside)?, &processes));
    Ok(found)
}

/// Every start of a program by vfork shares the parent's memory for a moment: only what persists counts.
fn shared_for_long(processes: &[HostPid]) -> Vec<Problem> {
    for _ in 0..4 {
        if task::shared_spaces(processes).is_empty() {
            return Vec::new();
        }
        std::thread::sleep(std::time::Duration::from_millis(25));
    }
    task::shared_spaces(processes)
}
