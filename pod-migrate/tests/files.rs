//! Open files there and back without a pod: a child sets objects up and stops, its table is dumped from outside, and the
//! image is opened in a fresh process. What only exists in namespaces of its own is tested by the guests.

use pod_migrate::freeze::Standstill;
use pod_migrate::ids::{FdTableId, FileId, HostPid, PodPid, TaskFd};
use pod_migrate::image::{Kind, Reader, Writer};
use pod_migrate::objects::files::socket;
use pod_migrate::objects::files::survey::{self, Survey};
use pod_migrate::objects::files::{Fd, File, FileState, Files, FilesDump, Opener, Outside, Task, View};
use pod_runtime::proc::{stat, status};
use pod_runtime::sys::daemon::{self, Fork};
use pod_runtime::sys::{descriptor, inet, pidfd, unix};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// A child that has set something up and waits until it is killed.
struct Child {
    pid: i32,
    pidfd: OwnedFd,
    stat: stat::Stat,
    status: status::Status,
}

impl Child {
    /// `set_up` returns what must stay open; the numbers under which it is are the test's business.
    fn start<T>(set_up: impl FnOnce() -> T) -> Child {
        let (mut ready, mut say) = std::io::pipe().unwrap();
        match daemon::fork().unwrap() {
            Fork::Child => {
                let kept = set_up();
                drop(ready);
                say.write_all(b"!").unwrap();
                // From here on its descriptors stay as they are.
                loop {
                    std::thread::park();
                    std::hint::black_box(&kept);
                }
            }
            Fork::Parent(pid) => {
                drop(say);
                ready.read_exact(&mut [0]).expect("the child has set up");
                let text = |name| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap();
                let (stat, status) = (stat::parse(&text("stat")).unwrap(), status::parse(&text("status")));
                Child { pid, pidfd: pidfd::open(pid).unwrap(), stat, status }
            }
        }
    }

    fn task(&self) -> Task<'_> {
        let Child { pid, pidfd, stat, status } = self;
        Task { pid: PodPid(*pid), host: HostPid(*pid), pidfd: pidfd.as_fd(), comm: "child", stat, status }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        daemon::pidfd_send_signal(self.pidfd.as_fd(), libc::SIGKILL).unwrap();
        daemon::reap(self.pid).unwrap();
    }
}

struct Dumped {
    files: Files,
    table: FdTableId,
    raw: Vec<(FileId, OwnedFd, u64)>,
    /// Descriptors of which only the task knows whether they are closed by exec.
    unsure: Vec<TaskFd>,
}

fn dump(child: &Child) -> Dumped {
    dump_as(child, |dump| dump)
}

