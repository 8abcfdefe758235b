//! The source side of a checkpoint and of a migration: what is written, in which order, and what holds the pod still
//! meanwhile.
//!
//! [`Capture`] sends while the pod runs; [`Still`] is a pod that is held still. Dropping either undoes all of it, and so
//! does the death of this process: the kernel lets the tasks go, the monitor notices that its client is gone, reads
//! stdio again and puts the pod back on the network.

use crate::connections::Connections;
use crate::dump::{DumpReport, dump};
use crate::freeze::{Frozen, Standstill};
use crate::ids::HostPid;
use crate::image::{Kind, Owner, PageRun, Writer};
use crate::laps::lap;
use crate::objects::files::socket::tcp::Silence;
use crate::objects::files::socket::tcp::closed::Closed;
use crate::objects::files::survey::Survey;
use crate::objects::files::{Holder, Outside};
use crate::objects::memory::WentAhead;
use crate::objects::memory::areas::Areas;
use crate::objects::memory::shared::Sharing;
use crate::objects::memory::tracking::{Pass, Tracker};
use crate::objects::namespaces::{cgroups, ipc, mounts, network, settings, uts};
use crate::objects::task::glance::Glance;
use crate::objects::task::waits::Observer;
use crate::restore::filler;
use crate::settle::{Settling, Unwritten};
use crate::storage::{self, Place, Sending, Sent};
use crate::watchdog::Watchdog;
use nix::fcntl::{Flock, FlockArg};
use nix::time::{ClockId, clock_gettime};
use pod_runtime::cgroup::Cgroup;
use pod_runtime::monitor::About;
use pod_runtime::monitor::client::{self, Hold, Throttle};
use pod_runtime::monitor::log::History;
use pod_runtime::network::{cable, port};
use pod_runtime::spec::Spec;
use pod_runtime::status::{ProcessKey, State, now, wrong_state};
use pod_runtime::store::Pod;
use pod_runtime::{Doing, Problem, Result};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a look takes at most.
const A_LOOK: Duration = Duration::from_secs(2);
/// Somebody else saves or moves the pod.
pub const BUSY: &str = "E-BUSY";
/// The log is sent in pieces of this size.
const PIECE: usize = 1 << 20;

/// The first record: whose image this is. State of SPEC.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Origin {
    pub spec: Spec,
    /// Of the program that wrote the image.
    pub version: String,
    pub host: String,
    /// Seconds since the epoch.
    pub written: u64,
}

/// State of MOMENT: the pod's clocks when it stopped, in nanoseconds, and what its monitor knew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    pub monotonic: i64,
    pub boottime: i64,
    pub realtime: i64,
    /// What `pod exec` had started.
    #[serde(default)]
    pub sessions: Vec<About>,
}

/// A pod that is being captured and runs meanwhile.
pub struct Capture {
    pod: Pod,
    spec: Spec,
    init: HostPid,
    cgroup: Cgroup,
    files: Sending,
    /// Bytes of the log that were sent.
    log: u64,
    /// Memory that is sent while the pod runs; shared memory if it is to be.
    ahead: WentAhead,
    shared_too: bool,
    observer: Observer,
    /// What control groups and settings say that nobody has touched, for a pod that may have.
    usual_groups: Option<cgroups::Usual>,
    usual_settings: Option<settings::Settings>,
    /// Only one tool saves or moves a pod at a time.
    _lock: Flock<File>,
}

/// What was captured, for the report.
#[derive(Debug, Clone, Default)]
pub struct Captured {
    pub dump: DumpReport,
    pub files: Sent,
    pub connections: Connections,
}

impl Capture {
    pub fn new(pod: &Pod) -> Result<Capture> {
        filler::wait(pod, || tracing::warn!("waiting until all memory of the pod is back from its checkpoint"))?;
        let spec = pod.spec()?;
        running(pod, &spec.name)?;
        // Who had the lock may have stopped it meanwhile.
        let lock = lock(pod, &spec.name)?;
        let init = running(pod, &spec.name)?;
        let cgroup = Cgroup::open(pod.id())?;
        Glance::begin(&cgroup.procs()?);
        let voice = crate::objects::task::check::voice(HostPid(init.pid));
        Ok(Capture {
            pod: pod.clone(),
            _lock: lock,
            files: Sending::new(pod, &spec, voice.0, &cgroup),
            cgroup,
            init: voice,
            spec,
            log: 0,
            ahead: WentAhead::default(),
            shared_too: false,
            observer: Observer::begin(pod.run_dir().parent().map(Path::to_path_buf).unwrap_or_default()),
            usual_groups: None,
            usual_settings: None,
        })
    }

