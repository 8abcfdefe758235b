//! Sockets moved from one network namespace to another with the same MAC and address, as a pod's are, while their peer
//! stays where it is. nextest runs each test in a process of its own; the namespace of its thread is the LAN.

use nix::sched::{CloneFlags, unshare};
use pod_migrate::objects::files::socket::address::{Endpoint, Family};
use pod_migrate::objects::files::socket::{netlink, raw, tcp, udp};
use pod_runtime::network::announce;
use pod_runtime::network::wire::inside;
use pod_runtime::spec::Address;
use pod_runtime::sys::netdev::{self, Receive};
use pod_runtime::sys::{inet, netdev::packet_socket};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Command;
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(10);
const POD: u8 = 100;
/// What a server is bound to: IPv4, IPv6, and IPv6 that serves IPv4.
const IPS: [&str; 3] = ["10.77.0.100", "fd77::100", "::"];

fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A namespace plugged into the bridge `lan0` of this thread's, with 10.77.0.N, fd77::N and a MAC made of N.
struct Station {
    namespace: File,
    port: String,
    number: u8,
}

impl Station {
    fn new(name: &str, number: u8, plugged: bool) -> Station {
        let namespace = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        let namespace = namespace.join().unwrap();
        let port = format!("s{name}");
        let station = Station { namespace, port: port.clone(), number };
        // ip(8) takes a namespace as a process: one that waits in it.
        let mut waiting = station.inside(|| Command::new("sleep").arg("100").spawn().unwrap());
        sh(&format!("ip link add {port} type veth peer name eth0 netns {}; ip link set {port} up", waiting.id()));
        waiting.kill().unwrap();
        waiting.wait().unwrap();
        station.sh(&format!(
            "ip link set lo up; ip link set eth0 address 02:00:00:00:00:{number:02x}; ip link set eth0 addrgenmode none
             ip addr add 10.77.0.{number}/24 dev eth0; ip addr add fd77::{number}/64 dev eth0 nodad; ip link set eth0 up"
        ));
        if plugged {
            station.plug();
        }
        station
    }

    fn plug(&self) {
        sh(&format!("ip link set {} master lan0", self.port));
    }

    fn cut(&self) {
        sh(&format!("ip link set {} down", self.port));
    }

    fn inside<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        inside(self.namespace.as_fd(), f).unwrap()
    }

    fn sh(&self, script: &str) -> String {
        self.inside(|| sh(script))
    }

    fn announce(&self) {
        let speaker = self.inside(|| {
            let device = netdev::index(netdev::control_socket().unwrap().as_fd(), "eth0").unwrap();
            packet_socket(device, Receive::Nothing, false).unwrap()
        });
        let addresses = [pod_ip(true), pod_ip(false)].map(|ip| Address { ip, prefix: 24 });
        announce::send_all(speaker.as_fd(), &[2, 0, 0, 0, 0, self.number], &addresses).unwrap();
    }
}

/// The client, and the pod at its first and its second host.
struct Move {
    client: Station,
    from: Station,
    to: Station,
}

impl Move {
    fn new() -> Move {
        unshare(CloneFlags::CLONE_NEWNET).expect("root");
        sh("ip link set lo up; ip link add lan0 type bridge; ip link set lan0 up");
        let (client, from) = (Station::new("c", 9, true), Station::new("a", POD, true));
        Move { client, from, to: Station::new("b", POD, false) }
    }

    /// The pod's socket and the client's end of one connection.
    fn connect(&self, ip: &str) -> (TcpStream, TcpStream) {
        let listener = self.from.inside(|| TcpListener::bind((ip, 0)).unwrap());
        let to = reachable(listener.local_addr().unwrap());
        let client = self.client.inside(|| TcpStream::connect_timeout(&to, LONG).unwrap());
        let (server, _) = listener.accept().unwrap();
        client.set_read_timeout(Some(LONG)).unwrap();
        (server, client)
    }

