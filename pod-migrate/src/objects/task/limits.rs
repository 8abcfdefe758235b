//! Resource limits.

use super::{Limit, ProcessState};
use crate::remote::{Arg, RemoteCall};

/// prlimit64(2) on oneself. A hard limit above what this host allows is capped there and said by the dry run of
/// `check`; it must not end a restore.
pub fn restore(state: &ProcessState) -> Vec<RemoteCall> {
    state.limits.iter().map(set).collect()
}

fn set(limit: &Limit) -> RemoteCall {
    let bytes = [limit.soft, limit.hard].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let args = vec![0.into(), limit.resource.into(), Arg::In(bytes), 0.into()];
    RemoteCall::new(format!("set limit {}", limit.resource), libc::SYS_prlimit64, args).may_fail()
}

/// As many descriptors as this process may have, for the time of the restore.
pub fn most_descriptors(hard: u64) -> RemoteCall {
    set(&Limit { resource: libc::RLIMIT_NOFILE, soft: hard, hard })
}
