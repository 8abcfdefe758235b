//! All descriptors of a task at a glance: a walk over them that is run in the kernel (a BPF iterator) says in one read what
//! would take a handful of calls for each. It pays where there are many.
//!
//! Above all it says which descriptors are one open file description, by the address of the kernel's struct, which kcmp(2)
//! tells by comparing only: ten thousand eventfds are one inode and take a sort. Of eventfds and sockets it says all, of
//! other files the offset, the flags, the mount, and whether fdinfo would say more.
//!
//! It fails by not knowing: no BPF, no BTF, a locked-down kernel, or one whose answers about descriptors of our own are
//! not those of /proc. Then each descriptor is asked for by itself.

use super::eventfd;
use super::socket::tcp::summary::{Plan, Summary};
use crate::objects::pieces;
use nix::sys::stat::{FileStat, fstat};
use pod_runtime::proc::btf::{Btf, Place};
use pod_runtime::proc::fdinfo::{self, FdInfo};
use pod_runtime::sys::bpf::{self, EbpfInstruction};
use pod_runtime::sys::{descriptor, inet};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::sync::OnceLock;

/// From so many descriptors on it pays to load the walk, which takes milliseconds, but before the pod stands still: a server with
/// fifty connections stands still 4 ms less, and as much again is not done where it is restored.
pub const MANY: usize = 16;

const EFD_SEMAPHORE: u64 = 1;

/// One descriptor, as it was when the walk came by. Of a frozen task that stays so.
#[derive(Debug)]
pub struct Seen {
    pub number: i32,
    /// The same for all descriptors of one open file description, as long as one of them is open.
    pub identity: u64,
    pub close_on_exec: bool,
    /// As F_GETFL gives them.
    pub flags: i32,
    /// Nobody gets signals of it, and no other signal than SIGIO was chosen.
    pub unowned: bool,
    /// None when fdinfo says more than this.
    pub info: Option<FdInfo>,
    /// What stat and the link in /proc say, of files that have neither path nor times.
    pub plain: Option<(FileStat, Vec<u8>)>,
    pub eventfd: Option<eventfd::State>,
    /// Of a TCP socket.
    pub summary: Option<Summary>,
}

/// The loaded walk, and what it found of descriptors of our own by which kinds are known.
pub struct Survey {
    program: OwnedFd,
    layout: Layout,
    eventfd: Sample,
    socket: Sample,
}

/// A kind, by the operations of its files.
struct Sample {
    operations: u64,
    stat: FileStat,
    link: Vec<u8>,
}

