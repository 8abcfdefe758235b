//! The keeper: the process that owns a bed. It makes the hosts, is the switch (its network namespace), and takes all of
//! it down when its stdin closes or it is told to end.
//!
//! A failure on the way up is printed on stdout instead of "ready", after everything made so far was removed.

use super::{BEDS, Host, alive, cable, cgroups, directory, files, record};
use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

struct Order {
    name: String,
    pod: Option<PathBuf>,
    persist: bool,
    hosts: Vec<String>,
}

fn parse(args: &[String]) -> Result<Order> {
    let mut order = Order { name: String::new(), pod: None, persist: false, hosts: Vec::new() };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--name" => order.name = args.next().context("--name NAME")?.clone(),
            "--pod" => order.pod = args.next().map(PathBuf::from),
            "--persist" => order.persist = true,
            host => order.hosts.push(host.into()),
        }
    }
    let proper =
        |name: &String| !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
    if !proper(&order.name) || !order.hosts.iter().all(|host| proper(host) && host.len() <= 13) {
        bail!("names of beds and hosts are letters, digits, - and _; a host's has 13 at most (its link is p-NAME)");
    }
    Ok(order)
}

/// `__keep --name NAME [--pod PROGRAM] [--persist] HOST…`
pub fn main(args: &[String]) -> Result<()> {
    let order = parse(args)?;
    let mut ends = SigSet::empty();
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().for_each(|signal| ends.add(signal));
    ends.thread_block()?;
    let signals = SignalFd::with_flags(&ends, SfdFlags::SFD_CLOEXEC)?;
    let _ = nix::unistd::setsid();
    fs::create_dir_all(BEDS)?;
    let file = fs::File::create(directory(&order.name).with_extension("lock"))?;
    let Ok(_lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
        println!("there is a bed of this name already");
        return Ok(());
    };
    remove_state(&order.name).context("remove what an earlier bed of this name left")?;
    let mut hosts = Vec::new();
    let up = raise(&order, &mut hosts);
    match &up {
        Ok(()) => println!("ready"),
        Err(error) => println!("{error:#}"),
    }
    std::io::stdout().flush()?;
    if up.is_ok() {
        wait_for_the_end(&signals, order.persist)?;
    }
    // Closing an init's stdin ends it, and all of its host with it.
    for host in &mut hosts {
        drop(host.stdin.take());
    }
    for mut host in hosts {
        host.wait()?;
    }
    remove(&order.name)
}

fn wait_for_the_end(signals: &SignalFd, persist: bool) -> Result<()> {
    let stdin = std::io::stdin();
    let mut fds = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
    if !persist {
        fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
    }
    loop {
        match poll(&mut fds, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => continue,
            ended => return Ok(ended.map(drop)?),
        }
    }
}

/// Makes everything. Hosts that were started are in `started` also when this fails.
fn raise(order: &Order, started: &mut Vec<Child>) -> Result<()> {
    let dir = directory(&order.name);
    fs::create_dir_all(&dir)?;
    let named = order.hosts.iter().enumerate();
    let hosts: Vec<Host> = named.map(|(index, host)| Host::new(&dir, host, index)).collect();
    fs::write(dir.join("names"), order.hosts.join("\n"))?;
    files::write(&dir, &hosts, order.pod.as_deref())?;
    for host in &hosts {
        cgroups::create(&order.name, host.name())?;
        let log = fs::File::create(dir.join(host.name()).join("log"))?;
        let child = Command::new("/proc/self/exe")
            .arg("__host")
            .args([&dir.join(host.name()).to_string_lossy(), order.name.as_str(), host.name()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()?;
        started.push(child);
    }
    for (host, child) in hosts.iter().zip(started.iter_mut()) {
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("stdout is a pipe")?).read_line(&mut line)?;
        let own = dir.join(host.name());
        if line.trim() != "ready" {
            bail!("host {} did not start: {}", host.name(), fs::read_to_string(own.join("log"))?.trim());
        }
        // Noted by us: the host's own processes no longer have the machine's /proc.
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id()))?;
        record(&own.join("pid"), children.trim().parse().context("a host has one init")?)?;
    }
    unshare(CloneFlags::CLONE_NEWNET).context("make the switch")?;
    cable::wire(&hosts)?;
    for host in &hosts {
        let own = dir.join(host.name());
        let (config, log) = (own.join("sshd_config"), own.join("sshd.log"));
        host.run(&["/usr/sbin/sshd", "-f", &config.to_string_lossy(), "-E", &log.to_string_lossy()])?;
    }
    record(&dir.join("keeper"), nix::unistd::getpid().as_raw())
}

/// Ends what still runs and removes the bed's cgroups, directory and lock.
pub fn remove(name: &str) -> Result<()> {
    remove_state(name)?;
    let _ = fs::remove_file(directory(name).with_extension("lock"));
    Ok(())
}

fn remove_state(name: &str) -> Result<()> {
    let dir = directory(name);
    if !dir.exists() {
        return Ok(());
    }
    for host in fs::read_to_string(dir.join("names")).unwrap_or_default().lines() {
        let file = dir.join(host).join("pid");
        if let Some(pid) = alive(&file) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
            crate::wait::until_true("a host to end", crate::wait::SOON, || alive(&file).is_none())?;
        }
        cgroups::remove(name, host)?;
    }
    // The mounts went with the hosts' namespaces: all that is below is the bed's own.
    fs::remove_dir_all(&dir).with_context(|| format!("remove {}", dir.display()))
}
