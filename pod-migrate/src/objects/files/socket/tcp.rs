//! TCP, over IPv4, IPv6 and IPv6 with mapped addresses, in every state that a descriptor can be in.
//!
//! **Dump.** The copy of the socket is put into repair mode for the length of a few system calls, in which sequence
//! numbers, window and the send queue can be read, and taken out of it without a word on the wire (-1). So an attempt
//! that is given up needs no undo. A tool that is killed in that very moment leaves the mode on: the pod's monitor ends
//! it ([`pod_runtime::network::repair`]). The pod's tasks are stopped and its cable is held meanwhile; nothing moves.
//!
//! **Restore.** In repair mode the socket is bound (beside its own listener, which the forced reuse of that mode
//! allows), "connected" without a packet, given options, window and what was received but not read. Nothing is sent.
//! Only [`release`] does, when all sockets of the pod exist again and its port is plugged in:
//!
//! * What was written but not acknowledged is written again *after* repair mode, from `snd_una` on, whether it was sent
//!   or not. The peer drops what it has. (Pushed in repair mode it would wait for a retransmission timer: one second.)
//! * A FIN that was received is handed in again by a packet that we make ([`super::inject`]), because repair mode has
//!   no way to say CLOSE_WAIT. A FIN that was sent is sent again by shutdown(2).
//!
//! **What the kernel does not give**: out-of-order segments (the peer repeats them), ECN of the connection (it goes on
//! without), connections that no program has accepted yet ([`Phase::Listening`] counts them). Urgent data that
//! waits is refused: the stream around its mark cannot be peeked at in one piece.
//!
//! **Leaving.** Closing a socket the usual way would send a FIN. The source host's cable is held, so it reaches nobody,
//! but the socket would linger. [`Silence`] closes all connections of a pod without a word once it runs elsewhere.

pub mod closed;
mod ended;
pub mod pairs;
mod release;
mod repair;
mod rest;
pub(super) mod signature;
mod silence;
pub mod summary;
pub(super) mod unaccepted;
mod window;

pub(super) use release::is_quiet;
pub use release::release;
use repair::Repair;
pub use silence::Silence;
pub use window::Window;

use super::address::{Endpoint, Family};
use super::options::Options;
use libc::{IPPROTO_TCP, MSG_DONTWAIT, MSG_NOSIGNAL, MSG_PEEK, SOCK_STREAM, SOL_SOCKET};
use pod_runtime::sys::inet;
use pod_runtime::{Doing, Problem, Result};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

const TCP_REPAIR: i32 = 19;
const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQ: i32 = 21;
const TCP_REPAIR_OPTIONS: i32 = 22;
const TCP_TIMESTAMP: i32 = 24;
const TCP_REPAIR_WINDOW: i32 = 29;
const TCP_ULP: i32 = 31;

const REPAIR_OFF: i32 = 0;
const REPAIR_ON: i32 = 1;
/// Without the window probe.
const REPAIR_OFF_SILENTLY: i32 = -1;
const RECEIVE_QUEUE: i32 = 1;
const SEND_QUEUE: i32 = 2;

const OPTION_MSS: u32 = 2;
const OPTION_WINDOW_SCALE: u32 = 3;
const OPTION_SACK: u32 = 4;
const OPTION_TIMESTAMPS: u32 = 8;