    /// As [`Capture::new`], of a pod that somebody may only look at for a moment, as `pod check` does.
    pub fn soon(pod: &Pod) -> Result<Capture> {
        let end = Instant::now() + A_LOOK;
        loop {
            match Capture::new(pod) {
                Err(problem) if problem.code() == BUSY && Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                other => return other,
            }
        }
    }

    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    pub fn init(&self) -> HostPid {
        self.init
    }

    /// Its processes now, as this host numbers them.
    pub fn processes(&self) -> Vec<i32> {
        self.cgroup.procs().unwrap_or_default()
    }

    /// Spec, files and log as they are now; the pod runs on and changes them.
    pub fn first_pass<W: Write>(&mut self, w: &mut Writer<W>) -> Result<()> {
        let origin = Origin {
            spec: self.spec.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            host: host_name(),
            written: now(),
        };
        w.put(Kind::SPEC, 0, &origin)?;
        let inside = self.mounted_inside();
        self.files.ahead(w, inside)?;
        self.log(w, u64::MAX)
    }

    /// What comes goes to a host that takes changes of files, and file systems in memory while the pod runs; and shared memory,
    /// if it does that too.
    pub fn to_a_host(&mut self, shared_too: bool) {
        self.files.to_a_host();
        self.shared_too = shared_too;
    }

    /// Where the pod has mounted something itself. What cannot be moved of that may be gone until it stands still.
    fn mounted_inside(&self) -> Option<BTreeSet<Vec<u8>>> {
        let made = mounts::dump(&self.pod, self.init.0).ok()?;
        Some(made.into_iter().map(|mount| mount.at.into_vec()).collect())
    }

    /// Passes over the files while the pod runs, as far as they pay; one of them, where there is memory to be sent.
    fn catch_up<W: Write>(&mut self, w: &mut Writer<W>, once: bool) -> Result<()> {
        while self.files.is_stale() {
            let inside = self.mounted_inside();
            self.files.ahead(w, inside)?;
            if once {
                break;
            }
        }
        Ok(())
    }

    /// Sends the memory of processes that have so many bytes of it while the pod runs, over and over, for as long as `again`
    /// says so of a pass. Files that change meanwhile are sent once more. Returns whether there was anything to send.
    pub fn memory_ahead<W: Write>(
        &mut self,
        w: &mut Writer<W>,
        least: u64,
        mut again: impl FnMut(Pass) -> Result<bool>,
    ) -> Result<bool> {
        self.ahead.private = self.watch_memory(least)?;
        let shared = self.shared_too && Sharing::pays(&self.processes());
        if self.ahead.private.is_none() && !shared {
            self.catch_up(w, false)?;
            return Ok(false);
        }
        // Files first: memory is written faster.
        while again(self.memory_pass(shared, w)?)? {
            self.catch_up(w, true)?;
        }
        Ok(true)
    }

    /// What is left of memory when the pod stands still may come when it runs elsewhere.
    pub fn follow(&mut self) {
        self.ahead.may_follow = true;
    }

    /// All memory that may comes when the pod runs elsewhere; what may not, because it is shared, is sent now, once, and once more
    /// what changed meanwhile. As [`Capture::memory_ahead`] else.
    pub fn watch_memory_that_follows<W: Write>(&mut self, w: &mut Writer<W>, least: u64) -> Result<bool> {
        self.follow();
        if self.shared_too && Sharing::pays(&self.processes()) {
            for _ in 0..2 {
                let processes = self.processes();
                self.ahead.shared.pass(&processes, w)?;
            }
        }
        self.catch_up(w, false)?;
        self.ahead.private = self.watch_memory(least)?;
        Ok(self.ahead.private.is_some())
    }

