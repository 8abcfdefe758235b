//! `pod-oci` as its clients call it: the contract of OCI runtimes, black box; needs root.
//!
//! Where runc and crun are installed and agree, they are held to the same test: what fails for all is a wrong test.
#![deny(unsafe_code)]

mod bench;
mod config;
mod escapes;
mod owners;
mod podman;
mod stdio;

use bench::{Bench, Runtime, eventually};
use serde_json::{Value, json};
use std::fs;
use std::process::Stdio;

#[test]
fn a_life_in_every_state() {
    for runtime in Runtime::all() {
        let bench = Bench::new(runtime);
        bench.write("a", bench.config("exit 3"));
        let pid_file = bench.dir().join("pid");
        bench.ok(&["create", "--pid-file", pid_file.to_str().unwrap(), "a"]);
        let state = bench.state("a");
        assert_eq!((state["status"].as_str(), state["id"].as_str()), (Some("created"), Some("a")));
        assert_eq!(fs::read_to_string(&pid_file).unwrap(), state["pid"].to_string());
        assert_eq!(state["bundle"].as_str(), bench.bundle().to_str());
        bench.refused(&["create", "a"], 1, &["exist"]);
        bench.ok(&["start", "a"]);
        eventually("the end", || bench.status("a") == "stopped");
        assert_eq!(bench.state("a")["pid"].as_i64().unwrap_or(0), 0);
        bench.refused(&["start", "a"], 1, &[]);
        bench.refused(&["kill", "a", "9"], 1, &["not running", "already finished", "no such process"]);
        bench.ok(&["delete", "a"]);
        bench.refused(&["delete", "a"], 1, &["does not exist", "no such file"]);
        let again = bench.call(&["delete", "--force", "a"]);
        assert_eq!((again.code, again.stderr.as_str()), (0, ""), "{runtime:?}");
        bench.assert_gone("a");
    }
}

#[test]
fn what_does_not_fit_the_state_is_refused() {
    for runtime in Runtime::all() {
        let bench = Bench::new(runtime);
        bench.sleeper("a");
        bench.refused(&["start", "a"], 1, &[]);
        bench.refused(&["delete", "a"], 1, &[]);
        bench.ok(&["pause", "a"]);
        assert_eq!(bench.status("a"), "paused");
        assert_ne!(bench.call(&["exec", "a", "true"]).code, 0);
        bench.ok(&["resume", "a"]);
        bench.ok(&["kill", "a", "0"]);
        bench.ok(&["pause", "a"]);
        bench.ok(&["kill", "a", "KILL"]);
        if runtime != Runtime::Pod {
            // With the freezer of v1 the signal waits there; newer ones thaw.
            bench.call(&["resume", "a"]);
        }
        eventually("a paused container's end", || bench.status("a") == "stopped");
        bench.ok(&["delete", "a"]);
        bench.write("b", bench.config("sleep 1000"));
        bench.ok(&["create", "b"]);
        bench.ok(&["exec", "b", "true"]);
        bench.ok(&["kill", "b", "SIGKILL"]);
        eventually("the end of one that never started", || bench.status("b") == "stopped");
        bench.ok(&["delete", "b"]);
        bench.write("c", bench.config("sleep 1000"));
        bench.ok(&["create", "c"]);
        bench.ok(&["delete", "--force", "c"]);
        bench.assert_gone("c");
    }
}

#[test]
fn options_stand_before_and_after_the_id() {
    for runtime in Runtime::and(&[Runtime::Runc]) {
        let bench = Bench::new(runtime);
        let (pid_file, bundle) = (bench.dir().join("pid"), bench.bundle());
        let (pid_file, bundle) = (pid_file.to_str().unwrap(), bundle.to_str().unwrap());
        for args in [
            vec!["create", "--bundle", bundle, "--pid-file", pid_file, "a"],
            vec!["create", "-b", bundle, "-pid-file", pid_file, "a"],
            vec!["create", &format!("--bundle={bundle}"), &format!("-pid-file={pid_file}"), "a"],
        ] {
            bench.write("a", bench.config("true"));
            let mut command = bench.command(&args);
            command.current_dir("/");
            assert_eq!(bench.finish(command).code, 0, "{args:?}");
            assert_eq!(fs::read_to_string(pid_file).unwrap(), bench.state("a")["pid"].to_string());
            bench.ok(&["delete", "-f", "a"]);
        }
    }
    let bench = Bench::ours();
    bench.write("a", bench.config("true"));
    bench.ok(&["create", "a", "--no-pivot", "--bundle", "."]);
    bench.ok(&["delete", "a", "--force"]);
    let said = bench.refused(&["create", "--frobnicate", "a"], 1, &["frobnicate"]);
    assert!(said.contains("not defined"), "{said}");
    bench.refused(&["frobnicate"], 1, &["frobnicate"]);
    bench.refused(&["create", "../a"], 1, &["invalid container id"]);
    bench.refused(&["--systemd-cgroup", "create", "a"], 1, &["systemd"]);
    bench.refused(&["checkpoint", "a"], 1, &["not supported"]);
}

