//! signalfd(2): only its mask; what it would read are the pending signals of the task that reads.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub mask: u64,
}
