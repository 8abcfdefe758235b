//! Where pods are kept on this host.
//!
//! Two roots: the data root (`$POD_ROOT`, else `/var/lib/pod`) outlives a reboot, the run root (`$POD_RUN`, else
//! `/run/pod`; below a data root of one's own when only that is given) holds sockets. A pod is a folder:
//!
//! ```text
//! DATA/pods/ID/{spec.json,status.json,log,upper/,work/}      DATA/events.jsonl      RUN/ID/ctl.sock
//! ```
//!
//! Files are written beside and renamed, so a reader sees the old or the new text, never half. Names are handed out
//! under one lock, so two pods never get one. A pod whose creator died is recognised ([`Status::corrected`]) and makes
//! way.

use crate::lifecycle;
use crate::problem::{Doing, Problem, Result};
use crate::spec::Spec;
use crate::status::{self, State, Status};
use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

mod names;
pub use names::closest;

/// The pods of this host.
#[derive(Debug, Clone)]
pub struct Store {
    data: PathBuf,
    run: PathBuf,
}

/// One pod of the store: its id and where its things are. Holds no lock and nothing open.
#[derive(Debug, Clone)]
pub struct Pod {
    id: String,
    store: Store,
}

impl Store {
    /// The store that the environment names.
    pub fn open() -> Result<Store> {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let (data, run) = (set("POD_ROOT"), set("POD_RUN"));
        let run = run.or_else(|| data.as_ref().map(|data| data.join("run"))).unwrap_or_else(|| "/run/pod".into());
        Store::open_at(data.unwrap_or_else(|| "/var/lib/pod".into()), run)
    }

    pub fn open_at(data: PathBuf, run: PathBuf) -> Result<Store> {
        let absolute = |path: PathBuf| std::path::absolute(&path).doing(|| format!("resolve {}", path.display()));
        let store = Store { data: absolute(data)?, run: absolute(run)? };
        make_dir(&store.data, 0o711)?;
        make_dir(&store.run, 0o711)?;
        make_dir(&store.pods_dir(), 0o700)?;
        Ok(store)
    }

    pub fn data(&self) -> &Path {
        &self.data
    }

    pub fn run(&self) -> &Path {
        &self.run
    }

    fn pods_dir(&self) -> PathBuf {
        self.data.join("pods")
    }

    /// Made when it is first asked for, 0700.
    pub fn checkpoints_dir(&self) -> Result<PathBuf> {
        self.subdir("checkpoints")
    }

    pub fn jobs_dir(&self) -> Result<PathBuf> {
        self.subdir("jobs")
    }

    pub fn network_dir(&self) -> Result<PathBuf> {
        self.subdir("network")
    }

    /// Keys of this host and of those that it trusts.
    pub fn daemon_dir(&self) -> Result<PathBuf> {
        self.subdir("daemon")
    }

