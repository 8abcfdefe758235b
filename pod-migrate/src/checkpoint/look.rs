//! Reading all of a checkpoint but the bytes of its memory, which stay where they are, without making anything of it.

use super::memory::{Memory, PAGE};
use super::{Identity, open_clear};
use crate::arrival::origin;
use crate::capture::{Moment, Origin};
use crate::ids::MmId;
use crate::image::{Contents, Kind, Owner, PageRun, Reader, Record, Waiting, damaged, verify};
use crate::objects::memory::forked::Claim;
use crate::objects::memory::{Alike, Same};
use crate::objects::namespaces::{mounts, network, uts};
use crate::restore::Image;
use crate::storage::{Entry, Layer, Meta, Node, Place};
use pod_runtime::{Doing, Result};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3;

/// What there is to see.
pub(super) struct Look {
    pub path: PathBuf,
    /// Others than the owner may read it.
    pub exposed: bool,
    /// By kind, and the whole.
    pub contents: Contents,
    pub origin: Origin,
    pub image: Image,
    pub memory: Memory,
    pub parts: Parts,
}

/// What lies beside the processes.
#[derive(Default)]
pub(super) struct Parts {
    pub moment: Option<Moment>,
    pub network: Option<network::State>,
    pub names: Option<uts::State>,
    pub mounts: Vec<mounts::Inside>,
    pub layers: BTreeMap<Place, BTreeMap<Vec<u8>, Stored>>,
    runs: Vec<(PageRun, Waiting)>,
    alike: Vec<Alike>,
    /// The layer that the entries belong to, and the file that the bytes do.
    layer: Option<Place>,
    file: Option<(u64, Vec<u8>)>,
}

/// A file of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stored {
    pub node: Node,
    pub meta: Option<Meta>,
    /// Of its contents, what the image holds.
    pub bytes: u64,
    /// Of its contents without holes and zeros, in whatever pieces they came.
    pub digest: u64,
}

/// Reads a checkpoint through, compares every checksum and the digest, and then takes it apart.
pub(super) fn look(path: &Path, identities: &[Identity]) -> Result<Look> {
    let file = open_clear(path, identities)?;
    let copy = || file.try_clone().doing(|| "copy a descriptor".into());
    let mode = fs::metadata(path).doing(|| format!("look at {}", path.display()))?.permissions().mode();
    let contents = verify(copy()?)?;
    let mut reader = Reader::of_file(copy()?)?;
    let origin = origin(&mut reader)?;
    let mut parts = Parts::default();
    let image = Image::collect(&mut reader, |record, reader| parts.take(record, reader))?;
    while let Some(record) = reader.next()? {
        parts.take(&record, &mut reader)?;
    }
    let memory = Memory::new(file, std::mem::take(&mut parts.runs), &image.kept);
    // In this order: what is inherited may itself have come as a page like another.
    let memory = memory.with(&parts.alike)?.with(&inherited(&image))?;
    Ok(Look { path: path.to_owned(), exposed: mode & 0o077 != 0, contents, origin, image, memory, parts })
}

/// Pages that spaces have from others, which are those of the others.
fn inherited(image: &Image) -> Vec<Alike> {
    let at = |mm: MmId, claim: &Claim| (Kind::PAGES.0, mm.0, claim.range.start);
    let one = |(mm, claim): (MmId, &Claim)| Alike {
        to: at(mm, claim),
        from: at(claim.from, claim),
        bytes: claim.range.end - claim.range.start,
    };
    image.claims.iter().flat_map(|(mm, claims)| claims.iter().map(|claim| (*mm, claim))).map(one).collect()
}

impl Parts {
    fn take(&mut self, record: &Record, reader: &mut Reader<File>) -> Result<()> {
        match record.kind {
            Kind::STORAGE => self.layer = Some(record.state::<Layer>()?.place),
            Kind::STORAGE_ENTRY => self.entry(record.id, record.state()?)?,
            Kind::STORAGE_END => (self.layer, self.file) = (None, None),
            Kind::SAME => self.alike.extend(record.state::<Same>()?.pages),
            Kind::MOMENT => self.moment = Some(record.state()?),
            Kind::NETWORK => self.network = Some(record.state()?),
            Kind::UTS => self.names = Some(record.state()?),
            Kind::MOUNTS => self.mounts.extend(record.state::<Vec<mounts::Inside>>()?),
            _ => {}
        }
        match record.run {
            Some(run @ PageRun { owner: Owner::Storage(id), .. }) => self.contents(id, run, reader),
            Some(run) => {
                self.runs.extend(reader.leave_pages()?.map(|waiting| (run, waiting)));
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn entry(&mut self, id: u64, Entry { path, node, meta }: Entry) -> Result<()> {
        let place = self.layer.clone().ok_or_else(|| damaged("a file of no layer"))?;
        let layer = self.layers.entry(place).or_default();
        let path = path.into_vec();
        if matches!(node, Node::Patch { .. }) {
            return Err(damaged("a change of a file, which comes between hosts only"));
        }
        if node == Node::Removed {
            remove(layer, path);
            self.file = None;
            return Ok(());
        }
        self.file = Some((id, path.clone()));
        layer.insert(path, Stored { node, meta, bytes: 0, digest: 0 });
        Ok(())
    }

    fn contents(&mut self, id: u64, run: PageRun, reader: &mut Reader<File>) -> Result<()> {
        let layer = self.layer.as_ref().and_then(|place| self.layers.get_mut(place));
        let path = self.file.as_ref().filter(|(of, _)| *of == id).map(|(_, path)| path);
        let Some(stored) = layer.zip(path).and_then(|(layer, path)| layer.get_mut(path)) else {
            return Err(damaged("contents of no file"));
        };
        stored.bytes = stored.bytes.saturating_add(run.bytes);
        let mut piece = [0; PAGE as usize];
        let mut at = run.address;
        loop {
            let mut have = 0;
            // Whole pages of the file, but for its first and its last.
            let want = (PAGE - at % PAGE) as usize;
            while have < want {
                match reader.read_pages(&mut piece[have..want])? {
                    0 => break,
                    count => have += count,
                }
            }
            if have == 0 {
                return Ok(());
            }
            if piece[..have].iter().any(|byte| *byte != 0) {
                stored.digest = stored.digest.wrapping_add(xxh3::xxh3_64_with_seed(&piece[..have], at));
            }
            at += have as u64;
        }
    }
}

/// A file, or a directory with all that is in it. That lies together; an image may remove as much as it likes.
fn remove(layer: &mut BTreeMap<Vec<u8>, Stored>, mut path: Vec<u8>) {
    layer.remove(&path);
    path.push(b'/');
    let after = layer.range(path.clone()..).map(|(other, _)| other);
    let inside: Vec<_> = after.take_while(|other| other.starts_with(&path)).cloned().collect();
    inside.iter().for_each(|other| drop(layer.remove(other)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_removed_goes_with_all_that_is_in_it() {
        let stored = || Stored { node: Node::Directory, meta: None, bytes: 0, digest: 0 };
        let paths = ["a", "a/b", "a/b/c", "a!", "a0", "ab", "b"];
        let mut layer: BTreeMap<_, _> = paths.iter().map(|path| (path.as_bytes().to_vec(), stored())).collect();
        remove(&mut layer, b"a".to_vec());
        assert_eq!(layer.keys().map(Vec::as_slice).collect::<Vec<_>>(), [&b"a!"[..], b"a0", b"ab", b"b"]);
        remove(&mut layer, b"nothing".to_vec());
        assert_eq!(layer.len(), 4);
    }
}
