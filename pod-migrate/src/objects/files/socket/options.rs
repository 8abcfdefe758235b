//! Socket options, by table. An option is read as bytes on the source and set on the destination where the new socket
//! does not have that value already, so that options which a kernel lacks, or whose default differs, do no harm.

use super::reuseport::{self, Found};
use super::values::Values;
use libc::{IPPROTO_IP as IP, IPPROTO_IPV6 as V6, IPPROTO_TCP as TCP, IPPROTO_UDP as UDP, SOL_SOCKET as ANY, c_int};
use pod_runtime::sys::inet;
use pod_runtime::{Doing, Problem, Result};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;

/// When an option must be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum When {
    /// It decides how the socket is bound.
    BeforeBind,
    AfterBind,
    /// It would hold back or shape what is sent, so only when the queues are full again.
    Last,
}
use When::{AfterBind, BeforeBind, Last};

const SMALL: usize = 4;

/// Name (in images), level, number, capacity in bytes, when.
pub(super) type Entry = (&'static str, c_int, c_int, usize, When);

#[rustfmt::skip]
pub(super) const TABLE: &[Entry] = &[
    ("reuseport", ANY, libc::SO_REUSEPORT, SMALL, BeforeBind),
    ("bindtodevice", ANY, libc::SO_BINDTODEVICE, 16, BeforeBind),
    ("mark", ANY, libc::SO_MARK, SMALL, BeforeBind),
    ("freebind", IP, libc::IP_FREEBIND, SMALL, BeforeBind),
    ("transparent", IP, libc::IP_TRANSPARENT, SMALL, BeforeBind),
    ("bind_address_no_port", IP, libc::IP_BIND_ADDRESS_NO_PORT, SMALL, BeforeBind),
    ("v6only", V6, libc::IPV6_V6ONLY, SMALL, BeforeBind),
    ("v6_freebind", V6, 78, SMALL, BeforeBind),
    ("v6_transparent", V6, libc::IPV6_TRANSPARENT, SMALL, BeforeBind),
    // TOS changes the priority, so it stands before it.
    ("tos", IP, libc::IP_TOS, SMALL, AfterBind),
    ("v6_tclass", V6, libc::IPV6_TCLASS, SMALL, AfterBind),
    ("priority", ANY, libc::SO_PRIORITY, SMALL, AfterBind),
    ("keepalive", ANY, libc::SO_KEEPALIVE, SMALL, AfterBind),
    ("broadcast", ANY, libc::SO_BROADCAST, SMALL, AfterBind),
    ("dontroute", ANY, libc::SO_DONTROUTE, SMALL, AfterBind),
    ("linger", ANY, libc::SO_LINGER, 8, AfterBind),
    ("oobinline", ANY, libc::SO_OOBINLINE, SMALL, AfterBind),
    ("rcvlowat", ANY, libc::SO_RCVLOWAT, SMALL, AfterBind),
    ("rcvtimeo", ANY, libc::SO_RCVTIMEO, 16, AfterBind),
    ("sndtimeo", ANY, libc::SO_SNDTIMEO, 16, AfterBind),
    ("timestamp", ANY, libc::SO_TIMESTAMP, SMALL, AfterBind),
    ("timestampns", ANY, libc::SO_TIMESTAMPNS, SMALL, AfterBind),
    ("timestamping", ANY, libc::SO_TIMESTAMPING, SMALL, AfterBind),
    ("passcred", ANY, libc::SO_PASSCRED, SMALL, AfterBind),
    ("rxq_ovfl", ANY, libc::SO_RXQ_OVFL, SMALL, AfterBind),
    ("no_check", ANY, libc::SO_NO_CHECK, SMALL, AfterBind),
    ("busy_poll", ANY, libc::SO_BUSY_POLL, SMALL, AfterBind),
    ("max_pacing_rate", ANY, libc::SO_MAX_PACING_RATE, 8, AfterBind),
    ("zerocopy", ANY, libc::SO_ZEROCOPY, SMALL, AfterBind),
    ("nofcs", ANY, 43, SMALL, AfterBind),
    ("select_err_queue", ANY, libc::SO_SELECT_ERR_QUEUE, SMALL, AfterBind),
    ("txtime", ANY, libc::SO_TXTIME, 8, AfterBind),
    ("prefer_busy_poll", ANY, 69, SMALL, AfterBind),
    ("txrehash", ANY, 74, SMALL, AfterBind),
    ("rcvmark", ANY, 75, SMALL, AfterBind),
    ("passpidfd", ANY, 76, SMALL, AfterBind),
    ("rcvpriority", ANY, 82, SMALL, AfterBind),
    ("passsec", ANY, libc::SO_PASSSEC, SMALL, AfterBind),
    // What is queued may carry descriptors, which a receiver that takes none would lose.
    ("passrights", ANY, 83, SMALL, Last),
    ("peek_off", ANY, libc::SO_PEEK_OFF, SMALL, Last),
    ("ttl", IP, libc::IP_TTL, SMALL, AfterBind),
    ("minttl", IP, libc::IP_MINTTL, SMALL, AfterBind),
    ("mtu_discover", IP, libc::IP_MTU_DISCOVER, SMALL, AfterBind),
    ("recverr", IP, libc::IP_RECVERR, SMALL, AfterBind),
    ("recvttl", IP, libc::IP_RECVTTL, SMALL, AfterBind),
    ("recvtos", IP, libc::IP_RECVTOS, SMALL, AfterBind),
    ("recvopts", IP, libc::IP_RECVOPTS, SMALL, AfterBind),
    ("options", IP, libc::IP_OPTIONS, 40, AfterBind),
    ("retopts", IP, libc::IP_RETOPTS, SMALL, AfterBind),
    ("ip_passsec", IP, 18, SMALL, AfterBind),
    ("checksum", IP, 23, SMALL, AfterBind),
    ("recvfragsize", IP, 25, SMALL, AfterBind),
    ("recverr_rfc4884", IP, 26, SMALL, AfterBind),
    ("pktinfo", IP, libc::IP_PKTINFO, SMALL, AfterBind),
    ("recvorigdstaddr", IP, libc::IP_RECVORIGDSTADDR, SMALL, AfterBind),
    ("multicast_ttl", IP, libc::IP_MULTICAST_TTL, SMALL, AfterBind),
    // By address only: what was chosen by a device's index alone, the kernel does not tell.
    ("multicast_if", IP, libc::IP_MULTICAST_IF, SMALL, AfterBind),
    ("multicast_loop", IP, libc::IP_MULTICAST_LOOP, SMALL, AfterBind),
    ("multicast_all", IP, libc::IP_MULTICAST_ALL, SMALL, AfterBind),
    ("unicast_if", IP, libc::IP_UNICAST_IF, SMALL, AfterBind),
    ("hdrincl", IP, libc::IP_HDRINCL, SMALL, AfterBind),
    ("nodefrag", IP, libc::IP_NODEFRAG, SMALL, AfterBind),
    ("local_port_range", IP, 51, SMALL, AfterBind),
    ("v6_unicast_hops", V6, libc::IPV6_UNICAST_HOPS, SMALL, AfterBind),
    ("v6_multicast_if", V6, libc::IPV6_MULTICAST_IF, SMALL, AfterBind),
    ("v6_multicast_hops", V6, libc::IPV6_MULTICAST_HOPS, SMALL, AfterBind),
    ("v6_multicast_loop", V6, libc::IPV6_MULTICAST_LOOP, SMALL, AfterBind),
    ("v6_multicast_all", V6, 29, SMALL, AfterBind),
    ("v6_mtu_discover", V6, libc::IPV6_MTU_DISCOVER, SMALL, AfterBind),
    ("v6_recverr", V6, libc::IPV6_RECVERR, SMALL, AfterBind),
    ("v6_recvpktinfo", V6, libc::IPV6_RECVPKTINFO, SMALL, AfterBind),
    ("v6_recvhoplimit", V6, libc::IPV6_RECVHOPLIMIT, SMALL, AfterBind),
    ("v6_recvtclass", V6, libc::IPV6_RECVTCLASS, SMALL, AfterBind),
    ("v6_recvorigdstaddr", V6, libc::IPV6_RECVORIGDSTADDR, SMALL, AfterBind),
    ("v6_recvhopopts", V6, 53, SMALL, AfterBind),
    ("v6_checksum", V6, 7, SMALL, AfterBind),
    ("v6_2292pktinfo", V6, 2, SMALL, AfterBind),
    ("v6_2292hopopts", V6, 3, SMALL, AfterBind),
    ("v6_2292dstopts", V6, 4, SMALL, AfterBind),
    ("v6_2292rthdr", V6, 5, SMALL, AfterBind),
    ("v6_2292hoplimit", V6, 8, SMALL, AfterBind),
    ("v6_flowinfo", V6, 11, SMALL, AfterBind),
    ("v6_flowinfo_send", V6, 33, SMALL, AfterBind),
    ("v6_router_alert_isolate", V6, 30, SMALL, AfterBind),
    ("v6_recverr_rfc4884", V6, 31, SMALL, AfterBind),
    ("v6_recvfragsize", V6, 77, SMALL, AfterBind),
    ("v6_hopopts", V6, 54, 256, AfterBind),
    ("v6_rthdrdstopts", V6, 55, 256, AfterBind),
    ("v6_rthdr", V6, 57, 256, AfterBind),
    ("v6_dstopts", V6, 59, 256, AfterBind),
    ("v6_recvrthdr", V6, 56, SMALL, AfterBind),
    ("v6_recvdstopts", V6, 58, SMALL, AfterBind),
    ("v6_recvpathmtu", V6, 60, SMALL, AfterBind),
    ("v6_dontfrag", V6, libc::IPV6_DONTFRAG, SMALL, AfterBind),
    ("v6_autoflowlabel", V6, 70, SMALL, AfterBind),
    ("v6_addr_preferences", V6, 72, SMALL, AfterBind),
    ("v6_minhopcount", V6, 73, SMALL, AfterBind),
    ("v6_unicast_if", V6, 76, SMALL, AfterBind),
    ("tcp_nodelay", TCP, libc::TCP_NODELAY, SMALL, AfterBind),
    // These two only of sockets without a connection: see `tcp::dump`.
    ("tcp_maxseg", TCP, libc::TCP_MAXSEG, SMALL, AfterBind),
    ("tcp_window_clamp", TCP, libc::TCP_WINDOW_CLAMP, SMALL, AfterBind),
    ("tcp_fastopen_key", TCP, 33, 32, AfterBind),
    ("tcp_keepidle", TCP, libc::TCP_KEEPIDLE, SMALL, AfterBind),
    ("tcp_keepintvl", TCP, libc::TCP_KEEPINTVL, SMALL, AfterBind),
    ("tcp_keepcnt", TCP, libc::TCP_KEEPCNT, SMALL, AfterBind),
    ("tcp_syncnt", TCP, libc::TCP_SYNCNT, SMALL, AfterBind),
    ("tcp_linger2", TCP, libc::TCP_LINGER2, SMALL, AfterBind),
    ("tcp_defer_accept", TCP, libc::TCP_DEFER_ACCEPT, SMALL, AfterBind),
    ("tcp_congestion", TCP, libc::TCP_CONGESTION, 16, AfterBind),
    ("tcp_thin_linear_timeouts", TCP, 16, SMALL, AfterBind),
    ("tcp_user_timeout", TCP, libc::TCP_USER_TIMEOUT, SMALL, AfterBind),
    ("tcp_notsent_lowat", TCP, 25, SMALL, AfterBind),
    ("tcp_save_syn", TCP, 27, SMALL, AfterBind),
    ("tcp_fastopen_connect", TCP, 30, SMALL, AfterBind),
    ("tcp_fastopen_no_cookie", TCP, 34, SMALL, AfterBind),
    ("tcp_inq", TCP, 36, SMALL, AfterBind),
    ("tcp_tx_delay", TCP, 37, SMALL, AfterBind),
    ("tcp_rto_max_ms", TCP, 44, SMALL, AfterBind),
    ("tcp_cork", TCP, libc::TCP_CORK, SMALL, Last),
    ("udp_no_check6_tx", UDP, 101, SMALL, AfterBind),
    ("udp_no_check6_rx", UDP, 102, SMALL, AfterBind),
    ("udp_segment", UDP, libc::UDP_SEGMENT, SMALL, AfterBind),
    ("udp_gro", UDP, libc::UDP_GRO, SMALL, AfterBind),
    ("udp_encap", UDP, 100, SMALL, AfterBind),
    // What was held back is lost (and said so); what comes next is held back again.
    ("udp_cork", UDP, libc::UDP_CORK, SMALL, Last),
];

/// Only IP sockets are in groups.
fn is_inet(address: &[u8]) -> bool {
    let family = address.first_chunk().map_or(0, |two| i32::from(u16::from_ne_bytes(*two)));
    [libc::AF_INET, libc::AF_INET6].contains(&family)
}

/// What a new socket has of these depends on where it is connected to.
const OF_THE_ROUTE: [&str; 2] = ["tcp_congestion", "v6_unicast_hops"];

/// SOL_SOCKET, not in libc for this target: which of the buffers were sized by hand.
const SO_BUF_LOCK: c_int = 72;

/// All that is set on a socket besides its addresses.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Options {
    pub values: Values,
    /// Set after TCP's repair mode, which uses the same field of the kernel.
    pub reuse_address: bool,
    /// As getsockopt gives it: twice what a program asked for.
    pub send_buffer: u32,
    pub receive_buffer: u32,
    /// Bit 0: the send buffer was sized by hand; bit 1: the receive buffer. Others grow by themselves.
    pub buffers_locked: u32,
    /// Classic BPF, 8 bytes an instruction.
    pub filter: ByteBuf,
    pub filter_locked: bool,
    /// What divides the group of a port among its sockets, classic BPF as above.
    #[serde(default)]
    pub reuseport_program: ByteBuf,
    /// Nobody can tell whether there is such a program.
    #[serde(skip)]
    pub reuseport_unknown: bool,
}

