//! What a pod is, as asked for: plain data that travels with it and from which its environment is born, here or on
//! another host. Everything that a restore needs to make the same environment again is in here and nothing is guessed
//! back from the kernel.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

/// Version of this structure in images, on the wire and on disk.
pub const VERSION: u32 = 1;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Spec {
    pub version: u32,
    /// 12 lower-case hex digits; stays with the pod for life, also across moves.
    pub id: String,
    /// Unique per host; `[a-zA-Z0-9][a-zA-Z0-9_.-]*`.
    pub name: String,
    /// Seconds since the epoch.
    pub created: u64,
    pub hostname: String,
    pub process: Process,
    pub root: Root,
    #[serde(default)]
    pub volumes: Vec<Volume>,
    pub network: Network,
    #[serde(default)]
    pub resources: Resources,
    pub security: Security,
    /// Extra device nodes, as `--device`.
    #[serde(default)]
    pub devices: Vec<Device>,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// `--rm`.
    #[serde(default)]
    pub auto_remove: bool,
    /// Signal number for `pod stop`; 15 unless told otherwise.
    pub stop_signal: i32,
    /// Seconds between the stop signal and SIGKILL.
    pub stop_timeout: u32,
    #[serde(default)]
    pub log: LogLimits,
}

/// `--log-opt`: how much of what the pod wrote is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLimits {
    /// Bytes of one file.
    pub max_size: Option<u64>,
    /// Files, with the one that is written to.
    pub max_files: u32,
}

impl Default for LogLimits {
    /// 100 MiB a pod: enough to look back, and a pod that talks without end does not fill the disk.
    fn default() -> LogLimits {
        LogLimits { max_size: Some(20 << 20), max_files: 5 }
    }
}

/// The first process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Process {
    pub args: Vec<String>,
    /// `K=V` lines, complete.
    pub env: Vec<String>,
    pub cwd: PathBuf,
    pub user: User,
    /// `-t`: stdio is a pty of the pod's own devpts, its master with the monitor.
    pub terminal: bool,
    /// `-i`: stdin stays open for clients; otherwise it is /dev/null.
    pub interactive: bool,
    /// `--init`: a tiny init is pid 1 and the program its child.
    pub init: bool,
    #[serde(default)]
    pub no_new_privileges: bool,
    #[serde(default)]
    pub rlimits: Vec<Rlimit>,
    #[serde(default)]
    pub oom_score_adj: Option<i32>,
}

/// Numeric after the names were looked up in the pod's own files.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    #[serde(default)]
    pub additional_gids: Vec<u32>,
    #[serde(default)]
    pub umask: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimit {
    /// As in setrlimit(2): "nofile", "nproc", ...
    pub kind: String,
    pub soft: u64,
    pub hard: u64,
}

/// Where the pod's file tree comes from. What it writes goes to the pod's own upper layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root {
    pub base: Base,
    /// `--read-only`.
    pub read_only: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Base {
    /// The host's own root, seen through a private overlay.
    Host,
    /// A directory (`--rootfs`), seen through a private overlay.
    Directory(PathBuf),
}

/// `-v SRC:DST[:ro][,shared]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    pub source: PathBuf,
    pub destination: PathBuf,
    pub read_only: bool,
    /// Declared to be the same storage on every host: checked, not copied.
    pub shared: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    pub mode: NetworkMode,
    /// The pod's addresses on eth0 with prefix lengths; filled in by the lease before the pod is born.
    #[serde(default)]
    pub addresses: Vec<Address>,
    #[serde(default)]
    pub gateways: Vec<IpAddr>,
    /// Stable for life: derived once, then travels. Six bytes, `02:…`.
    #[serde(default)]
    pub mac: Option<String>,
    #[serde(default)]
    pub mtu: Option<u32>,
    #[serde(default)]
    pub dns: Vec<IpAddr>,
    #[serde(default)]
    pub ports: Vec<Port>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkMode {
    /// A named network of the runtime ("pod" unless told otherwise): bridge, NAT outward, leased address.
    Named(String),
    /// Straight on a bridge of the host, which is its LAN.
    Bridge(String),
    /// Only loopback.
    None,
    /// The host's own: no private network, cannot be moved.
    Host,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    pub ip: IpAddr,
    pub prefix: u8,
}

/// `-p [HOST_IP:]HOST:POD[/udp]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    #[serde(default)]
    pub host_ip: Option<IpAddr>,
    pub host: u16,
    pub pod: u16,
    pub udp: bool,
}

/// `None` is unlimited.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Resources {
    /// Bytes.
    #[serde(default)]
    pub memory: Option<u64>,
    /// CPUs as a fraction: 1.5.
    #[serde(default)]
    pub cpus: Option<f64>,
    #[serde(default)]
    pub pids: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Security {
    pub privileged: bool,
    /// Names without the prefix, sorted: "CHOWN", "NET_BIND_SERVICE", …; what the first process may hold.
    pub capabilities: Vec<String>,
    pub seccomp: Seccomp,
}

impl Security {
    /// Whether a process of the pod can hold a capability.
    pub fn may(&self, capability: &str) -> bool {
        self.privileged || self.capabilities.iter().any(|held| held == capability)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Seccomp {
    Default,
    Unconfined,
    /// The text of a profile in docker's or OCI's JSON form.
    Profile(String),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    pub path: PathBuf,
    /// "c" or "b".
    pub kind: String,
    pub major: u32,
    pub minor: u32,
    /// Of "rwm".
    pub access: String,
}
