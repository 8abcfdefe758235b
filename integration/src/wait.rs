//! Waiting for a condition, with a deadline. Nothing in `integration/` sleeps for a fixed time and hopes.

use anyhow::{Result, bail};
use std::time::{Duration, Instant};

/// What a person waits at most for something that takes milliseconds, on a machine that is busy with other work.
pub const SOON: Duration = Duration::from_secs(20);

/// How often a condition is looked at; short beside anything measured with it.
const STEP: Duration = Duration::from_millis(3);

/// How many times slower than usual this machine is: `$PATIENCE`, for one that is emulated.
pub fn patience() -> u32 {
    std::env::var("PATIENCE").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// Calls `look` until it gives something. `what` names the condition in the error.
pub fn until<T>(what: &str, deadline: Duration, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    let deadline = deadline * patience();
    let end = Instant::now() + deadline;
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        if Instant::now() >= end {
            bail!("{what}: not within {deadline:?}");
        }
        std::thread::sleep(STEP);
    }
}

/// As [`until`], for a condition that is only true or false.
pub fn until_true(what: &str, deadline: Duration, mut look: impl FnMut() -> bool) -> Result<()> {
    until(what, deadline, || look().then_some(()))
}
