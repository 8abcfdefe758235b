//! What a process carries beside its memory: limits, umask, working directory, name, nice value, prctl settings,
//! personality, and where it was executed from.

use crate::{Guest, sys};
use anyhow::{Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::collections::BTreeMap;
use std::fs::read_link;

struct Limits {
    before: BTreeMap<&'static str, String>,
}

fn now() -> Result<BTreeMap<&'static str, String>> {
    let mut all = BTreeMap::new();
    for (name, limit) in
        [("nofile", Resource::RLIMIT_NOFILE), ("core", Resource::RLIMIT_CORE), ("stack", Resource::RLIMIT_STACK)]
    {
        all.insert(name, format!("{:?}", getrlimit(limit)?));
    }
    let status = std::fs::read_to_string("/proc/self/status")?;
    let umask = status.lines().find(|line| line.starts_with("Umask:")).unwrap_or_default();
    all.insert("umask", umask.into());
    all.insert("cwd", read_link("/proc/self/cwd")?.display().to_string());
    all.insert("root", read_link("/proc/self/root")?.display().to_string());
    all.insert("exe", read_link("/proc/self/exe")?.display().to_string());
    all.insert("comm", std::fs::read_to_string("/proc/self/comm")?);
    all.insert("cmdline", std::fs::read_to_string("/proc/self/cmdline")?);
    let environ = std::fs::read("/proc/self/environ")?;
    all.insert("environ", String::from_utf8_lossy(&environ).into_owned());
    all.insert("dumpable", format!("{:?}", nix::sys::prctl::get_dumpable()?));
    all.insert("subreaper", format!("{:?}", nix::sys::prctl::get_child_subreaper()?));
    all.insert("timer slack", format!("{:?}", nix::sys::prctl::get_timerslack()?));
    all.insert("death signal", format!("{:?}", nix::sys::prctl::get_pdeathsig()?));
    all.insert("nice", sys::call(libc::SYS_getpriority, [0, 0, 0, 0, 0])?.to_string());
    // Its number is another each time.
    let autogroup = std::fs::read_to_string("/proc/self/autogroup").unwrap_or_default();
    all.insert(
        "nice of the session",
        autogroup.split_once(" nice").map(|(_, nice)| nice.to_owned()).unwrap_or_default(),
    );
    all.insert("policy", sys::call(libc::SYS_sched_getscheduler, [0; 5])?.to_string());
    all.insert("personality", sys::call(libc::SYS_personality, [0xffff_ffff, 0, 0, 0, 0])?.to_string());
    Ok(all)
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, 333, hard.min(4444))?;
    setrlimit(Resource::RLIMIT_CORE, 0, 4096)?;
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o031));
    std::fs::create_dir_all("/var/tmp/guest-cwd")?;
    std::env::set_current_dir("/var/tmp/guest-cwd")?;
    std::fs::write("/proc/self/comm", "a (new) name")?;
    nix::sys::prctl::set_child_subreaper(true)?;
    nix::sys::prctl::set_timerslack(123_456)?;
    // Empty where no session has begun since the machine did, whose group has no weight to change.
    if std::fs::read_to_string("/proc/self/autogroup").is_ok_and(|own| !own.is_empty()) {
        std::fs::write("/proc/self/autogroup", "3")?;
    }
    sys::call(libc::SYS_setpriority, [0, 0, 5, 0, 0])?;
    Ok(Box::new(Limits { before: now()? }))
}

impl Guest for Limits {
    fn verify(&mut self) -> Result<()> {
        let now = now()?;
        for (name, before) in &self.before {
            ensure!(now[name] == *before, "{name}: {:?}, not {before:?}", now[name]);
        }
        Ok(())
    }
}
