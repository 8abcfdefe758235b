//! The options of many connections. Most have the same as others, but to ask a socket for all of them takes some eighty
//! calls. So the [survey](super::super::super::survey) tells, of each socket, what the kernel keeps of it where an option lies.
//! Sockets of which that is the same have the same options, and one of them is asked for all of them.
//!
//! What is believed: an option is where [`TOLD`] says, in a kernel that has a member of that name. Whatever is not there is
//! asked for, and of every [`CHECKED`] sockets one is asked for everything: if that differs, nothing of this is believed.

use super::super::address::Family;
use super::super::options::{Options, TABLE};
use super::{Connection, rest};
use crate::objects::pieces::{moved, pieces};
use pod_runtime::Result;
use pod_runtime::proc::btf::{Btf, Place};
use std::collections::{BTreeSet, HashMap};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

/// Of so many sockets that are alike, one is asked for all.
const CHECKED: usize = 64;

pub(super) type Member = (&'static str, &'static str);

/// Options, and the members of the kernel's structs that decide them.
const TOLD: &[(&[&str], &[Member])] = &[
    (&["reuseport"], &[("sock_common", "skc_reuseport")]),
    (&["bindtodevice"], &[("sock_common", "skc_bound_dev_if")]),
    (&["v6only"], &[("sock_common", "skc_ipv6only")]),
    (&["mark"], &[("sock", "sk_mark")]),
    (&["priority"], &[("sock", "sk_priority")]),
    (
        &["keepalive", "broadcast", "dontroute", "oobinline", "timestamp", "timestampns"],
        &[("sock_common", "skc_flags")],
    ),
    (&["rxq_ovfl", "zerocopy", "nofcs", "select_err_queue", "rcvmark", "rcvpriority"], &[("sock_common", "skc_flags")]),
    (&["linger"], &[("sock_common", "skc_flags"), ("sock", "sk_lingertime")]),
    (&["rcvlowat"], &[("sock", "sk_rcvlowat")]),
    (&["rcvtimeo"], &[("sock", "sk_rcvtimeo")]),
    (&["sndtimeo"], &[("sock", "sk_sndtimeo")]),
    (&["timestamping"], &[("sock_common", "skc_flags"), ("sock", "sk_tsflags"), ("sock", "sk_bind_phc")]),
    (&["no_check"], &[("sock", "sk_no_check_tx")]),
    (&["busy_poll"], &[("sock", "sk_ll_usec")]),
    (&["prefer_busy_poll"], &[("sock", "sk_prefer_busy_poll")]),
    (&["max_pacing_rate"], &[("sock", "sk_max_pacing_rate")]),
    (
        &["txtime"],
        &[
            ("sock_common", "skc_flags"),
            ("sock", "sk_clockid"),
            ("sock", "sk_txtime_deadline_mode"),
            ("sock", "sk_txtime_report_errors"),
        ],
    ),
    (&["txrehash"], &[("sock", "sk_txrehash")]),
    (&["peek_off"], &[("sock", "sk_peek_off")]),
    (&["freebind", "transparent", "bind_address_no_port", "hdrincl", "nodefrag"], &[("inet_sock", "inet_flags")]),
    (&["recverr", "recverr_rfc4884", "multicast_loop", "multicast_all"], &[("inet_sock", "inet_flags")]),
    (&["recvttl", "recvtos", "recvopts", "retopts", "ip_passsec"], &[("inet_sock", "inet_flags")]),
    (&["checksum", "recvfragsize", "pktinfo", "recvorigdstaddr"], &[("inet_sock", "inet_flags")]),
    (&["tos"], &[("inet_sock", "tos")]),
    (&["ttl"], &[("inet_sock", "uc_ttl")]),
    (&["minttl"], &[("inet_sock", "min_ttl")]),
    (&["mtu_discover"], &[("inet_sock", "pmtudisc")]),
    (&["options"], &[("inet_sock", "inet_opt")]),
    (&["multicast_ttl"], &[("inet_sock", "mc_ttl")]),
    (&["multicast_if"], &[("inet_sock", "mc_addr"), ("inet_sock", "mc_index")]),
    (&["unicast_if"], &[("inet_sock", "uc_index")]),
    (&["local_port_range"], &[("inet_sock", "local_port_range")]),
    (&["v6_freebind", "v6_transparent"], &[("inet_sock", "inet_flags")]),
    (&["v6_multicast_if"], &[("ipv6_pinfo", "mcast_oif")]),
    (&["v6_multicast_hops"], &[("ipv6_pinfo", "mcast_hops")]),
    (&["v6_unicast_if"], &[("ipv6_pinfo", "ucast_oif")]),
    (&["v6_mtu_discover"], &[("ipv6_pinfo", "pmtudisc")]),
    (&["v6_tclass"], &[("ipv6_pinfo", "tclass")]),
    (&["v6_minhopcount"], &[("ipv6_pinfo", "min_hopcount")]),
    (&["v6_addr_preferences"], &[("ipv6_pinfo", "srcprefs")]),
    (&["v6_recvpktinfo", "v6_recvhoplimit", "v6_recvtclass", "v6_recvorigdstaddr"], &[("ipv6_pinfo", "rxopt")]),
    (&["v6_recvhopopts", "v6_2292pktinfo", "v6_2292hopopts", "v6_2292dstopts"], &[("ipv6_pinfo", "rxopt")]),
    (&["v6_2292rthdr", "v6_2292hoplimit", "v6_flowinfo", "v6_recvfragsize"], &[("ipv6_pinfo", "rxopt")]),
    (&["v6_recvrthdr", "v6_recvdstopts", "v6_recvpathmtu"], &[("ipv6_pinfo", "rxopt")]),
    (&["v6_hopopts", "v6_rthdrdstopts", "v6_rthdr", "v6_dstopts"], &[("ipv6_pinfo", "opt")]),
    (&["tcp_nodelay", "tcp_cork"], &[("tcp_sock", "nonagle")]),
    (&["tcp_keepidle"], &[("tcp_sock", "keepalive_time")]),
    (&["tcp_keepintvl"], &[("tcp_sock", "keepalive_intvl")]),
    (&["tcp_keepcnt"], &[("tcp_sock", "keepalive_probes")]),
    (&["tcp_syncnt"], &[("inet_connection_sock", "icsk_syn_retries")]),
    (&["tcp_linger2"], &[("tcp_sock", "linger2")]),
    (&["tcp_congestion"], &[("inet_connection_sock", "icsk_ca_ops")]),
    (&["tcp_thin_linear_timeouts"], &[("tcp_sock", "thin_lto")]),
    (&["tcp_user_timeout"], &[("inet_connection_sock", "icsk_user_timeout")]),
    (&["tcp_notsent_lowat"], &[("tcp_sock", "notsent_lowat")]),
    (&["tcp_save_syn"], &[("tcp_sock", "save_syn")]),
    (&["tcp_fastopen_connect"], &[("tcp_sock", "fastopen_connect")]),
    (&["tcp_fastopen_no_cookie"], &[("tcp_sock", "fastopen_no_cookie")]),
    (&["tcp_inq"], &[("tcp_sock", "recvmsg_inq")]),
    (&["tcp_tx_delay"], &[("tcp_sock", "tcp_tx_delay")]),
    (&["tcp_rto_max_ms"], &[("inet_connection_sock", "icsk_rto_max")]),
];

