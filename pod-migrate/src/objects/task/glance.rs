//! All threads of a process at a glance: a walk over them that is run in the kernel (a BPF iterator) says in one read what
//! would take a text of /proc, some thirty calls and two stops of each. It pays where there are many.
//!
//! What is a plain number of a thread's own is taken as it is: its name, its alternate stack, which signals wait for it.
//! Everything else is only compared. Threads of which the kernel keeps the same where [`DECIDING`] says have the same
//! credentials, the same filters, the same switches; one of them is asked ([`Spokesmen`]) and the others are not
//! disturbed. Of every [`CHECKED`] of them one is asked all the same: if it says anything else, so is every other.
//!
//! It fails by not knowing: no BPF, no BTF, a locked-down kernel, or one whose answers about ourselves are not those of
//! /proc. Then each thread is asked for by itself.

use super::AlternateStack;
use crate::crew;
use crate::objects::pieces::{PIECE, moved, pieces};
use pod_runtime::proc::btf::{Btf, Place};
use pod_runtime::proc::{self, status};
use pod_runtime::sys::bpf::{self, EbpfInstruction};
use status::Status;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::OnceLock;

/// From so many threads of a process on it pays to load the walk, which takes milliseconds.
pub const MANY: usize = 32;
/// Of so many threads that are alike, one is asked.
pub const CHECKED: usize = 64;
/// Pid namespaces in each other that are looked at.
const LEVELS: usize = 8;

type Member = (&'static str, &'static str);

/// What each thread has for itself, in the order of [`Own`].
const OWN: [Member; 13] = [
    ("task_struct", "comm"),
    ("task_struct", "pending"),
    ("task_struct", "blocked"),
    ("task_struct", "nvcsw"),
    ("task_struct", "sas_ss_sp"),
    ("task_struct", "sas_ss_size"),
    ("task_struct", "sas_ss_flags"),
    ("task_struct", "clear_child_tid"),
    ("task_struct", "robust_list"),
    ("task_struct", "children"),
    ("task_struct", "io_context"),
    ("task_struct", "cred"),
    ("task_struct", "real_cred"),
];

/// What decides all that is not a thread's own. Of what it points to, the address: two threads that share it have the same.
const DECIDING: [Member; 21] = [
    // PR_MCE_KILL, PR_SET_IO_FLUSHER; PR_SET_TSC, ARCH_SET_CPUID, PR_SET_SPECULATION_CTRL, PR_SET_NO_NEW_PRIVS.
    ("task_struct", "flags"),
    ("thread_info", "flags"),
    ("thread_info", "syscall_work"),
    ("task_struct", "atomic_flags"),
    ("task_struct", "pdeath_signal"),
    ("task_struct", "personality"),
    ("task_struct", "timer_slack_ns"),
    ("task_struct", "policy"),
    ("task_struct", "static_prio"),
    ("task_struct", "rt_priority"),
    ("task_struct", "sched_reset_on_fork"),
    ("task_struct", "cpus_mask"),
    ("task_struct", "syscall_dispatch"),
    ("task_struct", "seccomp"),
    ("task_struct", "real_parent"),
    ("task_struct", "mm"),
    ("task_struct", "fs"),
    ("task_struct", "files"),
    ("task_struct", "nsproxy"),
    ("task_struct", "signal"),
    ("task_struct", "sighand"),
];

/// The same, in the credentials, of which every restored thread has a struct of its own.
const DECIDING_CREDENTIALS: [Member; 20] = [
    ("cred", "uid"),
    ("cred", "gid"),
    ("cred", "suid"),
    ("cred", "sgid"),
    ("cred", "euid"),
    ("cred", "egid"),
    ("cred", "fsuid"),
    ("cred", "fsgid"),
    ("cred", "securebits"),
    ("cred", "cap_inheritable"),
    ("cred", "cap_permitted"),
    ("cred", "cap_effective"),
    ("cred", "cap_bset"),
    ("cred", "cap_ambient"),
    ("cred", "session_keyring"),
    ("cred", "process_keyring"),
    ("cred", "thread_keyring"),
    ("cred", "user"),
    ("cred", "user_ns"),
    ("cred", "group_info"),
];

/// The same, of kernels that have it.
const DECIDING_TOO: [Member; 7] = [
    ("task_struct", "mempolicy"),
    ("task_struct", "uclamp_req"),
    ("sched_entity", "slice"),
    ("sched_dl_entity", "dl_runtime"),
    ("sched_dl_entity", "dl_deadline"),
    ("sched_dl_entity", "dl_period"),
    ("sched_dl_entity", "flags"),
];

