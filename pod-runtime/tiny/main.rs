//! Two programs of a few hundred instructions each, in one file, chosen by the first letter of their name.
//!
//! `init PATH ARGV0 ARG…` is the first process of a pod with `--init`: it starts one program, hands signals on to it,
//! reaps what is left to it and ends as the program ended. It has no signal handler and no memory to allocate: all
//! signals are blocked and waited for.
//!
//! `launch FD TEXT… PATH… "" ARGV0 ARG…` is the last step before any program of a pod: it tries the paths and, when none
//! can be executed, writes one of the four texts (not there, not permitted, no program, else) to the descriptor. The
//! runtime becomes it from a sealed memory file, because an image can name /proc/self/exe as an interpreter: what that
//! leads to at the moment of the exec must not be the runtime's own file on the host.
//!
//! Without a standard library, so that a checkpoint of the pod holds a few pages and no trace of the runtime. Compiled
//! by the build script of pod-runtime, which carries it inside.
// The compiler must not turn loops into calls of a C library.
#![no_builtins]
#![no_std]
#![no_main]

use core::arch::{asm, naked_asm};

const WRITE: usize = 1;
const CLOSE: usize = 3;
const FCNTL: usize = 72;
const RT_SIGPROCMASK: usize = 14;
const IOCTL: usize = 16;
const FORK: usize = 57;
const EXECVE: usize = 59;
const EXIT: usize = 60;
const WAIT4: usize = 61;
const KILL: usize = 62;
const SETPGID: usize = 109;
const GETPID: usize = 39;
const RT_SIGTIMEDWAIT: usize = 128;

const SIGCHLD: i32 = 17;
const SIGTTIN: i32 = 21;
const SIGTTOU: i32 = 22;
const TIOCSPGRP: usize = 0x5410;
const SIG_SETMASK: usize = 2;
const WNOHANG: usize = 1;
const ENOENT: isize = -2;
const ENOEXEC: isize = -8;
const EACCES: isize = -13;
const ENOTDIR: isize = -20;
const F_SETFD: usize = 2;
const FD_CLOEXEC: usize = 1;