impl Survey {
    /// That of this process, loaded when it is asked for first. None where the kernel does not let itself be asked.
    pub fn get() -> Option<&'static Survey> {
        static SURVEY: OnceLock<Option<Survey>> = OnceLock::new();
        let load =
            || Survey::load().inspect_err(|why| tracing::debug!(%why, "descriptors are asked for one by one")).ok();
        SURVEY.get_or_init(load).as_ref()
    }

    /// Loads it while the pod still runs, when one of its processes has so many descriptors that it will be asked for, and makes
    /// room for copies of them.
    pub fn prepare(processes: &[i32]) {
        let counts: Vec<usize> = processes.iter().map(|process| count(*process)).collect();
        if counts.iter().any(|count| *count >= MANY) {
            Survey::get();
            super::raise_limit();
            super::room_for(counts.iter().sum());
        }
    }

    fn load() -> io::Result<Survey> {
        let layout = Layout::of_this_kernel()?;
        let program = bpf::load_task_walk(&program(&layout), layout.function)?;
        let nothing = || io::Error::other("descriptors of our own are not what /proc says");
        let eventfd = descriptor::eventfd(true)?;
        let twin = eventfd.try_clone()?;
        nix::unistd::write(&eventfd, &7u64.to_ne_bytes())?;
        descriptor::set_async_owner(twin.as_fd(), descriptor::AsyncOwner { kind: 1, pid: std::process::id() as i32 })?;
        let socket = inet::socket(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_TCP)?;
        let file = std::fs::File::open("/proc/self/status")?;
        nix::unistd::lseek(&file, 3, nix::unistd::Whence::SeekSet)?;
        descriptor::set_close_on_exec(twin.as_fd(), false)?;
        let records = layout.records(program.as_fd(), std::process::id() as i32)?;
        let word = |fd: BorrowedFd<'_>| {
            let is_it = |words: &&[u64; WORDS]| words[NUMBER] as u32 as i32 == fd.as_raw_fd();
            records.iter().map(|(words, _)| words).find(is_it).ok_or_else(nothing)
        };
        let sample = |fd: BorrowedFd<'_>| -> io::Result<Sample> {
            let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?.into_os_string().into_vec();
            Ok(Sample { operations: word(fd)?[OPERATIONS], stat: fstat(fd)?, link })
        };
        let survey = Survey { eventfd: sample(eventfd.as_fd())?, socket: sample(socket.as_fd())?, program, layout };
        let all = [eventfd.as_fd(), twin.as_fd(), socket.as_fd(), file.as_fd()];
        let mut seen = Vec::new();
        for fd in all {
            let found = survey.seen((*word(fd)?, None));
            if !survey.is_as_told(fd, &found)? {
                return Err(nothing());
            }
            seen.push(found);
        }
        let owned = seen.iter().map(|seen| seen.unowned).collect::<Vec<_>>();
        let same = seen[0].identity == seen[1].identity && seen[2].identity != seen[3].identity;
        let owned_as_made = owned[..2] == [false; 2] && (owned[2..] == [true; 2] || !survey.layout.owner_is_apart);
        let known = [&survey.eventfd, &survey.socket].map(|sample| sample.operations);
        let told_apart =
            known[0] != known[1] && !known.contains(&0) && !known.contains(&word(file.as_fd())?[OPERATIONS]);
        if same && owned_as_made && told_apart { Ok(survey) } else { Err(nothing()) }
    }

    /// Whether what the walk says of a descriptor of our own is what is told in other ways.
    fn is_as_told(&self, fd: BorrowedFd<'_>, seen: &Seen) -> io::Result<bool> {
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
        let told = fdinfo::parse(&text);
        let (stat, link) = (fstat(fd)?, std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?);
        let plain = seen.plain.as_ref().is_none_or(|(seen, name)| {
            let of = |stat: &FileStat| (stat.st_dev, stat.st_ino, stat.st_mode);
            of(seen) == of(&stat) && *name == link.into_os_string().into_vec()
        });
        let info = seen.info.as_ref().is_some_and(|info| (info.position, info.mount) == (told.position, told.mount));
        let eventfd = seen.eventfd.as_ref().map(|state| (state.count, state.semaphore)) == told.eventfd();
        let flags = seen.flags == descriptor::status_flags(fd)?;
        Ok(plain && info && eventfd && flags && seen.close_on_exec == descriptor::close_on_exec(fd)?)
    }

    /// The descriptors of a task, by number.
    pub fn of(&self, task: i32) -> io::Result<Vec<Seen>> {
        let records = self.layout.records(self.program.as_fd(), task)?;
        let mut seen: Vec<Seen> = records.into_iter().map(|record| self.seen(record)).collect();
        seen.sort_unstable_by_key(|seen| seen.number);
        Ok(seen)
    }

    /// How the summaries of TCP sockets are read.
    pub fn plan(&self) -> Option<&Plan> {
        self.layout.sockets.as_ref()
    }

    fn seen(&self, (words, summary): Record) -> Seen {
        let number = words[NUMBER] as u32 as i32;
        let is = |sample: &Sample| words[OPERATIONS] == sample.operations;
        let inode = words[INODE_NUMBER];
        let numbered = |mut stat: FileStat| {
            stat.st_ino = inode;
            stat
        };
        let plain = if is(&self.eventfd) {
            Some((numbered(self.eventfd.stat), self.eventfd.link.clone()))
        } else if is(&self.socket) {
            Some((numbered(self.socket.stat), format!("socket:[{inode}]").into_bytes()))
        } else {
            None
        };
        let state = eventfd::State { count: words[COUNT], semaphore: words[COUNT_FLAGS] & EFD_SEMAPHORE != 0 };
        let says_all = plain.is_some() || words[SHOWS_MORE] == 0;
        let info = || FdInfo::short(words[POSITION], words[FLAGS] as u32 as i32, words[MOUNT] as u32 as i32);
        Seen {
            number,
            identity: words[FILE],
            close_on_exec: words[CLOSING] >> (number % 64) & 1 != 0,
            flags: words[FLAGS] as u32 as i32,
            unowned: self.layout.owner_is_apart && words[OWNER] == 0,
            info: (says_all && words[LOCKS] == 0).then(info),
            eventfd: is(&self.eventfd).then_some(state),
            summary: summary.filter(|_| is(&self.socket)),
            plain,
        }
    }
}

