//! The switch and its cables: made once, then pulled, slowed and made lossy by tests.
//!
//! Everything is done from the switch's network namespace (and, to shape both ways, from the host's). This kernel has
//! no netem: a token bucket limits the rate, an nftables rule at the switch drops at random.

use super::{Bed, Host, host};
use anyhow::{Context, Result, ensure};
use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};

/// Makes the switch in the calling process's network namespace and plugs every host in.
pub(super) fn wire(hosts: &[Host]) -> Result<()> {
    let mut switch =
        String::from("link set lo up\nlink add sw0 type bridge stp_state 0 forward_delay 0\nlink set sw0 up\n");
    for host in hosts {
        let (name, pid) = (host.name(), host.pid()?);
        writeln!(switch, "link add p-{name} type veth peer name eth0 netns {pid}")?;
        writeln!(switch, "link set p-{name} master sw0\nlink set p-{name} up")?;
    }
    batch(Command::new("ip"), &switch)?;
    keep_order()?;
    for host in hosts {
        let (four, six) = (host.address(), host.address6());
        // The bridge's own MAC is set: it would otherwise borrow, and change with, that of its ports.
        let mac = format!("02:77:00:00:00:{:02x}", four.octets()[3]);
        let lines = format!(
            "link set lo up
link add br0 address {mac} type bridge stp_state 0 forward_delay 0
addr add {four}/24 dev br0
addr add {six}/64 dev br0
link set br0 up
link set eth0 master br0
link set eth0 up
"
        );
        batch(host.in_network("ip")?, &lines)?;
    }
    Ok(())
}

/// Has the switch, in the calling process's network namespace, keep the frames of a connection in order, as a cable does. Without
/// this (receive packet steering) each processor has a queue of its own for what its processes send, and a client's last
/// acknowledgement, by its timer on one of them, comes after the FIN that it sent later on another: who is at the other end
/// answers that once more, and the client, which has forgotten the connection by then, does so with a reset.
fn keep_order() -> Result<()> {
    let processors = std::thread::available_parallelism()?.get().min(32);
    // In /sys as it is for this namespace, which nobody else sees.
    let script = format!(
        "mount -t sysfs sysfs /sys && for port in /sys/class/net/p-*/queues/rx-*/rps_cpus; do echo {:x} >$port || exit; done",
        (1u64 << processors) - 1
    );
    checked(Command::new("unshare").args(["-m", "sh", "-c", &script]))
}

fn batch(mut ip: Command, lines: &str) -> Result<()> {
    let mut child = ip.args(["-batch", "-"]).stdin(Stdio::piped()).spawn().context("run ip (package iproute2)")?;
    child.stdin.take().context("stdin is a pipe")?.write_all(lines.as_bytes())?;
    ensure!(child.wait()?.success(), "ip refused:\n{lines}");
    Ok(())
}

fn checked(command: &mut Command) -> Result<()> {
    let output = command.output()?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

impl Bed {
    fn at_switch(&self, program: &str, args: &[&str]) -> Command {
        let mut command = host::in_network(self.switch(), program);
        command.args(args);
        command
    }

    /// Pulls the host's cable at the switch.
    pub fn partition(&self, host: &Host) -> Result<()> {
        checked(&mut self.at_switch("ip", &["link", "set", &format!("p-{}", host.name()), "down"]))
    }

    /// Plugs it in again.
    pub fn heal(&self, host: &Host) -> Result<()> {
        checked(&mut self.at_switch("ip", &["link", "set", &format!("p-{}", host.name()), "up"]))
    }

    /// Limits a host's cable both ways ("1gbit"), or lifts the limit.
    pub fn shape(&self, host: &Host, rate: Option<&str>) -> Result<()> {
        let port = format!("p-{}", host.name());
        for (pid, device) in [(self.switch(), port.as_str()), (host.pid()?, "eth0")] {
            let tc = |args: &[&str]| {
                let mut command = host::in_network(pid, "tc");
                command.args(["qdisc", args[0], "dev", device, "root"]).args(&args[1..]);
                command
            };
            // Fails when there is no limit yet, which is what is wanted.
            let _ = tc(&["del"]).output();
            if let Some(rate) = rate {
                checked(&mut tc(&["add", "tbf", "rate", rate, "burst", "256kb", "latency", "20ms"]))?;
            }
        }
        Ok(())
    }

    /// Drops that share (percent) of what the switch sends to a host; 0 ends it.
    pub fn loss(&self, host: &Host, percent: f64) -> Result<()> {
        let table = format!("loss-{}", host.name());
        let _ = self.at_switch("nft", &["delete", "table", "bridge", &table]).output();
        if percent <= 0.0 {
            return Ok(());
        }
        let share = (percent * 100.0) as u32;
        let rule = format!(
            "table bridge {table} {{ chain c {{ type filter hook forward priority 0; \
             oifname \"p-{}\" numgen random mod 10000 < {share} drop; }}; }}",
            host.name()
        );
        checked(&mut self.at_switch("nft", &[&rule]))
    }

    /// Drops all frames of one direction at the switch, or ends that: a cable of which one wire is broken. Both ends
    /// still have a link.
    pub fn one_way(&self, host: &Host, broken: Option<Way>) -> Result<()> {
        let table = format!("way-{}", host.name());
        let _ = self.at_switch("nft", &["delete", "table", "bridge", &table]).output();
        let Some(broken) = broken else { return Ok(()) };
        let side = match broken {
            Way::To => "oifname",
            Way::From => "iifname",
        };
        let rule = format!(
            "table bridge {table} {{ chain c {{ type filter hook forward priority 0; {side} \"p-{}\" drop; }}; }}",
            host.name()
        );
        checked(&mut self.at_switch("nft", &[&rule]))
    }
}

/// A direction of a host's cable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    To,
    From,
}