fn dump_as(child: &Child, how: impl FnOnce(FilesDump<'_>) -> FilesDump<'_>) -> Dumped {
    let view = View::new(HostPid(std::process::id() as i32), Outside::default()).unwrap();
    let mut dump = how(FilesDump::new(&view));
    let table = dump.table(child.task()).unwrap();
    let unsure = dump.unsure(table);
    let mut writer = Writer::new(Vec::new());
    let contents = dump.finish(&mut writer).unwrap().contents;
    let image = writer.finish().unwrap();
    let mut files = Files::default();
    let mut reader = Reader::new(&image[..]).unwrap();
    while let Some(record) = reader.next().unwrap() {
        match record.kind {
            Kind::FILE => drop(files.files.insert(FileId(record.id), record.state::<File>().unwrap())),
            Kind::FD_TABLE => drop(files.tables.insert(FdTableId(record.id), record.state().unwrap())),
            other => panic!("unexpected {other}"),
        }
    }
    files.share_options().unwrap();
    Dumped { files, table, unsure, raw: contents.into_iter().map(|c| (c.file, c.fd, c.bytes)).collect() }
}

impl Dumped {
    fn id(&self, fd: &impl AsRawFd) -> FileId {
        let table = &self.files.tables[&self.table];
        table.fds.iter().find(|entry| entry.fd.0 == fd.as_raw_fd()).expect("the descriptor was dumped").file
    }

    fn open(&self) -> Opener {
        let mut opener =
            Opener::start_by(PodPid(0), (&self.files, Default::default()), |f| match daemon::fork().unwrap() {
                Fork::Child => daemon::exit_now(f()),
                Fork::Parent(pid) => Ok(pid),
            })
            .unwrap();
        for (id, from, bytes) in &self.raw {
            let mut data = vec![0; *bytes as usize];
            let from = std::fs::File::from(from.try_clone().unwrap());
            from.read_exact_at(&mut data, 0).unwrap();
            std::fs::File::from(opener.contents(*id).unwrap()).write_all_at(&data, 0).unwrap();
        }
        opener.connect(|_| Ok(None)).unwrap();
        opener.release().unwrap();
        opener
    }
}

#[test]
fn offsets_are_shared_by_copies_and_contents_survive_deletion() {
    let folder = tempfile::tempdir().unwrap();
    let (named, gone) = (folder.path().join("named"), folder.path().join("gone"));
    std::fs::write(&named, b"0123456789").unwrap();
    let open = |path| std::fs::File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap();
    let (mut a, mut d) = (open(&named), open(&gone));
    let appended = std::fs::File::options().append(true).open(&named).unwrap();
    let b = a.try_clone().unwrap();
    a.seek(SeekFrom::Start(4)).unwrap();
    let child = Child::start(|| {
        d.write_all(&vec![9; 3 << 20]).unwrap();
        std::fs::remove_file(&gone).unwrap();
        let read_only = std::fs::File::open(format!("/proc/self/fd/{}", d.as_raw_fd())).unwrap();
        // Somewhere known to the parent.
        descriptor::dup_to(read_only.as_fd(), 200).unwrap();
        read_only
    });
    let dumped = dump(&child);
    assert_eq!(dumped.id(&a), dumped.id(&b));
    assert_ne!(dumped.id(&a), dumped.id(&appended));
    let mut opener = dumped.open();
    let mut back = std::fs::File::from(opener.take(dumped.id(&a)).unwrap());
    assert_eq!(back.stream_position().unwrap(), 4);
    let flags = descriptor::status_flags(opener.take(dumped.id(&appended)).unwrap().as_fd()).unwrap();
    assert_eq!(flags & libc::O_APPEND, libc::O_APPEND);
    let mut deleted = std::fs::File::from(opener.take(dumped.id(&d)).unwrap());
    assert_eq!(deleted.metadata().unwrap().len(), 3 << 20);
    assert_eq!(deleted.stream_position().unwrap(), 3 << 20);
    deleted.write_all_at(b"new", 0).unwrap();
    let second = std::fs::File::from(opener.take(dumped.id(&200)).unwrap());
    let mut data = [0; 4];
    second.read_exact_at(&mut data, 0).unwrap();
    assert_eq!(&data, b"new\x09");
    assert!(!gone.exists());
    back.read_exact(&mut data).unwrap();
    opener.finish().unwrap();
}

#[test]
fn small_kinds() {
    let (event, timer, signal, epoll) = (
        descriptor::eventfd(true).unwrap(),
        descriptor::timerfd(1).unwrap(),
        descriptor::signalfd(0x202).unwrap(),
        descriptor::epoll().unwrap(),
    );
    descriptor::epoll_add(epoll.as_fd(), event.as_raw_fd(), 1, 42).unwrap();
    descriptor::epoll_add(epoll.as_fd(), timer.as_raw_fd(), 5, 43).unwrap();
    nix::unistd::write(&event, &7u64.to_ne_bytes()).unwrap();
    descriptor::set_timer(timer.as_fd(), 0, 3600 * 1_000_000_000, 5_000_000).unwrap();
    descriptor::set_timer_ticks(timer.as_fd(), 3).unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    let status = std::fs::File::open("/proc/self/status").unwrap();
    let child = Child::start(|| ());
    let own_pidfd = pidfd::open(child.pid).unwrap();
    let dumped = dump(&child);
    let mut opener = dumped.open();
    let again = |fd: &OwnedFd| opener.take(dumped.id(fd)).unwrap();
    let mut count = [0; 8];
    nix::unistd::read(again(&event), &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 1, "a semaphore counts down");
    nix::unistd::read(again(&timer), &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 3);
    drop(own_pidfd);
    assert!(matches!(&dumped.files.files[&dumped.id(&signal)].state, FileState::Signalfd(s) if s.mask == 0x202));
    let FileState::Epoll(state) = &dumped.files.files[&dumped.id(&epoll)].state else { panic!("no epoll") };
    let mut data: Vec<_> = state.targets.iter().map(|target| target.data).collect();
    data.sort_unstable();
    assert_eq!(data, [42, 43]);
    // The registration is by number: it can be taken out by it.
    let fresh = again(&epoll);
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fresh.as_raw_fd())).unwrap();
    assert!(text.contains(&format!("tfd: {:8} events:", event.as_raw_fd())), "{text}");
    let _ = (null, status);
    opener.finish().unwrap();
}