/// Largest queue that is carried: the kernel's own limit for a socket buffer is far below.
const MAX_QUEUE: usize = 60 << 20;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub family: Family,
    pub options: Options,
    pub phase: Phase,
    #[serde(default)]
    pub signatures: Vec<signature::Key>,
    /// Of a listener: connections that nobody has accepted, our end and the peer's.
    #[serde(default)]
    pub unaccepted: Vec<(Endpoint, Endpoint)>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Never connected.
    Fresh { local: Option<Endpoint> },
    Listening {
        local: Endpoint,
        backlog: u32,
        /// Handshakes that are complete but that no program has accepted.
        waiting: u32,
        /// `TCP_FASTOPEN`: the length of its queue, 0 for none.
        fast_open: u32,
    },
    /// SYN_SENT.
    Connecting { local: Endpoint, peer: Endpoint, initial_sequence: u32 },
    /// ESTABLISHED and every state after it in which the peer is still there.
    Connected(Box<Connection>),
    /// Over: what the peer had sent may still be read, then the end.
    /// `failed`: the next call is told of an error. `refused`: it never was connected.
    Ended {
        unread: ByteBuf,
        failed: bool,
        #[serde(default)]
        refused: bool,
    },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Connection {
    pub local: Endpoint,
    pub peer: Endpoint,
    /// Of the first byte that the peer has not acknowledged.
    pub send_sequence: u32,
    /// Of the first byte that the program has not read.
    pub receive_sequence: u32,
    pub unread: ByteBuf,
    /// Written by the program, not acknowledged by the peer.
    pub unacknowledged: ByteBuf,
    /// So many of them had been sent: the peer may have them and say so at any moment.
    pub sent: u64,
    pub received_fin: bool,
    pub sent_fin: bool,
    /// CLOSING: our FIN was first.
    pub sent_fin_first: bool,
    /// The program has shut down its reading side.
    pub read_shut: bool,
    pub window: Window,
    /// What the peer's SYN allowed.
    pub mss: u32,
    pub sack: bool,
    /// Shifts for sending and receiving.
    pub window_scale: Option<(u8, u8)>,
    /// Our clock as the peer knows it; bit 0 says microseconds (Linux ≥ 6.7), else milliseconds.
    pub timestamp: Option<u32>,
}

/// Kernel's numbers of the states, as in `struct tcp_info`.
mod kernel_state {
    pub const ESTABLISHED: u8 = 1;
    pub const SYN_SENT: u8 = 2;
    pub const FIN_WAIT1: u8 = 4;
    pub const FIN_WAIT2: u8 = 5;
    pub const CLOSE: u8 = 7;
    pub const CLOSE_WAIT: u8 = 8;
    pub const LAST_ACK: u8 = 9;
    pub const LISTEN: u8 = 10;
    pub const CLOSING: u8 = 11;
}
use kernel_state::*;

/// What we need of `struct tcp_info`.
struct Info {
    state: u8,
    options: u8,
    window_scale: u8,
    /// For a listener: handshakes that wait to be accepted, and how many may.
    unacked: u32,
    sacked: u32,
}

impl Info {
    fn of(fd: BorrowedFd<'_>) -> Result<Info> {
        let bytes = inet::option(fd, IPPROTO_TCP, libc::TCP_INFO, &[], 104).doing(|| "read the TCP state".into())?;
        let word =
            |at: usize| bytes.get(at..at + 4).map_or(0, |four| u32::from_ne_bytes(four.try_into().expect("four")));
        let byte = |at: usize| bytes.get(at).copied().unwrap_or(0);
        Ok(Info { state: byte(0), options: byte(5), window_scale: byte(6), unacked: word(24), sacked: word(28) })
    }
}

/// Reads a socket and leaves it as it was. `subject` is "pid 41 nginx, fd 7".
///
/// The other end may be in the pod too, and no cable between them is cut: what was on its way before the freeze and the
/// kernel's timers (an acknowledgement that was put off, a paced segment) can change a connection while it is read. Then
/// it is read again.
pub fn dump(fd: BorrowedFd<'_>, family: Family, subject: &str) -> Result<State> {
    dump_as(fd, family, subject, &|but| Options::dump(fd, but, subject))
}

/// A socket that was read, but for what only sock_diag tells.
#[derive(Debug)]
pub struct Read {
    pub state: State,
    /// It is known to have no keys of signatures.
    pub unsigned: bool,
}