#[test]
fn exit_codes_are_the_programs() {
    for runtime in Runtime::all() {
        let bench = Bench::new(runtime);
        assert_eq!(bench.run("a", bench.config("exit 7")).code, 7);
        bench.sleeper("s");
        assert_eq!(bench.call(&["exec", "s", "sh", "-c", "exit 9"]).code, 9);
        assert_eq!(bench.call(&["exec", "s", "sh", "-c", "kill -9 $$"]).code, 137);
        // What fails before the program: crun has another code.
        let failed = |code: i32| code == 255 || runtime == Runtime::Crun && code == 1;
        assert!(failed(bench.call(&["exec", "s", "no-such-program"]).code), "{runtime:?}");
        assert!(failed(bench.call(&["exec", "nobody", "true"]).code), "{runtime:?}");
    }
}

#[test]
fn errors_have_the_words_that_clients_look_for() {
    for runtime in Runtime::all() {
        let bench = Bench::new(runtime);
        let with_args = |args: Value| {
            let mut config = bench.config("");
            config["process"]["args"] = args;
            config
        };
        for (args, words) in [
            (json!(["no-such-program"]), vec!["executable file not found in", "not found in $path"]),
            (json!(["/no/such"]), vec!["no such file or directory"]),
            (json!(["/etc/passwd"]), vec!["permission denied"]),
        ] {
            bench.write("a", with_args(args));
            bench.refused(&["create", "a"], 1, &words);
        }
        let words = ["does not exist", "no such file"];
        bench.refused(&["state", "nobody"], 1, &words[..if runtime == Runtime::Crun { 2 } else { 1 }]);
        bench.refused(&["kill", "nobody", "9"], 1, &words[..if runtime == Runtime::Crun { 2 } else { 1 }]);
    }
}

#[test]
fn the_log_is_a_stream_of_objects() {
    for runtime in Runtime::all() {
        let bench = Bench::new(runtime);
        let log = bench.dir().join("log.json");
        let flags = ["--log", log.to_str().unwrap(), "--log-format", "json"];
        for _ in 0..2 {
            bench.call(&[&flags[..], &["--debug", "start", "nobody"]].concat());
        }
        let text = fs::read_to_string(&log).unwrap();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let errors: Vec<&Value> = lines.iter().filter(|line| line["level"] == "error").collect();
        assert_eq!(errors.len(), 2, "{runtime:?}: {text}");
        let last = lines.last().unwrap();
        let message = last["msg"].as_str().unwrap();
        assert!(message.contains("does not exist") || runtime == Runtime::Crun, "{text}");
        assert!(last["time"].as_str().unwrap().starts_with("20"), "{text}");
    }
}

#[test]
fn a_process_is_listed_limited_and_counted() {
    for runtime in Runtime::and(&[Runtime::Runc]) {
        let bench = Bench::new(runtime);
        bench.sleeper("a");
        let pid = bench.state("a")["pid"].clone();
        assert_eq!(serde_json::from_str::<Value>(&bench.ok(&["ps", "--format", "json", "a"])).unwrap(), json!([pid]));
        assert!(bench.ok(&["ps", "a"]).contains("sleep 1000"));
        let listed: Value = serde_json::from_str(&bench.ok(&["list", "--format", "json"])).unwrap();
        assert_eq!((listed[0]["id"].as_str(), listed[0]["pid"].clone()), (Some("a"), pid));
        assert_eq!(bench.ok(&["list", "-q"]), "a\n");
        let stats: Value = serde_json::from_str(&bench.ok(&["events", "--stats", "a"])).unwrap();
        assert_eq!(stats["type"], "stats");
        assert!(stats["data"]["pids"]["current"].as_u64() == Some(1), "{stats}");
        let mut update = bench.command(&["update", "--resources", "-", "a"]);
        update.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = update.spawn().unwrap();
        use std::io::Write;
        let change = json!({"memory": {"limit": 67_108_864}, "pids": {"limit": 20}});
        child.stdin.take().unwrap().write_all(change.to_string().as_bytes()).unwrap();
        assert!(child.wait().unwrap().success());
        bench.ok(&["update", "--cpu-share", "512", "a"]);
        let read = |file: &str| fs::read_to_string(format!("/sys/fs/cgroup/{file}")).unwrap().trim().to_owned();
        let group = bench.group("a");
        assert_eq!(read(&format!("memory/{group}/memory.limit_in_bytes")), "67108864");
        assert_eq!(read(&format!("pids/{group}/pids.max")), "20");
        assert_eq!(read(&format!("cpu/{group}/cpu.shares")), "512");
    }
}

