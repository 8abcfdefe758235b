//! What kind of thing a descriptor refers to, and which kinds are refused. Dump and check ask the same function, so a
//! move that was checked does not fail for a kind of file.

use super::View;
use crate::ids::HostPid;
use nix::sys::stat::{FileStat, fstat, major, minor};
use nix::sys::statfs::fstatfs;
use pod_runtime::proc::fdinfo::{self, FdInfo};
use pod_runtime::sys::{descriptor, pidfd};
use pod_runtime::{Doing, Problem, Result};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt;

/// One descriptor of ours, looked at.
#[derive(Debug)]
pub struct Look {
    pub stat: FileStat,
    /// What /proc/self/fd shows: a path or `kind:[number]`.
    pub link: Vec<u8>,
    /// F_GETFL.
    pub flags: i32,
    pub info: FdInfo,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Named or deleted file, directory, symbolic link, also below /proc.
    Regular,
    /// A namespace file, by the name in /proc/PID/ns.
    Namespace,
    Pipe,
    PtyMaster,
    PtySlave,
    Device,
    Memfd,
    Eventfd,
    Epoll,
    Timerfd,
    Signalfd,
    Inotify,
    Pidfd,
    MessageQueue,
    Socket,
}

impl Look {
    pub fn at(fd: BorrowedFd<'_>) -> Result<Look> {
        Look::with(fd, fstat(fd).doing(|| "stat an open file".into())?, None)
    }

    /// With what is known of it already: `info` may be that of another descriptor of the same description, which shows the
    /// locks of its table too.
    pub fn with(fd: BorrowedFd<'_>, stat: FileStat, info: Option<FdInfo>) -> Result<Look> {
        let number = fd.as_raw_fd();
        let link = std::fs::read_link(format!("/proc/self/fd/{number}")).doing(|| "read the name of a file".into())?;
        let info = match info {
            Some(info) => info,
            None => {
                let text = pod_runtime::proc::bytes(format!("/proc/self/fdinfo/{number}"));
                let text = text.doing(|| "read the fdinfo of a file".into())?;
                fdinfo::parse(&String::from_utf8_lossy(&text))
            }
        };
        Ok(Look {
            stat,
            link: link.into_os_string().into_vec(),
            flags: descriptor::status_flags(fd).doing(|| "read the flags of a file".into())?,
            info,
        })
    }

    /// For messages.
    pub fn name(&self) -> String {
        String::from_utf8_lossy(&self.link).into_owned()
    }

    pub fn is_path_only(&self) -> bool {
        self.flags & libc::O_PATH != 0
    }

    /// S_IFMT.
    pub fn format(&self) -> u32 {
        self.stat.st_mode & libc::S_IFMT
    }

    pub fn device(&self) -> (u32, u32) {
        (major(self.stat.st_rdev) as u32, minor(self.stat.st_rdev) as u32)
    }
}

/// `subject` opens the text of a refusal: "pid 41 (nginx), fd 7".
pub fn classify(fd: BorrowedFd<'_>, look: &Look, subject: &str) -> Result<Class> {
    let refuse = |code: &'static str, why: &str| Err(Problem::new(code, format!("{subject}: {why}")));
    if look.link.starts_with(b"anon_inode:") || !look.link.starts_with(b"/") {
        return anonymous(look, subject);
    }
    if look.is_path_only() {
        return Ok(Class::Regular);
    }
    match look.format() {
        libc::S_IFREG => regular(fd, look, subject),
        libc::S_IFDIR => Ok(Class::Regular),
        libc::S_IFIFO => Ok(Class::Pipe),
        libc::S_IFCHR => character_device(look, subject),
        libc::S_IFBLK => refuse("E-FILE-DEVICE", &format!("{} is a block device", look.name())),
        _ => refuse("E-FILE-KIND", &format!("{} is a kind of file that cannot move", look.name())),
    }
}

const MQUEUE_MAGIC: i64 = 0x1980_0202;

fn regular(fd: BorrowedFd<'_>, look: &Look, subject: &str) -> Result<Class> {
    if look.link.starts_with(b"/memfd:") {
        return Ok(Class::Memfd);
    }
    let refuse = |code: &'static str, why: &str| Err(Problem::new(code, format!("{subject}: {why}")));
    if look.link.starts_with(b"/secretmem") {
        return refuse("E-FILE-SECRET", "memory of memfd_secret(2) cannot be read by anyone else");
    }
    if look.link.starts_with(b"/[aio]") {
        return refuse("E-FILE-KIND", "a ring of asynchronous I/O (io_setup) cannot move");
    }
    if descriptor::lease(fd).is_ok_and(|lease| lease == libc::F_WRLCK) {
        let why = format!("{} has a write lease (F_SETLEASE), which reading the file would break", look.name());
        return refuse("E-FILE-LEASE", &why);
    }
    let magic = fstatfs(fd).map(|s| s.filesystem_type().0).unwrap_or(0);
    if magic == MQUEUE_MAGIC {
        return Ok(Class::MessageQueue);
    }
    Ok(Class::Regular)
}

