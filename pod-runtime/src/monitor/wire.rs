//! What goes over a pod's control socket.
//!
//! A client sends one [`Request`] as a line of JSON and gets one [`Reply`] as a line of JSON. After the reply to
//! `attach` and `exec` both sides send frames: kind (one byte), length (four bytes, little endian), payload.
//! Requests come from root only (the socket is 0600), but lengths are bounded all the same.

use crate::problem::{Problem, Report, Result};
use crate::spec::User;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::path::PathBuf;

/// A request line or a frame longer than this is refused.
pub const MAX: usize = 1 << 20;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Request {
    Ping,
    /// From now on this connection carries frames of the pod's stdio.
    Attach(Attach),
    /// Starts a process in the pod. Unless detached, the connection carries frames of its stdio.
    Exec(Exec),
    /// What `pod exec` started and is there, or has ended unheard.
    Sessions,
    /// Answered when the pod's first process has ended.
    Wait,
    /// Stops reading the pod's stdio until this connection closes; with `link` also takes the pod off the network. With `leaving`
    /// the neighbours may be told meanwhile that the pod is elsewhere: they are told again when the hold ends.
    Hold {
        #[serde(default)]
        link: bool,
        #[serde(default)]
        leaving: bool,
    },
    /// So many millionths of a CPU are all that the pod gets until this connection closes. May be said again, for less.
    Throttle {
        cpu: u64,
    },
    /// Of the connection that holds or throttles the pod: ends that, and is answered when the pod is back on the network, or
    /// has the CPU limit that it had.
    Release,
    /// The pod lives on another host now: the copy here is killed, the tombstone set, everything removed.
    Moved {
        to: String,
        /// Only if it was stopped for good for this job.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        job: Option<String>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    pub rows: u16,
    pub columns: u16,
}

/// Whose stdio, and from where on.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Attach {
    #[serde(default)]
    pub size: Option<Size>,
    /// A session of `pod exec` instead of the pod's own stdio.
    #[serde(default)]
    pub session: Option<u64>,
    /// Who was attached before the pod moved: everything that the log has from here on.
    #[serde(default)]
    pub from: Option<u64>,
    /// Comes back after a move: the program is not made to draw its screen anew.
    #[serde(default)]
    pub again: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Exec {
    pub args: Vec<String>,
    /// Complete.
    pub env: Vec<String>,
    pub cwd: PathBuf,
    pub user: User,
    /// A pty of the pod's devpts; its size.
    #[serde(default)]
    pub terminal: Option<Size>,
    #[serde(default)]
    pub interactive: bool,
    #[serde(default)]
    pub detach: bool,
    #[serde(default)]
    pub privileged: bool,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Reply {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<Report>,
    /// The monitor (ping, hold), the process started (exec).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// Hold: the length of the log, complete up to the freeze.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log: Option<u64>,
    /// Hold: the monitor's descriptors that the pod's stdio ends in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ends: Option<Ends>,
    /// Hold: the end of it opens the pod's port in the bridge, if it was locked or muted meanwhile.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub opens_port: bool,
    /// Attach: whether the program has a terminal, and reads what is typed.
    #[serde(default)]
    pub terminal: bool,
    #[serde(default)]
    pub interactive: bool,
    /// Exec: the session's number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<u64>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sessions: Vec<About>,
}

/// What `pod exec` started, as people and other hosts know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// Of this pod; stays when the pod moves.
    pub id: u64,
    /// In the pod.
    pub pid: i32,
    pub command: Vec<String>,
    pub uid: u32,
    pub terminal: bool,
    pub interactive: bool,
    /// Seconds since the epoch.
    pub started: u64,
    /// Somebody sees it.
    pub attached: bool,
    /// It has ended, and nobody was told.
    #[serde(default)]
    pub exit_code: Option<i32>,
}

/// What a client needs to know to go on where the pod lives now; the payload of [`Kind::Gone`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gone {
    pub to: String,
    /// How many of the bytes that it typed the program has got.
    pub typed: u64,
    /// How many of its signals were delivered.
    pub signals: u64,
    /// Everything up to here in the log was shown.
    pub log: u64,
}

impl Gone {
    pub fn to_bytes(&self) -> Vec<u8> {
        // Plain data: it cannot fail.
        serde_json::to_vec(self).unwrap_or_default()
    }

    pub fn from_bytes(bytes: &[u8]) -> Gone {
        serde_json::from_slice(bytes).unwrap_or_default()
    }
}

