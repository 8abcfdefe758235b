//! A pod must not stand still because we do.
//!
//! A pod that is frozen for a dump is held by nothing but this process. Should it hang (a file system that does not
//! answer, a mistake of ours), the kernel ends it after [`STALL`] by SIGALRM, and with it the freeze: the pod runs on
//! and everything of the attempt goes as it does when the tool is killed.

use nix::unistd::alarm;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Seconds without progress.
const STALL: u32 = 45;
/// How often writes are looked at.
const LOOK: Duration = Duration::from_secs(5);

/// Runs while the pod is held; ends with it.
#[derive(Debug)]
pub struct Watchdog {
    feeder: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Watchdog {
    /// Who makes progress says so: [`Watchdog::fed`].
    pub fn start() -> Watchdog {
        alarm::set(STALL);
        Watchdog { feeder: None }
    }

    /// What this process writes, by whichever thread and to whatever file, is progress.
    pub fn over_writes() -> Watchdog {
        let (stop, stopped) = channel::<()>();
        let mut before = written();
        alarm::set(STALL);
        let feeder = thread::spawn(move || {
            while stopped.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
                let now = written();
                // A kernel that does not count cannot tell that nothing happens.
                if now != before || now.is_none() {
                    before = now;
                    Watchdog::fed();
                }
            }
        });
        Watchdog { feeder: Some((stop, feeder)) }
    }

    /// Still alive. Without a watchdog that runs this does nothing.
    pub fn fed() {
        if alarm::cancel().is_some() {
            alarm::set(STALL);
        }
    }
}

/// Bytes that this process has handed to write(2) and its relatives.
fn written() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/io").ok()?;
    text.lines().find_map(|line| line.strip_prefix("wchar: "))?.parse().ok()
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        if let Some((stop, feeder)) = self.feeder.take() {
            drop(stop);
            let _ = feeder.join();
        }
        alarm::cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// One test: the alarm is the process's. Under nextest that is this test's own.
    #[test]
    fn writing_feeds_it_and_its_end_is_the_alarms() {
        let mut file = tempfile::tempfile().unwrap();
        let watchdog = Watchdog::over_writes();
        // As if it had stood still for most of the time.
        alarm::set(9);
        file.write_all(b"more").unwrap();
        let fed = || {
            let left = alarm::cancel().unwrap_or(0);
            alarm::set(left.max(1));
            left > 9
        };
        let until = std::time::Instant::now() + LOOK * 2;
        while !fed() {
            assert!(std::time::Instant::now() < until, "writing was not noticed");
            thread::sleep(Duration::from_millis(20));
        }
        drop(watchdog);
        assert_eq!(alarm::cancel(), None, "nothing is left of it");
        Watchdog::fed();
        assert_eq!(alarm::cancel(), None, "and it does not come back by itself");
    }
}
