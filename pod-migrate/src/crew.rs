//! Work for all CPUs: what is read in /proc of many tasks. (ptrace is bound to one thread, /proc is not.)

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// To start a thread costs about as much as this many pieces of work.
const PIECES: usize = 4;

/// How many threads run at once. The answer needs some twenty calls: it is asked for once.
pub fn cpus() -> usize {
    static CPUS: OnceLock<usize> = OnceLock::new();
    *CPUS.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// Does pieces 0 to `count` of some work; the results in their order.
pub fn share<T: Send>(count: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let hands = match count / PIECES {
        0 | 1 => 1,
        some => cpus().min(some),
    };
    let next = AtomicUsize::new(0);
    let some = || {
        let mut done = Vec::with_capacity(count / hands + 1);
        loop {
            let piece = next.fetch_add(1, Ordering::Relaxed);
            if piece >= count {
                return done;
            }
            done.push((piece, work(piece)));
        }
    };
    let mut all = std::thread::scope(|scope| {
        // A thread that is not to be had (a pod may hold no more than so many) is done without.
        let hand = |_| std::thread::Builder::new().spawn_scoped(scope, some).ok();
        let others: Vec<_> = (1..hands).filter_map(hand).collect();
        let mut all = some();
        for other in others {
            match other.join() {
                Ok(done) => all.extend(done),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        all
    });
    all.sort_unstable_by_key(|(piece, _)| *piece);
    all.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_in_order() {
        for count in [0, 1, 7, 1000] {
            let squares: Vec<usize> = (0..count).map(|n| n * n).collect();
            assert_eq!(share(count, |n| n * n), squares);
        }
    }
}
