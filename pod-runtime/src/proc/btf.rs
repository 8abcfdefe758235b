//! /sys/kernel/btf/vmlinux: where the running kernel keeps what. Documentation/bpf/btf.rst.
//!
//! Only what is asked for is looked at, in one pass over the types.

use std::sync::OnceLock;
use std::{fs, io};

const MAGIC: u16 = 0xeb9f;
const KIND_INT: u32 = 1;
const KIND_POINTER: u32 = 2;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_TYPEDEF: u32 = 8;
const KIND_VOLATILE: u32 = 9;
const KIND_CONST: u32 = 10;
const KIND_RESTRICT: u32 = 11;
const KIND_FUNC: u32 = 12;
const KIND_TYPE_TAG: u32 = 18;
const KIND_ENUM64: u32 = 19;
/// Types that lead to types, and structs in structs: deeper than any kernel's.
const DEEPEST: u32 = 16;

/// The two sections of a BTF file.
pub struct Btf<'a> {
    types: &'a [u8],
    strings: &'a [u8],
}

/// What was found; `None` for what is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Bytes from the start of each struct to each member that was asked for.
    pub members: Vec<Option<u32>>,
    /// Type of the function.
    pub function: Option<u32>,
}

/// Where in a struct a member lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// From the start of the struct.
    pub bit: u32,
    pub bits: u32,
}

impl Place {
    pub fn byte(&self) -> u32 {
        self.bit / 8
    }

    /// The value, from the bytes of the struct. Only as many bits as a word has.
    pub fn of(&self, bytes: &[u8]) -> Option<u64> {
        let end = self.bit.checked_add(self.bits)?.div_ceil(8);
        let bytes = bytes.get(self.byte() as usize..end as usize).filter(|bytes| bytes.len() <= 8)?;
        let word = bytes.iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte)) >> (self.bit % 8);
        Some(if self.bits < 64 { word & ((1 << self.bits) - 1) } else { word })
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_le_bytes)
}

impl Btf<'static> {
    /// Of the running kernel: some megabytes, read once.
    ///
    /// # Errors
    /// The kernel does not have them, or has them in a form that is not known here.
    pub fn of_this_kernel() -> io::Result<Btf<'static>> {
        static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
        let bytes = match BYTES.get() {
            Some(bytes) => bytes,
            None => {
                let read = fs::read("/sys/kernel/btf/vmlinux")?;
                BYTES.get_or_init(|| read)
            }
        };
        Btf::parse(bytes).ok_or_else(|| io::Error::other("the types of the kernel are in no form that is known here"))
    }
}

impl<'a> Btf<'a> {
    pub fn parse(bytes: &'a [u8]) -> Option<Btf<'a>> {
        let magic = u16::from_le_bytes(bytes.get(..2)?.try_into().ok()?);
        if magic != MAGIC {
            return None;
        }
        let header = word(bytes, 4)? as usize;
        let section = |at: usize| {
            let start = header.checked_add(word(bytes, at)? as usize)?;
            bytes.get(start..start.checked_add(word(bytes, at + 4)? as usize)?)
        };
        Some(Btf { types: section(8)?, strings: section(16)? })
    }

    fn named(&self, at: u32, name: &str) -> bool {
        let text = self.strings.get(at as usize..).unwrap_or_default();
        text.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&0))
    }

    /// Looks for members of named structs, each `(struct, member)`, and for a function.
    pub fn find(&self, members: &[(&str, &str)], function: &str) -> Found {
        let mut found = Found { members: vec![None; members.len()], function: None };
        let (mut at, mut id) = (0, 0);
        while let Some((name, info)) = word(self.types, at).zip(word(self.types, at + 4)) {
            id += 1;
            let (kind, count) = (info >> 24 & 31, (info & 0xffff) as usize);
            let tail = at + 12;
            if kind == KIND_FUNC && self.named(name, function) {
                found.function = Some(id);
            }
            if kind == KIND_STRUCT && name != 0 {
                for (slot, (_, member)) in
                    found.members.iter_mut().zip(members).filter(|(_, (outer, _))| self.named(name, outer))
                {
                    *slot = slot.or_else(|| self.member(tail, count, info >> 31 != 0, member));
                }
            }
            at = tail + tail_bytes(kind, count);
        }
        found
    }

    /// Looks for members of named structs, each `(struct, member)`, also for those in parts without a name, and for a
    /// function.
    pub fn places(&self, members: &[(&str, &str)], function: &str) -> (Vec<Option<Place>>, Option<u32>) {
        let mut found = vec![None; members.len()];
        let mut walk = None;
        let types = self.starts();
        for (id, at) in types.iter().enumerate().skip(1) {
            let Some((name, (kind, _))) = word(self.types, *at).zip(self.kind(*at)) else { break };
            if kind == KIND_FUNC && self.named(name, function) {
                walk = Some(id as u32);
            }
            if kind != KIND_STRUCT || name == 0 {
                continue;
            }
            for (slot, (_, member)) in found.iter_mut().zip(members).filter(|(_, (outer, _))| self.named(name, outer)) {
                *slot = slot.or_else(|| self.place(&types, *at, member, DEEPEST));
            }
        }
        (found, walk)
    }

    /// Where each type begins, by its number; there is no type 0.
    fn starts(&self) -> Vec<usize> {
        let (mut starts, mut at) = (vec![usize::MAX], 0);
        while let Some((kind, count)) = self.kind(at) {
            starts.push(at);
            at += 12 + tail_bytes(kind, count);
        }
        starts
    }

    fn kind(&self, at: usize) -> Option<(u32, usize)> {
        let info = word(self.types, at.checked_add(4)?)?;
        Some((info >> 24 & 31, (info & 0xffff) as usize))
    }

    fn place(&self, types: &[usize], at: usize, wanted: &str, depth: u32) -> Option<Place> {
        let (_, count) = self.kind(at)?;
        let with_bits = word(self.types, at + 4)? >> 31 != 0;
        (0..count).find_map(|index| {
            let member = at + 12 + index * 12;
            let (name, kind) = (word(self.types, member)?, word(self.types, member + 4)?);
            let offset = word(self.types, member + 8)?;
            let (bit, bits) = if with_bits { (offset & 0xff_ffff, offset >> 24) } else { (offset, 0) };
            if name == 0 {
                let inner = *types.get(kind as usize)?;
                let is_part = matches!(self.kind(inner)?.0, KIND_STRUCT | KIND_UNION);
                let place = self.place(types, inner, wanted, depth.checked_sub(1).filter(|_| is_part)?)?;
                return Some(Place { bit: bit.checked_add(place.bit)?, bits: place.bits });
            }
            let bits = || if bits > 0 { Some(bits) } else { self.bytes(types, kind, DEEPEST)?.checked_mul(8) };
            self.named(name, wanted).then(bits)?.map(|bits| Place { bit, bits })
        })
    }

    /// The size of a type.
    fn bytes(&self, types: &[usize], id: u32, depth: u32) -> Option<u32> {
        const POINTER: u32 = 8;
        let at = *types.get(id as usize)?;
        let next = || self.bytes(types, word(self.types, at + 8)?, depth.checked_sub(1)?);
        match self.kind(at)?.0 {
            KIND_INT | KIND_STRUCT | KIND_UNION | KIND_ENUM | KIND_ENUM64 => word(self.types, at + 8),
            KIND_POINTER => Some(POINTER),
            KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_RESTRICT | KIND_TYPE_TAG => next(),
            KIND_ARRAY => {
                let one = self.bytes(types, word(self.types, at + 12)?, depth.checked_sub(1)?)?;
                one.checked_mul(word(self.types, at + 20)?)
            }
            _ => None,
        }
    }

    fn member(&self, tail: usize, count: usize, with_bits: bool, wanted: &str) -> Option<u32> {
        (0..count).find_map(|index| {
            let at = tail + index * 12;
            let bits = word(self.types, at + 8)? & if with_bits { 0xff_ffff } else { u32::MAX };
            self.named(word(self.types, at)?, wanted).then_some(bits / 8)
        })
    }
}