/// How many descriptors a task has, where the kernel tells it (Linux 6.2); 0 where it does not.
pub fn count(task: i32) -> usize {
    std::fs::metadata(format!("/proc/{task}/fd")).map_or(0, |folder| folder.len() as usize)
}

/// The words of a record. Those from `COUNT` on mean something for some kinds of files only.
const FILE: usize = 0;
const NUMBER: usize = 1;
const POSITION: usize = 2;
const FLAGS: usize = 3;
const OPERATIONS: usize = 4;
const PRIVATE: usize = 5;
const INODE: usize = 6;
const OWNER: usize = 7;
const MOUNT: usize = 8;
const INODE_NUMBER: usize = 9;
const LOCKS: usize = 10;
const SHOWS_MORE: usize = 11;
const CLOSING: usize = 12;
const COUNT: usize = 13;
const COUNT_FLAGS: usize = 14;
/// The inode's mode, then whether a summary follows.
const SUMMARY: usize = 15;
const WORDS: usize = 16;

type Record = ([u64; WORDS], Option<Summary>);

/// Where this kernel keeps what, in bytes from the start of the struct.
#[derive(Debug)]
struct Layout {
    /// In struct file: offset, flags, operations, what the kind keeps, inode, owner, mount.
    file: [Place; 7],
    /// Linux 6.12: the owner is a struct of its own, and there is none before somebody asks for signals.
    owner_is_apart: bool,
    inode_number: Place,
    inode_mode: Place,
    locks: Place,
    show_fdinfo: Place,
    /// In the kernel's whole struct of a mount: what others see of it, and its number.
    mount: [Place; 2],
    count: [Place; 2],
    /// From a task to the bits of its table.
    bits: [Place; 3],
    /// None where the kernel's sockets are not as known here.
    sockets: Option<Plan>,
    /// BTF type of the walk's function.
    function: u32,
}

impl Layout {
    fn of_this_kernel() -> io::Result<Layout> {
        let unknown = || io::Error::other("the kernel does not say where it keeps descriptors");
        let wanted = [
            ("file", "f_pos"),
            ("file", "f_flags"),
            ("file", "f_op"),
            ("file", "private_data"),
            ("file", "f_inode"),
            ("file", "f_owner"),
            ("file", "f_path"),
            ("path", "mnt"),
            ("inode", "i_ino"),
            ("inode", "i_mode"),
            ("inode", "i_flctx"),
            ("file_operations", "show_fdinfo"),
            ("mount", "mnt"),
            ("mount", "mnt_id"),
            ("eventfd_ctx", "count"),
            ("eventfd_ctx", "flags"),
            ("task_struct", "files"),
            ("files_struct", "fdt"),
            ("fdtable", "close_on_exec"),
        ];
        let btf = Btf::of_this_kernel()?;
        let (places, function) = btf.places(&wanted, "bpf_iter_task_file");
        let places: Vec<Place> = places.into_iter().collect::<Option<_>>().ok_or_else(unknown)?;
        let [position, flags, operations, private, inode, owner, path, to_mount, rest @ ..] = &places[..] else {
            return Err(unknown());
        };
        let [number, mode, locks, show_fdinfo, outer, mount_number, count, count_flags, files, table, bits] = rest
        else {
            return Err(unknown());
        };
        let mount = Place { bit: path.bit + to_mount.bit, bits: to_mount.bits };
        Ok(Layout {
            file: [*position, *flags, *operations, *private, *inode, *owner, mount],
            owner_is_apart: owner.bits == 64,
            inode_number: *number,
            inode_mode: *mode,
            locks: *locks,
            show_fdinfo: *show_fdinfo,
            mount: [*outer, *mount_number],
            count: [*count, *count_flags],
            bits: [*files, *table, *bits],
            sockets: Plan::of(&btf),
            function: function.ok_or_else(unknown)?,
        })
    }

