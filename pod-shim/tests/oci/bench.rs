//! A root and bundles of one's own for a runtime, ours or a peer's; all that it made goes with the bench.

use serde_json::{Value, json};
use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Long: the machine may be busy with other tests.
const SOON: Duration = Duration::from_secs(20);

/// Asks until it is so.
pub fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !so() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Which runtime is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    Pod,
    Runc,
    Crun,
}

impl Runtime {
    /// Ours, and those peers that are installed and agree with what is tested.
    pub fn and(peers: &[Runtime]) -> Vec<Runtime> {
        let installed = |name: &str| ["/usr/bin", "/usr/sbin"].iter().any(|dir| Path::new(dir).join(name).exists());
        let there = |peer: &&Runtime| match peer {
            Runtime::Pod => false,
            Runtime::Runc => installed("runc"),
            Runtime::Crun => installed("crun"),
        };
        std::iter::once(Runtime::Pod).chain(peers.iter().filter(there).copied()).collect()
    }

    pub fn all() -> Vec<Runtime> {
        Self::and(&[Runtime::Runc, Runtime::Crun])
    }

    fn command(self) -> Command {
        match self {
            Runtime::Pod => Command::new(env!("CARGO_BIN_EXE_pod-oci")),
            Runtime::Runc => Command::new("runc"),
            // It refuses a host that has both kinds of cgroups: it is shown one kind.
            Runtime::Crun => {
                let mut command = Command::new("unshare");
                command.args(["-m", "sh", "-c", "umount /sys/fs/cgroup/unified 2>/dev/null; exec crun \"$@\"", "crun"]);
                command
            }
        }
    }
}

#[derive(Debug)]
pub struct Output {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

pub struct Bench {
    dir: tempfile::TempDir,
    pub runtime: Runtime,
    made: RefCell<Vec<String>>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        for id in self.made.borrow().iter() {
            self.call(&["delete", "--force", id]);
        }
    }
}

impl Bench {
    pub fn new(runtime: Runtime) -> Bench {
        assert!(nix::unistd::geteuid().is_root(), "these tests make containers: run them as root");
        let bench = Bench { dir: tempfile::tempdir().unwrap(), runtime, made: RefCell::default() };
        bench.furnish(&bench.rootfs());
        bench
    }

    pub fn ours() -> Bench {
        Bench::new(Runtime::Pod)
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn bundle(&self) -> PathBuf {
        self.dir().join("bundle")
    }

    pub fn rootfs(&self) -> PathBuf {
        self.bundle().join("rootfs")
    }

    fn furnish(&self, root: &Path) {
        for folder in ["bin", "proc", "sys", "dev", "etc", "tmp"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
        for name in [
            "sh", "true", "cat", "ls", "echo", "sleep", "id", "mount", "ps", "stat", "readlink", "grep", "head",
            "touch", "mkdir", "hostname", "kill", "mknod", "tty", "dd", "env", "pwd", "ip", "wc", "cut", "chmod",
            "nice", "find", "dmesg",
        ] {
            symlink("busybox", root.join("bin").join(name)).unwrap();
        }
        fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nweb:x:33:33:web:/srv:/bin/sh\n").unwrap();
    }

    /// The configuration that most tests start from: a shell with this script.
    pub fn config(&self, script: &str) -> Value {
        let output = Command::new(env!("CARGO_BIN_EXE_pod-oci")).args(["spec", "--bundle"]).arg(self.dir()).status();
        assert!(output.unwrap().success());
        let path = self.dir().join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        fs::remove_file(path).unwrap();
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(["sh", "-c", script]);
        config["root"]["readonly"] = json!(false);
        // What the oldest peer knows.
        config["ociVersion"] = json!("1.0.2");
        config
    }

    /// Writes it down, under cgroups that are this container's alone.
    pub fn write(&self, id: &str, mut config: Value) {
        if config["linux"]["cgroupsPath"].is_null() {
            config["linux"]["cgroupsPath"] = json!(format!("/{}", self.group(id)));
        }
        fs::write(self.bundle().join("config.json"), config.to_string()).unwrap();
        self.made.borrow_mut().push(id.to_owned());
    }

    pub fn group(&self, id: &str) -> String {
        let own = self.dir().file_name().unwrap().to_string_lossy().trim_start_matches('.').to_owned();
        format!("oci-{own}-{id}")
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = self.runtime.command();
        command.arg("--root").arg(self.dir().join("root")).args(args);
        command.current_dir(self.bundle()).stdin(Stdio::null());
        command
    }

    /// Its output goes to files: a runtime must not be waited for by its container's stdio.
    pub fn call(&self, args: &[&str]) -> Output {
        self.finish(self.command(args))
    }

    pub fn finish(&self, mut command: Command) -> Output {
        let (out, err) = (tempfile::tempfile_in(self.dir()).unwrap(), tempfile::tempfile_in(self.dir()).unwrap());
        command.stdout(out.try_clone().unwrap()).stderr(err.try_clone().unwrap());
        let code = command.status().unwrap().code().unwrap_or(-1);
        let read = |mut file: fs::File| {
            use std::io::{Read, Seek};
            let mut text = Vec::new();
            file.rewind().unwrap();
            file.read_to_end(&mut text).unwrap();
            String::from_utf8_lossy(&text).into_owned()
        };
        Output { code, stdout: read(out), stderr: read(err) }
    }

    /// What it prints; it must work.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.call(args);
        assert_eq!(output.code, 0, "{:?} {args:?}: {output:?}", self.runtime);
        output.stdout
    }

    /// What it says; it must fail with this code and one of these words.
    pub fn refused(&self, args: &[&str], code: i32, words: &[&str]) -> String {
        let output = self.call(args);
        let said = output.stderr.to_lowercase();
        let found = words.is_empty() || words.iter().any(|word| said.contains(&word.to_lowercase()));
        assert!(output.code == code && found, "{:?} {args:?} with {words:?}: {output:?}", self.runtime);
        output.stderr
    }

    /// Runs a container with this configuration in the foreground, to its end.
    pub fn run(&self, id: &str, config: Value) -> Output {
        self.write(id, config);
        self.call(&["run", id])
    }

    /// The output of a container that must end with 0.
    pub fn says(&self, id: &str, config: Value) -> String {
        let output = self.run(id, config);
        assert_eq!(output.code, 0, "{:?}: {output:?}", self.runtime);
        output.stdout
    }

    /// A container that sleeps, running.
    pub fn sleeper(&self, id: &str) {
        self.write(id, self.config("sleep 1000"));
        self.ok(&["create", id]);
        self.ok(&["start", id]);
    }

    pub fn status(&self, id: &str) -> String {
        self.state(id)["status"].as_str().unwrap().to_owned()
    }

    pub fn state(&self, id: &str) -> Value {
        serde_json::from_str(&self.ok(&["state", id])).unwrap()
    }

    /// Nothing of a container is there any more.
    pub fn assert_gone(&self, id: &str) {
        assert!(!self.dir().join("root").join(id).exists());
        for hierarchy in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
            assert!(!hierarchy.path().join(self.group(id)).exists(), "{}", hierarchy.path().display());
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(&*self.dir().to_string_lossy()), "a mount is left");
    }
}

/// Adds to a list of a configuration.
pub fn push(list: &mut Value, value: Value) {
    if list.is_null() {
        *list = json!([]);
    }
    list.as_array_mut().unwrap().push(value);
}

/// Replaces what a set of capabilities is.
pub fn capabilities(config: &mut Value, names: &[&str]) {
    for set in ["bounding", "effective", "permitted"] {
        config["process"]["capabilities"][set] = json!(names);
    }
}