    fn subdir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.data.join(name);
        make_dir(&dir, 0o700)?;
        Ok(dir)
    }

    /// The events of all pods, one JSON object a line.
    pub fn events_path(&self) -> PathBuf {
        self.data.join("events.jsonl")
    }

    /// The pod of exactly this id, if it is here.
    pub fn by_id(&self, id: &str) -> Option<Pod> {
        let pod = Pod { id: id.to_owned(), store: self.clone() };
        (check_id(id).is_ok() && pod.spec().is_ok()).then_some(pod)
    }

    /// Every pod, tombstones too, oldest first.
    pub fn pods(&self) -> Result<Vec<Pod>> {
        let mut found = Vec::new();
        let dir = self.pods_dir();
        for entry in fs::read_dir(&dir).doing(|| format!("list {}", dir.display()))? {
            let entry = entry.doing(|| format!("list {}", dir.display()))?;
            let id = entry.file_name().to_string_lossy().into_owned();
            let pod = Pod { id, store: self.clone() };
            // A folder without a spec is one that is being made or being removed this moment.
            if let Ok(spec) = pod.spec() {
                found.push((spec.created, pod));
            }
        }
        found.sort_by(|a, b| (a.0, &a.1.id).cmp(&(b.0, &b.1.id)));
        Ok(found.into_iter().map(|(_, pod)| pod).collect())
    }

    /// The pod of this name, id, or unambiguous beginning of an id. A live pod goes before a tombstone of its name.
    pub fn pod(&self, wanted: &str) -> Result<Pod> {
        let mut by_name = None;
        let mut by_id = Vec::new();
        let mut names = Vec::new();
        for pod in self.pods()? {
            let name = pod.name()?;
            if name == wanted && (by_name.is_none() || !pod.is_tombstone()) {
                by_name = Some(pod);
            } else if pod.id == wanted {
                return Ok(pod);
            } else if !wanted.is_empty() && pod.id.starts_with(wanted) {
                by_id.push(pod);
            }
            names.push(name);
        }
        if let Some(pod) = by_name {
            return Ok(pod);
        }
        match by_id.len() {
            1 => Ok(by_id.remove(0)),
            0 => {
                let problem = Problem::new("E-NOPOD", format!("there is no pod '{wanted}'"));
                Err(match closest(wanted, names.iter().map(String::as_str)) {
                    Some(name) => problem.fix(format!("did you mean '{name}'? `pod ps -a` lists all pods")),
                    None => problem.fix("`pod ps -a` lists all pods"),
                })
            }
            several => Err(Problem::new("E-NOPOD", format!("'{wanted}' is the beginning of {several} ids"))
                .fix("give more of the id, or the name")),
        }
    }

    /// Takes id and name of `spec` for a new pod, in state [`State::Creating`], and writes the spec down. A tombstone
    /// of the same id (the pod comes back) and a pod that died while it was created make way; tombstones of other pods
    /// do not hold their names.
    pub fn reserve(&self, spec: &Spec) -> Result<Pod> {
        check_name(&spec.name)?;
        check_id(&spec.id)?;
        let _lock = self.lock()?;
        self.sweep_locked();
        self.clear_name(&spec.name, Some(&spec.id))?;
        let pod = Pod { id: spec.id.clone(), store: self.clone() };
        if pod.dir().exists() {
            let status = pod.status();
            if status.as_ref().is_ok_and(|s| s.state.is_live() || s.state == State::Exited) {
                let name = pod.name().unwrap_or_else(|_| pod.id.clone());
                return Err(Problem::new("E-NAME", format!("pod {} ('{name}') is on this host already", pod.id))
                    .fix(format!("`pod rm -f {}` removes it", pod.id)));
            }
            lifecycle::remove(&pod)?;
        }
        // Made aside and renamed: a kill half way leaves no pod without a spec.
        let aside = self.data.join(format!(".new-{}-{}", pod.id, std::process::id()));
        for (dir, mode) in [("", 0o700), ("upper", 0o755), ("work", 0o700)] {
            make_dir(&aside.join(dir), mode)?;
        }
        write(&aside.join("status.json"), &Status::creating()?, false)?;
        write(&aside.join("spec.json"), spec, false)?;
        fs::rename(&aside, pod.dir()).doing(|| format!("make the folder {}", pod.dir().display()))?;
        Ok(pod)
    }

    /// Gives a pod another name.
    pub fn rename(&self, pod: &Pod, name: &str) -> Result<()> {
        check_name(name)?;
        let _lock = self.lock()?;
        self.clear_name(name, Some(&pod.id))?;
        let mut spec = pod.spec()?;
        spec.name = name.to_owned();
        pod.set_spec(&spec)
    }

    /// A name that no pod has: `adjective_noun`.
    pub fn free_name(&self) -> Result<String> {
        let taken: Vec<String> = self.pods()?.iter().filter_map(|pod| pod.name().ok()).collect();
        for _ in 0..64 {
            let name = names::random(random_bytes()?);
            if !taken.contains(&name) {
                return Ok(name);
            }
        }
        Ok(format!("{}_{}", names::random(random_bytes()?), &new_id()?[..4]))
    }

    /// Takes away what killed commands left: folders of pods half made or half removed, and pods that never began.
    pub fn sweep(&self) -> Result<()> {
        let _lock = self.lock()?;
        self.sweep_locked();
        Ok(())
    }

    fn sweep_locked(&self) {
        for entry in fs::read_dir(&self.data).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let rest = name.strip_prefix(".removed-").or_else(|| name.strip_prefix(".new-"));
            let maker = rest.and_then(|rest| rest.rsplit_once('-')?.1.parse::<i32>().ok());
            if maker.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
                let _ = remove_dir(&entry.path());
            }
        }
        self.put_back();
        for pod in self.pods().unwrap_or_default() {
            if pod.never_began() {
                let _ = lifecycle::remove(&pod);
            }
        }
    }

    /// Whether the journal says that the pod of this job runs (or ran) here. Such an entry is on the disk before it
    /// is in place.
    fn has_arrived(&self, job: &str) -> bool {
        let entry = read_json::<serde_json::Value>(&self.data.join("jobs").join(format!("{job}.json")));
        entry.is_ok_and(|entry| entry["phase"] == "running")
    }

    /// What a restore put aside (`.aside-ID-PID`) and was killed before it could settle: goes when the restored pod runs,
    /// comes back when there is none.
    fn put_back(&self) {
        for entry in fs::read_dir(&self.data).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Some((id, maker)) = name.strip_prefix(".aside-").and_then(|rest| rest.rsplit_once('-')) else {
                continue;
            };
            if check_id(id).is_err() || Path::new(&format!("/proc/{maker}")).exists() {
                continue;
            }
            let pod = Pod { id: id.to_owned(), store: self.clone() };
            if !pod.dir().exists() {
                let _ = fs::rename(entry.path(), pod.dir());
                continue;
            }
            let Ok(status) = pod.status() else { continue };
            match status.state {
                _ if pod.never_began() => {
                    if lifecycle::remove(&pod).is_ok() {
                        let _ = fs::rename(entry.path(), pod.dir());
                    }
                }
                // Its monitor goes on with the restore, or somebody does in its place.
                State::Creating => {}
                State::Dead if status.started.is_none() => {}
                _ => drop(remove_dir(&entry.path())),
            }
        }
    }

    /// Of a pod that is about to be removed: what a restore had put aside and was killed before it could settle. It would come
    /// back when there is no other.
    pub fn forget_aside(&self, pod: &Pod) -> Result<()> {
        let _lock = self.lock()?;
        for entry in fs::read_dir(&self.data).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let maker = name.strip_prefix(".aside-").and_then(|rest| rest.strip_prefix(&pod.id)?.strip_prefix('-'));
            if maker.is_some_and(|maker| !Path::new(&format!("/proc/{maker}")).exists()) {
                remove_dir(&entry.path())?;
            }
        }
        Ok(())
    }

    /// Fails when a pod other than `but` holds the name.
    fn clear_name(&self, name: &str, but: Option<&str>) -> Result<()> {
        for pod in self.pods()? {
            if Some(pod.id.as_str()) == but || pod.name()? != name {
                continue;
            }
            if !pod.is_tombstone() {
                return Err(Problem::new("E-NAME", format!("the name '{name}' is taken by pod {}", pod.id))
                    .fix(format!("choose another name, or `pod rm -f {name}`")));
            }
        }
        Ok(())
    }

    fn lock(&self) -> Result<Flock<File>> {
        lock_file(&self.data.join("lock"))
    }

    /// Does something while no pod comes to this host, or comes back.
    pub fn exclusively<T>(&self, act: impl FnOnce() -> Result<T>) -> Result<T> {
        let _lock = self.lock()?;
        act()
    }
}

