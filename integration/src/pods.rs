//! Pods on the hosts of a bed, driven by the command line that a user has.

use crate::bed::{self, Bed, Census, Host};
use crate::wait;
use anyhow::{Context, Result, bail, ensure};
use std::io::Write;
use std::process::{Child, ChildStdin, Stdio};
use std::time::{Duration, Instant};

/// Above any command of `pod` here; one that hangs is killed and told apart from one that fails.
fn deadline() -> String {
    (100 * wait::patience()).to_string()
}

/// The address on the LAN that workloads have, with the prefix of the LAN.
pub const ADDRESS: &str = "10.77.0.100";

impl Host {
    /// `pod ARGS…` on this host: what it printed, or an error with all that it said.
    pub fn pod(&self, args: &[&str]) -> Result<String> {
        self.run(&[&["timeout", "-s", "KILL", &deadline(), "pod"], args].concat())
    }

    /// `pod ARGS…` that is expected to fail: its exit code and what it said on stderr.
    pub fn pod_fails(&self, args: &[&str]) -> Result<(i32, String)> {
        let output = self.output(&[&["timeout", "-s", "KILL", &deadline(), "pod"], args].concat())?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success(), "pod {} worked", args.join(" "));
        Ok((output.status.code().unwrap_or(-1), said))
    }

    /// Starts a guest in a pod that has its name, without a network; `options` are more of `pod run`, `ballast` MiB of memory
    /// beside it. Returns when it has set up what it holds.
    pub fn guest(&self, kind: &str, options: &[&str], ballast: u32) -> Result<()> {
        let guest = bed::beside_us("guest").context("guest is built with us")?.to_string_lossy().into_owned();
        let run = ["run", "-d", "--name", kind, "--network", "none"];
        self.pod(&[&run, options, &["--", &guest, kind, &ballast.to_string()]].concat())?;
        said(self, kind, "ready")
    }

    /// Whether the pod runs here, by what `pod ps` says.
    pub fn runs(&self, name: &str) -> bool {
        self.pod(&["ps"]).is_ok_and(|table| table.lines().any(|line| line.split_whitespace().next() == Some(name)))
    }

    /// Whether a TCP port answers, tried from this host.
    pub fn reaches(&self, address: &str, port: u16) -> bool {
        let line = format!(": </dev/tcp/{address}/{port}");
        self.output(&["timeout", "5", "bash", "-c", &line]).is_ok_and(|output| output.status.success())
    }
}

/// Waits until the log of a pod has that line.
pub fn said(host: &Host, pod: &str, line: &str) -> Result<()> {
    let mut log = String::new();
    let found = wait::until_true(&format!("{pod} to say {line:?}"), wait::SOON, || {
        log = host.pod(&["logs", pod]).unwrap_or_else(|error| format!("{error:#}"));
        log.lines().any(|said| said.trim() == line) || log.lines().any(|said| said.starts_with("FAIL"))
    });
    let tail: Vec<&str> = log.lines().rev().take(10).collect();
    found.with_context(|| format!("the log of {pod} on {} ends (newest first): {tail:#?}", host.name()))?;
    if let Some(fail) = log.lines().find(|said| said.starts_with("FAIL")) {
        bail!("{pod} on {}: {fail}", host.name());
    }
    Ok(())
}

/// A client of the `client` program that runs on the bed's client host.
#[derive(Debug)]
pub struct Client {
    child: Child,
    stdin: Option<ChildStdin>,
    log: std::path::PathBuf,
    checks: usize,
}

/// What a client says at the end.
#[derive(Debug, Clone)]
pub struct Summary {
    pub text: String,
    pub longest: Duration,
}

impl Client {
    /// Starts it and waits until it is connected.
    pub fn start(bed: &Bed, args: &[&str]) -> Result<Client> {
        let program = crate::bed::beside_us("client").context("client is built with us")?;
        let log = bed.shared().join(format!("client-{}", args.join("-").replace(['/', ':'], "_")));
        let out = std::fs::File::create(&log)?;
        let mut command = bed.client().command(&program.to_string_lossy());
        command.args(args).stdin(Stdio::piped()).stderr(out.try_clone()?).stdout(out);
        let mut child = command.spawn()?;
        let mut client = Client { stdin: child.stdin.take(), child, log, checks: 0 };
        wait::until_true("a client to be ready", wait::SOON, || client.text().lines().any(|line| line == "ready"))
            .with_context(|| client.text())?;
        ensure!(client.child.try_wait()?.is_none(), "the client ended: {}", client.text());
        Ok(client)
    }

