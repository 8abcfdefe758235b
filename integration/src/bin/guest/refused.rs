//! What cannot be moved and is refused by name: each is made, and looked at when asked whether it is still what it was, for
//! the guest must go on as if nobody had tried.

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

/// By name, as `integration/tests/refused.rs` knows them with their codes.
pub const REFUSED: &[(&str, crate::SetUp)] = &[
    ("addressset", addressset),
    ("aio", aio),
    ("bpffilter", bpffilter),
    ("bpfmap", bpfmap),
    ("covering", covering),
    ("devicenode", devicenode),
    ("fanotify", fanotify),
    ("filtered", filtered),
    ("frozengroup", frozengroup),
    ("fuse", fuse),
    ("hidden", hidden),
    ("hostdevice", hostdevice),
    ("ipsec", ipsec),
    ("keyring", keyring),
    ("kvm", kvm),
    ("landlock", landlock),
    ("leased", leased),
    ("mptcp", mptcp),
    ("namespacefd", namespacefd),
    ("nested", nested),
    ("notified", notified),
    ("overseer", overseer),
    ("perf", perf),
    ("ring", ring),
    ("secret", secret),
    ("shaped", shaped),
    ("sharedfolder", sharedfolder),
    ("sharedhuge", sharedhuge),
    ("sharedspace", sharedspace),
    ("sharedtable", sharedtable),
    ("threadapart", threadapart),
    ("threadwatch", threadwatch),
    ("traced", traced),
    ("tun", tun),
    ("urgent", urgent),
    ("userfault", userfault),
    ("vsock", vsock),
];

/// Something, and what shows that it is still there.
struct Held<T>(T, fn(&T) -> Result<()>);

impl<T> Guest for Held<T> {
    fn verify(&mut self) -> Result<()> {
        (self.1)(&self.0)
    }
}

type Made = Result<Box<dyn Guest>>;

fn hold<T: 'static>(what: T, check: fn(&T) -> Result<()>) -> Made {
    Ok(Box::new(Held(what, check)))
}

/// A descriptor, and what its link said.
fn descriptor(fd: i64) -> Made {
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

fn made(number: i64, args: [i64; 5]) -> Made {
    descriptor(sys::call(number, args)?)
}

fn opened(path: &str) -> Made {
    use std::os::fd::IntoRawFd;
    descriptor(File::options().read(true).write(true).open(path).context(path.to_owned())?.into_raw_fd().into())
}

fn leased() -> Made {
    const WRITE: i32 = libc::F_WRLCK;
    let file = File::options().write(true).create(true).truncate(true).open("/tmp/guest-leased")?;
    sys::call(libc::SYS_fcntl, [file.as_raw_fd().into(), libc::F_SETLEASE.into(), WRITE.into(), 0, 0])?;
    hold(file, |file| {
        let lease = sys::call(libc::SYS_fcntl, [file.as_raw_fd().into(), libc::F_GETLEASE.into(), 0, 0, 0])?;
        ensure!(lease == WRITE.into(), "the lease is {lease}");
        Ok(())
    })
}

fn fanotify() -> Made {
    made(libc::SYS_fanotify_init, [0; 5])
}

fn threadwatch() -> Made {
    const PIDFD_THREAD: i64 = libc::O_EXCL as i64;
    let (told, tid) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let _ = told.send(nix::unistd::gettid());
        nix::unistd::pause();
    });
    made(libc::SYS_pidfd_open, [tid.recv()?.as_raw().into(), PIDFD_THREAD, 0, 0, 0])
}

fn userfault() -> Made {
    made(libc::SYS_userfaultfd, [0; 5])
}

fn ring() -> Made {
    descriptor(sys::io_uring()?)
}

fn aio() -> Made {
    let ring = sys::io_setup(8)?;
    hold(ring, |ring| {
        let maps = std::fs::read_to_string("/proc/self/maps")?;
        ensure!(maps.contains(&format!("{ring:x}-")), "there is no map at {ring:#x}");
        Ok(())
    })
}

