//! Files that came before under their name: what is another in them is sent, and nothing of one that is what it was.

use super::walk::{Sent, meta};
use super::{Entry, STORAGE, lossy};
use crate::Result;
use crate::compare::{self, Digests, Found, Subject};
use crate::crew;
use crate::image::{Kind, Owner, PageRun, Writer};
use nix::sys::stat::FileStat;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

/// Bytes in a block: two pages of postgres, four of sqlite.
pub(super) const BLOCK: usize = 16 << 10;

/// A file that came before under its name.
#[derive(Debug)]
pub(super) struct Candidate {
    pub id: u64,
    /// A patch; without what is about the file if that is the same.
    pub entry: Entry,
    pub fd: OwnedFd,
    pub size: u64,
    /// By its stamp, which is of this, it is what it was.
    pub same: bool,
    pub stat: FileStat,
    pub before: Arc<Digests>,
}

impl Subject for Candidate {
    const BLOCK: usize = BLOCK;
    const CODE: &'static str = STORAGE;

    fn open(&self) -> std::io::Result<File> {
        File::open(format!("/proc/self/fd/{}", self.fd.as_raw_fd()))
    }

    fn bytes(&self) -> u64 {
        self.size
    }

    fn before(&self) -> &Digests {
        &self.before
    }

    fn name(&self) -> String {
        lossy(&self.entry.path)
    }
}

/// Sends what is another; the digests of all of them as they are now.
pub(super) fn send<W: Write>(candidates: &[Candidate], out: &mut Writer<W>, sent: &mut Sent) -> Result<Vec<Digests>> {
    let subjects: Vec<&Candidate> = candidates.iter().collect();
    let mut announced = None;
    let (digests, _) = compare::compare(&subjects, crew::cpus(), out, |index, found, out| {
        let candidate = &candidates[index];
        let is_wanted = !candidate.same || matches!(found, Found::Run { .. });
        if is_wanted && announced.replace(index) != Some(index) {
            sent.files += 1;
            candidate.announce(out)?;
        }
        if let Found::Run { at, bytes } = found {
            let run = PageRun { owner: Owner::Storage(candidate.id), address: at, bytes: bytes.len() as u64 };
            out.pages(run, &[bytes])?;
            sent.bytes += run.bytes;
        }
        Ok(())
    })?;
    Ok(digests)
}

impl Candidate {
    fn announce<W: Write>(&self, out: &mut Writer<W>) -> Result<()> {
        match self.entry.meta {
            Some(_) => out.put(Kind::STORAGE_ENTRY, self.id, &self.entry),
            None => {
                let meta = Some(meta(&self.fd, &self.stat)?);
                out.put(Kind::STORAGE_ENTRY, self.id, &Entry { meta, ..self.entry.clone() })
            }
        }
    }
}