impl Pod {
    pub fn id(&self) -> &str {
        &self.id
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    pub fn name(&self) -> Result<String> {
        Ok(self.spec()?.name)
    }

    pub fn spec(&self) -> Result<Spec> {
        read_json(&self.dir().join("spec.json"))
    }

    /// Not synced: a pod does not outlive the power cut that would lose it.
    pub fn set_spec(&self, spec: &Spec) -> Result<()> {
        let _lock = lock_file(&self.dir().join("lock"))?;
        write(&self.dir().join("spec.json"), spec, false)
    }

    /// The status as it is now: the file, held against the kernel.
    pub fn status(&self) -> Result<Status> {
        Ok(self.written_status()?.corrected())
    }

    fn written_status(&self) -> Result<Status> {
        match read_whole(&self.dir().join("status.json"))? {
            Some(status) => Ok(status),
            // The pod died with that power cut. Of no boot that is known: what it wrote is not taken for that of a pod that
            // never began.
            None => Ok(Status { state: State::Dead, monitor: None, boot_id: String::new(), ..Status::creating()? }),
        }
    }

    pub fn set_status(&self, status: &Status) -> Result<()> {
        write_json(&self.dir().join("status.json"), status)
    }

    /// Changes the status under the pod's lock: monitor and commands write it both.
    pub fn update(&self, change: impl FnOnce(&mut Status)) -> Result<Status> {
        let _lock = lock_file(&self.dir().join("lock"))?;
        let mut status = self.written_status()?;
        change(&mut status);
        self.set_status(&status)?;
        Ok(status)
    }

    /// As [`Pod::update`], without waiting for the disk: for a state that ends with the host's processes anyway.
    pub fn update_quickly(&self, change: impl FnOnce(&mut Status)) -> Result<Status> {
        let _lock = lock_file(&self.dir().join("lock"))?;
        let mut status = self.written_status()?;
        change(&mut status);
        write_json_quickly(&self.dir().join("status.json"), &status)?;
        Ok(status)
    }

    /// DATA/pods/ID, 0700.
    pub fn dir(&self) -> PathBuf {
        self.store.pods_dir().join(&self.id)
    }

    /// What the pod wrote to its root.
    pub fn upper_dir(&self) -> PathBuf {
        self.dir().join("upper")
    }

    /// The overlay's own.
    pub fn work_dir(&self) -> PathBuf {
        self.dir().join("work")
    }

    pub fn log_path(&self) -> PathBuf {
        self.dir().join("log")
    }

    /// What the monitor itself had to say (it has no terminal).
    pub fn monitor_log_path(&self) -> PathBuf {
        self.dir().join("monitor.log")
    }

    /// RUN/ID
    pub fn run_dir(&self) -> PathBuf {
        self.store.run.join(&self.id)
    }

    pub fn socket_path(&self) -> PathBuf {
        self.run_dir().join("ctl.sock")
    }

    /// Has the disk hold what is known of the pod.
    pub fn sync(&self) -> Result<()> {
        let dir = self.dir();
        let paths = [dir.join("status.json"), dir.join("spec.json"), dir, self.store.pods_dir()];
        let sync = |path: &PathBuf| File::open(path)?.sync_all();
        paths.iter().try_for_each(|path| sync(path).doing(|| format!("write {}", path.display())))
    }

    /// Whether its creation was killed and nothing of it is worth keeping.
    fn never_began(&self) -> bool {
        let Ok(status) = self.status() else { return false };
        // One that is restored is held by its cgroup in the end, and does not die with its monitor.
        let stands = status.state == State::Creating && status.monitor_lost && status.job.is_none() && !status.let_go;
        if (status.state != State::Dead && !stands) || status.started.is_some() {
            return false;
        }
        if status.job.as_ref().is_some_and(|job| self.store.has_arrived(job)) {
            return false;
        }
        // After a power cut the file may be an old one, from before the pod ran.
        status::boot_id().is_ok_and(|now| now == status.boot_id) || self.is_blank()
    }

    /// Nothing was ever written to its root or its log.
    fn is_blank(&self) -> bool {
        let upper = fs::read_dir(self.upper_dir()).is_ok_and(|mut entries| entries.next().is_none());
        let log = crate::monitor::log::files(&self.dir());
        upper && log.iter().all(|path| fs::metadata(path).is_ok_and(|meta| meta.len() == 0))
    }

    fn is_tombstone(&self) -> bool {
        self.written_status().is_ok_and(|status| status.state == State::Moved)
    }

    /// Where what is removed lies meanwhile; the store's sweep finds it.
    fn grave(&self) -> PathBuf {
        self.store.data.join(format!(".removed-{}-{}", self.id, std::process::id()))
    }

    /// Puts away all that the pod and its monitor wrote, and leaves its spec and status.
    pub fn clear(&self) -> Result<Cleared> {
        let mut cleared = remove_dir(&self.run_dir());
        let grave = self.grave();
        make_dir(&grave, 0o700)?;
        let logs = crate::monitor::log::files(&self.dir());
        for path in logs.into_iter().chain([self.monitor_log_path(), self.upper_dir(), self.work_dir()]) {
            let Some(name) = path.file_name() else { continue };
            match fs::rename(&path, grave.join(name)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    // Everything is tried, the first problem is told.
                    cleared = cleared.and(Err(error).doing(|| format!("put {} away", path.display())));
                }
                _ => {}
            }
        }
        cleared.map(|()| Cleared(grave))
    }

