//! Networks with a name: what `pod run --network NAME` means on this host.
//!
//! A definition is a small TOML file, `NAME.toml`, in `/etc/pod/networks` (the administrator's, never written here) or
//! in the `network` folder of the data root (made by `pod network create`). The network "pod" needs no file: it is
//! made when first used, with a private range that collides with no route of the host, and written down. Every host
//! picks the same range if it can, so that a pod finds its addresses valid wherever it goes.
//!
//! ```toml
//! bridge = "br0"              # a link of the host
//! managed = false             # true: `pod` makes the bridge and gives it the gateway addresses
//! subnets = ["10.77.0.0/24"]
//! gateways = ["10.77.0.1"]
//! range = ["10.77.0.100", "10.77.0.200"]   # leases come from here; the whole subnet if absent
//! nat = false                 # masquerade what leaves the subnets
//! ```

use super::announce::format_mac;
use super::wire::{Request, Wire};
use super::{leases, nat};
use crate::spec::NetworkMode;
use crate::sys::netdev;
use crate::{Doing, Problem, Result};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use rtnetlink::{AddressMessageBuilder, LinkBridge, LinkUnspec};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The network of a pod that asks for none.
pub const DEFAULT: &str = "pod";
const ETC: &str = "/etc/pod/networks";
/// Tried in this order; the first that overlaps no route of the host is taken.
const CANDIDATES: [[u8; 4]; 6] =
    [[10, 177, 0, 0], [10, 178, 0, 0], [10, 201, 0, 0], [10, 249, 0, 0], [172, 29, 0, 0], [192, 168, 0, 0]];
/// "pod" in a unique local prefix. The same on every host, because pods travel with their addresses.
const ULA: Ipv6Addr = Ipv6Addr::new(0xfd70, 0x6f64, 0xb1d0, 0, 0, 0, 0, 0);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Definition {
    #[serde(skip)]
    pub name: String,
    pub bridge: String,
    /// `pod` makes the bridge and gives it the gateway addresses.
    #[serde(default)]
    pub managed: bool,
    pub subnets: Vec<Subnet>,
    #[serde(default)]
    pub gateways: Vec<IpAddr>,
    /// First and last IPv4 address to lease.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<(Ipv4Addr, Ipv4Addr)>,
    #[serde(default)]
    pub nat: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
}

/// An address range, "10.77.0.0/24".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Subnet {
    pub base: IpAddr,
    pub prefix: u8,
}

impl Subnet {
    pub fn contains(&self, ip: IpAddr) -> bool {
        match (self.base, ip) {
            (IpAddr::V4(base), IpAddr::V4(ip)) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix)).unwrap_or(0);
                u32::from(base) & mask == u32::from(ip) & mask
            }
            (IpAddr::V6(base), IpAddr::V6(ip)) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix)).unwrap_or(0);
                u128::from(base) & mask == u128::from(ip) & mask
            }
            _ => false,
        }
    }

    pub fn overlaps(&self, other: &Subnet) -> bool {
        self.contains(other.base) || other.contains(self.base)
    }
}

impl FromStr for Subnet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (base, prefix) = text.split_once('/').ok_or_else(|| format!("'{text}' is no subnet like 10.77.0.0/24"))?;
        let base: IpAddr = base.parse().map_err(|_| format!("'{base}' is no address"))?;
        let prefix: u8 = prefix.parse().map_err(|_| format!("'{prefix}' is no prefix length"))?;
        if prefix > if base.is_ipv4() { 32 } else { 128 } {
            return Err(format!("'{text}' has too long a prefix"));
        }
        Ok(Subnet { base, prefix })
    }
}

impl TryFrom<String> for Subnet {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> Self {
        subnet.to_string()
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

fn file(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.toml"))
}

fn valid_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && name.len() <= 12
        && bytes.all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

fn unknown(name: &str) -> Problem {
    Problem::new("E-NETWORK-UNKNOWN", format!("there is no network '{name}' on this host"))
        .fix(format!("pod network create {name} --subnet A.B.C.D/N, or pod network ls for those that exist"))
}

fn read(path: &Path, name: &str) -> Result<Option<Definition>> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).doing(|| format!("read {}", path.display())),
    };
    let mut definition: Definition =
        toml::from_str(&text).code("E-NETWORK-FILE", || format!("{} describes no network", path.display()))?;
    definition.name = name.to_string();
    Ok(Some(definition))
}

