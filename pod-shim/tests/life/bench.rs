//! A store of one's own, `pod` to run in it, and a person at a terminal.

use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// ctrl-p ctrl-q
pub const DETACH: &str = "\x10\x11";
/// Long: the machine may be busy with other tests.
const SOON: Duration = Duration::from_secs(30);

/// Asks until it is so.
pub fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !so() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(10));
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
}

impl Bench {
    pub fn new() -> Bench {
        assert!(nix::unistd::geteuid().is_root(), "these tests make namespaces: run them as root");
        Bench { dir: tempfile::tempdir().unwrap() }
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    fn prepare(&self, command: &mut Command) {
        let own = Path::new(env!("CARGO_BIN_EXE_pod"));
        let path = format!("{}:{}", own.parent().unwrap().display(), std::env::var("PATH").unwrap());
        command.current_dir(self.dir()).env("PATH", path).env("TERM", "xterm");
        command.env("POD_ROOT", self.dir().join("data")).env("POD_RUN", self.dir().join("run"));
        command.env_remove("POD_LOG").stdin(Stdio::null());
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pod"));
        self.prepare(&mut command);
        command.args(args);
        command
    }

    /// The same store for calls into the library.
    pub fn store(&self) -> pod_runtime::store::Store {
        pod_runtime::store::Store::open_at(self.dir().join("data"), self.dir().join("run")).unwrap()
    }

    pub fn pod(&self, args: &[&str]) -> Output {
        self.with_input(args, "")
    }

    pub fn with_input(&self, args: &[&str], input: &str) -> Output {
        let mut command = self.command(args);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        let output = child.wait_with_output().unwrap();
        Output {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// What it prints; it must work.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.pod(args);
        assert_eq!(output.code, 0, "pod {args:?}: {output:?}");
        output.stdout
    }

    pub fn json(&self, args: &[&str]) -> serde_json::Value {
        serde_json::from_str(&self.ok(args)).unwrap()
    }

    pub fn kill(&self, pid: i64) {
        self.signal(pid, Signal::SIGKILL);
    }

    pub fn signal(&self, pid: i64, signal: Signal) {
        kill(Pid::from_raw(pid as i32), signal).unwrap();
    }

    pub fn sha256(&self, data: &[u8]) -> String {
        let mut child = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(data).unwrap();
        String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap()
    }

    /// What of pods is on disk.
    pub fn files(&self) -> Vec<PathBuf> {
        let dirs = ["data/pods", "run"].map(|name| self.dir().join(name));
        dirs.iter().filter_map(|dir| fs::read_dir(dir).ok()).flatten().map(|entry| entry.unwrap().path()).collect()
    }

    pub fn is_empty(&self) -> bool {
        let removed = |name: &str| name.starts_with(".removed");
        let half = fs::read_dir(self.dir().join("data")).into_iter().flatten();
        self.files().is_empty() && !half.flatten().any(|entry| removed(&entry.file_name().to_string_lossy()))
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // A test that failed half way leaves pods.
        if let Ok(ids) = self.command(&["ps", "-aq"]).output() {
            let ids = String::from_utf8_lossy(&ids.stdout).into_owned();
            for id in ids.lines() {
                let _ = self.command(&["rm", "-f", id]).output();
            }
        }
    }
}

/// Runs on, and tells at its end all that was printed.
pub trait OutputLater {
    fn output_later(&mut self) -> std::thread::JoinHandle<String>;
}

impl OutputLater for Command {
    fn output_later(&mut self) -> std::thread::JoinHandle<String> {
        let child = self.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::spawn(move || {
            let output = child.wait_with_output().unwrap();
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
        })
    }
}

/// A pty, a command on one side and a person on the other.
pub struct Terminal {
    master: File,
    child: Child,
    screen: Arc<Mutex<Vec<u8>>>,
    seen: usize,
}

impl Terminal {
    pub fn new(bench: &Bench, args: &[&str]) -> Terminal {
        Terminal::program(bench, env!("CARGO_BIN_EXE_pod"), args)
    }

    pub fn program(bench: &Bench, program: &str, args: &[&str]) -> Terminal {
        let size = Winsize { ws_row: 40, ws_col: 120, ws_xpixel: 0, ws_ypixel: 0 };
        let ends = openpty(Some(&size), None).unwrap();
        let end = || -> Stdio { ends.slave.try_clone().unwrap().into() };
        let mut command = Command::new("setsid");
        bench.prepare(&mut command);
        command.args(["--ctty", "--wait", program]).args(args);
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();
        drop((command, ends.slave));
        let screen = Arc::new(Mutex::new(Vec::new()));
        let (shown, master) = (screen.clone(), File::from(ends.master));
        let mut reader = master.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut part = [0; 4096];
            // EIO is how the last close of the other end shows.
            while let Ok(count @ 1..) = reader.read(&mut part) {
                shown.lock().unwrap().extend_from_slice(&part[..count]);
            }
        });
        Terminal { master, child, screen, seen: 0 }
    }

    pub fn keys(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).unwrap();
    }

    fn shown(&self) -> String {
        String::from_utf8_lossy(&self.screen.lock().unwrap()).into_owned()
    }

    /// Waits until `text` is shown, after all that was waited for before.
    pub fn expect(&mut self, text: &str) {
        let deadline = Instant::now() + SOON;
        loop {
            let shown = self.shown();
            if let Some(at) = shown.get(self.seen..).and_then(|new| new.find(text)) {
                self.seen += at + text.len();
                return;
            }
            assert!(Instant::now() < deadline, "no {text:?} in {:?}", &shown[self.seen..]);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn say(&mut self, keys: &str, then: &str) {
        self.keys(keys);
        self.expect(then);
    }

    /// Waits for the command's end: its exit code.
    pub fn ended(&mut self) -> i32 {
        let mut code = None;
        eventually("the end of the command", || {
            code = self.child.try_wait().unwrap();
            code.is_some()
        });
        code.and_then(|status| status.code()).unwrap_or(-1)
    }

    /// kill -9 of what runs on it.
    pub fn kill(&mut self) {
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.child.id())).unwrap();
        for pid in children.split_whitespace().filter_map(|pid| pid.parse().ok()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
