//! The fields of `config.json`, each seen from inside the container that it makes.

use crate::bench::{Bench, Runtime, capabilities, push};
use serde_json::{Value, json};
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::process::Stdio;

#[test]
fn a_process_is_who_and_what_it_shall_be() {
    for runtime in Runtime::all() {
        let bench = Bench::new(runtime);
        let script = "id -u; id -g; id -G; umask; pwd; echo $HOME; grep -E 'Cap|NoNew' /proc/self/status; ulimit -n; \
             cat /proc/self/oom_score_adj";
        let mut config = bench.config(script);
        capabilities(&mut config, &["CAP_KILL", "CAP_NET_RAW"]);
        config["process"]["capabilities"]["ambient"] = json!(["CAP_KILL"]);
        config["process"]["capabilities"]["inheritable"] = json!(["CAP_KILL"]);
        config["process"]["user"] = json!({"uid": 33, "gid": 34, "additionalGids": [7, 8], "umask": 63});
        config["process"]["cwd"] = json!("/tmp");
        config["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}]);
        config["process"]["oomScoreAdj"] = json!(500);
        let text = bench.says("a", config);
        let lines: Vec<&str> = text.lines().map(|line| line.split('\t').next_back().unwrap()).collect();
        assert_eq!(lines[..6], ["33", "34", "34 7 8", "0077", "/tmp", "/srv"], "{runtime:?}: {text}");
        let set = |bits: u64| format!("{bits:016x}");
        // CapInh, CapPrm, CapEff, CapBnd, CapAmb: another user than root has those that are ambient.
        assert_eq!(lines[6..11], [set(32), set(32), set(32), set(32 | 1 << 13), set(32)], "{runtime:?}: {text}");
        assert_eq!(lines[11..], ["1", "100", "500"], "{runtime:?}: {text}");
    }
}

#[test]
fn exec_is_who_and_what_it_shall_be() {
    for runtime in Runtime::and(&[Runtime::Runc]) {
        let bench = Bench::new(runtime);
        bench.sleeper("a");
        let script = "id -u; id -g; pwd; echo $A; grep CapInh /proc/self/status; grep -c ':/$' /proc/self/cgroup";
        let args = ["exec", "-u", "5:6", "--cwd", "/tmp", "-e", "A=b", "a", "sh", "-c", script];
        let text = bench.ok(&args);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[..5], ["5", "6", "/tmp", "b", "CapInh:\t0000000000000000"], "{runtime:?}: {text}");
        let groups: u32 = lines[5].parse().unwrap();
        assert!(groups >= 8, "{runtime:?}: in the container's group of {groups} hierarchies");
    }
    let bench = Bench::ours();
    bench.sleeper("a");
    bench.refused(&["exec", "-u", "root", "a", "true"], 255, &["uid"]);
    bench.refused(&["exec", "--process", "/no/such", "a"], 255, &["not found"]);
    let file = bench.dir().join("process.json");
    for text in ["[]", "null", "7", r#"{"user": [], "args": ["true"], "cwd": "/"}"#] {
        fs::write(&file, text).unwrap();
        bench.refused(&["exec", "--tty", "--process", file.to_str().unwrap(), "a"], 255, &["no process"]);
    }
    assert_eq!(
        bench.ok(&["exec", "--no-new-privs", "a", "grep", "NoNewPrivs", "/proc/self/status"]),
        "NoNewPrivs:\t1\n"
    );
}

/// As systemd does inside: then the kernel takes no process in the container's own group of v2.
#[test]
fn exec_goes_where_the_first_process_has_gone() {
    let bench = Bench::ours();
    bench.sleeper("a");
    let unified = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(std::path::Path::new);
    let unified = unified.into_iter().find(|mount| mount.join("cgroup.controllers").exists()).unwrap();
    let group = unified.join(bench.group("a"));
    let controllers = fs::read_to_string(group.join("cgroup.controllers")).unwrap();
    let first = controllers.split_whitespace().next().expect("v2 has a controller");
    fs::create_dir(group.join("init.scope")).unwrap();
    for pid in fs::read_to_string(group.join("cgroup.procs")).unwrap().lines() {
        fs::write(group.join("init.scope/cgroup.procs"), pid).unwrap();
    }
    fs::write(group.join("cgroup.subtree_control"), format!("+{first}")).unwrap();
    let text = bench.ok(&["exec", "a", "grep", "^0::", "/proc/self/cgroup"]);
    assert_eq!(text, "0::/init.scope\n");
}

