//! Birth of a pod: its namespaces, cgroup, file tree and first process. Called in the pod's monitor, which becomes the
//! parent of the first process.
//!
//! `run` and `restore` share all of it. The difference is the last step of the child ([`Purpose`]): it becomes the
//! user's program, or it parks, that is, keeps nothing open but its end of [`Born::sync`] and blocks in read(2) there
//! until the engine has turned it into something else. A birth that fails leaves no process, mount, namespace or cgroup
//! behind; from a [`Born`] on, that is up to the caller.

use crate::cgroup::Cgroup;
use crate::init::first::{CLOCKS, First, GO, GROUPS, News, PLACES};
use crate::namespaces;
use crate::problem::{Doing, Problem, Result};
use crate::proc;
use crate::proc::mountinfo::{self, Mount};
use crate::spec::Spec;
use crate::store::Pod;
use crate::sys::clone::{self, CLONE_NEWTIME, Cloned};
use crate::sys::{daemon, process};
use crate::usher::{Inside, Usher};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::libc;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recv, recvmsg};
use nix::sys::stat::Mode;
use std::collections::BTreeMap;
use std::fs;
use std::io::{IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What the pod's clocks show more (or less) than this host's, in nanoseconds. Zero for a new pod; for a restored one,
/// what makes them go on where they stopped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Clocks {
    pub monotonic: i128,
    pub boottime: i128,
}

#[derive(Debug, Clone, Copy)]
pub enum Purpose {
    /// The first process becomes the user's program when [`Born::start`] says so.
    Run,
    /// The first process parks, to be filled. With this, an usher ([`Born::usher`]) is there to make a process that
    /// does it.
    Fill(Option<Inside>),
}

/// What the first process gets as descriptors 0, 1 and 2. Nothing of it is used for [`Purpose::Fill`].
#[derive(Debug)]
pub enum Stdio {
    /// A pty of the pod's own devpts, also its controlling terminal; the master comes back as [`Born::console`].
    Terminal { rows: u16, columns: u16 },
    /// These three.
    Files([OwnedFd; 3]),
    /// The pod's own /dev/null three times.
    Null,
}

/// A pod with a first process that does not run anything of the user's yet.
#[derive(Debug)]
pub struct Born {
    /// The first process as this host numbers it; a child of the caller, who reaps it.
    pub init: i32,
    pub pidfd: OwnedFd,
    /// The other end is the only descriptor of a parked first process.
    pub sync: UnixStream,
    pub cgroup: Cgroup,
    /// Master side of the pty, for [`Stdio::Terminal`].
    pub console: Option<OwnedFd>,
    /// Who has joined the pod's groups already.
    pub usher: Option<Usher>,
    /// What this host could not give and the pod lives without, a line each.
    pub warnings: Vec<String>,
}

impl Born {
    /// Lets the first process become the user's program and returns when it has. A program that cannot be executed is
    /// `E-COMMAND-NOT-FOUND` (exit code 127) or `E-COMMAND-NOT-EXECUTABLE` (126).
    pub fn start(&self) -> Result<()> {
        let doing = || "start the pod's program".to_owned();
        (&self.sync).write_all(&[GO]).doing(doing)?;
        // The other end closes at exec.
        let mut said = Vec::new();
        (&self.sync).take(BOUND).read_to_end(&mut said).doing(doing)?;
        if said.is_empty() {
            return Ok(());
        }
        match serde_json::from_slice(&said).doing(doing)? {
            News::Problem(report) => Err(report.into()),
            _ => Err(unexpected()),
        }
    }
}

fn unexpected() -> Problem {
    Problem::new("E-SYSTEM", "the pod's first process said something unexpected")
}

/// No more than this is heard from a first process.
const BOUND: u64 = 1 << 16;
/// And so many descriptors with a line.
const MOST_FDS: usize = 4;

/// Makes the pod's environment and its first process.
///
/// `meanwhile` gets the first process's pid as soon as its namespaces exist, and runs while that process builds its
/// file tree: the place to attach the network. When it fails, so does the birth.
pub fn birth(
    spec: &Spec,
    pod: &Pod,
    clocks: Clocks,
    purpose: Purpose,
    stdio: Stdio,
    meanwhile: impl FnOnce(i32) -> Result<()>,
) -> Result<Born> {
    conceive(spec, pod, Some(clocks), purpose, stdio, meanwhile)?.0.birth(pod, None)
}

/// A pod that has all that does not depend on its files and clocks: cgroup, namespaces, a first process. Dropping it
/// ends it.
#[derive(Debug)]
pub struct Conceived {
    born: Option<Born>,
    /// Roots of file systems in memory, by where they will be mounted.
    in_memory: BTreeMap<String, OwnedFd>,
}

