//! The runtime as a copy of itself that nobody can change.
//!
//! A process of the runtime that is in a container, before it becomes the container's program, shows its file as
//! /proc/PID/exe. Nothing inside may look there, but what holds CAP_SYS_PTRACE: it could keep that file open and write to
//! it when nobody runs it any more (CVE-2019-5736). For containers that may hold it, and for them only, the runtime goes
//! on from a sealed file in memory first.

use super::bundle;
use super::store::Containers;
use crate::problem::{Doing, Result};
use crate::sys::process;
use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

/// As it is written in a configuration. A text that has it anywhere is taken for one that gives it.
const CAPABILITY: &[u8] = b"CAP_SYS_PTRACE";

fn names_it(text: &[u8]) -> bool {
    text.windows(CAPABILITY.len()).any(|part| part.eq_ignore_ascii_case(CAPABILITY))
}

/// For a container that is made of this bundle. Faults of the configuration are found later.
pub fn for_bundle(folder: &Path) -> Result<()> {
    match bundle::read(&folder.join("config.json")) {
        Ok(text) if names_it(&text) => go_on(),
        _ => Ok(()),
    }
}

/// For a process that is to be executed in a container.
pub fn for_container(containers: &Containers, id: &str, more: &[u8]) -> Result<()> {
    let config = containers.get(id).and_then(|container| container.config());
    let listed = config.is_ok_and(|text| names_it(&text));
    if listed || names_it(more) { go_on() } else { Ok(()) }
}

/// Returns at once in the copy.
fn go_on() -> Result<()> {
    let doing = || "go on from a copy of the runtime".to_owned();
    let mut own = File::open("/proc/self/exe").doing(doing)?;
    if process::is_sealed(own.as_fd()) {
        return Ok(());
    }
    let mut program = Vec::new();
    own.read_to_end(&mut program).doing(doing)?;
    let copy = process::sealed_file(c"pod-oci", &program).doing(doing)?;
    let text = |text: std::ffi::OsString| CString::new(text.into_vec()).doing(doing);
    let args = std::env::args_os().map(text).collect::<Result<Vec<_>>>()?;
    let env = std::env::vars_os().map(|(mut name, value)| {
        name.push("=");
        name.push(value);
        text(name)
    });
    let env = env.collect::<Result<Vec<_>>>()?;
    Err(process::execute_file(copy.as_fd(), &args, &env)).doing(doing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_where_it_is_needed() {
        assert!(names_it(br#"{"bounding": ["CAP_KILL", "CAP_SYS_PTRACE"]}"#));
        assert!(names_it(b"cap_sys_ptrace"));
        assert!(!names_it(br#"{"bounding": ["CAP_KILL"]}"#));
        assert!(!names_it(b""));
    }
}
