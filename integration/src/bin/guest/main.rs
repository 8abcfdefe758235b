//! `guest KIND`: sets one kind of kernel object up, says "ready", and verifies it whenever it is asked to.
//!
//! Asked by SIGUSR1, or by a new number in the file `/tmp/verify`: it prints "ok N", or "FAIL N: why" and exits 1. N
//! counts the rounds. SIGTERM ends it with status 0. A guest leaves its objects as it set them up, so that it can be
//! moved and asked again any number of times. `guest --list` prints the kinds.
//!
//! One module a kind, one line in [`GUESTS`]; `integration/tests/guests.rs` has a line for each too.

mod sys;

mod churn;
mod clocks;
mod counter;
mod credentials;
mod epoll;
mod eventfd;
mod fifo;
mod files;
mod flow;
mod headless;
mod hugepages;
mod inotify;
mod limits;
mod lockedmem;
mod locks;
mod memfds;
mod memory;
mod mounts;
mod mqueues;
mod nameless;
mod names;
mod options;
mod packets;
mod peers;
mod pipes;
mod pty;
mod refused;
mod registers;
mod reuseport;
mod routes;
mod sealed;
mod seccomp;
mod sharedmem;
mod sharedparts;
mod signalfd;
mod signals;
mod signed;
mod switches;
mod tcp;
mod tcpends;
mod threads;
mod timeouts;
mod timerfd;
mod timers;
mod tree;
mod udp;
mod unix;
mod unixends;

use anyhow::{Result, bail};
use std::io::Write;
use std::time::Duration;

/// An object that is set up. `verify` leaves it as it was.
pub trait Guest {
    fn verify(&mut self) -> Result<()>;

    /// Called between questions, every few milliseconds.
    fn step(&mut self) -> Result<()> {
        Ok(())
    }
}

type SetUp = fn() -> Result<Box<dyn Guest>>;

const GUESTS: &[(&str, SetUp)] = &[
    ("churn", churn::set_up),
    ("clocks", clocks::set_up),
    ("counter", counter::set_up),
    ("covering", refused::covering),
    ("credentials", credentials::set_up),
    ("epoll", epoll::set_up),
    ("eventfd", eventfd::set_up),
    ("fifo", fifo::set_up),
    ("files", files::set_up),
    ("flow", flow::set_up),
    ("filtered", refused::filtered),
    ("headless", headless::set_up),
    ("hugepages", hugepages::set_up),
    ("inotify", inotify::set_up),
    ("keyring", refused::keyring),
    ("landlock", refused::landlock),
    ("limits", limits::set_up),
    ("lockedmem", lockedmem::set_up),
    ("locks", locks::set_up),
    ("memfds", memfds::set_up),
    ("memory", memory::set_up),
    ("mounts", mounts::set_up),
    ("mqueues", mqueues::set_up),
    ("nameless", nameless::set_up),
    ("names", names::set_up),
    ("notified", refused::notified),
    ("options", options::set_up),
    ("packets", packets::set_up),
    ("peers", peers::set_up),
    ("pipes", pipes::set_up),
    ("pty", pty::set_up),
    ("registers", registers::set_up),
    ("reuseport", reuseport::set_up),
    ("routes", routes::set_up),
    ("sealed", sealed::set_up),
    ("seccomp", seccomp::set_up),
    ("sharedmem", sharedmem::set_up),
    ("sharedparts", sharedparts::set_up),
    ("sharedtable", refused::sharedtable),
    ("signalfd", signalfd::set_up),
    ("signals", signals::set_up),
    ("signed", signed::set_up),
    ("switches", switches::set_up),
    ("tcp", tcp::set_up),
    ("tcpends", tcpends::set_up),
    ("threads", threads::set_up),
    ("timeouts", timeouts::set_up),
    ("timerfd", timerfd::set_up),
    ("timers", timers::set_up),
    ("tree", tree::set_up),
    ("udp", udp::set_up),
    ("unix", unix::set_up),
    ("unixends", unixends::set_up),
];

fn main() {
    let kind = std::env::args().nth(1).unwrap_or_default();
    if kind == "--list" {
        GUESTS.iter().for_each(|(name, _)| println!("{name}"));
        return;
    }
    if let Err(error) = run(&kind) {
        // Anything that goes wrong outside of a question is a wrong answer too.
        println!("FAIL: {error:#}");
        std::process::exit(1);
    }
}

fn run(kind: &str) -> Result<()> {
    let Some((_, set_up)) = GUESTS.iter().find(|(name, _)| *name == kind) else {
        bail!("no guest {kind:?}; --list prints them")
    };
    // The language's own alternate stack would hide whether there is none afterwards.
    sys::no_altstack()?;
    sys::handle(libc::SIGUSR1, libc::SA_RESTART | libc::SA_ONSTACK)?;
    sys::count_signals(libc::SIGTERM)?;
    let mut guest = set_up()?;
    say("ready");
    let (mut rounds, mut signals, mut file) = (0, 0, asked_by_file());
    while sys::signals(libc::SIGTERM) == 0 {
        guest.step()?;
        let (now_signals, now_file) = (sys::signals(libc::SIGUSR1), asked_by_file());
        if now_signals == signals && now_file == file {
            std::thread::sleep(Duration::from_millis(5));
            continue;
        }
        (signals, file, rounds) = (now_signals, now_file, rounds + 1);
        if let Err(error) = guest.verify() {
            say(&format!("FAIL {rounds}: {error:#}"));
            std::process::exit(1);
        }
        say(&format!("ok {rounds}"));
    }
    Ok(())
}

/// Waits for a condition of the set-up, or of a verification.
pub fn until(what: &str, mut holds: impl FnMut() -> bool) -> Result<()> {
    for _ in 0..2000 {
        if holds() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    bail!("{what}: not within ten seconds")
}

fn asked_by_file() -> String {
    std::fs::read_to_string("/tmp/verify").unwrap_or_default()
}

fn say(line: &str) {
    println!("{line}");
    let _ = std::io::stdout().flush();
}
