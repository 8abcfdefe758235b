//! What tests of faults are made of: dice whose throws can be repeated, the processes of a move, how many copies there are.

use crate::bed::{Bed, Host};
use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// xorshift: moments need no better.
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    /// With the seed that `$SEED` is, or one of its own, which it prints.
    pub fn new() -> Dice {
        let seed = seed();
        println!("SEED={seed}");
        Dice::of(seed)
    }

    pub fn of(seed: u64) -> Dice {
        // Near seeds would have near first throws.
        let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        for _ in 0..8 {
            dice.number();
        }
        dice
    }

    pub fn number(&mut self) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 1) as usize
    }

    pub fn below(&mut self, limit: Duration) -> Duration {
        Duration::from_nanos(self.number() as u64 % limit.as_nanos().max(1) as u64)
    }

    /// From 0 up to but not 1.
    pub fn share(&mut self) -> f64 {
        (self.number() % (1 << 30)) as f64 / f64::from(1 << 30)
    }

    pub fn one_of<T: Copy>(&mut self, choice: &[T]) -> T {
        choice[self.number() % choice.len()]
    }

    pub fn shuffle<T>(&mut self, cards: &mut [T]) {
        for at in (1..cards.len()).rev() {
            cards.swap(at, self.number() % (at + 1));
        }
    }
}

impl Default for Dice {
    fn default() -> Dice {
        Dice::new()
    }
}

/// `$SEED`, or the time.
pub fn seed() -> u64 {
    let given = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok());
    let clock = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |now| now.as_nanos());
    given.unwrap_or_else(|| clock() as u64 % 1_000_000_007)
}

/// Processes of one kind on a host, by what they are called and were started as.
#[derive(Debug, Clone, Copy)]
pub struct Victim {
    pub comm: &'static str,
    /// Words of the command line.
    pub line: &'static [&'static str],
    /// What the command line must not say.
    pub but: &'static str,
}

/// `pod migrate`.
pub const MIGRATE: Victim = Victim { comm: "pod", line: &["migrate"], but: "" };
/// The ssh that it started.
pub const SSH: Victim = Victim { comm: "ssh", line: &[], but: "" };
/// `pod receive`.
pub const RECEIVE: Victim = Victim { comm: "pod", line: &["receive"], but: "" };
/// Of a pod that runs, or comes.
pub const MONITOR: Victim = Victim { comm: "pod-monitor", line: &[], but: "" };
/// sshd's processes for a connection.
pub const SESSION: Victim = Victim { comm: "sshd", line: &[], but: "[listener]" };

impl Victim {
    /// Its processes there now, as the machine numbers them: to be killed by exactly that number.
    pub fn find(self, host: &Host) -> Result<Vec<i32>> {
        let space = space_of(host)?;
        let numbers =
            fs::read_dir("/proc")?.flatten().filter_map(|e| e.file_name().to_string_lossy().parse::<i32>().ok());
        Ok(numbers.filter(|pid| self.is(*pid, &space)).collect())
    }

    fn is(self, pid: i32, space: &Path) -> bool {
        let text = |name: &str| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
        if String::from_utf8_lossy(&text("comm")).trim() != self.comm {
            return false;
        }
        let line = text("cmdline");
        let words: Vec<_> = line.split(|b| *b == 0).map(String::from_utf8_lossy).collect();
        self.line.iter().all(|word| words.iter().any(|w| w == word))
            && (self.but.is_empty() || !words.iter().any(|word| word.contains(self.but)))
            && fs::read_link(format!("/proc/{pid}/ns/pid")).is_ok_and(|own| own == space)
    }

    /// How many of these took it, of those that still are what was looked for.
    pub fn signal(self, host: &Host, pids: &[i32], signal: Signal) -> Result<usize> {
        let space = space_of(host)?;
        let is_it = |pid: &&i32| self.is(**pid, &space);
        Ok(pids.iter().filter(is_it).filter(|pid| kill(Pid::from_raw(**pid), signal).is_ok()).count())
    }

    pub fn kill(self, host: &Host, pids: &[i32]) -> Result<usize> {
        self.signal(host, pids, Signal::SIGKILL)
    }
}

fn space_of(host: &Host) -> Result<std::path::PathBuf> {
    Ok(fs::read_link(format!("/proc/{}/ns/pid", host.pid()?))?)
}

/// Processes of that name on a host. By name: a monitor's command line is that of `pod run`.
pub fn count(host: &Host, name: &str) -> Result<usize> {
    let entries = fs::read_dir(host.root()?.join("proc"))?.flatten();
    let names = entries.filter_map(|entry| fs::read_to_string(entry.path().join("comm")).ok());
    Ok(names.filter(|comm| comm.trim() == name).count())
}

/// The same for every host on which pods live: how many copies of a pod there are that has one such process.
pub fn copies(bed: &Bed, name: &str) -> Result<Vec<usize>> {
    bed.homes().iter().map(|host| count(host, name)).collect()
}

/// The job that a text tells to settle: "… pod job resume 0123abcd".
pub fn to_resume(said: &str) -> Option<String> {
    let (_, job) = said.split_once("pod job resume ")?;
    Some(job.chars().take_while(char::is_ascii_hexdigit).collect())
}

/// Runs the `pod job resume ID` that was named, if one was. Tells whether.
pub fn resume(host: &Host, said: &str) -> Result<bool> {
    let Some(id) = to_resume(said) else { return Ok(false) };
    host.pod(&["job", "resume", &id]).with_context(|| format!("pod said: {said}"))?;
    Ok(true)
}
