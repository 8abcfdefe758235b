//! Containers on disk: `ROOT/ID/{config.json,state.json,start.sock}`, and what state one is in.
//!
//! A folder is made whole or not at all, by whoever makes it first; files are written beside and renamed. What makes,
//! changes or removes a container holds the lock on its folder. A state is never taken from a file alone: whether the
//! first process is there is asked of the kernel, by its number and the instant at which it began, so that a number that
//! is used again is nobody's container.

use super::bundle::{self, check_id};
use crate::cgroup::Cgroup;
use crate::problem::{Doing, Problem, Result};
use crate::proc;
use crate::sys::daemon;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag, open};
use nix::sys::stat::{Mode, fstat, stat};
use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// All containers of one root.
#[derive(Debug, Clone)]
pub struct Containers {
    root: PathBuf,
}

/// One of them. Holds nothing open.
#[derive(Debug, Clone)]
pub struct Container {
    id: String,
    folder: PathBuf,
}

/// `state.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    pub id: String,
    /// As this host numbers it; 0 until there is one.
    pub pid: i32,
    /// When it began, in ticks since the host's boot.
    pub start_time: u64,
    pub bundle: PathBuf,
    pub rootfs: PathBuf,
    /// RFC 3339.
    pub created: String,
    /// User name of whoever made it.
    pub owner: String,
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    /// In each hierarchy; none with cgroups disabled, and none before nobody else was found in it: what is written here
    /// ends with the container.
    #[serde(default)]
    pub cgroup: Option<PathBuf>,
    /// Its first process is there and the rest is not. Whoever makes it holds the lock.
    #[serde(default)]
    pub creating: bool,
    #[serde(default)]
    pub no_new_keyring: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Creating,
    Created,
    Running,
    Paused,
    Stopped,
}

impl Status {
    pub fn word(self) -> &'static str {
        match self {
            Status::Creating => "creating",
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Stopped => "stopped",
        }
    }
}

/// What `state` prints and hooks read.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Shown {
    pub oci_version: &'static str,
    pub id: String,
    pub pid: i32,
    pub status: Status,
    pub bundle: PathBuf,
    pub rootfs: PathBuf,
    pub created: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    pub owner: String,
}

impl Containers {
    /// The root that is meant when none is named: below /run for root, below $XDG_RUNTIME_DIR for others.
    pub fn usual_root() -> PathBuf {
        let own = std::env::var_os("XDG_RUNTIME_DIR").filter(|folder| !folder.is_empty());
        match own {
            Some(folder) if !nix::unistd::geteuid().is_root() => PathBuf::from(folder).join("pod-oci"),
            _ => "/run/pod-oci".into(),
        }
    }

    pub fn at(root: &Path) -> Result<Containers> {
        let root = std::path::absolute(root).doing(|| format!("resolve {}", root.display()))?;
        Ok(Containers { root })
    }

    /// All, by name.
    pub fn all(&self) -> Result<Vec<Container>> {
        let entries = match fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).doing(|| format!("list {}", self.root.display())),
        };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let mut found: Vec<Container> = names.filter_map(|id| self.get(&id).ok()).collect();
        found.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(found)
    }

    pub fn get(&self, id: &str) -> Result<Container> {
        check_id(id)?;
        let container = Container { id: id.to_owned(), folder: self.root.join(id) };
        if container.is_whole() {
            return Ok(container);
        }
        Err(Problem::new("E-OCI-ABSENT", format!("container \"{id}\" does not exist")))
    }

    /// Takes an id, with the bundle's text and a first state. With it comes the lock.
    pub fn claim(&self, state: &State, config: &[u8]) -> Result<(Container, Lock)> {
        check_id(&state.id)?;
        let make = |folder: &Path, recursive| DirBuilder::new().mode(0o700).recursive(recursive).create(folder);
        make(&self.root, true).doing(|| format!("make {}", self.root.display()))?;
        let container = Container { id: state.id.clone(), folder: self.root.join(&state.id) };
        let exists = || Problem::new("E-OCI-STATE", format!("container with id exists: {} already exists", state.id));
        for _ in 0..MOST_TRIES {
            match make(&container.folder, false) {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => return Err(exists()),
                other => other.doing(|| format!("make {}", container.folder.display()))?,
            }
            let lock = match container.lock() {
                // Removed as the remains of another, before it was locked.
                Err(problem) if problem.code() == "E-OCI-ABSENT" => continue,
                other => other?,
            };
            // The same, and another has made its own in this one's place.
            if container.is_whole() {
                return Err(exists());
            }
            let written = container.write("config.json", config).and_then(|()| container.set_state(state));
            written.inspect_err(|_| container.forget())?;
            return Ok((container, lock));
        }
        Err(Problem::new("E-OCI-STATE", format!("container {} is removed as often as it is made", state.id)))
    }

    /// Removes the folder of a container that whoever made it has died over before there was a state.
    pub fn remove_remains(&self, id: &str, deadline: Duration) -> Result<()> {
        check_id(id)?;
        let container = Container { id: id.to_owned(), folder: self.root.join(id) };
        let _lock = match container.lock_within(deadline) {
            Err(problem) if problem.code() == "E-OCI-ABSENT" => return Ok(()),
            other => other?,
        };
        if !container.is_whole() {
            container.forget();
        }
        Ok(())
    }
}

