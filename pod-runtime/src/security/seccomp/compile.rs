//! From rules to the kernel's classic BPF.
//!
//! The program checks the architecture, rejects numbers of the x32 ABI, and finds the call by binary search over ranges
//! of numbers that are treated alike, so that a call costs some ten instructions whatever the profile's length. Each
//! range ends in a return; tests of arguments compare both halves of 64 bits.

use super::profile::{Action, Argument, Comparison, Profile, wrong};
use super::{i386, syscalls};
use crate::problem::Result;
use crate::sys::process::Instruction;
use nix::libc;
use std::collections::BTreeMap;

/// AUDIT_ARCH_X86_64.
const ARCHITECTURE: u32 = 0xc000_003e;
/// AUDIT_ARCH_I386.
const ARCHITECTURE_32: u32 = 0x4000_0003;
/// Set in the numbers of the x32 ABI.
const X32: u32 = 0x4000_0000;
/// The first of the numbers that only that ABI has: its execve, ioctl, ptrace. The table of names does not know them.
const OWN_OF_X32: u32 = 512;
/// BPF_MAXINSNS.
const LONGEST: usize = 4096;

// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const ARGUMENTS: u32 = 16;

const LOAD: u16 = 0x20;
const JUMP: u16 = 0x05;
const IF_EQUAL: u16 = 0x15;
const IF_GREATER: u16 = 0x25;
const IF_AT_LEAST: u16 = 0x35;
const AND: u16 = 0x54;
const RETURN: u16 = 0x06;

fn op(code: u16, k: u32) -> Instruction {
    Instruction { code, jt: 0, jf: 0, k }
}

fn branch(code: u16, k: u32, jt: u8, jf: u8) -> Instruction {
    Instruction { code, jt, jf, k }
}

fn give(action: Action) -> Instruction {
    let value = match action {
        Action::Allow => libc::SECCOMP_RET_ALLOW,
        Action::Error(errno) => libc::SECCOMP_RET_ERRNO | u32::from(errno),
        Action::KillProcess => libc::SECCOMP_RET_KILL_PROCESS,
        Action::KillThread => libc::SECCOMP_RET_KILL_THREAD,
        Action::Trap => libc::SECCOMP_RET_TRAP,
        Action::Log => libc::SECCOMP_RET_LOG,
        Action::Trace(data) => libc::SECCOMP_RET_TRACE | u32::from(data),
        Action::Notify => libc::SECCOMP_RET_USER_NOTIF,
    };
    op(RETURN, value)
}

/// What is done with one call: alternatives in order, then for all else.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Verdict {
    tested: Vec<(Vec<Argument>, Action)>,
    plain: Action,
}

/// Which programs a filter lets run beside those of x86-64. Of all others every call kills.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Also {
    /// 32-bit programs of x86.
    pub i386: bool,
    pub x32: bool,
}

/// Compiles a profile for programs of x86-64 alone.
pub fn compile(profile: &Profile) -> Result<Vec<Instruction>> {
    compile_for(profile, Also::default())
}

/// Compiles a profile. Calls that are newer than everything it names answer ENOSYS if it denies by errno, so that
/// programs fall back as on an older kernel instead of taking the denial for a fault.
pub fn compile_for(profile: &Profile, also: Also) -> Result<Vec<Instruction>> {
    let mut native = vec![op(LOAD, NUMBER)];
    if also.x32 {
        // Those that it has numbers of its own for would be taken for calls that do not exist, and let through by a profile
        // that allows what it does not name.
        native.extend([branch(IF_AT_LEAST, X32 | OWN_OF_X32, 0, 1), give(Action::Error(libc::ENOSYS as u16))]);
        native.push(op(AND, !X32));
    } else {
        native.extend([branch(IF_AT_LEAST, X32, 0, 1), give(Action::Error(libc::ENOSYS as u16))]);
    }
    native.extend(search(&ranges(profile, syscalls::number)));
    let mut blocks = vec![(ARCHITECTURE, native)];
    if also.i386 {
        let mut small = vec![op(LOAD, NUMBER)];
        small.extend(search(&ranges(profile, i386::number)));
        blocks.push((ARCHITECTURE_32, small));
    }
    let mut program = vec![op(LOAD, ARCH)];
    for (architecture, block) in blocks {
        program.extend([branch(IF_EQUAL, architecture, 1, 0), op(JUMP, block.len() as u32)]);
        program.extend(block);
    }
    // Its calls would be read by the wrong table.
    program.push(give(Action::KillProcess));
    if program.len() > LONGEST {
        return Err(wrong(&format!("is too long for the kernel: {} instructions", program.len())));
    }
    Ok(program)
}

