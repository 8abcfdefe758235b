//! What is moved, under which clients, and what is aimed at.

use super::load::{Heard, Load, Pace, Protocol};
use super::talk::{Http, Ping, Redis};
use super::tools;
use crate::{echo, us};
use anyhow::{Context, Result};
use integration::bed::{Bed, Host};
use integration::pods::ADDRESS;
use integration::servers::POSTGRES;
use integration::wait::until_true;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

/// The name of every pod here.
pub const POD: &str = "subject";

/// What a start takes at most: a cluster is made, gigabytes are filled.
const PATIENCE: Duration = Duration::from_secs(120);

/// Ends the clients and tells what they heard.
pub type Finish = Box<dyn FnOnce() -> Result<Heard>>;

/// Milliseconds of silence at most.
#[derive(Debug, Clone, Copy)]
pub struct Aim {
    pub median: f64,
    pub worst: f64,
}

impl Aim {
    const fn always(ms: f64) -> Aim {
        Aim { median: ms, worst: ms }
    }
}

pub struct Workload {
    pub name: &'static str,
    pub title: &'static str,
    pub aim: Aim,
    /// What the points of a plot are.
    pub seen_by: &'static str,
    /// Starts the pod on the first host and its clients.
    start: fn(&Bed) -> Result<Finish>,
    /// To how many Gbit/s the first host's cable is limited.
    pub gbit: Option<f64>,
    /// What is done where memory does not settle.
    pub on_stall: &'static str,
}

impl Workload {
    pub fn start(&self, bed: &Bed) -> Result<Finish> {
        (self.start)(bed)
    }
}

pub const ALL: [Workload; 7] = [
    Workload {
        name: "redis",
        title: "redis 1 GiB, 50 connections, 2 000 SET/s",
        aim: Aim { median: 10.0, worst: 30.0 },
        seen_by: "all SETs, sent when they are due",
        start: |bed| redis(bed, Pace::PerSecond(2000)),
        gbit: None,
        on_stall: "switch",
    },
    Workload {
        name: "saturated",
        title: "redis 1 GiB, 50 connections, saturated, `--on-stall throttle`",
        aim: Aim { median: 25.0, worst: f64::INFINITY },
        seen_by: "all SETs, each sent when the one before was answered",
        start: |bed| redis(bed, Pace::Always),
        gbit: None,
        on_stall: "throttle",
    },
    Workload {
        name: "nginx",
        title: "nginx, `wrk`, 100 keep-alive connections",
        aim: Aim::always(20.0),
        seen_by: "1 000 GETs a second over 4 connections, wrk has 96",
        start: nginx,
        gbit: None,
        on_stall: "switch",
    },
    Workload {
        name: "postgres",
        title: "postgres, pgbench TPC-B, 8 clients",
        aim: Aim::always(40.0),
        seen_by: "all transactions, by pgbench's log",
        start: postgres,
        gbit: None,
        on_stall: "switch",
    },
    Workload {
        name: "java",
        title: "Java, heap of 2 GiB, allocating some 100 MiB/s",
        aim: Aim::always(60.0),
        seen_by: "1 000 lines a second over 8 connections, echoed",
        start: java,
        gbit: None,
        on_stall: "switch",
    },
    Workload {
        name: "connections",
        title: "10 000 mostly idle TCP connections",
        aim: Aim::always(250.0),
        seen_by: "1 000 lines a second, each over the next connection, echoed",
        start: connections,
        gbit: None,
        on_stall: "switch",
    },
    Workload {
        name: "link",
        title: "4 GiB over a link of 1 Gbit/s",
        aim: Aim::always(60.0),
        seen_by: "1 000 lines a second over 8 connections, echoed",
        start: link,
        gbit: Some(1.0),
        on_stall: "switch",
    },
];

fn server(port: u16) -> Result<SocketAddr> {
    Ok(SocketAddr::new(ADDRESS.parse::<Ipv4Addr>()?.into(), port))
}

