//! What kind of mappings a process has, without a look at their pages.
//!
//! The flags of a mapping are in smaps only, and smaps counts the pages of each, which takes 30 ms for a GiB while a pod
//! stands still. A walk over the mappings that is run in the kernel (a BPF iterator) reads them as they are.
//!
//! * The kernel keeps flags as bits, and which bit is which is its own affair. It is learned from mappings of our own
//!   ([`Samples`]), of which smaps says the two letters in the order of the bits. Of a process with a bit that was not met there
//!   smaps is read.
//! * The other thing that smaps is read for is what has been shared since a fork. A mapping whose anonymous memory nobody
//!   else was ever forked with (the root of its `anon_vma` is its own and has no other child) shares none. In another one the
//!   pages are counted, as smaps does it, but in no other: each backend of a postgres has its whole buffer mapped. Of a process
//!   that lets the kernel merge its pages (KSM) smaps is read.
//!
//! It fails by not knowing, as [`crate::objects::task::glance`] does.

use super::pagemap::{self, ENTRIES, FRAME, MAPPED_ONCE, OF_A_FILE, PAGE, PRESENT, words};
use pod_runtime::proc;
use pod_runtime::proc::btf::Btf;
use pod_runtime::proc::maps::{self, Map};
use pod_runtime::sys::bpf::{self, EbpfInstruction};
use pod_runtime::sys::memory::Samples;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

/// From so many pages in memory on (64 MiB) the walk pays for its loading, some milliseconds.
const MANY: u64 = 16 << 10;
/// From so many on, once it is loaded; smaps of a smaller process is no more work.
const SOME: u64 = MANY / 16;
/// Flags that a 64-bit kernel has room for.
const BITS: usize = 64;

const MEMBERS: [(&str, &str); 6] = [
    ("vm_area_struct", "vm_start"),
    ("vm_area_struct", "vm_end"),
    ("vm_area_struct", "vm_flags"),
    ("vm_area_struct", "anon_vma"),
    ("anon_vma", "root"),
    ("anon_vma", "num_children"),
];
/// Words that are written of each mapping.
const WORDS: usize = MEMBERS.len();

/// The loaded walk, and what its bits mean.
pub struct Areas {
    program: OwnedFd,
    letters: [Option<[u8; 2]>; BITS],
}

/// One mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Area {
    start: u64,
    end: u64,
    flags: u64,
    /// Its anonymous pages are nobody else's.
    is_alone: bool,
}

static AREAS: OnceLock<Option<Areas>> = OnceLock::new();

/// How much of a process is in memory, in pages.
fn resident(process: i32) -> u64 {
    let text = proc::read(format!("/proc/{process}/statm")).unwrap_or_default();
    text.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0)
}

impl Areas {
    /// Loads the walk while the pod still runs, when it will be asked for.
    pub fn prepare(processes: &[i32]) {
        if processes.iter().any(|process| resident(*process) >= MANY) {
            let load = || Areas::load().inspect_err(|why| tracing::debug!(%why, "smaps is read of each process")).ok();
            AREAS.get_or_init(load);
        }
    }

    fn load() -> io::Result<Areas> {
        let (places, function) = Btf::of_this_kernel()?.places(&MEMBERS, "bpf_iter_task_vma");
        let at = |member: usize| places[member].filter(|place| place.bits == 64).map(|place| place.byte() as i32);
        let at: Vec<i32> = (0..WORDS).map_while(at).collect();
        let unknown = || io::Error::other("the kernel does not say where it keeps mappings");
        let (at, function) = <[i32; WORDS]>::try_from(at).ok().zip(function).ok_or_else(unknown)?;
        let program = bpf::load_task_walk(&program(&at), function)?;
        let mut areas = Areas { program, letters: [None; BITS] };
        let _samples = Samples::make();
        let own = std::process::id() as i32;
        let (told, seen) = (maps::parse(&proc::read("/proc/self/smaps")?), areas.walk(own)?);
        areas.learn(&told, &seen).then_some(areas).ok_or_else(|| io::Error::other("mappings are not as smaps says"))
    }

    /// From mappings of which both were said, as far as they were the same then; whether one never contradicts another.
    fn learn(&mut self, told: &[Map], seen: &[Area]) -> bool {
        let mut met = 0;
        for map in told {
            let Some(area) = seen.iter().find(|area| (area.start, area.end) == (map.start, map.end)) else { continue };
            let bits: Vec<usize> = (0..BITS).filter(|bit| area.flags >> bit & 1 != 0).collect();
            if bits.len() != map.flags.len() {
                // It has a key, which is no flag, or has changed meanwhile.
                continue;
            }
            met += 1;
            for (bit, letters) in bits.into_iter().zip(&map.flags) {
                if *self.letters[bit].get_or_insert(*letters) != *letters {
                    return false;
                }
            }
        }
        met > 0
    }