/// The same as [`dump`] with options as they are told of many sockets at once.
pub(in super::super) fn dump_of_many(
    fd: BorrowedFd<'_>,
    subject: &str,
    groups: &summary::Groups<'_>,
    summary: &summary::Summary,
) -> Result<Read> {
    let family = groups.plan().family(summary);
    let asked = || dump_as(fd, family, subject, &|but| groups.options(fd, summary, but, subject));
    let told = groups.at_rest(summary, || match dump_as(fd, family, subject, &|_| Ok(Options::default()))?.phase {
        Phase::Connected(connection) => Ok(Some(*connection)),
        _ => Ok(None),
    })?;
    let state = match told {
        Some(connection) => {
            let options = groups.options(fd, summary, NOT_OF_CONNECTIONS, subject)?;
            let phase = Phase::Connected(Box::new(connection));
            State { family, options, phase, signatures: Vec::new(), unaccepted: Vec::new() }
        }
        None => asked()?,
    };
    Ok(Read { state, unsigned: groups.plan().is_unsigned(summary) })
}

/// TCP shows one (accepted connections that of their first packet), but lets nobody set it.
const NOBODYS: &str = "multicast_ttl";
/// Of a connection the others tell what was negotiated, which is restored by other means.
const NOT_OF_CONNECTIONS: &[&str] = &[NOBODYS, "tcp_maxseg", "tcp_window_clamp"];

/// `options` reads those that do not have one of these names.
type ReadOptions<'a> = &'a dyn Fn(&[&str]) -> Result<Options>;

fn dump_as(fd: BorrowedFd<'_>, family: Family, subject: &str, options: ReadOptions<'_>) -> Result<State> {
    const ATTEMPTS: u32 = 100;
    for _ in 0..ATTEMPTS {
        if let Some(state) = dump_once(fd, family, subject, options)? {
            return Ok(state);
        }
    }
    Err(Problem::new("E-TCP-STATE", format!("{subject}: the connection changes again and again while it is read"))
        .fix("try again in a moment"))
}

/// `None` if it changed meanwhile.
fn dump_once(fd: BorrowedFd<'_>, family: Family, subject: &str, options: ReadOptions<'_>) -> Result<Option<State>> {
    let local = Endpoint::parse(&inet::local_address(fd).doing(|| format!("{subject}: read its address"))?);
    let local = local.filter(|local| !local.is_unbound());
    if let Ok(ulp) = inet::option(fd, IPPROTO_TCP, TCP_ULP, &[], 16)
        && ulp.first().is_some_and(|byte| *byte != 0)
    {
        let name = String::from_utf8_lossy(&ulp).trim_end_matches('\0').to_string();
        return Err(Problem::new("E-SOCKET-ULP", format!("{subject}: the kernel speaks '{name}' on this connection"))
            .fix("let the program do it itself (for TLS: switch kTLS off)"));
    }
    let info = Info::of(fd)?;
    let but: &[&str] = match info.state {
        LISTEN | CLOSE => &[NOBODYS],
        _ => NOT_OF_CONNECTIONS,
    };
    let options = options(but)?;
    let phase = match info.state {
        LISTEN => Phase::Listening {
            local: local.unwrap_or(unspecified(family)),
            backlog: info.sacked,
            waiting: info.unacked,
            fast_open: inet::number(fd, IPPROTO_TCP, libc::TCP_FASTOPEN).unwrap_or(0).max(0) as u32,
        },
        CLOSE => dump_closed(fd, local, &info).doing(|| subject.to_owned())?,
        SYN_SENT => {
            let repair = Repair::enter(fd, subject)?;
            let initial_sequence = repair.sequence(SEND_QUEUE)?.wrapping_sub(1);
            drop(repair);
            Phase::Connecting {
                local: local.unwrap_or(unspecified(family)),
                peer: peer(fd, subject)?,
                initial_sequence,
            }
        }
        ESTABLISHED | FIN_WAIT1 | FIN_WAIT2 | CLOSE_WAIT | LAST_ACK | CLOSING => {
            let local = local.unwrap_or(unspecified(family));
            let Some(connection) = dump_connection(fd, local, &info, subject)? else { return Ok(None) };
            Phase::Connected(Box::new(connection))
        }
        other => {
            return Err(Problem::new(
                "E-TCP-STATE",
                format!("{subject}: a TCP socket in the state {other} of the kernel"),
            )
            .fix("try again in a moment"));
        }
    };
    Ok(Some(State { family, options, phase, signatures: Vec::new(), unaccepted: Vec::new() }))
}