#[test]
fn mounts_are_as_they_are_asked_for() {
    for runtime in Runtime::all() {
        let bench = Bench::new(runtime);
        let volume = bench.dir().join("volume");
        fs::create_dir_all(volume.join("sub")).unwrap();
        fs::write(volume.join("file"), "there\n").unwrap();
        let script = "cat /new/volume/file /one; touch /new/volume/x 2>/dev/null && echo written; \
            cat /etc/passwd | head -1; echo >/etc/new; grep -E ' /(new/volume|limited) ' /proc/self/mountinfo | cut -d' ' -f6 | cut -c1-9; \
            echo >/proc/sys/kernel/domainname; ls /sys/firmware | wc -l; echo >/root 2>/dev/null || echo read-only";
        let mut config = bench.config(script);
        config["root"]["readonly"] = json!(true);
        fs::create_dir_all(bench.rootfs().join("new/volume")).unwrap();
        fs::create_dir_all(bench.rootfs().join("limited")).unwrap();
        fs::write(bench.rootfs().join("one"), "").unwrap();
        let mounts = &mut config["mounts"];
        push(
            mounts,
            json!({"destination": "/new/volume", "type": "bind", "source": volume, "options": ["rbind", "ro", "nosuid"]}),
        );
        push(
            mounts,
            json!({"destination": "/one", "type": "bind", "source": volume.join("file"), "options": ["bind"]}),
        );
        let limited = ["noexec", "nosuid", "size=64k"];
        push(mounts, json!({"destination": "/limited", "type": "tmpfs", "source": "tmpfs", "options": limited}));
        push(mounts, json!({"destination": "/etc", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup"]}));
        let output = bench.run("a", config);
        let lines: Vec<&str> = output.stdout.lines().collect();
        let wanted = ["there", "there", "root:x:0:0:root:/root:/bin/sh", "ro,nosuid", "rw,nosuid", "0", "read-only"];
        assert_eq!(lines, wanted, "{runtime:?}: {output:?}");
        assert!(output.stderr.contains("Read-only file system"), "{output:?}");
        assert!(!bench.rootfs().join("etc/new").exists());
    }
}

#[test]
fn what_is_in_memory_is_read_only_when_all_is_in_it() {
    for runtime in Runtime::all() {
        let bench = Bench::new(runtime);
        let mut config = bench.config(
            "(: >/dev/x) 2>/dev/null && echo dev; (: >/limited/x) 2>/dev/null && echo limited; test -c /dev/null && echo node; \
             test -c /dev/pts/ptmx && echo pts; touch /dev/shm/x && echo shm; cat /limited/deep/er/file",
        );
        let volume = bench.dir().join("volume");
        fs::create_dir(&volume).unwrap();
        fs::write(volume.join("file"), "there\n").unwrap();
        let mounts = config["mounts"].as_array_mut().unwrap();
        let dev = mounts.iter_mut().find(|mount| mount["destination"] == "/dev").unwrap();
        push(&mut dev["options"], json!("ro"));
        let mounts = &mut config["mounts"];
        push(mounts, json!({"destination": "/limited", "type": "tmpfs", "source": "tmpfs", "options": ["ro"]}));
        let deep = "/limited/deep/er";
        push(mounts, json!({"destination": deep, "type": "bind", "source": volume, "options": ["bind"]}));
        assert_eq!(bench.says("a", config), "node\npts\nshm\nthere\n", "{runtime:?}");
    }
}

#[test]
fn what_is_below_a_mount_can_be_changed_too() {
    let bench = Bench::ours();
    let outer = bench.dir().join("outer");
    fs::create_dir_all(outer.join("inner")).unwrap();
    let script = "touch /v/x 2>/dev/null && echo outer; touch /v/inner/x 2>/dev/null && echo inner; true";
    let try_with = |id: &str, option: &str| {
        let mut config = bench.config(script);
        push(
            &mut config["mounts"],
            json!({"destination": "/v", "type": "bind", "source": outer, "options": ["rbind", option]}),
        );
        bench.write(id, config);
        // A mount below the volume, which goes with its namespace.
        let inner = outer.join("inner");
        let mut command = std::process::Command::new("unshare");
        command.args(["-m", "sh", "-c", "mount -t tmpfs x \"$0\" && exec \"$@\""]).arg(inner);
        let run = bench.command(&["run", id]);
        command.arg(run.get_program()).args(run.get_args()).current_dir(bench.bundle()).stdin(Stdio::null());
        bench.finish(command).stdout
    };
    assert_eq!(try_with("a", "rw"), "outer\ninner\n");
    assert_eq!(try_with("b", "ro"), "inner\n");
    assert_eq!(try_with("c", "rro"), "");
}

#[test]
fn owners_of_a_mount_can_be_mapped() {
    let bench = Bench::ours();
    let volume = bench.dir().join("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("file"), "").unwrap();
    let mut config = bench.config("stat -c '%u %g' /v/file; touch /v/new");
    let map = json!([{"containerID": 0, "hostID": 1000, "size": 10}]);
    push(
        &mut config["mounts"],
        json!({"destination": "/v", "type": "bind", "source": volume, "options": ["bind"], "uidMappings": map, "gidMappings": map}),
    );
    // Who is mapped to 1000 writes as root of the volume.
    config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let output = bench.run("a", config);
    assert_eq!(output.stdout, "1000 1000\n", "{output:?}");
    assert_eq!(fs::metadata(volume.join("new")).unwrap().uid(), 0);
}

#[test]
fn a_user_namespace_new_and_joined() {
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    for runtime in Runtime::all() {
        let bench = Bench::new(runtime);
        let mut config = bench.config("cat /proc/self/uid_map; id -u; echo x >/tmp/x; test -c /dev/null && sleep 1000");
        push(&mut config["linux"]["namespaces"], json!({"type": "user"}));
        config["linux"]["uidMappings"] = map.clone();
        config["linux"]["gidMappings"] = map.clone();
        for path in [bench.dir().to_owned(), bench.bundle(), bench.rootfs()] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        std::os::unix::fs::chown(bench.rootfs().join("tmp"), Some(100_000), Some(100_000)).unwrap();
        bench.write("a", config);
        bench.ok(&["create", "a"]);
        bench.ok(&["start", "a"]);
        assert_eq!(bench.ok(&["exec", "a", "id", "-u"]), "0\n");
        let pid = bench.state("a")["pid"].as_i64().unwrap();
        crate::eventually("the file", || bench.rootfs().join("tmp/x").exists());
        assert_eq!(fs::metadata(bench.rootfs().join("tmp/x")).unwrap().uid(), 100_000, "{runtime:?}");
        if runtime != Runtime::Pod {
            continue;
        }
        let mut config = bench.config("head -c 1 /proc/1/cmdline; readlink /proc/self/ns/user");
        let by_path = |kind: &str, file: &str| json!({"type": kind, "path": format!("/proc/{pid}/ns/{file}")});
        config["linux"]["namespaces"] = json!([
            by_path("user", "user"), by_path("pid", "pid"), by_path("network", "net"), by_path("ipc", "ipc"), {"type": "mount"}
        ]);
        config["hostname"] = Value::Null;
        let wanted = fs::read_link(format!("/proc/{pid}/ns/user")).unwrap();
        assert_eq!(bench.says("b", config), format!("s{}\n", wanted.display()));
    }
}

#[test]
fn namespaces_are_new_joined_or_the_hosts() {
    for runtime in Runtime::all() {
        let bench = Bench::new(runtime);
        bench.sleeper("a");
        let pid = bench.state("a")["pid"].as_i64().unwrap();
        let link =
            |pid: &str, kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap().display().to_string();
        let mut config = bench.config("for n in net ipc uts pid; do readlink /proc/self/ns/$n; done");
        config["linux"]["namespaces"] = json!([
            {"type": "network", "path": format!("/proc/{pid}/ns/net")}, {"type": "ipc"}, {"type": "mount"},
            {"type": "pid", "path": format!("/proc/{pid}/ns/pid")}
        ]);
        config["hostname"] = Value::Null;
        let text = bench.says("b", config);
        let seen: Vec<&str> = text.lines().collect();
        let (of_a, own) = (pid.to_string(), "self");
        assert_eq!(
            [seen[0], seen[2], seen[3]],
            [link(&of_a, "net"), link(own, "uts"), link(&of_a, "pid")],
            "{runtime:?}"
        );
        assert!(seen[1] != link(&of_a, "ipc") && seen[1] != link(own, "ipc"));
    }
    let bench = Bench::ours();
    let mut config = bench.config("cat /proc/self/timens_offsets");
    push(&mut config["linux"]["namespaces"], json!({"type": "time"}));
    config["linux"]["timeOffsets"] = json!({"monotonic": {"secs": 500}, "boottime": {"secs": 700, "nanosecs": 5}});
    let text = bench.says("t", config);
    let numbers: Vec<&str> = text.split_whitespace().collect();
    assert_eq!(numbers, ["monotonic", "500", "0", "boottime", "700", "5"]);
}

#[test]
fn names_settings_and_devices() {
    for runtime in Runtime::all() {
        let bench = Bench::new(runtime);
        let mut config = bench.config(
            "hostname; cat /proc/sys/kernel/shm_rmid_forced; stat -c '%t:%T %a %u' /dev/mine; head -c 1 /dev/zero | wc -c; \
             head -c 1 /dev/mine 2>&1 | grep -c permitted; mknod /tmp/mem c 1 1; head -c 1 /tmp/mem 2>&1 | grep -c permitted",
        );
        capabilities(&mut config, &["CAP_MKNOD", "CAP_DAC_OVERRIDE"]);
        config["hostname"] = json!("of-the-test");
        config["linux"]["sysctl"] = json!({"kernel.shm_rmid_forced": "1"});
        config["linux"]["devices"] =
            json!([{"path": "/dev/mine", "type": "c", "major": 1, "minor": 1, "fileMode": 384, "uid": 5, "gid": 5}]);
        let text = bench.run("a", config.clone()).stdout;
        // The node is there; using it is another thing.
        assert_eq!(text, "of-the-test\n1\n1:1 600 5\n1\n1\n1\n", "{runtime:?}");
        // The kernel's log, which everybody may write to.
        config["linux"]["devices"] = json!([{"path": "/dev/mine", "type": "c", "major": 1, "minor": 11}]);
        let allow = json!({"allow": true, "type": "c", "major": 1, "minor": 11, "access": "w"});
        push(&mut config["linux"]["resources"]["devices"], allow);
        let script = ": >/dev/mine && echo opened; head -c 0 /dev/mine 2>&1 | grep -c permitted";
        config["process"]["args"] = json!(["sh", "-c", script]);
        let text = bench.run("b", config).stdout;
        assert_eq!(text, "opened\n1\n", "{runtime:?}");
    }
}

#[test]
fn devices_are_kept_by_a_program_on_a_v2_host_too() {
    let bench = Bench::ours();
    let mut config =
        bench.config("head -c 1 /dev/zero | wc -c; mknod /tmp/mem c 1 1; head -c 1 /tmp/mem 2>&1 | grep -c permitted");
    capabilities(&mut config, &["CAP_MKNOD"]);
    bench.write("a", config);
    let run = bench.command(&["run", "a"]);
    let mut command = std::process::Command::new("unshare");
    let view = "umount -l /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && exec \"$@\"";
    command.args(["-m", "sh", "-c", view, "sh"]).arg(run.get_program()).args(run.get_args());
    command.current_dir(bench.bundle()).stdin(Stdio::null());
    let output = bench.finish(command);
    assert_eq!((output.code, output.stdout.as_str()), (0, "1\n1\n"), "{output:?}");
}

#[test]
fn limits_are_set_before_anything_runs() {
    for runtime in Runtime::all() {
        let bench = Bench::new(runtime);
        let mut config = bench.config("echo ran");
        config["linux"]["resources"]["memory"] =
            json!({"limit": 50_000_000, "reservation": 40_000_000, "swappiness": 10});
        config["linux"]["resources"]["cpu"] = json!({"shares": 300, "quota": 20_000, "period": 50_000, "cpus": "0"});
        config["linux"]["resources"]["pids"] = json!({"limit": 33});
        bench.write("a", config);
        bench.ok(&["create", "a"]);
        let group = bench.group("a");
        for (file, wanted) in [
            ("memory/G/memory.limit_in_bytes", "49999872"),
            ("memory/G/memory.soft_limit_in_bytes", "39997440"),
            ("memory/G/memory.swappiness", "10"),
            ("cpu/G/cpu.shares", "300"),
            ("cpu/G/cpu.cfs_quota_us", "20000"),
            ("cpu/G/cpu.cfs_period_us", "50000"),
            ("cpuset/G/cpuset.cpus", "0"),
            ("pids/G/pids.max", "33"),
        ] {
            let found = fs::read_to_string(format!("/sys/fs/cgroup/{}", file.replace('G', &group))).unwrap();
            assert_eq!(found.trim(), wanted, "{runtime:?}: {file}");
        }
    }
    let bench = Bench::ours();
    let mut config = bench.config("true");
    config["linux"]["resources"]["network"] = json!({"classID": 5});
    bench.write("b", config);
    bench.refused(&["create", "b"], 1, &["no net_cls cgroup controller"]);
    bench.assert_gone("b");
}

#[test]
fn system_calls_are_filtered() {
    for runtime in Runtime::all() {
        let bench = Bench::new(runtime);
        let with = |rules: Value| {
            let mut config = bench.config("mkdir /tmp/new 2>&1; chmod 755 /tmp 2>&1; chmod 700 /tmp 2>&1; echo end");
            config["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"], "syscalls": rules
            });
            config
        };
        let errno = json!([{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]);
        let text = bench.says("a", with(errno));
        assert!(text.contains("No space left") && text.ends_with("end\n"), "{runtime:?}: {text}");
        let masked = json!([{"names": ["chmod"], "action": "SCMP_ACT_ERRNO",
            "args": [{"index": 1, "value": 63, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]}]);
        let text = bench.says("b", with(masked));
        assert_eq!(text.matches("Operation not permitted").count(), 1, "{runtime:?}: {text}");
        let kill = json!([{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_KILL_PROCESS"}]);
        let mut config = with(kill);
        config["process"]["args"] = json!(["mkdir", "/tmp/x"]);
        assert_eq!(bench.run("c", config).code, 128 + 31, "{runtime:?}");
    }
}

/// What the runtime does after the filter is there must not depend on more than the program's own start.
#[test]
fn a_filter_that_denies_nearly_all_denies_no_start() {
    for runtime in Runtime::and(&[Runtime::Crun]) {
        let bench = Bench::new(runtime);
        let mut config = bench.config("");
        config["process"]["args"] = json!(["echo", "started"]);
        let denied =
            ["fcntl", "close_range", "execveat", "memfd_create", "accept4", "recvfrom", "sendmsg", "sendto", "pipe2"];
        config["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": denied, "action": "SCMP_ACT_ERRNO"}]
        });
        assert_eq!(bench.says("a", config), "started\n", "{runtime:?}");
    }
}

#[test]
fn somebody_outside_may_decide_about_calls() {
    for runtime in Runtime::and(&[Runtime::Runc]) {
        let bench = Bench::new(runtime);
        let path = bench.dir().join("listener");
        let socket = UnixListener::bind(&path).unwrap();
        let mut config = bench.config("mkdir /tmp/x 2>&1");
        config["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW", "listenerPath": path, "listenerMetadata": "of the test",
            "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]
        });
        bench.write("a", config);
        let child = bench.command(&["create", "a"]).stdout(Stdio::null()).spawn().unwrap();
        let (stream, _) = socket.accept().unwrap();
        let message = pod_runtime::sys::unix::take(stream.as_fd(), 1 << 16).unwrap();
        assert!({ child }.wait().unwrap().success());
        let state: Value = serde_json::from_slice(&message.bytes).unwrap();
        assert_eq!((state["metadata"].as_str(), state["state"]["id"].as_str()), (Some("of the test"), Some("a")));
        assert_eq!((state["pid"].clone(), message.fds.len()), (bench.state("a")["pid"].clone(), 1));
        let kind =
            fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&message.fds[0]))).unwrap();
        assert!(kind.to_string_lossy().contains("seccomp"), "{}", kind.display());
        let child = bench.command(&["exec", "a", "true"]).stdout(Stdio::null()).spawn().unwrap();
        let (stream, _) = socket.accept().unwrap();
        let of_exec = pod_runtime::sys::unix::take(stream.as_fd(), 1 << 16).unwrap();
        let said: Value = serde_json::from_slice(&of_exec.bytes).unwrap();
        assert!(said["pid"] != state["pid"] && of_exec.fds.len() == 1, "{runtime:?}: {said}");
        assert!({ child }.wait().unwrap().success());
        // Without anybody who answers the call fails as if it were not there.
        drop(message);
        bench.ok(&["start", "a"]);
        crate::eventually("the end", || bench.status("a") == "stopped");
    }
}