/// Numbers of descriptors in the monitor.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ends {
    /// Master side of the pod's terminal.
    #[serde(default)]
    pub console: Option<i32>,
    /// The write end of the pod's stdin, the read ends of its stdout and stderr.
    #[serde(default)]
    pub stdin: Option<i32>,
    #[serde(default)]
    pub stdout: Option<i32>,
    #[serde(default)]
    pub stderr: Option<i32>,
    /// Read ends that nobody listens to.
    #[serde(default)]
    pub others: Vec<i32>,
    #[serde(default)]
    pub sessions: Vec<SessionEnds>,
}

/// The same of a session of `pod exec`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionEnds {
    pub about: About,
    /// Master side of its terminal, or pipe ends: stdin, stdout, stderr. None of one that has ended.
    pub numbers: [Option<i32>; 4],
}

impl Reply {
    pub fn problem(problem: &Problem) -> Reply {
        Reply { problem: Some(problem.report()), ..Reply::default() }
    }

    pub fn into_result(self) -> Result<Reply> {
        match self.problem {
            Some(report) => Err(report.into()),
            None => Ok(self),
        }
    }
}

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// From the client: bytes typed; an empty one is end of file.
    Input = 1,
    /// From the client: the size of its terminal, two u16 (rows, columns).
    Resize = 2,
    /// From the client: the number of a signal for the program, an i32.
    Signal = 3,
    Output = 16,
    Error = 17,
    /// The program's exit code, an i32. The last frame.
    Exit = 18,
    /// The pod was moved ([`Gone`]); the connection ends without an exit code.
    Gone = 19,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Kind> {
        [Kind::Input, Kind::Resize, Kind::Signal, Kind::Output, Kind::Error, Kind::Exit, Kind::Gone]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// Appends a frame.
pub fn put(out: &mut VecDeque<u8>, kind: Kind, payload: &[u8]) {
    for piece in payload.chunks(MAX).chain(payload.is_empty().then_some(payload)) {
        out.push_back(kind as u8);
        out.extend((piece.len() as u32).to_le_bytes());
        out.extend(piece);
    }
}

/// Takes a whole frame off the front of `input`; `None` when there is not yet one, an error when there never will be.
pub fn take(input: &mut Vec<u8>) -> Result<Option<(Kind, Vec<u8>)>> {
    let Some((head, rest)) = input.split_at_checked(5) else { return Ok(None) };
    let length = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
    let kind = Kind::from_byte(head[0]).filter(|_| length <= MAX);
    let Some(kind) = kind else { return Err(Problem::new("E-MONITOR", "the control socket carries something else")) };
    let Some(payload) = rest.get(..length) else { return Ok(None) };
    let payload = payload.to_vec();
    input.drain(..5 + length);
    Ok(Some((kind, payload)))
}

impl Size {
    pub fn to_bytes(self) -> [u8; 4] {
        let (r, c) = (self.rows.to_le_bytes(), self.columns.to_le_bytes());
        [r[0], r[1], c[0], c[1]]
    }

    pub fn from_bytes(bytes: &[u8]) -> Option<Size> {
        let [a, b, c, d] = *bytes else { return None };
        Some(Size { rows: u16::from_le_bytes([a, b]), columns: u16::from_le_bytes([c, d]) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn frames_come_whole_or_not_at_all() {
        let mut out = VecDeque::new();
        put(&mut out, Kind::Output, b"hello");
        put(&mut out, Kind::Input, b"");
        let all: Vec<u8> = out.into();
        let mut input = Vec::new();
        let mut got = Vec::new();
        for byte in all {
            input.push(byte);
            while let Some(frame) = take(&mut input).unwrap() {
                got.push(frame);
            }
        }
        assert_eq!(got, [(Kind::Output, b"hello".to_vec()), (Kind::Input, vec![])]);
    }

    #[test]
    fn a_long_payload_is_several_frames() {
        let mut out = VecDeque::new();
        put(&mut out, Kind::Output, &vec![7; MAX + 1]);
        let mut input: Vec<u8> = out.into();
        assert_eq!(take(&mut input).unwrap().unwrap().1.len(), MAX);
        assert_eq!(take(&mut input).unwrap().unwrap().1.len(), 1);
    }

    proptest! {
        #[test]
        fn garbage_is_refused_or_waited_for(mut bytes: Vec<u8>) {
            while let Ok(Some(_)) = take(&mut bytes) {}
        }

        #[test]
        fn sizes(rows: u16, columns: u16) {
            let size = Size { rows, columns };
            prop_assert_eq!(Size::from_bytes(&size.to_bytes()), Some(size));
        }
    }
}
