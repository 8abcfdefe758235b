//! One host: the handle that tests hold, and the processes that make and enter it.
//!
//! Birth: `__host` joins the host's cgroups, makes the namespaces and starts `__init`, which is pid 1 there and builds
//! the mounts. Entering: `__enter` joins cgroups and namespaces and starts `__exec`, which becomes the program and dies
//! with its parent, so that to kill what [`Host::command`] gave is to kill the program.

use super::{alive, bed_program, cgroups};
use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigSet, Signal};
use std::convert::Infallible;
use std::fs;
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A host of a bed that is up.
#[derive(Debug, Clone)]
pub struct Host {
    name: String,
    dir: PathBuf,
    index: usize,
    environment: Vec<(String, String)>,
}

impl Host {
    pub(super) fn new(bed: &Path, name: &str, index: usize) -> Host {
        Host { name: name.into(), dir: bed.join(name), index, environment: Vec::new() }
    }

    /// The same host, whose commands have a variable set.
    pub fn with(&self, variable: &str, value: &str) -> Host {
        let mut host = self.clone();
        host.environment.push((variable.into(), value.into()));
        host
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its address on the LAN.
    pub fn address(&self) -> std::net::Ipv4Addr {
        [10, 77, 0, 11 + self.index as u8].into()
    }

    pub fn address6(&self) -> std::net::Ipv6Addr {
        [0xfd77, 0, 0, 0, 0, 0, 0, 0x11 + self.index as u16].into()
    }

    /// Its init, as this machine numbers it.
    pub fn pid(&self) -> Result<i32> {
        alive(&self.dir.join("pid")).with_context(|| format!("host {} is not up", self.name))
    }

    /// One of its processes, as this machine numbers it. Those of its pods are not its own.
    pub fn process(&self, is: impl Fn(i32) -> bool) -> Option<i32> {
        let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let ours = namespace(self.pid().ok()?)?;
        let processes = fs::read_dir("/proc").ok()?.flatten();
        let mut numbers = processes.filter_map(|entry| entry.file_name().to_string_lossy().parse().ok());
        numbers.find(|pid| is(*pid) && namespace(*pid).as_ref() == Some(&ours))
    }

    /// Its file tree, as seen from outside.
    pub fn root(&self) -> Result<PathBuf> {
        Ok(format!("/proc/{}/root", self.pid()?).into())
    }

    pub(super) fn cgroups(&self) -> Vec<PathBuf> {
        cgroups::directories(&self.bed(), &self.name)
    }

    pub(super) fn bed(&self) -> String {
        let bed = self.dir.parent().and_then(Path::file_name).unwrap_or_default();
        bed.to_string_lossy().into_owned()
    }

    /// A command that will run on this host, in all its namespaces and cgroups, with `pod` on its PATH.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(bed_program().expect("the bed was made with it"));
        command.arg("__enter").arg(&self.dir).arg(program);
        command.envs(self.environment.iter().map(|(variable, value)| (variable, value)));
        command
    }

    /// Runs a command line to its end, with its output; an error when it fails.
    pub fn run(&self, line: &[&str]) -> Result<String> {
        let output = self.output(line)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("on {}: {}: {}\n{text}{said}", self.name, line.join(" "), output.status);
        }
        Ok(text)
    }

    /// Runs a command line to its end and tells how it ended.
    pub fn output(&self, line: &[&str]) -> Result<Output> {
        let (program, arguments) = line.split_first().context("an empty command line")?;
        let output = self.command(program).args(arguments).stdin(Stdio::null()).output();
        output.with_context(|| format!("on {}: {}", self.name, line.join(" ")))
    }

    /// A tool of this machine, in the host's network namespace only: no process of the host, no trace in its `/proc`.
    pub fn in_network(&self, program: &str) -> Result<Command> {
        Ok(in_network(self.pid()?, program))
    }

    /// A thread of ours whose sockets are the host's: for clients that share a clock with who watches them.
    pub fn thread<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<std::thread::JoinHandle<Result<T>>> {
        let network = fs::File::open(format!("/proc/{}/ns/net", self.pid()?))?;
        Ok(std::thread::spawn(move || {
            setns(&network, CloneFlags::CLONE_NEWNET).context("enter a host's network")?;
            work()
        }))
    }

    /// Power failure: every process of the host is killed at once, its files stay.
    pub fn crash(&self) -> Result<()> {
        let pid = self.pid()?;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL)?;
        crate::wait::until_true("the host to be gone", crate::wait::SOON, || self.pid().is_err())
    }
}