/// Options that are decided deeper down: a member, its own, and so on.
const TOLD_DEEP: [(&str, &[Member]); 2] = [
    ("tcp_defer_accept", &[("inet_connection_sock", "icsk_accept_queue"), ("request_sock_queue", "rskq_defer_accept")]),
    // Without a key of its own a socket has that of its network.
    (
        "tcp_fastopen_key",
        &[
            ("inet_connection_sock", "icsk_accept_queue"),
            ("request_sock_queue", "fastopenq"),
            ("fastopen_queue", "ctx"),
        ],
    ),
];

/// Since Linux 6.7 the same flags as those of IPv4; before, bits of their own, of which this is one.
const TOLD_V6: (&[&str], &[Member]) = (
    &[
        "v6_multicast_loop",
        "v6_multicast_all",
        "v6_recverr",
        "v6_recverr_rfc4884",
        "v6_dontfrag",
        "v6_flowinfo_send",
        "v6_router_alert_isolate",
        "v6_autoflowlabel",
    ],
    &[("inet_sock", "inet_flags")],
);
const BEFORE: Member = ("ipv6_pinfo", "mc_loop");

/// What must be there, in this order.
const NEEDED: [Member; 13] = [
    ("socket", "sk"),
    ("sock_common", "skc_family"),
    ("sock", "sk_protocol"),
    ("sock", "sk_type"),
    ("inet_sock", "pinet6"),
    ("sock", "sk_sndbuf"),
    ("sock", "sk_rcvbuf"),
    ("sock_common", "skc_reuse"),
    ("sock", "sk_userlocks"),
    ("sock", "sk_filter"),
    ("sock_common", "skc_net"),
    ("sock_common", "skc_flags"),
    ("tcp_sock", "md5sig_info"),
];