    /// Cuts the first host off, dumps, closes there, restores at the second host, plugs it in and lets it speak.
    fn tcp(&self, sockets: Vec<OwnedFd>) -> Vec<OwnedFd> {
        self.from.cut();
        let began = Instant::now();
        let states: Vec<_> = sockets.iter().map(|fd| tcp::dump(fd.as_fd(), family(fd), "test").unwrap()).collect();
        eprintln!("dumped {} in {:?}", states.len(), began.elapsed());
        let states: Vec<tcp::State> = states.iter().map(through_an_image).collect();
        drop(sockets);
        let began = Instant::now();
        let restored: Vec<_> = self.to.inside(|| states.iter().map(|state| tcp::restore(state).unwrap()).collect());
        eprintln!("restored in {:?}", began.elapsed());
        self.to.plug();
        self.to.announce();
        let began = Instant::now();
        self.to
            .inside(|| states.iter().zip(&restored).for_each(|(state, fd)| tcp::release(state, fd.as_fd()).unwrap()));
        eprintln!("released in {:?}", began.elapsed());
        restored
    }

    fn one(&self, socket: TcpStream) -> TcpStream {
        TcpStream::from(self.tcp(vec![socket.into()]).remove(0))
    }
}

fn through_an_image(state: &tcp::State) -> tcp::State {
    let mut bytes = Vec::new();
    ciborium::into_writer(state, &mut bytes).unwrap();
    ciborium::from_reader(&bytes[..]).unwrap()
}

fn family(fd: &OwnedFd) -> Family {
    Family::of(inet::number(fd.as_fd(), libc::SOL_SOCKET, libc::SO_DOMAIN).unwrap()).unwrap()
}

fn pod_ip(v4: bool) -> IpAddr {
    if v4 { Ipv4Addr::new(10, 77, 0, POD).into() } else { "fd77::100".parse::<Ipv6Addr>().unwrap().into() }
}

fn reachable(mut bound: SocketAddr) -> SocketAddr {
    if bound.ip().is_unspecified() {
        bound.set_ip(pod_ip(true));
    }
    bound
}

fn endpoint(address: SocketAddr) -> Endpoint {
    Endpoint { ip: address.ip(), port: address.port(), scope: 0 }
}

