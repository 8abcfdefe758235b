//! Checkpoints: a migration to a file and back.
//!
//! A checkpoint is made in a file without a name and gets its name when it is whole and on the disk, so no half
//! checkpoint is ever seen and a killed `pod` leaves none ([`nameless`]). Files are 0600: they hold the memory of the
//! programs.

mod describe;
mod diff;
mod inspect;
mod key;
mod look;
mod memory;
mod nameless;
mod pack;
pub mod restore;
mod room;
pub mod seal;

use crate::arrival::origin;
use crate::capture::{Capture, Captured, Origin};
use crate::image::{Reader, WRITE, Writer};
use crate::objects::memory::tracking::LEAST_TO_COPY;
use crate::rounds::{Next, Rounds};
use crate::storage::volumes;
use crate::watchdog::Watchdog;
pub use describe::Socket;
pub use diff::{Differences, Pages, diff};
pub use inspect::{Inspected, Process, inspect};
pub use key::{Identity, Recipient};
use nameless::Nameless;
use nix::sys::memfd::{MFdFlags, memfd_create};
use pod_runtime::store::{Pod, Store, check_name};
use pod_runtime::{Doing, Problem, Result};
use serde::Serialize;
use std::fs::{self, File};
use std::io::Seek;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// There is no checkpoint of this name.
pub const MISSING: &str = "E-NOCHECKPOINT";
const EXTENSION: &str = "pod";

/// What to make.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Name in the store; made up when `None`.
    pub name: Option<String>,
    /// Into this file instead of the store.
    pub export: Option<PathBuf>,
    /// The pod ends with it.
    pub stop: bool,
    /// [`Compression::default_for`] when `None`.
    pub compression: Option<Compression>,
    /// For these to open and nobody else; for all if there are none.
    pub recipients: Vec<Recipient>,
}

/// How a checkpoint is made smaller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    None,
    /// With this level.
    Zstd(i32),
}

impl Compression {
    /// Negative levels are faster still.
    pub const LEVELS: std::ops::RangeInclusive<i32> = -7..=19;
    /// Docs/decisions/0050 has the figures.
    const USUAL: i32 = 1;

    /// `none`, `zstd`, `zstd:LEVEL`.
    pub fn parse(text: &str) -> Option<Compression> {
        match text.split_once(':') {
            None if text == "none" => Some(Compression::None),
            None if text == "zstd" => Some(Compression::Zstd(Self::USUAL)),
            Some(("zstd", level)) => {
                level.parse().ok().filter(|level| Self::LEVELS.contains(level)).map(Compression::Zstd)
            }
            _ => None,
        }
    }

    /// What stays on this host is restored from the page cache, and is to be fast; what is exported goes elsewhere.
    fn default_for(export: bool) -> Compression {
        if export { Compression::Zstd(Self::USUAL) } else { Compression::None }
    }
}

/// What was made.
#[derive(Debug, Clone, Serialize)]
pub struct Made {
    pub name: String,
    pub path: PathBuf,
    pub bytes: u64,
    /// Before it was made smaller.
    pub unpacked_bytes: u64,
    /// Of pages that the image holds once and has several times.
    pub duplicate_bytes: u64,
    pub frozen: Duration,
    pub total: Duration,
    pub processes: usize,
    pub files: u64,
    pub connections: u64,
    pub warnings: Vec<String>,
}

/// Saves a pod. It runs on, unless told otherwise; if anything fails it runs on in any case.
pub fn create(store: &Store, pod: &Pod, options: &Options) -> Result<Made> {
    let began = Instant::now();
    let (name, path) = place(store, pod, options)?;
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut capture = Capture::soon(pod)?;
    let spec = capture.spec().clone();
    let compression = options.compression.unwrap_or(Compression::default_for(options.export.is_some()));
    // What is to be encrypted lies in memory until it is.
    if !options.recipients.is_empty() {
        seal::check(&options.recipients)?;
        room::for_sealing(&capture.processes(), compression != Compression::None, &spec.name)?;
    }
    let file = match options.recipients.is_empty() {
        true => Beginning::Nameless(Nameless::new(dir)?),
        false => Beginning::Memory(memory()?),
    };
    let mut w = Writer::to_file(file.file().try_clone().doing(|| "copy a descriptor".into())?)?;
    capture.first_pass(&mut w)?;
    // Who goes on running shall stand still for what changes meanwhile alone; or, where that cannot be told, for the
    // copying.
    let mut rounds = Rounds::default();
    let again = |pass| Ok(rounds.judge(pass)? == Next::Again);
    if !options.stop && !capture.memory_ahead(&mut w, LEAST_TO_COPY, again)? && file.is_nameless() {
        room::make(file.file(), w.bytes(), &capture.processes());
    }
    let watchdog = Watchdog::over_writes();
    let mut still = capture.freeze(options.stop, None)?;
    let captured = still.dump(&mut w, || Ok(()))?;
    let mut frozen = still.since().elapsed();
    // Who goes on does so from here; who is to end stands still until the checkpoint has its name.
    let ending = options.stop.then_some(still);
    // The disk may take its time now.
    drop(watchdog);
    let Finished { file, bytes, unpacked_bytes, duplicate_bytes } =
        finish(w, file, dir, compression, &options.recipients)?;
    file.name(&path)?;
    if let Some(still) = ending {
        frozen = still.since().elapsed();
        still.kill()?;
    }
    volumes::remember(store, &spec)?;
    store.event(pod, "checkpoint", &[("name", &name)]);
    let Captured { dump, files, connections } = captured;
    let processes = dump.processes;
    Ok(Made {
        name,
        path,
        bytes,
        unpacked_bytes,
        duplicate_bytes,
        frozen,
        total: began.elapsed(),
        processes,
        files: files.files,
        connections: connections.kept,
        warnings: dump.warnings,
    })
}

