//! The life of a pod, seen by who types `pod`: needs root. Each test has a store of its own and leaves nothing.
#![deny(unsafe_code)]

mod bench;
mod moved;
mod sessions;

use bench::{Bench, DETACH, Terminal, eventually};
use std::fs;
use std::io::Write;
use std::process::Stdio;

#[test]
fn exit_codes_are_the_programs_or_dockers() {
    let bench = Bench::new();
    for (args, code) in [
        (vec!["run", "--rm", "--network", "none", "--", "true"], 0),
        (vec!["run", "--rm", "--network", "none", "sh", "-c", "exit 7"], 7),
        (vec!["run", "--rm", "--init", "--network", "none", "--", "sh", "-c", "kill -9 $$"], 137),
        (vec!["run", "--rm", "--network", "none", "--", "/etc/passwd"], 126),
        (vec!["run", "--rm", "--network", "none", "--", "no-such-program"], 127),
        (vec!["run", "--rm", "--network", "no:such", "--", "true"], 125),
        (vec!["run", "--rm", "--nmae", "x", "--", "true"], 125),
        (vec!["logs", "no-such-pod"], 3),
        (vec!["kill", "-s", "NOPE", "x"], 2),
        (vec!["pa"], 2),
        (vec!["explain", "E-STATE"], 0),
    ] {
        let output = bench.pod(&args);
        assert_eq!(output.code, code, "{args:?}: {output:?}");
    }
    assert!(bench.is_empty(), "{:?}", bench.files());
}

#[test]
fn a_detached_pod_is_seen_entered_stopped_and_removed() {
    let bench = Bench::new();
    let started = bench.ok(&[
        "run",
        "-d",
        "--name",
        "web",
        "--network",
        "none",
        "--label",
        "tier=a",
        "--",
        "sh",
        "-c",
        "trap 'echo bye; exit 4' TERM; echo begun; while :; do sleep 0.05; done",
    ]);
    assert_eq!(started, "web\n");
    eventually("the first line", || bench.ok(&["logs", "web"]).contains("begun"));
    assert!(bench.ok(&["ps", "--format", "{{.Name}} {{.State}}", "--filter", "label=tier=a"]).contains("web running"));
    assert_eq!(bench.ok(&["exec", "web", "sh", "-c", "echo $((6*7))"]), "42\n");
    assert_eq!(bench.pod(&["exec", "web", "sh", "-c", "exit 9"]).code, 9);
    assert_eq!(bench.pod(&["exec", "web", "no-such"]).code, 127);
    assert_eq!(bench.with_input(&["exec", "-i", "web", "cat"], "through\n").stdout, "through\n");
    assert_eq!(bench.pod(&["rm", "web"]).code, 3);
    let pod = bench.json(&["inspect", "web"]);
    assert_eq!(pod[0]["spec"]["name"], "web");
    assert!(bench.ok(&["top", "web"]).contains("sleep 0.05"));
    bench.ok(&["stop", "web"]);
    assert_eq!(bench.ok(&["wait", "web"]), "4\n");
    assert!(bench.ok(&["logs", "--tail", "1", "web"]).contains("bye"));
    assert!(bench.ok(&["ps", "-a"]).contains("exited (4)"));
    assert_eq!(bench.pod(&["exec", "web", "true"]).code, 125);
    bench.ok(&["rm", "web"]);
    assert!(bench.is_empty(), "{:?}", bench.files());
    let events = bench.ok(&["events"]);
    for event in ["create", "start", "exec", "stop", "die", "remove"] {
        assert!(events.contains(&format!(" {event} ")), "{event} is missing in {events}");
    }
}

#[test]
fn a_shell_on_a_terminal_is_left_and_found_again() {
    let bench = Bench::new();
    let mut first = Terminal::new(&bench, &["run", "-it", "--name", "sh", "--network", "none", "--", "sh"]);
    first.say("X=4; echo is-$((X+1))\n", "is-5");
    first.say("stty size\n", "40 120");
    first.keys(DETACH);
    assert_eq!(first.ended(), 0);
    let mut second = Terminal::new(&bench, &["attach", "sh"]);
    second.say("echo again-$((X*2))\n", "again-8");
    let mut inner = Terminal::new(&bench, &["exec", "-it", "sh", "sh"]);
    inner.say("tty; echo on-$((1+1))\n", "on-2");
    inner.keys("exit 3\n");
    assert_eq!(inner.ended(), 3);
    // The client's death is not the pod's.
    second.kill();
    let mut third = Terminal::new(&bench, &["attach", "sh"]);
    third.say("echo still-$X\n", "still-4");
    third.keys("exit 6\n");
    assert_eq!(third.ended(), 6);
    bench.ok(&["rm", "sh"]);
}

