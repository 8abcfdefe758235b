//! Pods that really are born: needs root. Each test forks a monitor of its own, since birth wants a single thread.

use pod_runtime::birth::{self, Born, Clocks, Purpose, Stdio};
use pod_runtime::cgroup::Cgroup;
use pod_runtime::init::{Tell, become_program};
use pod_runtime::samples;
use pod_runtime::security::capabilities;
use pod_runtime::spec::*;
use pod_runtime::store::{Pod, Store};
use pod_runtime::sys::daemon::{self, Fork};
use pod_runtime::{Doing, Result};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

/// A store of its own, with one pod in it.
struct Bed {
    dir: tempfile::TempDir,
    spec: Spec,
}

fn words(text: &[&str]) -> Vec<String> {
    text.iter().map(|word| (*word).to_owned()).collect()
}

impl Bed {
    fn new(script: &str) -> Bed {
        // Not in /tmp: an upper layer wants storage that a host's root has.
        let dir = tempfile::Builder::new().prefix("pod-birth-").tempdir_in("/var/tmp").unwrap();
        let id = pod_runtime::store::new_id().unwrap();
        let mut spec = samples::spec(&id, &format!("t-{id}"));
        spec.hostname = "inside".into();
        spec.process.args = words(&["sh", "-c", script]);
        spec.process.env = words(&["PATH=/usr/bin:/bin:/usr/sbin:/sbin", "LANG=C"]);
        spec.security.capabilities = capabilities::resolve(&[], &[]).unwrap();
        Bed { dir, spec }
    }

    fn store(&self) -> Store {
        Store::open_at(self.dir.path().join("data"), self.dir.path().join("run")).unwrap()
    }

    fn upper(&self, path: &str) -> PathBuf {
        self.dir.path().join("data/pods").join(&self.spec.id).join("upper/+").join(path)
    }

    /// Runs `f` in a forked monitor with a pod that was just reserved; what it prints comes back with its code.
    fn monitor(&self, f: impl FnOnce(&Spec, &Pod, [OwnedFd; 3]) -> Result<i32>) -> (i32, String) {
        let pod = self.store().reserve(&self.spec).unwrap();
        let (read, write) = nix::unistd::pipe().unwrap();
        match daemon::fork().unwrap() {
            Fork::Child => {
                drop(read);
                let null = OwnedFd::from(File::open("/dev/null").unwrap());
                let stdio = [null, write.try_clone().unwrap(), write.try_clone().unwrap()];
                let run = std::panic::AssertUnwindSafe(|| f(&self.spec, &pod, stdio));
                let code = match std::panic::catch_unwind(run) {
                    Ok(Ok(code)) => code,
                    Ok(Err(problem)) => {
                        let _ = write!(File::from(write), "{} {}", problem.code(), problem.chain());
                        200
                    }
                    Err(_) => 201,
                };
                let _ = Cgroup::open(&self.spec.id).and_then(|cgroup| cgroup.remove(Duration::from_secs(5)));
                daemon::exit_now(code)
            }
            Fork::Parent(pid) => {
                drop(write);
                let mut said = String::new();
                File::from(read).read_to_string(&mut said).unwrap();
                (daemon::reap(pid).unwrap().code(), said)
            }
        }
    }

    /// Runs the script as the pod's first process.
    fn run(&self) -> (i32, String) {
        self.monitor(|spec, pod, stdio| {
            let born = bear(spec, pod, Purpose::Run, Stdio::Files(stdio))?;
            born.start()?;
            daemon::reap(born.init).map(|ended| ended.code()).doing(|| "wait".into())
        })
    }

    /// The same, expecting success.
    fn see(&self) -> String {
        let (code, said) = self.run();
        assert_eq!(code, 0, "{said}");
        said
    }
}

fn bear(spec: &Spec, pod: &Pod, purpose: Purpose, stdio: Stdio) -> Result<Born> {
    birth::birth(spec, pod, Clocks::default(), purpose, stdio, |_| Ok(()))
}

