//! The end of a pod's connections on the host that it has left.

use super::{REPAIR_ON, TCP_REPAIR};
use crate::ids::HostPid;
use libc::{IPPROTO_TCP, SOL_SOCKET};
use pod_runtime::sys::inet;
use std::os::fd::{AsFd, OwnedFd};

/// Closes the TCP connections of a pod that runs elsewhere now, without a packet and without a trace.
///
/// Make it when the pod's fate is decided (its tasks are frozen and will be killed), kill the tasks, then drop it: the
/// last reference to each connection is then ours and in repair mode.
#[derive(Debug, Default)]
pub struct Silence {
    connections: Vec<OwnedFd>,
}

impl Silence {
    /// Of all descriptors of these processes. What cannot be reached is left to the kernel: the cable is held, so the
    /// only harm is a socket that lingers.
    pub fn of(processes: impl IntoIterator<Item = HostPid>) -> Silence {
        let mut connections = Vec::new();
        for HostPid(pid) in processes {
            let Ok(pidfd) = pod_runtime::sys::pidfd::open_any(pid) else { continue };
            let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
            for entry in entries.flatten() {
                let is_socket = std::fs::read_link(entry.path())
                    .is_ok_and(|target| target.as_os_str().as_encoded_bytes().starts_with(b"socket:"));
                let number = entry.file_name().to_string_lossy().parse::<i32>().ok().filter(|_| is_socket);
                let Some(copy) = number.and_then(|fd| pod_runtime::sys::pidfd::get_fd(pidfd.as_fd(), fd).ok()) else {
                    continue;
                };
                if inet::number(copy.as_fd(), SOL_SOCKET, libc::SO_PROTOCOL).ok() == Some(IPPROTO_TCP)
                    && inet::set_number(copy.as_fd(), IPPROTO_TCP, TCP_REPAIR, REPAIR_ON).is_ok()
                {
                    connections.push(copy);
                }
            }
        }
        Silence { connections }
    }

    pub fn len(&self) -> usize {
        self.connections.len()
    }

    pub fn is_empty(&self) -> bool {
        self.connections.is_empty()
    }
}
