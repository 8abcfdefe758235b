//! Connections that their program has closed and that are not over: the peer has not acknowledged our FIN (FIN_WAIT1,
//! CLOSING, LAST_ACK), or has not sent its own (FIN_WAIT2). A peer that reads slowly, or keeps its end open for a while,
//! leaves a server with some at every moment. Without them, what it says next would be answered with a reset.
//!
//! They have no descriptor, so nobody can be asked for their numbers but they themselves: a segment that does not fit a
//! connection is answered with what it has got and what it sends next (RFC 9293, 3.10.7.4). That changes nothing in it. The
//! answer leaves through the pod's cable, where we listen, and the bridge takes nothing from ([`port::mute`]).
//!
//! [`port::mute`]: pod_runtime::network::port::mute
//!
//! In the image each is a file that no process has. The opener restores it like any other connection, and closes it with
//! everything else that it holds when it ends: then it is again what it was.
//!
//! One with data that the peer has not acknowledged cannot be saved: nothing shows the data. Those are waited for
//! ([`crate::settle`]), and counted as lost after that. Nor is TIME_WAIT saved: both sides are done.

use super::super::address::{Endpoint, Family};
use super::super::diag::{Diag, Told};
use super::super::inject::Segment;
use super::super::options::Options;
use super::kernel_state::{CLOSING, FIN_WAIT1, FIN_WAIT2, LAST_ACK};
use super::window::Window;
use super::{Connection, Phase, State};
use crate::ids::HostPid;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use pod_runtime::network::cable::INSIDE;
use pod_runtime::network::frame::{ACK, FIN, RST, SYN, TcpFrame};
use pod_runtime::network::wire::inside;
use pod_runtime::spec::{NetworkMode, Spec};
use pod_runtime::sys::netdev::{self, Receive};
use pod_runtime::{Doing, Result};
use serde_bytes::ByteBuf;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// Answers come while the segment is still being handed in. So long for all together: the pod stands still.
const PATIENCE: Duration = Duration::from_millis(20);
/// More than these were asked for in one go would overflow the queue of the socket that listens.
const AT_ONCE: usize = 64;
/// No more are kept: each is made again at the destination.
const MOST: usize = 4096;
/// Everything that passes a device, in both directions.
const ETH_P_ALL: u16 = 3;

const STATES: u32 = 1 << FIN_WAIT1 | 1 << FIN_WAIT2 | 1 << CLOSING | 1 << LAST_ACK;

/// Those of a pod, as they were a moment ago. Whatever cannot be asked is lost, and the pod moves all the same.
#[derive(Debug)]
pub struct Closed {
    /// So many were counted.
    counted: u32,
    asked: Option<Asked>,
}

#[derive(Debug)]
struct Asked {
    diag: Diag,
    own: Vec<IpAddr>,
    states: Vec<(Told, State)>,
    when: Instant,
}

impl Closed {
    /// Asks them, of which there are so many. The pod stands still, and its cable has not been cut.
    pub fn ask(counted: u32, spec: &Spec, init: HostPid) -> Closed {
        // On the host's own network they may be anybody's.
        let counted = if spec.network.mode == NetworkMode::Host { 0 } else { counted };
        let asked = (counted > 0).then(|| Asked::of(spec, init));
        Closed { counted, asked: asked.and_then(said) }
    }

    /// Those that are the same still, now that nothing comes to the pod any more; and how many could not be saved.
    pub fn settled(&self) -> (Vec<State>, u32) {
        let settled = self.asked.as_ref().map(Asked::settled).and_then(said);
        settled.unwrap_or_else(|| (Vec::new(), self.counted))
    }
}

fn said<T>(done: Result<T>) -> Option<T> {
    done.map_err(|problem| tracing::debug!("closed connections: {}", problem.chain())).ok()
}

impl Asked {
    fn of(spec: &Spec, init: HostPid) -> Result<Asked> {
        let path = format!("/proc/{init}/ns/net");
        let network = File::open(&path).doing(|| format!("open {path}"))?;
        let diag = Diag::inside(network.as_fd()).doing(|| "open a socket of sock_diag in the pod".into())?;
        let own: Vec<IpAddr> = spec.network.addresses.iter().map(|address| address.ip).collect();
        let mut told = list(&diag, &own)?;
        told.truncate(MOST);
        let when = Instant::now();
        let answers = inside(network.as_fd(), || ask_all(&told))??;
        let state = |told: Told| {
            let state = answers.get(&key(&told.local, &told.peer)).and_then(|answer| state(&told, answer))?;
            Some((told, state))
        };
        Ok(Asked { states: told.into_iter().filter_map(state).collect(), diag, own, when })
    }