/// How one gets there.
const WAY: [Member; 7] = [
    ("task_struct", "thread_info"),
    ("task_struct", "se"),
    ("task_struct", "dl"),
    ("task_struct", "thread_pid"),
    ("pid", "level"),
    ("pid", "numbers"),
    ("sigpending", "signal"),
];

/// A stopped thread of a process with many.
#[derive(Debug, Clone)]
pub struct Seen {
    pub tid: i32,
    process: i32,
    /// Threads of one process with the same number have everything else in common.
    group: usize,
    /// Its numbers, from our pid namespace to its own.
    numbers: Vec<i32>,
    name: Vec<u8>,
    pending: u64,
    blocked: u64,
    switches: u64,
    alternate_stack: AlternateStack,
    pub clear_tid: u64,
    pub robust_list: u64,
    /// It has made no process that lives or was not waited for.
    pub childless: bool,
    /// It may have an I/O priority of its own.
    pub does_io: bool,
    /// Where its credentials are. Who shares them is under the same restrictions of Landlock.
    credentials: u64,
}

impl Seen {
    /// What /proc would say, by what it says of one of the same group.
    pub fn status(&self, like: &Status) -> Status {
        Status {
            name: self.name.clone(),
            pid: self.tid,
            ns_pid: self.numbers.clone(),
            pending: self.pending,
            blocked: self.blocked,
            voluntary_switches: self.switches,
            ..like.clone()
        }
    }

    /// As sigaltstack(2) would say with this stack pointer.
    pub fn alternate_stack(&self, pointer: u64) -> AlternateStack {
        const AUTODISARM: i32 = 1 << 31;
        let AlternateStack { address, flags, bytes } = self.alternate_stack;
        let on_it = pointer > address && pointer - address <= bytes && flags & AUTODISARM == 0;
        let now = if bytes == 0 {
            libc::SS_DISABLE
        } else if on_it {
            libc::SS_ONSTACK
        } else {
            0
        };
        AlternateStack { address, flags: flags & AUTODISARM | now, bytes }
    }
}

/// Who is asked, of many threads, and for whom else.
pub struct Spokesmen {
    like: Vec<usize>,
    asked: Vec<usize>,
}

impl Spokesmen {
    /// Of threads in their order, as far as they were seen. Of those that are alike the first speaks for all; and one in
    /// so many is asked beside it, so that it can be seen whether that is right.
    pub fn of<'a>(threads: impl IntoIterator<Item = Option<&'a Seen>>) -> Spokesmen {
        Spokesmen::by(threads, |_| 0)
    }

    /// Of those that also have the very same credentials.
    pub fn of_credentials<'a>(threads: impl IntoIterator<Item = Option<&'a Seen>>) -> Spokesmen {
        Spokesmen::by(threads, |seen| seen.credentials)
    }

    fn by<'a>(threads: impl IntoIterator<Item = Option<&'a Seen>>, too: impl Fn(&Seen) -> u64) -> Spokesmen {
        let mut groups: HashMap<(i32, usize, u64), (usize, usize)> = HashMap::new();
        let (mut like, mut asked) = (Vec::new(), Vec::new());
        for (at, seen) in threads.into_iter().enumerate() {
            let Some(seen) = seen else {
                like.push(at);
                asked.push(at);
                continue;
            };
            let (first, others) = groups.entry((seen.process, seen.group, too(seen))).or_insert((at, 0));
            if others.is_multiple_of(CHECKED) {
                asked.push(at);
            }
            *others += 1;
            like.push(*first);
        }
        Spokesmen { like, asked }
    }

    /// Who speaks for this one; itself, if it does.
    pub fn like(&self, at: usize) -> usize {
        self.like[at]
    }

    /// All that are asked, in their order: those that speak for others, and some more.
    pub fn asked(&self) -> &[usize] {
        &self.asked
    }

    /// Those that speak for themselves or others.
    pub fn first(&self) -> impl Iterator<Item = usize> + '_ {
        self.like.iter().enumerate().filter(|(at, like)| at == *like).map(|(at, _)| at)
    }
}