/// The definition of a network. "pod" is invented and written down when it has none.
pub fn load(dir: &Path, name: &str) -> Result<Definition> {
    if !valid_name(name) {
        return Err(unknown(name));
    }
    for path in [file(Path::new(ETC), name), file(dir, name)] {
        if let Some(definition) = read(&path, name)? {
            return Ok(definition);
        }
    }
    if name != DEFAULT {
        return Err(unknown(name));
    }
    let definition = invent(dir, name, "pod0", None)?;
    save(dir, &definition)?;
    Ok(definition)
}

/// The file that a network of this host is defined in.
pub fn origin(dir: &Path, name: &str) -> PathBuf {
    let given = file(Path::new(ETC), name);
    if given.exists() { given } else { file(dir, name) }
}

/// All networks of this host, by name.
pub fn list(dir: &Path) -> Result<Vec<Definition>> {
    let mut found: Vec<Definition> = Vec::new();
    for folder in [Path::new(ETC), dir] {
        let Ok(entries) = std::fs::read_dir(folder) else { continue };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Some(name) = name.strip_suffix(".toml") else { continue };
            if valid_name(name) && !found.iter().any(|known| known.name == name) {
                found.extend(read(&entry.path(), name)?);
            }
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// A managed network with NAT: the subnet asked for, or the first candidate that neither a route of the host nor
/// another network overlaps.
pub fn invent(dir: &Path, name: &str, bridge: &str, subnet: Option<Subnet>) -> Result<Definition> {
    let mut routes = routes()?;
    for other in list(dir)? {
        routes.extend(other.subnets.into_iter().map(|subnet| (subnet, None)));
    }
    let v4 = match subnet {
        Some(subnet) => {
            if let Some(route) = routes.iter().find(|(route, _)| route.overlaps(&subnet)) {
                return Err(Problem::new(
                    "E-SUBNET-CLASH",
                    format!("{subnet} overlaps {}, which this host routes or another network has", route.0),
                )
                .fix("choose another --subnet"));
            }
            subnet
        }
        None => CANDIDATES
            .iter()
            .map(|base| Subnet { base: IpAddr::V4((*base).into()), prefix: 16 })
            .find(|candidate| !routes.iter().any(|(route, _)| route.overlaps(candidate)))
            .ok_or_else(|| {
                Problem::new("E-SUBNET-CLASH", "every private range that pod tries is routed by this host already")
                    .fix(format!("pod network create {name} --subnet A.B.C.D/N with a range that is free here"))
            })?,
    };
    let IpAddr::V4(base) = v4.base else {
        return Err(Problem::new("E-SUBNET-CLASH", "a network needs an IPv4 subnet").fix("--subnet A.B.C.D/N"));
    };
    // A network of its own number in the ULA, so that two networks of a host differ and two hosts agree.
    let mut segments = ULA.segments();
    segments[3] = u16::from_be_bytes([base.octets()[1], base.octets()[2]]);
    let v6 = Ipv6Addr::from(segments);
    Ok(Definition {
        name: name.to_string(),
        bridge: bridge.to_string(),
        managed: true,
        subnets: vec![v4, Subnet { base: IpAddr::V6(v6), prefix: 64 }],
        gateways: vec![IpAddr::V4(Ipv4Addr::from(u32::from(base) + 1)), IpAddr::V6(Ipv6Addr::from(u128::from(v6) + 1))],
        range: None,
        nat: true,
        mtu: None,
    })
}

/// Writes a definition into the data root; refuses a name that exists.
pub fn create(dir: &Path, definition: &Definition) -> Result<()> {
    let name = &definition.name;
    if !valid_name(name) || matches!(name.as_str(), "none" | "host") {
        return Err(Problem::new("E-NETWORK-NAME", format!("'{name}' cannot name a network"))
            .fix("at most 12 letters, digits, '-', '_' and '.', beginning with a letter or digit"));
    }
    if list(dir)?.iter().any(|known| known.name == *name) {
        return Err(Problem::new("E-NETWORK-EXISTS", format!("there is a network '{name}' already"))
            .fix(format!("pod network rm {name}, or choose another name")));
    }
    save(dir, definition)
}

fn save(dir: &Path, definition: &Definition) -> Result<()> {
    let text = toml::to_string(definition).doing(|| "write a network as TOML".into())?;
    let by = format!("new.{}", std::process::id());
    leases::write_whole(dir, &file(dir, &definition.name), &by, text.as_bytes())
}

/// Forgets a network and takes its managed bridge away. Refused while a pod has a lease of it.
pub fn remove(dir: &Path, name: &str) -> Result<()> {
    let path = file(dir, name);
    let Some(definition) = (if valid_name(name) { read(&path, name)? } else { None }) else {
        if file(Path::new(ETC), name).exists() {
            return Err(Problem::new("E-NETWORK-FILE", format!("'{name}' is defined by the host's administrator"))
                .fix(format!("remove {ETC}/{name}.toml")));
        }
        return Err(unknown(name));
    };
    let users: Vec<String> = leases::all(dir)?
        .into_values()
        .filter(|lease| lease.network.as_deref() == Some(name))
        .map(|lease| lease.name)
        .collect();
    if !users.is_empty() {
        return Err(Problem::new("E-NETWORK-BUSY", format!("network '{name}' is used by {}", users.join(", ")))
            .fix("remove these pods first"));
    }
    if definition.managed {
        super::cable::remove(&definition.bridge)?;
        nat::close(&definition)?;
    }
    std::fs::remove_file(&path).doing(|| format!("remove {}", path.display()))
}

/// The bridge that a pod of this mode is plugged into, made ready. `None` for `none` and `host`.
pub fn bridge_of(dir: &Path, mode: &NetworkMode) -> Result<Option<String>> {
    match mode {
        NetworkMode::None | NetworkMode::Host => Ok(None),
        NetworkMode::Bridge(bridge) => {
            exists(bridge)?;
            Ok(Some(bridge.clone()))
        }
        NetworkMode::Named(name) => {
            let definition = load(dir, name)?;
            ensure(dir, &definition)?;
            Ok(Some(definition.bridge))
        }
    }
}

fn exists(bridge: &str) -> Result<()> {
    let control = netdev::control_socket().doing(|| "open a socket".into())?;
    if netdev::index(control.as_fd(), bridge).is_ok() {
        return Ok(());
    }
    Err(Problem::new("E-BRIDGE-MISSING", format!("this host has no bridge '{bridge}'")).fix(format!(
        "ip link add {bridge} type bridge && ip link set {bridge} up, and put the LAN's interface into it"
    )))
}

/// Makes the bridge of a managed network, its gateway addresses, forwarding and NAT, or finds them there.
pub fn ensure(dir: &Path, definition: &Definition) -> Result<()> {
    if !definition.managed {
        return exists(&definition.bridge);
    }
    let control = netdev::control_socket().doing(|| "open a socket".into())?;
    let ready = netdev::index(control.as_fd(), &definition.bridge).is_ok();
    if ready && (!definition.nat || nat::present()) {
        return Ok(());
    }
    let _lock = leases::lock(dir)?;
    make_bridge(definition)?;
    if definition.nat {
        enable_forwarding()?;
        nat::open(definition)?;
    }
    Ok(())
}

fn make_bridge(definition: &Definition) -> Result<()> {
    let bridge = &definition.bridge;
    let mut wire = Wire::open()?;
    let add = LinkBridge::new(bridge).address(bridge_mac(bridge).to_vec()).build();
    wire.ask(
        Request::new(format!("make the bridge {bridge}"), RouteNetlinkMessage::NewLink(add))
            .flags(NLM_F_CREATE | NLM_F_EXCL)
            .tolerate(&[libc::EEXIST]),
    )?;
    let control = netdev::control_socket().doing(|| "open a socket".into())?;
    let index = netdev::index(control.as_fd(), bridge).doing(|| format!("find the bridge {bridge}"))?;
    let mut requests = Vec::new();
    for gateway in &definition.gateways {
        let Some(subnet) = definition.subnets.iter().find(|subnet| subnet.contains(*gateway)) else { continue };
        requests.push(add_address(index, *gateway, subnet.prefix, bridge));
    }
    let mut up = LinkUnspec::new_with_index(index).up();
    if let Some(mtu) = definition.mtu {
        up = up.mtu(mtu);
    }
    requests.push(Request::new(format!("bring {bridge} up"), RouteNetlinkMessage::SetLink(up.build())));
    wire.batch(requests)?;
    tracing::info!("made the bridge {bridge} for the network '{}'", definition.name);
    Ok(())
}

/// The request that gives a device an address. IPv6 without duplicate detection, which would keep it unusable for a
/// second.
pub(super) fn add_address(index: u32, ip: IpAddr, prefix: u8, device: &str) -> Request {
    let message = match ip {
        IpAddr::V4(ip) => AddressMessageBuilder::<Ipv4Addr>::new().index(index).address(ip, prefix).build(),
        IpAddr::V6(ip) => {
            let mut message = AddressMessageBuilder::<Ipv6Addr>::new().index(index).address(ip, prefix).build();
            message.header.flags = AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
            message
        }
    };
    Request::new(format!("give {device} the address {ip}/{prefix}"), RouteNetlinkMessage::NewAddress(message))
        .flags(NLM_F_CREATE | NLM_F_REPLACE)
        .tolerate(&[libc::EEXIST])
}

/// The same on every host, so that a pod that moves keeps its gateway in its neighbour cache.
fn bridge_mac(bridge: &str) -> [u8; 6] {
    let hash =
        bridge.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, b| (hash ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let [a, b, c, d, ..] = hash.to_be_bytes();
    let mac = [0x02, 0x70, a, b, c, d];
    tracing::debug!("{bridge} has the address {}", format_mac(&mac));
    mac
}

/// IPv4 only: switching IPv6 forwarding on would make the host deaf to router advertisements, which may be how it got
/// its own address. Where the host forwards IPv6 already, pods use it.
fn enable_forwarding() -> Result<()> {
    let path = "/proc/sys/net/ipv4/ip_forward";
    if std::fs::read_to_string(path).is_ok_and(|value| value.trim() == "1") {
        return Ok(());
    }
    match std::fs::write(path, "1") {
        Ok(()) => tracing::info!("enabled IPv4 forwarding (net.ipv4.ip_forward) for the pods' way outward"),
        Err(error) => {
            tracing::warn!("W-NO-FORWARDING: cannot set net.ipv4.ip_forward: {error}; pods reach this host only")
        }
    }
    Ok(())
}

/// Whether this host passes IPv6 on.
pub fn forwards_ipv6() -> bool {
    std::fs::read_to_string("/proc/sys/net/ipv6/conf/all/forwarding").is_ok_and(|value| value.trim() == "1")
}

/// Destinations that the host routes (all but the default ones), with the index of the device.
pub fn routes() -> Result<Vec<(Subnet, Option<u32>)>> {
    let mut found = Vec::new();
    for message in Wire::open()?.dump(RouteNetlinkMessage::GetRoute(RouteMessage::default()))? {
        let RouteNetlinkMessage::NewRoute(route) = message else { continue };
        let device = route.attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => Some(*index),
            _ => None,
        });
        let base = route.attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
            RouteAttribute::Destination(RouteAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
            _ => None,
        });
        if let Some(base) = base.filter(|_| route.header.destination_prefix_length > 0) {
            found.push((Subnet { base, prefix: route.header.destination_prefix_length }, device));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnets_contain_and_overlap() {
        let wide: Subnet = "10.177.0.0/16".parse().unwrap();
        let narrow: Subnet = "10.177.3.0/24".parse().unwrap();
        assert!(wide.contains("10.177.255.1".parse().unwrap()));
        assert!(!wide.contains("10.178.0.1".parse().unwrap()));
        assert!(!wide.contains("fd00::1".parse().unwrap()));
        assert!(wide.overlaps(&narrow) && narrow.overlaps(&wide));
        let all: Subnet = "0.0.0.0/0".parse().unwrap();
        assert!(all.contains("1.2.3.4".parse().unwrap()));
        let v6: Subnet = "fd77::/64".parse().unwrap();
        assert!(v6.contains("fd77::100".parse().unwrap()) && !v6.contains("fd78::1".parse().unwrap()));
        assert!("10.0.0.0".parse::<Subnet>().is_err() && "10.0.0.0/33".parse::<Subnet>().is_err());
    }

    #[test]
    fn a_definition_is_read_back() {
        let text = "bridge = \"br0\"\nsubnets = [\"10.77.0.0/24\"]\nrange = [\"10.77.0.100\", \"10.77.0.200\"]\n";
        let definition: Definition = toml::from_str(text).unwrap();
        assert!(!definition.managed && !definition.nat);
        assert_eq!(toml::from_str::<Definition>(&toml::to_string(&definition).unwrap()).unwrap(), definition);
        assert!(toml::from_str::<Definition>("bridge = \"b\"\nsubnets = []\nbrige = 1").is_err());
    }

    #[test]
    fn names_are_bounded() {
        for good in ["pod", "lan", "a-b_c.d", "0"] {
            assert!(valid_name(good), "{good}");
        }
        for bad in ["", "../etc", "-x", "a/b", "averyveryverylongname"] {
            assert!(!valid_name(bad), "{bad}");
        }
    }
}
