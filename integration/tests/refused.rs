//! What cannot be moved is refused by name, and the pod goes on as if nothing had happened.

use anyhow::{Result, ensure};
use integration::bed::Bed;
use integration::hugepages::HugePages;
use integration::pods::said;

fn refused(kind: &str, code: &str, options: &[&str]) -> Result<()> {
    let _pages = HugePages::of(kind)?;
    let bed = Bed::new()?;
    bed.a().guest(kind, options, 0)?;
    for round in ["ok 1", "ok 2"] {
        let (_, message) = bed.a().pod_fails(&["checkpoint", "create", kind])?;
        ensure!(message.contains(code), "{message}");
        // Whoever asks before is told, unless it is of a moment.
        let checked = bed.a().output(&["pod", "check", kind])?;
        let checked = String::from_utf8_lossy(&checked.stdout);
        ensure!(LATE.contains(&kind) || checked.contains(code), "{checked}");
        ensure!(bed.a().pod(&["explain", code])?.contains(code), "{code} has no page");
        bed.a().pod(&["kill", "-s", "USR1", kind])?;
        said(bed.a(), kind, round)?;
    }
    ensure!(
        bed.a().pod(&["top", kind]).map_or(true, |processes| !processes.contains("onlooker")),
        "one of ours is left"
    );
    bed.a().pod(&["rm", "-f", kind]).map(drop)
}

/// What is only seen of a pod that stands still.
const LATE: [&str; 7] = ["bpffilter", "devicenode", "hidden", "keyring", "landlock", "namespacefd", "urgent"];

/// Rights that what is refused needs, for most programs do not get them.
const NO_FILTER: &[&str] = &["--security-opt", "seccomp=unconfined"];
const MOUNTS: &[&str] = &["--cap-add", "SYS_ADMIN", "--security-opt", "seccomp=unconfined"];
const PRIVILEGED: &[&str] = &["--privileged"];

macro_rules! refused {
    ($($kind:ident $code:literal $options:expr;)*) => { $( #[test] fn $kind() -> Result<()> {
        refused(stringify!($kind), $code, $options)
    } )* };
}

refused! {
    addressset "E-NETWORK-INSIDE" &["--cap-add", "NET_ADMIN"];
    aio "E-MEMORY-KIND" NO_FILTER;
    bpffilter "E-SOCKET-EBPF" PRIVILEGED;
    bpfmap "E-FILE-BPF" PRIVILEGED;
    covering "E-MOUNT-INSIDE" MOUNTS;
    devicenode "E-FILE-KIND" &["--cap-add", "MKNOD"];
    fanotify "E-FILE-FANOTIFY" PRIVILEGED;
    filtered "E-NETWORK-INSIDE" &["--cap-add", "NET_ADMIN"];
    frozengroup "E-CGROUP-INSIDE" PRIVILEGED;
    fuse "E-FILE-FUSE" &["--device", "/dev/fuse"];
    hidden "E-FILE-HIDDEN" MOUNTS;
    hostdevice "E-FILE-DEVICE" &["--device", "/dev/loop-control"];
    ipsec "E-NETWORK-INSIDE" &["--cap-add", "NET_ADMIN"];
    keyring "E-KEYRING" NO_FILTER;
    kvm "E-FILE-KVM" &["--device", "/dev/kvm"];
    landlock "E-LANDLOCK" &[];
    leased "E-FILE-LEASE" &[];
    mptcp "E-SOCKET-MPTCP" PRIVILEGED;
    namespacefd "E-FILE-NAMESPACE" MOUNTS;
    nested "E-NESTED-NAMESPACE" MOUNTS;
    notified "E-FILE-MQUEUE" &[];
    overseer "E-FILE-SECCOMP" NO_FILTER;
    perf "E-FILE-PERF" PRIVILEGED;
    ring "E-FILE-IO-URING" NO_FILTER;
    secret "E-FILE-SECRET" NO_FILTER;
    shaped "E-NETWORK-INSIDE" &["--cap-add", "NET_ADMIN"];
    sharedfolder "E-SHARED-TABLE" &[];
    sharedhuge "E-MEMORY-KIND" &[];
    sharedspace "E-SHARED-MEMORY-MAP" &[];
    sharedtable "E-SHARED-TABLE" &[];
    threadapart "E-THREAD-APART" NO_FILTER;
    threadwatch "E-FILE-PIDFD" &[];
    traced "E-TASK-TRACED" &[];
    tun "E-FILE-TUN" &["--device", "/dev/net/tun"];
    urgent "E-TCP-URGENT" &[];
    userfault "E-FILE-USERFAULTFD" PRIVILEGED;
    vsock "E-SOCKET-FAMILY" NO_FILTER;
}
