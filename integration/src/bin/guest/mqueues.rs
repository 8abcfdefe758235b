//! POSIX message queues: one that is open, with messages of several priorities and a time-out; one that nobody has open;
//! one that was removed and is open twice.

use crate::{Guest, sys};
use anyhow::{Context, Result, ensure};
use std::os::fd::{AsRawFd, OwnedFd};

struct Queues {
    open: OwnedFd,
    removed: [OwnedFd; 2],
    reader: OwnedFd,
}

/// In the order in which they are received.
const MESSAGES: [(u32, &[u8]); 4] = [(9, b"first"), (9, b""), (0, b"third"), (0, b"last")];
const RDWR: i32 = libc::O_RDWR | libc::O_CREAT;

fn fill(queue: &OwnedFd) -> Result<()> {
    // Those of a lower priority come first and stay behind.
    for (priority, text) in MESSAGES[2..].iter().chain(&MESSAGES[..2]) {
        sys::mq_send(queue.as_raw_fd(), *priority, text)?;
    }
    Ok(())
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let open = sys::mq_open(c"guest-open", RDWR | libc::O_NONBLOCK)?;
    fill(&open)?;
    fill(&sys::mq_open(c"guest-alone", RDWR)?)?;
    let removed = sys::mq_open(c"guest-removed", RDWR)?;
    let again = sys::mq_open(c"guest-removed", libc::O_RDONLY)?;
    sys::mq_unlink(c"guest-removed")?;
    fill(&removed)?;
    let reader = sys::mq_open(c"guest-alone", libc::O_RDONLY)?;
    Ok(Box::new(Queues { open, removed: [removed, again], reader }))
}

fn drain(name: &str, queue: &OwnedFd) -> Result<()> {
    for wanted in MESSAGES {
        let (priority, text) = sys::mq_receive(queue.as_raw_fd()).with_context(|| name.to_owned())?;
        ensure!((priority, &text[..]) == wanted, "{name} gives {priority} {text:?}, not {wanted:?}");
    }
    Ok(())
}

impl Guest for Queues {
    fn verify(&mut self) -> Result<()> {
        drain("the open queue", &self.open)?;
        ensure!(sys::mq_receive(self.open.as_raw_fd()).is_err(), "the open queue has more, or waits");
        let alone = sys::mq_open(c"guest-alone", libc::O_RDWR)?;
        drain("the other queue", &self.reader)?;
        ensure!(sys::mq_send(self.reader.as_raw_fd(), 0, b"x").is_err(), "one that may read writes");
        drain("the removed queue", &self.removed[1])?;
        ensure!(sys::mq_open(c"guest-removed", libc::O_RDONLY).is_err(), "the removed queue has a name");
        for queue in [&self.open, &alone, &self.removed[0]] {
            fill(queue)?;
        }
        Ok(())
    }
}