#[test]
fn what_it_is_and_can_do() {
    let bench = Bench::ours();
    let version = bench.ok(&["--version"]);
    let mut lines = version.lines();
    assert!(lines.next().unwrap().starts_with("pod-oci version "));
    assert!(lines.any(|line| line.starts_with("spec: 1.")), "{version}");
    let features: Value = serde_json::from_str(&bench.ok(&["features"])).unwrap();
    assert_eq!(features["ociVersionMin"], "1.0.0");
    assert!(features["mountOptions"].as_array().unwrap().contains(&json!("tmpcopyup")));
    bench.ok(&["create", "--help"]);
    bench.ok(&["spec", "--bundle", bench.bundle().to_str().unwrap()]);
    bench.refused(&["spec", "--bundle", bench.bundle().to_str().unwrap()], 1, &["exists"]);
}

#[test]
fn hooks_run_in_order_with_the_state() {
    for runtime in Runtime::and(&[Runtime::Runc]) {
        let bench = Bench::new(runtime);
        let log = bench.dir().join("hooks");
        let hook = bench.dir().join("hook.sh");
        fs::write(&hook, format!("#!/bin/sh\necho \"$1 $A $(cat)\" >>{}\nexit $2\n", log.display())).unwrap();
        fs::set_permissions(&hook, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let one = |kind: &str, code: &str| json!({"path": hook, "args": ["hook", kind, code], "env": ["A=b", "PATH=/bin:/usr/bin"], "timeout": 10});
        let with = |kinds: &[(&str, &str)]| {
            let mut config = bench.config("true");
            for (kind, code) in kinds {
                config["hooks"][*kind] = json!([one(kind, code)]);
            }
            config
        };
        let kinds = ["prestart", "createRuntime", "createContainer", "poststart", "poststop"];
        assert_eq!(bench.run("a", with(&kinds.map(|kind| (kind, "0")))).code, 0);
        let text = fs::read_to_string(&log).unwrap();
        let seen: Vec<&str> = text.lines().map(|line| line.split(' ').next().unwrap()).collect();
        assert_eq!(seen, kinds, "{runtime:?}");
        for line in text.lines() {
            let state: Value = serde_json::from_str(line.splitn(3, ' ').nth(2).unwrap()).unwrap();
            assert_eq!((line.split(' ').nth(1), state["id"].as_str()), (Some("b"), Some("a")));
        }
        bench.write("b", with(&[("createRuntime", "3"), ("poststop", "0")]));
        bench.refused(&["create", "b"], 1, &["hook"]);
        let last = fs::read_to_string(&log).unwrap();
        assert!(runtime != Runtime::Pod || last.lines().last().unwrap().starts_with("poststop"), "{last}");
        bench.ok(&["delete", "--force", "b"]);
        bench.assert_gone("b");
    }
    let bench = Bench::ours();
    let mut config = bench.config("true");
    config["hooks"]["startContainer"] = json!([{"path": "/bin/touch", "args": ["touch", "/started"]}]);
    config["hooks"]["createRuntime"] = json!([{"path": "/bin/sleep", "args": ["sleep", "100"], "timeout": 1}]);
    bench.write("a", config.clone());
    bench.refused(&["create", "a"], 1, &["in time"]);
    // The state is longer than a pipe, and nobody reads it.
    config["annotations"] = json!({"long": "x".repeat(200_000)});
    bench.write("a", config.clone());
    bench.refused(&["create", "a"], 1, &["in time"]);
    config["hooks"]["createRuntime"] = json!([]);
    bench.says("b", config);
    assert!(bench.rootfs().join("started").exists());
}

#[test]
fn nothing_stays_between_the_caller_and_the_container() {
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    for runtime in Runtime::all() {
        let bench = Bench::new(runtime);
        bench.write("a", bench.config("exit 5"));
        bench.ok(&["create", "a"]);
        let pid = bench.state("a")["pid"].as_i64().unwrap();
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let parent = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(1).unwrap();
        assert_eq!(parent, std::process::id().to_string(), "{runtime:?}");
        bench.ok(&["start", "a"]);
        let status = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid as i32), None).unwrap();
        assert!(matches!(status, nix::sys::wait::WaitStatus::Exited(_, 5)), "{runtime:?}: {status:?}");
        bench.ok(&["delete", "a"]);
    }
}

#[test]
fn many_at_once_get_in_nobodys_way() {
    let benches: Vec<Bench> = (0..12).map(|_| Bench::ours()).collect();
    benches.iter().for_each(|bench| bench.write("a", bench.config("echo $((6*7))")));
    let children: Vec<_> =
        benches.iter().map(|bench| bench.command(&["run", "a"]).stdout(Stdio::piped()).spawn().unwrap()).collect();
    for (child, bench) in children.into_iter().zip(&benches) {
        assert_eq!(String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap(), "42\n");
        bench.assert_gone("a");
    }
}