/// The program that a spawned [`Host::command`] runs, as this machine numbers it.
pub fn program_of(entered: &std::process::Child) -> Result<i32> {
    let children = format!("/proc/{0}/task/{0}/children", entered.id());
    crate::wait::until("the program to start", crate::wait::SOON, || {
        let child: i32 = fs::read_to_string(&children).ok()?.trim().parse().ok()?;
        // Before it became the program it is still `bed __exec`.
        let line = fs::read(format!("/proc/{child}/cmdline")).ok()?;
        (!line.is_empty() && !line.windows(7).any(|word| word == b"__exec\0")).then_some(child)
    })
}

pub(super) fn in_network(pid: i32, program: &str) -> Command {
    let mut command = Command::new("nsenter");
    command.args(["-t", &pid.to_string(), "-n", "--", program]).stdin(Stdio::null());
    command
}

/// `__host DIR BED HOST`: makes the namespaces, starts init, and ends when init has ended.
pub(super) fn birth(args: &[String]) -> Result<i32> {
    let [_dir, bed, host] = args else { bail!("__host DIR BED HOST") };
    cgroups::join(bed, host, cgroups::Place::Root)?;
    let all = CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWCGROUP;
    unshare(all).context("make a host's namespaces")?;
    cgroups::settle(bed, host)?;
    let mut init = Command::new("/proc/self/exe").arg("__init").args(args).spawn().context("start a host's init")?;
    Ok(init.wait()?.code().unwrap_or(1))
}

/// `__init DIR BED HOST`: pid 1 of a host. Builds its mounts, says "ready", reaps, and ends when stdin does.
pub(super) fn init(args: &[String]) -> Result<()> {
    let [dir, _bed, host] = args else { bail!("__init DIR BED HOST") };
    // Whoever is re-parented to us must not make us a zombie keeper: SIGCHLD is waited for, so it has to be blocked.
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    children.thread_block()?;
    mounts(Path::new(dir), host)?;
    println!("ready");
    std::thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(0);
    });
    loop {
        use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
        while !matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Err(_) | Ok(WaitStatus::StillAlive)) {}
        children.wait()?;
    }
}

const NONE: Option<&str> = None;

fn mounts(dir: &Path, host: &str) -> Result<()> {
    let hierarchies = cgroups::hierarchies();
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).context("make mounts private")?;
    // The machine's /sys and /proc are taken off, not covered: a program that reads mountinfo must find each once.
    for (kind, target) in [("sysfs", "/sys"), ("proc", "/proc")] {
        umount2(target, MntFlags::MNT_DETACH).with_context(|| format!("take {target} off"))?;
        mount(Some(kind), target, Some(kind), MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC, NONE)
            .with_context(|| format!("mount {target}"))?;
    }
    mount_cgroups(&hierarchies)?;
    nix::unistd::sethostname(host)?;
    fs::create_dir_all("/root/.ssh")?;
    let layers = format!("lowerdir=/etc,upperdir={0}/etc,workdir={0}/etc.work", dir.display());
    mount(Some("overlay"), "/etc", Some("overlay"), MsFlags::empty(), Some(layers.as_str())).context("overlay /etc")?;
    // No overlay here: an overlay cannot carry the upper layers of pods.
    bind(&dir.join("var-lib"), "/var/lib")?;
    bind(&dir.join("ssh"), "/root/.ssh")?;
    if Path::new("/root/.bashrc").exists() {
        // sshd's shell reads it, and a person's own may be slow or noisy.
        bind(Path::new("/dev/null"), "/root/.bashrc")?;
    }
    for (target, mode) in [("/dev/shm", "mode=1777"), ("/run", "mode=755")] {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("tmpfs"), target, Some("tmpfs"), flags, Some(mode)).with_context(|| format!("mount {target}"))?;
    }
    fs::create_dir_all("/run/sshd")?;
    fs::create_dir_all("/run/lock")?;
    // Addresses must be usable at once; nobody else can have them.
    for which in ["all", "default"] {
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{which}/accept_dad"), "0");
    }
    Ok(())
}

