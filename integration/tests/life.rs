//! The life of a pod as a user has it: run, look, enter, stop, remove, and nothing left.

use anyhow::{Result, ensure};
use integration::bed::Bed;
use integration::pods::said;
use integration::terminal::Terminal;
use integration::wait::{SOON, until_true};

#[test]
fn exit_codes_are_dockers() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    let code = |args: &[&str]| anyhow::Ok(bed.a().output(&[&["pod"], args].concat())?.status.code());
    ensure!(code(&["run", "--rm", "--", "sh", "-c", "exit 7"])? == Some(7), "the program's own");
    ensure!(code(&["run", "--rm", "--init", "--", "sh", "-c", "kill -9 $$"])? == Some(137), "a signal's");
    ensure!(code(&["run", "--rm", "--", "/no/such/program"])? == Some(127), "not found");
    ensure!(code(&["run", "--rm", "--", "/etc/hostname"])? == Some(126), "not executable");
    ensure!(code(&["run", "--rm", "--network", "bridge:none0", "--", "true"])? == Some(125), "pod's own");
    bed.nothing_left(&before)
}

/// Some supervisors start their programs so.
#[test]
fn whoever_ignores_children_can_run_a_pod() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    // Not by a shell, which changes that.
    const IGNORE: &str = "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execvp('pod', ['pod'] + sys.argv[1:])";
    let pod = |args: &[&str]| bed.a().run(&[&["python3", "-c", IGNORE], args].concat());
    ensure!(pod(&["run", "--rm", "-p", "8099:80", "--", "echo", "here"])? == "here\n");
    pod(&["run", "-d", "--name", "sleeper", "--network", "none", "--", "sleep", "1000"])?;
    pod(&["checkpoint", "create", "sleeper", "one"])?;
    pod(&["rm", "-f", "sleeper"])?;
    pod(&["restore", "one"])?;
    pod(&["rm", "-f", "sleeper"])?;
    pod(&["checkpoint", "rm", "one"])?;
    bed.nothing_left(&before)
}

#[test]
fn two_pods_have_the_same_pids_ports_and_keys() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    let script = "echo $$; ipcmk -Q >/dev/null; ipcs -q | grep -c 0x; exec python3 -m http.server 8000";
    for name in ["one", "two"] {
        bed.a().pod(&["run", "-d", "--name", name, "--hostname", "same", "--", "sh", "-c", script])?;
    }
    for name in ["one", "two"] {
        until_true(name, SOON, || {
            let fetch = "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/etc/hostname').read()";
            bed.a().pod(&["exec", name, "python3", "-c", fetch]).is_ok()
        })?;
        let log = bed.a().pod(&["logs", name])?;
        ensure!(log.starts_with("1\n1\n"), "pid and message queues of {name}: {log}");
        ensure!(bed.a().pod(&["exec", name, "hostname"])?.trim() == "same");
    }
    let address = |name| bed.a().pod(&["exec", name, "hostname", "-I"]);
    ensure!(address("one")? != address("two")?, "both have {}", address("one")?);
    bed.a().pod(&["rm", "-f", "one", "two"])?;
    bed.nothing_left(&before)
}

#[test]
fn what_a_pod_writes_stays_in_it() -> Result<()> {
    let bed = Bed::new()?;
    let name = format!("/var/tmp/written-{}", bed.name());
    bed.a().pod(&["run", "-d", "--name", "writer", "--", "sh", "-c", &format!("echo in >{name}; exec sleep 1000")])?;
    until_true("the file in the pod", SOON, || bed.a().pod(&["exec", "writer", "cat", &name]).is_ok())?;
    ensure!(!std::path::Path::new(&name).exists(), "{name} is on the host");
    bed.a().pod(&["rm", "-f", "writer"]).map(drop)
}

