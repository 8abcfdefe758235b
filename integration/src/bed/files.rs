//! What a bed writes before its hosts start: names, throw-away keys, settings of ssh and sshd.

use super::{Host, host};
use anyhow::{Context, Result, ensure};
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

/// Writes the bed's directory: one key for all of its roots, a host key and an `/etc` layer for each host.
pub fn write(dir: &Path, hosts: &[Host], pod: Option<&Path>) -> Result<()> {
    fs::create_dir_all(dir.join("shared"))?;
    fs::create_dir_all(dir.join("bin"))?;
    // Others may look up paths in here (postgres, nginx workers), only root may list it.
    fs::set_permissions(dir, fs::Permissions::from_mode(0o711))?;
    if let Some(pod) = pod {
        // A link of its own, so that a later build does not change the program under a bed that is up.
        let ours = dir.join("bin/pod");
        if fs::hard_link(pod, &ours).is_err() {
            fs::copy(pod, &ours).with_context(|| format!("copy {}", pod.display()))?;
        }
    }
    let id = dir.join("id");
    keygen(&id)?;
    let (mut names, mut known) = (String::from("127.0.0.1 localhost\n::1 localhost\n"), String::new());
    for host in hosts {
        let own = dir.join(host.name());
        for folder in ["etc/ssh", "etc.work", "var-lib", "ssh"] {
            fs::create_dir_all(own.join(folder))?;
        }
        let key = own.join("hostkey");
        keygen(&key)?;
        let public = fs::read_to_string(key.with_extension("pub"))?;
        let public = public.split(' ').take(2).collect::<Vec<_>>().join(" ");
        let (name, four, six) = (host.name(), host.address(), host.address6());
        writeln!(names, "{four} {name}\n{six} {name}")?;
        writeln!(known, "{name},{four},{six} {public}")?;
    }
    for host in hosts {
        let own = dir.join(host.name());
        fs::write(own.join("etc/hosts"), &names)?;
        fs::write(own.join("etc/hostname"), format!("{}\n", host.name()))?;
        let ssh = own.join("ssh");
        fs::set_permissions(&ssh, fs::Permissions::from_mode(0o700))?;
        fs::write(ssh.join("known_hosts"), &known)?;
        fs::copy(&id, ssh.join("id_ed25519"))?;
        fs::copy(id.with_extension("pub"), ssh.join("authorized_keys"))?;
        fs::write(ssh.join("config"), SSH)?;
        fs::write(own.join("sshd_config"), sshd(dir, &own))?;
    }
    Ok(())
}

fn keygen(path: &Path) -> Result<()> {
    let status =
        Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-C", "bed", "-f"]).arg(path).status();
    ensure!(status.context("run ssh-keygen (package openssh-client)")?.success(), "ssh-keygen failed");
    Ok(())
}

/// curve25519: the default post-quantum exchange costs a quarter of a second a connection on a busy machine.
const SSH: &str =
    "Host *\n  BatchMode yes\n  StrictHostKeyChecking yes\n  ConnectTimeout 10\n  KexAlgorithms curve25519-sha256\n";

fn sshd(dir: &Path, own: &Path) -> String {
    format!(
        "HostKey {}/hostkey
PidFile /run/sshd.pid
AuthorizedKeysFile /root/.ssh/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UsePAM no
UseDNS no
PrintMotd no
PrintLastLog no
MaxStartups 100
MaxSessions 100
Subsystem sftp internal-sftp
SetEnv PATH={}
",
        own.display(),
        host::path(dir)
    )
}
