//! Labels of a security module (SELinux, AppArmor, Smack) that programs of the pod run under.
//!
//! A pod has that of the `pod` that started it. What a program got beside that is not restored: there the whole pod runs
//! under the label of `pod receive`.

use crate::ids::HostPid;
use pod_runtime::{Problem, proc};

pub const LABEL: &str = "W-LABEL";

/// What of it would be lost.
pub fn downgrade(processes: &[HostPid]) -> Option<Problem> {
    let label = |pid: &str| proc::read(format!("/proc/{pid}/attr/current")).ok();
    let name = |pid: &HostPid| proc::read(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned();
    let of = processes.iter().filter_map(|pid| Some((name(pid), label(&pid.to_string())?)));
    lost(&label("self")?, of)
}

fn lost(own: &str, mut of: impl Iterator<Item = (String, String)>) -> Option<Problem> {
    let tidy = |label: &str| label.trim_end_matches(['\0', '\n']).to_owned();
    let (name, label) = of.find(|(_, label)| tidy(label) != tidy(own))?;
    let what =
        format!("{name} runs under the label {}, which is not restored: there it runs under that of pod", tidy(&label));
    Some(
        Problem::new(LABEL, what)
            .fix("give the label to pod itself on the other host, or to the program when it starts"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_of_its_own_is_named() {
        let lost = |labels: &[&str]| {
            lost("unconfined\n", labels.iter().map(|label| ("nginx".to_owned(), (*label).to_owned())))
        };
        assert!(lost(&["unconfined", "unconfined\n"]).is_none());
        let problem = lost(&["unconfined", "docker-default (enforce)\n"]).unwrap();
        assert!(problem.code() == LABEL && problem.what().contains("label docker-default (enforce),"), "{problem}");
    }
}
