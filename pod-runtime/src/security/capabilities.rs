//! Capabilities by name, docker's default set, and what `--cap-add` and `--cap-drop` make of it.

use crate::problem::{Problem, Result};
use crate::sys::process;

/// By number, as in linux/capability.h.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// What docker gives: enough to be root among one's own files, nothing that reaches the host.
const DEFAULT: [&str; 14] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// A set of capabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Set(u64);

impl Set {
    pub fn from_bits(bits: u64) -> Set {
        Set(bits)
    }

    pub fn bits(self) -> u64 {
        self.0
    }

    pub fn parse(names: &[String]) -> Result<Set> {
        names.iter().try_fold(Set(0), |set, name| Ok(Set(set.0 | 1 << number(name)?)))
    }

    pub fn has(self, name: &str) -> bool {
        number(name).is_ok_and(|cap| self.0 & 1 << cap != 0)
    }

    #[must_use]
    pub fn without(self, other: Set) -> Set {
        Set(self.0 & !other.0)
    }

    pub fn names(self) -> Vec<&'static str> {
        let mut names: Vec<_> = (0..64).filter(|cap| self.0 & 1 << cap != 0).map(name).collect();
        names.sort_unstable();
        names
    }

    /// Those of the bounding set of this process that are not in this set.
    pub fn missing(self) -> impl Iterator<Item = u32> {
        (0..64u32)
            .map_while(|cap| process::in_bounding_set(cap).map(|there| (cap, there)))
            .filter(move |(cap, there)| *there && self.0 & 1 << cap == 0)
            .map(|(cap, _)| cap)
    }
}

/// Without the prefix; "?" for one that is newer than this program.
pub fn name(cap: u32) -> &'static str {
    NAMES.get(cap as usize).copied().unwrap_or("?")
}

fn number(name: &str) -> Result<u32> {
    let plain = name.to_ascii_uppercase();
    let plain = plain.strip_prefix("CAP_").unwrap_or(&plain);
    match NAMES.iter().position(|known| *known == plain) {
        Some(at) => Ok(at as u32),
        None => {
            let problem = Problem::new("E-CAPABILITY", format!("'{name}' is no capability"));
            let closest = crate::store::closest(plain, NAMES.into_iter());
            Err(match closest {
                Some(closest) => problem.fix(format!("did you mean {closest}?")),
                None => problem.fix("the names are those of capabilities(7), with or without CAP_"),
            })
        }
    }
}

/// The sorted names that a pod's first process may hold: the default set with `add` and without `drop`, each of which
/// may be `ALL`. As docker: `--cap-drop ALL --cap-add X` is X alone, `--cap-add ALL --cap-drop X` all but X.
pub fn resolve(add: &[String], drop: &[String]) -> Result<Vec<String>> {
    let held = Set(process::capabilities().map_or(u64::MAX, |sets| sets.permitted) & ((1 << NAMES.len()) - 1));
    let all = |names: &[String]| names.iter().any(|name| name.eq_ignore_ascii_case("ALL"));
    let some = |names: &[String]| {
        Set::parse(&names.iter().filter(|n| !n.eq_ignore_ascii_case("ALL")).cloned().collect::<Vec<_>>())
    };
    let (added, dropped) = (some(add)?, some(drop)?);
    let base = match (all(add), all(drop)) {
        (true, _) => held,
        (false, true) => Set(0),
        (false, false) => Set::parse(&DEFAULT.map(String::from))?,
    };
    // A name that is in both lists was added on purpose when all were dropped, and dropped on purpose otherwise.
    let result = if all(drop) && !all(add) { Set(base.0 | added.0) } else { Set((base.0 | added.0) & !dropped.0) };
    Ok(result.names().into_iter().map(String::from).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(String::from).collect()
    }

    #[test]
    fn names_and_numbers() {
        assert_eq!(number("CAP_SYS_ADMIN").unwrap(), 21);
        assert_eq!(number("checkpoint_restore").unwrap(), 40);
        let wrong = number("SYS_ADMIM").unwrap_err();
        assert_eq!(wrong.way_out(), Some("did you mean SYS_ADMIN?"));
    }

    #[test]
    fn adding_and_dropping_as_docker() {
        let default = resolve(&[], &[]).unwrap();
        assert_eq!(default.len(), 14);
        assert!(default.is_sorted());
        assert_eq!(resolve(&words("NET_ADMIN"), &words("ALL")).unwrap(), ["NET_ADMIN"]);
        assert!(!resolve(&words("ALL"), &words("SYS_ADMIN")).unwrap().contains(&"SYS_ADMIN".into()));
        assert_eq!(resolve(&words("CAP_SYS_PTRACE"), &words("cap_chown")).unwrap().len(), 14);
        assert_eq!(resolve(&[], &words("all")).unwrap(), Vec::<String>::new());
        assert!(resolve(&words("NOPE"), &[]).is_err());
    }
}