/// What the walk reads of a TCP socket, and where what it tells lies in that.
#[derive(Debug)]
pub struct Plan {
    /// From a struct socket to its struct sock.
    pub to_sock: Place,
    pub protocol: Place,
    pub kind: Place,
    /// From a struct sock to what is of IPv6 only.
    pub to_v6: Place,
    /// Pieces of a struct sock, and of that: offset and bytes.
    pub sock: Vec<(u32, u32)>,
    pub v6: Vec<(u32, u32)>,
    /// In the bytes that are read.
    key: Vec<Place>,
    family: Place,
    send_buffer: Place,
    receive_buffer: Place,
    reuseport: Place,
    filter: Place,
    signatures: Place,
    /// Options that nobody tells of: indices into the table.
    asked: Vec<usize>,
    /// None where something is not known of a connection at rest.
    rest: Option<rest::Places>,
}

/// The bytes that were read of one socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary(pub Vec<u8>);

impl Plan {
    /// None where the kernel keeps a socket in another way.
    pub fn of(btf: &Btf<'_>) -> Option<Plan> {
        let mut wanted: Vec<Member> = NEEDED.to_vec();
        wanted.extend(TOLD.iter().flat_map(|(_, members)| *members));
        wanted.extend([TOLD_V6.1[0], BEFORE]);
        wanted.extend(TOLD_DEEP.iter().flat_map(|(_, way)| *way));
        wanted.extend(rest::MEMBERS.iter().chain(&rest::NEGOTIATED).chain([&rest::MICROSECONDS]));
        let (places, _) = btf.places(&wanted, "");
        let any = |member: &Member| places[wanted.iter().position(|one| one == member)?];
        let place = |member: &Member| any(member).filter(|place| place.bit % 8 + place.bits <= 64);
        let needed: Option<Vec<Place>> = NEEDED.iter().map(place).collect();
        let [to_sock, _, protocol, kind, to_v6, ..] = needed?[..] else { return None };

        let told = TOLD.iter().chain(place(&BEFORE).is_none().then_some(&TOLD_V6));
        let told: Vec<_> = told.filter(|(_, members)| members.iter().all(|member| place(member).is_some())).collect();
        let names: BTreeSet<&str> = told.iter().flat_map(|(names, _)| *names).copied().collect();
        let mut members: BTreeSet<Member> = told.iter().flat_map(|(_, members)| *members).copied().collect();
        // What else decides them: the family, and the defaults of the network.
        members.extend([("sock_common", "skc_family"), ("sock_common", "skc_net")]);
        members.extend([("sock_common", "skc_reuse"), ("sock", "sk_userlocks")]);
        let all = members.iter().copied().chain(NEEDED.into_iter().skip(5));
        let (of_v6, of_sock): (Vec<Member>, Vec<Member>) = all.partition(|(outer, _)| *outer == "ipv6_pinfo");
        let deep = |way: &[Member]| {
            let steps = way.iter().map(any).collect::<Option<Vec<Place>>>()?;
            let place = Place { bit: steps.iter().map(|step| step.bit).sum(), bits: steps.last()?.bits };
            Some(place).filter(|place| place.bits <= 64)
        };
        let deep: Vec<(&str, Place)> = TOLD_DEEP.iter().filter_map(|(name, way)| Some((*name, deep(way)?))).collect();
        let at_rest = rest::MEMBERS.iter().chain([&rest::MICROSECONDS]).filter_map(any);
        let of_sock = of_sock.iter().filter_map(place).chain(deep.iter().map(|(_, place)| *place));
        let sock = pieces(of_sock.chain(at_rest));
        let v6 = pieces(of_v6.iter().filter_map(place));

        let before = sock.iter().map(|(_, bytes)| bytes).sum();
        let within = |member: &Member| match member.0 {
            "ipv6_pinfo" => moved(place(member)?, &v6, before),
            _ => moved(place(member)?, &sock, 0),
        };
        let is_told = |name: &str| names.contains(name) || deep.iter().any(|(deep, _)| *deep == name);
        let asked = TABLE.iter().enumerate().filter(|(_, entry)| !is_told(entry.0)).map(|(index, _)| index);
        let deep = deep.iter().map(|(_, place)| moved(*place, &sock, 0));
        Some(Plan {
            to_sock,
            protocol,
            kind,
            to_v6,
            key: members.iter().map(within).chain(deep).collect::<Option<_>>()?,
            family: within(&("sock_common", "skc_family"))?,
            send_buffer: within(&("sock", "sk_sndbuf"))?,
            receive_buffer: within(&("sock", "sk_rcvbuf"))?,
            reuseport: within(&("sock_common", "skc_reuseport"))?,
            filter: within(&("sock", "sk_filter"))?,
            signatures: within(&("tcp_sock", "md5sig_info"))?,
            asked: asked.collect(),
            rest: rest::Places::of(any, &sock),
            sock,
            v6,
        })
    }