#[test]
fn the_terminal_that_was_there_before_is_there_after() {
    let bench = Bench::new();
    let mut terminal = Terminal::program(
        &bench,
        "sh",
        &[
            "-c",
            "stty -a > before; pod run --rm -it --network none -- sh -c 'stty raw -echo'; stty -a > after; echo done",
        ],
    );
    terminal.expect("done");
    terminal.ended();
    assert_eq!(
        fs::read_to_string(bench.dir().join("before")).unwrap(),
        fs::read_to_string(bench.dir().join("after")).unwrap()
    );
}

#[test]
fn a_pod_outlives_its_monitor() {
    let bench = Bench::new();
    bench.ok(&["run", "-d", "--name", "p", "--network", "none", "--", "sleep", "1000"]);
    let monitor = bench.json(&["inspect", "p"])[0]["monitor_pid"].as_i64().unwrap();
    bench.kill(monitor);
    eventually("the loss to be seen", || bench.ok(&["ps"]).contains("running (monitor lost)"));
    assert_eq!(bench.pod(&["attach", "p"]).code, 1);
    assert!(bench.pod(&["logs", "-f", "p"]).stderr.contains("E-MONITOR"));
    bench.ok(&["pause", "p"]);
    bench.ok(&["unpause", "p"]);
    bench.ok(&["stop", "-t", "0", "p"]);
    assert!(bench.ok(&["ps", "-a"]).contains("exited (?)"));
    bench.ok(&["run", "-d", "--name", "q", "--network", "none", "--", "sleep", "1000"]);
    let monitor = bench.json(&["inspect", "q"])[0]["monitor_pid"].as_i64().unwrap();
    bench.kill(monitor);
    bench.ok(&["rm", "-f", "p", "q"]);
    assert!(bench.is_empty(), "{:?}", bench.files());
}

#[test]
fn a_pod_outlives_the_command_that_started_it() {
    let bench = Bench::new();
    let mut run = bench.command(&["run", "--name", "p", "--network", "none", "--", "sleep", "1000"]).spawn().unwrap();
    eventually("the pod", || bench.ok(&["ps"]).contains("up "));
    run.kill().unwrap();
    run.wait().unwrap();
    assert_eq!(bench.ok(&["exec", "p", "echo", "here"]), "here\n");
    bench.ok(&["rm", "-f", "p"]);
    assert!(bench.is_empty(), "{:?}", bench.files());
}

#[test]
fn pods_side_by_side_have_the_same_pids_and_not_the_same_files() {
    let bench = Bench::new();
    for name in ["a", "b"] {
        bench.ok(&["run", "-d", "--name", name, "--network", "none", "--", "sleep", "1000"]);
        bench.ok(&["exec", name, "sh", "-c", &format!("echo {name} > /root/who; [ $$ = 2 ]")]);
    }
    for name in ["a", "b"] {
        assert_eq!(bench.ok(&["exec", name, "cat", "/root/who"]), format!("{name}\n"));
    }
    assert!(bench.pod(&["run", "--name", "a", "--network", "none", "--", "true"]).stderr.contains("E-NAME"));
    bench.ok(&["rm", "-f", "a", "b"]);
    assert!(bench.is_empty(), "{:?}", bench.files());
}

#[test]
fn a_paused_pod_stands_still() {
    let bench = Bench::new();
    bench.ok(&[
        "run",
        "-d",
        "--name",
        "p",
        "--network",
        "none",
        "--",
        "sh",
        "-c",
        "while :; do echo x; sleep 0.01; done",
    ]);
    eventually("lines", || bench.ok(&["logs", "p"]).lines().count() > 3);
    bench.ok(&["pause", "p"]);
    let lines = || bench.ok(&["logs", "p"]).lines().count();
    // What was in the pipe may still arrive.
    eventually("the log to stand still", || lines() == lines());
    let then = lines();
    assert_eq!(bench.pod(&["exec", "p", "true"]).code, 125);
    assert_eq!(lines(), then);
    bench.ok(&["unpause", "p"]);
    eventually("more lines", || lines() > then);
    bench.ok(&["rm", "-f", "p"]);
}

#[test]
fn files_go_in_and_out_and_no_link_leads_out() {
    let bench = Bench::new();
    bench.ok(&["run", "-d", "--name", "p", "--network", "none", "--", "sleep", "1000"]);
    fs::create_dir(bench.dir().join("tree")).unwrap();
    fs::write(bench.dir().join("tree/file"), "text").unwrap();
    fs::write(bench.dir().join("secret"), "secret").unwrap();
    std::os::unix::fs::symlink("file", bench.dir().join("tree/link")).unwrap();
    bench.ok(&["cp", "tree", "p:/root/"]);
    assert_eq!(bench.ok(&["exec", "p", "cat", "/root/tree/link"]), "text");
    bench.ok(&["exec", "p", "sh", "-c", "echo more >> /root/tree/file"]);
    bench.ok(&["cp", "p:/root/tree", "back"]);
    assert_eq!(fs::read_to_string(bench.dir().join("back/link")).unwrap(), "textmore\n");
    // A link in the pod that names a folder of the host which the pod does not see.
    let target = bench.dir().join("only-here");
    fs::create_dir(&target).unwrap();
    bench.ok(&["exec", "p", "ln", "-s", &target.display().to_string(), "/root/out"]);
    bench.pod(&["cp", "secret", "p:/root/out"]);
    assert!(fs::read_dir(&target).unwrap().next().is_none());
    bench.ok(&["rm", "-f", "p"]);
}