#[test]
fn a_pod_has_namespaces_of_its_own() {
    let bed = Bed::new(
        "echo $$; hostname; for n in pid net mnt ipc uts cgroup time; do readlink /proc/self/ns/$n; done; ls /proc | grep -c '^[0-9]'; \
         ping -c1 -W2 127.0.0.1 | grep -c 'bytes from'",
    );
    let said = bed.see();
    let lines: Vec<_> = said.lines().collect();
    assert_eq!(&lines[..2], ["1", "inside"]);
    for (at, name) in ["pid", "net", "mnt", "ipc", "uts", "cgroup", "time"].iter().enumerate() {
        let ours = fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
        assert_ne!(lines[2 + at], ours.to_str().unwrap(), "{name}");
    }
    assert!(lines[9].parse::<u32>().unwrap() <= 4, "{said}");
    assert_eq!(lines[10], "1", "its loopback is up: {said}");
}

#[test]
fn what_it_writes_stays_in_its_layer() {
    let bed = Bed::new("echo mine > /etc/of-the-pod; rm /etc/passwd; cat /etc/of-the-pod; ls /etc/passwd");
    let (code, said) = bed.run();
    assert!(said.starts_with("mine"), "{said}");
    assert_ne!(code, 0);
    assert!(!PathBuf::from("/etc/of-the-pod").exists() && PathBuf::from("/etc/passwd").exists());
    assert_eq!(fs::read_to_string(bed.upper("etc/of-the-pod")).unwrap(), "mine\n");
}

#[test]
fn nothing_is_left_of_it() {
    let before = birth::mounts_of(std::process::id() as i32).unwrap().len();
    let bed = Bed::new("true");
    assert_eq!(bed.run().0, 0);
    assert_eq!(birth::mounts_of(std::process::id() as i32).unwrap().len(), before);
    assert!(!Cgroup::open(&bed.spec.id).unwrap().exists());
    let mounts = bed.dir.path().join("data/pods").join(&bed.spec.id).join("mounts.json");
    assert!(fs::read_to_string(mounts).unwrap().contains("/dev/mqueue"));
}

#[test]
fn devices_and_kernel_files() {
    let bed = Bed::new(
        "ls /dev | tr '\\n' ' '; echo; stat -c '%a %t:%T' /dev/null /dev/tty; readlink /dev/ptmx; \
         cat /proc/timer_list | wc -c; ls /sys/firmware | wc -l; cat /proc/keys | wc -c; \
         (echo 1 > /proc/sys/kernel/domainname) 2>/dev/null || echo denied; \
         (echo 1 > /sys/kernel/mm/transparent_hugepage/enabled) 2>/dev/null || echo denied; \
         cat /proc/sys/kernel/pid_max; cat /proc/sys/net/mptcp/enabled; stat -c %a /tmp /run /dev/shm; \
         mknod /tmp/mem c 1 1 && dd if=/tmp/mem bs=1 count=1 2>&1 | grep -o 'not permitted\\|denied'",
    );
    let said = bed.see();
    let lines: Vec<_> = said.lines().collect();
    assert_eq!(lines[0], "fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero ");
    assert_eq!(&lines[1..4], ["666 1:3", "666 5:0", "pts/ptmx"]);
    assert_eq!(&lines[4..9], ["0", "0", "0", "denied", "denied"]);
    assert_eq!(&lines[9..11], ["32768", "0"], "{said}");
    assert_eq!(&lines[11..14], ["1777", "755", "1777"]);
}

#[test]
fn a_device_outside_the_list_cannot_be_opened() {
    let bed = Bed::new("mknod /root/mem c 1 1 || exit 1; dd if=/root/mem of=/dev/null bs=1 count=1 2>&1; true");
    assert!(bed.see().contains("ermi"), "{}", bed.see());
}

#[test]
fn capabilities_of_root_and_of_others() {
    let caps = "grep Cap /proc/self/status | cut -f2 | tr '\\n' ' '";
    let mut bed = Bed::new(caps);
    assert_eq!(
        bed.see().trim(),
        "0000000000000000 00000000a80425fb 00000000a80425fb 00000000a80425fb 0000000000000000"
    );
    bed = Bed::new(&format!("id -u; id -G; {caps}; touch /etc/x 2>/dev/null || echo denied"));
    bed.spec.process.user = User { uid: 1234, gid: 2345, additional_gids: vec![7, 8], umask: None };
    let said = bed.see();
    let lines: Vec<_> = said.lines().collect();
    assert_eq!(&lines[..2], ["1234", "2345 7 8"]);
    let none = "0000000000000000";
    assert_eq!(lines[2].trim(), format!("{none} {none} {none} 00000000a80425fb {none} denied"), "{said}");
    bed = Bed::new(caps);
    bed.spec.security.capabilities = capabilities::resolve(&words(&["NET_ADMIN"]), &words(&["ALL"])).unwrap();
    assert!(bed.see().contains("0000000000001000 0000000000001000 0000000000001000"));
}