    /// Of a summary.
    pub fn bytes(&self) -> usize {
        self.sock.iter().chain(&self.v6).map(|(_, bytes)| *bytes as usize).sum()
    }

    pub fn family(&self, summary: &Summary) -> Family {
        match self.family.of(&summary.0) {
            Some(family) if family == libc::AF_INET6 as u64 => Family::V6,
            _ => Family::V4,
        }
    }

    /// Whether a socket has no keys of signatures.
    pub fn is_unsigned(&self, summary: &Summary) -> bool {
        self.signatures.of(&summary.0) == Some(0)
    }
}

/// Sockets by what was told of them.
pub struct Groups<'p> {
    plan: &'p Plan,
    known: Mutex<HashMap<Vec<u64>, Arc<Group>>>,
    wrong: AtomicBool,
    /// Of connections at rest.
    told: AtomicUsize,
    /// By which their clocks go, once one was asked, and when that was.
    clock: OnceLock<(u32, Instant)>,
}

struct Group {
    /// Of the first.
    options: Options,
    /// Of those that must be asked for: what the kernel does not know of such sockets.
    unknown: BTreeSet<usize>,
    others: AtomicUsize,
}

impl<'p> Groups<'p> {
    pub fn new(plan: &'p Plan) -> Groups<'p> {
        Groups {
            plan,
            known: Mutex::default(),
            wrong: AtomicBool::new(false),
            told: AtomicUsize::new(0),
            clock: OnceLock::new(),
        }
    }

    /// A connection, if it is at rest and known without being asked. `ask` asks it: for the first, and now and then.
    pub fn at_rest(
        &self,
        summary: &Summary,
        ask: impl FnOnce() -> Result<Option<Connection>>,
    ) -> Result<Option<Connection>> {
        let family = self.plan.family(summary);
        let told = self.plan.rest.as_ref().and_then(|places| places.connection(summary, family));
        let Some((mut connection, offset)) = told else { return Ok(None) };
        let checked = self.told.fetch_add(1, Ordering::Relaxed).is_multiple_of(CHECKED);
        let clock = self.clock.get().copied();
        if !checked && (offset.is_none() || clock.is_some()) {
            connection.timestamp = offset.zip(clock).map(|(offset, (clock, _))| offset.shown(clock));
            return Ok(Some(connection));
        }
        let Some(asked) = ask()? else { return Ok(None) };
        if let (Some(offset), Some(shown)) = (offset, asked.timestamp) {
            let (clock, then) = *self.clock.get_or_init(|| (offset.clock(shown), Instant::now()));
            connection.timestamp = Some(offset.shown(clock.wrapping_add(then.elapsed().as_millis() as u32)));
        }
        if !rest::is_same(&connection, &asked) {
            tracing::debug!("{} is not as it is told: each connection is asked", asked.local);
            self.wrong.store(true, Ordering::Relaxed);
        }
        Ok(Some(asked))
    }

    pub fn plan(&self) -> &'p Plan {
        self.plan
    }

    /// Whether a socket was found that has other options than those like it: then nothing that was told is to be believed.
    pub fn wrong(&self) -> bool {
        self.wrong.load(Ordering::Relaxed)
    }

