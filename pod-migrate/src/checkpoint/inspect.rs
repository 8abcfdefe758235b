//! What a checkpoint holds, for people and programs. Nothing is unpacked and nothing is restored.
//!
//! The values of environment variables are where programs keep their secrets: they are left out unless asked for.

use super::Identity;
use super::describe::{self, Socket};
use super::look::{Look, Stored, look};
use super::memory::Memory;
use crate::ids::{FdTableId, FileId};
use crate::image::{Kind, Owner};
use crate::objects::files::{FileState, regular};
use crate::objects::memory::{Backing, Layout, Map, MmState, SharedMemoryKind};
use crate::objects::namespaces::mounts::What;
use crate::objects::task::{Life, Node, ProcessState};
use crate::restore::Image;
use crate::storage;
use pod_runtime::Result;
use pod_runtime::spec::Spec;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// More of a command line or of an environment is not shown.
const MOST_TEXT: u64 = 1 << 20;

#[derive(Debug, Clone, Serialize)]
pub struct Inspected {
    pub path: PathBuf,
    pub bytes: u64,
    pub pod: String,
    pub id: String,
    pub host: String,
    pub version: String,
    /// Seconds since the epoch.
    pub written: u64,
    pub command: Vec<String>,
    /// With the values of its environment only if they were asked for.
    pub spec: Spec,
    /// Of the first process, as it was started: names, or `NAME=VALUE`.
    pub environment: Vec<String>,
    /// Host and domain name that the pod gave itself.
    pub names: Option<(String, String)>,
    pub processes: Vec<Process>,
    /// What `pod exec` had started.
    pub sessions: Vec<Session>,
    /// Open file descriptions by what they are.
    pub open_files: BTreeMap<&'static str, u64>,
    pub sockets: Vec<Socket>,
    /// Maps by what they are, over all processes.
    pub memory: BTreeMap<&'static str, Maps>,
    pub shared_memory: Vec<SharedMemory>,
    /// Bytes of memory in the file, also those that came ahead and are out of date.
    pub memory_bytes: u64,
    /// Mounts that were made inside.
    pub mounts: Vec<Mount>,
    pub network: Option<Network>,
    pub layers: Vec<Layer>,
    pub files: u64,
    pub file_bytes: u64,
    /// Records by kind.
    pub records: BTreeMap<String, Size>,
    /// Others than the owner may read it.
    pub exposed: bool,
}

#[derive(Debug, Clone, Serialize)]
pub struct Process {
    pub pid: i32,
    pub parent: i32,
    pub group: i32,
    pub session: i32,
    /// "running", "stopped", "ended".
    pub state: &'static str,
    /// Its name as the kernel has it.
    pub command: String,
    pub args: Vec<String>,
    pub executable: String,
    pub directory: String,
    pub uid: u32,
    pub gid: u32,
    /// How many.
    pub threads: usize,
    pub thread_names: BTreeMap<i32, String>,
    pub mapped_bytes: u64,
    /// Of its own memory, what the image holds.
    pub stored_bytes: u64,
    pub maps: BTreeMap<&'static str, Maps>,
    pub descriptors: Vec<Descriptor>,
    /// As it is in its memory: names, or `NAME=VALUE`.
    pub environment: Vec<String>,
}

