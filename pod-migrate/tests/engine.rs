//! The engine against programs that verify themselves. Needs root. Each guest is this test binary again, told by an
//! environment variable what to be, so that nothing else has to be built.

mod guest;

use pod_migrate::freeze::{Frozen, Standstill};
use pod_migrate::ids::{FdTableId, FileId, HostPid, MmId};
use pod_migrate::objects::task::ProcessState;
use pod_migrate::objects::task::dump::{self as task, Parts};
use pod_migrate::objects::task::waits::Waits;
use pod_migrate::remote::Borrowed;
use pod_runtime::sys::descriptor;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

fn again(mode: &str, argument: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "guest_entry", "--nocapture", "--include-ignored"]);
    command.env("POD_GUEST", mode).env("POD_ARGUMENT", argument);
    command
}

/// Not a test: where the other processes of the tests begin.
#[test]
#[ignore = "entered by the other tests"]
fn guest_entry() {
    let argument = std::env::var("POD_ARGUMENT").unwrap_or_default();
    match std::env::var("POD_GUEST").as_deref() {
        Ok(mode) if mode.starts_with("busy") => guest::busy(mode.contains("catching-all"), mode.contains("killed")),
        Ok("crowd") => guest::crowd(),
        Ok("ask-for-ever") => loop {
            ask(argument.parse().unwrap()).unwrap();
        },
        _ => {}
    }
}

struct Guest(Child);

impl Guest {
    fn start(mode: &str) -> Guest {
        let mut child = again(mode, "").stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        while lines.next().expect("the guest says that it is ready").unwrap() != "ready" {}
        std::thread::spawn(move || lines.for_each(|line| println!("guest: {}", line.unwrap_or_default())));
        Guest(child)
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }

    /// The guest's own verdict.
    fn ends_well(mut self) {
        assert!(self.0.try_wait().unwrap().is_none(), "the guest ended early");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid()), nix::sys::signal::SIGTERM).unwrap();
        assert_eq!(self.0.wait().unwrap().code(), Some(0));
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Freezes a process, asks it everything, lets it go.
fn ask(pid: i32) -> pod_migrate::Result<ProcessState> {
    ask_since(pid, None)
}

/// The same when the clocks were noted already.
fn ask_since(pid: i32, standstill: Option<Standstill>) -> pod_migrate::Result<ProcessState> {
    let mut frozen = Frozen::seize(HostPid(pid), || Ok(vec![pid]), &Waits::default())?;
    assert!(!frozen.processes().is_empty(), "process {pid} is not there");
    frozen.look()?;
    if let Some(standstill) = standstill {
        frozen.clock_stands(standstill);
    }
    let process = &frozen.processes()[0];
    let parts = Parts { mm: MmId(1), fd_table: FdTableId(1), cwd: FileId(1), root: None };
    let mut borrowed = Borrowed::enter(process, &process.maps)?;
    let mut asked = task::ask(process, &mut borrowed, Vec::new())?;
    let (state, _) = task::dump(process, &mut borrowed, &mut asked, parts, &mut Default::default())?;
    borrowed.leave()?;
    Ok(state)
}

fn maps_count(pid: i32) -> usize {
    std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap().lines().count()
}

fn unnoticed(mode: &str) {
    let guest = Guest::start(mode);
    let before = maps_count(guest.pid());
    let begin = Instant::now();
    let mut count = 0;
    while begin.elapsed() < Duration::from_secs(3) {
        let state = ask(guest.pid()).unwrap();
        assert!(state.threads.len() >= 5);
        count += 1;
    }
    println!("asked {count} times");
    assert!(maps_count(guest.pid()) <= before + 60, "mappings stay behind");
    guest.ends_well();
}

#[test]
fn a_program_does_not_notice_that_it_is_asked() {
    unnoticed("busy");
}

#[test]
fn neither_does_one_that_catches_every_signal() {
    unnoticed("busy-catching-all");
}