#[test]
fn scheduling_is_as_asked_for() {
    let bench = Bench::ours();
    let mut config = bench.config("cut -d' ' -f19,41 /proc/self/stat");
    config["process"]["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 5});
    config["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_IDLE", "priority": 0});
    assert_eq!(bench.says("a", config), "5 3\n");
    bench.sleeper("b");
    let process = json!({"user": {"uid": 0, "gid": 0}, "cwd": "/", "args": ["grep", "Cpus_allowed_list", "/proc/self/status"],
        "env": ["PATH=/bin"], "execCPUAffinity": {"initial": "0-1", "final": "0"}});
    let file = bench.dir().join("process.json");
    fs::write(&file, process.to_string()).unwrap();
    assert_eq!(bench.ok(&["exec", "--process", file.to_str().unwrap(), "b"]), "Cpus_allowed_list:\t0\n");
}

#[test]
fn propagation_of_the_root() {
    for (given, tags) in [
        ("private", &[][..]),
        ("rprivate", &[]),
        ("unbindable", &["unbindable"]),
        ("slave", &["master"]),
        ("rslave", &["master"]),
        ("shared", &["shared", "master"]),
        ("rshared", &["shared", "master"]),
        ("", &["master"]),
    ] {
        let bench = Bench::ours();
        let mut config = bench.config("grep -E '^[0-9]+ [0-9]+ [0-9:]+ [^ ]+ / ' /proc/self/mountinfo");
        if !given.is_empty() {
            config["linux"]["rootfsPropagation"] = json!(given);
        }
        bench.write("a", config);
        // The host's root is one that others share.
        let run = bench.command(&["run", "a"]);
        let mut command = std::process::Command::new("unshare");
        command.args(["-m", "--propagation", "shared"]).arg(run.get_program()).args(run.get_args());
        command.current_dir(bench.bundle()).stdin(Stdio::null());
        let output = bench.finish(command);
        assert_eq!((output.code, output.stdout.lines().count()), (0, 1), "{given}: {output:?}");
        let optional = output.stdout.split(" - ").next().unwrap().split(' ').skip(6);
        let mut seen: Vec<&str> = optional.map(|tag| tag.split(':').next().unwrap()).collect();
        seen.retain(|tag| !["", "propagate_from"].contains(tag));
        assert_eq!(seen, tags, "{given}: {output:?}");
    }
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let bench = Bench::ours();
    let change = |at: &str, value: Value| {
        let mut config = bench.config("true");
        for field in ["intelRdt", "netDevices"] {
            config["linux"][field] = Value::Null;
        }
        *config.pointer_mut(at).unwrap_or_else(|| panic!("{at}")) = value;
        config
    };
    for (config, word) in [
        (change("/linux/intelRdt", json!({})), "intelRdt"),
        (change("/linux/netDevices", json!({"eth0": {}})), "netDevices"),
        (change("/ociVersion", json!("2.0")), "ociVersion"),
        (change("/process/cwd", json!("tmp")), "absolute"),
        (change("/process/args", json!([])), "args"),
        (change("/process/capabilities/bounding", json!(["CAP_NOPE"])), "CAP_NOPE"),
        (change("/root/path", json!("nowhere")), "rootfs"),
        (change("/process/rlimits", json!([{"type": "RLIMIT_NOPE", "hard": 1, "soft": 1}])), "RLIMIT_NOPE"),
        (change("/mounts/4/type", json!("nopefs")), "nopefs"),
        (change("/mounts/0/destination", json!("/../x")), ".."),
        (
            change(
                "/process",
                json!({"apparmorProfile": "x", "args": ["x"], "cwd": "/", "user": {"uid": 0, "gid": 0}}),
            ),
            "apparmor",
        ),
    ] {
        bench.write("a", config);
        bench.refused(&["create", "a"], 1, &[word]);
    }
    // In a mount namespace that is not its own, nothing is mounted.
    for (field, value) in [
        ("/mounts", json!([{"destination": "/tmp", "type": "tmpfs"}])),
        ("/root/readonly", json!(true)),
        ("/linux/maskedPaths", json!(["/proc/kcore"])),
    ] {
        let mut config = change("/mounts", json!([]));
        for field in ["maskedPaths", "readonlyPaths"] {
            config["linux"][field] = json!([]);
        }
        let mounts = json!({"type": "mount", "path": "/proc/self/ns/mnt"});
        config["linux"]["namespaces"] = json!([{"type": "uts"}, mounts]);
        *config.pointer_mut(field).unwrap() = value;
        bench.write("a", config);
        let last = field.rsplit('/').next().unwrap();
        let said = bench.refused(&["create", "a"], 1, &[last]);
        assert!(said.contains("MNT namespace"), "{said}");
    }
    fs::write(bench.bundle().join("config.json"), "{\"ociVersion\": ").unwrap();
    bench.refused(&["create", "a"], 1, &["config.json"]);
    fs::remove_file(bench.bundle().join("config.json")).unwrap();
    bench.refused(&["create", "a"], 1, &["not found"]);
    bench.assert_gone("a");
}

