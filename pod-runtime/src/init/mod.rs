//! What the first process of a pod ([`first`]), and every other that enters it to become a program, does on its way.
//!
//! With `--init` the first program is a tiny one that lives in the pod's own layer and starts the user's, so that no
//! process of a pod ever is a piece of this runtime.

pub(crate) mod first;

use crate::problem::{Doing, Problem, Result};
use crate::rootfs::TINY_INIT;
use crate::security;
use crate::spec::{Process, Spec};
use crate::sys::{daemon, process as own};
use nix::errno::Errno;
use nix::unistd::{AccessFlags, faccessat};
use std::convert::Infallible;
use std::ffi::CString;
use std::path::Path;

/// Of `tiny-init/`, as the build made it.
pub const TINY_INIT_PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/tiny-init"));

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Turns the calling process, which is inside the pod already, into `process` under the pod's security: user, groups,
/// capabilities, seccomp, limits, umask. Returns only when it cannot, with `E-COMMAND-NOT-FOUND` (exit code 127),
/// `E-COMMAND-NOT-EXECUTABLE` (126) or another code (125).
///
/// First of all every descriptor above 2 is closed but those in `keep`, which close at exec: a descriptor of the host
/// must not be there when the working directory and the program are looked up in /proc/self/fd. The caller must not
/// drop objects that own one of the others, and so leaves by `exit_now`.
pub fn become_program(spec: &Spec, process: &Process, keep: &[i32]) -> Problem {
    match try_to_become(spec, process, keep) {
        Err(problem) => problem,
        Ok(never) => match never {},
    }
}

fn try_to_become(spec: &Spec, process: &Process, keep: &[i32]) -> Result<Infallible> {
    daemon::close_all_but(keep);
    own::close_on_exec_from(3).doing(|| "mark descriptors to close at exec".into())?;
    own::reset_signals();
    go_to(&process.cwd)?;
    let program = process.args.first().ok_or_else(|| Problem::new("E-USAGE", "no command was given"))?;
    let args = strings(&process.args, "argument")?;
    let env = strings(&process.env, "environment variable")?;
    security::confine(spec, process)?;
    if process.init {
        return start_tiny_init(program, process, &args, &env);
    }
    let mut refused = None;
    for path in places(program, process) {
        let path = CString::new(path).doing(|| format!("use '{program}' as a command"))?;
        match nix::unistd::execve(&path, &args, &env) {
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            Err(error) => refused = refused.or(Some(error)),
        }
    }
    Err(cannot_execute(program, refused))
}

/// The program's place must be known before: the tiny init has no way to tell but its exit code.
fn start_tiny_init(program: &str, process: &Process, args: &[CString], env: &[CString]) -> Result<Infallible> {
    let mut refused = None;
    for path in places(program, process) {
        let at = nix::fcntl::AT_FDCWD;
        match faccessat(at, path.as_str(), AccessFlags::X_OK, nix::fcntl::AtFlags::AT_EACCESS) {
            Ok(()) if Path::new(&path).is_dir() => refused = refused.or(Some(Errno::EACCES)),
            Ok(()) => {
                let init = CString::new(TINY_INIT).doing(|| "name the tiny init".into())?;
                let path = CString::new(path).doing(|| format!("use '{program}' as a command"))?;
                let all: Vec<_> = [c"init".to_owned(), path].into_iter().chain(args.iter().cloned()).collect();
                let error = nix::unistd::execve(&init, &all, env).unwrap_err();
                return Err(cannot_execute(TINY_INIT, Some(error)));
            }
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            Err(error) => refused = refused.or(Some(error)),
        }
    }
    Err(cannot_execute(program, refused))
}

fn cannot_execute(program: &str, refused: Option<Errno>) -> Problem {
    match refused {
        None => Problem::new("E-COMMAND-NOT-FOUND", format!("the pod has no command '{program}'"))
            .fix("give its path inside the pod, or a root that has it"),
        Some(error) => {
            let what = format!("the pod's user may not or cannot execute '{program}'");
            Problem::new("E-COMMAND-NOT-EXECUTABLE", what).because(error)
        }
    }
}

/// Where a command may be: as execvp(3), but by the pod's PATH and without its fallback to a shell.
fn places(program: &str, process: &Process) -> Vec<String> {
    if program.contains('/') {
        return vec![program.to_owned()];
    }
    let path = process.env.iter().rev().find_map(|line| line.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
    let folders = path.split(':').map(|folder| if folder.is_empty() { "." } else { folder });
    if program.is_empty() { Vec::new() } else { folders.map(|folder| format!("{folder}/{program}")).collect() }
}

fn strings(texts: &[String], what: &str) -> Result<Vec<CString>> {
    texts
        .iter()
        .map(|text| CString::new(text.as_str()).doing(|| format!("pass an {what} with a zero byte in it")))
        .collect()
}

/// Enters the working directory, made if it is not there, and makes sure that it is inside the root: a path through
/// /proc could lead to a directory that is not.
fn go_to(cwd: &Path) -> Result<()> {
    let doing = || format!("enter the working directory {}", cwd.display());
    if let Err(error) = nix::unistd::chdir(cwd) {
        if error != Errno::ENOENT {
            return Err(error).doing(doing);
        }
        std::fs::create_dir_all(cwd).doing(|| format!("make the working directory {}", cwd.display()))?;
        nix::unistd::chdir(cwd).doing(doing)?;
    }
    match nix::unistd::getcwd() {
        Ok(path) if path.is_absolute() => Ok(()),
        _ => Err(Problem::new("E-ROOTFS", format!("the working directory {} is outside the pod", cwd.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tiny_init_is_tiny_and_a_program() {
        assert_eq!(&TINY_INIT_PROGRAM[..4], b"\x7fELF");
        assert!(TINY_INIT_PROGRAM.len() < 8192, "{} bytes", TINY_INIT_PROGRAM.len());
    }
}
