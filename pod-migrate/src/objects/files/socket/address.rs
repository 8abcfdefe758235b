//! Internet socket addresses as plain data.

use libc::{AF_INET, AF_INET6, c_int};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// AF_INET or AF_INET6.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub fn of(domain: c_int) -> Option<Family> {
        match domain {
            AF_INET => Some(Family::V4),
            AF_INET6 => Some(Family::V6),
            _ => None,
        }
    }

    pub fn number(self) -> c_int {
        match self {
            Family::V4 => AF_INET,
            Family::V6 => AF_INET6,
        }
    }
}

/// Address, port and, for link-local IPv6, the device. A mapped address (`::ffff:10.0.0.1`) stays as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    pub ip: IpAddr,
    pub port: u16,
    #[serde(default)]
    pub scope: u32,
}

impl Endpoint {
    /// From a kernel's sockaddr.
    pub fn parse(bytes: &[u8]) -> Option<Endpoint> {
        let family = c_int::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let port = u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?);
        match family {
            AF_INET => {
                let ip: [u8; 4] = bytes.get(4..8)?.try_into().ok()?;
                Some(Endpoint { ip: IpAddr::V4(Ipv4Addr::from(ip)), port, scope: 0 })
            }
            AF_INET6 => {
                let ip: [u8; 16] = bytes.get(8..24)?.try_into().ok()?;
                let scope = u32::from_ne_bytes(bytes.get(24..28)?.try_into().ok()?);
                Some(Endpoint { ip: IpAddr::V6(Ipv6Addr::from(ip)), port, scope })
            }
            _ => None,
        }
    }

    /// As the kernel's sockaddr.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(28);
        match self.ip {
            IpAddr::V4(ip) => {
                bytes.extend_from_slice(&(AF_INET as u16).to_ne_bytes());
                bytes.extend_from_slice(&self.port.to_be_bytes());
                bytes.extend_from_slice(&ip.octets());
                bytes.extend_from_slice(&[0; 8]);
            }
            IpAddr::V6(ip) => {
                bytes.extend_from_slice(&(AF_INET6 as u16).to_ne_bytes());
                bytes.extend_from_slice(&self.port.to_be_bytes());
                bytes.extend_from_slice(&[0; 4]);
                bytes.extend_from_slice(&ip.octets());
                bytes.extend_from_slice(&self.scope.to_ne_bytes());
            }
        }
        bytes
    }

    pub fn is_unbound(&self) -> bool {
        self.port == 0 && self.ip.is_unspecified()
    }

    /// What goes over the wire: IPv4 for a mapped address.
    pub fn wire_ip(&self) -> IpAddr {
        self.ip.to_canonical()
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ip {
            IpAddr::V4(ip) => write!(f, "{ip}:{}", self.port),
            IpAddr::V6(ip) => write!(f, "[{ip}]:{}", self.port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        for text in ["10.0.0.1", "fe80::1", "::ffff:10.0.0.1"] {
            let endpoint =
                Endpoint { ip: text.parse().unwrap(), port: 8080, scope: if text == "fe80::1" { 2 } else { 0 } };
            assert_eq!(Endpoint::parse(&endpoint.bytes()), Some(endpoint));
        }
        assert_eq!(Endpoint::parse(&[1, 0, 0]), None);
        assert_eq!(
            Endpoint { ip: "::ffff:10.0.0.1".parse().unwrap(), port: 1, scope: 0 }.wire_ip().to_string(),
            "10.0.0.1"
        );
    }
}
