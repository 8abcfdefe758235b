//! The mount calls that work on descriptors: no path is walked twice, so nothing can be swapped under it.

use linux_raw_sys::general::mount_attr;
use nix::errno::Errno;
use nix::libc;
use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

pub const MOUNT_ATTR_RDONLY: u64 = linux_raw_sys::general::MOUNT_ATTR_RDONLY as u64;
pub const MOUNT_ATTR_NOSUID: u64 = linux_raw_sys::general::MOUNT_ATTR_NOSUID as u64;
pub const MOUNT_ATTR_NODEV: u64 = linux_raw_sys::general::MOUNT_ATTR_NODEV as u64;
pub const MOUNT_ATTR_NOEXEC: u64 = linux_raw_sys::general::MOUNT_ATTR_NOEXEC as u64;

const OPEN_TREE_CLONE: u32 = 1;
const AT_RECURSIVE: u32 = 0x8000;

/// open_tree(2): a detached copy of the mount that `path` is on, rooted at `path`. An empty path means `dir` itself.
pub fn clone_tree(dir: BorrowedFd<'_>, path: &CStr, recursive: bool) -> nix::Result<OwnedFd> {
    let mut flags = OPEN_TREE_CLONE | libc::O_CLOEXEC as u32;
    if recursive {
        flags |= AT_RECURSIVE;
    }
    if path.is_empty() {
        flags |= libc::AT_EMPTY_PATH as u32;
    }
    // SAFETY: the descriptor is open, the string terminated; the result is a new descriptor that nobody else owns.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_open_tree, dir.as_raw_fd(), path.as_ptr(), flags) })?;
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// mount_setattr(2) on the mount (with `recursive`: and all below it) that `mount` is the root of; also makes it
/// private.
pub fn set_attributes(mount: BorrowedFd<'_>, set: u64, recursive: bool) -> nix::Result<()> {
    let attributes = mount_attr { attr_set: set, attr_clr: 0, propagation: libc::MS_PRIVATE, userns_fd: 0 };
    apply(mount, &attributes, recursive)
}

/// mount_setattr(2).
fn apply(mount: BorrowedFd<'_>, attributes: &mount_attr, recursive: bool) -> nix::Result<()> {
    let flags = libc::AT_EMPTY_PATH as u32 | if recursive { AT_RECURSIVE } else { 0 };
    // SAFETY: the descriptors are open, the string is terminated, and the struct outlives the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<mount_attr>(),
        )
    };
    Errno::result(done).map(drop)
}

/// What [`change`] does to a mount.
#[derive(Debug, Default)]
pub struct Change<'a> {
    pub set: u64,
    pub clear: u64,
    /// One of MS_PRIVATE, MS_SLAVE, MS_SHARED, MS_UNBINDABLE, or 0 to leave it.
    pub propagation: u64,
    /// Shows owners as this user namespace maps them. Only for a mount that is not attached yet.
    pub owners: Option<BorrowedFd<'a>>,
}

/// mount_setattr(2) on the mount (with `recursive`: and all below it) that `mount` is the root of.
pub fn change(mount: BorrowedFd<'_>, change: &Change<'_>, recursive: bool) -> nix::Result<()> {
    const IDMAP: u64 = 0x10_0000;
    let attributes = mount_attr {
        attr_set: change.set | if change.owners.is_some() { IDMAP } else { 0 },
        attr_clr: change.clear,
        propagation: change.propagation,
        userns_fd: change.owners.map_or(0, |fd| fd.as_raw_fd() as u64),
    };
    apply(mount, &attributes, recursive)
}

/// mount_setattr(2) of one mount: these attributes and no others; also makes it private.
pub fn replace_attributes(mount: BorrowedFd<'_>, set: u64) -> nix::Result<()> {
    /// All that can be set on a mount by itself, with every kind of access times.
    const ALL: u64 = 0x20_00ff;
    let attributes = mount_attr { attr_set: set & ALL, attr_clr: ALL, propagation: libc::MS_PRIVATE, userns_fd: 0 };
    apply(mount, &attributes, false)
}

/// move_mount(2): attaches a detached mount exactly on the object that `onto` is (an O_PATH descriptor).
pub fn attach(mount: impl AsFd, onto: BorrowedFd<'_>) -> nix::Result<()> {
    const FROM_EMPTY: u32 = 0x4;
    const TO_EMPTY: u32 = 0x40;
    // SAFETY: both descriptors are open, both strings terminated.
    let done = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            onto.as_raw_fd(),
            c"".as_ptr(),
            FROM_EMPTY | TO_EMPTY,
        )
    };
    Errno::result(done).map(drop)
}

/// fsopen(2): a file system that is to be. A kernel that has the kind as a module loads it now.
fn open_filesystem(kind: &CStr) -> nix::Result<OwnedFd> {
    // SAFETY: the string is terminated; the result is a new descriptor that nobody else owns.
    let fd = Errno::result(unsafe {
        libc::syscall(libc::SYS_fsopen, kind.as_ptr(), 1 /* FSOPEN_CLOEXEC */)
    })?;
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Whether the kernel can mount file systems of a kind.
pub fn has_filesystem(kind: &CStr) -> nix::Result<()> {
    open_filesystem(kind).map(drop)
}

/// fsopen, fsconfig, fsmount: a new instance of a file system, detached.
pub fn new_filesystem(kind: &CStr, options: &[(&CStr, &CStr)], attributes: u64) -> nix::Result<OwnedFd> {
    const SET_FLAG: u32 = 0;
    const SET_STRING: u32 = 1;
    const CREATE: u32 = 6;
    let context = open_filesystem(kind)?;
    let configure = |command: u32, key: *const libc::c_char, value: *const libc::c_char| {
        // SAFETY: key and value are null or terminated strings that outlive the call.
        let done = unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, key, value, 0) };
        Errno::result(done).map(drop)
    };
    // The name of the kind stands where a device would in /proc/mounts, unless the options have another.
    if options.iter().all(|(key, _)| *key != c"source") {
        configure(SET_STRING, c"source".as_ptr(), kind.as_ptr())?;
    }
    for (key, value) in options {
        match value.is_empty() {
            true => configure(SET_FLAG, key.as_ptr(), std::ptr::null())?,
            false => configure(SET_STRING, key.as_ptr(), value.as_ptr())?,
        }
    }
    configure(CREATE, std::ptr::null(), std::ptr::null())?;
    // SAFETY: the context is open; the result is a new descriptor that nobody else owns.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), 1, attributes as u32) })?;
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
