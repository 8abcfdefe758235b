//! What is known before a move: what it would be like, and what stands against it that only the two hosts together show.

use anyhow::{Context, Result, ensure};
use integration::bed::host::program_of;
use integration::bed::{Bed, Host};
use integration::pods::said;
use integration::wait::{SOON, until_true};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::process::Stdio;

fn json(text: &str) -> Result<Value> {
    serde_json::from_str(text).with_context(|| text.to_owned())
}

fn figure(value: &Value, name: &str) -> Result<f64> {
    value[name].as_f64().with_context(|| format!("no {name} in {value}"))
}

/// A pod that writes all of its memory, over and over, without a pause.
fn writer(host: &Host, mib: usize) -> Result<()> {
    let program = format!(
        "size = {mib} << 20\nmemory = bytearray(size)\nblock = bytes(range(256)) * 4096\nround = 0\n\
         while True:\n  for at in range(0, size, 1 << 20): memory[at:at + (1 << 20)] = block\n  round += 1\n  \
         round == 2 and print('ready', flush=True)\n"
    );
    host.pod(&["run", "-d", "--name", "writer", "--network", "none", "--", "python3", "-c", &program])?;
    said(host, "writer", "ready")
}

#[test]
fn what_a_move_would_be_like_is_measured() -> Result<()> {
    let bed = Bed::new()?;
    bed.a().guest("counter", &[], 100)?;
    bed.shape(bed.b(), Some("400mbit"))?;
    let dry = json(&bed.a().pod(&["migrate", "counter", "--to", "hostB", "--dry-run", "--json"])?)?;
    let expected = &dry["expected"];
    let link = figure(expected, "link_bytes_per_second")?;
    // A machine that is busy with other work has less for ssh than the link takes, but never more.
    ensure!((1e6..6e7).contains(&link), "a link of 50 MB/s was measured as {link}");
    ensure!(dry["clear"] == true && bed.a().runs("counter"), "{dry}");
    let moved = json(&bed.a().pod(&["migrate", "counter", "--to", "hostB", "--json"])?)?;
    for (name, foreseen, was) in [
        ("time", figure(expected, "total_ms")?, figure(&moved, "total_ms")?),
        ("bytes", figure(expected, "bytes")?, figure(&moved, "bytes_sent")?),
    ] {
        let most = if name == "time" { 8.0 } else { 2.0 };
        ensure!(was < foreseen * most && foreseen < was * most, "{name}: {foreseen} foreseen, {was} seen");
    }
    ensure!(figure(expected, "rounds")? >= 2.0, "{dry}");
    ensure!(dry["migration"]["status"] == "none" && dry["migration"]["ram"]["dirty-pages-rate"].is_u64(), "{dry}");
    let text = bed.b().pod(&["check", "counter", "--to", "hostA"])?;
    ensure!(text.contains("measured: the link takes") && text.contains("it stands still for about"), "{text}");
    let quick = bed.b().pod(&["check", "counter", "--to", "hostA", "--quick"])?;
    ensure!(!quick.contains("measured") && quick.contains("can be moved"), "{quick}");
    bed.b().pod(&["kill", "-s", "USR1", "counter"])?;
    said(bed.b(), "counter", "ok 1")
}

#[test]
fn a_pod_that_writes_faster_than_the_link_is_named_before() -> Result<()> {
    let bed = Bed::new()?;
    writer(bed.a(), 100)?;
    let checked = json(&bed.a().pod(&["check", "writer", "--to", "hostB", "--json"])?)?;
    let codes = |list: &Value| list.to_string();
    ensure!(codes(&checked["downgrades"]).contains("W-STALL") && checked["clear"] == true, "{checked}");
    let (written, stall) =
        (figure(&checked["expected"], "written_per_second")?, figure(&checked["expected"], "stall_ms")?);
    ensure!(written > 1e8 && stall > 50.0, "{checked}");
    let dry = ["migrate", "writer", "--to", "hostB", "--dry-run", "--on-stall", "abort"];
    let output = bed.a().output(&[&["pod"], &dry[..]].concat())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.code() == Some(10) && text.contains("BLOCKER   E-STALL"), "{text}");
    bed.a().pod(&[&dry[..], &["--downtime", "1h"]].concat()).map(drop)
}

