//! A redis with 1 GiB that comes back from a checkpoint, all at once or lazily: when it answers, and when it is whole.

use crate::moving::{self, ADDRESS};
use crate::pod;
use crate::report::Report;
use crate::table::{Table, ms};
use anyhow::Result;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

const RUNS: usize = 5;
const FILE: &str = "/dev/shm/redis";

/// What redis says to a line. It may be on its way.
fn ask(words: &str) -> Result<String> {
    let socket = format!("{ADDRESS}:6379").parse()?;
    let mut stream = TcpStream::connect_timeout(&socket, Duration::from_secs(5))?;
    stream.write_all(words.as_bytes())?;
    let mut answer = [0; 64];
    let count = stream.read(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer[..count]).into_owned())
}

/// Restores it; milliseconds from the beginning of the command until that ends, until redis has answered, until all of its
/// memory is there.
fn restored(how: &[&str]) -> Result<[f64; 3]> {
    let begun = Instant::now();
    pod(&[&["restore", "-i", FILE], how].concat())?;
    let ended = begun.elapsed();
    // A value of 1000 bytes out of the middle of its memory. Not before: the kernel asks again for an address that nobody has
    // only after a second.
    let answered = integration::wait::until("redis to answer", Duration::from_secs(60), || {
        ask("GET key:460000\r\n").ok().filter(|answer| answer.starts_with("$1000")).map(|_| begun.elapsed())
    })?;
    let whole = || pod(&["inspect", "-f", "{{.MemoryToCome}}", "redis"]).is_ok_and(|(word, _)| word.trim() == "false");
    integration::wait::until_true("all memory to be there", Duration::from_secs(60), whole)?;
    Ok([ms(ended), ms(answered), ms(begun.elapsed())])
}

pub fn lazily(report: &mut Report) -> Result<()> {
    moving::start()?;
    pod(&["checkpoint", "create", "redis", "-e", FILE, "--compress", "none"])?;
    let mut table =
        Table::new("restore of redis with 1 GiB, file in /dev/shm, from the beginning of the command on", "ms");
    for (name, how) in [("at once", &[][..]), ("lazily", &["--lazy"][..])] {
        let mut runs = Vec::new();
        for _ in 0..RUNS {
            pod(&["rm", "-f", "redis"])?;
            runs.push(restored(how)?);
        }
        for (at, what) in ["the command ends", "it has answered", "its memory is there"].iter().enumerate() {
            let value = table.row(&format!("{name}: {what}"), runs.iter().map(|run| run[at]).collect());
            if name == "lazily" && at == 1 {
                report.aim("1 GiB, restored lazily: first request", 20.0, "ms", value);
            }
        }
    }
    pod(&["rm", "-f", "redis"])?;
    std::fs::remove_file(FILE)?;
    report.add(table);
    Ok(())
}
