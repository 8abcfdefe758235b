//! Pipes and FIFOs.
//!
//! Contents are copied by tee(2) into a pipe of ours, which consumes nothing.

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Ends of one pipe share this.
    pub pipe: u64,
    /// For a FIFO: where it is. None is an anonymous pipe.
    pub path: Option<ByteBuf>,
    /// The pipe is the pod's stdin (0), stdout (1) or stderr (2): the other end is the monitor's.
    pub external: Option<u8>,
    /// With the first end.
    pub buffer: Option<Buffer>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Buffer {
    /// As F_GETPIPE_SZ.
    pub capacity: u32,
    /// In the order of reading; each a packet when the pipe is in packet mode, else one piece.
    pub packets: Vec<ByteBuf>,
}
