//! What of the caller's descriptors a container gets, and its terminal.

use crate::bench::{Bench, Runtime, eventually};
use serde_json::json;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixListener;
use std::process::Stdio;

#[test]
fn stdio_is_the_containers_alone() {
    for runtime in Runtime::all() {
        let bench = Bench::new(runtime);
        bench.write("a", bench.config("read line; echo got $line; echo err >&2"));
        let (mut ours, theirs) = std::io::pipe().unwrap();
        let (their_in, mut our_in) = std::io::pipe().unwrap();
        let mut create = bench.command(&["create", "a"]);
        create.stdin(their_in).stdout(theirs.try_clone().unwrap()).stderr(theirs);
        assert!(create.status().unwrap().success());
        drop(create);
        bench.ok(&["start", "a"]);
        our_in.write_all(b"it\n").unwrap();
        let mut text = String::new();
        // To the end: nobody else holds it open.
        ours.read_to_string(&mut text).unwrap();
        assert_eq!(text, "got it\nerr\n", "{runtime:?}");
    }
}

#[test]
fn descriptors_of_an_activated_service_are_handed_on() {
    let bench = Bench::ours();
    let run = |id: &str, script: &str, pid: &str| {
        bench.write(id, bench.config(script));
        let inner = bench.command(&["run", id]);
        let mut command = std::process::Command::new("sh");
        let wrapper = format!("export LISTEN_FDS=1 LISTEN_PID={pid}; exec \"$@\" 3<&-");
        command.args(["-c", &wrapper, "sh"]).arg(inner.get_program()).args(inner.get_args());
        command.current_dir(bench.bundle()).stdin(Stdio::null());
        bench.finish(command)
    };
    let output = run("a", "true", "$$");
    assert!(output.code == 1 && output.stderr.contains("descriptor 3"), "{output:?}");
    // They are another's: there are none.
    let output = run("b", "test -e /proc/self/fd/3 || echo none", "1");
    assert_eq!((output.code, output.stdout.as_str()), (0, "none\n"), "{output:?}");
}

#[test]
fn the_terminal_comes_by_a_socket() {
    for runtime in Runtime::all() {
        let bench = Bench::new(runtime);
        let path = bench.dir().join("console");
        let socket = UnixListener::bind(&path).unwrap();
        let mut config = bench.config("tty; read x; echo \"<$x>\"; test -c /dev/console && echo console");
        config["process"]["terminal"] = json!(true);
        config["process"]["consoleSize"] = json!({"height": 33, "width": 77});
        bench.write("a", config.clone());
        bench.refused(&["create", "a"], 1, &["console", "tty"]);
        bench.ok(&["delete", "--force", "a"]);
        bench.ok(&["create", "--console-socket", path.to_str().unwrap(), "a"]);
        let (stream, _) = socket.accept().unwrap();
        let message = pod_runtime::sys::unix::take(stream.as_fd(), 256).unwrap();
        assert_eq!((message.fds.len(), message.bytes.is_empty()), (1, false), "{runtime:?}");
        let size = pod_runtime::sys::tty::window_size(message.fds[0].as_fd()).unwrap();
        assert_eq!(size, (33, 77), "{runtime:?}");
        bench.ok(&["start", "a"]);
        let mut master = fs::File::from(message.fds.into_iter().next().unwrap());
        master.write_all(b"typed\n").unwrap();
        let mut text = Vec::new();
        // The end of a pty is an error.
        let _ = master.read_to_end(&mut text);
        let text = String::from_utf8_lossy(&text).into_owned();
        assert!(["/dev/", "<typed>", "console"].iter().all(|part| text.contains(part)), "{runtime:?}: {text}");
        config["process"]["terminal"] = json!(false);
        bench.write("b", config);
        let refused = bench.call(&["create", "--console-socket", path.to_str().unwrap(), "b"]);
        assert!(refused.code != 0 || runtime == Runtime::Crun, "{runtime:?}: {refused:?}");
    }
}