    fn settled(&self) -> Result<(Vec<State>, u32)> {
        let now = list(&self.diag, &self.own)?;
        let by_key: HashMap<Key, &Told> = now.iter().map(|told| (key(&told.local, &told.peer), told)).collect();
        let same = |told: &Told| by_key.get(&key(&told.local, &told.peer)).is_some_and(|now| is_still(told, now));
        let states = self.states.iter().filter(|(told, _)| same(told)).map(|(_, state)| state.clone());
        let mut states: Vec<State> = states.collect();
        // What one has sent since then (its FIN, once more) had a later time.
        let passed = self.when.elapsed().as_millis() as u32 + 1;
        for state in &mut states {
            if let Phase::Connected(connection) = &mut state.phase {
                connection.timestamp = connection.timestamp.map(|time| time.wrapping_add(passed) & !1);
            }
        }
        let lost = now.len().saturating_sub(states.len()) as u32;
        Ok((states, lost))
    }
}

/// Whether what was saved of one is right for what it is now. That its FIN is acknowledged makes no difference: it is sent
/// again in any case.
fn is_still(then: &Told, now: &Told) -> bool {
    let same = then.state == now.state || (then.state == FIN_WAIT1 && now.state == FIN_WAIT2);
    same && (&then.local, &then.peer) == (&now.local, &now.peer)
}

/// What a connection is called on the wire.
type Key = (IpAddr, u16, IpAddr, u16);

fn key(local: &Endpoint, peer: &Endpoint) -> Key {
    (local.wire_ip(), local.port, peer.wire_ip(), peer.port)
}

/// Without those whose other end is in the pod: it goes along.
fn list(diag: &Diag, own: &[IpAddr]) -> Result<Vec<Told>> {
    let of = |family: Family| diag.without_descriptor(family.number(), STATES);
    let both = of(Family::V4).and_then(|mut found| {
        found.extend(of(Family::V6)?);
        Ok(found)
    });
    let outside = |told: &Told| {
        let peer = told.peer.wire_ip();
        !peer.is_loopback() && !own.contains(&peer)
    };
    let has_no_data = |told: &Told| told.unacknowledged <= 1;
    let found = both.doing(|| "list the pod's closed connections".into())?;
    Ok(found.into_iter().filter(|told| outside(told) && has_no_data(told)).collect())
}

/// In the pod's network.
fn ask_all(told: &[Told]) -> Result<HashMap<Key, Answer>> {
    let mut answers = HashMap::new();
    if told.is_empty() {
        return Ok(answers);
    }
    let open = || -> io::Result<OwnedFd> {
        let control = netdev::control_socket()?;
        netdev::packet_socket(netdev::index(control.as_fd(), INSIDE)?, Receive::Protocol(ETH_P_ALL), false)
    };
    let listener = open().doing(|| "listen on the pod's cable".into())?;
    // An empty segment first: one that fits by chance (once in some ten thousand times) is passed over, data that fits would
    // be answered with a reset. Who has been asked so just now answers data only.
    let end = Instant::now() + PATIENCE;
    for (data, end) in [(&[][..], end - PATIENCE / 2), (&[0][..], end)] {
        let silent: Vec<&Told> =
            told.iter().filter(|told| !answers.contains_key(&key(&told.local, &told.peer))).collect();
        for some in silent.chunks(AT_ONCE) {
            for told in some {
                let segment = Segment {
                    from: told.peer,
                    to: told.local,
                    sequence: told.peer.port.into(),
                    acknowledge: 1,
                    flags: ACK,
                    window: 0,
                };
                // One that cannot be asked keeps no other from it.
                let _ = segment.inject_with(data);
            }
            hear(listener.as_fd(), some, end, &mut answers)?;
        }
    }
    netdev::close_later(listener);
    Ok(answers)
}

