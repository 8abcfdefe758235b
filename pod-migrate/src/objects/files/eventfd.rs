//! eventfd(2). Everything is in its fdinfo.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub count: u64,
    pub semaphore: bool,
}
