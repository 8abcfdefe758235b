//! `guest KIND [BALLAST]`: sets one kind of kernel object up, says "ready", and verifies it whenever it is asked to.
//!
//! Asked by SIGUSR1, or by a new number in the file `/tmp/verify`: it prints "ok N", or "FAIL N: why" and exits 1. N
//! counts the rounds. SIGTERM ends it with status 0. A guest leaves its objects as it set them up, so that it can be
//! moved and asked again any number of times. `guest --list` prints the kinds, `guest --refused` those of them that no
//! pod can be saved with. BALLAST, in MiB, is memory that it has beside, filled and written to now and then: so much makes
//! memory go ahead of a pod.
//!
//! One module a kind, one line in [`GUESTS`] and one in `integration/tests/moves.rs`; those that are refused are in
//! [`refused`], and in `integration/tests/refused.rs`.

mod sys;

mod advised;
mod churn;
mod clocks;
mod counter;
mod credentials;
mod crowd;
mod epoll;
mod eventfd;
mod fifo;
mod files;
mod flow;
mod handles;
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
mod prefork;
mod pty;
mod rawsockets;
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
mod subgroups;
mod switches;
mod sysctls;
mod tcp;
mod tcpends;
mod threads;
mod throng;
mod timeouts;
mod timerfd;
mod timers;
mod tree;
mod udp;
mod undone;
mod unix;
mod unixends;

use anyhow::{Context, Result, bail};
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
    ("advised", advised::set_up),
    ("churn", churn::set_up),
    ("clocks", clocks::set_up),
    ("counter", counter::set_up),
    ("credentials", credentials::set_up),
    ("crowd", crowd::set_up),
    ("epoll", epoll::set_up),
    ("eventfd", eventfd::set_up),
    ("fifo", fifo::set_up),
    ("files", files::set_up),
    ("flow", flow::set_up),
    ("handles", handles::set_up),
    ("headless", headless::set_up),
    ("hugepages", hugepages::set_up),
    ("inotify", inotify::set_up),
    ("limits", limits::set_up),
    ("lockedmem", lockedmem::set_up),
    ("locks", locks::set_up),
    ("memfds", memfds::set_up),
    ("memory", memory::set_up),
    ("mounts", mounts::set_up),
    ("mqueues", mqueues::set_up),
    ("nameless", nameless::set_up),
    ("names", names::set_up),
    ("options", options::set_up),
    ("packets", packets::set_up),
    ("peers", peers::set_up),
    ("pipes", pipes::set_up),
    ("prefork", prefork::set_up),
    ("pty", pty::set_up),
    ("rawsockets", rawsockets::set_up),
    ("registers", registers::set_up),
    ("reuseport", reuseport::set_up),
    ("routes", routes::set_up),
    ("sealed", sealed::set_up),
    ("seccomp", seccomp::set_up),
    ("sharedmem", sharedmem::set_up),
    ("sharedparts", sharedparts::set_up),
    ("signalfd", signalfd::set_up),
    ("signals", signals::set_up),
    ("signed", signed::set_up),
    ("subgroups", subgroups::set_up),
    ("switches", switches::set_up),
    ("sysctls", sysctls::set_up),
    ("tcp", tcp::set_up),
    ("tcpends", tcpends::set_up),
    ("threads", threads::set_up),
    ("throng", throng::set_up),
    ("timeouts", timeouts::set_up),
    ("timerfd", timerfd::set_up),
    ("timers", timers::set_up),
    ("tree", tree::set_up),
    ("udp", udp::set_up),
    ("undone", undone::set_up),
    ("unix", unix::set_up),
    ("unixends", unixends::set_up),
];

fn all() -> impl Iterator<Item = &'static (&'static str, SetUp)> {
    GUESTS.iter().chain(refused::REFUSED)
}

fn main() {
    let kind = std::env::args().nth(1).unwrap_or_default();
    match kind.as_str() {
        "--list" => return all().for_each(|(name, _)| println!("{name}")),
        "--refused" => return refused::REFUSED.iter().for_each(|(name, _)| println!("{name}")),
        _ => {}
    }
    let ballast = std::env::args().nth(2).map_or(Ok(0), |text| text.parse());
    if let Err(error) = ballast.context("a number of MiB").and_then(|ballast| run(&kind, ballast)) {
        // Anything that goes wrong outside of a question is a wrong answer too.
        println!("FAIL: {error:#}");
        std::process::exit(1);
    }
}

fn run(kind: &str, ballast: usize) -> Result<()> {
    let Some((_, set_up)) = all().find(|(name, _)| *name == kind) else {
        bail!("no guest {kind:?}; --list prints them")
    };
    // The language's own alternate stack would hide whether there is none afterwards.
    sys::no_altstack()?;
    sys::handle(libc::SIGUSR1, libc::SA_RESTART | libc::SA_ONSTACK)?;
    sys::count_signals(libc::SIGTERM)?;
    // Before the guest has children, who are to have it too.
    let mut ballast = Ballast::of(ballast);
    let mut guest = set_up()?;
    say("ready");
    let (mut rounds, mut signals, mut file) = (0, 0, asked_by_file());
    while sys::signals(libc::SIGTERM) == 0 {
        guest.step()?;
        ballast.write();
        let (now_signals, now_file) = (sys::signals(libc::SIGUSR1), asked_by_file());
        if now_signals == signals && now_file == file {
            std::thread::sleep(Duration::from_millis(5));
            continue;
        }
        (signals, file, rounds) = (now_signals, now_file, rounds + 1);
        if let Err(error) = guest.verify().and_then(|()| ballast.verify()) {
            say(&format!("FAIL {rounds}: {error:#}"));
            std::process::exit(1);
        }
        say(&format!("ok {rounds}"));
    }
    Ok(())
}

/// Memory whose every page is known: it has its number and how often it was written. One in eight is like others until then.
struct Ballast {
    words: Vec<u64>,
    written: Vec<u64>,
    turn: usize,
}

/// Words a page.
const PAGE: usize = 512;

impl Ballast {
    fn of(mebibytes: usize) -> Ballast {
        let pages = mebibytes * 256;
        let words = (0..pages * PAGE).map(|word| Ballast::word(word, 0)).collect();
        Ballast { words, written: vec![0; pages], turn: 0 }
    }

    fn word(at: usize, written: u64) -> u64 {
        let at = if written == 0 && at / PAGE % 8 == 7 { at % PAGE } else { at };
        (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ written
    }

    /// One page anew, another each time.
    fn write(&mut self) {
        if self.written.is_empty() {
            return;
        }
        self.turn = (self.turn + 257) % self.written.len();
        self.written[self.turn] += 1;
        let (first, written) = (self.turn * PAGE, self.written[self.turn]);
        (first..first + PAGE).for_each(|at| self.words[at] = Ballast::word(at, written));
    }

    fn verify(&self) -> Result<()> {
        let wrong =
            self.words.iter().enumerate().find(|(at, word)| **word != Ballast::word(*at, self.written[at / PAGE]));
        match wrong {
            None => Ok(()),
            Some((at, word)) => bail!("word {} of page {} of the ballast is {word:#x}", at % PAGE, at / PAGE),
        }
    }
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
