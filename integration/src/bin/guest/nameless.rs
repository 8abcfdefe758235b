//! Files that lost their name or never had one, and a directory that is being read: a file that has another name
//! elsewhere, one in directories that are gone, times and attributes, a symbolic link by O_PATH, files of a process that
//! has ended.

use crate::{Guest, sys};
use anyhow::{Context, Result, ensure};
use nix::sys::stat::futimens;
use nix::sys::time::TimeSpec;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

const HOME: &str = "/var/tmp/guest-nameless";
const FILES: usize = 900;

struct Nameless {
    linked: File,
    buried: File,
    kept: File,
    link: File,
    folder: File,
    /// Names that it gave already.
    given: BTreeSet<Vec<u8>>,
    dead: File,
    dead_folder: File,
}

fn create(name: &str) -> Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create_new(true);
    Ok(options.open(format!("{HOME}/{name}"))?)
}

fn path_of(file: &File) -> Result<String> {
    Ok(fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?.to_string_lossy().into_owned())
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let _ = fs::remove_dir_all(HOME);
    fs::create_dir_all(format!("{HOME}/deep/er"))?;
    fs::create_dir_all(format!("{HOME}/else/where"))?;
    let mut linked = create("linked")?;
    linked.write_all(b"two names")?;
    fs::hard_link(format!("{HOME}/linked"), format!("{HOME}/else/where/linked"))?;
    fs::remove_file(format!("{HOME}/linked"))?;
    let mut buried = create("deep/er/buried")?;
    buried.write_all(b"buried")?;
    fs::remove_dir_all(format!("{HOME}/deep"))?;
    let mut kept = create("kept")?;
    kept.write_all(b"kept")?;
    sys::attribute(kept.as_raw_fd(), c"user.guest", Some(b"value"))?;
    futimens(&kept, &TimeSpec::new(1_000_000_000, 1), &TimeSpec::new(1_100_000_000, 2))?;
    fs::remove_file(format!("{HOME}/kept"))?;
    std::os::unix::fs::symlink("/nowhere", format!("{HOME}/link"))?;
    let mut by_path = File::options();
    by_path.read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW);
    let link = by_path.open(format!("{HOME}/link"))?;
    fs::remove_file(format!("{HOME}/link"))?;
    fs::create_dir(format!("{HOME}/full"))?;
    for number in 0..FILES {
        create(&format!("full/a-file-with-a-name-{number}"))?;
    }
    let folder = File::open(format!("{HOME}/full"))?;
    let given = sys::some_names(folder.as_raw_fd(), 4096)?.into_iter().collect();
    let child = sys::fork(|| {
        loop {
            nix::unistd::pause();
        }
    })?;
    let dead = File::open(format!("/proc/{child}/stat"))?;
    let dead_folder = File::open(format!("/proc/{child}"))?;
    nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL)?;
    nix::sys::wait::waitpid(child, None)?;
    Ok(Box::new(Nameless { linked, buried, kept, link, folder, given, dead, dead_folder }))
}

impl Nameless {
    fn names(&mut self) -> Result<()> {
        let other = fs::metadata(format!("{HOME}/else/where/linked"))?;
        let own = self.linked.metadata()?;
        ensure!((own.ino(), own.nlink()) == (other.ino(), 1), "the file with two names is two files now");
        ensure!(!fs::exists(format!("{HOME}/linked"))?, "a name came back");
        let path = path_of(&self.buried)?;
        ensure!(path == format!("{HOME}/deep/er/buried (deleted)"), "the buried file is {path} now");
        ensure!(!fs::exists(format!("{HOME}/deep"))?, "a directory came back");
        let mut text = String::new();
        self.buried.seek(SeekFrom::Start(0))?;
        self.buried.read_to_string(&mut text)?;
        ensure!(text == "buried", "the buried file holds {text:?}");
        Ok(())
    }

    fn metadata(&self) -> Result<()> {
        let meta = self.kept.metadata()?;
        let times = (meta.atime(), meta.atime_nsec(), meta.mtime(), meta.mtime_nsec());
        ensure!(times == (1_000_000_000, 1, 1_100_000_000, 2), "times of a deleted file: {times:?}");
        let value = sys::attribute(self.kept.as_raw_fd(), c"user.guest", None).context("its attribute")?;
        ensure!(value == b"value", "its attribute is {value:?}");
        let target = nix::fcntl::readlinkat(&self.link, "")?;
        ensure!(target == "/nowhere", "the deleted link leads to {target:?}");
        Ok(())
    }

    /// Reading goes on where it was: nothing is missed.
    fn reading(&mut self) -> Result<()> {
        let mut names = self.given.clone();
        loop {
            let more = sys::some_names(self.folder.as_raw_fd(), 4096)?;
            if more.is_empty() {
                break;
            }
            names.extend(more);
        }
        ensure!(names.len() == FILES + 2, "{} of {} names of a directory", names.len(), FILES + 2);
        self.folder.seek(SeekFrom::Start(0))?;
        self.given = sys::some_names(self.folder.as_raw_fd(), 4096)?.into_iter().collect();
        Ok(())
    }
}

impl Guest for Nameless {
    fn verify(&mut self) -> Result<()> {
        self.names()?;
        self.metadata()?;
        self.reading()?;
        let mut text = String::new();
        ensure!(self.dead.read_to_string(&mut text).is_err(), "a process that has ended tells {text:?}");
        let inside = format!("/proc/self/fd/{}/stat", self.dead_folder.as_raw_fd());
        ensure!(File::open(inside).is_err(), "the directory of a process that has ended has files");
        Ok(())
    }
}