/// Whoever removes the folder of all pods after the last of them finds nobody who still writes there.
#[test]
fn a_removed_pod_has_no_monitor() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    let host = bed.a().with("POD_ROOT", "/var/lib/elsewhere");
    for round in 0..10 {
        host.pod(&["run", "-d", "--name", "short", "--", "sleep", "1000"])?;
        // The shell asks at once, without a program to start first.
        let script = "monitor=$(pgrep -x pod-monitor) && pod rm -f short >&2 && ! [ -e /proc/$monitor/exe ]";
        ensure!(
            host.output(&["sh", "-c", script])?.status.success(),
            "round {round}: its monitor is there, or never was"
        );
        host.run(&["rm", "-r", "/var/lib/elsewhere"])?;
    }
    bed.nothing_left(&before)
}

#[test]
fn a_pod_survives_its_monitor() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    bed.a().pod(&["run", "-d", "--name", "lonely", "--", "sleep", "1000"])?;
    bed.a().run(&["pkill", "-KILL", "-x", "pod-monitor"])?;
    ensure!(bed.a().runs("lonely"), "it does not run any more");
    until_true("ps to say that its monitor is gone", SOON, || {
        bed.a().pod(&["ps", "-a"]).is_ok_and(|ps| ps.contains("monitor"))
    })?;
    bed.a().pod(&["stop", "-t", "1", "lonely"])?;
    ensure!(!bed.a().runs("lonely"), "it still runs");
    bed.a().pod(&["rm", "lonely"])?;
    bed.nothing_left(&before)
}

#[test]
fn a_terminal_can_be_left_and_taken_again() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    let mut terminal = Terminal::pod(bed.a(), &["run", "-it", "--name", "shell", "--", "bash", "--norc"])?;
    terminal.expect("# ")?;
    terminal.say("PS1='no''w> '; x=41\n", "now> ")?;
    terminal.detach()?;
    let mut terminal = Terminal::pod(bed.a(), &["attach", "shell"])?;
    terminal.say("echo $((x+1)) done\n", "42 done")?;
    terminal.say("stty size\n", "40 120")?;
    terminal.type_in("exit 5\n")?;
    ensure!(terminal.ended()? == 5, "the shell's exit code is another");
    ensure!(bed.a().pod(&["wait", "shell"])?.trim() == "5");
    bed.a().pod(&["rm", "shell"])?;
    bed.nothing_left(&before)
}

#[test]
fn a_log_is_whole_and_followed() -> Result<()> {
    let bed = Bed::new()?;
    let count = "i=0; while [ $i -lt 5000 ]; do i=$((i+1)); echo line $i; done";
    bed.a().pod(&["run", "-d", "--name", "log", "--", "sh", "-c", count])?;
    said(bed.a(), "log", "line 5000")?;
    let followed = bed.a().pod(&["logs", "-f", "log"])?;
    ensure!(followed.lines().count() == 5000, "{} lines", followed.lines().count());
    ensure!(bed.a().pod(&["logs", "--tail", "3", "log"])? == "line 4998\nline 4999\nline 5000\n");
    bed.a().pod(&["rm", "log"]).map(drop)
}

#[test]
fn an_address_on_the_lan_is_given_once() -> Result<()> {
    let bed = Bed::new()?;
    let before = bed.census()?;
    let head = ["run", "-d", "--network", "bridge:br0", "--ip", "10.77.0.100/24"];
    bed.a().pod(&[&head[..], &["--name", "first", "--", "sleep", "1000"]].concat())?;
    ensure!(bed.client().run(&["ping", "-c1", "-W5", "10.77.0.100"])?.contains("1 received"));
    let (code, said) = bed.a().pod_fails(&[&head[..], &["--name", "second", "--", "sleep", "1000"]].concat())?;
    ensure!(code == 125 && said.contains("error[E-"), "{code}: {said}");
    bed.a().pod(&["rm", "-f", "first"])?;
    bed.nothing_left(&before)
}

#[test]
fn an_argument_may_be_empty() -> Result<()> {
    let bed = Bed::new()?;
    let counted = bed.a().pod(&["run", "--rm", "--", "sh", "-c", "echo $#", "sh", "", "x", ""])?;
    ensure!(counted.trim() == "3", "{counted} arguments arrived");
    Ok(())
}
