//! inotify: watches keep their numbers and go on to report, also of a file without a name; unread events are there, or the
//! reader is told that it missed some.

use crate::Guest;
use anyhow::{Context, Result, ensure};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use std::ffi::OsStr;
use std::fs;
use std::io::Write;

struct Watches {
    inotify: Inotify,
    folder: WatchDescriptor,
    file: WatchDescriptor,
    held: fs::File,
    nameless: WatchDescriptor,
    unread: Inotify,
}

const FOLDER: &str = "/var/tmp/guest-watched";

pub fn set_up() -> Result<Box<dyn Guest>> {
    let _ = fs::remove_dir_all(FOLDER);
    fs::create_dir_all(FOLDER)?;
    fs::write(format!("{FOLDER}/file"), "a")?;
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK)?;
    // A number in between that is free again.
    let passed_over = inotify.add_watch("/tmp", AddWatchFlags::IN_CREATE)?;
    let folder = inotify.add_watch(FOLDER, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE)?;
    inotify.rm_watch(passed_over)?;
    let file = inotify.add_watch(format!("{FOLDER}/file").as_str(), AddWatchFlags::IN_MODIFY)?;
    let held = fs::File::create(format!("{FOLDER}/held"))?;
    let nameless = inotify.add_watch(format!("{FOLDER}/held").as_str(), AddWatchFlags::IN_MODIFY)?;
    fs::remove_file(format!("{FOLDER}/held"))?;
    let _ = inotify.read_events();
    let unread = Inotify::init(InitFlags::IN_NONBLOCK)?;
    unread.add_watch(FOLDER, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE)?;
    fs::write(format!("{FOLDER}/before"), "")?;
    Ok(Box::new(Watches { inotify, folder, file, held, nameless, unread }))
}

impl Guest for Watches {
    fn verify(&mut self) -> Result<()> {
        let events = self.unread.read_events().context("unread events are gone")?;
        let first = events.first().context("no event")?;
        let kept = first.mask.contains(AddWatchFlags::IN_CREATE) || first.mask.contains(AddWatchFlags::IN_Q_OVERFLOW);
        ensure!(kept, "unread events are {events:?} now");
        let _ = self.inotify.read_events();
        (&self.held).write_all(b"x")?;
        let events = self.inotify.read_events().context("no event for a nameless file")?;
        ensure!(events.iter().all(|e| e.wd == self.nameless), "a nameless file gave {events:?}");
        fs::write(format!("{FOLDER}/new"), "")?;
        let events = self.inotify.read_events().context("no event for a new file")?;
        let new = events.iter().any(|e| e.wd == self.folder && e.name.as_deref() == Some(OsStr::new("new")));
        ensure!(new, "a new file gave {events:?}");
        fs::remove_file(format!("{FOLDER}/new"))?;
        let events = self.inotify.read_events().context("no event for a removed file")?;
        ensure!(events.iter().all(|e| e.wd == self.folder), "a removed file gave {events:?}");
        fs::write(format!("{FOLDER}/file"), "b")?;
        let events = self.inotify.read_events().context("no event for a changed file")?;
        ensure!(events.iter().all(|e| e.wd == self.file), "a changed file gave {events:?}");
        Ok(())
    }
}
