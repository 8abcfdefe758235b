//! User, groups, capabilities, securebits, no_new_privs: of each thread for itself, as the kernel has it.
//!
//! They are restored last, by a task that still may do everything, in an order in which no step takes away what a later
//! one needs.

use super::Credentials;
use crate::remote::{Arg, RemoteCall};

const CAPABILITY_VERSION_3: u32 = 0x2008_0522;
/// With it a change of users leaves the capabilities alone.
const SECBIT_NO_SETUID_FIXUP: u32 = 1 << 2;
/// Highest capability this was written for (CAP_CHECKPOINT_RESTORE); later ones are dropped as the mask says.
const LAST_CAPABILITY: u32 = 63;

/// Everything of one task.
pub fn restore(credentials: &Credentials) -> Vec<RemoteCall> {
    let mut calls = restore_ids(credentials);
    calls.extend(restore_capabilities(credentials));
    calls
}

/// The part that leaves the task able to do everything: users, groups, the bounding set. Threads that are made after it
/// have it too.
pub fn restore_ids(credentials: &Credentials) -> Vec<RemoteCall> {
    let mut calls = vec![prctl("set securebits", libc::PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP.into())];
    calls.push(groups(credentials));
    for capability in (0..=LAST_CAPABILITY).filter(|bit| credentials.bounding >> bit & 1 == 0) {
        // EINVAL: this kernel does not know it.
        calls.push(prctl("drop a bounding capability", libc::PR_CAPBSET_DROP, capability.into()).may_fail());
    }
    let [real, effective, saved, file] = credentials.gids;
    let ids = vec![real.into(), effective.into(), saved.into()];
    calls.push(RemoteCall::new("set groups", libc::SYS_setresgid, ids));
    calls.push(RemoteCall::new("set the file system group", libc::SYS_setfsgid, vec![file.into()]));
    let [real, effective, saved, file] = credentials.uids;
    let ids = vec![real.into(), effective.into(), saved.into()];
    calls.push(RemoteCall::new("set users", libc::SYS_setresuid, ids));
    calls.push(RemoteCall::new("set the file system user", libc::SYS_setfsuid, vec![file.into()]));
    calls
}

/// The rest, of each thread for itself.
pub fn restore_capabilities(credentials: &Credentials) -> Vec<RemoteCall> {
    let mut calls = vec![prctl("set securebits", libc::PR_SET_SECUREBITS, credentials.securebits.into())];
    calls.push(capabilities(credentials));
    calls.extend(ambient(credentials));
    if credentials.no_new_privileges {
        calls.push(prctl("set no_new_privs", libc::PR_SET_NO_NEW_PRIVS, 1));
    }
    calls
}

fn prctl(what: &'static str, option: i32, value: u64) -> RemoteCall {
    RemoteCall::new(what, libc::SYS_prctl, vec![option.into(), value.into(), 0.into(), 0.into(), 0.into()])
}

fn groups(credentials: &Credentials) -> RemoteCall {
    let list = credentials.groups.iter().flat_map(|gid| gid.to_ne_bytes()).collect();
    let args = vec![(credentials.groups.len() as u64).into(), Arg::In(list)];
    RemoteCall::new("set supplementary groups", libc::SYS_setgroups, args)
}

fn capabilities(credentials: &Credentials) -> RemoteCall {
    let mut header = CAPABILITY_VERSION_3.to_ne_bytes().to_vec();
    header.extend_from_slice(&0u32.to_ne_bytes());
    let mut data = Vec::with_capacity(24);
    for shift in [0, 32] {
        for set in [credentials.effective, credentials.permitted, credentials.inheritable] {
            data.extend_from_slice(&((set >> shift) as u32).to_ne_bytes());
        }
    }
    RemoteCall::new("set capabilities", libc::SYS_capset, vec![Arg::In(header), Arg::In(data)])
}

fn ambient(credentials: &Credentials) -> Vec<RemoteCall> {
    let call = |what, command: i32, capability: u32| {
        let args = vec![libc::PR_CAP_AMBIENT.into(), command.into(), capability.into(), 0.into(), 0.into()];
        RemoteCall::new(what, libc::SYS_prctl, args)
    };
    let mut calls = vec![call("clear ambient capabilities", libc::PR_CAP_AMBIENT_CLEAR_ALL, 0)];
    let raised = (0..=LAST_CAPABILITY).filter(|bit| credentials.ambient >> bit & 1 == 1);
    calls.extend(raised.map(|bit| call("raise an ambient capability", libc::PR_CAP_AMBIENT_RAISE, bit)));
    calls
}
