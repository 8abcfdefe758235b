//! What is run in a pod to be measured: this program as something large, many, or busy.

use anyhow::{Context, Result, bail};
use nix::sys::eventfd::EventFd;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::time::TimeValLike;
use nix::time::{ClockId, clock_gettime};
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;

pub fn ready() -> Result<()> {
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
        "__mixed" => {
            let memory = mixed(number()? << 20);
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
        "__maps" => {
            // As large as those that the allocator maps one by one; every other goes, so that none touches the next.
            let mut all: Vec<Option<Vec<u8>>> =
                (0..number()? * 2).map(|_| Some(Vec::with_capacity(256 << 10))).collect();
            all.iter_mut().step_by(2).for_each(|one| *one = None);
            ready()?;
            std::hint::black_box(&all);
            rest()
        }
        "__files" => {
            let count = number()?;
            many_descriptors()?;
            let files = (0..count).map(|value| EventFd::from_value(value as u32)).collect::<nix::Result<Vec<_>>>()?;
            ready()?;
            std::hint::black_box(&files);
            rest()
        }
        "__connections" => {
            let count = number()?;
            many_descriptors()?;
            let listener = TcpListener::bind("127.0.0.1:0")?;
            let there = listener.local_addr()?;
            let pair = |_| Ok((TcpStream::connect(there)?, listener.accept()?.0));
            let pairs = (0..count / 2).map(pair).collect::<Result<Vec<_>>>()?;
            ready()?;
            std::hint::black_box(&pairs);
            rest()
        }
        "__echo" => crate::echo::serve(number()?),
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

pub fn many_descriptors() -> Result<()> {
    let hard = getrlimit(Resource::RLIMIT_NOFILE)?.1;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}

fn word(at: u64) -> u64 {
    at.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Pages that differ from each other, so that none can be left out.
pub fn fill(bytes: usize) -> Vec<u64> {
    (0..bytes as u64 / 8).map(word).collect()
}

const WORDS: usize = 512;

/// One as the kernel counts them.
#[repr(C, align(4096))]
struct Page([u64; WORDS]);

/// Of ten pages six are zeros, which were written, two were there already, and two differ from all others.
fn mixed(bytes: usize) -> Vec<Page> {
    let page = |number: usize| match number % 10 {
        0 | 5 => Page(std::array::from_fn(|at| word((number * WORDS + at) as u64))),
        1 | 6 => Page(std::array::from_fn(|at| word(at as u64))),
        _ => Page([0; WORDS]),
    };
    (0..bytes / size_of::<Page>()).map(page).collect()
}
