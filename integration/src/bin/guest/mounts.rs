//! Mounts that were made inside: tmpfs with contents and a limit, in one another; parts of the tree, read-only; a file; a
//! procfs; the tmpfs once more elsewhere.

use crate::Guest;
use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};

struct Mounts {
    /// As mountinfo tells of them.
    table: Vec<String>,
    open: File,
}

const HOME: &str = "/var/tmp/guest-mounts";
const NONE: Option<&str> = None;

/// Where and what, without the numbers that a kernel gives.
fn table() -> Result<Vec<String>> {
    let text = fs::read_to_string("/proc/self/mountinfo")?;
    let ours = text.lines().filter(|line| line.contains(HOME));
    Ok(ours
        .map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            // Layers lie elsewhere on another host.
            let all = words.iter().skip(3).filter(|word| !word.contains("lowerdir="));
            all.copied().collect::<Vec<_>>().join(" ")
        })
        .collect())
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    let _ = fs::remove_dir_all(HOME);
    for folder in ["memory", "bound", "proc", "again"] {
        fs::create_dir_all(format!("{HOME}/{folder}"))?;
    }
    fs::write(format!("{HOME}/file"), "")?;
    mount(
        Some("guest"),
        format!("{HOME}/memory").as_str(),
        Some("tmpfs"),
        MsFlags::MS_NOEXEC,
        Some("size=256k,mode=700"),
    )?;
    fs::create_dir(format!("{HOME}/memory/inner"))?;
    mount(Some("guest"), format!("{HOME}/memory/inner").as_str(), Some("tmpfs"), MsFlags::MS_NOSUID, NONE)?;
    fs::write(format!("{HOME}/memory/inner/deep"), "deep")?;
    let bind = |from: &str, to: &str| mount(Some(from), format!("{HOME}/{to}").as_str(), NONE, MsFlags::MS_BIND, NONE);
    bind("/etc", "bound")?;
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | MsFlags::MS_NODEV;
    mount(NONE, format!("{HOME}/bound").as_str(), NONE, flags, NONE)?;
    bind("/etc/passwd", "file")?;
    bind(&format!("{HOME}/memory"), "again")?;
    mount(Some("proc"), format!("{HOME}/proc").as_str(), Some("proc"), MsFlags::empty(), NONE)?;
    let mut open = File::options().read(true).write(true).create(true).open(format!("{HOME}/memory/open"))?;
    open.write_all(b"in memory")?;
    Ok(Box::new(Mounts { table: table()?, open }))
}

impl Guest for Mounts {
    fn verify(&mut self) -> Result<()> {
        let now = table()?;
        ensure!(now == self.table, "mounts are {now:?}, not {:?}", self.table);
        ensure!(now.len() == 6, "there are {now:?}");
        let mut text = String::new();
        self.open.seek(SeekFrom::Start(0))?;
        self.open.read_to_string(&mut text)?;
        ensure!(text == "in memory", "the open file holds {text:?}");
        ensure!(fs::read_to_string(format!("{HOME}/again/open"))? == "in memory", "it is another one elsewhere");
        ensure!(
            fs::read_to_string(format!("{HOME}/memory/inner/deep"))? == "deep",
            "the inner one holds something else"
        );
        ensure!(fs::read(format!("{HOME}/file"))? == fs::read("/etc/passwd")?, "the file is another");
        ensure!(File::create(format!("{HOME}/bound/new")).is_err(), "the bound folder can be written to");
        ensure!(File::create(format!("{HOME}/memory/big"))?.write_all(&[0; 300 << 10]).is_err(), "it has no limit");
        fs::remove_file(format!("{HOME}/memory/big"))?;
        let own = fs::read_to_string(format!("{HOME}/proc/{}/comm", std::process::id())).context("its procfs")?;
        ensure!(own == fs::read_to_string("/proc/self/comm")?, "its procfs shows {own:?}");
        Ok(())
    }
}
