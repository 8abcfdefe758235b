//! The devices that a pod may use: a list, kept by the v1 controller where the host has it, by a small BPF program on
//! the v2 group otherwise. Of several rules that match the last counts; what none matches is denied. A host that can
//! do neither says so.
//!
//! The v1 controller knows no order: it has one answer and a set of exceptions from it, takes a denial only of exactly what
//! it allows, and reads every line that begins with "a" as all devices. So the list is folded first ([`Folded`]), and what
//! cannot be said that way is refused.

use super::Cgroup;
use crate::problem::{Doing, Problem, Result};
use crate::spec::Device;
use crate::sys::bpf::{self, EbpfInstruction};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::path::Path;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Block,
    Char,
    Any,
}

/// One line of the list; -1 is any number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rule {
    pub allow: bool,
    pub kind: Kind,
    pub major: i64,
    pub minor: i64,
    pub read: bool,
    pub write: bool,
    pub make: bool,
}

impl Rule {
    /// As "c 1:3 rwm"; the kernel refuses a rule of nothing.
    fn line(&self) -> String {
        let number = |number: i64| if number < 0 { "*".to_owned() } else { number.to_string() };
        let letters = [(self.read, 'r'), (self.write, 'w'), (self.make, 'm')];
        let access: String = letters.into_iter().filter(|(has, _)| *has).map(|(_, letter)| letter).collect();
        let kind = match self.kind {
            Kind::Block => 'b',
            Kind::Char => 'c',
            Kind::Any => 'a',
        };
        format!("{kind} {}:{} {access}", number(self.major), number(self.minor))
    }

    /// Every device in every way.
    fn is_all(&self) -> bool {
        self.kind == Kind::Any && self.major < 0 && self.minor < 0 && self.read && self.write && self.make
    }

    /// One for each kind that it is about.
    fn by_kind(self) -> Vec<Rule> {
        match self.kind {
            Kind::Any => vec![Rule { kind: Kind::Block, ..self }, Rule { kind: Kind::Char, ..self }],
            Kind::Block | Kind::Char => vec![self],
        }
    }

    /// Whether every device of the other is one of this. Of a kind each.
    fn covers(&self, other: &Rule) -> bool {
        let number = |own: i64, other: i64| own < 0 || own == other;
        self.kind == other.kind && number(self.major, other.major) && number(self.minor, other.minor)
    }

    /// Whether a device is one of both, to be used in a way of both.
    fn meets(&self, other: &Rule) -> bool {
        let number = |own: i64, other: i64| own < 0 || other < 0 || own == other;
        let both = self.without(&self.without(other));
        self.kind == other.kind
            && number(self.major, other.major)
            && number(self.minor, other.minor)
            && !both.is_empty()
    }

    /// The same devices, and only those ways to use them that the other does not name.
    fn without(&self, other: &Rule) -> Rule {
        Rule {
            read: self.read && !other.read,
            write: self.write && !other.write,
            make: self.make && !other.make,
            ..*self
        }
    }

    fn is_empty(&self) -> bool {
        !(self.read || self.write || self.make)
    }
}

/// A list as the v1 controller has it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Folded {
    /// All but the exceptions is allowed, or else denied.
    allows: bool,
    exceptions: Vec<Rule>,
}

impl Folded {
    fn of(rules: &[Rule]) -> Result<Folded> {
        // "All, but not …" can be said of two kinds of devices as well, and then some more can be taken away.
        Self::fold(rules, true).or_else(|_| Self::fold(rules, false))
    }

    fn fold(rules: &[Rule], all_is_one: bool) -> Result<Folded> {
        let mut folded = Folded { allows: false, exceptions: Vec::new() };
        for rule in rules {
            if rule.is_all() && (all_is_one || !rule.allow) {
                folded = Folded { allows: rule.allow, exceptions: Vec::new() };
                continue;
            }
            for part in rule.by_kind().into_iter().filter(|part| !part.is_empty()) {
                folded.take(part)?;
            }
        }
        Ok(folded)
    }

    fn take(&mut self, rule: Rule) -> Result<()> {
        if rule.allow != self.allows {
            self.exceptions.push(rule);
            return Ok(());
        }
        if let Some(kept) = self.exceptions.iter().find(|kept| rule.meets(kept) && !rule.covers(kept)) {
            let verb = if rule.allow { "allow" } else { "deny" };
            let what = format!(
                "cgroup v1 cannot {verb} the devices {} after a rule for {}, which are more",
                rule.line(),
                kept.line()
            );
            return Err(Problem::new("E-CGROUP", what));
        }
        for kept in self.exceptions.iter_mut().filter(|kept| rule.covers(kept)) {
            *kept = kept.without(&rule);
        }
        self.exceptions.retain(|kept| !kept.is_empty());
        Ok(())
    }
}

