//! Which way goes what the source sends: directly where the hosts reach each other, else through ssh.
//!
//! ```text
//! source                              destination
//!        ──── DIRECT (its key) ────▶  listens
//!        ◀──── DOOR, or NO DOOR ────
//!        ════ TLS handshake ════════  each knows the other's key; the source is told so
//!        ──── COMES directly ──────▶  the last word through ssh
//!        ════ all that follows ═════
//! ```
//!
//! A source that does not get there says that it comes through ssh, and does. A daemon in ssh's place is the same.

use super::protocol::{Answer, DIRECT, Say};
use crate::link::dial::Scheme;
use crate::link::direct::{self, Listening};
use crate::link::tls::Key;
use crate::link::{Link, PROTOCOL};
use pod_runtime::{Problem, Result};
use serde::{Deserialize, Serialize};

/// How the source's bytes get there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    #[default]
    Ssh,
    /// As ssh, by a daemon.
    Daemon,
    Tls,
}

impl From<Scheme> for Transport {
    fn from(scheme: Scheme) -> Transport {
        match scheme {
            Scheme::Ssh => Transport::Ssh,
            Scheme::Daemon => Transport::Daemon,
        }
    }
}

/// Source: takes the direct way if there is one, and says what the operator should know if not.
pub(super) fn seek(link: &mut Link, scheme: Scheme, host: &str) -> Result<(Transport, Option<String>)> {
    match link.direct {
        true => return Ok((Transport::Tls, None)),
        false if link.protocol < DIRECT => return Ok((scheme.into(), None)),
        false => {}
    }
    let key = Key::new()?;
    link.say(&Say::Direct { key: key.public() })?;
    let door = match link.hear()? {
        Answer::Door(door) => door,
        Answer::NoDoor(report) => {
            return Ok((scheme.into(), Some(direct::tunnelled(scheme, host, &report.into()))));
        }
        _ => return Err(Problem::new(PROTOCOL, "the answer to DIRECT was something else")),
    };
    let connected = link.connect(&door, &key);
    link.say(&Say::Comes { directly: connected.is_ok() })?;
    match connected {
        Ok(direct) => link.go(direct).map(|()| (Transport::Tls, None)),
        Err(problem) => Ok((scheme.into(), Some(direct::tunnelled(scheme, host, &problem)))),
    }
}

/// Destination: the next word that is not about this.
pub(super) fn hear(link: &mut Link) -> Result<Say> {
    loop {
        match link.hear()? {
            Say::Direct { key } if !link.direct => open(link, &key)?,
            other => return Ok(other),
        }
    }
}

fn open(link: &mut Link, source: &[u8]) -> Result<()> {
    let (mut listening, door) = match Listening::open(source) {
        Ok(open) => open,
        Err(problem) => return link.say(&Answer::NoDoor(problem.report())),
    };
    link.say(&Answer::Door(door))?;
    link.serve_until_heard(&mut listening)?;
    match link.hear()? {
        Say::Comes { directly: true } => link.come(listening),
        Say::Comes { directly: false } => Ok(()),
        _ => Err(Problem::new(PROTOCOL, "something else came where COMES was due")),
    }
}
