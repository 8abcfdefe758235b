//! monitor
pub mod log;