#[test]
fn limits_of_the_process_and_of_the_pod() {
    let mut bed = Bed::new(
        "ulimit -n; ulimit -Hn; umask; cat /sys/fs/cgroup/pids/pids.max /sys/fs/cgroup/pids.max 2>/dev/null; true",
    );
    bed.spec.process.rlimits = vec![Rlimit { kind: "nofile".into(), soft: 100, hard: 200 }];
    bed.spec.resources = Resources { memory: Some(64 << 20), cpus: Some(0.5), pids: Some(17) };
    assert_eq!(bed.see(), "100\n200\n0022\n17\n");
}

#[test]
fn too_much_memory_is_killed() {
    let mut bed = Bed::new("head -c 200000000 /dev/zero | tail -c 190000000 | wc -c");
    bed.spec.resources.memory = Some(32 << 20);
    let (_, said) = bed.run();
    assert!(!said.contains("190000000"), "{said}");
}

#[test]
fn volumes_of_folders_and_files() {
    let mut bed =
        Bed::new("cat /data/in; echo out > /data/out; (echo no > /ro/x) 2>/dev/null || echo denied; cat /etc/one");
    let volume = |source: PathBuf, destination: &str, read_only| Volume {
        source,
        destination: destination.into(),
        read_only,
        shared: false,
    };
    let host = bed.dir.path().join("volume");
    fs::create_dir_all(&host).unwrap();
    fs::write(host.join("in"), "in\n").unwrap();
    bed.spec.volumes = vec![
        volume(host.clone(), "/data", false),
        volume(bed.dir.path().join("made"), "/ro", true),
        volume(host.join("in"), "/etc/one", true),
    ];
    assert_eq!(bed.see(), "in\ndenied\nin\n");
    assert_eq!(fs::read_to_string(host.join("out")).unwrap(), "out\n");
}

#[test]
fn a_hostile_root_leads_nowhere() {
    let mut bed = Bed::new("unused");
    let root = bed.dir.path().join("rootfs");
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::copy("/usr/bin/busybox", root.join("bin/busybox")).unwrap();
    let outside = bed.dir.path().join("outside");
    fs::create_dir_all(&outside).unwrap();
    std::os::unix::fs::symlink(&outside, root.join("data")).unwrap();
    std::os::unix::fs::symlink("../../../../../..", root.join("up")).unwrap();
    bed.spec.root.base = Base::Directory(root.clone());
    bed.spec.process.args = words(&["/bin/busybox", "sh", "-c", "/bin/busybox ls -d /up/v /up/var; /bin/busybox true"]);
    bed.spec.volumes = vec![Volume {
        source: bed.dir.path().join("volume"),
        destination: "/up/../data/v".into(),
        read_only: false,
        shared: false,
    }];
    // A path with '..' is resolved inside the root, or refused; nothing appears outside.
    let _ = bed.run();
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    for link in ["proc", "sys", "dev"] {
        let mut bed = Bed::new("unused");
        let root = bed.dir.path().join("rootfs");
        fs::create_dir_all(root.join("elsewhere")).unwrap();
        std::os::unix::fs::symlink("/elsewhere", root.join(link)).unwrap();
        bed.spec.root.base = Base::Directory(root);
        let (code, said) = bed.run();
        assert_eq!(code, 200);
        assert!(said.starts_with("E-ROOTFS"), "{said}");
    }
}

#[test]
fn a_read_only_root_can_be_written_nowhere_but_in_tmp() {
    let mut bed =
        Bed::new("(touch /x || touch /etc/x) 2>/dev/null || echo denied; touch /tmp/x /run/x /dev/shm/x && echo fine");
    bed.spec.root.read_only = true;
    assert_eq!(bed.see(), "denied\nfine\n");
}

#[test]
fn a_folder_as_root() {
    let mut bed = Bed::new("unused");
    let root = bed.dir.path().join("rootfs");
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::create_dir_all(root.join("run/kept")).unwrap();
    fs::copy("/usr/bin/busybox", root.join("bin/sh")).unwrap();
    bed.spec.root.base = Base::Directory(root.clone());
    bed.spec.process.args =
        words(&["/bin/sh", "-c", "echo x > /new; echo /*; echo /run/*; read a < /etc/hostname; echo $a"]);
    let said = bed.see();
    assert_eq!(said, "/bin /dev /etc /new /proc /run /sys\n/run/kept\ninside\n");
    assert!(!root.join("new").exists());
}

