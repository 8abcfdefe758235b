//! Every guest × every way to be saved or moved: a table of tests, each on hosts of its own, each followed by the leak
//! check. `TIMES` says how often a guest goes each way in a row (once in CI, twenty times for the table in
//! `docs/guests.md`, which `integration/guests` writes).

use anyhow::{Context, Result, ensure};
use integration::bed::{self, Bed, Host};
use integration::hugepages::HugePages;
use integration::pods::{kill_and_restore, move_around, said};

fn times() -> usize {
    std::env::var("TIMES").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// MiB beside the guest, with which its memory goes ahead of it.
const BALLAST: u32 = 40;

/// A guest in a pod on the first host, asked once already.
fn start(bed: &Bed, kind: &str, ballast: u32) -> Result<()> {
    let rights: &[&str] = match kind {
        "mounts" | "names" => &["--cap-add", "SYS_ADMIN", "--security-opt", "seccomp=unconfined"],
        "subgroups" | "sysctls" => &["--privileged"],
        // mbind(2) and set_mempolicy(2) are for who may say where others run.
        "advised" => &["--cap-add", "SYS_NICE"],
        "routes" => &["--cap-add", "NET_ADMIN"],
        _ => &[],
    };
    bed.a().guest(kind, rights, ballast)?;
    ask(bed.a(), kind, 1)
}

fn ask(host: &Host, kind: &str, round: usize) -> Result<()> {
    host.pod(&["kill", "-s", "USR1", kind])?;
    said(host, kind, &format!("ok {round}"))
}

/// A pod with the guest goes a way: two steps, each followed by a question, as often as it is to; nothing is left of it.
fn way(kind: &str, ballast: u32, step: impl Fn(&Bed, usize) -> Result<Host>) -> Result<()> {
    let _pages = HugePages::of(kind)?;
    let bed = Bed::new()?;
    let before = bed.census()?;
    start(&bed, kind, ballast)?;
    let mut host = bed.a().clone();
    for round in 2..2 + 2 * times() {
        host = step(&bed, round)?;
        ask(&host, kind, round)?;
    }
    host.pod(&["rm", "-f", kind])?;
    bed.nothing_left(&before)
}

/// Saved, killed and restored. After each restore it must also be possible to save it again.
fn restored(kind: &str) -> Result<()> {
    way(kind, 0, |bed, _| kill_and_restore(bed.a(), kind, &[]).map(|()| bed.a().clone()))
}

/// Saved in a file, with which another host that knows nothing of it starts anew, in another directory.
fn restored_elsewhere(kind: &str) -> Result<()> {
    const ROOT: &str = "/var/lib/elsewhere";
    way(kind, 0, |bed, round| {
        let elsewhere = bed.b().with("POD_ROOT", ROOT);
        let (from, to) = if round % 2 == 0 { (bed.a(), &elsewhere) } else { (&elsewhere, bed.a()) };
        let file = bed.shared().join("saved");
        let file = file.to_string_lossy();
        from.pod(&["checkpoint", "create", kind, "--export", &file])?;
        from.pod(&["rm", "-f", kind])?;
        if round % 2 == 1 {
            from.run(&["rm", "-r", ROOT])?;
        }
        to.pod(&["restore", "--import", &file])?;
        std::fs::remove_file(&*file)?;
        Ok(to.clone())
    })
}

fn move_on(bed: &Bed, kind: &str) -> Result<Host> {
    move_around(bed, kind, 1)?;
    Ok(if bed.a().runs(kind) { bed.a() } else { bed.b() }.clone())
}

/// Moved to the other host, and back.
fn moved(kind: &str) -> Result<()> {
    way(kind, 0, |bed, _| move_on(bed, kind))
}

/// The same, with so much memory that it goes ahead while the guest runs.
fn moved_with_memory_ahead(kind: &str) -> Result<()> {
    way(kind, BALLAST, |bed, _| move_on(bed, kind))
}

/// The same, and all of it that can comes when the guest runs there already.
fn moved_with_memory_behind(kind: &str) -> Result<()> {
    way(kind, BALLAST, |bed, _| {
        let (from, to) = if bed.a().runs(kind) { (bed.a(), bed.b()) } else { (bed.b(), bed.a()) };
        let target = format!("root@{}", to.name());
        let report = from.pod(&["migrate", kind, "--to", &target, "--postcopy", "--json"])?;
        let report: serde_json::Value = serde_json::from_str(&report)?;
        let behind = report["bytes_behind"].as_u64().unwrap_or(0);
        // What processes share since a fork comes at once, and what is sealed.
        let much = ["memory", "threads", "tcp", "epoll"].contains(&kind);
        anyhow::ensure!(!much || behind >= u64::from(BALLAST) << 19, "of its memory {behind} bytes came behind it");
        from.pod(&["rm", kind])?;
        Ok(to.clone())
    })
}

/// Saved, killed, and running again before all of its memory is there: from the store, and from a packed file, which goes
/// meanwhile. To save it again means to wait for its memory.
fn restored_lazily(kind: &str) -> Result<()> {
    way(kind, BALLAST, |bed, round| {
        let host = bed.a();
        if round % 2 == 0 {
            kill_and_restore(host, kind, &["--lazy"])?;
        } else {
            let file = bed.shared().join("saved");
            let name = file.to_string_lossy();
            host.pod(&["checkpoint", "create", kind, "--export", &name])?;
            host.pod(&["rm", "-f", kind])?;
            host.pod(&["restore", "--lazy", "--import", &name])?;
            std::fs::remove_file(&file)?;
        }
        Ok(host.clone())
    })
}

macro_rules! ways {
    ($($way:ident)* : $kinds:tt) => { $( mod $way { ways! { @ $way $kinds } } )* };
    (@ $way:ident [$($kind:ident)*]) => { $( #[test] fn $kind() -> anyhow::Result<()> {
        super::$way(stringify!($kind))
    } )* };
}

