//! System V shared memory (attached, and removed while attached) and POSIX shared memory, with their keys and ids.

use crate::sys::{Map, Region};
use crate::{Guest, sys};
use anyhow::{Result, ensure};
use std::fs::File;
use std::os::fd::AsRawFd;

const BYTES: usize = 64 * 1024;
const KEY: i64 = 0x706f_6400;

struct SharedMemory {
    id: i64,
    kept: Region,
    removed: Region,
    posix: Region,
    semaphores: i64,
    queue: i64,
}

fn shmget(key: i64, flags: i64) -> Result<i64> {
    Ok(sys::call(libc::SYS_shmget, [key, BYTES as i64, flags | 0o600, 0, 0])?)
}

pub fn set_up() -> Result<Box<dyn Guest>> {
    // Ids of a namespace that has seen others come and go.
    let passed_over = shmget(KEY + 1, libc::IPC_CREAT as i64)?;
    let id = shmget(KEY, libc::IPC_CREAT as i64)?;
    sys::call(libc::SYS_shmctl, [passed_over, libc::IPC_RMID as i64, 0, 0, 0])?;
    let mut kept = sys::attach(id as i32, BYTES)?;
    kept.write(100, b"kept");
    let doomed = shmget(libc::IPC_PRIVATE as i64, libc::IPC_CREAT as i64)?;
    let mut removed = sys::attach(doomed as i32, BYTES)?;
    removed.write(100, b"removed");
    sys::call(libc::SYS_shmctl, [doomed, libc::IPC_RMID as i64, 0, 0, 0])?;
    let file = File::options().read(true).write(true).create(true).truncate(true).open("/dev/shm/guest")?;
    file.set_len(BYTES as u64)?;
    let mut posix = Map::of(file.as_raw_fd(), BYTES, libc::MAP_SHARED).map()?;
    posix.write(100, b"posix");
    let semaphores = sys::call(libc::SYS_semget, [KEY, 2, (libc::IPC_CREAT | 0o600) as i64, 0, 0])?;
    sys::call(libc::SYS_semctl, [semaphores, 1, libc::SETVAL as i64, 41, 0])?;
    let queue = sys::call(libc::SYS_msgget, [KEY, (libc::IPC_CREAT | 0o600) as i64, 0, 0, 0])?;
    sys::send(queue as i32, 3, b"first")?;
    sys::send(queue as i32, 4, b"second")?;
    Ok(Box::new(SharedMemory { id, kept, removed, posix, semaphores, queue }))
}

impl Guest for SharedMemory {
    fn verify(&mut self) -> Result<()> {
        ensure!(self.kept.read(100, 4) == b"kept", "System V memory has other contents");
        ensure!(self.removed.read(100, 7) == b"removed", "removed System V memory has other contents");
        ensure!(self.posix.read(100, 5) == b"posix", "POSIX memory has other contents");
        ensure!(shmget(KEY, 0)? == self.id, "key {KEY:#x} has another id");
        // Still one and the same memory, by a new way in.
        self.kept.write(200, b"again");
        let again = sys::attach(self.id as i32, BYTES)?;
        ensure!(again.read(200, 5) == b"again", "a second attachment shows something else");
        sys::detach(again)?;
        let posix = std::fs::read("/dev/shm/guest")?;
        ensure!(&posix[100..105] == b"posix", "/dev/shm/guest is not what is mapped");
        let value = sys::call(libc::SYS_semctl, [self.semaphores, 1, libc::GETVAL as i64, 0, 0])?;
        ensure!(value == 41, "a semaphore is {value}");
        let messages = [sys::receive(self.queue as i32)?, sys::receive(self.queue as i32)?];
        ensure!(messages == [(3, b"first".to_vec()), (4, b"second".to_vec())], "messages: {messages:?}");
        sys::send(self.queue as i32, 3, b"first")?;
        sys::send(self.queue as i32, 4, b"second")
    }
}