/// Starts of ranges of numbers that are treated alike.
fn ranges(profile: &Profile, number: fn(&str) -> Option<u32>) -> Vec<(u32, Verdict)> {
    let verdicts = verdicts(profile, number);
    let newest = verdicts.keys().next_back().copied().unwrap_or(0);
    let otherwise = Verdict { tested: Vec::new(), plain: profile.otherwise };
    let beyond = match profile.otherwise {
        Action::Error(_) => Verdict { tested: Vec::new(), plain: Action::Error(libc::ENOSYS as u16) },
        _ => otherwise.clone(),
    };
    let mut ranges: Vec<(u32, Verdict)> = Vec::new();
    for number in 0..=newest {
        let verdict = verdicts.get(&number).unwrap_or(&otherwise);
        if ranges.last().is_none_or(|(_, last)| last != verdict) {
            ranges.push((number, verdict.clone()));
        }
    }
    if ranges.last().is_none_or(|(_, last)| *last != beyond) {
        ranges.push((newest + 1, beyond));
    }
    ranges
}

fn verdicts(profile: &Profile, number: fn(&str) -> Option<u32>) -> BTreeMap<u32, Verdict> {
    type Found = (Vec<(Vec<Argument>, Action)>, Option<Action>);
    let mut found: BTreeMap<u32, Found> = BTreeMap::new();
    for rule in &profile.rules {
        // Names that this program or architecture does not know need no rule: such calls do not exist here.
        for number in rule.names.iter().filter_map(|name| number(name)) {
            let entry = found.entry(number).or_default();
            if rule.arguments.is_empty() {
                entry.1.get_or_insert(rule.action);
            } else {
                entry.0.push((rule.arguments.clone(), rule.action));
            }
        }
    }
    let verdict = |(tested, plain): Found| Verdict { tested, plain: plain.unwrap_or(profile.otherwise) };
    found.into_iter().map(|(number, found)| (number, verdict(found))).collect()
}

/// The number is in the accumulator. `ranges` is not empty.
fn search(ranges: &[(u32, Verdict)]) -> Vec<Instruction> {
    if let [(_, verdict)] = ranges {
        return decide(verdict);
    }
    let (below, above) = ranges.split_at(ranges.len() / 2);
    let (left, right) = (search(below), search(above));
    // A conditional jump reaches 255 instructions only; a plain one everywhere.
    let mut out = vec![branch(IF_AT_LEAST, above[0].0, 0, 1), op(JUMP, left.len() as u32)];
    out.extend(left);
    out.extend(right);
    out
}

fn decide(verdict: &Verdict) -> Vec<Instruction> {
    let mut out = Vec::new();
    for (arguments, action) in &verdict.tested {
        // Built from the end, since every test that fails jumps there.
        let mut tests = vec![give(*action)];
        for argument in arguments.iter().rev() {
            let mut test = test(argument, tests.len());
            test.extend(tests);
            tests = test;
        }
        out.extend(tests);
    }
    out.push(give(verdict.plain));
    out
}

