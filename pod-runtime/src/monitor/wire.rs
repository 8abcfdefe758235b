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
    Attach {
        #[serde(default)]
        size: Option<Size>,
    },
    /// Starts a process in the pod. Unless detached, the connection carries frames of its stdio.
    Exec(Exec),
    /// Answered when the pod's first process has ended.
    Wait,
    /// Stops reading the pod's stdio until this connection closes; with `link` also takes the pod off the network.
    Hold {
        #[serde(default)]
        link: bool,
    },
    /// The pod lives on another host now: the copy here is killed, the tombstone set, everything removed.
    Moved {
        to: String,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    pub rows: u16,
    pub columns: u16,
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
    /// Attach: whether the pod has a terminal.
    #[serde(default)]
    pub terminal: bool,
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
    /// Of processes that `pod exec` started: master sides and pipe ends.
    #[serde(default)]
    pub others: Vec<i32>,
    /// Pids on this host of the processes that `pod exec` started.
    #[serde(default)]
    pub roots: Vec<i32>,
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
    Output = 16,
    Error = 17,
    /// The program's exit code, an i32. The last frame.
    Exit = 18,
    /// Words for the person, then the connection ends without an exit code: the pod was moved.
    Gone = 19,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Kind> {
        [Kind::Input, Kind::Resize, Kind::Output, Kind::Error, Kind::Exit, Kind::Gone]
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
