//! Threads: each works, sleeps on a futex, keeps its own name, thread-local memory and id.

use crate::{Guest, sys};
use anyhow::{Result, ensure};
use std::cell::Cell;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::spawn;
use std::time::Duration;

thread_local! {
    static OWN: Cell<i64> = const { Cell::new(0) };
}

struct Threads {
    workers: Vec<(Sender<()>, i64)>,
    answers: Receiver<(usize, i64, String)>,
}

fn name() -> String {
    std::fs::read_to_string("/proc/thread-self/comm").unwrap_or_default().trim().to_string()
}

fn tid() -> Result<i64, std::io::Error> {
    sys::call(libc::SYS_gettid, [0; 5])
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let (answer, answers) = channel();
    let mut workers = Vec::new();
    for index in 0..16 {
        let (ask, asked) = channel::<()>();
        let (tell, told) = channel();
        let answer: Sender<(usize, i64, String)> = answer.clone();
        spawn(move || {
            let _ = std::fs::write("/proc/thread-self/comm", format!("worker-{index}"));
            OWN.set(tid().unwrap_or(0));
            let _ = tell.send(OWN.get());
            while asked.recv().is_ok() {
                let same = if tid().ok() == Some(OWN.get()) { OWN.get() } else { -1 };
                let _ = answer.send((index, same, name()));
            }
        });
        workers.push((ask, told.recv()?));
    }
    Ok(Box::new(Threads { workers, answers }))
}

impl Guest for Threads {
    fn verify(&mut self) -> Result<()> {
        for (ask, _) in &self.workers {
            ask.send(())?;
        }
        for _ in 0..self.workers.len() {
            let (index, tid, name) = self.answers.recv_timeout(Duration::from_secs(10))?;
            ensure!(tid == self.workers[index].1, "thread {index} is now {tid}, was {}", self.workers[index].1);
            ensure!(name == format!("worker-{index}"), "thread {index} is called {name}");
        }
        Ok(())
    }
}
