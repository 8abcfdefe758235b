//! What `pod exec` started, left and taken again; logs that are bounded; files of pods that have ended.

use crate::bench::{Bench, DETACH, OutputLater, Terminal, eventually};
use std::fs;

fn sleeping(bench: &Bench) {
    bench.ok(&["run", "-d", "--name", "p", "--network", "none", "--", "sleep", "1000"]);
}

fn sessions(bench: &Bench) -> Vec<serde_json::Value> {
    bench.json(&["inspect", "p"])[0]["exec_sessions"].as_array().unwrap().clone()
}

#[test]
fn a_session_is_left_and_taken_again() {
    let bench = Bench::new();
    sleeping(&bench);
    let mut person = Terminal::new(&bench, &["exec", "-it", "p", "sh"]);
    person.say("x=41; echo ready-$((1+1))\n", "ready-2");
    let found = sessions(&bench);
    assert_eq!((&found[0]["id"], &found[0]["command"][0]), (&1.into(), &"sh".into()));
    assert_eq!((&found[0]["terminal"], &found[0]["attached"]), (&true.into(), &true.into()));
    // One at a time.
    let refused = bench.pod(&["attach", "p", "--exec", "1"]);
    assert_eq!((refused.code, refused.stderr.contains("E-STATE")), (3, true), "{refused:?}");
    person.keys(DETACH);
    person.expect("pod attach p --exec 1");
    assert_eq!(person.ended(), 0);
    eventually("the session to have nobody", || sessions(&bench)[0]["attached"] == false);
    let mut person = Terminal::new(&bench, &["attach", "p", "--exec", "1"]);
    person.say("echo $((x+1)) again; stty size\n", "42 again\r\n40 120");
    person.keys("exit 7\n");
    assert_eq!(person.ended(), 7);
    assert!(sessions(&bench).is_empty());
    let none = bench.pod(&["attach", "p", "--exec", "1"]);
    assert_eq!((none.code, none.stderr.contains("E-NOSESSION")), (3, true), "{none:?}");
    bench.ok(&["rm", "-f", "p"]);
}

#[test]
fn how_a_session_ended_is_kept_for_who_comes_back() {
    let bench = Bench::new();
    sleeping(&bench);
    bench.ok(&["exec", "p", "mkfifo", "/tmp/go"]);
    let mut person = Terminal::new(&bench, &["exec", "-it", "p", "sh", "-c", "echo ready; read x </tmp/go; exit 9"]);
    person.expect("ready");
    let number = sessions(&bench)[0]["id"].to_string();
    person.keys(DETACH);
    assert_eq!(person.ended(), 0);
    bench.ok(&["exec", "p", "sh", "-c", "echo >/tmp/go"]);
    eventually("its end", || sessions(&bench)[0]["exit_code"] == 9);
    assert_eq!(bench.pod(&["attach", "p", "--exec", &number]).code, 9);
    bench.ok(&["rm", "-f", "p"]);
}

#[test]
fn a_log_is_bounded() {
    let bench = Bench::new();
    let script = "i=0; while [ $i -lt 3000 ]; do i=$((i+1)); echo line $i; done; sleep 0.3; echo end";
    let run = ["run", "-d", "--name", "p", "--network", "none", "--log-opt", "max-size=10k", "--log-opt", "max-file=3"];
    bench.ok(&[&run[..], &["--", "sh", "-c", script]].concat());
    let follower = bench.command(&["logs", "-f", "--tail", "1", "p"]).output_later();
    bench.ok(&["wait", "p"]);
    let dir = bench.store().pod("p").unwrap().dir();
    let files = pod_runtime::monitor::log::files(&dir);
    let bytes: u64 = files.iter().map(|path| fs::metadata(path).unwrap().len()).sum();
    assert!(files.len() == 3 && bytes < 31_000, "{bytes} bytes in {files:?}");
    let left = bench.ok(&["logs", "p"]);
    let first: u32 = left.lines().next().unwrap()[5..].parse().unwrap();
    let expected: String = (first..=3000).map(|i| format!("line {i}\n")).collect();
    assert!(first > 2000 && left == expected + "end\n");
    assert_eq!(bench.ok(&["logs", "--tail", "2", "p"]), "line 3000\nend\n");
    assert!(follower.join().unwrap().ends_with("end\n"));
    assert_eq!(bench.pod(&["run", "--log-opt", "max-size=x", "--", "true"]).code, 125);
    bench.ok(&["rm", "p"]);
    assert!(bench.is_empty(), "{:?}", bench.files());
}

#[test]
fn files_of_a_pod_that_has_ended_go_in_and_out() {
    let bench = Bench::new();
    let target = bench.dir().join("only-here");
    fs::create_dir(&target).unwrap();
    fs::write(bench.dir().join("secret"), "secret").unwrap();
    let script = format!(
        "echo inside >/root/file; rm -f /etc/hostname; ln -s {} /root/out; echo x >/tmp/gone",
        target.display()
    );
    bench.ok(&["run", "--name", "p", "--network", "none", "--", "sh", "-c", &script]);
    bench.ok(&["cp", "p:/root/file", "copy"]);
    assert_eq!(fs::read_to_string(bench.dir().join("copy")).unwrap(), "inside\n");
    // Seen through the layers: what the pod took away is gone, what it did not touch is there.
    assert_eq!(bench.pod(&["cp", "p:/etc/hostname", "copy"]).code, 2);
    bench.ok(&["cp", "p:/etc/passwd", "passwd"]);
    // What was in memory is not there, neither is what this host has at the same place.
    assert_eq!(bench.pod(&["cp", "p:/tmp/gone", "copy"]).code, 2);
    assert_ne!(bench.pod(&["cp", "secret", "p:/tmp/lost"]).code, 0);
    // No link leads out.
    bench.pod(&["cp", "secret", "p:/root/out"]);
    assert!(fs::read_dir(&target).unwrap().next().is_none());
    bench.ok(&["cp", "secret", "p:/etc/planted"]);
    bench.ok(&["cp", "p:/etc/planted", "planted"]);
    assert_eq!(fs::read_to_string(bench.dir().join("planted")).unwrap(), "secret");
    assert!(!std::path::Path::new("/etc/planted").exists());
    bench.ok(&["rm", "p"]);
    assert!(bench.is_empty(), "{:?}", bench.files());
}

/// strace is not everywhere, so the kernel is asked: the overlay of a pod that removes itself is as any other.
#[test]
fn fsync_means_what_it_says_also_with_rm() {
    let bench = Bench::new();
    let mounts = bench.ok(&["run", "--rm", "--network", "none", "--", "cat", "/proc/self/mountinfo"]);
    let overlays: Vec<&str> = mounts.lines().filter(|line| line.contains(" - overlay ")).collect();
    assert!(!overlays.is_empty() && !overlays.iter().any(|line| line.contains("volatile")), "{overlays:?}");
    eventually("the pod to be gone", || bench.is_empty());
}
