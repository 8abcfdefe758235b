//! Starting `pod` on another host, with its standard input and output here: by ssh, or by that host's daemon.
//!
//! `ssh [-p PORT] [OPTIONS] [user@]host -- POD receive` is the user's own program, configuration and keys. `pod dial HOST receive`
//! does the same where a daemon listens ([`super::daemon`]). What either and the far side print on stderr is kept and becomes
//! part of the message when the link cannot be made; questions (passphrases, unknown hosts) go to the terminal as always.

use super::{Interrupt, LINK, Link};
use nix::sys::memfd::{MFdFlags, memfd_create};
use pod_runtime::store::Store;
use pod_runtime::{Doing, Problem, Result};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Who answers there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scheme {
    #[default]
    Ssh,
    /// `pod daemon`.
    Daemon,
}

/// Where the other host is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    pub scheme: Scheme,
    /// `[user@]host`, as ssh takes it; or the name under which its daemon is known.
    pub host: String,
    pub port: Option<u16>,
}

/// How to reach it.
#[derive(Debug, Clone)]
pub struct Dial {
    pub target: Target,
    /// More `-o` options for ssh.
    pub options: Vec<String>,
    /// The program there, for ssh.
    pub remote_pod: String,
    /// Everything goes by this way, also where the hosts reach each other without.
    pub tunnelled: bool,
    /// Whose keys a daemon knows this host by.
    pub store: Store,
}

/// What a daemon's target begins with.
pub const DAEMON: &str = "pod://";

impl Target {
    /// `[user@]host[:port]`, `[user@][v6address][:port]` for ssh, `pod://host[:port]` for a daemon.
    pub fn parse(text: &str) -> Result<Target> {
        let bad = || {
            Problem::new("E-USAGE", format!("'{text}' is no destination"))
                .fix("write it as [user@]host[:port], or where a daemon answers pod://host[:port]")
        };
        let (scheme, text) = match text.strip_prefix(DAEMON) {
            Some(rest) => (Scheme::Daemon, rest),
            None => (Scheme::Ssh, text),
        };
        let (user, rest) = text.rsplit_once('@').map_or(("", text), |(user, rest)| (user, rest));
        let (host, port) = match rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((host, "")) => (host, None),
            Some((host, port)) => (host, Some(port.strip_prefix(':').ok_or_else(bad)?)),
            None if rest.matches(':').count() == 1 => {
                rest.split_once(':').map(|(h, p)| (h, Some(p))).unwrap_or((rest, None))
            }
            None => (rest, None),
        };
        // ssh would take a leading dash for an option.
        let spoils = |word: &str| word.starts_with('-') || word.contains(char::is_whitespace);
        if host.is_empty() || spoils(host) || spoils(user) || scheme == Scheme::Daemon && !user.is_empty() {
            return Err(bad());
        }
        let port = port.map(|p| p.parse().map_err(|_| bad())).transpose()?;
        let host = if user.is_empty() { host.to_owned() } else { format!("{user}@{host}") };
        Ok(Target { scheme, host, port })
    }
}

impl fmt::Display for Target {
    /// As it was written.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.scheme == Scheme::Daemon { DAEMON } else { "" };
        match self.port {
            Some(port) if self.host.contains(':') => write!(f, "{scheme}[{}]:{port}", self.host),
            Some(port) => write!(f, "{scheme}{}:{port}", self.host),
            None => write!(f, "{scheme}{}", self.host),
        }
    }
}

/// The process here that speaks for the one there; ended when dropped.
#[derive(Debug)]
pub struct Remote {
    child: Child,
    words: File,
}

impl Dial {
    /// What runs `pod ARGS…` there. The arguments go through a shell there, if it is ssh.
    pub fn command(&self, args: &[&str]) -> Command {
        match self.target.scheme {
            Scheme::Ssh => self.ssh(args),
            Scheme::Daemon => self.daemon(args),
        }
    }

    fn daemon(&self, args: &[&str]) -> Command {
        // The program that runs, also where another was installed in its place meanwhile.
        let mut command = Command::new("/proc/self/exe");
        command.env("POD_ROOT", self.store.data()).env("POD_RUN", self.store.run());
        command
            .args(["--json", "dial"])
            .args(self.target.port.iter().flat_map(|port| ["--port".to_owned(), port.to_string()]));
        command.arg(&self.target.host).arg("--").args(args);
        command
    }