/// What /proc says of each thread: of those that are alike it is read of one, and of one in so many to see that they are.
pub fn statuses(
    tids: impl Iterator<Item = i32>,
    seen: &BTreeMap<i32, Seen>,
    read: impl Fn(i32) -> io::Result<Status> + Sync,
) -> Vec<io::Result<Status>> {
    let tids: Vec<i32> = tids.collect();
    let spokesmen = Spokesmen::of(tids.iter().map(|tid| seen.get(tid)));
    let asked = spokesmen.asked();
    let found = crew::share(asked.len(), |at| read(tids[asked[at]]));
    let mut found: BTreeMap<usize, io::Result<Status>> = asked.iter().copied().zip(found).collect();
    let told = |at: usize| {
        let first = found.get(&spokesmen.like(at))?.as_ref().ok()?;
        Some(seen.get(&tids[at])?.status(first))
    };
    let as_told = |at: &usize| spokesmen.like(*at) == *at || told(*at).as_ref() == found[at].as_ref().ok();
    if !asked.iter().all(as_told) {
        tracing::debug!("threads are not alike as they were taken for: the status of each is read");
        return crew::share(tids.len(), |at| read(tids[at]));
    }
    let others = (0..tids.len()).filter(|at| !found.contains_key(at));
    let others: Vec<(usize, Status)> = others.filter_map(|at| Some((at, told(at)?))).collect();
    found.extend(others.into_iter().map(|(at, status)| (at, Ok(status))));
    (0..tids.len()).map(|at| found.remove(&at).unwrap_or_else(|| read(tids[at]))).collect()
}

/// The loaded walk.
pub struct Glance {
    program: OwnedFd,
    layout: Layout,
    /// Our own pid namespace, as an address in the kernel.
    namespace: u64,
}

/// How many threads a process has.
fn count(process: i32) -> usize {
    // The folder's links: itself, its name, and each of its folders.
    std::fs::metadata(format!("/proc/{process}/task")).map_or(0, |folder| folder.nlink().saturating_sub(2) as usize)
}

impl Glance {
    /// Begins to load the walk in a thread when one of these processes has so many threads that it will be asked for.
    pub fn begin(processes: &[i32]) {
        if processes.iter().any(|process| count(*process) >= MANY) {
            std::thread::spawn(Glance::get);
        }
    }

    /// Loads it while the pod still runs, when it will be asked for; waits for who has begun with it.
    pub fn prepare(processes: &[i32]) {
        if processes.iter().any(|process| count(*process) >= MANY) {
            Glance::get();
        }
    }

    /// That of this process, loaded when it is asked for first. None where the kernel does not let itself be asked.
    pub fn get() -> Option<&'static Glance> {
        static GLANCE: OnceLock<Option<Glance>> = OnceLock::new();
        let load = || Glance::load().inspect_err(|why| tracing::debug!(%why, "threads are asked one by one")).ok();
        GLANCE.get_or_init(load).as_ref()
    }

    fn load() -> io::Result<Glance> {
        let layout = Layout::of_this_kernel()?;
        let program = bpf::load_task_walk(&program(&layout), layout.function)?;
        let mut glance = Glance { program, layout, namespace: 0 };
        let own = nix::unistd::gettid().as_raw();
        let text = proc::read("/proc/thread-self/status")?;
        let told = status::parse(&text);
        let records = bpf::walk_task(glance.program.as_fd(), own)?;
        let record = Record(records.get(..glance.layout.bytes()).unwrap_or_default());
        glance.namespace = record.namespaces().next_back().unwrap_or(0);
        let unlike = || io::Error::other("threads of ours are not what /proc says");
        let seen = glance.seen(&record).ok_or_else(unlike)?;
        let (head, _) = pod_runtime::sys::task::robust_list(0)?;
        // Between the two it may have gone to sleep.
        let now = Status { voluntary_switches: told.voluntary_switches, ..seen.status(&told) };
        if now == told && seen.robust_list == head && seen.switches >= told.voluntary_switches {
            Ok(glance)
        } else {
            Err(unlike())
        }
    }

    /// The threads of a process, by tid.
    pub fn of(&self, process: i32) -> io::Result<BTreeMap<i32, Seen>> {
        let bytes = bpf::walk_tasks(self.program.as_fd(), process)?;
        let mut groups: HashMap<Vec<u8>, usize> = HashMap::new();
        let mut all = BTreeMap::new();
        for record in bytes.chunks_exact(self.layout.bytes()).map(Record) {
            let Some(mut seen) = self.seen(&record) else { continue };
            let next = groups.len();
            seen.process = process;
            seen.group = *groups.entry(self.layout.deciding(&record)).or_insert(next);
            all.insert(seen.tid, seen);
        }
        Ok(all)
    }

    /// Without its group. None of one that is not ours to number.
    fn seen(&self, record: &Record<'_>) -> Option<Seen> {
        let from = record.namespaces().position(|namespace| namespace == self.namespace)?;
        let numbers: Vec<i32> = record.numbers().skip(from).collect();
        let [name, pending, blocked, switches, stack, stack_bytes, stack_flags, clear_tid, robust_list, rest @ ..] =
            self.layout.own;
        let [children, io, credentials, real] = rest;
        let bytes = record.task();
        let name = bytes.get(name.byte() as usize..(name.byte() + name.bits / 8) as usize)?;
        let first_child = Place { bits: 64, ..children }.of(bytes)?;
        // The kernel acts for somebody else just now: never of one that stands.
        let credentials = credentials.of(bytes).filter(|own| real.of(bytes) == Some(*own))?;
        Some(Seen {
            tid: *numbers.first()?,
            process: 0,
            group: 0,
            numbers,
            name: name.split(|byte| *byte == 0).next()?.to_vec(),
            pending: pending.of(bytes)?,
            blocked: blocked.of(bytes)?,
            switches: switches.of(bytes)?,
            alternate_stack: AlternateStack {
                address: stack.of(bytes)?,
                flags: stack_flags.of(bytes)? as u32 as i32,
                bytes: stack_bytes.of(bytes)?,
            },
            clear_tid: clear_tid.of(bytes)?,
            robust_list: robust_list.of(bytes)?,
            // An empty list of the kernel's begins with itself.
            childless: first_child == record.word(0).wrapping_add(self.layout.children.into()),
            does_io: io.of(bytes)? != 0,
            credentials,
        })
    }
}

