//! Groups that nobody has touched, beside a pod's own: what their files say is what files say before anybody sets them.
//!
//! Each has a name of its own, for several may look at once; it begins with the pod's, so that those of a tool that was killed
//! are taken away with the pod at the latest.

use super::{Cgroup, make, subfolders};
use crate::problem::{Doing, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// One in each hierarchy. Dropping it removes them.
#[derive(Debug)]
pub struct Fresh {
    folders: Vec<PathBuf>,
    name: String,
}

impl Fresh {
    pub fn beside(cgroup: &Cgroup) -> Result<Fresh> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let id = cgroup.path.file_name().unwrap_or_default().to_string_lossy();
        let name = format!("{}{}.{number}", beginning(&id), std::process::id());
        let mut fresh = Fresh { folders: Vec::new(), name };
        for folder in cgroup.folders() {
            let beside = fresh.of(&folder);
            fresh.folders.push(beside.clone());
            make(&beside).doing(|| format!("make the cgroup {}", beside.display()))?;
        }
        Ok(fresh)
    }

    /// That of the hierarchy in which the pod has this folder.
    pub fn of(&self, folder: &Path) -> PathBuf {
        folder.with_file_name(&self.name)
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        for folder in &self.folders {
            let _ = fs::remove_dir(folder);
        }
    }
}

/// Of their names. No pod's id has a dot.
fn beginning(id: &str) -> String {
    format!("{id}.fresh.")
}

/// Removes what tools that were killed have left beside a pod's folder.
pub(super) fn forget(folder: &Path) {
    let beginning = beginning(&folder.file_name().unwrap_or_default().to_string_lossy());
    for beside in folder.parent().into_iter().flat_map(subfolders) {
        if beside.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&beginning)) {
            let _ = fs::remove_dir(beside);
        }
    }
}