/// Timers are read some time after the pod's clocks were noted, and have gone on meanwhile.
#[test]
fn what_remains_of_timers_is_counted_from_when_the_clocks_were_noted() {
    const SECOND: u64 = 1_000_000_000;
    const PASSED: Duration = Duration::from_secs(5);
    let armed = |clock, flags, value| {
        let timer = descriptor::timerfd(clock).unwrap();
        descriptor::set_timer(timer.as_fd(), flags, value, 0).unwrap();
        timer
    };
    let clock = |id| descriptor::clock(id).unwrap();
    let deadline = clock(libc::CLOCK_REALTIME) + 1000 * SECOND;
    let standing = [
        armed(libc::CLOCK_MONOTONIC, 0, 1000 * SECOND),
        armed(libc::CLOCK_BOOTTIME, 1, clock(libc::CLOCK_BOOTTIME) + 1000 * SECOND),
        armed(libc::CLOCK_REALTIME, 0, 1000 * SECOND),
    ];
    let (wall, idle) = (armed(libc::CLOCK_REALTIME, 1, deadline), descriptor::timerfd(1).unwrap());
    let child = Child::start(|| ());
    let here = Instant::now() - PASSED;
    let dumped = dump_as(&child, |dump| dump.since(Some(Standstill { here, monotonic: 0 })));
    let state = |fd: &OwnedFd| match &dumped.files.files[&dumped.id(fd)].state {
        FileState::Timerfd(state) => state.clone(),
        other => panic!("{other:?}"),
    };
    for timer in &standing {
        let state = state(timer);
        assert!((1001 * SECOND..=1005 * SECOND + SECOND / 10).contains(&state.remaining_ns), "{state:?}");
    }
    let until = state(&wall).wall_ns.unwrap();
    assert!((deadline..deadline + SECOND / 2).contains(&until), "an hour is that hour: {until} and not {deadline}");
    assert_eq!(state(&idle).remaining_ns, 0);
}

/// The clock of a connection goes on.
fn timeless(file: &File) -> File {
    let mut file = file.clone();
    if let FileState::Socket(socket::State::Tcp(state)) = &mut file.state
        && let socket::tcp::Phase::Connected(connection) = &mut state.phase
    {
        connection.timestamp = connection.timestamp.map(|_| 0);
    }
    file
}

