//! A tree of processes: sessions, groups, a group whose leader is gone, a session whose leader is gone with two groups in
//! it, an orphan, a zombie, a stopped child.

use crate::{Guest, sys};
use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpgid, getpid, getsid, pause, setpgid, setsid};

struct Tree {
    before: Vec<Line>,
    zombie: Pid,
}

/// What a process is to others.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    pid: i32,
    parent: i32,
    group: i32,
    session: i32,
    state: char,
}

fn line(pid: Pid) -> Result<Line> {
    let stat =
        std::fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid} is gone"))?;
    let (_, rest) = stat.rsplit_once(')').context("stat has a name")?;
    let rest: Vec<&str> = rest.split_whitespace().collect();
    let state = rest[0].chars().next().context("stat has a state")?;
    Ok(Line {
        pid: pid.as_raw(),
        parent: rest[1].parse()?,
        group: rest[2].parse()?,
        session: rest[3].parse()?,
        state: if state == 'R' { 'S' } else { state },
    })
}

fn for_ever() -> i32 {
    loop {
        pause();
    }
}

/// As daemons come to be: the leader of their session has ended. One is in its group, one has a group of its own.
fn daemons() -> Result<[Pid; 2]> {
    let (read, write) = nix::unistd::pipe()?;
    let gone = sys::fork(move || {
        let _ = setsid();
        let in_its_group = sys::fork(for_ever).map_or(0, Pid::as_raw);
        let apart = sys::fork(for_ever).map_or(0, Pid::as_raw);
        let _ = setpgid(Pid::from_raw(apart), Pid::from_raw(apart));
        let _ = nix::unistd::write(&write, &[in_its_group.to_ne_bytes(), apart.to_ne_bytes()].concat());
        0
    })?;
    let mut pids = [0; 8];
    nix::unistd::read(&read, &mut pids)?;
    waitpid(gone, None)?;
    let pid = |at: usize| Pid::from_raw(i32::from_ne_bytes(std::array::from_fn(|i| pids[at + i])));
    Ok([pid(0), pid(4)])
}

fn set_up_tree() -> Result<Tree> {
    let mut pids = vec![getpid()];
    pids.push(sys::fork(for_ever)?);
    let leader = sys::fork(|| {
        let _ = setsid();
        let _ = sys::fork(for_ever);
        for_ever()
    })?;
    pids.push(leader);
    let stopped = sys::fork(for_ever)?;
    setpgid(stopped, stopped)?;
    kill(stopped, Signal::SIGSTOP)?;
    waitpid(stopped, Some(WaitPidFlag::WUNTRACED))?;
    pids.push(stopped);
    // A group whose leader has been reaped, and in it a process whose parent is gone too.
    let (read, write) = nix::unistd::pipe()?;
    let gone = sys::fork(move || {
        let _ = setpgid(Pid::from_raw(0), Pid::from_raw(0));
        let orphan = sys::fork(for_ever).map_or(0, Pid::as_raw);
        let _ = nix::unistd::write(&write, &orphan.to_ne_bytes());
        0
    })?;
    let mut orphan = [0; 4];
    nix::unistd::read(&read, &mut orphan)?;
    waitpid(gone, None)?;
    pids.push(Pid::from_raw(i32::from_ne_bytes(orphan)));
    pids.extend(daemons()?);
    let zombie = sys::fork(|| 42)?;
    pids.push(zombie);
    crate::until("the tree to settle", || {
        let children = std::fs::read_to_string(format!("/proc/{leader}/task/{leader}/children")).unwrap_or_default();
        let settled = getsid(Some(leader)) == Ok(leader) && !children.trim().is_empty();
        settled && line(zombie).is_ok_and(|line| line.state == 'Z') && getpgid(Some(stopped)) == Ok(stopped)
    })?;
    let children = std::fs::read_to_string(format!("/proc/{leader}/task/{leader}/children"))?;
    pids.push(Pid::from_raw(children.trim().parse()?));
    let before = pids.into_iter().map(line).collect::<Result<Vec<_>>>()?;
    Ok(Tree { before, zombie })
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    Ok(Box::new(set_up_tree()?))
}

impl Guest for Tree {
    fn verify(&mut self) -> Result<()> {
        for before in &self.before {
            let now = line(Pid::from_raw(before.pid))?;
            ensure!(now == *before, "was {before:?}, is {now:?}");
        }
        // Peeked at, not reaped: its status is there the next time too.
        use nix::sys::wait::{Id, waitid};
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG;
        let status = waitid(Id::Pid(self.zombie), flags)?;
        ensure!(status == WaitStatus::Exited(self.zombie, 42), "the zombie's status is {status:?}");
        Ok(())
    }
}
