//! What a process of a container takes on itself before it becomes a program: first what needs rights ([`prepare`]),
//! then the end of all rights that it shall not have ([`confine`]). The same two run for the first process and for
//! every one that is executed later.
//!
//! Order of the second: bounding set, groups, user, then the filter while the right to install it is still held, the
//! capability sets last; with no_new_privs the filter needs no right and goes on at the very end.

use super::wrong;
use crate::problem::{Doing, Problem, Result};
use crate::security::capabilities::{self, Set};
use crate::security::limits;
use crate::security::seccomp::Filter;
use crate::spec::Rlimit;
use crate::sys::mount;
use crate::sys::process::{self, CapabilitySets};
use crate::sys::task::{self, SchedulingAttributes};
use nix::fcntl::{OFlag, openat};
use nix::libc;
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use oci_spec::runtime::{
    Capabilities, IOPriorityClass, LinuxMemoryPolicy, LinuxPersonality, LinuxPersonalityDomain, LinuxSchedulerFlag,
    LinuxSchedulerPolicy, MemoryPolicyFlagType, MemoryPolicyModeType, Process, Scheduler,
};
use std::fs::File;
use std::io::Write;

/// A 32-bit view of the machine, as in linux/personality.h.
const PER_LINUX32: i32 = 8;

/// Limits, scheduling, personality, memory policy: refused here, nothing of the user's has run.
pub fn prepare(
    process: &Process,
    personality: Option<&LinuxPersonality>,
    memory: Option<&LinuxMemoryPolicy>,
) -> Result<()> {
    if let Some(personality) = personality {
        let kind = match personality.domain() {
            LinuxPersonalityDomain::PerLinux => 0,
            LinuxPersonalityDomain::PerLinux32 => PER_LINUX32,
        };
        if personality.flags().as_ref().is_some_and(|flags| !flags.is_empty()) {
            return Err(wrong("personality flags are not supported"));
        }
        let kind = nix::sys::personality::Persona::from_bits_retain(kind);
        nix::sys::personality::set(kind).doing(|| "set the personality".into())?;
    }
    if let Some(scheduler) = process.scheduler() {
        schedule(scheduler)?;
    }
    if let Some(given) = process.io_priority() {
        let class = match given.class() {
            IOPriorityClass::IoprioClassRt => 1,
            IOPriorityClass::IoprioClassBe => 2,
            IOPriorityClass::IoprioClassIdle => 3,
        };
        let level = u32::try_from(given.priority()).ok().filter(|level| *level < 8);
        let level = level.ok_or_else(|| wrong(format!("ioPriority {} is not between 0 and 7", given.priority())))?;
        task::set_io_priority(class << 13 | level).doing(|| "set the I/O priority".into())?;
    }
    if let Some(policy) = memory {
        memory_policy(policy)?;
    }
    let limits: Vec<Rlimit> = process
        .rlimits()
        .iter()
        .flatten()
        .map(|limit| Rlimit { kind: limit.typ().to_string(), soft: limit.soft(), hard: limit.hard() })
        .collect();
    limits::apply(&limits)
}

fn schedule(scheduler: &Scheduler) -> Result<()> {
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => libc::SCHED_OTHER,
        LinuxSchedulerPolicy::SchedFifo => libc::SCHED_FIFO,
        LinuxSchedulerPolicy::SchedRr => libc::SCHED_RR,
        LinuxSchedulerPolicy::SchedBatch => libc::SCHED_BATCH,
        LinuxSchedulerPolicy::SchedIso => 4,
        LinuxSchedulerPolicy::SchedIdle => libc::SCHED_IDLE,
        LinuxSchedulerPolicy::SchedDeadline => libc::SCHED_DEADLINE,
    };
    let flag = |flag: &LinuxSchedulerFlag| match flag {
        LinuxSchedulerFlag::SchedResetOnFork => 0x01,
        LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
        LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
        LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
        LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
        LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
        LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
    };
    let attributes = SchedulingAttributes {
        size: 0,
        policy: policy as u32,
        flags: scheduler.flags().iter().flatten().map(flag).sum(),
        nice: scheduler.nice().unwrap_or(0),
        priority: u32::try_from(scheduler.priority().unwrap_or(0))
            .map_err(|_| wrong("scheduler priority is negative"))?,
        runtime: scheduler.runtime().unwrap_or(0),
        deadline: scheduler.deadline().unwrap_or(0),
        period: scheduler.period().unwrap_or(0),
    };
    task::set_scheduling(attributes).doing(|| "set the scheduler policy".into())
}

