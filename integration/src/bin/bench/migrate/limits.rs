//! What this machine can do at most, measured in the same run: its memory, the cable between two hosts, ssh, the disk.

use crate::memory;
use crate::table::{Table, ms};
use anyhow::{Context, Result};
use integration::bed::{Bed, Host};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::time::Instant;

const RUNS: usize = 5;
const GIB: usize = 1 << 30;
const PIECE: usize = 1 << 20;

/// Speeds in GiB/s, times in ms.
pub fn measure(bed: &Bed) -> Result<[Table; 2]> {
    let mut speeds = Table::new("limits of this machine: speeds", "GiB/s");
    memory::limits(&mut speeds)?;
    speeds.row("limit: copy of memory", copies());
    speeds.row("limit: TCP stream between the hosts", streams(bed)?);
    let handshakes = (0..RUNS).map(|_| through_ssh(bed.a(), "ssh hostB true")).collect::<Result<Vec<_>>>()?;
    let handshake = crate::table::median(&handshakes);
    let bulk = || through_ssh(bed.a(), &format!("head -c {GIB} /dev/zero | ssh hostB 'cat >/dev/null'"));
    let bulk = (0..RUNS).map(|_| Ok(1e3 / (bulk()? - handshake))).collect::<Result<_>>()?;
    speeds.row("limit: ssh, in bulk", bulk);
    let mut times = Table::new("limits of this machine: times", "ms");
    times.row("limit: a byte there and back over TCP", round_trips(bed)?);
    times.row("limit: ssh to the other host and back", handshakes);
    times.row("limit: 4 KiB to the disk (fsync)", to_the_disk(bed)?);
    Ok([speeds, times])
}

fn copies() -> Vec<f64> {
    let from = vec![1u8; GIB / 2];
    let mut to = vec![2u8; GIB / 2];
    let mut once = || {
        let begun = Instant::now();
        to.copy_from_slice(std::hint::black_box(&from));
        std::hint::black_box(&to);
        0.5 / begun.elapsed().as_secs_f64()
    };
    (0..RUNS).map(|_| once()).collect()
}

/// Two ends of a connection from the first host to the second, each used by a thread of that host.
fn between(
    bed: &Bed,
    first: impl FnOnce(TcpStream) -> Result<Vec<f64>> + Send + 'static,
    second: impl FnOnce(TcpStream) -> Result<()> + Send + 'static,
) -> Result<Vec<f64>> {
    let (tell, told) = std::sync::mpsc::channel::<SocketAddr>();
    let address = bed.b().address();
    let there = bed.b().thread(move || {
        let listener = TcpListener::bind((address, 0))?;
        tell.send(listener.local_addr()?)?;
        second(listener.accept()?.0)
    })?;
    let here = bed.a().thread(move || {
        let stream = TcpStream::connect(told.recv()?)?;
        stream.set_nodelay(true)?;
        first(stream)
    })?;
    let measured = here.join().ok().context("a measuring thread panicked")??;
    there.join().ok().context("a measuring thread panicked")??;
    Ok(measured)
}

fn streams(bed: &Bed) -> Result<Vec<f64>> {
    let send = |mut stream: TcpStream| {
        let piece = vec![1; PIECE];
        let mut once = || {
            let begun = Instant::now();
            (0..GIB / PIECE).try_for_each(|_| stream.write_all(&piece))?;
            stream.read_exact(&mut [0])?;
            Ok(1.0 / begun.elapsed().as_secs_f64())
        };
        (0..RUNS).map(|_| once()).collect()
    };
    let take = |mut stream: TcpStream| {
        let mut piece = vec![0; PIECE];
        for _ in 0..RUNS {
            (0..GIB / PIECE).try_for_each(|_| stream.read_exact(&mut piece))?;
            stream.write_all(&[1])?;
        }
        Ok(())
    };
    between(bed, send, take)
}

fn round_trips(bed: &Bed) -> Result<Vec<f64>> {
    const COUNT: usize = 1000;
    let ask = |mut stream: TcpStream| {
        let mut once = || {
            let begun = Instant::now();
            stream.write_all(&[1])?;
            stream.read_exact(&mut [0])?;
            Ok(ms(begun.elapsed()))
        };
        (0..COUNT).map(|_| once()).collect()
    };
    let answer = |mut stream: TcpStream| {
        stream.set_nodelay(true)?;
        (0..COUNT).try_for_each(|_| {
            stream.read_exact(&mut [0])?;
            Ok(stream.write_all(&[1])?)
        })
    };
    between(bed, ask, answer)
}

fn through_ssh(host: &Host, line: &str) -> Result<f64> {
    let begun = Instant::now();
    host.run(&["sh", "-c", line])?;
    Ok(ms(begun.elapsed()))
}

fn to_the_disk(bed: &Bed) -> Result<Vec<f64>> {
    let path = bed.shared().join("fsync");
    let file = std::fs::File::create(&path)?;
    let once = |_| {
        let begun = Instant::now();
        file.write_all_at(&[1; 4096], 0)?;
        file.sync_all()?;
        Ok(ms(begun.elapsed()))
    };
    let times = (0..20).map(once).collect::<Result<_>>()?;
    std::fs::remove_file(&path)?;
    Ok(times)
}
