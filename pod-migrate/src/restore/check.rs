//! What is believed of an image before anything is made of it: that every id that something names is there, and that
//! numbers are ones that a kernel could have had. After it the walk may index by them.
//!
//! The state of one object is checked where it is made, by the kernel mostly: a wrong one is a call that fails, in a pod
//! that does not run yet.

use super::{Image, memory, plan};
use crate::ids::PodPid;
use crate::image::damaged;
use crate::objects::files::FdTable;
use crate::objects::memory::{SharedMemoryKind, SharedMemoryState};
use crate::objects::namespaces::cgroups;
use crate::objects::task::check::TABLES;
use crate::objects::task::{Life, Node, ProcessState, undo};
use crate::{Problem, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;

/// The kernel's own PID_MAX_LIMIT.
const MOST_PIDS: i32 = 1 << 22;
/// Above the highest number that fs.nr_open lets a program ask for.
const MOST_DESCRIPTORS: i32 = 1 << 30;
/// Largest piece of shared memory: what an address space holds.
pub(super) const MOST_SHARED: u64 = 1 << 47;
/// Generations of processes, each the child of the one before. The walk down is a recursion.
const MOST_GENERATIONS: usize = 1000;
/// Signals that stop a process.
const STOPPING: [i32; 4] = [libc::SIGSTOP, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU];

pub(super) fn image(image: &Image) -> Result<()> {
    let nodes = &image.tree.as_ref().ok_or_else(|| damaged("the image has no processes"))?.processes;
    if nodes.is_empty() || nodes.len() > MOST_PIDS as usize {
        return Err(damaged("the image has no sensible number of processes"));
    }
    nodes.iter().try_for_each(node)?;
    shape(nodes)?;
    plan::plan(nodes)?;
    let known = |id: &crate::ids::FileId| image.files.files.contains_key(id);
    for (id, space) in &image.spaces {
        same("memory", id, &space.id)?;
        memory::check(space, &image.shared, known)?;
        if !known(&space.exe) {
            return Err(damaged(format!("memory {id} has no program in the image")));
        }
    }
    for (id, kept) in &image.kept {
        let space = image.spaces.get(id).ok_or_else(|| damaged(format!("pages of memory {id}, which nobody has")))?;
        memory::check_kept(space, kept)?;
    }
    for (id, behind) in &image.behind {
        let space = image.spaces.get(id).ok_or_else(|| damaged(format!("pages of memory {id}, which nobody has")))?;
        memory::check_behind(space, behind, image.kept.get(id))?;
    }
    for (id, claims) in &image.claims {
        memory::check_claims(image, *id, claims)?;
    }
    for (id, shared) in &image.shared {
        same("shared memory", id, &shared.id)?;
        shared_memory(shared, known)?;
    }
    for (id, table) in &image.files.tables {
        descriptors(table).map_err(|what| damaged(format!("descriptor table {id} {what}")))?;
        if !table.fds.iter().all(|fd| known(&fd.file)) {
            return Err(damaged(format!("descriptor table {id} names a file that is not in the image")));
        }
    }
    let living: BTreeMap<PodPid, &Node> =
        nodes.iter().filter(|node| !matches!(node.life, Life::Zombie(_))).map(|node| (node.pid, node)).collect();
    if let Some(pid) = living.keys().find(|pid| !image.processes.contains_key(pid)) {
        return Err(damaged(format!("process {pid} has no state in the image")));
    }
    cgroups::believe(&image.cgroups, |pid| living.contains_key(&pid))?;
    undo::believe(&image.undos, &image.ipc.semaphores, |pid| living.contains_key(&pid))?;
    tables_are_apart(image)?;
    for (pid, state) in &image.processes {
        same("process", pid, &state.pid)?;
        let node = living.get(pid).ok_or_else(|| damaged(format!("process {pid} is not in the tree")))?;
        process(image, node, state)?;
    }
    Ok(())
}

/// Each process makes its table itself, with all that belongs to the table and can be made only once: record locks,
/// registrations of signalfds.
fn tables_are_apart(image: &Image) -> Result<()> {
    let mut owners = BTreeMap::new();
    for (pid, state) in &image.processes {
        if let Some(other) = owners.insert(state.fd_table, pid) {
            let what = format!("processes {other} and {pid} of the image share one table of descriptors");
            return Err(Problem::new(TABLES, what));
        }
    }
    Ok(())
}

/// A record's id is what the record itself says.
fn same<T: PartialEq + Display>(what: &str, id: &T, said: &T) -> Result<()> {
    if id == said { Ok(()) } else { Err(damaged(format!("the record of {what} {id} says that it is {said}"))) }
}

fn node(node: &Node) -> Result<()> {
    let pid = |pid: PodPid, least| (least..=MOST_PIDS).contains(&pid.0);
    let pids = pid(node.pid, 1) && pid(node.parent, 0) && pid(node.group, 0) && pid(node.session, 0);
    let life = !matches!(node.life, Life::Stopped(signal) if !STOPPING.contains(&signal));
    if pids && life && node.threads.iter().all(|tid| pid(*tid, 1)) && (0..=64).contains(&node.exit_signal) {
        return Ok(());
    }
    Err(damaged(format!("process {} of the image is none that there can be", node.pid)))
}

/// One tree (or several) without circles, with the first process at a root.
fn shape(nodes: &[Node]) -> Result<()> {
    let mut children: BTreeMap<PodPid, Vec<PodPid>> = BTreeMap::new();
    for node in nodes {
        children.entry(node.parent).or_default().push(node.pid);
    }
    if !nodes.iter().any(|n| n.pid == PodPid(1) && n.parent == PodPid(0) && !matches!(n.life, Life::Zombie(_))) {
        return Err(damaged("the image has no first process"));
    }
    let mut reached = 0;
    let mut generation = vec![PodPid(0)];
    for _ in 0..=MOST_GENERATIONS {
        generation = generation.iter().filter_map(|parent| children.remove(parent)).flatten().collect();
        reached += generation.len();
        if generation.is_empty() {
            break;
        }
    }
    if !generation.is_empty() {
        let what = format!("the image has more than {MOST_GENERATIONS} generations of processes");
        return Err(Problem::new("E-TREE-SHAPE", what));
    }
    if reached < nodes.len() {
        return Err(damaged("a process of the image has no way to the first process"));
    }
    Ok(())
}

fn shared_memory(state: &SharedMemoryState, known: impl Fn(&crate::ids::FileId) -> bool) -> Result<()> {
    let wrong = |what: &str| Err(damaged(format!("shared memory {} {what}", state.id)));
    if state.bytes > MOST_SHARED {
        return wrong("is larger than memory can be");
    }
    match &state.kind {
        SharedMemoryKind::Contents(file) if !known(file) => wrong("has no file"),
        _ => Ok(()),
    }
}

/// In order and each once: then the lowest free number is known at every step.
fn descriptors(table: &FdTable) -> std::result::Result<(), &'static str> {
    if table.fds.iter().any(|fd| !(0..MOST_DESCRIPTORS).contains(&fd.fd.0)) {
        return Err("has a number that cannot be");
    }
    if table.fds.windows(2).any(|pair| pair[0].fd >= pair[1].fd) {
        return Err("is out of order");
    }
    Ok(())
}