fn character_device(look: &Look, subject: &str) -> Result<Class> {
    let (major, minor) = look.device();
    let what = match (major, minor) {
        (1, 3 | 5 | 7 | 8 | 9) => return Ok(Class::Device),
        (5, 2) => return Ok(Class::PtyMaster),
        (5, 0 | 1) | (136..=143, _) => return Ok(Class::PtySlave),
        (10, 200) => ("E-FILE-TUN", "a tun/tap interface"),
        (10, 229) => ("E-FILE-FUSE", "a connection of a FUSE file system"),
        (10, 232) => ("E-FILE-KVM", "the hypervisor"),
        (4, _) => ("E-FILE-DEVICE", "a console of the host"),
        _ => ("E-FILE-DEVICE", "a device of the host"),
    };
    Err(Problem::new(what.0, format!("{subject}: {} ({major}:{minor}) is {}", look.name(), what.1)))
}

/// Files without a path: by the name that the kernel gives them.
fn anonymous(look: &Look, subject: &str) -> Result<Class> {
    let name = look.name();
    if look.info.pidfd().is_some() {
        return Ok(Class::Pidfd);
    }
    let kind = name.strip_prefix("anon_inode:").unwrap_or(&name).trim_matches(['[', ']']);
    let (code, why) = match kind {
        "eventfd" => return Ok(Class::Eventfd),
        "eventpoll" => return Ok(Class::Epoll),
        "timerfd" => return Ok(Class::Timerfd),
        "signalfd" => return Ok(Class::Signalfd),
        "inotify" => return Ok(Class::Inotify),
        _ if name.starts_with("pipe:[") => return Ok(Class::Pipe),
        _ if name.starts_with("socket:[") => return Ok(Class::Socket),
        _ if is_namespace(&name) => return Ok(Class::Namespace),
        "io_uring" => ("E-FILE-IO-URING", "an io_uring, whose requests in flight cannot be read"),
        "perf_event" => ("E-FILE-PERF", "a perf event of the host's processor"),
        "userfaultfd" => ("E-FILE-USERFAULTFD", "a userfaultfd"),
        "fanotify" => ("E-FILE-FANOTIFY", "a fanotify group"),
        "seccomp notify" => ("E-FILE-SECCOMP", "a listener of seccomp notifications"),
        "bpf-map" | "bpf-prog" | "bpf_link" | "bpf-link" | "btf" | "bpf_iter" => ("E-FILE-BPF", "a bpf object"),
        _ if kind.starts_with("kvm") => ("E-FILE-KVM", "a virtual machine"),
        _ => ("E-FILE-KIND", "a kind of file that cannot move"),
    };
    Err(Problem::new(code, format!("{subject}: {name} is {why}")))
}

/// `net:[4026531840]` and its like.
pub fn is_namespace(link: &str) -> bool {
    const KINDS: [&str; 8] = ["net", "pid", "mnt", "ipc", "uts", "user", "cgroup", "time"];
    link.split_once(":[").is_some_and(|(kind, _)| KINDS.contains(&kind))
}

/// All files of the pod's processes that could not be moved, found without stopping anything: each descriptor is copied
/// and looked at. Descriptors come and go meanwhile, so this is a forecast.
pub fn check(view: &View, processes: &[HostPid]) -> Vec<Problem> {
    let mut problems = Vec::new();
    for host in processes {
        let Ok(pidfd) = pidfd::open_any(host.0) else { continue };
        let Ok(entries) = std::fs::read_dir(format!("/proc/{host}/fd")) else { continue };
        let name = std::fs::read_to_string(format!("/proc/{host}/comm")).unwrap_or_default();
        let pid = view.pid_in_pod(*host).map_or(0, |pid| pid.0);
        for number in entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse::<i32>().ok()) {
            let subject = format!("pid {pid} ({}), fd {number}", name.trim());
            let Ok(fd) = pidfd::get_fd(&pidfd, number) else { continue };
            problems.extend(check_one(view, &fd, &subject).err());
        }
    }
    problems
}

fn check_one(view: &View, fd: &std::os::fd::OwnedFd, subject: &str) -> Result<()> {
    use std::os::fd::AsFd;
    let look = Look::at(fd.as_fd())?;
    match classify(fd.as_fd(), &look, subject)? {
        Class::Socket => super::socket::check(fd.as_fd(), subject),
        Class::MessageQueue => crate::objects::namespaces::mqueue::refuse(fd.as_fd(), subject),
        Class::Pidfd => super::pidfd::dump(&look.info, look.flags, subject, view.depth).map(drop),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn class(fd: impl AsFd) -> Result<Class> {
        classify(fd.as_fd(), &Look::at(fd.as_fd())?, "pid 1 (test), fd 3")
    }

    #[test]
    fn common_files() {
        assert_eq!(class(std::fs::File::open("/dev/null").unwrap()).unwrap(), Class::Device);
        assert_eq!(class(std::fs::File::open("/proc/self/maps").unwrap()).unwrap(), Class::Regular);
        assert_eq!(class(std::fs::File::open("/").unwrap()).unwrap(), Class::Regular);
        let (reader, _writer) = std::io::pipe().unwrap();
        assert_eq!(class(reader).unwrap(), Class::Pipe);
        assert_eq!(class(std::os::unix::net::UnixDatagram::unbound().unwrap()).unwrap(), Class::Socket);
        assert_eq!(class(std::fs::File::open("/proc/self/ns/net").unwrap()).unwrap(), Class::Namespace);
    }

    #[test]
    fn namespaces_by_link() {
        assert!(is_namespace("net:[4026531840]"));
        assert!(!is_namespace("pipe:[17]"));
    }
}
