//! The unsafe code of the guests: raw objects that no library makes safely, behind wrappers that are.
#![allow(unsafe_code)]

mod region;

pub use region::{Map, Region};

use anyhow::{Result, bail};
use nix::unistd::Pid;
use std::io::{Error, ErrorKind};
use std::sync::atomic::{AtomicU64, Ordering};

static SEEN: [AtomicU64; 65] = [const { AtomicU64::new(0) }; 65];

extern "C" fn count(signal: i32) {
    SEEN[signal as usize].fetch_add(1, Ordering::SeqCst);
}

/// The kernel's answer, as an error when it is -1.
fn check(answer: i64) -> Result<i64, Error> {
    if answer == -1 { Err(Error::last_os_error()) } else { Ok(answer) }
}

/// Installs a handler that counts, with SA_RESTART.
pub fn count_signals(signal: i32) -> Result<()> {
    handle(signal, libc::SA_RESTART)
}

/// As [`count_signals`] with other flags.
pub fn handle(signal: i32, flags: i32) -> Result<()> {
    // SAFETY: all-zero is a valid sigaction; the handler only touches an atomic.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = count as *const () as usize;
    action.sa_flags = flags;
    // SAFETY: the structure is complete and lives through the call.
    check(unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) }.into())?;
    Ok(())
}

/// Flags and handler address of a signal's action; 0 is default, 1 is ignored.
pub fn action(signal: i32) -> Result<(i32, usize)> {
    // SAFETY: all-zero is a valid sigaction, which the kernel fills.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a structure of ours.
    check(unsafe { libc::sigaction(signal, std::ptr::null(), &mut action) }.into())?;
    Ok((action.sa_flags & !0x0400_0000, action.sa_sigaction))
}

/// Ignores a signal.
pub fn ignore(signal: i32) {
    // SAFETY: SIG_IGN is no code.
    unsafe { libc::signal(signal, libc::SIG_IGN) };
}

/// How often a counted signal came.
pub fn signals(signal: i32) -> u64 {
    SEEN[signal as usize].load(Ordering::SeqCst)
}

/// Address of the counting handler, to compare with [`action`].
pub fn handler() -> usize {
    count as *const () as usize
}

/// Puts an alternate stack in place that lives as long as the process, or tells the one in place.
pub fn altstack(new: Option<usize>) -> Result<(usize, usize)> {
    if let Some(bytes) = new {
        let memory = Box::leak(vec![0u8; bytes].into_boxed_slice());
        let stack = libc::stack_t { ss_sp: memory.as_mut_ptr().cast(), ss_flags: 0, ss_size: bytes };
        // SAFETY: the memory is leaked, so it outlives every handler.
        check(unsafe { libc::sigaltstack(&stack, std::ptr::null_mut()) }.into())?;
    }
    let mut old = libc::stack_t { ss_sp: std::ptr::null_mut(), ss_flags: 0, ss_size: 0 };
    // SAFETY: the pointer is to a structure of ours.
    check(unsafe { libc::sigaltstack(std::ptr::null(), &mut old) }.into())?;
    Ok((old.ss_sp as usize, old.ss_size))
}

/// Takes the alternate stack away that the standard library gives every thread.
pub fn no_altstack() -> Result<()> {
    let stack = libc::stack_t { ss_sp: std::ptr::null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
    // SAFETY: handlers then run on the ordinary stack.
    check(unsafe { libc::sigaltstack(&stack, std::ptr::null_mut()) }.into())?;
    Ok(())
}

/// Runs `child` in a forked process, which ends with its answer.
pub fn fork(child: impl FnOnce() -> i32) -> Result<Pid> {
    // SAFETY: guests fork before they have threads, so the child may use everything.
    match unsafe { nix::unistd::fork()? } {
        nix::unistd::ForkResult::Parent { child } => Ok(child),
        nix::unistd::ForkResult::Child => {
            let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child)).unwrap_or(101);
            // SAFETY: ends the process without running what the parent registered.
            unsafe { libc::_exit(status) }
        }
    }
}