fn perf() -> Made {
    descriptor(sys::count_own_time()?)
}

fn bpfmap() -> Made {
    descriptor(sys::bpf_array()?)
}

fn bpffilter() -> Made {
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

fn overseer() -> Made {
    descriptor(sys::seccomp_listener()?)
}

fn secret() -> Made {
    made(libc::SYS_memfd_secret, [0; 5])
}

fn tun() -> Made {
    opened("/dev/net/tun")
}

fn fuse() -> Made {
    opened("/dev/fuse")
}

fn kvm() -> Made {
    opened("/dev/kvm")
}

fn hostdevice() -> Made {
    opened("/dev/loop-control")
}

fn mptcp() -> Made {
    const IPPROTO_MPTCP: i64 = 262;
    std::fs::write("/proc/sys/net/mptcp/enabled", "1").context("switch multipath TCP on")?;
    made(libc::SYS_socket, [libc::AF_INET.into(), libc::SOCK_STREAM.into(), IPPROTO_MPTCP, 0, 0])
}

fn vsock() -> Made {
    made(libc::SYS_socket, [libc::AF_VSOCK.into(), libc::SOCK_STREAM.into(), 0, 0, 0])
}

/// Data that is marked as urgent and was not read.
fn urgent() -> Made {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let ours = TcpStream::connect(listener.local_addr()?)?;
    let (theirs, _) = listener.accept()?;
    sys::send_urgent(ours.as_raw_fd())?;
    hold((ours, theirs), |(_, theirs)| crate::until("the mark", || sys::at_mark(theirs.as_raw_fd()).unwrap_or(false)))
}

/// A file in a folder over which something was mounted since.
fn hidden() -> Made {
    std::fs::create_dir_all("/tmp/guest-hidden")?;
    let mut file = File::options().read(true).write(true).create(true).truncate(true).open("/tmp/guest-hidden/file")?;
    file.write_all(b"below")?;
    mount_over("/tmp/guest-hidden")?;
    hold(file, |file| {
        ensure!(file.metadata()?.len() == 5 && !PathBuf::from("/tmp/guest-hidden/file").exists(), "it is another file");
        Ok(())
    })
}

/// A node of a device that was removed, open by its path only.
fn devicenode() -> Made {
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
fn nested() -> Made {
    let child = child(|| Ok(unshare(CloneFlags::CLONE_NEWUTS)?))?;
    hold((child, name_space(child)?), |(child, before)| {
        ensure!(name_space(*child)? == *before && *before != name_space(Pid::this())?, "the child is elsewhere");
        Ok(())
    })
}

/// The name space of a child that is gone.
fn namespacefd() -> Made {
    use std::os::fd::IntoRawFd;
    let child = child(|| Ok(unshare(CloneFlags::CLONE_NEWUTS)?))?;
    let file = File::open(format!("/proc/{child}/ns/uts"))?;
    nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL)?;
    sys::reap(child)?;
    descriptor(file.into_raw_fd().into())
}

/// A child that we trace.
fn traced() -> Made {
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
fn sharedspace() -> Made {
    let (child, word) = sys::share_memory()?;
    hold((child, word), |(_, word)| {
        let before = word.load(std::sync::atomic::Ordering::SeqCst);
        crate::until("the child to count", || word.load(std::sync::atomic::Ordering::SeqCst) > before)
    })
}

/// A child that waits until it is killed, and shares what a flag of clone(2) says.
fn sharing(flag: i32) -> Result<Pid> {
    sys::fork_sharing(flag, || {
        loop {
            nix::unistd::pause();
        }
    })
}

/// A child that has the same table of descriptors.
fn sharedtable() -> Made {
    hold(sharing(libc::CLONE_FILES)?, |child| {
        let opened = File::open("/etc/passwd")?;
        let link = std::fs::read_link(format!("/proc/{child}/fd/{}", opened.as_raw_fd()))?;
        ensure!(link.ends_with("passwd"), "the child has {}", link.display());
        Ok(())
    })
}

/// A child that has our directory.
fn sharedfolder() -> Made {
    hold(sharing(libc::CLONE_FS)?, |child| {
        for folder in ["/tmp", "/"] {
            std::env::set_current_dir(folder)?;
            let its = std::fs::read_link(format!("/proc/{child}/cwd"))?;
            ensure!(its == *folder, "the child is in {}", its.display());
        }
        Ok(())
    })
}

/// A thread with a table of descriptors of its own.
fn threadapart() -> Made {
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
fn sharedhuge() -> Made {
    let mut region = sys::Map::anonymous(2 << 20, libc::MAP_SHARED | libc::MAP_HUGETLB).map()?;
    region.write(0, b"huge");
    hold(region, |region| {
        ensure!(region.read(0, 4) == b"huge", "it holds something else");
        Ok(())
    })
}

/// A right that was given up: to write files.
fn landlock() -> Made {
    sys::landlock_no_writing()?;
    hold((), |()| {
        let opened = File::options().write(true).open("/dev/null");
        ensure!(opened.is_err(), "the restriction is gone");
        Ok(())
    })
}

/// A key in the keyring of the process.
fn keyring() -> Made {
    /// KEY_SPEC_PROCESS_KEYRING.
    const PROCESS_KEYRING: i64 = -2;
    const KEYCTL_SEARCH: i64 = 10;
    let (kind, name) = (c"user".as_ptr() as i64, c"guest".as_ptr() as i64);
    sys::call(libc::SYS_add_key, [kind, name, c"x".as_ptr() as i64, 1, PROCESS_KEYRING])?;
    hold((kind, name), |(kind, name)| {
        sys::call(libc::SYS_keyctl, [KEYCTL_SEARCH, PROCESS_KEYRING, *kind, *name, 0]).context("the key is gone")?;
        Ok(())
    })
}

/// A message queue that tells of its next message.
fn notified() -> Made {
    let queue = sys::mq_open(c"guest-notified", libc::O_RDWR | libc::O_CREAT)?;
    sys::count_signals(libc::SIGUSR2)?;
    sys::mq_notify(queue.as_raw_fd(), libc::SIGUSR2)?;
    hold(queue, |queue| {
        let before = sys::signals(libc::SIGUSR2);
        sys::mq_send(queue.as_raw_fd(), 0, b"x")?;
        crate::until("to be told", || sys::signals(libc::SIGUSR2) > before)?;
        sys::mq_receive(queue.as_raw_fd())?;
        sys::mq_notify(queue.as_raw_fd(), libc::SIGUSR2)
    })
}

/// A table of packet filters.
fn filtered() -> Made {
    let made = std::process::Command::new("nft").args(["add", "table", "ip", "guest"]).status()?;
    ensure!(made.success(), "nft: {made}");
    hold((), |()| {
        let found = std::process::Command::new("nft").args(["list", "tables"]).output()?;
        ensure!(found.stdout == b"table ip guest\n", "nft lists {:?}", String::from_utf8_lossy(&found.stdout));
        Ok(())
    })
}

/// What a program prints; it must succeed.
fn printed(program: &str, args: &str) -> Result<String> {
    let output = std::process::Command::new(program).args(args.split(' ')).output()?;
    ensure!(output.status.success(), "{program} {args}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// A queueing discipline that was asked for.
fn shaped() -> Made {
    // One that holds nothing up: another guest may be on the same network.
    printed("tc", "qdisc add dev lo clsact")?;
    hold((), |()| {
        let shown = printed("tc", "qdisc show dev lo")?;
        ensure!(shown.contains("qdisc clsact"), "tc shows {shown:?}");
        Ok(())
    })
}

/// A policy of IPsec.
fn ipsec() -> Made {
    printed("ip", "xfrm policy add src 10.1.1.1 dst 10.1.1.2 dir out action block")?;
    hold((), |()| {
        let shown = printed("ip", "xfrm policy")?;
        ensure!(shown.contains("src 10.1.1.1/32 dst 10.1.1.2/32"), "ip shows {shown:?}");
        Ok(())
    })
}

/// A set of addresses, as ipset(8) makes them.
fn addressset() -> Made {
    const CREATE: u16 = 2;
    const HEADER: u16 = 12;
    // Name, type, revision, family, and nothing that its type would take.
    let about = [
        attribute(2, b"guest\0"),
        attribute(3, b"hash:ip\0"),
        attribute(4, &[0]),
        attribute(5, &[2]),
        vec![4, 0, 7, 0x80],
    ];
    ip_set(CREATE, &about.concat())?;
    hold((), |()| ip_set(HEADER, &attribute(2, b"guest\0")))
}

fn attribute(number: u8, value: &[u8]) -> Vec<u8> {
    let length = 4 + value.len();
    let mut attribute = [&[length as u8, 0, number, 0][..], value].concat();
    attribute.resize(length.next_multiple_of(4), 0);
    attribute
}

/// A request that is to be acknowledged.
fn ip_set(command: u16, attributes: &[u8]) -> Result<()> {
    use std::io::Read;
    const NETFILTER: i64 = 12;
    let socket = sys::call(libc::SYS_socket, [libc::AF_NETLINK.into(), libc::SOCK_RAW.into(), NETFILTER, 0, 0])?;
    let mut socket = sys::owned(socket as i32);
    // struct nlmsghdr, struct nfgenmsg, the version of the protocol.
    let mut message = [0u8; 20].to_vec();
    message.extend(attribute(1, &[6]));
    message.extend_from_slice(attributes);
    let (length, kind, flags) = (message.len() as u32, 6 << 8 | command, 5u16);
    message[..4].copy_from_slice(&length.to_ne_bytes());
    message[4..6].copy_from_slice(&kind.to_ne_bytes());
    message[6..8].copy_from_slice(&flags.to_ne_bytes());
    socket.write_all(&message)?;
    let mut answer = [0; 512];
    let got = socket.read(&mut answer)?;
    let code = if got >= 20 && answer[4] == 2 { i32::from_ne_bytes(answer[16..20].try_into()?) } else { 0 };
    ensure!(code == 0, "command {command} is answered by {code}");
    Ok(())
}

/// A control group below the pod's own that is frozen, with a process in it.
fn frozengroup() -> Made {
    let child = child(|| Ok(()))?;
    let folder = PathBuf::from("/sys/fs/cgroup");
    let folder =
        if folder.join("cgroup.procs").exists() { folder } else { folder.join("unified") }.join("guest-frozen");
    std::fs::create_dir(&folder)?;
    std::fs::write(folder.join("cgroup.procs"), child.to_string())?;
    std::fs::write(folder.join("cgroup.freeze"), "1")?;
    hold(folder, |folder| {
        let events = std::fs::read_to_string(folder.join("cgroup.events"))?;
        ensure!(events.contains("populated 1") && events.contains("frozen 1"), "{events}");
        Ok(())
    })
}

fn mount_over(target: &str) -> Result<()> {
    const NONE: Option<&str> = None;
    Ok(nix::mount::mount(Some("guest"), target, Some("tmpfs"), nix::mount::MsFlags::empty(), NONE)?)
}

/// A tmpfs over one that every pod has.
fn covering() -> Made {
    mount_over("/dev/shm")?;
    std::fs::write("/dev/shm/mine", "mine")?;
    hold((), |()| {
        ensure!(std::fs::read_to_string("/dev/shm/mine")? == "mine", "it is another one");
        Ok(())
    })
}