/// What the walk writes of a thread: where it is, how deep its number lies, number and namespace of each level, then pieces
/// of its task_struct.
struct Record<'a>(&'a [u8]);

/// Bytes before the pieces.
const HEAD: usize = 16 + LEVELS * 16;

impl Record<'_> {
    fn word(&self, at: usize) -> u64 {
        let word = self.0.get(at * 8..at * 8 + 8).and_then(|bytes| bytes.try_into().ok());
        word.map_or(0, u64::from_ne_bytes)
    }

    fn levels(&self) -> usize {
        (self.word(1) as u32 as usize).min(LEVELS - 1) + 1
    }

    fn numbers(&self) -> impl DoubleEndedIterator<Item = i32> {
        (0..self.levels()).map(|level| self.word(2 + level * 2) as u32 as i32)
    }

    fn namespaces(&self) -> impl DoubleEndedIterator<Item = u64> {
        (0..self.levels()).map(|level| self.word(3 + level * 2))
    }

    fn task(&self) -> &[u8] {
        self.0.get(HEAD..).unwrap_or_default()
    }
}

/// Where this kernel keeps what.
#[derive(Debug)]
struct Layout {
    /// Of a task_struct: offset and bytes.
    pieces: Vec<(u32, u32)>,
    /// In what was read of one.
    own: [Place; OWN.len()],
    deciding: Vec<Place>,
    /// Of its credentials, which are read behind it.
    credentials: Vec<(u32, u32)>,
    /// In the task_struct itself: where they are.
    to_credentials: u32,
    /// In the task_struct itself: the list of its children.
    children: u32,
    pid: u32,
    level: u32,
    numbers: u32,
    /// BTF type of the walk's function.
    function: u32,
}

impl Layout {
    fn of_this_kernel() -> io::Result<Layout> {
        let layout = Layout::of(&Btf::of_this_kernel()?);
        layout.ok_or_else(|| io::Error::other("the kernel does not say where it keeps threads"))
    }