/// Waits for the end of a child.
pub fn reap(child: Pid) -> Result<()> {
    nix::sys::wait::waitpid(child, None)?;
    Ok(())
}

/// As [`fork`], with flags of clone(2) that say what is shared (but memory).
pub fn fork_sharing(flags: i32, child: impl FnOnce() -> i32) -> Result<Pid> {
    // SAFETY: without CLONE_VM and a stack it is fork.
    match check(unsafe { libc::syscall(libc::SYS_clone, flags & !libc::CLONE_VM | libc::SIGCHLD, 0, 0, 0, 0) })? {
        0 => {
            let status = child();
            // SAFETY: as in `fork`.
            unsafe { libc::_exit(status) }
        }
        pid => Ok(Pid::from_raw(pid as i32)),
    }
}

/// Takes from ourselves the right to open files for writing (Landlock).
pub fn landlock_no_writing() -> Result<()> {
    const WRITE_FILE: u64 = 1 << 1;
    let rules = WRITE_FILE;
    // SAFETY: the kernel reads 8 bytes.
    let rules = check(unsafe { libc::syscall(444, &raw const rules, 8, 0) })?;
    call(libc::SYS_prctl, [libc::PR_SET_NO_NEW_PRIVS.into(), 1, 0, 0, 0])?;
    call(446, [rules, 0, 0, 0, 0])?;
    call(libc::SYS_close, [rules, 0, 0, 0, 0])?;
    Ok(())
}

/// A system call whose arguments are plain numbers; for pointers there are wrappers of their own.
pub fn call(number: i64, args: [i64; 5]) -> Result<i64, Error> {
    // SAFETY: callers in this program pass numbers only, and the kernel checks them.
    check(unsafe { libc::syscall(number, args[0], args[1], args[2], args[3], args[4]) })
}

/// Attaches System V shared memory.
pub fn attach(id: i32, bytes: usize) -> Result<Region> {
    // SAFETY: the kernel chooses the address.
    let address = unsafe { libc::shmat(id, std::ptr::null(), 0) };
    if address as isize == -1 {
        bail!("shmat: {}", Error::last_os_error());
    }
    Ok(Region { address: address.cast(), bytes })
}

/// A one-shot or periodic ITIMER_REAL, or what remains of it: (value, interval) in microseconds.
pub fn itimer(new: Option<(i64, i64)>) -> Result<(i64, i64)> {
    let split = |us: i64| libc::timeval { tv_sec: us / 1_000_000, tv_usec: us % 1_000_000 };
    if let Some((value, interval)) = new {
        let timer = libc::itimerval { it_value: split(value), it_interval: split(interval) };
        // SAFETY: the structure is complete and lives through the call.
        check(unsafe { libc::setitimer(libc::ITIMER_REAL, &timer, std::ptr::null_mut()) }.into())?;
    }
    let mut now = libc::itimerval { it_value: split(0), it_interval: split(0) };
    // SAFETY: the pointer is to a structure of ours.
    check(unsafe { libc::getitimer(libc::ITIMER_REAL, &mut now) }.into())?;
    let join = |time: libc::timeval| time.tv_sec * 1_000_000 + time.tv_usec;
    Ok((join(now.it_value), join(now.it_interval)))
}

/// A clock in nanoseconds.
pub fn clock(clock: i32) -> Result<i64> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a structure of ours.
    check(unsafe { libc::clock_gettime(clock, &mut time) }.into())?;
    Ok(time.tv_sec * 1_000_000_000 + time.tv_nsec)
}

/// Installs a seccomp program (cBPF, as the kernel takes it).
pub fn seccomp(program: &[libc::sock_filter]) -> Result<()> {
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    // SAFETY: plain numbers.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())?;
    // SAFETY: the program lives through the call; the kernel copies and checks it.
    check(unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &filter) }.into())?;
    Ok(())
}

