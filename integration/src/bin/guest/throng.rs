//! A hundred threads, most of which are alike and some of which have something that no other has: a name, a mask and a signal
//! that waits, capabilities, no_new_privs, an alternate stack, nice, CPUs, timer slack, the signal of a parent's death, a
//! filter, a child.

use crate::{Guest, sys};
use anyhow::{Context, Result, ensure};
use std::process::{Child, Command};
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::Builder;
use std::time::Duration;

const THREADS: usize = 100;
/// One thread in so many has something of its own.
const STEP: usize = 7;
/// In /proc/thread-self/status.
const KEPT: [&str; 9] = [
    "Name:",
    "Groups:",
    "SigPnd:",
    "SigBlk:",
    "CapEff:",
    "CapInh:",
    "NoNewPrivs:",
    "Seccomp_filters:",
    "Cpus_allowed:",
];
const PR_GET_TID_ADDRESS: i32 = 40;

type Facts = Vec<String>;

struct Throng {
    threads: Vec<(Sender<()>, Facts)>,
    answers: Receiver<(usize, Facts)>,
    children: Receiver<Child>,
    child: Option<Child>,
}

fn prctl(option: i32, arg: i64) -> i64 {
    sys::call(libc::SYS_prctl, [option.into(), arg, 0, 0, 0]).unwrap_or(-1)
}

/// All that a thread says of itself.
fn facts() -> Facts {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let kept = status.lines().filter(|line| KEPT.iter().any(|kept| line.starts_with(kept)));
    let mut facts: Facts = kept.map(String::from).collect();
    let told = [const { AtomicU64::new(0) }; 4];
    let [death, address, head, length] = &told;
    prctl(libc::PR_GET_PDEATHSIG, death.as_ptr() as i64);
    prctl(PR_GET_TID_ADDRESS, address.as_ptr() as i64);
    let _ = sys::call(libc::SYS_get_robust_list, [0, head.as_ptr() as i64, length.as_ptr() as i64, 0, 0]);
    let told = told.map(AtomicU64::into_inner);
    facts.push(format!("death signal, tid address, robust list: {told:?}"));
    facts.push(format!("timer slack: {}", prctl(libc::PR_GET_TIMERSLACK, 0)));
    facts.push(format!("alternate stack: {:?}", sys::altstack(None)));
    facts.push(format!("nice: {:?}", sys::call(libc::SYS_getpriority, [0, 0, 0, 0, 0]).ok()));
    facts
}

/// What sets a thread apart.
fn become_special(which: usize, children: &Sender<Child>) -> Result<()> {
    match which {
        0 => std::fs::write("/proc/thread-self/comm", "a\\b\nc")?,
        1 => {
            sys::block(libc::SIGUSR1)?;
            let (process, thread) = (std::process::id().into(), sys::call(libc::SYS_gettid, [0; 5])?);
            sys::call(libc::SYS_tgkill, [process, thread, libc::SIGUSR1.into(), 0, 0])?;
        }
        2 => ensure!(prctl(libc::PR_SET_TIMERSLACK, 77_777) == 0, "timer slack"),
        3 => drop(sys::call(libc::SYS_setpriority, [0, 0, 5, 0, 0])?),
        4 => drop(sys::altstack(Some(16384))?),
        5 => nix::sys::prctl::set_no_new_privs()?,
        6 => ensure!(prctl(libc::PR_SET_PDEATHSIG, libc::SIGUSR2.into()) == 0, "death signal"),
        7 => {
            let mut one = nix::sched::CpuSet::new();
            let own = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0))?;
            let first = (0..nix::sched::CpuSet::count()).find(|cpu| own.is_set(*cpu).unwrap_or(false));
            one.set(first.context("no CPU")?)?;
            nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &one)?;
        }
        8 => children.send(Command::new("sleep").arg("1000000").spawn()?)?,
        9 => {
            nix::sys::prctl::set_no_new_privs()?;
            // Allows all.
            sys::seccomp(&[libc::sock_filter { code: 6, jt: 0, jf: 0, k: 0x7fff_0000 }])?;
        }
        10 => ensure!(prctl(libc::PR_SET_SECUREBITS, 1 << 4) == 0, "securebits"),
        _ => {}
    }
    Ok(())
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    sys::count_signals(libc::SIGUSR1)?;
    let (answer, answers) = channel();
    let (for_child, children) = channel();
    let mut asking = Vec::new();
    for index in 0..THREADS {
        let (ask, asked) = channel::<()>();
        let (answer, for_child): (Sender<(usize, Facts)>, _) = (answer.clone(), for_child.clone());
        let run = move || {
            let special = if index % STEP == 3 { become_special(index / STEP, &for_child) } else { Ok(()) };
            let first = special.err().map(|error| vec![format!("{index}: {error:#}")]);
            let _ = answer.send((index, first.unwrap_or_else(facts)));
            while asked.recv().is_ok() {
                let _ = answer.send((index, facts()));
            }
        };
        Builder::new().name("one of many".into()).stack_size(128 << 10).spawn(run)?;
        asking.push(ask);
    }
    let mut told = vec![Facts::new(); THREADS];
    for _ in 0..THREADS {
        let (index, facts) = answers.recv_timeout(Duration::from_secs(30))?;
        ensure!(facts.len() > 4, "{facts:?}");
        told[index] = facts;
    }
    let threads = asking.into_iter().zip(told).collect();
    Ok(Box::new(Throng { threads, answers, children, child: None }))
}

impl Guest for Throng {
    fn verify(&mut self) -> Result<()> {
        for (ask, _) in &self.threads {
            ask.send(())?;
        }
        for _ in 0..self.threads.len() {
            let (index, facts) = self.answers.recv_timeout(Duration::from_secs(30))?;
            let before = &self.threads[index].1;
            ensure!(facts == *before, "thread {index}: {facts:?}, it was {before:?}");
        }
        self.child = self.child.take().or_else(|| self.children.try_recv().ok());
        let child = self.child.as_mut().context("no child")?;
        ensure!(child.try_wait()?.is_none(), "the child of a thread has ended");
        Ok(())
    }
}
