//! What is to be undone of System V semaphores when a process ends (SEM_UNDO), which the kernel shows to nobody.
//!
//! It is read by a walk over tasks that is run in the kernel (a BPF iterator), and made again by the process itself: an
//! operation with SEM_UNDO and the opposite one without, in one call, so that the value is never seen to change.
//!
//! It fails by not knowing: no BPF, no BTF, a kernel that has it otherwise, processes that share such a list without being
//! threads, sets of more semaphores than are read. Then it is reported ([`UNDO`]) that something may be forgotten.

use crate::ids::PodPid;
use crate::image::damaged;
use crate::objects::namespaces::ipc::SemaphoreSet;
use crate::remote::{Arg, RemoteCall};
use crate::{Problem, Result};
use nix::sched::{CloneFlags, unshare};
use pod_runtime::proc::btf::Btf;
use pod_runtime::sys::bpf::{self, EbpfInstruction};
use pod_runtime::sys::ipc;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;

/// What a process has asked to be undone may be forgotten.
pub const UNDO: &str = "W-SEMAPHORE-UNDO";

/// Of one process and one set. Record UNDO is a list of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Undo {
    pub pid: PodPid,
    pub set: i32,
    /// Number of the semaphore, and what is added to it at the end of the process.
    pub adjustments: Vec<(u16, i16)>,
}

/// How many semaphores there are in each set, by its id.
pub type Sets = BTreeMap<i32, usize>;

/// Loads the walk, which takes milliseconds.
pub fn prepare() {
    Walk::get();
}

/// Of these processes, each with its number on this host. With what may be forgotten, if something may.
pub fn of(processes: &[(PodPid, i32)], sets: &Sets) -> (Vec<Undo>, Option<Problem>) {
    if sets.is_empty() {
        return (Vec::new(), None);
    }
    let Some(walk) = Walk::get() else {
        return (Vec::new(), Some(forgotten("this kernel does not let it be read")));
    };
    let (mut found, mut lists, mut unsure) = (Vec::new(), BTreeSet::new(), None);
    for (pid, host) in processes {
        let Ok(threads) = walk.run(*host) else {
            unsure = Some("this kernel does not let it be read");
            continue;
        };
        let own = threads.first().map_or(0, |list| list.address);
        if threads.iter().any(|list| list.address != own) {
            unsure = Some("a thread of a process has something of its own to be undone");
        }
        let Some(list) = threads.into_iter().next().filter(|list| list.address != 0) else { continue };
        if !lists.insert(own) {
            unsure = Some("processes share what is to be undone");
            continue;
        }
        if !list.complete {
            unsure = Some("a process has something to be undone of more sets than are looked at");
        }
        for (set, adjustments) in list.entries {
            // One that was removed is none any more.
            let Some(count) = sets.get(&set) else { continue };
            if *count > adjustments.len() {
                unsure = Some("a set has more semaphores than are looked at");
            }
            let numbered = (0..).zip(adjustments.into_iter().take(*count));
            let adjustments: Vec<(u16, i16)> = numbered.filter(|(_, adjustment)| *adjustment != 0).collect();
            if !adjustments.is_empty() {
                found.push(Undo { pid: *pid, set, adjustments });
            }
        }
    }
    (found, unsure.map(forgotten))
}

fn forgotten(why: &str) -> Problem {
    let what = format!("what is to be undone of semaphores when a process ends (SEM_UNDO) may be forgotten: {why}");
    Problem::new(UNDO, what).fix("nothing, unless a process is killed while it holds one")
}

/// Of an image: that processes, sets and semaphores are there, and nothing is said twice.
pub fn believe(undos: &[Undo], sets: &[SemaphoreSet], known: impl Fn(PodPid) -> bool) -> Result<()> {
    let sets: Sets = sets.iter().map(|set| (set.id, set.values.len())).collect();
    let mut seen = BTreeSet::new();
    for undo in undos {
        let count = sets.get(&undo.set).copied().unwrap_or(0);
        let is_one = |(number, by): &(u16, i16)| usize::from(*number) < count && !matches!(by, 0 | &i16::MIN);
        let in_order = undo.adjustments.windows(2).all(|pair| pair[0].0 < pair[1].0);
        if !known(undo.pid) || !undo.adjustments.iter().all(is_one) || !in_order || !seen.insert((undo.pid, undo.set)) {
            let what = format!("what process {} of the image has to undo of semaphores {}", undo.pid, undo.set);
            return Err(damaged(format!("{what} is nothing that there can be")));
        }
    }
    Ok(())
}

