//! Reading an image through without using it: whether it is whole, and what it holds by kind.

use super::{Kind, Reader};
use pod_runtime::Result;
use std::collections::BTreeMap;
use std::io::Read;

/// What an image holds, by kind.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents {
    /// Number of records and bytes of payload.
    pub kinds: BTreeMap<Kind, (u64, u64)>,
    /// Size of the whole.
    pub bytes: u64,
}

/// Reads everything and compares every checksum and the digest.
pub fn verify<R: Read>(from: R) -> Result<Contents> {
    let mut reader = Reader::new(from)?;
    let mut contents = Contents::default();
    let mut piece = vec![0; 256 << 10];
    while let Some(record) = reader.next()? {
        let entry = contents.kinds.entry(record.kind).or_default();
        entry.0 += 1;
        entry.1 += record.payload().len() as u64 + record.run.map_or(0, |run| run.bytes);
        while reader.read_pages(&mut piece)? > 0 {}
    }
    reader.nothing_after()?;
    contents.bytes = reader.bytes();
    Ok(contents)
}

impl<R: Read> Reader<R> {
    /// A file that goes on after its trailer is not the file that was written.
    pub fn nothing_after(&mut self) -> Result<()> {
        let mut one = [0];
        match self.get_buffered().read(&mut one) {
            Ok(0) => Ok(()),
            Ok(_) => Err(super::damaged("the image goes on after its end")),
            Err(e) => Err(super::damaged("read the end of the image").because(e)),
        }
    }
}
