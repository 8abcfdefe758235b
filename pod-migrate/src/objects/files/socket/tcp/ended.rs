//! TCP sockets whose connection is over, or never was: made again with what can still be read, and the error that the
//! next call is to be told.

use super::super::address::{Endpoint, Family};
use super::super::inject::Segment;
use super::super::options::Options;
use super::{
    RECEIVE_QUEUE, SEND_QUEUE, bind, descriptor_flags, fill_received, leave_repair, set_descriptor_flags, set_sequence,
    unspecified,
};
use libc::{IPPROTO_TCP, SOCK_STREAM, SOL_SOCKET};
use pod_runtime::network::frame::{ACK, FIN, RST};
use pod_runtime::sys::inet;
use pod_runtime::{Doing, Result};
use std::os::fd::{AsFd, BorrowedFd};

fn loopback(family: Family) -> Endpoint {
    let ip = match family {
        Family::V4 => std::net::Ipv4Addr::LOCALHOST.into(),
        Family::V6 => std::net::Ipv6Addr::LOCALHOST.into(),
    };
    Endpoint { ip, port: 0, scope: 0 }
}

/// Nobody listens at a port that is only bound.
pub(super) fn be_refused(fd: BorrowedFd<'_>, family: Family) -> Result<()> {
    let doing = || "connect where nobody listens".to_string();
    let nobody = inet::socket(family.number(), SOCK_STREAM, IPPROTO_TCP).doing(doing)?;
    inet::bind(nobody.as_fd(), &loopback(family).bytes()).doing(doing)?;
    let to = inet::local_address(nobody.as_fd()).doing(doing)?;
    let flags = descriptor_flags(fd)?;
    set_descriptor_flags(fd, flags | libc::O_NONBLOCK)?;
    let connected = inet::connect(fd, &to);
    set_descriptor_flags(fd, flags)?;
    match connected {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINPROGRESS | libc::ECONNREFUSED)) => Ok(()),
        other => other.doing(doing),
    }
}

/// A connection that is over: one to ourselves is made in repair mode, filled, and ended by packets that we make.
pub(super) fn restore_ended(
    fd: BorrowedFd<'_>,
    family: Family,
    unread: &[u8],
    failed: bool,
    options: &Options,
) -> Result<()> {
    const SEQUENCE: u32 = 1000;
    let own = loopback(family);
    set_sequence(fd, SEND_QUEUE, SEQUENCE)?;
    set_sequence(fd, RECEIVE_QUEUE, SEQUENCE)?;
    bind(fd, &own)?;
    let local =
        Endpoint::parse(&inet::local_address(fd).doing(|| "read an address".into())?).unwrap_or(unspecified(family));
    // Port 9 is "discard"; nobody is asked.
    let peer = Endpoint { port: 9, ..own };
    inet::connect(fd, &peer.bytes()).doing(|| "connect in repair mode".into())?;
    fill_received(fd, unread, options)?;
    let sequence = SEQUENCE.wrapping_add(unread.len() as u32);
    let end = |flags, sequence| Segment { from: peer, to: local, sequence, acknowledge: SEQUENCE, flags, window: 1000 };
    if failed {
        // Reading gives the rest, and then the error.
        end(RST | ACK, sequence).inject()?;
    } else {
        // After a FIN, reading gives the rest and then the end; the RST that follows only ends the other direction.
        end(FIN | ACK, sequence).inject()?;
        end(RST | ACK, sequence.wrapping_add(1)).inject()?;
        let _ = inet::number(fd, SOL_SOCKET, libc::SO_ERROR);
    }
    leave_repair(fd, options)?;
    options.after_bind(fd)
}
