//! Seccomp profiles as text: docker's JSON (with conditions on capabilities, architectures and kernels) and OCI's.

use crate::namespaces::kernel_at_least;
use crate::problem::{Problem, Result};
use crate::security::capabilities::Set;
use nix::libc;
use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction, LinuxSeccompOperator};
use serde::Deserialize;

/// What happens to a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Allow,
    /// It is not made and returns this errno.
    Error(u16),
    KillProcess,
    KillThread,
    Trap,
    Log,
    Trace(u16),
    /// A listener outside decides.
    Notify,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    /// Equal after both are masked with this.
    MaskedEqual(u64),
}

/// A test of one argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Argument {
    /// 0 to 5.
    pub index: u8,
    pub comparison: Comparison,
    pub value: u64,
}

/// What happens to these calls when all tests hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    pub names: Vec<String>,
    pub action: Action,
    pub arguments: Vec<Argument>,
}

/// Rules with tests go before rules without; among equals the first counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    pub otherwise: Action,
    pub rules: Vec<Rule>,
}

/// Docker's additions to OCI's form; everything else of a rule is OCI's.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Conditions {
    includes: Filter,
    excludes: Filter,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Filter {
    #[serde(deserialize_with = "null_is_empty")]
    caps: Vec<String>,
    #[serde(deserialize_with = "null_is_empty")]
    arches: Vec<String>,
    min_kernel: Option<String>,
}

fn null_is_empty<'de, D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Vec<String>, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Reads a profile for processes that may hold `capabilities`.
pub fn parse(text: &str, capabilities: Set) -> Result<Profile> {
    let mut document: serde_json::Value =
        serde_json::from_str(text).map_err(|error| wrong("is not JSON").because(error))?;
    let top = document.as_object_mut().ok_or_else(|| wrong("is not an object"))?;
    // Docker's list of architectures by kernel is not OCI's; this program is for one.
    top.remove("archMap");
    top.entry("architectures").or_insert_with(|| serde_json::json!([]));
    let rules = top.entry("syscalls").or_insert_with(|| serde_json::json!([]));
    let rules = rules.as_array_mut().ok_or_else(|| wrong("has no list of syscalls"))?;
    let mut kept = Vec::new();
    for mut rule in std::mem::take(rules) {
        let conditions = Conditions::deserialize(&rule).map_err(|e| wrong("has a wrong condition").because(e))?;
        if applies(&conditions, capabilities) {
            tidy(&mut rule);
            kept.push(rule);
        }
    }
    *rules = kept;
    let oci: LinuxSeccomp =
        serde_json::from_value(document).map_err(|error| wrong("is not as docker or OCI write it").because(error))?;
    let profile = from_oci(&oci)?;
    let notifies = |action: Action| action == Action::Notify;
    if notifies(profile.otherwise) || profile.rules.iter().any(|rule| notifies(rule.action)) {
        return Err(wrong("asks for notifications, which need a listener outside the pod that cannot move with it"));
    }
    Ok(profile)
}

/// Docker writes one name as "name", and leaves out or nulls what is empty.
fn tidy(rule: &mut serde_json::Value) {
    let Some(rule) = rule.as_object_mut() else { return };
    for extra in ["includes", "excludes", "comment"] {
        rule.remove(extra);
    }
    if let Some(name) = rule.remove("name")
        && !rule.contains_key("names")
    {
        rule.insert("names".into(), serde_json::json!([name]));
    }
    if rule.get("args").is_some_and(serde_json::Value::is_null) {
        rule.remove("args");
    }
}

