//! What an open file is besides its contents: renamed or replaced under its name, with an owner that gets signals of its
//! choice, leased, of /sys and of a control group; pidfds of a process that lives, of a zombie, of one that has gone.

use crate::{Guest, sys};
use anyhow::{Context, Result, ensure};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

const F_SETSIG: i64 = 10;
const F_GETSIG: i64 = 11;
const F_SETOWN_EX: i64 = 15;
const F_GETOWN_EX: i64 = 16;
const OWNER_GROUP: i32 = 2;
/// Where the files of this guest are.
const FOLDER: &str = "/var/tmp/guest-handles";

struct Handles {
    renamed: File,
    replaced: File,
    owned: (UnixStream, UnixStream),
    leased: File,
    kernel: Vec<(File, PathBuf)>,
    pidfds: [(File, i32); 3],
}

fn fcntl(file: &impl AsRawFd, command: i64, argument: i64) -> Result<i64> {
    Ok(sys::call(libc::SYS_fcntl, [file.as_raw_fd().into(), command, argument, 0, 0])?)
}

fn made(name: &str, text: &str) -> Result<File> {
    let path = format!("{FOLDER}/{name}");
    let mut file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
    file.write_all(text.as_bytes())?;
    Ok(file)
}

fn text_of(mut file: &File) -> Result<String> {
    let mut text = String::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_string(&mut text)?;
    Ok(text)
}

fn pidfd(pid: i32) -> Result<(File, i32)> {
    Ok((sys::owned(sys::call(libc::SYS_pidfd_open, [pid.into(), 0, 0, 0, 0])? as i32), pid))
}

/// The process that a pidfd shows: -1 is one that has gone.
fn shown(pidfd: &File) -> Result<i32> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
    Ok(text.lines().find_map(|line| line.strip_prefix("Pid:")).context("no Pid in fdinfo")?.trim().parse()?)
}

fn waiting() -> i32 {
    loop {
        nix::unistd::pause();
    }
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    fs::create_dir_all(FOLDER)?;
    let renamed = made("before", "renamed")?;
    fs::rename(format!("{FOLDER}/before"), format!("{FOLDER}/after"))?;
    let replaced = made("replaced", "the first")?;
    made("other", "the second")?;
    fs::rename(format!("{FOLDER}/other"), format!("{FOLDER}/replaced"))?;
    made("leased", "leased")?;
    let leased = File::open(format!("{FOLDER}/leased"))?;
    fcntl(&leased, libc::F_SETLEASE.into(), libc::F_RDLCK.into())?;
    let owned = UnixStream::pair()?;
    // One that has a number here; who leads a session leads a group already.
    let own = nix::unistd::Pid::from_raw(0);
    if nix::unistd::setpgid(own, own).is_err() {
        ensure!(nix::unistd::getpgrp() == nix::unistd::getpid(), "it has no group of its own");
    }
    let group = [OWNER_GROUP, nix::unistd::getpgrp().as_raw()];
    sys::count_signals(libc::SIGWINCH)?;
    fcntl(&owned.0, F_SETOWN_EX, group.as_ptr() as i64)?;
    fcntl(&owned.0, F_SETSIG, libc::SIGWINCH.into())?;
    fcntl(&owned.0, libc::F_SETFL.into(), (libc::O_RDWR | libc::O_ASYNC).into())?;
    let kernel = [
        "/sys/devices/system/cpu/online",
        "/sys/kernel/mm/transparent_hugepage/enabled",
        "/sys/fs/cgroup/cgroup.controllers",
        "/sys/fs/cgroup/unified/cgroup.controllers",
        "/sys/fs/cgroup/memory/memory.stat",
    ];
    let kernel =
        kernel.iter().filter_map(|path| Some((File::open(path).ok()?, PathBuf::from(path)))).collect::<Vec<_>>();
    ensure!(kernel.len() > 1, "there are no files of /sys here");
    let (living, zombie, gone) = (sys::fork(waiting)?, sys::fork(|| 7)?, sys::fork(|| 0)?);
    let pidfds = [pidfd(living.as_raw())?, pidfd(zombie.as_raw())?, pidfd(gone.as_raw())?];
    sys::reap(gone)?;
    crate::until("a child to end", || {
        let stat = fs::read_to_string(format!("/proc/{zombie}/stat")).unwrap_or_default();
        stat.contains(") Z ")
    })?;
    let mut handles = Handles { renamed, replaced, owned, leased, kernel, pidfds };
    handles.verify()?;
    Ok(Box::new(handles))
}

impl Guest for Handles {
    fn verify(&mut self) -> Result<()> {
        let name = |file: &File| fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
        ensure!(text_of(&self.renamed)? == "renamed" && name(&self.renamed)?.ends_with("after"), "the renamed file");
        ensure!(
            text_of(&self.replaced)? == "the first",
            "the file that was replaced has {:?}",
            text_of(&self.replaced)
        );
        ensure!(fs::read_to_string(format!("{FOLDER}/replaced"))? == "the second", "what replaced it");
        ensure!(self.replaced.metadata()?.nlink() == 0, "the file that was replaced has a name");
        let lease = fcntl(&self.leased, libc::F_GETLEASE.into(), 0)?;
        ensure!(lease == libc::F_RDLCK.into(), "the lease is {lease}");

        let mut owner = [0i32; 2];
        fcntl(&self.owned.0, F_GETOWN_EX, owner.as_mut_ptr() as i64)?;
        ensure!(owner == [OWNER_GROUP, nix::unistd::getpgrp().as_raw()], "the owner is {owner:?}");
        ensure!(fcntl(&self.owned.0, F_GETSIG, 0)? == libc::SIGWINCH.into(), "another signal");
        let before = sys::signals(libc::SIGWINCH);
        self.owned.1.write_all(b"x")?;
        crate::until("the signal of what arrived", || sys::signals(libc::SIGWINCH) > before)?;
        self.owned.0.read_exact(&mut [0])?;

        for (file, path) in &self.kernel {
            ensure!(name(file)? == *path, "{} is {}", path.display(), name(file)?.display());
            ensure!(!text_of(file)?.is_empty() || path.ends_with("cgroup.controllers"), "{} is empty", path.display());
        }
        let [living, zombie, gone] = &self.pidfds;
        for (pidfd, pid) in [living, zombie] {
            ensure!(shown(pidfd)? == *pid, "a pidfd of {pid} shows {}", shown(pidfd)?);
        }
        ensure!(shown(&gone.0)? == -1, "a pidfd of a process that has gone shows {}", shown(&gone.0)?);
        let signal = |pidfd: &File| sys::call(libc::SYS_pidfd_send_signal, [pidfd.as_raw_fd().into(), 0, 0, 0, 0]);
        ensure!(signal(&living.0).is_ok() && signal(&gone.0).is_err(), "signals go elsewhere");
        Ok(())
    }
}