    /// What a walk over the descriptors of a task has written.
    fn records(&self, program: BorrowedFd<'_>, task: i32) -> io::Result<Vec<Record>> {
        let all = bpf::walk_task(program, task)?;
        let mut rest = &all[..];
        let short = || io::Error::other("a walk over descriptors was cut short");
        let mut records = Vec::new();
        while !rest.is_empty() {
            let (head, tail) = rest.split_at_checked(WORDS * 8).ok_or_else(short)?;
            let word = |at: usize| u64::from_ne_bytes(head[at * 8..at * 8 + 8].try_into().expect("eight bytes"));
            let words: [u64; WORDS] = std::array::from_fn(word);
            let bytes = self.sockets.as_ref().filter(|_| words[SUMMARY] == 1).map(Plan::bytes);
            let (summary, tail) = tail.split_at_checked(bytes.unwrap_or(0)).ok_or_else(short)?;
            records.push((words, bytes.map(|_| Summary(summary.to_vec()))));
            rest = tail;
        }
        Ok(records)
    }
}

/// Notes whether a descriptor is a TCP socket, and leaves where its struct sock is in r8.
fn is_tcp(plan: &Plan, mode: &Place, at: impl Fn(usize) -> i32) -> Vec<EbpfInstruction> {
    let (load, store, set) = (EbpfInstruction::load, EbpfInstruction::store, EbpfInstruction::set);
    let read = |from: u8, place: &Place| {
        let clear = [set(0, 0), store(10, 0, at(SUMMARY))];
        let bytes = EbpfInstruction::read_kernel(at(SUMMARY), place.bits as i32 / 8, from, place.byte() as i32);
        clear.into_iter().chain(bytes).chain([load(1, 10, at(SUMMARY))])
    };
    // Each look is followed by a jump to the end, where it is noted that it is none.
    let mut steps: Vec<(Vec<EbpfInstruction>, i32)> = Vec::new();
    let format = [EbpfInstruction::shift_right(1, 12)];
    let of_inode = [load(8, 10, at(INODE))].into_iter().chain(read(8, mode)).chain(format).collect();
    steps.push((of_inode, (libc::S_IFSOCK >> 12) as i32));
    let to_sock = [load(8, 10, at(PRIVATE))].into_iter().chain(read(8, &plan.to_sock));
    let to_sock = to_sock.chain([EbpfInstruction::copy(8, 1)]);
    steps.push((to_sock.chain(read(8, &plan.protocol)).collect(), libc::IPPROTO_TCP));
    steps.push((read(8, &plan.kind).collect(), libc::SOCK_STREAM));
    let mut all = vec![set(1, 1), store(10, 1, at(SUMMARY))];
    let none = [EbpfInstruction::skip_if(1, 1, 2), set(1, 0), store(10, 1, at(SUMMARY))];
    all.extend(none);
    for (look, wanted) in steps.into_iter().rev() {
        // Past all that follows but the last two, which note it.
        let jump = EbpfInstruction::skip_unless(1, wanted, all.len() - 2);
        all.splice(0..0, look.into_iter().chain([jump]));
    }
    all
}

