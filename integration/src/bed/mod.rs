//! A bed: hosts made of namespaces, a switch between them, sshd on each.
//!
//! ```text
//!        switch (the keeper's network namespace): bridge sw0
//!          |p-hostA    |p-hostB     |p-client
//!        eth0|       eth0|        eth0|
//!     br0 10.77.0.11   br0 .12      br0 .13      a pod on the LAN has its link in its host's br0
//! ```
//!
//! A host is a process tree in its own pid, mount, network, UTS, IPC and cgroup namespaces. Private to it: process ids,
//! host name, network stack, IPC, `/proc`, `/sys`, `/run`, `/var/lib`, `/etc` (an overlay), `/dev/shm`, `/root/.ssh` and a
//! part of every cgroup hierarchy. The rest of the file tree is the machine's, so that what was just built can be run.
//!
//! One *keeper* process owns each bed: it makes it, holds a pipe to whoever asked for it, and takes everything down when
//! that pipe closes, which is when the [`Bed`] is dropped and also when its owner panics or is killed. A host ends
//! with its init, an init ends with the keeper. What a killed keeper leaves (cgroups, one directory) the next [`Bed::up`]
//! of that name, or `bed down`, removes.

pub mod cable;
pub mod census;
mod cgroups;
mod files;
pub mod host;
mod keeper;

pub use census::Census;
pub use host::Host;

use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// Where beds keep their state, a directory each.
const BEDS: &str = "/var/tmp/pod-bed";

/// What a bed is to be.
#[derive(Debug, Clone)]
pub struct Config {
    /// Beds of different names live side by side.
    pub name: String,
    pub hosts: Vec<String>,
    /// The `pod` that is on every host's PATH.
    pub pod: Option<PathBuf>,
    /// Whether the bed outlives the process that made it.
    pub persist: bool,
}

impl Config {
    /// Two hosts and a client, under a name that nobody else has.
    pub fn fresh() -> Config {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let count = NEXT.fetch_add(1, Ordering::Relaxed);
        Config {
            name: format!("b{}-{count}", std::process::id()),
            hosts: ["hostA", "hostB", "client"].map(String::from).into(),
            pod: pod_program(),
            persist: false,
        }
    }
}

/// A bed that is up. Dropping it takes it down and waits until it is gone.
#[derive(Debug)]
pub struct Bed {
    name: String,
    dir: PathBuf,
    hosts: Vec<Host>,
    keeper: Option<Child>,
    keeper_pid: i32,
}

impl Bed {
    /// Two hosts and a client, with the `pod` under test on each.
    pub fn new() -> Result<Bed> {
        Bed::up(&Config::fresh())
    }

    /// Three hosts and a client.
    pub fn of_three() -> Result<Bed> {
        Bed::up(&Config { hosts: ["hostA", "hostB", "hostC", "client"].map(String::from).into(), ..Config::fresh() })
    }

    pub fn up(config: &Config) -> Result<Bed> {
        if !nix::unistd::geteuid().is_root() {
            bail!("a bed needs root");
        }
        let mut command = Command::new(bed_program()?);
        command.arg("__keep").args(["--name", &config.name]);
        if let Some(pod) = &config.pod {
            command.arg("--pod").arg(pod);
        }
        if config.persist {
            command.arg("--persist");
        }
        // A group of its own: a ^C or a test runner's SIGTERM to ours must not end the keeper before it cleaned up.
        let mut keeper = command
            .args(&config.hosts)
            .stdin(if config.persist { Stdio::null() } else { Stdio::piped() })
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .context("start the keeper of a bed")?;
        let mut answer = String::new();
        let mut out = BufReader::new(keeper.stdout.take().context("the keeper's stdout is a pipe")?);
        out.read_line(&mut answer)?;
        if answer.trim() != "ready" {
            out.read_to_string(&mut answer)?;
            drop(keeper.stdin.take());
            keeper.wait()?;
            bail!("bed {}: {}", config.name, answer.trim());
        }
        let mut bed = Bed::open(&config.name)?;
        bed.keeper = (!config.persist).then_some(keeper);
        Ok(bed)
    }

