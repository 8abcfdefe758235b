//! `pod doctor`: whether this host has what pods need. Everything is tried, not guessed from a version; nothing is left
//! behind. With `--to` also what lies between two hosts, and the other one ([`there`]).

mod there;

use super::migrate::Reach;
use super::{Context, Exit};
use crate::output;
use nix::sched::CloneFlags;
use pod_runtime::sys::daemon;
use pod_runtime::{Result, network};
use serde_json::json;
use std::fs;
use std::path::Path;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Exit code 0: all that is needed is there; 1: something that fails keeps pods from running, or from moving."
)]
pub struct Args {
    /// Also whether pods can move to that host, and what it says of itself
    #[arg(long, value_name = "[USER@]HOST[:PORT]")]
    to: Option<String>,
    #[command(flatten)]
    reach: Reach,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Health {
    Ok,
    Warn,
    Fail,
}

/// One line of the answer.
struct Finding {
    what: String,
    health: Health,
    found: String,
    /// What does not work without it.
    disables: String,
    fix: String,
}

fn finding(
    what: impl Into<String>,
    good: bool,
    bad: Health,
    found: String,
    disables: impl Into<String>,
    fix: impl Into<String>,
) -> Finding {
    let health = if good { Health::Ok } else { bad };
    Finding { what: what.into(), health, found, disables: disables.into(), fix: fix.into() }
}

pub fn run(args: Args, context: &Context) -> Result<Exit> {
    let mut findings = examine();
    if let Some(to) = &args.to {
        findings.extend(there::examine(to, &args.reach.to(to, &context.store()?)?));
    }
    let failed = findings.iter().any(|f| f.health == Health::Fail);
    if context.json {
        let rows = findings.iter().map(|f| {
            let health = format!("{:?}", f.health).to_lowercase();
            let bad = f.health != Health::Ok;
            json!({ "what": f.what, "health": health, "found": f.found,
                    "disables": bad.then_some(&f.disables), "fix": bad.then_some(&f.fix) })
        });
        let processor = pod_migrate::migrate::offer::cpu();
        output::json(&json!({
            "schema_version": output::SCHEMA_VERSION,
            "findings": rows.collect::<Vec<_>>(),
            "processor": processor,
        }))?;
    } else {
        for f in &findings {
            let mark = match f.health {
                Health::Ok => "ok  ",
                Health::Warn => "warn",
                Health::Fail => "FAIL",
            };
            output::data(&format!("{mark}  {:<22} {}\n", f.what, output::plain(&f.found)))?;
            if f.health != Health::Ok {
                output::data(&format!(
                    "      without it: {}\n      fix: {}\n",
                    output::plain(&f.disables),
                    output::plain(&f.fix)
                ))?;
            }
        }
    }
    Ok(Exit(i32::from(failed)))
}

fn examine() -> Vec<Finding> {
    let mut all = vec![privileges(), kernel()];
    all.extend(namespaces());
    all.push(cgroups());
    all.extend(storage());
    all.push(program("nft", "outbound NAT and published ports", "apt-get install nftables"));
    all.push(program("ssh", "pod migrate to another host", "apt-get install openssh-client"));
    all.push(forwarding());
    all.push(nft_table());
    all.push(dirty_tracking());
    all
}

fn privileges() -> Finding {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).map(str::trim).unwrap_or_default();
    let bits = u64::from_str_radix(effective, 16).unwrap_or(0);
    // SYS_ADMIN, NET_ADMIN, SYS_PTRACE, SYS_CHROOT, MKNOD, DAC_OVERRIDE, SETUID, SETGID.
    let needed = [21, 12, 19, 18, 27, 1, 7, 6];
    let good = nix::unistd::geteuid().is_root() && needed.iter().all(|cap| bits & 1 << cap != 0);
    let found = if good { "root with the capabilities that are needed".into() } else { format!("CapEff {effective}") };
    finding("privileges", good, Health::Fail, found, "everything but help", "run as root: sudo pod doctor")
}

fn kernel() -> Finding {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut parts = release.trim().split(['.', '-']).map(|n| n.parse::<u32>().unwrap_or(0));
    let version = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    let found = format!("Linux {}", release.trim());
    finding(
        "kernel",
        version >= (5, 14),
        Health::Warn,
        found,
        "pods are tried on Linux 6.1 and newer only",
        "a newer kernel",
    )
}

