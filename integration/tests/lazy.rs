//! `pod restore --lazy`: a pod runs before all of its memory is there, and never with memory that is not its own, whoever is
//! killed meanwhile. That what each guest holds survives it is shown by `moves.rs`.

use anyhow::{Context, Result, ensure};
use integration::bed::{self, Bed, Host};
use integration::pods::said;
use integration::wait::{SOON, until_true};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// MiB: so much that the filler is met at work.
const BALLAST: u32 = 300;
/// A guest that says nothing by itself.
const POD: &str = "eventfd";

/// A pod with much memory, which was saved in a file and removed.
struct Saved {
    bed: Bed,
    file: String,
}

impl Saved {
    fn new() -> Result<Saved> {
        let bed = Bed::new()?;
        bed.a().guest(POD, &[], BALLAST)?;
        let file = bed.shared().join("much.pod").to_string_lossy().into_owned();
        bed.a().pod(&["checkpoint", "create", POD, "-e", &file, "--compress", "none"])?;
        bed.a().pod(&["rm", "-f", POD])?;
        Ok(Saved { bed, file })
    }

    fn host(&self) -> &Host {
        self.bed.a()
    }

    /// Runs again, with a filler that does nothing until it is told to: its pid.
    fn restore_and_hold(&self) -> Result<String> {
        self.host().pod(&["restore", "--lazy", "-i", &self.file])?;
        let filler = process(self.host(), "pod-filler").context("there is no filler")?;
        self.host().run(&["kill", "-STOP", &filler])?;
        ensure!(self.inspect("MemoryToCome")? == "true", "all memory is there already");
        Ok(filler)
    }

    fn inspect(&self, field: &str) -> Result<String> {
        self.host().pod(&["inspect", "-f", &format!("{{{{.{field}}}}}"), POD]).map(|text| text.trim().to_owned())
    }

    fn verifies(&self, round: usize) -> Result<()> {
        self.host().pod(&["kill", "-s", "USR1", POD])?;
        said(self.host(), POD, &format!("ok {round}"))
    }

    /// Filled, and nobody is left who did it.
    fn is_filled(&self) -> Result<()> {
        until_true("all memory to be there", SOON, || self.inspect("MemoryToCome").is_ok_and(|word| word == "false"))?;
        until_true("the fillers to be gone", SOON, || {
            ["pod-filler", "pod-keeper"].iter().all(|name| process(self.host(), name).is_none())
        })
    }

    fn ended_because(&self, why: &str) -> Result<()> {
        until_true("the pod to be ended", SOON, || self.inspect("State").is_ok_and(|state| state == "exited"))?;
        let problem = self.inspect("Problem")?;
        ensure!(problem.contains(why), "it was ended because: {problem}");
        self.host().pod(&["rm", POD])?;
        self.is_gone()
    }

    fn is_gone(&self) -> Result<()> {
        until_true("the fillers to be gone", SOON, || {
            ["pod-filler", "pod-keeper"].iter().all(|name| process(self.host(), name).is_none())
        })
    }
}

fn process(host: &Host, name: &str) -> Option<String> {
    let found = host.run(&["pgrep", "-x", name]).ok()?;
    found.lines().next().map(str::to_owned)
}

/// MiB that the pod's program has in memory.
fn resident(saved: &Saved) -> Result<u64> {
    let pid = saved.inspect("Pid")?;
    let status = saved.host().run(&["cat", &format!("/proc/{pid}/status")])?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("a line VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? >> 10)
}

#[test]
fn a_pod_runs_before_its_memory_is_there() -> Result<()> {
    let saved = Saved::new()?;
    let before = saved.bed.census()?;
    let filler = saved.restore_and_hold()?;
    let there = resident(&saved)?;
    ensure!(there < 200, "{there} MiB of {BALLAST} are there when it runs");
    // Whoever would read its memory waits for it.
    let pod = bed::pod_program().context("pod is built with us")?;
    let mut save = saved.host().command(&pod.to_string_lossy()).args(["checkpoint", "create", POD, "again"]).spawn()?;
    let waits = || saved.host().run(&["cat", "/proc/locks"]).is_ok_and(|locks| locks.contains("-> FLOCK"));
    until_true("the checkpoint to wait for the memory", SOON, waits)?;
    ensure!(save.try_wait()?.is_none(), "the checkpoint has not waited");
    saved.host().run(&["kill", "-CONT", &filler])?;
    ensure!(save.wait()?.success(), "the checkpoint failed");
    saved.is_filled()?;
    saved.verifies(1)?;
    saved.host().pod(&["rm", "-f", POD])?;
    saved.host().pod(&["restore", "again"])?;
    saved.verifies(1)?;
    saved.host().pod(&["rm", "-f", POD])?;
    saved.host().pod(&["checkpoint", "rm", "again"])?;
    saved.bed.nothing_left(&before)
}

/// Without it pages would read as zeros.
#[test]
fn without_its_filler_a_pod_is_ended() -> Result<()> {
    let saved = Saved::new()?;
    let filler = saved.restore_and_hold()?;
    saved.host().run(&["kill", "-KILL", &filler])?;
    saved.ended_because("ended by signal 9")
}

#[test]
fn without_its_keeper_a_filler_finds_another() -> Result<()> {
    let saved = Saved::new()?;
    let before = saved.bed.census()?;
    let filler = saved.restore_and_hold()?;
    let keeper = process(saved.host(), "pod-keeper").context("there is no keeper")?;
    saved.host().run(&["kill", "-KILL", &keeper])?;
    saved.host().run(&["kill", "-CONT", &filler])?;
    // The filler becomes the keeper, if there is anything left to do.
    saved.verifies(1)?;
    saved.is_filled()?;
    saved.verifies(2)?;
    saved.host().pod(&["rm", "-f", POD])?;
    saved.bed.nothing_left(&before)
}

#[test]
fn without_its_monitor_a_pod_is_filled() -> Result<()> {
    let saved = Saved::new()?;
    let filler = saved.restore_and_hold()?;
    saved.host().run(&["kill", "-KILL", &saved.inspect("MonitorPid")?])?;
    saved.host().run(&["kill", "-CONT", &filler])?;
    saved.is_filled()?;
    let there = resident(&saved)?;
    ensure!(there >= 300 && saved.inspect("State")? == "running", "{there} MiB are there");
    saved.host().pod(&["rm", "-f", POD])?;
    saved.is_gone()
}

/// Which is found out when it runs already.
#[test]
fn a_pod_with_a_damaged_page_is_ended() -> Result<()> {
    let saved = Saved::new()?;
    let before = saved.bed.census()?;
    let file = File::options().read(true).write(true).open(&saved.file)?;
    // What lies between two runs of pages is a page of zeros, but for headers: damage there is found out too early.
    let mut page = [0; 4096];
    let mut at = file.metadata()?.len() / 2 / 4096 * 4096;
    file.read_exact_at(&mut page, at)?;
    while page.iter().filter(|byte| **byte == 0).count() > page.len() / 2 {
        at += page.len() as u64;
        file.read_exact_at(&mut page, at)?;
    }
    file.write_all_at(&[page[0] ^ 4], at)?;
    saved.host().pod(&["restore", "--lazy", "-i", &saved.file])?;
    saved.ended_because("E-IMAGE-DAMAGED")?;
    saved.bed.nothing_left(&before)
}
