//! What a person is told of a pod's connections before and after a move, and that it is true; ports that are published.

use anyhow::{Context, Result, ensure};
use integration::bed::{Bed, Host};
use integration::wait::{SOON, until_true};
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};

/// A python program on a host that has done what it should when it says so, and is killed when dropped.
struct Program(Child);

impl Program {
    fn start(host: &Host, text: &str) -> Result<Program> {
        let child =
            host.command("python3").args(["-c", text]).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn()?;
        let mut program = Program(child);
        let line = program.line()?;
        ensure!(line == "ready\n", "it says {line:?}");
        Ok(program)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        BufReader::new(self.0.stdout.as_mut().context("it is piped")?).read_line(&mut line)?;
        Ok(line)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn connected(host: &Host, address: &str, port: u16) -> Result<Program> {
    let text = format!(
        "import socket,time\ns=socket.create_connection(('{address}',{port}),20)\nprint('ready',flush=True)\ntime.sleep(1000)"
    );
    Program::start(host, &text)
}

#[test]
fn connections_by_the_hosts_address_are_named_before_and_counted_after() -> Result<()> {
    let bed = Bed::new()?;
    let serve = "import socket,time\ns=socket.create_server(('0.0.0.0',8000))\nc=[]\nwhile 1: c.append(s.accept())";
    bed.a().pod(&["run", "-d", "--name", "web", "-p", "8080:8000", "--", "python3", "-c", serve])?;
    let here = bed.a().address().to_string();
    until_true("the port to be open", SOON, || bed.client().reaches(&here, 8080))?;
    ensure!(bed.a().pod(&["port", "web"])?.trim() == "8000/tcp -> 0.0.0.0:8080");
    let client = connected(bed.client(), &here, 8080)?;
    let checked = bed.a().pod(&["check", "web", "--to", bed.b().name()])?;
    ensure!(checked.contains("DOWNGRADE W-NAT") && checked.contains("can be moved"), "{checked}");
    ensure!(checked.contains("of memory"), "{checked}");
    let report = bed.a().pod(&["migrate", "web", "--to", bed.b().name()])?;
    // `reaches` may have left one that is not closed yet.
    let line = report.lines().find(|line| line.starts_with("connections")).unwrap_or_default();
    ensure!(line.contains(" 0 kept, ") && !line.contains(" 0 closed"), "{report}");
    ensure!(report.contains("W-NAT"), "{report}");
    drop(client);
    // The port is open on the other host.
    let there = bed.b().address().to_string();
    until_true("the port to be open there", SOON, || bed.client().reaches(&there, 8080))?;
    ensure!(!bed.client().reaches(&here, 8080), "it still is open here");
    let job = bed.a().pod(&["job", "ls", "--json"])?;
    let id = job.split("\"id\": \"").nth(1).and_then(|rest| rest.split('"').next()).context("no job")?;
    let told = bed.a().pod(&["job", "log", id])?;
    ensure!(told.contains("commit") && told.contains("connections") && told.contains("done"), "{told}");
    Ok(())
}

/// A SYN from an address where nobody is: the handshake stays half open.
const SYN: &str = "import socket,struct,time\n\
    def sum16(b):\n    b+=b'\\0'*(len(b)%2); t=sum(struct.unpack('!%dH'%(len(b)//2),b))\n    \
    while t>>16: t=(t&65535)+(t>>16)\n    return ~t&65535\n\
    a,b=socket.inet_aton('10.77.0.77'),socket.inet_aton('10.77.0.100')\n\
    t=struct.pack('!HHLLBBHHH',4321,7000,1,0,5<<4,2,8192,0,0)\n\
    c=sum16(a+b+struct.pack('!BBH',0,6,len(t))+t)\nt=t[:16]+struct.pack('!H',c)+t[18:]\n\
    s=socket.socket(socket.AF_INET,socket.SOCK_RAW,socket.IPPROTO_RAW)\n\
    s.sendto(struct.pack('!BBHHHBBH',69,0,20+len(t),1,0,64,6,0)+a+b+t,('10.77.0.100',0))\n\
    print('ready',flush=True)\ntime.sleep(1000)";

#[test]
fn what_nobody_could_keep_is_counted() -> Result<()> {
    let bed = Bed::new()?;
    // Accepts one connection and no other.
    let serve = "import socket,time\ns=socket.create_server(('0.0.0.0',7000))\nc=s.accept()\nprint('accepted',flush=True)\ntime.sleep(1000)";
    let lan = ["run", "-d", "--name", "web", "--network", "bridge:br0", "--ip", "10.77.0.100/24", "--"];
    bed.a().pod(&[&lan[..], &["python3", "-c", serve]].concat())?;
    let mut kept = None;
    until_true("a connection", SOON, || {
        kept = connected(bed.client(), "10.77.0.100", 7000).ok();
        kept.is_some()
    })?;
    integration::pods::said(bed.a(), "web", "accepted")?;
    // Waits to be greeted.
    let text = "import socket\ns=socket.create_connection(('10.77.0.100',7000),20)\nprint('ready',flush=True)\n\
        s.settimeout(20)\ntry: print(s.recv(1))\nexcept ConnectionResetError: print('reset')";
    let mut waits = Program::start(bed.client(), text)?;
    let _half_open = Program::start(bed.client(), SYN)?;
    let states = || bed.a().pod(&["exec", "web", "cat", "/proc/net/tcp"]);
    until_true("the half-open one to be there", SOON, || states().is_ok_and(|t| t.contains(" 03 ")))?;
    let checked = bed.a().pod(&["check", "web", "--to", bed.b().name()])?;
    ensure!(!checked.contains("W-NAT"), "{checked}");
    ensure!(checked.contains("W-UNACCEPTED         one connection waits"), "{checked}");
    let report = bed.a().pod(&["migrate", "web", "--to", bed.b().name()])?;
    ensure!(report.contains("W-UNACCEPTED"), "{report}");
    let line = report.lines().find(|line| line.starts_with("connections")).unwrap_or_default();
    ensure!(line.ends_with(" 1 kept, 1 closed, 1 half-open left to the client's retransmission"), "{report}");
    ensure!(waits.line()? == "reset\n", "the client was not told");
    Ok(())
}

#[test]
fn pods_reach_each_other_and_the_world() -> Result<()> {
    let bed = Bed::new()?;
    let world = "import socket\ns=socket.create_server(('0.0.0.0',9000))\nprint('ready',flush=True)\n\
        while 1:\n c,a=s.accept(); c.sendall(b'hello'); c.close()";
    let _world = Program::start(bed.client(), world)?;
    for name in ["one", "two"] {
        bed.a().pod(&["run", "-d", "--name", name, "--", "python3", "-c", world])?;
        integration::pods::said(bed.a(), name, "ready")?;
    }
    let fetch = |address: &str| {
        let text = format!("import socket\nprint(socket.create_connection(('{address}',9000),10).recv(9).decode())");
        bed.a().pod(&["exec", "one", "python3", "-c", &text])
    };
    ensure!(fetch(&bed.client().address().to_string())?.trim() == "hello", "outside");
    let two = bed.a().pod(&["inspect", "two", "--format", "{{.Ip}}"])?;
    ensure!(fetch(two.trim())?.trim() == "hello", "from pod to pod");
    let ours = bed.a().run(&["cat", "/etc/resolv.conf"])?;
    let servers = |text: &str| text.lines().filter(|line| line.starts_with("nameserver")).count();
    let inside = bed.a().pod(&["exec", "one", "cat", "/etc/resolv.conf"])?;
    ensure!(servers(&ours) == 0 || servers(&inside) > 0, "no name server in the pod: {inside:?} of {ours:?}");
    let asked = bed.a().pod(&["run", "--rm", "--dns", "10.1.2.3", "--", "cat", "/etc/resolv.conf"])?;
    ensure!(asked.contains("nameserver 10.1.2.3"), "{asked}");
    Ok(())
}

/// A packet filter that asks for the state of connections, and is gone again.
#[test]
fn connections_that_are_tracked_are_named() -> Result<()> {
    let bed = Bed::new()?;
    let serve = "import socket,subprocess,time\n\
        subprocess.run(['nft','add table ip t; add chain ip t c { type filter hook output priority 0; }; \
        add rule ip t c ct state new accept'],check=True)\n\
        s=socket.create_server(('127.0.0.1',7000)); c=socket.create_connection(('127.0.0.1',7000)); a=s.accept()\n\
        subprocess.run(['nft','flush','ruleset'],check=True)\nprint('ready',flush=True)\ntime.sleep(1000)";
    let run = ["run", "-d", "--name", "tracked", "--network", "none", "--cap-add", "NET_ADMIN", "--"];
    bed.a().pod(&[&run[..], &["python3", "-c", serve]].concat())?;
    integration::pods::said(bed.a(), "tracked", "ready")?;
    let checked = bed.a().pod(&["check", "tracked"])?;
    ensure!(checked.contains("DOWNGRADE W-CONNTRACK"), "{checked}");
    let said = bed.a().output(&["pod", "checkpoint", "create", "tracked", "tracked"])?;
    let said = String::from_utf8_lossy(&[said.stdout, said.stderr].concat()).into_owned();
    ensure!(said.contains("W-CONNTRACK"), "{said}");
    bed.a().pod(&["rm", "-f", "tracked"])?;
    bed.a().pod(&["restore", "tracked"])?;
    let checked = bed.a().pod(&["check", "tracked"])?;
    ensure!(!checked.contains("W-CONNTRACK"), "it is said of a pod of which it is not true: {checked}");
    Ok(())
}

/// What is of a moment, and what the kernel shows to nobody.
const WAITING: &str = "import fcntl,os,socket,time\n\
    def lo(*a): s=socket.socket(*a); s.bind(('127.0.0.1',0)); return s\n\
    d=os.open('/tmp',os.O_RDONLY); fcntl.fcntl(d,fcntl.F_NOTIFY,fcntl.DN_MODIFY|fcntl.DN_MULTISHOT)\n\
    a,b=socket.socketpair(); a.send(b'!',socket.MSG_OOB)\n\
    u=lo(socket.AF_INET,socket.SOCK_DGRAM); u.connect(u.getsockname())\n\
    u.setsockopt(socket.IPPROTO_UDP,1,1); u.send(b'held back')\n\
    e=lo(socket.AF_INET,socket.SOCK_DGRAM); e.setsockopt(socket.IPPROTO_IP,11,1); e.connect(('127.0.0.1',9)); e.send(b'x')\n\
    r=socket.socket(socket.AF_INET,socket.SOCK_RAW,socket.IPPROTO_ICMP)\n\
    p=socket.socket(socket.AF_INET,socket.SOCK_DGRAM,socket.IPPROTO_ICMP); p.sendto(b'\\x08\\0'+bytes(8),('127.0.0.1',0))\n\
    n=socket.socket(socket.AF_NETLINK,socket.SOCK_RAW,0); n.bind((0,0)); n.send(bytes([32,0,0,0,18,0,1,0])+bytes(12)+b'\\1'+bytes(11))\n\
    time.sleep(.2)\nprint('ready',flush=True)\ntime.sleep(1000)";

#[test]
fn what_nobody_could_keep_of_files_is_named() -> Result<()> {
    let bed = Bed::new()?;
    bed.a().pod(&["run", "-d", "--name", "waiting", "--network", "none", "--", "python3", "-c", WAITING])?;
    integration::pods::said(bed.a(), "waiting", "ready")?;
    let said = bed.a().output(&["pod", "checkpoint", "create", "waiting", "waiting"])?;
    let said = String::from_utf8_lossy(&[said.stdout, said.stderr].concat()).into_owned();
    for lost in [
        "directory notifications (F_NOTIFY)",
        "MSG_OOB",
        "held back by UDP_CORK",
        "errors that wait in a socket",
        "packets that wait in a raw socket",
        "replies that wait in a ping socket",
        "kernel messages that wait in a netlink socket",
    ] {
        ensure!(said.contains(lost), "nothing is said of {lost:?}: {said}");
    }
    bed.a().pod(&["rm", "-f", "waiting"])?;
    bed.a().pod(&["restore", "waiting"]).map(drop)
}

/// Of semaphores, where it cannot be told whose it is; and the code that is of every pod.
#[test]
fn what_is_to_be_undone_of_semaphores_is_named() -> Result<()> {
    let bed = Bed::new()?;
    // clone(CLONE_SYSVSEM | SIGCHLD): a process that has the same list, or one that has none.
    let text = |flags: i32| {
        format!(
            "import ctypes,time\nl=ctypes.CDLL(None); s=l.semget(7,1,0o1600); o=(ctypes.c_short*3)(0,1,0x1000)\n\
            assert l.semop(s,o,1)==0\np=l.syscall(56,{flags}|17,0,0,0,0)\n\
            if p: print('ready',flush=True)\ntime.sleep(1000)"
        )
    };
    for (name, flags) in [("shared", 0x40000), ("apart", 0)] {
        bed.a().pod(&["run", "-d", "--name", name, "--network", "none", "--", "python3", "-c", &text(flags)])?;
        integration::pods::said(bed.a(), name, "ready")?;
        let checked = bed.a().pod(&["check", name])?;
        let said = bed.a().output(&["pod", "checkpoint", "create", name, name])?;
        let said = String::from_utf8_lossy(&[said.stdout, said.stderr].concat()).into_owned();
        for text in [checked, said] {
            ensure!(text.contains("W-SEMAPHORE-UNDO") == (name == "shared"), "{name}: {text}");
            ensure!(!text.contains("W-ANEW"), "{text}");
        }
    }
    let json = bed.a().pod(&["check", "apart", "--json"])?;
    ensure!(json.contains("W-ANEW"), "{json}");
    ensure!(bed.a().pod(&["explain", "W-ANEW"])?.contains("getrusage"));
    Ok(())
}

/// Sums over its processes, in KiB: what is in memory, and the same when shared pages are divided among all who have them.
fn memory_of(host: &Host, pod: &str) -> Result<(u64, u64)> {
    let text = host.pod(&["exec", pod, "sh", "-c", "cat /proc/[0-9]*/smaps_rollup"])?;
    let sum = |key: &str| {
        let amounts = text.lines().filter_map(|line| line.strip_prefix(key));
        amounts.filter_map(|amount| amount.trim().trim_end_matches(" kB").parse::<u64>().ok()).sum::<u64>()
    };
    Ok((sum("Rss:"), sum("Pss:")))
}

/// A server with 64 MiB and eight workers that have done nothing yet.
const SERVER: &str = "import os,time\nb=bytearray(os.urandom(64<<20))\n\
    for _ in range(8):\n if os.fork()==0: time.sleep(1000)\n\
    print('ready',flush=True)\ntime.sleep(1000)";

#[test]
fn memory_that_is_shared_since_fork_stays_shared() -> Result<()> {
    let bed = Bed::new()?;
    bed.a().pod(&["run", "-d", "--name", "server", "--network", "none", "--", "python3", "-c", SERVER])?;
    integration::pods::said(bed.a(), "server", "ready")?;
    let is_shared = |host: &Host, when: &str| -> Result<()> {
        let (resident, proportional) = memory_of(host, "server")?;
        eprintln!("{when}: {resident} KiB in memory, {proportional} KiB shared out");
        ensure!(resident > 9 * (64 << 10), "{when}: {resident} KiB in memory");
        ensure!(proportional < 100 << 10, "{when}: {proportional} KiB");
        let checked = host.pod(&["check", "server"])?;
        ensure!(!checked.contains("W-FORK-SHARED"), "{when}: {checked}");
        Ok(())
    };
    is_shared(bed.a(), "before")?;
    let said = bed.a().output(&["pod", "checkpoint", "create", "server", "server"])?;
    let said = String::from_utf8_lossy(&[said.stdout, said.stderr].concat()).into_owned();
    ensure!(!said.contains("W-FORK-SHARED"), "{said}");
    is_shared(bed.a(), "while it was saved")?;
    bed.a().pod(&["rm", "-f", "server"])?;
    bed.a().pod(&["restore", "server"])?;
    is_shared(bed.a(), "restored")?;
    let packed = bed.shared().join("packed");
    bed.a().pod(&["checkpoint", "create", "server", "--export", &packed.to_string_lossy()])?;
    let bytes = std::fs::metadata(&packed)?.len();
    ensure!(bytes < 100 << 20, "{bytes} bytes");
    bed.a().pod(&["rm", "-f", "server"])?;
    bed.a().pod(&["restore", "--import", &packed.to_string_lossy()])?;
    is_shared(bed.a(), "restored from a packed file")?;
    for (from, to) in [(bed.a(), bed.b()), (bed.b(), bed.a())] {
        let report = from.pod(&["migrate", "server", "--to", to.name()])?;
        ensure!(!report.contains("W-FORK-SHARED"), "{report}");
        is_shared(to, "moved")?;
    }
    Ok(())
}
