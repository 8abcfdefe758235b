//! System V message queues and semaphore sets, with their ids, keys, owners and contents.
//!
//! They belong to the IPC namespace and live on without any process, so they are found in `/proc/sysvipc`, which shows
//! the namespace of whoever opens it: both directions run in a thread of their own that has entered the pod's. Reading
//! changes nothing (messages are copied out by MSG_COPY). Ids are made again through `/proc/sys/kernel/*_next_id`.
//! What the kernel gives no way to read is lost: who sent last and when (W-ANEW). What is to be undone of semaphores is kept by
//! [`crate::objects::task::undo`], segments of shared memory by [`crate::objects::memory`], beside the maps that attach them.

use super::mqueue::{self, PosixQueue};
use super::{Namespace, within};
use crate::ids::{HostPid, PodPid};
use crate::objects::memory::{SharedMemoryKind, SharedMemoryState};
use crate::objects::task::undo;
use crate::{Doing, Problem, Result};
use pod_runtime::sys::ipc;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::fs::{self, File, OpenOptions};
use std::os::fd::OwnedFd;

/// Everything of the two kinds in one namespace. One record, IPC.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpcState {
    pub queues: Vec<Queue>,
    pub semaphores: Vec<SemaphoreSet>,
    #[serde(default)]
    pub posix_queues: Vec<PosixQueue>,
    #[serde(default)]
    pub posix_limits: mqueue::Limits,
}

/// struct ipc_perm, as far as it can be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    pub key: i32,
    pub uid: u32,
    pub gid: u32,
    /// The nine permission bits.
    pub mode: u32,
}

impl IpcState {
    pub fn sets(&self) -> undo::Sets {
        self.semaphores.iter().map(|set| (set.id, set.values.len())).collect()
    }
}

/// Has loaded, while the pod runs, what its semaphores will be asked by; what cannot be known now is found out later.
pub fn prepare(init: i32) {
    if within(init, Namespace::Ipc, || ids("sem")).is_ok_and(|sets| !sets.is_empty()) {
        undo::prepare();
    }
}