fn memory_policy(policy: &LinuxMemoryPolicy) -> Result<()> {
    let mode = match policy.mode() {
        MemoryPolicyModeType::MpolDefault => 0,
        MemoryPolicyModeType::MpolPreferred => 1,
        MemoryPolicyModeType::MpolBind => 2,
        MemoryPolicyModeType::MpolInterleave => 3,
        MemoryPolicyModeType::MpolLocal => 4,
        MemoryPolicyModeType::MpolPreferredMany => 5,
        MemoryPolicyModeType::MpolWeightedInterleave => 6,
    };
    let flag = |flag: &MemoryPolicyFlagType| match flag {
        MemoryPolicyFlagType::MpolFNumaBalancing => 1 << 13,
        MemoryPolicyFlagType::MpolFRelativeNodes => 1 << 14,
        MemoryPolicyFlagType::MpolFStaticNodes => 1 << 15,
    };
    let flags: u32 = policy.flags().iter().flatten().map(flag).fold(0, |all, flag| all | flag);
    let mut nodes = vec![0u64; 0];
    for node in list(policy.nodes().as_deref().unwrap_or_default())? {
        let word = node / 64;
        nodes.resize(nodes.len().max(word + 1), 0);
        nodes[word] |= 1 << (node % 64);
    }
    task::set_memory_policy(mode | flags, &nodes).doing(|| "set the memory policy".into())
}

/// "0-3,7" as numbers.
fn list(text: &str) -> Result<Vec<usize>> {
    const MOST: usize = 8192;
    let mut numbers = Vec::new();
    let bad = || wrong(format!("'{text}' is no list of numbers"));
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| text.trim().parse::<usize>().ok().filter(|number| *number < MOST).ok_or_else(bad);
        let (first, last) = (number(first)?, number(last)?);
        if last < first {
            return Err(bad());
        }
        numbers.extend(first..=last);
    }
    Ok(numbers)
}

/// Runs the caller on these CPUs only: "0-3,7".
pub fn run_on(cpus: &str) -> Result<()> {
    let mut mask = Vec::new();
    for cpu in list(cpus)? {
        mask.resize(mask.len().max(cpu / 8 + 1), 0u8);
        mask[cpu / 8] |= 1 << (cpu % 8);
    }
    task::set_affinity(&mask).doing(|| format!("set the CPU affinity to {cpus}"))
}

/// The sets of a process, each a bit a capability.
#[derive(Debug, Clone, Copy, Default)]
struct Wanted {
    bounding: u64,
    effective: u64,
    permitted: u64,
    inheritable: u64,
    ambient: u64,
}

impl Wanted {
    fn of(process: &Process) -> Result<Wanted> {
        let Some(given) = process.capabilities() else { return Ok(Wanted::default()) };
        let bits = |set: &Option<Capabilities>| {
            let names: Vec<String> = set.iter().flatten().map(ToString::to_string).collect();
            Set::parse(&names).map(Set::bits)
        };
        Ok(Wanted {
            bounding: bits(given.bounding())?,
            effective: bits(given.effective())?,
            permitted: bits(given.permitted())?,
            inheritable: bits(given.inheritable())?,
            ambient: bits(given.ambient())?,
        })
    }
}

/// That the runtime can give what the process shall have. Called where the process is made, in its user namespace.
pub fn can_give(process: &Process) -> Result<()> {
    let held = process::capabilities().doing(|| "read the own capabilities".into())?.permitted;
    let wanted = Wanted::of(process)?;
    match Set::from_bits((wanted.permitted | wanted.effective) & !held).names().first() {
        None => Ok(()),
        Some(name) => {
            Err(Problem::new("E-CAPABILITY", format!("unable to apply caps: the runtime does not hold CAP_{name}"))
                .because(nix::errno::Errno::EPERM))
        }
    }
}

