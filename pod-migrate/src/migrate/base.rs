//! What a pod sees through its own layer, as far as two hosts can compare it in a moment: the system's name and its
//! packages. Files that programs have open or mapped are compared one by one when they are restored.

use pod_runtime::copy::read_inside;
use pod_runtime::spec::{self, Spec};
use serde::{Deserialize, Serialize};
use std::path::Path;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// PRETTY_NAME of os-release.
    #[serde(default)]
    pub system: String,
    /// Digest of the names and versions of the installed packages; empty where there is no list that we can read.
    #[serde(default)]
    pub packages: String,
}

impl Base {
    pub fn of(spec: &Spec) -> Base {
        let root = match &spec.root.base {
            spec::Base::Host => Path::new("/"),
            spec::Base::Directory(path) => path,
        };
        let text = |path| read_inside(root, path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let release = text("etc/os-release").or_else(|_| text("usr/lib/os-release")).unwrap_or_default();
        let system = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
        let packages = text("var/lib/dpkg/status").or_else(|_| text("lib/apk/db/installed")).unwrap_or_default();
        Base { system: system.unwrap_or_default().trim_matches('"').to_owned(), packages: digest(&packages) }
    }

    /// Destination: what somebody should know of the base here, when the pod comes from `there`.
    pub fn differs(&self, there: &Base) -> Option<String> {
        if there.system != self.system {
            let name = |base: &Base| if base.system.is_empty() { "another system".into() } else { base.system.clone() };
            return Some(format!(
                "what the pod has not written itself it sees as its host has it: {} there, {} here",
                name(self),
                name(there)
            ));
        }
        (there.packages != self.packages && !there.packages.is_empty() && !self.packages.is_empty()).then(|| {
            "what the pod has not written itself it sees as its host has it, and other packages are installed there"
                .into()
        })
    }
}

fn digest(packages: &str) -> String {
    let wanted = |line: &&str| ["Package:", "Version:", "P:", "V:"].iter().any(|key| line.starts_with(key));
    let lines: Vec<&str> = packages.lines().filter(wanted).collect();
    if lines.is_empty() { String::new() } else { blake3::hash(lines.join("\n").as_bytes()).to_hex()[..16].to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bases_are_compared_by_name_then_by_packages() {
        let base = |system: &str, packages: &str| Base { system: system.into(), packages: digest(packages) };
        let (a, b) = (base("Debian 12", "Package: a\nVersion: 1\n"), base("Debian 12", "Package: a\nVersion: 2\n"));
        assert_eq!(a.differs(&base("Debian 12", "Package: a\nX: y\nVersion: 1\n")), None);
        assert!(a.differs(&b).unwrap().contains("packages"));
        let words = base("Debian 13", "").differs(&a).unwrap();
        assert!(words.contains("Debian 13 there, Debian 12 here"), "{words}");
        assert_eq!(base("Debian 12", "").differs(&a), None);
    }
}
