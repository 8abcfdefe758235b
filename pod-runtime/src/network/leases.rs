//! Who has which address, MAC and published port on this host.
//!
//! One JSON file, read and written whole under one lock, keyed by pod id. A lease is taken before the pod is born and
//! given back when it is removed or has moved; a second claim by the same pod finds its own lease, so that an attempt
//! that was killed can be repeated. What a claim settles is written into the pod's spec and travels with it.

use super::announce::{Mac, format_mac, parse_mac, somebody_has};
use super::named::{self, Definition, Subnet};
use crate::spec::{Address, NetworkMode, Port, Spec};
use crate::sys::netdev;
use crate::{Doing, Problem, Result};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

/// How long a LAN is given to say that an address is in use.
const PROBE: Duration = Duration::from_millis(25);

/// Why an address is claimed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// A new pod: the LAN is asked whether somebody has the address.
    New,
    /// A pod that arrives from another host or from a checkpoint: its addresses come with it, and on the LAN it
    /// answers for them itself until it is here, so that who else does is asked for.
    Arriving,
}

/// What a pod holds of this host's networks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The pod's name, for messages.
    pub name: String,
    /// The named network, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// The bridge that the pod is plugged into; none for `none` and `host`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bridge: Option<String>,
    #[serde(default)]
    pub addresses: Vec<Address>,
    #[serde(default)]
    pub mac: Option<String>,
    #[serde(default)]
    pub ports: Vec<Port>,
}

#[derive(Default, Serialize, Deserialize)]
struct Book {
    leases: BTreeMap<String, Lease>,
}

/// Held while the file is read and written; freed by the kernel when its owner dies.
pub(super) fn lock(dir: &Path) -> Result<Flock<File>> {
    std::fs::create_dir_all(dir).doing(|| format!("make {}", dir.display()))?;
    let path = dir.join("lock");
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let file = file.doing(|| format!("open {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno).doing(|| format!("lock {}", path.display()))
}

/// Replaces a file in one step, so that a reader never sees a half of it. `by` is what the other one is called until then.
pub(super) fn write_whole(dir: &Path, path: &Path, by: &str, bytes: &[u8]) -> Result<()> {
    let write = || {
        std::fs::create_dir_all(dir)?;
        let temporary = path.with_extension(by);
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&temporary)?;
        file.write_all(bytes)?;
        std::fs::rename(&temporary, path)
    };
    write().doing(|| format!("write {}", path.display()))
}

fn read(dir: &Path) -> Result<Book> {
    let path = dir.join("leases.json");
    match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).doing(|| format!("understand {}", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Book::default()),
        Err(error) => Err(error).doing(|| format!("read {}", path.display())),
    }
}

fn write(dir: &Path, book: &Book) -> Result<()> {
    let bytes = serde_json::to_vec_pretty(book).doing(|| "write leases as JSON".into())?;
    // Under the lock: what a writer left that was killed is taken by the next.
    write_whole(dir, &dir.join("leases.json"), "new", &bytes)
}

/// Every lease of this host by pod id.
pub fn all(dir: &Path) -> Result<BTreeMap<String, Lease>> {
    Ok(read(dir)?.leases)
}

/// The lease of one pod.
pub fn of(dir: &Path, pod_id: &str) -> Result<Option<Lease>> {
    Ok(read(dir)?.leases.remove(pod_id))
}

/// Gives a pod's lease back. No lease is no error.
pub fn forget(dir: &Path, pod_id: &str) -> Result<()> {
    if !dir.join("leases.json").exists() {
        return Ok(());
    }
    let _lock = lock(dir)?;
    let mut book = read(dir)?;
    if book.leases.remove(pod_id).is_some() {
        write(dir, &book)?;
    }
    Ok(())
}

/// Gives back the leases of all pods that `exists` does not know: what a crash may have left.
pub fn prune(dir: &Path, exists: impl Fn(&str) -> bool) -> Result<Vec<String>> {
    let gone: Vec<String> = all(dir)?.into_keys().filter(|id| !exists(id)).collect();
    for id in &gone {
        super::release(dir, id)?;
    }
    Ok(gone)
}

