//! Groups that nobody has touched, beside a pod's own: what their files say is what files say before anybody sets them.
//!
//! They are named after the pod, so that those of a tool that was killed are taken away with the pod at the latest.

use super::{Cgroup, make};
use crate::problem::{Doing, Result};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

/// One in each hierarchy. Dropping it removes them.
#[derive(Debug)]
pub struct Fresh(Vec<PathBuf>);

impl Fresh {
    pub fn beside(cgroup: &Cgroup) -> Result<Fresh> {
        let mut fresh = Fresh(Vec::new());
        for folder in cgroup.folders() {
            let beside = beside(&folder);
            fresh.0.push(beside.clone());
            make(&beside).doing(|| format!("make the cgroup {}", beside.display()))?;
        }
        Ok(fresh)
    }

    /// That of the hierarchy in which the pod has this folder.
    pub fn of(&self, folder: &Path) -> PathBuf {
        beside(folder)
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        for folder in &self.0 {
            let _ = fs::remove_dir(folder);
        }
    }
}

fn beside(folder: &Path) -> PathBuf {
    let mut name: OsString = folder.file_name().unwrap_or_default().to_owned();
    name.push(".fresh");
    folder.with_file_name(name)
}

/// Removes what a tool that was killed has left beside a pod's folder.
pub(super) fn forget(folder: &Path) {
    let _ = fs::remove_dir(beside(folder));
}