fn applies(conditions: &Conditions, capabilities: Set) -> bool {
    let has = |name: &String| capabilities.has(name);
    let here = |arch: &String| matches!(arch.as_str(), "amd64" | "x86_64" | "SCMP_ARCH_X86_64");
    let new_enough = |version: &String| {
        let mut numbers = version.split('.').map(|n| n.parse::<u32>().unwrap_or(0));
        kernel_at_least(numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
    };
    let (wanted, unwanted) = (&conditions.includes, &conditions.excludes);
    wanted.caps.iter().all(has)
        && (wanted.arches.is_empty() || wanted.arches.iter().any(here))
        && wanted.min_kernel.iter().all(new_enough)
        && !unwanted.caps.iter().any(has)
        && !unwanted.arches.iter().any(here)
        && !unwanted.min_kernel.iter().any(new_enough)
}

/// From OCI's form, as typed by oci-spec.
pub fn from_oci(oci: &LinuxSeccomp) -> Result<Profile> {
    let otherwise = action(oci.default_action(), oci.default_errno_ret())?;
    let mut rules = Vec::new();
    for call in oci.syscalls().iter().flatten() {
        let action = action(call.action(), call.errno_ret())?;
        let mut arguments = Vec::new();
        for arg in call.args().iter().flatten() {
            let index = u8::try_from(arg.index()).ok().filter(|index| *index < 6);
            let index = index.ok_or_else(|| wrong(&format!("tests argument {}", arg.index())))?;
            let (comparison, value) = match arg.op() {
                LinuxSeccompOperator::ScmpCmpNe => (Comparison::NotEqual, arg.value()),
                LinuxSeccompOperator::ScmpCmpLt => (Comparison::Less, arg.value()),
                LinuxSeccompOperator::ScmpCmpLe => (Comparison::LessOrEqual, arg.value()),
                LinuxSeccompOperator::ScmpCmpEq => (Comparison::Equal, arg.value()),
                LinuxSeccompOperator::ScmpCmpGe => (Comparison::GreaterOrEqual, arg.value()),
                LinuxSeccompOperator::ScmpCmpGt => (Comparison::Greater, arg.value()),
                LinuxSeccompOperator::ScmpCmpMaskedEq => {
                    (Comparison::MaskedEqual(arg.value()), arg.value_two().unwrap_or(0))
                }
            };
            arguments.push(Argument { index, comparison, value });
        }
        rules.extend(alternatives(call.names(), action, arguments));
    }
    Ok(Profile { otherwise, rules })
}

/// All tests of a rule must hold; but two of one argument, which could hardly hold together, are alternatives: so runc
/// reads them, and profiles count on it.
fn alternatives(names: &[String], action: Action, arguments: Vec<Argument>) -> Vec<Rule> {
    let names = names.to_vec();
    let repeated = arguments.iter().enumerate().any(|(at, a)| arguments[..at].iter().any(|b| a.index == b.index));
    if repeated {
        arguments.into_iter().map(|a| Rule { names: names.clone(), action, arguments: vec![a] }).collect()
    } else {
        vec![Rule { names, action, arguments }]
    }
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<Action> {
    let errno = u16::try_from(errno.unwrap_or(libc::EPERM as u32)).unwrap_or(libc::EPERM as u16);
    Ok(match action {
        LinuxSeccompAction::ScmpActAllow => Action::Allow,
        LinuxSeccompAction::ScmpActErrno => Action::Error(errno),
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => Action::KillThread,
        LinuxSeccompAction::ScmpActKillProcess => Action::KillProcess,
        LinuxSeccompAction::ScmpActTrap => Action::Trap,
        LinuxSeccompAction::ScmpActLog => Action::Log,
        LinuxSeccompAction::ScmpActTrace => Action::Trace(errno),
        LinuxSeccompAction::ScmpActNotify => Action::Notify,
    })
}

pub fn wrong(what: &str) -> Problem {
    Problem::new("E-SECCOMP", format!("the seccomp profile {what}"))
        .fix("use a profile in docker's or OCI's form, or --security-opt seccomp=unconfined")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DOCKER: &str = r#"{
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1,
        "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}],
        "syscalls": [
            {"names": ["read", "write"], "action": "SCMP_ACT_ALLOW"},
            {"name": "chroot", "action": "SCMP_ACT_ALLOW", "args": null, "includes": {"caps": ["CAP_SYS_CHROOT"]}},
            {"names": ["s390"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["s390x"]}, "excludes": {}},
            {"names": ["new"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "99.1"}},
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "comment": "x",
             "args": [{"index": 0, "value": 2114060288, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}],
             "excludes": {"caps": ["CAP_SYS_ADMIN"], "arches": ["s390", "s390x"]}},
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38, "excludes": {"caps": ["CAP_SYS_ADMIN"]}},
            {"names": ["personality"], "action": "SCMP_ACT_ALLOW",
             "args": [{"index": 0, "value": 0, "op": "SCMP_CMP_EQ"}, {"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]}
        ]}"#;

    fn caps(names: &[&str]) -> Set {
        Set::parse(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn conditions_of_docker() {
        let names = |profile: &Profile| profile.rules.iter().map(|rule| rule.names[0].clone()).collect::<Vec<_>>();
        let plain = parse(DOCKER, caps(&[])).unwrap();
        assert_eq!(plain.otherwise, Action::Error(1));
        assert_eq!(names(&plain), ["read", "clone", "clone3", "personality", "personality"]);
        assert_eq!(plain.rules[1].arguments[0].comparison, Comparison::MaskedEqual(2_114_060_288));
        assert_eq!(plain.rules[2].action, Action::Error(38));
        let more = parse(DOCKER, caps(&["SYS_ADMIN", "SYS_CHROOT"])).unwrap();
        assert_eq!(names(&more), ["read", "chroot", "personality", "personality"]);
    }

    #[test]
    fn what_is_no_profile() {
        for text in ["", "[]", "{}", r#"{"defaultAction": "SCMP_ACT_NOTIFY"}"#, r#"{"defaultAction": 3}"#] {
            assert_eq!(parse(text, caps(&[])).unwrap_err().code(), "E-SECCOMP", "{text}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(at in 0..DOCKER.len(), byte: u8) {
            let mut bytes = DOCKER.as_bytes().to_vec();
            bytes[at] = byte;
            let _ = parse(&String::from_utf8_lossy(&bytes), caps(&[]));
        }
    }
}
