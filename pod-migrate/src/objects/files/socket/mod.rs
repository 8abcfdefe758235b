//! Sockets, by family. A family is one file with `State`, `dump`, `restore` and, where something must happen at the last
//! moment before the pod runs, `release`.
//!
//! Kept: unix, TCP, UDP, raw IP, ping, netlink, packet. Every other family is refused by name: [`refusal`] says which
//! and why, to `check` and to `dump` alike.

pub mod address;
pub mod diag;
pub mod inject;
pub mod listing;
pub mod netlink;
pub mod options;
pub mod raw;
mod reuseport;
pub mod tcp;
pub mod udp;
pub mod unix;
pub mod values;

use super::dump::FilesDump;
use address::Family;
use libc::{SOCK_DGRAM, SOCK_RAW, SOCK_STREAM, SOL_SOCKET, c_int};
use pod_runtime::spec::Security;
use pod_runtime::sys::inet;
use pod_runtime::{Doing, Problem, Result};
use serde::{Deserialize, Serialize};
use std::os::fd::{BorrowedFd, OwnedFd};

const IPPROTO_MPTCP: c_int = 262;

/// Which family, and its state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum State {
    Unix(unix::State),
    Tcp(tcp::State),
    Udp(udp::State),
    Raw(raw::RawState),
    Packet(raw::PacketState),
    Netlink(netlink::State),
}

/// What a family's `dump` may look at besides the socket itself.
#[derive(Debug)]
pub struct DumpContext<'a, 'v> {
    /// Inode number of the socket: what the diag interfaces know it by.
    pub inode: u64,
    /// "pid 41 nginx, fd 7": the subject of a problem.
    pub subject: &'a str,
    pub files: &'a mut FilesDump<'v>,
}

/// Domain, type and protocol, as socket(2) was given them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    pub domain: c_int,
    pub kind: c_int,
    pub protocol: c_int,
}

impl Kind {
    pub fn of(fd: BorrowedFd<'_>) -> Result<Kind> {
        let number = |name| inet::number(fd, SOL_SOCKET, name).doing(|| "ask a socket what it is".into());
        Ok(Kind {
            domain: number(libc::SO_DOMAIN)?,
            kind: number(libc::SO_TYPE)?,
            protocol: number(libc::SO_PROTOCOL)?,
        })
    }
}

/// Why a socket of this kind cannot be moved; `None` when it can.
pub fn refusal(kind: Kind, subject: &str) -> Option<Problem> {
    let Kind { domain, kind, protocol } = kind;
    let known = match domain {
        libc::AF_UNIX | libc::AF_NETLINK | libc::AF_PACKET => true,
        libc::AF_INET | libc::AF_INET6 => match kind {
            SOCK_STREAM if protocol == IPPROTO_MPTCP => {
                return Some(
                    Problem::new("E-SOCKET-MPTCP", format!("{subject}: a socket of multipath TCP"))
                        .fix("use plain TCP (for Go programs: GODEBUG=multipathtcp=0)"),
                );
            }
            SOCK_STREAM => protocol == libc::IPPROTO_TCP,
            SOCK_DGRAM => {
                [libc::IPPROTO_UDP, libc::IPPROTO_UDPLITE, libc::IPPROTO_ICMP, libc::IPPROTO_ICMPV6].contains(&protocol)
            }
            SOCK_RAW => true,
            _ => false,
        },
        _ => false,
    };
    (!known).then(|| {
        Problem::new("E-SOCKET-FAMILY", format!("{subject}: {} cannot be moved", name_of(domain, kind, protocol)))
            .fix("close it before the move; pod explain E-SOCKET-FAMILY lists what can be moved")
    })
}

