//! podman and its conmon with `pod-oci` as the runtime. Passed over where podman is not installed.

use crate::bench::Output;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

struct Podman {
    dir: tempfile::TempDir,
}

impl Podman {
    fn new() -> Option<Podman> {
        if !Path::new("/usr/bin/podman").exists() {
            eprintln!("podman is not installed: passed over");
            return None;
        }
        let podman = Podman { dir: tempfile::tempdir().unwrap() };
        let root = podman.dir.path().join("rootfs");
        fs::create_dir_all(root.join("bin")).unwrap();
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
        for name in ["sh", "echo", "sleep", "id", "cat", "ps", "tty", "true"] {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).unwrap();
        }
        let tar = podman.dir.path().join("rootfs.tar");
        assert!(Command::new("tar").arg("-C").arg(&root).arg("-cf").arg(&tar).arg(".").status().unwrap().success());
        podman.ok(&["import", tar.to_str().unwrap(), "test"]);
        Some(podman)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn call(&self, args: &[&str]) -> Output {
        let mut command = Command::new("podman");
        command.arg("--root").arg(self.path("root")).arg("--runroot").arg(self.path("run"));
        command.arg("--tmpdir").arg(self.path("tmp")).args([
            "--cgroup-manager=cgroupfs",
            "--events-backend=file",
            "--runtime",
        ]);
        command.arg(env!("CARGO_BIN_EXE_pod-oci")).args(args).stdin(Stdio::null());
        let output = command.output().unwrap();
        Output {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    fn ok(&self, args: &[&str]) -> String {
        let output = self.call(args);
        assert_eq!(output.code, 0, "podman {args:?}: {output:?}");
        output.stdout
    }

    /// `podman run` under limits that this machine lets it have.
    fn run(&self, args: &[&str]) -> Output {
        const FLAGS: [&str; 7] =
            ["run", "--network", "none", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"];
        let group = format!("--cgroup-parent={}", self.group());
        self.call(&[&FLAGS[..], &[&group], args].concat())
    }

    /// Of this test alone.
    fn group(&self) -> String {
        format!("/podman-{}", std::process::id())
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        self.call(&["rm", "--all", "--force", "--time", "0"]);
        self.call(&["rmi", "--all", "--force"]);
        let group = self.group();
        for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let group = hierarchy.path().join(group.trim_start_matches('/'));
            for below in fs::read_dir(&group).into_iter().flatten().flatten() {
                let _ = fs::remove_dir(below.path());
            }
            let _ = fs::remove_dir(group);
        }
        // What it keeps mounted.
        let _ = Command::new("umount").arg("-R").arg(self.path("root")).stderr(Stdio::null()).status();
        let _ = Command::new("umount").arg("-R").arg(self.path("root/overlay")).stderr(Stdio::null()).status();
    }
}

#[test]
fn podman_runs_containers() {
    let Some(podman) = Podman::new() else { return };
    let output = podman.run(&["--rm", "test", "sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!((output.code, output.stdout.as_str(), output.stderr.as_str()), (7, "out\n", "err\n"));
    assert_eq!(podman.run(&["--rm", "test", "no-such"]).code, 127);
    assert_eq!(podman.run(&["--rm", "test", "/etc"]).code, 126);
    let output =
        podman.run(&["--rm", "-u", "33", "--read-only", "--tmpfs", "/t", "--cap-drop", "all", "test", "id", "-u"]);
    assert_eq!(output.stdout, "33\n", "{output:?}");
    let output = podman.run(&["--rm", "--uidmap", "0:100000:5000", "test", "cat", "/proc/self/uid_map"]);
    assert_eq!(output.stdout.split_whitespace().collect::<Vec<_>>(), ["0", "100000", "5000"], "{output:?}");
    let output = podman.run(&["--rm", "-t", "test", "tty"]);
    assert_eq!(output.stdout.trim(), "/dev/pts/0", "{output:?}");
}

#[test]
fn podman_keeps_a_container() {
    let Some(podman) = Podman::new() else { return };
    let output = podman.run(&["-d", "--name", "kept", "-m", "64m", "test", "sh", "-c", "echo begun; sleep 1000"]);
    assert_eq!(output.code, 0, "{output:?}");
    crate::eventually("its log", || podman.ok(&["logs", "kept"]) == "begun\n");
    assert_eq!(podman.ok(&["exec", "kept", "echo", "inside"]), "inside\n");
    assert_eq!(podman.call(&["exec", "kept", "sh", "-c", "exit 4"]).code, 4);
    podman.ok(&["pause", "kept"]);
    assert_eq!(podman.ok(&["inspect", "-f", "{{.State.Status}}", "kept"]), "paused\n");
    podman.ok(&["unpause", "kept"]);
    assert!(podman.ok(&["top", "kept"]).contains("sleep"));
    podman.ok(&["kill", "kept"]);
    assert_eq!(podman.ok(&["wait", "kept"]), "137\n");
    podman.ok(&["start", "kept"]);
    podman.ok(&["restart", "-t", "0", "kept"]);
    podman.ok(&["rm", "-f", "-t", "0", "kept"]);
    assert_eq!(podman.ok(&["ps", "-aq"]), "");
}
