//! What a process of a pod may do: user and groups, capabilities, seccomp, resource limits; and the order in which a
//! process takes them on itself, right before it becomes a program.
//!
//! Everything follows docker's defaults. The same [`confine`] runs for the first process and for every one that is
//! executed in the pod later, so neither can have more than the other.

pub mod capabilities;
pub mod limits;
pub mod seccomp;
pub mod user;

use crate::problem::{Doing, Problem, Result};
use crate::spec::{Process, Spec};
use crate::sys::mount;
use crate::sys::process::{self, CapabilitySets};
use capabilities::Set;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use std::fs::File;
use std::io::Write;

/// Gives up everything that `process` must not have. The caller is inside the pod, single-threaded, and execs next.
///
/// Order: what needs privileges first (limits, bounding set, groups, user), the filter while the right to install it is
/// still held, the capability sets last. With no_new_privs the filter needs no right and goes on at the very end.
pub fn confine(spec: &Spec, process: &Process) -> Result<()> {
    let filter = seccomp::program(spec)?;
    let allowed = allowed(spec)?;
    limits::apply(&process.rlimits)?;
    if let Some(adjustment) = process.oom_score_adj {
        // Lowering it needs CAP_SYS_RESOURCE; a pod without it runs all the same.
        let _ = adjust_oom_score(adjustment);
    }
    let _ = process::new_session_keyring();
    let umask = process.user.umask.unwrap_or(0o022);
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(umask & 0o777));

    process::clear_ambient_set().doing(|| "clear the ambient capabilities".into())?;
    for cap in allowed.missing() {
        process::drop_from_bounding_set(cap).doing(|| format!("drop capability {}", capabilities::name(cap)))?;
    }
    process::keep_capabilities(true).doing(|| "keep capabilities over a change of user".into())?;
    take_user(process)?;
    // The change of user has emptied the effective set; what is still permitted is needed once more.
    let permitted = process::capabilities().doing(|| "read the own capabilities".into())?.permitted;
    let all = CapabilitySets { effective: permitted, permitted, inheritable: 0 };
    process::set_capabilities(all).doing(|| "raise the own capabilities".into())?;
    if process.no_new_privileges {
        process::set_no_new_privileges().doing(|| "set no_new_privs".into())?;
    } else {
        install(filter.as_deref())?;
    }
    // As docker: another user than root starts with none, and can only get them from a file that grants them.
    let own = if process.user.uid == 0 { allowed.bits() & permitted } else { 0 };
    let own = CapabilitySets { effective: own, permitted: own, inheritable: 0 };
    process::set_capabilities(own).doing(|| "drop capabilities".into())?;
    if process.no_new_privileges {
        install(filter.as_deref())?;
    }
    Ok(())
}

/// Through a procfs of its own: what the pod has at /proc could send the write elsewhere.
fn adjust_oom_score(adjustment: i32) -> std::io::Result<()> {
    let proc = mount::new_filesystem(c"proc", &[], 0)?;
    let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
    let mut file = File::from(openat(&proc, "self/oom_score_adj", flags, Mode::empty())?);
    file.write_all(adjustment.to_string().as_bytes())
}

fn install(filter: Option<&[process::Instruction]>) -> Result<()> {
    match filter {
        Some(filter) => process::install_filter(filter).doing(|| "install the seccomp filter".into()),
        None => Ok(()),
    }
}

/// Capabilities that processes of this pod may hold.
fn allowed(spec: &Spec) -> Result<Set> {
    let held = Set::from_bits(process::capabilities().doing(|| "read the own capabilities".into())?.permitted);
    if spec.security.privileged {
        return Ok(held);
    }
    let wanted = Set::parse(&spec.security.capabilities)?;
    match wanted.without(held).names().first() {
        None => Ok(wanted),
        Some(name) => {
            Err(Problem::new("E-CAPABILITY", format!("the runtime itself does not hold {name} on this host"))
                .fix(format!("start the pod with --cap-drop {name}")))
        }
    }
}

fn take_user(process: &Process) -> Result<()> {
    let user = &process.user;
    let groups: Vec<Gid> = user.additional_gids.iter().map(|gid| Gid::from_raw(*gid)).collect();
    setgroups(&groups).doing(|| "set the groups".into())?;
    let gid = Gid::from_raw(user.gid);
    setresgid(gid, gid, gid).doing(|| format!("become group {}", user.gid))?;
    let uid = Uid::from_raw(user.uid);
    setresuid(uid, uid, uid).doing(|| format!("become user {}", user.uid))
}
