//! A pod's place on a network: its addresses, its cable, and what the world is told about them.
//!
//! * [`named`]: networks with a name ("pod" is made when first needed), their definitions and their bridges.
//! * [`leases`]: who has which address, MAC and published port on this host; one file, one lock.
//! * [`cable`]: the veth pair between the pod's `eth0` and a bridge of the host: attach, join, hold, remove.
//! * [`announce`]: gratuitous ARP and unsolicited neighbour advertisements, and the probe for a duplicate address.
//! * [`nat`]: the way outward and published ports, one nftables table `inet pod`.
//! * [`gate`]: no new connections for a moment, so that the last handshakes can finish before a move.
//! * [`repair`]: connections that a killed tool left in the middle of being read.
//! * [`hold`]: the port of a destination host that keeps a moving pod's frames until its sockets are restored.
//!
//! The rule for all of it: whatever a pod has on a host is found again from its id alone (the link is named after it,
//! the lease is keyed by it, nftables elements are listed in the lease), so that [`release`] can undo an attempt that
//! was killed at any point. Nothing here needs the pod to be alive.

use crate::spec::{NetworkMode, Spec};
use crate::sys::netdev;
use crate::{Doing, Result};
use std::os::fd::AsFd;
use std::path::Path;

pub mod announce;
pub mod cable;
pub mod frame;
pub mod gate;
pub mod hold;
pub mod knocks;
pub mod leases;
pub mod named;
pub mod nat;
pub mod port;
pub mod repair;
pub mod wire;

pub use cable::{Attachment, attach, link_name};
pub use leases::{Claim, Lease, lease};

/// Takes away everything that the pod has on this host's network: published ports, the cable, the lease. Doing it
/// twice, or for a pod that has nothing, is no error.
pub fn release(dir: &Path, pod_id: &str) -> Result<()> {
    withdraw(dir, pod_id)?;
    cable::remove(&link_name(pod_id))
}

/// The part of [`release`] that others wait for: the pod is off the network and its names are free. What is left is the
/// cable, cut, which takes the kernel 10 to 30 ms to put away; it goes with the pod's network namespace at the latest.
pub fn withdraw(dir: &Path, pod_id: &str) -> Result<()> {
    nat::unpublish(dir, pod_id)?;
    cable::cut(&link_name(pod_id))?;
    leases::forget(dir, pod_id)
}

/// The bridge by which a pod is on the LAN itself, and its MTU; `None` for a pod on a network that only this host has.
pub fn lan(dir: &Path, spec: &Spec) -> Result<Option<(String, u32)>> {
    let bridge = match &spec.network.mode {
        NetworkMode::Bridge(bridge) => bridge.clone(),
        NetworkMode::Named(name) => match named::load(dir, name)? {
            definition if definition.managed => return Ok(None),
            definition => definition.bridge,
        },
        NetworkMode::None | NetworkMode::Host => return Ok(None),
    };
    let control = netdev::control_socket().doing(|| "open a socket".into())?;
    let mtu = netdev::mtu(control.as_fd(), &bridge).doing(|| format!("read the MTU of {bridge}"))?;
    Ok(Some((bridge, mtu)))
}

/// Opens the published ports (`-p`) of a pod that has its lease. A port that is taken on this host is refused by
/// [`lease`], before anything runs.
pub fn publish(dir: &Path, spec: &Spec) -> Result<()> {
    nat::publish(dir, spec)
}
