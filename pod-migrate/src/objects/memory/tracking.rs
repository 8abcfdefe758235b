//! Memory that is sent while the pod runs, and which of it still holds when the pod has stopped.
//!
//! A [`Tracker`] has the kernel note writes to the private anonymous memory of large processes: a userfaultfd of each,
//! with asynchronous write protection (nobody handles a fault: the kernel notes it and goes on). A pass protects what was
//! written since the pass before and then reads it; what is written meanwhile is the next pass's. At the end, with
//! the pod frozen, [`Tracker::kept`] is what was sent and not written since.
//!
//! Whatever is not known for certain was written: memory that is new or was moved (it is under no userfaultfd), a process
//! that made itself a new address space (the same), pages that could not be read, a pass that failed. Closing the
//! userfaultfd, also by being killed, leaves the process as it was.
//!
//! Where the kernel cannot do it (before Linux 6.7) nothing is sent ahead, and where a process cannot (no free
//! descriptor, a program that uses userfaultfd itself) nothing of that process.

use super::Places;
use super::dump::{Place, Private};
use super::forked::{self, Member};
use super::pages::{self, Zeros};
use super::ranges::Ranges;
use crate::freeze::{Frozen, Process};
use crate::ids::{HostPid, MmId, TaskFd};
use crate::image::{Kind, Writer};
use crate::remote::{Borrowed, RemoteCall};
use pod_runtime::proc::maps::{self, Map};
use pod_runtime::sys::memory::{self, Look};
use pod_runtime::sys::ptrace;
use pod_runtime::sys::userfault::{self, Userfault};
use pod_runtime::{Doing, Problem, Result, proc};
use std::fs::{self, File};
use std::io::Write;
use std::time::{Duration, Instant};

/// A process with less memory of its own is not worth it: to watch it the pod is stopped once more, for some two milliseconds.
/// A checkpoint copies this much in six.
pub const LEAST_TO_COPY: u64 = 32 << 20;
/// ssh takes three for this.
pub const LEAST_TO_SEND: u64 = 1 << 20;
/// Places that are named ahead hold so much at least, and are so many at most.
const LARGE: u64 = 1 << 20;
const MOST_PLACES: usize = 512;
/// How long a process may take to make a descriptor.
const PATIENCE: Duration = Duration::from_millis(200);
/// Pages that are a process's own, as [`pages`] looks for them.
const THERE: u64 = memory::PAGE_IS_PRESENT | memory::PAGE_IS_SWAPPED;
const NOT_ITS_OWN: u64 = memory::PAGE_IS_FILE | memory::PAGE_IS_PFNZERO;
/// The same in memory that is no file's. Whether a page is a file's the kernel has to look up page by page, which takes
/// six times as long (23 ms for a GiB) as all else, which is in the table that it walks through.
const NOT_ITS_OWN_OF_NO_FILE: u64 = memory::PAGE_IS_PFNZERO;

/// The memory of a pod's large processes under watch.
pub struct Tracker {
    processes: Vec<Tracked>,
    passes: u32,
}

struct Tracked {
    mm: MmId,
    host: HostPid,
    name: String,
    fault: Userfault,
    pagemap: File,
    /// What was put under watch.
    watched: Ranges,
    /// What was sent and, as far as is known, not written since.
    sent: Ranges,
    /// It has pages that others have too, since a fork.
    forked: bool,
}

/// What a pass did.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pass {
    /// Bytes of pages that had been written.
    pub written: u64,
    pub took: Duration,
    /// Of that, to find out what had been written by comparing; and how long that will take when the pod stands still.
    pub compared: Duration,
    pub at_rest: Duration,
}

impl Tracker {
    /// Puts the large ones of these processes, which stand still, under watch. `None` when there are none, or it cannot
    /// be done here.
    pub fn begin(frozen: &Frozen, least: u64) -> Option<Tracker> {
        let large: Vec<&Process> = frozen.processes().iter().filter(|process| own_memory(process) >= least).collect();
        if large.is_empty() || !Userfault::can_notice() {
            return None;
        }
        let track = |process: &Process| {
            let tracked = Tracked::begin(process);
            let why = |problem: &Problem| tracing::debug!(problem = problem.chain(), "memory is not sent ahead");
            tracked.inspect_err(why).ok()
        };
        let processes: Vec<Tracked> = large.into_iter().filter_map(track).collect();
        (!processes.is_empty()).then_some(Tracker { processes, passes: 0 })
    }