/// What follows the three words of a type.
fn tail_bytes(kind: u32, count: usize) -> usize {
    match kind {
        1 | 14 | 17 => 4,
        3 => 12,
        4 | 5 | 15 | 19 => 12 * count,
        6 | 13 => 8 * count,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn finds_what_this_kernel_has() {
        let btf = match Btf::of_this_kernel() {
            Ok(btf) => btf,
            Err(why) => return crate::untested::here(format!("the kernel has no BTF: {why}")),
        };
        let found = btf
            .find(&[("task_struct", "pid"), ("task_struct", "no_such"), ("hrtimer_sleeper", "task")], "bpf_iter_task");
        assert!(found.function.is_some() && found.members[0].is_some() && found.members[2].is_some());
        assert_eq!(found.members[1], None);
    }

    #[test]
    fn finds_a_member() {
        // One struct "s" of one member "m" at bit 64.
        let types: Vec<u8> = [1u32, 4 << 24 | 1, 16, 3, 0, 64].iter().flat_map(|word| word.to_le_bytes()).collect();
        let btf = Btf { types: &types, strings: b"\0s\0m\0" };
        assert_eq!(btf.find(&[("s", "m"), ("s", "x")], "f"), Found { members: vec![Some(8), None], function: None });
    }

    #[test]
    fn finds_members_in_parts_without_a_name() {
        // 1: struct "s" { bit 32: union 2; bit 67, 3 bits: "f" }, 2: union { "m" of type 3 }, 3: int of 2 bytes.
        let words = [
            [1u32, 1 << 31 | 4 << 24 | 2, 16].as_slice(),
            &[0, 2, 32, 5, 3, 3 << 24 | 67],
            &[0, 5 << 24 | 1, 8, 3, 3, 0],
            &[0, 1 << 24, 2, 0],
        ];
        let types: Vec<u8> = words.concat().iter().flat_map(|word| word.to_le_bytes()).collect();
        let btf = Btf { types: &types, strings: b"\0s\0m\0f\0" };
        let (places, function) = btf.places(&[("s", "m"), ("s", "f"), ("s", "x")], "g");
        assert_eq!(places, [Some(Place { bit: 32, bits: 16 }), Some(Place { bit: 67, bits: 3 }), None]);
        assert_eq!(function, None);
    }

    #[test]
    fn a_place_is_read() {
        let bytes = [0, 0xf0, 0xff, 0x01];
        assert_eq!(Place { bit: 12, bits: 6 }.of(&bytes), Some(0x3f));
        assert_eq!(Place { bit: 8, bits: 24 }.of(&bytes), Some(0x01_fff0));
        assert_eq!(Place { bit: 24, bits: 16 }.of(&bytes), None);
        assert_eq!(Place { bit: u32::MAX, bits: 64 }.of(&bytes), None);
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut bytes = bytes;
            if let Some(head) = bytes.get_mut(..2) { head.copy_from_slice(&MAGIC.to_le_bytes()); }
            if let Some(btf) = Btf::parse(&bytes) { btf.find(&[("a", "b")], "c"); }
            Btf { types: &bytes, strings: &bytes }.find(&[("a", "b")], "c");
            Btf { types: &bytes, strings: &bytes }.places(&[("a", "b"), ("", "")], "c");
        }
    }
}
