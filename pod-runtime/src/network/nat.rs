//! The way outward of managed networks, and published ports: the nftables table `inet pod`.
//!
//! The chains are the same whatever runs; what changes are the elements of its sets and maps: one element a network,
//! one a published port. So opening and closing are single transactions that touch nobody else, and nothing of a pod
//! stays behind that its lease does not name. The program `nft` does it (4–10 ms); whether the table is there is asked
//! of the kernel directly, so that a pod without published ports never waits for it.

use super::leases;
use super::named::Definition;
use crate::spec::{Address, Port, Spec};
use crate::{Doing, Problem, Result};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
};
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Stdio};

/// Everything that does not depend on networks and pods. Chains are emptied first, so that it can be said again.
const BASE: &str = "
add table inet pod
add set inet pod nets4 { type ipv4_addr; flags interval; }
add set inet pod nets6 { type ipv6_addr; flags interval; }
add set inet pod bridges { type ifname; }
add map inet pod any4 { type inet_proto . inet_service : ipv4_addr . inet_service; }
add map inet pod any6 { type inet_proto . inet_service : ipv6_addr . inet_service; }
add map inet pod at4 { type inet_proto . ipv4_addr . inet_service : ipv4_addr . inet_service; }
add map inet pod at6 { type inet_proto . ipv6_addr . inet_service : ipv6_addr . inet_service; }
add chain inet pod publish
add chain inet pod prerouting { type nat hook prerouting priority dstnat; policy accept; }
add chain inet pod output { type nat hook output priority -100; policy accept; }
add chain inet pod postrouting { type nat hook postrouting priority srcnat; policy accept; }
add chain inet pod guard { type filter hook prerouting priority raw; policy accept; }
flush chain inet pod publish
flush chain inet pod prerouting
flush chain inet pod output
flush chain inet pod postrouting
flush chain inet pod guard
add rule inet pod publish dnat ip to meta l4proto . ip daddr . th dport map @at4
add rule inet pod publish dnat ip6 to meta l4proto . ip6 daddr . th dport map @at6
add rule inet pod publish dnat ip to meta l4proto . th dport map @any4
add rule inet pod publish dnat ip6 to meta l4proto . th dport map @any6
add rule inet pod prerouting fib daddr type local meta l4proto { tcp, udp } jump publish
add rule inet pod output fib daddr type local meta l4proto { tcp, udp } jump publish
add rule inet pod postrouting ip saddr @nets4 ip daddr != @nets4 masquerade
add rule inet pod postrouting ip6 saddr @nets6 ip6 daddr != @nets6 masquerade
add rule inet pod postrouting ct status dnat ip saddr @nets4 masquerade
add rule inet pod postrouting ct status dnat ip6 saddr @nets6 masquerade
add rule inet pod postrouting ct status dnat ip saddr 127.0.0.0/8 oifname @bridges masquerade
add rule inet pod guard iifname @bridges ip daddr 127.0.0.0/8 drop
";

/// Whether the table is there, asked by one netlink message.
pub fn present() -> bool {
    ask_table().unwrap_or(false)
}

fn ask_table() -> Result<bool> {
    let netfilter =
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)
            .doing(|| "open a netfilter socket".into())?;
    bind(netfilter.as_raw_fd(), &NetlinkAddr::new(0, 0)).doing(|| "bind a netfilter socket".into())?;
    // struct nlmsghdr, struct nfgenmsg, one attribute NFTA_TABLE_NAME.
    let mut message = Vec::with_capacity(28);
    message.extend_from_slice(&28u32.to_ne_bytes());
    message
        .extend_from_slice(&(((libc::NFNL_SUBSYS_NFTABLES as u16) << 8) | libc::NFT_MSG_GETTABLE as u16).to_ne_bytes());
    message.extend_from_slice(&(libc::NLM_F_REQUEST as u16).to_ne_bytes());
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(&[libc::NFPROTO_INET as u8, 0, 0, 0]);
    message.extend_from_slice(&8u16.to_ne_bytes());
    message.extend_from_slice(&1u16.to_ne_bytes());
    message.extend_from_slice(b"pod\0");
    send(netfilter.as_raw_fd(), &message, MsgFlags::empty()).doing(|| "ask netfilter for a table".into())?;
    let mut answer = [0; 4096];
    let length = recv(netfilter.as_raw_fd(), &mut answer, MsgFlags::empty()).doing(|| "hear from netfilter".into())?;
    let kind = answer.get(4..6).filter(|_| length >= 16).map(|bytes| u16::from_ne_bytes([bytes[0], bytes[1]]));
    Ok(kind.is_some_and(|kind| kind != libc::NLMSG_ERROR as u16))
}

/// Makes the table and lets a network's subnets outward. Without `nft` the pods stay without a way outward, and the
/// log says so: everything on the bridge and this host still works.
pub fn open(definition: &Definition) -> Result<()> {
    let mut script = String::from(BASE);
    network_elements(&mut script, "add", definition);
    match run_nft(&script) {
        Err(problem) if problem.code() == "E-NFT-MISSING" => {
            tracing::warn!(
                "W-NO-NAT: 'nft' is not installed: pods of '{}' reach no further than this host",
                definition.name
            );
            Ok(())
        }
        other => other,
    }
}

/// Takes a network's subnets out again.
pub fn close(definition: &Definition) -> Result<()> {
    if !present() {
        return Ok(());
    }
    let mut script = String::from(BASE);
    // Deleting what is not there fails: add it first, in the same transaction.
    network_elements(&mut script, "add", definition);
    network_elements(&mut script, "delete", definition);
    run_nft(&script)
}

