//! A program with many threads that each verify what the engine could spoil: registers (also vectors), results of
//! interrupted calls, masks, timers, memory, order of bytes. Anything wrong ends it with 3; SIGTERM ends it with 0.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

static TERMINATED: AtomicBool = AtomicBool::new(false);
static ALARMS: AtomicU64 = AtomicU64::new(0);

fn bad(what: &str) -> ! {
    println!("BAD: {what}: {}", std::io::Error::last_os_error());
    std::process::exit(3);
}

extern "C" fn on_signal(signal: i32) {
    match signal {
        libc::SIGTERM => TERMINATED.store(true, Ordering::SeqCst),
        libc::SIGALRM => {
            ALARMS.fetch_add(1, Ordering::SeqCst);
        }
        _ => {}
    }
}

fn catch(signal: i32) {
    // SAFETY: the handler only touches atomics; the struct is zero but for what is set.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as *const () as usize;
        action.sa_flags = libc::SA_RESTART;
        libc::sigaction(signal, &raw const action, std::ptr::null_mut());
    }
}

/// `killed`: engines will be killed, and a stop by one that is killed before it can look shows in the few calls that
/// every stop interrupts (signal(7)): epoll_wait may return EINTR then, as after SIGSTOP and SIGCONT.
pub fn busy(catch_all: bool, killed: bool) {
    catch(libc::SIGTERM);
    catch(libc::SIGALRM);
    if catch_all {
        [libc::SIGURG, libc::SIGWINCH, libc::SIGCHLD, libc::SIGCONT].into_iter().for_each(catch);
    }
    // All but this thread hold SIGALRM and SIGTERM off: the other calls must then never see EINTR.
    let mask = block(&[libc::SIGALRM, libc::SIGTERM, libc::SIGUSR2]);
    for number in 0..2 {
        std::thread::spawn(move || registers(number));
    }
    std::thread::spawn(sleeps);
    std::thread::spawn(move || polls(killed));
    std::thread::spawn(bytes_in_order);
    std::thread::spawn(ping_pong);
    std::thread::spawn(memory);
    std::thread::spawn(move || masks(mask));
    unblock(&[libc::SIGALRM, libc::SIGTERM]);
    let timer = libc::itimerval {
        it_interval: libc::timeval { tv_sec: 0, tv_usec: 7000 },
        it_value: libc::timeval { tv_sec: 0, tv_usec: 7000 },
    };
    // SAFETY: `timer` lives across the call.
    unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) };
    println!("ready");
    while !TERMINATED.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_millis(5));
    }
    if ALARMS.load(Ordering::SeqCst) < 10 {
        bad("the timer");
    }
    std::process::exit(0);
}

/// A thousand threads that do nothing.
pub fn crowd() {
    for _ in 0..1000 {
        std::thread::Builder::new().stack_size(64 << 10).spawn(std::thread::park).unwrap();
    }
    println!("ready");
    std::thread::park();
}

fn set_of(signals: &[i32]) -> libc::sigset_t {
    // SAFETY: sigset_t is plain memory that sigemptyset initializes.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in signals {
            libc::sigaddset(&raw mut set, *signal);
        }
        set
    }
}

fn mask_now() -> u64 {
    let mut mask = 0u64;
    // SAFETY: the kernel writes eight bytes to `mask`.
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, 0, 0, &raw mut mask, 8) };
    mask
}

fn block(signals: &[i32]) -> u64 {
    let set = set_of(signals);
    // SAFETY: `set` lives across the call.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    mask_now()
}

fn unblock(signals: &[i32]) {
    let set = set_of(signals);
    // SAFETY: `set` lives across the call.
    unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut()) };
}