impl Options {
    /// What a socket has for one; none of another family's option, or in a kernel without it.
    pub(super) fn value(fd: BorrowedFd<'_>, (_, level, number, capacity, _): &Entry) -> Option<Vec<u8>> {
        inet::option(fd, *level, *number, &[], *capacity).ok().filter(|value| !value.is_empty())
    }

    /// Whether no socket of this kind has such an option.
    pub(super) fn is_unknown(fd: BorrowedFd<'_>, (_, level, number, capacity, _): &Entry) -> bool {
        inet::option(fd, *level, *number, &[], *capacity)
            .is_err_and(|error| matches!(error.raw_os_error(), Some(libc::ENOPROTOOPT | libc::EOPNOTSUPP)))
    }

    /// All but those of some names. `subject` names the socket in a refusal.
    pub fn dump(fd: BorrowedFd<'_>, but: &[&str], subject: &str) -> Result<Options> {
        let mut values = BTreeMap::new();
        for entry in TABLE.iter().filter(|entry| !but.contains(&entry.0)) {
            if let Some(value) = Options::value(fd, entry) {
                values.insert(entry.0.to_string(), ByteBuf::from(value));
            }
        }
        let number = |name| inet::number(fd, ANY, name).unwrap_or(0);
        let filter = match inet::filter(fd) {
            Ok(filter) => filter,
            Err(error) if error.raw_os_error() == Some(libc::EACCES) => {
                return Err(Problem::new(
                    "E-SOCKET-EBPF",
                    format!("{subject}: the socket has an eBPF filter, which the kernel does not give back"),
                )
                .fix("detach it (SO_DETACH_FILTER), or use a classic BPF filter"));
            }
            Err(error) => return Err(error).doing(|| format!("{subject}: read the socket's filter")),
        };
        let reuseport = number(libc::SO_REUSEPORT) == 1 && inet::local_address(fd).is_ok_and(|bytes| is_inet(&bytes));
        let program = if reuseport { reuseport::program(fd, subject)? } else { Found::Classic(Vec::new()) };
        let (program, reuseport_unknown) = match program {
            Found::Classic(program) => (program, false),
            Found::Unknown => (Vec::new(), true),
        };
        Ok(Options {
            reuseport_program: ByteBuf::from(program),
            reuseport_unknown,
            values: Values::from(values),
            reuse_address: number(libc::SO_REUSEADDR) == 1,
            send_buffer: number(libc::SO_SNDBUF) as u32,
            receive_buffer: number(libc::SO_RCVBUF) as u32,
            buffers_locked: number(SO_BUF_LOCK) as u32,
            filter_locked: number(libc::SO_LOCK_FILTER) != 0,
            filter: ByteBuf::from(filter),
        })
    }