    fn memory_pass<W: Write>(&mut self, shared: bool, w: &mut Writer<W>) -> Result<Pass> {
        let began = Instant::now();
        let processes = if shared { self.processes() } else { Vec::new() };
        let mut written = 0;
        if shared {
            written += self.ahead.shared.pass(&processes, w)?;
        }
        if let Some(tracker) = &mut self.ahead.private {
            written += tracker.pass(w)?;
        }
        let (compared, at_rest) = self.ahead.shared.compared();
        Ok(Pass { written, took: began.elapsed(), compared, at_rest })
    }

    /// Puts the memory of processes that have so many bytes of it under watch, for which they stand still for a moment. None
    /// where there is nothing that is worth it.
    pub(crate) fn watch_memory(&mut self, least: u64) -> Result<Option<Tracker>> {
        if !Tracker::pays(&self.processes(), least) {
            return Ok(None);
        }
        let cgroup = self.cgroup.clone();
        let processes = cgroup.procs()?;
        Glance::prepare(&processes);
        let waits = self.observer.observe(&processes);
        let watchdog = Watchdog::start();
        // What stands against it, if anything does, the freeze itself will say.
        let Ok(frozen) = Frozen::seize(self.init, || cgroup.procs(), &waits) else { return Ok(None) };
        let tracker = Tracker::begin(&frozen, least);
        frozen.thaw();
        drop(watchdog);
        Ok(tracker)
    }

