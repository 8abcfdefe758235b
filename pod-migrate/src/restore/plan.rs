//! Who makes which process, from pids alone: decided before anything is made of an image.

use super::Image;
use crate::Result;
use crate::ids::PodPid;
use crate::objects::task::Node;
use std::collections::BTreeMap;

/// How a process comes to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Made {
    Outside,
    /// By its parent, before the parent's setsid.
    Early,
    Late,
    /// By a helper in this session.
    Orphan(PodPid),
}

/// Decides for each process who makes it, from pids alone.
pub(super) fn plan(all: &[Node]) -> Result<BTreeMap<PodPid, Made>> {
    let nodes: BTreeMap<PodPid, &Node> = all.iter().map(|node| (node.pid, node)).collect();
    if nodes.len() != all.len() {
        return Err(crate::image::damaged("two processes of the image have the same pid"));
    }
    let mut plan = BTreeMap::new();
    // Parents first, so that the session a parent came from is known; bounded by the number of processes.
    let mut before: BTreeMap<PodPid, PodPid> = BTreeMap::new();
    let mut left: Vec<&Node> = all.iter().collect();
    while !left.is_empty() {
        let count = left.len();
        left.retain(|node| {
            if node.parent != PodPid(0) && !plan.contains_key(&node.parent) {
                return true;
            }
            let made = decide(node, nodes.get(&node.parent).copied(), &before);
            let came_from = match made {
                Made::Outside => PodPid(0),
                Made::Early => before[&node.parent],
                Made::Late => nodes[&node.parent].session,
                Made::Orphan(session) => session,
            };
            before.insert(node.pid, came_from);
            plan.insert(node.pid, made);
            false
        });
        if left.len() == count {
            let what = format!("process {} of the image has no way to the first process", left[0].pid);
            return Err(crate::image::damaged(what));
        }
    }
    Ok(plan)
}

fn decide(node: &Node, parent: Option<&Node>, before: &BTreeMap<PodPid, PodPid>) -> Made {
    let Some(parent) = parent else { return Made::Outside };
    let leads = node.session == node.pid;
    if leads || node.session == parent.session {
        Made::Late
    } else if before.get(&parent.pid) == Some(&node.session) {
        Made::Early
    } else {
        Made::Orphan(node.session)
    }
}

/// A pid that no task of the image has, above all of them.
pub(super) fn free_pid(image: &Image, nth: i32) -> PodPid {
    let last = image.nodes().iter().flat_map(|node| node.threads.iter().chain([&node.pid, &node.group, &node.session]));
    PodPid(last.max().map_or(1, |pid| pid.0) + 1 + nth)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::task::{Life, Tree};

    fn node(pid: i32, parent: i32, session: i32) -> Node {
        Node {
            pid: PodPid(pid),
            parent: PodPid(parent),
            group: PodPid(pid),
            session: PodPid(session),
            exit_signal: libc::SIGCHLD,
            life: Life::Running,
            threads: vec![PodPid(pid)],
            comm: Default::default(),
        }
    }

    fn plan_of(nodes: Vec<Node>) -> BTreeMap<PodPid, Made> {
        plan(&nodes).unwrap()
    }

    #[test]
    fn sessions_decide_who_makes_whom() {
        let plan = plan_of(vec![
            node(1, 0, 1),
            node(2, 1, 1),
            node(3, 1, 3),
            node(4, 3, 1), // born before 3 became a leader
            node(5, 3, 3),
            node(6, 1, 3),  // its parent, a member of session 3, ended
            node(7, 1, 99), // so did the leader of its session
        ]);
        let made = |pid| plan[&PodPid(pid)];
        assert_eq!(made(1), Made::Outside);
        assert_eq!(made(2), Made::Late);
        assert_eq!(made(3), Made::Late);
        assert_eq!(made(4), Made::Early);
        assert_eq!(made(5), Made::Late);
        assert_eq!(made(6), Made::Orphan(PodPid(3)));
        assert_eq!(made(7), Made::Orphan(PodPid(99)));
    }

    #[test]
    fn a_circle_is_refused() {
        assert_eq!(plan(&[node(2, 3, 1), node(3, 2, 1)]).unwrap_err().code(), crate::image::DAMAGED);
    }

    #[test]
    fn free_pids_are_above_all() {
        let image = Image {
            tree: Some(Tree { processes: vec![node(1, 0, 1), node(7, 1, 40)], ..Tree::default() }),
            ..Image::default()
        };
        assert_eq!(free_pid(&image, 0), PodPid(41));
    }
}
