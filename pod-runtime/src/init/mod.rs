//! What the first process of a pod ([`first`]), and every other that enters it to become a program, does on its way.
//!
//! The last steps are those of two tiny programs (`tiny/`), so that no process of a pod ever is a piece of this runtime:
//! a launcher, from a sealed memory file, for every program; with `--init` also a first process, from the pod's own
//! layer, that starts the user's.

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
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Of `tiny/`, as the build made it.
pub const TINY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/tiny"));

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Where a process says what went wrong, and in what words.
pub struct Tell<'a> {
    /// Closes at the program's exec.
    pub fd: i32,
    pub words: &'a dyn Fn(&Problem) -> Vec<u8>,
}

/// Turns the calling process, which is inside the pod already, into `process` under the pod's security: user, groups,
/// capabilities, seccomp, limits, umask. Returns only when it cannot, with `E-COMMAND-NOT-FOUND` (exit code 127),
/// `E-COMMAND-NOT-EXECUTABLE` (126) or another code (125). When it does not return and yet the program cannot be
/// executed, the problem is written to `tell` in its words, and the process ends with the code.
///
/// First of all every descriptor above 2 is closed but that one: a descriptor of the host must not be there when the
/// working directory and the program are looked up in /proc/self/fd. The caller must not drop objects that own one of
/// the others, and so leaves by `exit_now`.
pub fn become_program(spec: &Spec, process: &Process, tell: &Tell<'_>) -> Problem {
    match try_to_become(spec, process, tell) {
        Err(problem) => problem,
        Ok(never) => match never {},
    }
}

/// The exit code of a process that could not become its program.
pub fn exit_code(problem: &Problem) -> i32 {
    match problem.code() {
        "E-COMMAND-NOT-FOUND" => 127,
        "E-COMMAND-NOT-EXECUTABLE" => 126,
        _ => 125,
    }
}

fn try_to_become(spec: &Spec, process: &Process, tell: &Tell<'_>) -> Result<Infallible> {
    daemon::close_all_but(&[tell.fd]);
    let launcher = launcher()?;
    own::close_on_exec_from(3).doing(|| "mark descriptors to close at exec".into())?;
    own::keep_at_exec(tell.fd).doing(|| "keep a descriptor over exec".into())?;
    own::reset_signals();
    go_to(&process.cwd)?;
    let program = process.args.first().ok_or_else(|| Problem::new("E-USAGE", "no command was given"))?;
    let env = strings(&process.env, "environment variable")?;
    let args = strings(&process.args, "argument")?;
    let texts = texts(program, tell)?;
    security::confine(spec, process)?;
    let (places, args) = match process.init {
        false => (strings(&places(program, &process.env), "command")?, args),
        true => through_tiny_init(program, process, args)?,
    };
    launch(launcher.as_fd(), tell.fd, texts, places, (&args, &env))
}

/// Becomes the launcher, which becomes the first of the programs that can be executed. Descriptor `tell`, which stays open
/// at exec, gets one of the texts when none can, and closes otherwise.
pub(crate) fn launch(
    launcher: BorrowedFd<'_>,
    tell: i32,
    texts: Vec<CString>,
    places: Vec<CString>,
    (args, env): (&[CString], &[CString]),
) -> Result<Infallible> {
    let fd = CString::new(tell.to_string()).doing(|| "name a descriptor".into())?;
    let mut all = vec![c"launch".to_owned(), fd];
    all.extend(texts);
    all.extend(places);
    all.push(c"".to_owned());
    all.extend_from_slice(args);
    Err(own::execute_file(launcher, &all, env)).doing(|| "start the launcher".into())
}

/// The program that [`launch`] becomes first, as a file of its own that nobody can change.
pub(crate) fn launcher() -> Result<OwnedFd> {
    own::sealed_file(c"pod-launch", TINY).doing(|| "make the launcher".into())
}

/// What the launcher says, in its order.
fn texts(program: &str, tell: &Tell<'_>) -> Result<Vec<CString>> {
    [None, Some(Errno::EACCES), Some(Errno::ENOEXEC), Some(Errno::EINVAL)]
        .into_iter()
        .map(|error| CString::new((tell.words)(&cannot_execute(program, error))).doing(|| "word a problem".into()))
        .collect()
}

/// The program's place must be known before: the tiny init has no way to tell but its exit code.
fn through_tiny_init(program: &str, process: &Process, args: Vec<CString>) -> Result<(Vec<CString>, Vec<CString>)> {
    let mut refused = None;
    for path in places(program, &process.env) {
        let at = nix::fcntl::AT_FDCWD;
        match faccessat(at, path.as_str(), AccessFlags::X_OK, nix::fcntl::AtFlags::AT_EACCESS) {
            Ok(()) if Path::new(&path).is_dir() => refused = refused.or(Some(Errno::EACCES)),
            Ok(()) => {
                let init = CString::new(TINY_INIT).doing(|| "name the tiny init".into())?;
                let path = CString::new(path).doing(|| format!("use '{program}' as a command"))?;
                return Ok((vec![init], [c"init".to_owned(), path].into_iter().chain(args).collect()));
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
            let why = match error {
                Errno::EACCES => "the pod's user may not execute it",
                Errno::ENOEXEC => "it is no program for this machine",
                _ => "the kernel refuses it",
            };
            Problem::new("E-COMMAND-NOT-EXECUTABLE", format!("'{program}' cannot be executed: {why}"))
        }
    }
}

/// Where a command may be: as execvp(3), but by the pod's PATH and without its fallback to a shell.
pub(crate) fn places(program: &str, env: &[String]) -> Vec<String> {
    if program.contains('/') {
        return vec![program.to_owned()];
    }
    let path = env.iter().rev().find_map(|line| line.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
    let folders = path.split(':').map(|folder| if folder.is_empty() { "." } else { folder });
    if program.is_empty() { Vec::new() } else { folders.map(|folder| format!("{folder}/{program}")).collect() }
}

pub(crate) fn strings(texts: &[String], what: &str) -> Result<Vec<CString>> {
    texts
        .iter()
        .map(|text| CString::new(text.as_str()).doing(|| format!("pass an {what} with a zero byte in it")))
        .collect()
}

/// Enters the working directory, made if it is not there, and makes sure that it is inside the root: a path through
/// /proc could lead to a directory that is not.
pub(crate) fn go_to(cwd: &Path) -> Result<()> {
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
    fn the_tiny_programs_are_tiny() {
        assert_eq!(&TINY[..4], b"\x7fELF");
        assert!(TINY.len() < 8192, "{} bytes", TINY.len());
    }
}
