//! The cable of a pod: a veth pair, `eth0` inside, `pod<id>` outside in a bridge of the host.
//!
//! The outside end's name is made of the pod's id, so it is found again without any record. The inside end gets
//! everything before the pod's first process runs: MAC, MTU, addresses (IPv6 without duplicate detection), routes.
//! Nothing on it depends on the host, router advertisements are ignored, and so it is the same after a move.
//!
//! * *quiet*: the outside end is up but in no bridge, so that the inside has carrier and nobody hears it; [`Attachment::join`]
//!   plugs it in by one ioctl. (An end that is brought up late does not forward at once and loses the first segments.)
//! * *hold*: the outside end goes down (0.2 ms): nothing of the pod enters or leaves, no FIN, no RST; the pod's side
//!   loses only its carrier. [`Attachment::release`] undoes it, and what was done before it to its [`port`] in the bridge.

use super::announce::{self, Mac, link_local, mac_of};
use super::named;
use super::port;
use super::wire::{Request, Wire, inside};
use crate::spec::{Address, NetworkMode, Spec};
use crate::sys::netdev::{self, Receive};
use crate::{Doing, Problem, Result};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoVeth, LinkAttribute, LinkFlags, LinkMessage,
};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

/// The pod's end of it, in the pod.
pub const INSIDE: &str = "eth0";

/// The outside end of a pod's cable: 15 characters, the longest that a device may have.
pub fn link_name(pod_id: &str) -> String {
    format!("pod{}", &pod_id[..pod_id.len().min(12)])
}

/// The outside end of a pod's cable, if it has one.
pub fn link_of(spec: &Spec) -> Option<String> {
    let has_none = matches!(spec.network.mode, NetworkMode::None | NetworkMode::Host);
    (!has_none).then(|| link_name(&spec.id))
}

/// A pod's cable as it is plugged in.
#[derive(Debug)]
pub struct Attachment {
    /// The outside end; `None` for a pod without a network of its own.
    pub host_link: Option<String>,
    pub bridge: Option<String>,
    pub mac: Mac,
    pub addresses: Vec<Address>,
    /// For device ioctls in the host's namespace.
    control: OwnedFd,
    /// Sends frames from the pod's own `eth0`, of a pod that was attached quietly or opened. It keeps the pod's network namespace
    /// alive: drop the attachment when the pod runs.
    speaker: Option<OwnedFd>,
}

/// Plugs a new pod in: `init_pid` is its first process, whose network namespace is still empty. `quiet` leaves the
/// outside end up but in no bridge, see the module.
pub fn attach(dir: &Path, spec: &Spec, init_pid: i32, quiet: bool) -> Result<Attachment> {
    let control = netdev::control_socket().doing(|| "open a socket".into())?;
    let bridge = named::bridge_of(dir, &spec.network.mode)?;
    let mac = mac_of(spec).unwrap_or_default();
    let addresses = spec.network.addresses.clone();
    if matches!(spec.network.mode, NetworkMode::Host) {
        return Ok(Attachment { host_link: None, bridge: None, mac, addresses, control, speaker: None });
    }
    let Some(bridge) = bridge else {
        return Ok(Attachment { host_link: None, bridge: None, mac, addresses, control, speaker: None });
    };
    let netns = netns_of(init_pid)?;
    let link = link_name(&spec.id);
    let mtu = match spec.network.mtu {
        Some(mtu) => mtu,
        None => netdev::mtu(control.as_fd(), &bridge).doing(|| format!("read the MTU of {bridge}"))?,
    };
    make_pair(&link, &mac, mtu, &netns)?;
    let made = (|| {
        let (mut wire, device, socket) = inside(netns.as_fd(), prepare_namespace)??;
        wire.batch(configure(spec, device, &mac))?;
        drop(socket);
        // A pod that arrives has neighbours to tell, and so has one on the LAN: its address may have been another's a
        // moment ago. On a network of our own nobody asks. A packet socket can be bound only after its device is up,
        // and closing it waits for the whole kernel (10 ms).
        let on_the_lan = matches!(spec.network.mode, NetworkMode::Bridge(_));
        let speaker = if quiet || on_the_lan { Some(speaker(&netns)?) } else { None };
        let attachment = Attachment {
            host_link: Some(link.clone()),
            bridge: Some(bridge.clone()),
            mac,
            addresses,
            control,
            speaker,
        };
        if !quiet {
            attachment.join()?;
        }
        Ok(attachment)
    })();
    if made.is_err() {
        remove(&link)?;
    }
    made
}

fn netns_of(pid: i32) -> Result<File> {
    let path = format!("/proc/{pid}/ns/net");
    File::open(&path).doing(|| format!("open {path}"))
}

