//! What became of each move, on disk: `DATA/jobs/ID.json` on both hosts, under the same id.
//!
//! The destination's entry decides. It goes from `Receiving` to `Running` when the COMMIT arrives or to `Aborted` when
//! anything else happens, once, under a lock, and is on the disk before anybody is told. All other entries only matter
//! as long as the host is up (with it go the processes that they are about), so they are not waited for: after a power cut
//! they say what was once true. Who asks about a job that is still `Receiving` makes it `Aborted`, and so does who finds
//! an entry that cannot be read: one that says `Running` was on the disk as `Receiving`
//! before, and differs from that in a word of its first sector, which the disk has whole or not at all.
//!
//! What is over stays as it is.

use crate::link::dial::{Dial, Scheme, Target};
use crate::link::{Interrupt, LINK};
use nix::fcntl::{Flock, FlockArg};
use pod_runtime::problem::Report;
use pod_runtime::status::{ProcessKey, now};
use pod_runtime::store::{Store, read_json, read_whole, write_json, write_json_quickly};
use pod_runtime::{Doing, Problem, Result};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Finished jobs older than this are forgotten, but for what ran here until its source is known to know: it may not have asked
/// yet, and what nobody knows is answered with "never".
const KEEP: u64 = 7 * 86_400;
/// Of those that both hosts know of, so many are kept, the newest.
const KNOWN: usize = 64;
/// So many at a time are told to the other host.
const TOLD: usize = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Source,
    Destination,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Source: nothing was touched yet, or the pod runs while its files are copied.
    Copying,
    /// Source: held still by the tool; let go when the tool dies.
    Frozen,
    /// Source: COMMIT may have been said. The copy here stays frozen until the destination was asked.
    Committing,
    /// Destination: not decided.
    Receiving,
    /// Destination: the pod runs (or ran) here.
    Running,
    /// Source: the pod lives there now.
    Done,
    /// Either: it did not happen, and will not.
    Aborted,
}

impl Phase {
    pub fn is_over(self) -> bool {
        matches!(self, Phase::Running | Phase::Done | Phase::Aborted)
    }
}

/// One move, as this host knows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Job {
    /// Comes first: [`overwrite`] looks for it in the first sector.
    pub phase: Phase,
    pub id: String,
    pub role: Role,
    pub pod: String,
    pub name: String,
    /// The other host: at the source what ssh was told.
    pub peer: String,
    #[serde(default)]
    pub port: Option<u16>,
    /// Who answers there.
    #[serde(default)]
    pub scheme: Scheme,
    #[serde(default)]
    pub ssh_options: Vec<String>,
    #[serde(default)]
    pub remote_pod: Option<String>,
    /// Who works on it; the job is orphaned when this is gone.
    pub tool: ProcessKey,
    /// Destination: `pod receive`, which has things of its own to give back though the monitor works on the job.
    #[serde(default)]
    pub receiver: Option<ProcessKey>,
    /// Seconds since the epoch.
    pub started: u64,
    pub updated: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<Report>,
    /// Source: when the pod runs there, memory is still to be brought from the copy here.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub behind: bool,
    /// Both hosts know how it ended: nobody will ask.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub known: bool,
}

impl Job {
    /// One that begins now at the destination, which does not know how to reach the other host.
    pub fn here(id: &str, phase: Phase, tool: ProcessKey) -> Job {
        Job {
            phase,
            id: id.to_owned(),
            role: Role::Destination,
            pod: String::new(),
            name: String::new(),
            peer: String::new(),
            port: None,
            scheme: Scheme::default(),
            ssh_options: Vec::new(),
            remote_pod: None,
            tool,
            receiver: None,
            started: now(),
            updated: now(),
            problem: None,
            behind: false,
            known: false,
        }
    }

    /// Source: how the other host is reached, beside what was said of one move.
    pub fn dial(self, store: &Store) -> Dial {
        Dial {
            target: Target { scheme: self.scheme, host: self.peer, port: self.port },
            options: self.ssh_options,
            remote_pod: self.remote_pod.unwrap_or_else(|| "pod".into()),
            tunnelled: true,
            store: store.clone(),
        }
    }
}