    fn walk(&self, process: i32) -> io::Result<Vec<Area>> {
        let bytes = bpf::walk_mappings(self.program.as_fd(), process, WORDS * 8)?;
        let words: Vec<u64> = words(&bytes).collect();
        let area = |words: &[u64]| {
            let [start, end, flags, anonymous, root, children] = words.try_into().expect("as many as are written");
            Area { start, end, flags, is_alone: anonymous == 0 || (root == anonymous && children == 1) }
        };
        Ok(words.chunks_exact(WORDS).map(area).collect())
    }

    /// `None` if smaps has to be asked.
    fn maps(&self, process: i32, text: &str) -> Option<Vec<Map>> {
        let mut maps = maps::parse(text);
        let mut pages = None;
        let seen = self.walk(process).ok()?;
        // That one is no mapping.
        let mut told: Vec<&mut Map> = maps.iter_mut().filter(|map| map.name != "[vsyscall]").collect();
        if told.len() != seen.len() {
            return None;
        }
        for (map, area) in told.iter_mut().zip(&seen) {
            if (map.start, map.end) != (area.start, area.end) {
                return None;
            }
            let bits = (0..BITS).filter(|bit| area.flags >> bit & 1 != 0);
            map.flags = bits.map(|bit| self.letters[bit]).collect::<Option<_>>()?;
            map.page_bytes = PAGE;
            // The size of huge pages is in smaps, and how much the kernel has merged (KSM); the rest says both.
            let same = (map.has(b"rd"), map.has(b"wr"), map.has(b"ex")) == (map.read, map.write, map.execute);
            if map.has(b"ht") || map.has(b"mg") || !same {
                return None;
            }
            if !area.is_alone && !map.shared {
                let pages = match &mut pages {
                    Some(pages) => pages,
                    none => none.insert(Pages::of(process).ok()?),
                };
                pages.count(map).ok()?;
            }
        }
        Some(maps)
    }
}

/// Of so many pages one at least is to be there.
const SPARSE: u64 = 8;
/// Counts that are read at once, of frames that are near each other.
const COUNTS: u64 = 64;

/// The pages of a process that stands still, and how often each is mapped.
struct Pages {
    pagemap: File,
    counts: File,
    /// So many pages, there or not, may be looked at: where next to nothing is there smaps is faster, which passes over holes.
    to_count: u64,
}

impl Pages {
    fn of(process: i32) -> io::Result<Pages> {
        let (pagemap, counts) = (File::open(format!("/proc/{process}/pagemap"))?, File::open("/proc/kpagecount")?);
        Ok(Pages { pagemap, counts, to_count: MANY + resident(process) * SPARSE })
    }

