//! Real programs with real clients: each moves there and back (MOVES times, 2 unless told otherwise) and is saved and
//! restored, with no error at a client, no reset and no wrong answer.

use anyhow::{Context, Result, ensure};
use integration::bed::{Bed, Host};
use integration::pods::{ADDRESS, Client, move_around, rounds, said, stop_and_restore};
use integration::servers::{POSTGRES, PYTHON};
use integration::wait::{SOON, until_true};
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;

/// `pod run` on the first host, on the LAN under [`ADDRESS`].
fn run(bed: &Bed, name: &str, options: &[&str], program: &[&str]) -> Result<()> {
    let address = format!("{ADDRESS}/24");
    let head = ["run", "-d", "--name", name, "--network", "bridge:br0", "--ip", &address];
    bed.a().pod(&[&head, options, &["--"], program].concat()).map(drop)
}

/// How long a client with a clock works: for all moves, at some three seconds each.
fn seconds() -> usize {
    6 * rounds()
}

fn listening(bed: &Bed, port: u16) -> Result<()> {
    until_true(&format!("port {port} to answer"), SOON, || bed.client().reaches(ADDRESS, port))
}

const REDIS: [&str; 9] = ["redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", "--dir", "/tmp"];

fn redis(bed: &Bed) -> Result<Client> {
    run(bed, "redis", &[], &REDIS)?;
    listening(bed, 6379)?;
    Client::start(bed, &["redis", &format!("{ADDRESS}:6379"), "20", "5", "5000"])
}

fn has_5000_keys(bed: &Bed) -> Result<()> {
    let size = bed.client().run(&["redis-cli", "-h", ADDRESS, "dbsize"])?;
    ensure!(size.trim() == "5000", "redis has {size} keys");
    Ok(())
}

#[test]
fn redis_moves_under_twenty_clients() -> Result<()> {
    let bed = Bed::new()?;
    let client = redis(&bed)?;
    let times = move_around(&bed, "redis", 2 * rounds())?;
    let summary = client.finish()?;
    println!("moves took {times:.2?}; client:\n{}", summary.text);
    has_5000_keys(&bed)
}

#[test]
fn redis_is_saved_and_restored_under_twenty_clients() -> Result<()> {
    let bed = Bed::new()?;
    let client = redis(&bed)?;
    stop_and_restore(bed.a(), "redis", rounds())?;
    println!("{}", client.finish()?.text);
    has_5000_keys(&bed)
}

const NGINX: &str = r#"
mkdir -p /tmp/n/www && cd /tmp/n && head -c 20000 /bin/ls >www/page && cat >conf <<'END'
worker_processes 2; daemon off; pid /tmp/n/pid; error_log /tmp/n/error;
events { worker_connections 512; }
http { access_log off; keepalive_requests 100000000; client_body_temp_path /tmp/n/b; proxy_temp_path /tmp/n/p;
  fastcgi_temp_path /tmp/n/f; uwsgi_temp_path /tmp/n/u; scgi_temp_path /tmp/n/s;
  server { listen 80; listen [::]:80; root /tmp/n/www; } }
END
exec nginx -c /tmp/n/conf
"#;

#[test]
fn nginx_moves_under_wrk() -> Result<()> {
    let bed = Bed::new()?;
    run(&bed, "nginx", &[], &["sh", "-c", NGINX])?;
    listening(&bed, 80)?;
    let client = Client::start(&bed, &["http", &format!("{ADDRESS}:80"), "/page", "8"])?;
    let url = format!("http://{ADDRESS}/page");
    let wrk = bed
        .client()
        .command("wrk")
        .args(["-t2", "-c32", &format!("-d{}s", seconds()), "--timeout", "30s", &url])
        .stdout(Stdio::piped())
        .spawn()?;
    move_around(&bed, "nginx", 2 * rounds())?;
    stop_and_restore(if bed.a().runs("nginx") { bed.a() } else { bed.b() }, "nginx", rounds())?;
    println!("{}", client.finish()?.text);
    let said = String::from_utf8_lossy(&wrk.wait_with_output()?.stdout).into_owned();
    ensure!(said.contains("Requests/sec") && !said.contains("Socket errors") && !said.contains("Non-2xx"), "{said}");
    Ok(())
}

#[test]
fn a_threaded_python_server_moves_under_its_clients() -> Result<()> {
    let bed = Bed::new()?;
    run(&bed, "python", &[], &["python3", "-c", PYTHON])?;
    listening(&bed, 8000)?;
    let client = Client::start(&bed, &["http", &format!("{ADDRESS}:8000"), "/some/path", "6"])?;
    move_around(&bed, "python", 2 * rounds())?;
    stop_and_restore(bed.a(), "python", rounds())?;
    println!("{}", client.finish()?.text);
    Ok(())
}

/// A psql on the client's host that is told one line at a time.
struct Session {
    child: std::process::Child,
    out: BufReader<std::process::ChildStdout>,
}

