//! Ways out that other runtimes had, tried on ours. The numbers are of their vulnerabilities.

use crate::bench::{Bench, Runtime, push};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A folder of the host that nothing may get into.
fn outside(bench: &Bench) -> std::path::PathBuf {
    let outside = bench.dir().join("outside");
    fs::create_dir_all(&outside).unwrap();
    outside
}

fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).unwrap().next().is_none()
}

/// CVE-2024-21626: a descriptor of the host as working directory or program.
#[test]
fn no_descriptor_of_the_host_is_a_way_out() {
    let bench = Bench::ours();
    for number in 0..24 {
        let mut config = bench.config("ls ../../../../../../../../home >/dev/null; pwd");
        config["process"]["cwd"] = json!(format!("/proc/self/fd/{number}"));
        let output = bench.run("a", config.clone());
        assert!(output.code != 0 || output.stdout == "/\n", "{number}: {output:?}");
        bench.call(&["delete", "--force", "a"]);
        config["process"]["cwd"] = json!(format!("/proc/self/fd/{number}/new-in-the-host"));
        assert_ne!(bench.run("a", config.clone()).code, 0, "{number}");
        bench.call(&["delete", "--force", "a"]);
    }
    bench.sleeper("s");
    for number in 0..24 {
        let (cwd, program) = (format!("/proc/self/fd/{number}"), format!("/proc/self/fd/{number}/bin/true"));
        let output = bench.call(&["exec", "--cwd", &cwd, "s", "pwd"]);
        assert!(output.code != 0 || output.stdout == "/\n", "{number}: {output:?}");
        assert_ne!(bench.call(&["exec", "s", &program]).code, 0, "{number}");
    }
    assert!(!Path::new("/new-in-the-host").exists());
}

/// CVE-2019-5736: the runtime's own program by way of /proc/self/exe.
#[test]
fn the_runtimes_program_is_out_of_reach() {
    let bench = Bench::ours();
    let own = fs::read(env!("CARGO_BIN_EXE_pod-oci")).unwrap();
    // What the runtime's program would need to run in there.
    for library in
        ["lib64/ld-linux-x86-64.so.2", "lib/x86_64-linux-gnu/libc.so.6", "lib/x86_64-linux-gnu/libgcc_s.so.1"]
    {
        let to = bench.rootfs().join(library);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(Path::new("/").join(library), to).unwrap();
    }
    fs::copy(env!("CARGO_BIN_EXE_pod-oci"), bench.rootfs().join("bin/copy")).unwrap();
    let mut config = bench.config("");
    config["process"]["args"] = json!(["/bin/copy", "--version"]);
    assert!(bench.says("copy", config.clone()).contains("pod-oci"), "it would run, if it could be reached");
    config["process"]["args"] = json!(["/proc/self/exe", "--version"]);
    let output = bench.run("a", config.clone());
    assert!(!output.stdout.contains("pod-oci"), "{output:?}");
    fs::write(bench.rootfs().join("bin/script"), "#!/proc/self/exe --version\n").unwrap();
    fs::set_permissions(bench.rootfs().join("bin/script"), std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .unwrap();
    config["process"]["args"] = json!(["/bin/script"]);
    let output = bench.run("b", config);
    assert!(!output.stdout.contains("pod-oci"), "{output:?}");
    bench.sleeper("s");
    for args in [["exec", "s", "/proc/self/exe"], ["exec", "s", "/bin/script"]] {
        let output = bench.call(&args);
        assert!(!output.stdout.contains("pod-oci"), "{output:?}");
    }
    assert_eq!(fs::read(env!("CARGO_BIN_EXE_pod-oci")).unwrap(), own);
}

/// The first process before its start is a piece of the runtime: nothing inside may look into it.
#[test]
fn the_first_process_is_closed_before_its_start() {
    let bench = Bench::ours();
    let mut config = bench.config("true");
    crate::bench::capabilities(&mut config, &["CAP_KILL", "CAP_DAC_OVERRIDE", "CAP_SETUID"]);
    bench.write("a", config);
    bench.ok(&["create", "a"]);
    for path in ["exe", "fd/3", "root", "cwd", "environ"] {
        let output = bench.call(&["exec", "a", "sh", "-c", &format!("readlink /proc/1/{path} || cat /proc/1/{path}")]);
        assert!(output.code != 0 && output.stdout.is_empty(), "{path}: {output:?}");
    }
}

/// The same in a user namespace: whoever is root there is not whose process it is, and was not when it was born.
#[test]
fn the_first_process_is_nobodys_in_a_user_namespace() {
    let bench = Bench::ours();
    let mut config = bench.config("sleep 1000");
    in_user_namespace(&bench, &mut config);
    bench.write("a", config);
    bench.ok(&["create", "a"]);
    let pid = bench.state("a")["pid"].as_i64().unwrap();
    let owner = || fs::metadata(format!("/proc/{pid}/environ")).unwrap().uid();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains("Uid:\t100000\t"), "{status}");
    assert_eq!(owner(), 0);
    bench.ok(&["start", "a"]);
    crate::eventually("its own program", || owner() == 100_000);
}

