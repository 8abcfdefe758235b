//! Text of /proc into structs. Pure: no file is opened here, anything that does not parse is `None` or left out, and
//! nothing panics whatever the text (a process chooses its own name and its mapped paths).

pub mod fdinfo;
pub mod limits;
pub mod maps;
pub mod mountinfo;
pub mod stat;
pub mod status;
pub mod timers;
