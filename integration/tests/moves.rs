//! Every guest × every way to move: a table of tests, each on hosts of its own, each followed by the leak check.

use anyhow::{Context, Result};
use integration::bed::{self, Bed, Host};
use integration::hugepages::HugePages;
use integration::pods::{kill_and_restore, move_around, said};

/// A guest in a pod on the first host, asked once already.
fn start(bed: &Bed, kind: &str) -> Result<()> {
    let guest = bed::beside_us("guest").context("guest is built with us")?;
    let run = ["run", "-d", "--name", kind, "--network", "none"];
    let rights: &[&str] = match kind {
        "mounts" | "names" => &["--cap-add", "SYS_ADMIN", "--security-opt", "seccomp=unconfined"],
        "routes" => &["--cap-add", "NET_ADMIN"],
        _ => &[],
    };
    bed.a().pod(&[&run, rights, &["--", &guest.to_string_lossy(), kind]].concat())?;
    said(bed.a(), kind, "ready")?;
    ask(bed.a(), kind, 1)
}

fn ask(host: &Host, kind: &str, round: usize) -> Result<()> {
    host.pod(&["kill", "-s", "USR1", kind])?;
    said(host, kind, &format!("ok {round}"))
}

/// After each restore it must also be possible to save it again.
fn checkpoint_and_restore_twice(kind: &str) -> Result<()> {
    let _pages = HugePages::of(kind)?;
    let bed = Bed::new()?;
    let before = bed.census()?;
    start(&bed, kind)?;
    for round in 2..=3 {
        kill_and_restore(bed.a(), kind)?;
        ask(bed.a(), kind, round)?;
    }
    bed.a().pod(&["rm", "-f", kind])?;
    bed.nothing_left(&before)
}

fn there_and_back(kind: &str) -> Result<()> {
    let _pages = HugePages::of(kind)?;
    let bed = Bed::new()?;
    let before = bed.census()?;
    start(&bed, kind)?;
    move_around(&bed, kind, 1)?;
    ask(bed.b(), kind, 2)?;
    move_around(&bed, kind, 1)?;
    ask(bed.a(), kind, 3)?;
    bed.a().pod(&["rm", "-f", kind])?;
    bed.nothing_left(&before)
}

macro_rules! ways {
    ($($way:ident)* : $kinds:tt) => { $( mod $way { ways! { @ $way $kinds } } )* };
    (@ $way:ident [$($kind:ident)*]) => { $( #[test] fn $kind() -> anyhow::Result<()> {
        super::$way(stringify!($kind))
    } )* };
}

ways! { checkpoint_and_restore_twice there_and_back: [
    churn clocks counter credentials epoll eventfd fifo files flow headless inotify limits lockedmem locks memfds memory
    nameless options packets peers pipes pty registers sealed seccomp sharedmem sharedparts signalfd signals signed switches
    tcp tcpends threads timeouts timerfd timers tree udp unix unixends
    reuseport
    mqueues mounts routes hugepages names
] }