/// The entry of one job.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    pub job: Job,
}

impl Journal {
    /// Begins an entry.
    pub fn begin(store: &Store, job: Job) -> Result<Journal> {
        check_id(&job.id)?;
        let dir = store.jobs_dir()?;
        forget_old(&dir);
        let journal = Journal { path: dir.join(format!("{}.json", job.id)), job };
        let _lock = lock(&journal.path)?;
        if let Ok(before) = read_json::<Job>(&journal.path) {
            let what = format!("job {} was begun before and is {:?}", before.id, before.phase);
            return Err(Problem::new(crate::link::PROTOCOL, what));
        }
        journal.write()?;
        Ok(journal)
    }

    /// The entry of a job, as it was left.
    pub fn open(store: &Store, id: &str) -> Result<Journal> {
        check_id(id)?;
        let path = store.jobs_dir()?.join(format!("{id}.json"));
        if !path.exists() {
            return Err(Problem::new("E-NOJOB", format!("there is no job '{id}'")).fix("`pod job ls` lists them"));
        }
        Ok(Journal { job: read_json(&path)?, path })
    }

    /// Writes down that the job is in another phase. One that somebody else has ended stays ended.
    pub fn phase(&mut self, phase: Phase) -> Result<()> {
        let _lock = lock(&self.path)?;
        match entry(&self.path)? {
            Some(job) if job.phase.is_over() && job.phase != phase => {
                self.job = job;
                if phase.is_over() { Ok(()) } else { Err(given_up()) }
            }
            _ => {
                self.job.phase = phase;
                self.write()
            }
        }
    }

    /// This process works on the job from now on; what was decided stays. On the disk when this returns, so that little is
    /// left to be written when it is decided.
    pub fn take_over(&mut self) -> Result<()> {
        let _lock = lock(&self.path)?;
        if let Some(job) = entry(&self.path)? {
            self.job.phase = job.phase;
        }
        self.job.tool = ProcessKey::myself()?;
        self.write_to_disk()
    }

    /// It did not happen, and why.
    pub fn aborted(&mut self, problem: &Problem) -> Result<()> {
        self.job.problem = Some(problem.report());
        self.phase(Phase::Aborted)
    }

    /// Destination: decides, once. `Running` only from `Receiving`; `Aborted` unless it ran. Returns what holds now, and
    /// will after a power cut.
    pub fn decide(&mut self, wanted: Phase) -> Result<Phase> {
        let _lock = lock(&self.path)?;
        // One that is not there any more was over for long. Where it is only that it cannot be read now, nobody decides.
        self.job.phase = entry(&self.path)?.map_or(Phase::Aborted, |job| job.phase);
        match self.job.phase {
            // Whoever decided it may have been killed before the disk had it.
            Phase::Running => self.sync()?,
            phase if phase.is_over() => {}
            _ => self.settle_on(wanted)?,
        }
        Ok(self.job.phase)
    }

    /// Under the lock. An error leaves the job undecided.
    fn settle_on(&mut self, wanted: Phase) -> Result<()> {
        let before = std::mem::replace(&mut self.job.phase, wanted);
        let written = match wanted {
            Phase::Running => self.write_running(),
            _ => self.write(),
        };
        let Err(problem) = written else { return Ok(()) };
        self.job.phase = before;
        // The entry may be in place though its folder is not on the disk. Nobody was told: who asks waits for the lock.
        let in_place = read_json::<Job>(&self.path).is_ok_and(|job| job.phase == wanted);
        if in_place && self.write().is_err() {
            tracing::error!(problem = problem.chain(), "what was decided may be lost in a power cut");
            self.job.phase = wanted;
            return Ok(());
        }
        Err(problem)
    }

