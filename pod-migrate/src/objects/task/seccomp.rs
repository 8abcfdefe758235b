//! Seccomp: off, strict, or a chain of filters.
//!
//! A chain is kept once, with the first process that has it. On restore, what all tasks of the pod have in common (the
//! pod's own filter, mostly) is installed in the first process before there are others, which then inherit it: to
//! install a filter is to compile it (0.1 ms and more a task), and its copies would not share memory.
//!
//! Nothing is filtered while the task is traced (PTRACE_O_SUSPEND_SECCOMP), and installing needs privileges that the
//! task may not keep: this comes before credentials.

use super::{Filter, Seccomp};
use crate::Result;
use crate::ids::PodPid;
use crate::image::damaged;
use crate::remote::{Arg, RemoteCall};
use pod_runtime::proc::status::Status;
use pod_runtime::sys::ptrace;
use serde_bytes::ByteBuf;

const SET_MODE_STRICT: i32 = 0;
const SET_MODE_FILTER: i32 = 1;

/// The chains that first threads of processes were seen to have.
#[derive(Debug, Default)]
pub struct Chains {
    seen: Vec<(PodPid, Vec<Filter>)>,
}

impl Chains {
    /// Of one stopped task; `leads` is the process that it is the first thread of.
    pub fn dump(&mut self, tid: i32, status: &Status, leads: Option<PodPid>) -> std::io::Result<Seccomp> {
        if status.seccomp != 2 {
            return Ok(if status.seccomp == 1 { Seccomp::Strict } else { Seccomp::Off });
        }
        let mut filters = Vec::new();
        while let Some(program) = ptrace::seccomp_filter(tid, filters.len())? {
            let flags = ptrace::seccomp_flags(tid, filters.len()).unwrap_or(0);
            filters.push(Filter { flags, program: ByteBuf::from(program) });
        }
        if let Some((pid, _)) = self.seen.iter().find(|(_, chain)| *chain == filters) {
            return Ok(Seccomp::As(*pid));
        }
        self.seen.extend(leads.map(|pid| (pid, filters.clone())));
        Ok(Seccomp::Filters(filters))
    }
}

/// The filters of a task, wherever they are kept; `first` is what the first thread of a process has.
pub fn chain<'a>(seccomp: &'a Seccomp, first: impl FnOnce(PodPid) -> Option<&'a Seccomp>) -> Result<&'a [Filter]> {
    match seccomp {
        Seccomp::Off | Seccomp::Strict => Ok(&[]),
        Seccomp::Filters(filters) => Ok(filters),
        Seccomp::As(pid) => match first(*pid) {
            Some(Seccomp::Filters(filters)) => Ok(filters),
            _ => Err(damaged(format!("process {pid} does not have the filters that others share"))),
        },
    }
}

/// The first filters that all of these chains have.
pub fn common<'a>(chains: impl IntoIterator<Item = &'a [Filter]>) -> &'a [Filter] {
    let mut chains = chains.into_iter();
    let first = chains.next().unwrap_or_default();
    chains.fold(first, |before, chain| {
        if std::ptr::eq(before, chain) {
            return before;
        }
        let same = before.iter().zip(chain).take_while(|(a, b)| a == b).count();
        &before[..same]
    })
}

/// What a task has besides the `inherited` first filters of its chain.
pub fn restore(seccomp: &Seccomp, chain: &[Filter], inherited: usize) -> Vec<RemoteCall> {
    if *seccomp == Seccomp::Strict {
        let args = vec![SET_MODE_STRICT.into(), 0.into(), 0.into()];
        return vec![RemoteCall::new("enter strict seccomp", libc::SYS_seccomp, args)];
    }
    install(&chain[inherited..])
}

/// Oldest filter first.
pub fn install(filters: &[Filter]) -> Vec<RemoteCall> {
    let one = |filter: &Filter| {
        let mut fprog = vec![0u8; 16];
        fprog[..2].copy_from_slice(&((filter.program.len() / 8) as u16).to_ne_bytes());
        let program = Arg::Nested(fprog, vec![(1, filter.program.to_vec())]);
        let args = vec![SET_MODE_FILTER.into(), filter.flags.into(), program];
        RemoteCall::new("install a seccomp filter", libc::SYS_seccomp, args)
    };
    filters.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(byte: u8) -> Filter {
        Filter { flags: 0, program: ByteBuf::from(vec![byte; 8]) }
    }

    #[test]
    fn what_all_have_is_inherited() {
        let (one, two) = ([filter(1)], [filter(1), filter(2)]);
        assert_eq!(common([&one[..], &two, &one]), one);
        assert_eq!(restore(&Seccomp::Filters(two.to_vec()), &two, 1).len(), 1);
        assert!(common([&one[..], &[]]).is_empty());
        assert!(common([]).is_empty());
    }

    #[test]
    fn filters_of_nobody_are_refused() {
        let filters = Seccomp::Filters(vec![filter(1)]);
        let of_first = Seccomp::As(PodPid(1));
        assert_eq!(chain(&of_first, |_| Some(&filters)).unwrap(), [filter(1)]);
        assert_eq!(chain(&of_first, |_| None).unwrap_err().code(), crate::image::DAMAGED);
        assert!(chain(&of_first, |_| Some(&of_first)).is_err());
    }
}