    fn of(btf: &Btf<'_>) -> Option<Layout> {
        let wanted = OWN.into_iter().chain(DECIDING).chain(DECIDING_CREDENTIALS).chain(DECIDING_TOO).chain(WAY);
        let wanted: Vec<Member> = wanted.collect();
        let (places, function) = btf.places(&wanted, "bpf_iter_task");
        let place = |member: &Member| places[wanted.iter().position(|one| one == member)?];
        let [info, entity, deadline, pid, level, numbers, signal] = WAY.map(|member| place(&member));
        let inside = |outer: Option<Place>, inner: Place| Some(Place { bit: outer?.bit + inner.bit, bits: inner.bits });
        // From the start of the task_struct.
        let whole = |member: &Member| match member.0 {
            "thread_info" => inside(info, place(member)?),
            "sched_entity" => inside(entity, place(member)?),
            "sched_dl_entity" => inside(deadline, place(member)?),
            _ => place(member),
        };
        let mut own = Vec::new();
        for member in &OWN {
            let place = whole(member)?;
            own.push(if member.1 == "pending" { inside(Some(place), signal?)? } else { place });
        }
        let mut deciding = Vec::new();
        for member in &DECIDING {
            deciding.push(whole(member)?);
        }
        deciding.extend(DECIDING_TOO.iter().filter_map(whole));
        let deciding: Vec<Place> = deciding.into_iter().flat_map(parts).collect();
        let pieces = pieces(own.iter().chain(&deciding).copied());
        let of_credentials: Vec<Place> = DECIDING_CREDENTIALS.iter().map(place).collect::<Option<_>>()?;
        let credentials = self::pieces(of_credentials.iter().copied());
        let before = pieces.iter().map(|(_, bytes)| bytes).sum();
        let within = |place: &Place| moved(*place, &pieces, 0);
        let of_task = deciding.iter().map(within);
        let deciding = of_task.chain(of_credentials.iter().map(|place| moved(*place, &credentials, before)));
        let whole_place = |name: &str| Some(own[OWN.iter().position(|member| member.1 == name)?].byte());
        Some(Layout {
            deciding: deciding.collect::<Option<_>>()?,
            children: whole_place("children")?,
            to_credentials: whole_place("real_cred")?,
            own: own.iter().map(within).collect::<Option<Vec<_>>>()?.try_into().ok()?,
            credentials,
            pid: pid?.byte(),
            level: level?.byte(),
            numbers: numbers?.byte(),
            function: function?,
            pieces,
        })
    }

    /// Of a record.
    fn bytes(&self) -> usize {
        let pieces = self.pieces.iter().chain(&self.credentials);
        HEAD + pieces.map(|(_, bytes)| *bytes as usize).sum::<usize>()
    }

    fn deciding(&self, record: &Record<'_>) -> Vec<u8> {
        let values = self.deciding.iter().map(|place| place.of(record.task()).unwrap_or(0));
        values.flat_map(u64::to_ne_bytes).collect()
    }
}

/// A large member in words.
fn parts(place: Place) -> impl Iterator<Item = Place> {
    (0..place.bits.div_ceil(64)).map(move |word| {
        let bits = (place.bits - word * 64).min(64);
        Place { bit: place.bit + word * 64, bits }
    })
}