/// `pod run` on the first host, on the LAN; returns when the port answers.
fn run(bed: &Bed, options: &[&str], program: &[&str], port: u16) -> Result<()> {
    let address = format!("{ADDRESS}/24");
    let head = ["run", "-d", "--name", POD, "--network", "bridge:br0", "--ip", &address];
    bed.a().pod(&[&head, options, &["--"], program].concat())?;
    until_true(&format!("port {port} to answer"), PATIENCE, || bed.client().reaches(ADDRESS, port))
        .with_context(|| bed.a().pod(&["logs", POD]).unwrap_or_default())
}

fn load(client: &Host, port: u16, connections: usize, pace: Pace, protocol: impl Protocol + 'static) -> Result<Finish> {
    let load = Load::start(client, server(port)?, connections, pace, Box::new(protocol))?;
    Ok(Box::new(|| load.finish()))
}

/// So many keys with values of 1000 bytes are a GiB of redis.
const KEYS: usize = 920_000;
const REDIS: &[&str] = &["redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", "--dir", "/tmp"];

fn redis(bed: &Bed, pace: Pace) -> Result<Finish> {
    run(bed, &[], &[REDIS, &["--enable-debug-command", "yes"]].concat(), 6379)?;
    bed.client().run(&["redis-cli", "-h", ADDRESS, "debug", "populate", &KEYS.to_string(), "key", "1000"])?;
    load(bed.client(), 6379, 50, pace, Redis::new(50, KEYS))
}

const NGINX: &str = "mkdir -p /tmp/n/www && cd /tmp/n && head -c 4000 /bin/ls >www/page && cat >conf <<'END'
worker_processes 2; daemon off; pid /tmp/n/pid; error_log /tmp/n/error;
events { worker_connections 512; }
http { access_log off; keepalive_requests 100000000; client_body_temp_path /tmp/n/b; proxy_temp_path /tmp/n/p;
  fastcgi_temp_path /tmp/n/f; uwsgi_temp_path /tmp/n/u; scgi_temp_path /tmp/n/s;
  server { listen 80; root /tmp/n/www; } }
END
exec nginx -c /tmp/n/conf";

fn nginx(bed: &Bed) -> Result<Finish> {
    run(bed, &[], &["sh", "-c", NGINX], 80)?;
    let wrk = tools::Wrk::start(bed, &format!("http://{ADDRESS}/page"), 96)?;
    let finish = load(bed.client(), 80, 4, Pace::PerSecond(1000), Http::new(ADDRESS, "/page"))?;
    Ok(Box::new(|| {
        let mut heard = finish()?;
        wrk.finish(&mut heard)?;
        Ok(heard)
    }))
}

fn postgres(bed: &Bed) -> Result<Finish> {
    // What is acknowledged is on the disk, as users have it.
    let program = ["bash", "-c", POSTGRES, "postgres", "-c", "fsync=on"];
    run(bed, &["-u", "postgres"], &program, 5432)?;
    let pgbench = tools::Pgbench::start(bed)?;
    Ok(Box::new(|| pgbench.finish()))
}

fn java(bed: &Bed) -> Result<Finish> {
    const SOURCE: &str = include_str!("Pings.java");
    let script = format!(
        "cat >/tmp/Pings.java <<'END'\n{SOURCE}END\n\
         exec java -Xms2g -Xmx2g -XX:+UseG1GC -XX:+AlwaysPreTouch /tmp/Pings.java"
    );
    run(bed, &[], &["sh", "-c", &script], echo::PORT)?;
    load(bed.client(), echo::PORT, 8, Pace::PerSecond(1000), Ping::new(8))
}

fn connections(bed: &Bed) -> Result<Finish> {
    const COUNT: usize = 10_000;
    crate::subjects::many_descriptors()?;
    run(bed, &[], &[&us()?, "__echo", "0"], echo::PORT)?;
    load(bed.client(), echo::PORT, COUNT, Pace::PerSecond(1000), Ping::new(COUNT))
}

fn link(bed: &Bed) -> Result<Finish> {
    run(bed, &[], &[&us()?, "__echo", "4096"], echo::PORT)?;
    let finish = load(bed.client(), echo::PORT, 8, Pace::PerSecond(1000), Ping::new(8))?;
    bed.shape(bed.a(), Some("1gbit"))?;
    Ok(finish)
}