#[test]
fn who_wants_to_move_a_pod_that_is_being_saved_waits() -> Result<()> {
    let bed = Bed::new()?;
    bed.a().guest("counter", &[], 300)?;
    let quiet = |line: &[&str]| -> Result<std::process::Child> {
        let mut command = bed.a().command(line[0]);
        Ok(command.args(&line[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?)
    };
    // It stops while it writes, long before or after it holds the pod still; either way it is the one that has the pod.
    let mut saves = quiet(&["pod", "checkpoint", "create", "counter", "saved"])?;
    let pid = Pid::from_raw(program_of(&saves)?);
    let held = "flock -n -E 9 \"$(find /run -name capture.lock | head -1)\" true; test $? = 9";
    until_true("it to have the pod", SOON, || bed.a().run(&["sh", "-c", held]).is_ok())?;
    kill(pid, Signal::SIGSTOP)?;
    ensure!(bed.a().run(&["sh", "-c", held]).is_ok(), "it was done before it was stopped");
    // Another checkpoint is told so.
    let (code, told) = bed.a().pod_fails(&["checkpoint", "create", "counter", "other"])?;
    ensure!(code == 3 && told.contains("E-BUSY"), "{code}: {told}");
    // So is a move that has no time.
    let (code, told) = bed.a().pod_fails(&["migrate", "counter", "--to", "hostB", "--timeout", "1s"])?;
    ensure!(code == 15 && told.contains("waiting, for the pod is being saved"), "{code}: {told}");
    let log = bed.shared().join("waits");
    let out = std::fs::File::create(&log)?;
    let mut moves = bed.a().command("pod");
    let mut moves = moves.args(["drain", "--to", "hostB"]).stdout(out.try_clone()?).stderr(out).spawn()?;
    let waits = || std::fs::read_to_string(&log).is_ok_and(|text| text.contains("counter: waiting"));
    until_true("the move to wait", SOON, waits)?;
    kill(pid, Signal::SIGCONT)?;
    ensure!(saves.wait()?.success(), "it was not saved");
    ensure!(moves.wait()?.success(), "{}", std::fs::read_to_string(&log)?);
    ensure!(bed.b().runs("counter") && !bed.a().runs("counter"), "it did not move");
    ensure!(bed.a().pod(&["checkpoint", "ls"])?.contains("saved"));
    bed.b().pod(&["kill", "-s", "USR1", "counter"])?;
    said(bed.b(), "counter", "ok 1")
}

#[test]
fn who_wants_to_move_a_pod_that_is_being_moved_is_told_so() -> Result<()> {
    let bed = Bed::new()?;
    bed.a().guest("counter", &[], 60)?;
    let slow = ["migrate", "counter", "--to", "hostB", "--bandwidth", "4M"];
    let mut command = bed.a().command("pod");
    let mut moves = command.args(slow).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let jobs = || bed.a().pod(&["job", "ls", "--json"]);
    until_true("it to be under way", SOON, || jobs().is_ok_and(|jobs| jobs.contains("copying")))?;
    let id = json(&jobs()?)?["jobs"][0]["id"].as_str().context("no job")?.to_owned();
    let (code, told) = bed.a().pod_fails(&["migrate", "counter", "--to", "hostB"])?;
    ensure!(code == 3 && told.contains("E-BUSY") && told.contains(&format!("by job {id}")), "{code}: {told}");
    bed.a().pod(&["job", "abort", &id])?;
    ensure!(moves.wait()?.code() == Some(15) && bed.a().runs("counter"), "it was not stopped");
    Ok(())
}

/// A pod on the LAN itself, by both protocols.
fn on_the_lan(host: &Host) -> Result<()> {
    let lan = ["--network", "bridge:br0", "--ip", "10.77.0.100/24", "--ip", "fd77::100/64"];
    host.pod(&[&["run", "-d", "--name", "web"], &lan[..], &["--", "sleep", "1000"]].concat()).map(drop)
}

/// What a check and a move say, which leaves the pod where it was.
fn refused(bed: &Bed, code: &str, text: &str) -> Result<()> {
    let checked = bed.a().output(&["pod", "check", "web", "--to", "hostB", "--quick"])?;
    let said = String::from_utf8_lossy(&checked.stdout).into_owned();
    ensure!(checked.status.code() == Some(10) && said.contains(code) && said.contains(text), "{said}");
    let (exit, said) = bed.a().pod_fails(&["migrate", "web", "--to", "hostB"])?;
    ensure!(exit == 11 && said.contains(code) && said.contains(text), "{exit}: {said}");
    ensure!(bed.a().runs("web") && !bed.b().runs("web"), "it does not run on where it was");
    bed.a().pod(&["explain", code]).map(drop)
}

#[test]
fn an_address_that_somebody_else_has_is_seen_before() -> Result<()> {
    let bed = Bed::new()?;
    on_the_lan(bed.a())?;
    // The pod itself answers for its addresses, and that is no reason.
    bed.a().pod(&["check", "web", "--to", "hostB", "--quick"])?;
    for (address, option) in [("10.77.0.100", "-4"), ("fd77::100", "-6")] {
        let single = if option == "-4" { format!("{address}/32") } else { format!("{address}/128") };
        let mut add = vec!["ip", option, "addr", "add", &single, "dev", "br0"];
        add.extend((option == "-6").then_some("nodad"));
        bed.client().run(&add)?;
        refused(&bed, "E-ADDRESS-TAKEN", &format!("{address} is in use by a station of the LAN"))?;
        bed.client().run(&["ip", option, "addr", "del", &single, "dev", "br0"])?;
    }
    bed.a().pod(&["migrate", "web", "--to", "hostB"])?;
    // And so does a host that has it.
    bed.a().run(&["ip", "addr", "add", "10.77.0.100/32", "dev", "lo"])?;
    let (exit, said) = bed.b().pod_fails(&["migrate", "web", "--to", "hostA"])?;
    ensure!(exit == 11 && said.contains("E-ADDRESS-TAKEN"), "{exit}: {said}");
    Ok(())
}

#[test]
fn a_lan_with_smaller_frames_is_seen_before() -> Result<()> {
    let bed = Bed::new()?;
    on_the_lan(bed.a())?;
    let mtu = |size: &str| bed.b().run(&["ip", "link", "set", "br0", "mtu", size]);
    mtu("1400")?;
    refused(&bed, "E-MTU", "frames of up to 1500 bytes")?;
    mtu("1500")?;
    bed.a().pod(&["migrate", "web", "--to", "hostB"]).map(drop)
}

#[test]
fn two_hosts_are_looked_at_together() -> Result<()> {
    let bed = Bed::new()?;
    let output = bed.a().output(&["pod", "doctor", "--to", "hostB", "--json"])?;
    let answer = json(&String::from_utf8_lossy(&output.stdout))?;
    let all = answer["findings"].as_array().context("no findings")?;
    for what in ["pod", "clock", "free", "link", "processor", "kernel", "overlay"] {
        let name = format!("hostB: {what}");
        let one =
            all.iter().find(|one| one["what"] == name.as_str()).with_context(|| format!("no {name}: {answer}"))?;
        ensure!(what == "free" || one["health"] == "ok", "{one}");
    }
    ensure!(all.iter().any(|one| one["what"] == "kernel") && answer["processor"]["flags"].is_array(), "{answer}");
    let nowhere = bed.a().output(&["pod", "doctor", "--to", "nowhere"])?;
    let text = String::from_utf8_lossy(&nowhere.stdout).into_owned();
    ensure!(nowhere.status.code() == Some(1) && text.contains("FAIL  nowhere: reach"), "{text}");
    Ok(())
}

#[test]
fn a_move_can_be_looked_up_afterwards() -> Result<()> {
    let bed = Bed::new()?;
    bed.a().pod(&["run", "-d", "--name", "web", "--network", "none", "--", "sleep", "1000"])?;
    let moved = json(&bed.a().pod(&["migrate", "web", "--to", "hostB", "--json"])?)?;
    let id = moved["job"].as_str().context("no job")?;
    let info = bed.a().pod(&["job", "info", id])?;
    ensure!(info.contains("to hostB, done") && info.contains(&format!("pod job log {id}")), "{info}");
    ensure!(bed.b().pod(&["job", "info", id])?.contains("from hostA, running"));
    let log = json(&bed.a().pod(&["job", "log", id, "--json"])?)?;
    let lines = log["lines"].as_array().context("no lines")?;
    ensure!(lines.iter().any(|line| line["text"] == "commit" && line["time"].is_string()), "{log}");
    let (code, said) = bed.a().pod_fails(&["job", "abort", id])?;
    ensure!(code == 3 && said.contains("is over"), "{code}: {said}");
    let (_, said) = bed.a().pod_fails(&["job", "info", "abcdef99"])?;
    ensure!(said.contains("E-NOJOB"), "{said}");
    Ok(())
}
