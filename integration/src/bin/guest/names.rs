//! Host and domain name that a program in the pod has set.

use crate::Guest;
use anyhow::{Result, ensure};
use std::fs;

struct Names;

const HOST: &str = "guest-host";
const DOMAIN: &str = "guest.example";

fn command(name: &str, args: &[&str]) -> Result<String> {
    let output = std::process::Command::new(name).args(args).output()?;
    ensure!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    command("hostname", &[HOST])?;
    command("domainname", &[DOMAIN])?;
    Ok(Box::new(Names))
}

impl Guest for Names {
    fn verify(&mut self) -> Result<()> {
        let (host, domain) = (command("uname", &["-n"])?, fs::read_to_string("/proc/sys/kernel/domainname")?);
        ensure!((host.trim(), domain.trim()) == (HOST, DOMAIN), "the names are {host:?} and {domain:?}");
        Ok(())
    }
}