/// # Safety
///
/// As the system call that it makes: pointers among the arguments must be good for what the kernel does with them.
unsafe fn call(number: usize, a: usize, b: usize, c: usize, d: usize) -> isize {
    let result: isize;
    // SAFETY: the kernel's calling convention: rcx and r11 are lost, nothing else changes.
    unsafe {
        asm!("syscall", inlateout("rax") number as isize => result, in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d,
             lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

/// # Safety
///
/// The kernel's entry point: the stack holds argc, argv and the environment, and is aligned.
#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "C" fn _start() -> ! {
    naked_asm!("mov rdi, rsp", "and rsp, -16", "call {begin}", "ud2", begin = sym begin)
}

unsafe extern "C" fn begin(stack: *const usize) -> ! {
    // SAFETY: argc pointers and a null follow, then the environment's; each points to a terminated string.
    unsafe {
        let argc = *stack;
        let argv = stack.add(1);
        let environment = argv.add(argc + 1) as usize;
        match (argc, *(*argv as *const u8)) {
            (3.., b'i') => init(argv, environment),
            (8.., b'l') => launch(argv, environment),
            _ => leave(125),
        }
    }
}

/// # Safety
///
/// `argv` is a process's own, with at least three entries.
unsafe fn init(argv: *const usize, environment: usize) -> ! {
    // SAFETY: plain integers, a local, and strings that the kernel gave to this process.
    unsafe {
        let all: u64 = !0;
        call(RT_SIGPROCMASK, SIG_SETMASK, &raw const all as usize, 0, 8);
        match call(FORK, 0, 0, 0, 0) {
            0 => become_program(*argv.add(1), argv.add(2) as usize, environment),
            child if child > 0 => keep_house(child as i32),
            _ => leave(125),
        }
    }
}

/// # Safety
///
/// `argv` is a process's own, with at least eight entries, one of them after the texts empty.
unsafe fn launch(argv: *const usize, environment: usize) -> ! {
    // SAFETY: strings that the kernel gave to this process; the walk ends at the empty one.
    unsafe {
        let fd = decimal(*argv.add(1) as *const u8);
        // A filter may deny that: then whoever waits for the other end hears nothing more, but is not kept waiting.
        if call(FCNTL, fd, F_SETFD, FD_CLOEXEC, 0) < 0 {
            call(CLOSE, fd, 0, 0, 0);
        }
        let mut path = argv.add(6);
        let mut paths = path;
        while *paths != 0 && *(*paths as *const u8) != 0 {
            paths = paths.add(1);
        }
        let program = paths.add(1) as usize;
        let mut refused = ENOENT;
        while path != paths {
            match call(EXECVE, *path, program, environment, 0) {
                ENOENT | ENOTDIR => {}
                error if refused == ENOENT => refused = error,
                _ => {}
            }
            path = path.add(1);
        }
        let (which, code) = match refused {
            ENOENT => (2, 127),
            EACCES => (3, 126),
            ENOEXEC => (4, 126),
            _ => (5, 126),
        };
        let text = *argv.add(which);
        let mut length = 0;
        while *(text as *const u8).add(length) != 0 {
            length += 1;
        }
        call(WRITE, fd, text, length, 0);
        leave(code)
    }
}

/// # Safety
///
/// `text` is terminated.
unsafe fn decimal(mut text: *const u8) -> usize {
    let mut value = 0;
    // SAFETY: the walk ends at the terminator.
    unsafe {
        while *text != 0 {
            value = value * 10 + (*text - b'0') as usize;
            text = text.add(1);
        }
    }
    value
}

/// In the child: a process group of its own, in the foreground if there is a terminal.
fn become_program(path: usize, argv: usize, environment: usize) -> ! {
    // SAFETY: plain integers, a local, and the strings that the kernel gave to this process.
    unsafe {
        call(SETPGID, 0, 0, 0, 0);
        let own = call(GETPID, 0, 0, 0, 0) as i32;
        // SIGTTOU is blocked, so a background process may do this. Without a terminal it fails, and may.
        call(IOCTL, 0, TIOCSPGRP, &raw const own as usize, 0);
        let none: u64 = 0;
        call(RT_SIGPROCMASK, SIG_SETMASK, &raw const none as usize, 0, 8);
        let error = call(EXECVE, path, argv, environment, 0);
        let text = b"pod: the program cannot be executed\n";
        call(WRITE, 2, text.as_ptr() as usize, text.len(), 0);
        leave(if error == ENOENT { 127 } else { 126 })
    }
}

fn keep_house(child: i32) -> ! {
    let all: u64 = !0;
    loop {
        // SAFETY: the set outlives the call; no information about the signal is asked for.
        let signal = unsafe { call(RT_SIGTIMEDWAIT, &raw const all as usize, 0, 0, 8) } as i32;
        match signal {
            SIGCHLD => reap(child),
            // About a terminal that is the child's.
            SIGTTIN | SIGTTOU => {}
            signal if signal > 0 => {
                // SAFETY: plain integers.
                unsafe { call(KILL, child as usize, signal as usize, 0, 0) };
            }
            // Interrupted by a stop: once more.
            _ => {}
        }
    }
}

/// Ends this process, and so the pod, when the child is among the dead.
fn reap(child: i32) {
    loop {
        let mut status: i32 = 0;
        // SAFETY: the status outlives the call.
        let pid = unsafe { call(WAIT4, usize::MAX, &raw mut status as usize, WNOHANG, 0) } as i32;
        if pid <= 0 {
            return;
        }
        if pid == child {
            let signal = status & 0x7f;
            leave(if signal == 0 { status >> 8 & 0xff } else { 128 + signal });
        }
    }
}

fn leave(code: i32) -> ! {
    loop {
        // SAFETY: plain integers; does not return.
        unsafe { call(EXIT, code as usize, 0, 0, 0) };
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    leave(125)
}
