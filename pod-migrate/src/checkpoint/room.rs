//! Room for a checkpoint, made while the pod still runs.
//!
//! Half of what writing a new file costs is making its pages, not copying into them. So the file is given pages for as
//! much memory as the pod has before the pod is stopped; the frozen part then only copies. A guess that is wrong costs
//! time and nothing else: what is missing is made when it is needed, what is too much goes when the file is finished.

use crate::objects::memory::tracking::own_memory_by;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use pod_runtime::{Problem, Result, proc};
use std::fs::File;
use std::os::unix::fs::FileExt;

const PIECE: usize = 1 << 20;
/// Less is not worth looking for.
const LITTLE: u64 = 8 << 20;
/// Of the memory that the host has free, and of the room on the disk, at most one part in so many.
const SHARE: u64 = 4;

/// Makes pages behind the first `from` bytes of the file, for the memory of these processes.
pub(super) fn make(file: &File, from: u64, processes: &[i32]) {
    let memory = memory_of(processes);
    if memory < LITTLE {
        return;
    }
    let Ok(file_system) = fstatfs(file) else { return };
    let disk = file_system.blocks_available().saturating_mul(file_system.block_size().unsigned_abs());
    let wanted = memory.min(free_memory() / SHARE).min(disk / SHARE);
    if wanted < LITTLE {
        return;
    }
    if file_system.filesystem_type() == TMPFS_MAGIC {
        // Pages without a content: the cheapest.
        let _ = fallocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, from as i64, wanted as i64);
    } else {
        // Reserving blocks would make no pages.
        write_zeros(file, from, wanted);
    }
}

/// Takes away what was too much: the file ends after `bytes`.
pub(super) fn trim(file: &File, bytes: u64) -> std::io::Result<()> {
    file.set_len(bytes)
}

fn write_zeros(file: &File, from: u64, bytes: u64) {
    let zeros = vec![0; PIECE];
    let mut at = from;
    while at < from + bytes {
        let piece = &zeros[..PIECE.min((from + bytes - at) as usize)];
        if file.write_all_at(piece, at).is_err() {
            return;
        }
        at += piece.len() as u64;
    }
}

/// Refuses what would have to lie in memory, and has no room there. `what` is "the checkpoint of web".
pub(super) fn in_memory(bytes: u64, what: impl FnOnce() -> String) -> Result<()> {
    let free = free_memory();
    if free == 0 || bytes <= free {
        return Ok(());
    }
    let (needed, free) = (bytes >> 20, free >> 20);
    let what = format!("{} needs {needed} MiB of memory, for it is encrypted, and {free} MiB are free", what());
    Err(Problem::new("E-MEMORY", what)
        .fix("free memory, or encrypt the file of a checkpoint elsewhere, by another tool"))
}

/// What an encrypted checkpoint of these processes lies in until it is on the disk: twice, if it is packed.
pub(super) fn for_sealing(processes: &[i32], packed: bool, pod: &str) -> Result<()> {
    let times = if packed { 2 } else { 1 };
    in_memory(memory_of(processes).saturating_mul(times), || format!("the checkpoint of {pod}"))
}

/// What a dump of them will about hold: memory of their own, and shared memory once.
fn memory_of(processes: &[i32]) -> u64 {
    let (mut own, mut shared) = (0u64, 0);
    for process in processes {
        let status = proc::read(format!("/proc/{process}/status")).unwrap_or_default();
        own = own.saturating_add(own_memory_by(&status));
        shared = proc::amount(&status, "RssShmem:").unwrap_or(0).max(shared);
    }
    own.saturating_add(shared)
}

/// 0 if the kernel does not say.
fn free_memory() -> u64 {
    proc::read("/proc/meminfo").ok().and_then(|text| proc::amount(&text, "MemAvailable:")).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_in_memory_is_refused() {
        in_memory(1 << 20, || unreachable!()).unwrap();
        let problem = in_memory(1 << 60, || "the checkpoint of web".into()).unwrap_err();
        assert_eq!(problem.code(), "E-MEMORY");
        assert!(problem.chain().starts_with("the checkpoint of web needs"), "{}", problem.chain());
    }

    #[test]
    fn what_is_too_much_goes() {
        let held = vec![1u8; 32 << 20];
        for dir in ["/dev/shm", "."] {
            let Ok(file) = tempfile::tempfile_in(dir) else { continue };
            file.write_all_at(b"head", 0).unwrap();
            make(&file, 4, &[std::process::id() as i32]);
            file.write_all_at(b"tail", 4).unwrap();
            trim(&file, 8).unwrap();
            let metadata = file.metadata().unwrap();
            assert_eq!(metadata.len(), 8);
            assert!(std::os::unix::fs::MetadataExt::blocks(&metadata) <= 16, "{dir}: {metadata:?}");
            let mut all = [0; 8];
            file.read_exact_at(&mut all, 0).unwrap();
            assert_eq!(&all, b"headtail");
        }
        assert!(memory_of(&[std::process::id() as i32]) > 32 << 20);
        assert_eq!(std::hint::black_box(held).len(), 32 << 20);
    }
}
