//! Connections at rest: everything that was written is acknowledged, everything that came is read, both sides are open. Of ten
//! thousand clients of a server nearly all are, and what there is to know of them is what the kernel keeps of them in a
//! few words, which the [survey](super::super::super::survey) tells: the twenty-odd calls of repair mode are not made.
//!
//! What is believed: the members that are named here mean what they mean in every Linux since 5.4. Of every so many connections
//! one is asked as well, and the first one, from which the clock of all is known.

use super::super::address::{Endpoint, Family};
use super::kernel_state::ESTABLISHED;
use super::summary::{Member, Summary};
use super::{Connection, Window};
use crate::objects::pieces::moved;
use pod_runtime::proc::btf::Place;
use serde_bytes::ByteBuf;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// What must be there, in this order.
pub(super) const MEMBERS: [Member; 24] = [
    ("sock_common", "skc_state"),
    ("sock_common", "skc_num"),
    ("sock_common", "skc_dport"),
    ("sock_common", "skc_rcv_saddr"),
    ("sock_common", "skc_daddr"),
    ("sock_common", "skc_v6_rcv_saddr"),
    ("sock_common", "skc_v6_daddr"),
    ("sock", "sk_err"),
    ("sock", "sk_shutdown"),
    ("inet_connection_sock", "icsk_ulp_ops"),
    ("tcp_sock", "repair"),
    ("tcp_sock", "urg_data"),
    ("tcp_sock", "copied_seq"),
    ("tcp_sock", "rcv_nxt"),
    ("tcp_sock", "snd_una"),
    ("tcp_sock", "snd_nxt"),
    ("tcp_sock", "write_seq"),
    ("tcp_sock", "snd_wl1"),
    ("tcp_sock", "snd_wnd"),
    ("tcp_sock", "max_window"),
    ("tcp_sock", "rcv_wnd"),
    ("tcp_sock", "rcv_wup"),
    ("tcp_sock", "tsoffset"),
    ("tcp_sock", "rx_opt"),
];

/// Within the last of these.
pub(super) const NEGOTIATED: [Member; 6] = [
    ("tcp_options_received", "mss_clamp"),
    ("tcp_options_received", "sack_ok"),
    ("tcp_options_received", "tstamp_ok"),
    ("tcp_options_received", "wscale_ok"),
    ("tcp_options_received", "snd_wscale"),
    ("tcp_options_received", "rcv_wscale"),
];

/// Since Linux 6.7: the connection's clock counts microseconds.
pub(super) const MICROSECONDS: Member = ("tcp_sock", "tcp_usec_ts");

/// Where what is asked for lies in the bytes of a summary, in the order of the names above.
#[derive(Debug)]
pub(super) struct Places {
    members: [Place; MEMBERS.len()],
    negotiated: [Place; NEGOTIATED.len()],
    microseconds: Option<Place>,
}

/// Since when a connection's clock runs, or what it shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Offset(u32);

impl Places {
    /// `place` finds a member in its struct, `sock` are the pieces of that which are read.
    pub fn of(place: impl Fn(&Member) -> Option<Place>, sock: &[(u32, u32)]) -> Option<Places> {
        let within = |member: &Member| moved(place(member)?, sock, 0);
        let members: Vec<Place> = MEMBERS.iter().map(within).collect::<Option<_>>()?;
        let all = members[MEMBERS.len() - 1].bit;
        let inner = |member: &Member| place(member).map(|place| Place { bit: all + place.bit, bits: place.bits });
        let negotiated: Vec<Place> = NEGOTIATED.iter().map(inner).collect::<Option<_>>()?;
        let microseconds = match place(&MICROSECONDS) {
            Some(_) => Some(within(&MICROSECONDS)?),
            None => None,
        };
        Some(Places { members: members.try_into().ok()?, negotiated: negotiated.try_into().ok()?, microseconds })
    }

