//! What cannot be moved and is refused by name: the guest must go on as if it had not been asked for.

use crate::{Guest, sys};
use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;

/// KEY_SPEC_PROCESS_KEYRING.
const PROCESS_KEYRING: i64 = -2;
const KEYCTL_SEARCH: i64 = 10;

struct Landlocked;

/// May read, but not write files.
pub fn landlock() -> Result<Box<dyn Guest>> {
    sys::landlock_no_writing()?;
    Ok(Box::new(Landlocked))
}

impl Guest for Landlocked {
    fn verify(&mut self) -> Result<()> {
        let opened = std::fs::File::options().write(true).open("/dev/null");
        ensure!(opened.is_err(), "the restriction is gone");
        Ok(())
    }
}

struct Keyring;

/// A key in the keyring of the process.
pub fn keyring() -> Result<Box<dyn Guest>> {
    sys::call(
        libc::SYS_add_key,
        [c"user".as_ptr() as i64, c"guest".as_ptr() as i64, c"x".as_ptr() as i64, 1, PROCESS_KEYRING],
    )?;
    Ok(Box::new(Keyring))
}

impl Guest for Keyring {
    fn verify(&mut self) -> Result<()> {
        let args = [KEYCTL_SEARCH, PROCESS_KEYRING, c"user".as_ptr() as i64, c"guest".as_ptr() as i64, 0];
        sys::call(libc::SYS_keyctl, args).context("the key is gone")?;
        Ok(())
    }
}

struct SharedTable(Pid);

/// A child that has the same table of descriptors.
pub fn sharedtable() -> Result<Box<dyn Guest>> {
    let child = sys::fork_sharing(libc::CLONE_FILES, || {
        loop {
            nix::unistd::pause();
        }
    })?;
    Ok(Box::new(SharedTable(child)))
}

impl Guest for SharedTable {
    fn verify(&mut self) -> Result<()> {
        use std::os::fd::AsRawFd;
        let opened = std::fs::File::open("/etc/passwd")?;
        let link = std::fs::read_link(format!("/proc/{}/fd/{}", self.0, opened.as_raw_fd()))?;
        ensure!(link.ends_with("passwd"), "the child has {}", link.display());
        Ok(())
    }
}

struct Notified(std::os::fd::OwnedFd);

/// A message queue that tells of its next message.
pub fn notified() -> Result<Box<dyn Guest>> {
    use std::os::fd::AsRawFd;
    let queue = sys::mq_open(c"guest-notified", libc::O_RDWR | libc::O_CREAT)?;
    sys::count_signals(libc::SIGUSR2)?;
    sys::mq_notify(queue.as_raw_fd(), libc::SIGUSR2)?;
    Ok(Box::new(Notified(queue)))
}

impl Guest for Notified {
    fn verify(&mut self) -> Result<()> {
        use std::os::fd::AsRawFd;
        let before = sys::signals(libc::SIGUSR2);
        sys::mq_send(self.0.as_raw_fd(), 0, b"x")?;
        crate::until("to be told", || sys::signals(libc::SIGUSR2) > before)?;
        sys::mq_receive(self.0.as_raw_fd())?;
        sys::mq_notify(self.0.as_raw_fd(), libc::SIGUSR2)
    }
}

struct Filtered;

/// A table of packet filters.
pub fn filtered() -> Result<Box<dyn Guest>> {
    let made = std::process::Command::new("nft").args(["add", "table", "ip", "guest"]).status()?;
    ensure!(made.success(), "nft: {made}");
    Ok(Box::new(Filtered))
}

impl Guest for Filtered {
    fn verify(&mut self) -> Result<()> {
        let found = std::process::Command::new("nft").args(["list", "tables"]).output()?;
        ensure!(found.stdout == b"table ip guest\n", "nft lists {:?}", String::from_utf8_lossy(&found.stdout));
        Ok(())
    }
}

struct Covering;

/// A tmpfs over one that every pod has.
pub fn covering() -> Result<Box<dyn Guest>> {
    use nix::mount::{MsFlags, mount};
    const NONE: Option<&str> = None;
    mount(Some("guest"), "/dev/shm", Some("tmpfs"), MsFlags::empty(), NONE)?;
    std::fs::write("/dev/shm/mine", "mine")?;
    Ok(Box::new(Covering))
}

impl Guest for Covering {
    fn verify(&mut self) -> Result<()> {
        ensure!(std::fs::read_to_string("/dev/shm/mine")? == "mine", "it is another one");
        Ok(())
    }
}