/// What each process does for it.
pub fn restore(undos: &[Undo], sets: &[SemaphoreSet]) -> BTreeMap<PodPid, Vec<RemoteCall>> {
    let values: BTreeMap<i32, &[u16]> = sets.iter().map(|set| (set.id, &set.values[..])).collect();
    let mut calls: BTreeMap<PodPid, Vec<RemoteCall>> = BTreeMap::new();
    for undo in undos {
        for (number, by) in &undo.adjustments {
            let value = values.get(&undo.set).and_then(|values| values.get(usize::from(*number))).copied().unwrap_or(0);
            for pair in pairs(value, *by) {
                let bytes: Vec<u8> = pair
                    .iter()
                    .flat_map(|(operation, flags)| [*number as i16, *operation, *flags])
                    .flat_map(i16::to_ne_bytes)
                    .collect();
                let args = vec![undo.set.into(), Arg::In(bytes), 2.into()];
                calls.entry(undo.pid).or_default().push(RemoteCall::new("semop", libc::SYS_semop, args));
            }
        }
    }
    calls
}

/// An operation and its flags, twice.
type Pair = [(i16, i16); 2];

/// Pairs of operations that leave the value as it is and have it changed by so much at the end of the process. An operation
/// is noted with the opposite sign; the value must not leave 0 to 32767 between the two.
fn pairs(value: u16, by: i16) -> Vec<Pair> {
    const MOST: i32 = 32767;
    let (noted, plain) = (libc::SEM_UNDO as i16 | libc::IPC_NOWAIT as i16, libc::IPC_NOWAIT as i16);
    let (down, up) = (i32::from(value), MOST - i32::from(value));
    let (mut left, sign) = (i32::from(by).abs(), i32::from(by).signum());
    let mut pairs = Vec::new();
    while left > 0 {
        let step = left.min(down.max(up));
        let (one, other) = ((-sign * step) as i16, (sign * step) as i16);
        let pair = [(one, noted), (other, plain)];
        // First the one that there is room for.
        let first_goes = if one < 0 { step <= down } else { step <= up };
        pairs.push(if first_goes { pair } else { [pair[1], pair[0]] });
        left -= step;
    }
    pairs
}

/// A thread's list. The same address is the same list; 0 is none.
#[derive(Debug, PartialEq, Eq)]
struct List {
    address: u64,
    /// By the id of a set. Beyond the end of the set they mean nothing.
    entries: Vec<(i32, Vec<i16>)>,
    complete: bool,
}

/// So many sets of a process are looked at, and so many semaphores of each.
const ENTRIES: usize = 32;
const SEMAPHORES: usize = 256;
const PIECE: i32 = 128;
/// In the upper half of a word: what comes next.
const ENTRY: u64 = 1;
const END: u64 = 2;
const MORE: u64 = 3;

/// Where this kernel keeps what, in bytes: in a task the address of its list, in that its first entry, and from there in an
/// entry the set and the adjustments.
struct Layout {
    list: i32,
    first: i32,
    set: i32,
    adjustments: i32,
    function: u32,
}

impl Layout {
    fn of_this_kernel() -> io::Result<Layout> {
        let unknown = || io::Error::other("the kernel does not say where it keeps what is to be undone");
        let wanted = [
            ("task_struct", "sysvsem"),
            ("sysv_sem", "undo_list"),
            ("sem_undo_list", "list_proc"),
            ("sem_undo", "list_proc"),
            ("sem_undo", "semid"),
            ("sem_undo", "semadj"),
        ];
        let (places, function) = Btf::of_this_kernel()?.places(&wanted, "bpf_iter_task");
        let places: Vec<_> = places.into_iter().collect::<Option<_>>().ok_or_else(unknown)?;
        let [task, list, first, node, set, adjustments] = places.try_into().map_err(|_| unknown())?;
        // Elsewhere they are not in the entry itself.
        if adjustments.bits != 0 {
            return Err(unknown());
        }
        let from_node = |place: u32| place as i32 - node.byte() as i32;
        Ok(Layout {
            list: (task.byte() + list.byte()) as i32,
            first: first.byte() as i32,
            set: from_node(set.byte()),
            adjustments: from_node(adjustments.byte()),
            function: function.ok_or_else(unknown)?,
        })
    }
}

struct Walk(OwnedFd);

