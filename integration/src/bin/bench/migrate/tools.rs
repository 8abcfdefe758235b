//! Clients that others wrote: wrk and pgbench. They run for ever, are ended by the signal that they take for the end of their
//! time, and say at the end what went wrong.

use super::clock;
use super::load::{Heard, Sample};
use anyhow::{Context, Result, ensure};
use integration::bed::host::program_of;
use integration::bed::{Bed, Host};
use integration::pods::ADDRESS;
use integration::wait::until_true;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

/// Longer than any run of moves.
const FOR_EVER: &str = "86400";

/// A program on the client host that writes to a file.
struct Tool {
    child: Child,
    out: PathBuf,
}

impl Tool {
    fn start(bed: &Bed, line: &[&str]) -> Result<Tool> {
        let out = bed.shared().join(line[0]);
        let file = File::create(&out)?;
        let mut command = bed.client().command(line[0]);
        command.args(&line[1..]).stdin(Stdio::null()).stderr(file.try_clone()?).stdout(file);
        Ok(Tool { child: command.spawn()?, out })
    }

    /// Tells it that its time is over: all that it said.
    fn end(mut self, signal: Signal) -> Result<String> {
        if self.child.try_wait()?.is_none() {
            kill(Pid::from_raw(program_of(&self.child)?), signal)?;
        }
        let mut status = None;
        until_true("a client to end", Duration::from_secs(70), || {
            status = self.child.try_wait().ok().flatten();
            status.is_some()
        })?;
        let said = std::fs::read_to_string(&self.out)?;
        ensure!(status.is_some_and(|status| status.success()), "{said}");
        Ok(said)
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub struct Wrk(Tool);

impl Wrk {
    pub fn start(bed: &Bed, url: &str, connections: u32) -> Result<Wrk> {
        let connections = connections.to_string();
        Ok(Wrk(Tool::start(bed, &["wrk", "-t2", "-c", &connections, "-d", FOR_EVER, url])?))
    }

    /// Adds what it says to what was heard beside it.
    pub fn finish(self, heard: &mut Heard) -> Result<()> {
        let said = self.0.end(Signal::SIGINT)?;
        let line = |word: &str| said.lines().map(str::trim).find(|line| line.starts_with(word));
        heard
            .errors
            .extend(["Socket errors", "Non-2xx"].iter().filter_map(|word| Some(format!("wrk: {}", line(word)?))));
        let rate = line("Requests/sec").with_context(|| format!("wrk says {said}"))?;
        heard.notes.push(format!("wrk: {}", rate.split_whitespace().collect::<Vec<_>>().join(" ")));
        heard.slowest = line("Latency").and_then(|line| in_ms(line.split_whitespace().nth(3)?));
        Ok(())
    }
}

/// A time as wrk writes it.
fn in_ms(text: &str) -> Option<f64> {
    let units = [("us", 1e-3), ("ms", 1.0), ("s", 1e3), ("m", 6e4)];
    let (unit, times) = units.into_iter().find(|(unit, _)| text.ends_with(unit))?;
    Some(text.strip_suffix(unit)?.parse::<f64>().ok()? * times)
}

pub struct Pgbench {
    tool: Tool,
    client: Host,
    logs: PathBuf,
    epoch: u64,
}

const LOG: &str = "transactions";

fn ask(client: &Host, question: &str) -> Result<String> {
    let answer = client.run(&["psql", "-h", ADDRESS, "-U", "postgres", "-XAtc", question])?;
    Ok(answer.trim().into())
}

impl Pgbench {
    pub fn start(bed: &Bed) -> Result<Pgbench> {
        let client = bed.client().clone();
        until_true("postgres to take connections", Duration::from_secs(60), || ask(&client, "select 1").is_ok())?;
        const THERE: [&str; 4] = ["-h", ADDRESS, "-U", "postgres"];
        client.run(&[&["pgbench"], &THERE[..], &["-i", "-q", "-s", "10", "postgres"]].concat())?;
        let (logs, epoch) = (bed.shared(), clock::since_epoch()?);
        let prefix = logs.join(LOG).display().to_string();
        let load = ["-c", "8", "-j", "1", "-n", "-T", FOR_EVER, "-l", "--log-prefix", &prefix, "postgres"];
        let tool = Tool::start(bed, &[&["pgbench"], &THERE[..], &load].concat())?;
        let written = || ask(&client, "select count(*) > 100 from pgbench_history").is_ok_and(|answer| answer == "t");
        until_true("pgbench to have written", Duration::from_secs(60), written)?;
        Ok(Pgbench { tool, client, logs, epoch })
    }

    pub fn finish(self) -> Result<Heard> {
        // What its own alarm sends: every client ends its transaction.
        let said = self.tool.end(Signal::SIGALRM)?;
        let mut heard = Heard { samples: transactions(&self.logs, self.epoch)?, ..Heard::default() };
        if !said.contains("number of failed transactions: 0 ") || said.contains("aborted") {
            heard.errors.push(format!("pgbench: {said}"));
        }
        let acknowledged = heard.samples.len();
        let found = ask(&self.client, "select count(*) from pgbench_history")?;
        if found != acknowledged.to_string() {
            heard.errors.push(format!("{acknowledged} transactions were acknowledged, {found} are there"));
        }
        let sums = "select count(distinct sum) from (select sum(abalance) from pgbench_accounts union all select \
                    sum(bbalance) from pgbench_branches union all select sum(tbalance) from pgbench_tellers union all \
                    select sum(delta) from pgbench_history) all_sums";
        let sums = ask(&self.client, sums)?;
        if sums != "1" {
            heard.errors.push(format!("accounts, branches, tellers and history have {sums} different sums"));
        }
        heard
            .notes
            .push(format!("{acknowledged} transactions acknowledged, {found} found, balances agree: {}", sums == "1"));
        Ok(heard)
    }
}

/// Out of the logs of pgbench: a line each with client, number, how long, script, and when it ended by the time of the day.
fn transactions(logs: &Path, epoch: u64) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    for entry in std::fs::read_dir(logs)? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(LOG)) {
            let text = std::fs::read_to_string(&path)?;
            for line in text.lines() {
                samples.push(transaction(line, epoch).with_context(|| format!("pgbench logs {line:?}"))?);
            }
        }
    }
    samples.sort_by_key(|sample| sample.replied);
    Ok(samples)
}

fn transaction(line: &str, epoch: u64) -> Option<Sample> {
    let numbers = line.split_whitespace().map(|word| word.parse::<u64>().ok()).collect::<Option<Vec<_>>>()?;
    let [_client, _number, took, _script, seconds, micros] = numbers[..] else { return None };
    let replied = (seconds * 1_000_000 + micros) * 1000 - epoch;
    Some(Sample { due: replied - took * 1000, replied })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_wrk_are_understood() {
        assert_eq!((in_ms("2.50ms"), in_ms("1.20s"), in_ms("x")), (Some(2.5), Some(1200.0), None));
        assert!(in_ms("630.00us").is_some_and(|ms| (ms - 0.63).abs() < 1e-9));
    }

    #[test]
    fn a_line_of_pgbench_is_a_transaction() {
        let sample = transaction("0 199 2241 0 1175850568 995598", 1_175_850_568_000_000_000).unwrap();
        assert_eq!((sample.due, sample.replied), (993_357_000, 995_598_000));
        assert_eq!(transaction("0 199", 0), None);
    }
}