/// Every node may be made (using it is what is checked), and those of a pod's /dev used: null, zero, full, random,
/// urandom, tty, console, ptmx and the ptys.
pub(crate) fn usual() -> Vec<Rule> {
    let node = |kind| Rule { allow: true, kind, major: -1, minor: -1, read: false, write: false, make: true };
    let used = |major, minor| Rule { read: true, write: true, major, minor, ..node(Kind::Char) };
    let numbers = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2), (136, -1)];
    let mut rules = vec![node(Kind::Char), node(Kind::Block)];
    rules.extend(numbers.map(|(major, minor)| used(major, minor)));
    rules
}

pub fn allow(cgroup: &Cgroup, devices: &[Device], privileged: bool) -> Result<Vec<String>> {
    if privileged {
        return Ok(Vec::new());
    }
    let mut rules = usual();
    for device in devices {
        let kind = match device.kind.as_str() {
            "b" => Kind::Block,
            "c" | "u" => Kind::Char,
            other => return Err(Problem::new("E-USAGE", format!("'{other}' is no kind of device: \"c\" or \"b\""))),
        };
        let has = |letter| device.access.contains(letter);
        let (major, minor) = (device.major.into(), device.minor.into());
        rules.push(Rule { allow: true, kind, major, minor, read: has('r'), write: has('w'), make: has('m') });
    }
    Ok(keep(cgroup, &rules)?.into_iter().collect())
}

/// The string is why this host cannot.
pub(super) fn keep(cgroup: &Cgroup, rules: &[Rule]) -> Result<Option<String>> {
    if let Some(folder) = cgroup.v1("devices") {
        by_v1(&folder, rules)?;
        return Ok(None);
    }
    let Some(folder) = cgroup.unified_dir() else {
        return Ok(Some("this host has no devices cgroup controller: the pod's device list is not kept".into()));
    };
    let attached = bpf::load_device_filter(&program(rules))
        .and_then(|program| bpf::attach_device_filter(folder.as_fd(), program.as_fd()));
    Ok(match attached {
        Ok(()) => None,
        Err(error) => Some(format!("this kernel takes no device filter ({error}): the pod's device list is not kept")),
    })
}

/// The kernel takes a line a write.
fn by_v1(folder: &Path, rules: &[Rule]) -> Result<()> {
    let folded = Folded::of(rules)?;
    fs::write(folder.join("devices.deny"), "a").doing(|| "deny all devices".into())?;
    if folded.allows {
        fs::write(folder.join("devices.allow"), "a").doing(|| "allow all devices".into())?;
    }
    let (name, verb) = if folded.allows { ("devices.deny", "deny") } else { ("devices.allow", "allow") };
    let path = folder.join(name);
    let mut list = OpenOptions::new().write(true).open(&path).doing(|| format!("open {}", path.display()))?;
    for line in folded.exceptions.iter().map(Rule::line) {
        list.write_all(line.as_bytes()).doing(|| format!("{verb} device {line}"))?;
    }
    Ok(())
}