/// The first half of a birth, for a pod whose files and clocks are still to come. With `clocks` the first process does
/// not wait for [`Conceived::birth`].
///
/// `meanwhile` gets the first process's pid as soon as its namespaces exist. When it fails, so does all of it. Without
/// `clocks` this returns when the first process waits for them: what can fail before that has not failed.
pub fn conceive<T>(
    spec: &Spec,
    pod: &Pod,
    clocks: Option<Clocks>,
    purpose: Purpose,
    stdio: Stdio,
    meanwhile: impl FnOnce(i32) -> Result<T>,
) -> Result<(Conceived, T)> {
    // The first process would find out too late.
    if clocks.is_none() && !Path::new("/proc/self/ns/time_for_children").exists() {
        return Err(namespaces::no_time_namespace(Errno::ENOSYS));
    }
    let outer_pid_max = fs::read_to_string("/proc/sys/kernel/pid_max").ok().map(|text| text.trim().to_owned());
    let cgroup = Cgroup::begin(pod.id())?;
    let cloned = UnixStream::pair().doing(|| "make a socket pair".into()).and_then(|pair| {
        let clone = || cgroup.fork(NAMESPACES).doing(|| "make the pod's namespaces".into());
        Ok((pair, clocks.map_or_else(clone, |clocks| in_time_namespace(clocks, clone))?))
    });
    let ((ours, theirs), (cloned, place)) = cloned.inspect_err(|_| {
        let _ = cgroup.remove(Duration::ZERO);
    })?;
    let (init, pidfd) = match cloned {
        Cloned::Parent { pid, pidfd } => (pid, pidfd),
        Cloned::Child => {
            drop(ours);
            let (waits, cgroup) = (clocks.is_none(), (&cgroup, place));
            First { spec, pod, cgroup, purpose, stdio, sync: theirs, outer_pid_max, waits }.live()
        }
    };
    drop((theirs, stdio));
    let born = Born { init, pidfd, sync: ours, cgroup, console: None, usher: None, warnings: Vec::new() };
    let mut conceived = Conceived { born: Some(born), in_memory: BTreeMap::new() };
    let born = conceived.born.as_mut().expect("it is there until birth or drop");
    // While the first process makes what it can without them.
    let device_nodes = complete_groups(born, spec)?;
    // A process that has died meanwhile has said why.
    let _ = (&born.sync).write_all(&[GROUPS, device_nodes.into()]);
    if let Purpose::Fill(Some(inside)) = purpose {
        born.usher = Some(Usher::start(&born.pidfd, &born.cgroup, inside)?);
    }
    match hear(&born.sync)?.0 {
        News::Apart => {}
        News::Problem(report) => return Err(report.into()),
        _ => return Err(unexpected()),
    }
    let done = meanwhile(born.init)?;
    if clocks.is_none() {
        match hear(&born.sync)? {
            (News::Waiting { folders }, roots) => conceived.in_memory = folders.into_iter().zip(roots).collect(),
            (News::Problem(report), _) => return Err(report.into()),
            _ => return Err(unexpected()),
        }
    }
    Ok((conceived, done))
}

/// The groups that the first process will enter, its limits and its devices. Whether device nodes may work on the pod's
/// own storage.
fn complete_groups(born: &mut Born, spec: &Spec) -> Result<bool> {
    born.warnings.extend(born.cgroup.complete(&spec.resources)?);
    let unguarded = born.cgroup.allow_devices(&spec.devices, spec.security.privileged)?;
    let device_nodes = unguarded.is_empty();
    born.warnings.extend(unguarded);
    Ok(device_nodes)
}

impl Conceived {
    /// The first process as this host numbers it.
    pub fn first(&self) -> i32 {
        self.born.as_ref().map_or(0, |born| born.init)
    }

    /// Has the first process map private memory at these places (start, end), where nothing of its own lies, for others to
    /// fill through the userfaultfd that comes back with the places that it could map. Its children do not get it, and what
    /// becomes of it is up to who takes the process over. Only while the process waits for its files.
    pub fn lay_out(&self, places: &[(u64, u64)]) -> Result<(OwnedFd, Vec<(u64, u64)>)> {
        let born = self.born.as_ref().expect("it is there until birth or drop");
        let doing = || "have the first process map memory".to_owned();
        let mut message = vec![PLACES];
        message.extend_from_slice(&(places.len() as u64).to_ne_bytes());
        for (start, end) in places {
            message.extend_from_slice(&start.to_ne_bytes());
            message.extend_from_slice(&end.to_ne_bytes());
        }
        (&born.sync).write_all(&message).doing(doing)?;
        let (news, fds) = hear(&born.sync)?;
        match (news, fds.into_iter().next()) {
            (News::Laid { places }, Some(fd)) => Ok((fd, places)),
            (News::Problem(report), _) => Err(report.into()),
            _ => Err(unexpected()),
        }
    }

