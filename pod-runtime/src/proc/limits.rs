//! /proc/PID/limits: the only way to read another's limits without CAP_SYS_RESOURCE.

/// Resource number of setrlimit(2), soft and hard; `u64::MAX` is unlimited.
pub type Limit = (u32, u64, u64);

const NAMES: [(&str, u32); 16] = [
    ("Max cpu time", 0),
    ("Max file size", 1),
    ("Max data size", 2),
    ("Max stack size", 3),
    ("Max core file size", 4),
    ("Max resident set", 5),
    ("Max processes", 6),
    ("Max open files", 7),
    ("Max locked memory", 8),
    ("Max address space", 9),
    ("Max file locks", 10),
    ("Max pending signals", 11),
    ("Max msgqueue size", 12),
    ("Max nice priority", 13),
    ("Max realtime priority", 14),
    ("Max realtime timeout", 15),
];

pub fn parse(text: &str) -> Vec<Limit> {
    text.lines()
        .filter_map(|line| {
            let (name, resource) = NAMES.iter().find(|(name, _)| line.starts_with(name))?;
            let mut words = line.get(name.len()..)?.split_ascii_whitespace();
            Some((*resource, value(words.next()?)?, value(words.next()?)?))
        })
        .collect()
}

fn value(word: &str) -> Option<u64> {
    if word == "unlimited" { Some(u64::MAX) } else { word.parse().ok() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_own() {
        assert_eq!(parse(&std::fs::read_to_string("/proc/self/limits").unwrap()).len(), 16);
    }

    proptest! {
        #[test]
        fn never_panics(text in "(\\PC*\n)*") { parse(&text); }
    }
}
