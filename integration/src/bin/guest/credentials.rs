//! Credentials: ids, groups, capabilities, no-new-privileges, of a process that has dropped most of them.

use crate::{Guest, sys};
use anyhow::{Result, ensure};
use nix::unistd::Pid;

struct Credentials {
    child: Pid,
    before: Vec<String>,
    own: Vec<String>,
}

const KEPT: [&str; 10] =
    ["Uid:", "Gid:", "Groups:", "CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:", "NoNewPrivs:", "Umask:"];

fn lines(pid: Pid) -> Result<Vec<String>> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    Ok(status.lines().filter(|line| KEPT.iter().any(|kept| line.starts_with(kept))).map(String::from).collect())
}

fn drop_all() -> nix::Result<()> {
    use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
    setgroups(&[Gid::from_raw(33), Gid::from_raw(4)])?;
    setresgid(Gid::from_raw(1001), Gid::from_raw(1002), Gid::from_raw(1003))?;
    setresuid(Uid::from_raw(1001), Uid::from_raw(1002), Uid::from_raw(1003))?;
    nix::sys::prctl::set_no_new_privs()
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let child = sys::fork(|| {
        nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o027));
        if drop_all().is_err() {
            return 1;
        }
        loop {
            nix::unistd::pause();
        }
    })?;
    crate::until("the child to have dropped its privileges", || {
        lines(child).is_ok_and(|lines| lines.iter().any(|line| line == "NoNewPrivs:\t1"))
    })?;
    Ok(Box::new(Credentials { child, before: lines(child)?, own: lines(nix::unistd::getpid())? }))
}

impl Guest for Credentials {
    fn verify(&mut self) -> Result<()> {
        for (pid, before) in [(self.child, &self.before), (nix::unistd::getpid(), &self.own)] {
            let now = lines(pid)?;
            ensure!(now == *before, "{pid}: {now:?}, not {before:?}");
        }
        Ok(())
    }
}