    /// Whether a pod has memory that is worth it, by a look from outside.
    pub fn pays(processes: &[i32], least: u64) -> bool {
        processes.iter().any(|host| own_memory_of(*host) >= least)
    }

    /// Sends what was written since the pass before; at first everything. The pod runs. Returns how many bytes that were.
    pub fn pass(&mut self, w: &mut Writer<impl Write>) -> Result<u64> {
        let zeros = if self.passes == 0 { Zeros::LeftOut } else { Zeros::Sent };
        self.passes += 1;
        if self.passes == 1 {
            self.processes.iter_mut().try_for_each(|tracked| tracked.places(w))?;
        }
        let mut spaces = Vec::with_capacity(self.processes.len());
        for tracked in &mut self.processes {
            spaces.push(tracked.written());
        }
        if self.passes == 1 {
            self.leave_out_what_others_send(&mut spaces);
        }
        let written = spaces.iter().filter_map(|space| space.only.as_ref()).map(Ranges::bytes).sum();
        let missed = pages::send_ahead(&spaces, zeros, w)?;
        for (tracked, space) in self.processes.iter_mut().zip(spaces) {
            let not_read = missed.iter().filter(|(mm, _)| *mm == tracked.mm).map(|(_, range)| range.clone());
            let read = space.only.unwrap_or_default().without(&Ranges::of_any(not_read));
            tracked.sent = tracked.sent.with(&read);
        }
        w.flush()?;
        Ok(written)
    }

    /// How much was written since this was asked last, at first everything. Nothing is sent.
    pub fn look(&mut self) -> u64 {
        self.processes.iter_mut().filter_map(|tracked| tracked.written().only).map(|only| only.bytes()).sum()
    }

    /// What processes have from others since a fork is not sent for each, unless they write to it. They run: that what is
    /// found here is what it seems to be does not matter, for what is left out now is sent in the end, if nobody else has it.
    fn leave_out_what_others_send(&self, spaces: &mut [Private]) {
        let text = |tracked: &Tracked| proc::read(format!("/proc/{}/smaps", tracked.host)).unwrap_or_default();
        if self.processes.iter().filter(|tracked| tracked.forked).count() < 2 {
            return;
        }
        let maps: Vec<_> = self.processes.iter().map(|tracked| maps::parse(&text(tracked))).collect();
        let of = self.processes.iter().zip(&maps);
        let members = of.map(|(tracked, maps)| Member { mm: tracked.mm, host: tracked.host.0, maps });
        let claims = forked::find(&members.collect::<Vec<_>>()).unwrap_or_default();
        for space in spaces {
            let Some(claims) = claims.get(&space.mm) else { continue };
            let others = Ranges::of(claims.iter().map(|claim| claim.range.clone()));
            space.only = space.only.as_ref().map(|only| only.without(&others));
        }
    }

    /// Whether a map is under userfaultfd because we put it there.
    pub(super) fn watches(&self, host: HostPid, map: &Map) -> bool {
        self.of(host).is_some_and(|tracked| tracked.watched.touches(&(map.start..map.end)))
    }

    /// Divides the pages of a process that stands still: what came ahead and still holds, and the rest.
    pub(super) fn kept(&self, host: HostPid, places: &[Place]) -> Result<Option<(Ranges, Ranges)>> {
        let Some(tracked) = self.of(host) else { return Ok(None) };
        let tell = memory::PAGE_IS_WATCHED | memory::PAGE_IS_WRITTEN;
        let mut regions = Vec::new();
        for over_a_file in [false, true] {
            let not = if over_a_file { NOT_ITS_OWN } else { NOT_ITS_OWN_OF_NO_FILE };
            let look = Look { any: THERE, not, tell, ..Look::default() };
            let of_those = places.iter().filter(|place| place.over_a_file == over_a_file);
            for place in Ranges::of(of_those.map(|place| place.range.clone())).iter() {
                let found = memory::look_for_pages(&tracked.pagemap, place.start, place.end, &look);
                let found = found.doing(|| format!("find the pages of {}", tracked.name))?;
                regions.extend(found.into_iter().map(|region| (region, over_a_file)));
            }
        }
        let range = |(region, _): &(memory::PageRegion, bool)| region.start..region.end;
        let is_clean = |(region, over_a_file): &&(memory::PageRegion, bool)| {
            region.categories == memory::PAGE_IS_WATCHED && !over_a_file
        };
        let kept = Ranges::of(regions.iter().filter(is_clean).map(range)).both(&tracked.sent);
        let rest = Ranges::of_any(regions.iter().map(range)).without(&kept);
        Ok(Some((kept, rest)))
    }

