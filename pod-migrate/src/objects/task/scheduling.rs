//! Policy, priorities, affinity.

use super::Scheduling;
use crate::remote::{Arg, RemoteCall};

const IOPRIO_WHO_PROCESS: i32 = 1;

/// Whether a new thread has the same as its maker.
pub fn is_inherited(scheduling: &Scheduling) -> bool {
    let usual = [libc::SCHED_OTHER, libc::SCHED_BATCH, libc::SCHED_IDLE].contains(&(scheduling.policy as i32));
    usual && scheduling.flags == 0
}

/// What /proc/PID/autogroup says: `/autogroup-17 nice 5`.
pub fn session_nice(text: &str) -> Option<i32> {
    text.trim_end().rsplit_once(" nice ")?.1.parse().ok()
}

/// For the calling thread. A host with fewer CPUs, or one that gives no real-time priority, makes it as near as it can:
/// how fast a program runs is not part of what it can rely on.
pub fn restore(scheduling: &Scheduling) -> Vec<RemoteCall> {
    let mut calls = Vec::new();
    if !scheduling.affinity.is_empty() {
        let args = vec![0.into(), (scheduling.affinity.len() as u64).into(), Arg::In(scheduling.affinity.to_vec())];
        calls.push(RemoteCall::new("set CPU affinity", libc::SYS_sched_setaffinity, args).may_fail());
    }
    let args = vec![0.into(), Arg::In(attributes(scheduling)), 0.into()];
    calls.push(RemoteCall::new("set the scheduling policy", libc::SYS_sched_setattr, args).may_fail());
    let args = vec![IOPRIO_WHO_PROCESS.into(), 0.into(), scheduling.io_priority.into()];
    calls.push(RemoteCall::new("set the I/O priority", libc::SYS_ioprio_set, args).may_fail());
    calls
}

/// struct sched_attr, its first version.
fn attributes(scheduling: &Scheduling) -> Vec<u8> {
    const SIZE: u32 = 48;
    let mut bytes = Vec::with_capacity(SIZE as usize);
    bytes.extend_from_slice(&SIZE.to_ne_bytes());
    bytes.extend_from_slice(&scheduling.policy.to_ne_bytes());
    bytes.extend_from_slice(&scheduling.flags.to_ne_bytes());
    bytes.extend_from_slice(&scheduling.nice.to_ne_bytes());
    bytes.extend_from_slice(&scheduling.priority.to_ne_bytes());
    for word in [scheduling.runtime, scheduling.deadline, scheduling.period] {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nice_of_a_session() {
        assert_eq!(session_nice("/autogroup-17 nice -5\n"), Some(-5));
        assert_eq!(session_nice(""), None);
        assert_eq!(session_nice("/autogroup-17 nice x"), None);
    }
}