/// One request makes both ends, the inside one already in the pod, with its name, MAC and MTU; a second one keeps the
/// outside end from inventing an IPv6 address and brings it up.
fn make_pair(link: &str, mac: &Mac, mtu: u32, netns: &File) -> Result<()> {
    let inside = LinkMessageBuilder::<LinkUnspec>::new()
        .name(INSIDE)
        .address(mac.to_vec())
        .mtu(mtu)
        .setns_by_fd(netns.as_raw_fd())
        .build();
    let mut pair = LinkMessageBuilder::<LinkVeth>::new(link, INSIDE).mtu(mtu);
    pair = pair.set_info_data(InfoData::Veth(InfoVeth::Peer(inside)));
    let mut wire = Wire::open()?;
    // One of the same name is what a killed attempt or a copy that has just died left.
    let [silent, up] = silent_up(LinkUnspec::new_with_name(link), link);
    wire.batch(vec![
        delete(link),
        Request::new(format!("make the pod's cable {link}"), RouteNetlinkMessage::NewLink(pair.build()))
            .flags(NLM_F_CREATE | NLM_F_EXCL),
        silent,
        up,
    ])
}

/// "Make up no IPv6 address of your own", then "up". Two requests: in one, the kernel brings the device up first.
pub(super) fn silent_up(link: LinkMessageBuilder<LinkUnspec>, name: &str) -> [Request; 2] {
    let link = link.build();
    let mut silent: LinkMessage = link.clone();
    let no_address = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    silent.attributes.push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![no_address])]));
    let mut up = link;
    up.header.flags = LinkFlags::Up;
    up.header.change_mask = LinkFlags::Up;
    [
        // A host without IPv6 has nothing to switch off.
        Request::new(format!("keep {name} from making up an address"), RouteNetlinkMessage::SetLink(silent))
            .tolerate(&[libc::EAFNOSUPPORT, libc::EOPNOTSUPP, libc::EINVAL]),
        Request::new(format!("bring {name} up"), RouteNetlinkMessage::SetLink(up)),
    ]
}

fn delete(link: &str) -> Request {
    let message = LinkUnspec::new_with_name(link).build();
    Request::new(format!("remove {link}"), RouteNetlinkMessage::DelLink(message)).tolerate(&[libc::ENODEV])
}

/// Removes a device of the host by its name; gone already is as good.
pub fn remove(link: &str) -> Result<()> {
    Wire::open()?.ask(delete(link))
}

/// The index of a device of the host, which no other gets after it.
pub fn index_of(link: &str) -> Option<u32> {
    let control = netdev::control_socket().ok()?;
    netdev::index(control.as_fd(), link).ok()
}

/// Removes a device of the host by its index; gone already is as good.
pub fn remove_by_index(index: u32) -> Result<()> {
    let message = LinkUnspec::new_with_index(index).build();
    let request = Request::new(format!("remove device {index}"), RouteNetlinkMessage::DelLink(message));
    Wire::open()?.ask(request.tolerate(&[libc::ENODEV]))
}

/// Takes a device of the host down, so that nothing comes through it any more (0.2 ms); gone already is as good.
pub fn cut(link: &str) -> Result<()> {
    let control = netdev::control_socket().doing(|| "open a socket".into())?;
    match netdev::set_up(control.as_fd(), link, false) {
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        other => other.doing(|| format!("cut {link}")),
    }
}

/// Inside the pod's namespace: sockets to configure it by, and the settings of the device that have no netlink message.
/// Those of the namespace are the first process's affair.
fn prepare_namespace() -> Result<(Wire, u32, OwnedFd)> {
    let control = netdev::control_socket().doing(|| "open a socket in the pod".into())?;
    netdev::set_up(control.as_fd(), "lo", true).doing(|| "bring the pod's loopback up".into())?;
    // Addresses come from the lease only: one that a router gave would be lost by a move. What a program adds by itself
    // may be another's, and is asked for as on any host, whatever the namespace's default is; the leased ones are not.
    // A host without IPv6 loses nothing by the absence of the settings.
    for (name, value) in [("accept_ra", "0"), ("autoconf", "0"), ("accept_dad", "1")] {
        if let Err(error) = std::fs::write(format!("/proc/sys/net/ipv6/conf/{INSIDE}/{name}"), value) {
            tracing::debug!("{name} of {INSIDE} in the pod: {error}");
        }
    }
    let index = netdev::index(control.as_fd(), INSIDE).doing(|| format!("find {INSIDE} in the pod"))?;
    Ok((Wire::open()?, index, control))
}

