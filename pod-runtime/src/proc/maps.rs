//! /proc/PID/maps and /proc/PID/smaps.

/// One mapping.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Map {
    pub start: u64,
    pub end: u64,
    pub read: bool,
    pub write: bool,
    pub execute: bool,
    pub shared: bool,
    /// Bytes into the file.
    pub offset: u64,
    pub device: (u32, u32),
    pub inode: u64,
    /// As the kernel prints it, escapes undone: a path (with " (deleted)" when it is), "[stack]", "" for anonymous.
    pub name: String,
    /// The two-letter VmFlags of smaps; empty when read from maps.
    pub flags: Vec<[u8; 2]>,
    /// From smaps.
    pub protection_key: u32,
    /// From smaps, bytes: what is in memory, and this map's part of it when pages are divided among all that share them.
    pub resident: u64,
    pub proportional: u64,
    /// Of what is in memory, what is no file's.
    pub anonymous: u64,
    /// Bytes of a page, also of huge ones.
    pub page_bytes: u64,
}

impl Map {
    pub fn has(&self, flag: &[u8; 2]) -> bool {
        self.flags.contains(flag)
    }

    pub fn bytes(&self) -> u64 {
        self.end - self.start
    }

    /// Bytes of private memory that other processes have too, since a fork: so many more are needed when each has a copy of
    /// its own.
    pub fn shared_since_fork(&self) -> u64 {
        if self.shared || self.inode != 0 { 0 } else { self.resident.saturating_sub(self.proportional) }
    }
}

/// Parses either file; lines that are neither a map nor one of the known keys are skipped.
pub fn parse(text: &str) -> Vec<Map> {
    let mut maps: Vec<Map> = Vec::new();
    for line in text.lines() {
        // An address begins with a digit or a small letter, a key with a capital one: most lines are told by that.
        match line.as_bytes().first() {
            Some(b'A'..=b'Z') => {
                let Some(map) = maps.last_mut() else { continue };
                if let Some(flags) = line.strip_prefix("VmFlags:") {
                    map.flags = flags.split_ascii_whitespace().filter_map(|f| f.as_bytes().try_into().ok()).collect();
                } else if let Some(key) = line.strip_prefix("ProtectionKey:") {
                    map.protection_key = key.trim().parse().unwrap_or(0);
                } else if let Some(size) = line.strip_prefix("Rss:") {
                    map.resident = super::kibibytes(size).unwrap_or(0);
                } else if let Some(size) = line.strip_prefix("KernelPageSize:") {
                    map.page_bytes = super::kibibytes(size).unwrap_or(0);
                } else if let Some(size) = line.strip_prefix("Pss:") {
                    map.proportional = super::kibibytes(size).unwrap_or(0);
                } else if let Some(size) = line.strip_prefix("Anonymous:") {
                    map.anonymous = super::kibibytes(size).unwrap_or(0);
                }
            }
            _ => maps.extend(header(line)),
        }
    }
    maps
}

fn header(line: &str) -> Option<Map> {
    let mut rest = line;
    let mut word = || {
        rest = rest.trim_start_matches(' ');
        let (word, tail) = rest.split_once(' ').unwrap_or((rest, ""));
        rest = tail;
        word
    };
    let (start, end) = word().split_once('-')?;
    let permissions = word().as_bytes();
    let offset = word();
    let (major, minor) = word().split_once(':')?;
    let inode = word();
    let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    if permissions.len() != 4 || end <= start {
        return None;
    }
    Some(Map {
        start,
        end,
        read: permissions[0] == b'r',
        write: permissions[1] == b'w',
        execute: permissions[2] == b'x',
        shared: permissions[3] == b's',
        offset: u64::from_str_radix(offset, 16).ok()?,
        device: (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?),
        inode: inode.parse().ok()?,
        // The name starts at a fixed column; only a newline in it is escaped.
        name: rest.trim_start_matches(' ').replace("\\012", "\n"),
        flags: Vec::new(),
        protection_key: 0,
        resident: 0,
        proportional: 0,
        anonymous: 0,
        page_bytes: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_own_smaps() {
        let maps = parse(&std::fs::read_to_string("/proc/self/smaps").unwrap());
        let stack = maps.iter().find(|map| map.name == "[stack]").unwrap();
        assert!(stack.has(b"gd") && stack.write && !stack.shared);
        assert!(stack.resident > 0 && stack.proportional <= stack.resident && stack.anonymous == stack.resident);
        assert!(maps.windows(2).all(|pair| pair[0].end <= pair[1].start));
    }

    #[test]
    fn reads_a_line() {
        let maps = parse("7f00-7f10 r-xs 00001000 fe:01 12345                      /a b (deleted)\n");
        let map = &maps[0];
        assert_eq!((map.start, map.end, map.offset, map.device, map.inode), (0x7f00, 0x7f10, 0x1000, (0xfe, 1), 12345));
        assert_eq!(map.name, "/a b (deleted)");
        assert!(map.shared && map.execute && !map.write);
    }

    proptest! {
        #[test]
        fn never_panics(text in "(\\PC*\n)*") { parse(&text); }

        #[test]
        fn never_panics_on_headers(text in "[0-9a-f]{1,17}-[0-9a-f]{1,17} \\PC{0,6} [0-9a-f]* [0-9a-f]*:[0-9a-f]* [0-9]* \\PC*") { parse(&text); }
    }
}
