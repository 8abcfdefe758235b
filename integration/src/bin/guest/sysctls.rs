//! Settings of the kernel that a program which may has made in its network and its IPC namespace: for all devices, for one,
//! and for none.

use crate::Guest;
use anyhow::{Context, Result, ensure};
use std::fs;

const SETTINGS: [(&str, &str); 6] = [
    ("net/ipv4/conf/all/log_martians", "1"),
    ("net/ipv4/conf/lo/arp_announce", "2"),
    ("net/ipv4/tcp_keepalive_probes", "5"),
    ("net/core/somaxconn", "4321"),
    ("kernel/msgmni", "777"),
    ("kernel/sem", "250\t32000\t100\t333"),
];

struct Sysctls;

fn path(name: &str) -> String {
    format!("/proc/sys/{name}")
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    for (name, value) in SETTINGS {
        fs::write(path(name), value).with_context(|| format!("set {name}"))?;
    }
    Ok(Box::new(Sysctls))
}

impl Guest for Sysctls {
    fn verify(&mut self) -> Result<()> {
        for (name, value) in SETTINGS {
            let now = fs::read_to_string(path(name))?;
            ensure!(now.trim_end() == value, "{name} is {now:?}");
        }
        Ok(())
    }
}
