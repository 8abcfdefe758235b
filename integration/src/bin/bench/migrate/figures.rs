//! What a client saw of a move, out of the times of its replies: pure, and the same for every workload.

use super::capture::Seen;
use super::clock::ms;
use super::load::{Heard, Sample};
use super::mover::Move;

/// What belongs to a move beyond its end: a second, in which a segment that was lost is sent again.
pub const AFTER: u64 = 1_000_000_000;

/// Between two of something.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Gap {
    pub from: u64,
    pub to: u64,
}

impl Gap {
    pub fn ms(&self) -> f64 {
        ms(self.to - self.from)
    }
}

/// The longest gap between two times, of those that touch a window.
pub fn longest(times: &[u64], from: u64, to: u64) -> Gap {
    let first = times.partition_point(|time| *time < from).saturating_sub(1);
    let last = (times.partition_point(|time| *time <= to) + 1).min(times.len());
    let gaps = times.get(first..last).unwrap_or_default().windows(2).map(|pair| Gap { from: pair[0], to: pair[1] });
    gaps.max_by_key(|gap| gap.to - gap.from).unwrap_or_default()
}

fn within(times: &[u64], from: u64, to: u64) -> usize {
    times.iter().filter(|time| (from..=to).contains(*time)).count()
}

/// A move and what was seen of it, in milliseconds where nothing else is said.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    pub moved: Move,
    /// The longest silence from the begin of the move until a second after its end.
    pub stall: f64,
    /// That around the time that the pod stood still.
    pub at_freeze: Gap,
    /// The longest silence in the second before the move.
    pub calm: f64,
    /// The longest wait for one reply.
    pub slowest: f64,
    /// As the stall, between frames of the pod's address.
    pub lan: f64,
    pub resets: usize,
    pub again: usize,
}

impl Figures {
    /// What the silence at the freeze went to, in microseconds, in its order.
    pub fn parts(&self) -> Vec<(String, f64)> {
        let before = (self.moved.frozen_at as f64 - self.at_freeze.from as f64) / 1e3;
        let after = (self.at_freeze.to as f64 - self.moved.thawed_at() as f64) / 1e3;
        let named = self.moved.parts.iter().map(|(part, ms)| (part.clone(), ms * 1e3));
        let mut parts = vec![("last reply until frozen".to_owned(), before)];
        parts.extend(named);
        parts.push(("told until first reply".to_owned(), after));
        parts
    }
}

/// The figures of each move. Replies are sorted by when they came.
pub fn of(moves: Vec<Move>, heard: &Heard, seen: &Seen) -> Vec<Figures> {
    let replies: Vec<u64> = heard.samples.iter().map(|sample| sample.replied).collect();
    let one = |moved: Move| {
        let (from, to) = (moved.begun, moved.ended + AFTER);
        let inside = heard.samples.iter().filter(|sample| (from..=to).contains(&sample.replied));
        Figures {
            stall: longest(&replies, from, to).ms(),
            at_freeze: longest(&replies, moved.frozen_at, moved.thawed_at()),
            calm: longest(&replies, from.saturating_sub(AFTER), from).ms(),
            slowest: inside.map(|sample| ms(sample.replied.saturating_sub(sample.due))).fold(0.0, f64::max),
            lan: longest(&seen.frames, from, to).ms(),
            resets: within(&seen.resets, from, to),
            again: within(&seen.again, from, to),
            moved,
        }
    };
    moves.into_iter().map(one).collect()
}

/// Samples around a move, and none of another, as points of a plot: milliseconds from the freeze on, microseconds.
pub fn points(samples: &[Sample], moved: &Move, (from, to): (f64, f64)) -> Vec<(f64, f64)> {
    let point = |sample: &Sample| {
        let at = (sample.due as f64 - moved.frozen_at as f64) / 1e6;
        (at, sample.replied.saturating_sub(sample.due) as f64 / 1e3)
    };
    let around = moved.begun.saturating_sub(AFTER)..moved.ended + AFTER;
    samples
        .iter()
        .filter(|sample| around.contains(&sample.due))
        .map(point)
        .filter(|(at, _)| (from..=to).contains(at))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silence_counts_that_begins_before_the_window() {
        let times = [10, 20, 30, 90, 100, 300];
        assert_eq!(longest(&times, 50, 60), Gap { from: 30, to: 90 });
        assert_eq!(longest(&times, 12, 25), Gap { from: 20, to: 30 });
        assert_eq!(longest(&times, 95, 200), Gap { from: 100, to: 300 });
        assert_eq!(longest(&[], 1, 2), Gap::default());
    }

    #[test]
    fn the_parts_of_a_silence_are_all_of_it() {
        let moved = Move {
            frozen_at: 5_000_000,
            frozen_ms: 3.0,
            parts: vec![("dump".into(), 2.0), ("commit".into(), 1.0)],
            ..Move::default()
        };
        let figures = Figures { moved, at_freeze: Gap { from: 4_900_000, to: 8_200_000 }, ..Figures::default() };
        let parts = figures.parts();
        assert_eq!(parts.iter().map(|(_, us)| us).sum::<f64>(), 3300.0);
        assert_eq!(parts[0].1, 100.0);
    }

    #[test]
    fn a_move_has_what_came_until_a_second_after_it() {
        let reply = |due, replied| Sample { due, replied };
        let samples = vec![reply(0, 1_000_000), reply(2_000_000, 9_000_000), reply(9_000_000, 9_500_000)];
        let heard = Heard { samples, ..Heard::default() };
        let seen = Seen { frames: vec![1, 7_000_000], resets: vec![8_000_000, AFTER * 3], ..Seen::default() };
        let moved =
            Move { begun: 2_000_000, frozen_at: 3_000_000, frozen_ms: 4.0, ended: 9_000_000, ..Move::default() };
        let figures = &of(vec![moved], &heard, &seen)[0];
        assert_eq!((figures.stall, figures.slowest, figures.resets), (8.0, 7.0, 1));
        assert_eq!(figures.at_freeze, Gap { from: 1_000_000, to: 9_000_000 });
    }
}