/// Writes the pieces of a summary; r8 is at the struct sock.
fn write_summary(plan: &Plan, at: impl Fn(usize) -> i32) -> Vec<EbpfInstruction> {
    let (load, store, set) = (EbpfInstruction::load, EbpfInstruction::store, EbpfInstruction::set);
    const PIECE: i32 = pieces::PIECE as i32;
    let to = at(0) - PIECE;
    let write = |pieces: &[(u32, u32)]| {
        let piece = |(offset, bytes): &(u32, u32)| {
            let read = EbpfInstruction::read_kernel(to, *bytes as i32, 8, *offset as i32);
            read.into_iter().chain(EbpfInstruction::write_out(6, to, *bytes as i32)).collect::<Vec<_>>()
        };
        pieces.iter().flat_map(piece).collect::<Vec<_>>()
    };
    let mut all = vec![set(0, 0)];
    all.extend((0..PIECE / 8).map(|word| store(10, 0, to + word * 8)));
    all.extend(write(&plan.sock));
    all.extend(EbpfInstruction::read_kernel(at(SUMMARY), 8, 8, plan.to_v6.byte() as i32));
    all.push(load(8, 10, at(SUMMARY)));
    all.extend(write(&plan.v6));
    all
}

/// For each descriptor a record.
fn program(layout: &Layout) -> Vec<EbpfInstruction> {
    let (load, store, set) = (EbpfInstruction::load, EbpfInstruction::store, EbpfInstruction::set);
    /// A word beside the record, for what is only passed by.
    const ASIDE: usize = WORDS;
    let at = |word: usize| (word as i32 - WORDS as i32 - 1) * 8;
    let read = |word: usize, from: u8, place: &Place| {
        let bytes = (place.bits / 8).min(8) as i32;
        EbpfInstruction::read_kernel(at(word), bytes, from, place.byte() as i32)
    };
    // r6: the output, r7: the file, r8: where we are, r9: the task, then how far the descriptor's word is in the bits.
    let mut body = vec![load(6, 6, 0), set(0, 0)];
    body.extend((0..=WORDS).map(|word| store(10, 0, at(word))));
    body.extend([store(10, 7, at(FILE)), store(10, 8, at(NUMBER))]);
    let of_file = [POSITION, FLAGS, OPERATIONS, PRIVATE, INODE, OWNER, MOUNT];
    for (word, place) in of_file.into_iter().zip(&layout.file) {
        body.extend(read(word, 7, place));
    }
    body.push(load(8, 10, at(INODE)));
    body.extend(read(INODE_NUMBER, 8, &layout.inode_number));
    body.extend(read(LOCKS, 8, &layout.locks));
    body.push(load(8, 10, at(OPERATIONS)));
    body.extend(read(SHOWS_MORE, 8, &layout.show_fdinfo));
    body.push(load(8, 10, at(PRIVATE)));
    body.extend(read(COUNT, 8, &layout.count[0]));
    body.extend(read(COUNT_FLAGS, 8, &layout.count[1]));
    let [outer, number] = &layout.mount;
    body.extend([load(8, 10, at(MOUNT)), EbpfInstruction::add(8, -(outer.byte() as i32)), set(0, 0)]);
    body.push(store(10, 0, at(MOUNT)));
    body.extend(read(MOUNT, 8, number));
    for (step, place) in layout.bits.iter().enumerate() {
        body.extend(read(ASIDE, if step == 0 { 9 } else { 8 }, place));
        body.push(load(8, 10, at(ASIDE)));
    }
    body.extend([
        load(9, 10, at(NUMBER)),
        EbpfInstruction::shift_right(9, 6),
        EbpfInstruction::shift_left(9, 3),
        EbpfInstruction::add_register(8, 9),
    ]);
    body.extend(EbpfInstruction::read_kernel(at(CLOSING), 8, 8, 0));
    body.extend(layout.sockets.iter().flat_map(|plan| is_tcp(plan, &layout.inode_mode, at)));
    body.extend(EbpfInstruction::write_out(6, at(0), WORDS as i32 * 8));
    if let Some(plan) = &layout.sockets {
        let summary = write_summary(plan, at);
        body.extend([load(1, 10, at(SUMMARY)), EbpfInstruction::skip_unless(1, 1, summary.len())]);
        body.extend(summary);
    }
    // The walk's context: its output, the task, the descriptor's number, the file. At the end the last are none.
    let mut all = vec![
        load(6, 1, 0),
        load(9, 1, 8),
        EbpfInstruction::load_half(8, 1, 16),
        load(7, 1, 24),
        EbpfInstruction::skip_if(7, 0, body.len() + 1),
        EbpfInstruction::skip_if(9, 0, body.len()),
    ];
    all.extend(body);
    all.extend([set(0, 0), EbpfInstruction::exit()]);
    all
}

