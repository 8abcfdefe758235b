//! Counts and prints, the first program that anybody tries: no number may be left out, repeated or out of order.

use crate::{Guest, say};
use anyhow::{Result, ensure};
use std::time::{Duration, Instant};

struct Counter {
    next: u64,
    copy: Vec<u64>,
    last: Instant,
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    Ok(Box::new(Counter { next: 0, copy: Vec::new(), last: Instant::now() }))
}

impl Guest for Counter {
    fn step(&mut self) -> Result<()> {
        if self.last.elapsed() >= Duration::from_millis(20) {
            self.last = Instant::now();
            say(&format!("count {}", self.next));
            self.copy.push(self.next);
            self.next += 1;
        }
        Ok(())
    }

    fn verify(&mut self) -> Result<()> {
        ensure!(self.copy.iter().copied().eq(0..self.next), "the counter's memory is not what it counted");
        Ok(())
    }
}