    /// The root of the file system in memory that will be mounted at this path, to be filled before. None where the pod gets
    /// none of its own: see [`crate::rootfs::folders_in_memory`].
    pub fn in_memory(&self, path: &[u8]) -> Option<Result<OwnedFd>> {
        let root = self.in_memory.get(std::str::from_utf8(path).ok()?)?;
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Some(openat(root, ".", flags, Mode::empty()).doing(|| "open a file system in memory".into()))
    }

    /// The second half: the files are there, and this is what the clocks show (unless that was said before).
    pub fn birth(mut self, pod: &Pod, clocks: Option<Clocks>) -> Result<Born> {
        let born = self.born.as_mut().expect("it is there until birth or drop");
        if let Some(clocks) = clocks {
            let mut message = vec![CLOCKS];
            message.extend_from_slice(&clocks.encode());
            // A process that has died meanwhile has said why.
            let _ = (&born.sync).write_all(&message);
        }
        raise(born, pod)?;
        Ok(self.born.take().expect("it is there until birth or drop"))
    }
}

impl Drop for Conceived {
    fn drop(&mut self) {
        let Some(mut born) = self.born.take() else { return };
        born.usher = None;
        let _ = process::kill_by_pidfd(born.pidfd.as_fd(), libc::SIGKILL);
        let _ = daemon::reap(born.init);
        let _ = born.cgroup.remove(Duration::from_secs(5));
    }
}

impl Clocks {
    pub(crate) const BYTES: usize = 32;

    fn encode(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..16].copy_from_slice(&self.monotonic.to_ne_bytes());
        bytes[16..].copy_from_slice(&self.boottime.to_ne_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; Self::BYTES]) -> Clocks {
        let number = |half: &[u8]| i128::from_ne_bytes(half.try_into().expect("sixteen bytes"));
        Clocks { monotonic: number(&bytes[..16]), boottime: number(&bytes[16..]) }
    }
}

/// The monitor's side of what [`First`] does.
fn raise(born: &mut Born, pod: &Pod) -> Result<()> {
    let (news, fds) = hear(&born.sync)?;
    match news {
        News::Problem(report) => return Err(report.into()),
        News::Ready { warnings } => born.warnings.extend(warnings),
        _ => return Err(unexpected()),
    }
    born.console = fds.into_iter().next();
    let mounts = serde_json::to_vec(&mounts_of(born.init)?).doing(|| "write down the pod's mounts".into())?;
    // Nothing hangs on it after a crash of the host: not synced.
    fs::write(mounts_path(pod), mounts).doing(|| "write down the pod's mounts".into())
}

/// One line, and the descriptors that came with it.
fn hear(sync: &UnixStream) -> Result<(News, Vec<OwnedFd>)> {
    let doing = || "hear from the pod's first process".to_owned();
    let (mut line, mut received) = (Vec::new(), Vec::new());
    while !line.ends_with(b"\n") {
        let mut buffer = [0; 4096];
        // The next line may be there already, and it may come with a descriptor.
        let there = match recv(sync.as_raw_fd(), &mut buffer, MsgFlags::MSG_PEEK) {
            Err(Errno::EINTR) => continue,
            other => other.doing(doing)?,
        };
        let most = buffer[..there].iter().position(|byte| *byte == b'\n').map_or(there, |at| at + 1);
        let mut slices = [IoSliceMut::new(&mut buffer[..most])];
        let mut space = nix::cmsg_space!([i32; MOST_FDS]);
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = match recvmsg::<()>(sync.as_raw_fd(), &mut slices, Some(&mut space), flags) {
            Err(Errno::EINTR) => continue,
            other => other.doing(doing)?,
        };
        for part in message.cmsgs().doing(doing)? {
            if let ControlMessageOwned::ScmRights(fds) = part {
                received.extend(fds.into_iter().map(process::received));
            }
        }
        let count = message.bytes;
        if count == 0 || line.len() as u64 > BOUND {
            return Err(Problem::new("E-SYSTEM", "the pod's first process died while it built the pod"));
        }
        line.extend_from_slice(&buffer[..count]);
    }
    Ok((serde_json::from_slice(&line).doing(doing)?, received))
}

/// What the first process is cloned into. The rest it makes itself: the network one because it takes longest, and the
/// monitor has something else to do; the cgroup one because its root is the group that it is made in.
const NAMESPACES: u64 = (libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS) as u64;

/// Takes the calling process, which is single-threaded, into a new time namespace with these clocks.
pub(crate) fn enter_time_namespace(clocks: Clocks) -> Result<()> {
    let doing = || "enter the pod's time namespace".to_owned();
    clone::unshare(CLONE_NEWTIME as i32).map_err(namespaces::no_time_namespace)?;
    fs::write("/proc/self/timens_offsets", namespaces::time_offsets(clocks)).doing(doing)?;
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let new = open("/proc/self/ns/time_for_children", flags, Mode::empty()).doing(doing)?;
    clone::setns(new.as_fd(), CLONE_NEWTIME as i32).doing(doing)
}