#[test]
fn programs_that_cannot_be_executed() {
    for (args, code) in [
        ("/nowhere", "E-COMMAND-NOT-FOUND"),
        ("nowhere", "E-COMMAND-NOT-FOUND"),
        ("/etc/passwd", "E-COMMAND-NOT-EXECUTABLE"),
    ] {
        for init in [false, true] {
            let mut bed = Bed::new("");
            bed.spec.process.args = words(&[args]);
            bed.spec.process.init = init;
            let (status, said) = bed.run();
            assert_eq!(status, 200);
            assert!(said.starts_with(code), "{init} {said}");
        }
    }
}

#[test]
fn a_tiny_init_reaps_and_hands_signals_on() {
    let mut bed = Bed::new(
        "echo $$; cat /proc/1/comm; (sh -c 'sleep 0.01 &' &); \
         trap 'echo term; ps -o stat= -A | grep -c Z; exit 7' TERM; kill -TERM 1; sleep 1; sleep 1; echo late",
    );
    bed.spec.process.init = true;
    let (code, said) = bed.run();
    assert_eq!(said, "2\n.pod-init\nterm\n0\n");
    assert_eq!(code, 7);
}

#[test]
fn two_pods_have_the_same_names() {
    let script = "ipcmk -M 4096 >/dev/null; ipcs -m | grep -c ^0x; echo $$";
    let (first, second) = (Bed::new(script), Bed::new(script));
    assert_eq!(first.see(), "1\n1\n");
    assert_eq!(second.see(), "1\n1\n");
}

#[test]
fn clocks_are_shifted() {
    let bed = Bed::new("cut -d' ' -f1 /proc/uptime");
    let (code, said) = bed.monitor(|spec, pod, stdio| {
        let clocks = Clocks { monotonic: 5_000_000_000_000, boottime: 1_000_000_000_000_000 };
        let born = birth::birth(spec, pod, clocks, Purpose::Run, Stdio::Files(stdio), |_| Ok(()))?;
        born.start()?;
        daemon::reap(born.init).map(|ended| ended.code()).doing(|| "wait".into())
    });
    assert_eq!(code, 0);
    assert!(said.trim().parse::<f64>().unwrap() > 1_000_000.0, "{said}");
}

#[test]
fn a_terminal_is_the_pods_own() {
    let mut bed = Bed::new("tty; stty size; ls /dev/pts /dev/console | tr '\\n' ' '; exit 3");
    bed.spec.process.terminal = true;
    let (code, said) = bed.monitor(|spec, pod, stdio| {
        let mut born = bear(spec, pod, Purpose::Run, Stdio::Terminal { rows: 33, columns: 77 })?;
        let console = File::from(born.console.take().unwrap());
        born.start()?;
        let code = daemon::reap(born.init).unwrap().code();
        let mut text = vec![0; 4096];
        let count = (&console).read(&mut text).unwrap();
        File::from(stdio.into_iter().nth(1).unwrap()).write_all(&text[..count]).unwrap();
        Ok(code)
    });
    assert_eq!(code, 3);
    assert_eq!(said.replace('\r', ""), "/dev/pts/0\n33 77\n/dev/console  /dev/pts: 0 ptmx ");
}

#[test]
fn entering_a_pod() {
    let bed = Bed::new("sleep 30");
    let (code, said) = bed.monitor(|spec, pod, stdio| {
        let born = bear(spec, pod, Purpose::Run, Stdio::Null)?;
        born.start()?;
        let out = stdio[1].as_raw_fd();
        let child = birth::enter(&born.pidfd, &born.cgroup, Some(300), || {
            let script =
                "echo $$; hostname; grep CapEff /proc/self/status; cat /proc/self/cgroup | cut -d: -f3 | sort -u";
            let process = Process { args: words(&["sh", "-c", script]), ..spec.process.clone() };
            nix::unistd::dup2_stdout(&stdio[1]).unwrap();
            let tell = Tell { fd: out, words: &|problem| problem.chain().into_bytes() };
            become_program(spec, &process, &tell);
            99
        })?;
        let code = daemon::reap(child).unwrap().code();
        assert!(born.cgroup.procs()?.contains(&born.init));
        let taken = birth::enter(&born.pidfd, &born.cgroup, Some(1), || 0);
        assert!(taken.is_err());
        born.cgroup.freeze(Duration::from_secs(2))?;
        assert!(birth::enter(&born.pidfd, &born.cgroup, None, || 0).is_err());
        born.cgroup.thaw()?;
        born.cgroup.kill()?;
        assert_eq!(daemon::reap(born.init).unwrap().code(), 137);
        Ok(code)
    });
    assert_eq!(code, 0, "{said}");
    assert!(said.starts_with("300\ninside\nCapEff:\t00000000a80425fb\n/\n"), "{said}");
}