fn name_of(domain: c_int, kind: c_int, protocol: c_int) -> String {
    let family = match domain {
        libc::AF_VSOCK => "a vsock socket",
        libc::AF_ALG => "a socket of the kernel's crypto (AF_ALG)",
        libc::AF_BLUETOOTH => "a bluetooth socket",
        libc::AF_CAN => "a CAN socket",
        libc::AF_TIPC => "a TIPC socket",
        libc::AF_KEY => "an IPsec key socket",
        44 => "an AF_XDP socket",
        43 => "an SMC socket",
        libc::AF_INET | libc::AF_INET6 if protocol == libc::IPPROTO_SCTP => "an SCTP socket",
        libc::AF_INET | libc::AF_INET6 if protocol == libc::IPPROTO_DCCP => "a DCCP socket",
        _ => return format!("a socket of family {domain}, type {kind}, protocol {protocol}"),
    };
    family.to_string()
}

/// Reads a socket without changing it. `fd` is our copy.
pub fn dump(fd: BorrowedFd<'_>, context: &mut DumpContext<'_, '_>) -> Result<State> {
    let kind = Kind::of(fd)?;
    if let Some(problem) = refusal(kind, context.subject) {
        return Err(problem);
    }
    let state = of_family(fd, kind, context)?;
    warn(&state, context);
    Ok(state)
}

/// The same of a TCP socket that was read with many others.
pub fn dumped(fd: BorrowedFd<'_>, read: tcp::Read, context: &mut DumpContext<'_, '_>) -> State {
    let state = State::Tcp(with_diag(fd, read, context));
    warn(&state, context);
    state
}

fn warn(state: &State, context: &mut DumpContext<'_, '_>) {
    if options(state).is_some_and(|options| options.reuseport_unknown) {
        let what =
            "whether a program divides its port among sockets (SO_ATTACH_REUSEPORT_*) is not told by this kernel";
        context.files.warnings.push(format!("{}: {what}; there is none afterwards", context.subject));
    }
}

fn of_family(fd: BorrowedFd<'_>, kind: Kind, context: &mut DumpContext<'_, '_>) -> Result<State> {
    match (kind.domain, Family::of(kind.domain), kind.kind) {
        (libc::AF_UNIX, ..) => unix::dump(fd, context).map(State::Unix),
        (libc::AF_NETLINK, ..) => {
            netlink::dump(fd, kind.protocol, context.subject, &mut context.files.warnings).map(State::Netlink)
        }
        (libc::AF_PACKET, ..) => {
            let mut state = raw::dump_packet(fd, kind.kind, context.subject)?;
            let diag = context.files.diag(fd);
            state.memberships = raw::memberships(diag, context.inode, context.subject)?;
            Ok(State::Packet(state))
        }
        (_, Some(family), SOCK_STREAM) => {
            let state = tcp::dump(fd, family, context.subject)?;
            Ok(State::Tcp(with_diag(fd, tcp::Read { state, unsigned: false }, context)))
        }
        (_, Some(family), SOCK_DGRAM) => {
            udp::dump(fd, family, kind.protocol, context.subject, &mut context.files.warnings).map(State::Udp)
        }
        (_, Some(family), _) => {
            raw::dump_raw(fd, family, kind.protocol, context.subject, &mut context.files.warnings).map(State::Raw)
        }
        _ => unreachable!("refused above"),
    }
}

/// What the socket itself does not tell.
fn with_diag(fd: BorrowedFd<'_>, read: tcp::Read, context: &mut DumpContext<'_, '_>) -> tcp::State {
    let tcp::Read { mut state, unsigned } = read;
    if !unsigned {
        state.signatures = context.files.diag(fd).map_or_else(Vec::new, |diag| tcp::signature::dump(diag, fd, &state));
    }
    if let tcp::Phase::Listening { waiting: waiting @ 1.., local, .. } = &state.phase {
        context.files.warnings.push(format!(
            "W-UNACCEPTED: {}: {waiting} connections to {local} that no program has accepted are not kept; their clients \
             are told of a reset",
            context.subject
        ));
        state.unaccepted = context.files.diag(fd).map_or_else(Vec::new, |diag| tcp::unaccepted::dump(diag, &state));
    }
    state
}

