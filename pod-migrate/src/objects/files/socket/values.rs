//! The values of the options of a socket, by name. Many sockets of a pod have the same: in the image they are with the first
//! of them, and the others name its file.

use super::options::When;
use crate::ids::FileId;
use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_bytes::ByteBuf;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, OnceLock};

/// What was read, or where it is.
#[derive(Debug, Clone, Default)]
pub struct Values {
    with: Arc<With>,
    /// The file that has the same in its record.
    of: Option<FileId>,
    /// Restored: what the first socket with these values had otherwise, and nothing else, is set on the others. They must
    /// be made in the same way.
    like_others: bool,
}

/// What sockets that have the same values have together.
#[derive(Debug, Default)]
struct With {
    values: BTreeMap<String, ByteBuf>,
    /// Which options of a new socket have other values, by [`When`].
    changed: [OnceLock<Vec<usize>>; 3],
}

impl From<BTreeMap<String, ByteBuf>> for Values {
    fn from(values: BTreeMap<String, ByteBuf>) -> Values {
        Values { with: Arc::new(With { values, changed: Default::default() }), ..Values::default() }
    }
}

impl PartialEq for Values {
    fn eq(&self, other: &Values) -> bool {
        Arc::ptr_eq(&self.with, &other.with) || self.with.values == other.with.values
    }
}

impl Values {
    pub fn get(&self, name: &str) -> Option<&ByteBuf> {
        self.with.values.get(name)
    }

    /// None or another value than all that have the same values so far.
    pub fn replace(&mut self, name: &str, value: Option<Vec<u8>>) {
        let mut values = self.with.values.clone();
        match value {
            Some(value) => drop(values.insert(name.to_owned(), ByteBuf::from(value))),
            None => drop(values.remove(name)),
        }
        *self = Values::from(values);
    }

    /// Which options the first socket with these values did not have when it was new.
    pub(super) fn changed(&self, when: When) -> &OnceLock<Vec<usize>> {
        &self.with.changed[when as usize]
    }

    /// The same for all that have the same values from the same reading.
    pub fn identity(&self) -> usize {
        Arc::as_ptr(&self.with) as usize
    }

    /// The file whose record has them, when it is another.
    pub fn of(&self) -> Option<FileId> {
        self.of
    }

    /// Another file's record has them.
    pub fn name(&mut self, file: FileId) {
        self.of = Some(file);
    }

    /// What an image has in the record of another file. From now on they are known. `alike`: the sockets that take them are
    /// made in one way.
    pub fn take(&mut self, other: &Values, alike: bool) {
        self.with = other.with.clone();
        self.like_others = alike;
    }

    pub(super) fn like_others(&self) -> bool {
        self.like_others
    }

    /// Whether they are in the record of another file that was not looked at yet.
    pub fn are_elsewhere(&self) -> bool {
        self.of.is_some() && self.with.values.is_empty()
    }
}

/// A map, or the number of a file.
impl Serialize for Values {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self.of {
            Some(FileId(id)) => to.serialize_u64(id),
            None => self.with.values.serialize(to),
        }
    }
}

impl<'d> Deserialize<'d> for Values {
    fn deserialize<D: Deserializer<'d>>(from: D) -> Result<Values, D::Error> {
        struct Either;
        impl<'d> Visitor<'d> for Either {
            type Value = Values;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("values of options, or the number of the file that has the same")
            }

            fn visit_u64<E: de::Error>(self, id: u64) -> Result<Values, E> {
                Ok(Values { of: Some(FileId(id)), ..Values::default() })
            }

            fn visit_map<A: MapAccess<'d>>(self, map: A) -> Result<Values, A::Error> {
                BTreeMap::deserialize(de::value::MapAccessDeserializer::new(map)).map(Values::from)
            }
        }
        from.deserialize_any(Either)
    }
}

#[cfg(test)]
mod tests {
    use super::super::address::Family;
    use super::super::{State, options::Options, tcp};
    use super::*;
    use crate::objects::files::{File, FileState, Files};

    /// A socket that has these values itself, or where another file has them.
    fn socket(values: &[u8], of: Option<u64>) -> File {
        let mut values = Values::from(BTreeMap::from([("tos".to_owned(), ByteBuf::from(values))]));
        if let Some(of) = of {
            values = Values::default();
            values.name(FileId(of));
        }
        let state = tcp::State {
            family: Family::V4,
            options: Options { values, ..Options::default() },
            phase: tcp::Phase::Fresh { local: None },
            signatures: Vec::new(),
            unaccepted: Vec::new(),
        };
        File {
            state: FileState::Socket(State::Tcp(state)),
            flags: 0,
            position: 0,
            owner: None,
            signal: 0,
            locks: Vec::new(),
            name: String::new(),
        }
    }

    #[test]
    fn another_file_has_them() {
        let mut files = Files {
            files: [(FileId(1), socket(&[3], None)), (FileId(2), socket(&[], Some(1)))].into(),
            ..Files::default()
        };
        files.share_options().unwrap();
        let FileState::Socket(State::Tcp(state)) = &files.files[&FileId(2)].state else { unreachable!() };
        assert_eq!(state.options.values.get("tos").map(|value| &value[..]), Some(&[3u8][..]));
    }

    #[test]
    fn whom_nobody_gives_them_is_refused() {
        for of in [2, 3, 4] {
            // Itself, one that has them elsewhere, one that is not there.
            let all = [
                (FileId(1), socket(&[3], None)),
                (FileId(2), socket(&[], Some(of))),
                (FileId(3), socket(&[], Some(1))),
            ];
            let mut files = Files { files: all.into(), ..Files::default() };
            assert_eq!(files.share_options().unwrap_err().code(), crate::image::DAMAGED, "{of}");
        }
    }

    #[test]
    fn both_forms_are_read() {
        let mut values = Values::from(BTreeMap::from([("tos".to_owned(), ByteBuf::from([1, 2]))]));
        let through = |values: &Values| -> Values {
            let mut bytes = Vec::new();
            ciborium::into_writer(values, &mut bytes).unwrap();
            ciborium::from_reader(&bytes[..]).unwrap()
        };
        assert_eq!(through(&values), values);
        values.name(FileId(7));
        let mut read = through(&values);
        assert!(read.are_elsewhere() && read.of() == Some(FileId(7)) && read.get("tos").is_none());
        read.take(&values, true);
        assert!(!read.are_elsewhere() && read == values);
    }
}