impl Walk {
    fn get() -> Option<&'static Walk> {
        static WALK: OnceLock<Option<Walk>> = OnceLock::new();
        let load = || Walk::load().inspect_err(|why| tracing::debug!(%why, "what is to be undone cannot be read")).ok();
        WALK.get_or_init(load).as_ref()
    }

    /// Loads it and tries it on a thread of our own.
    fn load() -> io::Result<Walk> {
        let layout = Layout::of_this_kernel()?;
        let walk = Walk(bpf::load_task_walk(&program(&layout), layout.function)?);
        let tried = std::thread::scope(|scope| scope.spawn(|| walk.is_right()).join());
        match tried {
            Ok(Ok(true)) => Ok(walk),
            Ok(Err(error)) => Err(error),
            _ => Err(io::Error::other("what is to be undone for ourselves is not what is found")),
        }
    }

    /// In a namespace that goes with the thread.
    fn is_right(&self) -> io::Result<bool> {
        unshare(CloneFlags::CLONE_NEWIPC)?;
        let own = nix::unistd::gettid().as_raw();
        let read = |walk: &Walk| -> io::Result<Vec<List>> { parse(&bpf::walk_task(walk.0.as_fd(), own)?) };
        let before = read(self)?;
        let (one, other) = (ipc::semget(libc::IPC_PRIVATE, 3, 0o600)?, ipc::semget(libc::IPC_PRIVATE, 1, 0o600)?);
        ipc::sem_operate(one, 2, 7, true)?;
        ipc::sem_operate(one, 0, 9, true)?;
        ipc::sem_operate(one, 0, -4, true)?;
        ipc::sem_operate(other, 0, 1, true)?;
        let [list] = &read(self)?[..] else { return Ok(false) };
        let of = |set| list.entries.iter().find(|(found, _)| *found == set).map(|(_, adjustments)| &adjustments[..3]);
        let found = of(one) == Some(&[-5, 0, -7]) && of(other).is_some_and(|adjustments| adjustments[0] == -1);
        let none_before = before.iter().all(|list| list.entries.is_empty());
        Ok(none_before && list.address != 0 && list.complete && list.entries.len() == 2 && found)
    }

    /// Of all threads of a process, its first one first.
    fn run(&self, process: i32) -> io::Result<Vec<List>> {
        parse(&bpf::walk_tasks(self.0.as_fd(), process)?)
    }
}

fn parse(bytes: &[u8]) -> io::Result<Vec<List>> {
    let cut = || io::Error::other("a walk over tasks was cut short");
    let (mut rest, mut lists) = (bytes, Vec::new());
    while !rest.is_empty() {
        let mut word = || -> io::Result<u64> {
            let (word, tail) = rest.split_first_chunk().ok_or_else(cut)?;
            rest = tail;
            Ok(u64::from_ne_bytes(*word))
        };
        let mut list = List { address: word()?, entries: Vec::new(), complete: true };
        while list.address != 0 {
            let next = word()?;
            if next >> 32 != ENTRY {
                list.complete = next >> 32 == END;
                break;
            }
            let adjustments = (0..SEMAPHORES / 4).map(|_| word()).collect::<io::Result<Vec<u64>>>()?;
            let each = adjustments.iter().flat_map(|four| (0..4).map(move |at| (four >> (at * 16)) as u16 as i16));
            list.entries.push((next as u32 as i32, each.collect()));
        }
        lists.push(list);
    }
    Ok(lists)
}

