//! What living in a pod costs: the same work in one and beside it, in turns.

use crate::report::Report;
use crate::table::Table;
use crate::{pod, timed, us};
use anyhow::{Context, Result};
use integration::wait::{SOON, until_true};
use std::process::{Child, Command, Stdio};

const RUNS: usize = 7;

const NGINX: &str = "mkdir -p /tmp/bench-nginx && cd /tmp/bench-nginx && head -c 4000 /bin/ls >page && cat >conf <<'END'
worker_processes 1; daemon off; pid /tmp/bench-nginx/pid; error_log /tmp/bench-nginx/error;
events { worker_connections 512; }
http { access_log off; keepalive_requests 100000000; client_body_temp_path /tmp/bench-nginx/b; proxy_temp_path /tmp/bench-nginx/p;
  fastcgi_temp_path /tmp/bench-nginx/f; uwsgi_temp_path /tmp/bench-nginx/u; scgi_temp_path /tmp/bench-nginx/s;
  server { listen 8089; root /tmp/bench-nginx; } }
END
exec nginx -c /tmp/bench-nginx/conf";

/// redis-benchmark asks a server that is not there yet again and again, for ever.
const READY: &str = "exec 3<>/dev/tcp/127.0.0.1/";

const REDIS: &[&str] = &["redis-server", "--port", "6390", "--save", "", "--dir", "/tmp"];
const REDIS_LOAD: &[&str] =
    &["timeout", "60", "redis-benchmark", "-p", "6390", "-q", "--csv", "-n", "200000", "-c", "20", "-t", "set"];
const WRK: &[&str] = &["timeout", "60", "wrk", "-t1", "-c16", "-d3s", "http://127.0.0.1:8089/page"];

/// The server beside the pod, gone with this value.
struct Bare(Child);

impl Drop for Bare {
    fn drop(&mut self) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.0.id() as i32), nix::sys::signal::SIGTERM);
        let _ = self.0.wait();
    }
}

fn redis_rate(text: &str) -> Option<f64> {
    let line = text.lines().find(|line| line.starts_with("\"SET\""))?;
    line.split(',').nth(1)?.trim_matches('"').parse().ok()
}

fn wrk_rate(text: &str) -> Option<f64> {
    text.lines().find_map(|line| line.trim().strip_prefix("Requests/sec:")?.trim().parse().ok())
}

/// A server in a pod and one beside it, loaded in turns by the same tool over their own loopback.
fn served(
    table: &mut Table,
    (what, port): (&str, u16),
    server: &[&str],
    load: &[&str],
    rate: fn(&str) -> Option<f64>,
) -> Result<()> {
    pod(&[&["run", "-d", "--name", "served", "--"], server].concat())?;
    let bare = Bare(Command::new(server[0]).args(&server[1..]).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?);
    let inside = [&["pod", "exec", "served"], load].concat();
    let ready = format!("{READY}{port}");
    for line in [&["bash", "-c", &ready][..], &["pod", "exec", "served", "bash", "-c", &ready]] {
        until_true(what, SOON, || timed(line).is_ok())?;
    }
    let (mut outer, mut inner) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        outer.push(rate(&timed(load)?.0).context("no rate")?);
        inner.push(rate(&timed(&inside)?.0).context("no rate")?);
    }
    drop(bare);
    pod(&["rm", "-f", "served"])?;
    let limit = table.row(&format!("{what}, bare"), outer);
    table.against(&format!("{what}, in a pod"), inner, limit, "bare");
    Ok(())
}

pub fn all(report: &mut Report) -> Result<()> {
    let mut table = Table::new("work in a pod and beside it", "requests/s");
    served(&mut table, ("redis-benchmark SET", 6390), REDIS, REDIS_LOAD, redis_rate)?;
    served(&mut table, ("wrk on nginx", 8089), &["sh", "-c", NGINX], WRK, wrk_rate)?;
    report.add(table);
    syscalls(report)
}

/// Any seccomp filter makes the kernel leave its fast path: so the pod's own is held against one of a single instruction.
const ALLOW_ALL: &str = "/tmp/bench-allow-all.json";

fn syscalls(report: &mut Report) -> Result<()> {
    let mut table = Table::new("a loop of getppid(), time of the processor", "ns a call");
    std::fs::write(ALLOW_ALL, r#"{"defaultAction": "SCMP_ACT_ALLOW"}"#)?;
    let us = us()?;
    let call = [us.as_str(), "__syscalls", "3000000"];
    let allow_all = format!("seccomp={ALLOW_ALL}");
    let run = ["run", "--rm", "--network", "none"];
    let in_pod =
        |options: &[&str]| -> Result<f64> { Ok(pod(&[&run[..], options, &["--"], &call].concat())?.0.trim().parse()?) };
    let mut rows: [Vec<f64>; 4] = Default::default();
    for _ in 0..RUNS {
        rows[0].push(timed(&call)?.0.trim().parse()?);
        rows[1].push(in_pod(&["--security-opt", "seccomp=unconfined"])?);
        rows[2].push(in_pod(&["--security-opt", &allow_all])?);
        rows[3].push(in_pod(&[])?);
    }
    std::fs::remove_file(ALLOW_ALL)?;
    let [bare, unconfined, filtered, inside] = rows;
    let bare = table.row("bare", bare);
    table.against("in a pod, seccomp=unconfined", unconfined, bare, "bare");
    let filter = table.against("in a pod, a filter that allows everything", filtered, bare, "bare");
    table.against("in a pod, the default profile", inside, filter, "the filter that allows everything");
    report.add(table);
    Ok(())
}