/// Settles the pod's addresses, gateways, MAC and published ports, writes them into `spec` and into the leases.
///
/// # Errors
/// E-ADDRESS-TAKEN, E-ADDRESS-OUTSIDE, E-ADDRESS-NEEDED, E-NETWORK-UNKNOWN, E-BRIDGE-MISSING, E-PORT-TAKEN,
/// E-PUBLISH-NETWORK: refused before anything of the pod exists.
pub fn lease(dir: &Path, spec: &mut Spec, claim: Claim) -> Result<Lease> {
    let network = &spec.network;
    if !network.ports.is_empty() && !matches!(network.mode, NetworkMode::Named(_)) {
        return Err(Problem::new("E-PUBLISH-NETWORK", "ports can be published from a named network only")
            .fix("leave -p away: on a bridge of the LAN the pod is reached at its own address"));
    }
    if matches!(network.mode, NetworkMode::None | NetworkMode::Host) {
        if !network.addresses.is_empty() {
            return Err(Problem::new(
                "E-ADDRESS-OUTSIDE",
                "this pod has no network of its own that an address could be on",
            )
            .fix("leave --ip away, or use --network bridge:IFACE"));
        }
        let name = spec.name.clone();
        return Ok(Lease { name, network: None, bridge: None, addresses: vec![], mac: None, ports: vec![] });
    }
    let bridge = named::bridge_of(dir, &network.mode)?;
    let mac = match network.mac.as_deref() {
        None => mac_of(&spec.id),
        Some(text) => parse_mac(text).ok_or_else(|| {
            Problem::new("E-ADDRESS-OUTSIDE", format!("'{text}' is no MAC address"))
                .fix("six bytes like 02:00:00:00:00:01")
        })?,
    };
    let _lock = lock(dir)?;
    let mut book = read(dir)?;
    book.leases.remove(&spec.id);
    let mut settled = spec.network.clone();
    settled.mac = Some(format_mac(&mac));
    let mut lan = true;
    match &spec.network.mode {
        NetworkMode::Named(name) => {
            let definition = named::load(dir, name)?;
            lan = !definition.managed;
            settle_named(&definition, &spec.id, &book, &mut settled)?;
        }
        _ => settle_bridge(bridge.as_deref().unwrap_or_default(), &mut settled)?,
    }
    for address in &settled.addresses {
        let Some(owner) = book.leases.values().find(|lease| lease.addresses.iter().any(|a| a.ip == address.ip)) else {
            continue;
        };
        return Err(taken(address.ip, &format!("the pod '{}' of this host", owner.name)));
    }
    settle_ports(&mut settled.ports, &book)?;
    if let (true, Some(bridge)) = (lan, &bridge) {
        let own = (claim == Claim::Arriving).then_some(&mac);
        probe(bridge, &settled.addresses, own)?;
    }
    let network = match &settled.mode {
        NetworkMode::Named(name) => Some(name.clone()),
        _ => None,
    };
    let lease = Lease {
        name: spec.name.clone(),
        network,
        bridge,
        addresses: settled.addresses.clone(),
        mac: settled.mac.clone(),
        ports: settled.ports.clone(),
    };
    book.leases.insert(spec.id.clone(), lease.clone());
    write(dir, &book)?;
    spec.network = settled;
    Ok(lease)
}

fn taken(ip: IpAddr, owner: &str) -> Problem {
    Problem::new("E-ADDRESS-TAKEN", format!("the address {ip} is in use by {owner}")).fix("choose another --ip")
}

/// The pod's id is random and its own for life: so is the MAC made of it.
fn mac_of(id: &str) -> Mac {
    let mut mac = [0x02, 0, 0, 0, 0, 0];
    for (byte, at) in mac[1..].iter_mut().zip((2..).step_by(2)) {
        *byte = id.get(at..at + 2).and_then(|hex| u8::from_str_radix(hex, 16).ok()).unwrap_or(0);
    }
    mac
}

fn settle_named(definition: &Definition, id: &str, book: &Book, network: &mut crate::spec::Network) -> Result<()> {
    for address in &mut network.addresses {
        let Some(subnet) = definition.subnets.iter().find(|subnet| subnet.contains(address.ip)) else {
            let known: Vec<String> = definition.subnets.iter().map(Subnet::to_string).collect();
            return Err(Problem::new(
                "E-ADDRESS-OUTSIDE",
                format!(
                    "{} is not in the network '{}' of this host ({})",
                    address.ip,
                    definition.name,
                    known.join(", ")
                ),
            )
            .fix(format!("define '{}' with the same subnet on every host: pod network create", definition.name)));
        };
        address.prefix = subnet.prefix;
        if definition.gateways.contains(&address.ip) {
            return Err(taken(address.ip, "the gateway of its network"));
        }
    }
    let seed = u64::from_str_radix(id.get(..12).unwrap_or("0"), 16).unwrap_or(0);
    for subnet in &definition.subnets {
        if network.addresses.iter().any(|address| address.ip.is_ipv4() == subnet.base.is_ipv4()) {
            continue;
        }
        let ip = match subnet.base {
            IpAddr::V4(base) => IpAddr::V4(free_v4(definition, base, subnet.prefix, seed, book)?),
            IpAddr::V6(base) => IpAddr::V6(Ipv6Addr::from(u128::from(base) | u128::from(seed.max(2)))),
        };
        network.addresses.push(Address { ip, prefix: subnet.prefix });
    }
    // The way out over IPv6 only where the host passes it on: else a program would wait for answers that never come.
    network.gateways =
        definition.gateways.iter().copied().filter(|gateway| gateway.is_ipv4() || named::forwards_ipv6()).collect();
    if network.mtu.is_none() {
        network.mtu = definition.mtu;
    }
    Ok(())
}