/// A nanosleep that is not resumed: true when it slept to its end, false when a signal cut it short.
pub fn sleep_once(ns: i64) -> Result<bool> {
    let time = libc::timespec { tv_sec: ns / 1_000_000_000, tv_nsec: ns % 1_000_000_000 };
    // SAFETY: the structure lives through the call.
    match check(unsafe { libc::nanosleep(&time, std::ptr::null_mut()) }.into()) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::Interrupted => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Loads a pattern into all vector registers (AVX where there is) and x87, spins until `stop` is set, and tells whether
/// every one of them still had it. The loop makes no system call: whatever changes a register did so from outside.
pub fn hold_registers(seed: u64, stop: &std::sync::atomic::AtomicBool) -> bool {
    let lanes: [[u64; 4]; 16] =
        std::array::from_fn(|i| std::array::from_fn(|j| seed ^ ((i * 8 + j) as u64 * 0x9e37_79b9)));
    let mut after = [[0u64; 4]; 16];
    let x87 = seed as f64 + 0.5;
    let mut x87_after = 0f64;
    if !std::is_x86_feature_detected!("avx") {
        return true;
    }
    // SAFETY: reads 512 bytes of lanes, one byte of the flag and x87, writes 512 bytes of after and x87_after, all of
    // them alive; every register that it touches is declared.
    unsafe {
        std::arch::asm!(
            "fld qword ptr [{x87}]",
            "vmovdqu ymm0, [{l}]", "vmovdqu ymm1, [{l}+32]", "vmovdqu ymm2, [{l}+64]", "vmovdqu ymm3, [{l}+96]",
            "vmovdqu ymm4, [{l}+128]", "vmovdqu ymm5, [{l}+160]", "vmovdqu ymm6, [{l}+192]", "vmovdqu ymm7, [{l}+224]",
            "vmovdqu ymm8, [{l}+256]", "vmovdqu ymm9, [{l}+288]", "vmovdqu ymm10, [{l}+320]", "vmovdqu ymm11, [{l}+352]",
            "vmovdqu ymm12, [{l}+384]", "vmovdqu ymm13, [{l}+416]", "vmovdqu ymm14, [{l}+448]", "vmovdqu ymm15, [{l}+480]",
            "2:", "pause", "cmp byte ptr [{stop}], 0", "je 2b",
            "vmovdqu [{a}], ymm0", "vmovdqu [{a}+32], ymm1", "vmovdqu [{a}+64], ymm2", "vmovdqu [{a}+96], ymm3",
            "vmovdqu [{a}+128], ymm4", "vmovdqu [{a}+160], ymm5", "vmovdqu [{a}+192], ymm6", "vmovdqu [{a}+224], ymm7",
            "vmovdqu [{a}+256], ymm8", "vmovdqu [{a}+288], ymm9", "vmovdqu [{a}+320], ymm10", "vmovdqu [{a}+352], ymm11",
            "vmovdqu [{a}+384], ymm12", "vmovdqu [{a}+416], ymm13", "vmovdqu [{a}+448], ymm14", "vmovdqu [{a}+480], ymm15",
            "fstp qword ptr [{x87_after}]", "vzeroupper",
            l = in(reg) lanes.as_ptr(), a = in(reg) after.as_mut_ptr(), stop = in(reg) stop.as_ptr(),
            x87 = in(reg) &x87, x87_after = in(reg) &mut x87_after,
            out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _, out("ymm4") _, out("ymm5") _, out("ymm6") _,
            out("ymm7") _, out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _, out("ymm12") _, out("ymm13") _,
            out("ymm14") _, out("ymm15") _, out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
        );
    }
    after == lanes && x87_after == x87
}

fn one(signal: i32) -> libc::sigset_t {
    // SAFETY: all-zero is a valid set, and the signal a valid number.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, signal);
        set
    }
}

/// Blocks a signal that nix has no name for.
pub fn block(signal: i32) -> Result<()> {
    // SAFETY: the set lives through the call.
    check(unsafe { libc::sigprocmask(libc::SIG_BLOCK, &one(signal), std::ptr::null_mut()) }.into())?;
    Ok(())
}