fn process(image: &Image, node: &Node, state: &ProcessState) -> Result<()> {
    let lacks = |what: &str| damaged(format!("process {} has no {what} in the image", node.pid));
    let known = |id: &crate::ids::FileId| image.files.files.contains_key(id);
    if !image.spaces.contains_key(&state.mm) {
        return Err(lacks("memory"));
    }
    if !image.files.tables.contains_key(&state.fd_table) {
        return Err(lacks("descriptors"));
    }
    if !known(&state.cwd) || !state.root.as_ref().is_none_or(known) {
        return Err(lacks("directory"));
    }
    if state.handlers.len() != 64 {
        return Err(lacks("set of handlers"));
    }
    let named: BTreeSet<PodPid> = node.threads.iter().copied().collect();
    let described: BTreeSet<PodPid> = state.threads.iter().map(|thread| thread.tid).collect();
    if state.threads.is_empty() || named != described || described.len() != state.threads.len() {
        return Err(lacks("sensible threads"));
    }
    state.threads.iter().try_for_each(|thread| image.filters(&thread.seccomp).map(drop))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{FileId, SharedMemoryId, TaskFd};
    use crate::image::DAMAGED;
    use crate::objects::files::Fd;
    use crate::objects::task::Tree;

    fn plain(pid: i32, parent: i32) -> Node {
        Node {
            pid: PodPid(pid),
            parent: PodPid(parent),
            group: PodPid(1),
            session: PodPid(1),
            exit_signal: libc::SIGCHLD,
            life: Life::Running,
            threads: vec![PodPid(pid)],
            comm: Default::default(),
        }
    }

    fn said(nodes: Vec<Node>) -> Problem {
        image(&Image { tree: Some(Tree { processes: nodes, ..Tree::default() }), ..Image::default() }).unwrap_err()
    }

    #[test]
    fn numbers_that_no_kernel_has() {
        let wrong: [fn(&mut Node); 7] = [
            |n| n.pid = PodPid(i32::MAX),
            |n| n.pid = PodPid(0),
            |n| n.group = PodPid(-1),
            |n| n.session = PodPid(i32::MIN),
            |n| n.exit_signal = 65,
            |n| n.life = Life::Stopped(libc::SIGKILL),
            |n| n.threads = vec![PodPid(2), PodPid(i32::MAX)],
        ];
        for change in wrong {
            let mut second = plain(2, 1);
            change(&mut second);
            let problem = said(vec![plain(1, 0), second]);
            assert!(problem.code() == DAMAGED && problem.what().contains("none that there can be"), "{problem:?}");
        }
        assert!(said(vec![plain(1, 0), plain(2, 1)]).what().contains("no state"), "and these are good");
    }

    #[test]
    fn trees_that_are_none() {
        assert!(said(vec![plain(2, 0)]).what().contains("no first process"));
        assert!(said(vec![plain(1, 0), plain(2, 3), plain(3, 2)]).what().contains("no way"));
        assert!(said(vec![plain(1, 0), plain(2, 9)]).what().contains("no way"));
        assert!(said(vec![plain(1, 0), plain(1, 0)]).what().contains("same pid"));
        let chain = |length: i32| (0..length).map(|n| plain(n + 1, n)).collect();
        assert_eq!(said(chain(1001)).code(), "E-TREE-SHAPE");
        assert!(said(chain(1000)).what().contains("no state"));
    }

    #[test]
    fn descriptors_and_shared_memory() {
        let table = |numbers: &[i32]| FdTable {
            fds: numbers.iter().map(|n| Fd { fd: TaskFd(*n), file: FileId(1), close_on_exec: false }).collect(),
            locks: Vec::new(),
        };
        assert!(descriptors(&table(&[0, 1, 7])).is_ok());
        for wrong in [&[-1][..], &[1, 0], &[1, 1], &[i32::MAX]] {
            assert!(descriptors(&table(wrong)).is_err(), "{wrong:?}");
        }
        let piece = |bytes, kind| SharedMemoryState { id: SharedMemoryId(1), bytes, kind };
        assert!(shared_memory(&piece(4096, SharedMemoryKind::Anonymous), |_| false).is_ok());
        assert!(shared_memory(&piece(u64::MAX, SharedMemoryKind::Anonymous), |_| false).is_err());
        assert!(shared_memory(&piece(4096, SharedMemoryKind::Contents(FileId(3))), |_| false).is_err());
    }

    #[test]
    fn two_processes_with_one_table() {
        let state = |pid, table| {
            let name = |name: &str| ciborium::Value::Text(name.into());
            let number = |n: i64| ciborium::Value::Integer(n.into());
            let (no, none) = (ciborium::Value::Bool(false), ciborium::Value::Array(Vec::new()));
            let fields = [
                ("pid", number(pid)),
                ("mm", number(1)),
                ("fd_table", number(table)),
                ("cwd", number(1)),
                ("root", ciborium::Value::Null),
                ("umask", number(0)),
                ("handlers", none.clone()),
                ("pending", none.clone()),
                ("interval_timers", none.clone()),
                ("timers", none.clone()),
                ("limits", none.clone()),
                ("oom_score_adj", number(0)),
                ("child_subreaper", no.clone()),
                ("dumpable", number(1)),
                ("no_huge_pages", no),
                ("coredump_filter", ciborium::Value::Null),
                ("threads", none),
            ];
            let state = ciborium::Value::Map(fields.into_iter().map(|(key, value)| (name(key), value)).collect());
            (PodPid(pid as i32), state.deserialized().unwrap())
        };
        let said = |tables: [i64; 2]| {
            let processes = [state(1, tables[0]), state(2, tables[1])].into();
            tables_are_apart(&Image { processes, ..Image::default() })
        };
        assert!(said([1, 2]).is_ok());
        let problem = said([3, 3]).unwrap_err();
        assert!(problem.code() == TABLES && problem.what().contains("processes 1 and 2"), "{problem:?}");
    }
}