/// A table that is large enough to be asked for at once has in the image what it has when each descriptor is.
#[test]
fn many_descriptors_are_the_same_as_each_by_itself() {
    let folder = tempfile::tempdir().unwrap();
    let child = Child::start(|| {
        let mut kept: Vec<OwnedFd> = Vec::new();
        let file = |name: &str| std::fs::File::create(folder.path().join(name)).unwrap();
        let (mut written, locked, owned) = (file("written"), file("locked"), file("owned"));
        written.write_all(b"to here").unwrap();
        descriptor::set_flock(locked.as_fd(), true).unwrap();
        descriptor::set_record_lock(locked.as_fd(), false, true, 5, 10).unwrap();
        let me = descriptor::AsyncOwner { kind: 1, pid: std::process::id() as i32 };
        descriptor::set_async_owner(owned.as_fd(), me).unwrap();
        kept.extend([written, locked, owned].map(OwnedFd::from));
        let (reader, writer) = std::io::pipe().unwrap();
        kept.extend([OwnedFd::from(reader), writer.into()]);
        let (one, other) = std::os::unix::net::UnixStream::pair().unwrap();
        let listener = std::net::TcpListener::bind("[::1]:0").unwrap();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let server = listener.accept().unwrap().0;
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        kept.extend([OwnedFd::from(one), other.into(), listener.into(), client.into(), server.into(), udp.into()]);
        let epoll = descriptor::epoll().unwrap();
        for count in 0..40u64 {
            let event = descriptor::eventfd(count % 2 == 0).unwrap();
            nix::unistd::write(&event, &count.to_ne_bytes()).unwrap();
            descriptor::epoll_add(epoll.as_fd(), event.as_raw_fd(), 1, count).unwrap();
            kept.push(event);
        }
        let asynchronous = kept.last().unwrap();
        descriptor::set_async_signal(asynchronous.as_fd(), 12).unwrap();
        kept.extend([epoll, descriptor::timerfd(1).unwrap(), descriptor::signalfd(0x202).unwrap()]);
        kept.push(std::fs::File::open("/dev/null").unwrap().into());
        kept.push(descriptor::memfd(c"name", 0).unwrap());
        kept.extend(kept.iter().step_by(2).map(|fd| fd.try_clone().unwrap()).collect::<Vec<_>>());
        descriptor::set_close_on_exec(kept[8].as_fd(), false).unwrap();
        kept
    });
    same_in_both_ways(&child);
}

fn same_in_both_ways(child: &Child) {
    let (at_once, each) = (dump(child), dump_as(child, |dump| dump.one_by_one()));
    let (table, told) = (&each.files.tables[&each.table], &at_once.files.tables[&at_once.table]);
    assert!(table.fds.len() > survey::MANY);
    for (id, file) in &each.files.files {
        assert_eq!(at_once.files.files.get(id).map(timeless), Some(timeless(file)));
    }
    assert_eq!(at_once.files.files.len(), each.files.files.len());
    assert_eq!((told.fds.len(), &told.locks), (table.fds.len(), &table.locks));
    for (told, fd) in told.fds.iter().zip(&table.fds) {
        let close_on_exec = if each.unsure.contains(&fd.fd) { told.close_on_exec } else { fd.close_on_exec };
        assert_eq!(*told, Fd { close_on_exec, ..*fd });
    }
    if Survey::get().is_some() {
        assert!(at_once.unsure.is_empty(), "nothing is left to ask the task for");
    }
}

