//! Bytes between two hosts.
//!
//! A [`Link`] is a record stream in each direction over a pair of descriptors. ssh makes them ([`dial`]): it
//! authenticates with the user's own keys, encrypts, and starts the far side; or the other host's [`daemon`] does. Whoever waits on a link waits no longer
//! than [`SILENCE`]; both sides send filler when they have nothing to say for a while.
//!
//! ssh is slow. Where the hosts reach each other, what the source sends goes over a connection of its own ([`direct`]) once both
//! have agreed on it.

mod channel;
pub mod daemon;
pub mod dial;
pub mod direct;
pub mod tls;

pub use channel::{ABORTED, Incoming, Interrupt, Outgoing, TIMEOUT};

use self::direct::{Door, Listening};
use self::tls::{Key, Session};
use crate::image::{Kind, Reader, Writer};
use pod_runtime::{Doing, Problem, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

/// The link broke, or could not be made.
pub const LINK: &str = "E-LINK";
/// The other side said something that does not belong here.
pub const PROTOCOL: &str = "E-PROTOCOL";

/// A peer that says nothing for this long is gone.
pub const SILENCE: Duration = Duration::from_secs(30);

/// Both directions between two hosts.
pub struct Link {
    pub reader: Reader<Incoming>,
    pub writer: Writer<Outgoing>,
    /// The protocol that both sides speak, once they have said hello.
    pub protocol: u32,
    /// What the source says goes past ssh.
    pub direct: bool,
}

impl Link {
    /// Exchanges stream headers with the other side. `peer` is its name, for messages.
    pub fn open(from: OwnedFd, to: OwnedFd, peer: &str, interrupt: Option<Interrupt>) -> Result<Link> {
        let incoming = Incoming::new(from, peer, interrupt.clone())?;
        let outgoing = Outgoing::new(to, peer, interrupt)?;
        let mut writer = Writer::new(outgoing);
        writer.flush()?;
        let reader = Reader::new(incoming).map_err(|problem| not_pod(problem, peer))?;
        Ok(Link { reader, writer, protocol: 0, direct: false })
    }

    /// Says one thing, at once.
    pub fn say<T: Serialize>(&mut self, message: &T) -> Result<()> {
        self.writer.put(Kind::MESSAGE, 0, message)?;
        self.writer.flush()
    }

    /// Waits for the next thing that the other side says.
    pub fn hear<T: DeserializeOwned>(&mut self) -> Result<T> {
        hear(&mut self.reader)
    }

    /// Source: goes to where the destination listens. An interrupt ends it.
    pub fn connect(&mut self, door: &Door, key: &Key) -> Result<Session> {
        let outgoing = self.writer.sink()?;
        direct::connect(door, key, |fd, end| outgoing.readable(fd, end)).map_err(|e| direct::unreached(door, e))
    }

    /// Source: what is said from now on goes this way.
    pub fn go(&mut self, direct: Session) -> Result<()> {
        self.writer.sink()?.switch(direct);
        self.direct = true;
        Ok(())
    }

    /// Destination: serves whoever comes by the other way until the source says something by this one.
    pub fn serve_until_heard(&mut self, listening: &mut Listening) -> Result<()> {
        match self.reader.is_ahead() {
            true => Ok(()),
            false => self.reader.get_mut().serve_until_heard(listening).doing(|| "wait for the source".into()),
        }
    }

    /// Destination: what the source says from now on comes by the other way.
    pub fn come(&mut self, listening: Listening) -> Result<()> {
        match self.reader.is_ahead() {
            true => Err(Problem::new(PROTOCOL, "the source went on by the way that it had left")),
            false => {
                self.direct = true;
                self.reader.get_mut().switch(listening)
            }
        }
    }

    /// Waits until the other side says something (true), or something else can be read (false); no longer than that (None).
    pub fn heard_or(&mut self, beside: &[BorrowedFd<'_>], patience: Duration) -> Result<Option<bool>> {
        if self.reader.is_ahead() {
            return Ok(Some(true));
        }
        let heard = self.reader.get_mut().heard_or(beside, patience);
        heard.map_err(|error| {
            let other = |error| Problem::new(LINK, "wait for the other side").because(error);
            error.downcast::<Problem>().unwrap_or_else(other)
        })
    }

    /// All that it is made of, for a process that keeps nothing else.
    pub fn descriptors(&mut self) -> Vec<RawFd> {
        let mut all = self.reader.get_mut().descriptors();
        all.extend(self.writer.sink().map(|sink| sink.descriptors()).unwrap_or_default());
        all
    }

    /// From now on this ends a wait.
    pub fn interrupted_by(&mut self, interrupt: &Interrupt) -> Result<()> {
        self.reader.get_mut().interrupted_by(interrupt.clone());
        self.writer.sink()?.interrupted_by(interrupt.clone());
        Ok(())
    }

    /// From now on an interrupt no longer ends a wait: there is no way back.
    pub fn past_interrupts(&mut self) {
        self.reader.get_mut().deaf();
        if let Ok(sink) = self.writer.sink() {
            sink.deaf();
        }
    }

    /// Waits this long at most for the other side's next word.
    pub fn patience(&mut self, patience: Duration) {
        self.reader.get_mut().patience(patience);
    }
}

/// As [`Link::hear`], while the other direction is in use.
pub fn hear<T: DeserializeOwned>(reader: &mut Reader<Incoming>) -> Result<T> {
    let Some(record) = reader.next()? else {
        return Err(Problem::new(PROTOCOL, "the other side ended its stream instead of answering"));
    };
    if record.kind != Kind::MESSAGE {
        return Err(Problem::new(PROTOCOL, format!("a {} record where a message was due", record.kind)));
    }
    record.state().code(PROTOCOL, || "understand the other side".into())
}

/// What answered was not `pod`: mostly a shell that prints something when it starts.
fn not_pod(problem: Problem, peer: &str) -> Problem {
    if problem.code() != crate::image::DAMAGED {
        return problem;
    }
    Problem::new(LINK, format!("what answers on {peer} is not pod"))
        .because(problem)
        .fix(format!("`ssh {peer} pod --version` must print the version and nothing else; see --remote-pod"))
}