/// What needs all files to be known: queued messages carry descriptors, peers are other sockets of the pod.
pub fn finish(state: &mut State, fd: BorrowedFd<'_>, context: &mut DumpContext<'_, '_>) -> Result<()> {
    match state {
        State::Unix(state) => unix::finish(state, fd, context),
        State::Tcp(_) | State::Udp(_) | State::Raw(_) | State::Packet(_) | State::Netlink(_) => Ok(()),
    }
}

/// Whether a socket of this kind can be moved; asked of a pod that runs.
pub fn check(fd: BorrowedFd<'_>, subject: &str) -> Result<()> {
    refusal(Kind::of(fd)?, subject).map_or(Ok(()), Err)
}

pub fn options(state: &State) -> Option<&options::Options> {
    match state {
        State::Tcp(state) => Some(&state.options),
        State::Udp(state) => Some(&state.options),
        State::Netlink(state) => Some(&state.options),
        State::Raw(_) | State::Packet(_) | State::Unix(_) => None,
    }
}

/// Whether it is made as all connections are.
pub(super) fn is_connection(state: &State) -> bool {
    matches!(state, State::Tcp(state) if matches!(state.phase, tcp::Phase::Connected(_)))
}

/// Whether it says nothing when it is released.
pub(super) fn is_quiet(state: &State) -> bool {
    let State::Tcp(tcp::State { phase: tcp::Phase::Connected(connection), .. }) = state else { return false };
    tcp::is_quiet(connection)
}

/// The same, to be changed.
pub fn options_mut(state: &mut State) -> Option<&mut options::Options> {
    match state {
        State::Tcp(state) => Some(&mut state.options),
        State::Udp(state) => Some(&mut state.options),
        State::Netlink(state) => Some(&mut state.options),
        State::Raw(_) | State::Packet(_) | State::Unix(_) => None,
    }
}

/// Whether a pod with these rights could have made the socket itself: an image can be anybody's, and the opener has
/// more rights than the pod.
pub fn permitted(state: &State, security: &Security) -> Result<()> {
    let options = options(state);
    if options.is_some_and(|options| options.values.are_elsewhere()) {
        return Err(Problem::new(crate::image::DAMAGED, "the options of a socket are nowhere in the image"));
    }
    let set = |name: &str| options.and_then(|o| o.values.get(name)).is_some_and(|value| value.iter().any(|b| *b != 0));
    let needs = match state {
        State::Raw(_) => Some("a raw socket"),
        State::Packet(_) => Some("a packet socket"),
        _ if set("mark") => Some("a socket with a mark"),
        _ if set("transparent") || set("v6_transparent") => Some("a transparent socket"),
        _ => None,
    };
    match needs {
        Some(what) if !security.may("NET_ADMIN") => crate::objects::namespaces::permitted(security, "NET_RAW", what),
        _ => Ok(()),
    }
}

/// Makes the socket again; runs in the opener, inside the pod's namespaces. Flags of the description are set by the
/// caller.
pub fn restore(state: &State) -> Result<OwnedFd> {
    match state {
        // Made all together: see `unix::restore`.
        State::Unix(_) => Err(Problem::new("E-INTERNAL", "a unix socket is made with its peers")),
        State::Tcp(state) => tcp::restore(state),
        State::Udp(state) => udp::restore(state),
        State::Raw(state) => raw::restore_raw(state),
        State::Packet(state) => raw::restore_packet(state),
        State::Netlink(state) => netlink::restore(state),
    }
}

/// The last moment before the tasks go; runs in the opener.
pub fn release(state: &State, fd: BorrowedFd<'_>) -> Result<()> {
    match state {
        State::Tcp(state) => tcp::release(state, fd),
        State::Unix(_) | State::Udp(_) | State::Raw(_) | State::Packet(_) | State::Netlink(_) => Ok(()),
    }
}
