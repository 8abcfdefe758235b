//! /proc/PID/status.

/// The lines that the engine needs. Numbers that are missing are zero.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// comm, at most 15 bytes.
    pub name: Vec<u8>,
    pub umask: u32,
    pub state: char,
    pub tgid: i32,
    pub pid: i32,
    pub parent: i32,
    pub tracer: i32,
    /// Real, effective, saved, file system.
    pub uids: [u32; 4],
    pub gids: [u32; 4],
    pub groups: Vec<u32>,
    /// The pid in each pid namespace, outermost first.
    pub ns_tgid: Vec<i32>,
    pub ns_pid: Vec<i32>,
    pub ns_group: Vec<i32>,
    pub ns_session: Vec<i32>,
    /// KiB.
    pub locked: u64,
    pub pending: u64,
    pub shared_pending: u64,
    pub blocked: u64,
    pub ignored: u64,
    pub caught: u64,
    pub inheritable: u64,
    pub permitted: u64,
    pub effective: u64,
    pub bounding: u64,
    pub ambient: u64,
    pub no_new_privileges: bool,
    /// 0 off, 1 strict, 2 filters.
    pub seccomp: u32,
    pub seccomp_filters: u32,
    /// How often it went to sleep.
    pub voluntary_switches: u64,
}

pub fn parse(text: &str) -> Status {
    let mut status = Status::default();
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else { continue };
        if key == "Name" {
            status.name = unescape(value.strip_prefix('\t').unwrap_or(value));
        }
        let value = value.trim();
        match key {
            "Umask" => status.umask = u32::from_str_radix(value, 8).unwrap_or(0),
            "State" => status.state = value.chars().next().unwrap_or('?'),
            "Tgid" => status.tgid = number(value),
            "Pid" => status.pid = number(value),
            "PPid" => status.parent = number(value),
            "TracerPid" => status.tracer = number(value),
            "Uid" => status.uids = four(value),
            "Gid" => status.gids = four(value),
            "Groups" => status.groups = list(value),
            "NStgid" => status.ns_tgid = list(value),
            "NSpid" => status.ns_pid = list(value),
            "NSpgid" => status.ns_group = list(value),
            "NSsid" => status.ns_session = list(value),
            "VmLck" => status.locked = number(value.trim_end_matches("kB").trim()),
            "SigPnd" => status.pending = hex(value),
            "ShdPnd" => status.shared_pending = hex(value),
            "SigBlk" => status.blocked = hex(value),
            "SigIgn" => status.ignored = hex(value),
            "SigCgt" => status.caught = hex(value),
            "CapInh" => status.inheritable = hex(value),
            "CapPrm" => status.permitted = hex(value),
            "CapEff" => status.effective = hex(value),
            "CapBnd" => status.bounding = hex(value),
            "CapAmb" => status.ambient = hex(value),
            "NoNewPrivs" => status.no_new_privileges = value == "1",
            "Seccomp" => status.seccomp = number(value),
            "voluntary_ctxt_switches" => status.voluntary_switches = number(value),
            "Seccomp_filters" => status.seccomp_filters = number(value),
            _ => {}
        }
    }
    status
}

/// The kernel writes a newline as `\n` and a backslash as `\\`.
fn unescape(text: &str) -> Vec<u8> {
    text.replace("\\\\", "\u{0}").replace("\\n", "\n").replace('\u{0}', "\\").into_bytes()
}

fn number<T: std::str::FromStr + Default>(text: &str) -> T {
    text.parse().unwrap_or_default()
}

fn hex(text: &str) -> u64 {
    u64::from_str_radix(text, 16).unwrap_or(0)
}

fn list<T: std::str::FromStr>(text: &str) -> Vec<T> {
    text.split_ascii_whitespace().filter_map(|word| word.parse().ok()).collect()
}

fn four(text: &str) -> [u32; 4] {
    let mut out = [0; 4];
    for (slot, value) in out.iter_mut().zip(list(text)) {
        *slot = value;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_own() {
        let status = parse(&std::fs::read_to_string("/proc/self/status").unwrap());
        assert_eq!(status.tgid, std::process::id() as i32);
        assert_eq!(status.ns_tgid.last().copied().map(|pid| pid > 0), Some(true));
        // The test's own thread runs, the leader that /proc/self shows may sleep.
        assert!(matches!(status.state, 'R' | 'S'));
    }

    #[test]
    fn names_are_unescaped() {
        assert_eq!(parse("Name:\ta\\nb \\\\n\n").name, b"a\nb \\n");
    }

    proptest! {
        #[test]
        fn never_panics(text in "(\\PC*\n)*") { parse(&text); }

        #[test]
        fn never_panics_on_keys(value in "\\PC*") {
            for key in ["Umask", "State", "Uid", "NSpid", "VmLck", "CapBnd", "Seccomp"] { parse(&format!("{key}:\t{value}\n")); }
        }
    }
}