/// Each kind is tried in a child.
fn namespaces() -> Vec<Finding> {
    let kinds = [
        ("pid namespaces", CloneFlags::CLONE_NEWPID),
        ("mount namespaces", CloneFlags::CLONE_NEWNS),
        ("network namespaces", CloneFlags::CLONE_NEWNET),
        ("ipc namespaces", CloneFlags::CLONE_NEWIPC),
        ("uts namespaces", CloneFlags::CLONE_NEWUTS),
        ("cgroup namespaces", CloneFlags::CLONE_NEWCGROUP),
        ("time namespaces", CloneFlags::from_bits_retain(0x80)),
    ];
    let tried = kinds.map(|(what, flag)| {
        let good = in_child(|| nix::sched::unshare(flag).is_ok());
        let found = if good { "works" } else { "refused" };
        finding(
            what,
            good,
            Health::Fail,
            found.into(),
            "pod run",
            "a kernel with it, and no sandbox around this shell that forbids it",
        )
    });
    tried.into()
}

/// Whether it works out in a child, which leaves nothing behind.
fn in_child(f: impl FnOnce() -> bool) -> bool {
    match daemon::fork() {
        Ok(daemon::Fork::Child) => daemon::exit_now(i32::from(!f())),
        Ok(daemon::Fork::Parent(pid)) => daemon::reap(pid).is_ok_and(|ended| ended.code() == 0),
        Err(_) => false,
    }
}

fn cgroups() -> Finding {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let unified = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"));
    let v1 = mounts.lines().filter(|line| line.split(' ').nth(2) == Some("cgroup")).count();
    let found = match (unified, v1) {
        (Some(_), 0) => "v2".to_owned(),
        (Some(_), n) => format!("hybrid: v2 and {n} v1 hierarchies"),
        (None, n) => format!("{n} v1 hierarchies"),
    };
    finding(
        "control groups",
        unified.is_some(),
        Health::Warn,
        found,
        "quick freezing and killing of a pod",
        "mount -t cgroup2 none /sys/fs/cgroup/unified",
    )
}

fn storage() -> Vec<Finding> {
    let root = std::env::var_os("POD_ROOT").map_or("/var/lib/pod".into(), std::path::PathBuf::from);
    let there = root.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/")).to_owned();
    // Asked for, it is loaded; /proc/filesystems has only what is there already, which is all that others may ask.
    let listed = || fs::read_to_string("/proc/filesystems").is_ok_and(|text| text.contains("\toverlay"));
    let overlay = pod_runtime::sys::mount::has_filesystem(c"overlay").is_ok() || listed();
    let free = nix::sys::statvfs::statvfs(&there).map_or(0, |s| s.blocks_available() * s.fragment_size());
    let kind = nix::sys::statfs::statfs(&there).map(|s| s.filesystem_type()).ok();
    let on_overlay = kind == Some(nix::sys::statfs::OVERLAYFS_SUPER_MAGIC);
    vec![
        finding(
            "overlay",
            overlay,
            Health::Fail,
            if overlay { "works".into() } else { "missing".into() },
            "pod run",
            "modprobe overlay",
        ),
        finding(
            "storage",
            !on_overlay,
            Health::Fail,
            format!("{} on a file system that can hold an upper layer", root.display()),
            "pod run (an overlay cannot hold another's upper layer)",
            "--root DIR on ext4, xfs, btrfs or tmpfs",
        ),
        finding(
            "free space",
            free > 1 << 30,
            Health::Warn,
            format!("{} at {}", output::size(free), there.display()),
            "room for what pods write, and for checkpoints",
            "free some, or use --root DIR elsewhere",
        ),
    ]
}

fn program(name: &'static str, disables: &'static str, fix: &'static str) -> Finding {
    let path = std::env::var("PATH").unwrap_or_default();
    let found = path.split(':').chain(["/usr/sbin", "/sbin"]).map(|dir| Path::new(dir).join(name)).find(|p| p.exists());
    let text = found.as_ref().map_or("not found".to_owned(), |path| path.display().to_string());
    finding(name, found.is_some(), Health::Warn, text, disables, fix)
}

fn forwarding() -> Finding {
    let on = fs::read_to_string("/proc/sys/net/ipv4/ip_forward").is_ok_and(|text| text.trim() == "1");
    let found = if on { "on" } else { "off (switched on with the first network that needs it)" };
    finding("IPv4 forwarding", true, Health::Warn, found.into(), "", "")
}

fn nft_table() -> Finding {
    let there = network::nat::present();
    finding("NAT table", true, Health::Warn, if there { "inet pod".into() } else { "not made yet".into() }, "", "")
}

fn dirty_tracking() -> Finding {
    let userfaultfd =
        Path::new("/dev/userfaultfd").exists() || Path::new("/proc/sys/vm/unprivileged_userfaultfd").exists();
    let found = if userfaultfd { "userfaultfd is there" } else { "no userfaultfd" };
    finding(
        "page tracking",
        userfaultfd,
        Health::Warn,
        found.into(),
        "moves that copy memory while the pod runs",
        "a kernel with CONFIG_USERFAULTFD",
    )
}
