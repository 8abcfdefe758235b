//! The network of pods, in network namespaces made by the test: `host` is one, each pod is another.
//!
//! nextest runs each test in a process of its own; the namespace is that of the test's thread.

use nix::sched::{CloneFlags, unshare};
use pod_runtime::network::{self, Attachment, Claim, hold::Holder, leases, named, port};
use pod_runtime::samples;
use pod_runtime::spec::*;
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A namespace of its own for this thread, with loopback and a bridge `lan0` that has 10.77.0.1/24.
fn host() -> tempfile::TempDir {
    unshare(CloneFlags::CLONE_NEWNET).expect("root");
    sh("ip link set lo up; ip link add lan0 type bridge; ip link set lan0 up; ip addr add 10.77.0.1/24 dev lan0;
        ip addr add fd77::1/64 dev lan0 nodad");
    tempfile::tempdir().unwrap()
}

fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A process in a network namespace of its own, in place of a pod's first one.
struct Init(Child);

impl Init {
    fn new() -> Init {
        let child = Command::new("unshare").args(["-n", "sleep", "100"]).stdin(Stdio::null()).spawn().unwrap();
        let own = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let end = Instant::now() + Duration::from_secs(5);
        while std::fs::read_link(format!("/proc/{}/ns/net", child.id())).is_ok_and(|ns| ns == own) {
            assert!(Instant::now() < end);
            std::thread::yield_now();
        }
        Init(child)
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }

    fn sh(&self, script: &str) -> String {
        sh(&format!("nsenter -t {} -n sh -ec '{script}'", self.pid()))
    }

    fn inside<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        use std::os::fd::AsFd;
        let ns = std::fs::File::open(format!("/proc/{}/ns/net", self.pid())).unwrap();
        network::wire::inside(ns.as_fd(), f).unwrap()
    }
}

