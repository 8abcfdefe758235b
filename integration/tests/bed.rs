//! The bed itself: hosts reach each other, two beds do not meet, nothing is left of one whose owner was killed.

use anyhow::{Context, Result, ensure};
use integration::bed::{self, Bed, Census};
use integration::wait::{SOON, until, until_true};
use std::process::{Command, Stdio};

#[test]
fn hosts_reach_each_other_by_ssh() -> Result<()> {
    let bed = Bed::new()?;
    ensure!(bed.a().run(&["ssh", "hostB", "hostname"])?.trim() == "hostB");
    ensure!(bed.b().run(&["ping", "-c1", "-W2", "hostA"])?.contains("1 received"));
    bed.partition(bed.b())?;
    ensure!(!bed.a().output(&["ping", "-c1", "-W1", "hostB"])?.status.success());
    bed.heal(bed.b())?;
    until_true("the cable to work again", SOON, || {
        bed.a().output(&["ping", "-c1", "-W1", "hostB"]).is_ok_and(|output| output.status.success())
    })
}

#[test]
fn beds_live_side_by_side() -> Result<()> {
    let (one, two) = (Bed::new()?, Bed::new()?);
    one.a().run(&["sh", "-c", "echo one >/var/lib/mark; echo one >/dev/shm/mark"])?;
    ensure!(!two.a().output(&["cat", "/var/lib/mark"])?.status.success());
    ensure!(!one.b().output(&["cat", "/dev/shm/mark"])?.status.success());
    let name = one.name().to_string();
    drop(one);
    ensure!(!bed::all().contains(&name));
    ensure!(two.a().run(&["hostname"])?.trim() == "hostA");
    Ok(())
}

#[test]
fn the_census_sees_what_is_left() -> Result<()> {
    let bed = Bed::new()?;
    let before = Census::of(bed.a())?;
    bed.a().run(&["true"])?;
    ensure!(before.settled(bed.a(), SOON)?.is_empty());
    bed.a().run(&[
        "sh",
        "-c",
        "sleep 1000 >/dev/null 2>&1 & ip link add left type veth; touch /run/left; ipcmk -M 100 >&2",
    ])?;
    let differs = before.differs_from(&Census::of(bed.a())?).join("\n");
    for kind in ["+ process", "+ link: left", "+ run: left", "+ ipc: shm"] {
        ensure!(differs.contains(kind), "no {kind} in:\n{differs}");
    }
    Ok(())
}

#[test]
fn nothing_is_left_of_a_bed_whose_owner_was_killed() -> Result<()> {
    let program = bed::beside_us("bed").context("bed is built with us")?;
    let name = format!("killed-{}", std::process::id());
    let mut owner =
        Command::new(program).args(["run", "sleep", "1000"]).env("BED_NAME", &name).stdout(Stdio::null()).spawn()?;
    let up = until("the bed to be up", SOON, || Bed::open(&name).ok())?;
    let switch = up.switch();
    owner.kill()?;
    owner.wait()?;
    until_true("the keeper to clean up", SOON, || !bed::all().contains(&name))?;
    until_true("the keeper to end", SOON, || !std::path::Path::new(&format!("/proc/{switch}")).exists())
}