    /// Takes away the folders of the pod. What else it has on this host (processes, cgroup, links, leases) goes first:
    /// see [`lifecycle::remove`].
    pub fn remove(self) -> Result<()> {
        let run = self.run_dir();
        remove_dir(&run)?;
        let (dir, grave) = (self.dir(), self.grave());
        // Out of the list in one step, so that a kill half way leaves no pod without a spec.
        match fs::rename(&dir, &grave) {
            Ok(()) => remove_dir(&grave),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(_) => remove_dir(&dir),
        }
    }
}

/// What a pod wrote, out of its way: see [`Pod::clear`].
#[derive(Debug)]
pub struct Cleared(PathBuf);

impl Cleared {
    pub fn remove(self) -> Result<()> {
        remove_dir(&self.0)
    }
}

/// A new pod id: 12 hex digits.
pub fn new_id() -> Result<String> {
    Ok(random_bytes()?[..6].iter().map(|byte| format!("{byte:02x}")).collect())
}

fn random_bytes() -> Result<[u8; 16]> {
    let mut bytes = [0; 16];
    let fill = |bytes: &mut [u8]| std::io::Read::read_exact(&mut File::open("/dev/urandom")?, bytes);
    fill(&mut bytes).doing(|| "read /dev/urandom".into())?;
    Ok(bytes)
}