fn configure(spec: &Spec, device: u32, mac: &Mac) -> Vec<Request> {
    let mut requests = Vec::from(silent_up(LinkUnspec::new_with_index(device), INSIDE));
    // A host without IPv6 leaves the pod without its link-local address, and nothing else.
    requests.push(named::add_address(device, IpAddr::V6(link_local(mac)), 64, INSIDE).tolerate(&[
        libc::EEXIST,
        libc::EOPNOTSUPP,
        libc::EAFNOSUPPORT,
        libc::EACCES,
        libc::EINVAL,
    ]));
    for address in &spec.network.addresses {
        requests.push(named::add_address(device, address.ip, address.prefix, INSIDE));
    }
    for gateway in &spec.network.gateways {
        let route = match gateway {
            IpAddr::V4(ip) => RouteMessageBuilder::<Ipv4Addr>::new().gateway(*ip).output_interface(device).build(),
            IpAddr::V6(ip) => RouteMessageBuilder::<Ipv6Addr>::new().gateway(*ip).output_interface(device).build(),
        };
        requests.push(
            Request::new(format!("route the pod by {gateway}"), RouteNetlinkMessage::NewRoute(route))
                .flags(NLM_F_CREATE)
                .tolerate(&[libc::EEXIST]),
        );
    }
    requests
}

impl Attachment {
    /// The cable of a pod that runs, found again by its id. `init_pid` may be gone: then nothing can be announced.
    pub fn open(dir: &Path, spec: &Spec, init_pid: Option<i32>) -> Result<Attachment> {
        let control = netdev::control_socket().doing(|| "open a socket".into())?;
        let bridge = match &spec.network.mode {
            NetworkMode::None | NetworkMode::Host => None,
            NetworkMode::Bridge(bridge) => Some(bridge.clone()),
            NetworkMode::Named(name) => Some(named::load(dir, name)?.bridge),
        };
        let host_link = link_of(spec);
        let speaker = match (&host_link, init_pid) {
            (Some(_), Some(pid)) => netns_of(pid).and_then(|netns| speaker(&netns)).ok(),
            _ => None,
        };
        let mac = mac_of(spec).unwrap_or_default();
        Ok(Attachment { host_link, bridge, mac, addresses: spec.network.addresses.clone(), control, speaker })
    }

    /// Plugs the outside end into the bridge (0.1 ms). In it already is no error.
    pub fn join(&self) -> Result<()> {
        let (Some(link), Some(bridge)) = (&self.host_link, &self.bridge) else { return Ok(()) };
        let port = netdev::index(self.control.as_fd(), link).doing(|| format!("find the pod's cable {link}"))?;
        match netdev::bridge_port(self.control.as_fd(), bridge, port, true) {
            // A device that is a port already answers EBUSY.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                Err(Problem::new("E-BRIDGE-MISSING", format!("'{bridge}' is no bridge"))
                    .fix("--network bridge:IFACE takes the name of a bridge, as 'ip link show type bridge' lists them"))
            }
            other => other.doing(|| format!("plug {link} into {bridge}")),
        }
    }

    /// Has the bridge go on taking the pod to be where its frames are held ([`super::hold`]), though it speaks from here; or not
    /// any more.
    pub fn notice(&self, noticed: bool) -> Result<()> {
        self.host_link.as_deref().map_or(Ok(()), |link| port::notice(link, noticed))
    }

    /// Tells the neighbours, from the pod's own side, where its addresses are now. The port must be in the bridge.
    pub fn announce(&self) -> Result<()> {
        match &self.speaker {
            Some(speaker) => announce::send_all(speaker.as_fd(), &self.mac, &self.addresses),
            None => Ok(()),
        }
    }

    /// Cuts the pod off, silently and reversibly (0.2 ms).
    pub fn hold(&self) -> Result<()> {
        self.set_up(false)
    }

    /// Undoes [`Attachment::hold`], [`port::lock`] and [`port::mute`], and tells the neighbours, who may have been told otherwise
    /// meanwhile.
    pub fn release(&self) -> Result<()> {
        self.set_up(true)?;
        let opened = self.host_link.as_deref().map_or(Ok(()), port::open);
        self.announce().and(opened)
    }

    /// Whether the pod was left as a move holds it. One without a cable is not held.
    pub fn is_held(&self) -> bool {
        let Some(link) = self.host_link.as_deref() else { return false };
        !netdev::is_up(self.control.as_fd(), link).unwrap_or(true) || !port::is_open(link)
    }

    fn set_up(&self, up: bool) -> Result<()> {
        let Some(link) = &self.host_link else { return Ok(()) };
        let verb = if up { "release" } else { "hold" };
        netdev::set_up(self.control.as_fd(), link, up).doing(|| format!("{verb} the pod's cable {link}"))
    }

    /// Takes the cable away. The pod's network namespace, if it is still there, is left with loopback.
    pub fn remove(self) -> Result<()> {
        match &self.host_link {
            Some(link) => remove(link),
            None => Ok(()),
        }
    }
}

fn speaker(netns: &File) -> Result<OwnedFd> {
    let open = || -> io::Result<OwnedFd> {
        let control = netdev::control_socket()?;
        netdev::packet_socket(netdev::index(control.as_fd(), INSIDE)?, Receive::Nothing, false)
    };
    inside(netns.as_fd(), open)?.doing(|| "open a packet socket in the pod".into())
}
