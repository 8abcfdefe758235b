//! Which of several hosts a pod goes to, by what is free on each.
//!
//! Pods come the largest first, each to where most memory is left after those before it. Hosts that do not say what they
//! have (of the release before) have their turn after those that do, the one with the fewest pods first.

use super::protocol::Room;
use pod_runtime::Problem;

/// What is free on each host, and what was promised of it.
#[derive(Debug)]
pub struct Placement {
    left: Vec<Option<Room>>,
    given: Vec<usize>,
}

impl Placement {
    pub fn new(rooms: Vec<Option<Room>>) -> Placement {
        Placement { given: vec![0; rooms.len()], left: rooms }
    }

    /// The hosts, the best first.
    pub fn order(&self) -> Vec<usize> {
        let mut hosts: Vec<usize> = (0..self.left.len()).collect();
        hosts.sort_by_key(|host| {
            let memory = self.left[*host].map(|room| room.memory);
            (std::cmp::Reverse(memory), self.given[*host], *host)
        });
        hosts
    }

    /// What is needed has no room there beside what was promised to others: each of these alone the host would take.
    pub fn full(&self, host: usize, needed: Room, name: &str) -> Option<Problem> {
        let left = self.left[host]?;
        let what = |code, needed: u64, left: u64, of| {
            let what = format!(
                "the pod needs {} MiB of {of}, and {} MiB are left on {name} beside the pods that go there",
                needed >> 20,
                left >> 20
            );
            Problem::new(code, what).fix("name one more host: --to A,B")
        };
        if needed.memory > left.memory {
            return Some(what("E-MEMORY", needed.memory, left.memory, "memory"));
        }
        (needed.disk > left.disk).then(|| what("E-DISK", needed.disk, left.disk, "room for files"))
    }

    /// The pod goes there.
    pub fn give(&mut self, host: usize, needed: Room) {
        self.given[host] += 1;
        if let Some(left) = &mut self.left[host] {
            left.memory = left.memory.saturating_sub(needed.memory);
            left.disk = left.disk.saturating_sub(needed.disk);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn room(memory: u64) -> Room {
        Room { memory: memory * GIB, disk: 100 * GIB }
    }

    fn pod(memory: u64) -> Room {
        Room { memory: memory * GIB, disk: GIB }
    }

    /// Where pods of these sizes go.
    fn placed(rooms: Vec<Option<Room>>, pods: &[u64]) -> Vec<Option<usize>> {
        let mut placement = Placement::new(rooms);
        let mut place = |size: &u64| {
            let fits = |host: &usize| placement.full(*host, pod(*size), "x").is_none();
            let host = placement.order().into_iter().find(fits);
            host.inspect(|host| placement.give(*host, pod(*size)))
        };
        pods.iter().map(&mut place).collect()
    }

    #[test]
    fn where_most_is_left() {
        assert_eq!(placed(vec![Some(room(10)), Some(room(30))], &[8, 8, 8, 4]), [Some(1), Some(1), Some(1), Some(0)]);
        assert_eq!(placed(vec![Some(room(8)), Some(room(8))], &[4, 4, 4, 4]), [Some(0), Some(1), Some(0), Some(1)]);
    }

    #[test]
    fn what_has_no_room_anywhere_stays() {
        assert_eq!(placed(vec![Some(room(8)), Some(room(6))], &[7, 7, 6]), [Some(0), None, Some(1)]);
        let placement = Placement::new(vec![Some(room(8))]);
        assert_eq!(placement.full(0, pod(9), "hostB").unwrap().code(), "E-MEMORY");
        let files = Room { memory: 0, disk: 101 * GIB };
        assert_eq!(placement.full(0, files, "hostB").unwrap().code(), "E-DISK");
    }

    #[test]
    fn hosts_that_do_not_say_have_their_turn() {
        assert_eq!(placed(vec![None, None], &[9, 9, 9]), [Some(0), Some(1), Some(0)]);
        assert_eq!(placed(vec![None, Some(room(4))], &[4, 9]), [Some(1), Some(0)], "who says comes first");
    }
}
