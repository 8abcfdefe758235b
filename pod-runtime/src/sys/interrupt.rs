//! Signals that programs started from here shall not see.

use nix::errno::Errno;

/// Ignores a signal in this process and in programs that it starts. A signal that is blocked as well still arrives at a
/// signalfd (see `sig_ignored` in kernel/signal.c).
pub fn ignore(signal: i32) -> Result<(), Errno> {
    // SAFETY: SIG_IGN runs no code of ours.
    let before = unsafe { libc::signal(signal, libc::SIG_IGN) };
    if before == libc::SIG_ERR { Err(Errno::last()) } else { Ok(()) }
}
