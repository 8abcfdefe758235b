//! What the opener cannot do itself, done by a process of the pod: the kernel notes who makes a pair, connects, listens.
//! The tasks have no descriptors yet.

use super::memory::close_all;
use super::tree::Grown;
use crate::Result;
use crate::ids::PodPid;
use crate::objects::files::opener::{Deed, Errand};
use crate::remote::{Arg, RemoteCall};

/// The results of the errand's own calls; `None` when there is no such process.
pub(super) fn run(grown: &Grown, opener: PodPid, errand: &Errand) -> Result<Option<Vec<i64>>> {
    let Some(stub) = grown.stubs.get(&errand.pid) else { return Ok(None) };
    match &errand.deed {
        Deed::Close => stub.run(&mut [close_all()]).map(|()| Some(Vec::new())),
        Deed::Pairs { kind, count } => {
            let args = || {
                let kind = kind | libc::SOCK_CLOEXEC;
                vec![libc::AF_UNIX.into(), kind.into(), 0.into(), Arg::Out(8)]
            };
            let pair = || RemoteCall::new("make a pair", libc::SYS_socketpair, args());
            let mut calls: Vec<RemoteCall> = ids(errand.uid, errand.gid).into();
            let first = calls.len();
            calls.extend((0..*count).map(|_| pair()));
            calls.extend(back());
            stub.run(&mut calls)?;
            let made = calls[first..first + count].iter().flat_map(|call| &call.out);
            let numbers = made.flat_map(|two| two.chunks_exact(4)).filter_map(|four| four.first_chunk());
            Ok(Some(numbers.map(|number| i64::from(i32::from_ne_bytes(*number))).collect()))
        }
        Deed::Listen { number, backlog } => {
            let call = RemoteCall::new("listen", libc::SYS_listen, vec![1.into(), (*backlog).into()]);
            on_a_copy(grown, opener, errand, *number, call).map(Some)
        }
        Deed::Connect { number, address } => {
            let length = Arg::from(address.len() as u64);
            let args = vec![1.into(), Arg::In(address.to_vec()), length];
            on_a_copy(grown, opener, errand, *number, RemoteCall::new("connect", libc::SYS_connect, args)).map(Some)
        }
    }
}

/// A call on descriptor 1, a copy of one of the opener's.
fn on_a_copy(grown: &Grown, opener: PodPid, errand: &Errand, number: i32, call: RemoteCall) -> Result<Vec<i64>> {
    let mut calls = vec![
        RemoteCall::new("open the opener", libc::SYS_pidfd_open, vec![opener.0.into(), 0.into()]).returns(0),
        RemoteCall::new("take a socket", libc::SYS_pidfd_getfd, vec![0.into(), number.into(), 0.into()]).returns(1),
    ];
    calls.extend(ids(errand.uid, errand.gid));
    let own = calls.len();
    calls.push(call.may_fail());
    calls.extend(back());
    calls.push(close_all());
    grown.stubs[&errand.pid].run(&mut calls)?;
    Ok(vec![calls[own].result])
}

/// -1: it stays.
const SAME: u32 = u32::MAX;

/// The effective ones only, so that there is a way back.
fn ids(uid: u32, gid: u32) -> [RemoteCall; 2] {
    [
        RemoteCall::new("take a group", libc::SYS_setresgid, vec![SAME.into(), gid.into(), SAME.into()]),
        RemoteCall::new("take a user", libc::SYS_setresuid, vec![SAME.into(), uid.into(), SAME.into()]),
    ]
}

fn back() -> [RemoteCall; 2] {
    let [group, user] = ids(0, 0);
    [user, group]
}