/// Sockets that differ in one option each, and many that do not differ: each has in the image what it has by itself.
#[test]
fn options_of_many_sockets_are_told_apart() {
    const DIFFERENT: &[(i32, i32, i32)] = &[
        (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
        (libc::SOL_SOCKET, libc::SO_OOBINLINE, 1),
        (libc::SOL_SOCKET, libc::SO_PRIORITY, 5),
        (libc::SOL_SOCKET, libc::SO_MARK, 77),
        (libc::SOL_SOCKET, libc::SO_RCVLOWAT, 9),
        (libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, 1),
        (libc::SOL_SOCKET, libc::SO_TIMESTAMPING, 8),
        (libc::SOL_SOCKET, libc::SO_DONTROUTE, 1),
        (libc::SOL_SOCKET, libc::SO_BROADCAST, 1),
        (libc::SOL_SOCKET, libc::SO_BUSY_POLL, 50),
        (libc::SOL_SOCKET, libc::SO_PEEK_OFF, 3),
        (libc::SOL_SOCKET, libc::SO_ZEROCOPY, 1),
        (libc::SOL_SOCKET, libc::SO_SELECT_ERR_QUEUE, 1),
        (libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE, 123_456),
        (libc::SOL_SOCKET, libc::SO_SNDBUF, 77_000),
        (libc::SOL_SOCKET, libc::SO_RCVBUF, 78_000),
        (libc::SOL_SOCKET, libc::SO_REUSEADDR, 1),
        (libc::SOL_SOCKET, libc::SO_REUSEPORT, 1),
        (libc::IPPROTO_IP, libc::IP_TOS, 0x10),
        (libc::IPPROTO_IP, libc::IP_TTL, 9),
        (libc::IPPROTO_IP, libc::IP_MINTTL, 8),
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, 2),
        (libc::IPPROTO_IP, libc::IP_RECVERR, 1),
        (libc::IPPROTO_IP, libc::IP_RECVTTL, 1),
        (libc::IPPROTO_IP, libc::IP_PKTINFO, 1),
        (libc::IPPROTO_IP, libc::IP_FREEBIND, 1),
        (libc::IPPROTO_IP, libc::IP_TRANSPARENT, 1),
        (libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1),
        (libc::IPPROTO_IP, 51, 40_000 << 16 | 30_000),
        (libc::IPPROTO_IPV6, libc::IPV6_TCLASS, 0x20),
        (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, 7),
        (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, 2),
        (libc::IPPROTO_IPV6, libc::IPV6_RECVERR, 1),
        (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1),
        (libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, 1),
        (libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG, 1),
        (libc::IPPROTO_IPV6, 70, 0),
        (libc::IPPROTO_IPV6, 72, 2),
        (libc::IPPROTO_IPV6, 73, 6),
        (libc::IPPROTO_IPV6, 33, 1),
        (libc::IPPROTO_TCP, libc::TCP_NODELAY, 1),
        (libc::IPPROTO_TCP, libc::TCP_CORK, 1),
        (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 100),
        (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 101),
        (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 12),
        (libc::IPPROTO_TCP, libc::TCP_SYNCNT, 4),
        (libc::IPPROTO_TCP, libc::TCP_LINGER2, 33),
        (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 9000),
        (libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, 3),
        (libc::IPPROTO_TCP, 16, 1),
        (libc::IPPROTO_TCP, 25, 5000),
        (libc::IPPROTO_TCP, 36, 1),
        (libc::IPPROTO_TCP, 37, 10),
        (libc::IPPROTO_TCP, 44, 5000),
    ];
    let child = Child::start(|| {
        let mut kept: Vec<OwnedFd> = Vec::new();
        for there in ["127.0.0.1:0", "[::1]:0"] {
            let listener = std::net::TcpListener::bind(there).unwrap();
            let mut connect = || {
                let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
                kept.extend([OwnedFd::from(listener.accept().unwrap().0), client.into()]);
                kept.last().unwrap().try_clone().unwrap()
            };
            for (level, name, value) in DIFFERENT {
                // Not every kernel has all, and not every family.
                let _ = inet::set_number(connect().as_fd(), *level, *name, *value);
            }
            let linger = [1i32, 5].map(i32::to_ne_bytes).concat();
            inet::set_option(connect().as_fd(), libc::SOL_SOCKET, libc::SO_LINGER, &linger).unwrap();
            for name in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
                let time = [3i64, 7].map(i64::to_ne_bytes).concat();
                inet::set_option(connect().as_fd(), libc::SOL_SOCKET, name, &time).unwrap();
            }
            inet::set_option(connect().as_fd(), libc::IPPROTO_TCP, libc::TCP_CONGESTION, b"reno").unwrap();
            inet::set_option(connect().as_fd(), libc::SOL_SOCKET, libc::SO_BINDTODEVICE, b"lo").unwrap();
            inet::attach_filter(connect().as_fd(), &[6, 0, 0, 0, 0xff, 0xff, 0, 0]).unwrap();
            kept.push(listener.into());
        }
        kept
    });
    same_in_both_ways(&child);
}

#[test]
fn pipes_keep_their_bytes_on_both_sides() {
    let (mut reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(b"on the way").unwrap();
    let child = Child::start(|| ());
    let dumped = dump(&child);
    let mut opener = dumped.open();
    let mut back = [0; 10];
    std::fs::File::from(opener.take(dumped.id(&reader)).unwrap()).read_exact(&mut back).unwrap();
    assert_eq!(&back, b"on the way");
    reader.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"on the way", "the source still has it");
    opener.finish().unwrap();
}