/// Queues a signal with a value to ourselves.
pub fn queue(signal: i32, value: i32) -> Result<()> {
    let value = libc::sigval { sival_ptr: value as usize as *mut libc::c_void };
    // SAFETY: plain numbers.
    check(unsafe { libc::sigqueue(libc::getpid(), signal, value) }.into())?;
    Ok(())
}

/// Takes a pending signal off the queue: its code and value.
pub fn take(signal: i32) -> Result<(i32, i32)> {
    let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: all-zero is a valid siginfo, which the kernel fills; a queued signal has a value.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        check(libc::sigtimedwait(&one(signal), &mut info, &none).into())?;
        Ok((info.si_code, info.si_value().sival_ptr as usize as i32))
    }
}

/// Detaches System V shared memory.
pub fn detach(region: Region) -> Result<()> {
    // SAFETY: the region was the only way to this attachment and is consumed.
    check(unsafe { libc::shmdt(region.address.cast()) }.into())?;
    Ok(())
}

#[repr(C)]
struct Message {
    kind: libc::c_long,
    text: [u8; 64],
}

/// Sends a System V message of at most 64 bytes.
pub fn send(queue: i32, kind: i64, text: &[u8]) -> Result<()> {
    let mut message = Message { kind, text: [0; 64] };
    message.text[..text.len()].copy_from_slice(text);
    // SAFETY: the message lives through the call and is at least that long.
    check(unsafe { libc::msgsnd(queue, (&raw const message).cast(), text.len(), libc::IPC_NOWAIT) }.into())?;
    Ok(())
}

/// Takes the first message of a System V queue.
pub fn receive(queue: i32) -> Result<(i64, Vec<u8>)> {
    let mut message = Message { kind: 0, text: [0; 64] };
    // SAFETY: the kernel writes at most 64 bytes of text into a structure that has them.
    let bytes = check(unsafe { libc::msgrcv(queue, (&raw mut message).cast(), 64, 0, libc::IPC_NOWAIT) } as i64)?;
    Ok((message.kind, message.text[..bytes as usize].to_vec()))
}

/// Rows and columns of a terminal.
pub fn window(fd: i32) -> Result<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one winsize.
    check(unsafe { libc::ioctl(fd, libc::TIOCGWINSZ, &mut size) }.into())?;
    Ok((size.ws_row, size.ws_col))
}

/// A classic program that sends all that comes to a group of sockets to the second (SO_ATTACH_REUSEPORT_CBPF).
pub fn choose_second_of_port(fd: i32) -> Result<()> {
    /// BPF_RET | BPF_K.
    const RETURN: u16 = 6;
    let mut instructions = [libc::sock_filter { code: RETURN, jt: 0, jf: 0, k: 1 }];
    let program = libc::sock_fprog { len: 1, filter: instructions.as_mut_ptr() };
    let bytes = size_of_val(&program) as libc::socklen_t;
    let option = libc::SO_ATTACH_REUSEPORT_CBPF;
    // SAFETY: the program and its instructions live through the call.
    check(unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, option, (&raw const program).cast(), bytes) }.into())?;
    Ok(())
}

/// mq_open(3) of a queue of 8 messages of 32 bytes.
pub fn mq_open(name: &std::ffi::CStr, flags: i32) -> Result<std::os::fd::OwnedFd> {
    let attributes = [0i64, 8, 32, 0, 0, 0, 0, 0];
    // SAFETY: name and attributes live through the call; nobody else has the new descriptor.
    unsafe {
        let flags = flags | libc::O_CLOEXEC;
        let fd = check(libc::syscall(libc::SYS_mq_open, name.as_ptr(), flags, 0o640, attributes.as_ptr()))?;
        Ok(std::os::fd::FromRawFd::from_raw_fd(fd as i32))
    }
}

/// mq_unlink(3).
pub fn mq_unlink(name: &std::ffi::CStr) -> Result<()> {
    // SAFETY: the name is terminated.
    check(unsafe { libc::syscall(libc::SYS_mq_unlink, name.as_ptr()) })?;
    Ok(())
}