/// Clones by `clone`, the child in a new time namespace with these clocks. The caller itself and its later children
/// stay in the one that they were in.
pub(crate) fn in_time_namespace<T>(clocks: Clocks, clone: impl FnOnce() -> Result<(Cloned, T)>) -> Result<(Cloned, T)> {
    let doing = || "make the pod's time namespace".to_owned();
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let own = open("/proc/self/ns/time", flags, Mode::empty()).map_err(namespaces::no_time_namespace)?;
    clone::unshare(CLONE_NEWTIME as i32).map_err(namespaces::no_time_namespace)?;
    let shifted = fs::write("/proc/self/timens_offsets", namespaces::time_offsets(clocks)).doing(doing);
    let cloned = shifted.and_then(|()| clone());
    if !matches!(cloned, Ok((Cloned::Child, _))) {
        clone::setns(own.as_fd(), CLONE_NEWTIME as i32).doing(doing)?;
    }
    cloned
}

/// The mounts that the birth made are written down, so that a later look can tell which were made by the pod itself.
pub fn mounts_path(pod: &Pod) -> PathBuf {
    pod.dir().join("mounts.json")
}

/// The mounts that a process sees.
pub fn mounts_of(pid: i32) -> Result<Vec<Mount>> {
    let doing = || format!("read the mounts of process {pid}");
    let text = proc::bytes(format!("/proc/{pid}/mountinfo")).doing(doing)?;
    mountinfo::parse(&text).ok_or_else(|| Problem::new("E-SYSTEM", "mountinfo is not as the kernel writes it"))
}

/// All namespaces of a pod; the time namespace of a caller changes only when it is single-threaded, as it must be.
const ALL: i32 = libc::CLONE_NEWPID
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWTIME;

/// Forks a child of the caller inside all namespaces and the cgroup of a living pod, and runs `f` there; the child
/// ends with what `f` returns. With `pid_in_pod` the child has exactly this pid inside. Returns its pid on this host.
///
/// `f` runs with the credentials of the caller, non-dumpable (nothing inside the pod can trace it or look at its
/// descriptors), its descriptors still open: it must close what the pod must not have before it becomes a program.
pub fn enter(init: &OwnedFd, cgroup: &Cgroup, pid_in_pod: Option<i32>, f: impl FnOnce() -> i32) -> Result<i32> {
    if cgroup.frozen()? {
        return Err(Problem::new("E-STATE", "the pod is paused: nothing can be started in it").fix("pod unpause POD"));
    }
    let (ours, theirs) = UnixStream::pair().doing(|| "make a socket pair".into())?;
    // setns changes the pid namespace of children only, and of the caller for good everything else: so a helper goes
    // in, and the child that it makes there becomes its sibling.
    let (cloned, place) = cgroup.fork(0).doing(|| "fork".into())?;
    match cloned {
        Cloned::Child => {
            drop(ours);
            let hidden = process::set_dumpable(false).doing(|| "hide from the pod's processes".into());
            let joined = hidden.and_then(|()| cgroup.enter(place));
            let told = joined.and_then(|()| go_in(init, pid_in_pod)).and_then(|cloned| match cloned {
                Cloned::Child => {
                    daemon::close_number(theirs.as_raw_fd());
                    daemon::exit_now(f())
                }
                Cloned::Parent { pid, .. } => Ok(pid),
            });
            let told = told.map_err(|problem| problem.report());
            let _ = serde_json::to_writer(&theirs, &told);
            daemon::exit_now(0)
        }
        Cloned::Parent { pid: helper, .. } => {
            drop(theirs);
            let mut told = Vec::new();
            let heard = (&ours).take(BOUND).read_to_end(&mut told);
            let _ = daemon::reap(helper);
            heard.doing(|| "hear from a helper".into())?;
            let told: Result<i32, crate::problem::Report> =
                serde_json::from_slice(&told).doing(|| "enter the pod: the helper died".into())?;
            told.map_err(Problem::from)
        }
    }
}

/// In a helper that has joined the pod's groups: enters the pod and makes a child there, its sibling.
pub(crate) fn go_in(init: &OwnedFd, pid_in_pod: Option<i32>) -> Result<Cloned> {
    clone::setns(init.as_fd(), ALL).doing(|| "enter the pod's namespaces".into())?;
    let parent = libc::CLONE_PARENT as u64;
    clone::clone3(parent, None, pid_in_pod).map_err(|error| match (error, pid_in_pod) {
        (Errno::EEXIST, Some(pid)) => Problem::new("E-SYSTEM", format!("pid {pid} of the pod is taken")),
        (error, _) => Problem::new("E-SYSTEM", "make a process in the pod").because(error),
    })
}