/// As long as it lives nobody else makes, changes or removes the container.
pub type Lock = Flock<OwnedFd>;

/// To make or lock a folder that others remove at the same time.
const MOST_TRIES: u32 = 100;

impl Container {
    pub fn id(&self) -> &str {
        &self.id
    }

    fn is_whole(&self) -> bool {
        self.folder.join("state.json").exists()
    }

    /// Makes the second of two that change it wait. Ends with the value.
    pub fn lock(&self) -> Result<Lock> {
        self.lock_as(|folder| Flock::lock(folder, FlockArg::LockExclusive).map_err(|(_, error)| error))
    }

    /// The same, and gives up at the deadline: what holds it may wait for something that never comes.
    pub fn lock_within(&self, deadline: Duration) -> Result<Lock> {
        let end = Instant::now() + deadline;
        self.lock_as(|mut folder| {
            loop {
                match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
                    Err((back, Errno::EWOULDBLOCK)) if Instant::now() < end => folder = back,
                    other => return other.map_err(|(_, error)| error),
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        })
    }

    fn lock_as(&self, take: impl Fn(OwnedFd) -> nix::Result<Lock>) -> Result<Lock> {
        for _ in 0..MOST_TRIES {
            let lock = match take(self.open()?) {
                Err(Errno::EINTR) => continue,
                Err(Errno::EWOULDBLOCK) => {
                    let what = format!("container {} is being made or changed by somebody else", self.id);
                    return Err(Problem::new("E-OCI-STATE", what));
                }
                other => other.doing(|| format!("lock container {}", self.id))?,
            };
            // Whoever had the lock may have removed the folder, and another have made one of the same name.
            let locked = fstat(&*lock).doing(|| format!("look at container {}", self.id))?;
            match stat(&self.folder) {
                Ok(found) if (found.st_dev, found.st_ino) == (locked.st_dev, locked.st_ino) => return Ok(lock),
                Ok(_) | Err(Errno::ENOENT) => {}
                Err(error) => return Err(error).doing(|| format!("look at container {}", self.id)),
            }
        }
        Err(Problem::new("E-OCI-STATE", format!("container {} is removed and made again all the time", self.id)))
    }

    fn open(&self) -> Result<OwnedFd> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        match open(&self.folder, flags, Mode::empty()) {
            Err(Errno::ENOENT) => {
                Err(Problem::new("E-OCI-ABSENT", format!("container \"{}\" does not exist", self.id)))
            }
            other => other.doing(|| format!("open {}", self.folder.display())),
        }
    }

    pub fn state(&self) -> Result<State> {
        let text = fs::read(self.folder.join("state.json")).doing(|| format!("read the state of {}", self.id))?;
        serde_json::from_slice(&text).doing(|| format!("read the state of {}", self.id))
    }

    pub fn set_state(&self, state: &State) -> Result<()> {
        let text = serde_json::to_vec(state).doing(|| "write a state".into())?;
        self.write("state.json", &text)
    }

    pub fn spec(&self) -> Result<Spec> {
        bundle::parse(&self.config()?)
    }

    /// The text of the bundle, as it came.
    pub fn config(&self) -> Result<Vec<u8>> {
        bundle::read(&self.folder.join("config.json"))
    }

    pub fn set_config(&self, text: &[u8]) -> Result<()> {
        self.write("config.json", text)
    }

    fn write(&self, name: &str, content: &[u8]) -> Result<()> {
        write_file(&self.folder.join(name), content, 0o600)
    }

