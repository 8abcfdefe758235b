//! Moves without ssh: `pod daemon` on both hosts, each of which knows the other's key.

use anyhow::{Context, Result, ensure};
use integration::bed::{Bed, Host};
use integration::pods::said;
use integration::wait::{SOON, until, until_true};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStderr, Stdio};

const POD: &str = "counter";

/// `pod daemon run` on a host; ended when dropped.
struct Daemon {
    child: Child,
    stderr: BufReader<ChildStderr>,
}

impl Daemon {
    fn run(host: &Host) -> Result<Daemon> {
        let mut command = host.command("pod");
        command.args(["daemon", "run"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let mut stderr = BufReader::new(child.stderr.take().context("a pipe")?);
        let mut line = String::new();
        stderr.read_line(&mut line)?;
        let daemon = Daemon { child, stderr };
        ensure!(line.contains("listening at"), "{line}");
        Ok(daemon)
    }

    /// Ends it, and gives all that it and what it has forked said.
    fn end(mut self) -> Result<String> {
        self.child.kill()?;
        let mut said = String::new();
        self.stderr.read_to_string(&mut said)?;
        Ok(said)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn key(host: &Host) -> Result<String> {
    Ok(host.pod(&["daemon", "key"])?.trim().to_owned())
}

/// Each of the two is told who the other is. None of what they run can call ssh.
fn acquainted(bed: &Bed) -> Result<(Host, Host)> {
    let without_ssh = |host: &Host| host.with("POD_SSH", "/bin/false");
    let (a, b) = (without_ssh(bed.a()), without_ssh(bed.b()));
    for (one, other) in [(&a, &b), (&b, &a)] {
        one.pod(&["daemon", "trust", other.name(), &key(other)?])?;
    }
    Ok((a, b))
}

fn forget(hosts: [&Host; 2]) -> Result<()> {
    hosts.into_iter().try_for_each(|host| host.run(&["rm", "-r", "/var/lib/pod/daemon"]).map(drop))
}

#[test]
fn pods_move_without_ssh() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    let (a, b) = acquainted(&bed)?;
    let daemons = [Daemon::run(&a)?, Daemon::run(&b)?];
    a.guest(POD, &[], 0)?;
    let checked = a.pod(&["check", POD, "--to", "pod://hostB", "--json"])?;
    ensure!(checked.contains("\"clear\": true"), "{checked}");
    let examined = a.pod(&["doctor", "--to", "pod://hostB"])?;
    ensure!(
        examined.contains("spoken with by protocol") && examined.contains("has all that this one has"),
        "{examined}"
    );
    for (round, (from, to, how, transport)) in [
        (&a, &b, None, "tls"),
        (&b, &a, Some("--tunnelled"), "daemon"),
        (&a, &b, Some("--downtime=50ms"), "tls"),
        (&b, &a, None, "tls"),
    ]
    .into_iter()
    .enumerate()
    {
        let target = format!("pod://{}", to.name());
        let args: Vec<&str> = ["migrate", POD, "--json", "--to", &target].into_iter().chain(how).collect();
        let report: serde_json::Value = serde_json::from_str(&from.pod(&args)?)?;
        ensure!(report["transport"] == transport, "{report}");
        ensure!(to.runs(POD) && !from.runs(POD), "it does not run on {}", to.name());
        to.pod(&["kill", "-s", "USR1", POD])?;
        said(to, POD, &format!("ok {}", round + 1))?;
        from.pod(&["rm", POD])?;
    }
    // All pods, by the same way; this one is asked to write down where it went, and found again there.
    a.pod(&["migrate", "--all", "--to", "pod://hostB"])?;
    ensure!(b.runs(POD), "it was not moved with all");
    a.pod(&["rm", POD])?;
    b.pod(&["rm", "-f", POD])?;
    for daemon in daemons {
        let said = daemon.end()?;
        ensure!(said.contains("pod receive"), "who called is not told: {said}");
    }
    forget([&a, &b])?;
    bed.nothing_left(&before)
}

/// Who holds a terminal or a lifeline follows the pod by the way that it took.
#[test]
fn who_is_attached_follows_by_the_daemon() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    let (a, b) = acquainted(&bed)?;
    let _daemons = [Daemon::run(&a)?, Daemon::run(&b)?];
    a.pod(&["run", "-d", "-i", "--name", "echo", "--network", "none", "--", "cat"])?;
    let mut attached = a.command("pod");
    let mut attached = attached.args(["attach", "echo"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let (mut to, from) = (attached.stdin.take().context("a pipe")?, attached.stdout.take().context("a pipe")?);
    let mut from = BufReader::new(from);
    let mut line = |word: &str| -> Result<()> {
        writeln!(to, "{word}")?;
        let mut line = String::new();
        from.read_line(&mut line)?;
        ensure!(line.trim() == word, "{word}: {line:?}");
        Ok(())
    };
    line("before")?;
    a.pod(&["migrate", "echo", "--to", "pod://hostB"])?;
    line("after")?;
    drop((to, from));
    attached.kill()?;
    attached.wait()?;
    b.pod(&["rm", "-f", "echo"])?;
    a.pod(&["rm", "echo"])?;
    drop(_daemons);
    forget([&a, &b])?;
    bed.nothing_left(&before)
}

/// Strangers get an error or nothing, nothing is run or written for them, and meanwhile others are served.
#[test]
fn strangers_get_no_further_than_the_door() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    let (a, b) = acquainted(&bed)?;
    let daemon = Daemon::run(&b)?;
    a.guest(POD, &[], 0)?;
    let at = format!("{}:8263", b.address());
    let jobs = || b.pod(&["job", "ls", "--json"]);
    let nothing = jobs()?;
    // No protocol, half of one, and a hundred who say nothing.
    let connect = || {
        bed.a()
            .thread({
                let at = at.clone();
                move || Ok(TcpStream::connect(at)?)
            })?
            .join()
            .map_err(|_| anyhow::anyhow!("a thread"))?
    };
    let mut silent = Vec::new();
    for n in 0..100 {
        let mut stream = connect()?;
        match n % 4 {
            0 => stream.write_all(b"GET / HTTP/1.1\r\n\r\n")?,
            1 => stream.write_all(&[0x16, 3, 1, 0xff, 0xff])?,
            2 => stream.write_all(&vec![0x16; 70_000]).unwrap_or(()),
            _ => {}
        }
        silent.push(stream);
    }
    let client = bed.client();
    let fails = |host: &Host, args: &[&str], codes: &[&str]| -> Result<()> {
        let (code, said) = host.pod_fails(args)?;
        println!("{}: exit {code}: {}", args.join(" "), said.trim().replace('\n', " / "));
        ensure!(codes.iter().any(|one| said.contains(&format!("[{one}]"))), "{args:?}: {code}: {said}");
        ensure!(said.contains("fix:") && !said.contains("panicked"), "{args:?}: {said}");
        Ok(())
    };
    let check = ["doctor", "--to", "pod://hostB", "--json"];
    // Nobody told this host of the other, nor the other of it.
    client.pod(&["run", "-d", "--name", "other", "--network", "none", "--", "sleep", "1000"])?;
    fails(client, &["migrate", "other", "--to", "pod://hostB"], &["E-PEER"])?;
    client.pod(&["daemon", "trust", "hostB", &key(&b)?])?;
    fails(client, &["migrate", "other", "--to", "pod://hostB"], &["E-PEER"])?;
    // It takes another for the one that it knows.
    client.pod(&["daemon", "trust", "hostB", &key(&a)?])?;
    fails(client, &["migrate", "other", "--to", "pod://hostB"], &["E-PEER"])?;
    // One that may only be sent to.
    b.pod(&["daemon", "trust", "client", &key(client)?, "--outgoing-only"])?;
    client.pod(&["daemon", "trust", "hostB", &key(&b)?])?;
    fails(client, &["migrate", "other", "--to", "pod://hostB"], &["E-PEER"])?;
    // Where nobody listens, and nothing is.
    fails(client, &["migrate", "other", "--to", "pod://hostB:1"], &["E-LINK"])?;
    client.pod(&["daemon", "trust", "nowhere", &key(&a)?])?;
    fails(client, &["migrate", "other", "--to", "pod://nowhere"], &["E-LINK"])?;
    // One that is trusted does not get everything.
    for verb in
        [&["run", "--", "touch", "/root/taken"][..], &["relay", "../../etc"], &["doctor"], &["receive", "x"], &[""]]
    {
        let (code, said) = a.pod_fails(&[&["--json", "dial", "hostB", "--"], verb].concat())?;
        ensure!(code == 126 && said.contains("E-PEER"), "{verb:?}: {code}: {said}");
    }
    ensure!(!b.root()?.join("root/taken").exists(), "it was run");
    ensure!(jobs()? == nothing && !b.runs("other"), "something was written down: {}", jobs()?);
    // With all of those still there.
    ensure!(a.pod(&check)?.contains("spoken with"), "it is not served any more");
    a.pod(&["migrate", POD, "--to", "pod://hostB"])?;
    ensure!(b.runs(POD), "it did not move");
    // From now on nobody; what is here stays.
    b.pod(&["daemon", "forget", "hostA"])?;
    fails(&a, &["migrate", "none", "--to", "pod://hostB"], &["E-NOPOD"])?;
    let examined = a.pod_fails(&check)?;
    ensure!(examined.1.is_empty() || !examined.1.contains("panicked"), "{examined:?}");
    drop(silent);
    a.pod(&["rm", POD])?;
    b.pod(&["rm", "-f", POD])?;
    client.pod(&["rm", "-f", "other"])?;
    let said = daemon.end()?;
    ensure!(!said.contains("panicked"), "{said}");
    forget([&a, &b])?;
    client.run(&["rm", "-r", "/var/lib/pod/daemon"])?;
    bed.nothing_left(&before)
}

/// Whoever of those between the two is killed, one copy runs, and the daemon is not needed by calls that it has let in.
#[test]
fn who_is_between_may_be_killed() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    let (a, b) = acquainted(&bed)?;
    let mut daemon = Some(Daemon::run(&b)?);
    a.guest(POD, &[], 80)?;
    // Slowly, so that there is time to kill somebody.
    let begin = |arguments: &[&str]| -> Result<Child> {
        let mut command = a.command("pod");
        command.args(["migrate", POD, "--to", "pod://hostB", "--bandwidth", "20M"]).args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let child = command.spawn()?;
        until_true("the move to be under way", SOON, || {
            b.pod(&["job", "ls"]).is_ok_and(|jobs| jobs.contains("receiving"))
        })?;
        Ok(child)
    };
    for who in ["pod dial", "session"] {
        let child = begin(&[])?;
        let host = if who == "session" { &b } else { &a };
        let found = until(who, SOON, || of(host, who))?;
        kill(Pid::from_raw(found), Signal::SIGKILL)?;
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(12) && said.contains("E-LINK"), "{who}: {:?}: {said}", output.status);
        ensure!(a.runs(POD), "{who}: it does not run on");
        until_true("the destination to give it up", SOON * 2, || {
            b.pod(&["job", "ls"]).is_ok_and(|jobs| !jobs.contains("receiving"))
        })?;
    }
    let child = begin(&[])?;
    drop(daemon.take());
    let output = child.wait_with_output()?;
    ensure!(output.status.success() && b.runs(POD), "without the daemon: {}", String::from_utf8_lossy(&output.stderr));
    a.pod(&["rm", POD])?;
    b.pod(&["kill", "-s", "USR1", POD])?;
    said(&b, POD, "ok 1")?;
    b.pod(&["rm", "-f", POD])?;
    forget([&a, &b])?;
    bed.nothing_left(&before)
}

/// The process on a host that calls, or that was forked for a call.
fn of(host: &Host, who: &str) -> Option<i32> {
    let read = |pid: i32, name: &str| std::fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
    host.process(|pid| match who {
        "session" => read(pid, "comm") == b"pod-session\n",
        _ => read(pid, "cmdline").windows(5).any(|word| word == b"dial\0"),
    })
}