/// Where a checkpoint is written first.
enum Beginning {
    Nameless(Nameless),
    Memory(File),
}

impl Beginning {
    fn file(&self) -> &File {
        match self {
            Beginning::Nameless(file) => file.file(),
            Beginning::Memory(file) => file,
        }
    }

    /// Whether nothing of it stays when this process is killed.
    fn is_nameless(&self) -> bool {
        match self {
            Beginning::Nameless(file) => file.is_nameless(),
            Beginning::Memory(_) => true,
        }
    }
}

/// A file in memory, for what must not be on a disk in clear. It goes with its last descriptor.
fn memory() -> Result<File> {
    let made = memfd_create(c"checkpoint", MFdFlags::MFD_CLOEXEC);
    made.map(File::from).doing(|| "make a file in memory".into())
}

/// Opens a checkpoint; one that is encrypted with one of the identities, into memory.
fn open_clear(path: &Path, identities: &[Identity]) -> Result<File> {
    let mut file = File::open(path).map_err(|error| {
        Problem::new(MISSING, format!("cannot open the checkpoint {}", path.display())).because(error)
    })?;
    if !seal::is_sealed(&file).doing(|| format!("read {}", path.display()))? {
        return Ok(file);
    }
    if identities.is_empty() {
        let what = format!("the checkpoint {} is encrypted", path.display());
        return Err(Problem::new(seal::ENCRYPTED, what)
            .fix("give the file of an identity that it was encrypted to: --identity FILE"));
    }
    let bytes = file.metadata().map_or(0, |metadata| metadata.len());
    room::in_memory(bytes, || format!("the checkpoint {}", path.display()))?;
    let mut clear = memory()?;
    seal::open(&mut file, &mut clear, identities)?;
    clear.rewind().doing(|| "read the opened checkpoint".into())?;
    Ok(clear)
}

/// What only lacks its name.
struct Finished {
    file: Nameless,
    bytes: u64,
    unpacked_bytes: u64,
    duplicate_bytes: u64,
}

/// Ends the stream, makes it smaller if that is wanted, and has the disk hold it.
fn finish(
    w: Writer<File>,
    file: Beginning,
    dir: &Path,
    compression: Compression,
    recipients: &[Recipient],
) -> Result<Finished> {
    let mut written = w.finish()?;
    let end = written.stream_position().and_then(|end| room::trim(&written, end).map(|()| end));
    let unpacked_bytes = end.code(WRITE, || "end the checkpoint".into())?;
    // Of what it was written to nothing must stay open: its room is wanted.
    drop(written);
    let (file, duplicate_bytes) = match compression {
        Compression::None => (file, 0),
        Compression::Zstd(level) => smaller(file, dir, level)?,
    };
    let file = match file {
        Beginning::Nameless(file) => file,
        Beginning::Memory(mut clear) => {
            let file = Nameless::new(dir)?;
            clear.rewind().code(WRITE, || "read the checkpoint once more".into())?;
            seal::seal(&mut clear, &mut file.file(), recipients)?;
            file
        }
    };
    file.file().sync_all().code(WRITE, || "write the checkpoint to the disk".into())?;
    let bytes = file.file().metadata().doing(|| "look at the checkpoint".into())?.len();
    Ok(Finished { file, bytes, unpacked_bytes, duplicate_bytes })
}

