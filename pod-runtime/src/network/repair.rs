//! Connections that a tool was reading when it was killed.
//!
//! Their numbers can be read in repair mode only (TCP_REPAIR), which is a state of the socket and does not end with
//! whoever set it. The tool is in it for microseconds; one that is killed just then leaves a connection that answers its
//! own program with EPERM and its peer not at all. The monitor, which notices the death, ends the mode; where it is gone as
//! well, `pod ps` does.

use crate::sys::{inet, pidfd};
use libc::{IPPROTO_TCP, SO_PROTOCOL, SO_REUSEADDR, SOL_SOCKET};
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

const TCP_REPAIR: i32 = 19;
/// Without a word on the wire.
const OFF: i32 = -1;

/// Ends the repair mode of all connections of these processes; how many were in it. What is gone meanwhile needs none.
pub fn mend(pids: &[i32]) -> usize {
    pids.iter().map(|pid| sockets(*pid).filter(|socket| mend_one(socket.as_fd()).unwrap_or(false)).count()).sum()
}

fn sockets(pid: i32) -> impl Iterator<Item = OwnedFd> {
    let process = pidfd::open(pid).ok();
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    entries.filter_map(move |entry| {
        let number = entry.file_name().to_str()?.parse().ok()?;
        is_socket(&entry.path()).then(|| pidfd::get_fd(process.as_ref()?, number).ok()).flatten()
    })
}

fn is_socket(link: &Path) -> bool {
    fs::read_link(link).is_ok_and(|target| target.as_os_str().as_encoded_bytes().starts_with(b"socket:"))
}

fn mend_one(socket: BorrowedFd<'_>) -> io::Result<bool> {
    if inet::number(socket, SOL_SOCKET, SO_PROTOCOL)? != IPPROTO_TCP
        || inet::number(socket, IPPROTO_TCP, TCP_REPAIR)? == 0
    {
        return Ok(false);
    }
    inet::set_number(socket, IPPROTO_TCP, TCP_REPAIR, OFF)?;
    // The mode took the place of this option, and whether it had been set is gone. It is set on nearly every connection
    // of a server, and without it the port could not be listened on again as long as this one lives.
    inet::set_number(socket, SOL_SOCKET, SO_REUSEADDR, 1)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn a_connection_left_in_repair_mode_goes_on() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        inet::set_number(server.as_fd(), IPPROTO_TCP, TCP_REPAIR, 1).unwrap();
        client.write_all(b"x").unwrap();
        let mut byte = [0];
        assert_eq!(server.read(&mut byte).unwrap_err().raw_os_error(), Some(libc::EPERM));
        assert_eq!(mend(&[std::process::id() as i32]), 1);
        server.read_exact(&mut byte).unwrap();
        server.write_all(b"y").unwrap();
        client.read_exact(&mut byte).unwrap();
        assert_eq!((byte, mend(&[std::process::id() as i32])), (*b"y", 0));
    }
}
