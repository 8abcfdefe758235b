//! System V IPC: message queues, semaphores and shared memory segments of the calling thread's IPC namespace.

use std::io;
use std::os::raw::{c_int, c_void};

fn result(value: c_int) -> io::Result<c_int> {
    if value < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

/// msgget(2).
pub fn msgget(key: i32, flags: i32) -> io::Result<i32> {
    // SAFETY: no pointers.
    result(unsafe { libc::msgget(key, flags) })
}

/// msgctl(IPC_STAT).
pub fn msg_stat(id: i32) -> io::Result<libc::msqid_ds> {
    // SAFETY: all-zero bytes are a valid msqid_ds.
    let mut stat: libc::msqid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: `stat` outlives the call and is of the size that the kernel writes.
    result(unsafe { libc::msgctl(id, libc::IPC_STAT, &raw mut stat) })?;
    Ok(stat)
}

/// msgctl(IPC_SET): owner, mode and `msg_qbytes`.
pub fn msg_set(id: i32, stat: &mut libc::msqid_ds) -> io::Result<()> {
    // SAFETY: `stat` outlives the call; the kernel only reads it.
    result(unsafe { libc::msgctl(id, libc::IPC_SET, stat) }).map(drop)
}

/// msgctl(IPC_RMID).
pub fn msg_remove(id: i32) -> io::Result<()> {
    // SAFETY: IPC_RMID takes no buffer.
    result(unsafe { libc::msgctl(id, libc::IPC_RMID, std::ptr::null_mut()) }).map(drop)
}

/// A copy of the `index`-th message, which stays in the queue (MSG_COPY): its type and text. `None` past the last one.
/// `room` is the largest text that can come, in bytes (the queue's `msg_cbytes` always suffices).
pub fn msg_peek(id: i32, index: i64, room: usize) -> io::Result<Option<(i64, Vec<u8>)>> {
    const MSG_COPY: c_int = 0o40000;
    let mut buffer = vec![0u8; 8 + room];
    // SAFETY: the buffer holds the 8 bytes of the type and `room` bytes of text.
    let got = unsafe {
        libc::msgrcv(
            id,
            buffer.as_mut_ptr().cast::<c_void>(),
            room,
            index,
            MSG_COPY | libc::IPC_NOWAIT | libc::MSG_NOERROR,
        )
    };
    if got < 0 {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::ENOMSG) { Ok(None) } else { Err(error) };
    }
    let kind = i64::from_ne_bytes(buffer[..8].try_into().expect("8 bytes"));
    buffer.truncate(8 + got as usize);
    buffer.drain(..8);
    Ok(Some((kind, buffer)))
}

/// msgsnd(2) without waiting.
pub fn msg_send(id: i32, kind: i64, text: &[u8]) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(8 + text.len());
    buffer.extend_from_slice(&kind.to_ne_bytes());
    buffer.extend_from_slice(text);
    // SAFETY: the buffer holds the type and `text.len()` bytes.
    result(unsafe { libc::msgsnd(id, buffer.as_ptr().cast::<c_void>(), text.len(), libc::IPC_NOWAIT) }).map(drop)
}

/// semget(2).
pub fn semget(key: i32, count: i32, flags: i32) -> io::Result<i32> {
    // SAFETY: no pointers.
    result(unsafe { libc::semget(key, count, flags) })
}

/// semctl(IPC_STAT).
pub fn sem_stat(id: i32) -> io::Result<libc::semid_ds> {
    // SAFETY: all-zero bytes are a valid semid_ds.
    let mut stat: libc::semid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: `stat` outlives the call.
    result(unsafe { libc::semctl(id, 0, libc::IPC_STAT, &raw mut stat) })?;
    Ok(stat)
}

/// semctl(IPC_SET): owner and mode.
pub fn sem_set(id: i32, stat: &mut libc::semid_ds) -> io::Result<()> {
    // SAFETY: `stat` outlives the call; the kernel only reads it.
    result(unsafe { libc::semctl(id, 0, libc::IPC_SET, std::ptr::from_mut(stat)) }).map(drop)
}

/// semctl(GETALL); `count` as in the set's `sem_nsems`.
pub fn sem_values(id: i32, count: usize) -> io::Result<Vec<u16>> {
    let mut values = vec![0u16; count];
    // SAFETY: the kernel writes one u16 for each semaphore of the set, whose number the caller took from IPC_STAT.
    result(unsafe { libc::semctl(id, 0, libc::GETALL, values.as_mut_ptr()) })?;
    Ok(values)
}

