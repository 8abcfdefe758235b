//! What a move asks of the monitor: hold still, go away without a sound, begin with an engine instead of a program.

use crate::bench::{Bench, OutputLater, Terminal, eventually};
use pod_runtime::birth::{Clocks, Conceived};
use pod_runtime::cgroup::Cgroup;
use pod_runtime::monitor::{self, Beginning, Filled, Filling, Launch, Size, client};
use pod_runtime::network::Attachment;
use pod_runtime::spec::Spec;
use pod_runtime::status::State;
use pod_runtime::store::Pod;
use pod_runtime::sys::daemon;
use pod_runtime::{Problem, lifecycle};
use std::os::fd::AsFd;

#[test]
fn a_held_pod_is_not_read_and_goes_on_when_the_holder_dies() {
    let bench = Bench::new();
    let script = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.01; done";
    bench.ok(&["run", "-d", "--name", "p", "--network", "none", "--", "sh", "-c", script]);
    let pod = bench.store().pod("p").unwrap();
    let length = || std::fs::metadata(pod.log_path()).unwrap().len();
    eventually("output", || length() > 500);
    let hold = client::hold(&pod, false).unwrap();
    assert_eq!(hold.log, length());
    assert!(hold.ends.stdout.is_some() && hold.ends.console.is_none());
    hold.end(hold.ends.stdout.unwrap()).unwrap();
    // The monitor answers, and does not read: a few writes later the log is as long as it was.
    assert_eq!(client::ping(&pod).unwrap(), hold.monitor);
    assert_eq!(bench.pod(&["exec", "p", "true"]).code, 125);
    assert_eq!(client::hold(&pod, false).unwrap_err().code(), "E-BUSY");
    assert_eq!(hold.log, length());
    let before = hold.log;
    drop(hold);
    eventually("more output", || length() > before);
    let lines = bench.ok(&["logs", "p"]);
    assert!(lines.lines().enumerate().all(|(at, line)| line == at.to_string()), "a line is missing in {lines}");
    bench.ok(&["rm", "-f", "p"]);
}

#[test]
fn who_watches_a_pod_that_moves_is_told_where_to() {
    let bench = Bench::new();
    let mut person = Terminal::new(&bench, &["run", "-it", "--rm", "--name", "sh", "--network", "none", "--", "sh"]);
    person.say("echo ready-$((1+1))\n", "ready-2");
    let waiting = bench.command(&["wait", "sh"]).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let follower = bench.command(&["logs", "-f", "sh"]).output_later();
    let pod = bench.store().pod("sh").unwrap();
    let hold = client::hold(&pod, false).unwrap();
    hold.moved("hostB").unwrap();
    person.expect("moved to hostB");
    assert_eq!(person.ended(), 0);
    assert!(String::from_utf8_lossy(&waiting.wait_with_output().unwrap().stderr).contains("E-MOVED"));
    assert!(follower.join().unwrap().contains("moved to hostB"));
    assert!(bench.ok(&["ps", "-a"]).contains("moved → hostB"));
    assert_eq!(bench.ok(&["ps", "-q"]), "");
    for verb in [&["logs", "sh"][..], &["attach", "sh"], &["stop", "sh"], &["wait", "sh"], &["top", "sh"]] {
        let output = bench.pod(verb);
        assert_eq!((output.code, output.stderr.contains("hostB")), (3, true), "{verb:?}: {output:?}");
    }
    assert!(!pod.upper_dir().exists() && !pod.run_dir().exists() && !pod.log_path().exists());
    // The tombstone holds no name.
    bench.ok(&["run", "--rm", "--name", "sh", "--network", "none", "--", "true"]);
    bench.ok(&["rm", "sh"]);
    assert!(bench.is_empty(), "{:?}", bench.files());
}