/// Of a pod that runs: what is not afterwards as it was. `processes` as this host numbers them.
pub fn downgrade(init: i32, processes: &[HostPid]) -> Option<Problem> {
    let sets = within(init, Namespace::Ipc, read_semaphores).ok()?;
    let sets = IpcState { semaphores: sets, ..IpcState::default() }.sets();
    let processes: Vec<_> = processes.iter().map(|host| (PodPid(0), host.0)).collect();
    undo::of(&processes, &sets).1
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Queue {
    pub id: i32,
    pub owner: Owner,
    /// Room for texts, bytes.
    pub capacity: u64,
    /// Type and text, oldest first.
    pub messages: Vec<(i64, ByteBuf)>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SemaphoreSet {
    pub id: i32,
    pub owner: Owner,
    pub values: Vec<u16>,
}

/// Reads the IPC namespace of the process `pid` (as the host numbers it). The pod is frozen. `removed` are POSIX queues that
/// are open and have no name, with the names that they are to have.
///
/// # Errors
/// The namespace cannot be entered, or an object changed meanwhile (it was not frozen).
pub fn dump(pid: i32, removed: &[(Vec<u8>, OwnedFd)]) -> Result<IpcState> {
    within(pid, Namespace::Ipc, || {
        Ok(IpcState {
            queues: read_queues()?,
            semaphores: read_semaphores()?,
            posix_queues: mqueue::dump(removed)?,
            posix_limits: mqueue::limits(),
        })
    })
}

/// Makes everything again in the IPC namespace of the process `pid`, which has none of it yet.
///
/// # Errors
/// An id or key is taken, or the kernel refuses a value: the image is damaged or the namespace was not fresh.
pub fn restore(pid: i32, state: &IpcState) -> Result<()> {
    within(pid, Namespace::Ipc, || {
        state.queues.iter().try_for_each(make_queue)?;
        state.semaphores.iter().try_for_each(make_semaphores)?;
        mqueue::restore(&state.posix_queues, &state.posix_limits)
    })
}

/// The ids in a table of `/proc/sysvipc`: its second column.
fn ids(table: &str) -> Result<Vec<i32>> {
    let path = format!("/proc/sysvipc/{table}");
    let text = fs::read_to_string(&path).doing(|| format!("read {path}"))?;
    Ok(parse_ids(&text))
}

fn parse_ids(text: &str) -> Vec<i32> {
    text.lines().skip(1).filter_map(|line| line.split_whitespace().nth(1)?.parse().ok()).collect()
}

fn read_queues() -> Result<Vec<Queue>> {
    ids("msg")?.into_iter().map(read_queue).collect()
}

fn read_queue(id: i32) -> Result<Queue> {
    let what = || format!("read message queue {id}");
    let stat = ipc::msg_stat(id).doing(what)?;
    let mut messages = Vec::new();
    while let Some((kind, text)) = ipc::msg_peek(id, messages.len() as i64, stat.__msg_cbytes as usize).doing(what)? {
        messages.push((kind, ByteBuf::from(text)));
    }
    let owner = owner(&stat.msg_perm);
    Ok(Queue { id, owner, capacity: stat.msg_qbytes, messages })
}

fn read_semaphores() -> Result<Vec<SemaphoreSet>> {
    ids("sem")?.into_iter().map(read_set).collect()
}

fn read_set(id: i32) -> Result<SemaphoreSet> {
    let what = || format!("read semaphore set {id}");
    let stat = ipc::sem_stat(id).doing(what)?;
    let values = ipc::sem_values(id, stat.sem_nsems as usize).doing(what)?;
    Ok(SemaphoreSet { id, owner: owner(&stat.sem_perm), values })
}

fn owner(perm: &libc::ipc_perm) -> Owner {
    Owner { key: perm.__key, uid: perm.uid, gid: perm.gid, mode: u32::from(perm.mode) & 0o777 }
}

/// Makes a segment of shared memory with its id and key in the namespace of `pid`, and opens its contents.
///
/// # Errors
/// The id or the key is taken, or the memory is not to be had.
pub fn make_segment(pid: i32, state: &SharedMemoryState) -> Result<File> {
    let SharedMemoryKind::SysV { shmid, key, mode, uid, gid, .. } = state.kind else {
        return Err(Problem::new("E-INTERNAL", format!("shared memory {} is no segment", state.id)));
    };
    let what = || format!("make segment {shmid} (key {key:#x}) of {} bytes", state.bytes);
    let bytes = usize::try_from(state.bytes).doing(what)?;
    within(pid, Namespace::Ipc, || {
        next_id("shm", shmid)?;
        let flags = (mode & 0o777) as i32 | libc::IPC_CREAT | libc::IPC_EXCL;
        got_id("segment", shmid, ipc::shmget(key, bytes, flags).doing(what)?)?;
        let attached = ipc::Attached::new(shmid, false).doing(what)?;
        let start = attached.address();
        let path = format!("/proc/self/map_files/{start:x}-{:x}", start + state.bytes.next_multiple_of(4096));
        let file = OpenOptions::new().read(true).write(true).open(&path).doing(|| format!("open {path}"))?;
        let mut stat = ipc::shm_stat(shmid).doing(what)?;
        stat.shm_perm.uid = uid;
        stat.shm_perm.gid = gid;
        ipc::shm_set(shmid, &mut stat).doing(what)?;
        Ok(file)
    })
}

/// Marks the segments as removed that were; to be called when everybody has attached.
pub fn remove_segments<'a>(pid: i32, states: impl Iterator<Item = &'a SharedMemoryState> + Send) -> Result<()> {
    within(pid, Namespace::Ipc, || {
        for state in states {
            if let SharedMemoryKind::SysV { shmid, removed: true, .. } = state.kind {
                ipc::shm_remove(shmid).doing(|| format!("remove segment {shmid}"))?;
            }
        }
        Ok(())
    })
}

fn next_id(table: &str, id: i32) -> Result<()> {
    let path = format!("/proc/sys/kernel/{table}_next_id");
    fs::write(&path, id.to_string()).doing(|| format!("write {id} to {path}"))
}

fn got_id(kind: &str, wanted: i32, got: i32) -> Result<()> {
    if wanted == got {
        return Ok(());
    }
    Err(Problem::new("E-IPC-ID", format!("{kind} {wanted} came back with the id {got}")))
}

fn make_queue(queue: &Queue) -> Result<()> {
    let what = || format!("make message queue {} (key {:#x})", queue.id, queue.owner.key);
    next_id("msg", queue.id)?;
    let flags = queue.owner.mode as i32 | libc::IPC_CREAT | libc::IPC_EXCL;
    got_id("message queue", queue.id, ipc::msgget(queue.owner.key, flags).doing(what)?)?;
    let mut stat = ipc::msg_stat(queue.id).doing(what)?;
    stat.msg_perm.uid = queue.owner.uid;
    stat.msg_perm.gid = queue.owner.gid;
    stat.msg_qbytes = queue.capacity;
    for (kind, text) in &queue.messages {
        ipc::msg_send(queue.id, *kind, text).doing(what)?;
    }
    // Last: from here on the queue may belong to somebody else.
    ipc::msg_set(queue.id, &mut stat).doing(what)
}

fn make_semaphores(set: &SemaphoreSet) -> Result<()> {
    let what = || format!("make semaphore set {} (key {:#x})", set.id, set.owner.key);
    next_id("sem", set.id)?;
    let flags = set.owner.mode as i32 | libc::IPC_CREAT | libc::IPC_EXCL;
    let count = i32::try_from(set.values.len()).doing(what)?;
    got_id("semaphore set", set.id, ipc::semget(set.owner.key, count, flags).doing(what)?)?;
    ipc::sem_set_values(set.id, &set.values).doing(what)?;
    let mut stat = ipc::sem_stat(set.id).doing(what)?;
    stat.sem_perm.uid = set.owner.uid;
    stat.sem_perm.gid = set.owner.gid;
    ipc::sem_set(set.id, &mut stat).doing(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A fresh IPC namespace for the rest of this test, which has a process of its own under nextest.
    fn fresh() {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWIPC).expect("needs root");
    }

    #[test]
    fn second_column() {
        let text = "       key      msqid perms\n  12345   7  600\n -1 junk\n\n 0 32769 0";
        assert_eq!(parse_ids(text), [7, 32769]);
    }

    #[test]
    fn queues_and_semaphores_come_back() {
        // A thread of its own, so that the namespaces of other tests' threads stay as they are under `cargo test`.
        std::thread::spawn(|| {
            fresh();
            let queue = ipc::msgget(0x1234, 0o640 | libc::IPC_CREAT).unwrap();
            ipc::msg_send(queue, 3, b"three").unwrap();
            ipc::msg_send(queue, 1, b"").unwrap();
            let sem = ipc::semget(libc::IPC_PRIVATE, 3, 0o600 | libc::IPC_CREAT).unwrap();
            ipc::sem_set_values(sem, &[1, 0, 7]).unwrap();
            let thread = nix::unistd::gettid().as_raw();
            let state = dump(thread, &[]).unwrap();
            assert_eq!(state.queues[0].messages.len(), 2);
            assert_eq!(dump(thread, &[]).unwrap(), state, "reading consumes nothing");

            fresh();
            restore(nix::unistd::gettid().as_raw(), &state).unwrap();
            assert_eq!(dump(nix::unistd::gettid().as_raw(), &[]).unwrap(), state);
            assert_eq!(ipc::msgget(0x1234, 0).unwrap(), queue);
        })
        .join()
        .unwrap();
    }
}