/// General and vector registers hold their values over a long stretch of pure computing.
fn registers(seed: u64) {
    let mut round = seed;
    loop {
        round = round.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let (mut a, mut b, mut c, mut d) = (round, !round, round ^ 0x5555, round.rotate_left(17));
        let vectors: [[u64; 2]; 3] = [[a, b], [c, d], [a ^ c, b ^ d]];
        let mut after = [[0u64; 2]; 3];
        let mut flags: u64;
        // SAFETY: reads and writes only the two arrays and the registers that it names.
        unsafe {
            std::arch::asm!(
                "movups xmm8, [{v}]", "movups xmm9, [{v} + 16]", "movups xmm15, [{v} + 32]",
                "mov {n:e}, 200000",
                "stc",
                "2:", "dec {n:e}", "jnz 2b",
                "pushfq", "pop {f}",
                "movups [{w}], xmm8", "movups [{w} + 16], xmm9", "movups [{w} + 32], xmm15",
                v = in(reg) vectors.as_ptr(), w = in(reg) after.as_mut_ptr(), n = out(reg) _, f = out(reg) flags,
                inout("r12") a, inout("r13") b, inout("r14") c, inout("r15") d,
                out("xmm8") _, out("xmm9") _, out("xmm15") _,
            );
        }
        if after != vectors || (a, b, c, d) != (round, !round, round ^ 0x5555, round.rotate_left(17)) || flags & 1 == 0
        {
            bad("registers");
        }
    }
}

fn sleeps() {
    loop {
        let wanted = Duration::from_millis(2);
        let time = libc::timespec { tv_sec: 0, tv_nsec: 2_000_000 };
        let begin = Instant::now();
        // SAFETY: `time` lives across the call.
        if unsafe { libc::nanosleep(&raw const time, std::ptr::null_mut()) } != 0 {
            bad("nanosleep");
        }
        if begin.elapsed() < wanted {
            bad("slept too little");
        }
    }
}

fn polls(killed: bool) {
    // SAFETY: a fresh descriptor, kept for ever.
    let epoll = unsafe { libc::epoll_create1(0) };
    loop {
        // SAFETY: the kernel writes at most one event to `event`.
        let (waited, polled) = unsafe {
            let mut event: libc::epoll_event = std::mem::zeroed();
            let waited = libc::epoll_wait(epoll, &raw mut event, 1, 3);
            (waited, libc::poll(std::ptr::null_mut(), 0, 2))
        };
        let interrupted = killed && std::io::Error::last_os_error().raw_os_error() == Some(libc::EINTR);
        if (waited != 0 && !interrupted) || polled != 0 {
            bad("epoll_wait or poll");
        }
    }
}

fn bytes_in_order() {
    let (reader, writer) = nix::unistd::pipe().unwrap();
    std::thread::spawn(move || {
        for number in 0u64.. {
            let bytes = number.to_ne_bytes();
            // SAFETY: `bytes` lives across the call.
            if unsafe { libc::write(writer.as_raw_fd(), bytes.as_ptr().cast(), 8) } != 8 {
                bad("write to a pipe");
            }
            if number % 64 == 0 {
                std::thread::sleep(Duration::from_micros(700));
            }
        }
    });
    for number in 0u64.. {
        let mut bytes = [0u8; 8];
        // SAFETY: `bytes` lives across the call.
        let count = unsafe { libc::read(reader.as_raw_fd(), bytes.as_mut_ptr().cast(), 8) };
        if count != 8 || u64::from_ne_bytes(bytes) != number {
            bad("read from a pipe");
        }
    }
}

fn ping_pong() {
    let turn = Arc::new((Mutex::new(0u64), Condvar::new()));
    let other = turn.clone();
    std::thread::spawn(move || step(&other, 1));
    step(&turn, 0);
}

fn step((number, changed): &(Mutex<u64>, Condvar), parity: u64) {
    loop {
        let mut number = number.lock().unwrap();
        while *number % 2 != parity {
            let (next, out) = changed.wait_timeout(number, Duration::from_secs(20)).unwrap();
            number = next;
            if out.timed_out() {
                bad("a wake-up was lost");
            }
        }
        *number += 1;
        changed.notify_all();
        drop(number);
        std::thread::sleep(Duration::from_micros(300));
    }
}

fn memory() {
    let mut words = vec![0u64; 256 << 10];
    for round in 0u64.. {
        for (index, word) in words.iter_mut().enumerate() {
            if *word != if round == 0 { 0 } else { (round - 1) ^ index as u64 } {
                bad("memory");
            }
            *word = round ^ index as u64;
        }
        std::thread::sleep(Duration::from_micros(500));
    }
}

fn masks(expected: u64) {
    loop {
        if mask_now() != expected {
            bad("the signal mask");
        }
        std::thread::yield_now();
    }
}
