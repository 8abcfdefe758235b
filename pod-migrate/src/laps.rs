//! What a stretch of time went to, lap by lap: where a pod's standstill goes, on both hosts.
//!
//! Each thread has a stopwatch of its own, which stands until [`begin`]: the walks call [`lap`] at the end of each of their
//! lines, and need not know whether anybody looks.

use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::cell::RefCell;
use std::time::Instant;

/// From the end of the lap before to the end of this one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Lap {
    pub lap: Cow<'static, str>,
    pub ms: f64,
}

struct Stopwatch {
    last: Instant,
    laps: Vec<Lap>,
}

thread_local! {
    static STOPWATCH: RefCell<Option<Stopwatch>> = const { RefCell::new(None) };
}

/// Starts this thread's stopwatch anew, as if it had been at that moment.
pub fn begin(at: Instant) {
    STOPWATCH.set(Some(Stopwatch { last: at, laps: Vec::new() }));
}

/// Something has ended. Costs nothing where no stopwatch runs, and some 50 ns where one does.
pub fn lap(lap: &'static str) {
    STOPWATCH.with_borrow_mut(|stopwatch| {
        let Some(Stopwatch { last, laps }) = stopwatch else { return };
        let now = Instant::now();
        laps.push(Lap { lap: lap.into(), ms: (now - *last).as_secs_f64() * 1e3 });
        *last = now;
    });
}

/// What was measured since [`begin`], or since it was taken last; the stopwatch goes on.
pub fn take() -> Vec<Lap> {
    STOPWATCH
        .with_borrow_mut(|stopwatch| stopwatch.as_mut().map(|running| std::mem::take(&mut running.laps)))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn laps_add_up_to_the_whole() {
        assert_eq!(take(), []);
        lap("nobody looks");
        let start = Instant::now();
        begin(start);
        lap("one");
        let first = take();
        lap("two");
        lap("three");
        let rest = take();
        assert!(start.elapsed().as_secs_f64() * 1e3 >= first.iter().chain(&rest).map(|lap| lap.ms).sum());
        let names: Vec<_> = first.iter().chain(&rest).map(|lap| lap.lap.as_ref()).collect();
        assert_eq!(names, ["one", "two", "three"]);
        assert_eq!(std::thread::spawn(take).join().unwrap(), []);
    }
}