/// An address that nobody has. The search begins at a place that depends on the pod, so that pods of two hosts with
/// the same range seldom get the same one and can visit each other.
fn free_v4(definition: &Definition, base: Ipv4Addr, prefix: u8, seed: u64, book: &Book) -> Result<Ipv4Addr> {
    let size = 1u64 << (32 - u32::from(prefix).min(32));
    let network = u32::from(base) & u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
    let (first, last) = match definition.range {
        Some((first, last)) => (u32::from(first), u32::from(last)),
        None => (network + 2.min(size as u32 - 1), network + (size.saturating_sub(2)) as u32),
    };
    let count = u64::from(last.saturating_sub(first)) + 1;
    for step in 0..count {
        let ip = Ipv4Addr::from(first + ((seed + step) % count) as u32);
        let used = book.leases.values().any(|lease| lease.addresses.iter().any(|a| a.ip == IpAddr::V4(ip)));
        if !used && !definition.gateways.contains(&IpAddr::V4(ip)) {
            return Ok(ip);
        }
    }
    Err(Problem::new("E-ADDRESS-TAKEN", format!("every address of the network '{}' is leased", definition.name))
        .fix("remove pods that are not needed, or widen its range"))
}

fn settle_bridge(bridge: &str, network: &mut crate::spec::Network) -> Result<()> {
    if network.addresses.is_empty() {
        return Err(Problem::new(
            "E-ADDRESS-NEEDED",
            format!("a pod on the bridge {bridge} needs an address of its LAN"),
        )
        .fix("--ip A.B.C.D/N"));
    }
    let control = netdev::control_socket().doing(|| "open a socket".into())?;
    let device = netdev::index(control.as_fd(), bridge).doing(|| format!("find the bridge {bridge}"))?;
    let routes = named::routes()?;
    for address in &mut network.addresses {
        let single = if address.ip.is_ipv4() { 32 } else { 128 };
        if address.prefix != single {
            continue;
        }
        // No prefix length given: the host's own route over the bridge tells it.
        let route = routes.iter().filter(|(route, at)| {
            *at == Some(device) && route.prefix < single && route.prefix > 8 && route.contains(address.ip)
        });
        address.prefix = route.map(|(route, _)| route.prefix).max().ok_or_else(|| {
            Problem::new("E-ADDRESS-NEEDED", format!("how long is the prefix of {}'s LAN?", address.ip))
                .fix(format!("--ip {}/24, or as long as it is there", address.ip))
        })?;
    }
    Ok(())
}

fn settle_ports(ports: &mut [Port], book: &Book) -> Result<()> {
    for at in 0..ports.len() {
        let (before, rest) = ports.split_at_mut(at);
        let port = &mut rest[0];
        if port.host == 0 {
            port.host = bind_here(port)?;
        }
        let clashes = |other: &Port| {
            let same_ip = other.host_ip.is_none() || port.host_ip.is_none() || other.host_ip == port.host_ip;
            other.host == port.host && other.udp == port.udp && same_ip
        };
        let owner = book.leases.values().find(|lease| lease.ports.iter().any(clashes));
        if let Some(owner) = owner {
            return Err(port_taken(port, &format!("the pod '{}' publishes it", owner.name)));
        }
        if before.iter().any(clashes) {
            return Err(port_taken(port, "it is given twice"));
        }
        bind_here(port)?;
    }
    Ok(())
}

fn port_taken(port: &Port, why: &str) -> Problem {
    let protocol = if port.udp { "udp" } else { "tcp" };
    Problem::new("E-PORT-TAKEN", format!("port {}/{protocol} of this host is taken: {why}", port.host))
        .fix("publish another port of the host: -p OTHER:PORT")
}

/// Binds the port for a moment, which shows whether a program of the host has it, and tells its number.
fn bind_here(port: &Port) -> Result<u16> {
    let at = SocketAddr::new(port.host_ip.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)), port.host);
    let bound = if port.udp {
        UdpSocket::bind(at).and_then(|socket| socket.local_addr())
    } else {
        TcpListener::bind(at).and_then(|socket| socket.local_addr())
    };
    bound.map(|address| address.port()).map_err(|error| port_taken(port, &error.to_string()))
}

/// Whether somebody else on the LAN has one of these addresses; `own` is the MAC by which the pod itself answers there.
fn probe(bridge: &str, addresses: &[Address], own: Option<&Mac>) -> Result<()> {
    let control = netdev::control_socket().doing(|| "open a socket".into())?;
    let device = netdev::index(control.as_fd(), bridge).doing(|| format!("find the bridge {bridge}"))?;
    // The question is the bridge's own: an answer to the pod's MAC, which no port has yet, would pass it by.
    let mac = netdev::hardware_address(control.as_fd(), bridge).doing(|| format!("read the MAC of {bridge}"))?;
    for address in addresses {
        if UdpSocket::bind((address.ip, 0)).is_ok() {
            return Err(taken(address.ip, "this host itself"));
        }
        if let Some(owner) = somebody_has(device, &mac, address.ip, own, PROBE)? {
            return Err(taken(address.ip, &format!("a station of the LAN ({})", format_mac(&owner))));
        }
    }
    Ok(())
}