fn bind(source: &Path, target: &str) -> Result<()> {
    mount(Some(source), target, NONE, MsFlags::MS_BIND, NONE).with_context(|| format!("bind {target}"))
}

/// Every hierarchy again, seen from the host's cgroup namespace: its own part is the root.
fn mount_cgroups(hierarchies: &[cgroups::Hierarchy]) -> Result<()> {
    let root = Path::new("/sys/fs/cgroup");
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    if !hierarchies.iter().any(|hierarchy| hierarchy.mount == root) {
        mount(Some("tmpfs"), root, Some("tmpfs"), flags, Some("mode=755")).context("mount /sys/fs/cgroup")?;
    }
    for hierarchy in hierarchies {
        if !hierarchy.mount.starts_with(root) {
            continue;
        }
        fs::create_dir_all(&hierarchy.mount)?;
        let (kind, options) = match (hierarchy.v2, hierarchy.options.starts_with("name=")) {
            (true, _) => ("cgroup2", None),
            (false, true) => ("cgroup", Some(format!("none,{}", hierarchy.options))),
            (false, false) => ("cgroup", Some(hierarchy.options.clone())),
        };
        mount(Some(kind), &hierarchy.mount, Some(kind), flags, options.as_deref())
            .with_context(|| format!("mount {}", hierarchy.mount.display()))?;
    }
    Ok(())
}

/// `__enter DIR PROGRAM ARGS…`: runs a program on the host whose directory that is, and ends as it ended.
pub(super) fn enter(args: &[String]) -> Result<i32> {
    let [dir, line @ ..] = args else { bail!("__enter DIR PROGRAM ARGS") };
    let dir = Path::new(dir);
    let host = dir.file_name().unwrap_or_default().to_string_lossy();
    let bed = dir.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
    let pid = alive(&dir.join("pid")).with_context(|| format!("host {host} is not up"))?;
    // Mount last: the other files are found through the machine's /proc.
    let kinds = ["cgroup", "ipc", "uts", "net", "pid", "mnt"];
    let open = |kind| fs::File::open(format!("/proc/{pid}/ns/{kind}"));
    let namespaces = kinds.into_iter().map(open).collect::<std::io::Result<Vec<_>>>()?;
    let us = std::env::current_exe()?;
    let here = std::env::current_dir().unwrap_or_else(|_| "/".into());
    cgroups::join(&bed, &host, cgroups::Place::Leaf)?;
    for namespace in &namespaces {
        setns(namespace, CloneFlags::empty()).context("enter a host's namespaces")?;
    }
    drop(namespaces);
    if std::env::set_current_dir(&here).is_err() {
        std::env::set_current_dir("/")?;
    }
    let mut program = Command::new(us);
    program.arg("__exec").args(line).env("PATH", path(dir.parent().unwrap_or(dir))).env("HOME", "/root");
    let status = program.env_remove("POD_PROGRAM").status()?;
    Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
}

/// PATH on every host of the bed in `dir`: its `pod` comes first.
pub(super) fn path(dir: &Path) -> String {
    format!("{}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", dir.display())
}

/// `__exec PROGRAM ARGS…`: becomes the program, killed when the parent dies.
pub(super) fn exec(line: &[String]) -> Result<Infallible> {
    let (program, args) = line.split_first().context("no program")?;
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    let error = Command::new(program).args(args).exec();
    eprintln!("{program}: {error}");
    std::process::exit(if error.kind() == std::io::ErrorKind::NotFound { 127 } else { 126 })
}