#[test]
fn a_move_without_a_monitor_ends_the_same() {
    let bench = Bench::new();
    bench.ok(&["run", "-d", "--name", "p", "--network", "none", "--", "sleep", "1000"]);
    let pod = bench.store().pod("p").unwrap();
    bench.kill(pod.status().unwrap().monitor.unwrap().pid.into());
    eventually("the loss to be seen", || pod.status().unwrap().monitor_lost);
    let began = pod_runtime::status::now();
    lifecycle::moved(&pod, "a job of another pod", began, "hostB").unwrap();
    assert_eq!(pod.status().unwrap().state, State::Running);
    pod.update(|status| (status.state, status.job) = (State::Migrating, Some("0001".into()))).unwrap();
    lifecycle::moved(&pod, "0001", began, "hostB").unwrap();
    assert!(bench.ok(&["ps", "-a"]).contains("moved → hostB"));
    bench.ok(&["rm", "p"]);
    assert!(bench.is_empty(), "{:?}", bench.files());
}

/// Fills a pod without files.
struct Only<F>(Option<F>);

impl<F: FnOnce(&mut monitor::Newborn) -> Result<Filled, Problem>> Filling for Only<F> {
    fn files(&mut self, _: &Pod, _: &Spec, _: Option<&Conceived>, _: &Attachment) -> Result<Clocks, Problem> {
        Ok(Clocks::default())
    }

    fn fill(mut self: Box<Self>, newborn: &mut monitor::Newborn) -> Result<Filled, Problem> {
        self.0.take().unwrap()(newborn)
    }

    fn failed(&mut self, _: &Problem) {}
}

/// A reserved pod that is a copy of the one that runs under the name.
fn arriving(bench: &Bench, name: &str) -> Launch {
    bench.ok(&["run", "-d", "--name", name, "--network", "none", "--", "sleep", "1000"]);
    let store = bench.store();
    let mut spec = store.pod(name).unwrap().spec().unwrap();
    spec.id = pod_runtime::store::new_id().unwrap();
    spec.name = format!("{name}-copy");
    Launch {
        pod: store.reserve(&spec).unwrap(),
        spec,
        beginning: Beginning::Run,
        size: Size { rows: 24, columns: 80 },
        attach: false,
    }
}

#[test]
fn a_fill_that_fails_leaves_nothing_and_tells_why() {
    let bench = Bench::new();
    let launch = arriving(&bench, "p");
    let (pod, status) = (launch.pod.clone(), launch.pod.clone());
    let fill = move |_: &mut monitor::Newborn| {
        assert!(status.status().unwrap().init.is_some());
        Err(Problem::new("E-STATE", "no page came").fix("try again"))
    };
    let problem =
        monitor::spawn(Launch { beginning: Beginning::Fill(Box::new(Only(Some(fill)))), ..launch }).unwrap_err();
    assert_eq!((problem.what(), problem.way_out()), ("no page came", Some("try again")));
    assert!(!pod.dir().exists() && !pod.run_dir().exists());
    bench.ok(&["rm", "-f", "p"]);
    assert!(bench.is_empty(), "{:?}", bench.files());
}

#[test]
fn a_monitor_that_is_killed_while_it_fills_leaves_nothing() {
    let bench = Bench::new();
    let launch = arriving(&bench, "p");
    let fill = |_: &mut monitor::Newborn| {
        let me = std::process::id() as i32;
        let myself = daemon::pidfd_open(me).unwrap();
        daemon::pidfd_send_signal(myself.as_fd(), 9).unwrap();
        unreachable!()
    };
    let problem =
        monitor::spawn(Launch { beginning: Beginning::Fill(Box::new(Only(Some(fill)))), ..launch }).unwrap_err();
    assert_eq!(problem.code(), "E-MONITOR");
    bench.ok(&["rm", "-f", "p"]);
    assert!(bench.is_empty(), "{:?}", bench.files());
}

#[test]
fn a_restored_pod_may_have_ended_before_it_is_watched() {
    let bench = Bench::new();
    let launch = arriving(&bench, "p");
    let pod = launch.pod.clone();
    // What the closure owns lives through the fork, and what it leaves open is closed after it.
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let fill = move |newborn: &mut monitor::Newborn| {
        std::io::Write::write_all(&mut &theirs, b"here").unwrap();
        std::mem::forget(theirs);
        daemon::pidfd_send_signal(newborn.born.pidfd.as_fd(), 9).unwrap();
        Ok(Filled::default())
    };
    monitor::spawn(Launch { beginning: Beginning::Fill(Box::new(Only(Some(fill)))), ..launch }).unwrap();
    let mut text = String::new();
    std::io::Read::read_to_string(&mut &ours, &mut text).unwrap();
    assert_eq!(text, "here");
    eventually("its end", || pod.status().unwrap().exit_code == Some(137));
    bench.ok(&["rm", "p-copy"]);
    bench.ok(&["rm", "-f", "p"]);
    assert!(bench.is_empty(), "{:?}", bench.files());
}