    /// Destination: decides that it does not happen, unless it did, and has whoever works on it hear of it at once
    /// instead of when its patience ends. Returns what holds now.
    pub fn give_up(&mut self) -> Result<Phase> {
        let undecided = !self.job.phase.is_over();
        let phase = self.decide(Phase::Aborted)?;
        if undecided && phase == Phase::Aborted {
            let path = self.path.with_extension("lock");
            let written = OpenOptions::new().append(true).open(&path).and_then(|mut file| file.write_all(b"."));
            written.doing(|| format!("write {}", path.display()))?;
        }
        Ok(phase)
    }

    /// Raised when somebody else gives the job up.
    pub fn given_up(&self) -> Result<Interrupt> {
        let interrupt = Interrupt::on_write(&self.path.with_extension("lock"))?;
        // It may have been a moment ago.
        match read_json::<Job>(&self.path)?.phase {
            Phase::Aborted => Err(given_up()),
            _ => Ok(interrupt),
        }
    }

    fn write(&self) -> Result<()> {
        let job = Job { updated: now(), ..self.job.clone() };
        write_json_quickly(&self.path, &job)
    }

    /// The commit point, in the time of one flush of the disk. (A new text in place of the old one would be two, and the
    /// file system's own journal each time.)
    fn write_running(&self) -> Result<()> {
        let doing = || format!("write {}", self.path.display());
        let file = OpenOptions::new().read(true).write(true).open(&self.path).doing(doing)?;
        match overwrite(&file).doing(doing)? {
            true => file.sync_data().doing(doing),
            // It was written in another way, by another version.
            false => self.write_to_disk(),
        }
    }

    /// Has the disk hold it, the text before it takes the place of the old one.
    fn write_to_disk(&self) -> Result<()> {
        let job = Job { updated: now(), ..self.job.clone() };
        write_json(&self.path, &job)?;
        self.sync_folder()
    }

    /// What is there, whoever wrote it.
    fn sync(&self) -> Result<()> {
        File::open(&self.path).and_then(|file| file.sync_all()).doing(|| format!("write {}", self.path.display()))?;
        self.sync_folder()
    }

    fn sync_folder(&self) -> Result<()> {
        let dir = self.path.parent().unwrap_or(Path::new("."));
        File::open(dir).and_then(|dir| dir.sync_all()).doing(|| format!("write {}", dir.display()))
    }
}

/// Makes `Receiving` `Running` in the text that is there, if that is where we write it: white space makes up for the shorter
/// word. Whether it did.
fn overwrite(file: &File) -> io::Result<bool> {
    const BEFORE: &[u8] = b"{\n  \"phase\": \"receiving\"";
    const AFTER: &[u8] = b"{\n  \"phase\": \"running\"  ";
    let mut there = [0; BEFORE.len()];
    let ours = file.read_exact_at(&mut there, 0).is_ok() && there == *BEFORE;
    if ours { file.write_all_at(AFTER, 0).map(|()| true) } else { Ok(false) }
}

fn given_up() -> Problem {
    Problem::new(LINK, "this attempt was given up; the pod runs on where it was")
}

/// Destination: what became of a job. One that has not run by now is written down as one that never will.
pub fn ask(store: &Store, id: &str, pod: &str) -> Result<Phase> {
    check_id(id)?;
    let path = store.jobs_dir()?.join(format!("{id}.json"));
    match entry(&path)? {
        Some(job) => Journal { path, job }.give_up(),
        // Never heard of, or a late COMMIT is still under way: it shall find this.
        None => {
            let job = Job::here(id, Phase::Aborted, ProcessKey::myself()?);
            Journal::begin(store, Job { pod: pod.to_owned(), ..job }).map(|journal| journal.job.phase)
        }
    }
}

/// None where there is none, or what a power cut has left of one.
fn entry(path: &Path) -> Result<Option<Job>> {
    if path.exists() { read_whole(path) } else { Ok(None) }
}