    /// What smaps says of a mapping: how much of it is in memory, and this mapping's part of it.
    fn count(&mut self, map: &mut Map) -> io::Result<()> {
        let pages = map.bytes() / PAGE;
        self.to_count = self.to_count.checked_sub(pages).ok_or(io::ErrorKind::FileTooLarge)?;
        (map.resident, map.anonymous, map.proportional) = (0, 0, 0);
        let mut several = Vec::new();
        let seen = pagemap::each(&self.pagemap, map.start..map.end, |_, entry| {
            if entry & PRESENT == 0 {
                return Ok(());
            }
            map.resident += PAGE;
            map.anonymous += if entry & OF_A_FILE == 0 { PAGE } else { 0 };
            if entry & MAPPED_ONCE != 0 {
                map.proportional += PAGE;
                return Ok(());
            }
            several.push(entry & FRAME);
            if several.len() == ENTRIES {
                map.proportional += self.parts(&mut several)?;
            }
            Ok(())
        })?;
        map.proportional += self.parts(&mut several)?;
        if seen == pages { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// This mapping's part of pages that several have, by their frames, of which none is left.
    fn parts(&self, several: &mut Vec<u64>) -> io::Result<u64> {
        several.sort_unstable();
        let mut frames = &several[..];
        let mut own = 0;
        while let Some(first) = frames.first() {
            let near = frames.partition_point(|frame| frame - first < COUNTS);
            let (some, rest) = frames.split_at(near);
            let mut counts = [0; COUNTS as usize * 8];
            let asked = (some[near - 1] - first + 1) as usize * 8;
            self.counts.read_exact_at(&mut counts[..asked], first * 8)?;
            let counts: Vec<u64> = words(&counts).collect();
            own += some.iter().map(|frame| PAGE / counts[(frame - first) as usize].max(1)).sum::<u64>();
            frames = rest;
        }
        several.clear();
        Ok(own)
    }
}

/// The mappings of a process that stands still, with their flags. What is in memory of them, and how much of it others have
/// too, is said only where that is something since a fork.
pub fn of(process: i32, read: impl Fn(&str) -> pod_runtime::Result<String>) -> pod_runtime::Result<Vec<Map>> {
    let areas = AREAS.get().and_then(Option::as_ref).filter(|_| resident(process) >= SOME);
    if let Some(areas) = areas
        && let Some(maps) = areas.maps(process, &read("maps")?)
    {
        return Ok(maps);
    }
    Ok(maps::parse(&read("smaps")?))
}

/// For each mapping its words.
fn program(at: &[i32; WORDS]) -> Vec<EbpfInstruction> {
    const RECORD: i32 = -((WORDS * 8) as i32);
    let read = EbpfInstruction::read_kernel;
    // r6: the output, r7: the mapping, r8: its anon_vma; where there is none, zeros are read.
    let mut body = Vec::new();
    for (word, at) in at.iter().enumerate() {
        let from = if MEMBERS[word].0 == "anon_vma" { 8 } else { 7 };
        body.extend(read(RECORD + word as i32 * 8, 8, from, *at));
        if MEMBERS[word].1 == "anon_vma" {
            body.push(EbpfInstruction::load(8, 10, RECORD + word as i32 * 8));
        }
    }
    body.extend(EbpfInstruction::write_out(6, RECORD, WORDS as i32 * 8));
    EbpfInstruction::for_each_mapping(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loaded() -> Option<Areas> {
        match Areas::load() {
            Ok(areas) => Some(areas),
            Err(why) if bpf::is_not_there(&why) => {
                pod_runtime::untested::here(format!("no BPF, or no BTF: {why}"));
                None
            }
            Err(why) => panic!("{why}"),
        }
    }

    /// What is looked at may be allocating just now.
    fn settled(look: impl Fn() -> Option<Vec<Map>>) -> Vec<Map> {
        let until = std::time::Instant::now() + std::time::Duration::from_secs(5);
        loop {
            if let Some(maps) = look() {
                return maps;
            }
            assert!(std::time::Instant::now() < until, "it is left to smaps");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    #[test]
    fn flags_are_as_smaps_says() {
        let Some(mut areas) = loaded() else { return };
        // Where the kernel has merged something, smaps is read: not here.
        let merged = areas.letters.iter().position(|letters| *letters == Some(*b"mg"));
        merged.into_iter().for_each(|bit| areas.letters[bit] = Some(*b"??"));
        let _samples = Samples::make();
        let own = std::process::id() as i32;
        let read = |file: &str| proc::read(format!("/proc/self/{file}")).unwrap();
        let maps = settled(|| areas.maps(own, &read("maps")));
        let told = maps::parse(&read("smaps"));
        let mut met = std::collections::BTreeSet::new();
        for map in maps.iter().filter(|map| map.name != "[vsyscall]") {
            // Whoever allocates meanwhile changes some.
            if let Some(told) = told.iter().find(|told| (told.start, told.end) == (map.start, map.end)) {
                let flags = map.flags.iter().map(|flag| if flag == b"??" { *b"mg" } else { *flag });
                assert_eq!(flags.collect::<Vec<_>>(), told.flags, "{map:?}");
                met.extend(map.flags.iter().map(|flag| String::from_utf8_lossy(flag).into_owned()));
            }
        }
        for flag in ["rd", "wr", "ex", "sh", "gd", "nr", "lo", "dc", "dd", "wf", "sr", "rr", "nh"] {
            assert!(met.contains(flag), "{flag} is not among {met:?}");
        }
    }

    /// More than the kernel says at a time, and one that is at the end of what it says.
    #[test]
    fn all_of_many_are_seen() {
        let Some(areas) = loaded() else { return };
        let program = "
import mmap, sys
held = [mmap.mmap(-1, 4096, prot=mmap.PROT_READ | (index % 2) * mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for index in range(int(sys.argv[1]))]
print('ready', flush=True)
sys.stdin.read()
";
        for many in [150, 700, 3000] {
            let mut process = std::process::Command::new("python3")
                .args(["-c", program, &many.to_string()])
                .stdin(std::process::Stdio::piped())
                .stdout(std::process::Stdio::piped())
                .spawn()
                .unwrap();
            let mut line = String::new();
            io::BufRead::read_line(&mut io::BufReader::new(process.stdout.as_mut().unwrap()), &mut line).unwrap();
            let read = |file: &str| proc::read(format!("/proc/{}/{file}", process.id())).unwrap();
            let maps = settled(|| areas.maps(process.id() as i32, &read("maps")));
            assert!(maps.len() > many, "{}", maps.len());
            for (map, told) in maps.iter().zip(&maps::parse(&read("smaps"))) {
                let same = (map.start, &map.flags) == (told.start, &told.flags);
                assert!(same || map.name == "[vsyscall]", "{map:?}");
            }
            drop(process.stdin.take());
            process.wait().unwrap();
        }
    }

    /// Three that share some of what they have, and what is left when two of them are gone.
    #[test]
    fn memory_that_children_have_too_is_counted_as_smaps_does() {
        let Some(areas) = loaded() else { return };
        let program = "
import mmap, os, signal, sys
held = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
held.write(b'x' * (1 << 20))
shared = mmap.mmap(-1, 1 << 20)
shared.write(b'x' * (1 << 20))
children = []
for child in range(2):
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        held.seek(0)
        held.write(b'y' * (len(children) + 1 << 16))
        os.write(tell, b'x')
        signal.pause()
    os.read(told, 1)
    children.append(child)
print(*children, flush=True)
sys.stdin.readline()
for child in children:
    os.kill(child, 9)
    os.waitpid(child, 0)
print('gone', flush=True)
sys.stdin.read()
";
        let mut parent = std::process::Command::new("python3")
            .args(["-c", program])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = parent.stdin.take().unwrap();
        let mut output = io::BufReader::new(parent.stdout.take().unwrap());
        let mut line = || {
            let mut line = String::new();
            io::BufRead::read_line(&mut output, &mut line).unwrap();
            line.trim().to_owned()
        };
        let read = |process: i32, file: &str| proc::read(format!("/proc/{process}/{file}")).unwrap();
        let is_as_told = |process: i32| {
            let counted = settled(|| areas.maps(process, &read(process, "maps")));
            let told = maps::parse(&read(process, "smaps"));
            assert_eq!(counted.len(), told.len());
            for (map, told) in counted.iter().zip(&told).filter(|(_, told)| !told.name.starts_with("[v")) {
                assert_eq!((map.start, &map.flags, &map.name), (told.start, &told.flags, &told.name));
                let (counted, exact) = (map.shared_since_fork(), told.shared_since_fork());
                // smaps rounds down to a KiB, and each part of a page is rounded here.
                assert!(counted.abs_diff(exact) <= 1024 + told.resident / PAGE, "{map:?}, and {told:?}");
                let is_candidate = |map: &Map| !map.shared && map.anonymous > 0 && map.proportional < map.resident;
                // Of a file's own pages any program that runs it has some, which is of no interest where nothing else is shared.
                if map.resident > 0 || told.inode == 0 {
                    assert_eq!(is_candidate(map), is_candidate(told), "{map:?}, and {told:?}");
                }
            }
            counted.iter().map(Map::shared_since_fork).sum::<u64>()
        };
        let pid = parent.id() as i32;
        let children: Vec<i32> = line().split(' ').map(|child| child.parse().unwrap()).collect();
        // Fourteen sixteenths are of all three.
        for process in [pid, children[0], children[1]] {
            assert!(is_as_told(process) >= 14 * (64 << 10) * 2 / 3);
        }
        io::Write::write_all(&mut input, b"\n").unwrap();
        assert_eq!(line(), "gone");
        assert_eq!(is_as_told(pid), 0);
        drop(input);
        parent.wait().unwrap();
    }

    #[test]
    fn what_contradicts_itself_is_not_believed() {
        let Some(mut areas) = loaded() else { return };
        areas.letters = [None; BITS];
        let map = |start, flags: &[&[u8; 2]]| Map {
            start,
            end: start + PAGE,
            flags: flags.iter().map(|flag| **flag).collect(),
            ..Map::default()
        };
        let area = |start, flags| Area { start, end: start + PAGE, flags, is_alone: true };
        let told = [map(0x1000, &[b"rd", b"wr"]), map(0x2000, &[b"rd", b"gd"])];
        assert!(areas.learn(&told, &[area(0x1000, 0b11), area(0x2000, 0b101)]));
        assert_eq!(areas.letters[..4], [Some(*b"rd"), Some(*b"wr"), Some(*b"gd"), None]);
        assert!(!areas.learn(&told, &[area(0x1000, 0b101)]));
        areas.letters = [None; BITS];
        assert!(!areas.learn(&told, &[area(0x5000, 0b11)]), "nothing was learned");
    }
}