fn in_user_namespace(bench: &Bench, config: &mut Value) {
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    push(&mut config["linux"]["namespaces"], json!({"type": "user"}));
    (config["linux"]["uidMappings"], config["linux"]["gidMappings"]) = (map.clone(), map);
    for path in [bench.dir().to_owned(), bench.bundle(), bench.rootfs()] {
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }
}

/// Hooks of the image get what the container gets, and nothing to keep open.
#[test]
fn hooks_of_the_container_have_no_more_rights() {
    for runtime in Runtime::and(&[Runtime::Runc]) {
        let bench = Bench::new(runtime);
        let mut config = bench.config("cat /tmp/seen");
        crate::bench::capabilities(&mut config, &["CAP_KILL"]);
        config["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["keyctl"], "action": "SCMP_ACT_ERRNO"}]});
        let script = "grep -E '^(CapPrm|CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status >/tmp/seen; \
            for n in /proc/self/fd/*; do echo $n; done | wc -l >>/tmp/seen; sleep 1000 </dev/null >/dev/null 2>&1 &";
        config["hooks"]["startContainer"] =
            json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"]}]);
        let text = bench.says("a", config);
        let seen: Vec<&str> = text.split_whitespace().skip(1).step_by(2).collect();
        let kill = "0000000000000020";
        assert_eq!(seen[..5], [kill, kill, kill, "1", "2"], "{runtime:?}: {text}");
        // 0, 1, 2 and the folder itself.
        assert!(runtime != Runtime::Pod || text.ends_with("\n4\n"), "{text}");
    }
}

/// A procfs of the host that nothing covers lets whoever makes a user namespace mount one without the masks.
#[test]
fn without_a_pivot_nothing_of_the_hosts_is_left() {
    let script = "mkdir -p /tmp/p; busybox unshare -U -r -m -p -f mount -t proc proc /tmp/p 2>/dev/null && echo mounted; \
        busybox unshare -U -r -m -n mount -t sysfs sysfs /tmp/p 2>/dev/null && echo mounted; echo end";
    for (user_namespace, flags) in [(false, &["--no-pivot"][..]), (true, &["--no-pivot"]), (false, &[])] {
        let bench = Bench::ours();
        let mut config = bench.config(script);
        // Without it nobody maps root.
        crate::bench::capabilities(&mut config, &["CAP_SETFCAP"]);
        if user_namespace {
            in_user_namespace(&bench, &mut config);
        }
        fs::set_permissions(bench.rootfs().join("tmp"), std::os::unix::fs::PermissionsExt::from_mode(0o1777)).unwrap();
        bench.write("a", config.clone());
        let output = bench.call(&[&["run"], flags, &["a"]].concat());
        assert_eq!((output.code, output.stdout.as_str()), (0, "end\n"), "{flags:?}: {output:?}");
        // It is the masks that forbid it.
        config["linux"]["maskedPaths"] = json!([]);
        config["linux"]["readonlyPaths"] = json!([]);
        bench.write("b", config);
        let output = bench.call(&[&["run"], flags, &["b"]].concat());
        assert!(output.stdout.starts_with("mounted\n"), "{flags:?}: {output:?}");
    }
    let own = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(own.contains(" /proc ") && own.contains(" /sys "));
}

/// The same for who may look into every process: what is found is a copy that nobody can change.
#[test]
fn who_may_trace_finds_a_copy() {
    let bench = Bench::ours();
    let mut config = bench.config("true");
    crate::bench::capabilities(&mut config, &["CAP_KILL", "CAP_SYS_PTRACE"]);
    bench.write("a", config);
    bench.ok(&["create", "a"]);
    let output = bench.call(&["exec", "a", "readlink", "/proc/1/exe"]);
    assert!(output.code != 0 || output.stdout.starts_with("/memfd:pod-oci"), "{output:?}");
    let pid = bench.state("a")["pid"].as_i64().unwrap();
    let own = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    assert!(own.to_string_lossy().starts_with("/memfd:pod-oci"), "{}", own.display());
    bench.ok(&["start", "a"]);
}

/// CVE-2023-27561, CVE-2019-19921, CVE-2026-41579: /proc, /sys, /dev as links of the image.
#[test]
fn folders_of_the_kernel_are_no_links() {
    for name in ["proc", "sys", "dev"] {
        let bench = Bench::ours();
        let outside = outside(&bench);
        fs::remove_dir(bench.rootfs().join(name)).unwrap();
        symlink(&outside, bench.rootfs().join(name)).unwrap();
        bench.write("a", bench.config("true"));
        bench.refused(&["create", "a"], 1, &["plain folder"]);
        assert!(is_empty(&outside), "{name}");
        bench.assert_gone("a");
    }
}

/// CVE-2021-30465, CVE-2024-45310: links of the image where mounts go stay inside, and nothing is made outside.
#[test]
fn links_lead_nowhere_but_inside() {
    let bench = Bench::ours();
    let outside = outside(&bench);
    symlink(&outside, bench.rootfs().join("link")).unwrap();
    symlink("../../../../../../../../../..", bench.rootfs().join("up")).unwrap();
    let volume = bench.dir().join("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("file"), "secret\n").unwrap();
    let mut config = bench.config("cat /link/deep/er/file /up/x/file");
    for destination in ["/link/deep/er", "/up/x"] {
        let mount = json!({"destination": destination, "type": "bind", "source": volume, "options": ["bind"]});
        push(&mut config["mounts"], mount);
    }
    assert_eq!(bench.says("a", config), "secret\nsecret\n");
    assert!(is_empty(&outside));
    assert!(!Path::new("/x").exists());
}

/// The same while somebody swaps the destination all the time.
#[test]
fn a_destination_that_is_swapped_leads_nowhere() {
    let bench = Bench::ours();
    let (outside, volume) = (outside(&bench), bench.dir().join("volume"));
    fs::create_dir_all(volume.join("real")).unwrap();
    symlink(&outside, volume.join("link")).unwrap();
    let mut config = bench.config("true");
    let bind =
        |source: &Path, to: &str| json!({"destination": to, "type": "bind", "source": source, "options": ["bind"]});
    push(&mut config["mounts"], bind(&volume, "/v"));
    push(&mut config["mounts"], json!({"destination": "/v/spot/deep", "type": "tmpfs", "source": "tmpfs"}));
    let enough = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let spot = volume.join("spot");
            while !enough.load(Ordering::Relaxed) {
                for from in ["real", "link"] {
                    let _ = fs::rename(volume.join(from), &spot);
                    let _ = fs::rename(&spot, volume.join(from));
                }
            }
        });
        let end = Instant::now() + Duration::from_secs(3);
        let mut mounted = 0;
        while Instant::now() < end {
            mounted += i32::from(bench.run("a", config.clone()).code == 0);
            bench.call(&["delete", "--force", "a"]);
            assert!(is_empty(&outside));
        }
        enough.store(true, Ordering::Relaxed);
        assert!(mounted > 0, "no container ran at all");
    });
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&*outside.to_string_lossy()));
}

