//! `-u USER[:GROUP]` as numbers, by the pod's own /etc/passwd and /etc/group.
//!
//! These files may be an enemy's: they are read from inside the root (no symlink leads out), bounded, and never by
//! libc's name service. A number is a number, whatever name the files give to it.

use crate::problem::{Doing, Problem, Result};
use crate::spec::{Base, User};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// More than this of a passwd file is not read.
const BOUND: u64 = 4 << 20;

/// The user that `text` names in a root, with its groups and, beside it, its home. Empty is root.
pub fn look_up(base: &Base, text: &str) -> Result<(User, Option<String>)> {
    let root = match base {
        Base::Host => Path::new("/"),
        Base::Directory(folder) => folder,
    };
    resolve(text, &read(root, "etc/passwd")?, &read(root, "etc/group")?)
}

fn read(root: &Path, path: &str) -> Result<String> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let folder = open(root, flags, Mode::empty()).doing(|| format!("open {}", root.display()))?;
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let Ok(file) = openat2(&folder, path, how).map(File::from) else { return Ok(String::new()) };
    if !file.metadata().is_ok_and(|found| found.is_file()) {
        return Ok(String::new());
    }
    let mut bytes = Vec::new();
    file.take(BOUND).read_to_end(&mut bytes).doing(|| format!("read /{path} of the pod's root"))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn resolve(text: &str, passwd: &str, group: &str) -> Result<(User, Option<String>)> {
    let (user, wanted_group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let by_number = number(user);
    let mut lines = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let line = lines.find(|line| match by_number {
        Some(uid) => line.get(2).and_then(|field| number(field)) == Some(uid),
        None => line.first() == Some(&user),
    });
    let field = |at: usize| line.as_ref().and_then(|line| line.get(at)).copied();
    let uid = by_number.or_else(|| number(field(2)?)).ok_or_else(|| unknown("user", user))?;
    let (gid, additional_gids) = match wanted_group {
        // A group that is named is the only one, as in docker.
        Some(name) => (group_number(name, group)?, Vec::new()),
        None => {
            let gid = field(3).and_then(number).unwrap_or(0);
            (gid, field(0).map(|name| groups_of(name, gid, group)).unwrap_or_default())
        }
    };
    let home = field(5).filter(|home| home.starts_with('/')).map(String::from);
    Ok((User { uid, gid, additional_gids, umask: None }, home))
}

/// Strict: digits only, and no number that the kernel takes for "none".
fn number(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten().filter(|number| *number != u32::MAX)
}

fn group_number(name: &str, group: &str) -> Result<u32> {
    if let Some(gid) = number(name) {
        return Ok(gid);
    }
    let mut lines = group.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let line = lines.find(|line| line.first() == Some(&name) && !name.is_empty());
    line.and_then(|line| number(line.get(2)?)).ok_or_else(|| unknown("group", name))
}

fn groups_of(user: &str, primary: u32, group: &str) -> Vec<u32> {
    let mut found: Vec<u32> = group
        .lines()
        .filter_map(|line| {
            let fields: Vec<_> = line.split(':').collect();
            let member = fields.get(3)?.split(',').any(|name| name == user);
            if member { number(fields.get(2)?) } else { None }
        })
        .filter(|gid| *gid != primary)
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

fn unknown(kind: &str, name: &str) -> Problem {
    Problem::new("E-USER", format!("the pod's root knows no {kind} '{name}'"))
        .fix("use a number, or a name from its /etc/passwd and /etc/group")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34:w:/var/www:/bin/false\n1000:x:0:0::/:/bin/sh\nbad\n";
    const GROUP: &str = "root:x:0:\nwww:x:34:web\nadm:x:4:web,root\n7:x:0:\n";

    fn ids(text: &str) -> (u32, u32, Vec<u32>) {
        let (user, _) = resolve(text, PASSWD, GROUP).unwrap();
        (user.uid, user.gid, user.additional_gids)
    }

    #[test]
    fn names_and_numbers() {
        assert_eq!(ids(""), (0, 0, vec![4]));
        assert_eq!(ids("web"), (33, 34, vec![4]));
        assert_eq!(ids("33"), (33, 34, vec![4]));
        assert_eq!(ids("web:adm"), (33, 4, vec![]));
        assert_eq!(ids("12345:7"), (12345, 7, vec![]));
        assert_eq!(resolve("web", PASSWD, GROUP).unwrap().1.as_deref(), Some("/var/www"));
    }

    #[test]
    fn a_name_of_digits_is_a_number() {
        assert_eq!(ids("1000"), (1000, 0, vec![]));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["nobody", "-1", "+1", "4294967295", "99999999999", "0:none", "0:", "web:-5", " 0", "0x0"] {
            assert!(resolve(text, PASSWD, GROUP).is_err(), "{text}");
        }
    }
}
