//! What is different between two checkpoints, of one pod as a rule: processes are the same if their pid is.

use super::Identity;
use super::describe::Socket;
use super::inspect::{Descriptor, Inspected, Process, Size, inspected};
use super::look::{Look, Stored, look};
use super::memory::Memory;
use crate::ids::{PodPid, SharedMemoryId};
use crate::image::Owner;
use crate::storage::Node;
use pod_runtime::Result;
use serde::Serialize;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3;

#[derive(Debug, Clone, Serialize)]
pub struct Differences {
    pub before: Side,
    pub after: Side,
    pub processes_come: Vec<Named>,
    pub processes_gone: Vec<Named>,
    pub processes_changed: Vec<Changed>,
    /// Of each process that is in both, if anything of its own memory is different.
    pub memory: Vec<Pages>,
    /// By the number that an image has for it.
    pub shared_memory: Vec<SharedPages>,
    pub descriptors: Vec<Descriptors>,
    pub sockets_come: Vec<Socket>,
    pub sockets_gone: Vec<Socket>,
    /// The same ends in another state, before and after.
    pub sockets_changed: Vec<(Socket, Socket)>,
    pub files: Vec<File>,
    /// Records by kind, if they take another number of bytes.
    pub records: BTreeMap<String, (Size, Size)>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Side {
    pub path: PathBuf,
    pub pod: String,
    pub id: String,
    pub host: String,
    pub written: u64,
    pub bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Named {
    pub pid: i32,
    pub command: String,
    /// Of its own memory in the image.
    pub stored_bytes: u64,
}

/// A process that is in both and looks different.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Changed {
    pub pid: i32,
    pub command: String,
    /// What, before and after.
    pub what: BTreeMap<&'static str, (String, String)>,
}

/// Numbers of pages of 4096 bytes; pages of zeros are not there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Count {
    pub added: u64,
    pub removed: u64,
    pub changed: u64,
    pub same: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Pages {
    pub pid: i32,
    pub command: String,
    #[serde(flatten)]
    pub pages: Count,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SharedPages {
    pub id: u64,
    #[serde(flatten)]
    pub pages: Count,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Descriptors {
    pub pid: i32,
    pub command: String,
    pub opened: Vec<Descriptor>,
    pub closed: Vec<Descriptor>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct File {
    pub layer: String,
    pub path: String,
    /// "added", "removed", "changed", or "attributes" where the contents are the same.
    pub change: &'static str,
    pub bytes_before: u64,
    pub bytes: u64,
}

/// Reads both through and compares them.
pub fn diff(before: &Path, after: &Path, identities: &[Identity]) -> Result<Differences> {
    let (a, b) = (look(before, identities)?, look(after, identities)?);
    let (was, is) = (inspected(&a, false)?, inspected(&b, false)?);
    let both = pairs(&was, &is);
    let only = |these: &Inspected, others: &Inspected| {
        let others: BTreeSet<i32> = others.processes.iter().map(|process| process.pid).collect();
        let alone = these.processes.iter().filter(|process| !others.contains(&process.pid));
        alone.map(named).collect::<Vec<_>>()
    };
    let (sockets_gone, sockets_come, sockets_changed) = sockets(&was.sockets, &is.sockets);
    Ok(Differences {
        before: side(&was),
        after: side(&is),
        processes_come: only(&is, &was),
        processes_gone: only(&was, &is),
        processes_changed: both.iter().filter_map(|(was, is)| changed(was, is)).collect(),
        memory: memory(&a, &b, &both)?,
        shared_memory: shared_memory(&a, &b)?,
        descriptors: both.iter().filter_map(|(was, is)| descriptors(was, is)).collect(),
        sockets_come,
        sockets_gone,
        sockets_changed,
        files: files(&a, &b),
        records: records(&was, &is),
    })
}

fn side(of: &Inspected) -> Side {
    let Inspected { path, pod, id, host, written, bytes, .. } = of.clone();
    Side { path, pod, id, host, written, bytes }
}

fn pairs<'a>(was: &'a Inspected, is: &'a Inspected) -> Vec<(&'a Process, &'a Process)> {
    let before: BTreeMap<i32, &Process> = was.processes.iter().map(|process| (process.pid, process)).collect();
    is.processes.iter().filter_map(|process| Some((*before.get(&process.pid)?, process))).collect()
}

fn named(process: &Process) -> Named {
    Named { pid: process.pid, command: process.line(), stored_bytes: process.stored_bytes }
}

fn changed(was: &Process, is: &Process) -> Option<Changed> {
    let all = [
        ("command", was.line(), is.line()),
        ("executable", was.executable.clone(), is.executable.clone()),
        ("directory", was.directory.clone(), is.directory.clone()),
        ("parent", was.parent.to_string(), is.parent.to_string()),
        ("state", was.state.to_owned(), is.state.to_owned()),
        ("threads", was.threads.to_string(), is.threads.to_string()),
        ("uid", was.uid.to_string(), is.uid.to_string()),
        ("mapped_bytes", was.mapped_bytes.to_string(), is.mapped_bytes.to_string()),
    ];
    let what: BTreeMap<_, _> =
        all.into_iter().filter(|(_, was, is)| was != is).map(|(name, was, is)| (name, (was, is))).collect();
    (!what.is_empty()).then(|| Changed { pid: is.pid, command: is.line(), what })
}

/// Address and digest of each page, in order.
fn pages(memory: &Memory, owner: Option<Owner>) -> Result<Vec<(u64, u128)>> {
    let mut found = Vec::new();
    if let Some(owner) = owner {
        memory.each_page(owner, |address, page| found.push((address, xxh3::xxh3_128(page))))?;
    }
    found.sort_unstable();
    Ok(found)
}

fn count(was: &[(u64, u128)], is: &[(u64, u128)]) -> Count {
    let mut count = Count::default();
    let (mut a, mut b) = (was.iter().peekable(), is.iter().peekable());
    loop {
        let order = match (a.peek(), b.peek()) {
            (None, None) => return count,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some((was, _)), Some((is, _))) => was.cmp(is),
        };
        match order {
            Ordering::Less => count.removed += u64::from(a.next().is_some()),
            Ordering::Greater => count.added += u64::from(b.next().is_some()),
            Ordering::Equal if a.next() == b.next() => count.same += 1,
            Ordering::Equal => count.changed += 1,
        }
    }
}

impl Count {
    fn is_none(&self) -> bool {
        (self.added, self.removed, self.changed) == (0, 0, 0)
    }
}

fn memory(a: &Look, b: &Look, both: &[(&Process, &Process)]) -> Result<Vec<Pages>> {
    let mut found = Vec::new();
    for (_, is) in both {
        let space = |look: &Look| look.image.processes.get(&PodPid(is.pid)).map(|state| Owner::Mm(state.mm));
        let pages = count(&pages(&a.memory, space(a))?, &pages(&b.memory, space(b))?);
        if !pages.is_none() {
            found.push(Pages { pid: is.pid, command: is.line(), pages });
        }
    }
    Ok(found)
}

fn shared_memory(a: &Look, b: &Look) -> Result<Vec<SharedPages>> {
    let ids: BTreeSet<SharedMemoryId> = a.image.shared.keys().chain(b.image.shared.keys()).copied().collect();
    let mut found = Vec::new();
    for id in ids {
        let owner = |look: &Look| look.image.shared.contains_key(&id).then_some(Owner::SharedMemory(id));
        let pages = count(&pages(&a.memory, owner(a))?, &pages(&b.memory, owner(b))?);
        if !pages.is_none() {
            found.push(SharedPages { id: id.0, pages });
        }
    }
    Ok(found)
}

fn descriptors(was: &Process, is: &Process) -> Option<Descriptors> {
    // What is said of it besides its name tells of the moment.
    let key = |one: &Descriptor| {
        let name = one.name.split(" (").next().unwrap_or_default().to_owned();
        (one.fd, one.kind, name, one.access)
    };
    let only = |these: &[Descriptor], others: &[Descriptor]| {
        let others: BTreeSet<_> = others.iter().map(key).collect();
        these.iter().filter(|one| !others.contains(&key(one))).cloned().collect::<Vec<_>>()
    };
    let opened = only(&is.descriptors, &was.descriptors);
    let closed = only(&was.descriptors, &is.descriptors);
    let any = !opened.is_empty() || !closed.is_empty();
    any.then(|| Descriptors { pid: is.pid, command: is.line(), opened, closed })
}

/// Gone, come, and the same in another state. Sockets of the same ends are told apart by their place in the list.
fn sockets(was: &[Socket], is: &[Socket]) -> (Vec<Socket>, Vec<Socket>, Vec<(Socket, Socket)>) {
    type Key = (&'static str, String, String, usize);
    let by_key = |all: &[Socket]| {
        let mut times: BTreeMap<(&'static str, String, String), usize> = BTreeMap::new();
        let mut found: BTreeMap<Key, Socket> = BTreeMap::new();
        for one in all {
            let seen = times.entry((one.protocol, one.local.clone(), one.peer.clone())).or_default();
            found.insert((one.protocol, one.local.clone(), one.peer.clone(), *seen), one.clone());
            *seen += 1;
        }
        found
    };
    let (was, is) = (by_key(was), by_key(is));
    let only = |these: &BTreeMap<Key, Socket>, others: &BTreeMap<Key, Socket>| {
        these.iter().filter(|(key, _)| !others.contains_key(*key)).map(|(_, one)| one.clone()).collect::<Vec<_>>()
    };
    let changed = was.iter().filter_map(|(key, was)| {
        let is = is.get(key)?;
        (was != is).then(|| (was.clone(), is.clone()))
    });
    (only(&was, &is), only(&is, &was), changed.collect())
}

fn files(a: &Look, b: &Look) -> Vec<File> {
    let none = BTreeMap::new();
    let places: BTreeSet<_> = a.parts.layers.keys().chain(b.parts.layers.keys()).collect();
    let mut found = Vec::new();
    for place in places {
        let (was, is) = (a.parts.layers.get(place).unwrap_or(&none), b.parts.layers.get(place).unwrap_or(&none));
        let paths: BTreeSet<&Vec<u8>> = was.keys().chain(is.keys()).collect();
        for path in paths {
            let Some(change) = change(was.get(path), is.get(path)) else { continue };
            let bytes = |of: &BTreeMap<Vec<u8>, Stored>| of.get(path).map_or(0, size);
            found.push(File {
                layer: place.name(),
                path: String::from_utf8_lossy(path).into_owned(),
                change,
                bytes_before: bytes(was),
                bytes: bytes(is),
            });
        }
    }
    found
}

fn size(stored: &Stored) -> u64 {
    match stored.node {
        Node::File { size } => size,
        _ => 0,
    }
}

fn change(was: Option<&Stored>, is: Option<&Stored>) -> Option<&'static str> {
    let (was, is) = match (was, is) {
        (None, None) => return None,
        (None, Some(_)) => return Some("added"),
        (Some(_), None) => return Some("removed"),
        (Some(was), Some(is)) => (was, is),
    };
    // To have been read is no change.
    let without_access = |stored: &Stored| {
        stored.meta.clone().map(|mut meta| {
            meta.accessed = (0, 0);
            meta
        })
    };
    if was.node != is.node || was.digest != is.digest {
        Some("changed")
    } else if without_access(was) != without_access(is) {
        Some("attributes")
    } else {
        None
    }
}

fn records(was: &Inspected, is: &Inspected) -> BTreeMap<String, (Size, Size)> {
    let kinds: BTreeSet<&String> = was.records.keys().chain(is.records.keys()).collect();
    let of = |side: &Inspected, kind: &String| side.records.get(kind).copied().unwrap_or_default();
    let both = kinds.into_iter().map(|kind| (kind.clone(), (of(was, kind), of(is, kind))));
    both.filter(|(_, (was, is))| was.bytes != is.bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_counted_by_what_became_of_them() {
        let was = [(0, 1), (4096, 2), (8192, 3)];
        let is = [(4096, 2), (8192, 4), (12288, 5)];
        assert_eq!(count(&was, &is), Count { added: 1, removed: 1, changed: 1, same: 1 });
        assert_eq!(count(&was, &was), Count { same: 3, ..Count::default() });
        assert_eq!(count(&[], &is), Count { added: 3, ..Count::default() });
    }

    #[test]
    fn sockets_of_the_same_ends_are_not_taken_for_one() {
        let socket = |local: &str, state| Socket {
            protocol: "tcp",
            state,
            local: local.into(),
            peer: String::new(),
            unread_bytes: 0,
            unsent_bytes: 0,
            held_by: Vec::new(),
        };
        let was = [socket("a", "listen"), socket("a", "listen"), socket("b", "closed")];
        let is = [socket("a", "listen"), socket("b", "listen"), socket("c", "closed")];
        let (gone, come, changed) = sockets(&was, &is);
        assert_eq!((gone, come), (vec![was[0].clone()], vec![is[2].clone()]));
        assert_eq!(changed, [(was[2].clone(), is[1].clone())]);
    }
}
