//! Many pods off a host: what goes where, what stays and is named, what one failure does to the others, and ctrl-C.

use anyhow::{Context, Result, ensure};
use integration::bed::host::program_of;
use integration::bed::{Bed, Config, Host};
use integration::pods::said;
use integration::wait::{SOON, until_true};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::process::Stdio;

/// Three hosts.
fn bed() -> Result<Bed> {
    Bed::up(&Config { hosts: ["hostA", "hostB", "hostC"].map(String::from).into(), ..Config::fresh() })
}

/// A pod that does nothing and can be moved.
fn sleeper(host: &Host, name: &str) -> Result<()> {
    host.pod(&["run", "-d", "--name", name, "--network", "none", "--", "sleep", "1000"]).map(drop)
}

/// One that cannot: it has the network of its host.
fn rooted(host: &Host, name: &str) -> Result<()> {
    host.pod(&["run", "-d", "--name", name, "--network", "host", "--", "sleep", "1000"]).map(drop)
}

/// What `pod drain --json` and its kin say, and the exit code.
fn drained(host: &Host, args: &[&str]) -> Result<(i32, Value)> {
    let output = host.output(&[&["pod"], args, &["--json"]].concat())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let value = serde_json::from_str(&text).with_context(|| format!("{args:?}: {text}{said}"))?;
    Ok((output.status.code().unwrap_or(-1), value))
}

fn of<'a>(value: &'a Value, pod: &str) -> Result<&'a Value> {
    let all = value["pods"].as_array().context("no pods")?;
    all.iter().find(|one| one["pod"] == pod).with_context(|| format!("no {pod} in {value}"))
}

#[test]
fn a_host_is_emptied_onto_two_and_another_takes_it_back() -> Result<()> {
    let bed = bed()?;
    let (a, b, c) = (bed.a(), bed.b(), bed.host("hostC"));
    let before = bed.census()?;
    a.guest("counter", &[], 40)?;
    for name in ["one", "two", "three"] {
        sleeper(a, name)?;
    }
    let (code, plan) = drained(a, &["drain", "--to", "hostB,hostC", "--dry-run"])?;
    ensure!(code == 0 && plan["moved"] == 0 && a.runs("counter"), "{plan}");
    ensure!(of(&plan, "counter")?["became"] == "would_move", "{plan}");
    ensure!(of(&plan, "counter")?["memory_bytes"].as_u64() > Some(40 << 20), "{plan}");
    ensure!(plan["pods"][0]["pod"] == "counter", "the largest is not the first: {plan}");

    let output = a.output(&["pod", "drain", "--to", "hostB,hostC", "-j", "3"])?;
    let (table, told) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{table}{told}");
    ensure!(table.lines().count() == 5 && table.contains("counter"), "{table}");
    ensure!(told.contains("one: commit") && told.contains("counter: pass 2:"), "without its name before it: {told}");
    ensure!(told.contains("4 of 4 moved; none runs here any more"), "{told}");
    let on = |host: &Host| ["counter", "one", "two", "three"].iter().filter(|name| host.runs(name)).count();
    ensure!((on(a), on(b) + on(c)) == (0, 4) && on(b) > 0 && on(c) > 0, "{} on B, {} on C", on(b), on(c));

    // Both come back, asked from the first, by their own `pod drain` over ssh.
    for name in ["counter", "one", "two", "three"] {
        a.pod(&["rm", name])?;
    }
    for from in ["hostB", "hostC"] {
        let (code, back) = drained(a, &["drain", from, "--to", "hostA"])?;
        ensure!(code == 0 && back["running_here"].as_array().is_some_and(Vec::is_empty), "{code}: {back}");
    }
    ensure!(on(a) == 4, "{} came back", on(a));
    a.pod(&["kill", "-s", "USR1", "counter"])?;
    said(a, "counter", "ok 1")?;
    for host in [a, b, c] {
        let tombs = host.pod(&["ps", "-aq"])?;
        for id in tombs.lines() {
            host.pod(&["rm", "-f", id])?;
        }
    }
    bed.nothing_left(&before)
}