/// `r1` points to `{ u32 access << 16 | kind, u32 major, u32 minor }`; each rule, the last first, is a run of tests that
/// falls through to its verdict, or goes on with the one before. A rule allows when it has all that is asked for, and
/// denies when it has any of it.
fn program(rules: &[Rule]) -> Vec<EbpfInstruction> {
    const LOAD_WORD: u8 = 0x61;
    const MOVE: u8 = 0xbf;
    const MOVE_VALUE: u8 = 0xb7;
    const AND: u8 = 0x54;
    const SHIFT_RIGHT: u8 = 0x74;
    const UNLESS_EQUAL: u8 = 0x55;
    const UNLESS_SAME: u8 = 0x5d;
    const IF_EQUAL: u8 = 0x15;
    const EXIT: u8 = 0x95;
    let op = |code, to: u8, from: u8, offset, immediate| EbpfInstruction {
        code,
        registers: to | from << 4,
        offset,
        immediate,
    };
    // r2 kind, r3 access, r4 major, r5 minor.
    let mut out = vec![
        op(LOAD_WORD, 2, 1, 0, 0),
        op(LOAD_WORD, 4, 1, 4, 0),
        op(LOAD_WORD, 5, 1, 8, 0),
        op(MOVE, 3, 2, 0, 0),
        op(SHIFT_RIGHT, 3, 0, 0, 16),
        op(AND, 2, 0, 0, 0xffff),
    ];
    for rule in rules.iter().rev() {
        let access = i32::from(rule.make) | i32::from(rule.read) << 1 | i32::from(rule.write) << 2;
        let mut tests = match rule.kind {
            Kind::Block => vec![op(UNLESS_EQUAL, 2, 0, 0, 1)],
            Kind::Char => vec![op(UNLESS_EQUAL, 2, 0, 0, 2)],
            Kind::Any => Vec::new(),
        };
        let other = if rule.allow { op(UNLESS_SAME, 1, 3, 0, 0) } else { op(IF_EQUAL, 1, 0, 0, 0) };
        tests.extend([op(MOVE, 1, 3, 0, 0), op(AND, 1, 0, 0, access), other]);
        if rule.major >= 0 {
            tests.push(op(UNLESS_EQUAL, 4, 0, 0, rule.major as i32));
        }
        if rule.minor >= 0 {
            tests.push(op(UNLESS_EQUAL, 5, 0, 0, rule.minor as i32));
        }
        tests.push(op(MOVE_VALUE, 0, 0, 0, rule.allow.into()));
        tests.push(op(EXIT, 0, 0, 0, 0));
        let end = tests.len();
        for (at, test) in tests.iter_mut().enumerate() {
            if matches!(test.code, UNLESS_EQUAL | UNLESS_SAME | IF_EQUAL) {
                test.offset = (end - at - 1) as i16;
            }
        }
        out.extend(tests);
    }
    out.push(op(MOVE_VALUE, 0, 0, 0, 0));
    out.push(op(EXIT, 0, 0, 0, 0));
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Runs the program as the kernel would.
    fn run(program: &[EbpfInstruction], access: u32, kind: u32, major: u32, minor: u32) -> u64 {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0u64; 11];
        let mut at = 0usize;
        loop {
            let op = program[at];
            let (to, from) = (usize::from(op.registers & 15), usize::from(op.registers >> 4));
            at += 1;
            match op.code {
                0x61 => registers[to] = context[op.offset as usize / 4].into(),
                0xbf => registers[to] = registers[from],
                0xb7 => registers[to] = op.immediate as u64,
                0x54 => registers[to] = (registers[to] as u32 & op.immediate as u32).into(),
                0x74 => registers[to] = (registers[to] as u32 >> op.immediate).into(),
                0x55 if registers[to] != op.immediate as u64 => at += op.offset as usize,
                0x5d if registers[to] != registers[from] => at += op.offset as usize,
                0x15 if registers[to] == op.immediate as u64 => at += op.offset as usize,
                0x15 | 0x55 | 0x5d => {}
                0x95 => return registers[0],
                other => panic!("opcode {other:#x}"),
            }
        }
    }

    #[test]
    fn rules_as_v1_takes_them() {
        let lines: Vec<String> = usual().iter().map(Rule::line).collect();
        assert_eq!(lines[..3], ["c *:* m", "b *:* m", "c 1:3 rwm"]);
        assert_eq!(lines.last().unwrap(), "c 136:* rwm");
    }

    /// "+" allows and "-" denies: "+c 10:229 rw".
    fn rule(text: &str) -> Rule {
        let mut parts = text[1..].split([' ', ':']);
        let mut next = || parts.next().unwrap();
        let kind = match next() {
            "a" => Kind::Any,
            "b" => Kind::Block,
            _ => Kind::Char,
        };
        let (major, minor) = (next().parse().unwrap_or(-1), next().parse().unwrap_or(-1));
        let access = next();
        let has = |letter| access.contains(letter);
        let (read, write, make) = (has('r'), has('w'), has('m'));
        Rule { allow: text.starts_with('+'), kind, major, minor, read, write, make }
    }

    fn folded(rules: &[&str]) -> Option<(bool, Vec<String>)> {
        let rules: Vec<Rule> = rules.iter().map(|text| rule(text)).collect();
        Folded::of(&rules).ok().map(|list| (list.allows, list.exceptions.iter().map(Rule::line).collect()))
    }

    #[test]
    fn v1_hears_of_all_devices_only_where_all_are_meant() {
        let is = |allows: bool, lines: &[&str]| Some((allows, lines.iter().map(|line| (*line).to_owned()).collect()));
        assert_eq!(folded(&["-a *:* rwm", "+a 10:229 rw"]), is(false, &["b 10:229 rw", "c 10:229 rw"]));
        assert_eq!(folded(&["+a *:* rw"]), is(false, &["b *:* rw", "c *:* rw"]));
        assert_eq!(folded(&["+a 10:* rwm", "+a *:5 rwm"]).unwrap().1.len(), 4);
        assert_eq!(folded(&["+c 1:3 r", "+a *:* rwm", "+c *:* m"]), is(true, &[]));
        assert_eq!(folded(&["+a *:* rwm", "-a *:* rwm"]), is(false, &[]));
    }

    #[test]
    fn a_later_rule_of_v1_takes_back_what_it_covers() {
        let is = |allows: bool, lines: &[&str]| Some((allows, lines.iter().map(|line| (*line).to_owned()).collect()));
        assert_eq!(folded(&["+c 10:229 rwm", "-c 10:* rwm"]), is(false, &[]));
        assert_eq!(folded(&["+c 10:229 rwm", "+c 5:1 rw", "-c 10:* w"]), is(false, &["c 10:229 rm", "c 5:1 rw"]));
        assert_eq!(folded(&["+c 10:229 rwm", "-a *:229 rwm", "+c 10:229 r"]), is(false, &["c 10:229 r"]));
        assert_eq!(folded(&["+a *:* rwm", "-c 10:229 w"]), is(true, &["c 10:229 w"]));
        assert_eq!(folded(&["+a *:* rwm", "-c *:* rwm", "+c 1:3 rwm"]), is(false, &["b *:* rwm", "c 1:3 rwm"]));
        assert_eq!(folded(&["+a *:* rwm", "-c 10:229 w", "+c 10:229 rwm"]), is(true, &[]));
        // Narrower than what is there, or across it.
        for refused in [["+c 10:* rwm", "-c 10:229 rwm"], ["+c 10:* rwm", "-c *:229 rwm"], ["+b *:* rw", "-b 8:0 w"]] {
            assert_eq!(folded(&refused), None, "{refused:?}");
        }
        // Not in a way that is there.
        assert_eq!(folded(&["+c *:* m", "-c 10:229 rw"]), is(false, &["c *:* m"]));
    }

    proptest! {
        /// The kernel's reading of the folded list is that of the program, which has an order, for every single way of use.
        #[test]
        fn folding_changes_nothing(texts in prop::collection::vec("[+-][abc] (1|2|\\*):(1|2|\\*) (r|w|rw|rwm|m)", 0..7)) {
            let rules: Vec<Rule> = texts.iter().map(|text| rule(text)).collect();
            let Ok(folded) = Folded::of(&rules) else { return Ok(()) };
            let program = program(&rules);
            for kind in [1, 2] {
                for (major, minor) in [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 3)] {
                    for access in [1, 2, 4] {
                        let asked = Rule {
                            allow: true,
                            kind: if kind == 1 { Kind::Block } else { Kind::Char },
                            major: major.into(),
                            minor: minor.into(),
                            read: access == 2,
                            write: access == 4,
                            make: access == 1,
                        };
                        let excepted = folded.exceptions.iter().any(|kept| kept.covers(&asked) && kept.meets(&asked));
                        let wanted = run(&program, access, kind, major, minor) == 1;
                        prop_assert_eq!(excepted != folded.allows, wanted, "{:?} {:?}", asked, folded);
                    }
                }
            }
        }
    }

    #[test]
    fn usual_devices_and_no_others() {
        let mut rules = usual();
        let kind = Kind::Char;
        rules.push(Rule { allow: true, kind, major: 10, minor: 229, read: true, write: false, make: false });
        let program = program(&rules);
        let (make, read, write, block, char) = (1, 2, 4, 1, 2);
        assert_eq!(run(&program, read | write, char, 1, 3), 1);
        assert_eq!(run(&program, read | write, char, 136, 77), 1);
        assert_eq!(run(&program, make, block, 8, 0), 1);
        assert_eq!(run(&program, read, block, 8, 0), 0);
        assert_eq!(run(&program, read | make, block, 8, 0), 0);
        assert_eq!(run(&program, read, char, 1, 1), 0);
        assert_eq!(run(&program, read, char, 10, 229), 1);
        assert_eq!(run(&program, write, char, 10, 229), 0);
    }

    #[test]
    fn the_last_rule_that_matches_counts() {
        let all = Rule { allow: true, kind: Kind::Any, major: -1, minor: -1, read: true, write: true, make: true };
        let no_write =
            Rule { allow: false, kind: Kind::Char, major: 1, minor: 3, read: false, write: true, make: false };
        let program = program(&[all, no_write]);
        let (read, write, block, char) = (2, 4, 1, 2);
        assert_eq!(run(&program, read, char, 1, 3), 1);
        assert_eq!(run(&program, read | write, char, 1, 3), 0);
        assert_eq!(run(&program, read | write, block, 8, 0), 1);
        assert_eq!(run(&super::program(&[all, Rule { allow: false, ..all }]), read, char, 1, 3), 0);
    }
}
