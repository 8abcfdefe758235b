//! Mappings of a guest's own.

use super::check;
use anyhow::{Result, bail};
use std::io::Error;

/// Memory of our own making. Access goes through bounds checks and copies.
pub struct Region {
    pub(super) address: *mut u8,
    pub(super) bytes: usize,
}

/// How to make a [`Region`].
#[derive(Clone, Copy)]
pub struct Map {
    pub bytes: usize,
    pub protection: i32,
    pub flags: i32,
    pub fd: i32,
    pub offset: i64,
}

impl Map {
    pub fn anonymous(bytes: usize, flags: i32) -> Map {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        Map { bytes, protection, flags: flags | libc::MAP_ANONYMOUS, fd: -1, offset: 0 }
    }

    pub fn of(fd: i32, bytes: usize, flags: i32) -> Map {
        Map { bytes, protection: libc::PROT_READ | libc::PROT_WRITE, flags, fd, offset: 0 }
    }

    pub fn map(self) -> Result<Region> {
        let nowhere = std::ptr::null_mut();
        // SAFETY: without MAP_FIXED a mapping replaces nothing.
        let address = unsafe {
            libc::mmap(nowhere, self.bytes, self.protection, self.flags & !libc::MAP_FIXED, self.fd, self.offset)
        };
        if address == libc::MAP_FAILED {
            bail!("mmap: {}", Error::last_os_error());
        }
        Ok(Region { address: address.cast(), bytes: self.bytes })
    }
}

impl Region {
    pub fn write(&mut self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.bytes);
        // SAFETY: the range is inside a mapping that only this value owns.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.address.add(at), bytes.len()) };
    }

    pub fn read(&self, at: usize, bytes: usize) -> Vec<u8> {
        assert!(at + bytes <= self.bytes);
        let mut out = vec![0; bytes];
        // SAFETY: as for `write`; other processes may change it meanwhile, a copy of bytes does not mind.
        unsafe { std::ptr::copy_nonoverlapping(self.address.add(at), out.as_mut_ptr(), bytes) };
        out
    }

    /// Its address, to be told to the kernel or compared.
    pub fn at(&self) -> usize {
        self.address as usize
    }

    /// Unmaps all but so many bytes from `from` on.
    pub fn keep(self, from: usize, bytes: usize) -> Result<Region> {
        let end = from + bytes;
        assert!(end <= self.bytes);
        for (at, bytes) in [(0, from), (end, self.bytes - end)] {
            // SAFETY: the range is ours, and the rest is what the new value owns.
            check(unsafe { libc::munmap(self.address.add(at).cast(), bytes) }.into())?;
        }
        // SAFETY: inside of the mapping.
        Ok(Region { address: unsafe { self.address.add(from) }, bytes })
    }

    /// Shared memory at a second address.
    pub fn twice(&self) -> Result<Region> {
        // SAFETY: an old size of 0 leaves the old mapping as it is; the kernel chooses the address.
        let address = unsafe { libc::mremap(self.address.cast(), 0, self.bytes, libc::MREMAP_MAYMOVE) };
        if address == libc::MAP_FAILED {
            bail!("mremap: {}", Error::last_os_error());
        }
        Ok(Region { address: address.cast(), bytes: self.bytes })
    }

    pub fn unmap(self) -> Result<()> {
        // SAFETY: the mapping is ours alone and consumed.
        check(unsafe { libc::munmap(self.address.cast(), self.bytes) }.into())?;
        Ok(())
    }

    /// Unmaps it; what reads it afterwards but [`Region::readable`] ends.
    pub fn unmap_place(&mut self) -> Result<()> {
        // SAFETY: the mapping is ours, and no reference into it exists.
        check(unsafe { libc::munmap(self.address.cast(), self.bytes) }.into())?;
        Ok(())
    }

    pub fn protect(&mut self, at: usize, bytes: usize, protection: i32) -> Result<()> {
        assert!(at + bytes <= self.bytes);
        // SAFETY: the range is ours, and no reference into it exists.
        check(unsafe { libc::mprotect(self.address.add(at).cast(), bytes, protection) }.into())?;
        Ok(())
    }

    /// madvise(2) for all of it.
    pub fn advise(&self, advice: i32) -> Result<()> {
        // SAFETY: the range is ours; advice that empties it is not asked for.
        check(unsafe { libc::madvise(self.address.cast(), self.bytes, advice) }.into())?;
        Ok(())
    }

    /// mbind(2) to the first node.
    pub fn bind(&self, mode: i32) -> Result<()> {
        let nodes = [1u64; 1];
        // SAFETY: the range is ours; the kernel reads one word. What is there stays.
        check(unsafe { libc::syscall(libc::SYS_mbind, self.address, self.bytes, mode, nodes.as_ptr(), 64, 0) })?;
        Ok(())
    }

    /// get_mempolicy(2): mode, and the first nodes.
    pub fn policy(&self) -> Result<(i32, u64)> {
        const OF_ADDRESS: i32 = 2;
        let (mut mode, mut nodes) = (0i32, [0u64; 16]);
        let (to, room) = (nodes.as_mut_ptr(), size_of_val(&nodes) * 8);
        // SAFETY: the kernel writes a number and as many words as there are.
        check(unsafe { libc::syscall(libc::SYS_get_mempolicy, &raw mut mode, to, room, self.address, OF_ADDRESS) })?;
        Ok((mode, nodes[0]))
    }

    /// MADV_DONTNEED: what was there is gone, and zeros come back.
    pub fn give_back(&mut self, at: usize, bytes: usize) -> Result<()> {
        assert!(at + bytes <= self.bytes);
        // SAFETY: the range is ours, no reference into it exists, and zeros are a value of bytes.
        check(unsafe { libc::madvise(self.address.add(at).cast(), bytes, libc::MADV_DONTNEED) }.into())?;
        Ok(())
    }

    /// Another private anonymous mapping at the same place.
    pub fn renew(&mut self) -> Result<()> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: the range is ours, and no reference into it exists.
        let address = unsafe { libc::mmap(self.address.cast(), self.bytes, protection, flags, -1, 0) };
        if address == libc::MAP_FAILED {
            bail!("mmap: {}", Error::last_os_error());
        }
        Ok(())
    }

    /// To another address, which the kernel has free.
    pub fn move_away(&mut self) -> Result<()> {
        let place = Map::anonymous(self.bytes, libc::MAP_PRIVATE).map()?;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: both ranges are ours, and no reference into them exists; the second is replaced by the first.
        let address =
            unsafe { libc::mremap(self.address.cast(), self.bytes, self.bytes, flags, place.address.cast::<u8>()) };
        if address == libc::MAP_FAILED {
            bail!("mremap: {}", Error::last_os_error());
        }
        self.address = address.cast();
        Ok(())
    }

    /// A copy from memory that may be unreadable: the kernel tells instead of a signal.
    pub fn readable(&self, at: usize) -> bool {
        assert!(at < self.bytes);
        let mut byte = 0u8;
        let local = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        // SAFETY: at is inside the mapping.
        let remote = libc::iovec { iov_base: unsafe { self.address.add(at) }.cast(), iov_len: 1 };
        // SAFETY: local is one byte of ours; the kernel checks remote.
        unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) == 1 }
    }
}
