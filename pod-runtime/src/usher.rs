//! The usher: a process of ours that joins a pod's control groups while the pod is being born, and later makes another
//! process inside the pod, which is born there.
//!
//! [`birth::enter`](crate::birth::enter) does the same in one step, for whoever comes later.
//!
//! It ends when it has done that, when nobody can ask for it any more, or with the thread that made it.

use crate::birth;
use crate::cgroup::{Born, Cgroup};
use crate::problem::{Doing, Problem, Report, Result};
use crate::sys::clone::Cloned;
use crate::sys::{daemon, process};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// What a process that an usher makes does: it is told on the stream, and ends with what this returns.
pub type Inside = fn(UnixStream) -> i32;

/// An answer is no longer.
const BOUND: usize = 1 << 16;

#[derive(Debug)]
pub struct Usher {
    host: i32,
    link: Option<UnixStream>,
}

impl Usher {
    /// The caller is single-threaded.
    pub(crate) fn start(init: &OwnedFd, cgroup: &Cgroup, inside: Inside) -> Result<Usher> {
        let (ours, theirs) = UnixStream::pair().doing(|| "make a socket pair".into())?;
        let (cloned, place) = cgroup.fork(0).doing(|| "fork".into())?;
        match cloned {
            Cloned::Child => {
                daemon::end_with_parent();
                daemon::set_comm(c"pod-usher");
                daemon::close_all_but(&[theirs.as_raw_fd(), init.as_raw_fd()]);
                daemon::exit_now(serve(init, (cgroup, place), theirs, inside))
            }
            Cloned::Parent { pid: host, .. } => Ok(Usher { host, link: Some(ours) }),
        }
    }

    /// Asks for a child of the caller inside the pod, with exactly this pid there. [`Usher::led`] is to follow.
    pub fn lead(&mut self, pid: i32) -> Result<()> {
        let mut link = self.link.as_ref().ok_or_else(unlinked)?;
        link.write_all(&pid.to_ne_bytes()).doing(gone)
    }

    /// When the child is there: its pid on this host, and the stream to it.
    pub fn led(mut self) -> Result<(i32, UnixStream)> {
        let mut link = self.link.take().ok_or_else(unlinked)?;
        // The process says nothing before it is spoken to: a line is all that can be there.
        let mut line = Vec::new();
        while !line.ends_with(b"\n") && line.len() < BOUND {
            let mut buffer = [0; 512];
            let count = link.read(&mut buffer).doing(gone)?;
            if count == 0 {
                break;
            }
            line.extend_from_slice(&buffer[..count]);
        }
        let told: std::result::Result<i32, Report> = serde_json::from_slice(&line).doing(gone)?;
        Ok((told.map_err(Problem::from)?, link))
    }
}

fn gone() -> String {
    "enter the pod: the helper died".to_owned()
}

fn unlinked() -> Problem {
    Problem::new("E-INTERNAL", "an usher without a link")
}

impl Drop for Usher {
    fn drop(&mut self) {
        self.link = None;
        let _ = daemon::reap(self.host);
    }
}

/// The usher's life.
fn serve(init: &OwnedFd, (cgroup, place): (&Cgroup, Born), mut link: UnixStream, inside: Inside) -> i32 {
    let hidden = process::set_dumpable(false).doing(|| "hide from the pod's processes".into());
    let ready = hidden.and_then(|()| cgroup.enter(place));
    let mut pid = [0; 4];
    if link.read_exact(&mut pid).is_err() {
        return 0;
    }
    let told = match ready.and_then(|()| birth::go_in(init, Some(i32::from_ne_bytes(pid)))) {
        Ok(Cloned::Child) => {
            daemon::close_number(init.as_raw_fd());
            return inside(link);
        }
        Ok(Cloned::Parent { pid, .. }) => Ok(pid),
        Err(problem) => Err(problem.report()),
    };
    let mut line = serde_json::to_vec(&told).unwrap_or_default();
    line.push(b'\n');
    i32::from(link.write_all(&line).is_err())
}