fn unspecified(family: Family) -> Endpoint {
    let ip = match family {
        Family::V4 => std::net::Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    Endpoint { ip, port: 0, scope: 0 }
}

fn peer(fd: BorrowedFd<'_>, subject: &str) -> Result<Endpoint> {
    // A socket that still connects has no peer name yet, but the repair mode gives it.
    let bytes = inet::peer_address(fd).or_else(|error| {
        if error.raw_os_error() != Some(libc::ENOTCONN) {
            return Err(error);
        }
        super::listing::peer_of(fd)
    });
    let bytes = bytes.doing(|| format!("{subject}: read its peer's address"))?;
    Endpoint::parse(&bytes).ok_or_else(|| Problem::new("E-TCP-STATE", format!("{subject}: a peer without an address")))
}

/// CLOSE: a socket that was never connected, or one whose connection is over.
fn dump_closed(fd: BorrowedFd<'_>, local: Option<Endpoint>, info: &Info) -> Result<Phase> {
    let found = inet::poll_now(fd, libc::POLLIN | libc::POLLRDHUP).doing(|| "poll a socket".into())?;
    let failed = found & libc::POLLERR != 0;
    if found & libc::POLLRDHUP == 0 && !failed {
        return Ok(Phase::Fresh { local });
    }
    // Whoever answers a handshake agrees to some option.
    Ok(Phase::Ended { unread: ByteBuf::from(peek_received(fd)?), failed, refused: failed && info.options == 0 })
}

/// What waits to be read. Peeking goes on from where an earlier peek with SO_PEEK_OFF stopped, so that is put aside.
fn peek_received(fd: BorrowedFd<'_>) -> Result<Vec<u8>> {
    let waiting = unread(fd)?;
    if waiting == 0 {
        return Ok(Vec::new());
    }
    let offset = inet::number(fd, SOL_SOCKET, libc::SO_PEEK_OFF).unwrap_or(-1);
    if offset >= 0 {
        inet::set_number(fd, SOL_SOCKET, libc::SO_PEEK_OFF, -1).doing(|| "put SO_PEEK_OFF aside".into())?;
    }
    let read = inet::receive(fd, waiting.min(MAX_QUEUE), MSG_PEEK | MSG_DONTWAIT);
    if offset >= 0 {
        let _ = inet::set_number(fd, SOL_SOCKET, libc::SO_PEEK_OFF, offset);
    }
    let bytes = match read {
        Ok(message) => message.bytes,
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Vec::new(),
        Err(error) => return Err(error).doing(|| "peek at the receive queue".into()),
    };
    let urgent = inet::poll_now(fd, libc::POLLPRI).doing(|| "poll a socket".into())? & libc::POLLPRI != 0;
    if urgent || bytes.len() < waiting.min(MAX_QUEUE) {
        let what = "urgent data (MSG_OOB) waits to be read, or data in front of its mark";
        return Err(Problem::new("E-TCP-URGENT", what).fix("try again in a moment"));
    }
    Ok(bytes)
}

/// How much there is to read: the kernel counts only as far as a mark of urgent data unless that is kept in line.
fn unread(fd: BorrowedFd<'_>) -> Result<usize> {
    let count = || inet::unread(fd).doing(|| "size the receive queue".into());
    if inet::number(fd, SOL_SOCKET, libc::SO_OOBINLINE).unwrap_or(0) != 0 {
        return count();
    }
    let in_line = |on| inet::set_number(fd, SOL_SOCKET, libc::SO_OOBINLINE, on);
    in_line(1).doing(|| "count urgent data too".into())?;
    let counted = count();
    in_line(0).doing(|| "count urgent data no more".into())?;
    counted
}

fn dump_connection(fd: BorrowedFd<'_>, local: Endpoint, info: &Info, subject: &str) -> Result<Option<Connection>> {
    let received_fin = matches!(info.state, CLOSE_WAIT | LAST_ACK | CLOSING);
    let sent_fin = matches!(info.state, FIN_WAIT1 | FIN_WAIT2 | LAST_ACK | CLOSING);
    let fin_acknowledged = info.state == FIN_WAIT2;
    let hung_up = inet::poll_now(fd, libc::POLLRDHUP).doing(|| "poll a socket".into())? & libc::POLLRDHUP != 0;
    let peer = match peer(fd, subject) {
        Err(_) if Info::of(fd)?.state != info.state => return Ok(None),
        peer => peer?,
    };

    let repair = Repair::enter(fd, subject)?;
    let receive_next = repair.sequence(RECEIVE_QUEUE)?;
    let unread = peek_received(fd).doing(|| subject.to_owned())?;
    let write_sequence = repair.sequence(SEND_QUEUE)?;
    // The unsent part first: what is sent or acknowledged meanwhile makes the sent part larger than it is, never smaller.
    let unsent = inet::unsent(fd).doing(|| "size the send queue".into())?;
    let outstanding = inet::unacknowledged(fd).doing(|| "size the send queue".into())?;
    let fin_outstanding = usize::from(sent_fin && !fin_acknowledged);
    let unacknowledged = peek_sent(fd, outstanding.saturating_sub(fin_outstanding))?;
    let same = unacknowledged.is_some() && inet::unacknowledged(fd).is_ok_and(|now| now == outstanding);
    let Some(unacknowledged) = unacknowledged.filter(|_| same) else { return Ok(None) };
    let window = inet::option(fd, IPPROTO_TCP, TCP_REPAIR_WINDOW, &[], 20).doing(|| "read the TCP window".into())?;
    let window = Window::parse(&window).ok_or_else(|| Problem::new("E-TCP-REPAIR", "the TCP window is cut short"))?;
    let mss = repair.number(libc::TCP_MAXSEG)?;
    let timestamp = match info.options & 1 != 0 {
        true => Some(repair.number(TCP_TIMESTAMP)?),
        false => None,
    };
    let same = repair.sequence(RECEIVE_QUEUE)? == receive_next;
    drop(repair);
    if !same || Info::of(fd)?.state != info.state {
        return Ok(None);
    }

    let fin = u32::from(sent_fin);
    let send_sequence = write_sequence.wrapping_sub(unacknowledged.len() as u32).wrapping_sub(fin);
    let received = receive_next.wrapping_sub(u32::from(received_fin));
    Ok(Some(Connection {
        local,
        peer,
        send_sequence,
        receive_sequence: received.wrapping_sub(unread.len() as u32),
        unread: ByteBuf::from(unread),
        sent: outstanding.saturating_sub(unsent).min(unacknowledged.len()) as u64,
        unacknowledged: ByteBuf::from(unacknowledged),
        received_fin,
        sent_fin,
        sent_fin_first: info.state == CLOSING,
        read_shut: hung_up && !received_fin,
        window,
        mss,
        sack: info.options & 2 != 0,
        window_scale: (info.options & 4 != 0).then_some((info.window_scale & 15, info.window_scale >> 4)),
        timestamp: timestamp.map(|value| if microsecond_bit() { value } else { value & !1 }),
    }))
}

/// How many of the unacknowledged bytes are put back as sent already.
///
/// An acknowledgement of more than was sent is thrown away, with all that comes along in its segment. So what the peer may
/// acknowledge must be sent again at once, which an initial congestion window allows for some ten segments: then the
/// peer answers within a round trip, also when it never got them. More than that, or than the window that the peer is
/// known to have, is put back as sent; the probe of [`release_connection`] makes the peer say how much of it it has.
fn sent_before(connection: &Connection) -> usize {
    const SENT_AT_ONCE: u64 = 8;
    let sent = sent(connection);
    let at_once = (SENT_AT_ONCE * u64::from(connection.mss.max(1))).min(u64::from(connection.window.snd_wnd));
    if sent as u64 <= at_once { 0 } else { sent }
}

fn sent(connection: &Connection) -> usize {
    connection.sent.min(connection.unacknowledged.len() as u64) as usize
}

/// The unacknowledged bytes. The first segment of the queue may begin before them: the peer has acknowledged a part of
/// it; so what counts is the end. `None` if it got acknowledged meanwhile.
fn peek_sent(fd: BorrowedFd<'_>, outstanding: usize) -> Result<Option<Vec<u8>>> {
    if outstanding == 0 {
        return Ok(Some(Vec::new()));
    }
    if outstanding > MAX_QUEUE {
        return Err(Problem::new("E-TCP-STATE", "a send queue larger than any the kernel makes"));
    }
    // A segment is at most 64 KiB (512 KiB with BIG TCP).
    let peeked = inet::receive(fd, outstanding + (512 << 10), MSG_PEEK | MSG_DONTWAIT);
    let mut bytes = peeked.doing(|| "peek at the send queue".into())?.bytes;
    Ok(bytes.len().checked_sub(outstanding).map(|before| bytes.split_off(before)))
}

/// Whether this kernel keeps the unit of a connection's clock in bit 0 (since 6.7); before, bit 0 was time.
fn microsecond_bit() -> bool {
    static HAS_ONE: OnceLock<bool> = OnceLock::new();
    *HAS_ONE.get_or_init(|| {
        let Ok(name) = nix::sys::utsname::uname() else { return false };
        let release = name.release().to_string_lossy().into_owned();
        let mut parts = release.split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
        (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= (6, 7)
    })
}

/// Makes the socket again, in the pod's network namespace. Nothing is sent: a connection stays in repair mode until
/// [`release`].
pub fn restore(state: &State) -> Result<OwnedFd> {
    let State { family, options, phase, signatures, unaccepted: _ } = state;
    let socket = inet::socket(family.number(), SOCK_STREAM, IPPROTO_TCP).doing(|| "make a TCP socket".into())?;
    let fd = socket.as_fd();
    // All are bound in repair mode, so that the order of listeners and connections on one port does not matter.
    let repaired = !matches!(phase, Phase::Fresh { local: None } | Phase::Ended { refused: true, .. });
    options.before_bind(fd, !repaired)?;
    signature::restore(signatures, fd, *family)?;
    if repaired {
        let on = inet::set_number(fd, IPPROTO_TCP, TCP_REPAIR, REPAIR_ON);
        on.code("E-TCP-REPAIR", || "the kernel does not open TCP sockets to us".into())?;
    }
    match phase {
        Phase::Fresh { local: None } => options.after_bind(fd)?,
        Phase::Fresh { local: Some(local) } => {
            bind(fd, local)?;
            leave_repair(fd, options)?;
            options.after_bind(fd)?;
        }
        Phase::Listening { local, backlog, waiting: _, fast_open } => {
            bind(fd, local)?;
            leave_repair(fd, options)?;
            options.after_bind(fd)?;
            if *fast_open > 0 {
                let _ = inet::set_number(fd, IPPROTO_TCP, libc::TCP_FASTOPEN, *fast_open as i32);
            }
            // listen(2) looks for conflicts anew, and a listener cannot leave repair mode. With its connections there
            // already (all of them in forced reuse) it needs SO_REUSEADDR for the moment.
            inet::set_number(fd, SOL_SOCKET, libc::SO_REUSEADDR, 1).doing(|| "set SO_REUSEADDR".into())?;
            listen(fd, *backlog).doing(|| format!("listen on {local}"))?;
            inet::set_number(fd, SOL_SOCKET, libc::SO_REUSEADDR, i32::from(options.reuse_address))
                .doing(|| "set SO_REUSEADDR".into())?;
        }
        Phase::Connecting { local, peer: _, initial_sequence } => {
            bind(fd, local)?;
            set_sequence(fd, SEND_QUEUE, *initial_sequence)?;
            leave_repair(fd, options)?;
            options.after_bind(fd)?;
        }
        Phase::Connected(connection) => {
            restore_connection(fd, connection, options)
                .doing(|| format!("restore {} to {}", connection.local, connection.peer))?;
            options.after_bind(fd)?;
        }
        Phase::Ended { refused: true, .. } => {
            ended::be_refused(fd, *family)?;
            options.after_bind(fd)?;
        }
        Phase::Ended { unread, failed, refused: false } => ended::restore_ended(fd, *family, unread, *failed, options)?,
    }
    match phase {
        Phase::Connected(connection) if !is_quiet(connection) => {}
        _ => options.last(fd)?,
    }
    Ok(socket)
}

fn bind(fd: BorrowedFd<'_>, local: &Endpoint) -> Result<()> {
    inet::bind(fd, &local.bytes()).doing(|| format!("bind to {local}"))
}

fn listen(fd: BorrowedFd<'_>, backlog: u32) -> Result<()> {
    let backlog = nix::sys::socket::Backlog::new(backlog.min(i32::MAX as u32) as i32);
    nix::sys::socket::listen(&fd, backlog.unwrap_or(nix::sys::socket::Backlog::MAXCONN)).doing(|| "listen".into())
}

fn leave_repair(fd: BorrowedFd<'_>, options: &Options) -> Result<()> {
    inet::set_number(fd, IPPROTO_TCP, TCP_REPAIR, REPAIR_OFF_SILENTLY).doing(|| "leave repair mode".into())?;
    inet::set_number(fd, SOL_SOCKET, libc::SO_REUSEADDR, i32::from(options.reuse_address))
        .doing(|| "set SO_REUSEADDR".into())
}

fn set_sequence(fd: BorrowedFd<'_>, queue: i32, sequence: u32) -> Result<()> {
    inet::set_number(fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, queue).doing(|| "choose a TCP queue".into())?;
    inet::set_number(fd, IPPROTO_TCP, TCP_QUEUE_SEQ, sequence as i32).doing(|| "set a sequence number".into())
}

fn restore_connection(fd: BorrowedFd<'_>, connection: &Connection, options: &Options) -> Result<()> {
    set_sequence(fd, RECEIVE_QUEUE, connection.receive_sequence)?;
    set_sequence(fd, SEND_QUEUE, connection.send_sequence)?;
    bind(fd, &connection.local)?;
    // Before connect(), or the first segments are of 524 bytes. Refused values are the kernel's own floor or ceiling.
    let _ = inet::set_number(fd, IPPROTO_TCP, libc::TCP_MAXSEG, connection.mss.min(32767) as i32);
    inet::connect(fd, &connection.peer.bytes()).doing(|| "connect in repair mode".into())?;

    let mut negotiated = vec![(OPTION_MSS, connection.mss)];
    if let Some((send, receive)) = connection.window_scale {
        negotiated.push((OPTION_WINDOW_SCALE, u32::from(send) | u32::from(receive) << 16));
    }
    if connection.sack {
        negotiated.push((OPTION_SACK, 0));
    }
    if connection.timestamp.is_some() {
        negotiated.push((OPTION_TIMESTAMPS, 0));
    }
    let negotiated: Vec<u8> =
        negotiated.iter().flat_map(|(code, value)| [code.to_ne_bytes(), value.to_ne_bytes()].concat()).collect();
    inet::set_option(fd, IPPROTO_TCP, TCP_REPAIR_OPTIONS, &negotiated).doing(|| "set the negotiated options".into())?;
    if let Some(timestamp) = connection.timestamp {
        let value = if microsecond_bit() { timestamp } else { timestamp & !1 };
        inet::set_number(fd, IPPROTO_TCP, TCP_TIMESTAMP, value as i32).doing(|| "set the connection's clock".into())?;
    }
    // The send queue is the chosen one still.
    send_again(fd, &connection.unacknowledged[..sent_before(connection)], 0, options)?;
    fill_received(fd, &connection.unread, options)?;

    // A FIN that is to be handed in again has not been received yet, and so it has not been acknowledged.
    let received = connection.receive_sequence.wrapping_add(connection.unread.len() as u32);
    let mut window = connection.window;
    let ahead = window.rcv_wup.wrapping_sub(received) as i32;
    if ahead > 0 {
        window.rcv_wup = received;
        window.rcv_wnd = window.rcv_wnd.wrapping_add(ahead as u32);
    }
    inet::set_option(fd, IPPROTO_TCP, TCP_REPAIR_WINDOW, &window.bytes()).doing(|| "set the TCP window".into())
}

/// In pieces, which take more room than what the peer sent: the buffer is made as large for the moment.
fn fill_received(fd: BorrowedFd<'_>, mut unread: &[u8], options: &Options) -> Result<()> {
    if unread.is_empty() {
        return Ok(());
    }
    let size = |bytes: usize| {
        inet::set_number(fd, SOL_SOCKET, libc::SO_RCVBUFFORCE, bytes.min(1 << 30) as i32)
            .doing(|| "size the receive buffer".into())
    };
    let own = options.receive_buffer as usize / 2;
    let room = unread.len().saturating_mul(2).saturating_add(64 << 10);
    let enlarged = room > own;
    if enlarged {
        size(room)?;
    }
    inet::set_number(fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, RECEIVE_QUEUE).doing(|| "choose the receive queue".into())?;
    while !unread.is_empty() {
        // The kernel takes a piece at a time.
        let part = &unread[..unread.len().min(32 << 10)];
        let taken =
            inet::send_to(fd, part, &[], MSG_NOSIGNAL | MSG_DONTWAIT).doing(|| "fill the receive queue".into())?;
        if taken == 0 {
            return Err(Problem::new("E-TCP-REPAIR", "the receive queue takes no more"));
        }
        unread = &unread[taken..];
    }
    if enlarged { size(own) } else { Ok(()) }
}

/// Writes what was not acknowledged, without waiting. With MSG_EOR nothing joins its last segment. The buffer is as large as it was and so holds it, except that
/// the kernel's accounting differs by segment: then it is made larger.
fn send_again(fd: BorrowedFd<'_>, mut rest: &[u8], flags: i32, options: &Options) -> Result<()> {
    let mut buffer = options.send_buffer.max(64 << 10);
    while !rest.is_empty() {
        match inet::send_to(fd, rest, &[], flags | MSG_NOSIGNAL | MSG_DONTWAIT) {
            Ok(sent) => rest = &rest[sent..],
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) && buffer < 1 << 30 => {
                buffer = buffer.saturating_mul(2);
                inet::set_number(fd, SOL_SOCKET, libc::SO_SNDBUFFORCE, (buffer / 2) as i32)
                    .doing(|| "size the send buffer".into())?;
            }
            // The peer is gone (a connection inside the pod whose other end is closed): the program will see it.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EPIPE | libc::ECONNRESET)) => return Ok(()),
            Err(error) => return Err(error).doing(|| "write the send queue again".into()),
        }
    }
    Ok(())
}

fn descriptor_flags(fd: BorrowedFd<'_>) -> Result<i32> {
    nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFL).doing(|| "read the flags of a socket".into())
}

fn set_descriptor_flags(fd: BorrowedFd<'_>, flags: i32) -> Result<()> {
    let flags = nix::fcntl::OFlag::from_bits_retain(flags);
    nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFL(flags)).map(drop).doing(|| "set the flags of a socket".into())
}
