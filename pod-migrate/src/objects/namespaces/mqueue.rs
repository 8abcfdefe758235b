//! POSIX message queues: they belong to the IPC namespace and live on, with their messages, when nobody has them open.
//!
//! All of a namespace are seen in an instance of their file system that is mounted nowhere. Messages cannot be looked at, so
//! they are taken and put back at once, in their order, by a process of its own, which goes on when the one who dumps is
//! killed. A queue that somebody wants to be told of (mq_notify) is refused: putting back would tell, and what is to be
//! told the kernel shows to nobody. Queues that were removed and are still open come with the descriptor that has them.

use crate::apart::apart;
use crate::{Doing, Problem, Result};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, fchmod, fstat};
use nix::unistd::{Gid, Uid, fchown};
use pod_runtime::sys::{mount, mqueue};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;

/// Someone wants to be told of messages.
pub const NOTIFIED: &str = "E-FILE-MQUEUE";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PosixQueue {
    /// Without the slash.
    pub name: ByteBuf,
    /// It was removed; the name is one that it has for the restore.
    pub removed: bool,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub most_messages: i64,
    pub message_bytes: i64,
    /// Priority and text, in the order in which they are received.
    pub messages: Vec<(u32, ByteBuf)>,
}

/// The limits of the namespace (/proc/sys/fs/mqueue) by name.
pub type Limits = Vec<(String, u64)>;

const LIMITS: [&str; 5] = ["queues_max", "msg_max", "msgsize_max", "msg_default", "msgsize_default"];

pub(super) fn limits() -> Limits {
    let value = |name: &str| fs::read_to_string(format!("/proc/sys/fs/mqueue/{name}")).ok()?.trim().parse().ok();
    LIMITS.iter().filter_map(|name| Some(((*name).to_owned(), value(name)?))).collect()
}

/// Of the calling thread's namespace; `removed` are open ones without a name, each with the name that it is to have.
pub(super) fn dump(removed: &[(Vec<u8>, OwnedFd)]) -> Result<Vec<PosixQueue>> {
    let all = mount::new_filesystem(c"mqueue", &[], 0).doing(|| "look at the message queues of the pod".into())?;
    let names = fs::read_dir(format!("/proc/self/fd/{}", all.as_raw_fd())).doing(|| "list message queues".into())?;
    let mut found = Vec::new();
    for name in names {
        let name = name.doing(|| "list message queues".into())?.file_name();
        let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let queue = nix::fcntl::openat(&all, name.as_os_str(), flags, Mode::empty());
        found.push((name.into_vec(), queue.doing(|| "open a message queue".into())?, false));
    }
    for (name, queue) in removed {
        let path = format!("/proc/self/fd/{}", queue.as_raw_fd());
        let again = open(path.as_str(), OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC, Mode::empty());
        found.push((name.clone(), again.doing(|| "open a message queue".into())?, true));
    }
    found.into_iter().map(|(name, queue, removed)| one(name, &queue, removed)).collect()
}

fn one(name: Vec<u8>, queue: &OwnedFd, removed: bool) -> Result<PosixQueue> {
    let shown = String::from_utf8_lossy(&name).into_owned();
    let doing = || format!("read message queue /{shown}");
    let (stat, attributes) = (fstat(queue).doing(doing)?, mqueue::attributes(queue.as_fd()).doing(doing)?);
    refuse(queue.as_fd(), &format!("message queue /{shown}"))?;
    let messages = match attributes.messages {
        0 => Vec::new(),
        _ => copy(queue, attributes.message_bytes.max(0) as usize).doing(doing)?,
    };
    Ok(PosixQueue {
        name: ByteBuf::from(name),
        removed,
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        most_messages: attributes.most_messages,
        message_bytes: attributes.message_bytes,
        messages,
    })
}

/// Whether somebody wants to be told of messages; asked of a pod that runs, too.
pub fn refuse(queue: BorrowedFd<'_>, subject: &str) -> Result<()> {
    let doing = || format!("{subject}: read who wants to be told of messages");
    let own = open(
        format!("/proc/self/fd/{}", queue.as_raw_fd()).as_str(),
        OFlag::O_RDONLY | OFlag::O_CLOEXEC,
        Mode::empty(),
    );
    let mut text = [0; 128];
    let got = fs::File::from(own.doing(doing)?).read_at(&mut text, 0).doing(doing)?;
    let text = String::from_utf8_lossy(&text[..got]);
    match text.split_once("NOTIFY_PID:").and_then(|(_, pid)| pid.trim().parse::<i32>().ok()) {
        Some(0) => Ok(()),
        Some(_) => {
            Err(Problem::new(NOTIFIED, format!("{subject}: a process wants to be told of messages (mq_notify)"))
                .fix("end it, or have it take that back, before the move"))
        }
        None => Err(Problem::new("E-SYSTEM", format!("{subject}: the kernel shows {text:?}"))),
    }
}