impl Process {
    /// Its command line, or its name if it has none.
    pub fn line(&self) -> String {
        if self.args.is_empty() { self.command.clone() } else { self.args.join(" ") }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Maps {
    pub maps: u64,
    pub bytes: u64,
    /// Private pages that the image holds.
    pub stored_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Descriptor {
    pub fd: i32,
    /// Those with the same number share one open file description.
    pub file: u64,
    pub kind: &'static str,
    pub name: String,
    /// "r", "w", "rw", or "path" for O_PATH.
    pub access: &'static str,
    pub position: u64,
    pub close_on_exec: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SharedMemory {
    pub id: u64,
    /// "anonymous", "file", "sysv".
    pub kind: &'static str,
    pub bytes: u64,
    pub stored_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Session {
    pub id: u64,
    pub pid: i32,
    pub command: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mount {
    pub at: String,
    /// "tmpfs", "bind", "proc".
    pub kind: &'static str,
    /// Of a bind.
    pub from: Option<String>,
}

/// What was made inside; what the pod was given is in its spec.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Network {
    pub addresses: usize,
    pub routes: usize,
    pub rules: usize,
}

/// Files that travel.
#[derive(Debug, Clone, Serialize)]
pub struct Layer {
    /// "the writable layer", "volume 1", the path of a tmpfs.
    pub name: String,
    /// For a volume: where the pod has it.
    pub at: Option<PathBuf>,
    pub files: u64,
    pub bytes: u64,
    pub entries: Vec<Entry>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Entry {
    pub path: String,
    /// "file", "directory", "symlink", …; "whiteout" hides a file of the base.
    pub kind: &'static str,
    pub bytes: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Size {
    pub records: u64,
    pub bytes: u64,
}

/// Reads a checkpoint through: whether it is whole, and what is in it. `values` of environment variables are shown only
/// if asked for.
pub fn inspect(path: &Path, identities: &[Identity], values: bool) -> Result<Inspected> {
    inspected(&look(path, identities)?, values)
}

pub(super) fn inspected(look: &Look, values: bool) -> Result<Inspected> {
    let spec = &look.origin.spec;
    let holders = holders(&look.image);
    let processes = look.image.tree.iter().flat_map(|tree| &tree.processes);
    let processes = processes.map(|node| process(look, node, values)).collect::<Result<Vec<_>>>()?;
    let mut memory: BTreeMap<&'static str, Maps> = BTreeMap::new();
    for (kind, maps) in processes.iter().flat_map(|process| &process.maps) {
        memory.entry(kind).or_default().add(*maps);
    }
    let mut open_files: BTreeMap<&'static str, u64> = BTreeMap::new();
    for file in look.image.files.files.values() {
        *open_files.entry(describe::kind(&file.state)).or_default() += 1;
    }
    let of = |kinds: &[Kind]| {
        let found = kinds.iter().filter_map(|kind| look.contents.kinds.get(kind));
        found.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    };
    let size = |(kind, (records, bytes)): (&Kind, &(u64, u64))| {
        (kind.to_string().to_lowercase(), Size { records: *records, bytes: *bytes })
    };
    Ok(Inspected {
        path: look.path.clone(),
        bytes: look.contents.bytes,
        pod: spec.name.clone(),
        id: spec.id.clone(),
        host: look.origin.host.clone(),
        version: look.origin.version.clone(),
        written: look.origin.written,
        command: spec.process.args.clone(),
        environment: shown(spec.process.env.iter().map(|line| line.as_bytes()), values),
        spec: hidden(spec, values),
        names: look.parts.names.as_ref().map(|names| (names.host.clone(), names.domain.clone())),
        processes,
        sessions: sessions(look),
        open_files,
        sockets: sockets(&look.image, &holders),
        memory,
        shared_memory: shared_memory(&look.image, &look.memory),
        memory_bytes: of(&[Kind::PAGES, Kind::AHEAD_PAGES, Kind::SHARED_PAGES]).1,
        mounts: mounts(look),
        network: look.parts.network.as_ref().map(|state| Network {
            addresses: state.addresses.len(),
            routes: state.routes.len(),
            rules: state.rules.len(),
        }),
        layers: layers(look),
        files: of(&[Kind::STORAGE_ENTRY]).0,
        file_bytes: of(&[Kind::STORAGE_DATA, Kind::FILE_DATA]).1,
        records: look.contents.kinds.iter().map(size).collect(),
        exposed: look.exposed,
    })
}

/// The spec without what may be secret in it.
fn hidden(spec: &Spec, values: bool) -> Spec {
    let mut spec = spec.clone();
    spec.process.env = shown(spec.process.env.iter().map(|line| line.as_bytes()), values);
    spec
}

/// Of `NAME=VALUE` the name, unless values are wanted.
fn shown<'a>(lines: impl Iterator<Item = &'a [u8]>, values: bool) -> Vec<String> {
    let text = |line: &[u8]| String::from_utf8_lossy(line).into_owned();
    lines
        .map(|line| match line.iter().position(|byte| *byte == b'=') {
            _ if values => text(line),
            Some(end) => text(&line[..end]),
            // Not of the form: a program has written over it, and nobody knows with what.
            None => "?".into(),
        })
        .collect()
}

fn process(look: &Look, node: &Node, values: bool) -> Result<Process> {
    let (image, memory) = (&look.image, &look.memory);
    let state = image.processes.get(&node.pid);
    let space = state.and_then(|state| image.spaces.get(&state.mm));
    let first = state.and_then(|state| state.threads.first());
    let comm = first.map_or(&node.comm, |thread| &thread.comm);
    let (args, environment) = match space {
        Some(space) => texts(memory, space)?,
        None => Default::default(),
    };
    let name = |id: Option<FileId>| id.and_then(|id| image.files.files.get(&id)).map(|file| file.name.clone());
    let maps = space.map(|space| maps(space, image, memory)).unwrap_or_default();
    Ok(Process {
        pid: node.pid.0,
        parent: node.parent.0,
        group: node.group.0,
        session: node.session.0,
        state: match node.life {
            Life::Running => "running",
            Life::Stopped(_) => "stopped",
            Life::Zombie(_) => "ended",
        },
        command: String::from_utf8_lossy(comm).into_owned(),
        args: args.iter().map(|arg| String::from_utf8_lossy(arg).into_owned()).collect(),
        executable: name(space.map(|space| space.exe)).unwrap_or_default(),
        directory: name(state.map(|state| state.cwd)).unwrap_or_default(),
        uid: first.map_or(0, |thread| thread.credentials.uids[1]),
        gid: first.map_or(0, |thread| thread.credentials.gids[1]),
        threads: node.threads.len(),
        thread_names: thread_names(state),
        mapped_bytes: maps.values().map(|maps| maps.bytes).sum(),
        stored_bytes: space.map_or(0, |space| memory.stored(Owner::Mm(space.id))),
        maps,
        descriptors: state.map(|state| descriptors(image, state.fd_table)).unwrap_or_default(),
        environment: shown(environment.iter().map(Vec::as_slice), values),
    })
}

fn thread_names(state: Option<&ProcessState>) -> BTreeMap<i32, String> {
    let threads = state.iter().flat_map(|state| &state.threads);
    threads.map(|thread| (thread.tid.0, String::from_utf8_lossy(&thread.comm).into_owned())).collect()
}

/// Strings, as a process has them in its memory.
type Texts = Vec<Vec<u8>>;

/// Command line and environment, as /proc shows them: who writes over the end of the first goes on in the second.
pub(super) fn texts(memory: &Memory, space: &MmState) -> Result<(Texts, Texts)> {
    let Layout { arg_start, arg_end, env_start, env_end, .. } = space.layout;
    let most = |start: u64, end: u64| start..end.clamp(start, start.saturating_add(MOST_TEXT));
    let mut args = memory.read(Owner::Mm(space.id), most(arg_start, arg_end))?;
    let environment = memory.read(Owner::Mm(space.id), most(env_start, env_end))?;
    let overwritten = args.last().is_some_and(|byte| *byte != 0) && env_start == arg_end;
    if overwritten {
        args.extend(environment.iter().take_while(|byte| **byte != 0));
    }
    let environment = if overwritten { Vec::new() } else { split(&environment) };
    Ok((split(&args), environment))
}

fn split(bytes: &[u8]) -> Vec<Vec<u8>> {
    // What a program clears behind its title is no argument.
    let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    let parts = bytes[..end].split(|byte| *byte == 0);
    parts.map(<[u8]>::to_vec).filter(|_| end > 0).collect()
}

impl Maps {
    fn add(&mut self, other: Maps) {
        self.maps += other.maps;
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.stored_bytes += other.stored_bytes;
    }
}

fn maps(space: &MmState, image: &Image, memory: &Memory) -> BTreeMap<&'static str, Maps> {
    let mut found: BTreeMap<&'static str, Maps> = BTreeMap::new();
    for map in &space.maps {
        let stored_bytes = memory.stored_in(Owner::Mm(space.id), &(map.start..map.end));
        let one = Maps { maps: 1, bytes: map.end.saturating_sub(map.start), stored_bytes };
        found.entry(kind_of_map(map, &space.layout, image)).or_default().add(one);
    }
    found
}

fn kind_of_map(map: &Map, layout: &Layout, image: &Image) -> &'static str {
    let has = |address: u64| map.start <= address && address < map.end;
    match map.backing {
        Backing::Vdso | Backing::Vvar => "kernel",
        Backing::Shared { .. } => "shared",
        Backing::File { file, .. } => match image.files.files.get(&file).map(|file| &file.state) {
            Some(FileState::Regular(state)) if !is_deleted(state) && map.shared => "shared_file",
            Some(FileState::Regular(_)) if !map.shared => "file",
            _ => "shared",
        },
        Backing::Anonymous if has(layout.start_stack) => "stack",
        Backing::Anonymous if layout.start_brk < map.end && map.start < layout.brk => "heap",
        Backing::Anonymous if map.protection == 0 => "reserved",
        Backing::Anonymous if map.huge > 0 => "huge",
        Backing::Anonymous => "anonymous",
    }
}

fn is_deleted(state: &regular::State) -> bool {
    matches!(state.existence, regular::Existence::Deleted(_))
}

fn descriptors(image: &Image, table: FdTableId) -> Vec<Descriptor> {
    let fds = image.files.tables.get(&table).into_iter().flat_map(|table| &table.fds);
    let describe = |fd: &crate::objects::files::Fd| {
        let file = image.files.files.get(&fd.file)?;
        Some(Descriptor {
            fd: fd.fd.0,
            file: fd.file.0,
            kind: describe::kind(&file.state),
            name: describe::name(file),
            access: describe::access(file),
            position: file.position,
            close_on_exec: fd.close_on_exec,
        })
    };
    fds.filter_map(describe).collect()
}

/// Who has a description, as "PID/FD".
fn holders(image: &Image) -> BTreeMap<FileId, Vec<String>> {
    let mut found: BTreeMap<FileId, Vec<String>> = BTreeMap::new();
    for state in image.processes.values() {
        let fds = image.files.tables.get(&state.fd_table).into_iter().flat_map(|table| &table.fds);
        for fd in fds {
            found.entry(fd.file).or_default().push(format!("{}/{}", state.pid, fd.fd));
        }
    }
    found
}

fn sockets(image: &Image, holders: &BTreeMap<FileId, Vec<String>>) -> Vec<Socket> {
    let mut found: Vec<Socket> = Vec::new();
    for (id, file) in &image.files.files {
        if let FileState::Socket(state) = &file.state {
            let held_by = holders.get(id).cloned().unwrap_or_default();
            found.push(Socket { held_by, ..describe::socket(state) });
        }
    }
    found.sort();
    found
}

fn sessions(look: &Look) -> Vec<Session> {
    let sessions = look.parts.moment.iter().flat_map(|moment| &moment.sessions);
    sessions.map(|about| Session { id: about.id, pid: about.pid, command: about.command.clone() }).collect()
}

fn shared_memory(image: &Image, memory: &Memory) -> Vec<SharedMemory> {
    let all = image.shared.values().map(|state| {
        let (kind, owner) = match state.kind {
            SharedMemoryKind::Anonymous => ("anonymous", None),
            SharedMemoryKind::Contents(file) => ("file", Some(Owner::File(file))),
            SharedMemoryKind::SysV { .. } => ("sysv", None),
        };
        let of = |owner| memory.stored(owner);
        let stored_bytes = of(Owner::SharedMemory(state.id)) + owner.map_or(0, of);
        SharedMemory { id: state.id.0, kind, bytes: state.bytes, stored_bytes }
    });
    all.collect()
}

fn mounts(look: &Look) -> Vec<Mount> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let mount = |mount: &crate::objects::namespaces::mounts::Inside| {
        let (kind, from) = match &mount.what {
            What::Memory { .. } => ("tmpfs", None),
            What::Bind { from } => ("bind", Some(text(from))),
            What::Proc => ("proc", None),
        };
        Mount { at: text(&mount.at), kind, from }
    };
    look.parts.mounts.iter().map(mount).collect()
}

fn layers(look: &Look) -> Vec<Layer> {
    let layer = |(place, files): (&storage::Place, &BTreeMap<Vec<u8>, Stored>)| {
        let at = match place {
            storage::Place::Volume(n) => look.origin.spec.volumes.get(*n).map(|volume| volume.destination.clone()),
            _ => None,
        };
        let files: Vec<_> = files.iter().filter(|(path, _)| !path.is_empty()).collect();
        Layer {
            name: place.name(),
            at,
            files: files.len() as u64,
            bytes: files.iter().map(|(_, stored)| stored.bytes).sum(),
            entries: files.into_iter().map(|(path, stored)| entry(path, stored)).collect(),
        }
    };
    look.parts.layers.iter().map(layer).collect()
}

fn entry(path: &[u8], stored: &Stored) -> Entry {
    let kind = match stored.node {
        storage::Node::Directory => "directory",
        storage::Node::File { .. } | storage::Node::Patch { .. } => "file",
        storage::Node::Symlink(_) => "symlink",
        storage::Node::HardLink(_) => "hardlink",
        storage::Node::Character { major: 0, minor: 0 } => "whiteout",
        storage::Node::Character { .. } | storage::Node::Block { .. } => "device",
        storage::Node::Fifo => "fifo",
        storage::Node::Socket => "socket",
        storage::Node::Removed => "removed",
    };
    Entry { path: String::from_utf8_lossy(path).into_owned(), kind, bytes: stored.bytes }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_hidden_unless_wanted() {
        let lines = ["PATH=/bin", "TOKEN=s3cret=x", "s3cret"].map(str::as_bytes);
        assert_eq!(shown(lines.into_iter(), false), ["PATH", "TOKEN", "?"]);
        assert_eq!(shown(lines.into_iter(), true), ["PATH=/bin", "TOKEN=s3cret=x", "s3cret"]);
    }

    #[test]
    fn command_lines_are_split_as_ps_does() {
        let text =
            |bytes: &[u8]| split(bytes).into_iter().map(|arg| String::from_utf8(arg).unwrap()).collect::<Vec<_>>();
        assert_eq!(text(b"sh\0-c\0\0x\0"), ["sh", "-c", "", "x"]);
        assert_eq!(text(b"nginx: worker\0\0\0\0"), ["nginx: worker"]);
        assert!(text(b"").is_empty());
        assert!(text(b"\0\0").is_empty());
    }
}
