//! The moment before a pod leaves: connections that are in a state which nobody can save are given time to leave it.
//!
//! * A handshake that is half done, or complete but not accepted by the program, has no descriptor. The
//!   [`Gate`] keeps new ones out; the others end within a round trip, then the program accepts them, which it can only
//!   while it runs. So [`Settling::ready`] is asked right after the freeze, and if it says no, the pod is let go until it
//!   has accepted them ([`Settling::accept`]) and frozen again. Whom the gate kept out goes along ([`Settling::knocks`]).
//! * A connection that the program has closed but whose last bytes are not acknowledged has no descriptor either. The
//!   kernel finishes it alone, as long as the pod is on the network: [`Settling::drain`] waits for that. Where no bytes but
//!   the FIN are left, it is saved instead ([`crate::objects::files::socket::tcp::closed`]).
//! * A unix socket that was written to before it was accepted can only be read by accepting, too. This one is a reason to
//!   wait for every dump, also of a pod that stays: [`Unwritten`].
//!
//! All waits are bounded: a client that stalls, or a program that does not accept, does not hold up a move. What is
//! left then is counted, for the report.

use crate::ids::HostPid;
use crate::objects::files::socket::unix::Unaccepted;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
};
use pod_runtime::cgroup::Cgroup;
use pod_runtime::network::announce::mac_of;
use pod_runtime::network::cable::link_of;
use pod_runtime::network::gate::Gate;
use pod_runtime::network::knocks::Knocks;
use pod_runtime::network::wire::inside;
use pod_runtime::spec::Spec;
use pod_runtime::{Doing, Problem, Result, proc};
use serde_bytes::ByteBuf;
use std::cell::{Cell, OnceCell};
use std::collections::{BTreeSet, HashSet};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// How long handshakes are waited for in all, from when one is found to be in the way. Where the processors are busy it takes
/// that long until we come here, and as long until the program has its turn.
const PATIENCE: Duration = Duration::from_millis(200);
/// How long unix connections are waited for in all.
const UNWRITTEN: Duration = Duration::from_secs(2);
/// And at a time while only their servers run: one of them may wait for the rest of what a stopped client writes.
const SERVERS: Duration = Duration::from_millis(5);
/// How long the kernel gets to finish closed connections while the pod is frozen.
const DRAIN: Duration = Duration::from_millis(40);

/// Connections wait that no program has accepted.
pub const UNACCEPTED: &str = "W-UNACCEPTED";

const FIN_WAIT1: u32 = 1 << 4;
const FIN_WAIT2: u32 = 1 << 5;
const LAST_ACK: u32 = 1 << 9;
const LISTEN: u32 = 1 << 10;
const CLOSING: u32 = 1 << 11;
const SYN_RECV: u32 = 1 << 3 | 1 << 12;

/// What of a pod's TCP nobody could save at this moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unsaved {
    /// Handshakes that wait for the client's last segment.
    pub half_open: u32,
    /// Connections that no program has accepted.
    pub waiting: u32,
    /// Closed by the program, with data that the client has not acknowledged.
    pub closing: u32,
    /// Closed by the program, with nothing to say but that, or nothing at all.
    pub closed: u32,
}

impl Unsaved {
    fn is_accepted(&self) -> bool {
        self.waiting == 0 && self.half_open == 0
    }
}

/// The last moments of a pod on a host. Dropping it opens the gate again.
#[derive(Debug)]
pub struct Settling {
    init: HostPid,
    diag: Option<OwnedFd>,
    end: OnceCell<Instant>,
    /// What there was when it was last looked, which walks through all connections of the host (2 ms); none if that failed.
    last: Cell<Option<Unsaved>>,
    gate: Option<Gate>,
    /// Whom the gate has kept out; after it, because they are let in when it is open.
    knocks: Option<Knocks>,
}

impl Settling {
    /// Closes the gate, and gives handshakes that are on their way a round trip to finish. The pod runs.
    pub fn begin(init: HostPid, cgroup: &Cgroup, spec: &Spec) -> Settling {
        // Before the gate: nothing that it keeps out is missed, and what it lets in is answered, which is heard too.
        let knocks = link_of(spec).zip(mac_of(spec)).and_then(|(link, mac)| {
            let listening = Knocks::listen(init.0, mac, link);
            listening.map_err(|problem| tracing::debug!("{}", problem.chain())).ok()
        });
        let gate = Gate::close(cgroup);
        let knocks = knocks.filter(|_| gate.is_some());
        let diag = open(init).map_err(|problem| tracing::debug!("sock_diag: {}", problem.chain())).ok();
        let settling = Settling { init, diag, end: OnceCell::new(), last: Cell::default(), gate, knocks };
        settling.wait(Duration::from_millis(20), |unsaved| unsaved.half_open == 0);
        settling
    }

