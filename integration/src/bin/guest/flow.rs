//! Data that flows inside the pod at the moment of a freeze: a TCP connection over loopback whose sender is paced, so that
//! the kernel goes on sending while the programs stand still, and unix connections that are written to before they
//! are accepted. Each stream is a count that its reader checks byte for byte.

use crate::{Guest, sys, until};
use anyhow::{Result, ensure};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

/// SO_MAX_PACING_RATE, in bytes a second: a segment now and then, always more queued than sent.
const PACE: i32 = 4_000_000;
const NAME: &str = "/tmp/flow";

static BYTES: AtomicU64 = AtomicU64::new(0);
static ACCEPTED: AtomicU64 = AtomicU64::new(0);
static WRONG: Mutex<Option<String>> = Mutex::new(None);

/// A thread that ends only when something is wrong.
fn forever(work: impl FnOnce() -> Result<()> + Send + 'static) {
    std::thread::spawn(move || {
        let why = match work() {
            Ok(()) => "a stream ended".into(),
            Err(error) => format!("{error:#}"),
        };
        WRONG.lock().expect("nobody panics").get_or_insert(why);
    });
}

fn count(mut stream: TcpStream) -> Result<()> {
    for number in 0u64.. {
        stream.write_all(&number.to_le_bytes().repeat(512))?;
    }
    Ok(())
}

fn check(mut stream: TcpStream) -> Result<()> {
    let mut piece = [0; 4096];
    for number in 0u64.. {
        stream.read_exact(&mut piece)?;
        ensure!(piece == number.to_le_bytes().repeat(512)[..], "other bytes in piece {number}");
        BYTES.fetch_add(piece.len() as u64, SeqCst);
    }
    Ok(())
}

fn call() -> Result<()> {
    for number in 0u64.. {
        let mut stream = UnixStream::connect(NAME)?;
        stream.write_all(&number.to_le_bytes())?;
        let mut answer = [0; 8];
        stream.read_exact(&mut answer)?;
        ensure!(answer == number.to_le_bytes(), "the answer to {number} is {answer:?}");
        ACCEPTED.fetch_add(1, SeqCst);
        std::thread::sleep(Duration::from_millis(3));
    }
    Ok(())
}

fn answer(listener: &UnixListener) -> Result<()> {
    loop {
        // A server that is busy: half of the time somebody waits, who has written already.
        std::thread::sleep(Duration::from_millis(3));
        let mut number = [0; 8];
        let mut stream = listener.accept()?.0;
        stream.read_exact(&mut number)?;
        stream.write_all(&number)?;
    }
}

struct Flow;

pub fn set_up() -> Result<Box<dyn Guest>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let sender = TcpStream::connect(listener.local_addr()?)?;
    let receiver = listener.accept()?.0;
    sys::set_option(sender.as_raw_fd(), libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE, &PACE.to_ne_bytes())?;
    forever(move || count(sender));
    forever(move || check(receiver));
    let listener = UnixListener::bind(NAME)?;
    forever(move || answer(&listener));
    forever(call);
    Ok(Box::new(Flow))
}

impl Guest for Flow {
    fn verify(&mut self) -> Result<()> {
        let (bytes, accepted) = (BYTES.load(SeqCst), ACCEPTED.load(SeqCst));
        let moved = || BYTES.load(SeqCst) > bytes + 1_000_000 && ACCEPTED.load(SeqCst) > accepted + 10;
        let wrong = || WRONG.lock().expect("nobody panics").clone();
        let went = until("more to have gone over", || moved() || wrong().is_some());
        let now = format!("{} bytes, {} answers", BYTES.load(SeqCst) - bytes, ACCEPTED.load(SeqCst) - accepted);
        ensure!(wrong().is_none(), "{:?}", wrong());
        ensure!(went.is_ok(), "not within ten seconds: {now} more");
        Ok(())
    }
}
