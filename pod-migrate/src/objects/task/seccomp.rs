//! Seccomp: off, strict, or a chain of filters.
//!
//! Nothing is filtered while the task is traced (PTRACE_O_SUSPEND_SECCOMP), and installing needs privileges that the
//! task may not keep: this comes before credentials.

use super::Seccomp;
use crate::remote::{Arg, RemoteCall};

const SET_MODE_STRICT: i32 = 0;
const SET_MODE_FILTER: i32 = 1;

/// Oldest filter first.
pub fn restore(seccomp: &Seccomp) -> Vec<RemoteCall> {
    match seccomp {
        Seccomp::Off => Vec::new(),
        Seccomp::Strict => {
            vec![RemoteCall::new(
                "enter strict seccomp",
                libc::SYS_seccomp,
                vec![SET_MODE_STRICT.into(), 0.into(), 0.into()],
            )]
        }
        Seccomp::Filters(filters) => filters
            .iter()
            .map(|filter| {
                let mut fprog = vec![0u8; 16];
                fprog[..2].copy_from_slice(&((filter.program.len() / 8) as u16).to_ne_bytes());
                let program = Arg::Nested(fprog, vec![(1, filter.program.to_vec())]);
                let args = vec![SET_MODE_FILTER.into(), filter.flags.into(), program];
                RemoteCall::new("install a seccomp filter", libc::SYS_seccomp, args)
            })
            .collect(),
    }
}
