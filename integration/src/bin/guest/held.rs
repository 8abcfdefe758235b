//! What cannot be moved because a descriptor, a mapping or a child of the process holds it: each is opened, and looked at
//! when asked whether it is still what it was.

use crate::{Guest, sys};
use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::Pid;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

/// Something, and what shows that it is still there.
struct Held<T>(T, fn(&T) -> Result<()>);

impl<T> Guest for Held<T> {
    fn verify(&mut self) -> Result<()> {
        (self.1)(&self.0)
    }
}

type SetUp = Result<Box<dyn Guest>>;

fn hold<T: 'static>(what: T, check: fn(&T) -> Result<()>) -> SetUp {
    Ok(Box::new(Held(what, check)))
}

/// A descriptor, and what its link said.
fn descriptor(fd: i64) -> SetUp {
    let file = sys::owned(fd as i32);
    let before = link(&file)?;
    hold((file, before), |(file, before)| {
        let now = link(file)?;
        ensure!(now == *before, "it is {} and was {}", now.display(), before.display());
        Ok(())
    })
}

fn link(file: &File) -> Result<PathBuf> {
    Ok(std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?)
}

fn made(number: i64, args: [i64; 5]) -> SetUp {
    descriptor(sys::call(number, args)?)
}

fn opened(path: &str) -> SetUp {
    use std::os::fd::IntoRawFd;
    descriptor(File::options().read(true).write(true).open(path).context(path.to_owned())?.into_raw_fd().into())
}

pub fn leased() -> SetUp {
    const WRITE: i32 = libc::F_WRLCK;
    let file = File::options().write(true).create(true).truncate(true).open("/tmp/guest-leased")?;
    sys::call(libc::SYS_fcntl, [file.as_raw_fd().into(), libc::F_SETLEASE.into(), WRITE.into(), 0, 0])?;
    hold(file, |file| {
        let lease = sys::call(libc::SYS_fcntl, [file.as_raw_fd().into(), libc::F_GETLEASE.into(), 0, 0, 0])?;
        ensure!(lease == WRITE.into(), "the lease is {lease}");
        Ok(())
    })
}

pub fn fanotify() -> SetUp {
    made(libc::SYS_fanotify_init, [0; 5])
}

pub fn threadwatch() -> SetUp {
    const PIDFD_THREAD: i64 = libc::O_EXCL as i64;
    let (told, tid) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let _ = told.send(nix::unistd::gettid());
        nix::unistd::pause();
    });
    made(libc::SYS_pidfd_open, [tid.recv()?.as_raw().into(), PIDFD_THREAD, 0, 0, 0])
}

pub fn userfault() -> SetUp {
    made(libc::SYS_userfaultfd, [0; 5])
}

pub fn ring() -> SetUp {
    descriptor(sys::io_uring()?)
}

pub fn aio() -> SetUp {
    let ring = sys::io_setup(8)?;
    hold(ring, |ring| {
        let maps = std::fs::read_to_string("/proc/self/maps")?;
        ensure!(maps.contains(&format!("{ring:x}-")), "there is no map at {ring:#x}");
        Ok(())
    })
}

pub fn perf() -> SetUp {
    descriptor(sys::count_own_time()?)
}

pub fn bpfmap() -> SetUp {
    descriptor(sys::bpf_array()?)
}

pub fn bpffilter() -> SetUp {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
    sys::attach_bpf(socket.as_raw_fd())?;
    hold(socket, |socket| {
        // Everything is cut to nothing by the program.
        socket.send_to(b"x", socket.local_addr()?)?;
        socket.set_nonblocking(true)?;
        ensure!(socket.recv(&mut [0; 8]).is_err(), "the filter lets everything in");
        Ok(())
    })
}

pub fn overseer() -> SetUp {
    descriptor(sys::seccomp_listener()?)
}

pub fn secret() -> SetUp {
    made(libc::SYS_memfd_secret, [0; 5])
}

pub fn tun() -> SetUp {
    opened("/dev/net/tun")
}

pub fn fuse() -> SetUp {
    opened("/dev/fuse")
}

pub fn kvm() -> SetUp {
    opened("/dev/kvm")
}

pub fn hostdevice() -> SetUp {
    opened("/dev/loop-control")
}

pub fn mptcp() -> SetUp {
    const IPPROTO_MPTCP: i64 = 262;
    std::fs::write("/proc/sys/net/mptcp/enabled", "1").context("switch multipath TCP on")?;
    made(libc::SYS_socket, [libc::AF_INET.into(), libc::SOCK_STREAM.into(), IPPROTO_MPTCP, 0, 0])
}

pub fn vsock() -> SetUp {
    made(libc::SYS_socket, [libc::AF_VSOCK.into(), libc::SOCK_STREAM.into(), 0, 0, 0])
}

/// Data that is marked as urgent and was not read.
pub fn urgent() -> SetUp {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let ours = TcpStream::connect(listener.local_addr()?)?;
    let (theirs, _) = listener.accept()?;
    sys::send_urgent(ours.as_raw_fd())?;
    hold((ours, theirs), |(_, theirs)| crate::until("the mark", || sys::at_mark(theirs.as_raw_fd()).unwrap_or(false)))
}