#[test]
fn without_control_groups() {
    let bench = Bench::ours();
    bench.write("a", bench.config("exit 4"));
    let without = ["--cgroup-manager", "disabled"];
    let call = |args: &[&str]| bench.call(&[&without[..], args].concat()).code;
    assert_eq!(call(&["create", "a"]), 0);
    let groups = fs::read_dir("/sys/fs/cgroup").unwrap().flatten();
    assert!(!groups.map(|hierarchy| hierarchy.path().join(bench.group("a"))).any(|group| group.exists()));
    assert_eq!([call(&["pause", "a"]), call(&["exec", "a", "true"]), call(&["delete", "a"])], [1, 0, 0]);
    bench.write("b", bench.config("exit 4"));
    assert_eq!(call(&["run", "b"]), 4);
}

#[test]
fn an_ordinary_user_has_containers_too() {
    use std::os::unix::process::CommandExt;
    const USER: u32 = 12_345;
    let bench = Bench::ours();
    // Where that user can reach it, and what is its own.
    let (folder, program) = (bench.dir(), bench.dir().join("program"));
    fs::copy(env!("CARGO_BIN_EXE_pod-oci"), &program).unwrap();
    for path in [folder, &bench.bundle(), &bench.rootfs(), &bench.rootfs().join("tmp")] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        std::os::unix::fs::chown(path, Some(USER), Some(USER)).unwrap();
    }
    let call = |args: &[&str]| {
        let mut command = std::process::Command::new(&program);
        command.args(["--cgroup-manager", "disabled"]).args(args).uid(USER).gid(USER).current_dir(bench.bundle());
        command.env("XDG_RUNTIME_DIR", folder).stdin(Stdio::null());
        bench.finish(command)
    };
    assert_eq!(call(&["spec", "--rootless"]).code, 0);
    let path = bench.bundle().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["process"]["terminal"] = json!(false);
    config["process"]["rlimits"] = json!([]);
    config["root"]["readonly"] = json!(false);
    config["process"]["args"] = json!(["sh", "-c", "id -u; : >/tmp/new; head -c 1 /dev/zero | wc -c; exec sleep 1000"]);
    fs::write(&path, config.to_string()).unwrap();
    let output = call(&["run", "-d", "a"]);
    assert_eq!(output.code, 0, "{output:?}");
    crate::eventually("its file", || bench.rootfs().join("tmp/new").exists());
    assert_eq!(fs::metadata(bench.rootfs().join("tmp/new")).unwrap().uid(), USER);
    let output = call(&["exec", "a", "sh", "-c", "id -u; exit 3"]);
    assert_eq!((output.code, output.stdout.as_str()), (3, "0\n"), "{output:?}");
    assert_eq!(call(&["delete", "--force", "a"]).code, 0);
    assert!(!folder.join("pod-oci/a").exists());
}