/// mq_send(3).
pub fn mq_send(queue: i32, priority: u32, text: &[u8]) -> Result<()> {
    // SAFETY: the kernel reads as many bytes as are there.
    check(unsafe { libc::syscall(libc::SYS_mq_timedsend, queue, text.as_ptr(), text.len(), priority, 0) })?;
    Ok(())
}

/// mq_receive(3): priority and text.
pub fn mq_receive(queue: i32) -> Result<(u32, Vec<u8>)> {
    let (mut text, mut priority) = (vec![0u8; 32], 0u32);
    // SAFETY: the kernel writes at most 32 bytes and a number.
    let got = check(unsafe {
        libc::syscall(libc::SYS_mq_timedreceive, queue, text.as_mut_ptr(), text.len(), &raw mut priority, 0)
    })?;
    text.truncate(got as usize);
    Ok((priority, text))
}

/// mq_notify(3) by a signal.
pub fn mq_notify(queue: i32, signal: i32) -> Result<()> {
    // SAFETY: all-zero is a valid sigevent; the kernel reads one.
    unsafe {
        let mut event: libc::sigevent = std::mem::zeroed();
        event.sigev_notify = libc::SIGEV_SIGNAL;
        event.sigev_signo = signal;
        check(libc::syscall(libc::SYS_mq_notify, queue, &raw const event))?;
    }
    Ok(())
}

/// Ends the calling thread and no other.
pub fn end_thread(status: i32) -> ! {
    loop {
        // SAFETY: what the thread owns stays where it is; nobody joins it.
        unsafe { libc::syscall(libc::SYS_exit, status) };
    }
}

/// How long what is written to a file will live (F_SET_RW_HINT), set or read.
pub fn write_hint(fd: i32, new: Option<u64>) -> Result<u64> {
    let mut hint = new.unwrap_or(0);
    // SAFETY: the kernel reads or writes 8 bytes of ours.
    check(unsafe { libc::fcntl(fd, if new.is_some() { 1036 } else { 1035 }, &raw mut hint) }.into())?;
    Ok(hint)
}

/// Has a packet socket listen to everything on one device.
pub fn bind_to_device(fd: i32, device: i32) -> Result<()> {
    // SAFETY: all-zero is a valid address; the kernel reads one.
    unsafe {
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = device;
        let bytes = size_of_val(&address) as libc::socklen_t;
        check(libc::bind(fd, (&raw const address).cast(), bytes).into())?;
    }
    Ok(())
}

/// Has a terminal's master tell what happens at the slave (TIOCPKT).
pub fn packet_mode(master: i32) -> Result<()> {
    // SAFETY: the kernel reads one int.
    check(unsafe { libc::ioctl(master, libc::TIOCPKT, &1i32) }.into())?;
    Ok(())
}

/// A descriptor that was just received.
pub fn owned(fd: i32) -> std::fs::File {
    // SAFETY: the kernel gave it to us by SCM_RIGHTS and nobody else knows its number.
    unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) }
}

/// Makes a data segment with this base in the process's LDT.
pub fn set_segment(number: u32, base: u32) -> Result<()> {
    // struct user_desc: 32 bits, limit in pages, usable.
    let segment = [number, base, 0xfffff, 0b101_0001];
    // SAFETY: the kernel reads 16 bytes.
    check(unsafe { libc::syscall(libc::SYS_modify_ldt, 0x11, segment.as_ptr(), 16) })?;
    Ok(())
}

/// A descriptor of the process's LDT.
pub fn segment(number: usize) -> Result<u64> {
    let mut table = [0u64; 16];
    // SAFETY: the kernel writes at most 128 bytes.
    check(unsafe { libc::syscall(libc::SYS_modify_ldt, 0, table.as_mut_ptr(), 128) })?;
    Ok(table[number])
}

static GATE: std::sync::atomic::AtomicPtr<std::sync::atomic::AtomicU8> =
    std::sync::atomic::AtomicPtr::new(std::ptr::null_mut());

extern "C" fn dispatched(signal: i32) {
    count(signal);
    // SAFETY: points to a static, once the handler can run.
    unsafe { (*GATE.load(Ordering::SeqCst)).store(0, Ordering::SeqCst) };
}