#[test]
fn the_log_that_arrives_is_gone_on_with() {
    let bench = Bench::new();
    let launch = arriving(&bench, "p");
    let pod = launch.pod.clone();
    let fill = |newborn: &mut monitor::Newborn| {
        let before = monitor::log::encode(1, monitor::log::Stream::Stdout, b"there\n");
        std::fs::write(newborn.pod.log_path(), before).unwrap();
        let (read, write) = nix::unistd::pipe().unwrap();
        nix::unistd::write(&write, b"here\n").unwrap();
        Ok(Filled { stdout: Some(read), ..Filled::default() })
    };
    monitor::spawn(Launch { beginning: Beginning::Fill(Box::new(Only(Some(fill)))), ..launch }).unwrap();
    eventually("both lines", || bench.ok(&["logs", pod.id()]) == "there\nhere\n");
    bench.ok(&["rm", "-f", "p", "p-copy"]);
    assert!(bench.is_empty(), "{:?}", bench.files());
}

#[test]
fn a_pod_that_was_filled_stays_when_nothing_can_be_written() {
    let bench = Bench::new();
    let launch = arriving(&bench, "p");
    let pod = launch.pod.clone();
    // What stands in the way of every change of the status.
    let lock = pod.dir().join("lock");
    let in_the_way = lock.clone();
    let fill = move |_: &mut monitor::Newborn| {
        std::fs::remove_file(&in_the_way).unwrap();
        std::fs::create_dir(&in_the_way).unwrap();
        Ok(Filled::default())
    };
    let beginning = Beginning::Fill(Box::new(Only(Some(fill))));
    let started = monitor::spawn(Launch { beginning, ..launch }).unwrap();
    let alive = |pid: i32| pod_runtime::status::ProcessKey::of(pid).is_ok_and(|key| key.alive());
    assert!(alive(started.init) && alive(started.monitor));
    assert_eq!(pod.status().unwrap().state, State::Creating);
    std::fs::remove_dir(&lock).unwrap();
    eventually("the status", || pod.status().unwrap().state == State::Running);
    assert!(alive(started.init));
    bench.ok(&["rm", "-f", "p", "p-copy"]);
    assert!(bench.is_empty(), "{:?}", bench.files());
}

/// Asks for the files only when all that can fail before has not.
struct InPlace;

impl Filling for InPlace {
    fn files(&mut self, pod: &Pod, _: &Spec, _: Option<&Conceived>, _: &Attachment) -> Result<Clocks, Problem> {
        let init = Cgroup::open(pod.id())?.procs()?.into_iter().next();
        let init = init.ok_or_else(|| Problem::new("E-STATE", "nobody is in the cgroup"))?;
        let cgroups = std::fs::read_to_string(format!("/proc/{init}/cgroup")).unwrap();
        let mut groups = cgroups.lines().filter(|line| line.contains("memory") || line.contains("pids"));
        // The one of its own is made last.
        let own = |of: &str| std::fs::read_link(format!("/proc/{of}/ns/cgroup")).unwrap();
        if groups.any(|line| !line.contains(pod.id())) || own("self") == own(&init.to_string()) {
            return Err(Problem::new("E-STATE", format!("too early: {cgroups}")));
        }
        Ok(Clocks::default())
    }

    fn fill(self: Box<Self>, _: &mut monitor::Newborn) -> Result<Filled, Problem> {
        Ok(Filled::default())
    }

    fn failed(&mut self, _: &Problem) {}
}

#[test]
fn the_files_come_when_the_first_process_is_in_its_place() {
    let bench = Bench::new();
    let launch = arriving(&bench, "p");
    monitor::spawn(Launch { beginning: Beginning::Fill(Box::new(InPlace)), ..launch }).unwrap();
    bench.ok(&["rm", "-f", "p", "p-copy"]);
    assert!(bench.is_empty(), "{:?}", bench.files());
}