    fn ssh(&self, args: &[&str]) -> Command {
        let program = std::env::var_os("POD_SSH").filter(|p| !p.is_empty()).unwrap_or_else(|| OsString::from("ssh"));
        let mut command = Command::new(program);
        for option in ["ServerAliveInterval=3", "ServerAliveCountMax=3", "ForwardX11=no", "ForwardAgent=no"] {
            command.args(["-o", option]);
        }
        for option in &self.options {
            command.args(["-o", option]);
        }
        // Of what ssh offers by itself the fastest where the processor has instructions for AES; memory may have to go
        // through here while the pod stands still. The first word counts: an option that was given goes before.
        command.args(["-o", "Ciphers=^aes128-gcm@openssh.com"]);
        if let Some(port) = self.target.port {
            command.args(["-p", &port.to_string()]);
        }
        command.args(["-T", &self.target.host, "--", &self.remote_pod]).args(args);
        command
    }

    /// Starts `pod receive` there and opens the link to it.
    pub fn connect(&self, interrupt: Option<Interrupt>) -> Result<(Remote, Link)> {
        let words: File =
            memfd_create(c"dial-stderr", MFdFlags::MFD_CLOEXEC).doing(|| "make a file in memory".into())?.into();
        let mut command = self.command(&["receive"]);
        let program = command.get_program().to_owned();
        let stderr = words.try_clone().doing(|| "copy a descriptor".into())?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(stderr);
        let mut child = command.spawn().code(LINK, || format!("start {}", program.to_string_lossy()))?;
        let (from, to) = (child.stdout.take(), child.stdin.take());
        let mut remote = Remote { child, words };
        let (Some(from), Some(to)) = (from, to) else {
            return Err(Problem::new(LINK, "what was started has no pipes"));
        };
        match Link::open(OwnedFd::from(from), OwnedFd::from(to), &self.target.host, interrupt) {
            Ok(link) => Ok((remote, link)),
            Err(problem) if problem.code() == super::channel::ABORTED => Err(problem),
            Err(problem) => Err(remote.explain(problem, self)),
        }
    }
}

impl Remote {
    /// What was said on stderr makes the better message.
    fn explain(&mut self, problem: Problem, dial: &Dial) -> Problem {
        let deadline = Instant::now() + Duration::from_millis(500);
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        let host = &dial.target.host;
        let words = self.words();
        if dial.target.scheme == Scheme::Daemon {
            return daemons(&words).unwrap_or(problem);
        }
        if words.contains("command not found") || words.contains("No such file or directory") {
            return Problem::new(LINK, format!("{host} has no program '{}'", dial.remote_pod)).fix(format!(
                "copy pod there (`scp $(command -v pod) {host}:/usr/local/bin/`), or name it: --remote-pod PATH"
            ));
        }
        let Some(last) = words.lines().map(str::trim).rfind(|line| !line.is_empty()) else { return problem };
        Problem::new(LINK, format!("cannot reach pod on {host}: {last}"))
            .fix(format!("`ssh {host} {} --version` must work without a question", dial.remote_pod))
    }

    /// What it and the far side said on stderr so far.
    pub fn words(&self) -> String {
        let mut bytes = vec![0; 16 << 10];
        let n = self.words.read_at(&mut bytes, 0).unwrap_or(0);
        String::from_utf8_lossy(&bytes[..n]).into_owned()
    }
}

/// What `pod dial` said, which is a problem with its code and its way out.
fn daemons(words: &str) -> Option<Problem> {
    let report = words.lines().rev().find_map(|line| serde_json::from_str::<Said>(line).ok())?;
    Some(report.error.into())
}

#[derive(Deserialize)]
struct Said {
    error: pod_runtime::problem::Report,
}

impl Drop for Remote {
    fn drop(&mut self) {
        // Its descriptors are closed by now; a far side that hangs must not keep us.
        let deadline = Instant::now() + Duration::from_millis(300);
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets() {
        let of = |scheme| move |host: &str, port| Some(Target { scheme, host: host.into(), port });
        let (target, daemon) = (of(Scheme::Ssh), of(Scheme::Daemon));
        for (text, expected) in [
            ("hostB", target("hostB", None)),
            ("root@hostB:2222", target("root@hostB", Some(2222))),
            ("[fd77::12]:22", target("fd77::12", Some(22))),
            ("me@[fd77::12]", target("me@fd77::12", None)),
            ("fd77::12", target("fd77::12", None)),
            ("pod://hostB", daemon("hostB", None)),
            ("pod://hostB:99", daemon("hostB", Some(99))),
            ("pod://[fd77::12]:99", daemon("fd77::12", Some(99))),
            ("pod://me@hostB", None),
            ("pod://", None),
            ("pod://-evil", None),
            ("-oProxyCommand=evil", None),
            ("x@-evil", None),
            ("a user@hostB", None),
            ("host:port", None),
            ("", None),
        ] {
            let parsed = Target::parse(text).ok();
            assert_eq!(parsed, expected, "{text}");
            if let Some(target) = parsed {
                assert_eq!(Target::parse(&target.to_string()).ok(), Some(target), "{text}");
            }
        }
    }
}
