//! Extended attributes, by path. To reach exactly one object without following a link, open it with `O_PATH` and give
//! `/proc/self/fd/N`.

use nix::errno::Errno;
use std::ffi::{CStr, CString};

/// The kernel's XATTR_SIZE_MAX and XATTR_LIST_MAX.
const MOST: usize = 64 << 10;

/// Names of all attributes that the caller may see; empty where the file system has none.
pub fn list(path: &CStr) -> Result<Vec<CString>, Errno> {
    let mut buffer = vec![0u8; 1024];
    loop {
        // SAFETY: the pointer and the length are of one live buffer, the path ends in NUL.
        let n = unsafe { libc::listxattr(path.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) };
        match Errno::result(n) {
            Ok(n) => {
                let names = buffer[..n as usize].split(|b| *b == 0).filter(|name| !name.is_empty());
                return Ok(names.filter_map(|name| CString::new(name).ok()).collect());
            }
            Err(Errno::ERANGE) if buffer.len() < MOST => buffer.resize(MOST, 0),
            Err(Errno::ENOTSUP) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        }
    }
}

/// The value of one attribute; `None` when it is not there.
pub fn get(path: &CStr, name: &CStr) -> Result<Option<Vec<u8>>, Errno> {
    let mut buffer = vec![0u8; 1024];
    loop {
        // SAFETY: the pointer and the length are of one live buffer, both names end in NUL.
        let n = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) };
        match Errno::result(n) {
            Ok(n) => {
                buffer.truncate(n as usize);
                return Ok(Some(buffer));
            }
            Err(Errno::ERANGE) if buffer.len() < MOST => buffer.resize(MOST, 0),
            Err(Errno::ENODATA) => return Ok(None),
            Err(error) => return Err(error),
        }
    }
}

pub fn set(path: &CStr, name: &CStr, value: &[u8]) -> Result<(), Errno> {
    // SAFETY: the value's pointer and length are of one live slice, both names end in NUL.
    let n = unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    Errno::result(n).map(drop)
}

pub fn remove(path: &CStr, name: &CStr) -> Result<(), Errno> {
    // SAFETY: both names end in NUL.
    let n = unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) };
    match Errno::result(n) {
        Err(Errno::ENODATA) => Ok(()),
        other => other.map(drop),
    }
}