    /// The connection, if it is at rest, and what is to be added to the clock of all if it has one. Its own clock is not
    /// told.
    pub fn connection(&self, Summary(bytes): &Summary, family: Family) -> Option<(Connection, Option<Offset>)> {
        let word = |at: usize| self.members[at].of(bytes);
        let number = |at: usize| word(at).map(|word| word as u32);
        let negotiated = |at: usize| self.negotiated[at].of(bytes);
        let microseconds = self.microseconds.is_some_and(|place| place.of(bytes) != Some(0));
        let open = word(0)? == u64::from(ESTABLISHED) && [7, 8, 9, 10, 11].iter().all(|at| word(*at) == Some(0));
        let (received, written) = (number(13)?, number(16)?);
        let at_rest = number(12)? == received && number(14)? == written && number(15)? == written;
        if !open || !at_rest || microseconds {
            return None;
        }
        let port = bytes.get(self.members[2].byte() as usize..)?.first_chunk()?;
        let (local, peer) = match family {
            Family::V4 => (self.address::<4>(bytes, 3)?, self.address::<4>(bytes, 4)?),
            Family::V6 => (self.address::<16>(bytes, 5)?, self.address::<16>(bytes, 6)?),
        };
        let connection = Connection {
            local: Endpoint { ip: local, port: word(1)? as u16, scope: 0 },
            peer: Endpoint { ip: peer, port: u16::from_be_bytes(*port), scope: 0 },
            send_sequence: written,
            receive_sequence: received,
            unread: ByteBuf::new(),
            unacknowledged: ByteBuf::new(),
            sent: 0,
            received_fin: false,
            sent_fin: false,
            sent_fin_first: false,
            read_shut: false,
            window: Window {
                snd_wl1: number(17)?,
                snd_wnd: number(18)?,
                max_window: number(19)?,
                rcv_wnd: number(20)?,
                rcv_wup: number(21)?,
            },
            mss: negotiated(0)? as u32,
            sack: negotiated(1)? != 0,
            window_scale: match negotiated(3)? {
                0 => None,
                _ => Some((negotiated(4)? as u8, negotiated(5)? as u8)),
            },
            timestamp: None,
        };
        let offset = Offset(number(22)?);
        Some((connection, (negotiated(2)? != 0).then_some(offset)))
    }

    /// None where a device belongs to it, or where it is none at all.
    fn address<const BYTES: usize>(&self, bytes: &[u8], at: usize) -> Option<IpAddr>
    where
        IpAddr: From<[u8; BYTES]>,
    {
        let found: &[u8; BYTES] = bytes.get(self.members[at].byte() as usize..)?.first_chunk()?;
        let ip = IpAddr::from(*found);
        let plain = match ip {
            IpAddr::V4(ip) => ip != Ipv4Addr::UNSPECIFIED,
            IpAddr::V6(ip) => ip != Ipv6Addr::UNSPECIFIED && !ip.is_unicast_link_local() && !ip.is_multicast(),
        };
        plain.then_some(ip)
    }
}

impl Offset {
    /// The clock of all, from what one connection's shows. One more, because that is told without its last bit: none may seem to
    /// go back.
    pub fn clock(self, shown: u32) -> u32 {
        shown.wrapping_sub(self.0).wrapping_add(1)
    }

    /// What a connection's clock shows when that of all shows this.
    pub fn shown(self, clock: u32) -> u32 {
        clock.wrapping_add(self.0) & !1
    }
}

/// Whether what was told is what the connection says, but for its clock, which goes on while it is asked. One that is behind makes
/// its peer drop all that it says until it is not.
pub(super) fn is_same(told: &Connection, asked: &Connection) -> bool {
    /// Milliseconds: of a machine that has much else to do.
    const LONG: i32 = 1000;
    let clocks = match (told.timestamp, asked.timestamp) {
        (Some(told), Some(asked)) => (asked.wrapping_sub(told) as i32).abs() < LONG,
        (told, asked) => told == asked,
    };
    clocks && Connection { timestamp: asked.timestamp, ..told.clone() } == *asked
}