/// Until all of these have answered, or until then.
fn hear(listener: BorrowedFd<'_>, asked: &[&Told], end: Instant, answers: &mut HashMap<Key, Answer>) -> Result<()> {
    let mut frame = [0; 256];
    let mut missing: HashSet<Key> = asked.iter().map(|told| key(&told.local, &told.peer)).collect();
    // What is there already is heard in any case; not more, however much passes.
    let mut late = 4 * AT_ONCE;
    while !missing.is_empty() && late > 0 {
        late -= usize::from(Instant::now() > end);
        // With MSG_TRUNC the length is the frame's, which says whether there is data in it.
        match recv(listener.as_raw_fd(), &mut frame, MsgFlags::MSG_TRUNC) {
            Ok(length) => {
                if let Some((key, answer)) = Answer::parse(&frame[..length.min(256)]) {
                    missing.remove(&key);
                    answers.insert(key, answer);
                }
            }
            Err(nix::Error::EINTR) => {}
            Err(nix::Error::EAGAIN) => {
                let left = end.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Ok(());
                }
                let mut fds = [PollFd::new(listener, PollFlags::POLLIN)];
                let left = PollTimeout::try_from(left.as_millis().max(1)).unwrap_or(PollTimeout::ZERO);
                match poll(&mut fds, left) {
                    Ok(_) | Err(nix::Error::EINTR) => {}
                    Err(error) => return Err(error).doing(|| "wait for what a connection answers".into()),
                }
            }
            Err(error) => return Err(error).doing(|| "hear what a connection answers".into()),
        }
    }
    Ok(())
}

/// What a connection says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Answer {
    send_next: u32,
    receive_next: u32,
    window: u16,
    timestamp: Option<u32>,
}

impl Answer {
    /// Of an Ethernet frame that the pod sends.
    fn parse(frame: &[u8]) -> Option<(Key, Answer)> {
        // Its FIN sent once more is not the answer.
        let tcp = TcpFrame::parse(frame).filter(|tcp| tcp.flags & (ACK | FIN | RST | SYN) == ACK)?;
        let (local, peer) = (tcp.source, tcp.destination);
        let answer = Answer {
            send_next: tcp.sequence,
            receive_next: tcp.acknowledged,
            window: tcp.window,
            timestamp: timestamp(tcp.options),
        };
        Some(((local.ip(), local.port(), peer.ip(), peer.port()), answer))
    }
}

/// Of the options of a segment.
fn timestamp(mut options: &[u8]) -> Option<u32> {
    loop {
        match options {
            [0, ..] | [] => return None,
            [1, rest @ ..] => options = rest,
            [8, 10, rest @ ..] => return Some(u32::from_be_bytes(*rest.first_chunk()?)),
            [_, length, ..] => options = options.get(usize::from(*length).max(2)..)?,
            [_] => return None,
        }
    }
}