/// All entries, oldest first.
pub fn jobs(store: &Store) -> Result<Vec<Job>> {
    let dir = store.jobs_dir()?;
    let mut jobs: Vec<Job> = fs::read_dir(&dir)
        .doing(|| format!("list {}", dir.display()))?
        .flatten()
        .filter(|entry| entry.path().extension().is_some_and(|e| e == "json"))
        .filter_map(|entry| read_json(&entry.path()).ok())
        .collect();
    jobs.sort_by(|a, b| (a.started, &a.id).cmp(&(b.started, &b.id)));
    Ok(jobs)
}

/// What the tool that moved the pod had to tell, a line each with its time: for `pod job log`.
pub fn keep_log(store: &Store, id: &str, lines: &str) -> Result<()> {
    check_id(id)?;
    let path = store.jobs_dir()?.join(format!("{id}.log"));
    let open = OpenOptions::new().create(true).append(true).mode(0o600).open(&path);
    open.and_then(|mut file| file.write_all(lines.as_bytes())).doing(|| format!("write {}", path.display()))
}

/// What [`keep_log`] kept; empty where that was on the other host.
pub fn log(store: &Store, id: &str) -> Result<String> {
    let job = Journal::open(store, id)?.job;
    Ok(fs::read_to_string(store.jobs_dir()?.join(format!("{}.log", job.id))).unwrap_or_default())
}

/// Ids become parts of paths and come from another host.
pub fn check_id(id: &str) -> Result<()> {
    let good = (4..=32).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    if good { Ok(()) } else { Err(Problem::new("E-USAGE", format!("'{id}' is not the id of a job"))) }
}

fn lock(path: &Path) -> Result<Flock<File>> {
    let path = path.with_extension("lock");
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let file = file.doing(|| format!("open {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno).doing(|| format!("lock {}", path.display()))
}

/// Source: jobs whose pods run on that host, which is still to hear that this is known here. Nothing here asks about them any
/// more, and the disk has that when this returns.
pub fn settled(store: &Store, peer: &str) -> Vec<String> {
    let Ok(dir) = store.jobs_dir() else { return Vec::new() };
    let theirs = |job: &Job| {
        job.role == Role::Source && job.phase == Phase::Done && !job.known && job.peer == peer && !job.tool.alive()
    };
    let there = jobs(store).unwrap_or_default().into_iter().filter(theirs);
    let flushed = |job: Job| {
        let flushed = File::open(dir.join(format!("{}.json", job.id))).and_then(|file| file.sync_all());
        flushed.is_ok().then_some(job.id)
    };
    let ids: Vec<String> = there.filter_map(flushed).take(TOLD).collect();
    let listed = ids.is_empty() || File::open(&dir).and_then(|dir| dir.sync_all()).is_ok();
    if listed { ids } else { Vec::new() }
}

/// Writes down that both hosts know how these ended, of those that `which` finds are such. What cannot be written is told
/// again another time.
pub fn known(store: &Store, ids: &[String], which: impl Fn(&Job) -> bool) {
    let Ok(dir) = store.jobs_dir() else { return };
    for id in ids.iter().take(TOLD).filter(|id| check_id(id).is_ok()) {
        let path = dir.join(format!("{id}.json"));
        if !path.exists() {
            continue;
        }
        let Ok(_lock) = lock(&path) else { continue };
        if let Ok(Some(job)) = entry(&path)
            && job.phase.is_over()
            && !job.known
            && which(&job)
        {
            // What it says besides is not to be lost in a power cut.
            let _ = Journal { path: path.clone(), job: Job { known: true, ..job } }.write_to_disk();
        }
    }
}

fn forget_old(dir: &Path) {
    let forget = |path: &Path| {
        let _ = fs::remove_file(path);
        let _ = fs::remove_file(path.with_extension("lock"));
        let _ = fs::remove_file(path.with_extension("log"));
    };
    let mut known = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|e| e == "json")
            && let Ok(job) = read_json::<Job>(&path)
            && job.phase.is_over()
        {
            let old = job.updated.saturating_add(KEEP) < now();
            if old && (job.phase != Phase::Running || job.known) {
                forget(&path);
            } else if job.known {
                known.push((job.updated, path.clone()));
            }
        }
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(id) = name.strip_prefix('.').and_then(|name| name.strip_suffix(".json.new")) {
            forget_unwritten(&path, &dir.join(format!("{id}.lock")));
        }
    }
    known.sort();
    known.iter().rev().skip(KNOWN).for_each(|(_, path)| forget(path));
}

