//! The fault itself: done at its moment, undone when its time is over.

use super::draw::{Draw, Kind};
use super::lane::{CLOCK, POD, STORE};
use super::tool::Tool;
use anyhow::{Context, Result, ensure};
use integration::bed::cable::Way;
use integration::bed::{Bed, Host};
use integration::faults::{Dice, MIGRATE, MONITOR, RECEIVE, SESSION, SSH, Victim};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::signal::Signal;
use nix::sys::statvfs::statvfs;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

pub struct Harm<'a> {
    bed: &'a Bed,
    from: &'a Host,
    to: &'a Host,
    other: &'a Host,
    kind: Kind,
    dice: Dice,
    /// More time than a test of a few minutes has.
    patient: bool,
    found: Vec<(Victim, &'a Host, Vec<i32>)>,
    /// When it is undone, unless the tool ends before.
    until: Option<Instant>,
    undone: bool,
    /// What was done.
    pub what: String,
    pub at: Option<Instant>,
    /// A second tool.
    pub second: Option<Tool>,
}

impl<'a> Harm<'a> {
    pub fn new(bed: &'a Bed, draw: &Draw, [from, to, other]: [&'a Host; 3], patient: bool) -> Harm<'a> {
        let victims: &[(Victim, &Host)] = match draw.kind {
            Kind::KillMigrate | Kind::ScarceHere | Kind::SlowMigrate | Kind::Interrupt => &[(MIGRATE, from)],
            Kind::KillSsh | Kind::SlowSsh => &[(SSH, from)],
            Kind::KillReceive => &[(RECEIVE, to)],
            Kind::KillNewMonitor => &[(MONITOR, to)],
            Kind::KillMonitor => &[(MONITOR, from)],
            Kind::KillSession => &[(SESSION, to)],
            Kind::ScarceThere | Kind::SlowReceiver => &[(RECEIVE, to), (MONITOR, to)],
            _ => &[],
        };
        Harm {
            bed,
            from,
            to,
            other,
            kind: draw.kind,
            dice: draw.dice.clone(),
            patient,
            found: victims.iter().map(|(victim, host)| (*victim, *host, Vec::new())).collect(),
            until: None,
            undone: false,
            what: String::new(),
            at: None,
            second: None,
        }
    }

    /// Finds whom it is to meet before the moment: looking takes longer than a commit.
    pub fn look(&mut self) -> Result<()> {
        for (victim, host, found) in &mut self.found {
            if found.is_empty() {
                *found = victim.find(host)?;
            }
        }
        Ok(())
    }

    /// Does it. False: there is nobody yet to whom it could be done.
    pub fn strike(&mut self) -> Result<bool> {
        self.look()?;
        if !self.found.is_empty() && self.found.iter().all(|(.., pids)| pids.is_empty()) {
            return Ok(false);
        }
        let what = self.act()?;
        self.at = Some(Instant::now());
        self.what = what;
        Ok(true)
    }

    fn act(&mut self) -> Result<String> {
        let towards =
            |dice: &mut Dice, from: &'a Host, to: &'a Host| if dice.number().is_multiple_of(4) { from } else { to };
        match self.kind {
            Kind::KillMigrate
            | Kind::KillSsh
            | Kind::KillReceive
            | Kind::KillNewMonitor
            | Kind::KillMonitor
            | Kind::KillSession => self.signal(Signal::SIGKILL),
            Kind::Interrupt => self.signal(Signal::SIGTERM),
            Kind::SlowReceiver | Kind::SlowSsh | Kind::SlowMigrate => {
                let time = self.pause();
                self.signal(Signal::SIGSTOP).map(|what| format!("{what} for {time:.1?}"))
            }
            Kind::Cut | Kind::Blink => {
                let host = towards(&mut self.dice, self.from, self.to);
                self.bed.partition(host)?;
                let time = (self.kind == Kind::Blink).then(|| self.dice.below(Duration::from_secs(5)));
                self.until = time.map(|time| Instant::now() + time);
                Ok(format!("{}, {}", host.name(), time.map_or("to the end".into(), |time| format!("{time:.1?}"))))
            }
            Kind::Deaf | Kind::Mute => {
                let host = towards(&mut self.dice, self.from, self.to);
                self.bed.one_way(host, Some(if self.kind == Kind::Deaf { Way::To } else { Way::From }))?;
                Ok(host.name().to_owned())
            }
            Kind::FullThere => self.fill(self.to),
            Kind::FullHere => self.fill(self.from),
            Kind::ScarceThere | Kind::ScarceHere => self.squeeze(),
            Kind::SlowLink => {
                let (host, rate) =
                    (towards(&mut self.dice, self.from, self.to), self.dice.one_of(&["40mbit", "100mbit", "400mbit"]));
                self.bed.shape(host, Some(rate))?;
                Ok(format!("{} has {rate}", host.name()))
            }
            Kind::Clock => {
                let host = towards(&mut self.dice, self.from, self.to);
                let step = self.dice.one_of(&[3_600, -3_600, 400 * 86_400, -400 * 86_400, -70 * 365 * 86_400]);
                set_clock(host, step)?;
                Ok(format!("{} by {step} s", host.name()))
            }
            Kind::TwiceSame | Kind::TwiceOther => {
                let to = if self.kind == Kind::TwiceSame { self.to } else { self.other };
                self.second = Some(Tool::start(self.from, &super::lane::moving(to, None))?);
                Ok(format!("to {}", to.name()))
            }
        }
    }

    /// How long somebody stands still: mostly shorter than anybody's patience.
    fn pause(&mut self) -> Duration {
        let time = match self.dice.number() % 10 {
            0 if self.patient => Duration::from_secs(31) + self.dice.below(Duration::from_secs(6)),
            1 | 2 => Duration::from_secs(8) + self.dice.below(Duration::from_secs(6)),
            _ => self.dice.below(Duration::from_secs(3)),
        };
        self.until = Some(Instant::now() + time);
        time
    }

    fn signal(&self, signal: Signal) -> Result<String> {
        let sent = self.found.iter().map(|(victim, host, pids)| victim.signal(host, pids, signal));
        Ok(format!("{} got {signal}", sent.sum::<Result<usize>>()?))
    }

    /// Leaves no room, or that of a few pages, so that it is not always the first write that fails.
    fn fill(&mut self, host: &Host) -> Result<String> {
        let left = self.dice.one_of(&[0, 1, 2, 4, 8, 32]);
        let (folder, filler) = (host.root()?.join(&STORE[1..]), filler(host)?);
        let file = fs::File::create(filler)?;
        let mut at = 0;
        while let stat = statvfs(&folder)?
            && stat.blocks_available() > left
        {
            let bytes = ((stat.blocks_available() - left) * stat.fragment_size()) as i64;
            // Somebody else may have been quicker.
            if fallocate(&file, FallocateFlags::empty(), at, bytes).is_ok() {
                at += bytes;
            }
        }
        Ok(format!("{} has {left} pages left", host.name()))
    }

    /// From now on the kernel says ENOMEM to them.
    fn squeeze(&mut self) -> Result<String> {
        let slack: u64 = self.dice.one_of(&[0, 64 << 10, 1 << 20, 8 << 20, 32 << 20]);
        let mut squeezed = 0;
        for pid in self.found.iter().flat_map(|(.., pids)| pids) {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let size = status.lines().find_map(|line| line.strip_prefix("VmSize:")?.trim().strip_suffix(" kB"));
            let Some(size) = size.and_then(|size| size.parse::<u64>().ok()) else { continue };
            squeezed += usize::from(address_space(*pid, &format!("{}:unlimited", (size << 10) + slack)));
        }
        Ok(format!("{squeezed} have {} KiB to grow", slack >> 10))
    }

    /// Undoes it if it is time for that.
    pub fn look_after(&mut self) -> Result<()> {
        match self.until.is_some_and(|until| Instant::now() >= until) {
            true => self.heal(),
            false => Ok(()),
        }
    }

    /// The world as it was, as far as it is not `pod` that has to see to that.
    pub fn heal(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.undone, true) {
            return Ok(());
        }
        match self.kind {
            Kind::Cut | Kind::Blink => [self.from, self.to].into_iter().try_for_each(|host| self.bed.heal(host)),
            Kind::Deaf | Kind::Mute => {
                [self.from, self.to].into_iter().try_for_each(|host| self.bed.one_way(host, None))
            }
            Kind::SlowLink => [self.from, self.to].into_iter().try_for_each(|host| self.bed.shape(host, None)),
            Kind::Clock => [self.from, self.to].into_iter().try_for_each(|host| set_clock(host, 0)),
            Kind::SlowReceiver | Kind::SlowSsh | Kind::SlowMigrate => self.signal(Signal::SIGCONT).map(drop),
            Kind::FullThere | Kind::FullHere => {
                for host in [self.from, self.to] {
                    match fs::remove_file(filler(host)?) {
                        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
                        _ => {}
                    }
                }
                Ok(())
            }
            // Who was squeezed and lives may be who keeps the pod from now on.
            Kind::ScarceThere | Kind::ScarceHere => {
                for (victim, host) in [(RECEIVE, self.to), (MONITOR, self.to), (MIGRATE, self.from)] {
                    victim.find(host)?.into_iter().for_each(|pid| _ = address_space(pid, "unlimited"));
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

fn filler(host: &Host) -> Result<PathBuf> {
    Ok(host.root()?.join(&STORE[1..]).join("filler"))
}

/// False: it is gone.
fn address_space(pid: i32, limit: &str) -> bool {
    let mut prlimit = Command::new("prlimit");
    prlimit.args(["--pid", &pid.to_string(), &format!("--as={limit}")]);
    prlimit.output().is_ok_and(|output| output.status.success())
}

/// Puts the clock that `pod` sees there so many seconds ahead.
pub fn set_clock(host: &Host, step: i64) -> Result<()> {
    let file = fs::OpenOptions::new().create(true).truncate(false).write(true).open(host.root()?.join(&CLOCK[1..]));
    Ok(file?.write_all_at(&step.to_le_bytes(), 0)?)
}

/// What gives a program such a clock, and a `pod` that has one, to be named as the one on another host.
pub fn clocks(bed: &Bed) -> Result<(PathBuf, PathBuf)> {
    let (source, library, pod) =
        (bed.shared().join("clock.c"), bed.shared().join("clock.so"), bed.shared().join("pod"));
    fs::write(&source, include_str!("clock.c"))?;
    let mut cc = Command::new("cc");
    let made = cc.args(["-shared", "-fPIC", "-O1", "-o"]).args([&library, &source]).output().context("run cc")?;
    ensure!(made.status.success(), "cc: {}", String::from_utf8_lossy(&made.stderr));
    fs::write(&pod, format!("#!/bin/sh\nexec env LD_PRELOAD={} pod \"$@\"\n", library.display()))?;
    fs::set_permissions(&pod, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    // That it works at all.
    let host = bed.a();
    set_clock(host, 86_400 * 365)?;
    let line = [&*pod.to_string_lossy(), "run", "-d", "--name", POD, "--network", "none", "--", "sleep", "1000"];
    host.run(&line)?;
    let listed: serde_json::Value = serde_json::from_str(&host.pod(&["ps", "--json"])?)?;
    let created = listed["pods"][0]["created"].as_str().unwrap_or_default().to_owned();
    let this_year = host.run(&["date", "-u", "+%Y"])?;
    ensure!(!created.is_empty() && !created.starts_with(this_year.trim()), "pod sees no other clock: {created}");
    host.pod(&["rm", "-f", POD])?;
    set_clock(host, 0)?;
    Ok((library, pod))
}