/// As the kernel numbers them (linux/tcp_states.h).
fn kernel_state(socket: &TcpStream) -> u8 {
    inet::option(socket.as_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, &[], 8).unwrap()[0]
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn wait_state(socket: &TcpStream, wanted: u8) {
    until(&format!("state {wanted}"), || kernel_state(socket) == wanted);
}

fn rest(socket: &mut TcpStream) -> String {
    socket.set_read_timeout(Some(LONG)).unwrap();
    let mut text = String::new();
    socket.read_to_string(&mut text).unwrap();
    text
}

fn exactly(socket: &mut TcpStream, text: &str) {
    socket.set_read_timeout(Some(LONG)).unwrap();
    let mut got = vec![0; text.len()];
    socket.read_exact(&mut got).unwrap();
    assert_eq!(String::from_utf8_lossy(&got), text);
}

/// Byte-exact in both directions.
fn talk(a: &mut TcpStream, b: &mut TcpStream, bytes: usize) {
    let pattern: Vec<u8> = (0..bytes).map(|at| (at * 31 + at / 251) as u8).collect();
    for (from, to) in [(&*a, &*b), (&*b, &*a)] {
        let (mut from, mut to, sent) = (from.try_clone().unwrap(), to.try_clone().unwrap(), pattern.clone());
        to.set_read_timeout(Some(LONG)).unwrap();
        let thread = std::thread::spawn(move || from.write_all(&sent).unwrap());
        let mut got = vec![0; bytes];
        to.read_exact(&mut got).unwrap();
        thread.join().unwrap();
        assert!(got == pattern);
    }
}

#[test]
fn established_and_idle() {
    for ip in IPS {
        let world = Move::new();
        let (server, mut client) = world.connect(ip);
        let mut moved = world.one(server);
        talk(&mut moved, &mut client, 300_000);
        assert_eq!(kernel_state(&moved), 1);
        assert_eq!(moved.peer_addr().unwrap().port(), client.local_addr().unwrap().port());
    }
}

/// How many segments of the other end a socket has seen (tcpi_segs_in).
fn segments(socket: &TcpStream) -> u32 {
    let info = inet::option(socket.as_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, &[], 144).unwrap();
    u32::from_ne_bytes(info[140..144].try_into().unwrap())
}

/// A connection on which nobody waits goes on without a packet; one whose peer has no room for more asks about that.
#[test]
fn who_is_at_rest_says_nothing() {
    for ip in IPS {
        let world = Move::new();
        let (mut server, mut client) = world.connect(ip);
        talk(&mut server, &mut client, 3);
        // What came is acknowledged, if late.
        let acknowledged = |socket: &TcpStream| inet::unacknowledged(socket.as_fd()).unwrap() == 0;
        until("acknowledgements", || acknowledged(&client) && acknowledged(&server));
        let before = segments(&client);
        let mut moved = world.one(server);
        assert_eq!(segments(&client), before);
        talk(&mut moved, &mut client, 100_000);
        moved.write_all(b"one more").unwrap();
        exactly(&mut client, "one more");
        until("the last acknowledgement", || acknowledged(&moved));
    }
}

/// What came and was not acknowledged yet is, at once: the peer would send it again.
#[test]
fn what_waits_for_an_acknowledgement_gets_it() {
    let world = Move::new();
    let (server, mut client) = world.connect("10.77.0.100");
    inet::set_number(server.as_fd(), libc::IPPROTO_TCP, libc::TCP_QUICKACK, 0).unwrap();
    client.write_all(b"request").unwrap();
    until("the request", || inet::unread(server.as_fd()).unwrap() == 7);
    world.from.cut();
    let waits = inet::unacknowledged(client.as_fd()).unwrap() > 0;
    let began = Instant::now();
    let mut moved = world.one(server);
    until("its acknowledgement", || inet::unacknowledged(client.as_fd()).unwrap() == 0);
    eprintln!("waited: {waits}, {:?}", began.elapsed());
    exactly(&mut moved, "request");
    talk(&mut moved, &mut client, 1000);
}

/// Unread bytes at the pod, unacknowledged bytes of the pod, and more in both directions after.
#[test]
fn both_queues_with_contents() {
    for ip in IPS {
        let world = Move::new();
        let (mut server, mut client) = world.connect(ip);
        client.write_all(b"request that was not read").unwrap();
        until("the request", || inet::unread(server.as_fd()).unwrap() == 25);
        world.from.cut();
        server.write_all(b"answer that was lost, ").unwrap();
        server.write_all(b"and the rest of it").unwrap();
        let mut moved = world.one(server);
        let began = Instant::now();
        exactly(&mut client, "answer that was lost, and the rest of it");
        eprintln!("{ip}: the client has the lost answer {:?} after the release", began.elapsed());
        assert!(began.elapsed() < Duration::from_millis(150), "no retransmission timer");
        exactly(&mut moved, "request that was not read");
        talk(&mut moved, &mut client, 1_000_000);
    }
}

/// The peer reads nothing: its window is closed and megabytes wait.
#[test]
fn a_full_send_queue_behind_a_closed_window() {
    let world = Move::new();
    let (mut server, mut client) = world.connect("10.77.0.100");
    server.set_nonblocking(true).unwrap();
    let (mut sent, mut quiet) = (0u64, 0);
    while quiet < 20 {
        let block: Vec<u8> = (0..65536u64).map(|at| ((sent + at) % 251) as u8).collect();
        match server.write(&block) {
            Ok(length) => sent += length as u64,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                quiet += 1;
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
    eprintln!("{sent} bytes written");
    let mut moved = world.one(server);
    let mut got = vec![0; sent as usize];
    client.read_exact(&mut got).unwrap();
    assert!(got.iter().enumerate().all(|(at, byte)| *byte == (at as u64 % 251) as u8));
    moved.set_nonblocking(false).unwrap();
    talk(&mut moved, &mut client, 100_000);
}

#[test]
fn close_wait() {
    for ip in IPS {
        let world = Move::new();
        let (server, mut client) = world.connect(ip);
        client.write_all(b"last words").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        wait_state(&server, 8);
        let mut moved = world.one(server);
        wait_state(&moved, 8);
        assert_eq!(rest(&mut moved), "last words");
        moved.write_all(b"reply").unwrap();
        drop(moved);
        assert_eq!(rest(&mut client), "reply");
    }
}

#[test]
fn fin_wait_2() {
    for ip in IPS {
        let world = Move::new();
        let (mut server, mut client) = world.connect(ip);
        server.write_all(b"all of it").unwrap();
        server.shutdown(Shutdown::Write).unwrap();
        wait_state(&server, 5);
        client.write_all(b"still talking").unwrap();
        until("the client's bytes", || inet::unread(server.as_fd()).unwrap() == 13);
        let mut moved = world.one(server);
        wait_state(&moved, 5);
        assert_eq!(rest(&mut client), "all of it");
        client.write_all(b", and more").unwrap();
        drop(client);
        assert_eq!(rest(&mut moved), "still talking, and more");
    }
}

/// The FIN and what was before it never reached the peer.
#[test]
fn fin_wait_1() {
    for ip in IPS {
        let world = Move::new();
        let (mut server, mut client) = world.connect(ip);
        world.from.cut();
        server.write_all(b"lost").unwrap();
        server.shutdown(Shutdown::Write).unwrap();
        assert_eq!(kernel_state(&server), 4);
        let mut moved = world.one(server);
        assert_eq!(rest(&mut client), "lost");
        wait_state(&moved, 5);
        client.write_all(b"bye").unwrap();
        drop(client);
        assert_eq!(rest(&mut moved), "bye");
    }
}

#[test]
fn last_ack() {
    let world = Move::new();
    let (mut server, mut client) = world.connect("10.77.0.100");
    client.shutdown(Shutdown::Write).unwrap();
    wait_state(&server, 8);
    world.from.cut();
    server.write_all(b"lost").unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    assert_eq!(kernel_state(&server), 9);
    let mut moved = world.one(server);
    assert_eq!(rest(&mut client), "lost");
    wait_state(&moved, 7);
    assert_eq!(rest(&mut moved), "");
}

/// Both sides have shut down, neither has heard of the other's FIN but the pod: CLOSING.
#[test]
fn closing() {
    let world = Move::new();
    let (mut server, mut client) = world.connect("10.77.0.100");
    client.write_all(b"over").unwrap();
    until("the client's bytes", || inet::unread(server.as_fd()).unwrap() == 4);
    // What the pod sends is lost; what the client sends arrives.
    world.from.sh("nft add table inet t; nft 'add chain inet t o { type filter hook output priority 0; }'
        nft add rule inet t o oifname eth0 tcp dport != 0 drop");
    server.write_all(b"lost").unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    wait_state(&server, 11);
    let mut moved = world.one(server);
    assert_eq!(rest(&mut client), "lost");
    assert_eq!(rest(&mut moved), "over");
    wait_state(&moved, 7);
}

/// A connection that is over, with bytes that nobody has read yet.
#[test]
fn ended_with_unread_bytes() {
    for ip in IPS {
        let world = Move::new();
        let (server, mut client) = world.connect(ip);
        server.shutdown(Shutdown::Write).unwrap();
        client.write_all(b"the rest").unwrap();
        drop(client);
        wait_state(&server, 7);
        let mut moved = world.one(server);
        assert_eq!(kernel_state(&moved), 7);
        assert_eq!(rest(&mut moved), "the rest");
        assert!(moved.take_error().unwrap().is_none());
    }
}

#[test]
fn reset_by_the_peer() {
    let world = Move::new();
    let (server, client) = world.connect("10.77.0.100");
    let linger = [1i32.to_ne_bytes(), 0i32.to_ne_bytes()].concat();
    inet::set_option(client.as_fd(), libc::SOL_SOCKET, libc::SO_LINGER, &linger).unwrap();
    drop(client);
    wait_state(&server, 7);
    let moved = world.one(server);
    assert!(moved.take_error().unwrap().is_some());
    assert_eq!((&moved).read(&mut [0; 4]).unwrap(), 0);
}

#[test]
fn a_listener_with_its_connections() {
    for ip in IPS {
        let world = Move::new();
        let listener = world.from.inside(|| TcpListener::bind((ip, 0)).unwrap());
        inet::set_number(listener.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, 0).unwrap();
        let to = reachable(listener.local_addr().unwrap());
        let connect = || world.client.inside(|| TcpStream::connect_timeout(&to, LONG).unwrap());
        let mut clients: Vec<TcpStream> = (0..5).map(|_| connect()).collect();
        let mut sockets: Vec<OwnedFd> = (0..5).map(|_| listener.accept().unwrap().0.into()).collect();
        // Connections first, then the listener, then more connections: the order must not matter.
        sockets.insert(3, listener.into());
        let mut moved = world.tcp(sockets);
        let listener = TcpListener::from(moved.remove(3));
        assert_eq!(inet::number(listener.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR).unwrap(), 0);
        for (client, server) in clients.iter_mut().zip(moved) {
            talk(client, &mut TcpStream::from(server), 10_000);
        }
        let mut client = connect();
        talk(&mut listener.accept().unwrap().0, &mut client, 1000);
    }
}

/// The first SYN is lost; the connection is made from the second host.
#[test]
fn connecting() {
    let world = Move::new();
    let listener = world.client.inside(|| TcpListener::bind("10.77.0.9:0").unwrap());
    world.from.cut();
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK;
    let socket = world.from.inside(|| inet::socket(libc::AF_INET, kind, 0).unwrap());
    let error = inet::connect(socket.as_fd(), &endpoint(listener.local_addr().unwrap()).bytes()).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EINPROGRESS));
    let mut moved = TcpStream::from(world.tcp(vec![socket]).remove(0));
    let (mut server, _) = listener.accept().unwrap();
    wait_state(&moved, 1);
    moved.set_nonblocking(false).unwrap();
    talk(&mut server, &mut moved, 10_000);
}

#[test]
fn options_travel() {
    let world = Move::new();
    let (server, mut client) = world.connect("10.77.0.100");
    let numbers = [
        (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1, 1),
        (libc::IPPROTO_TCP, libc::TCP_NODELAY, 1, 1),
        (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 77, 77),
        (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 12345, 12345),
        (libc::IPPROTO_IP, libc::IP_TOS, 0x10, 0x10),
        (libc::SOL_SOCKET, libc::SO_RCVBUF, 70_000, 140_000),
        (libc::SOL_SOCKET, libc::SO_MARK, 5, 5),
    ];
    for (level, name, value, _) in numbers {
        inet::set_number(server.as_fd(), level, name, value).unwrap();
    }
    inet::set_option(server.as_fd(), libc::IPPROTO_TCP, libc::TCP_CONGESTION, b"reno").unwrap();
    server.set_write_timeout(Some(Duration::from_millis(1500))).unwrap();
    let mut moved = world.one(server);
    let get = |level, name| inet::number(moved.as_fd(), level, name).unwrap();
    for (level, name, _, value) in numbers {
        assert_eq!(get(level, name), value, "{level} {name}");
    }
    assert_eq!(get(libc::SOL_SOCKET, 72) & 3, 2, "the receive buffer stays as sized, the send buffer grows by itself");
    assert_eq!(&inet::option(moved.as_fd(), libc::IPPROTO_TCP, libc::TCP_CONGESTION, &[], 16).unwrap()[..4], b"reno");
    assert_eq!(moved.write_timeout().unwrap(), Some(Duration::from_millis(1500)));
    talk(&mut moved, &mut client, 100_000);
}

/// A dump that is given up leaves everything as it was.
#[test]
fn a_dump_changes_nothing() {
    let world = Move::new();
    let (mut server, mut client) = world.connect("10.77.0.100");
    client.write_all(b"unread").unwrap();
    until("the client's bytes", || inet::unread(server.as_fd()).unwrap() == 6);
    world.from.cut();
    server.write_all(b"unsent").unwrap();
    let dump = || match tcp::dump(server.as_fd(), Family::V4, "test").unwrap().phase {
        tcp::Phase::Connected(connection) => tcp::Connection { timestamp: None, ..*connection },
        other => panic!("{other:?}"),
    };
    assert_eq!(dump(), dump());
    sh(&format!("ip link set {} up", world.from.port));
    exactly(&mut client, "unsent");
    exactly(&mut server, "unread");
    talk(&mut server, &mut client, 100_000);
}

/// Both ends inside the pod, with bytes on the way in both directions and one side shut.
#[test]
fn a_connection_inside_the_pod() {
    for ip in ["127.0.0.1", "::1"] {
        let world = Move::new();
        let listener = world.from.inside(|| TcpListener::bind((ip, 0)).unwrap());
        let to = listener.local_addr().unwrap();
        let pair = || {
            let client = world.from.inside(|| TcpStream::connect(to).unwrap());
            (client, listener.accept().unwrap().0)
        };
        let ((mut a, mut b), (c, d)) = (pair(), pair());
        a.write_all(b"to b").unwrap();
        b.write_all(b"to a").unwrap();
        c.shutdown(Shutdown::Write).unwrap();
        wait_state(&d, 8);
        let moved = world.tcp(vec![a.into(), b.into(), c.into(), d.into()]);
        let [mut a, mut b, mut c, mut d] = <[OwnedFd; 4]>::try_from(moved).unwrap().map(TcpStream::from);
        exactly(&mut a, "to a");
        exactly(&mut b, "to b");
        talk(&mut a, &mut b, 500_000);
        assert_eq!(d.read(&mut [0; 4]).unwrap(), 0);
        d.write_all(b"half").unwrap();
        exactly(&mut c, "half");
    }
}

#[test]
fn udp_with_its_queue() {
    for ip in IPS {
        let world = Move::new();
        let server = world.from.inside(|| UdpSocket::bind((ip, 5353)).unwrap());
        let to = reachable(server.local_addr().unwrap());
        let own = if to.is_ipv4() { "10.77.0.9" } else { "fd77::9" };
        let client = world.client.inside(|| UdpSocket::bind((own, 4000)).unwrap());
        let payloads = [&b"first"[..], b"", b"third"];
        for payload in payloads {
            client.send_to(payload, to).unwrap();
        }
        std::thread::sleep(Duration::from_millis(50));
        let mut warnings = Vec::new();
        let fd = OwnedFd::from(server);
        world.from.cut();
        let state = udp::dump(fd.as_fd(), family(&fd), 17, "test", &mut warnings).unwrap();
        assert_eq!(state.queue.len(), 3, "{ip}");
        let again = udp::dump(fd.as_fd(), family(&fd), 17, "test", &mut warnings).unwrap();
        assert!(again.queue.len() >= 2 && again.options == state.options, "nothing was taken");
        drop(fd);
        let moved = UdpSocket::from(world.to.inside(|| udp::restore(&state).unwrap()));
        moved.set_read_timeout(Some(LONG)).unwrap();
        for payload in payloads {
            let mut got = [0; 16];
            let (length, peer) = moved.recv_from(&mut got).unwrap();
            assert_eq!((&got[..length], peer.port()), (payload, 4000));
            assert_eq!(peer.ip().to_canonical().to_string(), own);
        }
        assert!(warnings.is_empty());
    }
}

#[test]
fn udp_connected_and_in_a_group() {
    let world = Move::new();
    let group = Ipv4Addr::new(239, 1, 2, 3);
    let socket = world.from.inside(|| UdpSocket::bind("0.0.0.0:6000").unwrap());
    world.from.inside(|| socket.join_multicast_v4(&group, &Ipv4Addr::new(10, 77, 0, POD)).unwrap());
    let connected = world.from.inside(|| UdpSocket::bind("10.77.0.100:6001").unwrap());
    world.from.inside(|| connected.connect("10.77.0.9:6002").unwrap());
    let dump = |socket: &UdpSocket| udp::dump(socket.as_fd(), Family::V4, 17, "test", &mut Vec::new()).unwrap();
    let (first, second) = (dump(&socket), dump(&connected));
    assert_eq!(first.groups.len(), 1);
    assert!(second.groups.is_empty());
    drop((socket, connected));
    world.from.cut();
    let moved = UdpSocket::from(world.to.inside(|| udp::restore(&first).unwrap()));
    let connected = UdpSocket::from(world.to.inside(|| udp::restore(&second).unwrap()));
    world.to.plug();
    moved.set_read_timeout(Some(LONG)).unwrap();
    let client = world.client.inside(|| UdpSocket::bind("10.77.0.9:6002").unwrap());
    world.client.sh("ip route add 239.0.0.0/8 dev eth0");
    client.send_to(b"to all", (group, 6000)).unwrap();
    assert_eq!(moved.recv(&mut [0; 16]).unwrap(), 6);
    connected.send(b"hello").unwrap();
    client.set_read_timeout(Some(LONG)).unwrap();
    assert_eq!(client.recv_from(&mut [0; 16]).unwrap(), (5, "10.77.0.100:6001".parse().unwrap()));
}

#[test]
fn netlink_raw_packet_and_ping() {
    let world = Move::new();
    let (from, to) = (&world.from, &world.to);
    let mut warnings = Vec::new();
    // Netlink: port id and groups.
    let socket = from.inside(|| inet::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE).unwrap());
    let address = |port: u32, groups: u32| {
        [&(libc::AF_NETLINK as u16).to_ne_bytes()[..], &[0; 2], &port.to_ne_bytes(), &groups.to_ne_bytes()].concat()
    };
    inet::bind(socket.as_fd(), &address(4242, 0x11)).unwrap();
    let state = netlink::dump(socket.as_fd(), libc::NETLINK_ROUTE, "test", &mut warnings).unwrap();
    assert_eq!((state.port, &state.groups[..]), (4242, &[1, 5][..]));
    let moved = to.inside(|| netlink::restore(&state).unwrap());
    assert_eq!(inet::local_address(moved.as_fd()).unwrap(), address(4242, 0x11));
    // Raw ICMP with a filter.
    let socket = from.inside(|| inet::socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP).unwrap());
    inet::set_option(socket.as_fd(), libc::SOL_RAW, 1, &0xfeu32.to_ne_bytes()).unwrap();
    let state = raw::dump_raw(socket.as_fd(), Family::V4, libc::IPPROTO_ICMP, "test", &mut Vec::new()).unwrap();
    let moved = to.inside(|| raw::restore_raw(&state).unwrap());
    assert_eq!(inet::option(moved.as_fd(), libc::SOL_RAW, 1, &[], 4).unwrap(), 0xfeu32.to_ne_bytes());
    // A packet socket on a device, with a filter that lets nothing in.
    let socket = from.inside(|| {
        let device = netdev::index(netdev::control_socket().unwrap().as_fd(), "eth0").unwrap();
        packet_socket(device, Receive::Protocol(0x0806), false).unwrap()
    });
    let nothing = [6, 0, 0, 0, 0, 0, 0, 0];
    inet::attach_filter(socket.as_fd(), &nothing).unwrap();
    let state = raw::dump_packet(socket.as_fd(), libc::SOCK_RAW, "test").unwrap();
    let moved = to.inside(|| raw::restore_packet(&state).unwrap());
    assert_eq!(inet::filter(moved.as_fd()).unwrap(), nothing);
    assert_eq!(raw::dump_packet(moved.as_fd(), libc::SOCK_RAW, "test").unwrap(), state);
    // A ping socket.
    for station in [from, to] {
        station.inside(|| std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647").unwrap());
    }
    let socket = from.inside(|| inet::socket(libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_ICMP).unwrap());
    let state = udp::dump(socket.as_fd(), Family::V4, libc::IPPROTO_ICMP, "test", &mut warnings).unwrap();
    to.inside(|| udp::restore(&state).unwrap());
    assert!(warnings.is_empty(), "{warnings:?}");
    assert!(socket.as_raw_fd() > 0);
}
