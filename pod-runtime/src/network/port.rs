//! The port of a pod's cable in its bridge, while the pod leaves and when it arrives.
//!
//! * *lock*: the bridge takes from the pod only what comes from where it knows the pod to be. From the moment at which another host
//!   draws the pod's frames, the pod's last words (its kernel goes on acknowledging) get no further than here, and draw nothing
//!   back. What still comes for it reaches it.
//! * *mute*: the bridge takes nothing from the cable and gives it nothing. The pod's side keeps its carrier and sends: who listens
//!   on the cable hears what the pod says, and nobody else does.
//!
//! Both go with [`open`], and with the cable.
//!
//! * *unnoticed*: the bridge takes what the pod says, and does not learn from it where the pod is. What is for the pod goes on to the
//!   port that holds it, until that was handed on: nothing overtakes it.

use super::cable::index_of;
use super::wire::{Request, Wire};
use crate::{Doing, Result};
use netlink_packet_core::DefaultNla;
use netlink_packet_route::link::{
    BridgePortState, InfoBridgePort, InfoPortData, LinkAttribute, LinkInfo, LinkProtoInfoBridge,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::LinkUnspec;
use std::io;
use std::time::{Duration, Instant};

// Of linux/if_link.h.
const IFLA_BRPORT_STATE: u16 = 1;
const IFLA_BRPORT_LEARNING: u16 = 8;
const IFLA_BRPORT_LOCKED: u16 = 39;

/// Kernels before 5.16 do not know it, and take no notice.
pub fn lock(link: &str) -> Result<()> {
    Wire::open()?.ask(set(link, IFLA_BRPORT_LOCKED, 1)?)
}

/// Whether the bridge learns from what comes from the cable where the pod is. Of a cable in no bridge it is no matter.
pub fn notice(link: &str, noticed: bool) -> Result<()> {
    Wire::open()?.ask(set(link, IFLA_BRPORT_LEARNING, noticed.into())?.tolerate(&[libc::EOPNOTSUPP]))
}

/// `false` where that cannot be done, or not be undone: a spanning tree (STP), of the kernel or of a daemon, sets the states of
/// ports itself.
pub fn mute(link: &str) -> Result<bool> {
    if state(link)?.0 != Some(BridgePortState::Forwarding) {
        return Ok(false);
    }
    let request = set(link, IFLA_BRPORT_STATE, BridgePortState::Disabled.into())?;
    Wire::open()?.ask(request.tolerate(&[libc::EBUSY, libc::EOPNOTSUPP]))?;
    Ok(state(link)?.0 == Some(BridgePortState::Disabled))
}

/// Undoes [`lock`] and [`mute`], and waits (20 ms at most) until the bridge takes frames from the port. Of a device that has just
/// come up it does so a moment later, by itself.
pub fn open(link: &str) -> Result<()> {
    const IN_NO_BRIDGE: &[i32] = &[libc::EOPNOTSUPP];
    const NOT_YET: &[i32] = &[libc::EOPNOTSUPP, libc::ENETDOWN, libc::EBUSY];
    let mut wire = Wire::open()?;
    wire.ask(set(link, IFLA_BRPORT_LOCKED, 0)?.tolerate(IN_NO_BRIDGE))?;
    let until = Instant::now() + Duration::from_millis(20);
    // One that cannot be looked at is told all the same.
    while state(link).map_or(true, |(state, _)| state == Some(BridgePortState::Disabled)) {
        let forwarding = set(link, IFLA_BRPORT_STATE, BridgePortState::Forwarding.into())?;
        wire.ask(forwarding.tolerate(NOT_YET))?;
        if Instant::now() > until {
            break;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}

/// Whether it is neither locked nor muted, for all that can be seen. What is in no bridge is neither.
pub fn is_open(link: &str) -> bool {
    match state(link) {
        Ok((state, locked)) => state != Some(BridgePortState::Disabled) && !locked,
        Err(_) => index_of(link).is_none(),
    }
}

/// As `bridge link set` does it: what `ip link set type bridge_slave` sets, the bridge sets back at once.
fn set(link: &str, attribute: u16, value: u8) -> Result<Request> {
    let index = index_of(link).ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV));
    let index = index.doing(|| format!("find the pod's cable {link}"))?;
    let mut message = LinkUnspec::new_with_index(index).build();
    message.header.interface_family = AddressFamily::Bridge;
    let setting = LinkProtoInfoBridge::Other(DefaultNla::new(attribute, vec![value]));
    message.attributes.push(LinkAttribute::ProtoInfoBridge(vec![setting]));
    Ok(Request::new(format!("set the port {link}"), RouteNetlinkMessage::SetLink(message)))
}

/// What its bridge does with a device, and whether it is locked; neither of one that is in no bridge.
fn state(link: &str) -> Result<(Option<BridgePortState>, bool)> {
    let message = LinkUnspec::new_with_name(link).build();
    let found = Wire::open()?.get(RouteNetlinkMessage::GetLink(message))?;
    let RouteNetlinkMessage::NewLink(found) = found else { return Ok((None, false)) };
    let infos = found.attributes.into_iter().filter_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    });
    let settings = infos.flatten().filter_map(|info| match info {
        LinkInfo::PortData(InfoPortData::BridgePort(settings)) => Some(settings),
        _ => None,
    });
    Ok(settings.flatten().fold((None, false), |(state, locked), setting| match setting {
        InfoBridgePort::State(state) => (Some(state), locked),
        InfoBridgePort::Locked(locked) => (state, locked),
        _ => (state, locked),
    }))
}