impl Session {
    fn new(host: &Host) -> Result<Session> {
        let mut command = host.command("psql");
        command.args(["-h", ADDRESS, "-U", "postgres", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        Ok(Session { out: BufReader::new(child.stdout.take().context("stdout is a pipe")?), child })
    }

    /// Statements, and the one line that the last of them answers.
    fn ask(&mut self, statements: &str) -> Result<String> {
        writeln!(self.child.stdin.as_mut().context("stdin is a pipe")?, "{statements}")?;
        let mut line = String::new();
        ensure!(self.out.read_line(&mut line)? > 0, "psql ended at {statements:?}");
        Ok(line.trim().into())
    }
}

#[test]
fn postgres_moves_inside_a_transaction_and_under_pgbench() -> Result<()> {
    let bed = Bed::new()?;
    run(&bed, "postgres", &["-u", "postgres"], &["bash", "-c", POSTGRES])?;
    listening(&bed, 5432)?;
    let bench = |args: &[&str]| {
        let mut command = bed.client().command("pgbench");
        command.args(["-h", ADDRESS, "-U", "postgres"]).args(args).arg("postgres");
        command
    };
    until_true("postgres to take connections", SOON, || {
        let ready = ["psql", "-h", ADDRESS, "-U", "postgres", "-c", "select 1"];
        bed.client().output(&ready).is_ok_and(|output| output.status.success())
    })?;
    ensure!(bench(&["-i", "-q", "-s", "1"]).stderr(Stdio::null()).status()?.success(), "pgbench -i failed");
    let mut session = Session::new(bed.client())?;
    session.ask("create table t (n int); begin; insert into t values (41); select 'open';")?;
    let running = bench(&["-c", "4", "-T", &seconds().to_string(), "-n"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    move_around(&bed, "postgres", 2 * rounds())?;
    let count = session.ask("update t set n = n + 1; commit; select n from t;")?;
    ensure!(count == "42", "the transaction that was open ends in {count}");
    let output = running.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "pgbench: {said}{}", String::from_utf8_lossy(&output.stderr));
    ensure!(said.contains("number of failed transactions: 0 "), "{said}");
    stop_and_restore(bed.a(), "postgres", rounds())?;
    ensure!(session.ask("select n from t;")? == "42", "the session lost its table");
    Ok(())
}

/// As many times the same archive as keep it in full flow at every move; the sum is known from the same bytes on a host.
fn pipeline(archives: usize) -> String {
    let archive = "tar c --sort=name -C /usr share/perl lib/python3.11 2>/dev/null";
    format!("for i in $(seq {archives}); do {archive}; done | gzip -6 | sha256sum")
}

#[test]
fn a_pipeline_moves_in_full_flow() -> Result<()> {
    // It stands still for most of a move: between two of them it runs for less than a second.
    let pipeline = pipeline(rounds().div_ceil(2));
    let bed = Bed::new()?;
    let expected = bed.client().run(&["sh", "-c", &pipeline])?;
    let line = format!("echo flowing; {pipeline}");
    bed.a().pod(&["run", "-d", "--name", "pipeline", "--network", "none", "--", "sh", "-c", &line])?;
    said(bed.a(), "pipeline", "flowing")?;
    move_around(&bed, "pipeline", 2 * rounds())?;
    ensure!(bed.a().runs("pipeline"), "the pipeline had ended before its last move");
    ensure!(bed.a().pod(&["wait", "pipeline"])?.trim() == "0", "the pipeline failed");
    said(bed.a(), "pipeline", expected.trim())
}

#[test]
fn twenty_pods_move_in_parallel() -> Result<()> {
    let bed = Bed::new()?;
    let names: Vec<(String, String)> = (0..20).map(|i| (format!("twin-{i}"), format!("10.77.0.{}", 100 + i))).collect();
    for (name, address) in &names {
        let address = format!("{address}/24");
        let head = ["run", "-d", "--name", name, "--network", "bridge:br0", "--ip", &address, "--"];
        bed.a().pod(&[&head[..], &REDIS].concat())?;
    }
    let ask = |address: &str, words: &[&str]| {
        let answer = bed.client().output(&[&["redis-cli", "-h", address], words].concat())?;
        anyhow::Ok(String::from_utf8_lossy(&answer.stdout).trim().to_string())
    };
    for (name, address) in &names {
        until_true(name, SOON, || ask(address, &["set", "name", name]).is_ok_and(|answer| answer == "OK"))?;
    }
    for (from, to) in [(bed.a(), bed.b()), (bed.b(), bed.a())] {
        std::thread::scope(|scope| {
            let moves: Vec<_> = names
                .iter()
                .map(|(name, _)| scope.spawn(move || from.pod(&["migrate", name, "--to", to.name()])))
                .collect();
            moves.into_iter().try_for_each(|one| one.join().expect("no mover panics").map(drop))
        })?;
        for (name, address) in &names {
            ensure!(to.runs(name) && !from.runs(name), "{name} is not where it was moved");
            let answer = ask(address, &["get", "name"])?;
            ensure!(answer == *name, "{address} says that it is {answer}, not {name}");
            from.pod(&["rm", name])?;
        }
    }
    Ok(())
}