/// None if its FIN is still to be sent.
fn state(told: &Told, answer: &Answer) -> Option<State> {
    let received_fin = matches!(told.state, CLOSING | LAST_ACK);
    let word =
        |at: usize| told.info.get(at..at + 4).and_then(|four| four.first_chunk()).map(|four| u32::from_ne_bytes(*four));
    let (options, scales) = (told.info.get(5).copied().unwrap_or(0), told.info.get(6).copied().unwrap_or(0));
    // struct tcp_info: tcpi_snd_mss, tcpi_unacked.
    let (mss, in_flight) = (word(16), word(24));
    if told.state != FIN_WAIT2 && (told.unacknowledged != 1 || in_flight == Some(0)) {
        return None;
    }
    let receive_sequence = answer.receive_next.wrapping_sub(u32::from(received_fin));
    let window_scale = (options & 4 != 0).then_some((scales & 15, scales >> 4));
    let shift = window_scale.map_or(0, |(_, receive)| u32::from(receive).min(14));
    let connection = Connection {
        local: told.local,
        peer: told.peer,
        // Of our FIN.
        send_sequence: answer.send_next.wrapping_sub(1),
        receive_sequence,
        unread: ByteBuf::new(),
        unacknowledged: ByteBuf::new(),
        sent: 0,
        received_fin,
        sent_fin: true,
        sent_fin_first: told.state == CLOSING,
        read_shut: false,
        // Nothing but the FIN goes out.
        window: Window {
            snd_wl1: receive_sequence,
            snd_wnd: 0xffff,
            max_window: 0xffff,
            rcv_wnd: (u32::from(answer.window) << shift).max(1),
            rcv_wup: receive_sequence,
        },
        mss: mss.unwrap_or(536),
        sack: options & 2 != 0,
        window_scale,
        // Not before what the peer has seen; bit 0 is the unit's (see `Connection::timestamp`).
        timestamp: answer.timestamp.map(|value| value.wrapping_add(1) & !1),
    };
    let family = if told.local.ip.is_ipv6() { Family::V6 } else { Family::V4 };
    // Of no use to anybody but the kernel, which takes its least.
    let options = Options { send_buffer: 1, receive_buffer: 1, ..Options::default() };
    let phase = Phase::Connected(Box::new(connection));
    Some(State { family, options, phase, signatures: Vec::new(), unaccepted: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const V4: &str = "0202020202020101010101010800\
        450000341234400040060000\
        0a4d0064\
        0a4d000d\
        1b5ad7680000007b000001c8\
        801000ff00000000\
        0101080a0000030900000141";

    fn bytes(hex: &str) -> Vec<u8> {
        hex.as_bytes().chunks(2).map(|two| u8::from_str_radix(std::str::from_utf8(two).unwrap(), 16).unwrap()).collect()
    }

    fn told(state: u8, unacknowledged: u32, in_flight: Option<u32>) -> Told {
        let end = |ip: &str, port| Endpoint { ip: ip.parse().unwrap(), port, scope: 0 };
        let info = in_flight.map_or(Vec::new(), |n| {
            let mut info = vec![0; 104];
            (info[5], info[6]) = (7, 0x7a);
            info[16..20].copy_from_slice(&1448u32.to_ne_bytes());
            info[24..28].copy_from_slice(&n.to_ne_bytes());
            info
        });
        let (local, peer) = (end("10.77.0.100", 7002), end("::ffff:10.77.0.13", 55144));
        Told { local, peer, state, unacknowledged, info }
    }

    #[test]
    fn an_answer_is_told_from_what_else_passes() {
        let (found, answer) = Answer::parse(&bytes(V4)).unwrap();
        assert_eq!(found, key(&told(FIN_WAIT2, 0, None).local, &told(FIN_WAIT2, 0, None).peer));
        let expected = Answer { send_next: 123, receive_next: 456, window: 255, timestamp: Some(0x309) };
        assert_eq!(answer, expected);
        for flags in ["11", "14", "12", "02"] {
            assert_eq!(Answer::parse(&bytes(&V4.replace("801000ff", &format!("80{flags}00ff")))), None, "{flags}");
        }
    }

    #[test]
    fn what_came_meanwhile() {
        let (then, now) = (told(FIN_WAIT1, 1, Some(1)), told(FIN_WAIT2, 0, None));
        assert!(is_still(&then, &then) && is_still(&then, &now) && !is_still(&now, &then));
        assert!(!is_still(&told(LAST_ACK, 1, Some(1)), &told(CLOSING, 1, Some(1))));
        let mut other = then.clone();
        other.peer.port += 1;
        assert!(!is_still(&then, &other));
    }

    #[test]
    fn what_can_be_saved() {
        let answer = Answer { send_next: 123, receive_next: 456, window: 255, timestamp: Some(0x309) };
        let connection = |told: Told| match state(&told, &answer)?.phase {
            Phase::Connected(connection) => Some(*connection),
            other => panic!("{other:?}"),
        };
        let ended = connection(told(FIN_WAIT2, 0, None)).unwrap();
        assert_eq!((ended.send_sequence, ended.receive_sequence, ended.timestamp), (122, 456, Some(0x30a)));
        assert!(ended.sent_fin && !ended.received_fin);
        let last = connection(told(LAST_ACK, 1, Some(1))).unwrap();
        assert_eq!((last.send_sequence, last.receive_sequence, last.window_scale), (122, 455, Some((10, 7))));
        assert!(last.sent_fin && last.received_fin && !last.sent_fin_first);
        assert!(connection(told(CLOSING, 1, Some(1))).unwrap().sent_fin_first);
        // Data, or a FIN that has not been sent.
        assert_eq!(connection(told(FIN_WAIT1, 2, Some(1))), None);
        assert_eq!(connection(told(FIN_WAIT1, 1, Some(0))), None);
    }

    proptest! {
        #[test]
        fn whatever_passes_is_read(mut bytes in proptest::collection::vec(any::<u8>(), 0..100), v6: bool) {
            if let Some(kind) = bytes.get_mut(12..15) {
                kind.copy_from_slice(if v6 { &[0x86, 0xdd, 0x60] } else { &[8, 0, 0x45] });
            }
            Answer::parse(&bytes);
        }
    }
}