    /// Whether the pod, frozen this moment, has no connection that is not accepted; or waiting longer is no use.
    pub fn ready(&self) -> bool {
        self.unsaved().is_accepted() || self.end.get().is_some_and(|end| Instant::now() > *end)
    }

    /// Waits until the program, which runs again, has accepted what there is.
    pub fn accept(&self) {
        let end = self.end.get_or_init(|| Instant::now() + PATIENCE);
        self.wait(end.saturating_duration_since(Instant::now()), Unsaved::is_accepted);
    }

    /// Waits until closed connections have no data any more that is not acknowledged; the pod is frozen, on the network, and
    /// nobody else draws its frames.
    pub fn drain(&self) {
        if self.last.get().is_some_and(|last| last.closing == 0) {
            return;
        }
        self.wait(DRAIN, |unsaved| unsaved.closing == 0);
    }

    fn wait(&self, patience: Duration, done: impl Fn(&Unsaved) -> bool) -> Unsaved {
        let end = Instant::now() + patience;
        loop {
            let unsaved = self.unsaved();
            if done(&unsaved) || Instant::now() > end {
                return unsaved;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Whom the gate has kept out until now.
    pub fn knocks(&self) -> Vec<ByteBuf> {
        let heard = self.knocks.as_ref().map(Knocks::heard).unwrap_or_default();
        heard.into_iter().map(ByteBuf::from).collect()
    }

    /// The pod runs elsewhere, and so does whoever knocked.
    pub fn moved(&mut self) {
        self.knocks.iter_mut().for_each(Knocks::moved);
    }

    /// Nothing, where the kernel does not tell.
    pub fn unsaved(&self) -> Unsaved {
        let mut unsaved = Unsaved::default();
        let asked = match self.diag.as_ref().filter(|_| has_tcp(self.init)) {
            Some(diag) => ask(diag, &mut unsaved),
            None => Ok(()),
        };
        if let Err(problem) = &asked {
            tracing::debug!("sock_diag: {}", problem.chain());
        }
        self.last.set(asked.ok().map(|()| unsaved));
        unsaved
    }

    /// The same of a pod that has stood still since it was last looked, with the gate closed: of nothing it makes nothing.
    pub fn still_unsaved(&self) -> Unsaved {
        match self.last.get() {
            Some(none) if none == Unsaved::default() && self.gate.is_some() => none,
            _ => self.unsaved(),
        }
    }
}

/// What a person should know before the pod moves: connections that wait to be accepted.
pub fn downgrade(init: HostPid) -> Option<Problem> {
    let mut unsaved = Unsaved::default();
    if has_tcp(init) {
        ask(&open(init).ok()?, &mut unsaved).ok()?;
    }
    let what = match unsaved.waiting {
        0 => return None,
        1 => "one connection waits to be accepted; if it still does when the pod stops, its client is told of a reset"
            .into(),
        n => format!(
            "{n} connections wait to be accepted; if they still do when the pod stops, their clients are told of a reset"
        ),
    };
    Some(Problem::new(UNACCEPTED, what).fix("move the pod when its program accepts connections"))
}

/// Waits for a moment at which no unix socket was written to before it was accepted. In a server that is busy there is
/// none unless its clients stand still first: see [`Unwritten::servers`].
pub struct Unwritten {
    unix: Option<Unaccepted>,
    end: Instant,
}

impl Unwritten {
    /// The pod runs.
    pub fn begin(init: HostPid) -> Unwritten {
        let path = format!("/proc/{init}/ns/net");
        let unix = File::open(&path).doing(|| format!("open {path}")).and_then(|ns| Unaccepted::of(ns.as_fd()));
        let unix = unix.map_err(|problem| tracing::debug!("sock_diag: {}", problem.chain())).ok();
        Unwritten { unix, end: Instant::now() + UNWRITTEN }
    }

    /// Whether the pod, frozen this moment, has none; or waiting longer is no use.
    pub fn ready(&self) -> bool {
        Instant::now() > self.end || self.written().is_empty()
    }

    fn written(&self) -> HashSet<u64> {
        self.unix.as_ref().and_then(|unix| unix.written().ok()).unwrap_or_default()
    }

    /// Of the processes those that can accept such a connection. If the others are stopped first, they do.
    pub fn servers(&self, processes: &[i32]) -> BTreeSet<i32> {
        let listeners: HashSet<String> = self.written().iter().map(|inode| format!("socket:[{inode}]")).collect();
        let listens = |process: &&i32| {
            let fds = std::fs::read_dir(format!("/proc/{process}/fd")).into_iter().flatten().flatten();
            let mut links = fds.filter_map(|fd| std::fs::read_link(fd.path()).ok());
            links.any(|link| link.to_str().is_some_and(|link| listeners.contains(link)))
        };
        if listeners.is_empty() { BTreeSet::new() } else { processes.iter().filter(listens).copied().collect() }
    }

    /// Waits until the servers have accepted all; not for long.
    pub fn drain(&self) {
        let end = Instant::now() + SERVERS;
        while !self.ready() && Instant::now() < end {
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

/// Whether the pod's network has any TCP socket. To list them is to walk the host's table of all connections (2 ms, empty
/// or not), and this is a number that the kernel keeps; a handshake or a closed connection cannot be without one.
fn has_tcp(init: HostPid) -> bool {
    // One that waits for the peer's end only is counted with those that wait for nobody ("tw").
    let none = |file: &str, line: &str| {
        let text = proc::read(format!("/proc/{init}/net/{file}")).unwrap_or_default();
        let waits = |rest: &str| rest.split_once(" tw ").is_some_and(|(_, rest)| !rest.starts_with("0 "));
        let rests = text.lines().filter_map(|found| found.strip_prefix(line));
        rests.into_iter().any(|rest| rest.split(' ').next() == Some("0") && !waits(rest))
    };
    !(none("sockstat", "TCP: inuse ") && none("sockstat6", "TCP6: inuse "))
}

/// A sock_diag socket of the pod's network namespace.
fn open(init: HostPid) -> Result<OwnedFd> {
    let path = format!("/proc/{init}/ns/net");
    let namespace = File::open(&path).doing(|| format!("open {path}"))?;
    let make = || -> nix::Result<OwnedFd> {
        let made =
            socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkSockDiag)?;
        bind(made.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(made)
    };
    inside(namespace.as_fd(), make)?.doing(|| "open a sock_diag socket in the pod".into())
}

/// One dump of the states in question, of both families: the older of the two requests does not choose between them, and
/// each dump walks the whole table.
fn ask(diag: &OwnedFd, unsaved: &mut Unsaved) -> Result<()> {
    const TCPDIAG_GETSOCK: u16 = 18;
    // struct nlmsghdr, then struct inet_diag_req: family, lengths, extensions (4 bytes), socket id (48), states, dbs.
    let mut message = Vec::with_capacity(76);
    message.extend_from_slice(&76u32.to_ne_bytes());
    message.extend_from_slice(&TCPDIAG_GETSOCK.to_ne_bytes());
    message.extend_from_slice(&((libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16).to_ne_bytes());
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(&[0; 4 + 48]);
    message.extend_from_slice(&(FIN_WAIT1 | FIN_WAIT2 | LAST_ACK | LISTEN | CLOSING | SYN_RECV).to_ne_bytes());
    message.extend_from_slice(&[0; 4]);
    send(diag.as_raw_fd(), &message, MsgFlags::empty()).doing(|| "ask for the pod's connections".into())?;
    let mut buffer = vec![0; 32 << 10];
    loop {
        let length = match recv(diag.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Err(nix::Error::EINTR) => continue,
            other => other.doing(|| "hear of the pod's connections".into())?,
        };
        let mut rest = &buffer[..length];
        while let Some(head) = rest.get(..16) {
            let size = u32::from_ne_bytes([head[0], head[1], head[2], head[3]]) as usize;
            let kind = u16::from_ne_bytes([head[4], head[5]]);
            if kind == libc::NLMSG_DONE as u16 || kind == libc::NLMSG_ERROR as u16 {
                return Ok(());
            }
            count(rest.get(16..size.max(16)).unwrap_or_default(), unsaved);
            rest = rest.get(size.max(16).next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

/// One `struct inet_diag_msg`: family, state, timer, retransmissions, id (48 bytes), then five words: expiry, read
/// queue (for a listener, what waits to be accepted), write queue, user, inode (0 without a descriptor).
fn count(message: &[u8], unsaved: &mut Unsaved) {
    let word = |at: usize| message.get(at..at + 4).map(|four| u32::from_ne_bytes(four.try_into().expect("four bytes")));
    let (Some(state), Some(waiting), Some(unacknowledged), Some(inode)) =
        (message.get(1), word(56), word(60), word(68))
    else {
        return;
    };
    match 1u32.checked_shl(u32::from(*state)).unwrap_or(0) {
        LISTEN => unsaved.waiting += waiting,
        state if state & SYN_RECV != 0 => unsaved.half_open += 1,
        state if state & (FIN_WAIT1 | FIN_WAIT2 | LAST_ACK | CLOSING) != 0 && inode == 0 => match unacknowledged {
            // A FIN counts as one.
            0 | 1 => unsaved.closed += 1,
            _ => unsaved.closing += 1,
        },
        _ => {}
    }
}
