//! Connections whose other end is a pod too, or a host that the pod comes to or leaves: they survive the move of either, and of both
//! at once, by IPv4 and by IPv6.

use anyhow::{Context, Result, bail, ensure};
use integration::bed::{Bed, Host};
use integration::pods::said;
use integration::wait::{SOON, until};
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};

/// How far the one who calls has to come after each step.
const FURTHER: u64 = 20;

fn peers(bed: &Bed) -> Result<String> {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/between/peers.py");
    let path = bed.shared().join("peers.py");
    fs::copy(source, &path).with_context(|| source.to_owned())?;
    Ok(path.to_string_lossy().into_owned())
}

fn v4(number: u8) -> String {
    format!("10.77.0.{number}")
}

fn v6(number: u8) -> String {
    format!("fd77::{number}")
}

/// A pod on the LAN that serves or calls.
fn pod(host: &Host, peers: &str, name: &str, number: u8, args: &[&str]) -> Result<()> {
    let (four, six) = (format!("{}/24", v4(number)), format!("{}/64", v6(number)));
    let head = ["run", "-d", "--name", name, "--network", "bridge:br0", "--ip", &four, "--ip", &six];
    let volume = format!("{peers}:{peers}:ro,shared");
    host.pod(&[&head, &["-v", &volume, "--", "python3", peers][..], args].concat()).map(drop)
}

/// The last that a log says of how far it has come.
fn at(log: &str) -> Result<u64> {
    if let Some(fail) = log.lines().find(|line| line.starts_with("FAIL")) {
        bail!("{fail}");
    }
    Ok(log.lines().rev().find_map(|line| line.strip_prefix("at ")?.parse().ok()).unwrap_or(0))
}

/// Waits until the pod that calls has come further on each of its connections.
fn further(host: &Host, pod: &str, what: &str) -> Result<()> {
    let log = || host.pod(&["logs", pod]);
    let from = at(&log()?)?;
    let mut failed = None;
    let come = until(what, SOON, || match log().and_then(|log| at(&log)) {
        Ok(now) => (now >= from + FURTHER).then_some(()),
        Err(error) => {
            failed = Some(error);
            Some(())
        }
    });
    match failed {
        Some(error) => Err(error).with_context(|| what.to_owned()),
        None => come.with_context(|| format!("{what}: it stands at {from}")),
    }
}

fn moved(from: &Host, to: &Host, pod: &str) -> Result<()> {
    from.pod(&["migrate", pod, "--to", to.name()])?;
    from.pod(&["rm", pod]).map(drop)
}

/// Both at the same time.
fn both_moved(one: (&Host, &Host, &str), other: (&Host, &Host, &str)) -> Result<()> {
    std::thread::scope(|scope| {
        let other = scope.spawn(move || moved(other.0, other.1, other.2));
        moved(one.0, one.1, one.2)?;
        other.join().map_err(|_| anyhow::anyhow!("a thread"))?
    })
}

#[test]
fn two_pods_talk_on_whichever_of_them_moves() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    let peers = peers(&bed)?;
    let (a, b) = (bed.a(), bed.b());
    pod(a, &peers, "serves", 101, &["serve", "7000"])?;
    said(a, "serves", "ready")?;
    pod(a, &peers, "calls", 102, &["call", "7000", &v4(101), &v6(101)])?;
    further(a, "calls", "both on one host")?;
    moved(a, b, "serves")?;
    further(a, "calls", "who serves has gone to the other host")?;
    moved(a, b, "calls")?;
    further(b, "calls", "who calls has followed")?;
    both_moved((b, a, "serves"), (b, a, "calls"))?;
    further(a, "calls", "both have gone to the other host at once")?;
    moved(a, b, "calls")?;
    further(b, "calls", "who calls has gone to the other host")?;
    for round in 0..3 {
        let (here, there) = if round % 2 == 0 { (a, b) } else { (b, a) };
        both_moved((here, there, "serves"), (there, here, "calls"))?;
        further(here, "calls", "they have changed places")?;
    }
    both_moved((b, a, "serves"), (a, b, "calls"))?;
    further(b, "calls", "and back")?;
    a.pod(&["rm", "-f", "serves"])?;
    b.pod(&["rm", "-f", "calls"])?;
    bed.nothing_left(&before)
}

/// One who calls from a host itself.
struct Caller {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
    at: u64,
}

impl Caller {
    fn new(host: &Host, peers: &str, args: &[&str]) -> Result<Caller> {
        let mut command = host.command("python3");
        command.arg(peers).args(args).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let output = BufReader::new(child.stdout.take().context("a pipe")?);
        Ok(Caller { child, output, at: 0 })
    }

    /// Waits for a line, which the deadline of the test bounds: it says one as long as it comes on.
    fn further(&mut self, what: &str) -> Result<()> {
        let from = self.at;
        while self.at < from + FURTHER {
            let mut line = String::new();
            ensure!(self.output.read_line(&mut line)? > 0, "{what}: it ended");
            self.at = at(&line).with_context(|| what.to_owned())?.max(self.at);
        }
        Ok(())
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_host_and_a_pod_talk_on_when_the_pod_leaves_it_and_comes_back() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    let peers = peers(&bed)?;
    let (a, b) = (bed.a(), bed.b());
    pod(a, &peers, "serves", 101, &["serve", "7000"])?;
    said(a, "serves", "ready")?;
    // The host that it leaves, and the one that it comes to.
    let mut callers = [a, b].map(|host| Caller::new(host, &peers, &["call", "7000", &v4(101), &v6(101)]));
    let further = |callers: &mut [Result<Caller>; 2], what: &str| -> Result<()> {
        for (caller, from) in callers.iter_mut().zip(["hostA", "hostB"]) {
            let caller = caller.as_mut().map_err(|error| anyhow::anyhow!("{error:#}"))?;
            caller.at = caller.at.max(1);
            caller.further(&format!("{what}, from {from}"))?;
        }
        Ok(())
    };
    further(&mut callers, "at first")?;
    for _ in 0..2 {
        moved(a, b, "serves")?;
        further(&mut callers, "on hostB")?;
        moved(b, a, "serves")?;
        further(&mut callers, "on hostA")?;
    }
    drop(callers);
    a.pod(&["rm", "-f", "serves"])?;

    // And the other way round: the host serves.
    let addresses =
        [a.address().to_string(), a.address6().to_string(), b.address().to_string(), b.address6().to_string()];
    let servers = [a, b].map(|host| Caller::new(host, &peers, &["serve", "7002"]));
    until("the hosts to serve", SOON, || {
        let listens = |host: &Host| host.run(&["ss", "-Hltn", "sport = :7002"]).is_ok_and(|text| !text.is_empty());
        (listens(a) && listens(b)).then_some(())
    })?;
    let args: Vec<&str> = ["call", "7002"].into_iter().chain(addresses.iter().map(String::as_str)).collect();
    pod(a, &peers, "calls", 102, &args)?;
    self::further(a, "calls", "at first")?;
    for _ in 0..2 {
        moved(a, b, "calls")?;
        self::further(b, "calls", "on hostB")?;
        moved(b, a, "calls")?;
        self::further(a, "calls", "on hostA")?;
    }
    a.pod(&["rm", "-f", "calls"])?;
    drop(servers);
    bed.nothing_left(&before)
}