#[test]
fn what_cannot_go_is_named_and_the_others_go() -> Result<()> {
    let bed = bed()?;
    let (a, b) = (bed.a(), bed.b());
    sleeper(a, "free")?;
    sleeper(a, "taken")?;
    rooted(a, "rooted")?;
    sleeper(b, "taken")?;
    let to = ["drain", "--to", "hostB"];
    let (code, strict) = drained(a, &[&to[..], &["--strict"]].concat())?;
    ensure!(code == 11 && strict["moved"] == 0 && a.runs("free") && !b.runs("free"), "{code}: {strict}");
    let (code, plan) = drained(a, &[&to[..], &["--dry-run"]].concat())?;
    ensure!(code == 11 && of(&plan, "rooted")?["errors"][0]["code"] == "E-NETWORK-HOST", "{plan}");

    let output = a.output(&["pod", "drain", "--to", "hostB,nowhere"])?;
    let (table, told) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.code() == Some(11), "{table}{told}");
    let at = |text: &str| told.find(text).with_context(|| format!("{text:?} is not in: {told}"));
    at("nowhere takes no part: E-LINK")?;
    let named = at("rooted cannot go: E-NETWORK-HOST")?.max(at("taken cannot go: E-NAME: hostB: ")?);
    ensure!(named < at("free: connect to hostB")?, "only after something was moved: {told}");
    ensure!(b.runs("free") && a.runs("taken") && a.runs("rooted"), "{table}");
    ensure!(at("1 of 3 moved; still here: rooted, taken").is_ok(), "{told}");
    // Where no host answers, nothing goes.
    let (code, none) = drained(a, &["drain", "--to", "nowhere"])?;
    ensure!(code == 12 && of(&none, "taken")?["errors"][0]["code"] == "E-LINK", "{code}: {none}");
    // The other host takes what the first does not.
    let (code, third) = drained(a, &["migrate", "--all", "--to", "hostB,hostC"])?;
    ensure!(code == 10 && of(&third, "taken")?["to"] == "hostC" && bed.host("hostC").runs("taken"), "{code}: {third}");
    Ok(())
}

#[test]
fn one_that_fails_on_its_way_keeps_no_other_from_going() -> Result<()> {
    let bed = bed()?;
    let (a, b) = (bed.a(), bed.b());
    a.guest("counter", &[], 60)?;
    sleeper(a, "one")?;
    // Slow enough that only the large one takes too long.
    let (code, report) = drained(a, &["drain", "--to", "hostB", "-j", "1", "--bandwidth", "8M", "--timeout", "4s"])?;
    let (counter, one) = (of(&report, "counter")?, of(&report, "one")?);
    ensure!(code == 15 && counter["became"] == "aborted" && counter["errors"][0]["code"] == "E-TIMEOUT", "{report}");
    ensure!(counter["job"].as_str().is_some_and(|job| a.pod(&["job", "info", job]).is_ok()), "{report}");
    ensure!(one["became"] == "moved" && one["report"]["frozen_ms"].as_f64() > Some(0.0), "{report}");
    ensure!(b.runs("one") && a.runs("counter") && !b.runs("counter"), "{report}");
    ensure!(report["running_here"].as_array().is_some_and(|left| left.len() == 1), "{report}");
    Ok(())
}

/// A slow drain, of which a pod is under way and one waits for its turn.
fn slow(bed: &Bed, at: &Host, host: Option<&str>) -> Result<std::process::Child> {
    bed.a().guest("counter", &[], 60)?;
    sleeper(bed.a(), "one")?;
    let mut command = at.command("pod");
    command.arg("drain").args(host).args(["--to", "hostB", "-j", "1", "--bandwidth", "4M", "--json"]);
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let copying = || bed.a().pod(&["job", "ls"]).is_ok_and(|jobs| jobs.contains("copying"));
    until_true("the first to be under way", SOON, copying)?;
    Ok(child)
}

fn stopped(bed: &Bed, child: std::process::Child) -> Result<()> {
    let output = child.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let report: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    ensure!(report["exit_code"] == 15 && report["moved"] == 0, "{report}");
    ensure!(of(&report, "counter")?["errors"][0]["code"] == "E-ABORTED", "{report}");
    ensure!(of(&report, "one")?["became"] == "not_begun", "{report}");
    for name in ["counter", "one"] {
        ensure!(bed.a().runs(name) && !bed.b().runs(name), "{name} does not run on where it was");
    }
    bed.a().pod(&["kill", "-s", "USR1", "counter"])?;
    said(bed.a(), "counter", "ok 1")
}

#[test]
fn ctrl_c_leaves_all_that_are_before_their_commit_where_they_were() -> Result<()> {
    let bed = bed()?;
    let child = slow(&bed, bed.a(), None)?;
    kill(Pid::from_raw(program_of(&child)?), Signal::SIGINT)?;
    stopped(&bed, child)
}

#[test]
fn ctrl_c_reaches_the_drain_of_another_host() -> Result<()> {
    let bed = bed()?;
    let child = slow(&bed, bed.host("hostC"), Some("hostA"))?;
    kill(Pid::from_raw(program_of(&child)?), Signal::SIGINT)?;
    stopped(&bed, child)
}

#[test]
fn who_drains_another_host_and_is_killed_leaves_its_pods_there() -> Result<()> {
    let bed = bed()?;
    let mut child = slow(&bed, bed.host("hostC"), Some("hostA"))?;
    kill(Pid::from_raw(program_of(&child)?), Signal::SIGKILL)?;
    child.wait()?;
    let over = || bed.a().pod(&["job", "ls"]).is_ok_and(|jobs| !jobs.contains("copying"));
    until_true("the move to be given up", SOON, over)?;
    for name in ["counter", "one"] {
        ensure!(bed.a().runs(name) && !bed.b().runs(name), "{name} does not run on where it was");
    }
    Ok(())
}
