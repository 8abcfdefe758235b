//! Which pods of this host can go, and where to: what `pod drain` and `pod migrate --all` know before any is moved.
//!
//! Every pod is checked here and then by the hosts in the order of their room, until one would take it. What none takes is
//! named with what each said.

use super::inquiry::Inquiry;
use super::offer;
use super::placement::Placement;
use super::protocol::{Offer, Room};
use super::source::Ended;
use crate::link::dial::Dial;
use pod_runtime::status::State;
use pod_runtime::store::{Pod, Store};
use pod_runtime::{Problem, Result};

/// A host that pods may go to.
pub struct Destination {
    /// As it was given.
    pub name: String,
    /// Or why it cannot be asked.
    pub inquiry: Result<Inquiry>,
}

/// What is to become of a pod.
#[derive(Debug)]
pub enum Verdict {
    /// It can go there, with this to be known.
    To { host: usize, warnings: Vec<String> },
    /// It cannot: how an attempt would end, and why.
    Stays { ended: Ended, problems: Vec<Problem> },
}

#[derive(Debug)]
pub struct Planned {
    pub id: String,
    pub name: String,
    /// What would go over, in bytes.
    pub needed: Room,
    pub verdict: Verdict,
}

/// The pods of this host that run, in the order of their names. Those that have ended have nothing to move.
pub fn running(store: &Store) -> Result<Vec<Pod>> {
    let mut pods = Vec::new();
    for pod in store.pods()? {
        // One that ends meanwhile is none.
        let Ok(status) = pod.status() else { continue };
        if matches!(status.state, State::Running | State::Paused | State::Migrating) {
            pods.push((pod.name().unwrap_or_default(), pod));
        }
    }
    pods.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(pods.into_iter().map(|(_, pod)| pod).collect())
}

impl Destination {
    pub fn ask(name: &str, dial: &Dial) -> Destination {
        Destination { name: name.to_owned(), inquiry: Inquiry::open(dial) }
    }
}

/// Decides for each pod. The answer has the largest first, which is the order in which to move them.
pub fn plan(pods: &[Pod], hosts: &mut [Destination]) -> Vec<Planned> {
    let mut asked: Vec<(Planned, Option<Offer>)> = pods.iter().map(look).collect();
    asked.sort_by_key(|(planned, _)| std::cmp::Reverse(planned.needed.memory));
    let rooms = hosts.iter().map(|host| host.inquiry.as_ref().ok().and_then(Inquiry::room)).collect();
    let mut placement = Placement::new(rooms);
    let decide = |(mut planned, offer): (Planned, Option<Offer>)| {
        if let Some(offer) = offer {
            planned.verdict = place(&offer, planned.needed, hosts, &mut placement);
        }
        planned
    };
    asked.into_iter().map(decide).collect()
}

/// What this host knows: what stands against the pod, or what it would bring.
fn look(pod: &Pod) -> (Planned, Option<Offer>) {
    let name = pod.name().unwrap_or_else(|_| pod.id().to_owned());
    let stays = |ended, problems| Verdict::Stays { ended, problems };
    let planned = |needed, verdict| Planned { id: pod.id().to_owned(), name, needed, verdict };
    match offer::blockers(pod).and_then(|blockers| Ok((blockers, offer::offer(pod)?))) {
        Ok((blockers, offer)) => {
            let needed = Room { memory: offer.memory, disk: offer.files };
            let offer = blockers.is_empty().then_some(offer);
            (planned(needed, stays(Ended::Blocked, blockers)), offer)
        }
        Err(problem) => (planned(Room::default(), stays(Ended::Blocked, vec![problem])), None),
    }
}

fn place(offer: &Offer, needed: Room, hosts: &mut [Destination], placement: &mut Placement) -> Verdict {
    let mut problems = Vec::new();
    let mut heard = false;
    for host in placement.order() {
        let Destination { name, inquiry } = &mut hosts[host];
        let Ok(inquiry) = inquiry else { continue };
        let said = match inquiry.ask(offer.clone()) {
            Ok((refused, warnings)) if refused.is_empty() => match placement.full(host, needed, name) {
                None => {
                    placement.give(host, needed);
                    return Verdict::To { host, warnings };
                }
                Some(full) => vec![full],
            },
            Ok((refused, _)) => refused,
            Err(problem) => {
                problems.push(at(name, problem));
                continue;
            }
        };
        heard = true;
        problems.extend(said.into_iter().map(|problem| at(name, problem)));
    }
    let unreachable = hosts.iter().filter_map(|host| host.inquiry.as_ref().err());
    problems.extend(unreachable.map(|problem| problem.report().into()));
    Verdict::Stays { ended: if heard { Ended::Refused } else { Ended::TransferFailed }, problems }
}

/// With the name of who said it.
fn at(host: &str, problem: Problem) -> Problem {
    let report = problem.report();
    let said = Problem::new(report.code, format!("{host}: {}", report.what));
    match report.fix {
        Some(fix) => said.fix(fix),
        None => said,
    }
}