    fn of(&self, host: HostPid) -> Option<&Tracked> {
        self.processes.iter().find(|tracked| tracked.host == host)
    }
}

impl Tracked {
    fn begin(process: &Process) -> Result<Tracked> {
        let fault = userfault(process)?;
        let path = process.proc("pagemap");
        Ok(Tracked {
            mm: MmId(process.pid.0 as u64),
            host: process.host,
            name: process.name(),
            fault,
            pagemap: File::open(&path).doing(|| format!("open {}", path.display()))?,
            watched: Ranges::default(),
            sent: Ranges::default(),
            forked: false,
        })
    }

    /// The PLACES record.
    fn places(&mut self, w: &mut Writer<impl Write>) -> Result<()> {
        let maps = maps::parse(&proc::read(format!("/proc/{}/smaps", self.host)).unwrap_or_default());
        self.forked = maps.iter().any(|map| map.shared_since_fork() > 0);
        let plain =
            |map: &&Map| is_sent_ahead(map) && map.write && !map.has(b"gd") && !map.has(b"dp") && !map.has(b"hg");
        let ranges = Ranges::of(maps.iter().filter(plain).map(|map| map.start..map.end));
        let large = ranges.iter().filter(|range| range.end - range.start >= LARGE);
        let ranges = large.map(|range| (range.start, range.end)).take(MOST_PLACES).collect();
        w.put(Kind::PLACES, self.mm.0, &Places { ranges })
    }

    /// What was written since it was asked last; from now on that counts as not written.
    fn written(&mut self) -> Private {
        // A process that has ended has none.
        let maps = maps::parse(&proc::read(format!("/proc/{}/maps", self.host)).unwrap_or_default());
        let places: Vec<_> = maps.iter().filter(|map| is_sent_ahead(map)).map(|map| map.start..map.end).collect();
        let (mut found, mut new) = (Vec::new(), Vec::new());
        for place in &places {
            match self.protect(place, &mut new) {
                Ok(regions) => found.extend(regions.iter().map(|region| region.start..region.end)),
                Err(error) => {
                    tracing::debug!(name = self.name, start = place.start, %error, "not sent ahead");
                    self.sent = self.sent.without(&Ranges::one(place.clone()));
                }
            }
        }
        // All at once: a process may have ten thousand.
        self.watched = self.watched.with(&Ranges::of_any(new));
        let only = Ranges::of(found);
        self.sent = self.sent.without(&only);
        let place = |range| Place { range, readable: true, over_a_file: false, forked: self.forked };
        let places = places.into_iter().map(place).collect();
        // One that cannot be opened is that of a process which has ended: nothing of it can be read in any way.
        let gently = if self.forked { File::open(format!("/proc/{}/mem", self.host)).ok() } else { None };
        let (early, left_out) = <(Ranges, Ranges)>::default();
        Private {
            mm: self.mm,
            host: self.host.0,
            name: self.name.clone(),
            places,
            only: Some(only),
            early,
            left_out,
            gently,
            can_wait: Ranges::default(),
        }
    }

    /// `new` is what is under watch from now on.
    fn protect(
        &self,
        place: &std::ops::Range<u64>,
        new: &mut Vec<std::ops::Range<u64>>,
    ) -> std::io::Result<Vec<memory::PageRegion>> {
        let all = Look { any: THERE, not: NOT_ITS_OWN_OF_NO_FILE, protect: true, ..Look::default() };
        let scan = |look| memory::look_for_pages(&self.pagemap, place.start, place.end, &look);
        scan(Look { all: memory::PAGE_IS_WRITTEN, ..all }).or_else(|_| {
            // Not under watch yet, or not any more: new maps are not. Of what was protected before the scan came to such a
            // place nobody knows whether it had been written, so all of it counts.
            self.fault.notice(place.start, place.end - place.start)?;
            new.push(place.clone());
            scan(all)
        })
    }
}