/// `[a-zA-Z0-9][a-zA-Z0-9_.-]*`, at most 63 long.
pub fn check_name(name: &str) -> Result<()> {
    let good = name.len() <= 63
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
    if good {
        return Ok(());
    }
    Err(Problem::new("E-USAGE", format!("'{name}' cannot be the name of a pod"))
        .fix("use letters, digits, '_', '.' and '-', beginning with a letter or digit, at most 63 of them"))
}

/// Ids become parts of paths and may come from another host.
pub fn check_id(id: &str) -> Result<()> {
    if id.len() == 12 && id.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
        return Ok(());
    }
    Err(Problem::new("E-USAGE", format!("'{id}' is not the id of a pod")))
}

fn make_dir(path: &Path, mode: u32) -> Result<()> {
    DirBuilder::new().recursive(true).mode(mode).create(path).doing(|| format!("make the folder {}", path.display()))
}

fn remove_dir(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).doing(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn lock_file(path: &Path) -> Result<Flock<File>> {
    let open = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path);
    let file = open.doing(|| format!("open {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno).doing(|| format!("lock {}", path.display()))
}

/// Reads a file that [`write_json`] wrote.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read(path).doing(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&text).doing(|| format!("understand {}", path.display()))
}

/// The same of one that was not waited for to be on the disk. None: a power cut has left what is no JSON at all. What is,
/// and means nothing to us, another version of pod wrote.
pub fn read_whole<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let text = fs::read(path).doing(|| format!("read {}", path.display()))?;
    match serde_json::from_slice::<serde::de::IgnoredAny>(&text) {
        Ok(_) => serde_json::from_slice(&text).map(Some).doing(|| format!("understand {}", path.display())),
        Err(_) => Ok(None),
    }
}

/// Writes a file so that after a crash it has the old or the new content, the new one once its folder is synced.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    write(path, value, true)
}

/// The same for what only matters while the host is up (a process that is killed loses nothing of it): not waited for
/// to be on the disk, which takes 5 to 50 ms.
pub fn write_json_quickly<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    write(path, value, false)
}

/// The same; without `synced` the content may be the old one after a power cut, and on some file systems nothing. Who
/// writes a file has its lock; so the name beside it is always the same, and what a writer left that was killed is taken by
/// the next.
fn write<T: Serialize>(path: &Path, value: &T, synced: bool) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value).doing(|| format!("put {} into words", path.display()))?;
    text.push(b'\n');
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let beside = path.with_file_name(format!(".{name}.new"));
    let replace = || -> std::io::Result<()> {
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&beside)?;
        file.write_all(&text)?;
        if synced {
            file.sync_all()?;
        }
        fs::rename(&beside, path)
    };
    let replaced = replace();
    if replaced.is_err() {
        // On a full disk there may be nobody who comes after us.
        let _ = fs::remove_file(&beside);
    }
    replaced.doing(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests;