#[test]
fn parking_keeps_one_descriptor() {
    let bed = Bed::new("unused");
    let (code, said) = bed.monitor(|spec, pod, _| {
        let born = bear(spec, pod, Purpose::Fill(None), Stdio::Null)?;
        // It parks after it has said "ready": wait for what it does last.
        let fds = || fs::read_dir(format!("/proc/{}/fd", born.init)).unwrap().count();
        for _ in 0..1000 {
            if fds() == 1 {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(fds(), 1);
        drop(born.sync);
        Ok(daemon::reap(born.init).unwrap().code())
    });
    assert_eq!(code, 125, "{said}");
}

#[test]
fn a_birth_that_fails_leaves_nothing() {
    let bed = Bed::new("unused");
    let (code, said) = bed.monitor(|spec, pod, stdio| {
        let failed = birth::birth(spec, pod, Clocks::default(), Purpose::Run, Stdio::Files(stdio), |_| {
            Err(pod_runtime::Problem::new("E-SYSTEM", "no network"))
        });
        assert_eq!(failed.unwrap_err().what(), "no network");
        assert!(!Cgroup::open(pod.id())?.exists());
        assert!(daemon::reap_any().unwrap().is_none());
        Ok(0)
    });
    assert_eq!(code, 0, "{said}");
}

#[test]
fn system_calls_are_filtered() {
    let probe = "import ctypes; l = ctypes.CDLL(None, use_errno=True)\n\
                 for n in (425, 426, 427, 323, 165, 435, 9999): print(l.syscall(n, 0, 0, 0, 0), ctypes.get_errno())";
    let script =
        format!("grep Seccomp: /proc/self/status; unshare -n true 2>/dev/null || echo denied; python3 -c \"{probe}\"");
    let mut bed = Bed::new(&script);
    let (enosys, eperm) = ("-1 38", "-1 1");
    let wanted = ["Seccomp:\t2", "denied", enosys, enosys, enosys, eperm, eperm, enosys, enosys];
    assert_eq!(bed.see().lines().collect::<Vec<_>>(), wanted);
    // Also for a user that could never install one, and with no_new_privs.
    bed = Bed::new("grep -E 'Seccomp:|NoNewPrivs' /proc/self/status; unshare -U true 2>/dev/null || echo denied");
    bed.spec.process.user.uid = 1000;
    assert_eq!(bed.see(), "NoNewPrivs:\t0\nSeccomp:\t2\ndenied\n");
    bed = Bed::new("grep -E 'Seccomp:|NoNewPrivs' /proc/self/status");
    bed.spec.process.no_new_privileges = true;
    assert_eq!(bed.see(), "NoNewPrivs:\t1\nSeccomp:\t2\n");
    bed = Bed::new("grep Seccomp: /proc/self/status; mkdir /tmp/x 2>/dev/null || echo denied");
    bed.spec.security.seccomp = Seccomp::Profile(
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}]}"#
            .into(),
    );
    assert_eq!(bed.see(), "Seccomp:\t2\ndenied\n");
    bed = Bed::new("grep Seccomp: /proc/self/status");
    bed.spec.security.seccomp = Seccomp::Unconfined;
    assert_eq!(bed.see(), "Seccomp:\t0\n");
}

#[test]
fn a_privileged_pod_is_not_confined() {
    let mut bed = Bed::new(
        "grep Seccomp: /proc/self/status; mount -t tmpfs x /mnt && umount /mnt && echo mounted; wc -c < /proc/keys | grep -c '[1-9]'",
    );
    bed.spec.security.privileged = true;
    assert!(bed.see().starts_with("Seccomp:\t0\nmounted\n"), "{}", bed.see());
}