/// CVE-2025-31133: what masks is the null device of the host, whatever the image has in its place.
#[test]
fn masks_are_not_the_images() {
    let bench = Bench::ours();
    let mut config = bench.config("cat /proc/version | wc -c");
    let volume = bench.dir().join("volume");
    fs::create_dir(&volume).unwrap();
    symlink("/proc/sys/kernel/core_pattern", volume.join("null")).unwrap();
    // A /dev that comes from elsewhere is taken as it is.
    let mounts = config["mounts"].as_array_mut().unwrap();
    mounts.retain(|mount| !mount["destination"].as_str().unwrap().starts_with("/dev"));
    push(&mut config["mounts"], json!({"destination": "/dev", "type": "bind", "source": volume, "options": ["bind"]}));
    push(&mut config["linux"]["maskedPaths"], json!("/proc/version"));
    assert_eq!(bench.says("a", config), "0\n");
}

/// CVE-2019-16884: nothing of the image or the host lies over /proc.
#[test]
fn nothing_is_mounted_over_proc() {
    let bench = Bench::ours();
    let volume = bench.dir().join("volume");
    fs::create_dir_all(volume.join("self")).unwrap();
    symlink("/proc/self", bench.rootfs().join("link")).unwrap();
    symlink("proc/sys", bench.rootfs().join("settings")).unwrap();
    let bind = json!({"type": "bind", "source": volume, "options": ["bind"]});
    let memory = json!({"type": "tmpfs", "source": "tmpfs"});
    let queue = json!({"type": "mqueue", "source": "mqueue"});
    for destination in ["/proc", "/proc/self", "/proc/sys/kernel", "/link/attr", "/settings/kernel", "/settings"] {
        for mount in [&bind, &memory, &queue, &json!({"type": "cgroup"})] {
            let mut config = bench.config("true");
            let mut mount = mount.clone();
            mount["destination"] = json!(destination);
            push(&mut config["mounts"], mount.clone());
            bench.write("a", config);
            let said = bench.refused(&["create", "a"], 1, &["inside /proc", "plain folder"]);
            assert!(mount["type"] == "cgroup" || said.contains("inside /proc"), "{destination}: {said}");
        }
    }
    // What tools tell a container about its limits.
    let mut config = bench.config("cat /proc/uptime");
    fs::write(volume.join("uptime"), "1 1\n").unwrap();
    push(
        &mut config["mounts"],
        json!({"destination": "/proc/uptime", "type": "bind", "source": volume.join("uptime"), "options": ["bind"]}),
    );
    assert_eq!(bench.says("b", config), "1 1\n");
}

