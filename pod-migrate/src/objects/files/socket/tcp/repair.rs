//! Repair mode of a connection, for the length of a few system calls.

use super::{REPAIR_OFF_SILENTLY, REPAIR_ON, TCP_QUEUE_SEQ, TCP_REPAIR, TCP_REPAIR_QUEUE};
use libc::{IPPROTO_TCP, SOL_SOCKET};
use pod_runtime::sys::inet;
use pod_runtime::{Doing, Problem, Result};
use std::os::fd::BorrowedFd;

/// The socket is in repair mode; dropping this ends it without a packet and puts back what the mode changes.
pub(super) struct Repair<'a> {
    fd: BorrowedFd<'a>,
    reuse_address: i32,
}

impl<'a> Repair<'a> {
    pub fn enter(fd: BorrowedFd<'a>, subject: &str) -> Result<Repair<'a>> {
        let reuse_address = inet::number(fd, SOL_SOCKET, libc::SO_REUSEADDR).doing(|| "read SO_REUSEADDR".into())?;
        inet::set_number(fd, IPPROTO_TCP, TCP_REPAIR, REPAIR_ON).map_err(|error| {
            let problem = match error.raw_os_error() {
                Some(libc::ENOPROTOOPT) => Problem::new("E-SOCKET-MPTCP", format!("{subject}: a connection of MPTCP"))
                    .fix("connect with plain TCP (for Go programs: GODEBUG=multipathtcp=0)"),
                _ => Problem::new("E-TCP-REPAIR", format!("{subject}: the kernel does not open the connection to us")),
            };
            problem.because(error)
        })?;
        Ok(Repair { fd, reuse_address })
    }

    pub fn number(&self, name: i32) -> Result<u32> {
        inet::number(self.fd, IPPROTO_TCP, name).map(|value| value as u32).doing(|| format!("read TCP option {name}"))
    }

    pub fn queue(&self, queue: i32) -> Result<()> {
        inet::set_number(self.fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, queue).doing(|| "choose a TCP queue".into())
    }

    pub fn sequence(&self, queue: i32) -> Result<u32> {
        self.queue(queue)?;
        self.number(TCP_QUEUE_SEQ)
    }
}

impl Drop for Repair<'_> {
    fn drop(&mut self) {
        let _ = inet::set_number(self.fd, IPPROTO_TCP, TCP_REPAIR, REPAIR_OFF_SILENTLY);
        let _ = inet::set_number(self.fd, SOL_SOCKET, libc::SO_REUSEADDR, self.reuse_address);
    }
}