#[cfg(test)]
mod tests {
    use super::super::classify::Look;
    use super::*;
    use pod_runtime::sys::kcmp;
    use std::cmp::Ordering;

    /// What the kernel tells of many descriptors at once is what it tells of each, and sameness is that of kcmp.
    #[test]
    fn all_at_once_is_as_each_by_itself() {
        let survey = match Survey::load() {
            Ok(survey) => survey,
            Err(why) if bpf::is_not_there(&why) => {
                return pod_runtime::untested::here(format!("no BPF, or no BTF: {why}"));
            }
            Err(why) => panic!("a kernel with BPF does not tell of all descriptors at once: {why}"),
        };
        let folder = tempfile::tempdir().unwrap();
        let file = std::fs::File::create(folder.path().join("file")).unwrap();
        let locked = std::fs::File::create(folder.path().join("locked")).unwrap();
        descriptor::set_flock(locked.as_fd(), true).unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        let eventfds: Vec<OwnedFd> = (0..100).map(|_| descriptor::eventfd(false).unwrap()).collect();
        let mut all: Vec<OwnedFd> = vec![file.into(), locked.into(), reader.into(), writer.into()];
        all.push(inet::socket(libc::AF_INET6, libc::SOCK_DGRAM, 0).unwrap());
        all.push(std::os::unix::net::UnixDatagram::unbound().unwrap().into());
        all.push(descriptor::epoll().unwrap());
        all.extend(eventfds);
        all.extend(all.iter().step_by(3).map(|fd| fd.try_clone().unwrap()).collect::<Vec<_>>());
        let found = survey.of(std::process::id() as i32).unwrap();
        let seen: Vec<&Seen> =
            all.iter().map(|fd| found.iter().find(|seen| seen.number == fd.as_raw_fd()).unwrap()).collect();
        for (fd, seen) in all.iter().zip(&seen) {
            let look = Look::at(fd.as_fd()).unwrap();
            assert_eq!((seen.flags, seen.close_on_exec), (look.flags, true), "{}", look.name());
            if let Some(info) = &seen.info {
                assert_eq!((info.position, info.mount), (look.info.position, look.info.mount), "{}", look.name());
                assert!(look.info.locks().is_empty() && look.info.epoll().is_empty(), "{}", look.name());
            }
            if let Some((stat, link)) = &seen.plain {
                let of = |stat: &FileStat| (stat.st_dev, stat.st_ino, stat.st_mode);
                assert_eq!((of(stat), link), (of(&look.stat), &look.link));
            }
            assert_eq!(seen.eventfd.is_some(), look.name() == "anon_inode:[eventfd]");
        }
        assert!(seen[0].info.is_some() && seen[1].info.is_none() && seen[6].info.is_none());
        let me = std::process::id() as i32;
        for (one, first) in all.iter().zip(&seen) {
            for (other, second) in all.iter().zip(&seen) {
                let same = kcmp::compare_files(me, one.as_fd(), other.as_fd()).unwrap() == Ordering::Equal;
                assert_eq!(first.identity == second.identity, same);
            }
        }
    }
}
