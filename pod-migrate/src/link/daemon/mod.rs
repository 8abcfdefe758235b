//! `pod daemon`: in the place of ssh, for hosts that have none.
//!
//! It listens for hosts that it was told to trust. Both sides prove their keys ([`keys`]) in the handshake of TLS 1.3
//! ([`super::tls`]), which is the last that a stranger sees of it. Then it runs what it was called for, and passes on its
//! standard input, output and errors ([`pump`]), as sshd does: all else of a move is the same. So it knows nothing of pods itself,
//! and a call goes on when the daemon that took it has ended.
//!
//! ```text
//! pod migrate ── pipes ── pod dial ════ TLS ════ a session, forked from pod daemon ── pipes ── pod receive
//! ```
//!
//! Who is trusted to call may send any pod, and so has this host, as who may log in as root has it. It is still only let run what
//! [`serve`] names.

pub mod call;
mod frame;
pub mod keys;
mod pump;
pub mod serve;

/// Where it listens unless told otherwise.
pub const PORT: u16 = 8263;
/// Says to what it runs who has come, and where to: as SSH_CONNECTION does.
pub const CONNECTION: &str = "POD_CONNECTION";
/// The other host is not trusted, or not known.
pub const PEER: &str = "E-PEER";