#[test]
fn with_rm_nothing_is_left() {
    let bench = Bench::new();
    bench.ok(&["run", "--rm", "--network", "none", "--", "true"]);
    assert!(bench.is_empty(), "{:?}", bench.files());
    bench.ok(&["run", "-d", "--rm", "--name", "p", "--network", "none", "--", "sleep", "1000"]);
    bench.ok(&["stop", "-t", "0", "p"]);
    eventually("the pod to be gone", || bench.is_empty());
}

#[test]
fn a_foreground_run_passes_signals_on() {
    let bench = Bench::new();
    let script = "trap 'echo got; exit 9' USR1; echo ready; while :; do sleep 0.02; done";
    let mut command = bench.command(&["run", "--rm", "--name", "p", "--network", "none", "--", "sh", "-c", script]);
    let child = command.stdout(Stdio::piped()).spawn().unwrap();
    eventually("the trap", || bench.pod(&["logs", "p"]).stdout.contains("ready"));
    bench.signal(child.id().into(), nix::sys::signal::Signal::SIGUSR1);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(9));
    assert!(String::from_utf8_lossy(&output.stdout).ends_with("got\n"));
}

#[test]
fn much_output_arrives_whole_and_binary_data_unchanged() {
    let bench = Bench::new();
    let output = bench.pod(&["run", "--rm", "--network", "none", "--", "seq", "1", "200000"]);
    assert_eq!(output.stdout.lines().count(), 200_000);
    assert!(output.stdout.ends_with("199999\n200000\n"));
    let script = "head -c 3000000 /dev/urandom | tee /tmp/r | sha256sum >&2; cat /tmp/r";
    let mut run = bench.command(&["run", "--network", "none", "--name", "p", "--", "sh", "-c", script]);
    let output = run.output().unwrap();
    let sum = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(bench.sha256(&output.stdout), sum);
    let logged = bench.command(&["logs", "p"]).output().unwrap().stdout;
    assert_eq!(bench.sha256(&logged), sum);
}

#[test]
fn input_of_any_size_goes_through() {
    let bench = Bench::new();
    let mut run = bench.command(&["run", "--rm", "-i", "--network", "none", "--", "sha256sum"]);
    let mut child = run.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let data: Vec<u8> = (0..5_000_000u32).map(|i| (i * 7 + i / 251) as u8).collect();
    child.stdin.take().unwrap().write_all(&data).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), bench.sha256(&data));
}

#[test]
fn followed_logs_end_with_the_pod() {
    let bench = Bench::new();
    bench.ok(&[
        "run",
        "-d",
        "--name",
        "p",
        "--network",
        "none",
        "--",
        "sh",
        "-c",
        "for i in 1 2 3; do echo n$i; sleep 0.1; done",
    ]);
    assert_eq!(bench.ok(&["logs", "-f", "p"]), "n1\nn2\nn3\n");
    assert_eq!(bench.ok(&["logs", "--tail", "2", "p"]), "n2\nn3\n");
    assert_eq!(bench.ok(&["logs", "--since", "1h", "--until", "1m", "p"]), "");
}

#[test]
fn json_is_json_and_problems_are_objects() {
    let bench = Bench::new();
    bench.ok(&["run", "-d", "--name", "p", "--network", "none", "--", "sleep", "1000"]);
    assert_eq!(bench.json(&["--json", "ps"])["pods"][0]["name"], "p");
    assert_eq!(bench.json(&["stats", "--no-stream", "--json"])["stats"][0]["name"], "p");
    assert_eq!(bench.json(&["top", "p", "--json"])["processes"][0]["pid"], 1);
    let output = bench.pod(&["--json", "logs", "q"]);
    let problem: serde_json::Value = serde_json::from_str(&output.stderr).unwrap();
    assert_eq!(problem["error"]["code"], "E-NOPOD");
    bench.ok(&["rm", "-f", "p"]);
}

#[test]
fn of_two_at_once_one_gets_the_name() {
    let bench = Bench::new();
    let spawn = || {
        let mut command = bench.command(&["run", "-d", "--name", "one", "--network", "none", "--", "sleep", "1000"]);
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    let tries: Vec<_> = (0..4).map(|_| spawn()).collect();
    let won = tries.into_iter().map(|mut child| child.wait().unwrap()).filter(|status| status.success()).count();
    assert_eq!(won, 1);
    bench.ok(&["rm", "-f", "one"]);
    assert!(bench.is_empty(), "{:?}", bench.files());
}