    fn text(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Has it read back all that was ever acknowledged to it, over the connections that it has had from the beginning.
    pub fn check(&mut self) -> Result<()> {
        self.checks += 1;
        let (line, mut stdin) = (format!("checked {}", self.checks), self.stdin.as_ref().context("it has ended")?);
        writeln!(stdin, "check")?;
        let mut ended = false;
        wait::until_true("a client to check what it wrote", Duration::from_secs(130), || {
            ended = matches!(self.child.try_wait(), Ok(Some(_)) | Err(_));
            ended || self.text().lines().any(|said| said == line)
        })
        .with_context(|| self.text())?;
        ensure!(self.text().lines().any(|said| said == line), "the client lost something:\n{}", self.text());
        Ok(())
    }

    /// Ends it: an error unless every request was answered rightly and every connection kept.
    pub fn finish(mut self) -> Result<Summary> {
        drop(self.stdin.take());
        let mut ended = None;
        wait::until_true("a client to end", Duration::from_secs(70), || {
            ended = self.child.try_wait().ok().flatten();
            ended.is_some()
        })?;
        let text = self.text();
        ensure!(ended.is_some_and(|status| status.success()), "the client lost something:\n{text}");
        let longest = text.lines().find_map(|line| line.strip_prefix("longest pause: ")?.strip_suffix(" ms"));
        let longest: f64 = longest.context("a summary has the longest pause")?.parse()?;
        Ok(Summary { text, longest: Duration::from_secs_f64(longest / 1000.0) })
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Moves a pod between the first two hosts that many times, starting from wherever it is; tells how long each took.
pub fn move_around(bed: &Bed, pod: &str, moves: usize) -> Result<Vec<Duration>> {
    let mut times = Vec::new();
    let (mut from, mut to) = if bed.a().runs(pod) { (bed.a(), bed.b()) } else { (bed.b(), bed.a()) };
    for step in 1..=moves {
        let start = Instant::now();
        from.pod(&["migrate", pod, "--to", to.name()]).with_context(|| format!("move {step} of {moves}"))?;
        times.push(start.elapsed());
        ensure!(to.runs(pod), "{pod} does not run on {} after move {step}", to.name());
        ensure!(!from.runs(pod), "{pod} still runs on {} after move {step}", from.name());
        from.pod(&["rm", pod]).with_context(|| format!("remove the tombstone of move {step}"))?;
        std::mem::swap(&mut from, &mut to);
    }
    Ok(times)
}

/// Saves a pod and stops it with that, so that its clients hear nothing of it, and restores it; that many times.
pub fn stop_and_restore(host: &Host, pod: &str, times: usize) -> Result<()> {
    for round in 1..=times {
        let name = format!("{pod}-{round}");
        host.pod(&["checkpoint", "create", pod, &name, "--stop"]).with_context(|| format!("checkpoint {round}"))?;
        ensure!(!host.runs(pod), "{pod} runs after it was saved and stopped");
        host.pod(&["restore", &name]).with_context(|| format!("restore {round}"))?;
        ensure!(host.runs(pod), "{pod} does not run after its restore");
        host.pod(&["checkpoint", "rm", &name])?;
    }
    Ok(())
}

/// Saves a pod, which runs on, kills and removes it, and restores it to what it was; `how` are options of that.
pub fn kill_and_restore(host: &Host, pod: &str, how: &[&str]) -> Result<()> {
    host.pod(&["checkpoint", "create", pod, pod])?;
    ensure!(host.runs(pod), "{pod} does not run after its checkpoint");
    host.pod(&["rm", "-f", pod])?;
    host.pod(&[&["restore", pod], how].concat())?;
    ensure!(host.runs(pod), "{pod} does not run after its restore");
    host.pod(&["checkpoint", "rm", pod]).map(drop)
}

/// How often a workload goes there and back: `$MOVES` by hand, fewer in CI.
pub fn rounds() -> usize {
    std::env::var("MOVES").ok().and_then(|text| text.parse().ok()).unwrap_or(2)
}

impl Bed {
    /// A census of each host but the client's, after they have what the first pod and the first checkpoint of a host
    /// make for good: the default network and the folders of the store.
    pub fn census(&self) -> Result<Vec<Census>> {
        for host in self.homes() {
            host.pod(&["run", "-d", "--name", "first", "--", "sleep", "1000"])?;
            host.pod(&["checkpoint", "create", "first", "first"])?;
            host.pod(&["checkpoint", "rm", "first"])?;
            host.pod(&["rm", "-f", "first"])?;
            // Its last act is to have the disk hold what the pod wrote, which takes as long as the disk is busy.
            let gone = || host.output(&["pgrep", "-x", "pod-monitor"]).is_ok_and(|found| !found.status.success());
            wait::until_true("the first pod's monitor to be gone", wait::SOON * 2, gone)?;
        }
        self.homes().iter().map(Census::of).collect()
    }

    /// An error if anything is on these hosts that was not there before.
    pub fn nothing_left(&self, before: &[Census]) -> Result<()> {
        for (host, before) in self.homes().iter().zip(before) {
            let left = before.settled(host, wait::SOON)?;
            ensure!(left.is_empty(), "left on {}:\n{}", host.name(), left.join("\n"));
        }
        Ok(())
    }
}