impl Drop for Init {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn spec(id: &str, mode: NetworkMode, ip: &[&str]) -> Spec {
    let address = |text: &&str| {
        let (ip, prefix) = text.split_once('/').unwrap_or((text, ""));
        let ip: IpAddr = ip.parse().unwrap();
        Address { ip, prefix: prefix.parse().unwrap_or(if ip.is_ipv4() { 32 } else { 128 }) }
    };
    let mut spec = samples::spec(id, &format!("name-{id}"));
    spec.network.mode = mode;
    spec.network.addresses = ip.iter().map(address).collect();
    spec
}

fn plug(dir: &Path, spec: &mut Spec, init: &Init, quiet: bool) -> Attachment {
    network::lease(dir, spec, Claim::New).unwrap();
    network::attach(dir, spec, init.pid(), quiet).unwrap()
}

const LAN: fn() -> NetworkMode = || NetworkMode::Bridge("lan0".into());

#[test]
fn a_pod_on_the_lan_is_reached_and_removed() {
    let dir = host();
    let init = Init::new();
    let mut pod = spec("0123456789ab", LAN(), &["10.77.0.100/24", "fd77::100/64"]);
    // As the first process has set it by then.
    init.sh("echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad");
    let began = Instant::now();
    let attachment = plug(dir.path(), &mut pod, &init, false);
    eprintln!("leased and attached in {:?}", began.elapsed());
    assert_eq!(attachment.host_link.as_deref(), Some("pod0123456789ab"));
    assert_eq!(pod.network.mac.as_deref(), Some("02:23:45:67:89:ab"));
    let inside = init.sh("ip -o addr; ip -o link; ip route");
    assert!(inside.contains("10.77.0.100/24") && inside.contains("fd77::100/64"), "{inside}");
    assert!(inside.contains("fe80::23:45ff:fe67:89ab/64") && inside.contains("02:23:45:67:89:ab"), "{inside}");
    assert!(!inside.contains("tentative"), "{inside}");
    assert_eq!(init.sh("cat /proc/sys/net/ipv6/conf/eth0/accept_dad").trim(), "1", "addresses that programs add");
    let listener = init.inside(|| TcpListener::bind(("10.77.0.100", 80)).unwrap());
    TcpStream::connect_timeout(&"10.77.0.100:80".parse().unwrap(), Duration::from_secs(2)).unwrap();
    drop(listener);
    let listener = init.inside(|| TcpListener::bind("[fd77::100]:80").unwrap());
    TcpStream::connect_timeout(&"[fd77::100]:80".parse().unwrap(), Duration::from_secs(2)).unwrap();
    drop(listener);
    network::release(dir.path(), &pod.id).unwrap();
    network::release(dir.path(), &pod.id).unwrap();
    assert!(!sh("ip -o link").contains("pod0123456789ab"));
    assert!(leases::all(dir.path()).unwrap().is_empty());
}

#[test]
fn addresses_in_use_are_refused() {
    let dir = host();
    let init = Init::new();
    let mut first = spec("aaaaaaaaaaaa", LAN(), &["10.77.0.100/24"]);
    plug(dir.path(), &mut first, &init, false);
    let code = |spec: &mut Spec, claim| network::lease(dir.path(), spec, claim).unwrap_err().code().to_string();
    assert_eq!(code(&mut spec("bbbbbbbbbbbb", LAN(), &["10.77.0.100/24"]), Claim::New), "E-ADDRESS-TAKEN");
    assert_eq!(code(&mut spec("bbbbbbbbbbbb", LAN(), &["10.77.0.100/24"]), Claim::Arriving), "E-ADDRESS-TAKEN");
    assert_eq!(code(&mut spec("bbbbbbbbbbbb", LAN(), &["10.77.0.1/24"]), Claim::New), "E-ADDRESS-TAKEN");
    assert_eq!(code(&mut spec("bbbbbbbbbbbb", LAN(), &[]), Claim::New), "E-ADDRESS-NEEDED");
    assert_eq!(
        code(&mut spec("bbbbbbbbbbbb", NetworkMode::Bridge("nobr".into()), &["10.1.1.1/24"]), Claim::New),
        "E-BRIDGE-MISSING"
    );
    // A station of the LAN that is no pod of this host's leases.
    leases::forget(dir.path(), &first.id).unwrap();
    assert_eq!(code(&mut spec("bbbbbbbbbbbb", LAN(), &["10.77.0.100/24"]), Claim::New), "E-ADDRESS-TAKEN");
    // A pod that arrives, too, but for the station that it is itself: it owns the address there.
    let mut arriving = spec("bbbbbbbbbbbb", LAN(), &["10.77.0.100/24"]);
    assert_eq!(code(&mut arriving, Claim::Arriving), "E-ADDRESS-TAKEN");
    arriving.network.mac = first.network.mac.clone();
    network::lease(dir.path(), &mut arriving, Claim::Arriving).unwrap();
    // The prefix comes from the host's route over the bridge.
    let mut short = spec("cccccccccccc", LAN(), &["10.77.0.101"]);
    network::lease(dir.path(), &mut short, Claim::New).unwrap();
    assert_eq!(short.network.addresses[0].prefix, 24);
}

#[test]
fn the_default_network_is_made_when_needed() {
    let dir = host();
    let (a, b) = (Init::new(), Init::new());
    let mode = || NetworkMode::Named("pod".into());
    let (mut first, mut second) = (spec("aaaaaaaaaaaa", mode(), &[]), spec("bbbbbbbbbbbb", mode(), &[]));
    let began = Instant::now();
    plug(dir.path(), &mut first, &a, false);
    eprintln!("with the network made: {:?}", began.elapsed());
    let began = Instant::now();
    plug(dir.path(), &mut second, &b, false);
    eprintln!("with the network there: {:?}", began.elapsed());
    let ip = |spec: &Spec, v4: bool| spec.network.addresses.iter().find(|a| a.ip.is_ipv4() == v4).unwrap().ip;
    assert_ne!(ip(&first, true), ip(&second, true));
    assert_ne!(ip(&first, false), ip(&second, false));
    assert_eq!(sh("cat /proc/sys/net/ipv4/ip_forward").trim(), "1");
    let (to4, to6) = (ip(&second, true), ip(&second, false));
    a.sh(&format!("ping -c1 -W2 {to4} && ping -c1 -W2 {to6} && ping -c1 -W2 10.177.0.1"));
    // The same network again, for a pod that asks for an address of it, and for one outside.
    let mut third = spec("cccccccccccc", mode(), &["10.177.7.7"]);
    network::lease(dir.path(), &mut third, Claim::New).unwrap();
    assert_eq!(third.network.addresses[0].prefix, 16);
    let outside = network::lease(dir.path(), &mut spec("dddddddddddd", mode(), &["10.1.1.1"]), Claim::Arriving);
    assert_eq!(outside.unwrap_err().code(), "E-ADDRESS-OUTSIDE");
    assert_eq!(named::remove(dir.path(), "pod").unwrap_err().code(), "E-NETWORK-BUSY");
    for id in ["aaaaaaaaaaaa", "bbbbbbbbbbbb", "cccccccccccc"] {
        network::release(dir.path(), id).unwrap();
    }
    named::remove(dir.path(), "pod").unwrap();
    assert!(!sh("ip -o link").contains("pod0"));
}

#[test]
fn a_clashing_route_makes_the_default_network_step_aside() {
    let dir = host();
    sh("ip route add 10.177.4.0/24 dev lan0");
    let definition = named::load(dir.path(), "pod").unwrap();
    assert_eq!(definition.subnets[0].to_string(), "10.178.0.0/16");
    assert_eq!(named::load(dir.path(), "pod").unwrap(), definition, "written down");
    assert_eq!(named::load(dir.path(), "other").unwrap_err().code(), "E-NETWORK-UNKNOWN");
    let clash = named::invent(dir.path(), "x", "podx", Some("10.77.0.0/16".parse().unwrap()));
    assert_eq!(clash.unwrap_err().code(), "E-SUBNET-CLASH");
}

#[test]
fn ports_are_published_and_closed() {
    let dir = host();
    if let Err(why) = Command::new("nft").arg("--version").output() {
        return pod_runtime::untested::here(format!("there is no nft: {why}"));
    }
    let init = Init::new();
    let outside = Init::new();
    // A station beyond the host: it can reach the pod by the host's address only, and the pod it by NAT only.
    sh(&format!(
        "ip link add up0 type veth peer name eth0 netns {0}; ip addr add 198.51.100.1/24 dev up0; ip link set up0 up
         nsenter -t {0} -n sh -ec 'ip addr add 198.51.100.2/24 dev eth0; ip link set eth0 up; ip link set lo up'",
        outside.pid()
    ));
    let mut pod = spec("aaaaaaaaaaaa", NetworkMode::Named("pod".into()), &[]);
    pod.network.ports = vec![
        Port { host_ip: None, host: 8080, pod: 80, udp: false },
        Port { host_ip: None, host: 0, pod: 53, udp: true },
    ];
    plug(dir.path(), &mut pod, &init, false);
    assert_ne!(pod.network.ports[1].host, 0, "a free port was found");
    network::publish(dir.path(), &pod).unwrap();
    network::publish(dir.path(), &pod).unwrap();
    let listener = init.inside(|| TcpListener::bind("0.0.0.0:80").unwrap());
    let udp = init.inside(|| UdpSocket::bind("0.0.0.0:53").unwrap());
    let connect = |to: &str| TcpStream::connect_timeout(&to.parse().unwrap(), Duration::from_secs(2));
    outside.inside(|| connect("198.51.100.1:8080")).unwrap();
    connect("198.51.100.1:8080").expect("from the host itself");
    connect("127.0.0.1:8080").expect("from the host's loopback");
    let port = pod.network.ports[1].host;
    outside.inside(|| UdpSocket::bind("0.0.0.0:0").unwrap().send_to(b"x", ("198.51.100.1", port)).unwrap());
    udp.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    assert_eq!(udp.recv(&mut [0; 8]).unwrap(), 1);
    // Outward, the pod is the host.
    let station = outside.inside(|| TcpListener::bind("0.0.0.0:90").unwrap());
    init.inside(|| connect("198.51.100.2:90")).unwrap();
    assert_eq!(station.accept().unwrap().1.ip().to_string(), "198.51.100.1");
    // The host's own loopback is not the pods'.
    let _private = TcpListener::bind("127.0.0.1:7777").unwrap();
    let mut second = spec("bbbbbbbbbbbb", NetworkMode::Named("pod".into()), &[]);
    second.network.ports = vec![Port { host_ip: None, host: 8080, pod: 80, udp: false }];
    assert_eq!(network::lease(dir.path(), &mut second, Claim::New).unwrap_err().code(), "E-PORT-TAKEN");
    second.network.ports[0].host = 7777;
    assert_eq!(network::lease(dir.path(), &mut second, Claim::New).unwrap_err().code(), "E-PORT-TAKEN");
    second.network.mode = LAN();
    assert_eq!(network::lease(dir.path(), &mut second, Claim::New).unwrap_err().code(), "E-PUBLISH-NETWORK");
    drop(listener);
    network::release(dir.path(), &pod.id).unwrap();
    assert!(connect("198.51.100.1:8080").is_err());
    let table = sh("nft list table inet pod");
    assert!(!table.contains("8080"), "{table}");
}

#[test]
fn none_and_host() {
    let dir = host();
    let init = Init::new();
    let attachment = plug(dir.path(), &mut spec("aaaaaaaaaaaa", NetworkMode::None, &[]), &init, false);
    assert!(attachment.host_link.is_none());
    attachment.hold().unwrap();
    attachment.release().unwrap();
    attachment.announce().unwrap();
    plug(dir.path(), &mut spec("bbbbbbbbbbbb", NetworkMode::Host, &[]), &init, false);
    let given = network::lease(dir.path(), &mut spec("bbbbbbbbbbbb", NetworkMode::None, &["10.0.0.1/8"]), Claim::New);
    assert_eq!(given.unwrap_err().code(), "E-ADDRESS-OUTSIDE");
}

#[test]
fn a_held_cable_is_silent_and_comes_back() {
    let dir = host();
    let init = Init::new();
    let mut pod = spec("aaaaaaaaaaaa", LAN(), &["10.77.0.100/24", "fd77::100/64"]);
    let attachment = plug(dir.path(), &mut pod, &init, false);
    let listener = init.inside(|| TcpListener::bind("10.77.0.100:80").unwrap());
    let mut client = TcpStream::connect("10.77.0.100:80").unwrap();
    let (mut server, _) = listener.accept().unwrap();
    let again = Attachment::open(dir.path(), &pod, Some(init.pid())).unwrap();
    let began = Instant::now();
    again.hold().unwrap();
    eprintln!("held in {:?}", began.elapsed());
    use std::io::{Read, Write};
    client.write_all(b"hello").unwrap();
    server.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert!(server.read(&mut [0; 8]).is_err());
    attachment.release().unwrap();
    server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    assert_eq!(server.read(&mut [0; 8]).unwrap(), 5);
    assert!(init.sh("ip -o addr").contains("fd77::100/64"));
    init.sh("ping -c1 -W2 fd77::1");
}

/// Two sockets, in a pod and on its LAN, that send each other datagrams.
struct Ends {
    inside: UdpSocket,
    outside: UdpSocket,
    sent: std::cell::Cell<u32>,
}

impl Ends {
    fn of(init: &Init) -> Ends {
        let inside = init.inside(|| UdpSocket::bind("10.77.0.100:80").unwrap());
        let outside = UdpSocket::bind("10.77.0.1:80").unwrap();
        for socket in [&inside, &outside] {
            socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        }
        Ends { inside, outside, sent: std::cell::Cell::new(0) }
    }

