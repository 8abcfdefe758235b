//! SysV shared memory segments: found in /proc/sysvipc/shm, which shows the namespace of whoever opens it, so a thread
//! of ours enters the pod's.

use super::SharedMemoryKind;
use crate::ids::HostPid;
use crate::objects::namespaces::{Namespace, within};
use pod_runtime::sys::ipc;
use pod_runtime::{Doing, Problem, Result};
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;

/// The segment is gone when the last one detaches.
const SHM_DEST: u32 = 0o1000;

struct Segment {
    shmid: i32,
    bytes: u64,
    attached: u32,
    kind: SharedMemoryKind,
}

fn segments() -> Result<Vec<Segment>> {
    let text = fs::read_to_string("/proc/sysvipc/shm").doing(|| "read /proc/sysvipc/shm".into())?;
    Ok(text.lines().skip(1).filter_map(segment).collect())
}

fn segment(line: &str) -> Option<Segment> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let number = |index: usize| fields.get(index)?.parse::<i64>().ok();
    let mode = u32::from_str_radix(fields.get(2)?, 8).ok()?;
    let shmid = number(1)? as i32;
    Some(Segment {
        shmid,
        bytes: number(3)? as u64,
        attached: number(6)? as u32,
        kind: SharedMemoryKind::SysV {
            shmid,
            key: number(0)? as i32,
            mode: mode & 0o777,
            uid: number(7)? as u32,
            gid: number(8)? as u32,
            cuid: number(9)? as u32,
            cgid: number(10)? as u32,
            removed: mode & SHM_DEST != 0,
        },
    })
}

/// What a segment is like.
pub(super) fn kind(pid: HostPid, shmid: i32) -> Result<SharedMemoryKind> {
    let found = within(pid.0, Namespace::Ipc, segments)?.into_iter().find(|segment| segment.shmid == shmid);
    let found =
        found.ok_or_else(|| Problem::new("E-SYSTEM", format!("segment {shmid} has no entry in /proc/sysvipc")))?;
    Ok(found.kind)
}

/// A segment that no process has attached.
pub(super) struct Unattached {
    /// Major, minor, inode.
    pub key: (u32, u32, u64),
    pub memory: File,
    pub bytes: u64,
    pub kind: SharedMemoryKind,
}

/// Those of the pod.
pub(super) fn unattached(pid: HostPid) -> Result<Vec<Unattached>> {
    within(pid.0, Namespace::Ipc, || {
        let mut found = Vec::new();
        for segment in segments()?.into_iter().filter(|segment| segment.attached == 0) {
            let doing = || format!("attach segment {}", segment.shmid);
            let memory = ipc::Attached::new(segment.shmid, true).doing(doing)?;
            let start = memory.address();
            let end = start + segment.bytes.next_multiple_of(4096);
            let file = File::open(format!("/proc/self/map_files/{start:x}-{end:x}")).doing(doing)?;
            let metadata = file.metadata().doing(doing)?;
            let (major, minor) = (nix::sys::stat::major(metadata.dev()), nix::sys::stat::minor(metadata.dev()));
            let key = (major as u32, minor as u32, metadata.ino());
            found.push(Unattached { key, memory: file, bytes: segment.bytes, kind: segment.kind });
        }
        Ok(found)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_line() {
        let line = "  -559038737          7  1600      4096 1 2 3  1000   100  0 0  1 2 3 0 0";
        let found = segment(line).unwrap();
        assert_eq!((found.shmid, found.bytes, found.attached), (7, 4096, 3));
        assert!(matches!(found.kind, SharedMemoryKind::SysV { mode: 0o600, removed: true, uid: 1000, gid: 100, .. }));
    }
}
