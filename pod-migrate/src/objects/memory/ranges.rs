//! Sets of addresses.

use std::ops::Range;

/// Ranges in order that neither overlap nor touch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ranges(Vec<Range<u64>>);

impl Ranges {
    /// Of ranges in order; those that overlap or touch become one.
    pub fn of(ranges: impl IntoIterator<Item = Range<u64>>) -> Ranges {
        let mut all: Vec<Range<u64>> = Vec::new();
        for range in ranges.into_iter().filter(|range| range.start < range.end) {
            match all.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => all.push(range),
            }
        }
        Ranges(all)
    }

    pub fn one(range: Range<u64>) -> Ranges {
        Ranges::of(std::iter::once(range))
    }

    /// Of ranges in any order.
    pub fn of_any(ranges: impl IntoIterator<Item = Range<u64>>) -> Ranges {
        let mut all: Vec<Range<u64>> = ranges.into_iter().collect();
        all.sort_unstable_by_key(|range| range.start);
        Ranges::of(all)
    }

    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> {
        self.0.iter().cloned()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether anything of a range is in it.
    pub fn touches(&self, range: &Range<u64>) -> bool {
        let at = self.0.partition_point(|mine| mine.end <= range.start);
        self.0.get(at).is_some_and(|mine| mine.start < range.end)
    }

    /// Whether all of a range is in it.
    pub fn has(&self, range: &Range<u64>) -> bool {
        let at = self.0.partition_point(|mine| mine.end <= range.start);
        range.is_empty() || self.0.get(at).is_some_and(|mine| mine.start <= range.start && range.end <= mine.end)
    }

    /// The parts that lie in a range.
    pub fn within(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let first = self.0.partition_point(|mine| mine.end <= range.start);
        let over = self.0[first..].iter().take_while(move |mine| mine.start < range.end);
        over.map(move |mine| mine.start.max(range.start)..mine.end.min(range.end))
    }

    /// How many addresses.
    pub fn bytes(&self) -> u64 {
        self.iter().map(|range| range.end - range.start).sum()
    }

    /// What is in either.
    pub fn with(&self, other: &Ranges) -> Ranges {
        Ranges::of_any(self.iter().chain(other.iter()))
    }

    /// What is in both.
    pub fn both(&self, other: &Ranges) -> Ranges {
        let mut found = Vec::new();
        let (mut mine, mut theirs) = (self.0.iter().peekable(), other.0.iter().peekable());
        while let (Some(a), Some(b)) = (mine.peek(), theirs.peek()) {
            let part = a.start.max(b.start)..a.end.min(b.end);
            if a.end <= b.end {
                mine.next();
            } else {
                theirs.next();
            }
            if part.start < part.end {
                found.push(part);
            }
        }
        Ranges(found)
    }

    /// What is in this and not in the other.
    pub fn without(&self, other: &Ranges) -> Ranges {
        let mut left = Vec::new();
        let mut first = 0;
        for range in self.iter() {
            let mut from = range.start;
            first += other.0[first..].partition_point(|hole| hole.end <= range.start);
            for hole in other.0[first..].iter().take_while(|hole| hole.start < range.end) {
                if from < hole.start {
                    left.push(from..hole.start);
                }
                from = from.max(hole.end);
            }
            if from < range.end {
                left.push(from..range.end);
            }
        }
        Ranges(left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn members(ranges: &Ranges) -> BTreeSet<u64> {
        assert!(ranges.0.windows(2).all(|pair| pair[0].end < pair[1].start), "{ranges:?}");
        ranges.iter().flatten().collect()
    }

    fn some() -> impl Strategy<Value = Ranges> {
        proptest::collection::vec((0u64..40, 0u64..9), 0..8).prop_map(|mut pairs| {
            pairs.sort_unstable();
            Ranges::of(pairs.into_iter().map(|(start, bytes)| start..start + bytes))
        })
    }

    proptest! {
        #[test]
        fn they_are_sets(a in some(), b in some()) {
            let (x, y) = (members(&a), members(&b));
            prop_assert_eq!(members(&a.with(&b)), &x | &y);
            // Two parts of a set may touch where the sets do: only what is in them counts.
            prop_assert_eq!(a.both(&b).iter().flatten().collect::<BTreeSet<_>>(), &x & &y);
            prop_assert_eq!(a.without(&b).iter().flatten().collect::<BTreeSet<_>>(), &x - &y);
            prop_assert_eq!(a.bytes(), x.len() as u64);
            let within: BTreeSet<u64> = b.iter().flat_map(|range| a.within(range)).flatten().collect();
            prop_assert_eq!(within, &x & &y);
            prop_assert!(b.iter().all(|range| a.touches(&range) == range.clone().any(|address| x.contains(&address))));
        }
    }
}
