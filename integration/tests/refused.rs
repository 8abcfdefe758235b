//! What cannot be moved is refused by name, and the pod goes on as if nothing had happened.

use anyhow::{Context, Result, ensure};
use integration::bed::{self, Bed};
use integration::pods::said;

fn refused(kind: &str, code: &str, options: &[&str]) -> Result<()> {
    let bed = Bed::new()?;
    let guest = bed::beside_us("guest").context("guest is built with us")?;
    let guest = guest.to_string_lossy();
    let run = ["run", "-d", "--name", kind, "--network", "none"];
    bed.a().pod(&[&run, options, &["--", &guest, kind]].concat())?;
    said(bed.a(), kind, "ready")?;
    for round in ["ok 1", "ok 2"] {
        let (_, message) = bed.a().pod_fails(&["checkpoint", "create", kind])?;
        ensure!(message.contains(code), "{message}");
        ensure!(bed.a().pod(&["explain", code])?.contains(code), "{code} has no page");
        bed.a().pod(&["kill", "-s", "USR1", kind])?;
        said(bed.a(), kind, round)?;
    }
    ensure!(
        bed.a().pod(&["top", kind]).map_or(true, |processes| !processes.contains("onlooker")),
        "one of ours is left"
    );
    bed.a().pod(&["rm", "-f", kind]).map(drop)
}

#[test]
fn landlock() -> Result<()> {
    refused("landlock", "E-LANDLOCK", &[])
}

#[test]
fn keyring() -> Result<()> {
    refused("keyring", "E-KEYRING", &["--security-opt", "seccomp=unconfined"])
}

#[test]
fn sharedtable() -> Result<()> {
    refused("sharedtable", "E-SHARED-TABLE", &[])
}

#[test]
fn notified() -> Result<()> {
    refused("notified", "E-FILE-MQUEUE", &[])
}

#[test]
fn filtered() -> Result<()> {
    refused("filtered", "E-NETWORK-INSIDE", &["--cap-add", "NET_ADMIN"])
}

#[test]
fn covering() -> Result<()> {
    refused("covering", "E-MOUNT-INSIDE", &["--cap-add", "SYS_ADMIN", "--security-opt", "seccomp=unconfined"])
}