/// Gives up what the process must not have. The caller is inside the container, single-threaded, and execs next.
pub fn confine(process: &Process, filter: Option<&Filter>) -> Result<()> {
    let wanted = Wanted::of(process)?;
    process::reset_signals();
    let umask = process.user().umask().unwrap_or(0o022);
    nix::sys::stat::umask(Mode::from_bits_truncate(umask & 0o777));
    label(process)?;
    process::clear_ambient_set().doing(|| "clear the ambient capabilities".into())?;
    for cap in Set::from_bits(wanted.bounding).missing() {
        process::drop_from_bounding_set(cap).doing(|| format!("drop capability {}", capabilities::name(cap)))?;
    }
    process::keep_capabilities(true).doing(|| "keep capabilities over a change of user".into())?;
    take_user(process)?;
    // That can make it visible, and hooks of the container may run before it becomes the program.
    process::set_dumpable(false).doing(|| "hide from the container's processes".into())?;
    // The change of user has emptied the effective set; what is still permitted is needed once more.
    let permitted = process::capabilities().doing(|| "read the own capabilities".into())?.permitted;
    let all = CapabilitySets { effective: permitted, permitted, inheritable: 0 };
    process::set_capabilities(all).doing(|| "raise the own capabilities".into())?;
    let no_new_privileges = process.no_new_privileges().unwrap_or(false);
    if no_new_privileges {
        process::set_no_new_privileges().doing(|| "set no_new_privs".into())?;
    } else {
        filter.map_or(Ok(()), Filter::install)?;
    }
    let Wanted { effective, permitted, inheritable, ambient, .. } = wanted;
    process::set_capabilities(CapabilitySets { effective, permitted, inheritable })
        .doing(|| "unable to apply caps".into())?;
    // One that is not inheritable cannot be ambient, and a profile that asks for it means no harm.
    for cap in (0..64).filter(|cap| ambient & permitted & inheritable & 1 << cap != 0) {
        process::raise_ambient(cap).doing(|| format!("raise the ambient capability {}", capabilities::name(cap)))?;
    }
    if no_new_privileges {
        filter.map_or(Ok(()), Filter::install)?;
    }
    Ok(())
}

fn take_user(process: &Process) -> Result<()> {
    let user = process.user();
    let groups: Vec<Gid> = user.additional_gids().iter().flatten().map(|gid| Gid::from_raw(*gid)).collect();
    match setgroups(&groups) {
        // In the user namespace of an ordinary user nobody may: none are asked for, and what there are cannot be left.
        Err(nix::errno::Errno::EPERM) if groups.is_empty() => {}
        other => other.doing(|| "setgroups".into())?,
    }
    let gid = Gid::from_raw(user.gid());
    setresgid(gid, gid, gid).doing(|| format!("setgid {}", user.gid()))?;
    let uid = Uid::from_raw(user.uid());
    setresuid(uid, uid, uid).doing(|| format!("setuid {}", user.uid()))
}

/// The AppArmor profile that the next exec enters. Through a procfs of its own: what the container has at /proc could
/// send the write elsewhere.
fn label(process: &Process) -> Result<()> {
    let Some(profile) = process.apparmor_profile().as_deref().filter(|profile| !profile.is_empty()) else {
        return Ok(());
    };
    let doing = || format!("apply the apparmor profile {profile}");
    let proc = mount::new_filesystem(c"proc", &[], 0).doing(doing)?;
    let open = |path: &str| openat(&proc, path, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty()).map(File::from);
    let file = open("self/attr/apparmor/exec").or_else(|_| open("self/attr/exec"));
    file.doing(doing)?.write_all(format!("exec {profile}").as_bytes()).doing(doing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_numbers() {
        assert_eq!(list("0-2, 5").unwrap(), [0, 1, 2, 5]);
        assert_eq!(list("").unwrap(), Vec::<usize>::new());
        for text in ["x", "3-1", "0-99999999", "1-", "-1"] {
            assert!(list(text).is_err(), "{text}");
        }
    }
}
