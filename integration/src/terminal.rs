//! A person at a terminal: a pty whose other end is a `pod run -it` or `pod attach` on a host.

use crate::bed::Host;
use crate::wait;
use anyhow::{Context, Result};
use nix::pty::{Winsize, openpty};
use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};

/// Docker's keys to leave a pod running: ctrl-p ctrl-q.
pub const DETACH: &str = "\x10\x11";

#[derive(Debug)]
pub struct Terminal {
    master: File,
    child: Child,
    screen: Arc<Mutex<Vec<u8>>>,
    seen: usize,
}

impl Terminal {
    /// `pod ARGS…` on the host, on a terminal of 40 rows and 120 columns.
    pub fn pod(host: &Host, args: &[&str]) -> Result<Terminal> {
        let size = Winsize { ws_row: 40, ws_col: 120, ws_xpixel: 0, ws_ypixel: 0 };
        let ends = openpty(Some(&size), None)?;
        let end = || -> Result<Stdio> { Ok(ends.slave.try_clone()?.into()) };
        let mut command = host.command("setsid");
        command.args(["--ctty", "--wait", "pod"]).args(args).env("TERM", "xterm");
        let child = command.stdin(end()?).stdout(end()?).stderr(end()?).spawn()?;
        drop((command, ends.slave));
        let screen = Arc::new(Mutex::new(Vec::new()));
        let (shown, mut master) = (screen.clone(), File::from(ends.master));
        let mut reader = master.try_clone()?;
        std::thread::spawn(move || {
            let mut part = [0; 4096];
            // EIO is how the last close of the other end shows.
            while let Ok(count @ 1..) = reader.read(&mut part) {
                shown.lock().expect("no reader panics").extend_from_slice(&part[..count]);
            }
        });
        master.flush()?;
        Ok(Terminal { master, child, screen, seen: 0 })
    }

    pub fn type_in(&mut self, keys: &str) -> Result<()> {
        Ok(self.master.write_all(keys.as_bytes())?)
    }

    fn shown(&self) -> String {
        String::from_utf8_lossy(&self.screen.lock().expect("no reader panics")).into_owned()
    }

    /// Waits until `text` is shown, after all that was waited for before.
    pub fn expect(&mut self, text: &str) -> Result<()> {
        let mut found = None;
        let waited = wait::until_true(&format!("the terminal to show {text:?}"), wait::SOON, || {
            let shown = self.shown();
            found = shown.get(self.seen..).and_then(|new| new.find(text)).map(|at| self.seen + at + text.len());
            found.is_some()
        });
        waited.with_context(|| format!("it shows {:?}", self.shown().get(self.seen..).unwrap_or_default()))?;
        self.seen = found.unwrap_or(self.seen);
        Ok(())
    }

    /// Types, and waits for what that shows.
    pub fn say(&mut self, keys: &str, then: &str) -> Result<()> {
        self.type_in(keys)?;
        self.expect(then)
    }

    /// Leaves the pod running and waits for the command to end.
    pub fn detach(mut self) -> Result<()> {
        self.type_in(DETACH)?;
        self.ended().map(drop)
    }

    /// Waits for the command to end: its exit code.
    pub fn ended(&mut self) -> Result<i32> {
        let child = &mut self.child;
        let status = wait::until("the command at the terminal to end", wait::SOON, || child.try_wait().ok().flatten());
        Ok(status.with_context(|| format!("it shows {:?}", self.shown()))?.code().unwrap_or(-1))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