/// A packed one instead, of the same sort; and how many bytes of pages were in it already.
fn smaller(file: Beginning, dir: &Path, level: i32) -> Result<(Beginning, u64)> {
    let smaller = match &file {
        Beginning::Nameless(_) => Beginning::Nameless(Nameless::new(dir)?),
        Beginning::Memory(_) => Beginning::Memory(memory()?),
    };
    let copy = smaller.file().try_clone().doing(|| "copy a descriptor".into())?;
    let (_, saving) = pack::pack(file.file(), copy, level).map_err(|problem| match problem.code() {
        WRITE => Problem::new(WRITE, "pack the checkpoint, which takes room for a second file until it is done")
            .because(problem)
            .fix("make room for it, or `--compress none`"),
        _ => problem,
    })?;
    Ok((smaller, saving.alike))
}

/// Name and path of a checkpoint to be made.
fn place(store: &Store, pod: &Pod, options: &Options) -> Result<(String, PathBuf)> {
    if let Some(path) = &options.export {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        return Ok((name, path.clone()));
    }
    let dir = store.checkpoints_dir()?;
    let at = |name: &str| dir.join(format!("{name}.{EXTENSION}"));
    if let Some(name) = &options.name {
        check_name(name)?;
        if at(name).exists() {
            return Err(Problem::new("E-NAME", format!("there is a checkpoint '{name}' already"))
                .fix(format!("choose another name, or `pod checkpoint rm {name}`")));
        }
        return Ok((name.clone(), at(name)));
    }
    let pod = pod.name()?;
    let mut n = 1;
    while at(&format!("{pod}-{n}")).exists() {
        n += 1;
    }
    Ok((format!("{pod}-{n}"), at(&format!("{pod}-{n}"))))
}

/// One line of `ls`.
#[derive(Debug, Clone, Serialize)]
pub struct Listed {
    pub name: String,
    pub path: PathBuf,
    pub bytes: u64,
    pub pod: String,
    pub id: String,
    pub host: String,
    /// Seconds since the epoch.
    pub written: u64,
    /// Why it cannot be used, if so.
    pub problem: Option<String>,
}

/// The checkpoints of the store, oldest first.
pub fn list(store: &Store) -> Result<Vec<Listed>> {
    let dir = store.checkpoints_dir()?;
    let mut found = Vec::new();
    for entry in fs::read_dir(&dir).doing(|| format!("list {}", dir.display()))?.flatten() {
        let path = entry.path();
        if path.extension().is_none_or(|e| e != EXTENSION) {
            continue;
        }
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let metadata = entry.metadata().ok();
        let written = metadata.as_ref().and_then(|metadata| metadata.modified().ok());
        let written = written.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
        let mut listed = Listed {
            name,
            bytes: metadata.map_or(0, |metadata| metadata.len()),
            pod: String::new(),
            id: String::new(),
            host: String::new(),
            // Until it says so itself.
            written: written.map_or(0, |time| time.as_secs()),
            problem: None,
            path,
        };
        match head(&listed.path) {
            Ok(Origin { spec, host, written, .. }) => {
                (listed.pod, listed.id, listed.host, listed.written) = (spec.name, spec.id, host, written);
            }
            Err(problem) if problem.code() == seal::ENCRYPTED => listed.problem = Some("encrypted".into()),
            Err(problem) => listed.problem = Some(problem.chain()),
        }
        found.push(listed);
    }
    found.sort_by(|a, b| (a.written, &a.name).cmp(&(b.written, &b.name)));
    Ok(found)
}

fn head(path: &Path) -> Result<Origin> {
    let file = open_clear(path, &[])?;
    origin(&mut Reader::new(file)?)
}

/// The file of a checkpoint by its name.
pub fn find(store: &Store, name: &str) -> Result<PathBuf> {
    let path = store.checkpoints_dir()?.join(format!("{name}.{EXTENSION}"));
    if check_name(name).is_ok() && path.exists() {
        return Ok(path);
    }
    let names: Vec<String> = list(store)?.into_iter().map(|l| l.name).collect();
    let problem = Problem::new(MISSING, format!("there is no checkpoint '{name}'"));
    Err(match pod_runtime::store::closest(name, names.iter().map(String::as_str)) {
        Some(close) => {
            problem.fix(format!("did you mean '{close}'? `pod checkpoint ls` lists all; for a file: -i FILE"))
        }
        None => problem.fix("`pod checkpoint ls` lists all; for a file: -i FILE"),
    })
}

pub fn remove(store: &Store, name: &str) -> Result<()> {
    let path = find(store, name)?;
    fs::remove_file(&path).doing(|| format!("remove {}", path.display()))
}

/// Opens a checkpoint and reads it through once, but for the bytes of memory: nothing of it is used before. Those are
/// compared when they are read, and nothing runs before all of them were.
pub fn open_verified(path: &Path, identities: &[Identity]) -> Result<Reader<File>> {
    Reader::of_verified_file(open_clear(path, identities)?)
}