/// For each thread a record.
fn program(layout: &Layout) -> Vec<EbpfInstruction> {
    const HEAD_AT: i32 = -(HEAD as i32);
    const PIECE_AT: i32 = HEAD_AT - PIECE as i32;
    let (load, store, set) = (EbpfInstruction::load, EbpfInstruction::store, EbpfInstruction::set);
    let read = EbpfInstruction::read_kernel;
    let write = |from, bytes| EbpfInstruction::write_out(6, from, bytes);
    // r6: the output, r7: the task, r8: its pid, then its credentials, r10: our own stack.
    let mut body = vec![set(0, 0)];
    body.extend((0..(HEAD as i32 + PIECE as i32) / 8).map(|word| store(10, 0, PIECE_AT + word * 8)));
    body.extend(read(HEAD_AT, 8, 7, layout.pid as i32));
    body.extend([load(8, 10, HEAD_AT), store(10, 7, HEAD_AT)]);
    body.extend(read(HEAD_AT + 8, 4, 8, layout.level as i32));
    body.extend(read(HEAD_AT + 16, (LEVELS * 16) as i32, 8, layout.numbers as i32));
    body.extend(write(HEAD_AT, HEAD as i32));
    body.extend(read(HEAD_AT, 8, 7, layout.to_credentials as i32));
    body.push(load(8, 10, HEAD_AT));
    let mut copy = |from: u8, pieces: &[(u32, u32)]| {
        for (offset, bytes) in pieces {
            body.extend(read(PIECE_AT, *bytes as i32, from, *offset as i32));
            body.extend(write(PIECE_AT, *bytes as i32));
        }
    };
    copy(7, &layout.pieces);
    copy(8, &layout.credentials);
    EbpfInstruction::for_each_task(body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn this_kernel_keeps_threads_as_known_here() {
        let btf = match Btf::of_this_kernel() {
            Ok(btf) => btf,
            Err(why) => return pod_runtime::untested::here(format!("the kernel has no BTF: {why}")),
        };
        let layout = Layout::of(&btf).unwrap();
        assert!(layout.pieces.iter().chain(&layout.credentials).all(|(_, bytes)| *bytes <= PIECE));
    }

    fn seen(process: i32, group: usize) -> Seen {
        Seen {
            tid: 1,
            process,
            group,
            numbers: vec![1],
            name: Vec::new(),
            pending: 0,
            blocked: 0,
            switches: 0,
            alternate_stack: AlternateStack { address: 0x1000, flags: 0, bytes: 0x100 },
            clear_tid: 0,
            robust_list: 0,
            childless: true,
            does_io: false,
            credentials: 0,
        }
    }

    #[test]
    fn the_first_speaks_for_those_like_it() {
        let (one, other, elsewhere) = (seen(1, 0), seen(1, 1), seen(2, 0));
        let spokesmen = Spokesmen::of([Some(&one), Some(&other), Some(&one), None, Some(&elsewhere), None]);
        assert_eq!(spokesmen.like, [0, 1, 0, 3, 4, 5]);
        assert_eq!(spokesmen.asked(), [0, 1, 3, 4, 5]);
        assert_eq!(spokesmen.first().collect::<Vec<_>>(), [0, 1, 3, 4, 5]);
        let many = Spokesmen::of(std::iter::repeat_n(Some(&one), 3 * CHECKED));
        assert_eq!(many.asked(), [0, CHECKED, 2 * CHECKED]);
        assert_eq!(many.first().collect::<Vec<_>>(), [0]);
    }

    #[test]
    fn an_alternate_stack_is_as_the_kernel_says() {
        let with = |flags, bytes| {
            let mut seen = seen(1, 0);
            (seen.alternate_stack.flags, seen.alternate_stack.bytes) = (flags, bytes);
            move |pointer| seen.alternate_stack(pointer).flags
        };
        assert_eq!(with(0, 0)(0x1001), libc::SS_DISABLE);
        assert_eq!([0x1000, 0x1001, 0x1100, 0x1101].map(with(0, 0x100)), [0, 1, 1, 0]);
        assert_eq!(with(1 << 31, 0x100)(0x1001), 1 << 31);
    }

    /// What the walk says of our own threads is what /proc says, and those that differ are told apart.
    #[test]
    fn threads_are_as_proc_says() {
        let glance = match Glance::load() {
            Ok(glance) => glance,
            Err(why) if bpf::is_not_there(&why) => {
                return pod_runtime::untested::here(format!("no BPF, or no BTF: {why}"));
            }
            Err(why) => panic!("{why}"),
        };
        let (says, said) = channel();
        let go: Vec<_> = (0..6)
            .map(|number| {
                let (says, (go, wait)) = (says.clone(), channel::<()>());
                let name = format!("t {number}\\\n");
                let run = move || {
                    if number == 3 {
                        nix::sys::prctl::set_timerslack(77_777).unwrap();
                    }
                    if number == 4 {
                        nix::sys::prctl::set_no_new_privs().unwrap();
                    }
                    says.send(nix::unistd::gettid().as_raw()).unwrap();
                    let _ = wait.recv();
                };
                drop(std::thread::Builder::new().name(name).spawn(run).unwrap());
                go
            })
            .collect();
        let tids: Vec<i32> = (0..6).map(|_| said.recv().unwrap()).collect();
        let read = |tid: i32| status::parse(&proc::read(format!("/proc/self/task/{tid}/status")).unwrap());
        let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !tids.iter().all(|tid| read(*tid).state == 'S') {
            assert!(std::time::Instant::now() < until, "they do not wait");
            std::thread::yield_now();
        }
        let seen = glance.of(std::process::id() as i32).unwrap();
        let by_name = |number: usize| {
            let name = format!("t {number}\\\n").into_bytes();
            seen.values().find(|seen| seen.name == name).unwrap()
        };
        let all: Vec<&Seen> = (0..6).map(by_name).collect();
        let alike = |a: usize, b: usize| all[a].group == all[b].group;
        assert!(!alike(0, 3) && !alike(0, 4) && !alike(3, 4));
        for one in &all {
            for other in all.iter().filter(|other| other.group == one.group) {
                assert_eq!(other.status(&read(one.tid)), read(other.tid));
            }
            let (head, _) = pod_runtime::sys::task::robust_list(one.tid).unwrap();
            assert_eq!(one.robust_list, head);
            assert!(one.alternate_stack(0).bytes > 0 && one.childless);
        }
        // At least two of those that nothing sets apart.
        assert!([0, 1, 2, 5].iter().any(|a| [0, 1, 2, 5].iter().any(|b| a != b && alike(*a, *b))));
        drop(go);
    }
}