fn network_elements(script: &mut String, verb: &str, definition: &Definition) {
    for subnet in &definition.subnets {
        let family = if subnet.base.is_ipv4() { 4 } else { 6 };
        let _ = writeln!(script, "{verb} element inet pod nets{family} {{ {subnet} }}");
    }
    let _ = writeln!(script, "{verb} element inet pod bridges {{ \"{}\" }}", definition.bridge);
}

/// Publishes the ports of a spec whose lease is taken.
pub fn publish(dir: &Path, spec: &Spec) -> Result<()> {
    let network = &spec.network;
    if network.ports.is_empty() {
        return Ok(());
    }
    let lease = leases::of(dir, &spec.id)?;
    if let Some(bridge) = lease.and_then(|lease| lease.bridge) {
        // A client on this very host that connects to 127.0.0.1 leaves over the bridge with that source; the chain
        // `guard` keeps pods from using the same door.
        let _ = std::fs::write(format!("/proc/sys/net/ipv4/conf/{bridge}/route_localnet"), "1");
    }
    let mut script = if present() { String::new() } else { String::from(BASE) };
    // The same element again is no error; another pod's was refused by the lease.
    port_elements(&mut script, "add", &network.ports, &network.addresses);
    run_nft(&script)
}

/// Closes the ports of a pod; knows them from its lease.
pub fn unpublish(dir: &Path, pod_id: &str) -> Result<()> {
    let Some(lease) = leases::of(dir, pod_id)?.filter(|lease| !lease.ports.is_empty()) else { return Ok(()) };
    if !present() {
        return Ok(());
    }
    let mut script = String::new();
    port_elements(&mut script, "add", &lease.ports, &lease.addresses);
    port_elements(&mut script, "delete", &lease.ports, &lease.addresses);
    run_nft(&script)
}

fn port_elements(script: &mut String, verb: &str, ports: &[Port], addresses: &[Address]) {
    let v4 = addresses.iter().find_map(|address| match address.ip {
        IpAddr::V4(ip) => Some(ip),
        IpAddr::V6(_) => None,
    });
    let v6 = addresses.iter().find_map(|address| match address.ip {
        IpAddr::V6(ip) => Some(ip),
        IpAddr::V4(_) => None,
    });
    for port in ports {
        let protocol = if port.udp { "udp" } else { "tcp" };
        let mut element = |map: &str, key: String, to: IpAddr| {
            let value = if verb == "add" { format!(" : {to} . {}", port.pod) } else { String::new() };
            let _ = writeln!(script, "{verb} element inet pod {map} {{ {key}{value} }}");
        };
        let any = |at: Option<IpAddr>| match at {
            None => true,
            Some(IpAddr::V4(ip)) => ip == Ipv4Addr::UNSPECIFIED,
            Some(IpAddr::V6(ip)) => ip == Ipv6Addr::UNSPECIFIED,
        };
        match port.host_ip {
            Some(IpAddr::V4(at)) if !any(port.host_ip) => {
                if let Some(to) = v4 {
                    element("at4", format!("{protocol} . {at} . {}", port.host), IpAddr::V4(to));
                }
            }
            Some(IpAddr::V6(at)) if !any(port.host_ip) => {
                if let Some(to) = v6 {
                    element("at6", format!("{protocol} . {at} . {}", port.host), IpAddr::V6(to));
                }
            }
            _ => {
                if let Some(to) = v4 {
                    element("any4", format!("{protocol} . {}", port.host), IpAddr::V4(to));
                }
                if let Some(to) = v6.filter(|_| !matches!(port.host_ip, Some(IpAddr::V4(_)))) {
                    element("any6", format!("{protocol} . {}", port.host), IpAddr::V6(to));
                }
            }
        }
    }
}

fn run_nft(script: &str) -> Result<()> {
    let child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = child.map_err(|error| {
        Problem::new("E-NFT-MISSING", "cannot run 'nft', which publishes ports and lets pods outward")
            .because(error)
            .fix("apt install nftables")
    })?;
    // A write can fail only because nft ended early; then its own words say more.
    let _ = child.stdin.take().map(|mut stdin| stdin.write_all(script.as_bytes()));
    let output = child.wait_with_output().doing(|| "wait for nft".into())?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(Problem::new(
        "E-NFT",
        format!("nft refused the pod's rules: {}", text.lines().next().unwrap_or("no reason given")),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_become_elements() {
        let port = |host_ip: Option<&str>, udp| Port {
            host_ip: host_ip.map(|ip| ip.parse().unwrap()),
            host: 80,
            pod: 8080,
            udp,
        };
        let addresses = [
            Address { ip: "10.177.0.9".parse().unwrap(), prefix: 16 },
            Address { ip: "fd70::9".parse().unwrap(), prefix: 64 },
        ];
        let mut script = String::new();
        port_elements(&mut script, "add", &[port(None, false), port(Some("10.0.0.1"), true)], &addresses);
        port_elements(&mut script, "delete", &[port(Some("0.0.0.0"), false)], &addresses);
        assert_eq!(
            script,
            "add element inet pod any4 { tcp . 80 : 10.177.0.9 . 8080 }\n\
             add element inet pod any6 { tcp . 80 : fd70::9 . 8080 }\n\
             add element inet pod at4 { udp . 10.0.0.1 . 80 : 10.177.0.9 . 8080 }\n\
             delete element inet pod any4 { tcp . 80 }\n"
        );
    }
}