    /// A bed that is up already. Dropping this handle leaves it up.
    pub fn open(name: &str) -> Result<Bed> {
        let dir = directory(name);
        let keeper_pid = alive(&dir.join("keeper")).with_context(|| format!("bed {name} is not up"))?;
        let names = std::fs::read_to_string(dir.join("names"))?;
        let hosts = names.lines().enumerate().map(|(index, host)| Host::new(&dir, host, index)).collect();
        Ok(Bed { name: name.into(), dir, hosts, keeper: None, keeper_pid })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The bed's own directory; `shared/` in it is for files that a test wants to find on every host.
    pub fn shared(&self) -> PathBuf {
        self.dir.join("shared")
    }

    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// Where pods live: all but the last.
    pub fn homes(&self) -> &[Host] {
        &self.hosts[..self.hosts.len() - 1]
    }

    /// Panics when there is no such host: a mistake in a test, not a condition.
    pub fn host(&self, name: &str) -> &Host {
        self.hosts.iter().find(|host| host.name() == name).unwrap_or_else(|| panic!("no host {name} in this bed"))
    }

    /// The first host, where pods start.
    pub fn a(&self) -> &Host {
        &self.hosts[0]
    }

    /// The second host, where they go.
    pub fn b(&self) -> &Host {
        &self.hosts[1]
    }

    /// The last host, where their clients are.
    pub fn client(&self) -> &Host {
        &self.hosts[self.hosts.len() - 1]
    }

    /// The process whose network namespace is the switch.
    pub fn switch(&self) -> i32 {
        self.keeper_pid
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if let Some(mut keeper) = self.keeper.take() {
            drop(keeper.stdin.take());
            let _ = keeper.wait();
        }
    }
}

/// Takes down a bed that persists, or what is left of one whose keeper was killed.
pub fn down(name: &str) -> Result<()> {
    let dir = directory(name);
    if let Some(pid) = alive(&dir.join("keeper")) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGTERM)?;
        crate::wait::until_true("the keeper to end", crate::wait::SOON, || alive(&dir.join("keeper")).is_none())?;
    }
    keeper::remove(name)
}

/// Names of all beds that have state on this machine.
pub fn all() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(BEDS) else { return Vec::new() };
    let names = entries.flatten().filter(|entry| entry.path().is_dir());
    names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// The commands that `bed` runs as itself, inside and around a host. True when `args` was one of them.
pub fn internal(args: &[String]) -> Option<Result<i32>> {
    let (verb, rest) = args.split_first()?;
    match verb.as_str() {
        "__keep" => Some(keeper::main(rest).map(|()| 0)),
        "__host" => Some(host::birth(rest)),
        "__init" => Some(host::init(rest).map(|()| 0)),
        "__enter" => Some(host::enter(rest)),
        "__exec" => Some(host::exec(rest).map(|never| match never {})),
        _ => None,
    }
}

fn directory(name: &str) -> PathBuf {
    Path::new(BEDS).join(name)
}

/// Start time of a process in clock ticks: with it a pid names one process for good.
fn start_time(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace();
    if fields.next()? == "Z" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// Writes "pid start-time" by rename, so that a reader sees all of it or nothing.
fn record(path: &Path, pid: i32) -> Result<()> {
    let start = start_time(pid).context("the process is gone")?;
    let new = path.with_extension("new");
    std::fs::write(&new, format!("{pid} {start}"))?;
    Ok(std::fs::rename(&new, path)?)
}

/// The recorded process, if it is still that very one.
fn alive(path: &Path) -> Option<i32> {
    let text = std::fs::read_to_string(path).ok()?;
    let (pid, start) = text.split_once(' ')?;
    let pid = pid.parse().ok()?;
    (start_time(pid)? == start.trim().parse::<u64>().ok()?).then_some(pid)
}

/// The `bed` program: ourselves, or beside us, or beside the folder of the tests.
fn bed_program() -> Result<PathBuf> {
    beside_us("bed").context("the program `bed` is not built: cargo build -p integration")
}

/// The `pod` under test: `$POD_PROGRAM`, or the one that was built with us.
pub fn pod_program() -> Option<PathBuf> {
    std::env::var_os("POD_PROGRAM").map(PathBuf::from).or_else(|| beside_us("pod"))
}

/// A program of this workspace from the same build as the caller.
pub fn beside_us(name: &str) -> Option<PathBuf> {
    let us = std::env::current_exe().ok()?;
    us.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|program| program.is_file())
}