/// System calls end in SIGSYS, which is counted, while the selector is 1; the handler sets it to 0.
pub fn dispatch_calls(option: i64, selector: &'static std::sync::atomic::AtomicU8) -> Result<()> {
    GATE.store(std::ptr::from_ref(selector).cast_mut(), Ordering::SeqCst);
    // SAFETY: all-zero is a valid sigaction; the handler only touches atomics.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = dispatched as *const () as usize;
    action.sa_flags = libc::SA_ONSTACK;
    // SAFETY: the structure is complete and lives through the call.
    check(unsafe { libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()) }.into())?;
    call(libc::SYS_prctl, [option, 1, 0, 0, selector.as_ptr() as i64])?;
    Ok(())
}

/// A call that waits with a time-out: a name, how the wait ends (0, or minus an error number), the call for so many
/// nanoseconds.
pub type Wait = (&'static str, i32, fn(i64) -> i32);

/// All that are tried.
pub const WAITS: &[Wait] = &[
    ("nanosleep", 0, |ns| raw(libc::SYS_nanosleep, [at(&time(ns)), 0, 0, 0, 0, 0])),
    ("nanosleep with a rest", 0, |ns| {
        let mut rest = time(0);
        raw(libc::SYS_nanosleep, [at(&time(ns)), (&raw mut rest) as i64, 0, 0, 0, 0])
    }),
    ("clock_nanosleep", 0, |ns| raw(libc::SYS_clock_nanosleep, [1, 0, at(&time(ns)), 0, 0, 0])),
    ("clock_nanosleep on boot time", 0, |ns| raw(libc::SYS_clock_nanosleep, [7, 0, at(&time(ns)), 0, 0, 0])),
    ("poll", 0, |ns| raw(libc::SYS_poll, [0, 0, ns / 1_000_000, 0, 0, 0])),
    ("ppoll", 0, |ns| {
        let mut time = time(ns);
        raw(libc::SYS_ppoll, [0, 0, (&raw mut time) as i64, 0, 8, 0])
    }),
    ("pselect", 0, |ns| {
        let mut time = time(ns);
        raw(libc::SYS_pselect6, [0, 0, 0, 0, (&raw mut time) as i64, 0])
    }),
    ("epoll_wait", 0, |ns| raw(libc::SYS_epoll_wait, [epoll(), at(&[0u64; 4]), 1, ns / 1_000_000, 0, 0])),
    ("epoll_pwait", 0, |ns| raw(libc::SYS_epoll_pwait, [epoll(), at(&[0u64; 4]), 1, ns / 1_000_000, 0, 8])),
    ("epoll_pwait2", 0, |ns| raw(libc::SYS_epoll_pwait2, [epoll(), at(&[0u64; 4]), 1, at(&time(ns)), 0, 8])),
    ("futex", -libc::ETIMEDOUT, |ns| {
        let word = AtomicU64::new(0);
        raw(libc::SYS_futex, [word.as_ptr() as i64, libc::FUTEX_WAIT.into(), 0, at(&time(ns)), 0, 0])
    }),
    ("sigtimedwait", -libc::EAGAIN, |ns| {
        raw(libc::SYS_rt_sigtimedwait, [at(&(1u64 << (libc::SIGURG - 1))), 0, at(&time(ns)), 8, 0, 0])
    }),
    ("recv", -libc::EAGAIN, |ns| socket_with_time_out(ns, libc::SYS_recvfrom)),
    ("read of a socket", -libc::EAGAIN, |ns| socket_with_time_out(ns, libc::SYS_read)),
];

/// Of those, the ones whose time cannot be given to them anew.
pub const WHOLE_AGAIN: &[&str] = &["sigtimedwait", "recv", "read of a socket"];

fn time(ns: i64) -> libc::timespec {
    libc::timespec { tv_sec: ns / 1_000_000_000, tv_nsec: ns % 1_000_000_000 }
}

fn at<T>(value: &T) -> i64 {
    std::ptr::from_ref(value) as i64
}

fn epoll() -> i64 {
    call(libc::SYS_epoll_create1, [libc::EPOLL_CLOEXEC.into(), 0, 0, 0, 0]).unwrap_or(-1)
}

/// 0 or minus the error number.
fn raw(number: i64, a: [i64; 6]) -> i32 {
    // SAFETY: the table above passes pointers to values that live until the call has returned, of the size that it
    // reads or writes.
    match check(unsafe { libc::syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]) }) {
        Ok(_) => 0,
        Err(error) => -error.raw_os_error().unwrap_or(0),
    }
}

