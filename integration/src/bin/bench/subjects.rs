//! What is run in a pod to be measured: this program as something large, many, or busy.

use anyhow::{Context, Result, bail};
use nix::sys::time::TimeValLike;
use nix::time::{ClockId, clock_gettime};
use std::io::Write;
use std::process::Command;
use std::time::Duration;

fn ready() -> Result<()> {
    println!("ready");
    Ok(std::io::stdout().flush()?)
}

fn rest() -> ! {
    loop {
        std::thread::sleep(Duration::from_secs(1_000_000));
    }
}

pub fn become_one(subject: &str, args: &[&str]) -> Result<()> {
    let number = || args.first().context("a number is missing")?.parse::<usize>().context("not a number");
    match subject {
        "__memory" => {
            let memory = fill(number()? << 20);
            ready()?;
            std::hint::black_box(&memory);
            rest()
        }
        "__processes" => {
            let us = std::env::current_exe()?;
            let children = (1..number()?).map(|_| Command::new(&us).arg("__rest").spawn());
            let children = children.collect::<std::io::Result<Vec<_>>>()?;
            ready()?;
            std::hint::black_box(&children);
            rest()
        }
        "__threads" => {
            for _ in 1..number()? {
                std::thread::Builder::new().stack_size(64 * 1024).spawn(|| rest())?;
            }
            ready()?;
            rest()
        }
        "__rest" => rest(),
        "__syscalls" => {
            let count = number()?;
            // Of the processor, not of the clock: who else runs meanwhile costs nothing.
            let clock = || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(|time| time.num_nanoseconds());
            let begun = clock()?;
            for _ in 0..count {
                std::hint::black_box(nix::unistd::getppid());
            }
            println!("{}", (clock()? - begun) as f64 / count as f64);
            Ok(())
        }
        other => bail!("no subject {other}"),
    }
}

/// Pages that differ from each other, so that none can be left out.
pub fn fill(bytes: usize) -> Vec<u64> {
    (0..bytes as u64 / 8).map(|at| at.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect()
}