    /// Everything that decides how the socket is bound, and its buffers, whose sizes a connection takes over.
    pub fn before_bind(&self, fd: BorrowedFd<'_>, reuse_address: bool) -> Result<()> {
        if reuse_address && self.reuse_address {
            inet::set_number(fd, ANY, libc::SO_REUSEADDR, 1).doing(|| "set SO_REUSEADDR".into())?;
        }
        // Half, because the kernel doubles it again. A host may refuse more than its limit to a program; not to us.
        let half = |bytes: u32| (bytes / 2).min(1 << 30) as i32;
        inet::set_number(fd, ANY, libc::SO_SNDBUFFORCE, half(self.send_buffer))
            .doing(|| "size the send buffer".into())?;
        inet::set_number(fd, ANY, libc::SO_RCVBUFFORCE, half(self.receive_buffer))
            .doing(|| "size the receive buffer".into())?;
        self.set(fd, BeforeBind)
    }

    /// The rest, except what would hold back data that is still to be written.
    pub fn after_bind(&self, fd: BorrowedFd<'_>) -> Result<()> {
        self.set(fd, AfterBind)?;
        if !self.filter.is_empty() {
            inet::attach_filter(fd, &self.filter).doing(|| "attach the socket's filter".into())?;
            if self.filter_locked {
                inet::set_number(fd, ANY, libc::SO_LOCK_FILTER, 1).doing(|| "lock the socket's filter".into())?;
            }
        }
        Ok(())
    }