/// Readable, private and of no file.
fn is_sent_ahead(map: &Map) -> bool {
    map.read && !map.shared && map.inode == 0 && !map.name.starts_with("[v")
}

/// A userfaultfd that the process makes. It may not keep it, also if we are killed meanwhile: so the same table of calls
/// that makes it waits until we have taken our copy, and then closes it.
fn userfault(process: &Process) -> Result<Userfault> {
    let doing = || format!("watch the memory of {}", process.name());
    let number = free_descriptor(process).doing(doing)?;
    let maps = maps::parse(&process.text("maps")?);
    let mut borrowed = Borrowed::enter(process, &maps)?;
    let wait = PATIENCE.as_nanos() as u64;
    let time = [0u64.to_ne_bytes(), wait.to_ne_bytes()].concat();
    // Waits for no signal at all: it ends with the time, or with the interrupt that says that we have it.
    let until = vec![crate::remote::Arg::In(vec![0; 8]), 0.into(), crate::remote::Arg::In(time), 8.into()];
    let mut calls = [
        RemoteCall::new("userfaultfd", libc::SYS_userfaultfd, vec![userfault::FLAGS.into()]).may_fail(),
        RemoteCall::new("wait", libc::SYS_rt_sigtimedwait, until).may_fail(),
        RemoteCall::new("close", libc::SYS_close, vec![number.into()]).may_fail(),
    ];
    let leader = process.leader();
    borrowed.start(leader, &calls)?;
    let taken = take(process, TaskFd(number));
    let interrupted = ptrace::interrupt(leader.host.0).doing(doing);
    borrowed.finish(leader, &mut calls)?;
    borrowed.leave()?;
    interrupted?;
    if let Some(error) = calls[0].error() {
        return Err(error).doing(doing);
    }
    if calls[0].result != i64::from(number) {
        return Err(Problem::new("E-SYSTEM", format!("{}: another descriptor was made", doing())));
    }
    let fd = taken.ok_or_else(|| Problem::new("E-SYSTEM", format!("{}: it took too long", doing())))?;
    Userfault::noticing(fd).doing(doing)
}

/// The descriptor, as soon as the process waits for us.
fn take(process: &Process, number: TaskFd) -> Option<std::os::fd::OwnedFd> {
    let end = Instant::now() + PATIENCE;
    let call = process.leader().proc("syscall");
    let waits = || {
        let text = proc::read(&call).unwrap_or_default();
        text.split(' ').next().and_then(|number| number.parse().ok()) == Some(libc::SYS_rt_sigtimedwait)
    };
    while !waits() {
        if Instant::now() > end {
            return None;
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    process.take(number).ok()
}

/// The number that the process's next descriptor gets.
fn free_descriptor(process: &Process) -> std::io::Result<i32> {
    let entries = fs::read_dir(process.proc("fd"))?;
    let mut taken: Vec<i32> = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    taken.sort_unstable();
    let free = taken.iter().zip(0..).take_while(|(fd, at)| **fd == *at).count() as i32;
    let limits = proc::read(process.proc("limits"))?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    let most = line.and_then(|line| line.split_ascii_whitespace().next()?.parse::<i32>().ok());
    match most {
        Some(most) if free >= most => Err(std::io::Error::from_raw_os_error(libc::EMFILE)),
        _ => Ok(free),
    }
}

fn own_memory(process: &Process) -> u64 {
    own_memory_of(process.host.0)
}

/// Bytes of private anonymous memory that are there or swapped out.
fn own_memory_of(host: i32) -> u64 {
    own_memory_by(&proc::read(format!("/proc/{host}/status")).unwrap_or_default())
}

/// The same, by /proc/PID/status.
pub fn own_memory_by(status: &str) -> u64 {
    let of = |name| proc::amount(status, name).unwrap_or(0);
    of("RssAnon:").saturating_add(of("VmSwap:"))
}
