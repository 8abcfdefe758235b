//! Text of /proc into structs. Pure but for [`read`]: anything that does not parse is `None` or left out, and
//! nothing panics whatever the text (a process chooses its own name and its mapped paths).

pub mod btf;
pub mod fdinfo;
pub mod limits;
pub mod maps;
pub mod mountinfo;
pub mod stat;
pub mod status;
pub mod timers;

/// How many bytes a line `NAME    12 kB` of a text says, as /proc/meminfo and /proc/PID/status have them.
pub fn amount(text: &str, name: &str) -> Option<u64> {
    kibibytes(text.lines().find_map(|line| line.strip_prefix(name))?)
}

/// "    132 kB"
fn kibibytes(text: &str) -> Option<u64> {
    let number = text.trim().strip_suffix(" kB")?;
    number.trim_end().parse::<u64>().ok().map(|number| number.saturating_mul(1024))
}

/// The text of a file in /proc. The kernel makes the text anew for each read, so one with much room is cheaper than many
/// that grow (as std's, which trusts the size of 0 that such files have). What is not UTF-8 is replaced.
pub fn read(path: impl AsRef<std::path::Path>) -> std::io::Result<String> {
    let bytes = bytes(path)?;
    Ok(String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
}

/// The same as it is.
pub fn bytes(path: impl AsRef<std::path::Path>) -> std::io::Result<Vec<u8>> {
    use std::cell::Cell;
    use std::io::Read;
    thread_local! {
        /// Room that is reused: to make it costs more than to read most files.
        static ROOM: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
    }
    /// More is not kept.
    const KEPT: usize = 256 << 10;
    let mut file = std::fs::File::open(path)?;
    let mut room = ROOM.take();
    if room.is_empty() {
        room.resize(16 << 10, 0);
    }
    let mut length = 0;
    loop {
        match file.read(&mut room[length..])? {
            0 => break,
            count => length += count,
        }
        if room.len() - length < 4096 {
            room.resize(room.len() * 4, 0);
        }
    }
    let bytes = room[..length].to_vec();
    if room.len() <= KEPT {
        ROOM.set(room);
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_bytes() {
        let text =
            "MemTotal:       16 kB\nMemAvailable:   12345 kB\nHugePages_Total:       3\nFar: 99999999999999999 kB\n";
        assert_eq!(amount(text, "MemAvailable:"), Some(12345 << 10));
        assert_eq!(amount(text, "Far:"), Some(u64::MAX));
        for none in ["HugePages_Total:", "MemFree:"] {
            assert_eq!(amount(text, none), None);
        }
    }
}
