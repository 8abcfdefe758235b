//! Every guest where nothing moves: one that fails there says nothing about moves.

use anyhow::{Context, Result, ensure};
use integration::bed::host::program_of;
use integration::bed::{self, Bed};
use integration::hugepages::HugePages;
use integration::wait::{SOON, until_true};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::process::Stdio;

/// All guests, each on its own on a host, asked twice.
#[test]
fn guests_verify_where_nothing_moves() -> Result<()> {
    let bed = Bed::new()?;
    let guest = bed::beside_us("guest").context("guest is built with us")?;
    let guest = guest.to_string_lossy().into_owned();
    let kinds = bed.a().run(&[&guest, "--list"])?;
    for kind in kinds.lines() {
        let _pages = HugePages::of(kind)?;
        let log = bed.shared().join(kind);
        // Guests write to /tmp and /var/tmp, which hosts share with the machine, and make message queues.
        let line = format!("mount -t tmpfs t /tmp && mount -t tmpfs t /var/tmp && exec /proc/self/fd/3 {kind}");
        let line = format!("exec 3<{guest}; exec unshare --mount --ipc --uts sh -c '{line}'");
        let out = fs::File::create(&log)?;
        let mut running = bed.a().command("bash").args(["-c", &line]).stdout(out).stdin(Stdio::null()).spawn()?;
        let said = |what: &str| {
            until_true(&format!("{kind} to say {what:?}"), SOON, || {
                fs::read_to_string(&log).is_ok_and(|text| text.lines().any(|line| line == what))
            })
            .with_context(|| fs::read_to_string(&log).unwrap_or_default())
        };
        said("ready")?;
        let program = Pid::from_raw(program_of(&running)?);
        for round in ["ok 1", "ok 2"] {
            kill(program, Signal::SIGUSR1)?;
            said(round)?;
        }
        ensure!(running.try_wait()?.is_none(), "{kind} ended");
        running.kill()?;
        running.wait()?;
    }
    Ok(())
}