type Messages = Vec<(u32, ByteBuf)>;

/// Takes all messages and puts them back.
fn copy(queue: &OwnedFd, bytes: usize) -> io::Result<Messages> {
    apart(|| {
        let taken = take(queue.as_fd(), bytes);
        put(queue.as_fd(), &taken).map(|()| taken)
    })
}

/// Until there is none; whatever stops it, what was taken is to be put back.
fn take(queue: BorrowedFd<'_>, bytes: usize) -> Messages {
    let mut messages = Messages::new();
    while let Ok((priority, text)) = mqueue::receive(queue, bytes) {
        messages.push((priority, ByteBuf::from(text)));
    }
    messages
}

fn put(queue: BorrowedFd<'_>, messages: &Messages) -> io::Result<()> {
    messages.iter().try_for_each(|(priority, text)| mqueue::send(queue, *priority, text))
}

/// In the calling thread's namespace, which has none yet.
pub(super) fn restore(queues: &[PosixQueue], wanted: &Limits) -> Result<()> {
    let now = limits();
    let set = |name: &str, value: u64| {
        let path = format!("/proc/sys/fs/mqueue/{name}");
        fs::write(&path, value.to_string()).doing(|| format!("write {value} to {path}"))
    };
    if !queues.is_empty() {
        // A queue may be larger than is allowed now.
        let most = |value: fn(&PosixQueue) -> i64| queues.iter().map(value).max().unwrap_or(0).clamp(1, 1 << 24) as u64;
        let needed = [
            ("queues_max", queues.len() as u64),
            ("msg_max", most(|queue| queue.most_messages)),
            ("msgsize_max", most(|queue| queue.message_bytes)),
        ];
        for (name, needed) in needed {
            if now.iter().any(|(known, value)| known == name && *value < needed) {
                set(name, needed)?;
            }
        }
    }
    queues.iter().try_for_each(make)?;
    for (name, value) in wanted.iter().filter(|(name, _)| LIMITS.contains(&name.as_str())) {
        if limits().iter().any(|(known, current)| known == name && current != value) {
            set(name, *value)?;
        }
    }
    Ok(())
}

fn make(state: &PosixQueue) -> Result<()> {
    let PosixQueue { name, removed: _, mode, uid, gid, most_messages, message_bytes, messages } = state;
    let shown = String::from_utf8_lossy(name).into_owned();
    let doing = || format!("make message queue /{shown} of {most_messages} messages of {message_bytes} bytes");
    let name = CString::new(name.to_vec()).doing(doing)?;
    let queue = mqueue::create(&name, *most_messages, *message_bytes).doing(doing)?;
    put(queue.as_fd(), messages).doing(|| format!("fill message queue /{shown}"))?;
    fchown(&queue, Some(Uid::from_raw(*uid)), Some(Gid::from_raw(*gid))).doing(doing)?;
    fchmod(&queue, Mode::from_bits_truncate(*mode)).doing(doing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sched::{CloneFlags, unshare};

    #[test]
    fn queues_come_back_with_their_messages() {
        std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWIPC).expect("needs root");
            let queue = mqueue::create(c"one", 9, 100).unwrap();
            for (priority, text) in [(1, "low"), (7, "high"), (1, "low too"), (7, "")] {
                mqueue::send(queue.as_fd(), priority, text.as_bytes()).unwrap();
            }
            let removed = mqueue::create(c"two", 3, 10).unwrap();
            mqueue::unlink(c"two").unwrap();
            mqueue::send(removed.as_fd(), 0, b"gone").unwrap();
            let removed = [(b".removed-1".to_vec(), removed)];
            let (state, had) = (dump(&removed).unwrap(), limits());
            let texts: Vec<&[u8]> = state[0].messages.iter().map(|(_, text)| &text[..]).collect();
            assert_eq!(texts, [&b"high"[..], b"", b"low", b"low too"]);
            assert_eq!(dump(&removed).unwrap(), state, "reading changes nothing");
            unshare(CloneFlags::CLONE_NEWIPC).unwrap();
            restore(&state, &had).unwrap();
            let again: Vec<PosixQueue> = dump(&[]).unwrap();
            assert_eq!((again.len(), limits()), (2, had));
            assert!(
                state
                    .iter()
                    .all(|one| again.iter().any(|other| (&one.name, &one.messages) == (&other.name, &other.messages)))
            );
        })
        .join()
        .unwrap();
    }
}