    /// The address at which its first process waits to be started. Short, whatever the folder is called: a socket's
    /// path has 108 bytes. Good as long as the descriptor is open.
    pub fn start_socket(&self) -> Result<(OwnedFd, PathBuf)> {
        let folder = self.open()?;
        let path = format!("/proc/self/fd/{}/start.sock", folder.as_raw_fd());
        Ok((folder, path.into()))
    }

    pub fn is_waiting(&self) -> bool {
        self.folder.join("start.sock").exists()
    }

    pub fn started(&self) {
        let _ = fs::remove_file(self.folder.join("start.sock"));
    }

    /// Its groups, if it has some.
    pub fn cgroup(&self, state: &State) -> Result<Option<Cgroup>> {
        state.cgroup.as_deref().map(Cgroup::at).transpose()
    }

    pub fn status(&self, state: &State) -> Result<Status> {
        if state.pid == 0 {
            return Ok(Status::Creating);
        }
        if !is_alive(state) {
            return Ok(Status::Stopped);
        }
        if state.creating {
            return Ok(Status::Creating);
        }
        if self.cgroup(state)?.is_some_and(|cgroup| cgroup.frozen().unwrap_or(false)) {
            return Ok(Status::Paused);
        }
        Ok(if self.is_waiting() { Status::Created } else { Status::Running })
    }

    /// A descriptor of its first process, if that lives.
    pub fn first(&self, state: &State) -> Option<OwnedFd> {
        if state.pid <= 1 {
            return None;
        }
        let pidfd = daemon::pidfd_open(state.pid).ok()?;
        // The number may have been used again before it was opened.
        is_alive(state).then_some(pidfd)
    }

    pub fn shown(&self, state: &State, status: Status) -> Shown {
        let state = state.clone();
        Shown {
            oci_version: super::VERSION,
            id: state.id,
            pid: if status == Status::Stopped { 0 } else { state.pid },
            status,
            bundle: state.bundle,
            rootfs: state.rootfs,
            created: state.created,
            annotations: state.annotations,
            owner: state.owner,
        }
    }

    /// Removes the folder.
    pub fn forget(&self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// When a process began; none when it has ended, reaped or not.
pub fn began(pid: i32) -> Option<u64> {
    let stat = proc::stat::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?;
    (!matches!(stat.state, 'Z' | 'X')).then_some(stat.start_time)
}

fn is_alive(state: &State) -> bool {
    state.pid > 1 && began(state.pid) == Some(state.start_time)
}

/// Beside it and renamed, so that nobody reads half of it.
pub fn write_file(path: &Path, content: &[u8], mode: u32) -> Result<()> {
    let doing = || format!("write {}", path.display());
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let aside = path.with_file_name(format!(".{name}.{}", std::process::id()));
    let open = || OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&aside);
    let put = |mut file: File| file.write_all(content).and_then(|()| fs::rename(&aside, path));
    open().and_then(put).inspect_err(|_| drop(fs::remove_file(&aside))).doing(doing)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(id: &str) -> State {
        State { id: id.to_owned(), ..State::default() }
    }

    #[test]
    fn a_lock_is_of_the_folder_that_is_there_now() {
        let dir = tempfile::tempdir().unwrap();
        let containers = Containers::at(dir.path()).unwrap();
        let (container, first) = containers.claim(&state("a"), b"{}").unwrap();
        assert_eq!(container.lock_within(Duration::from_millis(5)).unwrap_err().code(), "E-OCI-STATE");
        assert!(containers.claim(&state("a"), b"{}").is_err());
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let waiting = container.clone();
            scope.spawn(move || tell.send(waiting.lock().map(drop)));
            std::thread::sleep(Duration::from_millis(20));
            container.forget();
            let (_, second) = containers.claim(&state("a"), b"{}").unwrap();
            drop(first);
            // What it waited for is gone, and the new one is somebody's.
            assert!(told.recv_timeout(Duration::from_millis(50)).is_err());
            drop(second);
            told.recv().unwrap().unwrap();
        });
        container.forget();
        assert_eq!(container.lock().unwrap_err().code(), "E-OCI-ABSENT");
    }

    #[test]
    fn remains_are_removed_and_containers_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let containers = Containers::at(dir.path()).unwrap();
        let (container, lock) = containers.claim(&state("a"), b"{}").unwrap();
        drop(lock);
        let soon = Duration::from_secs(5);
        containers.remove_remains("a", soon).unwrap();
        container.state().unwrap();
        fs::remove_file(dir.path().join("a/state.json")).unwrap();
        containers.remove_remains("a", soon).unwrap();
        assert!(!dir.path().join("a").exists());
        containers.remove_remains("a", soon).unwrap();
    }
}