#[test]
fn memfds_are_shared_and_sealed() {
    let memfd = std::fs::File::from(descriptor::memfd(c"name", libc::MFD_ALLOW_SEALING).unwrap());
    memfd.write_all_at(&vec![5; 2 << 20], 0).unwrap();
    descriptor::add_seals(memfd.as_fd(), libc::F_SEAL_SHRINK as u32).unwrap();
    let second = std::fs::File::open(format!("/proc/self/fd/{}", memfd.as_raw_fd())).unwrap();
    let child = Child::start(|| ());
    let dumped = dump(&child);
    let mut opener = dumped.open();
    let back = std::fs::File::from(opener.take(dumped.id(&memfd)).unwrap());
    let through = std::fs::File::from(opener.take(dumped.id(&second)).unwrap());
    back.write_all_at(b"!", 0).unwrap();
    let mut data = [0; 2];
    through.read_exact_at(&mut data, 0).unwrap();
    assert_eq!(data, [b'!', 5]);
    assert!(back.set_len(0).is_err(), "sealed against shrinking");
    let link = std::fs::read_link(format!("/proc/self/fd/{}", back.as_raw_fd())).unwrap();
    assert_eq!(link.to_string_lossy(), "/memfd:name (deleted)");
    opener.finish().unwrap();
}

#[test]
fn locks_of_descriptions_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lock");
    let holder = std::fs::File::create(&path).unwrap();
    let child = Child::start(|| descriptor::set_flock(holder.as_fd(), true).unwrap());
    let dumped = dump(&child);
    let id = dumped.id(&holder);
    assert_eq!(dumped.files.files[&id].locks.len(), 1);
    drop(holder);
    drop(child);
    let mut opener = dumped.open();
    let other = std::fs::File::open(&path).unwrap();
    assert!(descriptor::set_flock(other.as_fd(), true).is_err(), "the opener holds it");
    opener.finish().unwrap();
    descriptor::set_flock(other.as_fd(), true).unwrap();
}

#[test]
fn terminals_keep_their_modes() {
    let master = std::fs::File::options().read(true).write(true).open("/dev/ptmx").unwrap();
    descriptor::set_pty_locked(master.as_fd(), false).unwrap();
    descriptor::set_window_size(master.as_fd(), [31, 77, 0, 0]).unwrap();
    let slave = descriptor::pty_slave(master.as_fd(), libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC).unwrap();
    let index = descriptor::pty_index(master.as_fd()).unwrap();
    let mut termios = descriptor::termios(slave.as_fd()).unwrap();
    termios[12] &= !2; // no ICANON
    descriptor::set_termios(slave.as_fd(), &termios).unwrap();
    let child = Child::start(|| ());
    let dumped = dump(&child);
    let (master_id, slave_id) = (dumped.id(&master), dumped.id(&slave));
    // The number must be free, as it is in a pod that is born.
    drop((master, slave, child));
    let mut opener = dumped.open();
    let (master, slave) = (opener.take(master_id).unwrap(), opener.take(slave_id).unwrap());
    assert_eq!(descriptor::pty_index(master.as_fd()).unwrap(), index);
    assert_eq!(descriptor::window_size(slave.as_fd()).unwrap(), [31, 77, 0, 0]);
    assert_eq!(descriptor::termios(slave.as_fd()).unwrap(), termios);
    opener.finish().unwrap();
}

