//! Pseudo-terminals in the pod's own devpts.

use crate::ids::PodPid;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub end: End,
    /// The N of /dev/pts/N.
    pub index: u32,
    /// The pod's terminal: the master is the monitor's.
    pub external: bool,
    /// Whose controlling terminal it is.
    pub session: Option<PodPid>,
    pub foreground: Option<PodPid>,
    /// With the first description of the pair.
    pub pair: Option<Pair>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    Master,
    Slave,
}

/// What both ends share.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pair {
    /// struct termios2 of the slave.
    pub termios: ByteBuf,
    /// Rows, columns, pixels.
    pub size: [u16; 4],
    pub packet_mode: bool,
    pub locked: bool,
    pub exclusive: bool,
    /// The master is closed: the slave hangs.
    pub hung_up: bool,
    pub owner: (u32, u32),
    pub mode: u32,
    /// Typed, not yet read by the slave.
    pub input: ByteBuf,
    /// Written by the slave, not yet read from the master.
    pub output: ByteBuf,
}