#[test]
fn a_terminal_for_exec() {
    for runtime in Runtime::all() {
        let bench = Bench::new(runtime);
        bench.sleeper("a");
        let path = bench.dir().join("console");
        let socket = UnixListener::bind(&path).unwrap();
        let (path, pid_file) = (path.to_str().unwrap(), bench.dir().join("pid"));
        let pid_file = pid_file.to_str().unwrap();
        let process = json!({"terminal": true, "user": {"uid": 0, "gid": 0}, "args": ["sh", "-c", "tty; echo $A"], "cwd": "/",
            "env": ["A=of-exec", "PATH=/bin"]});
        let file = bench.dir().join("process.json");
        fs::write(&file, process.to_string()).unwrap();
        let file = file.to_str().unwrap();
        bench.ok(&["exec", "--process", file, "--console-socket", path, "--detach", "--pid-file", pid_file, "a"]);
        let (stream, _) = socket.accept().unwrap();
        let message = pod_runtime::sys::unix::take(stream.as_fd(), 256).unwrap();
        let mut text = Vec::new();
        let _ = fs::File::from(message.fds.into_iter().next().unwrap()).read_to_end(&mut text);
        let text = String::from_utf8_lossy(&text).into_owned();
        assert!(text.contains("of-exec") && text.contains("/dev/"), "{runtime:?}: {text}");
        assert!(fs::read_to_string(pid_file).unwrap().parse::<i32>().unwrap() > 1);
    }
}

#[test]
fn descriptors_are_preserved_by_number_and_no_others() {
    for runtime in Runtime::and(&[Runtime::Runc]) {
        let bench = Bench::new(runtime);
        bench.write("a", bench.config("ls /proc/$$/fd; cat <&3"));
        let given = bench.dir().join("given");
        fs::write(&given, "handed on\n").unwrap();
        let script = "exec 3<given 4</etc/passwd 7</; exec \"$@\"";
        let inner = bench.command(&["run", "--preserve-fds", "1", "a"]);
        let mut command = std::process::Command::new("sh");
        command.args(["-c", script, "sh"]).arg(inner.get_program()).args(inner.get_args());
        command.current_dir(bench.dir()).stdin(Stdio::null());
        fs::copy(bench.bundle().join("config.json"), bench.dir().join("config.json")).unwrap();
        let mut config = fs::read_to_string(bench.dir().join("config.json")).unwrap();
        config = config.replace("\"rootfs\"", &format!("{:?}", bench.rootfs().to_str().unwrap()));
        fs::write(bench.dir().join("config.json"), config).unwrap();
        let output = bench.finish(command);
        let mut lines: Vec<&str> = output.stdout.lines().collect();
        assert_eq!(lines.pop(), Some("handed on"), "{runtime:?}: {output:?}");
        lines.retain(|line| *line != "10");
        assert_eq!(lines, ["0", "1", "2", "3"], "{runtime:?}: {output:?}");
    }
    let bench = Bench::ours();
    bench.write("a", bench.config("true"));
    bench.refused(&["create", "--preserve-fds", "40", "a"], 1, &["not open"]);
}

#[test]
fn a_terminal_in_the_foreground_is_shown_in_ours() {
    let bench = Bench::ours();
    let mut config = bench.config("tty; echo ends; exit 6");
    config["process"]["terminal"] = json!(true);
    bench.write("a", config);
    let pty = nix::pty::openpty(None, None).unwrap();
    let mut command = bench.command(&["run", "a"]);
    let copy = || pty.slave.try_clone().unwrap();
    command.stdin(copy()).stdout(copy()).stderr(copy());
    let mut child = command.spawn().unwrap();
    drop(command);
    let before = pty.slave.as_raw_fd();
    assert!(before > 2);
    let mut code = None;
    eventually("the end", || {
        code = child.try_wait().unwrap();
        code.is_some()
    });
    assert_eq!(code.unwrap().code(), Some(6));
    let mut text = vec![0; 4096];
    let count = fs::File::from(pty.master).read(&mut text).unwrap();
    assert!(String::from_utf8_lossy(&text[..count]).contains("/dev/pts/0"));
}
