//! Places for things that are made under a name for a moment: the name is freed and its directories are there meanwhile,
//! and all is as it was when these are dropped.

use std::io;
use std::path::{Path, PathBuf};

/// What had the name is called something else meanwhile.
#[derive(Debug)]
pub(super) struct Aside {
    moved: Option<(PathBuf, PathBuf)>,
}

impl Aside {
    pub fn of(path: &Path) -> io::Result<Aside> {
        if std::fs::symlink_metadata(path).is_err() {
            return Ok(Aside { moved: None });
        }
        for attempt in 0..64 {
            let other = path.with_file_name(format!(".pod-aside-{attempt}"));
            if std::fs::symlink_metadata(&other).is_err() {
                std::fs::rename(path, &other)?;
                return Ok(Aside { moved: Some((other, path.to_owned())) });
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        if let Some((from, to)) = self.moved.take()
            && let Err(error) = std::fs::rename(&from, &to)
        {
            tracing::warn!("{} could not be named {} again: {error}", from.display(), to.display());
        }
    }
}

/// Directories that are gone, made again for the moment; the deepest last.
#[derive(Debug, Default)]
pub(super) struct Made {
    directories: Vec<PathBuf>,
}

impl Made {
    pub fn parents_of(path: &Path) -> io::Result<Made> {
        let mut made = Made::default();
        let missing: Vec<&Path> =
            path.ancestors().skip(1).take_while(|parent| std::fs::symlink_metadata(parent).is_err()).collect();
        for directory in missing.into_iter().rev() {
            std::fs::create_dir(directory)?;
            made.directories.push(directory.to_owned());
        }
        Ok(made)
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for directory in self.directories.iter().rev() {
            if let Err(error) = std::fs::remove_dir(directory) {
                tracing::warn!("{} could not be removed again: {error}", directory.display());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let (taken, deep) = (folder.path().join("taken"), folder.path().join("a/b/c"));
        std::fs::write(&taken, "mine").unwrap();
        {
            let _aside = Aside::of(&taken).unwrap();
            std::fs::write(&taken, "yours").unwrap();
            std::fs::remove_file(&taken).unwrap();
            let _made = Made::parents_of(&deep).unwrap();
            assert!(deep.parent().unwrap().is_dir());
        }
        assert_eq!(std::fs::read(&taken).unwrap(), b"mine");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
