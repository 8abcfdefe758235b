//! FIFOs: one with contents and both ends open, one with a reader only.

use crate::Guest;
use anyhow::{Result, ensure};
use nix::sys::stat::Mode;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;

struct Fifo {
    both: File,
    reader: File,
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let open = |path: &str, write: bool| -> Result<File> {
        let _ = std::fs::remove_file(path);
        nix::unistd::mkfifo(path, Mode::from_bits_truncate(0o600))?;
        Ok(File::options().read(true).write(write).custom_flags(libc::O_NONBLOCK).open(path)?)
    };
    let mut fifo = Fifo { both: open("/tmp/guest-fifo", true)?, reader: open("/tmp/guest-lonely", false)? };
    fifo.both.write_all(b"in the fifo")?;
    Ok(Box::new(fifo))
}

impl Guest for Fifo {
    fn verify(&mut self) -> Result<()> {
        let mut text = [0; 11];
        self.both.read_exact(&mut text)?;
        ensure!(&text == b"in the fifo", "the fifo holds {text:?}");
        self.both.write_all(&text)?;
        ensure!(self.reader.read(&mut [0])? == 0, "a fifo without a writer gives data");
        let mut writer = File::options().write(true).custom_flags(libc::O_NONBLOCK).open("/tmp/guest-lonely")?;
        writer.write_all(b"x")?;
        ensure!(self.reader.read(&mut [0])? == 1, "what a new writer wrote does not arrive");
        Ok(())
    }
}