    /// What [`Options::dump`] gives. `but` are names that are not wanted.
    pub fn options(&self, fd: BorrowedFd<'_>, summary: &Summary, but: &[&str], subject: &str) -> Result<Options> {
        let value = |place: &Place| place.of(&summary.0).unwrap_or(u64::MAX);
        if value(&self.plan.filter) != 0 || value(&self.plan.reuseport) != 0 {
            return Options::dump(fd, but, subject);
        }
        let mut key: Vec<u64> = self.plan.key.iter().map(value).collect();
        key.push(but.len() as u64);
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(group) = known().get(&key).cloned() else {
            let options = Options::dump(fd, but, subject)?;
            let asked = self.plan.asked.iter().copied();
            let unknown = asked.filter(|index| Options::is_unknown(fd, &TABLE[*index])).collect();
            let group = Group { options: options.clone(), unknown, others: AtomicUsize::new(0) };
            known().insert(key, Arc::new(group));
            return Ok(options);
        };
        let mut options = Options {
            send_buffer: value(&self.plan.send_buffer) as u32,
            receive_buffer: value(&self.plan.receive_buffer) as u32,
            ..group.options.clone()
        };
        for index in self.plan.asked.iter().filter(|index| !group.unknown.contains(index)) {
            let entry = &TABLE[*index];
            if but.contains(&entry.0) {
                continue;
            }
            let value = Options::value(fd, entry);
            if value.as_ref() != options.values.get(entry.0).map(|value| &**value) {
                options.values.replace(entry.0, value);
            }
        }
        if group.others.fetch_add(1, Ordering::Relaxed).is_multiple_of(CHECKED) {
            self.compare(&options, Options::dump(fd, but, subject)?, subject);
        }
        Ok(options)
    }