fn socket_with_time_out(ns: i64, number: i64) -> i32 {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
    use std::os::fd::AsRawFd;
    let Ok((ours, _theirs)) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC) else {
        return 1;
    };
    let limit = nix::sys::time::TimeVal::new(ns / 1_000_000_000, 0);
    if setsockopt(&ours, sockopt::ReceiveTimeout, &limit).is_err() {
        return 2;
    }
    raw(number, [ours.as_raw_fd().into(), at(&[0u64; 4]), 8, 0, 0, 0])
}

/// getsockopt(2).
pub fn option(fd: i32, level: i32, name: i32) -> Result<Vec<u8>, Error> {
    let mut value = vec![0u8; 256];
    let mut length = value.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most as many bytes as the buffer has.
    check(unsafe { libc::getsockopt(fd, level, name, value.as_mut_ptr().cast(), &mut length) }.into())?;
    value.truncate(length as usize);
    Ok(value)
}

/// setsockopt(2).
pub fn set_option(fd: i32, level: i32, name: i32, value: &[u8]) -> Result<(), Error> {
    // SAFETY: the kernel reads as many bytes as are there.
    check(unsafe { libc::setsockopt(fd, level, name, value.as_ptr().cast(), value.len() as libc::socklen_t) }.into())?;
    Ok(())
}

/// An extended attribute of an open file, set or read.
pub fn attribute(fd: i32, name: &std::ffi::CStr, new: Option<&[u8]>) -> Result<Vec<u8>, Error> {
    if let Some(value) = new {
        // SAFETY: name and value live through the call.
        check(unsafe { libc::fsetxattr(fd, name.as_ptr(), value.as_ptr().cast(), value.len(), 0) }.into())?;
    }
    let mut value = vec![0u8; 256];
    // SAFETY: the kernel writes at most as many bytes as the buffer has.
    let length = check(unsafe { libc::fgetxattr(fd, name.as_ptr(), value.as_mut_ptr().cast(), value.len()) } as i64)?;
    value.truncate(length as usize);
    Ok(value)
}

/// The names of a directory's next entries: what one getdents64(2) of so many bytes gives.
pub fn some_names(fd: i32, bytes: usize) -> Result<Vec<Vec<u8>>, Error> {
    let mut buffer = vec![0u8; bytes];
    // SAFETY: the kernel writes at most as many bytes as the buffer has.
    let read = check(unsafe { libc::syscall(libc::SYS_getdents64, fd, buffer.as_mut_ptr(), bytes) })?;
    let (mut at, mut names) = (0, Vec::new());
    while at < read as usize {
        let length = usize::from(u16::from_ne_bytes([buffer[at + 16], buffer[at + 17]]));
        let name = buffer[at + 19..at + length].split(|byte| *byte == 0).next().unwrap_or_default();
        names.push(name.to_vec());
        at += length;
    }
    Ok(names)
}

/// An io_uring of two entries.
pub fn io_uring() -> Result<i64> {
    let mut parameters = [0u8; 120];
    // SAFETY: the kernel reads and writes a struct io_uring_params, which has 120 bytes.
    Ok(check(unsafe { libc::syscall(libc::SYS_io_uring_setup, 2, parameters.as_mut_ptr()) })?)
}

/// A ring of asynchronous I/O; tells where it is mapped.
pub fn io_setup(entries: u32) -> Result<u64> {
    let mut context = 0u64;
    // SAFETY: the kernel writes one word.
    check(unsafe { libc::syscall(libc::SYS_io_setup, entries, &raw mut context) })?;
    Ok(context)
}

