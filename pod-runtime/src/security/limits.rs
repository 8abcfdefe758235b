//! Resource limits by the names of setrlimit(2).

use crate::problem::{Problem, Result};
use crate::spec::Rlimit;
use crate::sys::process;
use nix::errno::Errno;

/// By number.
const NAMES: [&str; 16] = [
    "cpu",
    "fsize",
    "data",
    "stack",
    "core",
    "rss",
    "nproc",
    "nofile",
    "memlock",
    "as",
    "locks",
    "sigpending",
    "msgqueue",
    "nice",
    "rtprio",
    "rttime",
];

/// The number of a limit: "nofile", "RLIMIT_NOFILE".
pub fn number(name: &str) -> Result<u32> {
    let plain = name.to_ascii_lowercase();
    let plain = plain.strip_prefix("rlimit_").unwrap_or(&plain);
    let found = NAMES.iter().position(|known| *known == plain);
    found.map(|at| at as u32).ok_or_else(|| {
        Problem::new("E-USAGE", format!("'{name}' is no resource limit")).fix(format!("one of {}", NAMES.join(", ")))
    })
}

/// Sets them on the calling process. A limit that already is as asked needs no privilege.
pub fn apply(limits: &[Rlimit]) -> Result<()> {
    for limit in limits {
        let kind = number(&limit.kind)?;
        if process::limit(kind).is_ok_and(|now| now == (limit.soft, limit.hard)) {
            continue;
        }
        match process::set_limit(kind, limit.soft, limit.hard) {
            Ok(()) => {}
            Err(Errno::EPERM) => return Err(refused(limit, kind)),
            Err(error) => {
                let what = format!("the limit {} cannot be {}:{}", limit.kind, limit.soft, limit.hard);
                return Err(Problem::new("E-LIMIT", what).because(error));
            }
        }
    }
    Ok(())
}

fn refused(limit: &Rlimit, kind: u32) -> Problem {
    let hard = process::limit(kind).map_or(0, |now| now.1);
    let what = format!("this host may not raise the limit {} to {} (it is {hard} here)", limit.kind, limit.hard);
    Problem::new("E-LIMIT", what).because(Errno::EPERM).fix(format!("ask for at most --ulimit {}={hard}", limit.kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(number("RLIMIT_NOFILE").unwrap(), nix::libc::RLIMIT_NOFILE);
        assert_eq!(number("rttime").unwrap(), nix::libc::RLIMIT_RTTIME);
        assert!(number("files").is_err());
    }

    #[test]
    fn the_limit_that_is_there_needs_no_privilege() {
        let (soft, hard) = process::limit(nix::libc::RLIMIT_NOFILE).unwrap();
        apply(&[Rlimit { kind: "nofile".into(), soft, hard }]).unwrap();
    }
}
