//! Memory that comes when the pod runs at the destination already, and whoever is killed meanwhile.

use anyhow::{Context, Result, bail, ensure};
use integration::bed::{Bed, Host};
use integration::pods::said;
use integration::wait::{SOON, until, until_true};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::process::{Child, Stdio};

const POD: &str = "memory";
/// MiB beside the guest.
const BALLAST: u32 = 80;

/// A guest with much memory, which leaves the first host slowly.
fn leaving(bed: &Bed, options: &[&str]) -> Result<Child> {
    bed.a().guest(POD, &[], BALLAST)?;
    let mut command = bed.a().command("pod");
    command.args(["migrate", POD, "--to", "hostB", "--postcopy", "--bandwidth", "20M"]).args(options);
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    until_true("the pod to run there", SOON, || of(bed.b(), "pod-carrier").is_some())?;
    Ok(child)
}

/// A process of a host by its name, as this machine numbers it.
fn of(host: &Host, name: &str) -> Option<i32> {
    host.process(|pid| std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == name))
}

fn kill_of(host: &Host, name: &str) -> Result<()> {
    let pid = until(name, SOON, || of(host, name))?;
    kill(Pid::from_raw(pid), Signal::SIGKILL).with_context(|| format!("kill {name}"))
}

fn ended(child: Child, code: i32) -> Result<String> {
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(code), "{:?}: {said}", output.status);
    Ok(said)
}

/// It has all that it had, on the second host, and the first has nothing more of it.
fn arrived(bed: &Bed) -> Result<()> {
    bed.b().pod(&["kill", "-s", "USR1", POD])?;
    said(bed.b(), POD, "ok 1")?;
    ensure!(!bed.a().runs(POD), "it runs on both");
    bed.a().pod(&["rm", POD])?;
    bed.b().pod(&["rm", "-f", POD]).map(drop)
}

fn open_job(host: &Host) -> Result<String> {
    let jobs: Value = serde_json::from_str(&host.pod(&["job", "ls", "--json"])?)?;
    let open = jobs["jobs"].as_array().into_iter().flatten().find(|job| job["phase"] == "committing");
    Ok(open.and_then(|job| job["id"].as_str()).with_context(|| format!("no job is open: {jobs}"))?.to_owned())
}

#[test]
fn a_carrier_or_a_link_that_is_lost_is_made_again() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    for (host, who) in [(bed.b(), "pod-carrier"), (bed.a(), "ssh")] {
        let child = leaving(&bed, &[])?;
        kill_of(host, who).context(who)?;
        ended(child, 0).context(who)?;
        arrived(&bed).context(who)?;
    }
    bed.nothing_left(&before)
}

#[test]
fn a_killed_tool_is_returned_to() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    let mut child = leaving(&bed, &[])?;
    kill_of(bed.a(), "pod")?;
    child.wait()?;
    // The copy stays as it is; its host knows that it is needed, and nobody lets it go, nor buries it.
    let job = open_job(bed.a())?;
    let held = || bed.a().pod(&["inspect", POD]).is_ok_and(|text| text.contains("\"state\": \"migrating\""));
    ensure!(held() && bed.b().runs(POD), "one copy runs, there");
    until_true("somebody to be missed", SOON, || {
        bed.b().pod(&["inspect", POD]).is_ok_and(|text| text.contains("pod job resume"))
    })?;
    for refused in [&["unpause", POD][..], &["migrate", POD, "--to", "hostB"], &["checkpoint", "create", POD]] {
        let (_, said) = bed.a().pod_fails(refused)?;
        ensure!(held() && !said.contains("panicked"), "{refused:?}: {said}");
    }
    // A program that touches what is missing waits for it.
    bed.b().pod(&["kill", "-s", "USR1", POD])?;
    bed.a().pod(&["job", "resume", &job])?;
    said(bed.b(), POD, "ok 1")?;
    let inspected = bed.b().pod(&["inspect", POD])?;
    ensure!(!inspected.contains("pod job resume"), "nobody is missed any more: {inspected}");
    bed.a().pod(&["rm", POD])?;
    bed.b().pod(&["rm", "-f", POD])?;
    bed.nothing_left(&before)
}