fn killed(mode: &str) {
    let mut guest = Guest::start(mode);
    let mut random = 88172645463325252u64;
    for _ in 0..150 {
        let mut tracer = again("ask-for-ever", &guest.pid().to_string()).stdout(Stdio::null()).spawn().unwrap();
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        std::thread::sleep(Duration::from_micros(15_000 + random % 20_000));
        tracer.kill().unwrap();
        tracer.wait().unwrap();
        assert_eq!(guest.0.try_wait().unwrap(), None, "the guest ended");
    }
    // The last engine takes over what its predecessors left.
    ask(guest.pid()).unwrap();
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", guest.pid())).unwrap();
    assert!(maps.lines().count() < 200, "{maps}");
    guest.ends_well();
}

#[test]
fn an_engine_that_is_killed_leaves_the_program_as_it_was() {
    killed("busy-killed");
}

#[test]
fn also_when_every_signal_is_caught() {
    killed("busy-catching-all-killed");
}

#[test]
fn what_a_process_is_asked_is_true() {
    let guest = Guest::start("busy");
    std::thread::sleep(Duration::from_millis(300));
    let state = ask(guest.pid()).unwrap();
    assert_ne!(state.handlers[libc::SIGTERM as usize - 1].handler, 0);
    let period = state.interval_timers[0].interval_us;
    assert_ne!(period, 0);
    // Five seconds ago it had as much more to go, unless it has just expired; timers of CPU time, which are not armed, stay so.
    let monotonic = descriptor::clock(libc::CLOCK_MONOTONIC).unwrap() as i64 - 5_000_000_000;
    let here = Instant::now() - Duration::from_secs(5);
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        let later = ask_since(guest.pid(), Some(Standstill { here, monotonic })).unwrap();
        let left: Vec<u64> = later.interval_timers.iter().map(|timer| timer.value_us).collect();
        assert_eq!(left[1..], [0, 0]);
        if left[0] > 5_000_000 {
            break;
        }
        assert_eq!(left[0], period, "what has expired begins again");
        assert!(Instant::now() < until, "the timer has always expired");
    }
    assert_eq!(state.limits.len(), 16);
    assert!(state.threads.iter().all(|thread| thread.rseq.is_some()));
    assert!(state.threads.iter().all(|thread| thread.clear_tid != 0 && thread.robust_list.is_some()));
    assert!(state.threads.iter().all(|thread| thread.xstate.len() >= 832));
    std::thread::sleep(Duration::from_millis(300));
    guest.ends_well();
}

/// Figures, not a test: what freezing and asking costs. Run with `--run-ignored all --no-capture`.
#[test]
#[ignore = "prints figures"]
fn cost() {
    let mut sleeper = Command::new("sleep").arg("1000").spawn().unwrap();
    let crowd = Guest::start("crowd");
    std::thread::sleep(Duration::from_millis(300));
    for (name, pid) in [("sleep", sleeper.id() as i32), ("1000 threads", crowd.pid())] {
        for _ in 0..3 {
            let begin = Instant::now();
            let mut frozen = Frozen::seize(HostPid(pid), || Ok(vec![pid]), &Waits::default()).unwrap();
            let froze = begin.elapsed();
            frozen.look().unwrap();
            let process = &frozen.processes()[0];
            let mut borrowed = Borrowed::enter(process, &process.maps).unwrap();
            let entered = begin.elapsed();
            let parts = Parts { mm: MmId(1), fd_table: FdTableId(1), cwd: FileId(1), root: None };
            let mut asked = task::ask(process, &mut borrowed, Vec::new()).unwrap();
            task::dump(process, &mut borrowed, &mut asked, parts, &mut Default::default()).unwrap();
            let asked = begin.elapsed();
            borrowed.leave().unwrap();
            let left = begin.elapsed();
            let maps = process.text("smaps").unwrap().len();
            let mapped = begin.elapsed();
            drop(frozen);
            let all = begin.elapsed();
            println!(
                "{name}: freeze {froze:?}, enter {:?}, ask {:?}, leave {:?}, smaps ({maps}) {:?}, thaw {:?}",
                entered - froze,
                asked - entered,
                left - asked,
                mapped - left,
                all - mapped
            );
        }
    }
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
}