/// A file in a folder over which something was mounted since.
pub fn hidden() -> SetUp {
    use nix::mount::{MsFlags, mount};
    const NONE: Option<&str> = None;
    std::fs::create_dir_all("/tmp/guest-hidden")?;
    let mut file = File::options().read(true).write(true).create(true).truncate(true).open("/tmp/guest-hidden/file")?;
    file.write_all(b"below")?;
    mount(Some("guest"), "/tmp/guest-hidden", Some("tmpfs"), MsFlags::empty(), NONE)?;
    hold(file, |file| {
        ensure!(file.metadata()?.len() == 5 && !PathBuf::from("/tmp/guest-hidden/file").exists(), "it is another file");
        Ok(())
    })
}

/// A node of a device that was removed, open by its path only.
pub fn devicenode() -> SetUp {
    use nix::sys::stat::{Mode, SFlag, makedev, mknod};
    let path = "/tmp/guest-node";
    mknod(path, SFlag::S_IFCHR, Mode::from_bits_truncate(0o600), makedev(1, 3))?;
    let file = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path)?;
    std::fs::remove_file(path)?;
    hold(file, |file| {
        use std::os::unix::fs::MetadataExt;
        ensure!(file.metadata()?.rdev() == makedev(1, 3), "it is another device");
        Ok(())
    })
}

/// A child that waits until it is killed, after it has done something.
fn child(first: impl FnOnce() -> Result<()>) -> Result<Pid> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    let child = sys::fork(move || {
        let done = first();
        let _ = (&theirs).write_all(&[u8::from(done.is_ok())]);
        loop {
            nix::unistd::pause();
        }
    })?;
    let mut done = [0];
    std::io::Read::read_exact(&mut &ours, &mut done)?;
    ensure!(done == [1], "the child could not");
    Ok(child)
}

fn name_space(pid: Pid) -> Result<PathBuf> {
    Ok(std::fs::read_link(format!("/proc/{pid}/ns/uts"))?)
}

/// A child in a UTS namespace of its own.
pub fn nested() -> SetUp {
    let child = child(|| Ok(unshare(CloneFlags::CLONE_NEWUTS)?))?;
    hold((child, name_space(child)?), |(child, before)| {
        ensure!(name_space(*child)? == *before && *before != name_space(Pid::this())?, "the child is elsewhere");
        Ok(())
    })
}

/// The name space of a child that is gone.
pub fn namespacefd() -> SetUp {
    use std::os::fd::IntoRawFd;
    let child = child(|| Ok(unshare(CloneFlags::CLONE_NEWUTS)?))?;
    let file = File::open(format!("/proc/{child}/ns/uts"))?;
    nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL)?;
    sys::reap(child)?;
    descriptor(file.into_raw_fd().into())
}

/// A child that we trace.
pub fn traced() -> SetUp {
    let child = child(|| Ok(()))?;
    nix::sys::ptrace::seize(child, nix::sys::ptrace::Options::empty())?;
    hold(child, |child| {
        let status = std::fs::read_to_string(format!("/proc/{child}/status"))?;
        let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:\t"));
        ensure!(tracer == Some(&Pid::this().to_string()), "the tracer is {tracer:?}");
        Ok(())
    })
}

/// A child that has our memory.
pub fn sharedspace() -> SetUp {
    let (child, word) = sys::share_memory()?;
    hold((child, word), |(_, word)| {
        let before = word.load(std::sync::atomic::Ordering::SeqCst);
        crate::until("the child to count", || word.load(std::sync::atomic::Ordering::SeqCst) > before)
    })
}

/// A child that has our directory.
pub fn sharedfolder() -> SetUp {
    let child = sys::fork_sharing(libc::CLONE_FS, || {
        loop {
            nix::unistd::pause();
        }
    })?;
    hold(child, |child| {
        for folder in ["/tmp", "/"] {
            std::env::set_current_dir(folder)?;
            let its = std::fs::read_link(format!("/proc/{child}/cwd"))?;
            ensure!(its == *folder, "the child is in {}", its.display());
        }
        Ok(())
    })
}

/// A thread with a table of descriptors of its own.
pub fn threadapart() -> SetUp {
    let (told, tid) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let apart = unshare(CloneFlags::CLONE_FILES);
        let _ = told.send(apart.map(|()| nix::unistd::gettid()));
        nix::unistd::pause();
    });
    hold(tid.recv()??, |tid| {
        let file = File::open("/etc/passwd")?;
        let its = std::fs::read_link(format!("/proc/{tid}/fd/{}", file.as_raw_fd()));
        ensure!(its.is_err(), "the thread has our descriptor, too");
        Ok(())
    })
}

/// Huge pages that are shared.
pub fn sharedhuge() -> SetUp {
    let mut region = sys::Map::anonymous(2 << 20, libc::MAP_SHARED | libc::MAP_HUGETLB).map()?;
    region.write(0, b"huge");
    hold(region, |region| {
        ensure!(region.read(0, 4) == b"huge", "it holds something else");
        Ok(())
    })
}