/// A counter of our own processor time.
pub fn count_own_time() -> Result<i64> {
    const SOFTWARE: u32 = 1;
    const SIZE: u32 = 64;
    let mut attribute = [0u32; SIZE as usize / 4];
    (attribute[0], attribute[1]) = (SOFTWARE, SIZE);
    // SAFETY: the kernel reads as many bytes as the second word says.
    Ok(check(unsafe { libc::syscall(libc::SYS_perf_event_open, attribute.as_ptr(), 0, -1, -1, 0) })?)
}

fn bpf(command: i64, attribute: &[u8]) -> Result<i64> {
    // SAFETY: the kernel reads that many bytes; what they point to lives through the call.
    Ok(check(unsafe { libc::syscall(libc::SYS_bpf, command, attribute.as_ptr(), attribute.len()) })?)
}

/// A bpf map: an array of four words.
pub fn bpf_array() -> Result<i64> {
    const ARRAY: u32 = 2;
    let words: Vec<u8> = [ARRAY, 4, 4, 4, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
    bpf(0, &words)
}

/// A program that cuts everything to nothing, as the filter of a socket.
pub fn attach_bpf(socket: i32) -> Result<()> {
    const SOCKET_FILTER: u32 = 1;
    const MOVE_0_TO_R0: u64 = 0xb7;
    const EXIT: u64 = 0x95;
    let program = [MOVE_0_TO_R0, EXIT];
    let license = c"Apache-2.0";
    let mut attribute = [SOCKET_FILTER, program.len() as u32].map(u32::to_ne_bytes).concat();
    attribute.extend_from_slice(&(program.as_ptr() as u64).to_ne_bytes());
    attribute.extend_from_slice(&(license.as_ptr() as u64).to_ne_bytes());
    attribute.extend_from_slice(&[0; 24]);
    let program = owned(bpf(5, &attribute)? as i32);
    use std::os::fd::AsRawFd;
    Ok(set_option(socket, libc::SOL_SOCKET, libc::SO_ATTACH_BPF, &program.as_raw_fd().to_ne_bytes())?)
}

/// A filter that lets everything pass, with somebody who would be asked.
pub fn seccomp_listener() -> Result<i64> {
    let allow = libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW };
    let filter = libc::sock_fprog { len: 1, filter: (&raw const allow).cast_mut() };
    // SAFETY: plain numbers.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())?;
    let (set, listener) = (libc::SECCOMP_SET_MODE_FILTER, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER);
    // SAFETY: the program lives through the call; the kernel copies and checks it.
    Ok(check(unsafe { libc::syscall(libc::SYS_seccomp, set, listener, &raw const filter) })?)
}

/// A byte as urgent data.
pub fn send_urgent(socket: i32) -> Result<()> {
    // SAFETY: one byte is read.
    check(unsafe { libc::send(socket, b"!".as_ptr().cast(), 1, libc::MSG_OOB) } as i64)?;
    Ok(())
}

/// Whether urgent data comes next.
pub fn at_mark(socket: i32) -> Result<bool> {
    const SIOCATMARK: u64 = 0x8905;
    let mut at = 0i32;
    // SAFETY: one int is written.
    check(unsafe { libc::ioctl(socket, SIOCATMARK, &raw mut at) }.into())?;
    Ok(at == 1)
}

/// A child in our memory, which counts.
pub fn share_memory() -> Result<(Pid, &'static AtomicU64)> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    extern "C" fn count_on(_: *mut libc::c_void) -> i32 {
        loop {
            COUNT.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
    let stack: &'static mut [u8] = Box::leak(vec![0; 64 << 10].into_boxed_slice());
    let top = stack.as_mut_ptr_range().end.map_addr(|end| end & !15);
    // SAFETY: the stack is the child's for ever, and what the child runs touches nothing but the counter.
    let child = unsafe { libc::clone(count_on, top.cast(), libc::CLONE_VM | libc::SIGCHLD, std::ptr::null_mut()) };
    Ok((Pid::from_raw(check(child.into())? as i32), &COUNT))
}
