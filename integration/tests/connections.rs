//! Connections of every sort across moves, IPv4 and IPv6: streams in full flow both ways, datagrams, and clients that
//! connect anew for each request, so that handshakes and ends are on their way at every moment. No client sees an
//! error, no datagram is lost, and no RST is ever sent.

use anyhow::{Context, Result, ensure};
use integration::bed::{Bed, Host};
use integration::pods::{ADDRESS, move_around, rounds, said};
use integration::wait::{SOON, until_true};
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

const ADDRESS6: &str = "fd77::100";

fn script(bed: &Bed, name: &str) -> Result<String> {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/connections").join(name);
    let to = bed.shared().join(name);
    fs::copy(&from, &to).with_context(|| format!("copy {}", from.display()))?;
    Ok(to.to_string_lossy().into_owned())
}

const RESETS: &str = "(ip and tcp[tcpflags] & tcp-rst != 0) or (ip6 and ip6[6] = 6 and ip6[53] & 4 != 0)";

/// Writes every RST on a host's bridge into a file, and all else of connections that come and go, from when it says that
/// it listens. The end of the bed ends it.
fn watch(bed: &Bed, host: &Host) -> Result<Watch> {
    let file = bed.shared().join(format!("resets-{}", host.name())).to_string_lossy().into_owned();
    let mut command = host.command("tcpdump");
    command
        .args(["-i", "br0", "--immediate-mode", "-U", "-s", "128", "-w", &file, &format!("tcp port 7002 or {RESETS}")])
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    let mut child = command.stderr(Stdio::piped()).spawn()?;
    let mut first = String::new();
    BufReader::new(child.stderr.as_mut().context("a pipe was asked for")?).read_line(&mut first)?;
    Ok(Watch { child, file, at: host.name().to_owned() })
}

struct Watch {
    child: Child,
    file: String,
    at: String,
}

impl Watch {
    fn read(&self, bed: &Bed, filter: &str) -> Result<String> {
        bed.client().run(&["tcpdump", "-n", "-r", &self.file, filter])
    }