/// Falls through when the test holds, skips `rest` instructions when not.
fn test(argument: &Argument, rest: usize) -> Vec<Instruction> {
    let low = ARGUMENTS + 8 * u32::from(argument.index);
    let high = low + 4;
    let halves = |value: u64| ((value >> 32) as u32, value as u32);
    let (value_high, value_low) = halves(argument.value);
    let rest = rest as u8;
    // At most six tests of six instructions follow: a byte holds every jump.
    match argument.comparison {
        Comparison::Equal => vec![
            op(LOAD, high),
            branch(IF_EQUAL, value_high, 0, rest + 2),
            op(LOAD, low),
            branch(IF_EQUAL, value_low, 0, rest),
        ],
        Comparison::NotEqual => vec![
            op(LOAD, high),
            branch(IF_EQUAL, value_high, 0, 2),
            op(LOAD, low),
            branch(IF_EQUAL, value_low, rest, 0),
        ],
        Comparison::Greater => vec![
            op(LOAD, high),
            branch(IF_GREATER, value_high, 3, 0),
            branch(IF_EQUAL, value_high, 0, rest + 2),
            op(LOAD, low),
            branch(IF_GREATER, value_low, 0, rest),
        ],
        Comparison::GreaterOrEqual => vec![
            op(LOAD, high),
            branch(IF_GREATER, value_high, 3, 0),
            branch(IF_EQUAL, value_high, 0, rest + 2),
            op(LOAD, low),
            branch(IF_AT_LEAST, value_low, 0, rest),
        ],
        Comparison::Less => vec![
            op(LOAD, high),
            branch(IF_GREATER, value_high, rest + 3, 0),
            branch(IF_EQUAL, value_high, 0, 2),
            op(LOAD, low),
            branch(IF_AT_LEAST, value_low, rest, 0),
        ],
        Comparison::LessOrEqual => vec![
            op(LOAD, high),
            branch(IF_GREATER, value_high, rest + 3, 0),
            branch(IF_EQUAL, value_high, 0, 2),
            op(LOAD, low),
            branch(IF_GREATER, value_low, rest, 0),
        ],
        Comparison::MaskedEqual(mask) => {
            let (mask_high, mask_low) = halves(mask);
            vec![
                op(LOAD, high),
                op(AND, mask_high),
                branch(IF_EQUAL, value_high & mask_high, 0, rest + 3),
                op(LOAD, low),
                op(AND, mask_low),
                branch(IF_EQUAL, value_low & mask_low, 0, rest),
            ]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::profile::Rule;
    use super::super::usual;
    use super::*;
    use crate::security::capabilities::Set;
    use proptest::prelude::*;

    /// Runs a program as the kernel does.
    fn run(program: &[Instruction], arch: u32, number: u32, arguments: [u64; 6]) -> u32 {
        let mut data = [0u8; 64];
        data[0..4].copy_from_slice(&number.to_le_bytes());
        data[4..8].copy_from_slice(&arch.to_le_bytes());
        for (at, argument) in arguments.iter().enumerate() {
            data[16 + 8 * at..24 + 8 * at].copy_from_slice(&argument.to_le_bytes());
        }
        let (mut accumulator, mut at) = (0u32, 0usize);
        loop {
            let Instruction { code, jt, jf, k } = program[at];
            at += 1;
            let mut jump = |holds: bool| at += usize::from(if holds { jt } else { jf });
            match code {
                LOAD => accumulator = u32::from_le_bytes(data[k as usize..k as usize + 4].try_into().unwrap()),
                AND => accumulator &= k,
                JUMP => at += k as usize,
                IF_EQUAL => jump(accumulator == k),
                IF_GREATER => jump(accumulator > k),
                IF_AT_LEAST => jump(accumulator >= k),
                RETURN => return k,
                other => panic!("code {other:#x}"),
            }
        }
    }

    fn call(program: &[Instruction], name: &str, arguments: &[u64]) -> u32 {
        let mut all = [0; 6];
        all[..arguments.len()].copy_from_slice(arguments);
        run(program, ARCHITECTURE, syscalls::number(name).unwrap(), all)
    }

    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
    const EPERM: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    const ENOSYS: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

    #[test]
    fn programs_of_other_kinds_by_their_own_numbers() {
        let rule = Rule { names: vec!["mkdir".into()], action: Action::Error(28), arguments: Vec::new() };
        let profile = Profile { otherwise: Action::Allow, rules: vec![rule] };
        let denied = libc::SECCOMP_RET_ERRNO | 28;
        let call = |also, arch, number| run(&compile_for(&profile, also).unwrap(), arch, number, [0; 6]);
        let (native, all) = (Also::default(), Also { i386: true, x32: true });
        // mkdir is 83 here and 39 there, where 83 is symlink.
        for also in [native, all] {
            assert_eq!([call(also, ARCHITECTURE, 83), call(also, ARCHITECTURE, 39)], [denied, ALLOW]);
        }
        assert_eq!([call(all, ARCHITECTURE_32, 39), call(all, ARCHITECTURE_32, 83)], [denied, ALLOW]);
        assert_eq!([call(all, ARCHITECTURE, X32 | 83), call(all, ARCHITECTURE, X32 | 39)], [denied, ALLOW]);
        for own in [512, 520, 547] {
            assert_eq!(call(all, ARCHITECTURE, X32 | own), ENOSYS, "{own}");
        }
        assert_eq!(call(all, ARCHITECTURE, X32 | 511), ALLOW);
        assert_eq!(call(native, ARCHITECTURE_32, 39), libc::SECCOMP_RET_KILL_PROCESS);
        assert_eq!(call(native, ARCHITECTURE, X32 | 39), ENOSYS);
        assert_eq!(call(all, 0xc000_00b7, 39), libc::SECCOMP_RET_KILL_PROCESS);
    }

    #[test]
    fn the_usual_profile() {
        let program = compile(&usual::profile(Set::from_bits(0))).unwrap();
        assert!(program.len() < 700, "{} instructions", program.len());
        for (name, arguments, wanted) in [
            ("read", &[][..], ALLOW),
            ("openat2", &[], ALLOW),
            ("getrandom", &[], ALLOW),
            ("io_uring_setup", &[], ENOSYS),
            ("io_uring_enter", &[], ENOSYS),
            ("io_uring_register", &[], ENOSYS),
            ("io_setup", &[], ENOSYS),
            ("unshare", &[], EPERM),
            ("mount", &[], EPERM),
            ("keyctl", &[], EPERM),
            ("userfaultfd", &[], EPERM),
            ("kexec_load", &[], EPERM),
            ("setns", &[], EPERM),
            ("chroot", &[], EPERM),
            ("clone3", &[], ENOSYS),
            ("clone", &[libc::CLONE_NEWUSER as u64], EPERM),
            ("clone", &[libc::CLONE_VM as u64 | 17], ALLOW),
            ("personality", &[0], ALLOW),
            ("personality", &[0xffff_ffff], ALLOW),
            ("personality", &[0x1_0000_0000], EPERM),
            ("personality", &[0x40000], EPERM),
            ("socket", &[libc::AF_INET as u64], ALLOW),
            ("socket", &[libc::AF_VSOCK as u64], EPERM),
        ] {
            assert_eq!(call(&program, name, arguments), wanted, "{name} {arguments:?}");
        }
        assert_eq!(run(&program, 0x4000_0003, 0, [0; 6]), libc::SECCOMP_RET_KILL_PROCESS);
        assert_eq!(run(&program, ARCHITECTURE, X32 | 1, [0; 6]), ENOSYS);
        assert_eq!(run(&program, ARCHITECTURE, 5000, [0; 6]), ENOSYS);
        let admin = Set::parse(&["SYS_ADMIN".to_owned(), "SYS_CHROOT".to_owned()]).unwrap();
        let program = compile(&usual::profile(admin)).unwrap();
        for name in ["unshare", "mount", "clone3", "chroot"] {
            assert_eq!(call(&program, name, &[]), ALLOW, "{name}");
        }
        assert_eq!(call(&program, "clone", &[libc::CLONE_NEWUSER as u64]), ALLOW);
        assert_eq!(call(&program, "io_uring_setup", &[]), ENOSYS);
    }

    /// Every name of the table exists: a misspelt one would be denied in silence.
    #[test]
    fn the_usual_profile_names_real_calls() {
        let all = Set::from_bits(u64::MAX);
        let profile = usual::profile(all);
        for name in profile.rules.iter().flat_map(|rule| &rule.names) {
            assert!(syscalls::number(name).is_some() || newer(name), "{name}");
        }
    }

    /// Later than the table of numbers.
    fn newer(name: &str) -> bool {
        ["file_getattr", "file_setattr", "open_tree_attr", "uprobe", "uretprobe"].contains(&name)
    }

    fn holds(comparison: Comparison, argument: u64, value: u64) -> bool {
        match comparison {
            Comparison::Equal => argument == value,
            Comparison::NotEqual => argument != value,
            Comparison::Less => argument < value,
            Comparison::LessOrEqual => argument <= value,
            Comparison::Greater => argument > value,
            Comparison::GreaterOrEqual => argument >= value,
            Comparison::MaskedEqual(mask) => argument & mask == value & mask,
        }
    }

    fn comparison() -> impl Strategy<Value = Comparison> {
        prop_oneof![
            Just(Comparison::Equal),
            Just(Comparison::NotEqual),
            Just(Comparison::Less),
            Just(Comparison::LessOrEqual),
            Just(Comparison::Greater),
            Just(Comparison::GreaterOrEqual),
            any::<u64>().prop_map(Comparison::MaskedEqual),
        ]
    }

    /// Halves that are often alike, or 64-bit comparisons would hardly be tested.
    fn word() -> impl Strategy<Value = u64> {
        (0..3u64, 0..3u64, any::<bool>())
            .prop_map(|(high, low, top)| (high << 32 | low) ^ if top { 1 << 63 } else { 0 })
    }

    proptest! {
        #[test]
        fn comparisons_of_64_bits(
            tests in prop::collection::vec((0..6u8, comparison(), word()), 1..7),
            arguments in prop::array::uniform6(word()),
        ) {
            let list: Vec<_> = tests.iter().map(|&(index, comparison, value)| Argument { index, comparison, value }).collect();
            let rule = Rule { names: vec!["write".into()], action: Action::Allow, arguments: list };
            let program = compile(&Profile { otherwise: Action::Error(1), rules: vec![rule] }).unwrap();
            let all = tests.iter().all(|&(index, comparison, value)| holds(comparison, arguments[usize::from(index)], value));
            let wanted = if all { ALLOW } else { EPERM };
            prop_assert_eq!(run(&program, ARCHITECTURE, libc::SYS_write as u32, arguments), wanted);
            prop_assert_eq!(run(&program, ARCHITECTURE, libc::SYS_read as u32, arguments), EPERM);
        }

        #[test]
        fn search_finds_every_number(allowed in prop::collection::btree_set(0..300u32, 0..120)) {
            let names: Vec<String> = (0..300u32).filter(|n| allowed.contains(n)).filter_map(name_of).collect();
            let known: Vec<u32> = names.iter().filter_map(|name| syscalls::number(name)).collect();
            let newest = known.iter().max().copied();
            let rule = Rule { names, action: Action::Allow, arguments: Vec::new() };
            let program = compile(&Profile { otherwise: Action::Error(1), rules: vec![rule] }).unwrap();
            for number in 0..400 {
                let wanted = match newest {
                    _ if known.contains(&number) => ALLOW,
                    Some(newest) if number <= newest => EPERM,
                    None if number == 0 => EPERM,
                    _ => ENOSYS,
                };
                prop_assert_eq!(run(&program, ARCHITECTURE, number, [0; 6]), wanted);
            }
        }
    }

    fn name_of(number: u32) -> Option<String> {
        syscalls::name(number).map(str::to_owned)
    }
}
