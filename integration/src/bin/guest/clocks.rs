//! Clocks go on: monotonic and boot time never go back and never jump by more than the move itself took.

use crate::{Guest, sys};
use anyhow::{Result, ensure};

const CLOCKS: [(i32, &str); 2] = [(libc::CLOCK_MONOTONIC, "monotonic"), (libc::CLOCK_BOOTTIME, "boottime")];
/// Far above any pause here and far below the difference between two hosts' uptimes in the test.
const JUMP: i64 = 60_000_000_000;

struct Clocks {
    last: [i64; 2],
    longest: [i64; 2],
    back: bool,
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let last = [sys::clock(CLOCKS[0].0)?, sys::clock(CLOCKS[1].0)?];
    Ok(Box::new(Clocks { last, longest: [0; 2], back: false }))
}

impl Guest for Clocks {
    fn step(&mut self) -> Result<()> {
        for (index, (clock, _)) in CLOCKS.iter().enumerate() {
            let now = sys::clock(*clock)?;
            self.back |= now < self.last[index];
            self.longest[index] = self.longest[index].max(now - self.last[index]);
            self.last[index] = now;
        }
        Ok(())
    }

    fn verify(&mut self) -> Result<()> {
        self.step()?;
        ensure!(!self.back, "a clock went back");
        for (index, (_, name)) in CLOCKS.iter().enumerate() {
            ensure!(self.longest[index] < JUMP, "{name} jumped by {} ns", self.longest[index]);
        }
        Ok(())
    }
}
