//! Device nodes that hold no state: null, zero, full, random, urandom. Terminals have a file of their own.

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub path: ByteBuf,
    pub major: u32,
    pub minor: u32,
}