/// What the source's kernel, or whoever ends the copy there, takes with it is gone: the pod waits until it is ended.
#[test]
fn without_its_source_it_waits_until_it_is_ended() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    let mut child = leaving(&bed, &[])?;
    kill_of(bed.a(), "pod")?;
    child.wait()?;
    let job = open_job(bed.a())?;
    bed.a().pod(&["rm", "-f", POD])?;
    // The job ends, and whoever looks at the pod is told.
    bed.a().pod(&["job", "resume", &job])?;
    let inspected = bed.b().pod(&["inspect", POD])?;
    ensure!(inspected.contains("waits for it in vain"), "{inspected}");
    bed.b().pod(&["rm", "-f", POD])?;
    bed.nothing_left(&before)
}

#[test]
fn without_its_filler_it_is_ended() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    let child = leaving(&bed, &[])?;
    kill_of(bed.b(), "pod-filler")?;
    ended(child, 0)?;
    until_true("the pod to be ended", SOON, || !bed.b().runs(POD))?;
    let inspected = bed.b().pod(&["inspect", POD])?;
    ensure!(inspected.contains("could not be brought from the host that it left"), "{inspected}");
    bed.a().pod(&["rm", POD])?;
    bed.b().pod(&["rm", POD])?;
    bed.nothing_left(&before)
}

/// Nobody can save or move it before it has all.
#[test]
fn who_wants_to_move_it_on_waits() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    let child = leaving(&bed, &[])?;
    bed.b().pod(&["checkpoint", "create", POD, "whole"])?;
    ensure!(of(bed.b(), "pod-filler").is_none(), "it was saved before all was there");
    ended(child, 0)?;
    bed.b().pod(&["checkpoint", "rm", "whole"])?;
    arrived(&bed)?;
    bed.nothing_left(&before)
}

/// A pod that writes as fast as its memory is sent does not stand still for that.
#[test]
fn what_passes_cannot_catch_up_with_follows() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    let program = "import os\nsize = 400 << 20\nblocks = [os.urandom(1 << 20) for _ in range(2)]\nmemory = bytearray(size)\nround = 0\n\
         while True:\n  for at in range(0, size, 1 << 20): memory[at:at + (1 << 20)] = blocks[round % 2]\n  round += 1\n  \
         round == 2 and print('ready', flush=True)\n";
    bed.a().pod(&["run", "-d", "--name", "writer", "--network", "none", "--", "python3", "-c", program])?;
    said(bed.a(), "writer", "ready")?;
    let moved = bed.a().pod(&["migrate", "writer", "--to", "hostB", "--on-stall", "postcopy", "--json"])?;
    let report: Value = serde_json::from_str(&moved)?;
    let figure = |name: &str| report[name].as_f64().with_context(|| format!("no {name}"));
    let (behind, expected, frozen) = (figure("bytes_behind")?, figure("expected_ms")?, figure("frozen_ms")?);
    ensure!(behind > 50e6 && report["rounds"].as_u64() > Some(1), "{behind} bytes came behind it");
    ensure!(frozen < expected, "it stood still for {frozen} ms; with its memory for {expected}");
    let warned =
        report["warnings"].as_array().is_some_and(|all| all.iter().any(|one| one.to_string().contains("MiB/s")));
    ensure!(warned, "not said aloud: {}", report["warnings"]);
    ensure!(report["migration"]["ram"]["postcopy-bytes"].as_u64() > Some(50_000_000), "{}", report["migration"]);
    bed.a().pod(&["rm", "writer"])?;
    bed.b().pod(&["rm", "-f", "writer"])?;
    let (code, said) =
        bed.a().pod_fails(&["migrate", "writer", "--to", "hostB", "--postcopy", "--on-stall", "abort"])?;
    if code != 2 {
        bail!("two answers to one question: {code}: {said}");
    }
    bed.nothing_left(&before)
}
