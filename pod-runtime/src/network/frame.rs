//! TCP in Ethernet frames, as far as it is looked at here.

use super::announce::Mac;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

pub const FIN: u8 = 0x01;
pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const ACK: u8 = 0x10;

/// A TCP segment in its frame, with its whole header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcpFrame<'a> {
    pub to: Mac,
    pub from: Mac,
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub sequence: u32,
    pub acknowledged: u32,
    pub flags: u8,
    /// As on the wire, before scaling.
    pub window: u16,
    pub options: &'a [u8],
    /// Bytes behind the header, also those that are not in what was read of the frame; the padding is none of them.
    pub data: usize,
}

impl TcpFrame<'_> {
    /// `None` for anything else, and for what is cut short in its headers. Extension headers of IPv6 are not walked: TCP has
    /// none in practice.
    pub fn parse(frame: &[u8]) -> Option<TcpFrame<'_>> {
        const ETHERNET: usize = 14;
        const TCP: u8 = 6;
        let packet = frame.get(ETHERNET..)?;
        let short = |bytes: &[u8], at: usize| Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
        let word = |bytes: &[u8], at: usize| Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
        let (header, end) = match (short(frame, 12)?, packet.first()? >> 4) {
            // A later fragment has no header of TCP's.
            (0x0800, 4) if packet.get(9) == Some(&TCP) && short(packet, 6)? & 0x1fff == 0 => {
                (usize::from(packet[0] & 15) * 4, usize::from(short(packet, 2)?))
            }
            (0x86dd, 6) if packet.get(6) == Some(&TCP) => (40, 40 + usize::from(short(packet, 4)?)),
            _ => return None,
        };
        let segment = packet.get(header..).filter(|_| header >= 20)?;
        let own = usize::from(segment.get(12)? >> 4) * 4;
        let end_at = |ip: usize, port: usize| -> Option<SocketAddr> {
            let port = short(segment, port)?;
            Some(match header {
                40 if packet[0] >> 4 == 6 => {
                    (Ipv6Addr::from(*packet.get(8 + ip * 16..)?.first_chunk::<16>()?), port).into()
                }
                _ => (Ipv4Addr::from(*packet.get(12 + ip * 4..)?.first_chunk::<4>()?), port).into(),
            })
        };
        Some(TcpFrame {
            to: *frame.first_chunk()?,
            from: *frame.get(6..)?.first_chunk()?,
            source: end_at(0, 0)?,
            destination: end_at(1, 2)?,
            sequence: word(segment, 4)?,
            acknowledged: word(segment, 8)?,
            flags: *segment.get(13)?,
            window: short(segment, 14)?,
            options: segment.get(20..own)?,
            data: end.saturating_sub(header + own),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn both_families_are_read() {
        let mut v4 = vec![1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0x08, 0x00];
        v4.extend_from_slice(&[0x45, 0, 0, 47, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        let tcp = [0, 80, 0x1f, 0x90, 0, 0, 0, 7, 0, 0, 0, 9, 6 << 4, ACK | FIN, 0, 5, 0, 0, 0, 0, 1, 1, 1, 0, 1, 2, 3];
        v4.extend_from_slice(&tcp);
        v4.resize(80, 0); // as an Ethernet pads it
        let expected = TcpFrame {
            to: [1; 6],
            from: [2; 6],
            source: "10.0.0.1:80".parse().unwrap(),
            destination: "10.0.0.2:8080".parse().unwrap(),
            sequence: 7,
            acknowledged: 9,
            flags: ACK | FIN,
            window: 5,
            options: &[1, 1, 1, 0],
            data: 3,
        };
        assert_eq!(TcpFrame::parse(&v4), Some(expected.clone()));
        let mut v6 = v4[..12].to_vec();
        v6.extend_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0, 0, 27, 6, 64]);
        v6.extend_from_slice(&"fd77::1".parse::<Ipv6Addr>().unwrap().octets());
        v6.extend_from_slice(&"fd77::2".parse::<Ipv6Addr>().unwrap().octets());
        v6.extend_from_slice(&tcp);
        let (source, destination) = ("[fd77::1]:80".parse().unwrap(), "[fd77::2]:8080".parse().unwrap());
        assert_eq!(TcpFrame::parse(&v6), Some(TcpFrame { source, destination, ..expected }));
        // A later fragment, another protocol, a header that is not all there.
        for (at, value) in [(14 + 7, 1), (14 + 9, 17), (13, 6)] {
            let mut other = v4.clone();
            other[at] = value;
            assert_eq!(TcpFrame::parse(&other), None, "{at}");
        }
        (0..14 + 20 + 24).for_each(|length| assert_eq!(TcpFrame::parse(&v4[..length]), None, "{length}"));
    }

    proptest! {
        #[test]
        fn whatever_comes_is_read(bytes in proptest::collection::vec(any::<u8>(), 0..120), v6: bool) {
            let mut frame = vec![0; 12];
            frame.extend_from_slice(if v6 { &[0x86, 0xdd, 0x60] } else { &[8, 0, 0x45] });
            frame.extend_from_slice(&bytes);
            TcpFrame::parse(&frame);
        }
    }
}