    /// Holds the pod still: its stdio is not read any more, then its tasks stop. With `leaving`, at a moment at which no
    /// connection is between the kernel and a program, if there is one soon. One that was throttled is no more just before: a task
    /// that has used up what it may takes no order to stop until the next period.
    pub fn freeze(mut self, leaving: bool, mut throttle: Option<Throttle>) -> Result<Still> {
        self.usual_groups = cgroups::usual(&self.spec.security, &self.cgroup)?;
        self.usual_settings = settings::usual(&self.spec)?;
        let settling = leaving.then(|| Settling::begin(self.init, &self.cgroup, &self.spec));
        let unwritten = Unwritten::begin(self.init);
        let cgroup = self.cgroup.clone();
        let processes = cgroup.procs()?;
        Areas::prepare(&processes);
        Glance::prepare(&processes);
        Survey::prepare(&processes);
        ipc::prepare(self.init.0);
        let hold = if leaving { client::hold_leaving(&self.pod)? } else { client::hold(&self.pod, false)? };
        let observer = &mut self.observer;
        let mut servers = BTreeSet::new();
        let frozen = loop {
            let processes = cgroup.procs()?;
            let waits = observer.observe(&processes);
            drop(throttle.take());
            let frozen = if servers.is_empty() {
                Frozen::seize(self.init, || cgroup.procs(), &waits)?
            } else {
                let then = || {
                    unwritten.drain();
                    observer.observe(&Vec::from_iter(servers.iter().copied()))
                };
                Frozen::seize_last(self.init, || cgroup.procs(), waits, &servers, then)?
            };
            let unaccepted = settling.as_ref().filter(|settling| !settling.ready());
            if unaccepted.is_none() && unwritten.ready() {
                break frozen;
            }
            drop(frozen);
            servers = unwritten.servers(&processes);
            match unaccepted {
                Some(settling) => settling.accept(),
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        let since = frozen.since();
        if let Some(settling) = &settling {
            // Not later: when another host draws the pod's frames, it has the acknowledgements too.
            settling.drain();
            let locked = cable::link_of(&self.spec).filter(|_| hold.opens_port).map(|link| port::lock(&link));
            if let Some(Err(problem)) = locked {
                tracing::debug!("{}", problem.chain());
            }
        }
        Ok(Still { frozen, hold, settling, capture: self, since })
    }

    /// The log from where it was sent to, up to `end`.
    fn log<W: Write>(&mut self, w: &mut Writer<W>, end: u64) -> Result<()> {
        let here = || format!("read {}", self.pod.log_path().display());
        let history = History::open(&self.pod.dir()).doing(here)?;
        let end = end.min(history.end().doing(here)?);
        let mut buffer = vec![0; PIECE];
        loop {
            // What was rotated away is not there any more.
            self.log = history.settle(self.log).doing(here)?;
            let most = PIECE.min(end.saturating_sub(self.log) as usize);
            let n = history.raw(&mut buffer[..most], self.log).doing(here)?;
            if n == 0 {
                break;
            }
            let run = PageRun { owner: Owner::Log, address: self.log, bytes: n as u64 };
            w.pages(run, &[&buffer[..n]])?;
            self.log += n as u64;
        }
        Ok(())
    }
}

/// A pod that is held still: nothing of it runs.
///
/// The order of the fields is the order of letting go: the tasks first, then the monitor's hold, whose end puts the pod
/// back on the network.
pub struct Still {
    frozen: Frozen,
    hold: Hold,
    /// Of a pod that is to leave.
    settling: Option<Settling>,
    capture: Capture,
    since: Instant,
}

/// Why a pod is not stopped for good.
#[derive(Debug)]
pub struct NotStopped {
    pub problem: Problem,
    /// And why it does not go on either: its status says that it stands still for the job.
    pub held: Option<Problem>,
}

impl Still {
    /// How long it has been still.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// What changed since the first pass, then everything else. After it the stream lacks nothing but its end.
    ///
    /// Before the sockets are looked at, the pod leaves the network. Until then its kernel goes on acknowledging what
    /// arrives; `may_leave` returns when somebody else holds the frames that come later.
    pub fn dump<W: Write>(&mut self, w: &mut Writer<W>, may_leave: impl FnOnce() -> Result<()>) -> Result<Captured> {
        self.frozen.look()?;
        lap("look");
        let maps = self.frozen.processes().iter().map(|process| &process.maps[..]);
        self.capture.files.at_rest(w, maps)?;
        lap("files");
        self.capture.log(w, self.hold.log)?;
        lap("log");
        let sessions = self.hold.ends.sessions.iter().map(|session| session.about.clone()).collect();
        let moment = moment(self.capture.init, sessions)?;
        self.frozen.clock_stands(Standstill { here: Instant::now(), monotonic: moment.monotonic });
        w.put(Kind::MOMENT, 0, &moment)?;
        lap("moment");
        if let Some(network) = network::dump(&self.capture.spec, self.capture.init.0)? {
            w.put(Kind::NETWORK, 0, &network)?;
        }
        let capture = &self.capture;
        let made = settings::dump(&capture.spec, capture.usual_settings.as_ref(), capture.init.0)?;
        if !made.is_empty() {
            w.put(Kind::SETTINGS, 0, &made)?;
        }
        if let Some(names) = uts::dump(&self.capture.spec.security, self.capture.init.0)? {
            w.put(Kind::UTS, 0, &names)?;
        }
        lap("namespaces");
        self.in_memory(w)?;
        w.flush()?;
        lap("file systems in memory");
        may_leave()?;
        lap("hold");
        let mut unsaved = self.settling.as_ref().map(Settling::still_unsaved).unwrap_or_default();
        let closed = self.closed(unsaved.closed);
        lap("closed connections");
        self.hold.cut()?;
        lap("cut");
        let (closed, lost) = closed.settled();
        unsaved.closing += lost;
        let (security, usual) = (&self.capture.spec.security, self.capture.usual_groups.as_ref());
        let groups = cgroups::dump(security, &self.capture.cgroup, usual, self.frozen.processes())?;
        if !groups.is_empty() {
            w.put(Kind::CGROUPS, 0, &groups)?;
        }
        lap("groups");
        let outside = Outside { closed, ..outside(&self.hold, self.capture.pod.upper_dir())? };
        lap("outside");
        let mut dump = dump(&mut self.frozen, &self.capture.cgroup, outside, &mut self.capture.ahead, w)?;
        if unsaved.closing > 0 {
            let lost = format!("{} connections that were being closed are not kept", unsaved.closing);
            dump.warnings.push(lost);
        }
        lap("pages");
        let tracked = network::downgrade(&self.capture.spec, self.capture.init.0);
        dump.warnings.extend(tracked.map(|problem| format!("{}: {}", problem.code(), problem.chain())));
        let connections = match self.settling {
            Some(_) => {
                let network = self.capture.pod.store().network_dir()?;
                Connections::tally(&self.capture.spec, &network, &dump.peers, &unsaved)
            }
            None => Connections { kept: dump.peers.len() as u64, ..Connections::default() },
        };
        lap("downgrades");
        Ok(Captured { dump, files: self.capture.files.done(), connections })
    }

    /// Asks connections that are closed, of which there are so many, for what must be known of them. Nothing may come in
    /// meanwhile that makes it wrong, and nobody else may hear them: a client that has ended its half in this very moment
    /// knows nothing of the connection any more, and would answer with a reset.
    fn closed(&self, counted: u32) -> Closed {
        if let Some(link) = cable::link_of(&self.capture.spec).filter(|_| counted > 0 && self.hold.opens_port) {
            match port::mute(&link) {
                Ok(true) => {}
                Ok(false) => tracing::debug!("the states of the bridge's ports are not ours to set: answers go out"),
                Err(problem) => tracing::debug!("{}", problem.chain()),
            }
        }
        Closed::ask(counted, &self.capture.spec, self.capture.init)
    }

    /// What wanted to begin a connection since the gate was closed: to be handed to the pod where it runs on.
    pub fn knocks(&self) -> Vec<ByteBuf> {
        self.settling.as_ref().map(Settling::knocks).unwrap_or_default()
    }

    /// Mounts that were made inside, and what is in memory file systems: each mount before the contents that come into it,
    /// and after those of the one that it lies in.
    fn in_memory<W: Write>(&mut self, w: &mut Writer<W>) -> Result<()> {
        let init = self.capture.init.0;
        let mut mounts = mounts::dump(&self.capture.pod, init)?;
        for (place, tree) in storage::layers_in_memory(init)? {
            let made = |mount: &mounts::Inside| place == Place::Memory(mount.at.clone());
            if let Some(last) = mounts.iter().position(made) {
                let rest = mounts.split_off(last + 1);
                w.put(Kind::MOUNTS, 0, &mounts)?;
                mounts = rest;
            }
            self.capture.files.in_memory(w, place, &tree)?;
        }
        if mounts.is_empty() { Ok(()) } else { w.put(Kind::MOUNTS, 0, &mounts) }
    }

    /// Stops the pod in a way that outlives this process: for the commit.
    ///
    /// First it is written down for which job, or nobody would let a pod go that this process was killed in the middle of
    /// stopping.
    pub fn stop_for_good(&mut self, job: &str) -> Result<(), Box<NotStopped>> {
        let (pod, cgroup) = (&self.capture.pod, &self.capture.cgroup);
        let written = pod.update_quickly(|status| {
            status.state = State::Migrating;
            status.job = Some(job.to_owned());
        });
        written.map_err(|problem| Box::new(NotStopped { problem, held: None }))?;
        let frozen = cgroup.freeze(Duration::from_secs(5));
        frozen.map_err(|problem| Box::new(NotStopped { problem, held: go_on(pod, cgroup, job).err() }))
    }

    /// Undoes [`Still::stop_for_good`].
    pub fn resume(self, job: &str) -> Result<()> {
        go_on(&self.capture.pod, &self.capture.cgroup, job)
    }

    /// The pod runs elsewhere: lets go of the tasks, which the cgroup keeps frozen, and has the monitor bury them. The job
    /// began at that second.
    pub fn moved(self, job: &str, began: u64, to: &str) -> Result<()> {
        let Still { frozen, hold, settling, capture, .. } = self;
        let silence = silence(&frozen);
        drop(frozen);
        let moved = hold.moved(to);
        settling.into_iter().for_each(|mut settling| settling.moved());
        // The tasks are gone: the last reference to each connection is ours.
        drop(silence);
        match moved {
            Err(problem) if problem.code() == "E-MONITOR" => {
                pod_runtime::lifecycle::moved(&capture.pod, job, began, to)
            }
            other => other,
        }
    }

    /// Leaves everything as it is, frozen by its cgroup: nobody knows where the pod runs.
    pub fn leave(self) {
        drop(self);
    }

    /// Kills the pod while it is still: after a checkpoint that was to be its end.
    pub fn kill(self) -> Result<()> {
        let Still { frozen, hold, capture, .. } = self;
        capture.cgroup.freeze(Duration::from_secs(5))?;
        let silence = silence(&frozen);
        drop(frozen);
        let killed = pod_runtime::lifecycle::kill_now(&capture.pod);
        drop(silence);
        if killed.is_ok() {
            hold.over();
        }
        killed
    }
}

/// The first process of a pod that can be saved or moved.
fn running(pod: &Pod, name: &str) -> Result<ProcessKey> {
    let status = pod.status()?;
    if let Some(init) = status.init.filter(|_| status.state == State::Running) {
        return Ok(init);
    }
    if let Some(to) = status.moved_to.filter(|_| status.state == State::Moved) {
        return Err(pod_runtime::monitor::moved_problem(name, &to));
    }
    let problem = wrong_state(name, status.state, "running");
    Err(match status.state {
        State::Paused => problem.fix(format!("pod unpause {name}")),
        _ => problem,
    })
}

/// In the run directory, which goes with the pod.
pub(crate) fn lock(pod: &Pod, name: &str) -> Result<Flock<File>> {
    let path = pod.run_dir().join("capture.lock");
    let open = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let file = open.doing(|| format!("open {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| {
        Problem::new(BUSY, format!("pod '{name}' is being saved or moved already"))
            .because(error)
            .fix("wait for it; `pod job ls` shows moves")
    })
}

/// Lets a pod go on that was stopped for the commit of a job which did not happen. What says for which job it stands still
/// goes last: whoever finds that does the rest. A pod that ends as soon as it may stays ended.
pub(crate) fn go_on(pod: &Pod, cgroup: &Cgroup, job: &str) -> Result<()> {
    cgroup.thaw()?;
    let written = pod.update_quickly(|status| {
        if status.is_leaving(job) {
            status.state = State::Running;
            status.job = None;
        }
    });
    if pod.dir().exists() { written.map(drop) } else { Ok(()) }
}

/// What the monitor holds of the pod's files.
fn outside(hold: &Hold, upper: PathBuf) -> Result<Outside> {
    let mut outside = Outside::new(Some(upper));
    let mut add = |number, holder| hold.end(number)?.map_or(Ok(()), |end| outside.add(end, holder));
    let ends = &hold.ends;
    let own = [(ends.console, 0), (ends.stdin, 0), (ends.stdout, 1), (ends.stderr, 2)];
    for (number, which) in own.into_iter().filter_map(|(number, which)| Some((number?, which))) {
        add(number, Holder::Pod(which))?;
    }
    for number in &ends.others {
        add(*number, Holder::Nobody)?;
    }
    for session in &ends.sessions {
        // Console and stdin are 0.
        for (number, which) in session.numbers.iter().zip([0, 0, 1, 2]).filter_map(|(n, which)| Some(((*n)?, which))) {
            add(number, Holder::Session(session.about.id, which))?;
        }
    }
    Ok(outside)
}

/// The same for a look at a pod that runs: held for a moment only.
pub(crate) fn outside_now(pod: &Pod) -> Result<Outside> {
    outside(&client::hold(pod, false)?, pod.upper_dir())
}

/// The pod's clocks now.
fn moment(init: HostPid, sessions: Vec<About>) -> Result<Moment> {
    let offsets = fs::read_to_string(format!("/proc/{init}/timens_offsets")).unwrap_or_default();
    let offset = |name: &str| -> i64 {
        let line = offsets.lines().find_map(|line| line.strip_prefix(name));
        let mut numbers = line.unwrap_or("").split_ascii_whitespace().map(|n| n.parse::<i64>().unwrap_or(0));
        numbers.next().unwrap_or(0) * 1_000_000_000 + numbers.next().unwrap_or(0)
    };
    Ok(Moment {
        monotonic: clock(ClockId::CLOCK_MONOTONIC)? + offset("monotonic"),
        boottime: clock(ClockId::CLOCK_BOOTTIME)? + offset("boottime"),
        realtime: clock(ClockId::CLOCK_REALTIME)?,
        sessions,
    })
}

pub(crate) fn clock(id: ClockId) -> Result<i64> {
    let time = clock_gettime(id).doing(|| "read a clock".into())?;
    Ok(time.tv_sec() * 1_000_000_000 + time.tv_nsec())
}

/// Its connections end without a word to their peers, who go on with the copy.
fn silence(frozen: &Frozen) -> Silence {
    Silence::of(frozen.processes().iter().map(|process| process.host))
}

pub(crate) fn host_name() -> String {
    nix::unistd::gethostname().map_or_else(|_| String::new(), |name| name.to_string_lossy().into_owned())
}