/// What was to become an entry, if whoever wrote it was killed: it has its lock while it writes, and made that before.
fn forget_unwritten(path: &Path, lock: &Path) {
    let is_held = match OpenOptions::new().write(true).open(lock) {
        Ok(lock) => Flock::lock(lock, FlockArg::LockExclusiveNonblock).is_err(),
        Err(error) => error.kind() != std::io::ErrorKind::NotFound,
    };
    if !is_held {
        let _ = fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_both_hosts_know_is_forgotten_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_at(dir.path().join("data"), dir.path().join("run")).unwrap();
        let gone = ProcessKey { pid: i32::MAX, start_time: 1 };
        let write = |n: usize, role, phase, peer: &str| {
            let id = format!("{n:08x}");
            let job = Job { role, peer: peer.into(), updated: n as u64, ..Job::here(&id, phase, gone) };
            let path = store.jobs_dir().unwrap().join(format!("{id}.json"));
            write_json_quickly(&path, &Job { updated: now() - 1000 + n as u64, ..job }).unwrap();
            id
        };
        let ids: Vec<String> = (0..80).map(|n| write(n, Role::Source, Phase::Done, "hostB")).collect();
        write(100, Role::Source, Phase::Done, "hostC");
        write(101, Role::Source, Phase::Committing, "hostB");
        write(102, Role::Destination, Phase::Running, "hostB");
        let told = settled(&store, "hostB");
        assert_eq!(told, ids);
        // The other side takes its word only for what it is about.
        known(&store, &told, |job| job.role == Role::Destination);
        assert_eq!(settled(&store, "hostB"), ids);
        known(&store, &told, |_| true);
        assert_eq!(settled(&store, "hostB"), Vec::<String>::new());
        forget_old(&store.jobs_dir().unwrap());
        let left = jobs(&store).unwrap();
        assert_eq!(left.len(), KNOWN + 3);
        assert!(ids[..16].iter().all(|id| !left.iter().any(|job| job.id == *id)), "the oldest go");
        // What is no id, or no job, does no harm.
        known(&store, &["../../x".into(), "abcdef01".into(), format!("{:08x}", 101)], |_| true);
        assert!(!Journal::open(&store, &format!("{:08x}", 101)).unwrap().job.known, "it is not over");
    }

    #[test]
    fn what_a_killed_writer_left_goes_and_that_of_a_living_one_stays() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_at(dir.path().join("data"), dir.path().join("run")).unwrap();
        let jobs = store.jobs_dir().unwrap();
        let unwritten = |id: &str| jobs.join(format!(".{id}.json.new"));
        let begin = |id: &str| Journal::begin(&store, Job::here(id, Phase::Receiving, ProcessKey::myself().unwrap()));
        // One that has an entry: the next to write it takes it.
        let mut journal = begin("aaaa").unwrap();
        fs::write(unwritten("aaaa"), "{").unwrap();
        journal.phase(Phase::Aborted).unwrap();
        assert!(!unwritten("aaaa").exists());
        // Those that never had one: the next job.
        for id in ["bbbb", "cccc"] {
            fs::write(unwritten(id), "{").unwrap();
            fs::write(jobs.join(format!("{id}.lock")), "").unwrap();
        }
        // On a full disk a lock may be all that could not be made.
        fs::write(unwritten("eeee"), "").unwrap();
        let living = lock(&jobs.join("cccc.json")).unwrap();
        begin("dddd").unwrap();
        assert!(!unwritten("bbbb").exists() && !unwritten("eeee").exists());
        assert!(unwritten("cccc").exists(), "somebody writes it");
        drop(living);
    }
}
