//! What a pod that may administer its network makes of it: addresses of both families, routes in several tables, one that
//! leads by another, one that leads nowhere, rules, neighbours.

use crate::{Guest, until};
use anyhow::{Result, ensure};
use std::process::Command;

struct Routes {
    shown: String,
}

fn ip(args: &str) -> Result<String> {
    let output = Command::new("ip").args(args.split(' ')).output()?;
    ensure!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

fn shown() -> Result<String> {
    let all = [
        "-o addr show dev lo",
        "route show table all",
        "-6 route show table all",
        "rule",
        "-6 rule",
        "neigh show nud permanent",
        "neigh show proxy",
    ];
    all.map(ip).into_iter().collect::<Result<Vec<_>>>().map(|texts| texts.join("--\n"))
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    for line in [
        "addr add 10.9.9.9/24 dev lo label lo:guest",
        "addr add fd99::9/64 dev lo",
        "route add 10.8.0.0/16 dev lo metric 7",
        "route add 10.7.0.0/16 via 10.8.0.1 dev lo onlink table 77",
        "route add blackhole 10.6.0.0/16",
        "-6 route add fd98::/64 dev lo table 78",
        "rule add from 10.9.9.9 table 77 priority 100",
        "-6 rule add fwmark 5 table 78 priority 101",
        // None of IPv4: on lo it would be the one for all addresses.
        "-6 neigh add fd99::99 lladdr 02:00:00:00:00:9a dev lo nud permanent",
        "neigh add proxy 10.9.9.77 dev lo",
    ] {
        ip(line)?;
    }
    // The kernel makes some of the routes of an address a little later.
    until("the route of an address", || ip("-6 route show table local").is_ok_and(|text| text.contains("fd99::9 ")))?;
    Ok(Box::new(Routes { shown: shown()? }))
}

impl Guest for Routes {
    fn verify(&mut self) -> Result<()> {
        // Another host's kernel has looked for another who has the address, or has not.
        let plain = |text: &str| text.replace(" nodad", "").replace(" tentative", "");
        let (now, before) = (plain(&shown()?), plain(&self.shown));
        let differ: Vec<&str> = now.lines().filter(|line| !before.contains(line)).collect();
        let gone: Vec<&str> = before.lines().filter(|line| !now.contains(line)).collect();
        ensure!(now == before, "new: {differ:?}; gone: {gone:?}");
        Ok(())
    }
}
