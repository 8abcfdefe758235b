//! The last moment of a restore: connections speak again.

use super::super::inject::Segment;
use super::super::options::Options;
use super::{Connection, Phase, REPAIR_OFF, REPAIR_OFF_SILENTLY, State, TCP_REPAIR};
use super::{descriptor_flags, send_again, sent, sent_before, set_descriptor_flags, unaccepted};
use libc::{IPPROTO_TCP, MSG_EOR, SOL_SOCKET};
use nix::sys::socket::{Shutdown, shutdown};
use pod_runtime::network::frame::{ACK, FIN};
use pod_runtime::sys::inet;
use pod_runtime::{Doing, Result};
use std::os::fd::{AsRawFd, BorrowedFd};

/// The last moment: every socket of the pod exists and its port is plugged in. The connection speaks from here on.
pub fn release(state: &State, fd: BorrowedFd<'_>) -> Result<()> {
    match &state.phase {
        Phase::Listening { .. } => {
            unaccepted::reset_all(&state.unaccepted);
            Ok(())
        }
        Phase::Fresh { .. } | Phase::Ended { .. } => Ok(()),
        Phase::Connecting { peer, .. } => {
            let flags = descriptor_flags(fd)?;
            set_descriptor_flags(fd, flags | libc::O_NONBLOCK)?;
            let connected = inet::connect(fd, &peer.bytes());
            set_descriptor_flags(fd, flags)?;
            match connected {
                Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => {
                    // The program learns it by its own call, as it would have without the move.
                    tracing::warn!("W-CONNECT: connecting to {peer} again: {error}");
                    Ok(())
                }
                _ => Ok(()),
            }
        }
        Phase::Connected(connection) => release_connection(connection, &state.options, fd)
            .doing(|| format!("release {} to {}", connection.local, connection.peer)),
    }
}

/// Whether nobody waits for anything: all that was written is acknowledged, so is all that was received, both sides are open,
/// and the peer has room. It needs no packet to go on; a probe and its answer would be most of what it costs to let one go.
pub fn is_quiet(connection: &Connection) -> bool {
    let Connection { received_fin, sent_fin, read_shut, window, mss, .. } = connection;
    let received = connection.receive_sequence.wrapping_add(connection.unread.len() as u32);
    let ended = *received_fin || *sent_fin || *read_shut;
    !ended && connection.unacknowledged.is_empty() && window.rcv_wup == received && window.snd_wnd >= *mss
}

/// One that nobody waits for has all its options already.
fn release_quiet(options: &Options, fd: BorrowedFd<'_>) -> Result<()> {
    inet::set_number(fd, IPPROTO_TCP, TCP_REPAIR, REPAIR_OFF_SILENTLY).doing(|| "leave repair mode".into())?;
    match options.reuse_address {
        true => inet::set_number(fd, SOL_SOCKET, libc::SO_REUSEADDR, 1).doing(|| "set SO_REUSEADDR".into()),
        false => Ok(()),
    }
}

fn release_connection(connection: &Connection, options: &Options, fd: BorrowedFd<'_>) -> Result<()> {
    if is_quiet(connection) {
        return release_quiet(options, fd);
    }
    // With a probe of the window: the peer answers where it stands. One that has ended may be gone (an end in the same
    // pod always is) and would answer with a reset before its own end is handed in.
    let probe = !connection.received_fin || sent_before(connection) > 0;
    let off = if probe { REPAIR_OFF } else { REPAIR_OFF_SILENTLY };
    inet::set_number(fd, IPPROTO_TCP, TCP_REPAIR, off).doing(|| "leave repair mode".into())?;
    inet::set_number(fd, SOL_SOCKET, libc::SO_REUSEADDR, i32::from(options.reuse_address))
        .doing(|| "set SO_REUSEADDR".into())?;
    if connection.received_fin && !connection.sent_fin_first {
        hand_in_fin(connection)?;
    }
    // What had been sent ends a segment. Written together with what follows, its end would be in the middle of a full one,
    // for which the window may have no room: what the peer acknowledges would never have been sent.
    let (again, rest) = connection.unacknowledged.split_at(sent(connection));
    send_again(fd, &again[sent_before(connection)..], MSG_EOR, options)?;
    send_again(fd, rest, 0, options)?;
    options.last(fd)?;
    if connection.sent_fin {
        shutdown(fd.as_raw_fd(), Shutdown::Write).doing(|| "shut down for writing".into())?;
    }
    if connection.received_fin && connection.sent_fin_first {
        hand_in_fin(connection)?;
    }
    if connection.read_shut {
        shutdown(fd.as_raw_fd(), Shutdown::Read).doing(|| "shut down for reading".into())?;
    }
    Ok(())
}

fn hand_in_fin(connection: &Connection) -> Result<()> {
    let shift = connection.window_scale.map_or(0, |(send, _)| u32::from(send).min(14));
    Segment {
        from: connection.peer,
        to: connection.local,
        sequence: connection.receive_sequence.wrapping_add(connection.unread.len() as u32),
        acknowledge: connection.send_sequence,
        flags: FIN | ACK,
        window: (connection.window.snd_wnd >> shift).min(0xffff) as u16,
    }
    .inject()
}
