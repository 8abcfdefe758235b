//! Connections of every sort across moves, IPv4 and IPv6: streams in full flow both ways, datagrams, and clients that
//! connect anew for each request, so that handshakes and ends are on their way at every moment. No client sees an
//! error, no datagram is lost, and no RST is ever sent.

use anyhow::{Context, Result, ensure};
use integration::bed::Bed;
use integration::pods::{ADDRESS, move_around, rounds, said};
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Stdio};

const ADDRESS6: &str = "fd77::100";

fn script(bed: &Bed, name: &str) -> Result<String> {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/connections").join(name);
    let to = bed.shared().join(name);
    fs::copy(&from, &to).with_context(|| format!("copy {}", from.display()))?;
    Ok(to.to_string_lossy().into_owned())
}

/// Writes every RST on the client's cable into a file, from when it says that it listens. The end of the bed ends it.
fn watch(bed: &Bed, file: &str) -> Result<Child> {
    let resets = "(ip and tcp[tcpflags] & tcp-rst != 0) or (ip6 and ip6[6] = 6 and ip6[53] & 4 != 0)";
    let mut command = bed.client().command("tcpdump");
    command.args(["-i", "br0", "-U", "-w", file, resets]).stdin(Stdio::null()).stdout(Stdio::null());
    let mut child = command.stderr(Stdio::piped()).spawn()?;
    let mut first = String::new();
    BufReader::new(child.stderr.as_mut().context("a pipe was asked for")?).read_line(&mut first)?;
    Ok(child)
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

    let resets = bed.shared().join("resets").to_string_lossy().into_owned();
    let mut watching = watch(&bed, &resets)?;
    let times = move_around(&bed, "server", 2 * rounds())?;
    // A connection that a client ends with answers unread is reset by the client: only what came before counts.
    let seen = bed.client().run(&["tcpdump", "-n", "-r", &resets])?;
    watching.kill()?;
    watching.wait()?;

    drop(clients.stdin.take());
    let mut text = String::new();
    output.read_to_string(&mut text)?;
    clients.wait()?;
    println!("moves took {times:.2?}; clients:\n{text}");
    ensure!(!text.contains("FAIL") && text.lines().count() == 10, "clients:\n{text}");
    ensure!(seen.is_empty(), "somebody was told that a connection is gone:\n{seen}");
    let log = bed.a().pod(&["logs", "server"])?;
    ensure!(!log.contains("FAIL"), "the server saw wrong bytes:\n{log}");
    bed.a().pod(&["rm", "-f", "server"]).map(drop)
}