/// semctl(SETALL); one value for each semaphore of the set.
pub fn sem_set_values(id: i32, values: &[u16]) -> io::Result<()> {
    // SAFETY: the kernel reads one u16 for each semaphore; the caller made the set with `values.len()` of them.
    result(unsafe { libc::semctl(id, 0, libc::SETALL, values.as_ptr()) }).map(drop)
}

/// semop(2) on one semaphore of a set, without waiting.
pub fn sem_operate(id: i32, number: u16, operation: i16, undo: bool) -> io::Result<()> {
    let flags = libc::IPC_NOWAIT | if undo { libc::SEM_UNDO } else { 0 };
    let mut one = libc::sembuf { sem_num: number, sem_op: operation, sem_flg: flags as i16 };
    // SAFETY: the kernel reads one operation.
    result(unsafe { libc::semop(id, &raw mut one, 1) }).map(drop)
}

/// semctl(IPC_RMID).
pub fn sem_remove(id: i32) -> io::Result<()> {
    // SAFETY: no pointers.
    result(unsafe { libc::semctl(id, 0, libc::IPC_RMID) }).map(drop)
}

/// shmget(2); `bytes` is the size of the segment.
pub fn shmget(key: i32, bytes: usize, flags: i32) -> io::Result<i32> {
    // SAFETY: no pointers.
    result(unsafe { libc::shmget(key, bytes, flags) })
}

/// shmctl(IPC_STAT).
pub fn shm_stat(id: i32) -> io::Result<libc::shmid_ds> {
    // SAFETY: all-zero bytes are a valid shmid_ds.
    let mut stat: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: `stat` outlives the call.
    result(unsafe { libc::shmctl(id, libc::IPC_STAT, &raw mut stat) })?;
    Ok(stat)
}

/// shmctl(IPC_SET): owner and mode.
pub fn shm_set(id: i32, stat: &mut libc::shmid_ds) -> io::Result<()> {
    // SAFETY: `stat` outlives the call; the kernel only reads it.
    result(unsafe { libc::shmctl(id, libc::IPC_SET, stat) }).map(drop)
}

/// shmctl(IPC_RMID): the segment goes when its last attachment does.
pub fn shm_remove(id: i32) -> io::Result<()> {
    // SAFETY: IPC_RMID takes no buffer.
    result(unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) }).map(drop)
}

/// A segment attached to this process for as long as the value lives.
#[derive(Debug)]
pub struct Attached {
    address: *mut u8,
    bytes: usize,
}

impl Attached {
    /// shmat(2), read-only or for writing; the size comes from the kernel.
    pub fn new(id: i32, read_only: bool) -> io::Result<Attached> {
        let bytes = shm_stat(id)?.shm_segsz;
        // SAFETY: the kernel chooses the place, so nothing of ours is covered.
        let address = unsafe { libc::shmat(id, std::ptr::null(), if read_only { libc::SHM_RDONLY } else { 0 }) };
        if address as isize == -1 {
            return Err(io::Error::last_os_error());
        }
        Ok(Attached { address: address.cast(), bytes })
    }

    /// The address in this process, for process_vm_readv(2) on oneself and the like.
    pub fn address(&self) -> u64 {
        self.address as u64
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The contents. Others may write meanwhile: take a copy and call it no more than that.
    pub fn copy_out(&self, offset: usize, into: &mut [u8]) {
        assert!(offset.checked_add(into.len()).is_some_and(|end| end <= self.bytes));
        // SAFETY: in range by the assertion; a raw copy makes no promise about concurrent writers.
        unsafe { std::ptr::copy_nonoverlapping(self.address.add(offset), into.as_mut_ptr(), into.len()) }
    }

    /// Writes contents; needs an attachment for writing.
    pub fn copy_in(&mut self, offset: usize, from: &[u8]) {
        assert!(offset.checked_add(from.len()).is_some_and(|end| end <= self.bytes));
        // SAFETY: in range by the assertion; attached for writing by the caller's choice (else the kernel kills us).
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.address.add(offset), from.len()) }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: the address came from shmat and is detached once.
        unsafe { libc::shmdt(self.address.cast()) };
    }
}