/// For each task the address of its list, and if there is one, its entries and how they end.
fn program(layout: &Layout) -> Vec<EbpfInstruction> {
    const WORD: i32 = -8;
    const PIECE_AT: i32 = WORD - PIECE;
    let (load, store, set) = (EbpfInstruction::load, EbpfInstruction::store, EbpfInstruction::set);
    let (read, shift) = (EbpfInstruction::read_kernel, EbpfInstruction::shift_left);
    let write = |from, bytes| EbpfInstruction::write_out(6, from, bytes);
    // r6: the output, r7: the task, r8: where its list begins and ends, r9: the entry.
    let mark = |what: u64| [set(1, what as i32), shift(1, 32), store(10, 1, WORD)];
    let mut entry = Vec::new();
    entry.extend(mark(ENTRY));
    entry.extend(read(WORD, 4, 9, layout.set));
    entry.extend(write(WORD, 8));
    for piece in 0..SEMAPHORES as i32 * 2 / PIECE {
        entry.extend(read(PIECE_AT, PIECE, 9, layout.adjustments + piece * PIECE));
        entry.extend(write(PIECE_AT, PIECE));
    }
    entry.extend(read(WORD, 8, 9, 0));
    entry.push(load(9, 10, WORD));

    let mut walk = vec![EbpfInstruction::add(8, layout.first)];
    walk.extend(read(WORD, 8, 8, 0));
    walk.push(load(9, 10, WORD));
    let whole = entry.len() + 2;
    for left in (1..=ENTRIES).rev() {
        // To where it is said how it ended.
        walk.push(EbpfInstruction::skip_if_same(9, 8, left * whole - 1));
        walk.push(EbpfInstruction::skip_if(9, 0, left * whole - 2));
        walk.extend(&entry);
    }
    let more = mark(MORE);
    walk.extend(mark(END));
    walk.push(EbpfInstruction::skip_if_same(9, 8, more.len()));
    walk.extend(more);
    walk.extend(write(WORD, 8));

    let mut body = vec![set(0, 0), store(10, 0, WORD)];
    body.extend((0..PIECE / 8).map(|word| store(10, 0, PIECE_AT + word * 8)));
    body.extend(read(WORD, 8, 7, layout.list));
    body.push(load(8, 10, WORD));
    body.extend(write(WORD, 8));
    body.push(EbpfInstruction::skip_if(8, 0, walk.len()));
    body.extend(walk);
    EbpfInstruction::for_each_task(body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::namespaces::ipc::Owner;

    #[test]
    fn pairs_leave_the_value_and_add_up() {
        for value in [0u16, 1, 5, 16383, 16384, 32766, 32767] {
            for by in [1i16, -1, 5, -7, 16383, -16384, 32766, 32767, -32767] {
                let (mut now, mut noted) = (i32::from(value), 0);
                for pair in pairs(value, by) {
                    for (operation, flags) in pair {
                        now += i32::from(operation);
                        assert!((0..=32767).contains(&now), "{value} {by}: {now}");
                        noted -= if flags & libc::SEM_UNDO as i16 != 0 { i32::from(operation) } else { 0 };
                    }
                    assert_eq!(now, i32::from(value));
                }
                assert_eq!(noted, i32::from(by), "{value}");
            }
        }
    }

    #[test]
    fn what_there_cannot_be() {
        let owner = Owner { key: 0, uid: 0, gid: 0, mode: 0o600 };
        let sets = [SemaphoreSet { id: 7, owner, values: vec![1, 2] }];
        let undo =
            |pid, set, adjustments: &[(u16, i16)]| Undo { pid: PodPid(pid), set, adjustments: adjustments.to_vec() };
        let known = |pid: PodPid| pid.0 == 1;
        believe(&[undo(1, 7, &[(0, 5), (1, -5)])], &sets, known).unwrap();
        for wrong in [
            vec![undo(2, 7, &[(0, 5)])],
            vec![undo(1, 8, &[(0, 5)])],
            vec![undo(1, 7, &[(2, 5)])],
            vec![undo(1, 7, &[(0, 0)])],
            vec![undo(1, 7, &[(0, i16::MIN)])],
            vec![undo(1, 7, &[(1, 1), (0, 1)])],
            vec![undo(1, 7, &[(0, 1)]), undo(1, 7, &[(1, 1)])],
        ] {
            assert_eq!(believe(&wrong, &sets, known).unwrap_err().code(), crate::image::DAMAGED, "{wrong:?}");
        }
    }

    #[test]
    fn a_walk_that_is_cut() {
        let words = |words: &[u64]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>();
        let entry = [&[9, ENTRY << 32 | 4][..], &[0xffff; SEMAPHORES / 4], &[END << 32]].concat();
        let lists = parse(&words(&[&[0][..], &entry].concat())).unwrap();
        assert!(lists.len() == 2 && lists[1].entries[0].0 == 4 && lists[1].entries[0].1[..2] == [-1, 0]);
        for length in [7, 12, 24, 400] {
            assert!(parse(&words(&entry)[..length]).is_err(), "{length}");
        }
        assert!(!parse(&words(&[9, MORE << 32])).unwrap()[0].complete);
    }

    /// Of this very kernel.
    #[test]
    fn it_is_found_in_this_kernel() {
        match Walk::load() {
            Ok(_) => {}
            Err(why) if bpf::is_not_there(&why) => pod_runtime::untested::here(format!("no BPF, or no BTF: {why}")),
            Err(why) => panic!("{why}"),
        }
    }
}
