//! Whose a container's folder and groups are while it is made, and when whoever made it dies over it.

use crate::bench::{Bench, eventually};
use serde_json::{Value, json};
use std::fs;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// A configuration whose createRuntime hook runs this script of the host.
fn with_hook(bench: &Bench, script: &str) -> Value {
    let mut config = bench.config("sleep 1000");
    let env = ["PATH=/bin:/usr/bin"];
    config["hooks"]["createRuntime"] = json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "env": env}]);
    config
}

fn spawn(bench: &Bench, args: &[&str]) -> Child {
    let mut command = bench.command(args);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().unwrap()
}

fn folder(bench: &Bench, id: &str) -> std::path::PathBuf {
    bench.dir().join("root").join(id)
}

#[test]
fn what_a_dead_maker_leaves_can_be_deleted() {
    let bench = Bench::ours();
    let pid = bench.dir().join("pid");
    let script = format!("grep -o '\"pid\":[0-9]*' >{}; kill -9 $PPID", pid.display());
    bench.write("a", with_hook(&bench, &script));
    assert_ne!(bench.call(&["create", "a"]).code, 0);
    let text = fs::read_to_string(&pid).unwrap();
    let first = text.trim().rsplit(':').next().unwrap().to_owned();
    eventually("the first process's end", || {
        fs::read_to_string(format!("/proc/{first}/stat")).is_ok_and(|stat| stat.contains(") Z "))
            || !std::path::Path::new(&format!("/proc/{first}")).exists()
    });
    bench.refused(&["start", "a"], 1, &[]);
    bench.ok(&["delete", "a"]);
    bench.assert_gone("a");
}

#[test]
fn a_folder_without_a_state_is_removed_by_force() {
    let bench = Bench::ours();
    bench.write("a", bench.config("true"));
    fs::create_dir_all(folder(&bench, "a")).unwrap();
    fs::write(folder(&bench, "a").join("config.json"), "{}").unwrap();
    bench.refused(&["create", "a"], 1, &["exist"]);
    bench.ok(&["delete", "--force", "a"]);
    assert!(!folder(&bench, "a").exists());
    bench.ok(&["run", "a"]);
}

/// Groups that belong to somebody else do not end with a container whose maker died before it knew.
#[test]
fn groups_that_are_refused_are_not_written_down() {
    let bench = Bench::ours();
    bench.sleeper("owner");
    let mut config = bench.config("true");
    config["linux"]["cgroupsPath"] = json!(format!("/{}", bench.group("owner")));
    // It waits for a listener that does not answer, after it has its folder and before it looks at the groups.
    let socket = bench.dir().join("full");
    config["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW", "listenerPath": socket,
        "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]
    });
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let waiting: Vec<_> = fill(&listener, &socket);
    bench.write("thief", config);
    let mut child = spawn(&bench, &["create", "thief"]);
    eventually("the folder", || {
        folder(&bench, "thief").join("start.sock").exists() || folder(&bench, "thief").join("state.json").exists()
    });
    child.kill().unwrap();
    child.wait().unwrap();
    drop(waiting);
    bench.ok(&["delete", "--force", "thief"]);
    assert_eq!(bench.status("owner"), "running");
}

/// So many connections that the next one waits.
fn fill(listener: &std::os::unix::net::UnixListener, path: &std::path::Path) -> Vec<std::os::fd::OwnedFd> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
    use std::os::fd::{AsFd, AsRawFd};
    nix::sys::socket::listen(&listener.as_fd(), nix::sys::socket::Backlog::new(1).unwrap()).unwrap();
    let address = UnixAddr::new(path).unwrap();
    let mut all = Vec::new();
    loop {
        let one = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_NONBLOCK, None).unwrap();
        match connect(one.as_raw_fd(), &address) {
            Ok(()) => all.push(one),
            Err(nix::errno::Errno::EAGAIN) => return all,
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn who_deletes_waits_for_who_makes() {
    let bench = Bench::ours();
    let begun = bench.dir().join("begun");
    bench.write("a", with_hook(&bench, &format!("touch {}; sleep 1", begun.display())));
    let start = Instant::now();
    let mut child = spawn(&bench, &["create", "a"]);
    eventually("the hook", || begun.exists());
    assert_eq!(bench.status("a"), "creating");
    bench.refused(&["exec", "a", "true"], 255, &["not running"]);
    bench.ok(&["delete", "--force", "a"]);
    assert!(start.elapsed() >= Duration::from_millis(900), "it was deleted while it was made");
    assert!(child.wait().unwrap().success());
    bench.assert_gone("a");
}
