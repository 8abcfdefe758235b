//! Clients that notice everything: they keep their connections, check every answer, and measure their longest pause.
//!
//!   client redis ADDRESS [CONNECTIONS [WRITERS [KEYS [MS]]]]   RESP; writers verify what they read, and pause for MS
//!   client http ADDRESS PATH [CONNECTIONS]                     keep-alive GETs of one page
//!
//! "ready" when connected and loaded; "checked N" when, after the Nth line on stdin, every connection has read back all
//! that was acknowledged to it; when stdin ends a summary, and status 0 only if nothing was lost. A client never
//! connects again: what it loses stays lost.

mod http;
mod redis;

use anyhow::{Context, Result, bail};
use std::io::Write;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Longer than any pause that could still pass for one.
const GIVE_UP: Duration = Duration::from_secs(120);

/// What all connections of a client found out together.
#[derive(Default)]
pub struct Tally {
    pub stop: AtomicBool,
    /// How often somebody has asked for a check, and how many connections have done theirs.
    asked: AtomicU64,
    checked: AtomicU64,
    answered: AtomicU64,
    lost: AtomicU64,
    longest_us: AtomicU64,
    connections_lost: AtomicU64,
}

impl Tally {
    /// One request: counts it, times it.
    fn request(&self, ask: impl FnOnce() -> Result<()>) -> Result<()> {
        let start = Instant::now();
        let answer = ask();
        self.longest_us.fetch_max(start.elapsed().as_micros() as u64, Ordering::Relaxed);
        let count = if answer.is_ok() { &self.answered } else { &self.lost };
        count.fetch_add(1, Ordering::Relaxed);
        answer
    }

    /// Checks if that was asked for since `done` was; a connection calls this between its requests.
    fn check(&self, done: &mut u64, check: impl FnOnce() -> Result<()>) -> Result<()> {
        if self.asked.load(Ordering::Relaxed) > *done {
            check()?;
            *done += 1;
            self.checked.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Waits until all connections have checked. False: one of them is lost.
    fn all_checked(&self, connections: u64) -> bool {
        let due = (self.asked.fetch_add(1, Ordering::Relaxed) + 1) * connections;
        while self.checked.load(Ordering::Relaxed) < due {
            if self.connections_lost.load(Ordering::Relaxed) > 0 {
                return false;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        true
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// One connection, made once.
fn connect(address: &str) -> Result<TcpStream> {
    let stream = TcpStream::connect(address).with_context(|| format!("connect to {address}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(GIVE_UP))?;
    stream.set_write_timeout(Some(GIVE_UP))?;
    Ok(stream)
}

type Work = Box<dyn FnOnce(&Tally) -> Result<()> + Send>;

fn run() -> Result<bool> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let number = |at: usize, default: usize| args.get(at).map_or(Ok(default), |text| text.parse());
    let work: Vec<Work> = match args.as_slice() {
        ["redis", address, ..] => {
            let pause = Duration::from_millis(number(5, 0)? as u64);
            redis::connections(address, number(2, 1)?, number(3, 1)?, number(4, 100)?, pause)?
        }
        ["http", address, path, ..] => http::connections(address, path, number(3, 4)?)?,
        _ => bail!("client redis ADDRESS [CONNECTIONS [WRITERS [KEYS [MS]]]] | client http ADDRESS PATH [CONNECTIONS]"),
    };
    let tally = Tally::default();
    let connections = work.len();
    std::thread::scope(|scope| {
        for one in work {
            let tally = &tally;
            scope.spawn(move || {
                if let Err(error) = one(tally) {
                    tally.connections_lost.fetch_add(1, Ordering::Relaxed);
                    eprintln!("client: {error:#}");
                }
            });
        }
        println!("ready");
        let _ = std::io::stdout().flush();
        for (number, _) in std::io::stdin().lines().map_while(Result::ok).enumerate() {
            if !tally.all_checked(connections as u64) {
                break;
            }
            println!("checked {}", number + 1);
            let _ = std::io::stdout().flush();
        }
        tally.stop.store(true, Ordering::Relaxed);
    });
    let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
    println!("requests answered: {}", get(&tally.answered));
    println!("requests lost: {}", get(&tally.lost));
    println!("connections kept: {} of {connections}", connections as u64 - get(&tally.connections_lost));
    println!("longest pause: {:.1} ms", get(&tally.longest_us) as f64 / 1000.0);
    Ok(get(&tally.lost) == 0 && get(&tally.connections_lost) == 0)
}

fn main() {
    match run() {
        Ok(true) => {}
        Ok(false) => std::process::exit(1),
        Err(error) => {
            eprintln!("client: {error:#}");
            std::process::exit(1);
        }
    }
}