    /// When the queues are what they were.
    pub fn last(&self, fd: BorrowedFd<'_>) -> Result<()> {
        self.set(fd, Last)?;
        if !self.reuseport_program.is_empty() {
            inet::attach_reuseport(fd, &self.reuseport_program)
                .doing(|| "attach the program of a port's group".into())?;
        }
        // Kernels before 5.14 have no such option: there the buffers stay as they are now.
        let _ = inet::set_number(fd, ANY, SO_BUF_LOCK, (self.buffers_locked & 3) as i32);
        Ok(())
    }

    fn set(&self, fd: BorrowedFd<'_>, when: When) -> Result<()> {
        let all = || TABLE.iter().enumerate().filter(|(_, entry)| entry.4 == when).map(|(index, _)| index);
        if !self.values.like_others() {
            for index in all() {
                self.set_one(fd, index);
            }
            return Ok(());
        }
        let changed = self.values.changed(when);
        match changed.get() {
            Some(changed) => {
                for index in changed {
                    self.set_one(fd, *index);
                }
            }
            None => {
                let needed = all().filter(|index| self.set_one(fd, *index) || OF_THE_ROUTE.contains(&TABLE[*index].0));
                let _ = changed.set(needed.collect());
            }
        }
        Ok(())
    }

    /// Whether it was another.
    fn set_one(&self, fd: BorrowedFd<'_>, index: usize) -> bool {
        let (name, level, number, capacity, _) = &TABLE[index];
        let Some(wanted) = self.values.get(name) else { return false };
        let Ok(current) = inet::option(fd, *level, *number, &[], *capacity) else {
            tracing::debug!("this kernel has no socket option {name}");
            return false;
        };
        if current[..] == wanted[..] {
            return false;
        }
        if let Err(error) = inet::set_option(fd, *level, *number, wanted) {
            // Images of earlier versions have it of connections, which nobody can set it on.
            if *name == "multicast_ttl" && error.raw_os_error() == Some(libc::EINVAL) {
                return false;
            }
            // A congestion control that is not built here, a device that is not there: the socket works on.
            tracing::warn!("W-SOCKET-OPTION: {name} of a socket could not be set: {error}");
        }
        true
    }
}