    /// Whether one that is sent now arrives, whatever arrived before.
    fn crosses(&self, inward: bool) -> bool {
        let number = self.sent.get() + 1;
        self.sent.set(number);
        let (from, to, at) = match inward {
            true => (&self.outside, "10.77.0.100:80", &self.inside),
            false => (&self.inside, "10.77.0.1:80", &self.outside),
        };
        let mut data = [0; 4];
        let sent = from.send_to(&number.to_be_bytes(), to).is_ok();
        sent && std::iter::from_fn(|| at.recv(&mut data).ok().map(|_| data)).any(|data| data == number.to_be_bytes())
    }
}

/// On a busy machine, and with a device that has just got its carrier, the first may be late or lost.
fn soon(what: &str, mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < until, "not within 10 s: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_muted_cable_is_heard_inside_only() {
    let dir = host();
    let init = Init::new();
    let mut pod = spec("aaaaaaaaaaaa", LAN(), &["10.77.0.100/24"]);
    let attachment = plug(dir.path(), &mut pod, &init, false);
    let link = attachment.host_link.as_deref().unwrap();
    let ends = Ends::of(&init);
    soon("the pod is reached", || ends.crosses(true));
    assert!(!attachment.is_held());
    assert!(port::mute(link).unwrap());
    assert!(attachment.is_held());
    let sent = || init.sh("cat /proc/net/dev").lines().find(|line| line.contains("eth0")).unwrap().to_owned();
    let before = sent();
    assert!(!ends.crosses(true) && !ends.crosses(false));
    assert_ne!(before, sent(), "the pod has its carrier");
    // Muted, or held as well.
    for held in [false, true] {
        if held {
            assert!(port::mute(link).unwrap());
            attachment.hold().unwrap();
        }
        attachment.release().unwrap();
        soon("it is not held", || !attachment.is_held());
        soon("the pod is reached", || ends.crosses(true));
        soon("the pod reaches others", || ends.crosses(false));
    }
    // A bridge with a spanning tree does not let us.
    sh("ip link set lan0 type bridge stp_state 1");
    assert!(!port::mute(link).unwrap());
}

/// Of a pod whose frames another host draws: what still comes reaches it, and its answers go nowhere.
#[test]
fn a_locked_cable_does_not_draw_the_frames_back() {
    let dir = host();
    let (init, there) = (Init::new(), Init::new());
    let mut pod = spec("aaaaaaaaaaaa", LAN(), &["10.77.0.100/24"]);
    let attachment = plug(dir.path(), &mut pod, &init, false);
    let link = attachment.host_link.as_deref().unwrap();
    let ends = Ends::of(&init);
    soon("the pod is reached", || ends.crosses(true));
    soon("the pod reaches others", || ends.crosses(false));
    port::lock(link).unwrap();
    assert!(attachment.is_held());
    soon("nobody else draws its frames yet", || ends.crosses(false));
    // As the holding port of another host, behind another port of the bridge.
    sh(&format!(
        "ip link add cl0 type veth peer name eth0 netns {0}; ip link set cl0 up master lan0
         nsenter -t {0} -n sh -ec 'ip link set eth0 address 02:aa:aa:aa:aa:aa up; ip addr add 10.77.0.9/24 dev eth0
             ping -c1 -W2 10.77.0.1'",
        there.pid()
    ));
    let knows_it_at = |port: &str| sh("bridge fdb").contains(&format!("02:aa:aa:aa:aa:aa dev {port}"));
    assert!(knows_it_at("cl0"));
    assert!(!ends.crosses(false));
    assert!(knows_it_at("cl0"));
    attachment.release().unwrap();
    assert!(!attachment.is_held());
    soon("its announcement is heard", || knows_it_at(link));
    soon("the pod is reached", || ends.crosses(true));
}

/// A pod that is not there yet: what is sent to it waits in the holding port and reaches it in order.
#[test]
fn held_frames_reach_the_pod() {
    let dir = host();
    let init = Init::new();
    let client = Init::new();
    sh(&format!(
        "ip link add cl0 type veth peer name eth0 netns {0}; ip link set cl0 up master lan0
         nsenter -t {0} -n sh -ec 'ip addr add 10.77.0.9/24 dev eth0; ip link set eth0 up
         ip neigh add 10.77.0.100 lladdr 02:aa:aa:aa:aa:aa dev eth0'",
        client.pid()
    ));
    let mut pod = spec("aaaaaaaaaaaa", LAN(), &["10.77.0.100/24", "fd77::100/64"]);
    let attachment = plug(dir.path(), &mut pod, &init, true);
    assert!(!sh("bridge link").contains("podaaaaaaaaaaaa"), "quiet");
    let before = sh("ip -o link show lan0");
    let began = Instant::now();
    let holder = Holder::start(&attachment).unwrap().expect("a pod with a bridge");
    eprintln!("holding port made in {:?}", began.elapsed());
    holder.announce().unwrap();
    assert!(sh("bridge fdb").contains("02:aa:aa:aa:aa:aa dev pdhaaaaaaaaaaaa"), "{}", sh("bridge fdb"));
    let sender = client.inside(|| UdpSocket::bind("10.77.0.9:1000").unwrap());
    for number in 0..50u32 {
        sender.send_to(&number.to_be_bytes(), "10.77.0.100:2000").unwrap();
    }
    holder.gather();
    for number in 50..100u32 {
        sender.send_to(&number.to_be_bytes(), "10.77.0.100:2000").unwrap();
    }
    let receiver = init.inside(|| UdpSocket::bind("10.77.0.100:2000").unwrap());
    receiver.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let began = Instant::now();
    attachment.join().unwrap();
    attachment.announce().unwrap();
    let frames = holder.inject();
    eprintln!("joined and injected {frames} frames in {:?}", began.elapsed());
    let began = Instant::now();
    drop(holder);
    eprintln!("holding port removed in {:?}", began.elapsed());
    assert!(frames >= 100);
    for number in 0..100u32 {
        let mut data = [0; 4];
        receiver.recv(&mut data).unwrap();
        assert_eq!(u32::from_be_bytes(data), number);
    }
    // The client is still where it was, and so the pod's answer reaches it.
    receiver.send_to(b"back", "10.77.0.9:1000").unwrap();
    sender.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    assert_eq!(sender.recv(&mut [0; 8]).unwrap(), 4);
    assert!(!sh("ip -o link").contains("pdh"), "the port is gone");
    let mtu = |text: &str| text.split(" mtu ").nth(1).unwrap().split(' ').next().unwrap().to_string();
    assert_eq!(mtu(&before), mtu(&sh("ip -o link show lan0")));
}

/// While the gate is closed nobody can begin a connection from outside, and everything else goes on.
#[test]
fn a_gate_keeps_new_connections_out() {
    use pod_runtime::cgroup::Cgroup;
    use pod_runtime::network::announce::parse_mac;
    use pod_runtime::network::cable::link_name;
    use pod_runtime::network::gate::Gate;
    use pod_runtime::network::knocks::Knocks;
    let dir = host();
    let init = Init::new();
    let mut pod = spec("aaaaaaaaaaaa", LAN(), &["10.77.0.100/24", "fd77::100/64"]);
    plug(dir.path(), &mut pod, &init, false);
    let id = format!("gate{}", std::process::id());
    let (cgroup, _) = Cgroup::create(&id, &Resources::default()).unwrap();
    // A listener belongs to the group of the process that makes it.
    std::fs::write(cgroup.unified().expect("a group of v2").join("cgroup.procs"), "0").unwrap();
    let listeners =
        init.inside(|| ["10.77.0.100:80", "[fd77::100]:80", "127.0.0.1:81"].map(|at| TcpListener::bind(at).unwrap()));
    let connect = |to: &str| TcpStream::connect_timeout(&to.parse().unwrap(), Duration::from_millis(200));
    let outside = ["10.77.0.100:80", "[fd77::100]:80"];
    let mac = parse_mac(pod.network.mac.as_deref().unwrap()).unwrap();
    let knocks = Knocks::listen(init.pid(), mac, link_name(&pod.id)).unwrap();
    let mut client = connect(outside[0]).unwrap();
    let (mut server, _) = listeners[0].accept().unwrap();
    assert_eq!(knocks.heard().len(), 0, "it was answered");
    let Some(gate) = Gate::close(&cgroup) else { panic!("no gate on this kernel") };
    for to in outside {
        assert!(connect(to).is_err(), "{to}");
    }
    init.inside(|| connect("127.0.0.1:81")).expect("inside the pod");
    use std::io::{Read, Write};
    client.write_all(b"on").unwrap();
    server.read_exact(&mut [0; 2]).unwrap();
    // Who knocks meanwhile is let in when it opens, and need not knock again, which would take a second.
    let before = knocks.heard().len();
    let knock = |to: &'static str| {
        std::thread::spawn(move || TcpStream::connect_timeout(&to.parse().unwrap(), Duration::from_secs(10)).unwrap())
    };
    let knocking = outside.map(knock);
    let until = Instant::now() + Duration::from_secs(5);
    while knocks.heard().len() < before + 2 {
        assert!(Instant::now() < until, "nobody is heard");
        std::thread::sleep(Duration::from_millis(1));
    }
    init.inside(|| connect("127.0.0.1:81")).expect("inside the pod");
    assert_eq!(knocks.heard().len(), before + 2, "only who comes from outside");
    drop(gate);
    let opened = Instant::now();
    drop(knocks);
    knocking.into_iter().for_each(|client| drop(client.join().unwrap()));
    assert!(opened.elapsed() < Duration::from_millis(500), "{:?}", opened.elapsed());
    for to in outside {
        connect(to).unwrap();
    }
    std::fs::write(cgroup.unified().unwrap().join("../../cgroup.procs"), "0").unwrap();
    for controller in std::fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
        let _ = std::fs::write(controller.path().join("cgroup.procs"), "0");
    }
    cgroup.remove(Duration::from_secs(1)).unwrap();
}
