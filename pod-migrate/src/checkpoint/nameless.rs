//! The file that a checkpoint is written to before it has its name.
//!
//! Where the file system knows files without a name it is one, and the kernel frees it with its last descriptor. Where it
//! does not, and for the moment between its first name and its own, it is called `.checkpoint-PID-N` and locked
//! (flock(2)) by who makes it: one that is not locked was left by a `pod` that was killed, and the next removes it.

use crate::image::WRITE;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::{LinkatFlags, linkat};
use pod_runtime::{Doing, Problem, Result};
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const PREFIX: &str = ".checkpoint-";
/// Names to try: others may make checkpoints in the same directory from another pid namespace.
const MOST: u32 = 1000;

/// A file that has no name yet, or one that nobody looks for. Dropping it removes it.
pub(super) struct Nameless {
    file: File,
    /// The name that it has meanwhile.
    named: Option<PathBuf>,
}

impl Nameless {
    pub fn new(dir: &Path) -> Result<Nameless> {
        sweep(dir);
        let mode = Mode::from_bits_truncate(0o600);
        if let Ok(fd) = open(dir, OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC, mode) {
            return Ok(Nameless { file: own(fd.into()), named: None });
        }
        Nameless::named(dir)
    }

    /// Where the file system knows no nameless files.
    fn named(dir: &Path) -> Result<Nameless> {
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_RDWR | OFlag::O_CLOEXEC;
        let make = |path: &Path| open(path, flags, Mode::from_bits_truncate(0o600)).map(File::from);
        let what = || format!("make a file in {}", dir.display());
        for _ in 0..MOST {
            let (path, file) = free_name(dir, make).code(WRITE, what)?;
            let file = own(file);
            // Until it was locked, somebody who sweeps could take it for one that was left.
            if file.metadata().code(WRITE, what)?.nlink() > 0 {
                return Ok(Nameless { file, named: Some(path) });
            }
        }
        Err(Problem::new(WRITE, what()))
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether nothing of it stays when this process is killed.
    pub fn is_nameless(&self) -> bool {
        self.named.is_none()
    }

    /// Gives the file its name, over one that is there.
    pub fn name(mut self, path: &Path) -> Result<()> {
        let what = || format!("give the checkpoint its name {}", path.display());
        let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let beside = match &self.named {
            Some(named) => named.clone(),
            None => {
                let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                let link = |name: &Path| linkat(AT_FDCWD, own.as_str(), AT_FDCWD, name, LinkatFlags::AT_SYMLINK_FOLLOW);
                free_name(dir, link).code(WRITE, what)?.0
            }
        };
        self.named = Some(beside.clone());
        fs::rename(&beside, path).code(WRITE, what)?;
        self.named = None;
        File::open(dir).and_then(|d| d.sync_all()).code(WRITE, what)
    }
}

impl Drop for Nameless {
    fn drop(&mut self) {
        if let Some(path) = &self.named {
            let _ = fs::remove_file(path);
        }
    }
}

/// Says that somebody is at work on it, until the last descriptor of it is closed. A file system without locks has none that could be swept either.
fn own(file: File) -> File {
    if let Err(error) = file.lock() {
        tracing::debug!(%error, "the checkpoint cannot be locked");
    }
    file
}

fn free_name<T>(dir: &Path, make: impl Fn(&Path) -> nix::Result<T>) -> nix::Result<(PathBuf, T)> {
    for number in 0..MOST {
        let path = dir.join(format!("{PREFIX}{}-{number}", std::process::id()));
        match make(&path) {
            Err(Errno::EEXIST) => {}
            made => return made.map(|made| (path, made)),
        }
    }
    Err(Errno::EEXIST)
}

/// Removes what killed makers of checkpoints have left in this directory.
fn sweep(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten().filter(|entry| entry.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes())) {
        let path = entry.path();
        if was_left(&path).unwrap_or(false) {
            let removed = fs::remove_file(&path);
            tracing::info!(path = %path.display(), ?removed, "a checkpoint that was never finished");
        }
    }
}

/// A file of ours that nobody works on.
fn was_left(path: &Path) -> std::io::Result<bool> {
    // The directory may be one in which others make names.
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = File::from(open(path, flags, Mode::empty())?);
    let metadata = file.metadata()?;
    let ours = metadata.is_file() && metadata.uid() == nix::unistd::geteuid().as_raw();
    Ok(ours && file.try_lock().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn what_a_killed_maker_left_goes_and_what_is_at_work_stays() {
        let dir = tempfile::tempdir().unwrap();
        let left = dir.path().join(format!("{PREFIX}{}-0", std::process::id()));
        fs::write(&left, b"half").unwrap();
        fs::write(dir.path().join(format!("{PREFIX}17")), b"of a version before").unwrap();
        fs::write(dir.path().join("web-1.pod"), b"whole").unwrap();
        std::os::unix::fs::symlink("web-1.pod", dir.path().join(format!("{PREFIX}x"))).unwrap();
        let at_work = Nameless::named(dir.path()).unwrap();
        let name = at_work.named.clone().unwrap();
        assert_ne!(name, left, "a name that is taken is no obstacle");
        at_work.file().write_all(b"more").unwrap();
        drop(Nameless::new(dir.path()).unwrap());
        let name = name.file_name().unwrap().to_str().unwrap();
        let link = format!("{PREFIX}x");
        assert_eq!(names(dir.path()), [name, &link, "web-1.pod"]);
        drop(at_work);
        assert_eq!(names(dir.path()), [&link, "web-1.pod"]);
    }

    #[test]
    fn it_gets_its_name_or_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("taken/by")).unwrap();
        for make in [Nameless::new, Nameless::named] {
            let file = make(dir.path()).unwrap();
            file.file().write_all(b"whole").unwrap();
            assert!(file.name(&dir.path().join("taken")).is_err());
            assert_eq!(names(dir.path()), ["taken"], "nothing is left of it");
            let path = dir.path().join("web-1.pod");
            fs::write(&path, b"old").unwrap();
            let file = make(dir.path()).unwrap();
            file.file().write_all(b"whole").unwrap();
            file.name(&path).unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"whole");
            assert_eq!(names(dir.path()), ["taken", "web-1.pod"]);
            fs::remove_file(path).unwrap();
        }
    }
}