/// An image can make the runtime's own file its interpreter; what it gets is a launcher that cannot be written to.
#[test]
fn the_runtimes_file_is_out_of_reach() {
    let mut bed = Bed::new("unused");
    bed.spec.process.args = words(&["/proc/self/exe", "--help"]);
    assert_eq!(bed.run(), (125, String::new()));
    bed = Bed::new("unused");
    let root = bed.dir.path().join("rootfs");
    fs::create_dir_all(&root).unwrap();
    fs::write(root.join("evil"), "#!/proc/self/exe\n").unwrap();
    fs::set_permissions(root.join("evil"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    bed.spec.root.base = Base::Directory(root);
    bed.spec.process.args = words(&["/evil"]);
    assert_eq!(bed.run(), (125, String::new()));
}

/// Descriptors of the host lead neither to a working directory nor to a program.
#[test]
fn no_way_out_by_descriptors() {
    for number in 3..40 {
        let mut bed = Bed::new("unused");
        bed.spec.process.cwd = format!("/proc/self/fd/{number}").into();
        bed.spec.process.args = words(&["pwd"]);
        let (code, said) = bed.run();
        assert_eq!(code, 200, "{number}: {said}");
    }
    let mut bed = Bed::new("ls /proc/self/fd | wc -l; cat /proc/1/cmdline > /dev/null");
    bed.spec.process.cwd = "/proc/1/cwd".into();
    assert_eq!(bed.see(), "4\n");
}

#[test]
fn a_user_cannot_push_characters_into_a_terminal_outside() {
    let bed = Bed::new(
        "python3 -c 'import fcntl, termios\ntry:\n fcntl.ioctl(1, termios.TIOCSTI, b\"x\")\nexcept OSError as e: print(e.errno)'; ls -l /dev/tty > /dev/null; (: < /dev/tty) 2>/dev/null || echo none",
    );
    let said = bed.see();
    assert!(said.ends_with("none\n"), "{said}");
}

/// A volume that somebody else writes to: what is a folder when it is looked at is a way out a moment later.
#[test]
fn a_destination_that_is_swapped_leads_nowhere() {
    let mut bed = Bed::new("true");
    let (shared, outside) = (bed.dir.path().join("shared"), bed.dir.path().join("outside"));
    fs::create_dir_all(shared.join("folder")).unwrap();
    fs::create_dir_all(&outside).unwrap();
    std::os::unix::fs::symlink(&outside, shared.join("link")).unwrap();
    let volume = |source: PathBuf, destination: &str| Volume {
        source,
        destination: destination.into(),
        read_only: false,
        shared: false,
    };
    bed.spec.volumes =
        vec![volume(shared.clone(), "/shared"), volume(bed.dir.path().join("inner"), "/shared/folder/made/deep")];
    let swapper = match daemon::fork().unwrap() {
        Fork::Child => loop {
            let exchange = nix::fcntl::RenameFlags::RENAME_EXCHANGE;
            let _ = nix::fcntl::renameat2(
                nix::fcntl::AT_FDCWD,
                &shared.join("folder"),
                nix::fcntl::AT_FDCWD,
                &shared.join("link"),
                exchange,
            );
        },
        Fork::Parent(pid) => pid,
    };
    for _ in 0..30 {
        // Mounted inside, or refused: both will do.
        let _ = bed.run();
        let _ = fs::remove_dir_all(bed.dir.path().join("data/pods").join(&bed.spec.id));
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    }
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(swapper), nix::sys::signal::SIGKILL).unwrap();
    daemon::reap(swapper).unwrap();
}

/// A layer that came from another host, at a path that this one does not have; and folders that were used before.
#[test]
fn a_layer_from_elsewhere() {
    let bed = Bed::new("cat /not/there/file; echo more >> /not/there/file");
    let (code, said) = bed.monitor(|spec, pod, stdio| {
        let layer = pod.upper_dir().join("+not+there");
        fs::create_dir_all(&layer).unwrap();
        fs::write(layer.join("file"), "came along\n").unwrap();
        for _ in 0..2 {
            let stdio = Stdio::Files([0, 1, 2].map(|at: usize| stdio[at].try_clone().unwrap()));
            let born = bear(spec, pod, Purpose::Run, stdio)?;
            born.start()?;
            assert_eq!(daemon::reap(born.init).unwrap().code(), 0);
            born.cgroup.remove(Duration::from_secs(5))?;
        }
        Ok(0)
    });
    assert_eq!((code, said.as_str()), (0, "came along\ncame along\nmore\n"));
}
