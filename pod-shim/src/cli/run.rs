//! `pod run`: a program in a new pod.

use super::{Context, Exit, options};
use crate::output;
use crate::terminal::{self, View};
use nix::sys::stat::{SFlag, major, minor, stat};
use pod_runtime::monitor::{self, Beginning, Launch, Started};
use pod_runtime::security::{capabilities, user};
use pod_runtime::spec::{self, Base, NetworkMode, Seccomp, Spec};
use pod_runtime::store::{Pod, Store};
use pod_runtime::{Doing, Problem, Result, lifecycle, status, store};
use serde_json::json;
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::PathBuf;

/// Where programs are looked for in a pod, as in docker.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pod run -it -- bash                          a shell; leave it with ctrl-p ctrl-q
  pod run -d --name web -p 8080:80 -- nginx -g 'daemon off;'
  pod run -d --network bridge:br0 --ip 10.77.0.100/24 -- redis-server
  pod run --rm -v ./src:/src:ro -w /src -m 512m -- make test

The program's exit code is that of `pod run`; 125: pod failed, 126: the program cannot be executed, 127: not found.")]
pub struct Args {
    /// Keep stdin open
    #[arg(short, long)]
    interactive: bool,
    /// Give the program a terminal
    #[arg(short, long)]
    tty: bool,
    /// Do not wait; print the pod's name
    #[arg(short, long)]
    detach: bool,
    /// Keys that leave a terminal without ending the program
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q")]
    detach_keys: String,
    /// Remove the pod when it ends
    #[arg(long)]
    rm: bool,
    /// Name of the pod [default: two random words]
    #[arg(long)]
    name: Option<String>,
    /// Host name inside [default: the pod's name]
    #[arg(long)]
    hostname: Option<String>,
    /// Add a tiny init as first process, which reaps and passes signals on
    #[arg(long)]
    init: bool,
    /// A note on the pod, for filters
    #[arg(short, long, value_name = "K=V")]
    label: Vec<String>,
    /// What `pod stop` sends first
    #[arg(long, value_name = "SIGNAL", default_value = "TERM")]
    stop_signal: String,
    /// Seconds that `pod stop` then waits
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    stop_timeout: u32,
    /// What is kept of the log: max-size=20m (of a file, -1: all), max-file=5
    #[arg(long, value_name = "OPTION=VALUE")]
    log_opt: Vec<String>,
    /// Write the pod's id here
    #[arg(long, value_name = "FILE")]
    cidfile: Option<PathBuf>,
    /// Write the first process's pid on this host here
    #[arg(long, value_name = "FILE")]
    pidfile: Option<PathBuf>,
    #[command(flatten)]
    program: Program,
    #[command(flatten)]
    network: Network,
    #[command(flatten)]
    limits: Limits,
    #[command(flatten)]
    security: Security,
    /// A folder or file of this host in the pod; `shared`: the same storage on every host
    #[arg(short, long, value_name = "SRC:DST[:ro][,shared]", help_heading = "Files")]
    volume: Vec<String>,
    /// Run on this root instead of the host's own
    #[arg(long, value_name = "DIR", help_heading = "Files")]
    rootfs: Option<PathBuf>,
    /// Nothing can be written but to volumes and /tmp
    #[arg(long, help_heading = "Files")]
    read_only: bool,
    /// A device of this host
    #[arg(long, value_name = "SRC[:DST[:rwm]]", help_heading = "Files")]
    device: Vec<String>,
    /// The program and its arguments
    #[arg(required = true, num_args = 1.., trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<String>,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Program")]
struct Program {
    /// Set a variable, or pass on the one that is set here
    #[arg(short, long, value_name = "K=V|K")]
    env: Vec<String>,
    /// Read variables from a file
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// Folder to begin in
    #[arg(short, long, value_name = "DIR", default_value = "/")]
    workdir: PathBuf,
    /// Who the program runs as, by the pod's own passwd file or by number [default: root]
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Further groups
    #[arg(long, value_name = "GROUP")]
    group_add: Vec<String>,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Network")]
struct Network {
    /// pod, none, host, bridge:IFACE, or a network's name
    #[arg(long, visible_alias = "net", value_name = "NETWORK", default_value = "pod")]
    network: String,
    /// Address of the pod
    #[arg(long, value_name = "A[/N]")]
    ip: Vec<String>,
    /// MAC address of the pod
    #[arg(long, value_name = "MAC")]
    mac_address: Option<String>,
    /// Make a port of the pod reachable as one of this host
    #[arg(short, long, value_name = "[IP:]HOST:POD[/udp]")]
    publish: Vec<String>,
    /// Name servers [default: the host's]
    #[arg(long, value_name = "IP")]
    dns: Vec<std::net::IpAddr>,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Limits")]
struct Limits {
    /// Memory at most, as in 512m
    #[arg(short, long, value_name = "SIZE")]
    memory: Option<String>,
    /// CPUs at most, as in 1.5
    #[arg(long, value_name = "N")]
    cpus: Option<f64>,
    /// Processes and threads at most
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pids_limit: Option<i64>,
    /// A resource limit of each process
    #[arg(long, value_name = "NAME=SOFT[:HARD]")]
    ulimit: Vec<String>,
    /// Preference of the kernel's OOM killer, -1000 to 1000
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-1000..=1000))]
    oom_score_adj: Option<i32>,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Security")]
struct Security {
    /// Add a capability, or ALL
    #[arg(long, value_name = "CAP")]
    cap_add: Vec<String>,
    /// Drop a capability, or ALL
    #[arg(long, value_name = "CAP")]
    cap_drop: Vec<String>,
    /// seccomp=FILE, seccomp=unconfined, no-new-privileges
    #[arg(long, value_name = "OPTION")]
    security_opt: Vec<String>,
    /// All capabilities, no seccomp filter, nothing masked
    #[arg(long)]
    privileged: bool,
}

pub fn run(args: Args, context: &Context) -> Result<Exit> {
    let store = context.store()?;
    let detach_keys = options::detach_keys(&args.detach_keys)?;
    if args.tty && args.interactive && !args.detach && !std::io::stdin().is_terminal() {
        return Err(Problem::new("E-USAGE", "-t needs a terminal, and stdin is none").fix("leave -t away, or add -d"));
    }
    let spec = spec_of(&args, &store)?;
    let (attach, input) = (!args.detach, args.interactive && !args.detach);
    let (pod, started) = launch(&store, spec, attach)?;
    for (path, text) in [(&args.cidfile, pod.id().to_owned()), (&args.pidfile, started.init.to_string())] {
        if let Some(path) = path {
            std::fs::write(path, text).doing(|| format!("write {}", path.display()))?;
        }
    }
    for warning in &started.warnings {
        output::say(format!("warning: {warning}"));
    }
    let name = pod.name().unwrap_or_else(|_| pod.id().to_owned());
    let Some(stream) = started.client else {
        return show_started(context, &pod, &name);
    };
    let (terminal, proxy) = (args.tty, true);
    View { stream, input, terminal, detach_keys, proxy, pod, session: None }.show(&name)
}

fn show_started(context: &Context, pod: &Pod, name: &str) -> Result<Exit> {
    if !context.json {
        output::data(&format!("{name}\n"))?;
        return Ok(Exit::OK);
    }
    // It may have ended, and with `--rm` be gone, by now.
    let addresses = pod.spec().map(|spec| spec.network.addresses).unwrap_or_default();
    output::json(&json!({
        "schema_version": output::SCHEMA_VERSION,
        "id": pod.id(),
        "name": name,
        "addresses": addresses,
    }))?;
    Ok(Exit::OK)
}

/// Reserves, leases and starts; what was begun is taken back when it fails.
fn launch(store: &Store, mut spec: Spec, attach: bool) -> Result<(Pod, Started)> {
    let pod = store.reserve(&spec)?;
    let started = lifecycle::settle_network(&pod, &mut spec).and_then(|()| {
        store.event(&pod, "create", &[]);
        if attach {
            terminal::keep_signals()?;
        }
        let launch = Launch { pod: pod.clone(), spec, beginning: Beginning::Run, size: terminal::size(), attach };
        monitor::spawn(launch)
    });
    match started {
        Ok(started) => Ok((pod, started)),
        Err(problem) => {
            // The monitor has done it already, if there was one.
            let _ = lifecycle::remove(&pod);
            Err(problem)
        }
    }
}

/// What was asked for, as plain data.
fn spec_of(args: &Args, store: &Store) -> Result<Spec> {
    let name = match &args.name {
        Some(name) => name.clone(),
        None => store.free_name()?,
    };
    store::check_name(&name)?;
    let here = std::env::current_dir().doing(|| "find the working folder".into())?;
    let hostname = args.hostname.clone().unwrap_or_else(|| hostname_of(&name));
    if hostname.is_empty()
        || hostname.len() > 64
        || hostname.contains(|c: char| !c.is_ascii_alphanumeric() && !"-.".contains(c))
    {
        return Err(Problem::new("E-USAGE", format!("'{hostname}' cannot be a host name")));
    }
    let base = match &args.rootfs {
        None => Base::Host,
        Some(dir) => Base::Directory(folder(&here.join(dir))?),
    };
    let volumes = args.volume.iter().map(|text| mounted(options::volume(text, &here)?)).collect::<Result<Vec<_>>>()?;
    Ok(Spec {
        version: spec::VERSION,
        id: store::new_id()?,
        created: status::now(),
        process: process(args, &base, &hostname)?,
        hostname,
        root: spec::Root { base, read_only: args.read_only },
        volumes,
        network: network(&args.network)?,
        resources: resources(&args.limits)?,
        security: security(&args.security)?,
        devices: args.device.iter().map(|text| device(text)).collect::<Result<_>>()?,
        labels: args.label.iter().map(|text| options::label(text)).collect(),
        auto_remove: args.rm,
        stop_signal: options::signal(&args.stop_signal)?,
        stop_timeout: args.stop_timeout,
        log: options::log(&args.log_opt)?,
        name,
    })
}

/// Host names have no underscores.
fn hostname_of(name: &str) -> String {
    name.replace('_', "-").trim_matches(|c| c == '-' || c == '.').to_owned()
}

fn folder(path: &std::path::Path) -> Result<PathBuf> {
    let found = std::fs::canonicalize(path);
    let found =
        found.map_err(|e| Problem::new("E-USAGE", format!("there is no folder {}", path.display())).because(e))?;
    if found.is_dir() { Ok(found) } else { Err(Problem::new("E-USAGE", format!("{} is no folder", path.display()))) }
}

/// A volume whose source is there, by its real path.
fn mounted(volume: spec::Volume) -> Result<spec::Volume> {
    let source = std::fs::canonicalize(&volume.source).map_err(|error| {
        Problem::new("E-USAGE", format!("there is nothing at {} that could be mounted", volume.source.display()))
            .because(error)
            .fix(format!("mkdir -p {}", volume.source.display()))
    })?;
    Ok(spec::Volume { source, ..volume })
}

fn process(args: &Args, base: &Base, hostname: &str) -> Result<spec::Process> {
    let program = &args.program;
    let (mut user, home) = user::look_up(base, program.user.as_deref().unwrap_or_default())?;
    for group in &program.group_add {
        let (found, _) = user::look_up(base, &format!("0:{group}"))?;
        user.additional_gids.push(found.gid);
    }
    if !program.workdir.is_absolute() {
        return Err(Problem::new("E-USAGE", format!("the folder '{}' is not absolute", program.workdir.display())));
    }
    let mut env = BTreeMap::new();
    env.insert("PATH".to_owned(), PATH.to_owned());
    env.insert("HOSTNAME".to_owned(), hostname.to_owned());
    env.insert("HOME".to_owned(), home.unwrap_or_else(|| "/".into()));
    if args.tty {
        env.insert("TERM".to_owned(), std::env::var("TERM").unwrap_or_else(|_| "xterm".into()));
    }
    env.extend(variables(&program.env, &program.env_file)?);
    Ok(spec::Process {
        args: args.command.clone(),
        env: env.into_iter().map(|(key, value)| format!("{key}={value}")).collect(),
        cwd: program.workdir.clone(),
        user,
        terminal: args.tty,
        interactive: args.interactive,
        init: args.init,
        no_new_privileges: no_new_privileges(&args.security.security_opt),
        rlimits: args.limits.ulimit.iter().map(|text| options::ulimit(text)).collect::<Result<_>>()?,
        oom_score_adj: args.limits.oom_score_adj,
    })
}

/// Of `--env-file` and `-e`, in this order.
pub fn variables(env: &[String], files: &[PathBuf]) -> Result<Vec<(String, String)>> {
    let lookup = |key: &str| std::env::var(key).ok();
    let mut found = Vec::new();
    for path in files {
        let text = std::fs::read_to_string(path).code("E-USAGE", || format!("read {}", path.display()))?;
        found.extend(options::env_file(&text, lookup)?);
    }
    for text in env {
        found.extend(options::env(text, lookup)?);
    }
    Ok(found)
}

fn network(args: &Network) -> Result<spec::Network> {
    let mode = options::network(&args.network)?;
    let ports = args.publish.iter().map(|text| options::ports(text)).collect::<Result<Vec<_>>>()?.concat();
    if args.mac_address.is_some() && matches!(mode, NetworkMode::None | NetworkMode::Host) {
        return Err(Problem::new("E-USAGE", "--mac-address means nothing without a network of the pod's own"));
    }
    Ok(spec::Network {
        mode,
        addresses: args.ip.iter().map(|text| options::address(text)).collect::<Result<_>>()?,
        gateways: Vec::new(),
        mac: args.mac_address.clone(),
        mtu: None,
        dns: args.dns.clone(),
        ports,
    })
}

fn resources(limits: &Limits) -> Result<spec::Resources> {
    if limits.cpus.is_some_and(|cpus| !cpus.is_finite() || cpus <= 0.0) {
        return Err(Problem::new("E-USAGE", "--cpus must be above 0").fix("--cpus 1.5"));
    }
    Ok(spec::Resources {
        memory: limits.memory.as_deref().map(options::size).transpose()?.filter(|bytes| *bytes > 0),
        cpus: limits.cpus,
        // Docker: 0 and -1 are unlimited.
        pids: limits.pids_limit.and_then(|n| u64::try_from(n).ok()).filter(|n| *n > 0),
    })
}

fn no_new_privileges(options: &[String]) -> bool {
    options
        .iter()
        .any(|o| matches!(o.as_str(), "no-new-privileges" | "no-new-privileges:true" | "no-new-privileges=true"))
}

fn security(args: &Security) -> Result<spec::Security> {
    let mut seccomp = if args.privileged { Seccomp::Unconfined } else { Seccomp::Default };
    for option in &args.security_opt {
        match option.split_once(['=', ':']) {
            Some(("seccomp", "unconfined")) => seccomp = Seccomp::Unconfined,
            Some(("seccomp", path)) => {
                let text =
                    std::fs::read_to_string(path).code("E-USAGE", || format!("read the seccomp profile {path}"))?;
                seccomp = Seccomp::Profile(text);
            }
            None | Some((_, "true" | "false")) if option.starts_with("no-new-privileges") => {}
            _ => {
                return Err(Problem::new("E-USAGE", format!("--security-opt {option} is not known"))
                    .fix("seccomp=FILE, seccomp=unconfined or no-new-privileges"));
            }
        }
    }
    let mut add = args.cap_add.clone();
    if args.privileged {
        add.push("ALL".into());
    }
    Ok(spec::Security {
        privileged: args.privileged,
        capabilities: capabilities::resolve(&add, &args.cap_drop)?,
        seccomp,
    })
}

fn device(text: &str) -> Result<spec::Device> {
    let (source, path, access) = options::device(text)?;
    let found = stat(&source).code("E-USAGE", || format!("find the device {}", source.display()))?;
    let kind = match SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT {
        SFlag::S_IFCHR => "c",
        SFlag::S_IFBLK => "b",
        _ => return Err(Problem::new("E-USAGE", format!("{} is no device", source.display()))),
    };
    let (major, minor) = (major(found.st_rdev) as u32, minor(found.st_rdev) as u32);
    Ok(spec::Device { path, kind: kind.into(), major, minor, access })
}
