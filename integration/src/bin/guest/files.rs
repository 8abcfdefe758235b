//! Open files: offsets (shared after dup and fork), append, deleted, directories, close-on-exec, O_PATH, devices.

use crate::{Guest, sys};
use anyhow::{Context, Result, ensure};
use nix::fcntl::{AT_FDCWD, AtFlags, FcntlArg, FdFlag, OFlag, fcntl};
use nix::unistd::{Pid, Whence, linkat, lseek};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

struct Files {
    plain: File,
    twin: OwnedFd,
    apart: File,
    append: File,
    deleted: File,
    temporary: File,
    folder: File,
    path: File,
    zero: File,
    reader: Pid,
    appended: u64,
}

const BIG: u64 = 3 << 20;
/// RWH_WRITE_LIFE_SHORT.
const SHORT: u64 = 2;

fn options() -> std::fs::OpenOptions {
    let mut options = File::options();
    options.read(true).write(true).create(true);
    options
}

fn temporary() -> Result<File> {
    let mut options = File::options();
    options.read(true).write(true).custom_flags(libc::O_TMPFILE);
    // Overlays have none before Linux 6.3.
    let mut temporary = options.open("/var/tmp/guest-files").or_else(|_| options.open("/dev/shm"))?;
    temporary.write_all(b"no name")?;
    Ok(temporary)
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let home = "/var/tmp/guest-files";
    let _ = std::fs::remove_dir_all(home);
    std::fs::create_dir_all(home)?;
    let mut plain = options().open(format!("{home}/plain"))?;
    plain.write_all(b"0123456789abcdef")?;
    plain.seek(SeekFrom::Start(4))?;
    let mut apart = File::open(format!("{home}/plain"))?;
    apart.seek(SeekFrom::Start(8))?;
    let mut append = options().append(true).open(format!("{home}/log"))?;
    append.write_all(b"one")?;
    sys::write_hint(append.as_raw_fd(), Some(SHORT))?;
    let mut deleted = options().open(format!("{home}/deleted"))?;
    deleted.set_len(BIG)?;
    deleted.seek(SeekFrom::Start(BIG - 4))?;
    deleted.write_all(b"tail")?;
    std::fs::remove_file(format!("{home}/deleted"))?;
    let reader = sys::fork(|| {
        loop {
            nix::unistd::pause();
        }
    })?;
    Ok(Box::new(Files {
        twin: nix::unistd::dup(&plain)?,
        plain,
        apart,
        append,
        deleted,
        temporary: temporary()?,
        folder: File::options().read(true).custom_flags(libc::O_DIRECTORY).open(home)?,
        path: File::options().read(true).custom_flags(libc::O_PATH).open(format!("{home}/plain"))?,
        zero: options().create(false).open("/dev/zero")?,
        reader,
        appended: 3,
    }))
}

impl Files {
    fn offsets(&mut self) -> Result<()> {
        ensure!(self.plain.stream_position()? == 4, "offset {}", self.plain.stream_position()?);
        ensure!(self.apart.stream_position()? == 8, "the other's offset is {}", self.apart.stream_position()?);
        self.plain.seek(SeekFrom::Start(6))?;
        let twin = lseek(&self.twin, 0, Whence::SeekCur)?;
        ensure!(twin == 6, "a duplicate has an offset of its own: {twin}");
        let info = std::fs::read_to_string(format!("/proc/{}/fdinfo/{}", self.reader, self.plain.as_raw_fd()))?;
        ensure!(info.lines().next() == Some("pos:\t6"), "the child's copy has an offset of its own: {info}");
        self.plain.seek(SeekFrom::Start(4))?;
        Ok(())
    }

    fn nameless(&mut self) -> Result<()> {
        let meta = self.deleted.metadata()?;
        ensure!(
            meta.len() == BIG && meta.nlink() == 0,
            "the deleted file: {} bytes, {} links",
            meta.len(),
            meta.nlink()
        );
        self.deleted.seek(SeekFrom::Start(BIG - 4))?;
        let mut text = String::new();
        self.deleted.read_to_string(&mut text)?;
        ensure!(text == "tail", "the deleted file ends in {text:?}");
        ensure!(self.temporary.stream_position()? == 7, "the temporary file's offset is another");
        self.temporary.seek(SeekFrom::Start(0))?;
        text.clear();
        self.temporary.read_to_string(&mut text)?;
        ensure!(text == "no name", "the temporary file holds {text:?}");
        // Once it has had a name it cannot get another.
        let open = format!("/proc/self/fd/{}", self.temporary.as_raw_fd());
        let name = std::fs::read_link(&open)?.with_file_name("named");
        linkat(AT_FDCWD, open.as_str(), AT_FDCWD, &name, AtFlags::AT_SYMLINK_FOLLOW).context("give it a name")?;
        ensure!(std::fs::read_to_string(&name)? == "no name", "it holds something else by its name");
        std::fs::remove_file(&name)?;
        self.temporary = temporary()?;
        Ok(())
    }
}

impl Guest for Files {
    fn verify(&mut self) -> Result<()> {
        self.offsets()?;
        self.nameless()?;
        self.append.seek(SeekFrom::Start(0))?;
        self.append.write_all(b"+")?;
        self.appended += 1;
        ensure!(self.append.metadata()?.len() == self.appended, "append wrote elsewhere");
        let hint = sys::write_hint(self.append.as_raw_fd(), None)?;
        ensure!(hint == SHORT, "the write hint is {hint}");
        let flags = OFlag::from_bits_retain(fcntl(&self.path, FcntlArg::F_GETFL)?);
        ensure!(flags.contains(OFlag::O_PATH), "O_PATH is gone: {flags:?}");
        ensure!(self.folder.metadata()?.is_dir(), "the directory is something else");
        let mut byte = [1];
        self.zero.read_exact(&mut byte)?;
        ensure!(byte == [0], "/dev/zero gives {byte:?}");
        let cloexec = FdFlag::from_bits_retain(fcntl(&self.plain, FcntlArg::F_GETFD)?);
        ensure!(cloexec.contains(FdFlag::FD_CLOEXEC), "close-on-exec is gone");
        let cloexec = FdFlag::from_bits_retain(fcntl(&self.twin, FcntlArg::F_GETFD)?);
        ensure!(!cloexec.contains(FdFlag::FD_CLOEXEC), "close-on-exec is on a duplicate");
        Ok(())
    }
}