/// CVE-2022-24769, CVE-2022-29162, CVE-2022-2989: no capability is inheritable and no group is there that nobody asked for.
#[test]
fn nothing_is_inherited_that_was_not_given() {
    let bench = Bench::ours();
    bench.sleeper("s");
    for args in [
        vec!["exec", "s", "grep", "-E", "CapInh|Groups", "/proc/self/status"],
        vec!["exec", "--cap", "CAP_NET_ADMIN", "s", "grep", "-E", "CapInh|Groups", "/proc/self/status"],
        vec!["exec", "-u", "5:5", "s", "grep", "-E", "CapInh|Groups", "/proc/self/status"],
    ] {
        let text = bench.ok(&args);
        let words: Vec<&str> = text.split_whitespace().collect();
        assert_eq!(words, ["Groups:", "CapInh:", "0000000000000000"], "{args:?}");
    }
}

/// No descriptor, no key, no terminal of the caller is there.
#[test]
fn the_caller_is_not_there() {
    let bench = Bench::ours();
    bench.write("a", bench.config("sleep 1000"));
    let inner = bench.command(&["create", "a"]);
    let mut command = std::process::Command::new("sh");
    command
        .args(["-c", "exec 5</ 6</etc/passwd 9</proc; exec \"$@\"", "sh"])
        .arg(inner.get_program())
        .args(inner.get_args());
    command.current_dir(bench.bundle()).stdin(Stdio::null());
    assert_eq!(bench.finish(command).code, 0);
    let pid = bench.state("a")["pid"].as_i64().unwrap();
    let mut open = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
        let number: i32 = entry.file_name().to_string_lossy().parse().unwrap();
        let target = fs::read_link(entry.path()).unwrap().display().to_string();
        if number > 2 {
            open.push(target);
        }
    }
    // The socket that it waits on, and the sealed file by which it becomes a program.
    open.iter_mut().for_each(|target| target.truncate(7));
    open.sort();
    assert_eq!(open, ["/memfd:", "socket:"]);
    bench.ok(&["start", "a"]);
    let text = bench.ok(&["exec", "a", "ls", "/proc/1/fd"]);
    assert_eq!(text.split_whitespace().collect::<Vec<_>>(), ["0", "1", "2"]);
}