// Those whose memory, threads and waits matter to it.
ways! { moved_with_memory_behind: [
    advised churn crowd epoll headless lockedmem memory prefork sharedparts tcp threads tree
] }

ways! { restored restored_elsewhere restored_lazily moved moved_with_memory_ahead: [
    churn clocks counter credentials crowd epoll eventfd fifo files flow headless inotify limits lockedmem locks memfds memory
    nameless options packets peers pipes prefork pty registers sealed seccomp sharedmem sharedparts signalfd signals signed switches
    tcp tcpends threads throng timeouts timerfd timers tree udp unix unixends
    reuseport
    advised handles rawsockets undone
    mqueues mounts routes hugepages names subgroups sysctls
] }

/// All guests in one pod: none is in the way of another, and the pod goes there and back, is saved and restored.
#[test]
fn all_guests_in_one_pod() -> Result<()> {
    let _pages = HugePages::take()?;
    let bed = Bed::new()?;
    let before = bed.census()?;
    let guest = bed::beside_us("guest").context("guest is built with us")?;
    let guest = guest.to_string_lossy();
    let names = |which: &str| bed.a().run(&[&guest, which]);
    let (list, refused) = (names("--list")?, names("--refused")?);
    let kinds: Vec<&str> = list.lines().filter(|kind| refused.lines().all(|other| other != *kind)).collect();
    ensure!(kinds.len() > 45, "{} guests", kinds.len());

    let line = format!("for kind; do {guest} $kind >/tmp/$kind.log 2>&1 & done; wait");
    let run = ["run", "-d", "--name", "all", "--privileged", "--", "sh", "-c", &line, "sh"];
    bed.a().pod(&[&run[..], &kinds].concat())?;
    let all_say = |host: &Host, what: &str| -> Result<()> {
        let mut missing = Vec::new();
        let ended = format!("cd /tmp; for kind; do grep -qx '{what}' $kind.log || tail -n 1 $kind.log /dev/null; done");
        integration::wait::until_true(&format!("every guest to say {what:?}"), integration::wait::SOON, || {
            let said = host.pod(&[&["exec", "all", "sh", "-c", &ended, "sh"], &kinds[..]].concat());
            missing =
                said.map_or_else(|error| vec![format!("{error:#}")], |said| said.lines().map(str::to_owned).collect());
            missing.is_empty() || missing.iter().any(|line| line.contains("FAIL"))
        })
        .with_context(|| missing.join("\n"))?;
        ensure!(missing.is_empty(), "on {}: {}", host.name(), missing.join("\n"));
        Ok(())
    };
    all_say(bed.a(), "ready")?;
    let ask = |host: &Host, round: usize| -> Result<()> {
        // At once, for a guest that finds the file empty counts that as a question.
        let line = format!("echo {round} >/tmp/verify.new && mv /tmp/verify.new /tmp/verify");
        host.pod(&["exec", "all", "sh", "-c", &line])?;
        all_say(host, &format!("ok {round}"))
    };
    ask(bed.a(), 1)?;
    let mut round = 2;
    for _ in 0..times() {
        for _ in 0..2 {
            ask(&move_on(&bed, "all")?, round)?;
            round += 1;
        }
        kill_and_restore(bed.a(), "all", &[])?;
        ask(bed.a(), round)?;
        round += 1;
    }
    bed.a().pod(&["rm", "-f", "all"])?;
    bed.nothing_left(&before)
}