#[test]
fn unix_streams_keep_queues_descriptors_and_halves() {
    use std::os::unix::net::UnixStream;
    let (a, mut b) = UnixStream::pair().unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    unix::send(a.as_fd(), b"pipe", &[], &[writer.as_raw_fd()], None).unwrap();
    a.shutdown(std::net::Shutdown::Write).unwrap();
    let (lonely, gone) = UnixStream::pair().unwrap();
    unix::send(gone.as_fd(), b"last words", &[], &[], None).unwrap();
    drop(gone);
    let child = Child::start(|| ());
    let dumped = dump(&child);
    let mut opener = dumped.open();
    let mut again = UnixStream::from(opener.take(dumped.id(&b)).unwrap());
    let mut bytes = [0; 4];
    let message = unix::peek(again.as_fd(), 100).unwrap();
    assert_eq!((message.bytes.as_slice(), message.fds.len()), (&b"pipe"[..], 1));
    nix::unistd::write(&message.fds[0], b"x").unwrap();
    let mut out = std::fs::File::from(opener.take(dumped.id(&reader)).unwrap());
    out.read_exact(&mut [0]).unwrap();
    let mut rest = Vec::new();
    again.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"pipe", "and an end of file, for the other end was shut down");
    again.write_all(b"back").unwrap();
    let mut there = UnixStream::from(opener.take(dumped.id(&a)).unwrap());
    there.read_exact(&mut bytes).unwrap();
    let mut words = String::new();
    UnixStream::from(opener.take(dumped.id(&lonely)).unwrap()).read_to_string(&mut words).unwrap();
    assert_eq!(words, "last words");
    b.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"pipe", "the source still has it");
    opener.finish().unwrap();
}

#[test]
fn unix_listeners_keep_their_name_and_those_that_wait() {
    use std::os::unix::net::{UnixListener, UnixStream};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let mut client = UnixStream::connect(&path).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    client.write_all(b"hi").unwrap();
    let waiting = UnixStream::connect(&path).unwrap();
    let child = Child::start(|| ());
    let dumped = dump(&child);
    let (listener_id, client_id, accepted_id, waiting_id) =
        (dumped.id(&listener), dumped.id(&client), dumped.id(&accepted), dumped.id(&waiting));
    drop((listener, client, accepted, waiting, child));
    let mut opener = dumped.open();
    let take = |id| opener.take(id).unwrap();
    let listener = UnixListener::from(take(listener_id));
    assert_eq!(listener.local_addr().unwrap().as_pathname(), Some(path.as_path()));
    let accepted = UnixStream::from(take(accepted_id));
    assert_eq!(accepted.local_addr().unwrap().as_pathname(), Some(path.as_path()));
    let client = UnixStream::from(take(client_id));
    assert_eq!(client.peer_addr().unwrap().as_pathname(), Some(path.as_path()));
    let mut hi = [0; 2];
    (&accepted).read_exact(&mut hi).unwrap();
    let (mut second, _) = listener.accept().unwrap();
    UnixStream::from(take(waiting_id)).write_all(b"ok").unwrap();
    second.read_exact(&mut hi).unwrap();
    assert_eq!(&hi, b"ok");
    UnixStream::connect(&path).unwrap();
    opener.finish().unwrap();
}

#[test]
fn unix_datagrams_keep_senders_and_peers() {
    use std::os::unix::net::UnixDatagram;
    let folder = tempfile::tempdir().unwrap();
    let (server_path, client_path) = (folder.path().join("server"), folder.path().join("client"));
    let server = UnixDatagram::bind(&server_path).unwrap();
    let client = UnixDatagram::bind(&client_path).unwrap();
    client.connect(&server_path).unwrap();
    client.send(b"first").unwrap();
    client.send(b"second one").unwrap();
    let child = Child::start(|| ());
    let dumped = dump(&child);
    let (server_id, client_id) = (dumped.id(&server), dumped.id(&client));
    drop((server, client, child));
    let mut opener = dumped.open();
    let server = UnixDatagram::from(opener.take(server_id).unwrap());
    let mut bytes = [0; 20];
    let (length, from) = server.recv_from(&mut bytes).unwrap();
    assert_eq!((&bytes[..length], from.as_pathname()), (&b"first"[..], Some(client_path.as_path())));
    assert_eq!(server.recv(&mut bytes).unwrap(), 10);
    let client = UnixDatagram::from(opener.take(client_id).unwrap());
    client.send(b"3").unwrap();
    assert_eq!(server.recv(&mut bytes).unwrap(), 1);
    opener.finish().unwrap();
}