/// A container's end is that of all in its groups: they must not be anybody else's.
#[test]
fn groups_that_are_in_use_are_not_taken() {
    let bench = Bench::ours();
    bench.sleeper("owner");
    for path in [bench.group("owner"), format!("{}/below", bench.group("owner"))] {
        let mut config = bench.config("true");
        config["linux"]["cgroupsPath"] = json!(format!("/{path}"));
        bench.write("thief", config);
        let output = bench.call(&["run", "thief"]);
        // Below them there is room; in them there is not.
        assert_eq!(output.code, i32::from(!path.ends_with("below")), "{path}: {output:?}");
        assert!(output.code == 0 || output.stderr.contains("not empty"), "{output:?}");
        bench.call(&["delete", "--force", "thief"]);
        assert_eq!(bench.status("owner"), "running");
    }
    let mut config = bench.config("sleep 1000");
    config["linux"]["cgroupsPath"] = json!(format!("/{}-parent/below", bench.group("owner")));
    bench.write("below", config.clone());
    bench.ok(&["run", "--detach", "below"]);
    config["linux"]["cgroupsPath"] = json!(format!("/{}-parent", bench.group("owner")));
    bench.write("above", config);
    bench.refused(&["create", "above"], 1, &["not empty"]);
    assert_eq!(bench.status("below"), "running");
    bench.ok(&["delete", "--force", "below"]);
    for hierarchy in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
        let _ = fs::remove_dir(hierarchy.path().join(format!("{}-parent", bench.group("owner"))));
    }
}

/// A configuration that is hostile makes an error, never a panic.
#[test]
fn a_hostile_configuration_is_an_error() {
    let bench = Bench::ours();
    let plain = bench.config("true");
    let fields = [
        ("/process/args", json!(["\u{0}"])),
        ("/process/env", json!(["A=\u{0}b"])),
        ("/process/cwd", json!("/a\u{0}b")),
        ("/hostname", json!("x".repeat(5000))),
        ("/mounts/0/destination", json!("/a\u{0}")),
        ("/mounts/1/options", json!(["size=\u{0}", "nosuch=1"])),
        ("/linux/maskedPaths", json!(["/\u{0}"])),
        ("/process/user", json!({"uid": 4_294_967_295u32, "gid": 4_294_967_295u32})),
        ("/linux/resources", json!({"unified": {"../x": "1"}})),
        ("/linux/cgroupsPath", json!("/../../x")),
    ];
    for (at, value) in fields {
        let mut config: Value = plain.clone();
        match at {
            "/linux/cgroupsPath" => config["linux"]["cgroupsPath"] = value,
            _ => *config.pointer_mut(at).unwrap() = value,
        }
        bench.write("a", config);
        let output = bench.call(&["run", "a"]);
        assert!(
            output.code != 0 && !output.stderr.contains("panicked") && !output.stderr.is_empty(),
            "{at}: {output:?}"
        );
        bench.call(&["delete", "--force", "a"]);
        bench.assert_gone("a");
    }
}