    fn end(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

/// As tcpdump writes it.
fn time(bed: &Bed) -> Result<String> {
    Ok(bed.client().run(&["date", "+%H:%M:%S.%6N"])?.trim().to_owned())
}

/// Moves a pod there and back that many times: for each when it began, and what `pod` says of it, its laps too.
fn moves(bed: &Bed, pod: &str, count: usize) -> Result<Vec<String>> {
    let mut told = Vec::new();
    let (mut from, mut to) = (bed.a(), bed.b());
    for step in 0..2 * count {
        let began = time(bed)?;
        let said = from.pod(&["migrate", "--json", pod, "--to", to.name()]).with_context(|| format!("move {step}"))?;
        ensure!(to.runs(pod) && !from.runs(pod), "move {step} said {said}");
        from.pod(&["rm", pod])?;
        told.push(format!("{began} a move to {}: {}", to.name(), said.split_whitespace().collect::<String>()));
        std::mem::swap(&mut from, &mut to);
    }
    Ok(told)
}

/// Of the clients of that sort.
fn longest_pause(clients: &str, sort: &str) -> Duration {
    let of_those = clients.lines().filter(|line| line.starts_with(&format!("ok {sort}")));
    let pauses = of_those.filter_map(|line| line.trim_end_matches(" ms").rsplit(' ').next()?.parse().ok());
    pauses.max().map_or(Duration::MAX, Duration::from_millis)
}

/// What was said on the connections that were reset, and what was done meanwhile, in the order of time; each line behind the
/// name of the host on which it was heard.
fn conversations(bed: &Bed, watches: &[Watch], resets: &str, done: &[String]) -> Result<String> {
    let port = |line: &str| -> Option<String> {
        let mut ends = [line.split(' ').nth(2)?, line.split(' ').nth(4)?.trim_end_matches(':')];
        ends.sort();
        Some(ends.concat())
    };
    let reset: Vec<String> = resets.lines().filter_map(port).collect();
    let mut lines: Vec<(String, String)> = done.iter().map(|line| (line.clone(), String::new())).collect();
    for watch in watches {
        let all = watch.read(bed, "tcp")?;
        let of_those = |line: &&str| port(line).is_some_and(|port| reset.contains(&port));
        lines.extend(all.lines().filter(of_those).map(|line| (line.to_owned(), watch.at.clone())));
    }
    lines.sort();
    Ok(lines.iter().map(|(line, at)| format!("{at:7} {line}\n")).collect())
}

/// Greets and closes. The client keeps its own end open for as long as it likes.
const GREETER: &str = "
import socket
it = socket.create_server(('::', 7003), family=socket.AF_INET6, dualstack_ipv6=True)
print('ready', flush=True)
while True:
    connection, _ = it.accept()
    connection.sendall(b'hello')
    connection.close()
";

/// Reads to the end over each address, and ends its own half when it is told to.
const GREETED: &str = "
import socket, sys
connections = [socket.create_connection((address, 7003), timeout=20) for address in sys.argv[1:]]
for connection in connections:
    assert b''.join(iter(lambda: connection.recv(100), b'')) == b'hello'
print('ended', flush=True)
sys.stdin.readline()
for connection in connections:
    connection.close()
print('closed', flush=True)
";

#[test]
fn what_the_pod_has_closed_and_its_clients_have_not_survives_a_move() -> Result<()> {
    let bed = Bed::new()?;
    let (v4, v6) = (format!("{ADDRESS}/24"), format!("{ADDRESS6}/64"));
    let head = ["run", "-d", "--name", "greeter", "--network", "bridge:br0", "--ip", &v4, "--ip", &v6];
    bed.a().pod(&[&head[..], &["--", "python3", "-c", GREETER]].concat())?;
    said(bed.a(), "greeter", "ready")?;
    let mut command = bed.client().command("python3");
    let mut client = command
        .args(["-c", GREETED, ADDRESS, ADDRESS6])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("start the client")?;
    let mut output = BufReader::new(client.stdout.take().context("a pipe was asked for")?);
    let mut says = |what: &str| -> Result<()> {
        let mut line = String::new();
        output.read_line(&mut line)?;
        ensure!(line.trim() == what, "the client said {line:?} where '{what}' was due");
        Ok(())
    };
    says("ended")?;

    let watching = watch(&bed, bed.client())?;
    move_around(&bed, "greeter", 2)?;
    drop(client.stdin.take());
    says("closed")?;
    client.wait()?;
    // Whoever is not answered says it again and again.
    let waiting = || bed.client().run(&["ss", "-Htn", "state", "last-ack", "dport", "7003"]);
    until_true("the client's end is acknowledged", SOON, || waiting().is_ok_and(|text| text.trim().is_empty()))?;
    // Refused with a reset: when that is in the file, all that came before it is.
    ensure!(!bed.client().reaches(ADDRESS, 7009), "somebody listens at port 7009");
    let read = || watching.read(&bed, RESETS).unwrap_or_default();
    until_true("the resets are written down", SOON, || read().contains(".7009 > "))?;
    let seen = read();
    watching.end()?;
    ensure!(!seen.contains(".7003"), "somebody was told that a connection is gone:\n{seen}");
    bed.a().pod(&["rm", "-f", "greeter"]).map(drop)
}

#[test]
fn connections_survive_moves() -> Result<()> {
    let bed = Bed::new()?;
    let (server, client) = (script(&bed, "server.py")?, script(&bed, "client.py")?);
    let (v4, v6) = (format!("{ADDRESS}/24"), format!("{ADDRESS6}/64"));
    let head = ["run", "-d", "--name", "server", "--network", "bridge:br0", "--ip", &v4, "--ip", &v6];
    bed.a().pod(&[&head[..], &["-v", &format!("{server}:{server}:ro"), "--", "python3", &server]].concat())?;
    said(bed.a(), "server", "ready")?;

    let mut command = bed.client().command("python3");
    let mut clients =
        command.args([&client, ADDRESS, ADDRESS6]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut output = BufReader::new(clients.stdout.take().context("a pipe was asked for")?);
    let mut line = String::new();
    output.read_line(&mut line)?;
    ensure!(line.trim() == "ready", "the clients said {line:?}");

    // The client's is the first.
    let watches = bed.hosts().iter().rev().map(|host| watch(&bed, host)).collect::<Result<Vec<_>>>()?;
    let done = moves(&bed, "server", rounds())?;
    // A connection that a client ends with answers unread is reset by the client: only what came before counts.
    let seen = watches[0].read(&bed, RESETS)?;
    let of_those = if seen.is_empty() { seen.clone() } else { conversations(&bed, &watches, &seen, &done)? };
    watches.into_iter().try_for_each(Watch::end)?;

    drop(clients.stdin.take());
    let mut text = String::new();
    output.read_to_string(&mut text)?;
    clients.wait()?;
    println!("{}\nclients:\n{text}", done.join("\n"));
    ensure!(!text.contains("FAIL") && text.lines().count() == 10, "clients:\n{text}");
    // Whoever connects waits no longer than a datagram does: a SYN that gets lost is repeated after a second.
    let (connecting, datagrams) = (longest_pause(&text, "requests"), longest_pause(&text, "echo"));
    ensure!(
        connecting < datagrams.saturating_add(Duration::from_millis(700)),
        "who connected waited for {connecting:?}:\n{text}"
    );
    ensure!(seen.is_empty(), "somebody was told that a connection is gone:\n{seen}\n{of_those}");
    let log = bed.a().pod(&["logs", "server"])?;
    ensure!(!log.contains("FAIL"), "the server saw wrong bytes:\n{log}");
    bed.a().pod(&["rm", "-f", "server"]).map(drop)
}