    fn compare(&self, told: &Options, asked: Options, subject: &str) {
        // Those grow by themselves, also while they are looked at.
        let Options { send_buffer, receive_buffer, .. } = *told;
        if *told != (Options { send_buffer, receive_buffer, ..asked }) {
            tracing::debug!("{subject} has other options than sockets like it: each is asked for all of them");
            self.wrong.store(true, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::super::survey::Survey;
    use super::super::super::options::Entry;
    use super::*;
    use crate::objects::pieces::PIECE;
    use pod_runtime::sys::inet;
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::os::fd::{AsFd, AsRawFd, OwnedFd};
    use std::time::Duration;

    #[test]
    fn this_kernel_keeps_sockets_as_known_here() {
        let btf = match Btf::of_this_kernel() {
            Ok(btf) => btf,
            Err(why) => return pod_runtime::untested::here(format!("the kernel has no BTF: {why}")),
        };
        let plan = Plan::of(&btf).unwrap();
        assert!(plan.sock.iter().chain(&plan.v6).all(|(_, bytes)| *bytes <= PIECE));
    }

    /// Values that are tried for an option until it has another than before.
    fn values((name, level, _, capacity, _): &Entry) -> Vec<Vec<u8>> {
        let words = |words: &[i32]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>();
        match *name {
            "bindtodevice" => vec![b"lo".to_vec()],
            "tcp_fastopen_key" => vec![vec![7; 16]],
            "tcp_congestion" => vec![b"reno".to_vec(), b"cubic".to_vec()],
            "linger" => vec![words(&[1, 5])],
            "txtime" => vec![words(&[libc::CLOCK_MONOTONIC, 1])],
            "rcvtimeo" | "sndtimeo" => vec![[3u64, 0].map(u64::to_ne_bytes).concat()],
            // No operations, one behind the other.
            "options" => vec![vec![1; 4]],
            "local_port_range" => vec![words(&[41_000 << 16 | 40_000])],
            "unicast_if" | "v6_unicast_if" => vec![1u32.to_be_bytes().to_vec()],
            // A way by segments: one, which is the loopback device's.
            "v6_rthdr" => vec![[[0, 2, 4, 0, 0, 0, 0, 0].as_slice(), &std::net::Ipv6Addr::LOCALHOST.octets()].concat()],
            // A header of padding.
            _ if *level == libc::IPPROTO_IPV6 && *capacity == 256 => vec![vec![0, 0, 1, 4, 0, 0, 0, 0]],
            _ if *capacity == 8 => vec![123_456u64.to_ne_bytes().to_vec()],
            _ => [1, 0, 2, 3, 9, 100, 2000, 50_000].map(|value| words(&[value])).to_vec(),
        }
    }

    /// A socket that has another value for an option than it was made with; None where that cannot be.
    fn changed(entry: &Entry) -> Option<OwnedFd> {
        let family = if entry.1 == libc::IPPROTO_IPV6 { libc::AF_INET6 } else { libc::AF_INET };
        let socket = inet::socket(family, libc::SOCK_STREAM, 0).unwrap();
        let before = Options::value(socket.as_fd(), entry);
        values(entry).into_iter().find_map(|value| {
            inet::set_option(socket.as_fd(), entry.1, entry.2, &value).ok()?;
            let now = Options::value(socket.as_fd(), entry);
            (now != before && now.is_some()).then(|| socket.try_clone().unwrap())
        })
    }

    /// For each option that is told of: a socket like all others but for it has it.
    #[test]
    fn none_of_the_options_is_lost() {
        let Some((survey, plan)) = Survey::get().and_then(|survey| Some((survey, survey.plan()?))) else {
            return pod_runtime::untested::here("the kernel does not tell of sockets");
        };
        let plain = [libc::AF_INET, libc::AF_INET6].map(|family| inet::socket(family, libc::SOCK_STREAM, 0).unwrap());
        let made: Vec<_> = TABLE.iter().map(|entry| (entry.0, changed(entry))).collect();
        let seen = survey.of(std::process::id() as i32).unwrap();
        let groups = Groups::new(plan);
        let options = |name: &str, socket: &OwnedFd| {
            let told = seen.iter().find(|seen| seen.number == socket.as_raw_fd()).unwrap();
            let told = groups.options(socket.as_fd(), told.summary.as_ref().unwrap(), &[], name).unwrap();
            assert_eq!(told, Options::dump(socket.as_fd(), &[], name).unwrap(), "{name}");
        };
        plain.iter().for_each(|socket| options("as made", socket));
        made.iter().for_each(|(name, socket)| socket.iter().for_each(|socket| options(name, socket)));
        let left: BTreeSet<&str> = made.iter().filter(|(_, socket)| socket.is_none()).map(|(name, _)| *name).collect();
        let told = TOLD.iter().chain([&TOLD_V6]).flat_map(|(names, _)| *names).copied();
        let told: BTreeSet<&str> = told.chain(TOLD_DEEP.iter().map(|(name, _)| *name)).collect();
        let untried: Vec<&&str> = left.intersection(&told).collect();
        println!("not changed: {untried:?}");
        let unexpected: Vec<_> = untried.iter().filter(|name| !FIXED.contains(name)).collect();
        assert!(unexpected.is_empty(), "a test does not change {unexpected:?}");
    }

    /// Options that a TCP socket does not let itself be given.
    const FIXED: &[&str] = &[
        "hdrincl",
        "multicast_if",
        "multicast_ttl",
        "nodefrag",
        "recvfragsize",
        "v6_multicast_hops",
        "v6_multicast_if",
    ];

    /// Of sockets that are alike but for one option each has its own.
    #[test]
    fn what_is_told_is_what_each_says() {
        const DIFFERENT: [(i32, i32, i32); 6] = [
            (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
            (libc::IPPROTO_IP, libc::IP_TTL, 9),
            (libc::IPPROTO_TCP, libc::TCP_NODELAY, 1),
            (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 100),
            (libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, 3),
            (libc::SOL_SOCKET, libc::SO_SNDBUF, 77_000),
        ];
        let Some((survey, plan)) = Survey::get().and_then(|survey| Some((survey, survey.plan()?))) else {
            return pod_runtime::untested::here("the kernel does not tell of sockets");
        };
        let new = || inet::socket(libc::AF_INET, libc::SOCK_STREAM, 0).unwrap();
        let mut sockets = vec![new(), new()];
        for (level, name, value) in DIFFERENT {
            sockets.push(new());
            inet::set_number(sockets[sockets.len() - 1].as_fd(), level, name, value).unwrap();
        }
        let seen = survey.of(std::process::id() as i32).unwrap();
        let groups = Groups::new(plan);
        for socket in &sockets {
            let told = seen.iter().find(|seen| seen.number == socket.as_raw_fd()).unwrap();
            let told = groups.options(socket.as_fd(), told.summary.as_ref().unwrap(), &[], "a test").unwrap();
            assert_eq!(told, Options::dump(socket.as_fd(), &[], "a test").unwrap());
        }
        assert!(!groups.wrong());
        let like_the_first =
            groups.known.lock().unwrap().values().map(|group| group.others.load(Ordering::Relaxed)).max();
        assert!(like_the_first >= Some(1), "the second");
    }

    /// Both ends of a connection over the loopback device, over which something was said.
    fn pair(listen: &str, connect: &str) -> [TcpStream; 2] {
        let listener = TcpListener::bind(listen).unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut one = TcpStream::connect((connect, port)).unwrap();
        let mut other = listener.accept().unwrap().0;
        for _ in 0..3 {
            one.write_all(b"request").unwrap();
            other.read_exact(&mut [0; 7]).unwrap();
            other.write_all(b"answer").unwrap();
            one.read_exact(&mut [0; 6]).unwrap();
        }
        [one, other]
    }

    #[test]
    fn a_connection_at_rest_is_as_it_says() {
        let Some((survey, plan)) = Survey::get().and_then(|survey| Some((survey, survey.plan()?))) else {
            return pod_runtime::untested::here("the kernel does not tell of sockets");
        };
        let places = plan.rest.as_ref().expect("a connection at rest is known");
        const WAYS: [(&str, &str); 3] = [("127.0.0.1:0", "127.0.0.1"), ("[::1]:0", "::1"), ("[::]:0", "127.0.0.1")];
        let mut ends: Vec<TcpStream> = WAYS.iter().flat_map(|(listen, connect)| pair(listen, connect)).collect();
        let summary = |socket: &TcpStream| {
            let all = survey.of(std::process::id() as i32).unwrap();
            all.into_iter().find(|seen| seen.number == socket.as_raw_fd()).unwrap().summary.unwrap()
        };
        let told = |socket: &TcpStream| {
            let summary = summary(socket);
            places.connection(&summary, plan.family(&summary))
        };
        let groups = Groups::new(plan);
        for end in &ends {
            let start = Instant::now();
            while told(end).is_none() {
                assert!(start.elapsed() < Duration::from_secs(10), "it does not come to rest");
                std::thread::sleep(Duration::from_millis(1));
            }
            let summary = summary(end);
            let ask = |but: &[&str]| Options::dump(end.as_fd(), but, "a test");
            let asked = || super::super::dump_as(end.as_fd(), plan.family(&summary), "a test", &ask).unwrap();
            let connection = || match asked().phase {
                super::super::Phase::Connected(connection) => *connection,
                other => panic!("{other:?}"),
            };
            let found = groups.at_rest(&summary, || Ok(Some(connection()))).unwrap().unwrap();
            assert!(found.timestamp.is_some() && rest::is_same(&found, &connection()), "{found:?} {:?}", connection());
        }
        assert!(!groups.wrong());
        ends[0].write_all(b"more").unwrap();
        let start = Instant::now();
        while told(&ends[1]).is_some() {
            assert!(start.elapsed() < Duration::from_secs(10), "something is to be read");
        }
        ends[2].shutdown(Shutdown::Write).unwrap();
        assert!(told(&ends[2]).is_none() && told(&ends[3]).is_none(), "one side is closed");
        ends[4].shutdown(Shutdown::Read).unwrap();
        assert!(told(&ends[4]).is_none(), "one side reads no more");
    }

    /// One that is not as it is told gives all of them away.
    #[test]
    fn what_is_told_wrongly_is_noticed() {
        let Some((survey, plan)) = Survey::get().and_then(|survey| Some((survey, survey.plan()?))) else {
            return pod_runtime::untested::here("the kernel does not tell of sockets");
        };
        let [one, _other] = pair("127.0.0.1:0", "127.0.0.1");
        let all = survey.of(std::process::id() as i32).unwrap();
        let summary = all.into_iter().find(|seen| seen.number == one.as_raw_fd()).unwrap().summary.unwrap();
        let (connection, _) = plan.rest.as_ref().unwrap().connection(&summary, Family::V4).unwrap();
        let groups = Groups::new(plan);
        let other = Connection { send_sequence: connection.send_sequence + 1, timestamp: Some(0), ..connection };
        groups.at_rest(&summary, || Ok(Some(other))).unwrap();
        assert!(groups.wrong());
    }

    #[test]
    fn each_option_is_told_of_once() {
        let told = TOLD.iter().chain([&TOLD_V6]).flat_map(|(names, _)| *names).copied();
        let told: Vec<&str> = told.chain(TOLD_DEEP.iter().map(|(name, _)| *name)).collect();
        assert_eq!(told.iter().collect::<BTreeSet<_>>().len(), told.len());
        for name in told {
            assert!(TABLE.iter().any(|entry| entry.0 == name), "{name}");
        }
    }
}
